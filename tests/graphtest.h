// SPDX-License-Identifier: Apache-2.0
// For tests of the graph: a backend of naive loops in f32 for a few ops, and gradients against finite differences.
#ifndef TESTS_GRAPHTEST_H
#define TESTS_GRAPHTEST_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/rng.h"
#include "graph/build.h"
#include "graph/internal.h"

static int failed;
#define CHECK(c)                                                              \
  do {                                                                        \
    if (!(c)) failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c);      \
  } while (0)
#define OK(call)                                                                                                  \
  do {                                                                                                            \
    fd_status st_ = (call);                                                                                       \
    if (st_ != FD_OK) failed = 1, printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, fd_status_message());       \
  } while (0)

/** Type and shape of a value. */
#define F32(...) FD_F32, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

/* ---- a backend of naive loops ------------------------------------------------------------------------------------ */

static float *ref_f(const fd_tensor *t) { return t->data; }
static int64_t ref_used(const fd_tensor *count, int64_t rows) { return count ? *(int32_t *)count->data : rows; }
static void ref_put(float *at, double value, int add) { *at = (float)(add ? *at + value : value); }

static fd_status ref_matmul(fd_ctx *ctx, const struct fd_matmul_args *a) {
  int64_t sr = fd_tensor_rows(a->a), sc = fd_tensor_cols(a->a), N = fd_tensor_cols(a->c), used = ref_used(a->count, sr);
  int64_t M = a->trans_a ? sc : used, K = a->trans_a ? used : sc, bc = fd_tensor_cols(a->b);
  int add = a->acc >> SLOT(matmul, c) & 1;
  memset(ctx->scratch, 0x5a, ctx->scratch_bytes); /* whoever lies under it will notice */
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      double sum = a->bias ? ref_f(a->bias)[n] : 0;
      for (int64_t k = 0; k < K; k++)
        sum += (double)ref_f(a->a)[a->trans_a ? k * sc + m : m * sc + k] * ref_f(a->b)[a->trans_b ? n * bc + k : k * bc + n];
      ref_put(&ref_f(a->c)[m * N + n], sum, add);
    }
  return FD_OK;
}

static fd_status ref_colsum(fd_ctx *ctx, const struct fd_colsum_args *a) {
  (void)ctx;
  int64_t n = fd_tensor_numel(a->y), rows = ref_used(a->count, n ? fd_tensor_numel(a->x) / n : 0);
  for (int64_t c = 0; c < n; c++) {
    double sum = 0;
    for (int64_t r = 0; r < rows; r++) sum += ref_f(a->x)[r * n + c];
    ref_put(&ref_f(a->y)[c], sum, a->acc != 0);
  }
  return FD_OK;
}

static fd_status ref_add_fwd(fd_ctx *ctx, const struct fd_add_fwd_args *a) {
  (void)ctx;
  int64_t n = ref_used(a->count, fd_tensor_rows(a->x)) * fd_tensor_cols(a->x), ny = fd_tensor_numel(a->y);
  for (int64_t i = 0; i < n; i++) ref_f(a->z)[i] = ref_f(a->x)[i] + ref_f(a->y)[i % ny];
  return FD_OK;
}

static fd_status ref_act_fwd(fd_ctx *ctx, const struct fd_act_fwd_args *a) { /* silu, whatever is asked */
  (void)ctx;
  int64_t n = ref_used(a->count, fd_tensor_rows(a->x)) * fd_tensor_cols(a->x);
  for (int64_t i = 0; i < n; i++) ref_f(a->y)[i] = (float)(ref_f(a->x)[i] / (1 + exp(-(double)ref_f(a->x)[i])));
  return FD_OK;
}

static fd_status ref_act_bwd(fd_ctx *ctx, const struct fd_act_bwd_args *a) {
  (void)ctx;
  int64_t n = ref_used(a->count, fd_tensor_rows(a->x)) * fd_tensor_cols(a->x);
  for (int64_t i = 0; i < n; i++) {
    double x = ref_f(a->x)[i], s = 1 / (1 + exp(-x));
    ref_put(&ref_f(a->dx)[i], ref_f(a->dy)[i] * (s + x * s * (1 - s)), a->acc != 0);
  }
  return FD_OK;
}

