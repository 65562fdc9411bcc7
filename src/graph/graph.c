// SPDX-License-Identifier: Apache-2.0
// Values, views and the list of ops. Invariant: whatever is appended is well formed; the first failure stops all building.
#include "graph/graph.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "graph/internal.h"

fd_status fd_graph_create(fd_ctx *ctx, const char *name, fd_graph **out) {
  fd_status st = FD_OK;
  fd_graph *g = calloc(1, sizeof *g);
  if (!g || !(g->name = strdup(name))) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a graph"));
  g->ctx = ctx;
  g->phase = "";
  g->n_values = 1; /* 0 is "none" */
  g->open_segment = -1;
  *out = g;
  g = NULL;
done:
  fd_graph_destroy(&g);
  return st;
}

void fd_graph_destroy(fd_graph **graph) {
  fd_graph *g = *graph;
  if (!g) return;
  fd_graph_drop_recordings(g);
  for (int i = 0; i < g->n_nodes; i++) free(g->nodes[i].args);
  for (int v = 1; v < g->n_values; v++) {
    free(g->values[v]->name);
    free(g->values[v]);
  }
  free(g->nodes);
  free(g->values);
  free(g->segments);
  free(g->message);
  free(g->name);
  free(g);
  *graph = NULL;
}

fd_ctx *fd_graph_ctx(const fd_graph *g) { return g->ctx; }

/* ---- failures -------------------------------------------------------------------------------------------------- */

void fd_graph_fail(fd_graph *g, fd_status st, const char *format, ...) {
  if (!fd_graph_ok(g)) return;
  g->st = st;
  va_list args;
  va_start(args, format);
  if (vasprintf(&g->message, format, args) < 0) g->message = NULL;
  va_end(args);
}

fd_status fd_graph_status(const fd_graph *g) {
  if (fd_graph_ok(g)) return FD_OK;
  return FD_FAIL(g->st, "graph %s: %s", g->name, g->message ? g->message : "no memory");
}

const char *fd_graph_text(const fd_graph *g, fd_var v) {
  static _Thread_local char buffers[8][160];
  static _Thread_local unsigned turn;
  char *text = buffers[turn++ % 8];
  const size_t size = sizeof buffers[0];
  if (v < 1 || v >= g->n_values) {
    snprintf(text, size, "nothing");
    return text;
  }
  const struct fd_value *x = g->values[v];
  int n = snprintf(text, size, "%.80s%s[", x->name ? x->name : "", x->name ? " " : "");
  for (int i = 0; i < x->t.ndim; i++)
    n += snprintf(text + n, size - (size_t)n, "%s%lld", i ? ", " : "", (long long)x->t.shape[i]);
  snprintf(text + n, size - (size_t)n, "] %s", fd_dtype_name(x->t.dtype));
  return text;
}

/* ---- values ---------------------------------------------------------------------------------------------------- */

static fd_var add_value(fd_graph *g, enum fd_value_kind kind, const char *name, fd_dtype dtype, int ndim, const int64_t *shape,
                        unsigned flags) {
  if (!fd_graph_ok(g)) return 0;
  FD_WANT(!g->planned, "a value (%s) is added after the graph was planned", name ? name : "of an op");
  FD_WANT(ndim >= 0 && ndim <= FD_MAX_NDIM, "%s: %d dimensions, at most %d are possible", name ? name : "a value", ndim, FD_MAX_NDIM);
  FD_WANT((unsigned)dtype < FD_DTYPE_COUNT, "%s: element type %d does not exist", name ? name : "a value", (int)dtype);
  int64_t numel = 1;
  for (int i = 0; i < ndim; i++) {
    FD_WANT(shape[i] >= 0 && !__builtin_mul_overflow(numel, shape[i], &numel) && numel < INT64_MAX / 8,
            "%s: dimension %d is %lld", name ? name : "a value", i, (long long)shape[i]);
  }
  if (g->n_values == g->cap_values || !g->values) {
    int cap = g->cap_values ? 2 * g->cap_values : 256;
    struct fd_value **grown = realloc(g->values, (size_t)cap * sizeof *grown);
    if (!grown) {
      fd_graph_fail(g, FD_ERR_NOMEM, "no memory for %d values", cap);
      return 0;
    }
    grown[0] = NULL;
    g->values = grown;
    g->cap_values = cap;
  }
  struct fd_value *x = calloc(1, sizeof *x);
  if (!x || (name && !(x->name = strdup(name)))) {
    free(x);
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for a value");
    return 0;
  }
  fd_var v = g->n_values++;
  g->values[v] = x;
  x->kind = kind;
  x->base = x->store = v;
  x->t.dtype = dtype;
  x->t.ndim = ndim;
  x->t.flags = flags;
  memcpy(x->t.shape, shape, (size_t)ndim * sizeof *shape);
  x->first = x->last = -1;
  return v;
}

