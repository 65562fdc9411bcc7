// SPDX-License-Identifier: Apache-2.0
// Every op's backward, through the graph and the kernels of the CPU, against finite differences at small odd shapes; then
// in bf16 against f32. Memory that nobody wrote is NaN throughout.
#include "graph/backend.h"
#include "graphtest.h"

static fd_dtype type_of(fd_graph *g, fd_var v) { return fd_graph_get(g, v)->dtype; }

static fd_var build_linear(fd_graph *g, const fd_var *l, const void *user) {
  (void)user;
  return fd_linear(g, l[0], l[1], l[2], 0);
}
static fd_var build_linear_count(fd_graph *g, const fd_var *l, const void *user) {
  (void)user;
  fd_var y = fd_linear(g, l[0], l[1], l[2], l[3]);
  return fd_linear(g, y, l[1], l[2], l[3]); /* everything twice */
}

/* c = op(a) op(b), all four ways */
static fd_var build_matmul(fd_graph *g, const fd_var *l, const void *user) {
  struct fd_matmul_args args = *(const struct fd_matmul_args *)user;
  const fd_tensor *a = fd_graph_get(g, l[0]), *b = fd_graph_get(g, l[1]);
  fd_var c = fd_graph_tensor(g, a->dtype, 2, (int64_t[]){a->shape[args.trans_a ? 1 : 0], b->shape[args.trans_b ? 0 : 1]});
  fd_graph_emit(g, FD_OP_matmul, &args, (fd_var[]){l[0], l[1], 0, 0, c});
  return c;
}

static fd_var build_rmsnorm(fd_graph *g, const fd_var *l, const void *user) {
  return fd_rmsnorm(g, l[0], l[1], 1e-6f, NULL, user ? l[2] : 0);
}
static fd_var build_modulated(fd_graph *g, const fd_var *l, const void *user) {
  struct fd_mod m = *(const struct fd_mod *)user;
  m.mod = l[2];
  fd_var y = fd_rmsnorm(g, l[0], l[1], 1e-6f, &m, 0);
  return m.gate_col >= 0 ? fd_residual(g, l[0], y, &m, 0) : y;
}
static fd_var build_add(fd_graph *g, const fd_var *l, const void *user) {
  (void)user;
  return fd_add(g, fd_add(g, l[0], l[1], 0), l[0], 0);
}
static fd_var build_act(fd_graph *g, const fd_var *l, const void *user) { return fd_activate(g, l[0], *(const enum fd_act *)user, 0); }
static fd_var build_geglu(fd_graph *g, const fd_var *l, const void *user) {
  return fd_add(g, fd_geglu(g, l[0], *(const enum fd_act *)user, l[1]), fd_geglu(g, l[0], FD_ACT_SILU, l[1]), l[1]);
}
static fd_var build_embed(fd_graph *g, const fd_var *l, const void *user) {
  (void)user;
  return fd_embed(g, l[0], l[1], 1.7f, -1, FD_F32, l[2]);
}

struct attend {
  struct fd_heads h;
  struct fd_attention a;
};
/* qkv, text_kv, q_norm, k_norm, rope, pos, text, ranges, count */
static fd_var build_attend(fd_graph *g, const fd_var *l, const void *user) {
  struct attend s = *(const struct attend *)user;
  s.h.qkv = l[0];
  s.h.text_kv = s.h.text_kv ? l[1] : 0;
  s.h.q_norm = s.h.q_norm ? l[2] : 0;
  s.h.k_norm = s.h.k_norm ? l[3] : 0;
  s.h.rope = s.h.rope ? l[4] : 0;
  s.h.pos = s.h.pos ? l[5] : 0;
  s.h.text = l[6];
  s.h.count = s.h.count ? l[8] : 0;
  s.a.A = s.h.A, s.a.K = s.h.K, s.a.E = s.h.E;
  s.a.ranges = l[7];
  fd_heads(g, &s.h, &s.a.q, &s.a.k, &s.a.v);
  return fd_attention(g, &s.a);
}
static fd_var build_attention(fd_graph *g, const fd_var *l, const void *user) { /* q, k, v given; k and v the same value */
  struct fd_attention a = *(const struct fd_attention *)user;
  a.q = l[0], a.k = l[1], a.v = l[1], a.ranges = l[2];
  return fd_attention(g, &a);
}

