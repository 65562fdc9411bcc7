// SPDX-License-Identifier: Apache-2.0
// cuBLASLt by oneDNN's sgemm, on copies. It is stricter than the library, which reads and writes what it is told: operands may not overlap,
// the workspace is overwritten, an algorithm holds for the shape and the alignments that it was made for.
// A refusal is explained on stderr, as the library does in its log.
#include "tests/emulate/cublasLt.h"

#include <dnnl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "tests/emulate/emulate.h"

enum { A, B, C, D, BIAS, OPERANDS };
enum { SOME_WORKSPACE = 64 << 10, WORKSPACE_ALIGN = 16, BEST_ALIGN = 16 };
static const uint64_t MAGIC = 0x66642d656d752d31;

struct fd_emu_lt {
  int unused;
};
struct fd_emu_lt_op {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  int32_t trans[2]; /* of A, of B */
  uint32_t epilogue;
  const void *bias;
  int32_t bias_type;
};
struct fd_emu_lt_layout {
  cudaDataType type;
  uint64_t rows, cols;
  int64_t ld, stride;
  int32_t batch;
};
struct fd_emu_lt_pref {
  uint64_t workspace;
  uint32_t reductions, align[BIAS]; /* of A, B, C, D */
};

struct fd_emu_lt_calls fd_emu_lt_calls;

static cublasStatus_t refuse(cublasStatus_t s, const char *why) {
  fprintf(stderr, "emulate: cuBLASLt: %s: %s\n", cublasLtGetStatusName(s), why);
  return s;
}
static cublasStatus_t invalid(const char *why) { return refuse(CUBLAS_STATUS_INVALID_VALUE, why); }
static cublasStatus_t unsupported(const char *why) { return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why); }

size_t cublasLtGetVersion(void) { return 0; }

const char *cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
  }
  return "unknown";
}

/* ---- handles and descriptors ------------------------------------------------------------------------------------- */

static cublasStatus_t create(void **out, const void *value, size_t bytes) {
  if (!out) return invalid("no place for the handle");
  *out = malloc(bytes);
  if (!*out) return CUBLAS_STATUS_ALLOC_FAILED;
  memcpy(*out, value, bytes);
  fd_emu_lt_calls.live++;
  return CUBLAS_STATUS_SUCCESS;
}
static cublasStatus_t destroy(void *p) {
  fd_emu_lt_calls.live -= p != NULL;
  free(p);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  const struct fd_emu_lt h = {0};
  return create((void **)handle, &h, sizeof h);
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *op, cublasComputeType_t compute, cudaDataType_t scale) {
  const struct fd_emu_lt_op o = {compute, scale, {CUBLAS_OP_N, CUBLAS_OP_N}, CUBLASLT_EPILOGUE_DEFAULT, NULL, -1};
  return create((void **)op, &o, sizeof o);
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
  const struct fd_emu_lt_layout l = {type, rows, cols, ld, 0, 1};
  return create((void **)layout, &l, sizeof l);
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *pref) {
  const struct fd_emu_lt_pref p = {0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}};
  return create((void **)pref, &p, sizeof p);
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t op) { return destroy(op); }
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref) { return destroy(pref); }

static cublasStatus_t set(void *member, size_t wanted, const void *value, size_t bytes) {
  if (!value || bytes != wanted) return invalid("an attribute of another size");
  memcpy(member, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
#define SET(member) set(&(member), sizeof(member), value, bytes)

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t op, cublasLtMatmulDescAttributes_t attr, const void *value, size_t bytes) {
  if (!op) return invalid("no descriptor");
  switch (attr) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return SET(op->trans[A]);
    case CUBLASLT_MATMUL_DESC_TRANSB: return SET(op->trans[B]);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return SET(op->epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return SET(op->bias);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return SET(op->bias_type);
  }
  return invalid("an unknown attribute of a product");
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attr, const void *value, size_t bytes) {
  if (!layout) return invalid("no layout");
  switch (attr) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return SET(layout->batch);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return SET(layout->stride);
  }
  return invalid("an unknown attribute of a layout");
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref, cublasLtMatmulPreferenceAttributes_t attr, const void *value,
                                                    size_t bytes) {
  if (!pref) return invalid("no preference");
  switch (attr) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return SET(pref->workspace);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return SET(pref->reductions);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return SET(pref->align[A]);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return SET(pref->align[B]);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return SET(pref->align[C]);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return SET(pref->align[D]);
  }
  return invalid("an unknown preference");
}

