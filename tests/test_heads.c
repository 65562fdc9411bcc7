// SPDX-License-Identifier: Apache-2.0
// Split into heads: forward and backward against the formula in double, over norms, rotation, text, positions, counts, acc.
#include "optest.h"

struct ref {
  int64_t B, N, L, T, used;
  int A, K, E;
  double eps;
  const int32_t *text, *pos;
  double *qkv, *text_kv, *q_norm, *k_norm, *rope, *q, *k, *v, *dq, *dk, *dv;
};

static void head(const struct ref *f, const double *x, const double *w, const double *cs, double *y) {
  double s = 0, n[256];
  for (int i = 0; i < f->E; i++) s += x[i] * x[i];
  s = 1 / sqrt(s / f->E + f->eps);
  for (int i = 0; i < f->E; i++) y[i] = n[i] = w ? x[i] * s * (1 + w[i]) : x[i];
  for (int i = 0; cs && i < f->E / 2; i++) {
    double c = cs[i], z = cs[i + f->E / 2];
    y[i] = n[i] * c - n[i + f->E / 2] * z;
    y[i + f->E / 2] = n[i + f->E / 2] * c + n[i] * z;
  }
}

/* Outputs that are not written stay NaN; the loss adds what is written. */
static double forward(void *user) {
  struct ref *f = user;
  const int64_t E = f->E, A = f->A, K = f->K;
  for (int64_t i = 0; i < f->B * f->N * A * E; i++) f->q[i] = NAN;
  for (int64_t i = 0; i < f->B * (f->N + f->L) * K * E; i++) f->k[i] = f->v[i] = NAN;
  for (int64_t r = 0; r < f->used; r++) {
    const double *x = f->qkv + r * (A + 2 * K) * E, *cs = f->rope ? f->rope + (f->pos ? f->pos[r] : r % f->N) * E : NULL;
    int64_t to = r / f->N * (f->N + f->L) + r % f->N;
    for (int64_t h = 0; h < A; h++) head(f, x + h * E, f->q_norm, cs, f->q + (r * A + h) * E);
    for (int64_t h = 0; h < K; h++) head(f, x + (A + h) * E, f->k_norm, cs, f->k + (to * K + h) * E);
    memcpy(f->v + to * K * E, x + (A + K) * E, sizeof(double) * (size_t)(K * E));
  }
  for (int64_t b = 0; f->text_kv && b < f->B; b++)
    for (int64_t j = 0; j < f->text[2 * b + 1]; j++) {
      const double *x = f->text_kv + (f->text[2 * b] + j) * 2 * K * E;
      int64_t to = b * (f->N + f->L) + f->N + j;
      for (int64_t h = 0; h < K; h++) head(f, x + h * E, f->k_norm, NULL, f->k + (to * K + h) * E);
      memcpy(f->v + to * K * E, x + K * E, sizeof(double) * (size_t)(K * E));
    }
  double loss = 0;
  for (int64_t i = 0; f->dq && i < f->B * f->N * A * E; i++) loss += isnan(f->q[i]) ? 0 : f->q[i] * f->dq[i];
  for (int64_t i = 0; f->dq && i < f->B * (f->N + f->L) * K * E; i++) loss += isnan(f->k[i]) ? 0 : f->k[i] * f->dk[i] + f->v[i] * f->dv[i];
  return loss;
}

enum { NORMS = 1, ROPE = 2, TEXT = 4, POS = 8, ACC = 16, Q_NORM_ONLY = 32, FROZEN_TEXT = 64 };

/* Elements that belong to nobody are as they were; on a device those behind a sample's text are 0. N, L: rows of a sample in x, L 0: no text. */
static void check_written(struct ot *t, fd_tensor *x, const double *ref, int64_t N, int64_t L) {
  int64_t n = fd_tensor_numel(x);
  double *r = calloc((size_t)(n + 1), sizeof *r);
  for (int64_t i = 0; i < n; i++) {
    if (isnan(ref[i])) {
      OT_CHECK(t, OT_ON_DEVICE && L && i / (n / x->shape[0]) % (N + L) >= N ? ot_get(x, i) == 0 : isnan(ot_get(x, i)));
      ot_set(x, i, 0);
    }
    r[i] = isnan(ref[i]) ? 0 : ref[i];
  }
  OT_COMPARE_SIZE(t, x, r, 8, 1);
  for (int64_t i = 0; i < n; i++)
    if (isnan(ref[i])) ot_set(x, i, NAN);
  free(r);
}

