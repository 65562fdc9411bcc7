// SPDX-License-Identifier: Apache-2.0
// Attention by cuDNN: the graph softmax(scale q k') v with lengths per sample, and its gradient from the saved logarithms of the sums.
// 4 B A N M E FLOP forward, 10 backward; at least 70 % (forward) and 55 % (backward) of the matrix peak expected for E = 128, less for 256.
//
// What the graphs hold against, found with cuDNN 9.19:
//  - The length mask is always there: without one the kernels of sm_90 give NaN where the keys' length % 128 is 64.
//  - The mask comes after the logarithm of the sum is subtracted: a row without keys would give -inf - -inf.
//  - The product with the probabilities reads them as bf16.
//  - Keys of grouped heads get their gradients per query head first (cuDNN's own workspace), then a sum.
#include <math.h>
#include <stdio.h>

#include "cuda/cudnn_graph.h"
#include "cuda/library.h"

enum { Q = 1, K, V, O, LSE, D_O, DQ, DK, DV, LENGTH_Q, LENGTH_K, DQ_SUM, DELTA, SCALE, MINUS_INFINITY, ONE };

struct shape {
  int64_t B, N, M, A, K, E;
  int causal, deterministic;
};

static const cudnnDataType_t F32 = CUDNN_DATA_FLOAT, BF16 = CUDNN_DATA_BFLOAT16, I32 = CUDNN_DATA_INT32, BOOLEAN = CUDNN_DATA_BOOLEAN;

/* [B, heads, rows, E] of memory [B, rows, heads, E]; transposed: [B, heads, E, rows] */
static fd_dnn_tensor rows_of(struct fd_dnn_graph *g, int64_t uid, const struct shape *s, int64_t heads, int64_t rows, bool transposed) {
  const int64_t step = heads * s->E, dim[4] = {s->B, heads, transposed ? s->E : rows, transposed ? rows : s->E};
  const int64_t stride[4] = {rows * step, s->E, transposed ? 1 : step, transposed ? step : 1};
  return uid ? fd_dnn_bound(g, uid, BF16, dim, stride) : fd_dnn_inner(g, BF16, dim, stride);
}

static fd_dnn_tensor per_query(struct fd_dnn_graph *g, int64_t uid, const struct shape *s) {
  const int64_t dim[4] = {s->B, s->A, s->N, 1}, stride[4] = {s->A * s->N, s->N, 1, 1};
  return fd_dnn_bound(g, uid, F32, dim, stride);
}

static fd_dnn_tensor lengths(struct fd_dnn_graph *g, int64_t uid, const struct shape *s) {
  const int64_t dim[4] = {s->B, 1, 1, 1}, stride[4] = {1, 1, 1, 1};
  return fd_dnn_bound(g, uid, I32, dim, stride);
}

/* Inside the graph: a score per query and key, a number per query, a row of E per query (per key of every query head). */
static fd_dnn_tensor scores(struct fd_dnn_graph *g, cudnnDataType_t type, const struct shape *s) {
  return fd_dnn_inner(g, type, (const int64_t[4]){s->B, s->A, s->N, s->M}, NULL);
}
static fd_dnn_tensor column(struct fd_dnn_graph *g, const struct shape *s) {
  return fd_dnn_inner(g, F32, (const int64_t[4]){s->B, s->A, s->N, 1}, NULL);
}
static fd_dnn_tensor transposed(struct fd_dnn_graph *g, const struct shape *s, fd_dnn_tensor x) {
  const int64_t dim[4] = {s->B, s->A, s->M, s->N}, stride[4] = {s->A * s->M * s->N, s->M * s->N, 1, s->M};
  fd_dnn_tensor y = fd_dnn_inner(g, BF16, dim, stride);
  fd_dnn_reshape(g, x, y);
  return y;
}

