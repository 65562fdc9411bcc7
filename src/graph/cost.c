// SPDX-License-Identifier: Apache-2.0
// What ops cost: floating-point operations of matrix products (a multiply-add is two), and bytes they move at least.
// Counts at capacity; attention's keys at max_k, halved if causal.
#include <string.h>

#include "graph/internal.h"

static double elements(const fd_tensor *t) { return t ? (double)fd_tensor_numel(t) : 0; }

static double conv_flop(const fd_tensor *y, const fd_tensor *w) {
  double out = (double)w->shape[0];
  return out > 0 ? 2 * elements(y) * elements(w) / out : 0;
}

/* pairs of query and key, times heads and head size: one product of [rows, E] with [E, keys] per head */
static double attention_product(const fd_tensor *q, const fd_tensor *ranges, int64_t max_q, int64_t max_k, int causal, int64_t window) {
  double rows = (double)ranges->shape[0] * (double)max_q, all = (double)q->shape[0], keys = (double)max_k;
  if (rows > all) rows = all;
  if (causal) keys = (keys + 1) / 2;
  if (window > 0 && keys > (double)window) keys = (double)window;
  double width = q->shape[0] ? elements(q) / (double)q->shape[0] : 0;
  return 2 * rows * keys * width;
}

void fd_op_cost(enum fd_op op, const void *args, double *flop, double *bytes) {
  const struct fd_op_info *info = fd_op_info(op);
  fd_tensor *const *slot = args;
  unsigned acc = *fd_op_acc(op, (void *)(uintptr_t)args);
  double moved = 0, work = 0;
  for (int s = 0; s < info->n_slots; s++) {
    if (!slot[s]) continue;
    bool twice = info->dir[s] == 'b' || acc >> s & 1;
    moved += (double)fd_tensor_bytes(slot[s]) * (twice ? 2 : 1);
  }
  switch (op) {
    case FD_OP_matmul: {
      const struct fd_matmul_args *a = args;
      double K = (double)(a->trans_a ? fd_tensor_rows(a->a) : fd_tensor_cols(a->a));
      work = 2 * elements(a->c) * K;
      break;
    }
    case FD_OP_conv2d_fwd: {
      const struct fd_conv2d_fwd_args *a = args;
      work = conv_flop(a->y, a->w);
      break;
    }
    case FD_OP_conv2d_bwd_data: {
      const struct fd_conv2d_bwd_data_args *a = args;
      work = conv_flop(a->dy, a->w);
      break;
    }
    case FD_OP_conv2d_bwd_weights: {
      const struct fd_conv2d_bwd_weights_args *a = args;
      work = conv_flop(a->dy, a->dw);
      break;
    }
    case FD_OP_attention_fwd: { /* scores and values */
      const struct fd_attention_fwd_args *a = args;
      work = 2 * attention_product(a->q, a->ranges, a->max_q, a->max_k, a->causal, a->window);
      break;
    }
    case FD_OP_attention_bwd: { /* scores again, dv, dp, dq, dk */
      const struct fd_attention_bwd_args *a = args;
      work = 5 * attention_product(a->q, a->ranges, a->max_q, a->max_k, a->causal, a->window);
      break;
    }
    case FD_OP_embed_fwd: { /* not the whole table */
      const struct fd_embed_fwd_args *a = args;
      moved += 2 * (double)fd_tensor_bytes(a->y) - (double)fd_tensor_bytes(a->table) - (double)fd_tensor_bytes(a->y);
      break;
    }
    case FD_OP_embed_bwd: { /* the rows that are named; the whole table only where it is cleared first */
      const struct fd_embed_bwd_args *a = args;
      moved += 2 * elements(a->dy) * 4 - (acc >> 3 & 1 ? 2 * (double)fd_tensor_bytes(a->dtable) : 0);
      break;
    }
    case FD_OP_gate_residual_bwd: { /* a is read for the gate's gradient only */
      const struct fd_gate_residual_bwd_args *a = args;
      if (!a->dmod) moved -= (double)fd_tensor_bytes(a->a);
      break;
    }
    case FD_OP_adamw: { /* the copy is written only */
      const struct fd_adamw_args *a = args;
      if (a->compute) moved -= (double)fd_tensor_bytes(a->compute);
      if (a->keep_g) moved -= (double)fd_tensor_bytes(a->g);
      break;
    }
    default: break;
  }
  if (flop) *flop = work;
  if (bytes) *bytes = moved;
}

double fd_graph_flop(const fd_graph *g, const char *phase) {
  double sum = 0;
  for (int i = 0; i < g->n_nodes; i++) {
    const struct fd_node *node = &g->nodes[i];
    if (phase && strcmp(phase, node->phase) != 0) continue;
    _Alignas(16) char args[FD_OP_ARGS_MAX]; /* before planning the slots are not filled yet */
    memcpy(args, node->args, FD_OP_ARGS_MAX);
    for (int s = 0; s < fd_op_info(node->op)->n_slots; s++) fd_op_slots(args)[s] = node->slot[s] ? &g->values[node->slot[s]]->t : NULL;
    double flop;
    fd_op_cost(node->op, args, &flop, NULL);
    sum += flop;
  }
  return sum;
}
