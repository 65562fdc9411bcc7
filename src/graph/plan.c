// SPDX-License-Identifier: Apache-2.0
// The plan: which ops are needed, how long each value lives, and where in the arena it lies.
// Invariant: two values whose lifetimes [first, last] in op numbers meet never share a byte, unless the op that ends one
// and begins the other may work in place (op/ops.h).
#include <stdlib.h>
#include <string.h>

#include "graph/internal.h"

static size_t align_up(size_t n) { return (n + FD_GRAPH_ALIGN - 1) / FD_GRAPH_ALIGN * FD_GRAPH_ALIGN; }

static bool in_arena(const struct fd_value *x) { return x->kind == FD_VALUE_INPUT || x->kind == FD_VALUE_TENSOR; }

/* Drop ops and optional outputs that nobody reads. */
static void drop_unread(fd_graph *g) {
  bool *needed = calloc((size_t)g->n_nodes + 1, 1);
  if (!needed) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for the plan");
    return;
  }
  for (int v = 1; v < g->n_values; v++) g->values[v]->read = false;
  for (int i = g->n_nodes - 1; i >= 0; i--) {
    struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    unsigned *acc = fd_op_acc(node->op, node->args);
    for (int s = 0; s < info->n_slots; s++) {
      if (!node->slot[s] || info->dir[s] == 'i') continue;
      const struct fd_value *b = fd_graph_base(g, node->slot[s]);
      if (b->kind != FD_VALUE_TENSOR || b->keep || b->read) needed[i] = true;
    }
    if (!needed[i]) continue;
    for (int s = 0; s < info->n_slots; s++) {
      if (!node->slot[s]) continue;
      struct fd_value *b = fd_graph_base(g, node->slot[s]);
      if (info->dir[s] == 'o' && info->optional[s] && b->kind == FD_VALUE_TENSOR && !b->keep && !b->read) {
        node->slot[s] = 0;
        *acc &= ~(1u << s);
      }
    }
    for (int s = 0; s < info->n_slots; s++)
      if (node->slot[s] && (info->dir[s] != 'o' || *acc >> s & 1)) fd_graph_base(g, node->slot[s])->read = true;
  }
  int n = 0;
  for (int i = 0; i < g->n_nodes; i++) {
    if (needed[i])
      g->nodes[n++] = g->nodes[i];
    else
      free(g->nodes[i].args);
  }
  g->n_nodes = n;
  free(needed);
}

static void lifetimes(fd_graph *g) {
  for (int i = 0; i < g->n_nodes; i++) {
    const struct fd_node *node = &g->nodes[i];
    for (int s = 0; s < fd_op_info(node->op)->n_slots; s++) {
      if (!node->slot[s]) continue;
      struct fd_value *b = fd_graph_base(g, node->slot[s]);
      if (b->first < 0) b->first = i;
      b->last = i;
    }
  }
  for (int v = 1; v < g->n_values; v++) {
    struct fd_value *x = g->values[v];
    if (x->kind == FD_VALUE_INPUT) x->first = 0;
    if (x->kind == FD_VALUE_INPUT || (x->keep && x->first >= 0)) x->last = g->n_nodes;
  }
}

/* Outputs that may use the memory of an input that dies there. */
static void work_in_place(fd_graph *g) {
  for (int i = 0; i < g->n_nodes; i++) {
    const struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    for (int o = 0; o < info->n_slots; o++) {
      if (!node->slot[o] || info->dir[o] != 'o' || *fd_op_acc(node->op, node->args) >> o & 1) continue;
      for (int in = 0; in < info->n_slots; in++) {
        if (!node->slot[in] || !fd_graph_in_place(node->op, o, in)) continue;
        struct fd_value *y = fd_graph_base(g, node->slot[o]), *x = fd_graph_base(g, node->slot[in]);
        bool whole = fd_tensor_bytes(&g->values[node->slot[o]]->t) == fd_tensor_bytes(&y->t) &&
                     fd_tensor_bytes(&g->values[node->slot[in]]->t) == fd_tensor_bytes(&x->t);
        bool elsewhere = false; /* the input is read by another slot too */
        for (int s = 0; s < info->n_slots; s++)
          if (s != in && node->slot[s] && fd_graph_base(g, node->slot[s]) == x) elsewhere = true;
        if (x != y && whole && !elsewhere && fd_tensor_bytes(&x->t) == fd_tensor_bytes(&y->t) && x->kind == FD_VALUE_TENSOR &&
            !x->keep && x->last == i && y->kind == FD_VALUE_TENSOR && y->first == i) {
          y->store = x->store;
          struct fd_value *store = g->values[x->store];
          store->last = y->last;
        }
      }
    }
  }
}

struct item {
  size_t bytes, *at;
  int first, last;
  int order; /* makes the sort, hence the plan, the same everywhere */
};

static int larger_first(const void *a, const void *b) {
  const struct item *x = a, *y = b;
  if (x->bytes != y->bytes) return x->bytes < y->bytes ? 1 : -1;
  if (x->last - x->first != y->last - y->first) return x->last - x->first < y->last - y->first ? 1 : -1;
  return x->order - y->order;
}

