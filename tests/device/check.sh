#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Everything that is checked on a GPU, in parts; `make check-device` calls it in the build folder, there.sh in an unpacked pack.
#
#   check.sh --build DIR --source DIR [--work DIR] [--seconds N] [--parts LIST] [--list]
#
#   ops         every tests/device/test_<op>: the ops' tests on the CUDA backend
#   golden      all golden records on the CUDA backend, in fp32 and in bf16
#   ranks       20 steps of the demo in fp32: CPU backend, one rank on the GPU, two ranks on one GPU; losses within 1e-5
#   demo        the demo trained for 1500 steps on the GPU, its pictures measured by the judge
#   sanitizer   memcheck, racecheck and synccheck of compute-sanitizer over the ops' tests
#
# --seconds: all parts together take no longer; each part has its share, and what does not fit is named as skipped. Ends with a table and the line
# "N passed, N failed, N skipped". Exit code 0: nothing failed and something passed; 1: something failed; 77: nothing could be run.
set -u
export LC_ALL=C

build=. source=.. work='' total=0 parts=ops,golden,ranks,demo,sanitizer list=''
usage() { sed -n '3,17s/^# \{0,1\}//p' "$0"; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    --build) build=$2; shift 2 ;;
    --source) source=$2; shift 2 ;;
    --work) work=$2; shift 2 ;;
    --seconds) total=$2; shift 2 ;;
    --parts) parts=$2; shift 2 ;;
    --list) list=1; shift ;;
    *) usage ;;
    esac
done
for p in ${parts//,/ }; do
    case $p in ops|golden|ranks|demo|sanitizer) ;; *) usage ;; esac
done
build=$(cd "$build" && pwd) && source=$(cd "$source" && pwd) || exit 2
if [ -z "$work" ]; then
    work=$(mktemp -d "${TMPDIR:-/tmp}/fdhpc-check.XXXXXX") || exit 2
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work" && work=$(cd "$work" && pwd) || exit 2
fdhpc=$build/fdhpc judge=$build/tests/judge mpirun=${MPIRUN:-mpirun}
sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
[ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export RES_OPTIONS="timeout:1 attempts:1" # a host name that is not in /etc/hosts would be looked up at each start

# ---- results ---------------------------------------------------------------------------------------------------------

rows=() passed=0 failed=0 skipped=0
result() { # part name verdict seconds detail
    rows+=("$(printf '%-10s %-34s %-8s %6d  %s' "$1" "$2" "$3" "$4" "$5")")
    case $3 in passed) passed=$((passed + 1)) ;; failed) failed=$((failed + 1)) ;; *) skipped=$((skipped + 1)) ;; esac
    echo "== $1 $2: $3${5:+ ($5)}"
}
wanted() { case ",$parts," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

# A part's deadline: its share of what is left, by its weight among the parts that are still to come; without --seconds a day.
part_begin() { # name
    local weights=(ops 4 golden 4 ranks 2 demo 2 sanitizer 6) i own=0 sum=0
    echo
    echo "==== $1"
    part=$1
    part_end=$((SECONDS + 86400))
    [ "$total" != 0 ] || return 0
    for ((i = 0; i < ${#weights[@]}; i += 2)); do
        [ "${weights[i]}" != "$1" ] || own=${weights[i + 1]}
        if [ "$own" != 0 ] && wanted "${weights[i]}"; then sum=$((sum + weights[i + 1])); fi
    done
    part_end=$((SECONDS + (total - 8 - SECONDS) * own / sum)) # 8 s: a stopped command's end, the table
}
# attempt NAME LIMIT COMMAND...: its output is shown and kept in $work/out. Verdict by the exit code: 0, 77 (its last line says why), else failed;
# a command that its own limit ends failed, one that the part's deadline ends is skipped.
attempt() {
    local name=$1 limit=$2 status began=$SECONDS left=$((part_end - SECONDS)) why took
    shift 2
    if [ "$left" -lt 2 ]; then
        result "$part" "$name" skipped 0 "no time left of this part's share"
        return 2
    fi
    [ "$left" -gt "$limit" ] && left=$limit
    echo "\$ $*"
    # Into a file, not a pipe: what a stopped command leaves running would keep a pipe open, and with it all that follows.
    (cd "$source" && exec timeout --kill-after=5 "$left" "$@") </dev/null >"$work/out" 2>&1 &
    wait $!
    status=$?
    kill -KILL -- -$! 2>/dev/null # timeout leads its own process group
    cat "$work/out"
    why=$(tail -n 1 "$work/out")
    took=$((SECONDS - began))
    # 137 without having used up its time: killed by someone else, for memory say
    [ "$status" = 137 ] && [ "$took" -lt "$left" ] && status=9999
    case $status in
    0) result "$part" "$name" passed $((SECONDS - began)) "$why" ;;
    77) result "$part" "$name" skipped $((SECONDS - began)) "$why"; return 2 ;;
    124|137)
        if [ "$left" = "$limit" ]; then
            result "$part" "$name" failed $((SECONDS - began)) "not done after $limit s"
            return 1
        fi
        result "$part" "$name" skipped $((SECONDS - began)) "stopped after $left s, the end of this part's share"
        return 2 ;;
    9999) result "$part" "$name" failed $took "killed: $why"; return 1 ;;
    *) result "$part" "$name" failed $took "exit code $status: $why"; return 1 ;;
    esac
}

