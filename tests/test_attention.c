// SPDX-License-Identifier: Apache-2.0
// Attention forward and backward against double loops over each sequence: grouped heads, causal, window, soft cap, empty
// sequences, several tiles; rows outside ranges are neither read nor written. With and without AVX-512.
#include "cpu/dnnl.h"
#include "isa.h"
#ifdef FD_EMULATE
#include "cuda/attention.h"
#endif

struct one {
  int64_t Tq, Tk;
  int S, A, K, E;
  const int *ranges; /* 4 S */
  int causal, window;
  double softcap;
  int q_stride, k_stride; /* of a regular batch, else 0 */
};

/* One head of one sequence. s: scores after cap and mask; p: probabilities. */
static void reference(const struct one *c, const double *q, const double *k, const double *v, const double *d_o, double scale, double *o,
                      double *lse, double *dq, double *dk, double *dv) {
  for (int s = 0; s < c->S; s++) {
    const int *r = c->ranges + 4 * s;
    int64_t N = r[1], M = r[3], E = c->E;
    double *p = malloc(sizeof *p * (size_t)(M + 1)), *raw = malloc(sizeof *raw * (size_t)(M + 1)), *dp = malloc(sizeof *dp * (size_t)(M + 1));
    for (int a = 0; a < c->A; a++)
      for (int64_t i = 0; i < N; i++) {
        int64_t qa = ((r[0] + i) * c->A + a) * E, h = a / (c->A / c->K);
        double most = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < M; j++) {
          int64_t ka = ((r[2] + j) * c->K + h) * E;
          bool seen = !(c->causal && j > i) && !(c->window > 0 && i - j >= c->window);
          double x = 0;
          for (int64_t e = 0; e < E; e++) x += q[qa + e] * k[ka + e];
          raw[j] = x * scale;
          if (c->softcap > 0) raw[j] = c->softcap * tanh(raw[j] / c->softcap);
          p[j] = seen ? raw[j] : -INFINITY;
          most = fmax(most, p[j]);
        }
        for (int64_t j = 0; j < M; j++) p[j] = p[j] == -INFINITY ? 0 : exp(p[j] - most), sum += p[j];
        lse[qa / E] = sum > 0 ? most + log(sum) : -INFINITY;
        for (int64_t e = 0; e < E; e++) o[qa + e] = 0;
        for (int64_t j = 0; sum > 0 && j < M; j++) {
          int64_t ka = ((r[2] + j) * c->K + h) * E;
          p[j] /= sum, dp[j] = 0;
          for (int64_t e = 0; e < E; e++) o[qa + e] += p[j] * v[ka + e], dp[j] += d_o[qa + e] * v[ka + e], dv[ka + e] += p[j] * d_o[qa + e];
          delta += p[j] * dp[j];
        }
        for (int64_t j = 0; sum > 0 && j < M; j++) {
          int64_t ka = ((r[2] + j) * c->K + h) * E;
          double g = p[j] * (dp[j] - delta) * scale;
          if (c->softcap > 0) g *= 1 - raw[j] / c->softcap * (raw[j] / c->softcap);
          for (int64_t e = 0; e < E; e++) dq[qa + e] += g * k[ka + e], dk[ka + e] += g * q[qa + e];
        }
      }
    free(p), free(raw), free(dp);
  }
}

/* On a device rows between the sequences of a regular batch are finite, and may be overwritten. */
static bool may_spoil_gaps(const struct one *c) { return OT_ON_DEVICE && c->k_stride > 0; }

/* Whether a row is inside a range; which: 0 queries, 2 keys. */
static bool inside(const struct one *c, int64_t row, int which) {
  for (int s = 0; s < c->S; s++)
    if (row >= c->ranges[4 * s + which] && row < c->ranges[4 * s + which] + c->ranges[4 * s + which + 1]) return true;
  return false;
}

/* In bf16 the probabilities and their gradients are rounded before they are multiplied, and the
 * backward forms sum(do o) from a rounded o: errors of eps(bf16) of what is summed.
 * Early causal rows are sums of few terms and much larger than the rest: the size is the largest element's. Rows outside
 * ranges must be as they were. */
