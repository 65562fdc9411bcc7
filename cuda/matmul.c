// SPDX-License-Identifier: Apache-2.0
// The op matmul on cuda/gemm.c: counts, and biases. Bound by arithmetic for production shapes: at least 75 % of the measured matrix peak expected
// in bf16.
// Epilogues: bias (rounded to the type of c), and c itself (acc: residual streams and gradients). Gelu stands alone nowhere in the models but in
// projections of one row a sample; gated units multiply two halves of a row, and residuals are gated by sample: no epilogue of the library does
// that (geglu.cu, gate_residual.cu).
#include "cuda/library.h"

/* An epilogue's bias has the type of c. A copy of that type lies in scratch before the workspace. */
static bool bias_is_cast(const struct fd_matmul_args *a) { return a->bias && a->bias->dtype != a->c->dtype; }
static size_t bias_bytes(const struct fd_matmul_args *a) {
  return bias_is_cast(a) ? fd_cuda_aligned((size_t)fd_tensor_numel(a->bias) * fd_dtype_bytes(a->c->dtype)) : 0;
}

/* `used`: rows of a in use. */
static struct fd_cuda_gemm gemm_of(const struct fd_matmul_args *a, int64_t used) {
  const int64_t a_cols = fd_tensor_cols(a->a), b_cols = fd_tensor_cols(a->b), b_rows = fd_tensor_rows(a->b);
  return (struct fd_cuda_gemm){.M = a->trans_a ? a_cols : used,
                               .N = a->trans_b ? b_rows : b_cols,
                               .K = a->trans_a ? used : a_cols,
                               .batch = 1,
                               .trans_a = a->trans_a,
                               .trans_b = a->trans_b,
                               .has_bias = a->bias != NULL,
                               .ab = a->a->dtype,
                               .c_type = a->c->dtype,
                               .ldb = b_cols, /* more than K where a count leaves out some */
                               .alpha = 1,
                               .beta = a->acc ? 1 : 0,
                               .a = a->a->data,
                               .b = a->b->data,
                               .bias = a->bias && !bias_is_cast(a) ? a->bias->data : NULL,
                               .c = a->c->data};
}

fd_status cuda_matmul_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  const struct fd_matmul_args *a = args;
  const int64_t rows = fd_tensor_rows(a->a);
  const struct fd_cuda_gemm all = gemm_of(a, rows);
  const int64_t Kb = a->trans_b ? fd_tensor_cols(a->b) : fd_tensor_rows(a->b);
  if (Kb != all.K) return fd_op_wrong_slot(op, "b", a->b, "inner length %lld", (long long)all.K);
  if (fd_tensor_rows(a->c) != all.M || fd_tensor_cols(a->c) != all.N)
    return fd_op_wrong_slot(op, "c", a->c, "[%lld, %lld]", (long long)all.M, (long long)all.N);
  if (a->c->dtype != a->a->dtype && a->c->dtype != FD_F32) return fd_op_wrong_slot(op, "c", a->c, "%s or f32", fd_dtype_name(a->a->dtype));
  if (a->bias && fd_tensor_numel(a->bias) != all.N) return fd_op_wrong_slot(op, "bias", a->bias, "[%lld]", (long long)all.N);
  *scratch_bytes = bias_bytes(a);
  if (all.M == 0 || all.N == 0 || all.K == 0) return FD_OK;
  /* with a count: every tile that its writer rounds to, so that no plan is made in a step */
  const int steps = FD_CUDA_COUNT_STEPS;
  for (int i = a->count ? 1 : steps; i <= steps; i++) {
    size_t bytes;
    const struct fd_cuda_gemm g = gemm_of(a, (rows * i + steps - 1) / steps);
    const fd_status st = fd_cuda_gemm_prepare(ctx, &g, &bytes);
    if (st != FD_OK) return st;
    if (bias_bytes(a) + bytes > *scratch_bytes) *scratch_bytes = bias_bytes(a) + bytes;
  }
  return FD_OK;
}

/* c = bias, or c += bias: a sum over no inner rows. */
static fd_status no_inner_rows(fd_ctx *ctx, const struct fd_matmul_args *a) {
  const struct fd_add_fwd_args add = {.x = a->c, .y = a->bias, .z = a->c};
  fd_status st = a->acc ? FD_OK : FD_CUDA(cudaMemsetAsync(a->c->data, 0, fd_tensor_bytes(a->c), fd_cuda_stream(ctx)));
  return st == FD_OK && a->bias ? cuda_add_fwd(ctx, &add) : st;
}

fd_status cuda_matmul(fd_ctx *ctx, const struct fd_matmul_args *a) {
  fd_status st = FD_OK;
  int64_t used;
  FD_TRY(fd_cuda_count(ctx, a->count, fd_tensor_rows(a->a), &used));
  struct fd_cuda_gemm g = gemm_of(a, used);
  if (g.M == 0 || g.N == 0) return FD_OK;
  if (g.K == 0) return no_inner_rows(ctx, a);
  if (bias_is_cast(a)) {
    fd_tensor bias = *a->bias;
    bias.data = ctx->scratch, bias.dtype = a->c->dtype;
    FD_TRY(cuda_cast(ctx, &(struct fd_cast_args){.x = a->bias, .y = &bias}));
    g.bias = bias.data;
  }
  FD_TRY(fd_cuda_gemm(ctx, &g, (char *)ctx->scratch + bias_bytes(a)));
done:
  return st;
}
