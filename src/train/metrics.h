// SPDX-License-Identifier: Apache-2.0
// What a run tells: metrics.csv in the run folder; numbers for people.
// Invariant: metrics.csv has one row per step logged, in ascending order; resuming cuts the rows beyond the step it starts from.
#ifndef FD_TRAIN_METRICS_H
#define FD_TRAIN_METRICS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/status.h"

#define FD_METRICS_PHASES 5

/** One row: of the step itself, and means over the steps since the row before. */
struct fd_metrics_row {
  int64_t step;          /* steps done, this one included */
  double loss;           /* mean over the global batch of this step */
  double loss_mean;      /* mean over the steps since the last row */
  double grad_norm, lr;  /* lr is what the step used */
  double images_per_s;   /* all ranks */
  double seconds;        /* per step; of it: */
  double data_s, comm_s; /* waiting for data, and for communication (within the optimiser's phase) */
  double phase_s[FD_METRICS_PHASES]; /* vae, text, forward, backward, optimizer */
  int64_t bad_samples, skipped_steps, samples_seen;
};

/** Open DIR/metrics.csv to go on after step `step` (0: a new file). Closed with fclose. Rank 0 only. */
fd_status fd_metrics_open(const char *path, int64_t step, FILE **out);
fd_status fd_metrics_write(FILE *f, const struct fd_metrics_row *row);

/** "1 h 02 min", "3 min 20 s", "12 s". */
void fd_format_duration(double seconds, char *text, size_t bytes);
/** "1.5 GB", decimal. */
void fd_format_bytes(double bytes, char *text, size_t size);

#endif
