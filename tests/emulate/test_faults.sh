#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Faults that the emulated tests must catch. Each is planted into a copy of a real kernel by one edit; the op's test is linked with that copy
# and must fail with the words expected. Unchanged copies must pass. An edit that finds nothing to change fails: then mend it here.
[ -n "$EMULATED_TESTS" ] || { echo "not built: configure found no CUDA headers (cuda_bf16.h)"; exit 77; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
wrong() { failed=$((failed + 1)); echo "FAIL $1"; }

# build DIR KERNEL TEST: the copies in DIR/cuda stand before the real files
build() {
    $EMULATE_CXX -I"$1" $EMULATE_FLAGS -c -o "$1/kernel.o" "$1/cuda/$2.cu" 2>"$1/err" &&
        $EMULATE_LINK -o "$1/test" "tests/tests_emulate_test_$3-test_$3.o" "$1/kernel.o" $EMULATE_LIBS 2>>"$1/err" || { head -n 20 "$1/err"; return 1; }
}
run() { (timeout 60 "$1/test" >"$1/out" 2>&1; exit $?) 2>/dev/null; } # the shell need not say that it was aborted
# unchanged KERNEL TEST
unchanged() {
    d=$work/$1
    mkdir -p "$d/cuda" && cp "$top_srcdir/cuda/$1.cu" "$top_srcdir/cuda/device.cuh" "$d/cuda" || exit 1
    build "$d" "$1" "$2" || { wrong "$1.cu, unchanged: does not build"; return; }
    if run "$d"; then
        passed=$((passed + 1)); echo "ok   $1.cu, unchanged: $(tail -n 1 "$d/out")"
    else
        wrong "$1.cu, unchanged: $(head -c 400 "$d/out")"
    fi
}
# fault WHAT FILE 'EDIT' KERNEL TEST 'PATTERN': sed's EDIT changes one line of cuda/FILE; PATTERN is grep's (extended)
fault() {
    d=$work/fault
    rm -rf "$d" && mkdir -p "$d/cuda" && cp "$top_srcdir/cuda/$4.cu" "$top_srcdir/cuda/device.cuh" "$d/cuda" && chmod u+w "$d/cuda/$2" || exit 1
    sed -i "$3" "$d/cuda/$2"
    changed=$(diff "$top_srcdir/cuda/$2" "$d/cuda/$2" | grep -c '^<')
    [ "$changed" = 1 ] || { wrong "$1: the edit changes $changed lines of cuda/$2, not one: mend it"; return; }
    build "$d" "$4" "$5" || { wrong "$1: does not build"; return; }
    if run "$d"; then
        wrong "$1: not caught"
    elif grep -Eq -- "$6" "$d/out"; then
        passed=$((passed + 1)); echo "ok   $1: $(grep -E -m 1 -- "$6" "$d/out")"
    else
        wrong "$1: wanted '$6', found: $(head -c 400 "$d/out")"
    fi
}

# a lane that reads too early finds nothing there, or what another writes at the same time: the order of threads decides
early='read at .* (never written by this block|races with the write)'
fault 'a barrier removed behind a store to shared memory' device.cuh '/slots\[warp\] = v/{n;s/__syncthreads();//}' adamw adamw \
    "$early"
fault 'a barrier removed before shared memory is used again' device.cuh '/slots may still be read/s/__syncthreads();//' groupnorm groupnorm \
    'write at .* races with the read'
fault 'a store one past the end' elementwise.cu 's/i < (n); i += /i <= (n); i += /' elementwise simple 'outside every allocation'
fault 'half a warp summed' device.cuh '/float warp_sum(float v)/{n;s/i = 16/i = 8/}' rmsnorm rmsnorm 'expected .* times the tolerance'
fault 'a warp that does not wait for its lanes' heads.cu '/shared\[e\] = v\[i\];/{n;s/__syncwarp();//}' heads heads "$early"
fault 'scratch read that nobody wrote' colsum.cu 's/part\[chunk/if (chunk == 0) &/' colsum colsum 'never written'
for pair in 'adamw adamw' 'groupnorm groupnorm' 'elementwise simple' 'rmsnorm rmsnorm' 'heads heads' 'colsum colsum'; do
    unchanged $pair
done
echo "$passed passed, $failed failed, 0 skipped"
exit $((failed > 0))