# ---- what there is ---------------------------------------------------------------------------------------------------

# Plans that cuDNN compiles are shared by all tests and their rounds.
export OT_CACHE=$work/cache
mkdir -p "$OT_CACHE"
tests=()
for t in "$build"/tests/device/test_*; do
    case $t in *.o|*.log|*.trs) ;; *) if [ -x "$t" ]; then tests+=("$t"); fi ;; esac
done
if [ -n "$list" ]; then
    printf '%s\n' "${tests[@]##*/}"
    exit 0
fi
echo "date      $(date -u '+%Y-%m-%d %H:%M UTC')"
"$fdhpc" --version | sed '1s/^/program   /; 2,$s/^/          /'
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | sed 's/^/GPU       /'
echo "sanitizer ${sanitizer:-none}"
echo "tests     ${#tests[@]}"

# Whether the backend can be used at all; its own words if not.
if ! gpu=$("$fdhpc" verify --backend cuda "$source/tests/golden/dit/self-ape" 2>&1); then
    case $gpu in
    *"is not built"*|*"runs without a GPU"*)
        why=$(echo "$gpu" | grep -m 1 -oE 'backend cuda is not built.*|cuda: .*runs without a GPU')
        for p in ${parts//,/ }; do result "$p" "all of it" skipped 0 "$why"; done ;;
    *) why= ;;
    esac
else why=
fi

# ---- parts -----------------------------------------------------------------------------------------------------------

