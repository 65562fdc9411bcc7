// SPDX-License-Identifier: Apache-2.0
// A tensor is a view: where, which shape, which type. It owns nothing and is always contiguous, last index fastest.
#ifndef FD_OP_TENSOR_H
#define FD_OP_TENSOR_H

#include "base/dtype.h"

#define FD_MAX_NDIM 4

enum {
  FD_T_CONST = 1u /* the content never changes while the graph lives (frozen weights): a backend may cache a reordered copy */
};

typedef struct fd_tensor {
  void *data; /* borrowed: arena, parameter buffer or caller */
  int64_t shape[FD_MAX_NDIM];
  int ndim;
  fd_dtype dtype;
  unsigned flags; /* FD_T_* */
} fd_tensor;

static inline int64_t fd_tensor_numel(const fd_tensor *t) {
  int64_t n = 1;
  for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
  return n;
}

static inline size_t fd_tensor_bytes(const fd_tensor *t) {
  return (size_t)fd_tensor_numel(t) * fd_dtype_bytes(t->dtype);
}

/** Length of the last dimension, and the number of rows of that length: most kernels see [rows, cols]. */
static inline int64_t fd_tensor_cols(const fd_tensor *t) { return t->ndim ? t->shape[t->ndim - 1] : 1; }
static inline int64_t fd_tensor_rows(const fd_tensor *t) {
  int64_t n = 1;
  for (int i = 0; i + 1 < t->ndim; i++) n *= t->shape[i];
  return n;
}

#endif