static fd_dnn_tensor pointwise(struct fd_dnn_graph *g, const struct shape *s, cudnnPointwiseMode_t mode, fd_dnn_tensor x, fd_dnn_tensor b) {
  fd_dnn_tensor y = scores(g, F32, s);
  fd_dnn_pointwise(g, mode, F32, 0, x, b, NULL, y);
  return y;
}

/* x where the query and the key exist and, if causal, the key is not later; elsewhere -infinity */
static fd_dnn_tensor masked(struct fd_dnn_graph *g, const struct shape *s, fd_dnn_tensor x, fd_dnn_tensor length_q, fd_dnn_tensor length_k) {
  fd_dnn_tensor row = scores(g, I32, s), col = scores(g, I32, s), in_row = scores(g, BOOLEAN, s), in_col = scores(g, BOOLEAN, s);
  fd_dnn_tensor in = scores(g, BOOLEAN, s), y = scores(g, F32, s), out = fd_dnn_scalar(g, MINUS_INFINITY);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_GEN_INDEX, I32, 2, x, NULL, NULL, row);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_GEN_INDEX, I32, 3, x, NULL, NULL, col);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_CMP_LT, BOOLEAN, 0, row, length_q, NULL, in_row);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_CMP_LT, BOOLEAN, 0, col, length_k, NULL, in_col);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_LOGICAL_AND, BOOLEAN, 0, in_row, in_col, NULL, in);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_BINARY_SELECT, F32, 0, x, out, in, y);
  if (!s->causal) return y;
  fd_dnn_tensor query = scores(g, I32, s), key = scores(g, I32, s), not_later = scores(g, BOOLEAN, s), z = scores(g, F32, s);
  /* in two steps, as cuDNN knows it: for one mask of both it has no plan */
  fd_dnn_pointwise(g, CUDNN_POINTWISE_GEN_INDEX, I32, 2, y, NULL, NULL, query);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_GEN_INDEX, I32, 3, y, NULL, NULL, key);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_CMP_GE, BOOLEAN, 0, query, key, NULL, not_later);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_BINARY_SELECT, F32, 0, y, out, not_later, z);
  return z;
}

static void forward(struct fd_dnn_graph *g, const void *shape) {
  const struct shape *s = shape;
  fd_dnn_tensor q = rows_of(g, Q, s, s->A, s->N, false), kt = rows_of(g, K, s, s->K, s->M, true), v = rows_of(g, V, s, s->K, s->M, false);
  fd_dnn_tensor o = rows_of(g, O, s, s->A, s->N, false), nq = lengths(g, LENGTH_Q, s), nk = lengths(g, LENGTH_K, s), raw = scores(g, F32, s);
  fd_dnn_matmul(g, q, kt, raw, nq, nk, NULL);
  fd_dnn_tensor x = pointwise(g, s, CUDNN_POINTWISE_MUL, raw, fd_dnn_scalar(g, SCALE)), top = column(g, s), sum = column(g, s), log = column(g, s);
  x = masked(g, s, x, nq, nk);
  fd_dnn_reduce(g, CUDNN_REDUCE_TENSOR_MAX, x, top);
  x = pointwise(g, s, CUDNN_POINTWISE_EXP, pointwise(g, s, CUDNN_POINTWISE_SUB, x, top), NULL);
  fd_dnn_reduce(g, CUDNN_REDUCE_TENSOR_ADD, x, sum);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_LOG, F32, 0, sum, NULL, NULL, log);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_ADD, F32, 0, top, log, NULL, per_query(g, LSE, s));
  fd_dnn_tensor p = scores(g, BF16, s);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_DIV, F32, 0, x, sum, NULL, p);
  fd_dnn_matmul(g, p, v, o, nq, NULL, nk);
}