if [ -z "$why" ] && wanted ops; then
    part_begin ops
    [ ${#tests[@]} -gt 0 ] || result ops "tests/device" failed 0 "no test is built"
    for t in "${tests[@]}"; do attempt "${t##*/}" 45 "$t"; done
fi

if [ -z "$why" ] && wanted golden; then
    part_begin golden
    attempt "all records, fp32" 300 "$fdhpc" verify --backend cuda --dtype f32 tests/golden
    attempt "all records, bf16" 300 "$fdhpc" verify --backend cuda --dtype bf16 tests/golden
fi

demo_data() {
    [ -f "$work/data/prompts.json" ] && return 0
    "$fdhpc" demo "$work/data" --samples 8000 --seed 1 >"$work/out" 2>&1 || { tail -n 3 "$work/out"; return 1; }
}
# Loss of each of the 20 steps, from metrics.csv.
losses() {
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i } NR > 1 { print $c["step"], $c["loss"] }' "$work/$1/metrics.csv"
}
train20() { # run folder, ranks, batch of a rank, backend
    rm -rf "${work:?}/$1"
    attempt "20 steps, $4, $2 rank$([ "$2" = 1 ] || echo s)" 180 "$mpirun" -n "$2" --oversubscribe --bind-to none "$fdhpc" train input/demo.cfg \
        --set trainer.backend="$4" --set trainer.share_gpu=true --set trainer.deterministic=true --set trainer.max_steps=20 \
        --set trainer.logging_steps=1 --set trainer.checkpointing_steps=0 --set trainer.sampling_steps=0 --set optimizer.eps=1e-4 \
        --set trainer.checkpoint_dir="$work/$1" --set "data.data_path=$work/data/shapes-{000000..000007}.tar" --set data.batch_size="$3"
}
compare_losses() { # name, run, reference
    local worst
    worst=$(join <(losses "$2" | sort) <(losses "$3" | sort) |
        awk '{ d = $2 - $3; if (d < 0) d = -d; r = $3 < 0 ? -$3 : $3; e = r > 0 ? d / r : d; if (!(e <= w)) { w = e; at = $1 } n++ }
             BEGIN { at = 1 } END { if (n == 20) printf "%.2e at step %s", w, at; else printf "nan: %d steps of 20", n }')
    if awk -v w="${worst%% *}" 'BEGIN { exit !(w != "nan:" && w + 0 <= 1e-5) }'; then result ranks "$1" passed 0 "largest difference $worst"
    else result ranks "$1" failed 0 "largest difference $worst, allowed 1e-5"
    fi
}
if [ -z "$why" ] && wanted ranks; then
    part_begin ranks
    if ! demo_data; then result ranks "data of the demo" failed 0 "$(tail -n 1 "$work/out")"
    else # eps 1e-4: with 1e-8 Adam's first step is the gradient's sign, which rounding decides where it is nearly 0
        train20 cpu 1 32 cpu; a=$?
        train20 one 1 32 cuda; b=$?
        train20 two 2 16 cuda; c=$?
        if [ $a = 0 ] && [ $b = 0 ]; then compare_losses "losses: GPU and CPU" one cpu
        else result ranks "losses: GPU and CPU" skipped 0 "a run is missing"; fi
        if [ $b = 0 ] && [ $c = 0 ]; then compare_losses "losses: two ranks and one" two one
        else result ranks "losses: two ranks and one" skipped 0 "a run is missing"; fi
    fi
fi

if [ -z "$why" ] && wanted demo; then
    part_begin demo
    if ! demo_data; then result demo "data of the demo" failed 0 "$(tail -n 1 "$work/out")"
    else
        keys=(--set trainer.backend=cuda --set trainer.checkpoint_dir="$work/demo" --set "data.data_path=$work/data/shapes-{000000..000007}.tar"
            --set data.batch_size=32)
        rm -rf "$work/demo"
        if ! attempt "1500 steps" 600 "$fdhpc" train input/demo.cfg --set trainer.max_steps=1500 "${keys[@]}"; then
            result demo "200 pictures" skipped 0 "the training was not done"
            result demo judge skipped 0 "the training was not done"
        elif ! attempt "200 pictures" 300 "$fdhpc" sample input/demo.cfg --prompts "$work/data/prompts.json" --num_samples 200 \
            -o "$work/demo/judged" "${keys[@]}"; then
            result demo judge skipped 0 "there are no pictures"
        else
            attempt judge 60 "$judge" "$work/demo/judged" "$work/data/prompts.json" --min background=90,colour=60,place=90
        fi
    fi
fi

if [ -z "$why" ] && wanted sanitizer; then
    part_begin sanitizer
    for tool in memcheck racecheck synccheck; do
        if [ -z "$sanitizer" ]; then
            result sanitizer "$tool" skipped 0 "no compute-sanitizer on PATH or in CUDA_HOME/bin"
            continue
        fi
        # OT_EXACT: no room around a tensor, so that the tool sees each step over an edge
        for t in "${tests[@]}"; do
            attempt "$tool ${t##*/}" 900 env OT_EXACT=1 "$sanitizer" --tool $tool --error-exitcode 9 "$t"
        done
    done
fi

# ---- the end ---------------------------------------------------------------------------------------------------------

echo
printf '%-10s %-34s %-8s %6s  %s\n' part what verdict s detail
printf '%s\n' "${rows[@]}"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] || exit 1
[ "$passed" -gt 0 ] || exit 77
