// SPDX-License-Identifier: Apache-2.0
// The graph itself, on a backend of naive loops: gradients that meet, plans that do not overlap, recompute, replay, misuse.
#include <string.h>

#include "graph/backend.h"
#include "graphtest.h"


/* ---- gradients that meet ----------------------------------------------------------------------------------------- */

static fd_var build_linear(fd_graph *g, const fd_var *l, const void *user) {
  (void)user;
  return fd_linear(g, l[0], l[1], l[2], 0);
}
static fd_var build_linear_count(fd_graph *g, const fd_var *l, const void *user) {
  (void)user;
  fd_var y = fd_activate(g, fd_linear(g, l[0], l[1], l[2], l[3]), FD_ACT_SILU, l[3]);
  return fd_residual(g, fd_linear(g, y, l[4], 0, l[3]), y, NULL, l[3]);
}
static fd_var build_add_self(fd_graph *g, const fd_var *l, const void *user) { /* x + x, twice over, and a broadcast */
  (void)user;
  fd_var y = fd_add(g, l[0], l[0], 0);
  return fd_add(g, fd_residual(g, y, y, NULL, 0), l[1], 0);
}
static fd_var build_shared_weight(fd_graph *g, const fd_var *l, const void *user) { /* a weight and an input used twice */
  (void)user;
  fd_var h = fd_activate(g, fd_linear(g, l[0], l[1], 0, 0), FD_ACT_SILU, 0);
  fd_var y = fd_linear(g, h, l[1], 0, 0), z = fd_linear(g, h, l[2], 0, 0);
  return fd_add(g, fd_add(g, y, z, 0), l[0], 0);
}
static fd_var build_square(fd_graph *g, const fd_var *l, const void *user) { /* x x^T through one op: both inputs the same value */
  (void)user;
  fd_var h = fd_activate(g, l[0], FD_ACT_SILU, 0);
  return fd_linear(g, h, h, 0, 0);
}
static fd_var build_views(fd_graph *g, const fd_var *l, const void *user) { /* consumers of several views of one value */
  (void)user;
  fd_var h = fd_activate(g, l[0], FD_ACT_SILU, 0); /* [4, 6] */
  fd_var a = fd_graph_view(g, h, 2, (int64_t[]){8, 3}), b = fd_graph_view(g, a, 3, (int64_t[]){2, 2, 6});
  fd_var y = fd_linear(g, a, l[1], 0, 0), z = fd_linear(g, b, l[2], 0, 0); /* [8, 6], [2, 2, 12] */
  return fd_add(g, fd_graph_view(g, y, 2, (int64_t[]){4, 12}), fd_graph_view(g, z, 2, (int64_t[]){4, 12}), 0);
}
static fd_var build_gates(fd_graph *g, const fd_var *l, const void *user) { /* partial columns of one mod, x gated by itself */
  (void)user;
  struct fd_mod m = {.mod = fd_activate(g, l[1], FD_ACT_SILU, 0), .rows_per_mod = 3, .shift_col = 0, .scale_col = 5, .gate_col = 10};
  fd_var x = l[0];
  for (int i = 0; i < 2; i++) {
    x = fd_residual(g, x, fd_linear(g, fd_rmsnorm(g, x, l[2], 1e-6f, &m, 0), l[3], 0, 0), &m, 0);
    x = fd_residual(g, x, x, &m, 0);
  }
  m.scale_col = -1;
  return fd_rmsnorm(g, x, l[2], 1e-6f, &m, 0);
}
static fd_var build_norm_of_constant(fd_graph *g, const fd_var *l, const void *user) { /* dx is not wanted, dw is */
  (void)user;
  struct fd_mod m = {.mod = l[2], .rows_per_mod = 2, .shift_col = -1, .scale_col = -1, .gate_col = 0};
  return fd_residual(g, fd_rmsnorm(g, l[0], l[1], 1e-6f, NULL, 0), l[0], &m, 0);
}
static fd_var build_linear_of_frozen(fd_graph *g, const fd_var *l, const void *user) { /* only the bias learns */
  (void)user;
  return fd_linear(g, fd_linear(g, l[0], l[1], l[2], 0), l[1], l[2], 0);
}

