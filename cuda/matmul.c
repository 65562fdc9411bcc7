// SPDX-License-Identifier: Apache-2.0
// Matrix products by cuBLASLt. It thinks in columns: our row-major c [M, N] is its [N, M], so it computes c' = op(b)' op(a)'.
// Bound by arithmetic for production shapes: at least 75 % of the measured matrix peak expected in bf16.
// f32 is plain f32 (no TF32), so that records can be compared.
// Epilogues: bias (rounded to the type of c), and c itself (acc: residual streams and gradients). Gelu stands alone nowhere in the models but in projections of one row a
// sample; gated units multiply two halves of a row, and residuals are gated by sample: no epilogue of the library does that (geglu.cu, gate_residual.cu).
// Of the algorithms that the heuristic names the fastest is taken, timed once; with trainer.deterministic, or where nothing is kept (plan), its first, among those that split no
// sum. What was timed is kept in the run folder and used again when the run goes on, so that it keeps its bits.
#include <cublasLt.h>
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "comm/comm.h"
#include "cuda/library_state.h"

enum { MAX_KEPT = 1024, TRY = 8, WORKSPACE = 32 << 20, REPEAT = 5, ALIGN = 16 /* what the fast kernels want */ };
#define KEPT_NAME "cuda-matmul.json"

/* What makes two products the same for cuBLASLt. */
struct key {
  int64_t M, N, K, ldb; /* ldb: columns of b as stored, more than K where a count leaves out some */
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
static fd_status layout(cublasLtMatrixLayout_t *l, fd_dtype type, int64_t rows, int64_t cols, int64_t ld) {
  return BLAS(cublasLtMatrixLayoutCreate(l, type_of(type), (uint64_t)cols, (uint64_t)rows, ld));
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
#define KEY_MEMBERS(X) X(M) X(N) X(K) X(ldb) X(trans_a) X(trans_b) X(acc) X(bias) X(align) X(ab) X(c)

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

static size_t aligned(size_t bytes) { return (bytes + 255) & ~(size_t)255; }

static struct operands operands_of(const struct key *k, size_t workspace) {
  struct operands o = {NULL, 0, 0, 0, 0, 0, 0};
  o.b = aligned((size_t)(k->M * k->K) * fd_dtype_bytes(k->ab));
  o.c = o.b + aligned((size_t)((k->trans_b ? k->N : k->K) * k->ldb) * fd_dtype_bytes(k->ab));
  o.workspace = o.c + aligned((size_t)(k->M * k->N) * fd_dtype_bytes(k->c));
  o.bias = o.workspace + aligned(workspace);
  o.bytes = o.bias + aligned((size_t)k->N * sizeof(float));
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

/* An algorithm for a plan whose descriptors are made. */
static void choose(fd_ctx *ctx, struct fd_blas *blas, struct plan *p, size_t limit, const cublasLtMatmulHeuristicResult_t *found, int n) {
  cublasLtMatmulHeuristicResult_t checked;
  double us;
  int best = 0;
  const bool timed = ctx->cache_dir && !ctx->deterministic && !fd_cuda_of(ctx)->recording;
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
  int n = 0;
  const cublasOperation_t first = k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasLtEpilogue_t epilogue = k->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  const cudaDataType bias_type = type_of(k->c);
  const void *bias = (const void *)(uintptr_t)k->align; /* the heuristic looks at its alignment */
  const uint64_t workspace = limit;
  const uint32_t no_split = CUBLASLT_REDUCTION_SCHEME_NONE, align = (uint32_t)k->align;
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
  FD_TRY(k->trans_b ? layout(&p->a, k->ab, k->N, k->K, k->ldb) : layout(&p->a, k->ab, k->K, k->N, k->ldb));
  FD_TRY(k->trans_a ? layout(&p->b, k->ab, k->K, k->M, k->M) : layout(&p->b, k->ab, k->M, k->K, k->K));
  FD_TRY(layout(&p->c, k->c, k->M, k->N, k->N));
  FD_TRY(BLAS(cublasLtMatmulPreferenceCreate(&pref)));
  FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace)));
  for (int i = 0; i < 4; i++) FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, aligned_operand[i], &align, sizeof align)));
  if (ctx->deterministic)
    FD_TRY(BLAS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_split, sizeof no_split)));
  FD_TRY(BLAS(cublasLtMatmulAlgoGetHeuristic(blas->handle, p->op, p->a, p->b, p->c, p->c, pref, TRY, found, &n)));
  int usable = 0;
  for (int i = 0; i < n; i++)
    if (found[i].state == CUBLAS_STATUS_SUCCESS) found[usable++] = found[i];
  if (usable == 0)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "cuBLASLt: no algorithm for %s [%lld, %lld] = [.., %lld] x [.., %lld]", fd_dtype_name(k->ab),
                   (long long)k->M, (long long)k->N, (long long)k->K, (long long)k->N));
  choose(ctx, blas, p, limit, found, usable);
done:
  if (pref) cublasLtMatmulPreferenceDestroy(pref);
  if (st != FD_OK) plan_free(p);
  return st;
}

