// SPDX-License-Identifier: Apache-2.0
// matmul on oneDNN. Two ways, chosen by shape (measured; tests/bench_kernels shows the rates):
//   blocked  a primitive of fixed shape (oneDNN's "brg"). Best where both operands fit in cache, and for bf16 results.
//            With a count: primitives of 64, 128, 256, ... rows, and the rest by gemm.
//   gemm     row counts known at run time, f32 sums. Best for large operands, for sums over rows, for counts. A bf16 result
//            is summed in a block of f32 scratch and rounded once.
// Without AVX-512 oneDNN has no bf16: blocks of both operands are widened to f32 first; then only gemm is used.
// On AVX2 the bits of an f32 result may depend on the number of rows (oneDNN chooses kernels by it); for one count they are
// the same in every run.
#include <stdio.h>
#include <stdlib.h>

#include "cpu/dnnl.h"

enum {
  LEAST_TILE = 64,        /* rows of the smallest blocked primitive under a count */
  SMALL_BYTES = 1536 << 10, /* operands up to this size: blocked */
  BLOCK_BYTES = 8 << 20,  /* of one f32 block in scratch */
};

struct shape {
  int64_t M, N, K;      /* capacities */
  int64_t ld_a, ld_b;
  bool ta, tb, add, bias;
  fd_dtype type, c_type, bias_type;
};

static struct shape shape_of(const struct fd_matmul_args *a) {
  struct shape s = {.ta = a->trans_a, .tb = a->trans_b, .add = a->acc != 0, .bias = a->bias != NULL};
  s.type = a->a->dtype;
  s.c_type = a->c->dtype;
  s.bias_type = a->bias ? a->bias->dtype : FD_F32;
  s.ld_a = fd_tensor_cols(a->a);
  s.ld_b = fd_tensor_cols(a->b);
  s.M = s.ta ? s.ld_a : fd_tensor_rows(a->a);
  s.K = s.ta ? fd_tensor_rows(a->a) : s.ld_a;
  s.N = s.tb ? fd_tensor_rows(a->b) : s.ld_b;
  return s;
}

/* ---- which way ------------------------------------------------------------------------------------------------------ */

static bool blocked_pays(bool has_bf16, const struct shape *s) {
  if (s->type == FD_BF16 && !has_bf16) return false;
  if (s->M < 1 || s->N < 1 || s->K < 1) return false;
  if (s->bias && s->bias_type == FD_BF16 && s->type == FD_F32) return false; /* oneDNN has no such bias */
  int64_t bytes = (s->M * s->K + s->K * s->N) * (int64_t)fd_dtype_bytes(s->type);
  if (bytes <= SMALL_BYTES) return true;
  return s->type == FD_BF16 && s->c_type == FD_BF16 && s->tb && !s->ta && !s->add;
}

static fd_status describe(dnnl_memory_desc_t *md, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                          dnnl_data_type_t type) {
  return CPU_DNNL(dnnl_memory_desc_init_by_strides(md, 2, (dnnl_dims_t){rows, cols}, type, (dnnl_dims_t){row_stride, col_stride}));
}

enum { KEY_MATMUL = 1, KEY_MATMUL_RUNTIME };

static void key_of(const struct shape *s, int64_t kind, int64_t M, int64_t K, int64_t *key) {
  int64_t k[CPU_PRIM_KEY] = {kind, M, s->N, K, s->ld_a, s->ld_b, s->ta, s->tb, s->add, s->bias, s->type, s->c_type,
                             s->bias_type};
  memcpy(key, k, sizeof k);
}