static void test_gradients(fd_ctx *ctx) {
  static const int32_t three = 3;
  const struct gradient_test tests[] = {
      {"linear", build_linear, NULL, 3, {{2, {5, 3}, FD_F32, 1, NULL, 1}, {2, {4, 3}, FD_F32, 1, NULL, 1}, {1, {4}, FD_F32, 1, NULL, 1}}, 0, 0},
      {"linear, made gradients", build_linear, NULL, 3, {{2, {5, 3}, FD_F32, 1, NULL, 2}, {2, {4, 3}, FD_F32, 1, NULL, 2}, {1, {4}, FD_F32, 1, NULL, 2}}, 0, 0},
      {"one row", build_linear, NULL, 3, {{2, {1, 1}, FD_F32, 1, NULL, 1}, {2, {1, 1}, FD_F32, 1, NULL, 1}, {1, {1}, FD_F32, 1, NULL, 2}}, 0, 0},
      {"count", build_linear_count, NULL, 5,
       {{2, {5, 3}, FD_F32, 1, NULL, 0}, {2, {4, 3}, FD_F32, 1, NULL, 1}, {1, {4}, FD_F32, 1, NULL, 1}, {1, {1}, FD_I32, 0, &three, 0},
        {2, {4, 4}, FD_F32, 1, NULL, 2}}, 3, 0},
      {"x + x", build_add_self, NULL, 2, {{3, {2, 3, 4}, FD_F32, 1, NULL, 2}, {2, {3, 4}, FD_F32, 1, NULL, 2}}, 0, 0},
      {"x + x, external", build_add_self, NULL, 2, {{3, {2, 3, 4}, FD_F32, 1, NULL, 1}, {2, {3, 4}, FD_F32, 1, NULL, 1}}, 0, 0},
      {"shared weight", build_shared_weight, NULL, 3, {{2, {5, 4}, FD_F32, 1, NULL, 1}, {2, {4, 4}, FD_F32, 1, NULL, 1}, {2, {4, 4}, FD_F32, 1, NULL, 2}}, 0, 0},
      {"shared weight, made", build_shared_weight, NULL, 3, {{2, {5, 4}, FD_F32, 1, NULL, 2}, {2, {4, 4}, FD_F32, 1, NULL, 2}, {2, {4, 4}, FD_F32, 1, NULL, 0}}, 0, 0},
      {"square", build_square, NULL, 1, {{2, {4, 3}, FD_F32, 1, NULL, 1}}, 0, 0},
      {"views", build_views, NULL, 3, {{2, {4, 6}, FD_F32, 1, NULL, 1}, {2, {6, 3}, FD_F32, 1, NULL, 1}, {2, {12, 6}, FD_F32, 1, NULL, 2}}, 0, 0},
      {"gates", build_gates, NULL, 4,
       {{2, {6, 5}, FD_F32, 1, NULL, 1}, {2, {2, 15}, FD_F32, 0.5f, NULL, 1}, {1, {5}, FD_F32, 0.5f, NULL, 1}, {2, {5, 5}, FD_F32, 0.5f, NULL, 1}}, 0, 0},
      {"norm of a constant", build_norm_of_constant, NULL, 3, {{2, {4, 3}, FD_F32, 1, NULL, 0}, {1, {3}, FD_F32, 1, NULL, 1}, {2, {2, 3}, FD_F32, 1, NULL, 2}}, 0, 0},
      {"bias only", build_linear_of_frozen, NULL, 3, {{2, {4, 3}, FD_F32, 1, NULL, 0}, {2, {3, 3}, FD_F32, 1, NULL, 0}, {1, {3}, FD_F32, 1, NULL, 1}}, 0, 0},
  };
  for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) check_gradients(ctx, &tests[i]);
}

/* A random graph: values and weights used any number of times, views, gates, segments that end anywhere. */
struct dice {
  uint32_t seed, n;
};
static int roll(struct dice *d, int sides) { return (int)(fd_rng_uniform(d->seed, FD_RNG_SYNTHETIC, 1, d->n++) * (float)sides); }

static fd_var build_random(fd_graph *g, const fd_var *l, const void *user) {
  struct dice d = {*(const uint32_t *)user, 0};
  enum { R = 4, C = 6 };
  fd_var pool[24] = {l[0], l[1]};
  int n = 2, open = 0;
  while (n < 12) {
    if (!open && roll(&d, 3) == 0) fd_graph_segment_begin(g), open = 1;
    fd_var x = pool[roll(&d, n)], y = pool[n - 1 - roll(&d, n < 3 ? n : 3)], z = 0;
    struct fd_mod m = {.mod = fd_graph_view(g, pool[roll(&d, n)], 2, (int64_t[]){2, 2 * C}), .rows_per_mod = 2, .shift_col = 0, .scale_col = C, .gate_col = roll(&d, C)};
    switch (roll(&d, 8)) {
      case 0: z = fd_add(g, x, y, 0); break;
      case 1: z = fd_residual(g, y, x, NULL, 0); break;
      case 2: z = fd_residual(g, y, fd_rmsnorm(g, x, l[4], 1e-2f, NULL, 0), &m, 0); break;
      case 3: z = fd_rmsnorm(g, y, l[4], 1e-2f, &m, 0); break;
      case 4: z = fd_activate(g, y, FD_ACT_SILU, 0); break;
      case 5: z = fd_linear(g, y, l[2], l[4], 0); break;
      case 6: z = fd_linear(g, fd_graph_view(g, y, 3, (int64_t[]){2, 2, C}), l[3], 0, 0); break;
      default: /* the same memory seen as [6, 4] */
        z = fd_add(g, fd_graph_view(g, x, 2, (int64_t[]){C, R}), fd_graph_view(g, y, 2, (int64_t[]){C, R}), 0);
    }
    pool[n++] = fd_rmsnorm(g, fd_graph_view(g, z, 2, (int64_t[]){R, C}), l[4], 1e-2f, NULL, 0); /* keeps values near 1 */
    if (open && roll(&d, 3) == 0) fd_graph_segment_end(g), open = 0;
  }
  fd_var sum = pool[n - 1];
  for (int i = 0; i < 3; i++) sum = fd_add(g, sum, pool[roll(&d, n)], 0);
  if (open) fd_graph_segment_end(g);
  return sum;
}

static void test_random(fd_ctx *ctx) {
  for (uint32_t seed = 1; seed <= 60; seed++) {
    char name[32];
    snprintf(name, sizeof name, "random graph %u", seed);
    const int made = seed % 3 == 0 ? 2 : 1;
    const struct gradient_test t = {name, build_random, &seed, 5,
                                    {{2, {4, 6}, FD_F32, 1, NULL, made}, {2, {4, 6}, FD_F32, 1, NULL, seed % 2 ? 1 : 0}, {2, {6, 6}, FD_F32, 0.5f, NULL, 1},
                                     {2, {6, 6}, FD_F32, 0.5f, NULL, made}, {1, {6}, FD_F32, 0.3f, NULL, 1}}, 0, 0};
    check_gradients(ctx, &t);
  }
}