static void compare(struct ot *t, const char *name, const fd_tensor *x, const double *ref, const double *before, const struct one *c,
                    int which, int64_t per_row, double terms, int line) {
  double size = 0, eps = x->dtype == FD_BF16 ? 0x1p-8 : 0x1p-23, most = 1;
  int64_t n = fd_tensor_numel(x), worst = -1;
  t->checks++;
  for (int64_t i = 0; i < n; i++)
    if (inside(c, i / per_row, which) && isfinite(ref[i])) size = fmax(size, fabs(ref[i]));
  for (int64_t i = 0; i < n; i++) {
    double v = ot_get(x, i), off;
    if (!inside(c, i / per_row, which)) {
      if (!may_spoil_gaps(c) && !(v == before[i] || (isnan(v) && isnan(before[i]))))
        OT_FAIL(t, "line %d: %s[%lld] outside the ranges was written", line, name, (long long)i);
      continue;
    }
    double tol = eps * (4 * fabs(ref[i]) + size * (x->dtype == FD_BF16 ? 2 : 2 * sqrt(terms))) + 1e-12;
    off = v == ref[i] ? 0 : fabs(v - ref[i]) / tol;
    if (!(off <= most)) worst = i, most = isnan(off) ? INFINITY : off;
  }
  if (worst >= 0)
    OT_FAIL(t, "line %d: %s[%lld] = %.9g, expected %.9g: %.3g times the tolerance (size %.3g)", line, name, (long long)worst, ot_get(x, worst),
            ref[worst], most, size);
}

/* On a device lse of a regular batch is [S, A, q_stride]. */
static void turn(const struct one *c, double *lse) {
  double *was = malloc(sizeof *was * (size_t)(c->Tq * c->A));
  memcpy(was, lse, sizeof *was * (size_t)(c->Tq * c->A));
  for (int64_t r = 0; r < c->Tq; r++)
    for (int a = 0; a < c->A; a++) lse[(r / c->q_stride * c->A + a) * c->q_stride + r % c->q_stride] = was[r * c->A + a];
  free(was);
}

