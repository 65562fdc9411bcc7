// SPDX-License-Identifier: Apache-2.0
// cuda/matmul.c and gemm.c on the emulated cuBLASLt: which algorithms it takes, when it times them, what it keeps in the run folder and when it believes
// that; operands anywhere in memory; and that no plan is made in a run. And what the emulation itself refuses.
#include <cublasLt.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/dtype.h"
#include "comm/comm.h"
#include "cuda/cuda.h"

static int checks, failed;
#define CHECK(c)                                                 \
  do {                                                           \
    checks++;                                                    \
    if (!(c)) failed++, printf("%s:%d: %s\n", __FILE__, __LINE__, #c); \
  } while (0)

static char folder[] = "matmul-kept-XXXXXX", file[64]; /* where the test runs */

enum { N = 24, K = 40 };

static fd_ctx *open_ctx(const char *cache_dir, unsigned flags) {
  fd_ctx *ctx = NULL;
  CHECK(fd_ctx_create_with(&fd_cuda_backend, 1, NULL, flags, &ctx) == FD_OK);
  ctx->cache_dir = cache_dir;
  return ctx;
}

/* Tensors of c [M, N] = a [M, K] b [N, K]' + bias, all beginning `odd` elements behind the start of their memory. */
struct product {
  fd_tensor a, b, bias, c, count;
  void *memory[5];
  fd_bf16 host[5][128 * K];
  struct fd_matmul_args args;
  size_t scratch_bytes;
};

static void make(fd_ctx *ctx, struct product *p, int64_t M, int odd, bool counted) {
  fd_tensor *const t[5] = {&p->a, &p->b, &p->bias, &p->c, &p->count};
  memset(p, 0, sizeof *p);
  p->a = (fd_tensor){NULL, {M, K}, 2, FD_BF16, 0}, p->b = (fd_tensor){NULL, {N, K}, 2, FD_BF16, 0};
  p->bias = (fd_tensor){NULL, {N}, 1, FD_BF16, 0}, p->c = (fd_tensor){NULL, {M, N}, 2, FD_BF16, 0};
  p->count = (fd_tensor){NULL, {1}, 1, FD_I32, 0};
  for (int i = 0; i < 5; i++) {
    CHECK(ctx->backend->alloc(ctx, fd_tensor_bytes(t[i]) + 64, &p->memory[i]) == FD_OK);
    t[i]->data = (char *)p->memory[i] + (i < 4 ? odd * 2 : 0);
    if (i >= 3) continue;
    for (int64_t e = 0; e < fd_tensor_numel(t[i]); e++) p->host[i][e] = fd_f32_to_bf16((float)((e * 37 + i * 11) % 17 - 8) / 8);
    CHECK(ctx->backend->to_device(ctx, t[i]->data, p->host[i], fd_tensor_bytes(t[i])) == FD_OK);
  }
  p->args = (struct fd_matmul_args){.a = &p->a, .b = &p->b, .bias = &p->bias, .count = counted ? &p->count : NULL, .c = &p->c, .trans_b = 1};
  CHECK(ctx->backend->prepare(ctx, FD_OP_matmul, &p->args, &p->scratch_bytes) == FD_OK);
}

/* Runs it with `rows` in use and compares. */
static bool run(fd_ctx *ctx, struct product *p, int32_t rows) {
  bool right = true;
  CHECK(ctx->backend->alloc(ctx, p->scratch_bytes, &ctx->scratch) == FD_OK);
  ctx->scratch_bytes = p->scratch_bytes;
  if (p->args.count) CHECK(ctx->backend->to_device(ctx, p->count.data, &rows, sizeof rows) == FD_OK);
  if (fd_op_run(ctx, FD_OP_matmul, &p->args) != FD_OK) printf("%s\n", fd_status_message()), right = false;
  CHECK(ctx->backend->from_device(ctx, p->host[3], p->c.data, fd_tensor_bytes(&p->c)) == FD_OK);
  ctx->backend->free(ctx, ctx->scratch);
  ctx->scratch = NULL;
  for (int64_t m = 0; m < rows && right; m++)
    for (int64_t n = 0; n < N; n++) {
      double sum = fd_bf16_to_f32(p->host[2][n]), size = 0;
      for (int64_t k = 0; k < K; k++) {
        const double x = (double)fd_bf16_to_f32(p->host[0][m * K + k]) * fd_bf16_to_f32(p->host[1][n * K + k]);
        sum += x, size += fabs(x);
      }
      right = right && fabs(fd_bf16_to_f32(p->host[3][m * N + n]) - sum) <= 0x1p-8 * fabs(sum) + 1e-6 * size;
    }
  return right;
}

static void drop(fd_ctx *ctx, struct product *p) {
  for (int i = 0; i < 5; i++) ctx->backend->free(ctx, p->memory[i]);
}

/* What a context did for two products, each prepared and run once. */
struct seen {
  struct fd_emu_lt_calls calls;
  bool file_before_run;
};

static struct seen two_products(const char *cache_dir, unsigned flags, int rank) {
  struct seen s;
  static struct product p, q;
  struct fd_comm ranks = {.rank = rank, .size = 1};
  const struct fd_emu_lt_calls before = fd_emu_lt_calls;
  fd_ctx *ctx = open_ctx(cache_dir, flags);
  ctx->comm = &ranks;
  make(ctx, &p, 16, 0, false), make(ctx, &q, 32, 0, false);
  s.file_before_run = access(file, F_OK) == 0;
  CHECK(run(ctx, &p, 16) && run(ctx, &q, 32));
  drop(ctx, &p), drop(ctx, &q);
  ctx->comm = NULL;
  fd_ctx_destroy(&ctx);
  s.calls.heuristics = fd_emu_lt_calls.heuristics - before.heuristics, s.calls.checks = fd_emu_lt_calls.checks - before.checks;
  s.calls.products = fd_emu_lt_calls.products - before.products, s.calls.split = fd_emu_lt_calls.split - before.split;
  CHECK(s.calls.heuristics == 2); /* one plan each, when it was prepared */
  CHECK(fd_emu_lt_calls.live == before.live);
  return s;
}

static bool is_whole(void) { /* the file, with both products */
  json_t *root = json_load_file(file, 0, NULL);
  const char *there = json_string_value(json_object_get(root, "made_on"));
  const bool whole = there && strstr(there, "emulated GPU") && json_array_size(json_object_get(root, "products")) == 2;
  json_decref(root);
  return whole;
}

static json_t *product_of(json_t *root, size_t i) { return json_array_get(json_object_get(root, "products"), i); }

static void change(void (*edit)(json_t *root)) {
  json_t *root = json_load_file(file, 0, NULL);
  edit(root);
  CHECK(json_dump_file(root, file, 0) == 0);
  json_decref(root);
}
static void of_another_gpu(json_t *root) { json_object_set_new(root, "made_on", json_string("another GPU")); }
static void no_hex(json_t *root) { /* as long as an algorithm */
  char text[2 * sizeof(cublasLtMatmulAlgo_t) + 1] = "";
  memset(text, 'z', sizeof text - 1);
  for (size_t i = 0; i < 2; i++) json_object_set_new(product_of(root, i), "algorithm", json_string(text));
}
static void too_short(json_t *root) {
  for (size_t i = 0; i < 2; i++) json_object_set_new(product_of(root, i), "algorithm", json_string("00"));
}
static void exchanged(json_t *root) { /* each has the algorithm of the other's shape */
  json_t *x = json_incref(json_object_get(product_of(root, 0), "algorithm"));
  json_object_set(product_of(root, 0), "algorithm", json_object_get(product_of(root, 1), "algorithm"));
  json_object_set_new(product_of(root, 1), "algorithm", x);
}

static void kept(void) {
  enum { RUNS = 2, LAUNCHES = 6 * 3 * 2 /* of three algorithms that may run, for each product */ };
  struct seen s = two_products(folder, 0, 0);
  CHECK(!s.file_before_run && s.calls.products == RUNS + LAUNCHES && s.calls.split > 0 && is_whole());
  s = two_products(folder, 0, 0); /* the next start reads it */
  CHECK(s.calls.products == RUNS && s.calls.checks == 2);
  s = two_products(folder, 0, 1); /* another rank, too */
  CHECK(s.calls.products == RUNS && s.calls.checks == 2);

  void (*const edits[])(json_t *) = {of_another_gpu, no_hex, too_short, exchanged};
  const int asked[] = {0, 0, 0, 2};
  for (int i = 0; i < 4; i++) {
    change(edits[i]);
    s = two_products(folder, 0, 0);
    CHECK(s.calls.products == RUNS + LAUNCHES && s.calls.checks == asked[i] && is_whole());
    s = two_products(folder, 0, 0); /* and what was timed anew is believed */
    CHECK(s.calls.products == RUNS && s.calls.checks == 2);
  }
  FILE *f = fopen(file, "w");
  CHECK(f && fputs("{ \"made_on\": ", f) >= 0 && fclose(f) == 0);
  s = two_products(folder, 0, 0);
  CHECK(s.calls.products == RUNS + LAUNCHES && is_whole());

  /* nothing is timed or written: same bits each time; nothing to keep it in */
  CHECK(unlink(file) == 0);
  s = two_products(folder, FD_CTX_DETERMINISTIC, 0);
  CHECK(s.calls.products == RUNS && s.calls.split == 0 && access(file, F_OK) != 0);
  s = two_products(NULL, 0, 0);
  CHECK(s.calls.products == RUNS && access(file, F_OK) != 0);
  s = two_products(folder, 0, 1); /* times for itself, does not write */
  CHECK(s.calls.products == RUNS + LAUNCHES && access(file, F_OK) != 0);
  s = two_products("/nowhere/at all", 0, 0);
  CHECK(s.calls.products == RUNS + LAUNCHES);
}

static void anywhere(void) {
  static struct product p;
  fd_ctx *ctx = open_ctx(NULL, 0);
  for (int odd = 0; odd <= 8; odd++) {
    make(ctx, &p, 16, odd, false);
    const long plans = fd_emu_lt_calls.heuristics;
    CHECK(run(ctx, &p, 16));
    CHECK(fd_emu_lt_calls.heuristics == plans);
    drop(ctx, &p);
  }
  make(ctx, &p, 16, 0, false); /* the bias alone */
  p.bias.data = (char *)p.bias.data + 2;
  CHECK(ctx->backend->to_device(ctx, p.bias.data, p.host[2], fd_tensor_bytes(&p.bias)) == FD_OK && run(ctx, &p, 16));
  drop(ctx, &p);
  fd_ctx_destroy(&ctx);
}

/* Packed rows: their count goes in eighths of the capacity, and each has its plan before the first step. */
static void counted(void) {
  static struct product p;
  fd_ctx *ctx = open_ctx(NULL, 0);
  const long none = fd_emu_lt_calls.heuristics;
  make(ctx, &p, 100, 0, true);
  const long plans = fd_emu_lt_calls.heuristics;
  CHECK(plans == none + FD_CUDA_COUNT_STEPS);
  for (int eighth = 0; eighth <= 8; eighth++) CHECK(run(ctx, &p, (100 * eighth + 7) / 8));
  CHECK(fd_emu_lt_calls.heuristics == plans);
  CHECK(run(ctx, &p, 14) && fd_emu_lt_calls.heuristics == plans + 1); /* any other is right, too */
  drop(ctx, &p);
  fd_ctx_destroy(&ctx);
}

/* ---- the emulation ----------------------------------------------------------------------------------------------- */

#define IS(call, status) CHECK((call) == CUBLAS_STATUS_##status)

static void refused(void) {
  enum { M = 8, WANTED = 4 };
  fd_ctx *ctx = open_ctx(NULL, 0);
  const cudaStream_t stream = fd_cuda_stream(ctx);
  const long live = fd_emu_lt_calls.live;
  cublasLtHandle_t lt;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t a, b, c, narrow, other;
  cublasLtMatmulPreference_t pref;
  cublasLtMatmulHeuristicResult_t found[WANTED], first, checked;
  const float one = 1, zero = 0;
  const int64_t wrong_size = 0;
  const uint64_t workspace = 1 << 20;
  const uint32_t align = 8;
  int n;
  void *memory;
  CHECK(ctx->backend->alloc(ctx, 4096, &memory) == FD_OK);
  char *x = memory, *y = x + 1024, *z = x + 2048, *w = x + 3072;
  IS(cublasLtCreate(&lt), SUCCESS);
  IS(cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F), SUCCESS);
  IS(cublasLtMatrixLayoutCreate(&a, CUDA_R_32F, M, M, M), SUCCESS);
  IS(cublasLtMatrixLayoutCreate(&b, CUDA_R_32F, M, M, M), SUCCESS);
  IS(cublasLtMatrixLayoutCreate(&c, CUDA_R_32F, M, M, M), SUCCESS);
  IS(cublasLtMatrixLayoutCreate(&narrow, CUDA_R_32F, M, M, M - 1), SUCCESS);
  IS(cublasLtMatrixLayoutCreate(&other, CUDA_R_16BF, M, M, M), SUCCESS);
  IS(cublasLtMatmulPreferenceCreate(&pref), SUCCESS);
  IS(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &wrong_size, sizeof wrong_size), INVALID_VALUE);
  IS(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, NULL, sizeof(int32_t)), INVALID_VALUE);
  IS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &align, sizeof align), INVALID_VALUE);
  IS(cublasLtMatrixLayoutSetAttribute(a, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &wrong_size, sizeof wrong_size), INVALID_VALUE);
  IS(cublasLtMatmulAlgoGetHeuristic(lt, op, narrow, b, c, c, pref, WANTED, found, &n), INVALID_VALUE);
  IS(cublasLtMatmulAlgoGetHeuristic(lt, op, other, b, c, c, pref, WANTED, found, &n), NOT_SUPPORTED);
  IS(cublasLtMatmulAlgoGetHeuristic(lt, op, a, b, other, other, pref, WANTED, found, &n), NOT_SUPPORTED);
  IS(cublasLtMatmulAlgoGetHeuristic(lt, op, a, b, c, c, pref, 0, found, &n), INVALID_VALUE);
  IS(cublasLtMatmulAlgoGetHeuristic(lt, op, a, b, c, c, pref, WANTED, found, &n), SUCCESS);
  CHECK(n == 1 && found[0].workspaceSize == 0); /* as long as no workspace is allowed */
  IS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace), SUCCESS);
  IS(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align, sizeof align), SUCCESS);
  IS(cublasLtMatmulAlgoGetHeuristic(lt, op, a, b, c, c, pref, WANTED, found, &n), SUCCESS);
  CHECK(n == WANTED && found[1].state != CUBLAS_STATUS_SUCCESS);
  first = found[0];
  CHECK(first.workspaceSize == 512);