static fd_var build_conv(fd_graph *g, const fd_var *l, const void *user) { return fd_conv2d(g, l[0], l[1], l[2], l[3], user); }
static fd_var build_resnet(fd_graph *g, const fd_var *l, const void *user) { /* x is convolved, and the residual */
  (void)user;
  struct fd_conv c = {1, 1, 1, 1, 1};
  fd_var h = fd_conv2d(g, fd_groupnorm(g, l[0], l[1], l[2], 2, 1e-6f, FD_ACT_SILU), l[3], l[4], 0, &c);
  return fd_conv2d(g, h, l[3], l[4], l[0], &c);
}
static fd_var build_groupnorm(fd_graph *g, const fd_var *l, const void *user) {
  return fd_groupnorm(g, l[0], l[1], l[2], 3, 1e-6f, *(const enum fd_act *)user);
}
static fd_var build_images(fd_graph *g, const fd_var *l, const void *user) {
  (void)user;
  fd_var up = fd_upsample2x(g, l[0]); /* [2, 4, 6, 3] */
  fd_var a = fd_patchify(g, up, 2, 0), b = fd_patchify(g, up, 2, 1);
  return fd_unpatchify(g, fd_add(g, a, b, 0), 2, 1, 2, 4, 6);
}
static fd_var build_latent(fd_graph *g, const fd_var *l, const void *user) {
  fd_var mean, logvar, latent;
  if (!user) {
    fd_posterior(g, l[0], l[1], NULL, NULL, &latent);
    return fd_channel_affine(g, latent, l[2], l[3], 0, FD_F32);
  }
  fd_posterior(g, l[0], 0, &mean, &logvar, &latent);
  fd_var y = fd_add(g, mean, fd_add(g, logvar, latent, 0), 0); /* the affine adds to a gradient that is there */
  return fd_add(g, y, fd_channel_affine(g, y, l[2], l[3], 1, FD_F32), 0);
}
static fd_var build_loss(fd_graph *g, const fd_var *l, const void *user) {
  return fd_flow_loss(g, l[0], l[1], l[2], l[3], l[4], l[5], user != NULL);
}
static fd_var build_mixed(fd_graph *g, const fd_var *l, const void *user) { /* f32 stream, products in the type of the weight */
  (void)user;
  fd_var h = fd_cast(g, l[0], type_of(g, l[1]), 1);
  fd_var y = fd_cast(g, fd_linear(g, h, l[1], 0, 0), FD_F32, 1), z = fd_cast(g, fd_activate(g, h, FD_ACT_GELU_TANH, 0), FD_F32, 1);
  return fd_add(g, fd_residual(g, l[0], y, NULL, 0), z, 0);
}

static fd_var build_mixed_norm(fd_graph *g, const fd_var *l, const void *user) { /* f32 stream, norm and product in the type of the weight */
  (void)user;
  return fd_residual(g, l[0], fd_linear(g, fd_rmsnorm_as(g, l[0], l[2], 1e-6f, NULL, 0, type_of(g, l[1])), l[1], 0, 0), NULL, 0);
}

#define ROPE_ROWS 8
static const float *rope(void) { /* any table: pairs of a cosine and a sine */
  static float t[ROPE_ROWS][6];
  for (int r = 0; r < ROPE_ROWS; r++)
    for (int k = 0; k < 3; k++) t[r][k] = cosf(0.3f * (float)(r * (k + 1))), t[r][3 + k] = sinf(0.3f * (float)(r * (k + 1)));
  return t[0];
}