/* A primitive for M rows (K rows if trans_a), or for any number: runtime. `c` then is f32 and dense. */
static fd_status make(struct cpu_dnnl *d, const struct shape *s, int64_t M, bool runtime, struct cpu_prim **out) {
  fd_status st = FD_OK;
  int64_t key[CPU_PRIM_KEY];
  dnnl_primitive_attr_t attr = NULL;
  dnnl_post_ops_t sum = NULL;
  dnnl_memory_desc_t a, b, bias, c;
  dnnl_matmul_desc_t desc;
  char name[96];
  int64_t rows = s->ta ? s->M : runtime ? DNNL_RUNTIME_DIM_VAL : M, inner = runtime && s->ta ? DNNL_RUNTIME_DIM_VAL : s->K;
  dnnl_data_type_t type = cpu_dnnl_type(s->type);
  key_of(s, runtime ? KEY_MATMUL_RUNTIME : KEY_MATMUL, rows, inner, key);
  *out = cpu_prim_find(d, key);
  if (*out) goto done;
  FD_TRY(describe(&a, rows, inner, s->ta ? 1 : s->ld_a, s->ta ? s->ld_a : 1, type));
  FD_TRY(describe(&b, inner, s->N, s->tb ? 1 : s->ld_b, s->tb ? s->ld_b : 1, type));
  FD_TRY(describe(&c, rows, s->N, s->N, 1, runtime ? dnnl_f32 : cpu_dnnl_type(s->c_type)));
  FD_TRY(describe(&bias, 1, s->N, s->N, 1, cpu_dnnl_type(s->bias_type)));
  FD_TRY(CPU_DNNL(dnnl_matmul_desc_init(&desc, &a, &b, s->bias && !runtime ? &bias : NULL, &c)));
  FD_TRY(CPU_DNNL(dnnl_primitive_attr_create(&attr)));
  FD_TRY(CPU_DNNL(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user)));
  if (s->add) {
    FD_TRY(CPU_DNNL(dnnl_post_ops_create(&sum)));
    FD_TRY(CPU_DNNL(dnnl_post_ops_append_sum(sum, 1.0f)));
    FD_TRY(CPU_DNNL(dnnl_primitive_attr_set_post_ops(attr, sum)));
  }
  snprintf(name, sizeof name, "matmul %s%s %lldx%lldx%lld%s%s%s%s%s", fd_dtype_name(s->type), s->c_type != s->type ? ">f32" : "",
           runtime && !s->ta ? -1LL : (long long)rows, (long long)s->N, runtime && s->ta ? -1LL : (long long)s->K, s->ta ? " ta" : "",
           s->tb ? " tb" : "", s->bias ? " bias" : "", s->add ? " add" : "", runtime ? " any" : "");
  FD_TRY(cpu_prim_make(d, key, name, &desc, attr, NULL, s->bias && !runtime ? 4 : 3,
                       (int[]){DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST, DNNL_ARG_BIAS}, runtime, out));
done:
  if (sum) dnnl_post_ops_destroy(sum);
  if (attr) dnnl_primitive_attr_destroy(attr);
  return st;
}

/* ---- gemm ----------------------------------------------------------------------------------------------------------- */

