// SPDX-License-Identifier: Apache-2.0
// cuBLASLt: plans of matrix products, alone or in batches. It thinks in columns: our row-major c [M, N] is its [N, M], so it computes
// c' = op(b)' op(a)', and a and b change places. f32 is plain f32 (no TF32), so that records can be compared.
// Of the algorithms that the heuristic names the fastest is taken, timed once when a product is prepared; where nothing is kept (plan) its first;
// with trainer.deterministic its first among those that split no sum. What was timed is kept in the run folder and used again when the run goes
// on, so that it keeps its bits.
#include <cublasLt.h>
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "comm/comm.h"
#include "cuda/library.h"

enum { MAX_KEPT = 1024, TRY = 8, WORKSPACE = 32 << 20, REPEAT = 5, ALIGN = 16 /* what the fast kernels want */ };
#define KEPT_NAME "cuda-matmul.json"

/* What makes two products the same for cuBLASLt. */
struct key {
  int64_t M, N, K, batch, ldb, a_stride, b_stride, c_stride;
  int trans_a, trans_b, acc, bias;
  int align; /* bytes that divide every operand's address: ALIGN, or less for a view that begins anywhere */
  fd_dtype ab, c;
};

/* An algorithm that was timed, now or in an earlier run. */
struct kept {
  struct key key;
  cublasLtMatmulAlgo_t algo;
  double us;
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
  struct plan *plan;
  int n, room;
  struct kept kept[MAX_KEPT];
  int n_kept;
  bool looked, unsaved; /* for what the run folder keeps; kept holds what it does not */
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

/* A row-major [rows, cols] is cuBLASLt's [cols, rows] with the same leading dimension. */
static fd_status layout(cublasLtMatrixLayout_t *l, const struct key *k, fd_dtype type, int64_t rows, int64_t cols, int64_t ld, int64_t stride) {
  fd_status st = FD_OK;
  const int32_t batch = (int32_t)k->batch;
  FD_TRY(BLAS(cublasLtMatrixLayoutCreate(l, type_of(type), (uint64_t)cols, (uint64_t)rows, ld)));
  if (batch == 1) goto done;
  FD_TRY(BLAS(cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch)));
  FD_TRY(BLAS(cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride)));
done:
  return st;
}

/* ---- what the run folder keeps ------------------------------------------------------------------------------------ */

/* Times hold for this GPU and these versions only. The caller frees it. */
static char *made_on(const fd_ctx *ctx) {
  struct cudaDeviceProp prop;
  char *text = NULL;
  int driver = 0;
  if (cudaGetDeviceProperties(&prop, fd_cuda_of((fd_ctx *)ctx)->device) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess) return NULL;
  if (asprintf(&text, "%s, driver %d, cuBLASLt %zu", prop.name, driver, cublasLtGetVersion()) < 0) return NULL;
  return text;
}

/* Every member of a key, once for reading and writing. */
#define KEY_MEMBERS(X) \
  X(M) X(N) X(K) X(batch) X(ldb) X(a_stride) X(b_stride) X(c_stride) X(trans_a) X(trans_b) X(acc) X(bias) X(align) X(ab) X(c)

static bool read_kept(const json_t *j, struct kept *k) {
  const char *hex = json_string_value(json_object_get(j, "algorithm"));
  memset(k, 0, sizeof *k);
#define READ(m) k->key.m = json_integer_value(json_object_get(j, #m));
  KEY_MEMBERS(READ)
#undef READ
  k->us = json_number_value(json_object_get(j, "us"));
  if (!hex || strlen(hex) != 2 * sizeof k->algo) return false;
  for (size_t i = 0; i < sizeof k->algo; i++) {
    unsigned byte;
    if (sscanf(hex + 2 * i, "%2x", &byte) != 1) return false;
    ((unsigned char *)&k->algo)[i] = (unsigned char)byte;
  }
  return true;
}

