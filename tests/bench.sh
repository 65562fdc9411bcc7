#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# make bench: how fast this build is on this machine. Single ops beside the library's own rate, the demo's step with the VAE on line, bench-mid, the
# data path. One core each, pinned. Keep the output as doc/measurements/<machine>.txt. Shared machines are noisy: the best run counts.
build=${top_builddir:-.} source=${top_srcdir:-..}
repeat=${REPEAT:-3}
fdhpc=$PWD/$build/fdhpc
tests=$PWD/$build/tests
cd "$source" || exit 1
one="taskset -c ${CORE:-0} env OMP_NUM_THREADS=1"

echo "$(date -u +%Y-%m-%d)  $("$fdhpc" --version | head -1)"
lscpu | grep -E '^Model name|^CPU\(s\)'
echo "load before: $(cut -d' ' -f1-3 /proc/loadavg)"

best() { # best COMMAND...: the run with most images/s out of $repeat
    local i out rate top=0 keep=
    for i in $(seq "$repeat"); do
        out=$("$@") || { echo "$out"; return 1; }
        rate=$(echo "$out" | awk '/images\/s on/ { print int($1 * 10); exit }')
        [ "${rate:-0}" -gt "$top" ] && top=$rate keep=$out
    done
    echo "$keep"
}

for type in no bf16; do
    echo
    echo "== demo step, VAE on line, batch 32, one core, mixed_precision $type (best of $repeat)"
    best $one "$fdhpc" bench input/demo.cfg --set trainer.mixed_precision=$type --set data.batch_size=32 --least_tokens 14 --most_tokens 20 --steps 20
done
echo
echo "== bench-mid, bf16, one core (best of $repeat)"
best $one "$fdhpc" bench input/bench-mid.cfg --set trainer.mixed_precision=bf16 --steps 3
echo
echo "== single ops"
$one "$tests/bench_kernels"
echo
echo "== data path: JPEG of 512 x 512 to tokens and pixels"
$one top_srcdir=. "$tests/bench_data"