#define MULTIPLY(A, B, C, D, algo, space, bytes, s) cublasLtMatmul(lt, op, &one, A, a, B, b, &zero, C, c, D, c, algo, space, bytes, s)
  IS(MULTIPLY(x, y, z, z, &first.algo, w, 512, stream), SUCCESS);
  IS(MULTIPLY(x, y + 8, z, z, &first.algo, w, 512, stream), SUCCESS);
  IS(MULTIPLY(x, y + 4, z, z, &first.algo, w, 512, stream), NOT_SUPPORTED);
  IS(MULTIPLY(x + 128, y, z, z, &first.algo, w, 512, stream), NOT_SUPPORTED);
  IS(MULTIPLY(x, NULL, z, z, &first.algo, w, 512, stream), INVALID_VALUE);
  IS(MULTIPLY(x, y, z, z, &first.algo, w, 511, stream), INVALID_VALUE);
  IS(MULTIPLY(x, y, z, z, &first.algo, NULL, 512, stream), INVALID_VALUE);
  IS(MULTIPLY(x, y, z, z, &first.algo, x, 512, stream), INVALID_VALUE);
  IS(MULTIPLY(x, y, x, x, &first.algo, w, 512, stream), INVALID_VALUE);
  IS(MULTIPLY(x, y, z, z, &first.algo, w, 512, NULL), INVALID_VALUE);
  IS(MULTIPLY(x, y, z, z, NULL, w, 512, stream), INVALID_VALUE);
  IS(MULTIPLY(x, y, w + 1024, w + 1024, &found[3].algo, NULL, 0, stream), EXECUTION_FAILED);
  IS(cublasLtMatmulAlgoCheck(lt, op, a, b, c, c, &first.algo, &checked), SUCCESS);
  CHECK(checked.workspaceSize == 512);
  first.algo.data[3] ^= 1;
  IS(cublasLtMatmulAlgoCheck(lt, op, a, b, c, c, &first.algo, &checked), INVALID_VALUE);
  first.algo.data[3] ^= 1;
  const int32_t transposed = CUBLAS_OP_T;
  IS(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed), SUCCESS);
  IS(cublasLtMatmulAlgoCheck(lt, op, a, b, c, c, &first.algo, &checked), INVALID_VALUE);
  IS(MULTIPLY(x, y, z, z, &first.algo, w, 512, stream), INVALID_VALUE);
  cublasLtMatmulPreferenceDestroy(pref), cublasLtMatmulDescDestroy(op);
  cublasLtMatrixLayoutDestroy(a), cublasLtMatrixLayoutDestroy(b), cublasLtMatrixLayoutDestroy(c);
  cublasLtMatrixLayoutDestroy(narrow), cublasLtMatrixLayoutDestroy(other), cublasLtDestroy(lt);
  CHECK(fd_emu_lt_calls.live == live);
  ctx->backend->free(ctx, memory);
  fd_ctx_destroy(&ctx);
}

int main(void) {
  if (!mkdtemp(folder)) return 1;
  snprintf(file, sizeof file, "%s/cuda-matmul.json", folder);
  kept();
  anywhere();
  counted();
  refused();
  unlink(file);
  CHECK(rmdir(folder) == 0);
  printf("%d checks, %d failed\n", checks, failed);
  return failed != 0;
}
