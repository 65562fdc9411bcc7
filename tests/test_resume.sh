#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# test_resume.sh - real runs that are stopped, killed, starved of disk and damaged, and then go on. Exit 77 skips.
# A run "stopped at 10 and resumed" must equal the one that was not: whole files are compared, so that weights, moments, average,
# counters and the configuration all count.
[ -n "$MPIRUN" ] || { echo "no mpirun"; exit 77; }
top=$(cd "${top_srcdir:-$(dirname "$0")/..}" && pwd)
fdhpc=$(cd "${top_builddir:-.}" && pwd)/fdhpc
if [ "$(id -u)" = 0 ]; then
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_ALLOW_RUN_AS_ROOT OMPI_ALLOW_RUN_AS_ROOT_CONFIRM
fi
OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=1
export OMPI_MCA_rmaps_base_oversubscribe OMPI_MCA_btl_vader_single_copy_mechanism OMP_NUM_THREADS
tmp=$(mktemp -d "${TMPDIR:-/tmp}/fdhpc-resume-XXXXXX") || exit 1
failed=0 mounted=
trap '[ -z "$mounted" ] || umount "$mounted"; [ $failed != 0 ] || rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

passed=0 skipped=0
ok() { echo "ok - $1"; passed=$((passed + 1)); }
not_ok() { echo "NOT OK - $1"; failed=$((failed + 1)); }
check() { # check TEXT COMMAND...
    text=$1; shift
    if "$@"; then ok "$text"; else not_ok "$text"; fi
}
says() { grep -q -- "$2" "$1" || { echo "in $1 there is no: $2"; tail -5 "$1"; return 1; }; }

# run NAME RANKS [--set ...]: in the folder NAME, so that all runs have the same configuration text; its code in $rc
run() {
    name=$1 ranks=$2; shift 2
    mkdir -p "$tmp/$name"
    (cd "$tmp/$name" && exec "$MPIRUN" -n "$ranks" "$fdhpc" ../small.cfg "$@") >"$tmp/$name.out" 2>&1
    rc=$?
}
equals() { [ "$rc" = "$1" ] || { echo "exit code $rc, expected $1"; tail -5 "$tmp/$name.out"; return 1; }; }
losses() { awk -F, 'NR > 1 { print $1, $2 }' "$tmp/$1/run/metrics.csv"; }
# close_to A B: the losses of two runs agree to 1e-5
close_to() {
    losses "$1" >"$tmp/a"; losses "$2" >"$tmp/b"
    [ "$(wc -l <"$tmp/a")" = 20 ] || { echo "20 losses expected"; return 1; }
    paste -d' ' "$tmp/a" "$tmp/b" | awk '{ d = $2 - $4; if (d < 0) d = -d; if ($1 != $3 || d > 1e-5 * $2 || $2 == "") { print; bad = 1 } } END { exit bad }'
}

"$fdhpc" demo "$tmp/tars" --samples 200 --seed 3 >"$tmp/demo.out" 2>&1 || { cat "$tmp/demo.out"; exit 1; }
cat >"$tmp/small.cfg" <<EOF
extends = "$top/input/demo.cfg";
trainer = {
  checkpoint_dir = "run"; max_steps = 20; checkpointing_steps = 10; sampling_steps = 0; logging_steps = 1;
  mixed_precision = "no";
};
model = {
  base = "$top/input/demo/text_encoder";
  dit_num_hidden_layers = 2;
  base_config_override = { hidden_size = 64; intermediate_size = 128; num_attention_heads = 4; num_key_value_heads = 2; head_dim = 16; };
};
vae = { pretrained_model_name_or_path = "$top/input/demo/vae"; };
lr_scheduler = { name = "constant_with_warmup"; num_warmup_steps = 5; };
data = { batch_size = 6; tokenizer = "$top/input/demo/tokenizer"; data_path = "$(echo "$tmp"/tars/*.tar | sed 's/ /::/g')"; };
EOF

# -- stopped and resumed ------------------------------------------------------------------------------------------------
run whole 2
check "20 steps on 2 ranks" equals 0
run again 2
check "20 steps again" equals 0
check "two runs on 2 ranks are the same to the bit" cmp "$tmp/whole/run/checkpoints/step-20.h5" "$tmp/again/run/checkpoints/step-20.h5"
run half 2 --set trainer.max_steps=10
check "10 steps on 2 ranks" equals 0
cp -r "$tmp/half" "$tmp/other"
run half 2
check "resumed from latest" equals 0
check "it says so" says "$tmp/half.out" "resumed from .*step-10.h5"
check "stopped at 10 and resumed equals 20 steps to the bit" cmp "$tmp/whole/run/checkpoints/step-20.h5" "$tmp/half/run/checkpoints/step-20.h5"
check "and so do its losses" eval '[ "$(losses whole)" = "$(losses half)" ]'
run other 3 --set data.batch_size=4
check "resumed on 3 ranks" equals 0
check "on another number of ranks it equals 20 steps to 1e-5" close_to whole other
run one 1 --set data.batch_size=12
check "20 steps on 1 rank" equals 0
check "1 and 2 ranks agree to 1e-5" close_to whole one

