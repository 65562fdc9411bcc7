// SPDX-License-Identifier: Apache-2.0
// Batches for training, decoded ahead of the step by threads.
//
// Invariants: what position p of a run sees depends on (seed, p, the data set) only, never on ranks, threads or where the run
// was resumed. p = (step * micros + micro) * global_batch + position in the micro-batch: the global sample index of all random numbers.
// Epoch p / n is a keyed permutation of all n samples, each once. A bad sample is replaced by permutation index
// hash(seed, epoch, p, attempt); noise, caption dropping and cropping stay keyed by p.
#ifndef FD_IO_LOADER_H
#define FD_IO_LOADER_H

#include "io/dataset.h"
#include "io/tokenizer.h"

struct fd_loader_config {
  fd_dataset *dataset;     /* borrowed */
  const fd_prompt *prompt; /* borrowed */
  uint64_t seed;
  int resolution;          /* R */
  int micros;              /* micro-batches per step (gradient_accumulation_steps) */
  int64_t global_batch;    /* samples of one micro-batch over all ranks */
  int64_t first, count;    /* this rank's positions of a micro-batch: first .. first + count - 1 */
  bool center_crop;        /* else a random crop */
  bool fast_jpeg;
  double random_dropping_rate;
  double original_caption_rate; /* share of samples that take caption column 1 where they have it */
  double max_bad_fraction;
  int threads;             /* decoding threads; 0: in fd_loader_get itself */
  int ahead;               /* micro-batches decoded ahead; 0: 2 */
};

/** One micro-batch of this rank. All memory is the loader's, valid until the next call of fd_loader_get. */
struct fd_batch {
  int B, R;
  const uint8_t *pixels;   /* [B, R, R, 3] */
  const int32_t *ids;      /* [total], samples one behind the other */
  const int32_t *first, *len; /* [B] */
  int32_t total;
  const int64_t *position; /* [B] the key of all randomness of a sample */
  const int64_t *sample;   /* [B] index in the data set that was really read, for tests and logs */
  const char *const *text; /* [B] the caption as used (NUL terminated, "" if dropped), for logs */
};

typedef struct fd_loader fd_loader;

/** Local. FD_ERR_CONFIG: no samples, a rate outside [0, 1], original_caption_rate without that column. FD_ERR_DATA: the index
 *  alone lost more than max_bad_fraction of samples or tars. FD_ERR_NOMEM. */
fd_status fd_loader_create(const struct fd_loader_config *config, fd_loader **out);
void fd_loader_destroy(fd_loader **l);

/** Most tokens that a batch can have: count * fd_prompt_length. */
int64_t fd_loader_token_capacity(const fd_loader *l);

/** The micro-batch `micro` of step `step`. Any order is right; consecutive ones were decoded ahead. *wait_s (may be NULL): seconds that
 *  this call waited. FD_ERR_DATA when more than max_bad_fraction of this rank's visits were bad (at least min(n, 1000) visits count). */
fd_status fd_loader_get(fd_loader *l, int64_t step, int micro, struct fd_batch *batch, double *wait_s);

/** Visits since creation, by kind; [FD_BAD_NONE]: good ones. This rank's. Each bad sample is logged once with its tar and key. */
void fd_loader_counts(fd_loader *l, int64_t counts[FD_BAD_COUNT]);

#endif