/* Gradients that are written, whatever their memory holds, are those that are added to zeros: of a weight used once, often and never, and of a table. */
static void test_new_grads(fd_ctx *ctx) {
  enum { WEIGHTS = 4, TABLE = 5 * 3 };
  const int32_t ids[4] = {4, 1, 4, 0};
  static _Alignas(64) float w[WEIGHTS][16], table[16], dw[2][WEIGHTS][16], dtable[2][16], dy[12];
  for (int i = 0; i < WEIGHTS; i++)
    for (int k = 0; k < 9; k++) w[i][k] = (float)((9 * i + k) * 5 % 7 - 3) / 4;
  for (int i = 0; i < TABLE; i++) table[i] = (float)(i * 3 % 5 - 2) / 2;
  for (int i = 0; i < 12; i++) dy[i] = (float)(i % 4 - 1);
  for (int fresh = 0; fresh < 2; fresh++) {
    fd_graph *g = NULL;
    size_t bytes;
    void *arena = NULL;
    fd_var vw[WEIGHTS], vd[WEIGHTS];
    OK(fd_graph_create(ctx, "new gradients", &g));
    const fd_var vi = fd_graph_input(g, "ids", FD_I32, 1, (int64_t[]){4}), vdy = fd_graph_input(g, "dy", F32(4, 3));
    const fd_var vt = fd_graph_external(g, "table", F32(5, 3), 0), vdt = fd_graph_external(g, "dtable", F32(5, 3), 0);
    fd_graph_want_grad(g, vt, vdt);
    for (int i = 0; i < WEIGHTS; i++) {
      vw[i] = fd_graph_external(g, "w", F32(3, 3), 0), vd[i] = fd_graph_external(g, "dw", F32(3, 3), 0);
      fd_graph_want_grad(g, vw[i], vd[i]);
    }
    if (fresh) fd_graph_new_grads(g);
    fd_var y = fd_embed(g, vi, vt, 1, -1, FD_F32, 0);
    for (int i = 0; i < WEIGHTS - 1; i++) y = fd_linear(g, fd_linear(g, y, vw[i], 0, 0), vw[0], 0, 0); /* the last is used by nobody */
    fd_graph_backward(g, 1, &y, &vdy);
    OK(fd_graph_plan(g, &bytes));
    OK(ctx->backend->alloc(ctx, bytes, &arena));
    OK(fd_graph_attach(g, arena, bytes));
    fd_graph_bind(g, vt, table), fd_graph_bind(g, vdt, dtable[fresh]);
    for (int i = 0; i < WEIGHTS; i++) fd_graph_bind(g, vw[i], w[i]), fd_graph_bind(g, vd[i], dw[fresh][i]);
    memset(dw[fresh], fresh ? 0xff : 0, sizeof dw[fresh]); /* NaN */
    memset(dtable[fresh], fresh ? 0xff : 0, sizeof dtable[fresh]);
    OK(fd_graph_set(g, vi, ids, sizeof ids));
    OK(fd_graph_set(g, vdy, dy, sizeof dy));
    OK(fd_graph_run(g));
    ctx->backend->free(ctx, arena);
    fd_graph_destroy(&g);
  }
  for (int i = 0; i < WEIGHTS; i++)
    for (int k = 0; k < 9; k++) CHECK(dw[0][i][k] == dw[1][i][k]);
  for (int i = 0; i < TABLE; i++) CHECK(dtable[0][i] == dtable[1][i]);
  CHECK(dw[1][0][0] != 0 && dw[1][2][4] != 0 && dw[1][3][4] == 0 && dtable[1][12] != 0 && dtable[1][6] == 0); /* id 2 is named by nobody */
}