/* Nothing is emitted that nobody wants: no dx of the first layer, no weights of frozen ones. */
static void test_skips(fd_ctx *ctx) {
  fd_graph *g = NULL;
  size_t bytes;
  OK(fd_graph_create(ctx, "skips", &g));
  fd_var x = fd_graph_input(g, "x", F32(4, 3)), w0 = fd_graph_external(g, "w0", F32(3, 3), 0), w1 = fd_graph_external(g, "w1", F32(3, 3), FD_T_CONST);
  fd_graph_want_grad(g, w0, 0);
  fd_var y = fd_linear(g, fd_linear(g, x, w0, 0, 0), w1, 0, 0), dy = fd_graph_input(g, "dy", F32(4, 3));
  fd_graph_backward(g, 1, &y, &dy);
  CHECK(fd_graph_grad(g, w0) && !fd_graph_grad(g, w1) && !fd_graph_grad(g, x));
  OK(fd_graph_plan(g, &bytes));
  CHECK(fd_graph_n_nodes(g) == 2); /* dx of w1, dw of w0: the forward products are read by nobody and dropped */
  CHECK(fd_graph_flop(g, NULL) == 2 * 2.0 * 4 * 3 * 3);
  fd_graph_destroy(&g);
}

/* The backend's copy of a constant weight is counted once, however many ops read it. */
static void test_copies(fd_ctx *ctx) {
  fd_graph *g = NULL;
  size_t bytes;
  struct fd_graph_memory m;
  OK(fd_graph_create(ctx, "copies", &g));
  fd_var x = fd_graph_input(g, "x", F32(4, 3)), b = fd_graph_external(g, "b", F32(3), FD_T_CONST);
  for (int i = 0; i < 2; i++) {
    fd_var w = fd_graph_external(g, "w", F32(3, 3), FD_T_CONST);
    x = fd_linear(g, fd_linear(g, x, w, b, 0), w, b, 0);
  }
  x = fd_linear(g, x, fd_graph_external(g, "trained", F32(3, 3), 0), b, 0);
  fd_graph_keep(g, x);
  OK(fd_graph_plan(g, &bytes));
  fd_graph_memory(g, &m);
  CHECK(m.copies == 2 * 100);
  fd_graph_destroy(&g);
}

/* A padding row gets no gradient: the backward of an embedding is told which it is. */
static void test_embed(fd_ctx *ctx) {
  fd_graph *g = NULL;
  const void *args = NULL;
  OK(fd_graph_create(ctx, "embed", &g));
  fd_var ids = fd_graph_input(g, "ids", FD_I32, 1, (int64_t[]){4}), table = fd_graph_external(g, "table", F32(6, 3), 0);
  fd_graph_want_grad(g, table, 0);
  fd_var y = fd_embed(g, ids, table, 1.5f, 2, FD_F32, 0), dy = fd_graph_input(g, "dy", F32(4, 3));
  fd_graph_backward(g, 1, &y, &dy);
  OK(fd_graph_status(g));
  CHECK(fd_graph_n_nodes(g) == 3 && fd_graph_node(g, 1, NULL, NULL) == FD_OP_fill); /* rows that no id names are zero */
  CHECK(fd_graph_node(g, 2, &args, NULL) == FD_OP_embed_bwd);
  const struct fd_embed_bwd_args *e = args;
  CHECK(e->padding_idx == 2 && e->scale == 1.5f && e->acc == SLOT_BIT(embed_bwd, dtable));
  fd_graph_destroy(&g);
}

/* ---- a net of several layers, as the models are -------------------------------------------------------------------- */

enum { D = 6, S = 3 * D, B = 2, N = 3, LAYERS = 5 };

struct net {
  fd_graph *g;
  fd_var x, cond, y, dy, grad[LAYERS][3];
  void *arena;
  size_t bytes;
  float *weights[LAYERS][3];
};

static fd_var net_layer(fd_graph *g, fd_var x, fd_var silu, const fd_var w[3]) {
  struct fd_mod m = {.mod = fd_linear(g, silu, w[0], 0, 0), .rows_per_mod = N, .shift_col = 0, .scale_col = D, .gate_col = 2 * D};
  fd_var h = fd_activate(g, fd_linear(g, fd_rmsnorm(g, x, w[1], 1e-6f, &m, 0), w[2], 0, 0), FD_ACT_SILU, 0);
  return fd_residual(g, x, h, &m, 0);
}

