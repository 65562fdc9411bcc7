// SPDX-License-Identifier: Apache-2.0
// Matrix products by cuBLASLt. It thinks in columns: our row-major c [M, N] is its [N, M], so it computes c' = op(b)' op(a)'.
// Bound by arithmetic for production shapes: at least 75 % of the measured matrix peak expected in bf16.
// f32 is plain f32 (no TF32), so that records can be compared.
#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/library_state.h"

enum { MAX_PLANS = 1024, TRY = 8, WORKSPACE = 32 << 20 };

/* What makes two products the same for cuBLASLt. */
struct key {
  int64_t M, N, K;
  int trans_a, trans_b, acc, bias;
  fd_dtype ab, c, bias_type;
};

struct plan {
  struct key key;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatmulAlgo_t algo;
  size_t workspace;
};

struct fd_blas {
  cublasLtHandle_t handle;
  struct plan plan[MAX_PLANS];
  int n;
};

static fd_status blas_status(cublasStatus_t s, const char *what) {
  return s == CUBLAS_STATUS_SUCCESS ? FD_OK : FD_FAIL(FD_ERR_UNSUPPORTED, "cuBLASLt: %s: %s", what, cublasLtGetStatusName(s));
}
#define BLAS(call) blas_status((call), #call)

static cudaDataType type_of(fd_dtype t) { return t == FD_BF16 ? CUDA_R_16BF : CUDA_R_32F; }

static void plan_free(struct plan *p) {
  if (p->c) cublasLtMatrixLayoutDestroy(p->c);
  if (p->b) cublasLtMatrixLayoutDestroy(p->b);
  if (p->a) cublasLtMatrixLayoutDestroy(p->a);
  if (p->op) cublasLtMatmulDescDestroy(p->op);
  memset(p, 0, sizeof *p);
}

/* A row-major [rows, cols] is cuBLASLt's [cols, rows] with leading dimension cols. */
static fd_status layout(cublasLtMatrixLayout_t *l, fd_dtype type, int64_t rows, int64_t cols) {
  return BLAS(cublasLtMatrixLayoutCreate(l, type_of(type), (uint64_t)cols, (uint64_t)rows, cols));
}

static fd_status plan_make(fd_ctx *ctx, struct fd_blas *blas, const struct key *k, struct plan *p) {
  fd_status st = FD_OK;
  cublasLtMatmulPreference_t pref = NULL;
  cublasLtMatmulHeuristicResult_t found[TRY];
  int n = 0;
  const cublasOperation_t first = k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasLtEpilogue_t epilogue = k->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  const cudaDataType bias_type = type_of(k->bias_type);
  const uint64_t workspace = WORKSPACE;
  const uint32_t no_split = CUBLASLT_REDUCTION_SCHEME_NONE;
  memset(p, 0, sizeof *p);
  p->key = *k;
  FD_TRY(BLAS(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F)));
  FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first)));
  FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second)));
  FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue)));
  if (k->bias)
    FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type)));
  FD_TRY(k->trans_b ? layout(&p->a, k->ab, k->N, k->K) : layout(&p->a, k->ab, k->K, k->N));
  FD_TRY(k->trans_a ? layout(&p->b, k->ab, k->K, k->M) : layout(&p->b, k->ab, k->M, k->K));
  FD_TRY(layout(&p->c, k->c, k->M, k->N));
  FD_TRY(BLAS(cublasLtMatmulPreferenceCreate(&pref)));
  FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace)));
  if (ctx->deterministic)
    FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_split, sizeof no_split)));
  FD_TRY(BLAS(cublasLtMatmulAlgoGetHeuristic(blas->handle, p->op, p->a, p->b, p->c, p->c, pref, TRY, found, &n)));
  if (n == 0)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "cuBLASLt: no algorithm for %s [%lld, %lld] = [.., %lld] x [.., %lld]", fd_dtype_name(k->ab),
                   (long long)k->M, (long long)k->N, (long long)k->K, (long long)k->N));
  p->algo = found[0].algo;
  p->workspace = found[0].workspaceSize;
done:
  if (pref) cublasLtMatmulPreferenceDestroy(pref);
  if (st != FD_OK) plan_free(p);
  return st;
}

static fd_status plan_find(fd_ctx *ctx, const struct key *k, struct plan **out) {
  struct fd_blas *blas = fd_cuda_of(ctx)->blas;
  for (int i = 0; i < blas->n; i++)
    if (memcmp(&blas->plan[i].key, k, sizeof *k) == 0) {
      *out = &blas->plan[i];
      return FD_OK;
    }
  if (blas->n == MAX_PLANS) return FD_FAIL(FD_ERR_UNSUPPORTED, "cuBLASLt: more than %d different matrix products", MAX_PLANS);
  fd_status st = plan_make(ctx, blas, k, &blas->plan[blas->n]);
  if (st == FD_OK) *out = &blas->plan[blas->n++];
  return st;
}