/* dk or dv: a row per key from the transposed p (or its gradient) and a row per query; grouped heads are summed. */
static void to_keys(struct fd_dnn_graph *g, const struct shape *s, fd_dnn_tensor pt, fd_dnn_tensor rows, int64_t uid, fd_dnn_tensor nq,
                    fd_dnn_tensor nk) {
  fd_dnn_tensor out = rows_of(g, uid, s, s->K, s->M, false);
  if (s->A == s->K) {
    fd_dnn_matmul(g, pt, rows, out, nk, NULL, nq);
    return;
  }
  fd_dnn_tensor all = fd_dnn_inner(g, BF16, (const int64_t[4]){s->B, s->A, s->M, s->E}, NULL);
  fd_dnn_matmul(g, pt, rows, all, nk, NULL, nq);
  fd_dnn_reduce(g, CUDNN_REDUCE_TENSOR_ADD, all, out);
}

static void backward(struct fd_dnn_graph *g, const void *shape) {
  const struct shape *s = shape;
  fd_dnn_tensor q = rows_of(g, Q, s, s->A, s->N, false), kt = rows_of(g, K, s, s->K, s->M, true), vt = rows_of(g, V, s, s->K, s->M, true);
  fd_dnn_tensor o = rows_of(g, O, s, s->A, s->N, false), d_o = rows_of(g, D_O, s, s->A, s->N, false), dq = rows_of(g, DQ, s, s->A, s->N, false);
  fd_dnn_tensor lse = per_query(g, LSE, s), nq = lengths(g, LENGTH_Q, s), nk = lengths(g, LENGTH_K, s), scale = fd_dnn_scalar(g, SCALE);
  /* delta = sum over e of d_o o */
  fd_dnn_tensor product = fd_dnn_inner(g, F32, (const int64_t[4]){s->B, s->A, s->N, s->E}, NULL), sum = column(g, s), delta = per_query(g, DELTA, s);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_MUL, F32, 0, d_o, o, NULL, product);
  fd_dnn_reduce(g, CUDNN_REDUCE_TENSOR_ADD, product, sum);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_MUL, F32, 0, sum, fd_dnn_scalar(g, ONE), NULL, delta);
  /* p = exp(scale q k' - lse) */
  fd_dnn_tensor raw = scores(g, F32, s);
  fd_dnn_matmul(g, q, kt, raw, nq, nk, NULL);
  fd_dnn_tensor x = pointwise(g, s, CUDNN_POINTWISE_SUB, pointwise(g, s, CUDNN_POINTWISE_MUL, raw, scale), lse);
  fd_dnn_tensor p = pointwise(g, s, CUDNN_POINTWISE_EXP, masked(g, s, x, nq, nk), NULL);
  to_keys(g, s, transposed(g, s, p), d_o, DV, nq, nk);
  /* ds = scale p (d_o v' - delta) */
  fd_dnn_tensor dp = scores(g, F32, s);
  fd_dnn_matmul(g, d_o, vt, dp, nq, nk, NULL);
  fd_dnn_tensor ds = pointwise(g, s, CUDNN_POINTWISE_MUL, pointwise(g, s, CUDNN_POINTWISE_SUB, dp, delta), p);
  ds = pointwise(g, s, CUDNN_POINTWISE_MUL, ds, scale);
  to_keys(g, s, transposed(g, s, ds), q, DK, nq, nk);
  fd_dnn_tensor k = rows_of(g, 0, s, s->K, s->M, false);
  fd_dnn_reshape(g, kt, k);
  if (s->deterministic) {
    fd_dnn_matmul(g, ds, k, dq, nq, NULL, nk);
    return;
  }
  /* blocks of keys add to dq in f32, in any order */
  const int64_t dim[4] = {s->B, s->A, s->N, s->E}, stride[4] = {s->A * s->N * s->E, s->N * s->E, s->E, 1};
  fd_dnn_tensor dq_sum = fd_dnn_bound(g, DQ_SUM, F32, dim, stride);
  fd_dnn_matmul(g, ds, k, dq_sum, nq, NULL, nk);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_IDENTITY, F32, 0, dq_sum, NULL, NULL, dq);
}

