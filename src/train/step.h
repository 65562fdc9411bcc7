// SPDX-License-Identifier: Apache-2.0
// One training step as two graphs: that of a micro-batch (pixels, token ids and noise to gradients in the flat buffer), run
// `accumulation` times, and that of the optimiser. verify, bench and plan build them as training does.
//
// Gradients are summed over ranks in buckets that are filled from the end of the flat space. Without accumulation a bucket's sum
// starts right after the op that writes its last gradient and runs beside the rest of backward; with accumulation all
// buckets start in the optimiser's graph, since only the last micro-batch may be followed by a sum. All ranks of a
// step then hold the same gradient, norm, loss and decision to skip, to the bit.
#ifndef FD_TRAIN_STEP_H
#define FD_TRAIN_STEP_H

#include "model/model.h"
#include "train/optim.h"

struct fd_step_config {
  fd_model *dit;          /* trainable; borrowed, as the other two */
  fd_model *text_encoder; /* frozen; NULL: text states are an input */
  fd_model *vae;          /* frozen; NULL: latents are an input */
  fd_dtype dtype;         /* activations and compute weights */
  int64_t batch;          /* samples of a micro-batch on this rank */
  int64_t accumulation;   /* micro-batches of a step */
  int64_t height, width;  /* pixels, or latents without a VAE */
  int64_t max_length;     /* text tokens of a sample */
  int text_index;         /* model.text_hidden_states_index */
  bool precondition;      /* trainer.precondition_outputs */
  bool checkpointing;     /* trainer.enable_gradient_checkpointing */
  bool given_noise;       /* noise is an input (verify); else it is drawn */
  struct fd_optim_config optim;
};

/** A micro-batch in host memory. What the configuration does not want is not read. Samples are in the order of the batch. */
struct fd_step_batch {
  const unsigned char *pixels; /* [B, height, width, 3] */
  const float *latents;        /* [B, H, W, C], without a VAE: normalised latents */
  const float *noise;          /* [B, H, W, C], with given_noise */
  const int32_t *ids;          /* packed: the tokens of sample 0, then those of sample 1, ... */
  const float *text;           /* [rows, Dt], packed in the same way, without a text encoder */
  const int32_t *lengths;      /* [B] tokens of each sample, 0 .. max_length */
  const float *sigma, *timestep, *weight; /* [B] */
  const int64_t *sample;       /* [B] global sample indices: keys of the noise */
  uint64_t seed;
};

/** What an update reads from the host. */
struct fd_step_rates {
  double lr;
  double ema_decay;   /* 1: the average does not move */
  int64_t update;     /* number of updates done before this one, 0, 1, ...: Adam's bias correction */
};

struct fd_step_result {
  double loss;      /* mean over the samples of all ranks and micro-batches */
  double grad_norm; /* before clipping */
  bool skipped;     /* loss or gradient not finite: nothing was changed */
};

enum fd_step_phase { FD_PHASE_VAE = 0, FD_PHASE_TEXT, FD_PHASE_FORWARD, FD_PHASE_BACKWARD, FD_PHASE_OPTIMIZER, FD_PHASE_COUNT };
extern const char *const fd_step_phase_name[FD_PHASE_COUNT];

/** Bytes per rank, by family. */
struct fd_step_bytes {
  size_t weights, gradients, master, moments, ema; /* of what is trained */
  size_t frozen;                                   /* VAE, text encoder, buffers */
  size_t activations;                              /* the arena */
  size_t copies;                                   /* reordered frozen weights that the backend keeps */
};

typedef struct fd_step fd_step;

/** Build, differentiate and plan; no device memory is allocated. The tables of the models are laid out. Local. */
fd_status fd_step_create(fd_ctx *ctx, const struct fd_step_config *config, fd_step **out);
void fd_step_destroy(fd_step **s);
void fd_step_bytes(const fd_step *s, struct fd_step_bytes *bytes);
/** FLOP of one micro-batch on one rank, by phase; FD_PHASE_COUNT: all. */
double fd_step_flop(const fd_step *s, enum fd_step_phase phase);
/** Buckets of the reduction, their elements in all. */
int fd_step_buckets(const fd_step *s, int64_t *elements);

/** Arena and state in device memory; the models' own memory exists (weights may still change). Local. */
fd_status fd_step_alloc(fd_step *s);
fd_optim *fd_step_optim(fd_step *s); /* borrowed */
/** The graphs, for bench: that of a micro-batch, that of the optimiser. */
fd_graph *fd_step_graph(fd_step *s, bool optimizer);

/** Begin a step: what the optimiser will read. Then `accumulation` calls of micro, then update. */
fd_status fd_step_begin(fd_step *s, const struct fd_step_rates *rates);
fd_status fd_step_micro(fd_step *s, const struct fd_step_batch *batch);
fd_status fd_step_update(fd_step *s);
/** Waits for the step and tells how it went. Losses of the last micro-batch's samples: fd_step_losses. */
fd_status fd_step_result(fd_step *s, struct fd_step_result *result);
fd_status fd_step_losses(fd_step *s, float *losses);

/** Seconds in each phase since the last call, of steps whose result was asked for: the device's time, not that of issuing ops. */
void fd_step_take_seconds(fd_step *s, double seconds[FD_PHASE_COUNT]);

#endif