static void net_open(fd_ctx *ctx, struct net *n, bool segments, bool keep_all) {
  static const int64_t shapes[3][2] = {{S, D}, {1, D}, {D, D}};
  memset(n, 0, sizeof *n);
  OK(fd_graph_create(ctx, segments ? "net with segments" : "net", &n->g));
  fd_graph *g = n->g;
  n->x = fd_graph_input(g, "x", F32(B, N, D));
  n->cond = fd_graph_input(g, "cond", F32(B, D));
  fd_var w[LAYERS][3], x = n->x;
  for (int l = 0; l < LAYERS; l++)
    for (int i = 0; i < 3; i++) {
      w[l][i] = fd_graph_external(g, "w", FD_F32, 2, shapes[i], 0);
      fd_graph_want_grad(g, w[l][i], 0);
    }
  fd_graph_phase(g, "forward");
  fd_var silu = fd_activate(g, n->cond, FD_ACT_SILU, 0);
  for (int l = 0; l < LAYERS; l++) {
    if (segments) fd_graph_segment_begin(g);
    x = net_layer(g, x, silu, w[l]);
    if (segments) fd_graph_segment_end(g);
  }
  n->y = x;
  n->dy = fd_graph_input(g, "dy", F32(B, N, D));
  fd_graph_keep(g, n->y);
  fd_graph_phase(g, "backward");
  fd_graph_backward(g, 1, &n->y, &n->dy);
  for (int v = 1; keep_all && fd_graph_ok(g) && v < g->n_values; v++) fd_graph_keep(g, v);
  OK(fd_graph_plan(g, &n->bytes));
  OK(ctx->backend->alloc(ctx, n->bytes, &n->arena));
  OK(fd_graph_attach(g, n->arena, n->bytes));
  for (int l = 0; l < LAYERS; l++)
    for (int i = 0; i < 3; i++) {
      n->grad[l][i] = fd_graph_grad(g, w[l][i]);
      int64_t count = shapes[i][0] * D;
      n->weights[l][i] = malloc((size_t)(count + 4) * sizeof(float));
      for (int64_t k = 0; k < count; k += 4) fd_rng_normal4(5, FD_RNG_INIT, (uint64_t)(3 * l + i), (uint32_t)(k / 4), n->weights[l][i] + k);
      fd_graph_bind(g, w[l][i], n->weights[l][i]);
    }
  float host[B * N * D + 4];
  for (int k = 0; k < B * N * D; k++) host[k] = fd_rng_uniform(3, FD_RNG_NOISE, 0, (uint32_t)k) - 0.5f;
  OK(fd_graph_set(g, n->x, host, B * N * D * sizeof(float)));
  OK(fd_graph_set(g, n->dy, host, B * N * D * sizeof(float)));
  OK(fd_graph_set(g, n->cond, host, B * D * sizeof(float)));
}

static void net_close(fd_ctx *ctx, struct net *n) {
  for (int l = 0; l < LAYERS; l++)
    for (int i = 0; i < 3; i++) free(n->weights[l][i]);
  ctx->backend->free(ctx, n->arena);
  fd_graph_destroy(&n->g);
}

static void net_same(struct net *a, struct net *b) {
  float p[S * D], q[S * D];
  OK(fd_graph_run(a->g));
  OK(fd_graph_run(b->g));
  for (int l = 0; l < LAYERS; l++)
    for (int i = 0; i < 3; i++) {
      size_t bytes = fd_tensor_bytes(fd_graph_get(a->g, a->grad[l][i]));
      OK(fd_graph_read(a->g, a->grad[l][i], p, bytes));
      OK(fd_graph_read(b->g, b->grad[l][i], q, bytes));
      CHECK(memcmp(p, q, bytes) == 0);
      CHECK(p[0] == p[0] && p[0] != 0);
    }
}

/* No two values that live at the same time share a byte. */
static void check_plan(const fd_graph *g, size_t arena) {
  for (int v = 1; v < g->n_values; v++) {
    const struct fd_value *x = g->values[v];
    if (x->kind == FD_VALUE_EXTERNAL || x->kind == FD_VALUE_VIEW || x->first < 0 || x->store != v) continue;
    CHECK(x->at % FD_GRAPH_ALIGN == 0 && x->at + fd_tensor_bytes(&x->t) <= arena);
    for (int w = v + 1; w < g->n_values; w++) {
      const struct fd_value *y = g->values[w];
      if (y->kind == FD_VALUE_EXTERNAL || y->kind == FD_VALUE_VIEW || y->first < 0 || y->store != w) continue;
      bool meet = x->first <= y->last && y->first <= x->last;
      bool apart = x->at + fd_tensor_bytes(&x->t) <= y->at || y->at + fd_tensor_bytes(&y->t) <= x->at;
      CHECK(!meet || apart);
    }
    for (int i = x->first; i <= x->last && i < g->n_nodes; i++)
      CHECK(!g->nodes[i].scratch_bytes || g->nodes[i].scratch_at >= x->at + fd_tensor_bytes(&x->t) ||
            g->nodes[i].scratch_at + g->nodes[i].scratch_bytes <= x->at);
  }
}

static int count_nodes(const fd_graph *g, int op, const char *phase) {
  int n = 0;
  for (int i = 0; i < fd_graph_n_nodes(g); i++) {
    const char *p;
    int o = fd_graph_node(g, i, NULL, &p);
    n += (op < 0 || o == op) && (!phase || strcmp(p, phase) == 0);
  }
  return n;
}

static int lines;
static void count_line(void *user, const char *text) {
  (void)user;
  lines += text[0] != 0;
}