/* ---- what is to be computed, and algorithms for it --------------------------------------------------------------- */

struct problem {
  int64_t m, n, k, batch, ld[BIAS], stride[BIAS], extent[BIAS] /* elements that one matrix spans */;
  int64_t trans[2], bias;
  int64_t ab_type, d_type;
};

static bool is_float(cudaDataType t) { return t == CUDA_R_16BF || t == CUDA_R_32F; }
static size_t size_of(int64_t type) { return type == CUDA_R_16BF ? 2 : 4; }

static cublasStatus_t describe(const struct fd_emu_lt_op *op, const struct fd_emu_lt_layout *const l[BIAS], struct problem *p) {
  memset(p, 0, sizeof *p); /* it is hashed */
  if (!op || !l[A] || !l[B] || !l[C] || !l[D]) return invalid("no descriptor");
  if (op->compute != CUBLAS_COMPUTE_32F || op->scale != CUDA_R_32F) return unsupported("sums and factors are f32");
  if (!is_float(l[A]->type) || l[B]->type != l[A]->type || !is_float(l[D]->type) || l[C]->type != l[D]->type ||
      (l[A]->type == CUDA_R_32F && l[D]->type != CUDA_R_32F))
    return unsupported("types: bf16 x bf16 to bf16 or f32, or f32 x f32 to f32; C as D");
  for (int i = A; i <= D; i++) {
    if (l[i]->rows < 1 || l[i]->cols < 1 || l[i]->rows > INT32_MAX || l[i]->cols > INT32_MAX) return invalid("an empty or too large matrix");
    if (l[i]->ld < (int64_t)l[i]->rows) return invalid("a leading dimension below the rows");
    p->ld[i] = l[i]->ld;
    p->extent[i] = l[i]->ld * ((int64_t)l[i]->cols - 1) + (int64_t)l[i]->rows;
    if (l[i]->batch < 1 || l[i]->batch != l[D]->batch) return invalid("batches differ");
    if (l[i]->batch > 1 && (l[i]->stride < 0 || (i >= C && l[i]->stride < p->extent[i]))) return invalid("matrices of a batch overlap");
    p->stride[i] = l[i]->stride;
  }
  for (int i = A; i <= B; i++) {
    if (op->trans[i] != CUBLAS_OP_N && op->trans[i] != CUBLAS_OP_T && op->trans[i] != CUBLAS_OP_C) return invalid("a transposition that is none");
    p->trans[i] = op->trans[i] != CUBLAS_OP_N;
  }
  p->m = (int64_t)(p->trans[A] ? l[A]->cols : l[A]->rows);
  p->k = (int64_t)(p->trans[A] ? l[A]->rows : l[A]->cols);
  p->n = (int64_t)(p->trans[B] ? l[B]->rows : l[B]->cols);
  if ((int64_t)(p->trans[B] ? l[B]->cols : l[B]->rows) != p->k) return invalid("inner lengths differ");
  for (int i = C; i <= D; i++)
    if ((int64_t)l[i]->rows != p->m || (int64_t)l[i]->cols != p->n) return invalid("C or D is of another shape than op(A) op(B)");
  if (op->epilogue != CUBLASLT_EPILOGUE_DEFAULT && op->epilogue != CUBLASLT_EPILOGUE_BIAS) return unsupported("an epilogue other than a bias");
  p->bias = op->epilogue == CUBLASLT_EPILOGUE_BIAS;
  p->batch = l[D]->batch, p->ab_type = l[A]->type, p->d_type = l[D]->type;
  if (p->bias && op->bias_type != -1 && op->bias_type != (int32_t)l[D]->type) return unsupported("a bias of another type than D");
  return CUBLAS_STATUS_SUCCESS;
}