# -- killed while a checkpoint is written ----------------------------------------------------------------------------------
for point in layout data sums verified renamed; do
    mkdir -p "$tmp/killed"; rm -rf "$tmp/killed/run"
    FDHPC_TEST_KILL_CHECKPOINT=20:$point; export FDHPC_TEST_KILL_CHECKPOINT
    run killed 2
    unset FDHPC_TEST_KILL_CHECKPOINT
    check "killed at $point: an error" eval '[ $rc != 0 ]'
    run killed 2
    check "killed at $point: goes on" equals 0
    check "killed at $point: from the one before" says "$tmp/killed.out" "resumed from .*step-10.h5"
    check "killed at $point: nothing is lost" cmp "$tmp/whole/run/checkpoints/step-20.h5" "$tmp/killed/run/checkpoints/step-20.h5"
done

# -- damaged ---------------------------------------------------------------------------------------------------------------
file=$tmp/half/run/checkpoints/step-20.h5
size=$(wc -c <"$file")
cp "$file" "$tmp/good.h5"
# a byte in the last array of the file (it ends with data, behind all names)
byte=$(tail -c 3000 "$file" | head -c 1 | od -An -tu1 | tr -d ' ')
printf "\\$(printf %o $(((byte + 1) % 256)))" | dd of="$file" bs=1 seek=$((size - 3000)) conv=notrunc 2>/dev/null
run half 2 --set trainer.max_steps=30
check "corrupted: exit code 4" equals 4
check "corrupted: file and data set" says "$tmp/half.out" "step-20.h5: data set /.* is corrupted"
head -c $((size / 2)) "$tmp/good.h5" >"$file"
run half 2 --set trainer.max_steps=30
check "cut off: exit code 4" equals 4
check "cut off: file and data set" says "$tmp/half.out" "step-20.h5: cut off: .* data set that is not whole is /"
run half 2 --set trainer.max_steps=12 --set trainer.resume_from=10
check "an earlier step still loads" equals 0
run half 2 --set trainer.max_steps=30 --set trainer.resume_from=15
check "a step that is not there: exit code 3" equals 3
check "a step that is not there: says which are" says "$tmp/half.out" "there are 10 12 20"
cp "$tmp/good.h5" "$file"; echo step-20.h5 >"$tmp/half/run/checkpoints/latest"
run half 2 --set trainer.max_steps=30 --set model.dit_num_hidden_layers=3
check "another model: exit code 4" equals 4
check "another model: names what is missing" says "$tmp/half.out" "data set /model/layers.2.* is missing"

# -- full disk -------------------------------------------------------------------------------------------------------------
mkdir -p "$tmp/full/run"
half=$((size * 3 / 2 / 1024 + 1024)) # room for one checkpoint and what else a run writes
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=${half}k none "$tmp/full/run" 2>/dev/null; then
    mounted=$tmp/full/run
    run full 2
    check "full disk: exit code 3" equals 3
    check "full disk: says how much is missing" says "$tmp/full.out" "no room for a checkpoint of .* GB (.* GB are free)"
    check "full disk: nothing half-written is left" eval '[ -z "$(find "$mounted" -name "*.part")" ]'
    mkdir -p "$tmp/roomy/run" && cp -r "$mounted/checkpoints" "$tmp/roomy/run/"
    run roomy 2
    check "full disk: the checkpoint before loads" says "$tmp/roomy.out" "resumed from .*step-10.h5"
    check "full disk: and goes on as if nothing had been" cmp "$tmp/whole/run/checkpoints/step-20.h5" "$tmp/roomy/run/checkpoints/step-20.h5"
    umount "$mounted"; mounted=
else
    skipped=1; echo "skipped - full disk on a tmpfs: only root can mount one here"
fi

# -- asked to stop -----------------------------------------------------------------------------------------------------------
mkdir -p "$tmp/asked"
(cd "$tmp/asked" && exec "$MPIRUN" -n 2 "$fdhpc" ../small.cfg --set trainer.max_steps=1000000 --set trainer.checkpointing_steps=0) >"$tmp/asked.out" 2>&1 &
pid=$!
until [ -s "$tmp/asked/run/metrics.csv" ] && [ "$(wc -l <"$tmp/asked/run/metrics.csv")" -ge 4 ]; do
    kill -0 $pid 2>/dev/null || break
    sleep 0.2
done
kill -USR1 $pid
wait $pid; rc=$?
name=asked
check "SIGUSR1: exit code 0" equals 0
check "SIGUSR1: a checkpoint" [ -s "$tmp/asked/run/checkpoints/latest" ]

# -- a rank that stands still --------------------------------------------------------------------------------------------------
mkdir -p "$tmp/still"
(cd "$tmp/still" && exec "$MPIRUN" -n 2 "$fdhpc" ../small.cfg --set trainer.max_steps=1000000 --set trainer.checkpointing_steps=0 --set trainer.watchdog_minutes=0.2) >"$tmp/still.out" 2>&1 &
pid=$!
until [ -s "$tmp/still/run/metrics.csv" ] && [ "$(wc -l <"$tmp/still/run/metrics.csv")" -ge 4 ]; do
    kill -0 $pid 2>/dev/null || break
    sleep 0.2
done
for child in $(cat /proc/$pid/task/$pid/children); do
    if tr '\0' '\n' <"/proc/$child/environ" | grep -q '^OMPI_COMM_WORLD_RANK=1$'; then kill -STOP "$child"; fi
done
wait $pid; rc=$?
name=still
check "watchdog: exit code 9" equals 9
check "watchdog: names the rank, the step and the phase" says "$tmp/still.out" "rank 1 on .*: step [0-9]*, phase .*: does not answer (look here first)"

[ $failed = 0 ] || echo "files are kept in $tmp"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
