// SPDX-License-Identifier: Apache-2.0
// Batched matrix products by cuBLASLt, for what is no matrix product of the graph (attention with one wide head). 2 M N K FLOP each; at least
// 60 % of the measured matrix peak expected in bf16. f32 is plain f32 (no TF32). As in cuda/matmul.c our row-major c is cuBLASLt's c', so a and
// b change places.
#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/library_state.h"

enum { WORKSPACE = 32 << 20, ALIGN = 16 /* of a, b and c (library.h); unless told, the heuristic takes 256 */ };

/* What makes two batches the same for cuBLASLt. */
struct key {
  int64_t M, N, K, batch, a_stride, b_stride, c_stride;
  int trans_a, trans_b;
  fd_dtype ab, c;
};

struct plan {
  struct key key;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatmulAlgo_t algo;
  size_t workspace;
};

struct fd_gemm {
  cublasLtHandle_t handle;
  struct plan *plan;
  int n;
};

static fd_status lt_status(cublasStatus_t s, const char *what) {
  return s == CUBLAS_STATUS_SUCCESS ? FD_OK : FD_FAIL(FD_ERR_UNSUPPORTED, "cuBLASLt: %s: %s", what, cublasLtGetStatusName(s));
}
#define LT(call) lt_status((call), #call)

static cudaDataType type_of(fd_dtype t) { return t == FD_BF16 ? CUDA_R_16BF : CUDA_R_32F; }

static void plan_free(struct plan *p) {
  if (p->c) cublasLtMatrixLayoutDestroy(p->c);
  if (p->b) cublasLtMatrixLayoutDestroy(p->b);
  if (p->a) cublasLtMatrixLayoutDestroy(p->a);
  if (p->op) cublasLtMatmulDescDestroy(p->op);
}

static fd_status layout(cublasLtMatrixLayout_t *l, fd_dtype type, int64_t rows, int64_t cols, int64_t batch, int64_t stride) {
  fd_status st = FD_OK;
  const int32_t count = (int32_t)batch;
  FD_TRY(LT(cublasLtMatrixLayoutCreate(l, type_of(type), (uint64_t)cols, (uint64_t)rows, cols)));
  FD_TRY(LT(cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count)));
  FD_TRY(LT(cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride)));
done:
  return st;
}

static fd_status plan_make(fd_ctx *ctx, struct fd_gemm *lt, const struct key *k, struct plan *p) {
  fd_status st = FD_OK;
  cublasLtMatmulPreference_t pref = NULL;
  cublasLtMatmulHeuristicResult_t found;
  int n = 0;
  const cublasOperation_t first = k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const uint64_t workspace = WORKSPACE;
  const uint32_t no_split = CUBLASLT_REDUCTION_SCHEME_NONE, align = ALIGN;
  static const cublasLtMatmulPreferenceAttributes_t aligned_operand[] = {
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  p->key = *k;
  FD_TRY(LT(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F)));
  FD_TRY(LT(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first)));
  FD_TRY(LT(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second)));
  FD_TRY(k->trans_b ? layout(&p->a, k->ab, k->N, k->K, k->batch, k->b_stride) : layout(&p->a, k->ab, k->K, k->N, k->batch, k->b_stride));
  FD_TRY(k->trans_a ? layout(&p->b, k->ab, k->K, k->M, k->batch, k->a_stride) : layout(&p->b, k->ab, k->M, k->K, k->batch, k->a_stride));
  FD_TRY(layout(&p->c, k->c, k->M, k->N, k->batch, k->c_stride));
  FD_TRY(LT(cublasLtMatmulPreferenceCreate(&pref)));
  FD_TRY(LT(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace)));
  for (int i = 0; i < 4; i++) FD_TRY(LT(cublasLtMatmulPreferenceSetAttribute(pref, aligned_operand[i], &align, sizeof align)));
  if (ctx->deterministic)
    FD_TRY(LT(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_split, sizeof no_split)));
  FD_TRY(LT(cublasLtMatmulAlgoGetHeuristic(lt->handle, p->op, p->a, p->b, p->c, p->c, pref, 1, &found, &n)));
  if (n == 0 || found.state != CUBLAS_STATUS_SUCCESS)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "cuBLASLt: no algorithm for %lld products of %s [%lld, %lld] = [.., %lld] x [%lld, ..]", (long long)k->batch,
                   fd_dtype_name(k->ab), (long long)k->M, (long long)k->N, (long long)k->K, (long long)k->K));
  p->algo = found.algo;
  p->workspace = found.workspaceSize;
done:
  if (pref) cublasLtMatmulPreferenceDestroy(pref);
  return st;
}

static fd_status plan_find(fd_ctx *ctx, const struct fd_cuda_gemm *g, struct plan **out) {
  struct fd_cuda *c = fd_cuda_of(ctx);
  struct fd_gemm *lt = c->gemm;
  struct key k;
  memset(&k, 0, sizeof k); /* padding too: keys are compared as bytes */
  k.M = g->M, k.N = g->N, k.K = g->K, k.batch = g->batch, k.a_stride = g->a_stride, k.b_stride = g->b_stride, k.c_stride = g->c_stride;
  k.trans_a = g->trans_a, k.trans_b = g->trans_b, k.ab = g->ab, k.c = g->c_type;
  if (!lt) {
    lt = c->gemm = calloc(1, sizeof *lt);
    if (!lt) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  }
  if (!lt->handle) {
    const fd_status st = LT(cublasLtCreate(&lt->handle));
    if (st != FD_OK) return st;
  }
  for (int i = 0; i < lt->n; i++)
    if (memcmp(&lt->plan[i].key, &k, sizeof k) == 0) {
      *out = &lt->plan[i];
      return FD_OK;
    }
  struct plan *more = realloc(lt->plan, sizeof *more * (size_t)(lt->n + 1));
  if (!more) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  lt->plan = more;
  memset(&more[lt->n], 0, sizeof *more);
  const fd_status st = plan_make(ctx, lt, &k, &more[lt->n]);
  if (st == FD_OK)
    *out = &more[lt->n++];
  else
    plan_free(&more[lt->n]);
  return st;
}

fd_status fd_cuda_gemm_prepare(fd_ctx *ctx, const struct fd_cuda_gemm *g, size_t *scratch_bytes) {
  struct plan *p = NULL;
  *scratch_bytes = 0;
  const fd_status st = plan_find(ctx, g, &p);
  if (st == FD_OK) *scratch_bytes = p->workspace;
  return st;
}

fd_status fd_cuda_gemm(fd_ctx *ctx, const struct fd_cuda_gemm *g, void *scratch) {
  struct plan *p = NULL;
  const fd_status st = plan_find(ctx, g, &p);
  if (st != FD_OK) return st;
  const struct fd_gemm *lt = fd_cuda_of(ctx)->gemm;
  return LT(cublasLtMatmul(lt->handle, p->op, &g->alpha, g->b, p->a, g->a, p->b, &g->beta, g->c, p->c, g->c, p->c, &p->algo, scratch,
                           p->workspace, fd_cuda_stream(ctx)));
}

void fd_cuda_gemm_close(fd_ctx *ctx) {
  struct fd_gemm *lt = fd_cuda_of(ctx)->gemm;
  if (!lt) return;
  for (int i = 0; i < lt->n; i++) plan_free(&lt->plan[i]);
  free(lt->plan);
  if (lt->handle) cublasLtDestroy(lt->handle);
  free(lt);
  fd_cuda_of(ctx)->gemm = NULL;
}
