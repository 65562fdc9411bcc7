// SPDX-License-Identifier: Apache-2.0
// Where a model is on this machine. Nothing is ever downloaded.
#ifndef FD_BASE_MODELS_H
#define FD_BASE_MODELS_H

#include "base/options.h"
#include "base/status.h"

/** The folder of model `name` (and `subfolder` in it, "" for none). Looked for, in this order: a folder of that name; under
 *  paths.models; in the local Hugging Face hub cache ($HF_HUB_CACHE, $HF_HOME/hub, ~/.cache/huggingface/hub).
 *  key: the configuration key that names it, for the message. *folder: the caller frees it.
 *  FD_ERR_CONFIG if name is "", FD_ERR_IO if it is nowhere: the message gives the download command, and says so when the
 *  model's licence has to be accepted first. Local. */
fd_status fd_model_find(const struct fd_options *opt, const char *key, const char *name, const char *subfolder, char **folder);

/** The same, but the config.json of published models that comes with the program (input/models) will do: *shipped is then
 *  true, there are no weights, and the command must say so. For plan and bench. Local. */
fd_status fd_model_find_config(const struct fd_options *opt, const char *key, const char *name, const char *subfolder, char **folder,
                               bool *shipped);

/** The folder input/ that comes with the program: $FDHPC_INPUT, beside the program, or installed. FD_ERR_IO. The caller frees it. */
fd_status fd_models_input_folder(char **folder);

/** The two numbers of a published scheduler_config.json: num_train_timesteps (1000 if absent) and shift (1 if absent). What it asks
 *  for beyond these (dynamic shifting, Karras sigmas, a shifted terminal, ...) is FD_ERR_UNSUPPORTED by name. FD_ERR_IO, FD_ERR_FORMAT. Local. */
fd_status fd_noise_schedule_read(const char *path, int64_t *num_train_timesteps, double *shift);

/** Fill noise_scheduler.num_train_timesteps and .shift where they are 0, as options.def says. *from: NULL if they were not,
 *  else where they are from, which the caller frees. FD_ERR_FORMAT if the file has none. */
fd_status fd_models_noise_scheduler(struct fd_options *opt, char **from);

#endif