static void check(struct ot *t, struct one c, fd_dtype type, bool acc) {
  ot_reset(t);
  ot_what(t, "%s Tq %lld Tk %lld S %d A %d K %d E %d causal %d window %d cap %g acc %d strides %d %d", fd_dtype_name(type), (long long)c.Tq,
          (long long)c.Tk, c.S, c.A, c.K, c.E, c.causal, c.window, c.softcap, acc, c.q_stride, c.k_stride);
  fd_tensor *q = OT_RAND(t, type, c.Tq, c.A, c.E), *k = OT_RAND(t, type, c.Tk, c.K, c.E), *v = OT_RAND(t, type, c.Tk, c.K, c.E);
  fd_tensor *d_o = OT_RAND(t, type, c.Tq, c.A, c.E), *o = OT_NEW(t, type, c.Tq, c.A, c.E), *lse = OT_NEW(t, FD_F32, c.Tq, c.A);
  fd_tensor *dq = acc ? OT_RAND(t, type, c.Tq, c.A, c.E) : OT_NEW(t, type, c.Tq, c.A, c.E);
  fd_tensor *dk = acc ? OT_RAND(t, type, c.Tk, c.K, c.E) : OT_NEW(t, type, c.Tk, c.K, c.E);
  fd_tensor *dv = acc ? OT_RAND(t, type, c.Tk, c.K, c.E) : OT_NEW(t, type, c.Tk, c.K, c.E), *ranges = OT_NEW(t, FD_I32, c.S, 4);
  int64_t max_q = 0, max_k = 0, q_row = (int64_t)c.A * c.E, k_row = (int64_t)c.K * c.E;
  for (int i = 0; i < 4 * c.S; i++) ot_set(ranges, i, c.ranges[i]);
  for (int s = 0; s < c.S; s++) {
    if (c.ranges[4 * s + 1] > max_q) max_q = c.ranges[4 * s + 1];
    if (c.ranges[4 * s + 3] > max_k) max_k = c.ranges[4 * s + 3];
  }
  for (int64_t i = 0; i < fd_tensor_numel(q); i++) /* outside the ranges: must not be read */
    if (!inside(&c, i / q_row, 0)) ot_set(q, i, NAN), ot_set(d_o, i, NAN);
  for (int64_t i = 0; i < fd_tensor_numel(k); i++)
    if (!inside(&c, i / k_row, 2)) ot_set(k, i, may_spoil_gaps(&c) ? 1e30 : NAN), ot_set(v, i, may_spoil_gaps(&c) ? -1e30 : NAN);
  double *dQ = ot_doubles(q), *dK = ot_doubles(k), *dV = ot_doubles(v), *dO = ot_doubles(d_o);
  double *ro = ot_doubles(o), *rl = ot_doubles(lse), *rq = ot_doubles(dq), *rk = ot_doubles(dk), *rv = ot_doubles(dv);
  double *bo = ot_doubles(o), *bl = ot_doubles(lse), *bq = ot_doubles(dq), *bk = ot_doubles(dk), *bv = ot_doubles(dv);
  if (!acc) {
    memset(rq, 0, sizeof *rq * (size_t)fd_tensor_numel(q));
    memset(rk, 0, sizeof *rk * (size_t)fd_tensor_numel(k));
    memset(rv, 0, sizeof *rv * (size_t)fd_tensor_numel(k));
  }
  double scale = 1 / sqrt(c.E);
  reference(&c, dQ, dK, dV, dO, (float)scale, ro, rl, rq, rk, rv);
#define COMMON .A = c.A, .K = c.K, .E = c.E, .scale = (float)scale, .causal = c.causal, .window = c.window, .softcap = (float)c.softcap, \
               .max_q = max_q, .max_k = max_k, .q_stride = c.q_stride, .k_stride = c.k_stride
  struct fd_attention_fwd_args fwd = {.q = q, .k = k, .v = v, .ranges = ranges, .o = o, .lse = lse, COMMON};
  ot_run(t, FD_OP_attention_fwd, &fwd);
  double longest = fmax(c.E, (double)(max_q * c.A / c.K > max_k ? max_q * c.A / c.K : max_k));
  compare(t, "o", o, ro, bo, &c, 0, q_row, longest, __LINE__);
  if (OT_ON_DEVICE && c.q_stride && c.Tq == c.S * c.q_stride) turn(&c, rl);
  compare(t, "lse", lse, rl, bl, &c, 0, c.A, longest, __LINE__);
  OT_RUN(t, attention_bwd, .d_o = d_o, .q = q, .k = k, .v = v, .o = o, .lse = lse, .ranges = ranges, .dq = dq, .dk = dk, .dv = dv,
         .acc = acc ? 7u << 7 : 0, COMMON);
  compare(t, "dq", dq, rq, bq, &c, 0, q_row, longest, __LINE__);
  compare(t, "dk", dk, rk, bk, &c, 2, k_row, longest, __LINE__);
  compare(t, "dv", dv, rv, bv, &c, 2, k_row, longest, __LINE__);
  if (type == FD_F32 && !acc && c.Tq < 20) {
    /* outside ranges: zeros, so that sums over all elements can be formed */
    for (int64_t i = 0; i < fd_tensor_numel(q); i++)
      if (!inside(&c, i / q_row, 0)) ot_set(q, i, 0), ot_set(d_o, i, 0), ot_set(o, i, 0), ot_set(dq, i, 0);
    for (int64_t i = 0; i < fd_tensor_numel(k); i++)
      if (!inside(&c, i / k_row, 2)) ot_set(k, i, 0), ot_set(v, i, 0), ot_set(dk, i, 0), ot_set(dv, i, 0);
    ot_finite_difference(t, FD_OP_attention_fwd, &fwd, 1, OT_LIST(o), OT_LIST(d_o), 3, OT_LIST(q, k, v), OT_LIST(dq, dk, dv), __LINE__);
  }
  free(dQ), free(dK), free(dV), free(dO), free(ro), free(rl), free(rq), free(rk), free(rv), free(bo), free(bl), free(bq), free(bk), free(bv);
}