fd_var fd_graph_external(fd_graph *g, const char *name, fd_dtype dtype, int ndim, const int64_t *shape, unsigned flags) {
  return add_value(g, FD_VALUE_EXTERNAL, name, dtype, ndim, shape, flags);
}

fd_var fd_graph_input(fd_graph *g, const char *name, fd_dtype dtype, int ndim, const int64_t *shape) {
  return add_value(g, FD_VALUE_INPUT, name, dtype, ndim, shape, 0);
}

fd_var fd_graph_tensor(fd_graph *g, fd_dtype dtype, int ndim, const int64_t *shape) {
  return add_value(g, FD_VALUE_TENSOR, NULL, dtype, ndim, shape, 0);
}

static bool exists(const fd_graph *g, fd_var v) { return v > 0 && v < g->n_values; }

void fd_graph_bind(fd_graph *g, fd_var v, void *data) {
  if (!exists(g, v)) return; /* building failed: plan says so */
  if (g->values[v]->kind != FD_VALUE_EXTERNAL) {
    fd_graph_fail(g, FD_ERR_ARG, "bind: %s is not external", fd_graph_text(g, v));
    return;
  }
  if (g->values[v]->t.data != data) fd_graph_drop_recordings(g); /* they hold addresses */
  g->values[v]->t.data = data;
  for (fd_var w = g->values[v]->next_view; w; w = g->values[w]->next_view)
    g->values[w]->t.data = data ? (char *)data + g->values[w]->offset : NULL;
  g->ready = false; /* looked at again by the next run */
}

void fd_graph_keep(fd_graph *g, fd_var v) {
  if (!fd_graph_ok(g)) return;
  FD_WANT_OR(, exists(g, v), "keep: value %d does not exist", v);
  FD_WANT_OR(, !g->planned || fd_graph_base(g, v)->keep, "keep: %s comes after the graph was planned", fd_graph_text(g, v));
  fd_graph_base(g, v)->keep = true;
}

fd_var fd_graph_view_at(fd_graph *g, fd_var base, size_t offset, fd_dtype dtype, int ndim, const int64_t *shape, bool rows) {
  fd_var w = add_value(g, FD_VALUE_VIEW, NULL, dtype, ndim, shape, g->values[base]->t.flags);
  if (!w) return 0;
  struct fd_value *b = g->values[base], *x = g->values[w];
  x->base = base;
  x->offset = offset;
  x->rows = rows;
  x->next_view = b->next_view;
  b->next_view = w;
  if (b->t.data) x->t.data = (char *)b->t.data + offset;
  return w;
}

fd_var fd_graph_view(fd_graph *g, fd_var v, int ndim, const int64_t *shape) {
  if (!fd_graph_ok(g)) return 0;
  FD_WANT(exists(g, v), "view: value %d does not exist", v);
  const struct fd_value *x = g->values[v];
  fd_tensor wanted = {.ndim = ndim};
  FD_WANT(ndim >= 0 && ndim <= FD_MAX_NDIM, "view: %d dimensions, at most %d are possible", ndim, FD_MAX_NDIM);
  memcpy(wanted.shape, shape, (size_t)ndim * sizeof *shape);
  if (ndim == x->t.ndim && memcmp(shape, x->t.shape, (size_t)ndim * sizeof *shape) == 0) return v;
  FD_WANT(fd_tensor_numel(&wanted) == fd_tensor_numel(&x->t), "view: %s has %lld elements, the view %lld", fd_graph_text(g, v),
          (long long)fd_tensor_numel(&x->t), (long long)fd_tensor_numel(&wanted));
  return fd_graph_view_at(g, x->base, x->offset, x->t.dtype, ndim, shape, x->rows);
}