/* limit: bytes of workspace that a new plan may want; a plan that exists was prepared with its own. */
static fd_status plan_find(fd_ctx *ctx, const struct key *k, size_t limit, struct plan **out) {
  struct fd_blas *blas = fd_cuda_of(ctx)->blas;
  for (int i = 0; i < blas->n; i++)
    if (memcmp(&blas->plan[i].key, k, sizeof *k) == 0) {
      *out = &blas->plan[i];
      return FD_OK;
    }
  if (blas->n == blas->room) {
    struct plan *more = realloc(blas->plan, sizeof *more * (size_t)(2 * blas->room + 64));
    if (!more) return FD_FAIL(FD_ERR_NOMEM, "no memory for the plan of a matrix product");
    blas->plan = more;
    blas->room = 2 * blas->room + 64;
  }
  fd_status st = plan_make(ctx, blas, k, limit, &blas->plan[blas->n]);
  if (st == FD_OK) *out = &blas->plan[blas->n++];
  return st;
}

static int alignment(const fd_tensor *t) {
  int n = ALIGN; /* memory that is not bound yet, too: the arena's is aligned to 256 bytes, parameters to 128 */
  while ((uintptr_t)t->data % (unsigned)n) n /= 2;
  return n;
}

static int least(int a, int b) { return a < b ? a : b; }

/* An epilogue's bias has the type of c. A copy of that type lies in scratch before the workspace. */
static bool bias_is_cast(const struct fd_matmul_args *a) { return a->bias && a->bias->dtype != a->c->dtype; }
static size_t bias_bytes(const struct fd_matmul_args *a) {
  return bias_is_cast(a) ? aligned((size_t)fd_tensor_numel(a->bias) * fd_dtype_bytes(a->c->dtype)) : 0;
}

/* `used`: rows of a in use. */
static struct key key_of(const struct fd_matmul_args *a, int64_t used) {
  struct key k;
  memset(&k, 0, sizeof k); /* padding too: keys are compared as bytes */
  const int64_t a_cols = fd_tensor_cols(a->a), b_cols = fd_tensor_cols(a->b), b_rows = fd_tensor_rows(a->b);
  k.trans_a = a->trans_a, k.trans_b = a->trans_b;
  k.M = a->trans_a ? a_cols : used;
  k.K = a->trans_a ? used : a_cols;
  k.N = a->trans_b ? b_rows : b_cols;
  k.ldb = b_cols;
  k.acc = a->acc != 0;
  k.align = least(alignment(a->a), least(alignment(a->b), alignment(a->c)));
  k.bias = a->bias != NULL;
  if (k.bias && !bias_is_cast(a)) k.align = least(k.align, alignment(a->bias));
  k.ab = a->a->dtype, k.c = a->c->dtype;
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
  free(blas->plan);
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
  if (a->c->dtype != a->a->dtype && a->c->dtype != FD_F32) return fd_op_wrong_slot(FD_OP_matmul, "c", a->c, "%s or f32", fd_dtype_name(a->a->dtype));
  if (a->bias && fd_tensor_numel(a->bias) != N) return fd_op_wrong_slot(FD_OP_matmul, "bias", a->bias, "[%lld]", (long long)N);
  *scratch_bytes = bias_bytes(a);
  if (M == 0 || N == 0 || K == 0) return FD_OK;
  /* with a count: every tile that its writer rounds to (an eighth of the capacity), so that no plan is made in a step */
  for (int eighth = a->count ? 1 : 8; eighth <= 8; eighth++) {
    struct plan *p;
    const struct key k = key_of(a, (rows * eighth + 7) / 8);
    fd_status st = plan_find(ctx, &k, WORKSPACE, &p);
    if (st != FD_OK) return st;
    if (bias_bytes(a) + p->workspace > *scratch_bytes) *scratch_bytes = bias_bytes(a) + p->workspace;
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
  if (((struct fd_blas *)fd_cuda_of(ctx)->blas)->unsaved) save_kept(ctx, fd_cuda_of(ctx)->blas); /* the plan is complete: ops run */
  if (k.M == 0 || k.N == 0) return FD_OK;
  if (k.K == 0) {
    if (!a->acc) st = FD_CUDA(cudaMemsetAsync(a->c->data, 0, fd_tensor_bytes(a->c), stream));
    const struct fd_add_fwd_args add = {.x = a->c, .y = a->bias, .z = a->c};
    return st == FD_OK && a->bias ? cuda_add_fwd(ctx, &add) : st;
  }
  st = plan_find(ctx, &k, 0, &p); /* one that was not prepared (a view at an odd address) gets no workspace, so it suits any scratch */
  if (st != FD_OK) return st;
  if (k.bias) {
    fd_tensor bias = *a->bias;
    if (bias_is_cast(a)) {
      bias.data = ctx->scratch, bias.dtype = a->c->dtype;
      const struct fd_cast_args cast = {.x = a->bias, .y = &bias};
      st = cuda_cast(ctx, &cast);
    }
    if (st == FD_OK) st = BLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.data, sizeof bias.data));
  }
  if (st == FD_OK)
    st = BLAS(cublasLtMatmul(((struct fd_blas *)fd_cuda_of(ctx)->blas)->handle, p->op, &one, a->b->data, p->a, a->a->data, p->b,
                             a->acc ? &one : &zero, a->c->data, p->c, a->c->data, p->c, &p->algo, p->workspace ? (char *)ctx->scratch + bias_bytes(a) : NULL, p->workspace, stream));
  return st;
}
