#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Packages, configure, make, all tests. The last line is "N passed, N failed, N skipped"; the exit code is 0 if none failed.
# BUILD=DIR builds elsewhere than in build/; JOBS=N; CONFIGURE="..." passes arguments to configure; GOLDEN=DIR: other records.
cd "$(dirname "$0")/.." || exit 1
top=$PWD
build=${BUILD:-build}
jobs=${JOBS:-$(nproc)}

finish() { # a step before the tests failed: that is one failure
    echo "tests/run.sh: $1"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
}

sh jobs/packages.sh || finish "packages are missing"
if [ ! -x configure ] || [ configure.ac -nt configure ] || [ m4/fdhpc.m4 -nt configure ]; then
    autoreconf -i || finish "autoreconf failed"
fi
mkdir -p "$build" && cd "$build" || finish "no folder $build"
if [ ! -f config.status ] || [ -n "$CONFIGURE" ]; then
    "$top/configure" -q $CONFIGURE || finish "configure failed"
fi
make -j"$jobs" || finish "make failed"

log=run.log
touch run.begin
make -k check ${GOLDEN:+GOLDEN="$GOLDEN"} 2>&1 | tee "$log"
status=${PIPESTATUS[0]}

# automake's totals, and those of tests that print a line "N passed, N failed, N skipped" of their own (rank 0)
read -r passed failed skipped < <(
    find . -name '*.log' -path '*tests/*' -newer run.begin -exec grep -hE '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' {} + |
        cat - <(grep -E '^# (PASS|FAIL|XPASS|ERROR|SKIP|XFAIL):' "$log") |
        awk '/passed,/ { p += $1; f += $3; s += $5 }
             $2 == "PASS:" { p += $3 } $2 == "XFAIL:" { p += $3 } $2 == "SKIP:" { s += $3 }
             $2 == "FAIL:" || $2 == "ERROR:" || $2 == "XPASS:" { f += $3 }
             END { print p + 0, f + 0, s + 0 }')
grep -q '^# TOTAL:' "$log" || failed=$((failed + 1)) # a test program that does not build
[ "$status" = 0 ] || [ "$failed" -gt 0 ] || failed=1
if [ "$failed" -gt 0 ]; then
    echo
    grep -E '^(FAIL|ERROR|XPASS):' "$log" | while read -r _ name _; do
        echo "--- $build/${name%.sh}.log"
        tail -n 30 "${name%.sh}.log"
    done
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
