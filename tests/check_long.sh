#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# make check-long: the demo at full length. 3000 steps with each of two seeds, 400 prompts (half of them pairs of colour and shape that
# training never showed), held to the judge's minimum; and a run on shuffled captions, which must fail it.
# About 25 minutes on two free cores. The figures go to check-long.txt too.
build=${top_builddir:-.} source=${top_srcdir:-..}
fdhpc=$PWD/$build/fdhpc judge=$PWD/$build/tests/judge
source=$(cd "$source" && pwd)
work=${TMPDIR:-/tmp}/fdhpc-check-long.$$
steps=${STEPS:-3000} ranks=${RANKS:-2}
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=1
mkdir -p "$work" && cd "$work" || exit 1
trap 'rm -rf "$work"' EXIT
ln -s "$source/input" input
passed=0 failed=0

# run NAME SEED FLAGS-OF-DEMO...: train, sample, judge; the judge's exit code
run() {
    local name=$1 seed=$2 status
    shift 2
    "$fdhpc" demo "$name/data" --samples 8000 --prompts 400 --seed "$seed" "$@" 2>/dev/null || return 3
    # an absolute data path: the configuration's own is relative
    mpirun -n "$ranks" --bind-to none "$fdhpc" input/demo.cfg --set trainer.max_steps="$steps" --set trainer.seed="$seed" \
        --set trainer.checkpoint_dir="$work/$name" --set trainer.sampling_steps=0 --set trainer.logging_steps=500 \
        --set data.data_path="$work/$name/data/shapes-{000000..000007}.tar" 2>"$name.log" || { tail -5 "$name.log"; return 3; }
    mpirun -n "$ranks" --bind-to none "$fdhpc" sample input/demo.cfg --checkpoint "$work/$name" --prompts "$name/data/prompts.json" -o "$name/judged" \
        2>>"$name.log" || { tail -5 "$name.log"; return 3; }
    echo "== $name: $steps steps, seed $seed"
    "$judge" "$name/judged" "$name/data/prompts.json" --min background=95,colour=80,place=95,size=85,shape=60
}

for seed in 1 2; do
    mkdir -p "seed-$seed"
    if run "seed-$seed" $seed; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
done
mkdir -p shuffled
run shuffled 3 --shuffle_captions
if [ $? = 1 ]; then
    passed=$((passed + 1))
else
    echo "shuffled captions: the judge should have failed these pictures"
    failed=$((failed + 1))
fi
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
