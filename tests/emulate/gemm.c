// SPDX-License-Identifier: Apache-2.0
// The emulated twin of cuda/gemm.c: plain loops on copies.
#include <stdlib.h>

#include "base/dtype.h"
#include "cuda/library.h"

static fd_status to_host(const void *from, int64_t n, fd_dtype type, void **host) {
  const size_t bytes = (size_t)n * fd_dtype_bytes(type);
  *host = malloc(bytes + 1);
  return *host ? FD_CUDA(cudaMemcpy(*host, from, bytes, cudaMemcpyDeviceToHost)) : FD_FAIL(FD_ERR_NOMEM, "no memory");
}

static float get(const void *x, fd_dtype type, int64_t i) {
  return type == FD_BF16 ? fd_bf16_to_f32(((const fd_bf16 *)x)[i]) : ((const float *)x)[i];
}

fd_status fd_cuda_gemm_prepare(fd_ctx *ctx, const struct fd_cuda_gemm *g, size_t *scratch_bytes) {
  (void)ctx, (void)g;
  *scratch_bytes = 0;
  return FD_OK;
}

static fd_status status; /* of the last call; its message is the thread's */

static int run_gemm(void *data) {
  fd_status st = FD_OK;
  const struct fd_cuda_gemm *g = data;
  void *a = NULL, *b = NULL, *c = NULL;
  for (int64_t s = 0; s < g->batch && st == FD_OK; s++) {
    char *to = (char *)g->c + (size_t)(s * g->c_stride) * fd_dtype_bytes(g->c_type);
    FD_TRY(to_host((const char *)g->a + (size_t)(s * g->a_stride) * fd_dtype_bytes(g->ab), g->M * g->K, g->ab, &a));
    FD_TRY(to_host((const char *)g->b + (size_t)(s * g->b_stride) * fd_dtype_bytes(g->ab), g->K * g->N, g->ab, &b));
    FD_TRY(to_host(to, g->M * g->N, g->c_type, &c));
    for (int64_t m = 0; m < g->M; m++)
      for (int64_t n = 0; n < g->N; n++) {
        float sum = 0;
        for (int64_t k = 0; k < g->K; k++)
          sum += get(a, g->ab, g->trans_a ? k * g->M + m : m * g->K + k) * get(b, g->ab, g->trans_b ? n * g->K + k : k * g->N + n);
        sum *= g->alpha;
        if (g->beta != 0) sum += g->beta * get(c, g->c_type, m * g->N + n);
        if (g->c_type == FD_BF16)
          ((fd_bf16 *)c)[m * g->N + n] = fd_f32_to_bf16(sum);
        else
          ((float *)c)[m * g->N + n] = sum;
      }
    FD_TRY(FD_CUDA(cudaMemcpy(to, c, (size_t)(g->M * g->N) * fd_dtype_bytes(g->c_type), cudaMemcpyHostToDevice)));
    free(a), free(b), free(c);
    a = b = c = NULL;
  }
done:
  free(a), free(b), free(c);
  status = st;
  return st != FD_OK;
}

fd_status fd_cuda_gemm(fd_ctx *ctx, const struct fd_cuda_gemm *g, void *scratch) {
  (void)ctx, (void)scratch;
  return fd_emu_host(run_gemm, g, sizeof *g) == cudaSuccess ? FD_OK : status;
}