static json_t *write_kept(const struct kept *k) {
  char hex[2 * sizeof k->algo + 1];
  json_t *j = json_object();
#define WRITE(m) json_object_set_new(j, #m, json_integer((json_int_t)k->key.m));
  KEY_MEMBERS(WRITE)
#undef WRITE
  for (size_t i = 0; i < sizeof k->algo; i++) snprintf(hex + 2 * i, 3, "%02x", ((const unsigned char *)&k->algo)[i]);
  json_object_set_new(j, "us", json_real(k->us));
  json_object_set_new(j, "algorithm", json_string(hex));
  return j;
}

/* A file that is not there, or was made elsewhere, only means that products are timed again. */
static void load_kept(fd_ctx *ctx, struct fd_blas *blas) {
  char path[4096];
  json_t *root = NULL;
  char *here = made_on(ctx);
  blas->looked = true;
  if (ctx->cache_dir && snprintf(path, sizeof path, "%s/" KEPT_NAME, ctx->cache_dir) < (int)sizeof path) root = json_load_file(path, 0, NULL);
  const char *there = json_string_value(json_object_get(root, "made_on"));
  if (there && here && strcmp(there, here) != 0 && fd_comm_rank(ctx->comm) == 0)
    fd_log_info("%s is from \"%s\", this is \"%s\": matrix products are timed anew", path, there, here);
  if (there && here && strcmp(there, here) == 0) {
    const json_t *list = json_object_get(root, "products");
    for (size_t i = 0; i < json_array_size(list) && blas->n_kept < MAX_KEPT; i++)
      if (read_kept(json_array_get(list, i), &blas->kept[blas->n_kept])) blas->n_kept++;
  }
  json_decref(root);
  free(here);
}

/* Rank 0 writes; all read. A folder that cannot be written to costs time at the next start, no more. */
static void save_kept(fd_ctx *ctx, struct fd_blas *blas) {
  char path[4096], part[4200];
  blas->unsaved = false;
  if (!ctx->cache_dir || fd_comm_rank(ctx->comm) != 0) return;
  char *here = made_on(ctx);
  json_t *root = json_object(), *list = json_array();
  json_object_set_new(root, "made_on", here ? json_string(here) : json_null());
  for (int i = 0; i < blas->n_kept; i++) json_array_append_new(list, write_kept(&blas->kept[i]));
  json_object_set_new(root, "products", list);
  snprintf(path, sizeof path, "%s/" KEPT_NAME, ctx->cache_dir);
  snprintf(part, sizeof part, "%s.part", path);
  if (json_dump_file(root, part, JSON_INDENT(1)) != 0 || rename(part, path) != 0)
    fd_log_info("%s: not written (%s); the next start times matrix products again", path, strerror(errno));
  json_decref(root);
  free(here);
}

static struct kept *find_kept(struct fd_blas *blas, const struct key *k) {
  for (int i = 0; i < blas->n_kept; i++)
    if (memcmp(&blas->kept[i].key, k, sizeof *k) == 0) return &blas->kept[i];
  return NULL;
}

/* ---- choice of the algorithm --------------------------------------------------------------------------------------- */

struct operands {
  char *memory; /* a, b, c, workspace, bias, one behind the other */
  size_t a, b, c, workspace, bias, bytes;
};

/* Bytes of one operand of all batches, whose matrices have n elements each. */
static size_t operand_bytes(const struct key *k, int64_t n, int64_t stride, fd_dtype type) {
  return fd_cuda_aligned((size_t)((k->batch - 1) * stride + n) * fd_dtype_bytes(type));
}