/* `used`: rows of a in use. A bias of another type than c cannot be an epilogue; it is added behind. */
static struct key key_of(const struct fd_matmul_args *a, int64_t used) {
  struct key k;
  memset(&k, 0, sizeof k); /* padding too: keys are compared as bytes */
  const int64_t a_cols = fd_tensor_cols(a->a), b_cols = fd_tensor_cols(a->b), b_rows = fd_tensor_rows(a->b);
  k.trans_a = a->trans_a, k.trans_b = a->trans_b;
  k.M = a->trans_a ? a_cols : used;
  k.K = a->trans_a ? used : a_cols;
  k.N = a->trans_b ? b_rows : b_cols;
  k.acc = a->acc != 0;
  k.bias = a->bias && a->bias->dtype == a->c->dtype;
  k.ab = a->a->dtype, k.c = a->c->dtype, k.bias_type = k.bias ? a->bias->dtype : FD_F32;
  return k;
}

fd_status fd_cuda_matmul_open(fd_ctx *ctx) {
  struct fd_blas *blas = calloc(1, sizeof *blas);
  if (!blas) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  fd_cuda_of(ctx)->blas = blas;
  return BLAS(cublasLtCreate(&blas->handle));
}

void fd_cuda_matmul_close(fd_ctx *ctx) {
  struct fd_blas *blas = fd_cuda_of(ctx)->blas;
  if (!blas) return;
  for (int i = 0; i < blas->n; i++) plan_free(&blas->plan[i]);
  if (blas->handle) cublasLtDestroy(blas->handle);
  free(blas);
  fd_cuda_of(ctx)->blas = NULL;
}

fd_status fd_cuda_matmul_prepare(fd_ctx *ctx, const struct fd_matmul_args *a, size_t *scratch_bytes) {
  const int64_t rows = fd_tensor_rows(a->a), a_cols = fd_tensor_cols(a->a);
  const int64_t M = a->trans_a ? a_cols : rows, K = a->trans_a ? rows : a_cols;
  const int64_t N = a->trans_b ? fd_tensor_rows(a->b) : fd_tensor_cols(a->b), Kb = a->trans_b ? fd_tensor_cols(a->b) : fd_tensor_rows(a->b);
  if (Kb != K) return fd_op_wrong_slot(FD_OP_matmul, "b", a->b, "inner length %lld", (long long)K);
  if (fd_tensor_rows(a->c) != M || fd_tensor_cols(a->c) != N)
    return fd_op_wrong_slot(FD_OP_matmul, "c", a->c, "[%lld, %lld]", (long long)M, (long long)N);
  if (a->bias && fd_tensor_numel(a->bias) != N) return fd_op_wrong_slot(FD_OP_matmul, "bias", a->bias, "[%lld]", (long long)N);
  *scratch_bytes = WORKSPACE;
  if (M == 0 || N == 0 || K == 0) return FD_OK;
  /* with a count: every tile that its writer rounds to (an eighth of the capacity), so that no plan is made in a step */
  for (int eighth = a->count ? 1 : 8; eighth <= 8; eighth++) {
    struct plan *p;
    const struct key k = key_of(a, (rows * eighth + 7) / 8);
    fd_status st = plan_find(ctx, &k, &p);
    if (st != FD_OK) return st;
  }
  return FD_OK;
}

fd_status cuda_matmul(fd_ctx *ctx, const struct fd_matmul_args *a) {
  const float one = 1.0f, zero = 0.0f;
  const cudaStream_t stream = fd_cuda_stream(ctx);
  int64_t used;
  struct plan *p = NULL;
  fd_status st = fd_cuda_count(ctx, a->count, fd_tensor_rows(a->a), &used);
  if (st != FD_OK) return st;
  const struct key k = key_of(a, used);
  if (k.M == 0 || k.N == 0) return FD_OK;
  if (k.K == 0) return a->acc ? FD_OK : FD_CUDA(cudaMemsetAsync(a->c->data, 0, fd_tensor_bytes(a->c), stream));
  st = plan_find(ctx, &k, &p);
  if (st != FD_OK) return st;
  if (k.bias)
    st = BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &a->bias->data, sizeof a->bias->data));
  if (st == FD_OK)
    st = BLAS(cublasLtMatmul(((struct fd_blas *)fd_cuda_of(ctx)->blas)->handle, p->op, &one, a->b->data, p->a, a->a->data, p->b,
                             a->acc ? &one : &zero, a->c->data, p->c, a->c->data, p->c, &p->algo, ctx->scratch, p->workspace, stream));
  if (st == FD_OK && a->bias && !k.bias) {
    struct fd_add_fwd_args add = {.x = a->c, .y = a->bias, .count = a->trans_a ? NULL : a->count, .z = a->c};
    st = cuda_add_fwd(ctx, &add);
  }
  return st;
}