/* The 64 bytes of cublasLtMatmulAlgo_t. */
struct algo {
  uint64_t magic, problem, workspace;
  uint32_t split;
  uint16_t align[OPERANDS];
  uint16_t rounds; /* parts are added in D's own bf16 */
  uint16_t zero[4];
  uint64_t check; /* hash of what is before it */
};
_Static_assert(sizeof(struct algo) <= sizeof(cublasLtMatmulAlgo_t), "an algorithm fits");

static uint64_t hash(const void *data, size_t bytes) {
  uint64_t h = 14695981039346656037u;
  for (size_t i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)data)[i]) * 1099511628211u;
  return h;
}

static cublasStatus_t read_algo(const cublasLtMatmulAlgo_t *from, const struct problem *p, struct algo *a) {
  if (!from) return invalid("no algorithm");
  memcpy(a, from, sizeof *a);
  if (a->magic != MAGIC || a->check != hash(a, offsetof(struct algo, check))) return CUBLAS_STATUS_INVALID_VALUE; /* not one of ours */
  return a->problem == hash(p, sizeof *p) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

static uint32_t alignment(const void *p) {
  uint32_t n = BEST_ALIGN;
  while ((uintptr_t)p % n) n /= 2;
  return n;
}

static cublasLtMatmulHeuristicResult_t result_of(const struct algo *a) {
  cublasLtMatmulHeuristicResult_t r;
  memset(&r, 0, sizeof r);
  memcpy(&r.algo, a, sizeof *a);
  r.workspaceSize = a->workspace;
  r.wavesCount = 1;
  return r;
}

/* Two that sum in parts, one that is refused, and two others. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t pref, int wanted,
                                              cublasLtMatmulHeuristicResult_t *found, int *n) {
  struct problem p;
  struct algo algo;
  fd_emu_lt_calls.heuristics++;
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!pref || !found || !n || wanted < 1) return invalid("no preference, or no place for an algorithm");
  *n = 0;
  const cublasStatus_t st = describe(op, (const struct fd_emu_lt_layout *const[]){a, b, c, d}, &p);
  if (st != CUBLAS_STATUS_SUCCESS) return st;
  memset(&algo, 0, sizeof algo);
  algo.magic = MAGIC, algo.problem = hash(&p, sizeof p);
  for (int i = A; i <= D; i++) {
    if (pref->align[i] < size_of(i <= B ? p.ab_type : p.d_type) || pref->align[i] > 256 || (pref->align[i] & (pref->align[i] - 1)))
      return unsupported("a least alignment below an element, or no power of two");
    algo.align[i] = (uint16_t)pref->align[i];
  }
  algo.align[BIAS] = (uint16_t)(p.bias ? alignment(op->bias) : 1); /* NULL: the best */
  const struct {
    uint32_t split, reduction;
    uint64_t workspace;
    bool refused;
  } all[] = {{4, CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE, 0, false},
             {2, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 2 * (uint64_t)(p.m * p.n * p.batch) * sizeof(float), false},
             {1, 0, 0, true},
             {1, 0, SOME_WORKSPACE, false},
             {1, 0, 0, false}};
  for (size_t i = 0; i < sizeof all / sizeof *all && *n < wanted; i++) {
    if (all[i].split > 1 && (p.k < all[i].split || !(pref->reductions & all[i].reduction))) continue;
    if (all[i].reduction == CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE && p.d_type != CUDA_R_16BF) continue;
    if (all[i].workspace > pref->workspace) continue;
    algo.split = all[i].split, algo.workspace = all[i].workspace;
    algo.rounds = all[i].reduction == CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    algo.check = hash(&algo, offsetof(struct algo, check));
    found[*n] = result_of(&algo);
    if (all[i].refused) {
      if (*n == 0) continue; /* not where one is wanted */
      memset(&found[*n], 0xff, sizeof *found);
      found[*n].state = CUBLAS_STATUS_NOT_SUPPORTED;
    }
    ++*n;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *result) {
  struct problem p;
  struct algo own;
  fd_emu_lt_calls.checks++;
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!result) return invalid("no place for the result");
  cublasStatus_t st = describe(op, (const struct fd_emu_lt_layout *const[]){a, b, c, d}, &p);
  if (st == CUBLAS_STATUS_SUCCESS) st = read_algo(algo, &p, &own);
  if (st == CUBLAS_STATUS_SUCCESS) *result = result_of(&own);
  return st;
}