/* Largest first, each into the smallest gap between those already placed that live at the same time. */
static size_t place(struct item *items, int n, struct item **placed) {
  size_t end = 0;
  qsort(items, (size_t)n, sizeof *items, larger_first);
  for (int i = 0; i < n; i++) {
    struct item *x = &items[i];
    size_t cursor = 0, best_at = 0, best_gap = SIZE_MAX;
    for (int j = 0; j < i; j++) {
      const struct item *p = placed[j]; /* in the order of offsets */
      if (p->last < x->first || x->last < p->first) continue;
      if (*p->at > cursor && *p->at - cursor >= x->bytes && *p->at - cursor < best_gap) {
        best_gap = *p->at - cursor;
        best_at = cursor;
      }
      if (*p->at + p->bytes > cursor) cursor = *p->at + p->bytes;
    }
    *x->at = best_gap == SIZE_MAX ? cursor : best_at;
    if (*x->at + x->bytes > end) end = *x->at + x->bytes;
    int j = i;
    for (; j > 0 && *placed[j - 1]->at > *x->at; j--) placed[j] = placed[j - 1];
    placed[j] = x;
  }
  return end;
}

static void assign(fd_graph *g) {
  int most = g->n_values + g->n_nodes, n = 0;
  struct item *items = calloc((size_t)most + 1, sizeof *items);
  struct item **placed = calloc((size_t)most + 1, sizeof(struct item *));
  int64_t *live = calloc((size_t)g->n_nodes + 2, sizeof *live), *transient = calloc((size_t)g->n_nodes + 2, sizeof *transient);
  if (!items || !placed || !live || !transient) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for the plan");
    goto done;
  }
  for (int v = 1; v < g->n_values; v++) {
    struct fd_value *x = g->values[v];
    size_t bytes = fd_tensor_bytes(&x->t);
    if (x->kind == FD_VALUE_EXTERNAL) g->memory.external += bytes;
    if (!in_arena(x) || x->first < 0) continue;
    bool stays = x->kind == FD_VALUE_INPUT || x->keep;
    bytes = align_up(bytes);
    if (x->kind == FD_VALUE_INPUT) g->memory.inputs += bytes;
    else if (x->keep) g->memory.kept += bytes;
    int last = x->last < g->n_nodes ? x->last : g->n_nodes - 1;
    if (stays) {
      transient[x->first] -= (int64_t)bytes;
      transient[last + 1] += (int64_t)bytes;
    }
    if (x->store != v || !bytes) continue;
    items[n] = (struct item){.bytes = bytes, .at = &x->at, .first = x->first, .last = x->last, .order = n};
    n++;
    live[x->first] += (int64_t)bytes;
    live[last + 1] -= (int64_t)bytes;
  }
  int64_t sum = 0, activations = 0;
  for (int i = 0; i < g->n_nodes; i++) {
    struct fd_node *node = &g->nodes[i];
    sum += live[i];
    activations += live[i] + transient[i];
    size_t scratch = align_up(node->scratch_bytes);
    if (scratch) {
      items[n] = (struct item){.bytes = scratch, .at = &node->scratch_at, .first = i, .last = i, .order = n};
      n++;
    }
    if ((size_t)activations > g->memory.activations) g->memory.activations = (size_t)activations;
    if (scratch > g->memory.scratch) g->memory.scratch = scratch;
    if ((size_t)sum + scratch > g->memory.needed) g->memory.needed = (size_t)sum + scratch;
  }
  g->memory.arena = place(items, n, placed);
done:
  free(items);
  free(placed);
  free(live);
  free(transient);
}

/* Reordered constant weights; one copy serves all ops that read them alike. */
static void add_copy(fd_graph *g, const struct fd_node *node) {
  size_t bytes = g->ctx->backend->kept_bytes(g->ctx, node->op, node->args);
  struct fd_value *w = NULL; /* the largest constant: the others are biases and norms */
  for (int s = 0; s < fd_op_info(node->op)->n_slots; s++) {
    struct fd_value *x = node->slot[s] ? fd_graph_base(g, node->slot[s]) : NULL;
    if (x && (x->t.flags & FD_T_CONST) && (!w || fd_tensor_numel(&x->t) > fd_tensor_numel(&w->t))) w = x;
  }
  if (!bytes || !w || w->copy_bytes == bytes) return;
  w->copy_bytes = bytes;
  g->memory.copies += bytes;
}

static void prepare(fd_graph *g) {
  fd_ctx *ctx = g->ctx;
  for (int i = 0; i < g->n_nodes && fd_graph_ok(g); i++) {
    struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    fd_tensor **slots = fd_op_slots(node->args);
    for (int s = 0; s < info->n_slots; s++) slots[s] = node->slot[s] ? &g->values[node->slot[s]]->t : NULL;
    fd_status st = ctx->backend->prepare ? ctx->backend->prepare(ctx, node->op, node->args, &node->scratch_bytes) : FD_OK;
    if (st == FD_OK && ctx->backend->kept_bytes) add_copy(g, node);
    if (st != FD_OK) fd_graph_fail(g, st, "op %d (%s)%s%s: %s", i, info->name, *node->phase ? " of " : "", node->phase, fd_status_message());
  }
}

fd_status fd_graph_plan(fd_graph *g, size_t *arena_bytes) {
  if (fd_graph_ok(g) && g->planned) fd_graph_fail(g, FD_ERR_ARG, "planned twice");
  if (fd_graph_ok(g) && g->open_segment >= 0) fd_graph_fail(g, FD_ERR_ARG, "a recompute segment has no end");
  if (fd_graph_ok(g)) drop_unread(g);
  if (fd_graph_ok(g)) prepare(g);
  if (fd_graph_ok(g)) {
    lifetimes(g);
    work_in_place(g);
    assign(g);
  }
  if (!fd_graph_ok(g)) return fd_graph_status(g);
  g->planned = true;
  *arena_bytes = g->memory.arena;
  return FD_OK;
}
