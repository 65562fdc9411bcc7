// SPDX-License-Identifier: Apache-2.0
// What libraries do for the CUDA backend: matrix products (cuBLASLt), attention and convolutions (cuDNN), sums over ranks (NCCL).
// cuda/library.c, matmul.c, gemm.c, cudnn_*.c and collective.c; without a GPU they run on emulations of the libraries themselves (tests/emulate).
#ifndef FD_CUDA_LIBRARY_H
#define FD_CUDA_LIBRARY_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

fd_status fd_cuda_library_open(fd_ctx *ctx);
void fd_cuda_library_close(fd_ctx *ctx);
/** "cuBLASLt 13.1, cuDNN 9.19.0, NCCL 2.28.9" */
void fd_cuda_library_versions(char *out, size_t bytes);
/* ---- the parts of cuda/library.c; cuDNN (cudnn_graph.h) opens itself with its first plan ---- */

fd_status fd_cuda_gemm_open(fd_ctx *ctx);
void fd_cuda_gemm_close(fd_ctx *ctx);
fd_status fd_cuda_collective_open(fd_ctx *ctx);
void fd_cuda_collective_close(fd_ctx *ctx);
/** Later ops come after all sums that were started. */
fd_status fd_cuda_collective_join(fd_ctx *ctx);
/** FD_ERR_COMM if NCCL failed on another rank, which would leave this one waiting for ever. */
fd_status fd_cuda_collective_check(fd_ctx *ctx);

/* ---- work that kernels and ops hand over ---- */

/** The op matmul: checks shapes, makes plans, says how much scratch it needs. */
fd_status cuda_matmul_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes);

/* The functions below come in pairs: _prepare makes the plan and says how much scratch it wants, and may be called with no data;
   the other runs it on the context's stream, with that scratch (aligned to 256 bytes). */

/** For each matrix of the batch: c = alpha op(a) op(b) + bias + beta c, row-major; sums in f32.
 *    a [M, K], or [K, M] if trans_a;  b [K, N], or [N, K] if trans_b, rows ldb elements apart (0: no gaps);  c [M, N];  bias [N] as c.
 *  Strides of the batch in elements. Operands that are not aligned to 16 bytes are slower. */
struct fd_cuda_gemm {
  int64_t M, N, K, batch;
  int trans_a, trans_b, has_bias;
  fd_dtype ab, c_type; /* bf16 -> bf16 | f32, f32 -> f32 */
  int64_t ldb, a_stride, b_stride, c_stride;
  float alpha, beta;
  const void *a, *b, *bias;
  void *c;
};
fd_status fd_cuda_gemm_prepare(fd_ctx *ctx, const struct fd_cuda_gemm *g, size_t *scratch_bytes);
fd_status fd_cuda_gemm(fd_ctx *ctx, const struct fd_cuda_gemm *g, void *scratch);

/** Attention in bf16 over B sequences of equal strides: sequence b's queries are rows b N .. b N + n[b] - 1 of q, o, d_o, dq, its keys rows
 *  b M .. b M + m[b] - 1 of k, v, dk, dv. Rows beyond n[b] and m[b] must be finite in what is read; what is written there is undefined.
 *  Data are aligned to 16 bytes, but n and m.
 *    n, m  in   i32 [B] on the device, 1 <= n <= N, 1 <= m <= M; n = N in the backward pass
 *    lse   f32 [B, A, N]: out of the forward pass, in of the backward pass */
struct fd_cuda_sdpa {
  int64_t B, N, M;
  int A, K, E;
  int backward, causal; /* causal: query i sees keys j <= i; not in the backward pass */
  float scale;
  const void *q, *k, *v, *d_o;
  void *o; /* out; in of the backward pass */
  float *lse;
  const int *n, *m;
  void *dq, *dk, *dv;
};
/** *found = 0: the library cannot do it. */
fd_status fd_cuda_sdpa_prepare(fd_ctx *ctx, const struct fd_cuda_sdpa *a, int *found, size_t *scratch_bytes);
fd_status fd_cuda_sdpa(fd_ctx *ctx, const struct fd_cuda_sdpa *a, void *scratch);

/** A convolution in bf16, NHWC, weights as [O, kh, kw, I]; sums in f32.
 *    forward: y = conv(x, w) + bias + residual;  data: x = the gradient of x from that of y and w, bf16 or (f32_data) f32;
 *    weights: w = the gradient of w, f32 */
enum fd_cuda_conv_op { FD_CUDA_CONV_FORWARD, FD_CUDA_CONV_DATA, FD_CUDA_CONV_WEIGHTS };
struct fd_cuda_conv {
  enum fd_cuda_conv_op op;
  int64_t B, H, W, I, Ho, Wo, O, kh, kw;
  int stride, top, left, bottom, right;
  int has_bias, has_residual, f32_data;
  void *x, *w, *y;
  const void *bias, *residual; /* bf16 */
};
/** *found = 0: the library cannot do it. */
fd_status fd_cuda_conv_prepare(fd_ctx *ctx, const struct fd_cuda_conv *c, int *found, size_t *scratch_bytes);
fd_status fd_cuda_conv(fd_ctx *ctx, const struct fd_cuda_conv *c, void *scratch);

#ifdef __cplusplus
}
#endif

#endif
