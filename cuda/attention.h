// SPDX-License-Identifier: Apache-2.0
// The two halves of attention: cuda/attention_library.cu gives batches in bf16 to libraries, cuda/attention.cu does the rest itself.
// Each pass chooses for itself, so both must agree on where lse is: with regular strides it is [S, A, q_stride], else [Tq, A].
#ifndef FD_CUDA_ATTENTION_H
#define FD_CUDA_ATTENTION_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Whether q and k have exactly the S q_stride and S k_stride rows that the strides speak of. */
static inline int fd_attention_is_regular(const fd_tensor *q, const fd_tensor *k, const fd_tensor *ranges, int A, int K, int E, int64_t q_stride,
                                          int64_t k_stride) {
  const int64_t S = ranges->shape[0];
  return q_stride > 0 && S > 0 && fd_tensor_numel(q) == S * q_stride * A * E && fd_tensor_numel(k) == S * k_stride * K * E;
}

/** *found = 0: not this way. The passes' args are checked already. */
fd_status cuda_attention_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, int *found, size_t *scratch_bytes);
fd_status cuda_attention_library_fwd(fd_ctx *ctx, const struct fd_attention_fwd_args *a, int *found);
fd_status cuda_attention_library_bwd(fd_ctx *ctx, const struct fd_attention_bwd_args *a, int *found);

/** Most bytes of scores and probabilities that lie in scratch at once; tests make it small. */
extern size_t cuda_attention_most_bytes;

#ifdef __cplusplus
}
#endif

#endif