fd_var fd_graph_rows(fd_graph *g, fd_var v, int64_t first, int64_t n) {
  if (!fd_graph_ok(g)) return 0;
  FD_WANT(exists(g, v), "rows: value %d does not exist", v);
  const struct fd_value *x = g->values[v];
  FD_WANT(x->t.ndim >= 1 && first >= 0 && n >= 0 && first + n <= x->t.shape[0], "rows: [%lld, %lld) of %s", (long long)first,
          (long long)(first + n), fd_graph_text(g, v));
  int64_t shape[FD_MAX_NDIM];
  memcpy(shape, x->t.shape, sizeof shape);
  shape[0] = n;
  size_t row_bytes = x->t.shape[0] ? fd_tensor_bytes(&x->t) / (size_t)x->t.shape[0] : 0;
  return fd_graph_view_at(g, x->base, x->offset + (size_t)first * row_bytes, x->t.dtype, x->t.ndim, shape, true);
}

const fd_tensor *fd_graph_get(const fd_graph *g, fd_var v) {
  static const fd_tensor one = {.shape = {1, 1, 1, 1}, .ndim = FD_MAX_NDIM};
  return exists(g, v) ? &g->values[v]->t : &one;
}

/* ---- ops ------------------------------------------------------------------------------------------------------- */

bool fd_graph_in_place(enum fd_op op, int out, int in) {
  switch (op) {
    case FD_OP_add_fwd: return out == SLOT(add_fwd, z) && in == SLOT(add_fwd, x);
    case FD_OP_act_fwd: return out == SLOT(act_fwd, y) && in == SLOT(act_fwd, x);
    case FD_OP_act_bwd: return out == SLOT(act_bwd, dx) && in == SLOT(act_bwd, dy);
    case FD_OP_rmsnorm_bwd: return out == SLOT(rmsnorm_bwd, dx) && in == SLOT(rmsnorm_bwd, dy);
    case FD_OP_gate_residual_fwd: return out == SLOT(gate_residual_fwd, y) && in == SLOT(gate_residual_fwd, x);
    default: return false;
  }
}

static bool overlap(const struct fd_value *x, const struct fd_value *y) {
  return x->base == y->base && x->offset < y->offset + fd_tensor_bytes(&y->t) && y->offset < x->offset + fd_tensor_bytes(&x->t);
}

static bool same_memory(const struct fd_value *x, const struct fd_value *y) {
  return x->base == y->base && x->offset == y->offset && fd_tensor_bytes(&x->t) == fd_tensor_bytes(&y->t);
}

void fd_graph_emit(fd_graph *g, enum fd_op op, const void *args, const fd_var *slot) {
  if (!fd_graph_ok(g)) return;
  FD_WANT_OR(, (unsigned)op < FD_OP_COUNT, "op %d does not exist", (int)op);
  const struct fd_op_info *info = fd_op_info(op);
  FD_WANT_OR(, !g->planned, "%s is added after the graph was planned", info->name);
  struct fd_node node = {.op = op, .phase = g->phase, .args = calloc(1, FD_OP_ARGS_MAX)};
  if (!node.args) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for an op");
    return;
  }
  memcpy(node.args, args, info->args_bytes);
  memset(node.args, 0, (size_t)info->n_slots * sizeof(fd_tensor *)); /* filled by plan */
  unsigned *acc = fd_op_acc(op, node.args);
  for (int s = 0; s < info->n_slots; s++) {
    fd_var v = node.slot[s] = slot[s];
    if (!v) {
      if (!info->optional[s]) fd_graph_fail(g, FD_ERR_ARG, "%s: slot %s is missing", info->name, info->slot[s]);
      *acc &= ~(1u << s);
      continue;
    }
    if (!exists(g, v)) {
      fd_graph_fail(g, FD_ERR_ARG, "%s: slot %s is value %d, which does not exist", info->name, info->slot[s], v);
      continue;
    }
    const struct fd_value *base = fd_graph_base(g, v);
    bool adds = *acc >> s & 1;
    if ((info->dir[s] != 'o' || adds) && base->kind == FD_VALUE_TENSOR && base->n_writes == 0)
      fd_graph_fail(g, FD_ERR_ARG, "%s: slot %s reads %s, which nothing has written", info->name, info->slot[s], fd_graph_text(g, v));
    if (info->dir[s] != 'i' && (base->t.flags & FD_T_CONST))
      fd_graph_fail(g, FD_ERR_ARG, "%s: slot %s writes the constant %s", info->name, info->slot[s], fd_graph_text(g, v));
  }
  if (*acc >> info->n_slots) fd_graph_fail(g, FD_ERR_ARG, "%s: acc %#x names a slot that does not exist", info->name, *acc);
  for (int o = 0; fd_graph_ok(g) && o < info->n_slots; o++) {
    if (!slot[o] || info->dir[o] == 'i') continue;
    for (int s = 0; s < info->n_slots; s++) {
      if (s == o || !slot[s] || (info->dir[s] != 'i' && s < o)) continue;
      const struct fd_value *y = g->values[slot[o]], *x = g->values[slot[s]];
      if (!overlap(x, y)) continue;
      if (!(info->dir[s] == 'i' && fd_graph_in_place(op, o, s) && same_memory(x, y) && !(*acc >> o & 1)))
        fd_graph_fail(g, FD_ERR_ARG, "%s: slots %s and %s are the same memory, %s", info->name, info->slot[s], info->slot[o],
                      fd_graph_text(g, slot[o]));
    }
  }
  if (fd_graph_ok(g) && g->n_nodes == g->cap_nodes) {
    int cap = g->cap_nodes ? 2 * g->cap_nodes : 128;
    struct fd_node *grown = realloc(g->nodes, (size_t)cap * sizeof *grown);
    if (grown) {
      g->nodes = grown;
      g->cap_nodes = cap;
    } else {
      fd_graph_fail(g, FD_ERR_NOMEM, "no memory for %d ops", cap);
    }
  }
  if (!fd_graph_ok(g)) {
    free(node.args);
    return;
  }
  for (int s = 0; s < info->n_slots; s++) {
    if (!slot[s]) continue;
    if (info->dir[s] != 'i') fd_graph_base(g, slot[s])->n_writes++;
  }
  g->nodes[g->n_nodes++] = node;
}

