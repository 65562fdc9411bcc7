#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Template: sbatch jobs/slurm.sh CONFIG [--set KEY=VALUE]...
# One task per GPU, or per share of a CPU. 120 s before the time limit the ranks get SIGUSR1: they write a checkpoint at the next
# step and end with exit code 0; the job is then put back into the queue and goes on from that checkpoint.
#SBATCH --job-name=fdhpc
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
##SBATCH --gpus-per-task=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fdhpc-%j.log
[ $# -ge 1 ] || { echo "usage: sbatch jobs/slurm.sh CONFIG [--set KEY=VALUE]..."; exit 2; }
fdhpc=${FDHPC:-build/fdhpc}

limit_near=
on_limit() {
    limit_near=1
    kill -USR1 "$step" # srun passes it on to all tasks
}
trap on_limit USR1

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "$fdhpc" train "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # the trap ended the first wait
    wait "$step"
    status=$?
done
if [ -n "$limit_near" ] && [ $status = 0 ]; then
    echo "time limit near: checkpoint written, job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