static fd_status ref_gate_residual_fwd(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a) {
  (void)ctx;
  int64_t D = fd_tensor_cols(a->x), rows = ref_used(a->count, fd_tensor_rows(a->x)), S = a->mod ? fd_tensor_cols(a->mod) : 0;
  for (int64_t i = 0; i < rows * D; i++) {
    float gate = a->mod ? ref_f(a->mod)[i / D / a->rows_per_mod * S + a->gate_col + i % D] : 1;
    ref_f(a->y)[i] = ref_f(a->x)[i] + gate * ref_f(a->a)[i];
  }
  return FD_OK;
}

static fd_status ref_gate_residual_bwd(fd_ctx *ctx, const struct fd_gate_residual_bwd_args *a) {
  (void)ctx;
  int64_t D = fd_tensor_cols(a->a), rows = ref_used(a->count, fd_tensor_rows(a->a)), S = a->mod ? fd_tensor_cols(a->mod) : 0;
  for (int64_t i = 0; i < rows * D; i++) {
    int64_t m = i / D / a->rows_per_mod * S + a->gate_col + i % D;
    if (a->dmod) ref_f(a->dmod)[m] += ref_f(a->dy)[i] * ref_f(a->a)[i];
    ref_put(&ref_f(a->da)[i], ref_f(a->dy)[i] * (double)(a->mod ? ref_f(a->mod)[m] : 1), a->acc >> SLOT(gate_residual_bwd, da) & 1);
  }
  return FD_OK;
}

static fd_status ref_rmsnorm_fwd(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a) {
  (void)ctx;
  int64_t D = fd_tensor_cols(a->x), rows = ref_used(a->count, fd_tensor_rows(a->x)), S = a->mod ? fd_tensor_cols(a->mod) : 0;
  for (int64_t r = 0; r < rows; r++) {
    const float *x = ref_f(a->x) + r * D, *mod = a->mod ? ref_f(a->mod) + r / a->rows_per_mod * S : NULL;
    double sum = 0;
    for (int64_t i = 0; i < D; i++) sum += (double)x[i] * x[i];
    double rstd = 1 / sqrt(sum / (double)D + a->eps);
    if (a->rstd) ref_f(a->rstd)[r] = (float)rstd;
    for (int64_t i = 0; i < D; i++) {
      double n = x[i] * rstd * (1 + ref_f(a->w)[i]);
      if (mod && a->scale_col >= 0) n *= 1 + mod[a->scale_col + i];
      if (mod && a->shift_col >= 0) n += mod[a->shift_col + i];
      ref_f(a->y)[r * D + i] = (float)n;
    }
  }
  return FD_OK;
}

static fd_status ref_rmsnorm_bwd(fd_ctx *ctx, const struct fd_rmsnorm_bwd_args *a) {
  (void)ctx;
  int64_t D = fd_tensor_cols(a->x), rows = ref_used(a->count, fd_tensor_rows(a->x)), S = a->mod ? fd_tensor_cols(a->mod) : 0;
  for (int64_t i = 0; a->dw && !(a->acc >> SLOT(rmsnorm_bwd, dw) & 1) && i < D; i++) ref_f(a->dw)[i] = 0;
  double *dn = malloc((size_t)(D + 1) * sizeof *dn);
  for (int64_t r = 0; r < rows; r++) {
    const float *x = ref_f(a->x) + r * D, *dy = ref_f(a->dy) + r * D, *mod = a->mod ? ref_f(a->mod) + r / a->rows_per_mod * S : NULL;
    float *dmod = a->dmod ? ref_f(a->dmod) + r / a->rows_per_mod * S : NULL;
    double rstd = ref_f(a->rstd)[r], dot = 0;
    for (int64_t i = 0; i < D; i++) {
      double xh = x[i] * rstd, w = 1 + ref_f(a->w)[i], scale = mod && a->scale_col >= 0 ? 1 + mod[a->scale_col + i] : 1;
      if (dmod && a->scale_col >= 0) dmod[a->scale_col + i] += (float)(dy[i] * xh * w);
      if (dmod && a->shift_col >= 0) dmod[a->shift_col + i] += dy[i];
      if (a->dw) ref_f(a->dw)[i] += (float)(dy[i] * scale * xh);
      dn[i] = dy[i] * scale * w;
      dot += dn[i] * xh;
    }
    for (int64_t i = 0; i < D; i++)
      ref_put(&ref_f(a->dx)[r * D + i], rstd * (dn[i] - x[i] * rstd * dot / (double)D), a->acc >> SLOT(rmsnorm_bwd, dx) & 1);
  }
  free(dn);
  return FD_OK;
}