static void one(struct ot *t, int64_t B, int64_t N, int A, int K, int E, unsigned how, int64_t count, fd_dtype dt, fd_dtype wt) {
  ot_reset(t);
  ot_what(t, "B %d N %d A %d K %d E %d how %u count %d %s %s", (int)B, (int)N, A, K, E, how, (int)count, fd_dtype_name(dt), fd_dtype_name(wt));
  const int64_t L = how & TEXT ? 5 : 0, T = 11, cols = (A + 2 * K) * E, used = count < 0 ? B * N : count;
  const bool acc = how & ACC;
  fd_tensor *qkv = OT_RAND(t, dt, B * N, cols), *text_kv = NULL, *text = NULL, *q_norm = NULL, *k_norm = NULL, *rope = NULL, *pos = NULL,
            *n = count < 0 ? NULL : ot_count(t, count), *q = OT_NEW(t, dt, B * N, A, E), *k = OT_NEW(t, dt, B * (N + L), K, E),
            *v = OT_NEW(t, dt, B * (N + L), K, E), *q_rstd = NULL, *k_rstd = NULL;
  if (how & TEXT) {
    text_kv = OT_RAND(t, dt, T, 2 * K * E);
    text = OT_NEW(t, FD_I32, B, 2);
    for (int64_t b = 0, first = 1; b < B; b++) { /* lengths 3, 0, 5; a row before and some after belong to nobody */
      ot_set(text, 2 * b, (double)first);
      ot_set(text, 2 * b + 1, b == 0 ? 3 : b == 1 ? 0 : 5);
      first += b == 0 ? 3 : b == 1 ? 0 : 5;
    }
  }
  if (how & NORMS) {
    q_norm = OT_RAND(t, wt, E);
    q_rstd = OT_NEW(t, FD_F32, B * N, A);
    if (!(how & Q_NORM_ONLY)) k_norm = OT_RAND(t, wt, E), k_rstd = OT_NEW(t, FD_F32, B * (N + L), K);
  }
  if (how & ROPE) {
    rope = OT_NEW(t, FD_F32, N + 7, E);
    for (int64_t p = 0; p < N + 7; p++)
      for (int i = 0; i < E / 2; i++) {
        double angle = (double)p * pow(100, -2.0 * i / E);
        ot_set(rope, p * E + i, cos(angle));
        ot_set(rope, p * E + E / 2 + i, sin(angle));
      }
    if (how & POS) pos = ot_integers(t, OT_NEW(t, FD_I32, B * N), 0, N + 7);
  }
  struct fd_heads_fwd_args fwd = {.qkv = qkv, .text_kv = text_kv, .q_norm = q_norm, .k_norm = k_norm, .rope = rope, .pos = pos, .text = text,
                                  .count = n, .q = q, .k = k, .v = v, .q_rstd = q_rstd, .k_rstd = k_rstd, .B = B, .N = N, .L = L, .A = A,
                                  .K = K, .E = E, .eps = 1e-2f};
  ot_run(t, FD_OP_heads_fwd, &fwd);
  struct ref f = {B, N, L, T, used, A, K, E, (double)1e-2f, text ? text->data : NULL, pos ? pos->data : NULL, ot_doubles(qkv),
                  ot_doubles(text_kv), ot_doubles(q_norm), ot_doubles(k_norm), ot_doubles(rope), ot_doubles(q), ot_doubles(k), ot_doubles(v),
                  NULL, NULL, NULL};
  forward(&f);
  check_written(t, q, f.q, N, 0);
  check_written(t, k, f.k, N, L);
  check_written(t, v, f.v, N, L);

  fd_tensor *dq = OT_RAND(t, dt, B * N, A, E), *dk = OT_RAND(t, dt, B * (N + L), K, E), *dv = OT_RAND(t, dt, B * (N + L), K, E);
  f.dq = ot_doubles(dq), f.dk = ot_doubles(dk), f.dv = ot_doubles(dv);
  for (int64_t i = 0; i < fd_tensor_numel(dq); i++) if (isnan(f.q[i])) ot_set(dq, i, NAN); /* not read */
  for (int64_t i = 0; i < fd_tensor_numel(dk); i++) if (isnan(f.k[i])) ot_set(dk, i, NAN), ot_set(dv, i, NAN);
  fd_tensor *dqkv = OT_NEW(t, dt, B * N, cols), *dtext = text_kv && !(how & FROZEN_TEXT) ? OT_NEW(t, dt, T, 2 * K * E) : NULL,
            *dqn = q_norm ? OT_NEW(t, FD_F32, E) : NULL, *dkn = k_norm ? OT_NEW(t, FD_F32, E) : NULL;
  if (acc) {
    ot_normal(t, dqkv, 0, 1);
    if (dtext) ot_normal(t, dtext, 0, 1);
    if (dqn) ot_normal(t, dqn, 0, 1);
    if (dkn) ot_normal(t, dkn, 0, 1);
  }
  double *was[4] = {ot_doubles(dqkv), ot_doubles(dtext), ot_doubles(dqn), ot_doubles(dkn)};
  OT_RUN(t, heads_bwd, .dq = dq, .dk = dk, .dv = dv, .qkv = qkv, .text_kv = text_kv, .q_norm = q_norm, .k_norm = k_norm, .rope = rope,
         .pos = pos, .text = text, .count = n, .q_rstd = q_rstd, .k_rstd = k_rstd, .dqkv = dqkv, .dtext_kv = dtext, .dq_norm = dqn,
         .dk_norm = dkn, .acc = acc ? 15u << 13 : 0, .B = B, .N = N, .L = L, .A = A, .K = K, .E = E, .eps = 1e-2f);
  fd_tensor *grads[4] = {dqkv, dtext, dqn, dkn};
  double *inputs[4] = {f.qkv, f.text_kv, f.q_norm, f.k_norm};
  for (int g = 0; g < 4; g++) {
    if (!grads[g]) continue;
    int64_t m = g == 0 ? used * cols : fd_tensor_numel(grads[g]);
    double *want = calloc((size_t)(m + 1), sizeof *want);
    ot_numeric_gradient(forward, &f, inputs[g], m, want);
    for (int64_t i = 0; acc && i < m; i++) want[i] += was[g][i];
    if (g == 0) dqkv->shape[0] = used;
    OT_COMPARE_SIZE(t, grads[g], want, g < 2 ? E : B * (N + L) * A, 1);
    if (g == 0) dqkv->shape[0] = B * N;
    free(want);
  }
  for (int64_t i = used * cols; i < B * N * cols; i++) OT_CHECK(t, acc ? ot_get(dqkv, i) == was[0][i] : isnan(ot_get(dqkv, i)));
  for (int g = 0; g < 4; g++) free(was[g]);
  free(f.qkv), free(f.text_kv), free(f.q_norm), free(f.k_norm), free(f.rope), free(f.q), free(f.k), free(f.v), free(f.dq), free(f.dk), free(f.dv);
}

