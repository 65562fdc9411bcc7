// SPDX-License-Identifier: Apache-2.0
// Running: args structs point to their values since the plan and get their memory once, in attach; nothing is made here.
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "comm/comm.h"
#include "graph/internal.h"

fd_status fd_graph_attach(fd_graph *g, void *arena, size_t bytes) {
  if (!fd_graph_ok(g)) return fd_graph_status(g);
  if (!g->planned) return FD_FAIL(FD_ERR_ARG, "graph %s: attached before it was planned", g->name);
  if (bytes < g->memory.arena)
    return FD_FAIL(FD_ERR_ARG, "graph %s: an arena of %zu bytes, the plan needs %zu", g->name, bytes, g->memory.arena);
  if ((uintptr_t)arena % 64) return FD_FAIL(FD_ERR_ARG, "graph %s: the arena is not aligned to 64 bytes", g->name);
  fd_graph_drop_recordings(g); /* they hold addresses */
  g->arena = arena;
  for (int v = 1; v < g->n_values; v++) {
    struct fd_value *x = g->values[v];
    const struct fd_value *b = fd_graph_base(g, v);
    if (b->kind == FD_VALUE_EXTERNAL || b->first < 0) continue;
    x->t.data = g->arena + g->values[b->store]->at + x->offset;
  }
  g->ready = false;
  return FD_OK;
}

static fd_status check_copy(fd_graph *g, const char *what, fd_var v, size_t bytes) {
  if (!fd_graph_ok(g)) return fd_graph_status(g);
  if (v < 1 || v >= g->n_values) return FD_FAIL(FD_ERR_ARG, "graph %s: %s of value %d, which does not exist", g->name, what, v);
  const struct fd_value *b = fd_graph_base(g, v);
  if (b->kind == FD_VALUE_TENSOR && !b->keep)
    return FD_FAIL(FD_ERR_ARG, "graph %s: %s of %s, which is not kept", g->name, what, fd_graph_text(g, v));
  if (bytes > fd_tensor_bytes(&g->values[v]->t))
    return FD_FAIL(FD_ERR_ARG, "graph %s: %s of %zu bytes, %s has %zu", g->name, what, bytes, fd_graph_text(g, v),
                   fd_tensor_bytes(&g->values[v]->t));
  if (bytes && !g->values[v]->t.data)
    return FD_FAIL(FD_ERR_ARG, "graph %s: %s of %s, which has no memory: %s", g->name, what, fd_graph_text(g, v),
                   b->kind == FD_VALUE_EXTERNAL ? "bind it first" : !g->arena ? "attach an arena first" : "no op uses it");
  return FD_OK;
}

fd_status fd_graph_set(fd_graph *g, fd_var v, const void *host, size_t bytes) {
  fd_status st = check_copy(g, "set", v, bytes);
  return st == FD_OK && bytes ? g->ctx->backend->to_device(g->ctx, g->values[v]->t.data, host, bytes) : st;
}

fd_status fd_graph_read(fd_graph *g, fd_var v, void *host, size_t bytes) {
  fd_status st = check_copy(g, "read", v, bytes);
  return st == FD_OK && bytes ? g->ctx->backend->from_device(g->ctx, host, g->values[v]->t.data, bytes) : st;
}

static fd_status check_ready(fd_graph *g) {
  if (!fd_graph_ok(g)) return fd_graph_status(g);
  if (!g->planned) return FD_FAIL(FD_ERR_ARG, "graph %s: run before it was planned", g->name);
  if (!g->arena && g->memory.arena) return FD_FAIL(FD_ERR_ARG, "graph %s: run before an arena was attached", g->name);
  for (int i = 0; i < g->n_nodes; i++) {
    const struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    for (int s = 0; s < info->n_slots; s++)
      if (node->slot[s] && !g->values[node->slot[s]]->t.data && fd_tensor_numel(&g->values[node->slot[s]]->t))
        return FD_FAIL(FD_ERR_ARG, "graph %s: op %d (%s): %s in slot %s is not bound", g->name, i, info->name,
                       fd_graph_text(g, node->slot[s]), info->slot[s]);
  }
  g->ready = true;
  return FD_OK;
}

/* ---- poison ---------------------------------------------------------------------------------------------------- */

void fd_graph_set_poison(fd_graph *g, bool on) { g->poison = on; }

static fd_status fill_nan(fd_graph *g, void *at, size_t bytes) {
  static unsigned char nan[1 << 16];
  fd_status st = FD_OK;
  if (!nan[0]) memset(nan, 0xff, sizeof nan); /* NaN in every float type, -1 in every integer */
  for (size_t done = 0; done < bytes && st == FD_OK; done += sizeof nan)
    st = g->ctx->backend->to_device(g->ctx, (char *)at + done, nan, bytes - done < sizeof nan ? bytes - done : sizeof nan);
  return st;
}

/* The values that begin (before op i) or end (after it). */
static fd_status poison(fd_graph *g, int i, bool after) {
  fd_status st = FD_OK;
  const struct fd_node *node = &g->nodes[i];
  if (!after) FD_TRY(fill_nan(g, g->arena + node->scratch_at, node->scratch_bytes));
  for (int s = 0; s < fd_op_info(node->op)->n_slots; s++) {
    if (!node->slot[s]) continue;
    const struct fd_value *b = fd_graph_base(g, node->slot[s]);
    if (b->kind != FD_VALUE_TENSOR) continue;
    const struct fd_value *store = g->values[b->store];
    if (after ? store->last == i : b == store && b->first == i) FD_TRY(fill_nan(g, store->t.data, fd_tensor_bytes(&store->t)));
  }
done:
  return st;
}