/* ---- the product ------------------------------------------------------------------------------------------------- */

/* A call, which a captured stream makes later. */
struct call {
  struct problem p;
  struct algo algo;
  float alpha, beta;
  const void *at[OPERANDS];
  void *workspace;
  size_t workspace_bytes;
};

static float *to_host(const void *device, int64_t n, int64_t type) {
  const size_t bytes = (size_t)n * size_of(type);
  float *x = malloc((size_t)n * sizeof *x);
  void *raw = type == CUDA_R_16BF && x ? malloc(bytes) : x;
  if (!raw || cudaMemcpy(raw, device, bytes, cudaMemcpyDeviceToHost) != cudaSuccess) {
    if (raw != x) free(raw);
    free(x);
    return NULL;
  }
  if (raw != x) {
    for (int64_t i = 0; i < n; i++) x[i] = fd_bf16_to_f32(((const fd_bf16 *)raw)[i]);
    free(raw);
  }
  return x;
}

/* Columns of m elements; gaps between them (ld > m) are not written. */
static bool to_device(void *device, const float *x, const struct problem *p) {
  const size_t size = size_of(p->d_type);
  const int64_t ld = p->ld[D], n = p->extent[D];
  char *raw = malloc((size_t)n * size);
  bool ok = raw != NULL;
  for (int64_t i = 0; i < n && ok; i++) {
    if (p->d_type == CUDA_R_16BF)
      ((fd_bf16 *)raw)[i] = fd_f32_to_bf16(x[i]);
    else
      ((float *)raw)[i] = x[i];
  }
  if (ld == p->m)
    ok = ok && cudaMemcpy(device, raw, (size_t)n * size, cudaMemcpyHostToDevice) == cudaSuccess;
  else
    for (int64_t j = 0; j < p->n && ok; j++)
      ok = cudaMemcpy((char *)device + (size_t)(j * ld) * size, raw + (size_t)(j * ld) * size, (size_t)p->m * size, cudaMemcpyHostToDevice) == cudaSuccess;
  free(raw);
  return ok;
}

static const void *matrix(const struct call *c, int i, int64_t s) {
  return (const char *)c->at[i] + (size_t)(s * c->p.stride[i]) * size_of(i <= B ? c->p.ab_type : c->p.d_type);
}

/* By rows, D' = op(B)' op(A)': what is not transposed in columns is not in rows. */
static bool multiply(const struct call *c, int64_t s, const float *bias) {
  const struct problem *p = &c->p;
  float *a = to_host(matrix(c, A, s), p->extent[A], p->ab_type), *b = to_host(matrix(c, B, s), p->extent[B], p->ab_type);
  float *old = c->beta != 0 ? to_host(matrix(c, C, s), p->extent[C], p->d_type) : NULL, *d = calloc((size_t)p->extent[D], sizeof *d);
  bool ok = a && b && d && (c->beta == 0 || old);
  for (uint32_t part = 0; part < c->algo.split && ok; part++) {
    const int64_t from = p->k * part / c->algo.split, to = p->k * (part + 1) / c->algo.split;
    ok = dnnl_sgemm(p->trans[B] ? 'T' : 'N', p->trans[A] ? 'T' : 'N', p->n, p->m, to - from, 1, b + from * (p->trans[B] ? p->ld[B] : 1), p->ld[B],
                    a + from * (p->trans[A] ? 1 : p->ld[A]), p->ld[A], part > 0, d, p->ld[D]) == dnnl_success;
    for (int64_t i = 0; i < p->extent[D] && c->algo.rounds; i++) d[i] = fd_bf16_to_f32(fd_f32_to_bf16(d[i]));
  }
  for (int64_t j = 0; j < p->n && ok; j++)
    for (int64_t i = 0; i < p->m; i++) {
      float *to = &d[i + j * p->ld[D]];
      *to *= c->alpha;
      if (old) *to += c->beta * old[i + j * p->ld[C]];
      if (bias) *to += bias[i];
    }
  ok = ok && to_device((void *)matrix(c, D, s), d, p);
  free(a), free(b), free(old), free(d);
  return ok;
}