static void finite_differences(struct ot *t) {
  ot_reset(t);
  ot_what(t, "finite differences");
  enum { B = 2, N = 3, L = 2, A = 4, K = 2, E = 6 };
  fd_tensor *qkv = OT_RAND(t, FD_F32, B * N, (A + 2 * K) * E), *text_kv = OT_RAND(t, FD_F32, 4, 2 * K * E), *qn = OT_RAND(t, FD_F32, E),
            *kn = OT_RAND(t, FD_F32, E), *rope = OT_RAND(t, FD_F32, N, E), *text = OT_NEW(t, FD_I32, B, 2), *q = OT_NEW(t, FD_F32, B * N, A, E),
            *k = ot_fill(OT_NEW(t, FD_F32, B * (N + L), K, E), 0), *v = ot_fill(OT_NEW(t, FD_F32, B * (N + L), K, E), 0),
            *qr = OT_NEW(t, FD_F32, B * N, A), *kr = OT_NEW(t, FD_F32, B * (N + L), K), *dq = OT_RAND(t, FD_F32, B * N, A, E),
            *dk = OT_RAND(t, FD_F32, B * (N + L), K, E), *dv = OT_RAND(t, FD_F32, B * (N + L), K, E), *dqkv = OT_NEW(t, FD_F32, B * N, (A + 2 * K) * E),
            *dt = OT_NEW(t, FD_F32, 4, 2 * K * E), *dqn = OT_NEW(t, FD_F32, E), *dkn = OT_NEW(t, FD_F32, E);
  ot_set(text, 0, 2), ot_set(text, 1, 2), ot_set(text, 2, 0), ot_set(text, 3, 1); /* not in the order of samples */
  struct fd_heads_fwd_args fwd = {.qkv = qkv, .text_kv = text_kv, .q_norm = qn, .k_norm = kn, .rope = rope, .text = text, .q = q, .k = k, .v = v,
                                  .q_rstd = qr, .k_rstd = kr, .B = B, .N = N, .L = L, .A = A, .K = K, .E = E, .eps = 1e-6f};
  ot_run(t, FD_OP_heads_fwd, &fwd);
  OT_RUN(t, heads_bwd, .dq = dq, .dk = dk, .dv = dv, .qkv = qkv, .text_kv = text_kv, .q_norm = qn, .k_norm = kn, .rope = rope, .text = text,
         .q_rstd = qr, .k_rstd = kr, .dqkv = dqkv, .dtext_kv = dt, .dq_norm = dqn, .dk_norm = dkn, .B = B, .N = N, .L = L, .A = A, .K = K, .E = E);
  ot_finite_difference(t, FD_OP_heads_fwd, &fwd, 3, OT_LIST(q, k, v), OT_LIST(dq, dk, dv), 4, OT_LIST(qkv, text_kv, qn, kn),
                       OT_LIST(dqkv, dt, dqn, dkn), __LINE__);
  for (int i = 0; i < 2 * K * E; i++) OT_CHECK(t, ot_get(dt, 2 * K * E + i) == 0); /* row 1 belongs to no sample */
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *qkv = OT_RAND(t, FD_F32, 6, 16), *q = OT_NEW(t, FD_F32, 6, 2, 4), *k = OT_NEW(t, FD_F32, 6, 1, 4), *kt = OT_NEW(t, FD_F32, 10, 1, 4),
            *w3 = OT_RAND(t, FD_F32, 3), *w4 = OT_RAND(t, FD_F32, 4), *text_kv = OT_RAND(t, FD_F32, 4, 8), *text = OT_NEW(t, FD_I32, 2, 2),
            *rope = OT_RAND(t, FD_F32, 2, 4), *r6 = OT_NEW(t, FD_F32, 6), *pos5 = OT_NEW(t, FD_I32, 5);
#define SIZES .B = 2, .N = 3, .A = 2, .K = 1, .E = 4
#define USUAL .qkv = qkv, .q = q, .k = k, .v = k
  OT_MISUSE(t, "qkv is f32 [6, 2, 4]", heads_fwd, .qkv = q, .q = q, .k = k, .v = k, SIZES);
  OT_MISUSE(t, "E = 0", heads_fwd, USUAL, .B = 2, .N = 3, .A = 2, .K = 1);
  OT_MISUSE(t, "N = -3", heads_fwd, USUAL, .B = 2, .N = -3, .A = 2, .K = 1, .E = 4);
  OT_MISUSE(t, "L = 2", heads_fwd, USUAL, SIZES, .L = 2);
  OT_MISUSE(t, "q is f32 [6, 1, 4]", heads_fwd, .qkv = qkv, .q = k, .k = k, .v = k, SIZES);
  OT_MISUSE(t, "k is f32 [6, 1, 4]", heads_fwd, USUAL, .text_kv = text_kv, .text = text, .L = 2, SIZES);
  OT_MISUSE(t, "text is missing", heads_fwd, .qkv = qkv, .q = q, .k = kt, .v = kt, .text_kv = text_kv, .L = 2, SIZES);
  OT_MISUSE(t, "text_kv is f32 [6, 16]", heads_fwd, .qkv = qkv, .q = q, .k = kt, .v = kt, .text_kv = qkv, .text = text, .L = 2, SIZES);
  OT_MISUSE(t, "q_norm is f32 [3]", heads_fwd, USUAL, .q_norm = w3, SIZES);
  OT_MISUSE(t, "k_norm is f32 [3]", heads_fwd, USUAL, .k_norm = w3, SIZES);
  OT_MISUSE(t, "rope is f32 [2, 4]", heads_fwd, USUAL, .rope = rope, SIZES);
  OT_MISUSE(t, "pos is i32 [5]", heads_fwd, USUAL, .rope = rope, .pos = pos5, SIZES);
  OT_MISUSE(t, "q_rstd is f32 [6]", heads_fwd, USUAL, .q_norm = w4, .q_rstd = r6, SIZES);
  OT_MISUSE(t, "q_rstd is missing", heads_bwd, .dq = q, .dk = k, .dv = k, .qkv = qkv, .dqkv = qkv, .q_norm = w4, SIZES);
  OT_MISUSE(t, "dqkv is f32 [6, 2, 4]", heads_bwd, .dq = q, .dk = k, .dv = k, .qkv = qkv, .dqkv = q, SIZES);
  OT_MISUSE(t, "dq_norm is f32 [4]", heads_bwd, .dq = q, .dk = k, .dv = k, .qkv = qkv, .dqkv = qkv, .dq_norm = w4, SIZES);
  OT_MISUSE(t, "dtext_kv is f32 [4, 8]", heads_bwd, .dq = q, .dk = k, .dv = k, .qkv = qkv, .dqkv = qkv, .dtext_kv = text_kv, SIZES);
  ot_set(text, 2, 3), ot_set(text, 3, 2); /* rows 3 and 4 of 4: seen when the op runs */
  struct fd_heads_fwd_args fwd = {.qkv = qkv, .q = q, .k = kt, .v = kt, .text_kv = text_kv, .text = text, .L = 2, SIZES};
  OT_CHECK(t, OT_ON_DEVICE || (fd_op_run(t->ctx, FD_OP_heads_fwd, &fwd) == FD_ERR_ARG && strstr(fd_status_message(), "text[1] = (3, 2)")));
}

