// SPDX-License-Identifier: Apache-2.0
// The optimiser's state: master weights, Adam moments and moving average (EMA), each one flat f32 buffer over this rank's
// shard of the flat parameter space, and the ops that update them.
// Invariant: the compute weights of the table are the master weights rounded, except between fd_optim_use_ema(true) and (false).
#ifndef FD_TRAIN_OPTIM_H
#define FD_TRAIN_OPTIM_H

#include "io/checkpoint.h"
#include "model/model.h"

struct fd_optim_config {
  int64_t zero_stage; /* 0; the others are FD_ERR_UNSUPPORTED until built */
  double beta1, beta2, eps, weight_decay;
  double max_norm; /* of the gradient; <= 0: no clipping */
  bool ema;        /* keep a moving average */
  bool keep_g;     /* gradients are overwritten by the next step: nobody clears them */
  fd_dtype compute; /* type of the flat compute weights */
};

typedef struct fd_optim fd_optim;

/** For a trainable table that is laid out; ctx and params are borrowed. Allocates no device memory. Local. */
fd_status fd_optim_create(fd_ctx *ctx, fd_params *params, const struct fd_optim_config *config, fd_optim **out);
void fd_optim_destroy(fd_optim **o);
/** Bytes per rank. Any output may be NULL. */
void fd_optim_bytes(const fd_optim *o, size_t *master, size_t *moments, size_t *ema);

/** Append norm, clip and AdamW; the gradient is summed over ranks already. control: f32 [FD_CONTROL_COUNT]. Once. */
void fd_optim_build(fd_optim *o, fd_graph *g, fd_var control);
/** Device memory, all zero; the table's memory exists. Then bind the values of the graph that was planned. */
fd_status fd_optim_alloc(fd_optim *o);
void fd_optim_bind(fd_optim *o, fd_graph *g);

/** A fd_model_set (model/model.h) with user = the fd_optim: a row's value goes into the master weights and the EMA, a buffer's
 *  into the table. For fd_model_init and fd_model_load; then fd_optim_publish. Moments stay as they are (0 at first). */
fd_status fd_optim_fill(void *optim, fd_params *params, int row, const float *values);
/** Compute weights from the master weights, after those were filled from outside (through fd_optim_set or a checkpoint). */
fd_status fd_optim_publish(fd_optim *o);
/** Compute weights from the EMA (true; without one the master weights), or from the master weights again (false). */
fd_status fd_optim_use_ema(fd_optim *o, bool ema);

enum fd_optim_part { FD_OPTIM_MASTER = 0, FD_OPTIM_EXP_AVG, FD_OPTIM_EXP_AVG_SQ, FD_OPTIM_EMA, FD_OPTIM_PARTS };
/** One row of the table (not a buffer) from or to host memory; the row must lie in this rank's shard. */
fd_status fd_optim_set(fd_optim *o, enum fd_optim_part part, int row, const float *host);
fd_status fd_optim_get(const fd_optim *o, enum fd_optim_part part, int row, float *host);

/** The families of a checkpoint: model, optimizer/exp_avg, optimizer/exp_avg_sq and, with an average, ema; returns their number.
 *  reading: copies go into the state. Valid as long as o is. */
int fd_optim_families(fd_optim *o, bool reading, struct fd_checkpoint_family families[FD_OPTIM_PARTS]);
/** Rows as the checkpoint wants them (fd_params_count of them); values of buffers are copied to host. The caller frees with
 *  fd_optim_free_rows. */
fd_status fd_optim_rows(const fd_params *params, struct fd_checkpoint_row **rows);
void fd_optim_free_rows(const fd_params *params, struct fd_checkpoint_row **rows);

#endif