/* The same bits on 1 to 4 threads; few sequences, so that forward cuts them into blocks. */
static void same_bits(struct ot *t) {
  static const int at[][4] = {{0, 0, 0, 0}, {0, 301, 0, 700}, {0, 650, 0, 650}, {0, 97, 0, 33}};
  enum { A = 6, K = 2, E = 16 };
  for (int type = FD_F32; type <= FD_BF16; type++)
    for (int mode = 0; mode < 3; mode++)
      for (int s = 1; s < 4; s++) {
        ot_reset(t);
        ot_what(t, "same bits, %s, mode %d, %d queries", fd_dtype_name(type), mode, at[s][1]);
        int64_t N = at[s][1], M = at[s][3];
        fd_tensor *q = OT_RAND(t, type, N, A, E), *k = OT_RAND(t, type, M, K, E), *v = OT_RAND(t, type, M, K, E);
        fd_tensor *d_o = OT_RAND(t, type, N, A, E), *ranges = OT_NEW(t, FD_I32, 1, 4);
        for (int i = 0; i < 4; i++) ot_set(ranges, i, at[s][i]);
        fd_tensor *first[5] = {NULL};
        fd_ctx *own = t->ctx;
        for (int threads = 1; threads <= 4; threads++) {
          fd_tensor *out[] = {OT_NEW(t, type, N, A, E), OT_NEW(t, FD_F32, N, A), OT_NEW(t, type, N, A, E), OT_NEW(t, type, M, K, E),
                              OT_NEW(t, type, M, K, E)};
          if (fd_ctx_create(&fd_cpu_backend, threads, NULL, &t->ctx) != FD_OK) abort();
#define MODE .A = A, .K = K, .E = E, .scale = 0.25f, .causal = mode == 1, .window = mode == 2 ? 40 : 0, .max_q = N, .max_k = M
          OT_RUN(t, attention_fwd, .q = q, .k = k, .v = v, .ranges = ranges, .o = out[0], .lse = out[1], MODE);
          OT_RUN(t, attention_bwd, .d_o = d_o, .q = q, .k = k, .v = v, .o = out[0], .lse = out[1], .ranges = ranges, .dq = out[2],
                 .dk = out[3], .dv = out[4], MODE);
          fd_ctx_destroy(&t->ctx);
          t->ctx = own;
          for (int i = 0; i < 5; i++) {
            if (threads == 1) first[i] = out[i];
            OT_CHECK(t, memcmp(first[i]->data, out[i]->data, fd_tensor_bytes(out[i])) == 0);
          }
        }
      }
}

/* Batches of equal strides with rows to spare between the keys, as a library takes them; and what only looks like one. */
static void regular(struct ot *t) {
  static const int at[] = {0, 6, 0, 16, 6, 6, 16, 1, 12, 6, 32, 9}, one[] = {0, 2, 0, 261};
#define REGULAR(A, K, E, causal, cap) check(t, (struct one){18, 48, 3, A, K, E, at, causal, 0, cap, 6, 16}, type, acc)
  for (int type = FD_F32; type <= FD_BF16; type++)
    for (int acc = 0; acc < 2; acc++) {
      REGULAR(6, 2, 24, 0, 0);
      REGULAR(4, 2, 8, 1, 0);
      REGULAR(4, 2, 8, 0, 2);
      REGULAR(2, 2, 5, 0, 0);
      REGULAR(2, 1, 64, 0, 0);
      check(t, (struct one){19, 49, 3, 4, 2, 8, at, 0, 0, 0, 6, 16}, type, acc); /* a row too many: no batch */
    }
  const fd_dtype type = FD_BF16;
  bool acc = false;
  REGULAR(1, 1, 256, 0, 0);
  REGULAR(1, 1, 264, 0, 0); /* one wide head */
  check(t, (struct one){2, 264, 1, 1, 1, 264, one, 0, 0, 0, 2, 264}, type, acc);
#ifdef FD_EMULATE
  const size_t most = cuda_attention_most_bytes, row = 16 * (sizeof(float) + sizeof(fd_bf16));
  cuda_attention_most_bytes = 2 * 6 * row; /* two pictures at a time, then one */
  REGULAR(1, 1, 264, 0, 0);
  cuda_attention_most_bytes = 4 * row; /* four rows at a time, then two */
  REGULAR(1, 1, 264, 0, 0);
  cuda_attention_most_bytes = 6; /* a backward that keeps scores: one sequence at a time */
#endif
  t->ctx->deterministic = acc = true;
  REGULAR(6, 2, 24, 0, 0);
  t->ctx->deterministic = false;
#ifdef FD_EMULATE
  cuda_attention_most_bytes = most;
#endif
}

