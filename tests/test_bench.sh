#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# `fdhpc bench` does each piece of its work and writes what tests/device/table.py reads; what needs a GPU says so where there is none, and fails nothing.
case $top_builddir in /*) ;; *) top_builddir=$PWD/$top_builddir ;; esac
fdhpc=$top_builddir/fdhpc
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$top_srcdir" || exit 1
failed=0
fail() { echo "FAIL $*"; failed=1; }

run() { # name, what
    "$fdhpc" bench input/demo.cfg --what "$2" --steps 1 --times 2 --least_tokens 5 --most_tokens 20 --set trainer.backend=cpu --set data.batch_size=2 \
        --set gen.batch_size=2 --set gen.steps=2 --json "$work/$1.json" >"$work/$1.txt" 2>&1 || { fail "$1: $(tail -n 2 "$work/$1.txt")"; touch "$work/$1.json"; }
}
has() { # name, pattern of the text, keys of the file
    name=$1
    grep -Eq "$2" "$work/$name.txt" || fail "$name: no line with '$2'"
    shift 2
    for key; do grep -q "\"$key\":" "$work/$name.json" || fail "$name: no $key in the file"; done
}
run step step
has step 'images/s on 1 rank' images_per_s seconds_per_step median_seconds_per_step phase_seconds_per_step clocked_steps planned_bytes tokens_per_image ops
grep -q '"sample"' "$work/step.json" && fail "step: there is a sample"
run rest sample,vae
has rest '^sampling, 2 steps with guidance 4: [0-9.]+ images/s in batches of 2' sample encode decode matmul_flop_per_s
has rest '^VAE encode: [0-9.]+ images/s' encode
has rest '^VAE decode: [0-9.]+ images/s' decode
grep -q '"images_per_s": 0.0' "$work/rest.json" && fail "rest: a rate of 0"
grep -q '"seconds_per_step"' "$work/rest.json" && fail "rest: there is a step"
run all step,sample,vae # weights outlive the step
has all '^VAE decode: [0-9.]+ images/s' seconds_per_step sample encode decode

bash tests/device/check.sh --build "$top_builddir" --source . --work "$work/check" --parts golden >"$work/check.txt" 2>&1
status=$?
last=$(tail -n 1 "$work/check.txt")
case $status:$last in
77:"0 passed, 0 failed, 1 skipped") grep -Eq 'runs without a GPU|is not built' "$work/check.txt" || fail "check.sh: no reason" ;;
0:"2 passed, 0 failed, 0 skipped") ;;
*) fail "check.sh: exit $status, $last" ;;
esac
exit $failed