static fd_status ref_cast(fd_ctx *ctx, const struct fd_cast_args *a) {
  (void)ctx;
  int64_t n = fd_tensor_numel(a->y), m = fd_tensor_numel(a->x);
  for (int64_t i = 0; i < n; i++) ref_put(&ref_f(a->y)[i], ref_f(a->x)[i % m], a->acc != 0);
  return FD_OK;
}

static fd_status ref_fill(fd_ctx *ctx, const struct fd_fill_args *a) {
  (void)ctx;
  for (int64_t i = 0; i < fd_tensor_numel(a->y); i++) ref_f(a->y)[i] = a->value;
  return FD_OK;
}

static fd_status ref_adamw(fd_ctx *ctx, const struct fd_adamw_args *a) { /* plain descent: what the replay test needs */
  (void)ctx;
  for (int64_t i = 0; i < fd_tensor_numel(a->p); i++) {
    ref_f(a->p)[i] -= ref_f(a->control)[FD_CONTROL_LR] * ref_f(a->g)[i];
    ref_f(a->g)[i] = 0;
  }
  return FD_OK;
}

static fd_status ref_none(fd_ctx *ctx) {
  (void)ctx;
  return FD_OK;
}
static void ref_close(fd_ctx *ctx) { (void)ctx; }
static fd_status ref_alloc(fd_ctx *ctx, size_t bytes, void **out) {
  (void)ctx;
  *out = NULL;
  if (posix_memalign(out, 256, bytes + 1) != 0) return FD_ERR_NOMEM;
  memset(*out, 0, bytes);
  return FD_OK;
}
static void ref_free(fd_ctx *ctx, void *p) {
  (void)ctx;
  free(p);
}
static fd_status ref_copy(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  (void)ctx;
  memcpy(dst, src, bytes);
  return FD_OK;
}
static fd_status ref_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  (void)ctx;
  (void)args;
  *scratch_bytes = op == FD_OP_matmul ? 700 : 0;
  return FD_OK;
}
static size_t ref_kept_bytes(fd_ctx *ctx, enum fd_op op, const void *args) {
  (void)ctx;
  return op == FD_OP_matmul && ((const struct fd_matmul_args *)args)->b->flags & FD_T_CONST ? 100 : 0;
}
static const struct fd_ops ref_ops = {.matmul = ref_matmul, .colsum = ref_colsum, .add_fwd = ref_add_fwd, .act_fwd = ref_act_fwd,
                                      .act_bwd = ref_act_bwd, .gate_residual_fwd = ref_gate_residual_fwd,
                                      .gate_residual_bwd = ref_gate_residual_bwd, .rmsnorm_fwd = ref_rmsnorm_fwd,
                                      .rmsnorm_bwd = ref_rmsnorm_bwd, .cast = ref_cast, .fill = ref_fill, .adamw = ref_adamw};
__attribute__((unused)) static const struct fd_backend ref_backend = {
    .name = "loops", .ops = &ref_ops, .open = ref_none, .close = ref_close, .alloc = ref_alloc, .free = ref_free,
    .to_device = ref_copy, .from_device = ref_copy, .sync = ref_none, .prepare = ref_prepare, .kept_bytes = ref_kept_bytes};

/* ---- gradients --------------------------------------------------------------------------------------------------- */