static void test_plan_and_recompute(fd_ctx *ctx) {
  struct net plain, poisoned, kept, again;
  struct fd_graph_memory m, k;
  net_open(ctx, &plain, false, false);
  net_open(ctx, &poisoned, false, false);
  net_open(ctx, &kept, false, true);
  net_open(ctx, &again, true, false);
  fd_graph_set_poison(poisoned.g, true);
  fd_graph_set_poison(again.g, true);
  if (!failed) {
    net_same(&plain, &kept);     /* reuse of memory changes no bit */
    net_same(&plain, &poisoned); /* nothing that is dead is read */
    net_same(&plain, &again);    /* nor does recomputing */
    net_same(&plain, &again);    /* nor a second run */
    check_plan(plain.g, plain.bytes);
    check_plan(again.g, again.bytes);
    fd_graph_memory(plain.g, &m);
    fd_graph_memory(kept.g, &k);
    CHECK(m.needed <= m.arena && m.arena <= m.needed + m.needed / 5 && m.arena < k.arena);
    CHECK(m.inputs == 3 * 256 && m.scratch == 768 && m.external > 0);
    fd_graph_memory(again.g, &k);
    CHECK(k.activations < m.activations && k.arena < m.arena);
    CHECK(count_nodes(plain.g, FD_OP_cast, NULL) == 1);         /* dout is copied once, gradients along the residual never */
    CHECK(count_nodes(plain.g, FD_OP_fill, NULL) == LAYERS);     /* one zero per modulation */
    CHECK(count_nodes(again.g, -1, "recompute") == 4 * LAYERS); /* all but the last op of each layer, whose result stays */
    fd_graph_print(again.g, count_line, NULL);
    CHECK(lines == 1 + fd_graph_n_nodes(again.g));
    CHECK(fd_graph_flop(again.g, "recompute") > 0 && fd_graph_flop(plain.g, "recompute") == 0);
    CHECK(fd_graph_flop(again.g, "backward") == fd_graph_flop(plain.g, "backward"));
  }
  net_close(ctx, &plain);
  net_close(ctx, &poisoned);
  net_close(ctx, &kept);
  net_close(ctx, &again);
}

/* The poison does find a plan that overlaps: move a saved value onto another. */
static void test_poison_finds(fd_ctx *ctx) {
  struct net bad;
  net_open(ctx, &bad, false, false);
  fd_graph *g = bad.g;
  fd_graph_set_poison(g, true);
  int longest = 0;
  for (int v = 1; v < g->n_values; v++) {
    const struct fd_value *x = g->values[v];
    if (x->kind == FD_VALUE_TENSOR && !x->keep && x->store == v && x->first >= 0 &&
        (!longest || x->last - x->first > g->values[longest]->last - g->values[longest]->first))
      longest = v;
  }
  for (int v = 1; v < g->n_values; v++) {
    struct fd_value *x = g->values[v];
    if (x->kind == FD_VALUE_TENSOR && !x->keep && x->store == v && v != longest && x->first > g->values[longest]->first &&
        x->last < g->values[longest]->last)
      x->at = g->values[longest]->at;
  }
  OK(fd_graph_attach(g, bad.arena, bad.bytes));
  OK(fd_graph_run(g));
  float p[S * D];
  bool nan = false;
  for (int l = 0; l < LAYERS; l++)
    for (int i = 0; i < 3; i++) {
      OK(fd_graph_read(g, bad.grad[l][i], p, D * sizeof(float)));
      for (int k = 0; k < D; k++) nan = nan || p[k] != p[k];
    }
  CHECK(nan);
  net_close(ctx, &bad);
}

/* ---- replay with frozen arguments --------------------------------------------------------------------------------- */

static void test_replay(fd_ctx *ctx) {
  enum { R = 4 };
  fd_graph *g = NULL;
  size_t bytes;
  void *arena = NULL;
  float w[2] = {1, 2}, dw[2] = {0, 0}, m[2] = {0, 0}, v[2] = {0, 0}, control[FD_CONTROL_COUNT] = {0};
  OK(fd_graph_create(ctx, "replay", &g));
  fd_var x = fd_graph_input(g, "x", F32(R, 2)), dy = fd_graph_input(g, "dy", F32(R, 1));
  fd_var count = fd_graph_input(g, "count", FD_I32, 1, (int64_t[]){1}), c = fd_graph_input(g, "control", F32(FD_CONTROL_COUNT));
  fd_var vw = fd_graph_external(g, "w", F32(1, 2), 0), vg = fd_graph_external(g, "dw", F32(2), 0);
  fd_var vm = fd_graph_external(g, "m", F32(2), 0), vv = fd_graph_external(g, "v", F32(2), 0);
  fd_graph_want_grad(g, vw, vg);
  fd_var y = fd_linear(g, x, vw, 0, count);
  fd_graph_backward(g, 1, &y, &dy);
  fd_graph_emit(g, FD_OP_adamw, &(struct fd_adamw_args){0}, (fd_var[]){fd_graph_view(g, vw, 1, (int64_t[]){2}), vg, vm, vv, 0, 0, c});
  OK(fd_graph_plan(g, &bytes));
  OK(ctx->backend->alloc(ctx, bytes, &arena));
  OK(fd_graph_attach(g, arena, bytes));
  fd_graph_bind(g, vw, w);
  fd_graph_bind(g, vg, dw);
  fd_graph_bind(g, vm, m);
  fd_graph_bind(g, vv, v);
  CHECK(fd_graph_n_nodes(g) == 2);
  char before[2][FD_OP_ARGS_MAX];
  const void *args;
  for (int i = 0; i < 2; i++) fd_graph_node(g, i, &args, NULL), memcpy(before[i], args, FD_OP_ARGS_MAX);
  const float hx[R * 2] = {1, 2, 3, 4, NAN, NAN, NAN, NAN}, hy[R] = {1, -1, NAN, NAN};
  OK(fd_graph_set(g, x, hx, sizeof hx));
  OK(fd_graph_set(g, dy, hy, sizeof hy));
  static const struct {
    int32_t count;
    float lr, w0, w1;
  } steps[] = {{1, 0.5f, 0.5f, 1}, {2, 1, 2.5f, 3}, {0, 1, 2.5f, 3}, {2, 0, 2.5f, 3}};
  for (int i = 0; i < 4; i++) {
    control[FD_CONTROL_LR] = steps[i].lr;
    OK(fd_graph_set(g, c, control, sizeof control));
    OK(fd_graph_set(g, count, &steps[i].count, sizeof(int32_t)));
    OK(fd_graph_run(g));
    CHECK(w[0] == steps[i].w0 && w[1] == steps[i].w1);
  }
  for (int i = 0; i < 2; i++) {
    fd_graph_node(g, i, &args, NULL);
    CHECK(memcmp(before[i], args, FD_OP_ARGS_MAX) == 0);
  }
  ctx->backend->free(ctx, arena);
  fd_graph_destroy(&g);
}

