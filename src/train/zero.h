// SPDX-License-Identifier: Apache-2.0
// Sharding of the flat parameter space over ranks (ZeRO; Rajbhandari et al. 2020): which rank keeps which elements.
#ifndef FD_TRAIN_ZERO_H
#define FD_TRAIN_ZERO_H

#include <stdint.h>

/** Elements [first, first + n) whose master weights, moments and EMA this rank keeps. numel is a multiple of 64 * size
 *  (fd_params_layout pads it), so that shards are equal and aligned. Stage 0: every rank keeps everything. */
static inline void fd_zero_shard_range(int zero_stage, int64_t numel, int rank, int size, int64_t *first, int64_t *n) {
  *n = zero_stage > 0 ? numel / size : numel;
  *first = zero_stage > 0 ? *n * rank : 0;
}

#endif
