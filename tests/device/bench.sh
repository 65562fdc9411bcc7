#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The production step (3B transformer, FLUX's VAE, Gemma-2B, 256 px, captions of 24 to 200 tokens), sampling and the VAE on one GPU: fdhpc beside
# PyTorch (bench_torch.py), in rounds that take turns; a table and the targets at the end. Random weights, no files, no network.
#
#   bench.sh --build DIR --source DIR [--work DIR] [--seconds N] [--batch N] [--rounds N] [--steps N] [--set KEY=VALUE]... [--torch "ARGUMENTS"]
#
#   --batch     pictures of a step (32); a quarter less, for both sides, until what `fdhpc plan` says fits the GPU's memory, and said so
#   --seconds   all of it ends by then; what no longer fits is named
#   --torch     further arguments of bench_torch.py, such as "--compile layers"; PYTHON: which Python (python3)
#
# Exit code 0: all targets are met; 1: a target is missed or a run failed; 77: nothing could be run.
set -u
export LC_ALL=C

here=$(cd "$(dirname "$0")" && pwd)
build=. source=.. work='' total=0 batch=32 rounds=2 steps=10 torch_more='' config=input/e2eflux.cfg trial='' more=()
usage() { sed -n '3,13s/^# \{0,1\}//p' "$0"; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    --build) build=$2 ;;
    --source) source=$2 ;;
    --work) work=$2 ;;
    --seconds) total=$2 ;;
    --batch) batch=$2 ;;
    --rounds) rounds=$2 ;;
    --steps) steps=$2 ;;
    --torch) torch_more=$2 ;;
    --config) config=$2 trial=trial ;; # other shapes than PyTorch's: to try this script where there is no GPU
    --set) more+=(--set "$2") ;;
    *) usage ;;
    esac
    shift 2 || usage
done
build=$(cd "$build" && pwd) && source=$(cd "$source" && pwd) || exit 2
if [ -z "$work" ]; then
    work=$(mktemp -d "${TMPDIR:-/tmp}/fdhpc-bench.XXXXXX") || exit 2
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work" && work=$(cd "$work" && pwd) || exit 2
rm -f "$work"/fdhpc-*.json "$work"/torch-*.json
cd "$source" || exit 2
fdhpc=$build/fdhpc python=${PYTHON:-python3} least=24 most=200
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TORCHINDUCTOR_FX_GRAPH_CACHE=1 # the second round compiles nothing again
export PYTORCH_ALLOC_CONF=expandable_segments:True # the step nearly fills 80 GB: no room for fragments
export RES_OPTIONS="timeout:1 attempts:1"

echo "date      $(date -u '+%Y-%m-%d %H:%M UTC')"
"$fdhpc" --version | sed '1s/^/program   /; 2,$s/^/          /'
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null | sed 's/^/GPU       /'

mkdir -p "$work/run" # timed products and compiled plans are kept there for the next round
keys=(--set trainer.backend="${BACKEND:-cuda}" --set trainer.checkpoint_dir="$work/run" --set data.max_prompt_length="$most" "${more[@]}")
planned() { "$fdhpc" plan "$config" "${keys[@]}" --set data.batch_size="$1" 2>&1; } # seconds on a GPU: it makes the libraries' plans
if ! plan=$(planned "$batch"); then
    echo "$plan"
    case $plan in *"is not built"*|*"runs without a GPU"*) exit 77 ;; *) exit 1 ;; esac
fi
parameters=$(sed -n 's/^DiT: \([0-9 ]*\) parameters.*/\1/p' <<< "$plan" | tr -d ' ')
[ -z "$trial" ] || parameters='' # other shapes
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1) # MiB
asked=$batch
while [ "$batch" -gt 1 ]; do
    need=$(awk '$1 == "sum" && $3 == "GB" { print $2; exit }' <<< "$plan")
    awk -v n="${need:-0}" -v m="${memory:-1000000}" 'BEGIN { exit !(n * 1e9 < 0.97 * m * 1048576) }' && break
    batch=$((batch * 3 / 4))
    plan=$(planned "$batch")
done
echo "plan      $need GB for a batch of $batch"
[ "$batch" = "$asked" ] || echo "batch $batch for both sides instead of $asked: $asked would need more memory than this GPU has"
keys+=(--set data.batch_size="$batch" --set gen.batch_size="$batch")

failed=0
try() { # name command...
    local name=$1 left=86400 began=$SECONDS status
    shift
    if [ "$total" != 0 ]; then # 8 s for the end; one command may not use up the time of all
        left=$((total - 8 - SECONDS))
        [ "$left" -le $((total * 45 / 100)) ] || left=$((total * 45 / 100))
    fi
    if [ "$left" -lt 10 ]; then
        echo "== $name: skipped, no time left of $total s"
        return
    fi
    echo
    echo "== $name"
    echo "\$ $*"
    timeout --kill-after=5 "$left" "$@" </dev/null &
    wait $!
    status=$?
    kill -KILL -- -$! 2>/dev/null # timeout leads its own process group: nothing of it may keep the GPU's memory, or go.sh's pipe
    echo "== $name: exit code $status after $((SECONDS - began)) s"
    case $status in 0|77) ;; 124|137) echo "== $name: stopped after $left s of $total" ;; *) failed=1 ;; esac
}
ours() { # number, what
    try "fdhpc, round $1, $2" "$fdhpc" bench "$config" "${keys[@]}" --what "$2" --steps "$steps" --least_tokens $least --most_tokens $most \
        --json "$work/fdhpc-$1-${2%%,*}.json"
}
theirs() { # number, what, --compile
    # shellcheck disable=SC2086
    try "PyTorch, round $1, $2" "$python" "$here/bench_torch.py" --input input --compile "$3" --what "$2" --steps "$steps" --batch "$batch" --sample_batch "$batch" \
        --least_tokens $least --most_tokens $most ${parameters:+--dit_parameters "$parameters"} --json "$work/torch-$1-${2%%,*}.json" $torch_more
}
# The most important first. PyTorch's first round compiles a layer at a time, in a minute; the later ones whole models, which takes minutes and may be a
# little faster: the best counts.
for r in $(seq "$rounds"); do
    ours "$r" step
    theirs "$r" step "$([ "$r" = 1 ] && echo layers || echo whole)"
    [ "$r" != 1 ] || { ours 1 sample,vae; theirs 1 sample,vae layers; try "every op by itself" "$build/tests/device/bench_kernels"; }
done

echo
echo "== result: $config, batch $batch, captions of $least to $most tokens; PyTorch pads them to $most, fdhpc packs them"
"$python" "$here/table.py" "$work" "$batch" 256 ${trial:+"$trial"}
status=$?
[ "$status" != 0 ] || status=$failed
exit $status