int main(void) {
  static const int32_t four = 4, ids[] = {5, 2, 5, 0, 1 << 30}, pos[] = {2, 7, 1, 0, 3, 3}, text[] = {0, 2, 2, 3},
                       ranges[] = {0, 3, 0, 5, 3, 3, 7, 6}, alone[] = {0, 3, 0, 3, 3, 3, 3, 3}, packed[] = {0, 1, 0, 1, 1, 3, 1, 3},
                       cross[] = {0, 2, 0, 3, 2, 1, 0, 0, 3, 2, 3, 2};
  static const enum fd_act silu = FD_ACT_SILU, tanh_ = FD_ACT_GELU_TANH, erf_ = FD_ACT_GELU_ERF, none = FD_ACT_NONE;
  const struct fd_mod full = {.rows_per_mod = 3, .shift_col = 0, .scale_col = 5, .gate_col = 11},
                      last = {.rows_per_mod = 3, .shift_col = 5, .scale_col = 0, .gate_col = -1},
                      shift = {.rows_per_mod = 3, .shift_col = 3, .scale_col = -1, .gate_col = -1};
  const struct attend self = {{.text_kv = 1, .q_norm = 1, .k_norm = 1, .B = 2, .N = 3, .L = 4, .A = 4, .K = 2, .E = 6, .eps = 1e-6f},
                              {.scale = 0.4f, .max_q = 3, .max_k = 7}},
                      rotated = {{.text_kv = 1, .q_norm = 1, .k_norm = 1, .rope = 1, .pos = 1, .B = 2, .N = 3, .L = 4, .A = 4, .K = 2, .E = 6, .eps = 1e-6f},
                                 {.scale = 0.4f, .max_q = 3, .max_k = 7}},
                      plain = {{.rope = 1, .B = 2, .N = 3, .A = 4, .K = 4, .E = 6}, {.scale = 0.4f, .max_q = 3, .max_k = 3}},
                      causal = {{.rope = 1, .pos = 1, .count = 1, .B = 1, .N = 6, .A = 4, .K = 1, .E = 6}, {.scale = 0.4f, .causal = 1, .max_q = 6, .max_k = 6}},
                      capped = {{.rope = 1, .count = 1, .B = 1, .N = 6, .A = 4, .K = 1, .E = 6},
                                {.scale = 0.4f, .causal = 1, .window = 2, .softcap = 1.5f, .max_q = 6, .max_k = 6}};
  const struct fd_attention given = {.A = 2, .K = 1, .E = 5, .scale = 0.6f, .max_q = 2, .max_k = 3};
  const struct fd_conv same = {1, 1, 1, 1, 1}, down = {2, 0, 0, 1, 1}, one = {1, 0, 0, 0, 0};
  const struct fd_matmul_args nn = {.trans_a = 0}, nt = {.trans_b = 1}, tn = {.trans_a = 1}, tt = {.trans_a = 1, .trans_b = 1};
#define FREE(...) {__VA_ARGS__, FD_F32, 1, NULL, 1}
#define MADE(...) {__VA_ARGS__, FD_F32, 1, NULL, 2}
#define FIXED(...) {__VA_ARGS__, FD_F32, 1, NULL, 0}
#define INTS(data, ...) {__VA_ARGS__, FD_I32, 0, data, 0}
#define S(...) {__VA_ARGS__}
#define HEADS(A, K, rows, names) FREE(2, S(rows, ((A) + 2 * (K)) * 6)), FREE(2, S(7, 24)), FREE(1, S(6)), MADE(1, S(6)), {2, {ROPE_ROWS, 6}, FD_F32, 0, rope(), 0}, INTS(pos, 1, S(6)), INTS(text, 2, S(2, 2)), INTS(names, 2, S(2, 4)), INTS(&four, 1, S(1))
  const struct gradient_test tests[] = {
      {"linear", build_linear, NULL, 3, {FREE(3, S(2, 3, 5)), FREE(2, S(7, 5)), FREE(1, S(7))}, 0, 3},
      {"linear of one", build_linear, NULL, 3, {FREE(2, S(1, 1)), FREE(2, S(1, 1)), MADE(1, S(1))}, 0, 3},
      {"linear, wide", build_linear, NULL, 3, {MADE(2, S(33, 40)), MADE(2, S(24, 40)), MADE(1, S(24))}, 0, 3},
      {"linear, count", build_linear_count, NULL, 4, {FREE(2, S(6, 5)), FREE(2, S(5, 5)), FREE(1, S(5)), INTS(&four, 1, S(1))}, 4, 3},
      {"matmul nn", build_matmul, &nn, 2, {FREE(2, S(3, 5)), FREE(2, S(5, 4))}, 0, 3},
      {"matmul nt", build_matmul, &nt, 2, {FREE(2, S(3, 5)), FREE(2, S(4, 5))}, 0, 3},
      {"matmul tn", build_matmul, &tn, 2, {FREE(2, S(5, 3)), FREE(2, S(5, 4))}, 0, 3},
      {"matmul tt", build_matmul, &tt, 2, {FREE(2, S(5, 3)), FREE(2, S(4, 5))}, 0, 3},
      {"rmsnorm", build_rmsnorm, NULL, 2, {FREE(2, S(3, 37)), FREE(1, S(37))}, 0, 1},
      {"rmsnorm of one", build_rmsnorm, NULL, 2, {FREE(2, S(1, 3)), MADE(1, S(3))}, 0, 1},
      {"rmsnorm, count", build_rmsnorm, &four, 3, {MADE(2, S(6, 5)), FREE(1, S(5)), INTS(&four, 1, S(1))}, 4, 1},
      {"modulated, gated", build_modulated, &full, 3, {FREE(3, S(2, 3, 5)), FREE(1, S(5)), FREE(2, S(2, 17))}, 0, 5},
      {"modulated, scale first", build_modulated, &last, 3, {MADE(3, S(2, 3, 5)), MADE(1, S(5)), MADE(2, S(2, 10))}, 0, 5},
      {"shifted", build_modulated, &shift, 3, {FREE(3, S(2, 3, 5)), FREE(1, S(5)), MADE(2, S(2, 10))}, 0, 5},
      {"add", build_add, NULL, 2, {FREE(3, S(2, 3, 5)), FREE(2, S(3, 5))}, 0, 1},
      {"add a row", build_add, NULL, 2, {MADE(3, S(2, 3, 5)), MADE(1, S(5))}, 0, 1},
      {"silu", build_act, &silu, 1, {FREE(2, S(3, 37))}, 0, 1},
      {"gelu tanh", build_act, &tanh_, 1, {MADE(2, S(3, 37))}, 0, 1},
      {"gelu erf", build_act, &erf_, 1, {FREE(2, S(1, 1))}, 0, 1},
      {"geglu tanh", build_geglu, &tanh_, 2, {FREE(2, S(6, 14)), INTS(&four, 1, S(1))}, 4, 1},
      {"geglu erf", build_geglu, &erf_, 2, {MADE(2, S(6, 14)), INTS(&four, 1, S(1))}, 4, 1},
      {"embed", build_embed, NULL, 3, {INTS(ids, 1, S(5)), FREE(2, S(6, 3)), INTS(&four, 1, S(1))}, 4, 2},
      {"embed, made", build_embed, NULL, 3, {INTS(ids, 1, S(5)), MADE(2, S(6, 3)), INTS(&four, 1, S(1))}, 4, 2},
      {"self attention with text", build_attend, &self, 9, {HEADS(4, 2, 6, ranges)}, 0, 3},
      {"rotated", build_attend, &rotated, 9, {HEADS(4, 2, 6, ranges)}, 0, 3},
      {"image alone", build_attend, &plain, 9,
       {FREE(2, S(6, 72)), FIXED(2, S(7, 24)), FIXED(1, S(6)), FIXED(1, S(6)), {2, {ROPE_ROWS, 6}, FD_F32, 0, rope(), 0}, INTS(pos, 1, S(6)),
        INTS(text, 2, S(2, 2)), INTS(alone, 2, S(2, 4)), INTS(&four, 1, S(1))}, 0, 1},
      {"causal, packed", build_attend, &causal, 9,
       {MADE(2, S(6, 36)), FIXED(2, S(7, 24)), FIXED(1, S(6)), FIXED(1, S(6)), {2, {ROPE_ROWS, 6}, FD_F32, 0, rope(), 0}, INTS(pos, 1, S(6)),
        INTS(text, 2, S(2, 2)), INTS(packed, 2, S(2, 4)), INTS(&four, 1, S(1))}, 4, 1},
      {"causal, window, softcap", build_attend, &capped, 9,
       {MADE(2, S(6, 36)), FIXED(2, S(7, 24)), FIXED(1, S(6)), FIXED(1, S(6)), {2, {ROPE_ROWS, 6}, FD_F32, 0, rope(), 0}, INTS(pos, 1, S(6)),
        INTS(text, 2, S(2, 2)), INTS(packed, 2, S(2, 4)), INTS(&four, 1, S(1))}, 4, 1},
      {"cross attention", build_attention, &given, 3, {FREE(3, S(5, 2, 5)), FREE(3, S(5, 1, 5)), INTS(cross, 2, S(3, 4))}, 0, 3},
      {"conv 3x3", build_conv, &same, 4, {FREE(4, S(2, 3, 4, 3)), FREE(4, S(2, 3, 3, 3)), FREE(1, S(2)), FREE(4, S(2, 3, 4, 2))}, 0, 11},
      {"conv down", build_conv, &down, 4, {MADE(4, S(1, 4, 6, 3)), MADE(4, S(5, 3, 3, 3)), MADE(1, S(5)), MADE(4, S(1, 2, 3, 5))}, 0, 11},
      {"conv 1x1, bias only", build_conv, &one, 4, {FIXED(4, S(2, 3, 4, 3)), FIXED(4, S(2, 3, 1, 1)), FREE(1, S(2)), FIXED(4, S(2, 3, 4, 2))}, 0, 11},
      {"resnet", build_resnet, NULL, 5, {FREE(4, S(2, 3, 4, 4)), FREE(1, S(4)), FREE(1, S(4)), FREE(4, S(4, 4, 3, 3)), FREE(1, S(4))}, 0, 9},
      {"groupnorm", build_groupnorm, &none, 3, {FREE(4, S(2, 3, 3, 6)), FREE(1, S(6)), FREE(1, S(6))}, 0, 1},
      {"groupnorm silu", build_groupnorm, &silu, 3, {MADE(3, S(2, 5, 9)), MADE(1, S(9)), MADE(1, S(9))}, 0, 1},
      {"patches", build_images, NULL, 1, {FREE(4, S(2, 2, 3, 3))}, 0, 1},
      {"latent", build_latent, NULL, 4, {FREE(3, S(2, 3, 8)), FIXED(3, S(2, 3, 4)), FIXED(1, S(4)), FIXED(1, S(4))}, 0, 1},
      {"moments", build_latent, &four, 4, {MADE(3, S(2, 3, 8)), FIXED(3, S(2, 3, 4)), FIXED(1, S(4)), FIXED(1, S(4))}, 0, 1},
      {"loss", build_loss, NULL, 6, {FREE(3, S(3, 2, 5)), FIXED(3, S(3, 2, 5)), FIXED(3, S(3, 2, 5)), FIXED(3, S(3, 2, 5)), FIXED(1, S(3)), FIXED(1, S(3))}, 0, 1},
      {"loss, preconditioned", build_loss, &four, 6, {MADE(3, S(3, 2, 5)), FIXED(3, S(3, 2, 5)), FIXED(3, S(3, 2, 5)), FIXED(3, S(3, 2, 5)), FIXED(1, S(3)), FIXED(1, S(3))}, 0, 1},
      {"mixed types", build_mixed, NULL, 2, {FREE(2, S(3, 5)), FREE(2, S(5, 5))}, 0, 2},
      {"mixed types, norm", build_mixed_norm, NULL, 3, {FREE(2, S(3, 5)), FREE(2, S(5, 5)), FREE(1, S(5))}, 0, 2},
      {"no rows", build_linear, NULL, 3, {FREE(2, S(0, 5)), FREE(2, S(7, 5)), FREE(1, S(7))}, 0, 3},
  };
  fd_ctx *ctx = NULL;
  const struct fd_backend *cpu = NULL;
  OK(fd_backend_find("cpu", &cpu));
  OK(fd_ctx_create(cpu, 2, NULL, &ctx));
  int bad = 0;
  for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
    failed = 0;
    check_gradients(ctx, &tests[i]);
    if (failed) printf("FAILED %s\n", tests[i].name), bad++;
  }
  failed = 0;
  test_new_grads(ctx);
  bad += failed;
  fd_ctx_destroy(&ctx);
  printf("%zu gradients, %d wrong\n", sizeof tests / sizeof *tests, bad);
  return bad != 0;
}