/* ---- run ------------------------------------------------------------------------------------------------------- */

static fd_status run_ops(fd_graph *g, int first, int last) {
  fd_status st = FD_OK;
  fd_ctx *ctx = g->ctx;
  for (int i = first; i < last; i++) {
    const struct fd_node *node = &g->nodes[i];
    if (g->poison) FD_TRY(poison(g, i, false));
    ctx->scratch = node->scratch_bytes ? g->arena + node->scratch_at : NULL;
    ctx->scratch_bytes = node->scratch_bytes;
    st = fd_op_run(ctx, node->op, node->args);
    if (st != FD_OK) {
      fd_fail_in(st, "graph %s: op %d (%s)%s%s", g->name, i, fd_op_info(node->op)->name, *node->phase ? " of " : "", node->phase);
      goto done;
    }
    if (ctx->comm) FD_TRY(fd_comm_progress(ctx->comm));
    if (g->poison) FD_TRY(poison(g, i, true));
  }
done:
  return st;
}

void fd_graph_drop_recordings(fd_graph *g) {
  for (int i = 0; i < g->n_recordings; i++)
    if (g->recordings[i].what) g->ctx->backend->record_free(g->ctx, &g->recordings[i].what);
  g->n_recordings = 0;
}

/* The recording of these ops that fits, or where a new one goes; NULL: no more are kept. *seen: the ops ran before. */
static struct fd_recording *find_recording(fd_graph *g, int first, int last, bool *seen) {
  struct fd_recording *empty = NULL;
  *seen = false;
  for (int i = 0; i < g->n_recordings; i++) {
    struct fd_recording *r = &g->recordings[i];
    if (r->first != first || r->last != last) continue;
    *seen = true;
    if (!r->what) empty = r;
    else if (g->ctx->backend->record_fits(g->ctx, r->what)) return r;
  }
  if (empty || g->n_recordings == FD_GRAPH_RECORDINGS) return empty;
  empty = &g->recordings[g->n_recordings++];
  *empty = (struct fd_recording){.first = first, .last = last};
  return empty;
}

/* A library that refuses to be recorded costs speed, not the run: it is said once, and nothing was executed. */
static void record(fd_graph *g, struct fd_recording *r) {
  fd_ctx *ctx = g->ctx;
  char why[1024] = "";
  fd_status st = ctx->backend->record_begin(ctx);
  if (st == FD_OK) {
    st = run_ops(g, r->first, r->last);
    if (st != FD_OK) snprintf(why, sizeof why, "%s", fd_status_message());
    const fd_status end = ctx->backend->record_end(ctx, st == FD_OK ? &r->what : NULL);
    if (st == FD_OK) st = end;
  }
  if (st == FD_OK) return;
  fd_log_warn("graph %s: its ops cannot be recorded, so each step issues them one by one (as with trainer.cuda_graph = false): %s", g->name,
              *why ? why : fd_status_message());
  ctx->record = false;
}

/* What is not recorded: everything where someone looks at each op; and sums between ranks, since NCCL wants all ranks to record the same sum at the
 * same time and to launch what came of that, while each rank's own counts decide when it records and what it launches. */
static bool is_issued(const fd_graph *g, int i) {
  if (!g->ctx->record || g->poison || fd_op_hooked()) return true;
  switch (g->nodes[i].op) {
    case FD_OP_reduce_start:
    case FD_OP_reduce_scatter_start:
    case FD_OP_all_gather_start:
    case FD_OP_reduce_wait: return fd_comm_size(g->ctx->comm) > 1;
    default: return false;
  }
}

static fd_status run_recorded(fd_graph *g, int first, int last) {
  bool seen;
  struct fd_recording *r = find_recording(g, first, last, &seen);
  /* the first time libraries load what they need, which cannot be recorded */
  if (!r || !seen) return run_ops(g, first, last);
  if (!r->what) record(g, r);
  return r->what ? g->ctx->backend->replay(g->ctx, r->what) : run_ops(g, first, last);
}

fd_status fd_graph_run_nodes(fd_graph *g, int first, int last) {
  fd_status st = FD_OK;
  fd_ctx *ctx = g->ctx;
  if (!g->ready) FD_TRY(check_ready(g));
  if (first < 0 || last > g->n_nodes)
    FD_TRY(FD_FAIL(FD_ERR_ARG, "graph %s: ops [%d, %d) of %d", g->name, first, last, g->n_nodes));
  for (int i = first, end; i < last; i = end) {
    const bool issued = is_issued(g, i);
    for (end = i + 1; end < last && is_issued(g, end) == issued;) end++;
    FD_TRY(issued ? run_ops(g, i, end) : run_recorded(g, i, end));
  }
  if (ctx->backend->join) FD_TRY(ctx->backend->join(ctx));
done:
  return st;
}

fd_status fd_graph_run(fd_graph *g) { return fd_graph_run_nodes(g, 0, g->n_nodes); }