static struct operands operands_of(const struct key *k, size_t workspace) {
  struct operands o = {NULL, 0, 0, 0, 0, 0, 0};
  o.b = operand_bytes(k, k->M * k->K, k->a_stride, k->ab);
  o.c = o.b + operand_bytes(k, (k->trans_b ? k->N : k->K) * k->ldb, k->b_stride, k->ab);
  o.workspace = o.c + operand_bytes(k, k->M * k->N, k->c_stride, k->c);
  o.bias = o.workspace + fd_cuda_aligned(workspace);
  o.bytes = o.bias + fd_cuda_aligned((size_t)k->N * sizeof(float));
  return o;
}

/* Microseconds of one product; infinite if the library refuses it. */
static double time_algorithm(struct fd_blas *blas, const struct plan *p, const struct operands *o, const cublasLtMatmulAlgo_t *algo,
                             size_t workspace, cudaStream_t stream, cudaEvent_t from, cudaEvent_t to) {
  const float one = 1.0f, beta = p->key.acc ? 1.0f : 0.0f;
  float ms = INFINITY;
  for (int i = 0; i <= REPEAT; i++) { /* the first loads the kernel */
    if (i == 1 && cudaEventRecord(from, stream) != cudaSuccess) return INFINITY;
    if (cublasLtMatmul(blas->handle, p->op, &one, o->memory + o->b, p->a, o->memory + o->a, p->b, &beta, o->memory + o->c, p->c, o->memory + o->c,
                       p->c, algo, o->memory + o->workspace, workspace, stream) != CUBLAS_STATUS_SUCCESS)
      return INFINITY;
  }
  if (cudaEventRecord(to, stream) != cudaSuccess || cudaEventSynchronize(to) != cudaSuccess || cudaEventElapsedTime(&ms, from, to) != cudaSuccess)
    return INFINITY;
  return 1e3 * ms / REPEAT;
}

/* The fastest of n, with operands of its own; the heuristic's first where there is no memory for them. */
static int fastest(fd_ctx *ctx, struct fd_blas *blas, struct plan *p, const cublasLtMatmulHeuristicResult_t *found, int n, double *us) {
  size_t workspace = 0;
  for (int i = 0; i < n; i++)
    if (found[i].workspaceSize > workspace) workspace = found[i].workspaceSize;
  struct operands o = operands_of(&p->key, workspace);
  const cudaStream_t stream = fd_cuda_stream(ctx);
  cudaEvent_t from = NULL, to = NULL;
  int best = 0;
  *us = INFINITY;
  if (cudaMalloc((void **)&o.memory, o.bytes) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  const void *bias = o.memory + o.bias;
  /* 0x3c3c: small numbers in both types; zeros are faster than data ever is */
  if (cudaMemsetAsync(o.memory, 0x3c, o.bytes, stream) == cudaSuccess && cudaEventCreate(&from) == cudaSuccess && cudaEventCreate(&to) == cudaSuccess &&
      (!p->key.bias || cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias) == CUBLAS_STATUS_SUCCESS))
    for (int i = 0; i < n; i++) {
      const double t = time_algorithm(blas, p, &o, &found[i].algo, found[i].workspaceSize, stream, from, to);
      if (t < *us) *us = t, best = i;
    }
  if (from) cudaEventDestroy(from);
  if (to) cudaEventDestroy(to);
  (void)cudaStreamSynchronize(stream);
  cudaFree(o.memory);
  return best;
}

/* An algorithm for a plan whose descriptors are made. Times nothing within a step (limit 0). */
static void choose(fd_ctx *ctx, struct fd_blas *blas, struct plan *p, size_t limit, const cublasLtMatmulHeuristicResult_t *found, int n) {
  cublasLtMatmulHeuristicResult_t checked;
  double us;
  int best = 0;
  const bool timed = limit > 0 && ctx->cache_dir && !ctx->deterministic;
  if (timed && !blas->looked) load_kept(ctx, blas);
  struct kept *k = timed ? find_kept(blas, &p->key) : NULL;
  if (k && cublasLtMatmulAlgoCheck(blas->handle, p->op, p->a, p->b, p->c, p->c, &k->algo, &checked) == CUBLAS_STATUS_SUCCESS &&
      checked.workspaceSize <= limit) {
    p->algo = k->algo;
    p->workspace = checked.workspaceSize;
    return;
  }
  if (timed && n > 1) {
    best = fastest(ctx, blas, p, found, n, &us);
    if (isfinite(us) && (k || blas->n_kept < MAX_KEPT)) {
      if (!k) k = &blas->kept[blas->n_kept++];
      *k = (struct kept){.algo = found[best].algo, .us = us};
      memcpy(&k->key, &p->key, sizeof k->key); /* padding too */
      blas->unsaved = true;
    }
  }
  p->algo = found[best].algo;
  p->workspace = found[best].workspaceSize;
}