static int run(void *data) {
  const struct call *c = data;
  float *bias = c->p.bias ? to_host(c->at[BIAS], c->p.m, c->p.d_type) : NULL;
  bool ok = (!c->p.bias || bias) && (c->workspace_bytes == 0 || cudaMemset(c->workspace, 0xff, c->workspace_bytes) == cudaSuccess);
  for (int64_t s = 0; s < c->p.batch && ok; s++) ok = multiply(c, s, bias);
  free(bias);
  return !ok;
}

static bool overlap(const void *x, size_t x_bytes, const void *y, size_t y_bytes) {
  return (const char *)x < (const char *)y + y_bytes && (const char *)y < (const char *)x + x_bytes;
}

/* What a kernel would not notice. */
static cublasStatus_t check_memory(const struct call *c) {
  size_t bytes[OPERANDS];
  for (int i = A; i <= D; i++)
    bytes[i] = (size_t)(c->p.stride[i] * (c->p.batch - 1) + c->p.extent[i]) * size_of(i <= B ? c->p.ab_type : c->p.d_type);
  bytes[BIAS] = (size_t)c->p.m * size_of(c->p.d_type);
  for (int i = A; i < OPERANDS; i++) {
    if ((i == BIAS && !c->p.bias) || (i == C && c->beta == 0 && !c->at[C])) continue;
    if (!c->at[i]) return invalid("an operand is a null pointer");
    if ((uintptr_t)c->at[i] % c->algo.align[i]) return unsupported("an operand is not aligned as the algorithm wants it");
    if (overlap(c->at[i], bytes[i], c->workspace, c->workspace_bytes)) return invalid("the workspace overlaps an operand");
    if (i != D && !(i == C && c->at[C] == c->at[D]) && overlap(c->at[i], bytes[i], c->at[D], bytes[D])) return invalid("D overlaps another operand");
  }
  return c->at[C] == c->at[D] && (c->p.ld[C] != c->p.ld[D] || c->p.stride[C] != c->p.stride[D]) ? invalid("C is D in another layout") : CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, const void *alpha, const void *a_data, cublasLtMatrixLayout_t a,
                              const void *b_data, cublasLtMatrixLayout_t b, const void *beta, const void *c_data, cublasLtMatrixLayout_t c, void *d_data,
                              cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes, cudaStream_t stream) {
  struct call call;
  memset(&call, 0, sizeof call);
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!alpha || !beta) return invalid("no factor");
  if (!stream) return invalid("the default stream waits for all others");
  cublasStatus_t st = describe(op, (const struct fd_emu_lt_layout *const[]){a, b, c, d}, &call.p);
  if (st != CUBLAS_STATUS_SUCCESS) return st;
  st = read_algo(algo, &call.p, &call.algo);
  if (st != CUBLAS_STATUS_SUCCESS) return refuse(st, "an algorithm for something else");
  memcpy(&call.alpha, alpha, sizeof call.alpha), memcpy(&call.beta, beta, sizeof call.beta);
  call.at[A] = a_data, call.at[B] = b_data, call.at[C] = c_data, call.at[D] = d_data, call.at[BIAS] = op->bias;
  call.workspace = workspace, call.workspace_bytes = workspace_bytes;
  if (workspace_bytes < call.algo.workspace || (!workspace && workspace_bytes > 0)) return invalid("the algorithm wants more workspace");
  if ((uintptr_t)workspace % WORKSPACE_ALIGN) return invalid("the workspace is not aligned to 16 bytes");
  st = check_memory(&call);
  if (st != CUBLAS_STATUS_SUCCESS) return st;
  fd_emu_lt_calls.products++;
  fd_emu_lt_calls.split += call.algo.split > 1;
  return fd_emu_host(run, &call, sizeof call) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : refuse(CUBLAS_STATUS_EXECUTION_FAILED, "memory outside an allocation");
}
