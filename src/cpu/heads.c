// SPDX-License-Identifier: Apache-2.0
// Split of the joint projection into heads with norm and rotation, text rows put behind each sample's image rows.
// Sums for dq_norm and dk_norm go to one slot per piece of image rows and one per piece of text rows (cpu.h).
#include <math.h>

#include "cpu/cpu.h"
#include "cpu/vmath.h"

/* Heads of 32 and 64 are compiled on their own: known lengths need no loop over what is left, which costs as much as the work. */

/* How the heads of one row are treated; `f` = 1 + norm weight, or NULL; cs = cosines then sines, or NULL. */
struct row {
  int64_t E;
  const float *f, *cs;
  float eps;
};

/* ---- forward ----------------------------------------------------------------------------------------------------- */

CPU_INLINE void fwd_head(const void *restrict x, void *restrict y, bool bf16, int64_t E, const float *restrict f, const float *restrict cs,
                         float eps, float *rstd) {
  float s = 1.0f;
  if (f) {
    float lane[CPU_LANES] = {0};
    CPU_LANES_ADD(lane, E, cpu_load(x, bf16, i) * cpu_load(x, bf16, i));
    s = 1.0f / sqrtf(cpu_lanes_sum(lane) / (float)E + eps);
    if (rstd) *rstd = s;
  }
  if (cs) {
    const int64_t half = E / 2;
    for (int64_t i = 0; i < half; i++) {
      float p = cpu_load(x, bf16, i) * s, q = cpu_load(x, bf16, i + half) * s;
      if (f) p *= f[i], q *= f[i + half];
      cpu_store(y, bf16, i, cpu_fma(p, cs[i], -(q * cs[i + half])));
      cpu_store(y, bf16, i + half, cpu_fma(q, cs[i], p * cs[i + half]));
    }
  } else if (f) {
    for (int64_t i = 0; i < E; i++) cpu_store(y, bf16, i, cpu_load(x, bf16, i) * s * f[i]);
  } else {
    memcpy(y, x, (size_t)E * (bf16 ? sizeof(fd_bf16) : sizeof(float)));
  }
}