#define MAX_LEAVES 12

/** One leaf of a test graph: `wanted` floats are drawn from N(0, scale); others are given in `data`. */
struct leaf {
  int ndim;
  int64_t shape[FD_MAX_NDIM];
  fd_dtype dtype;
  float scale;
  const void *data; /* not drawn */
  int wanted;       /* 1: external gradient that holds something already; 2: the graph makes one */
};

struct gradient_test {
  const char *name;
  fd_var (*build)(fd_graph *g, const fd_var *leaf, const void *user);
  const void *user;
  int n;
  struct leaf leaf[MAX_LEAVES];
  int64_t rows; /* of the output, and of leaf 0, that are in use; 0: all */
  unsigned bf16; /* leaves that a second run holds in bf16; its gradients are those of f32 up to rounding */
};

struct bound {
  fd_graph *g;
  void *arena;
  fd_var out, dout, leaf[MAX_LEAVES];
};

static struct bound graphtest_open(fd_ctx *ctx, const struct gradient_test *t, unsigned bf16, float **data, float **grad) {
  struct bound b = {0};
  fd_var want[MAX_LEAVES] = {0};
  size_t bytes = 0;
  OK(fd_graph_create(ctx, t->name, &b.g));
  for (int i = 0; i < t->n; i++) {
    char name[32];
    snprintf(name, sizeof name, "leaf%d", i);
    b.leaf[i] = fd_graph_external(b.g, name, bf16 >> i & 1 ? FD_BF16 : t->leaf[i].dtype, t->leaf[i].ndim, t->leaf[i].shape, 0);
    if (!grad || !t->leaf[i].wanted) continue;
    int64_t n = fd_tensor_numel(fd_graph_get(b.g, b.leaf[i]));
    if (t->leaf[i].wanted == 1) want[i] = fd_graph_external(b.g, "gradient", FD_F32, 1, &n, 0);
    fd_graph_want_grad(b.g, b.leaf[i], want[i]);
  }
  b.out = t->build(b.g, b.leaf, t->user);
  fd_graph_keep(b.g, b.out);
  if (grad) {
    const fd_tensor *y = fd_graph_get(b.g, b.out);
    b.dout = fd_graph_input(b.g, "dout", y->dtype, y->ndim, y->shape);
    fd_graph_phase(b.g, "backward");
    fd_graph_backward(b.g, 1, &b.out, &b.dout);
  }
  OK(fd_graph_plan(b.g, &bytes));
  OK(ctx->backend->alloc(ctx, bytes, &b.arena));
  OK(fd_graph_attach(b.g, b.arena, bytes));
  for (int i = 0; i < t->n; i++) {
    fd_graph_bind(b.g, b.leaf[i], data[i]);
    if (want[i]) fd_graph_bind(b.g, want[i], grad[i]);
  }
  fd_graph_set_poison(b.g, true);
  return b;
}

static void graphtest_close(fd_ctx *ctx, struct bound *b) {
  ctx->backend->free(ctx, b->arena);
  fd_graph_destroy(&b->g);
}

static double graphtest_loss(struct bound *b, const float *cotangent, int64_t used, float *out) {
  double sum = 0;
  OK(fd_graph_run(b->g));
  OK(fd_graph_read(b->g, b->out, out, (size_t)used * sizeof(float)));
  for (int64_t i = 0; i < used; i++) sum += (double)out[i] * cotangent[i];
  return sum;
}

/* |x - y|; infinite if one is not a number. */
static double apart(double x, double y) { return isnan(x - y) ? INFINITY : fabs(x - y); }

/** Read n floats of v, whatever its type. */
static void graphtest_read(fd_graph *g, fd_var v, float *out, int64_t n) {
  const fd_tensor *t = fd_graph_get(g, v);
  void *raw = malloc((size_t)(n + 1) * 4);
  OK(fd_graph_read(g, v, raw, (size_t)n * fd_dtype_bytes(t->dtype)));
  if (fd_convert(out, FD_F32, raw, t->dtype, n) != 0) failed = 1;
  free(raw);
}