/* c (f32, leading dimension ld_c) = op(a) op(b), or += if add, for `rows` stored rows of a. Widened or f32 operands. */
static fd_status sgemm(bool ta, bool tb, int64_t M, int64_t N, int64_t K, const float *a, int64_t ld_a, const float *b, int64_t ld_b,
                       bool add, float *c, int64_t ld_c) {
  return CPU_DNNL(dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', M, N, K, 1.0f, a, ld_a, b, ld_b, add ? 1.0f : 0.0f, c, ld_c));
}

/* The same for bf16 operands through a primitive whose row count is known at run time; c dense [.., N]. */
static fd_status gemm_bf16(struct cpu_dnnl *d, const struct shape *s, int64_t rows, const fd_bf16 *a, const fd_bf16 *b, bool add,
                           float *c) {
  fd_status st = FD_OK;
  struct shape f = *s;
  struct cpu_prim *p;
  dnnl_memory_t mem[3] = {NULL, NULL, NULL};
  dnnl_memory_desc_t md[3];
  f.add = add, f.bias = false, f.c_type = FD_F32, f.bias_type = FD_F32;
  FD_TRY(make(d, &f, rows, true, &p));
  int64_t M = s->ta ? s->M : rows, K = s->ta ? rows : s->K;
  FD_TRY(describe(&md[0], M, K, s->ta ? 1 : s->ld_a, s->ta ? s->ld_a : 1, dnnl_bf16));
  FD_TRY(describe(&md[1], K, s->N, s->tb ? 1 : s->ld_b, s->tb ? s->ld_b : 1, dnnl_bf16));
  FD_TRY(describe(&md[2], M, s->N, s->N, 1, dnnl_f32));
  void *data[3] = {(void *)a, (void *)b, c};
  dnnl_exec_arg_t args[3];
  for (int i = 0; i < 3; i++) {
    FD_TRY(CPU_DNNL(dnnl_memory_create(&mem[i], &md[i], cpu_dnnl_engine(d), data[i])));
    args[i] = (dnnl_exec_arg_t){p->args[i].arg, mem[i]};
  }
  FD_TRY(CPU_DNNL(dnnl_primitive_execute(p->prim, cpu_dnnl_stream(d), 3, args)));
done:
  for (int i = 0; i < 3; i++)
    if (mem[i]) dnnl_memory_destroy(mem[i]);
  return st;
}

/* Rows of f32 blocks in scratch: results, widened a, and columns of widened b. */
struct blocks {
  int64_t rows, cols, inner; /* of results and of a; of b (outputs); of the sum if trans_a */
  size_t c_bytes, a_bytes, b_bytes;
};

static int64_t at_most(int64_t unit, int64_t whole) {
  int64_t n = BLOCK_BYTES / 4 / (unit > 0 ? unit : 1);
  n = n < LEAST_TILE ? LEAST_TILE : n > 512 ? 512 : n / LEAST_TILE * LEAST_TILE;
  return n < whole ? n : whole;
}

static struct blocks blocks_of(const struct shape *s, bool has_bf16) {
  struct blocks z = {s->M, s->N, s->K, 0, 0, 0};
  bool widen = s->type == FD_BF16 && !has_bf16;
  if (s->ta) {
    if (s->c_type != FD_F32) z.c_bytes = cpu_align((size_t)(s->M * s->N) * 4);
    if (widen) {
      z.inner = at_most(s->M > s->N ? s->M : s->N, s->K);
      z.a_bytes = cpu_align((size_t)(z.inner * s->M) * 4);
      z.b_bytes = cpu_align((size_t)(z.inner * s->N) * 4);
    }
    return z;
  }
  if (widen) z.cols = at_most(s->K, s->N);
  if (widen || s->c_type != FD_F32) {
    z.rows = at_most(z.cols > s->K ? z.cols : s->K, s->M);
    z.c_bytes = cpu_align((size_t)(z.rows * z.cols) * 4);
  }
  if (widen) {
    z.a_bytes = cpu_align((size_t)(z.rows * s->K) * 4);
    z.b_bytes = cpu_align((size_t)(z.cols * s->K) * 4);
  }
  return z;
}

/* Rows [first, first + rows) of c, or with trans_a everything from `rows` stored rows. */
static fd_status gemm(fd_ctx *ctx, struct cpu_dnnl *d, const struct fd_matmul_args *m, const struct shape *s, int64_t first,
                      int64_t rows) {
  fd_status st = FD_OK;
  bool has_bf16 = cpu_dnnl_has_bf16(d), widen = s->type == FD_BF16 && !has_bf16, bf16 = s->type == FD_BF16;
  struct blocks z = blocks_of(s, has_bf16);
  float *c_block = ctx->scratch, *a_block = (float *)((char *)c_block + z.c_bytes), *b_block = (float *)((char *)a_block + z.a_bytes);
  size_t c_size = fd_dtype_bytes(s->c_type);
  const void *bias = m->bias ? m->bias->data : NULL;
  if (s->ta) {
    float *sums = s->c_type == FD_F32 ? m->c->data : c_block;
    bool add = s->add && s->c_type == FD_F32;
    const fd_bf16 *a = m->a->data, *b = m->b->data;
    if (!bf16) FD_TRY(sgemm(true, s->tb, s->M, s->N, rows, m->a->data, s->ld_a, m->b->data, s->ld_b, add, sums, s->N));
    else if (!widen) FD_TRY(gemm_bf16(d, s, rows, a, b, add, sums));
    else
      for (int64_t k = 0; k < rows; k += z.inner) {
        int64_t n = rows - k < z.inner ? rows - k : z.inner;
        cpu_widen(ctx, a_block, s->M, a + k * s->ld_a, s->ld_a, n, s->M);
        if (s->tb) cpu_widen(ctx, b_block, n, b + k, s->ld_b, s->N, n);
        else cpu_widen(ctx, b_block, s->N, b + k * s->ld_b, s->ld_b, n, s->N);
        FD_TRY(sgemm(true, s->tb, s->M, s->N, n, a_block, s->M, b_block, s->tb ? n : s->N, add || k > 0, sums, s->N));
      }
    if (s->c_type != FD_F32) cpu_finish(ctx, m->c->data, s->c_type, s->N, sums, s->N, bias, s->bias_type, s->add, s->M, s->N);
    else if (bias) cpu_finish(ctx, sums, FD_F32, s->N, sums, s->N, bias, s->bias_type, false, s->M, s->N);
    goto done;
  }
  for (int64_t col = 0; col < s->N; col += z.cols) {
    int64_t cols = s->N - col < z.cols ? s->N - col : z.cols;
    const fd_bf16 *b = m->b->data;
    const void *bias_here = bias ? (const char *)bias + (size_t)col * fd_dtype_bytes(s->bias_type) : NULL;
    if (widen && s->tb) cpu_widen(ctx, b_block, s->K, b + col * s->ld_b, s->ld_b, cols, s->K);
    if (widen && !s->tb) cpu_widen(ctx, b_block, cols, b + col, s->ld_b, s->K, cols);
    for (int64_t row = first; row < first + rows; row += z.rows) {
      int64_t n = first + rows - row < z.rows ? first + rows - row : z.rows;
      char *c = (char *)m->c->data + (size_t)(row * s->N + col) * c_size;
      if (!bf16) {
        float *to = s->c_type == FD_F32 ? (float *)c : c_block;
        bool direct = s->c_type == FD_F32;
        FD_TRY(sgemm(false, s->tb, n, s->N, s->K, (float *)m->a->data + row * s->ld_a, s->ld_a, m->b->data, s->ld_b, direct && s->add,
                     to, s->N));
        if (bias || !direct) cpu_finish(ctx, c, s->c_type, s->N, to, s->N, bias, s->bias_type, !direct && s->add, n, s->N);
      } else if (!widen) {
        bool direct = s->c_type == FD_F32;
        float *to = direct ? (float *)c : c_block;
        FD_TRY(gemm_bf16(d, s, n, (const fd_bf16 *)m->a->data + row * s->ld_a, b, direct && s->add, to));
        if (bias || !direct) cpu_finish(ctx, c, s->c_type, s->N, to, s->N, bias, s->bias_type, !direct && s->add, n, s->N);
      } else {
        cpu_widen(ctx, a_block, s->K, (const fd_bf16 *)m->a->data + row * s->ld_a, s->ld_a, n, s->K);
        FD_TRY(sgemm(false, s->tb, n, cols, s->K, a_block, s->K, b_block, s->tb ? s->K : cols, false, c_block, cols));
        cpu_finish(ctx, c, s->c_type, s->N, c_block, cols, bias_here, s->bias_type, s->add, n, cols);
      }
    }
  }
done:
  return st;
}

/* ---- the op --------------------------------------------------------------------------------------------------------- */

fd_status cpu_matmul_prepare(fd_ctx *ctx, const struct fd_matmul_args *a, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct cpu_prim *p;
  struct shape s = shape_of(a);
  CPU_CHECK(matmul, a, a->a->ndim >= 1, "a matrix");
  CPU_CHECK(matmul, b, a->b->dtype == a->a->dtype, "%s as a", fd_dtype_name(a->a->dtype));
  CPU_CHECK(matmul, b, (s.tb ? s.ld_b : fd_tensor_rows(a->b)) == s.K, "%lld %s to match a", (long long)s.K, s.tb ? "columns" : "rows");
  CPU_CHECK(matmul, c, fd_tensor_rows(a->c) == s.M && fd_tensor_cols(a->c) == s.N, "[%lld, %lld]", (long long)s.M, (long long)s.N);
  CPU_CHECK(matmul, c, a->c->dtype == s.type || a->c->dtype == FD_F32, "%s as a, or f32", fd_dtype_name(s.type));
  CPU_CHECK(matmul, bias, !a->bias || fd_tensor_numel(a->bias) == s.N, "[%lld]", (long long)s.N);
  FD_TRY(cpu_dnnl(ctx, &d));
  struct blocks z = blocks_of(&s, cpu_dnnl_has_bf16(d));
  bool blocked = blocked_pays(cpu_dnnl_has_bf16(d), &s) && !(s.ta && a->count);
  size_t need = 0;
  if (!blocked || a->count) need = z.c_bytes + z.a_bytes + z.b_bytes;
  if (s.type == FD_BF16 && cpu_dnnl_has_bf16(d) && (!blocked || a->count) && s.M > 0 && s.N > 0 && s.K > 0) {
    struct shape f = s;
    f.add = s.add && s.c_type == FD_F32, f.bias = false, f.c_type = FD_F32, f.bias_type = FD_F32;
    FD_TRY(make(d, &f, 0, true, &p));
  }
  if (blocked && !a->count) {
    FD_TRY(make(d, &s, s.M, false, &p));
    need = p->scratch_bytes;
  } else if (blocked)
    for (int64_t rows = LEAST_TILE; rows <= s.M; rows *= 2) {
      FD_TRY(make(d, &s, rows, false, &p));
      if (p->scratch_bytes > need) need = p->scratch_bytes;
    }
  *scratch_bytes = need;
done:
  return st;
}

static fd_status run_blocked(fd_ctx *ctx, struct cpu_dnnl *d, const struct fd_matmul_args *m, const struct shape *s, int64_t first,
                             int64_t rows) {
  struct cpu_prim *p;
  fd_status st = make(d, s, rows, false, &p);
  if (st != FD_OK) return st;
  void *data[4] = {(char *)m->a->data + (size_t)(first * (s->ta ? 0 : s->ld_a)) * fd_dtype_bytes(s->type), m->b->data,
                   (char *)m->c->data + (size_t)(first * s->N) * fd_dtype_bytes(s->c_type), m->bias ? m->bias->data : NULL};
  return cpu_prim_run(d, p, data, ctx->scratch);
}

fd_status cpu_matmul(fd_ctx *ctx, const struct fd_matmul_args *m) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct shape s = shape_of(m);
  int64_t rows, done_rows = 0;
  FD_TRY(cpu_dnnl(ctx, &d));
  FD_TRY(cpu_rows_used(FD_OP_matmul, m->count, s.ta ? s.K : s.M, &rows));
  if (s.M == 0 || s.N == 0 || (!s.ta && rows == 0)) goto done;
  if (s.K == 0 || rows == 0) { /* an empty sum: what is left is the bias */
    static const float zero[64];
    for (int64_t r = 0; r < (s.ta ? s.M : rows); r++)
      for (int64_t c = 0; c < s.N; c += 64) {
        int64_t n = s.N - c < 64 ? s.N - c : 64;
        cpu_finish(ctx, (char *)m->c->data + (size_t)(r * s.N + c) * fd_dtype_bytes(s.c_type), s.c_type, s.N, zero, 0,
                   m->bias ? (char *)m->bias->data + (size_t)c * fd_dtype_bytes(s.bias_type) : NULL, s.bias_type, s.add, 1, n);
      }
    goto done;
  }
  if (blocked_pays(cpu_dnnl_has_bf16(d), &s) && !(s.ta && m->count)) {
    if (!m->count) {
      st = run_blocked(ctx, d, m, &s, 0, s.M);
      goto done;
    }
    int64_t tile = LEAST_TILE;
    while (tile * 2 <= s.M) tile *= 2;
    for (; tile >= LEAST_TILE; tile /= 2)
      while (rows - done_rows >= tile) {
        FD_TRY(run_blocked(ctx, d, m, &s, done_rows, tile));
        done_rows += tile;
      }
  }
  if (done_rows < rows) FD_TRY(gemm(ctx, d, m, &s, done_rows, rows - done_rows));
done:
  return st;
}