static fd_status plan_make(fd_ctx *ctx, struct fd_blas *blas, const struct key *k, size_t limit, struct plan *p) {
  fd_status st = FD_OK;
  cublasLtMatmulPreference_t pref = NULL;
  cublasLtMatmulHeuristicResult_t found[TRY];
  int n = 0, usable = 0;
  const cublasOperation_t first = k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasLtEpilogue_t epilogue = k->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  const cudaDataType bias_type = type_of(k->c);
  const void *bias = (const void *)(uintptr_t)k->align; /* the heuristic looks at its alignment */
  const uint64_t workspace = limit;
  /* parts of a split sum are added in the type of c by the other schemes, so for bf16 only that in compute type keeps sums in f32 */
  const uint32_t split = ctx->deterministic ? CUBLASLT_REDUCTION_SCHEME_NONE
                         : k->c == FD_BF16  ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
                                            : CUBLASLT_REDUCTION_SCHEME_MASK;
  const uint32_t align = (uint32_t)k->align;
  static const cublasLtMatmulPreferenceAttributes_t aligned_operand[] = {
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  memset(p, 0, sizeof *p);
  memcpy(&p->key, k, sizeof p->key); /* padding too */
  FD_TRY(BLAS(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F)));
  FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first)));
  FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second)));
  FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue)));
  if (k->bias) {
    FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type)));
    FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias)));
  }
  FD_TRY(k->trans_b ? layout(&p->a, k, k->ab, k->N, k->K, k->ldb, k->b_stride) : layout(&p->a, k, k->ab, k->K, k->N, k->ldb, k->b_stride));
  FD_TRY(k->trans_a ? layout(&p->b, k, k->ab, k->K, k->M, k->M, k->a_stride) : layout(&p->b, k, k->ab, k->M, k->K, k->K, k->a_stride));
  FD_TRY(layout(&p->c, k, k->c, k->M, k->N, k->N, k->c_stride));
  FD_TRY(BLAS(cublasLtMatmulPreferenceCreate(&pref)));
  FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace)));
  for (int i = 0; i < 4; i++) FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, aligned_operand[i], &align, sizeof align)));
  FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &split, sizeof split)));
  FD_TRY(BLAS(cublasLtMatmulAlgoGetHeuristic(blas->handle, p->op, p->a, p->b, p->c, p->c, pref, TRY, found, &n)));
  for (int i = 0; i < n; i++)
    if (found[i].state == CUBLAS_STATUS_SUCCESS) found[usable++] = found[i];
  if (usable == 0)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "cuBLASLt: no algorithm for %lld x %s [%lld, %lld] = [%lld, %lld] x [%lld, %lld]", (long long)k->batch,
                   fd_dtype_name(k->ab), (long long)k->M, (long long)k->N, (long long)k->M, (long long)k->K, (long long)k->K, (long long)k->N));
  choose(ctx, blas, p, limit, found, usable);
done:
  if (pref) cublasLtMatmulPreferenceDestroy(pref);
  if (st != FD_OK) plan_free(p);
  return st;
}

static int alignment(const void *p) {
  int n = ALIGN; /* memory that is not bound yet, too: the arena's is aligned to 256 bytes, parameters to 128 */
  while ((uintptr_t)p % (unsigned)n) n /= 2;
  return n;
}