/* The same graph with some leaves in bf16, whose values are exact: gradients agree to a few roundings of bf16. */
static void check_bf16(fd_ctx *ctx, const struct gradient_test *t, float *const *data, const int64_t *numel, const float *cotangent, int64_t used,
                       struct bound *with) {
  float *half[MAX_LEAVES], *grad[MAX_LEAVES];
  for (int i = 0; i < t->n; i++) {
    half[i] = data[i];
    grad[i] = calloc((size_t)numel[i] + 1, sizeof(float));
    for (int64_t k = 0; k < numel[i]; k++) grad[i][k] = (float)(k % 7) - 3;
    if (!(t->bf16 >> i & 1)) continue;
    half[i] = aligned_alloc(64, ((size_t)numel[i] * 2 + 128) / 64 * 64);
    fd_convert(half[i], FD_BF16, data[i], FD_F32, numel[i]);
  }
  struct bound b = graphtest_open(ctx, t, t->bf16, half, grad);
  const fd_tensor *dy = fd_graph_get(b.g, b.dout);
  int64_t n_out = fd_tensor_numel(dy);
  void *raw = malloc((size_t)(n_out + 1) * 4);
  fd_convert(raw, dy->dtype, cotangent, FD_F32, n_out);
  if (failed) goto done;
  OK(fd_graph_set(b.g, b.dout, raw, (size_t)n_out * fd_dtype_bytes(dy->dtype)));
  OK(fd_graph_run(b.g));
  for (int i = -1; i < t->n; i++) {
    if (i >= 0 && !t->leaf[i].wanted) continue;
    int64_t n = i < 0 ? used : i == 0 && t->rows ? t->rows * (numel[0] / t->leaf[0].shape[0]) : numel[i];
    float *p = malloc((size_t)(n + 1) * sizeof *p), *q = malloc((size_t)(n + 1) * sizeof *q);
    graphtest_read(b.g, i < 0 ? b.out : fd_graph_grad(b.g, b.leaf[i]), p, n);
    graphtest_read(with->g, i < 0 ? with->out : fd_graph_grad(with->g, with->leaf[i]), q, n);
    double largest = 1e-3, error = 0;
    for (int64_t k = 0; k < n; k++) {
      float start = i >= 0 && t->leaf[i].wanted == 1 ? (float)(k % 7) - 3 : 0;
      if (fabs(q[k] - start) > largest) largest = fabs(q[k] - start);
      error = fmax(error, apart(p[k], q[k]));
    }
    if (!(error <= 8 * 0x1p-8 * largest)) {
      failed = 1;
      printf("%s in bf16: %s %d: error %g, largest %g\n", t->name, i < 0 ? "output" : "gradient of leaf", i, error, largest);
    }
    free(p);
    free(q);
  }
done:
  graphtest_close(ctx, &b);
  for (int i = 0; i < t->n; i++) {
    if (half[i] != data[i]) free(half[i]);
    free(grad[i]);
  }
  free(raw);
}