static void body(struct ot *t) {
  const unsigned hows[] = {0, NORMS, ROPE, NORMS | ROPE, TEXT, TEXT | NORMS, TEXT | NORMS | ROPE | ACC, NORMS | ROPE | POS | ACC, TEXT | ACC,
                           NORMS | Q_NORM_ONLY | TEXT, TEXT | NORMS | FROZEN_TEXT};
  for (int dt = FD_F32; dt <= FD_BF16; dt++)
    for (size_t h = 0; h < sizeof hows / sizeof hows[0]; h++) {
      one(t, 3, 2, 4, 2, 6, hows[h], -1, dt, FD_F32);
      one(t, 1, 5, 1, 1, 2, hows[h], 3, dt, FD_BF16);
      one(t, 2, 1, 3, 3, 34, hows[h], -1, dt, FD_F32);
    }
  for (int dt = FD_F32; dt <= FD_BF16; dt++) /* lengths that are compiled on their own */
    for (size_t h = 0; h < sizeof hows / sizeof hows[0]; h++) {
      one(t, 2, 2, 2, 1, 32, hows[h], -1, dt, FD_F32);
      one(t, 1, 2, 2, 1, 64, hows[h], -1, dt, FD_F32);
    }
  one(t, 1, 2, 2, 1, 5, NORMS, -1, FD_F32, FD_F32); /* odd E */
  one(t, 1, 70, 2, 1, 4, NORMS | ROPE, -1, FD_F32, FD_F32); /* several pieces */
  one(t, 0, 4, 2, 1, 4, NORMS | TEXT, -1, FD_F32, FD_F32);
  one(t, 1, 4, 2, 1, 4, NORMS | TEXT, 0, FD_F32, FD_F32);
  finite_differences(t);
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