/* ---- one call ---------------------------------------------------------------------------------------------------- */

/* Scratch: delta and the sums of dq (backward), then cuDNN's workspace. */
static size_t delta_bytes(const struct fd_cuda_sdpa *a) {
  return a->backward ? fd_cuda_aligned((size_t)(a->B * a->A * a->N) * sizeof(float)) : 0;
}
static size_t dq_bytes(fd_ctx *ctx, const struct fd_cuda_sdpa *a) {
  return a->backward && !ctx->deterministic ? fd_cuda_aligned((size_t)(a->B * a->A * a->N) * (size_t)a->E * sizeof(float)) : 0;
}

static fd_status find(fd_ctx *ctx, const struct fd_cuda_sdpa *a, const struct fd_dnn_plan **plan) {
  const struct shape s = {a->B, a->N, a->M, a->A, a->K, a->E, a->causal, ctx->deterministic};
  char key[FD_DNN_KEY];
  *plan = NULL;
  if (a->E % 8) return FD_OK; /* rows are read 16 bytes at a time */
  snprintf(key, sizeof key, "attention %s%s bf16, %lld sequences, %lld queries, %lld keys, %d heads, %d kv heads, head_dim %d",
           a->backward ? "backward" : "forward", a->causal ? " causal" : "", (long long)a->B, (long long)a->N, (long long)a->M, a->A, a->K, a->E);
  return fd_dnn_plan_find(ctx, key, a->backward ? backward : forward, &s, plan);
}

fd_status fd_cuda_sdpa_prepare(fd_ctx *ctx, const struct fd_cuda_sdpa *a, int *found, size_t *scratch_bytes) {
  const struct fd_dnn_plan *p = NULL;
  fd_status st = find(ctx, a, &p);
  *found = p != NULL;
  *scratch_bytes = p ? delta_bytes(a) + dq_bytes(ctx, a) + (size_t)p->workspace : 0;
  return st;
}

fd_status fd_cuda_sdpa(fd_ctx *ctx, const struct fd_cuda_sdpa *a, void *scratch) {
  const struct fd_dnn_plan *p = NULL;
  fd_status st = find(ctx, a, &p);
  if (st != FD_OK) return st;
  if (!p) return FD_FAIL(FD_ERR_UNSUPPORTED, "cuDNN has no plan for attention with head_dim %d", a->E);
  char *delta = scratch, *dq_sum = delta + delta_bytes(a), *workspace = dq_sum + dq_bytes(ctx, a);
  float scale = a->scale, minus_infinity = -INFINITY, one = 1;
  const struct {
    int64_t uid;
    const void *data;
  } bound[] = {{Q, a->q}, {K, a->k}, {V, a->v}, {O, a->o}, {LSE, a->lse}, {LENGTH_Q, a->n}, {LENGTH_K, a->m}, {SCALE, &scale},
               {MINUS_INFINITY, &minus_infinity}, /* the rest: backward */
               {D_O, a->d_o}, {DQ, a->dq}, {DK, a->dk}, {DV, a->dv}, {DELTA, delta}, {ONE, &one}, {DQ_SUM, dq_sum}};
  const int n = !a->backward ? 9 : ctx->deterministic ? 15 : 16;
  int64_t uid[FD_DNN_MAX_BOUND];
  void *data[FD_DNN_MAX_BOUND];
  for (int i = 0; i < n; i++) uid[i] = bound[i].uid, data[i] = (void *)bound[i].data;
  /* since 9.6 the library clears its sums of dq itself (cudnn-frontend, scaled_dot_product_flash_attention.h) */
  if (dq_bytes(ctx, a) && cudnnGetVersion() < 90600) st = FD_CUDA(cudaMemsetAsync(dq_sum, 0, dq_bytes(ctx, a), fd_cuda_stream(ctx)));
  return st == FD_OK ? fd_dnn_run(ctx, p, n, uid, data, workspace) : st;
}