CPU_CLONES static void fwd_heads(const void *x, void *y, bool bf16, int64_t heads, struct row r, float *rstd) {
#define HEADS(T, bf16, E, f, cs) \
  for (int64_t h = 0; h < heads; h++) \
    fwd_head((const T *)x + h * E, (T *)y + h * E, bf16, E, f, cs, r.eps, rstd ? rstd + h : NULL)
#define SIZES(T, bf16, f, cs)                                      \
  do {                                                             \
    if (r.E == 32) HEADS(T, bf16, 32, f, cs);                      \
    else if (r.E == 64) HEADS(T, bf16, 64, f, cs);                 \
    else HEADS(T, bf16, r.E, f, cs);                               \
  } while (0)
#define TYPES(f, cs) \
  if (bf16) SIZES(fd_bf16, true, f, cs); \
  else SIZES(float, false, f, cs)
  if (r.f && r.cs) {
    TYPES(r.f, r.cs);
  } else if (r.f) {
    TYPES(r.f, NULL);
  } else if (r.cs) {
    TYPES(NULL, r.cs);
  } else {
    memcpy(y, x, (size_t)(heads * r.E) * (bf16 ? sizeof(fd_bf16) : sizeof(float)));
  }
#undef TYPES
#undef SIZES
#undef HEADS
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* dx of one head. g = gradient of the normed value (rotated back), h = x rstd: dx = rstd (g f - h mean(g f h)), sum += g h. */
CPU_INLINE void bwd_head(const void *restrict dy, const void *restrict x, void *restrict dx, bool bf16, bool acc, int64_t E,
                         const float *restrict f, const float *restrict cs, float s, float *restrict sum, float *restrict g) {
  if (cs) {
    const int64_t half = E / 2;
    for (int64_t i = 0; i < half; i++) {
      float p = cpu_load(dy, bf16, i), q = cpu_load(dy, bf16, i + half);
      g[i] = cpu_fma(p, cs[i], q * cs[i + half]);
      g[i + half] = cpu_fma(q, cs[i], -(p * cs[i + half]));
    }
  } else if (f) {
    for (int64_t i = 0; i < E; i++) g[i] = cpu_load(dy, bf16, i);
  } else {
    for (int64_t i = 0; i < E; i++) cpu_store(dx, bf16, i, acc ? cpu_load(dx, bf16, i) + cpu_load(dy, bf16, i) : cpu_load(dy, bf16, i));
    return;
  }
  if (f) {
    float lane[CPU_LANES] = {0};
    CPU_LANES_ADD(lane, E, g[i] * f[i] * cpu_load(x, bf16, i));
    float c = cpu_lanes_sum(lane) * s * s / (float)E;
    for (int64_t i = 0; i < E; i++) {
      float h = cpu_load(x, bf16, i) * s, d = cpu_fma(g[i] * f[i], s, -(h * c));
      sum[i] = cpu_fma(g[i], h, sum[i]);
      if (acc) d += cpu_load(dx, bf16, i);
      cpu_store(dx, bf16, i, d);
    }
  } else {
    for (int64_t i = 0; i < E; i++) cpu_store(dx, bf16, i, acc ? cpu_load(dx, bf16, i) + g[i] : g[i]);
  }
}

/* `g`: E floats of this thread. sum: E floats, added to (with norms). */
CPU_CLONES static void bwd_heads(const void *dy, const void *x, void *dx, bool bf16, bool acc, int64_t heads, struct row r,
                                 const float *rstd, float *sum, float *g) {
#define HEADS(T, bf16, acc, E, f, cs) \
  for (int64_t h = 0; h < heads; h++) \
    bwd_head((const T *)dy + h * E, (const T *)x + h * E, (T *)dx + h * E, bf16, acc, E, f, cs, (f) ? rstd[h] : 1.0f, sum, g)
#define SIZES(T, bf16, f, cs)                                               \
  do {                                                                      \
    if (r.E == 32 && !acc) HEADS(T, bf16, false, 32, f, cs);                \
    else if (r.E == 64 && !acc) HEADS(T, bf16, false, 64, f, cs);           \
    else HEADS(T, bf16, acc, r.E, f, cs);                                   \
  } while (0)
#define TYPES(f, cs) \
  if (bf16) SIZES(fd_bf16, true, f, cs); \
  else SIZES(float, false, f, cs)
  if (r.f && r.cs) {
    TYPES(r.f, r.cs);
  } else if (r.f) {
    TYPES(r.f, NULL);
  } else if (r.cs) {
    TYPES(NULL, r.cs);
  } else {
    r.E *= heads; /* a copy or a sum, no heads in it */
    heads = 1;
    if (!acc) memcpy(dx, dy, (size_t)r.E * (bf16 ? sizeof(fd_bf16) : sizeof(float)));
    else TYPES(NULL, NULL);
  }
#undef TYPES
#undef SIZES
#undef HEADS
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

/* Slots that both directions have, and their scalars. */
struct shape {
  const fd_tensor *qkv, *text_kv, *q_norm, *k_norm, *rope, *pos, *text, *count;
  int64_t B, N, L;
  int A, K, E;
};

static fd_status check_shape(enum fd_op op, const struct shape *s) {
#define SLOT(slot, cond, ...) \
  if (!(cond)) return fd_op_wrong_slot(op, #slot, s->slot, __VA_ARGS__)
  if (s->B < 0 || s->N < 0 || s->L < 0)
    return fd_op_wrong_arg(op, "B = %lld, N = %lld, L = %lld, expected 0 or more", (long long)s->B, (long long)s->N, (long long)s->L);
  if (s->A < 1 || s->K < 1 || s->E < 1) return fd_op_wrong_arg(op, "A = %d, K = %d, E = %d, expected 1 or more", s->A, s->K, s->E);
  const int64_t rows = s->B * s->N, cols = ((int64_t)s->A + 2 * s->K) * s->E;
  SLOT(qkv, fd_tensor_rows(s->qkv) == rows && fd_tensor_cols(s->qkv) == cols, "[B N = %lld, (A + 2 K) E = %lld]", (long long)rows, (long long)cols);
  SLOT(q_norm, !s->q_norm || fd_tensor_numel(s->q_norm) == s->E, "[%d]", s->E);
  SLOT(k_norm, !s->k_norm || fd_tensor_numel(s->k_norm) == s->E, "[%d]", s->E);
  if (s->text_kv) {
    SLOT(text_kv, fd_tensor_cols(s->text_kv) == 2 * (int64_t)s->K * s->E, "[T, 2 K E = %lld]", 2 * (long long)s->K * s->E);
    SLOT(text, s->text, "i32 [B, 2] beside text_kv");
    SLOT(text, fd_tensor_numel(s->text) == 2 * s->B, "[%lld, 2]", (long long)s->B);
  } else if (s->L != 0) {
    return fd_op_wrong_arg(op, "L = %lld without text_kv, expected 0", (long long)s->L);
  }
  if (s->rope) {
    if (s->E % 2) return fd_op_wrong_arg(op, "E = %d is odd, it cannot be rotated", s->E);
    SLOT(rope, s->rope->ndim == 2 && s->rope->shape[1] == s->E, "[positions, %d]", s->E);
    SLOT(rope, s->pos || s->rope->shape[0] >= s->N, "at least N = %lld positions", (long long)s->N);
    SLOT(pos, !s->pos || fd_tensor_numel(s->pos) == rows, "[%lld]", (long long)rows);
  }
  return FD_OK;
#undef SLOT
}

/* Contents that only the step knows: text inside its buffer, positions inside the table. */
static fd_status check_content(enum fd_op op, const struct shape *s, int64_t used) {
  const int32_t *text = s->text_kv ? s->text->data : NULL, *pos = s->rope && s->pos ? s->pos->data : NULL;
  const int64_t T = s->text_kv ? fd_tensor_rows(s->text_kv) : 0, positions = s->rope ? s->rope->shape[0] : 0;
  for (int64_t b = 0; text && b < s->B; b++)
    if (text[2 * b] < 0 || text[2 * b + 1] < 0 || text[2 * b + 1] > s->L || text[2 * b] + (int64_t)text[2 * b + 1] > T)
      return fd_op_wrong_arg(op, "text[%lld] = (%d, %d), expected rows inside %lld and at most L = %lld", (long long)b, (int)text[2 * b],
                             (int)text[2 * b + 1], (long long)T, (long long)s->L);
  for (int64_t r = 0; pos && r < used; r++)
    if (pos[r] < 0 || pos[r] >= positions)
      return fd_op_wrong_arg(op, "pos[%lld] = %d, rope has %lld positions", (long long)r, (int)pos[r], (long long)positions);
  return FD_OK;
}

static void load_norm(const fd_tensor *w, int64_t E, float *f) {
  for (int64_t i = 0; w && i < E; i++) f[i] = 1.0f + cpu_load(w->data, w->dtype == FD_BF16, i);
}

static const float *angles(const struct shape *s, int64_t row) {
  if (!s->rope) return NULL;
  int64_t p = s->pos ? ((const int32_t *)s->pos->data)[row] : row % s->N;
  return (const float *)s->rope->data + p * s->E;
}

#define SHAPE(a) \
  {(a)->qkv, (a)->text_kv, (a)->q_norm, (a)->k_norm, (a)->rope, (a)->pos, (a)->text, (a)->count, (a)->B, (a)->N, (a)->L, (a)->A, (a)->K, (a)->E}

/* ---- ops --------------------------------------------------------------------------------------------------------- */

fd_status cpu_heads_fwd_prepare(fd_ctx *ctx, const struct fd_heads_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx;
  const struct shape s = SHAPE(a);
  fd_status st = check_shape(FD_OP_heads_fwd, &s);
  if (st != FD_OK) return st;
  const int64_t rows = a->B * a->N, rows_kv = a->B * (a->N + a->L), KE = (int64_t)a->K * a->E;
  CPU_CHECK(heads_fwd, q, fd_tensor_numel(a->q) == rows * a->A * a->E, "[%lld, %d, %d]", (long long)rows, a->A, a->E);
  CPU_CHECK(heads_fwd, k, fd_tensor_numel(a->k) == rows_kv * KE, "[%lld, %d, %d]", (long long)rows_kv, a->K, a->E);
  CPU_CHECK(heads_fwd, v, fd_tensor_numel(a->v) == rows_kv * KE, "[%lld, %d, %d]", (long long)rows_kv, a->K, a->E);
  CPU_CHECK(heads_fwd, q_rstd, !a->q_rstd || fd_tensor_numel(a->q_rstd) == rows * a->A, "[%lld, %d]", (long long)rows, a->A);
  CPU_CHECK(heads_fwd, k_rstd, !a->k_rstd || fd_tensor_numel(a->k_rstd) == rows_kv * a->K, "[%lld, %d]", (long long)rows_kv, a->K);
  *scratch_bytes = 2 * cpu_align(sizeof(float) * (size_t)a->E);
  return FD_OK;
}

fd_status cpu_heads_fwd(fd_ctx *ctx, const struct fd_heads_fwd_args *a) {
  const struct shape s = SHAPE(a);
  const int64_t A = a->A, K = a->K, E = a->E, N = a->N, L = a->L;
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_heads_fwd, a->count, a->B * N, &used);
  if (st == FD_OK) st = check_content(FD_OP_heads_fwd, &s, used);
  if (st != FD_OK) return st;
  const bool bf16 = a->qkv->dtype == FD_BF16;
  const size_t each = fd_dtype_bytes(a->qkv->dtype);
  float *fq = ctx->scratch, *fk = (float *)((char *)fq + cpu_align(sizeof(float) * (size_t)E));
  load_norm(a->q_norm, E, fq);
  load_norm(a->k_norm, E, fk);
  const int32_t *text = a->text_kv ? a->text->data : NULL;
  #pragma omp parallel num_threads(cpu_threads(ctx, used * (A + 2 * K) * E))
  {
    int64_t lo, hi;
    cpu_share(used, 1, &lo, &hi);
    for (int64_t r = lo; r < hi; r++) {
      const char *x = (const char *)a->qkv->data + (size_t)(r * (A + 2 * K) * E) * each;
      const int64_t to = r / N * (N + L) + r % N;
      const float *cs = angles(&s, r);
      const struct row rq = {E, a->q_norm ? fq : NULL, cs, a->eps}, rk = {E, a->k_norm ? fk : NULL, cs, a->eps};
      fwd_heads(x, (char *)a->q->data + (size_t)(r * A * E) * each, bf16, A, rq, a->q_rstd ? (float *)a->q_rstd->data + r * A : NULL);
      fwd_heads(x + (size_t)(A * E) * each, (char *)a->k->data + (size_t)(to * K * E) * each, bf16, K, rk,
                a->k_rstd ? (float *)a->k_rstd->data + to * K : NULL);
      memcpy((char *)a->v->data + (size_t)(to * K * E) * each, x + (size_t)((A + K) * E) * each, (size_t)(K * E) * each);
    }
    cpu_share(text ? a->B : 0, 1, &lo, &hi);
    for (int64_t b = lo; b < hi; b++)
      for (int64_t j = 0; j < text[2 * b + 1]; j++) {
        const char *x = (const char *)a->text_kv->data + (size_t)((text[2 * b] + j) * 2 * K * E) * each;
        const int64_t to = b * (N + L) + N + j;
        const struct row rk = {E, a->k_norm ? fk : NULL, NULL, a->eps};
        fwd_heads(x, (char *)a->k->data + (size_t)(to * K * E) * each, bf16, K, rk, a->k_rstd ? (float *)a->k_rstd->data + to * K : NULL);
        memcpy((char *)a->v->data + (size_t)(to * K * E) * each, x + (size_t)(K * E) * each, (size_t)(K * E) * each);
      }
  }
  return FD_OK;
}

/* Pieces of image rows, and of text rows: B of them. */
static int64_t image_pieces(int64_t rows) { return cpu_pieces(1, rows); }

fd_status cpu_heads_bwd_prepare(fd_ctx *ctx, const struct fd_heads_bwd_args *a, size_t *scratch_bytes) {
  const struct shape s = SHAPE(a);
  fd_status st = check_shape(FD_OP_heads_bwd, &s);
  if (st != FD_OK) return st;
  const int64_t rows = a->B * a->N, rows_kv = a->B * (a->N + a->L), KE = (int64_t)a->K * a->E;
  CPU_CHECK(heads_bwd, dq, fd_tensor_numel(a->dq) == rows * a->A * a->E, "[%lld, %d, %d]", (long long)rows, a->A, a->E);
  CPU_CHECK(heads_bwd, dk, fd_tensor_numel(a->dk) == rows_kv * KE, "[%lld, %d, %d]", (long long)rows_kv, a->K, a->E);
  CPU_CHECK(heads_bwd, dv, fd_tensor_numel(a->dv) == rows_kv * KE, "[%lld, %d, %d]", (long long)rows_kv, a->K, a->E);
  CPU_CHECK(heads_bwd, q_rstd, !a->q_norm || (a->q_rstd && fd_tensor_numel(a->q_rstd) == rows * a->A), "[%lld, %d] beside q_norm", (long long)rows, a->A);
  CPU_CHECK(heads_bwd, k_rstd, !a->k_norm || (a->k_rstd && fd_tensor_numel(a->k_rstd) == rows_kv * a->K), "[%lld, %d] beside k_norm",
            (long long)rows_kv, a->K);
  CPU_CHECK(heads_bwd, dqkv, cpu_same_shape(a->dqkv, a->qkv), "the shape of qkv");
  CPU_CHECK(heads_bwd, dtext_kv, !a->dtext_kv || (a->text_kv && cpu_same_shape(a->dtext_kv, a->text_kv)), "the shape of text_kv");
  CPU_CHECK(heads_bwd, dq_norm, !a->dq_norm || (a->q_norm && fd_tensor_numel(a->dq_norm) == a->E), "[%d], beside q_norm", a->E);
  CPU_CHECK(heads_bwd, dk_norm, !a->dk_norm || (a->k_norm && fd_tensor_numel(a->dk_norm) == a->E), "[%d], beside k_norm", a->E);
  size_t head = cpu_align(sizeof(float) * (size_t)a->E);
  *scratch_bytes = (2 + (size_t)ctx->n_threads + 2 * (size_t)image_pieces(rows) + (size_t)a->B) * head;
  return FD_OK;
}

fd_status cpu_heads_bwd(fd_ctx *ctx, const struct fd_heads_bwd_args *a) {
  const struct shape s = SHAPE(a);
  const int64_t A = a->A, K = a->K, E = a->E, N = a->N, L = a->L, B = a->B;
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_heads_bwd, a->count, B * N, &used);
  if (st == FD_OK) st = check_content(FD_OP_heads_bwd, &s, used);
  if (st != FD_OK) return st;
  const bool bf16 = a->qkv->dtype == FD_BF16, acc = a->acc >> 13 & 1, acc_text = a->acc >> 14 & 1;
  const size_t each = fd_dtype_bytes(a->qkv->dtype), head = cpu_align(sizeof(float) * (size_t)E);
  const int64_t pieces = image_pieces(B * N);
  char *const scratch = ctx->scratch;
  float *fq = (float *)scratch, *fk = (float *)(scratch + head);
#define SLOT_Q(p) ((float *)(scratch + (2 + (size_t)ctx->n_threads + (size_t)(p)) * head))
#define SLOT_K(p) SLOT_Q(pieces + (p)) /* image pieces, then text pieces */
  load_norm(a->q_norm, E, fq);
  load_norm(a->k_norm, E, fk);
  const int32_t *text = a->text_kv ? a->text->data : NULL;
  if (a->dtext_kv && !acc_text) { /* rows between the samples' get no gradient; the others are written below */
    int64_t T = fd_tensor_rows(a->text_kv), row = 2 * K * E;
    for (int64_t b = 0, end = 0; b <= B; b++) {
      int64_t first = b < B ? text[2 * b] : T;
      if (first < end) end = 0, first = T; /* not in order: clear everything */
      memset((char *)a->dtext_kv->data + (size_t)(end * row) * each, 0, (size_t)((first - end) * row) * each);
      if (first == T) break;
      end = first + text[2 * b + 1];
    }
  }
  #pragma omp parallel num_threads(cpu_threads(ctx, used * (A + 2 * K) * E))
  {
    float *g = (float *)(scratch + (2 + (size_t)omp_get_thread_num()) * head);
    int64_t lo, hi;
    cpu_share(pieces, 1, &lo, &hi);
    for (int64_t p = lo; p < hi; p++) {
      int64_t from = cpu_cut(B * N, pieces, p), to = cpu_cut(B * N, pieces, p + 1);
      float *sq = SLOT_Q(p), *sk = SLOT_K(p);
      memset(sq, 0, head);
      memset(sk, 0, head);
      for (int64_t r = from; r < to && r < used; r++) {
        const size_t at = (size_t)(r * (A + 2 * K) * E) * each;
        const char *x = (const char *)a->qkv->data + at;
        char *dx = (char *)a->dqkv->data + at;
        const int64_t kv = r / N * (N + L) + r % N;
        const float *cs = angles(&s, r);
        const struct row rq = {E, a->q_norm ? fq : NULL, cs, a->eps}, rk = {E, a->k_norm ? fk : NULL, cs, a->eps}, rv = {E, NULL, NULL, 0};
        bwd_heads((const char *)a->dq->data + (size_t)(r * A * E) * each, x, dx, bf16, acc, A, rq,
                  a->q_norm ? (const float *)a->q_rstd->data + r * A : NULL, sq, g);
        bwd_heads((const char *)a->dk->data + (size_t)(kv * K * E) * each, x + (size_t)(A * E) * each, dx + (size_t)(A * E) * each, bf16, acc, K,
                  rk, a->k_norm ? (const float *)a->k_rstd->data + kv * K : NULL, sk, g);
        bwd_heads((const char *)a->dv->data + (size_t)(kv * K * E) * each, x, dx + (size_t)((A + K) * E) * each, bf16, acc, K, rv, NULL, NULL, g);
      }
    }
    cpu_share(text ? B : 0, 1, &lo, &hi);
    for (int64_t b = lo; b < hi; b++) {
      float *sk = SLOT_K(pieces + b);
      memset(sk, 0, head);
      for (int64_t j = 0; (a->dtext_kv || a->dk_norm) && j < text[2 * b + 1]; j++) {
        const size_t at = (size_t)((text[2 * b] + j) * 2 * K * E) * each;
        const char *x = (const char *)a->text_kv->data + at;
        const int64_t kv = b * (N + L) + N + j;
        const struct row rk = {E, a->k_norm ? fk : NULL, NULL, a->eps}, rv = {E, NULL, NULL, 0};
        const float *rstd = a->k_norm ? (const float *)a->k_rstd->data + kv * K : NULL;
        const char *dk = (const char *)a->dk->data + (size_t)(kv * K * E) * each;
        if (a->dtext_kv) {
          char *dx = (char *)a->dtext_kv->data + at;
          bwd_heads(dk, x, dx, bf16, acc_text, K, rk, rstd, sk, g);
          bwd_heads((const char *)a->dv->data + (size_t)(kv * K * E) * each, x, dx + (size_t)(K * E) * each, bf16, acc_text, K, rv, NULL, NULL, g);
        } else { /* the text is frozen: only the norm's weight wants the text keys */
          for (int64_t h = 0; h < K; h++)
            for (int64_t i = 0; i < E; i++) sk[i] += cpu_load(dk, bf16, h * E + i) * cpu_load(x, bf16, h * E + i) * rstd[h];
        }
      }
    }
  }
  for (int which = 0; which < 2; which++) {
    const fd_tensor *out = which ? a->dk_norm : a->dq_norm;
    if (!out) continue;
    const bool add = a->acc >> (15 + which) & 1;
    const int64_t n = pieces + (which && text ? B : 0);
    for (int64_t i = 0; i < E; i++) {
      float sum = 0, *d = (float *)out->data + i;
      for (int64_t p = 0; p < n; p++) sum += which ? SLOT_K(p)[i] : SLOT_Q(p)[i];
      *d = add ? *d + sum : sum;
    }
  }
  return FD_OK;
}