/* ---- buckets ------------------------------------------------------------------------------------------------------ */

struct told {
  int n;
  fd_var grad[8];
  int at[8];
};
static void remember(void *user, fd_graph *g, fd_var grad) {
  struct told *t = user;
  t->grad[t->n] = grad;
  t->at[t->n++] = fd_graph_n_nodes(g);
  fd_graph_emit(g, FD_OP_reduce_start, &(struct fd_reduce_start_args){.request = t->n}, &grad);
}

static void test_grad_done(fd_ctx *ctx) {
  fd_graph *g = NULL;
  struct told t = {0};
  OK(fd_graph_create(ctx, "buckets", &g));
  fd_var x = fd_graph_input(g, "x", F32(4, 3)), dy = fd_graph_input(g, "dy", F32(4, 3)), w[4], d[4];
  for (int i = 0; i < 4; i++) {
    w[i] = fd_graph_external(g, "w", F32(3, 3), 0);
    d[i] = fd_graph_external(g, "dw", F32(3, 3), 0);
    fd_graph_want_grad(g, w[i], d[i]);
  }
  fd_graph_on_grad_done(g, remember, &t);
  fd_var y = x;
  for (int i = 0; i < 3; i++) y = fd_linear(g, fd_linear(g, y, w[i], 0, 0), w[0], 0, 0); /* w[0] is used in all, w[3] never */
  fd_graph_backward(g, 1, &y, &dy);
  OK(fd_graph_status(g));
  CHECK(t.n == 4 && t.grad[0] == d[3] && t.grad[1] == d[2] && t.grad[2] == d[1] && t.grad[3] == d[0]);
  for (int i = 0; i < g->n_nodes; i++)
    for (int s = 0; s < fd_op_info(g->nodes[i].op)->n_slots; s++)
      for (int k = 0; k < t.n; k++) {
        if (g->nodes[i].slot[s] && g->values[g->nodes[i].slot[s]]->base == t.grad[k]) CHECK(i <= t.at[k]); /* the reduction itself at most */
        if (t.at[k] == i) CHECK(g->nodes[i].op == FD_OP_reduce_start);
      }
  fd_graph_destroy(&g);
}

/* A wanted value in the middle keeps its gradient whatever is added downstream of it. */
static void test_wanted_inside(fd_ctx *ctx) {
  fd_graph *g = NULL;
  size_t bytes;
  void *arena = NULL;
  float w[4] = {2, 0, 0, 3}, dw[4], host[2] = {1, 1};
  OK(fd_graph_create(ctx, "inside", &g));
  fd_var x = fd_graph_input(g, "x", F32(1, 2)), dy = fd_graph_input(g, "dy", F32(1, 2)), vw = fd_graph_external(g, "w", F32(2, 2), 0);
  fd_graph_want_grad(g, vw, 0);
  fd_var h = fd_linear(g, x, vw, 0, 0);
  fd_var s = fd_residual(g, h, h, NULL, 0); /* ds passes to h as an alias, twice */
  fd_var y = fd_residual(g, s, x, NULL, 0);
  fd_graph_want_grad(g, s, 0);
  fd_graph_want_grad(g, h, 0);
  fd_graph_backward(g, 1, &y, &dy);
  fd_var gs = fd_graph_grad(g, s), gh = fd_graph_grad(g, h), gw = fd_graph_grad(g, vw);
  CHECK(gs && gh && gw && !fd_graph_grad(g, x));
  OK(fd_graph_plan(g, &bytes));
  OK(ctx->backend->alloc(ctx, bytes, &arena));
  OK(fd_graph_attach(g, arena, bytes));
  fd_graph_bind(g, vw, w);
  OK(fd_graph_set(g, x, host, sizeof host));
  OK(fd_graph_set(g, dy, host, sizeof host));
  fd_graph_set_poison(g, true);
  OK(fd_graph_run(g));
  OK(fd_graph_read(g, gs, dw, 2 * sizeof(float)));
  CHECK(dw[0] == 1 && dw[1] == 1);
  OK(fd_graph_read(g, gh, dw, 2 * sizeof(float)));
  CHECK(dw[0] == 2 && dw[1] == 2);
  OK(fd_graph_read(g, dy, dw, 2 * sizeof(float)));
  CHECK(dw[0] == 1 && dw[1] == 1); /* the caller's dout is never written */
  OK(fd_graph_read(g, gw, dw, sizeof dw));
  CHECK(dw[0] == 2 && dw[3] == 2);
  ctx->backend->free(ctx, arena);
  fd_graph_destroy(&g);
}

/* ---- misuse ------------------------------------------------------------------------------------------------------- */

static const int64_t s43[] = {4, 3}, s34[] = {3, 4}, s3[] = {3}, s1[] = {1};