static int least(int a, int b) { return a < b ? a : b; }

/* limit: bytes of workspace that a new plan may want; a plan that exists was prepared with its own. */
static fd_status plan_find(fd_ctx *ctx, const struct fd_cuda_gemm *g, size_t limit, struct plan **out) {
  struct fd_blas *blas = fd_cuda_of(ctx)->blas;
  struct key k;
  memset(&k, 0, sizeof k); /* padding too: keys are compared as bytes */
  k.M = g->M, k.N = g->N, k.K = g->K, k.batch = g->batch, k.ldb = g->ldb ? g->ldb : g->trans_b ? g->K : g->N;
  k.a_stride = g->a_stride, k.b_stride = g->b_stride, k.c_stride = g->c_stride;
  k.trans_a = g->trans_a, k.trans_b = g->trans_b, k.acc = g->beta != 0, k.bias = g->has_bias, k.ab = g->ab, k.c = g->c_type;
  k.align = least(least(alignment(g->a), alignment(g->b)), least(alignment(g->c), g->has_bias ? alignment(g->bias) : ALIGN));
  for (int i = 0; i < blas->n; i++)
    if (memcmp(&blas->plan[i].key, &k, sizeof k) == 0) {
      *out = &blas->plan[i];
      return FD_OK;
    }
  if (blas->n == blas->room) {
    struct plan *more = realloc(blas->plan, sizeof *more * (size_t)(2 * blas->room + 64));
    if (!more) return FD_FAIL(FD_ERR_NOMEM, "no memory for the plan of a matrix product");
    blas->plan = more;
    blas->room = 2 * blas->room + 64;
  }
  fd_status st = plan_make(ctx, blas, &k, limit, &blas->plan[blas->n]);
  if (st == FD_OK) *out = &blas->plan[blas->n++];
  return st;
}

fd_status fd_cuda_gemm_open(fd_ctx *ctx) {
  struct fd_blas *blas = calloc(1, sizeof *blas);
  if (!blas) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  fd_cuda_of(ctx)->blas = blas;
  return BLAS(cublasLtCreate(&blas->handle));
}

void fd_cuda_gemm_close(fd_ctx *ctx) {
  struct fd_blas *blas = fd_cuda_of(ctx)->blas;
  if (!blas) return;
  for (int i = 0; i < blas->n; i++) plan_free(&blas->plan[i]);
  free(blas->plan);
  if (blas->handle) cublasLtDestroy(blas->handle);
  free(blas);
  fd_cuda_of(ctx)->blas = NULL;
}

fd_status fd_cuda_gemm_prepare(fd_ctx *ctx, const struct fd_cuda_gemm *g, size_t *scratch_bytes) {
  struct plan *p = NULL;
  const fd_status st = plan_find(ctx, g, WORKSPACE, &p);
  *scratch_bytes = st == FD_OK ? p->workspace : 0;
  return st;
}

fd_status fd_cuda_gemm(fd_ctx *ctx, const struct fd_cuda_gemm *g, void *scratch) {
  fd_status st = FD_OK;
  struct fd_blas *blas = fd_cuda_of(ctx)->blas;
  struct plan *p = NULL;
  if (blas->unsaved) save_kept(ctx, blas); /* all are prepared: ops run */
  FD_TRY(plan_find(ctx, g, 0, &p)); /* one that was not prepared (a view at an odd address) gets no workspace, so it suits any scratch */
  if (g->has_bias) FD_TRY(BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g->bias, sizeof g->bias)));
  FD_TRY(BLAS(cublasLtMatmul(blas->handle, p->op, &g->alpha, g->b, p->a, g->a, p->b, &g->beta, g->c, p->c, g->c, p->c, &p->algo,
                             p->workspace ? scratch : NULL, p->workspace, fd_cuda_stream(ctx))));
done:
  return st;
}
