#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh Debian 12 to pictures: packages, build, demo data, training on 2 ranks, sampling, judging. About ten minutes on
# two free cores. Run it again and it goes on where it stopped; RANKS=N and STEPS=N change the training, FRESH=1 starts it anew.
cd "$(dirname "$0")/.." || exit 1
ranks=${RANKS:-2}
steps=${STEPS:-1500}
config=input/demo.cfg
run=output/demo
started=$SECONDS

names=(packages build data training "sampling and judging")
budgets=(60 90 15 390 45)
taken=()
phase_start=$SECONDS

phase_done() {
    taken+=($((SECONDS - phase_start)))
    phase_start=$SECONDS
}

table() {
    echo
    printf '%-22s %9s %9s\n' phase "budget s" "taken s"
    local i
    for i in "${!taken[@]}"; do
        printf '%-22s %9d %9d%s\n' "${names[i]}" "${budgets[i]}" "${taken[i]}" "$([ "${taken[i]}" -gt "${budgets[i]}" ] && echo "   over budget")"
    done
    printf '%-22s %9d %9d\n' all 600 $((SECONDS - started))
}

stop() {
    echo "quickstart: $1" >&2
    phase_done
    table
    exit 1
}

# a rank's threads: its share of the cores this script may use
cores=$(nproc)
threads=$((cores / ranks > 0 ? cores / ranks : 1))
launch=(mpirun -n "$ranks" --bind-to none -x OMP_NUM_THREADS="$threads")
[ "$ranks" -gt "$cores" ] && launch+=(--oversubscribe)
if [ "$(id -u)" = 0 ]; then # OpenMPI asks root twice
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# MPI looks its host's name up; without it in /etc/hosts that would wait 5 s for a name server at each start
export RES_OPTIONS="timeout:1 attempts:1"

sh jobs/packages.sh || stop "packages are missing"
phase_done

[ -x configure ] || autoreconf -i || stop "autoreconf failed"
mkdir -p build
(
    cd build || exit 1
    [ -f config.status ] || ../configure -q || exit 1
    make -s -j"$cores" fdhpc tests/judge
) || stop "the build failed"
fdhpc=build/fdhpc
phase_done

[ -f data/demo/prompts.json ] || { mkdir -p data && "${launch[@]}" "$fdhpc" demo data/demo --samples 8000 --seed 1; } || stop "no demo data"
phase_done

# Says at step 50 whether the budget will hold, from the images/s of metrics.csv.
watch_speed() {
    local batch=$1 need=$2 row rate
    while sleep 2; do
        row=$(awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i } NR > 1 && $c["step"] >= 50 { print $c["images_per_s"]; exit }' \
            "$run/metrics.csv" 2>/dev/null)
        [ -n "$row" ] && break
    done
    rate=${row%.*}
    awk -v rate="$row" -v images=$((steps * batch)) -v need="$need" 'BEGIN {
        seconds = rate > 0 ? images / rate : 0
        if (rate <= 0 || seconds > need)
            printf "quickstart: %.0f images/s at step 50: %.0f s for the training, %.0f s over its budget of %d s\n", rate, seconds, seconds - need, need
        else
            printf "quickstart: %.0f images/s at step 50: %.0f s for the training, within its budget of %d s\n", rate, seconds, need
    }'
}
[ -n "$FRESH" ] && rm -rf "$run"
batch=$((32 / ranks > 0 ? 32 / ranks : 1))
watch_speed $((batch * ranks)) "${budgets[3]}" &
watcher=$!
"${launch[@]}" "$fdhpc" train $config --set trainer.max_steps="$steps" --set data.batch_size="$batch"
status=$?
kill "$watcher" 2>/dev/null
[ $status = 0 ] || stop "training ended with exit code $status"
phase_done

pictures=$run/judged
"${launch[@]}" "$fdhpc" sample $config --prompts data/demo/prompts.json --num_samples 200 -o $pictures || stop "sampling failed"
echo
build/tests/judge $pictures data/demo/prompts.json --min background=90,colour=60,place=90
status=$?
phase_done
table
echo
if [ $status = 0 ]; then
    echo "The pictures follow their prompts. Open $pictures/sheet.png"
    echo "Next, a prompt of your own:"
    echo "  $fdhpc sample $config --prompt \"a large green star on a purple background, center\" -o output/mine"
else
    echo "quickstart: the pictures are below the judge's minimum. Look at $pictures/sheet.png and $run/metrics.csv"
    echo "Next, more steps: STEPS=3000 bash jobs/quickstart.sh"
fi
exit $status