static void wrong_shape(fd_graph *g) { fd_linear(g, fd_graph_input(g, "x", FD_F32, 2, s43), fd_graph_input(g, "w", FD_F32, 2, s34), 0, 0); }
static void wrong_type(fd_graph *g) { fd_linear(g, fd_graph_input(g, "x", FD_F32, 2, s43), fd_graph_input(g, "w", FD_BF16, 2, s43), 0, 0); }
static void wrong_count(fd_graph *g) { fd_activate(g, fd_graph_input(g, "x", FD_F32, 2, s43), FD_ACT_SILU, fd_graph_input(g, "n", FD_F32, 1, s1)); }
static void missing(fd_graph *g) { fd_linear(g, 0, fd_graph_input(g, "w", FD_F32, 2, s43), 0, 0); }
static void missing_slot(fd_graph *g) { fd_graph_emit(g, FD_OP_fill, &(struct fd_fill_args){0}, (fd_var[]){0}); }
static void no_such_value(fd_graph *g) { fd_graph_emit(g, FD_OP_fill, &(struct fd_fill_args){0}, (fd_var[]){77}); }
static void read_unwritten(fd_graph *g) { fd_activate(g, fd_graph_tensor(g, FD_F32, 2, s43), FD_ACT_SILU, 0); }
static void write_constant(fd_graph *g) {
  fd_graph_emit(g, FD_OP_fill, &(struct fd_fill_args){0}, (fd_var[]){fd_graph_external(g, "frozen", FD_F32, 1, s3, FD_T_CONST)});
}
static void alias(fd_graph *g) {
  fd_var x = fd_graph_input(g, "x", FD_F32, 2, s43);
  fd_graph_emit(g, FD_OP_colsum, &(struct fd_colsum_args){0}, (fd_var[]){x, 0, fd_graph_rows(g, x, 1, 1)});
}
static void bad_view(fd_graph *g) { fd_graph_view(g, fd_graph_input(g, "x", FD_F32, 2, s43), 1, s3); }
static void bad_rows(fd_graph *g) { fd_graph_rows(g, fd_graph_input(g, "x", FD_F32, 2, s43), 3, 2); }
static void bad_mod(fd_graph *g) {
  struct fd_mod m = {.mod = fd_graph_input(g, "mod", FD_F32, 2, s43), .rows_per_mod = 1, .shift_col = 0, .scale_col = 3};
  fd_rmsnorm(g, fd_graph_input(g, "x", FD_F32, 2, s43), fd_graph_input(g, "w", FD_F32, 1, s3), 1e-6f, &m, 0);
}
static void bad_heads(fd_graph *g) {
  fd_var q, k, v;
  fd_heads(g, &(struct fd_heads){.qkv = fd_graph_input(g, "qkv", FD_F32, 2, s43), .B = 1, .N = 4, .A = 3, .K = 2, .E = 1}, &q, &k, &v);
}
static void bad_conv(fd_graph *g) {
  fd_conv2d(g, fd_graph_input(g, "x", FD_F32, 4, (int64_t[]){1, 4, 4, 3}), fd_graph_input(g, "w", FD_F32, 4, (int64_t[]){2, 2, 3, 3}), 0, 0,
            &(struct fd_conv){.stride = 1});
}
static void negative(fd_graph *g) { fd_graph_input(g, "x", FD_F32, 1, (int64_t[]){-1}); }
static void nested(fd_graph *g) { fd_graph_segment_begin(g), fd_graph_segment_begin(g); }
static void endless(fd_graph *g) { fd_graph_segment_begin(g); }
static void twice(fd_graph *g) { fd_graph_backward(g, 0, NULL, NULL), fd_graph_backward(g, 0, NULL, NULL); }
static void unlike_dout(fd_graph *g) {
  fd_var x = fd_graph_input(g, "x", FD_F32, 2, s43), dy = fd_graph_input(g, "dy", FD_F32, 1, s3);
  fd_graph_backward(g, 1, &x, &dy);
}
static void bf16_gradient(fd_graph *g) { fd_graph_want_grad(g, fd_graph_external(g, "w", FD_F32, 1, s3, 0), fd_graph_external(g, "dw", FD_BF16, 1, s3, 0)); }
static void no_backward(fd_graph *g) {
  fd_var t = fd_graph_input(g, "t", FD_F32, 1, s3);
  fd_graph_want_grad(g, t, 0);
  fd_var y = fd_timestep_embed(g, t, fd_graph_input(g, "freqs", FD_F32, 1, s3), FD_F32), dy = fd_graph_input(g, "dy", FD_F32, 2, (int64_t[]){3, 6});
  fd_graph_backward(g, 1, &y, &dy);
}
static void through_rows(fd_graph *g) {
  fd_var x = fd_graph_input(g, "x", FD_F32, 2, s43);
  fd_graph_want_grad(g, x, 0);
  fd_var y = fd_activate(g, fd_graph_rows(g, x, 0, 2), FD_ACT_SILU, 0), dy = fd_graph_input(g, "dy", FD_F32, 2, (int64_t[]){2, 3});
  fd_graph_backward(g, 1, &y, &dy);
}
static void changed_between(fd_graph *g) {
  fd_var x = fd_graph_input(g, "x", FD_F32, 2, s43), w = fd_graph_external(g, "w", FD_F32, 2, s43, 0), dy = fd_graph_input(g, "dy", FD_F32, 2, (int64_t[]){4, 4});
  fd_graph_want_grad(g, w, 0);
  fd_var y = fd_linear(g, x, w, 0, 0);
  fd_graph_emit(g, FD_OP_fill, &(struct fd_fill_args){0}, &w);
  fd_graph_backward(g, 1, &y, &dy);
}