static void body(struct ot *t) {
  if (!OT_ON_DEVICE) same_bits(t); /* of numbers of threads */
  static const int one[] = {0, 1, 0, 1}, gaps[] = {1, 5, 2, 7, 6, 0, 9, 3, 8, 6, 12, 0, 14, 3, 13, 1};
  static const int demo[] = {0, 16, 0, 35, 16, 16, 40, 24, 32, 16, 80, 16}, text[] = {0, 37, 0, 37, 37, 1, 37, 1, 38, 65, 38, 65};
  static const int mid[] = {0, 100, 0, 250}, large[] = {0, 70, 0, 1100, 70, 600, 1100, 600};
  for (int type = FD_F32; type <= FD_BF16; type++)
    for (int acc = 0; acc < 2; acc++)
      for (int mode = 0; mode < 5; mode++) {
        int causal = mode == 1 || mode == 3, window = mode >= 2 && mode <= 3 ? 5 : 0;
        double cap = mode == 4 ? 2 : 0;
        check(t, (struct one){1, 1, 1, 1, 1, 1, one, causal, window, cap, 0, 0}, type, acc);
        check(t, (struct one){18, 15, 4, 6, 2, 5, gaps, causal, window, cap, 0, 0}, type, acc);
        check(t, (struct one){18, 15, 4, 3, 3, 8, gaps, causal, window, cap, 0, 0}, type, acc);
        check(t, (struct one){48, 120, 3, 6, 2, 32, demo, causal, window, cap, 0, 0}, type, acc);
        check(t, (struct one){103, 103, 3, 4, 1, 24, text, causal, window, cap, 0, 0}, type, acc);
        if (OT_EMULATED) continue; /* the emulator is slow; the shapes above have tiles, gaps and groups */
        check(t, (struct one){100, 250, 1, 4, 2, 64, mid, causal, window * 10, cap, 0, 0}, type, acc);
        check(t, (struct one){103, 103, 3, 2, 1, 130, text, causal, window, cap, 0, 0}, type, acc);
        if (!acc) check(t, (struct one){670, 1700, 2, 2, 1, 17, large, causal, window * 30, cap, 0, 0}, type, acc);
      }
  regular(t);
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *q = OT_RAND(t, FD_F32, 4, 4, 8), *k = OT_RAND(t, FD_F32, 6, 2, 8), *o = OT_NEW(t, FD_F32, 4, 4, 8), *lse = OT_NEW(t, FD_F32, 4, 4);
  fd_tensor *r = OT_NEW(t, FD_I32, 1, 4), *r3 = OT_NEW(t, FD_I32, 1, 3);
#define GOOD .k = k, .v = k, .o = o, .max_q = 4, .max_k = 6, .scale = 1
  OT_MISUSE(t, "A", attention_fwd, .q = q, .ranges = r, .lse = lse, .A = 4, .K = 3, .E = 8, GOOD);
  OT_MISUSE(t, "scale", attention_fwd, .q = q, .k = k, .v = k, .ranges = r, .o = o, .lse = lse, .A = 4, .K = 2, .E = 8);
  OT_MISUSE(t, "ranges", attention_fwd, .q = q, .ranges = r3, .lse = lse, .A = 4, .K = 2, .E = 8, GOOD);
  OT_MISUSE(t, "stride", attention_fwd, .q = q, .ranges = r, .lse = lse, .A = 4, .K = 2, .E = 8, .q_stride = 4, .k_stride = 5, GOOD);
  OT_MISUSE(t, "lse", attention_fwd, .q = q, .ranges = r, .lse = q, .A = 4, .K = 2, .E = 8, GOOD);
  OT_MISUSE(t, "dq", attention_bwd, .d_o = q, .q = q, .lse = lse, .ranges = r, .dq = k, .dk = k, .dv = k, .A = 4, .K = 2, .E = 8, GOOD);
  struct fd_attention_fwd_args a = {.q = q, .ranges = r, .lse = lse, .A = 4, .K = 2, .E = 8, GOOD};
  ot_set(r, 1, 4), ot_set(r, 3, 7); /* more keys than there are */
  OT_CHECK(t, OT_ON_DEVICE || fd_op_run(t->ctx, FD_OP_attention_fwd, &a) == FD_ERR_ARG);
}

int main(void) { return isa_main(body); }
