// SPDX-License-Identifier: Apache-2.0
// `fdhpc train CONFIG`, and `fdhpc CONFIG`: the training run.
#include "cmd/cmd.h"
#include "train/job.h"

static fd_status run_train(struct fd_run *run) { return fd_train_run(run->config, run->comm); }

const struct fd_command fd_cmd_train = {
    .name = "train",
    .args = "CONFIG",
    .help = "train a diffusion transformer",
    .takes_config = true,
    .groups = NULL,
    .more = "`fdhpc CONFIG` is the same. Goes on from the newest checkpoint in trainer.checkpoint_dir unless trainer.resume_from says\n"
            "otherwise. SIGUSR1 writes a checkpoint at the end of the step and stops with exit code 0; SIGTERM does too, where the\n"
            "launcher gives the time.\n",
    .run = run_train,
};