void fd_graph_phase(fd_graph *g, const char *phase) { g->phase = phase; }

void fd_graph_segment_begin(fd_graph *g) {
  if (!fd_graph_ok(g)) return;
  FD_WANT_OR(, g->open_segment < 0, "a recompute segment begins inside another");
  FD_WANT_OR(, !g->differentiated, "a recompute segment begins after fd_graph_backward");
  struct fd_segment *grown = realloc(g->segments, (size_t)(g->n_segments + 1) * sizeof *grown);
  if (!grown) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for a segment");
    return;
  }
  g->segments = grown;
  g->open_segment = g->n_segments++;
  g->segments[g->open_segment] = (struct fd_segment){.first = g->n_nodes, .end = -1};
}

void fd_graph_segment_end(fd_graph *g) {
  if (!fd_graph_ok(g)) return;
  FD_WANT_OR(, g->open_segment >= 0, "a recompute segment ends that did not begin");
  g->segments[g->open_segment].end = g->n_nodes;
  g->open_segment = -1;
}

/* ---- looking at it ----------------------------------------------------------------------------------------------- */

int fd_graph_n_nodes(const fd_graph *g) { return g->n_nodes; }

enum fd_op fd_graph_node(const fd_graph *g, int node, const void **args, const char **phase) {
  if (args) *args = g->nodes[node].args;
  if (phase) *phase = g->nodes[node].phase;
  return g->nodes[node].op;
}

void fd_graph_memory(const fd_graph *g, struct fd_graph_memory *out) { *out = g->memory; }

void fd_graph_print(const fd_graph *g, void (*line)(void *user, const char *text), void *user) {
  char text[2048];
  snprintf(text, sizeof text, "graph %s: %d ops, %d values, arena %zu bytes", g->name, g->n_nodes, g->n_values - 1, g->memory.arena);
  line(user, text);
  for (int i = 0; i < g->n_nodes; i++) {
    const struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    size_t n = (size_t)snprintf(text, sizeof text, "%5d %-10s %-18s", i, node->phase, info->name);
    for (int s = 0; s < info->n_slots && n < sizeof text; s++) {
      if (!node->slot[s]) continue;
      const struct fd_value *x = g->values[node->slot[s]], *b = fd_graph_base(g, node->slot[s]);
      bool adds = *fd_op_acc(node->op, node->args) >> s & 1;
      n += (size_t)snprintf(text + n, sizeof text - n, " %s%s=%%%d %s", info->slot[s], adds ? "+" : "", node->slot[s],
                            fd_graph_text(g, node->slot[s]));
      if (g->planned && b->kind != FD_VALUE_EXTERNAL && n < sizeof text)
        n += (size_t)snprintf(text + n, sizeof text - n, " @%zu", g->values[b->store]->at + x->offset);
    }
    if (node->scratch_bytes && n < sizeof text)
      snprintf(text + n, sizeof text - n, " scratch=%zu @%zu", node->scratch_bytes, node->scratch_at);
    line(user, text);
  }
}
