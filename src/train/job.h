// SPDX-License-Identifier: Apache-2.0
// A training run: parts from options, the step loop, the run folder.
//
//   DIR = trainer.checkpoint_dir:  used.cfg  metrics.csv  log.txt  checkpoints/step-N.h5  samples/step-N/
//
// Order within a step: micro-batches -> clip, AdamW, EMA -> log -> sample (with the EMA) -> checkpoint. The original samples before
// it updates the EMA, with the raw weights; doc/parity.md says why this differs.
#ifndef FD_TRAIN_JOB_H
#define FD_TRAIN_JOB_H

#include "base/config.h"
#include "eval/sampler.h"
#include "io/tokenizer.h"
#include "train/density.h"
#include "train/lr.h"
#include "train/step.h"

/** The models and schedules of a configuration. Owned by whoever opened it. */
struct fd_parts {
  const struct fd_options *opt; /* borrowed */
  char *text_dir, *vae_dir, *tokenizer_dir; /* folders */
  bool shipped; /* a configuration comes from input/models: there are no weights */
  fd_model *dit, *text_encoder, *vae; /* declared, not laid out */
  fd_tokenizer *tokenizer;
  fd_prompt *prompt;
  fd_scheduler *scheduler;
  struct fd_density density;
  enum fd_lr_kind lr;
  fd_dtype dtype;
};

enum {
  FD_PARTS_CONFIG_ONLY = 1u /* config.json is enough (plan, bench): no tokenizer, and configurations in input/models will do */
};

/** Open what the options name; says what is missing and how to get it. Reads configurations, no weights. Local. */
fd_status fd_parts_open(const struct fd_options *opt, unsigned flags, struct fd_parts *out);
void fd_parts_close(struct fd_parts *p);
/** The step's configuration; max_length: text tokens of a sample (fd_prompt_length of p->prompt when training). */
void fd_parts_step(const struct fd_parts *p, int64_t max_length, struct fd_step_config *out);
/** Table layouts for this many ranks: the DiT is trainable, the others are frozen. Before fd_step_create. */
fd_status fd_parts_layout(struct fd_parts *p, int ranks);
/** Device memory of the three tables, then the published weights of VAE and text encoder. Collective. */
fd_status fd_parts_load(struct fd_parts *p, fd_ctx *ctx, fd_comm *comm);
/** The same without the DiT's. Collective. */
fd_status fd_parts_load_frozen(struct fd_parts *p, fd_ctx *ctx, fd_comm *comm);

/** A context on the backend that the options name. Collective. */
fd_status fd_parts_context(const struct fd_options *opt, fd_comm *comm, fd_ctx **out);
/** The sampler that the `gen` group describes, for at most `pictures` at a time. The tables have memory. Local. */
fd_status fd_parts_sampler(const struct fd_parts *p, fd_ctx *ctx, int64_t pictures, fd_sampler **out);

/** Hashes of the frozen weights' files, for the checkpoint. Collective. */
fd_status fd_parts_hash(const struct fd_parts *p, fd_comm *comm, char vae[17], char text[17]);

/** Rate of a large matrix product on this rank, FLOP per second: what a step's rate is compared with. */
fd_status fd_matmul_peak(fd_ctx *ctx, fd_dtype dtype, double *flop_per_s);

/** Train until trainer.max_steps, or until told to stop by a signal. Collective. */
fd_status fd_train_run(const fd_config *config, fd_comm *comm);

#endif