/** Gradients of sum(out * cotangent), out and leaves in f32, against differences of fourth order. NaN anywhere fails. */
static void check_gradients(fd_ctx *ctx, const struct gradient_test *t) {
  float *data[MAX_LEAVES] = {0}, *grad[MAX_LEAVES] = {0};
  int64_t numel[MAX_LEAVES];
  for (int i = 0; i < t->n; i++) {
    numel[i] = 1;
    for (int k = 0; k < t->leaf[i].ndim; k++) numel[i] *= t->leaf[i].shape[k];
    size_t bytes = (size_t)numel[i] * fd_dtype_bytes(t->leaf[i].dtype);
    data[i] = aligned_alloc(64, (bytes + 128) / 64 * 64);
    grad[i] = aligned_alloc(64, (bytes + 128) / 64 * 64);
    float z[4];
    for (int64_t k = 0; k < numel[i] && !t->leaf[i].data; k++) {
      if (k % 4 == 0) fd_rng_normal4(11, FD_RNG_SYNTHETIC, (uint64_t)i, (uint32_t)(k / 4), z);
      data[i][k] = z[k % 4] * t->leaf[i].scale;
    }
    if (t->leaf[i].data) memcpy(data[i], t->leaf[i].data, bytes);
    for (int64_t k = 0; t->bf16 >> i & 1 && k < numel[i]; k++) data[i][k] = fd_bf16_to_f32(fd_f32_to_bf16(data[i][k]));
    for (int64_t k = 0; t->leaf[i].wanted == 1 && k < numel[i]; k++) grad[i][k] = (float)(k % 7) - 3;
  }
  struct bound with = graphtest_open(ctx, t, 0, data, grad), plain = graphtest_open(ctx, t, 0, data, NULL);
  int64_t n_out = fd_tensor_numel(fd_graph_get(with.g, with.out)), used = n_out;
  if (t->rows) used = t->rows * fd_tensor_cols(fd_graph_get(with.g, with.out));
  float *cotangent = calloc((size_t)n_out + 4, sizeof *cotangent), *out = calloc((size_t)n_out + 4, sizeof *out);
  for (int64_t k = 0; k < used; k += 4) fd_rng_normal4(12, FD_RNG_SYNTHETIC, 99, (uint32_t)(k / 4), cotangent + k);
  for (int64_t k = 0; k < used; k++) cotangent[k] = fd_bf16_to_f32(fd_f32_to_bf16(cotangent[k]));
  for (int64_t k = used; k < n_out; k++) cotangent[k] = NAN; /* not to be read */
  if (failed) goto done;
  OK(fd_graph_set(with.g, with.dout, cotangent, (size_t)n_out * sizeof(float)));
  OK(fd_graph_run(with.g));
  for (int i = 0; i < t->n; i++) {
    if (!t->leaf[i].wanted) continue;
    float *got = malloc((size_t)(numel[i] + 1) * sizeof *got);
    fd_var v = fd_graph_grad(with.g, with.leaf[i]);
    memset(got, 0, (size_t)numel[i] * sizeof *got); /* a leaf that leads nowhere has no gradient */
    if (v) OK(fd_graph_read(with.g, v, got, (size_t)numel[i] * sizeof(float)));
    double largest = 1e-3, error = 0;
    int64_t step = numel[i] > 60 ? numel[i] / 47 : 1;
    int64_t n = i == 0 && t->rows ? t->rows * (numel[0] / t->leaf[0].shape[0]) : numel[i];
    for (int64_t k = 0; k < n; k += step) {
      const float x0 = data[i][k];
      double nearest = INFINITY;
      for (int fine = 0; fine < 2; fine++) { /* the smaller step where the function bends, the larger where f32 is noisy */
        const float h = (fine ? 0.004f : 0.02f) * (t->leaf[i].scale > 0.3f ? 1.0f : t->leaf[i].scale * 3);
        double l[4];
        for (int s = 0; s < 4; s++) {
          data[i][k] = x0 + h * (float)(s - 2 + (s > 1));
          l[s] = graphtest_loss(&plain, cotangent, used, out);
        }
        data[i][k] = x0;
        double want = (8 * (l[2] - l[1]) - (l[3] - l[0])) / (12.0 * h), have = got[k] - (t->leaf[i].wanted == 1 ? k % 7 - 3 : 0);
        if (fabs(want) > largest) largest = fabs(want);
        nearest = fmin(nearest, apart(want, have));
        if (nearest <= 5e-4 * largest) break;
      }
      error = fmax(error, nearest);
    }
    if (!(error <= 2e-3 * largest)) {
      failed = 1;
      printf("%s: gradient of leaf %d: error %g, largest %g\n", t->name, i, error, largest);
    }
    free(got);
  }
  if (t->bf16) check_bf16(ctx, t, data, numel, cotangent, used, &with);
done:
  graphtest_close(ctx, &with);
  graphtest_close(ctx, &plain);
  for (int i = 0; i < t->n; i++) {
    free(data[i]);
    free(grad[i]);
  }
  free(cotangent);
  free(out);
}

#endif