static void test_misuse(fd_ctx *ctx) {
  static const struct {
    void (*build)(fd_graph *g);
    fd_status st;
    const char *says;
  } cases[] = {
      {wrong_shape, FD_ERR_ARG, "linear: w is w [3, 4] f32, wanted [out, 3] for x x [4, 3] f32"},
      {wrong_type, FD_ERR_ARG, "types differ"},
      {wrong_count, FD_ERR_ARG, "activate: count is n [1] f32, wanted [1] i32"},
      {missing, FD_ERR_ARG, "linear: x is missing"},
      {missing_slot, FD_ERR_ARG, "fill: slot y is missing"},
      {no_such_value, FD_ERR_ARG, "value 77, which does not exist"},
      {read_unwritten, FD_ERR_ARG, "slot x reads [4, 3] f32, which nothing has written"},
      {write_constant, FD_ERR_ARG, "writes the constant frozen [3] f32"},
      {alias, FD_ERR_ARG, "colsum: slots x and y are the same memory"},
      {bad_view, FD_ERR_ARG, "view: x [4, 3] f32 has 12 elements, the view 3"},
      {bad_rows, FD_ERR_ARG, "rows: [3, 5) of x [4, 3] f32"},
      {bad_mod, FD_ERR_ARG, "rmsnorm: mod is mod [4, 3] f32, but its columns 0 and 3 begin vectors of 3"},
      {bad_heads, FD_ERR_ARG, "kv heads must divide heads"},
      {bad_conv, FD_ERR_ARG, "conv2d: w is w [2, 2, 3, 3] f32, wanted [out, 3, kh, kw]"},
      {negative, FD_ERR_ARG, "x: dimension 0 is -1"},
      {nested, FD_ERR_ARG, "begins inside another"},
      {endless, FD_ERR_ARG, "has no end"},
      {twice, FD_ERR_ARG, "differentiated twice"},
      {unlike_dout, FD_ERR_ARG, "they must be alike"},
      {bf16_gradient, FD_ERR_ARG, "wanted an external f32 value"},
      {no_backward, FD_ERR_UNSUPPORTED, "timestep_embed: this op has no backward"},
      {through_rows, FD_ERR_UNSUPPORTED, "a view of some rows"},
      {changed_between, FD_ERR_UNSUPPORTED, "is changed by another op"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    fd_graph *g = NULL;
    size_t bytes = 17;
    OK(fd_graph_create(ctx, "misuse", &g));
    cases[i].build(g);
    fd_activate(g, fd_graph_input(g, "later", FD_F32, 1, s3), FD_ACT_SILU, 0); /* builders after a failure do nothing */
    fd_status st = fd_graph_plan(g, &bytes);
    if (st != cases[i].st || !strstr(fd_status_message(), cases[i].says) || strncmp(fd_status_message(), "graph misuse: ", 14) != 0 || bytes != 17) {
      failed = 1;
      printf("misuse %zu: status %s, \"%s\", wanted \"%s\"\n", i, fd_status_name(st), fd_status_message(), cases[i].says);
    }
    fd_graph_destroy(&g);
  }
  /* running too early, and memory that is not the caller's */
  fd_graph *g = NULL;
  size_t bytes;
  float three[3] = {0};
  _Alignas(256) char arena[4096];
  OK(fd_graph_create(ctx, "early", &g));
  fd_var w = fd_graph_external(g, "w", FD_F32, 1, s3, 0), in = fd_graph_input(g, "in", FD_F32, 1, s3);
  fd_var y = fd_add(g, in, w, 0), z = fd_activate(g, y, FD_ACT_SILU, 0);
  fd_graph_keep(g, z);
  CHECK(fd_graph_run(g) == FD_ERR_ARG && fd_graph_attach(g, arena, sizeof arena) == FD_ERR_ARG);
  OK(fd_graph_plan(g, &bytes));
  CHECK(fd_graph_run(g) == FD_ERR_ARG && strstr(fd_status_message(), "before an arena"));
  CHECK(fd_graph_set(g, in, three, sizeof three) == FD_ERR_ARG && fd_graph_attach(g, arena, 256) == FD_ERR_ARG);
  OK(fd_graph_attach(g, arena, sizeof arena));
  CHECK(fd_graph_run(g) == FD_ERR_ARG && strstr(fd_status_message(), "w [3] f32 in slot y is not bound"));
  fd_graph_bind(g, w, three);
  OK(fd_graph_run(g));
  CHECK(fd_graph_read(g, y, three, sizeof three) == FD_ERR_ARG && fd_graph_set(g, in, three, 16) == FD_ERR_ARG);
  CHECK(fd_graph_plan(g, &bytes) == FD_ERR_ARG);
  fd_graph_destroy(&g);
}

static void test_backends(void) {
  const struct fd_backend *b = NULL;
  OK(fd_backend_find("auto", &b));
  CHECK(b && !b->not_built);
  OK(fd_backend_find("cpu", &b));
  CHECK(strcmp(b->name, "cpu") == 0);
  CHECK(fd_backend_find("tpu", &b) == FD_ERR_CONFIG);
  for (int i = 0; fd_backend_at(i); i++)
    if (fd_backend_at(i)->not_built)
      CHECK(fd_backend_find(fd_backend_at(i)->name, &b) == FD_ERR_UNSUPPORTED && strstr(fd_status_message(), "reconfigure"));
}

int main(void) {
  fd_ctx *ctx = NULL;
  OK(fd_ctx_create(&ref_backend, 1, NULL, &ctx));
  test_backends();
  test_misuse(ctx);
  test_skips(ctx);
  test_embed(ctx);
  test_copies(ctx);
  test_gradients(ctx);
  test_random(ctx);
  test_plan_and_recompute(ctx);
  test_poison_finds(ctx);
  test_replay(ctx);
  test_grad_done(ctx);
  test_wanted_inside(ctx);
  fd_ctx_destroy(&ctx);
  return failed;
}
