// SPDX-License-Identifier: Apache-2.0
// Automatic differentiation: one backward builder per op, in a table; and where gradients of several consumers meet.
//
// The gradient of a value lives at its base (views have a view of it). A gradient that passes an op unchanged is an alias,
// not a copy; `refs` of the memory counts whose gradient it is, and nothing is added in place while it is more than one.
// Ops are walked from the last to the first, so a value's gradient is complete when the op that made it is reached.
#include <stdlib.h>
#include <string.h>

#include "graph/internal.h"

#define MAX_PENDING 8

struct bw {
  fd_graph *g;
  int n_nodes, n_values; /* of the forward part */
  fd_var *grad;          /* of each base; 0: none yet */
  bool *open;            /* an op that is being built writes this gradient */
  bool *needs;           /* base: something wanted leads to it */
  bool *reached;         /* base: it leads to an output */
  bool *empty;           /* external gradient: what it holds does not count, and nothing was written to it yet */
  fd_var *fresh;         /* base: recomputed value, 0: the original is there */
  bool *active;          /* node */
  int n_pending;
  struct {
    fd_var from, to;
  } pending[MAX_PENDING];
  /* the node at hand */
  const struct fd_node *node;
  fd_var in[FD_MAX_SLOTS]; /* its values as backward sees them (recomputed ones in the place of dropped ones) */
};

static fd_var base_of(const struct bw *b, fd_var v) { return b->g->values[v]->base; }
static bool needs(const struct bw *b, fd_var v) { return v && b->needs[base_of(b, v)]; }

/* ---- small ops that gradients need ----------------------------------------------------------------------------- */

static fd_var like(fd_graph *g, fd_var v) {
  const fd_tensor *t = fd_graph_get(g, v);
  return fd_graph_tensor(g, t->dtype, t->ndim, t->shape);
}

static void emit_cast(fd_graph *g, fd_var from, fd_var to) {
  fd_graph_emit(g, FD_OP_cast, &(struct fd_cast_args){0}, (fd_var[]){from, to});
}

/* The gradient of `base` is an external one that is to be overwritten now. */
static bool take_empty(struct bw *b, fd_var base) {
  const fd_var want = b->g->values[base]->want;
  const bool empty = want && b->empty[want];
  if (empty) b->empty[want] = false;
  return empty;
}

static void emit_zero(fd_graph *g, fd_var v) { fd_graph_emit(g, FD_OP_fill, &(struct fd_fill_args){.value = 0}, (fd_var[]){v}); }

static fd_var shaped(fd_graph *g, fd_var v, fd_var as) {
  const fd_tensor *t = fd_graph_get(g, as);
  return v ? fd_graph_view(g, v, t->ndim, t->shape) : 0;
}

/* ---- where gradients meet -------------------------------------------------------------------------------------- */

/** The complete gradient of an output of the node at hand, in its shape; 0 if nothing flows into it. */
static fd_var grad_of(struct bw *b, fd_var y) { return y ? shaped(b->g, b->grad[base_of(b, y)], y) : 0; }

static fd_dtype type_of(struct bw *b, fd_var v) { return fd_graph_get(b->g, v)->dtype; }

/** A gradient in the type of x. */
static fd_var in_type_of(struct bw *b, fd_var c, fd_var x) {
  const fd_tensor *t = fd_graph_get(b->g, c);
  if (!fd_graph_ok(b->g) || t->dtype == type_of(b, x)) return c;
  const fd_var y = fd_graph_tensor(b->g, type_of(b, x), t->ndim, t->shape);
  emit_cast(b->g, c, y);
  return y;
}

static fd_var grad_or_zero(struct bw *b, fd_var y) {
  fd_var dy = grad_of(b, y);
  if (dy) return dy;
  dy = like(b->g, y);
  emit_zero(b->g, dy);
  return dy;
}

static bool differentiable_view(struct bw *b, fd_var x) {
  fd_graph *g = b->g;
  if (!g->values[x]->rows) return true;
  fd_graph_fail(g, FD_ERR_UNSUPPORTED, "%s: the gradient of %s, a view of some rows of %s, is not built", fd_op_info(b->node->op)->name,
                fd_graph_text(g, x), fd_graph_text(g, base_of(b, x)));
  return false;
}

/* Only leaves may have a gradient of another type: f32 for weights in bf16. */
static bool any_type(struct bw *b, fd_var base) { return b->g->values[base]->n_writes == 0; }

/* Make the gradient of `base` safe to add to. */
static void unshare(struct bw *b, fd_var base) {
  fd_graph *g = b->g;
  fd_var old = b->grad[base];
  if (fd_graph_base(g, old)->refs <= 1) return;
  fd_var own = like(g, old);
  emit_cast(g, old, own);
  if (!fd_graph_ok(g)) return;
  fd_graph_base(g, old)->refs--;
  fd_graph_base(g, own)->refs = 1;
  b->grad[base] = own;
}

/** Add c, complete and of as many elements, to the gradient of x: as an alias if it is the first. */
static void contribute(struct bw *b, fd_var x, fd_var c) {
  fd_graph *g = b->g;
  if (!fd_graph_ok(g) || !c || !needs(b, x) || !differentiable_view(b, x)) return;
  fd_var base = base_of(b, x), r = b->grad[base];
  fd_dtype have = fd_graph_get(g, c)->dtype, wanted = fd_graph_get(g, base)->dtype;
  if (r) wanted = fd_graph_get(g, r)->dtype;
  else if (any_type(b, base) && have == FD_F32) wanted = FD_F32;
  c = shaped(g, c, base);
  if (!r && have != wanted) {
    r = fd_graph_tensor(g, wanted, fd_graph_get(g, c)->ndim, fd_graph_get(g, c)->shape);
    emit_cast(g, c, r);
    c = r;
    r = 0;
  }
  if (!fd_graph_ok(g)) return;
  if (!r) {
    b->grad[base] = c;
    fd_graph_base(g, c)->refs++;
    return;
  }
  unshare(b, base);
  fd_graph_emit(g, FD_OP_cast, &(struct fd_cast_args){.acc = take_empty(b, base) ? 0 : SLOT_BIT(cast, y)}, (fd_var[]){c, b->grad[base]});
}

enum {
  OVERWRITES = 1, /* the op has no acc */
  PARTIAL = 2,    /* the op touches a part only, always adding */
  OR_F32 = 4      /* the op can write f32 instead of `dtype` */
};

/** Where the node's backward op writes the gradient of x, as `slot`, in `dtype` or f32 if it has OR_F32. Sets the slot's bit in
 *  *acc if it is to add. 0 if x needs no gradient. The op must be emitted, and `done` called, before the next contribute. */
static fd_var target(struct bw *b, fd_var x, fd_dtype dtype, int flags, unsigned *acc, int slot) {
  fd_graph *g = b->g;
  if (!fd_graph_ok(g) || !needs(b, x) || !differentiable_view(b, x)) return 0;
  fd_var base = base_of(b, x);
  const fd_tensor *tb = fd_graph_get(g, base), *tx = fd_graph_get(g, x);
  if (!b->grad[base] && (dtype == tb->dtype || any_type(b, base))) {
    fd_var v = fd_graph_tensor(g, dtype, tb->ndim, tb->shape);
    if (!v) return 0;
    fd_graph_base(g, v)->refs = 1;
    b->grad[base] = v;
    b->open[base] = true;
    b->pending[b->n_pending].from = 0;
    b->pending[b->n_pending++].to = base;
    if (flags & PARTIAL) {
      emit_zero(g, v);
      *acc |= 1u << slot;
    }
    return shaped(g, v, x);
  }
  fd_dtype have = b->grad[base] ? fd_graph_get(g, b->grad[base])->dtype : FD_DTYPE_COUNT;
  if (b->grad[base] && (have == dtype || (have == FD_F32 && flags & OR_F32)) && !b->open[base] && !(flags & OVERWRITES)) {
    unshare(b, base);
    const bool empty = take_empty(b, base);
    if (empty && flags & PARTIAL) emit_zero(g, b->grad[base]);
    if (!empty || flags & PARTIAL) *acc |= 1u << slot;
    b->open[base] = true;
    b->pending[b->n_pending].from = 0;
    b->pending[b->n_pending++].to = base;
    return shaped(g, b->grad[base], x);
  }
  fd_var v = fd_graph_tensor(g, dtype, tx->ndim, tx->shape);
  if (flags & PARTIAL) {
    emit_zero(g, v);
    *acc |= 1u << slot;
  }
  b->pending[b->n_pending].from = v;
  b->pending[b->n_pending++].to = x;
  return v;
}

/** The same for an output slot that the op insists on: memory that nobody reads if x needs no gradient. */
static fd_var target_or_dummy(struct bw *b, fd_var x, fd_dtype dtype, unsigned *acc, int slot) {
  fd_var v = target(b, x, dtype, 0, acc, slot);
  return v || !fd_graph_ok(b->g) ? v : fd_graph_tensor(b->g, dtype, fd_graph_get(b->g, x)->ndim, fd_graph_get(b->g, x)->shape);
}

/** The ops that write the open targets are emitted. */
static void done(struct bw *b) {
  int n = b->n_pending;
  b->n_pending = 0;
  for (int i = 0; i < n; i++)
    if (!b->pending[i].from) b->open[b->pending[i].to] = false;
  for (int i = 0; i < n; i++)
    if (b->pending[i].from) contribute(b, b->pending[i].to, b->pending[i].from);
}

/* ---- one builder per op ------------------------------------------------------------------------------------------ */
/* X(s): the node's value in slot s, for its gradient. IN(s): the same as data. ARGS: the node's scalars. */

#define X(op, member) (b->node->slot[SLOT(op, member)])
#define IN(op, member) (b->in[SLOT(op, member)])
#define ARGS(op) const struct fd_##op##_args *f = b->node->args

static void matmul_bwd(struct bw *b) {
  ARGS(matmul);
  fd_graph *g = b->g;
  fd_var dc = grad_of(b, X(matmul, c)), av = X(matmul, a), bv = X(matmul, b), count = IN(matmul, count);
  const fd_tensor *c = fd_graph_get(g, X(matmul, c));
  FD_WANT_OR(, !(f->trans_a && f->trans_b && count), "matmul: backward of two transposed matrices with a count is not built");
  if (needs(b, X(matmul, bias))) {
    struct fd_colsum_args args = {0};
    fd_var db = target(b, X(matmul, bias), FD_F32, 0, &args.acc, SLOT(colsum, y));
    fd_graph_emit(g, FD_OP_colsum, &args, (fd_var[]){dc, f->trans_a ? 0 : count, db});
    done(b);
  }
  if (!needs(b, av) && !needs(b, bv)) return;
  if (type_of(b, dc) != type_of(b, av)) { /* c was asked for in f32 */
    fd_var as_a = fd_graph_tensor(g, type_of(b, av), c->ndim, c->shape);
    emit_cast(g, dc, as_a);
    dc = as_a;
  }
  if (needs(b, av)) {
    struct fd_matmul_args args = {0};
    fd_var da = target(b, av, type_of(b, av), OR_F32, &args.acc, SLOT(matmul, c));
    if (!f->trans_a) { /* da = dc op(b)^T */
      args.trans_b = !f->trans_b;
      fd_graph_emit(g, FD_OP_matmul, &args, (fd_var[]){dc, IN(matmul, b), 0, count, da});
    } else { /* da [K, M] = op(b) dc^T */
      args.trans_a = f->trans_b;
      args.trans_b = 1;
      fd_graph_emit(g, FD_OP_matmul, &args, (fd_var[]){IN(matmul, b), dc, 0, count, da});
    }
    done(b);
  }
  if (needs(b, bv)) {
    struct fd_matmul_args args = {0};
    fd_var db = target(b, bv, any_type(b, base_of(b, bv)) ? FD_F32 : type_of(b, bv), OR_F32, &args.acc, SLOT(matmul, c));
    if (f->trans_b) { /* db [N, K] = dc^T op(a) */
      args.trans_a = 1;
      args.trans_b = f->trans_a;
      fd_graph_emit(g, FD_OP_matmul, &args, (fd_var[]){dc, IN(matmul, a), 0, count, db});
    } else { /* db [K, N] = op(a)^T dc */
      args.trans_a = !f->trans_a;
      fd_graph_emit(g, FD_OP_matmul, &args, (fd_var[]){IN(matmul, a), dc, 0, count, db});
    }
    done(b);
  }
}

static void add_bwd(struct bw *b) {
  fd_graph *g = b->g;
  fd_var dz = grad_of(b, X(add_fwd, z)), x = X(add_fwd, x), y = X(add_fwd, y);
  int64_t nx = fd_tensor_numel(fd_graph_get(g, x)), ny = fd_tensor_numel(fd_graph_get(g, y));
  if (nx == ny) {
    contribute(b, y, dz);
  } else if (needs(b, y)) {
    struct fd_colsum_args args = {0};
    fd_var dy = target(b, y, FD_F32, 0, &args.acc, SLOT(colsum, y));
    fd_graph_emit(g, FD_OP_colsum, &args, (fd_var[]){dz, IN(add_fwd, count), dy});
    done(b);
  }
  contribute(b, x, dz);
}

static void act_bwd(struct bw *b) {
  ARGS(act_fwd);
  struct fd_act_bwd_args args = {.act = f->act};
  fd_var dx = target(b, X(act_fwd, x), type_of(b, X(act_fwd, x)), 0, &args.acc, SLOT(act_bwd, dx));
  fd_graph_emit(b->g, FD_OP_act_bwd, &args, (fd_var[]){grad_of(b, X(act_fwd, y)), IN(act_fwd, x), IN(act_fwd, count), dx});
}

static void geglu_bwd(struct bw *b) {
  ARGS(geglu_fwd);
  struct fd_geglu_bwd_args args = {.act = f->act};
  fd_var dx = target(b, X(geglu_fwd, gate_up), type_of(b, X(geglu_fwd, gate_up)), 0, &args.acc, SLOT(geglu_bwd, dgate_up));
  fd_graph_emit(b->g, FD_OP_geglu_bwd, &args, (fd_var[]){grad_of(b, X(geglu_fwd, y)), IN(geglu_fwd, gate_up), IN(geglu_fwd, count), dx});
}

static void rmsnorm_bwd(struct bw *b) {
  ARGS(rmsnorm_fwd);
  struct fd_rmsnorm_bwd_args args = {.eps = f->eps, .rows_per_mod = f->rows_per_mod, .shift_col = f->shift_col, .scale_col = f->scale_col};
  fd_var x = X(rmsnorm_fwd, x), mod = X(rmsnorm_fwd, mod), dy = in_type_of(b, grad_of(b, X(rmsnorm_fwd, y)), x);
  fd_var dmod = mod ? target(b, mod, type_of(b, mod), PARTIAL, &args.acc, SLOT(rmsnorm_bwd, dmod)) : 0;
  fd_var dw = target(b, X(rmsnorm_fwd, w), FD_F32, 0, &args.acc, SLOT(rmsnorm_bwd, dw));
  fd_var dx = target_or_dummy(b, x, type_of(b, x), &args.acc, SLOT(rmsnorm_bwd, dx));
  fd_graph_emit(b->g, FD_OP_rmsnorm_bwd, &args,
                (fd_var[]){dy, IN(rmsnorm_fwd, x), IN(rmsnorm_fwd, w), IN(rmsnorm_fwd, rstd), IN(rmsnorm_fwd, mod),
                           IN(rmsnorm_fwd, count), dx, dw, dmod});
}

static void gate_residual_bwd(struct bw *b) {
  ARGS(gate_residual_fwd);
  fd_var dy = grad_of(b, X(gate_residual_fwd, y)), a = X(gate_residual_fwd, a), mod = X(gate_residual_fwd, mod);
  if (!mod) {
    contribute(b, a, dy);
  } else if (needs(b, a) || needs(b, mod)) {
    struct fd_gate_residual_bwd_args args = {.rows_per_mod = f->rows_per_mod, .gate_col = f->gate_col};
    fd_var dmod = target(b, mod, type_of(b, mod), PARTIAL, &args.acc, SLOT(gate_residual_bwd, dmod));
    fd_var da = target_or_dummy(b, a, type_of(b, a), &args.acc, SLOT(gate_residual_bwd, da));
    fd_graph_emit(b->g, FD_OP_gate_residual_bwd, &args,
                  (fd_var[]){dy, IN(gate_residual_fwd, a), IN(gate_residual_fwd, mod), IN(gate_residual_fwd, count), da, dmod});
    done(b);
  }
  contribute(b, X(gate_residual_fwd, x), dy); /* last: what reads dy above is emitted before anything adds to it */
}

static void heads_bwd(struct bw *b) {
  ARGS(heads_fwd);
  struct fd_heads_bwd_args args = {.B = f->B, .N = f->N, .L = f->L, .A = f->A, .K = f->K, .E = f->E, .eps = f->eps};
  fd_var qkv = X(heads_fwd, qkv), text_kv = X(heads_fwd, text_kv);
  fd_var dq = grad_or_zero(b, X(heads_fwd, q)), dk = grad_or_zero(b, X(heads_fwd, k)), dv = grad_or_zero(b, X(heads_fwd, v));
  fd_var dtext = text_kv ? target(b, text_kv, type_of(b, text_kv), 0, &args.acc, SLOT(heads_bwd, dtext_kv)) : 0;
  fd_var dqn = target(b, X(heads_fwd, q_norm), FD_F32, 0, &args.acc, SLOT(heads_bwd, dq_norm));
  fd_var dkn = target(b, X(heads_fwd, k_norm), FD_F32, 0, &args.acc, SLOT(heads_bwd, dk_norm));
  fd_var dqkv = target_or_dummy(b, qkv, type_of(b, qkv), &args.acc, SLOT(heads_bwd, dqkv));
  fd_graph_emit(b->g, FD_OP_heads_bwd, &args,
                (fd_var[]){dq, dk, dv, IN(heads_fwd, qkv), IN(heads_fwd, text_kv), IN(heads_fwd, q_norm), IN(heads_fwd, k_norm),
                           IN(heads_fwd, rope), IN(heads_fwd, pos), IN(heads_fwd, text), IN(heads_fwd, count), IN(heads_fwd, q_rstd),
                           IN(heads_fwd, k_rstd), dqkv, dtext, dqn, dkn});
}

static void attention_bwd(struct bw *b) {
  ARGS(attention_fwd);
  struct fd_attention_bwd_args args = {.A = f->A, .K = f->K, .E = f->E, .scale = f->scale, .causal = f->causal, .window = f->window,
                                       .softcap = f->softcap, .max_q = f->max_q, .max_k = f->max_k, .q_stride = f->q_stride,
                                       .k_stride = f->k_stride};
  fd_var q = X(attention_fwd, q), k = X(attention_fwd, k), v = X(attention_fwd, v);
  fd_var dq = target_or_dummy(b, q, type_of(b, q), &args.acc, SLOT(attention_bwd, dq));
  fd_var dk = target_or_dummy(b, k, type_of(b, k), &args.acc, SLOT(attention_bwd, dk));
  fd_var dv = target_or_dummy(b, v, type_of(b, v), &args.acc, SLOT(attention_bwd, dv));
  fd_graph_emit(b->g, FD_OP_attention_bwd, &args,
                (fd_var[]){grad_of(b, X(attention_fwd, o)), IN(attention_fwd, q), IN(attention_fwd, k), IN(attention_fwd, v),
                           IN(attention_fwd, o), IN(attention_fwd, lse), IN(attention_fwd, ranges), dq, dk, dv});
}

static void embed_bwd(struct bw *b) {
  ARGS(embed_fwd);
  struct fd_embed_bwd_args args = {.scale = f->scale, .padding_idx = f->padding_idx};
  fd_var dtable = target(b, X(embed_fwd, table), FD_F32, PARTIAL, &args.acc, SLOT(embed_bwd, dtable));
  fd_graph_emit(b->g, FD_OP_embed_bwd, &args, (fd_var[]){grad_of(b, X(embed_fwd, y)), IN(embed_fwd, ids), IN(embed_fwd, count), dtable});
}

static void conv2d_bwd(struct bw *b) {
  ARGS(conv2d_fwd);
  fd_graph *g = b->g;
  fd_var dy = grad_of(b, X(conv2d_fwd, y)), x = X(conv2d_fwd, x), w = X(conv2d_fwd, w), bias = X(conv2d_fwd, bias);
  if (needs(b, x)) {
    struct fd_conv2d_bwd_data_args args = {.stride = f->stride, .pad_top = f->pad_top, .pad_left = f->pad_left, .pad_bottom = f->pad_bottom,
                                           .pad_right = f->pad_right};
    fd_var dx = target(b, x, type_of(b, x), 0, &args.acc, SLOT(conv2d_bwd_data, dx));
    fd_graph_emit(g, FD_OP_conv2d_bwd_data, &args, (fd_var[]){dy, IN(conv2d_fwd, w), dx});
    done(b);
  }
  if (needs(b, w)) {
    struct fd_conv2d_bwd_weights_args args = {.stride = f->stride, .pad_top = f->pad_top, .pad_left = f->pad_left,
                                              .pad_bottom = f->pad_bottom, .pad_right = f->pad_right};
    fd_var dw = target(b, w, FD_F32, 0, &args.acc, SLOT(conv2d_bwd_weights, dw));
    fd_var db = target(b, bias, FD_F32, 0, &args.acc, SLOT(conv2d_bwd_weights, dbias));
    fd_graph_emit(g, FD_OP_conv2d_bwd_weights, &args, (fd_var[]){dy, IN(conv2d_fwd, x), dw, db});
    done(b);
  } else if (needs(b, bias)) {
    struct fd_colsum_args args = {0};
    fd_var db = target(b, bias, FD_F32, 0, &args.acc, SLOT(colsum, y));
    fd_graph_emit(g, FD_OP_colsum, &args, (fd_var[]){dy, 0, db});
    done(b);
  }
  contribute(b, X(conv2d_fwd, residual), dy);
}

static void groupnorm_bwd(struct bw *b) {
  ARGS(groupnorm_fwd);
  struct fd_groupnorm_bwd_args args = {.groups = f->groups, .eps = f->eps, .act = f->act};
  fd_var x = X(groupnorm_fwd, x);
  fd_var dw = target(b, X(groupnorm_fwd, w), FD_F32, 0, &args.acc, SLOT(groupnorm_bwd, dw));
  fd_var db = target(b, X(groupnorm_fwd, b), FD_F32, 0, &args.acc, SLOT(groupnorm_bwd, db));
  fd_var dx = target_or_dummy(b, x, type_of(b, x), &args.acc, SLOT(groupnorm_bwd, dx));
  fd_graph_emit(b->g, FD_OP_groupnorm_bwd, &args,
                (fd_var[]){grad_of(b, X(groupnorm_fwd, y)), IN(groupnorm_fwd, x), IN(groupnorm_fwd, w), IN(groupnorm_fwd, b),
                           IN(groupnorm_fwd, stats), dx, dw, db});
}

static void upsample2x_bwd(struct bw *b) {
  struct fd_upsample2x_bwd_args args = {0};
  fd_var dx = target(b, X(upsample2x_fwd, x), type_of(b, X(upsample2x_fwd, x)), 0, &args.acc, SLOT(upsample2x_bwd, dx));
  fd_graph_emit(b->g, FD_OP_upsample2x_bwd, &args, (fd_var[]){grad_of(b, X(upsample2x_fwd, y)), dx});
}

static void patchify_bwd(struct bw *b) {
  ARGS(patchify);
  struct fd_unpatchify_args args = {.P = f->P, .channel_last = f->channel_last};
  fd_var dx = target(b, X(patchify, x), type_of(b, X(patchify, x)), 0, &args.acc, SLOT(unpatchify, y));
  fd_graph_emit(b->g, FD_OP_unpatchify, &args, (fd_var[]){grad_of(b, X(patchify, y)), dx});
}

static void unpatchify_bwd(struct bw *b) {
  ARGS(unpatchify);
  struct fd_patchify_args args = {.P = f->P, .channel_last = f->channel_last};
  fd_var dx = target(b, X(unpatchify, x), type_of(b, X(unpatchify, x)), 0, &args.acc, SLOT(patchify, y));
  fd_graph_emit(b->g, FD_OP_patchify, &args, (fd_var[]){grad_of(b, X(unpatchify, y)), dx});
}

static void posterior_bwd(struct bw *b) {
  struct fd_posterior_bwd_args args = {0};
  fd_var moments = X(posterior_fwd, moments);
  fd_var dm = target(b, moments, type_of(b, moments), 0, &args.acc, SLOT(posterior_bwd, dmoments));
  fd_graph_emit(b->g, FD_OP_posterior_bwd, &args,
                (fd_var[]){grad_of(b, X(posterior_fwd, mean)), grad_of(b, X(posterior_fwd, logvar)), grad_of(b, X(posterior_fwd, latent)),
                           IN(posterior_fwd, moments), IN(posterior_fwd, noise), dm});
}

static void channel_affine_bwd(struct bw *b) { /* dx = dy * mul, or dy / mul */
  ARGS(channel_affine);
  fd_graph *g = b->g;
  struct fd_channel_affine_args args = {.inverse = f->inverse};
  fd_var zero = like(g, X(channel_affine, sub));
  emit_zero(g, zero);
  fd_var dx = target(b, X(channel_affine, x), type_of(b, X(channel_affine, x)), OVERWRITES | OR_F32, &args.acc, SLOT(channel_affine, y));
  fd_graph_emit(g, FD_OP_channel_affine, &args, (fd_var[]){grad_of(b, X(channel_affine, y)), zero, IN(channel_affine, mul), dx});
}

static void cast_bwd(struct bw *b) {
  fd_graph *g = b->g;
  fd_var x = X(cast, x), dy = grad_of(b, X(cast, y));
  FD_WANT_OR(, fd_tensor_numel(fd_graph_get(g, x)) == fd_tensor_numel(fd_graph_get(g, dy)), "cast: backward of a repeated value is not built");
  contribute(b, x, dy); /* converts as needed */
}

static void flow_loss_bwd(struct bw *b) {
  ARGS(flow_loss_fwd);
  struct fd_flow_loss_bwd_args args = {.precondition = f->precondition};
  fd_var out = X(flow_loss_fwd, out);
  fd_var dout = target(b, out, type_of(b, out), 0, &args.acc, SLOT(flow_loss_bwd, dout));
  fd_graph_emit(b->g, FD_OP_flow_loss_bwd, &args,
                (fd_var[]){grad_of(b, X(flow_loss_fwd, loss)), IN(flow_loss_fwd, out), IN(flow_loss_fwd, x), IN(flow_loss_fwd, noise),
                           IN(flow_loss_fwd, x_t), IN(flow_loss_fwd, sigma), IN(flow_loss_fwd, weight), dout});
}

/* An op that is no row here has no backward. `slots`: the inputs through which a gradient flows. */
static const struct {
  void (*build)(struct bw *b);
  const char *slots;
} table[FD_OP_COUNT] = {
    [FD_OP_matmul] = {matmul_bwd, "a b bias"},
    [FD_OP_add_fwd] = {add_bwd, "x y"},
    [FD_OP_act_fwd] = {act_bwd, "x"},
    [FD_OP_geglu_fwd] = {geglu_bwd, "gate_up"},
    [FD_OP_rmsnorm_fwd] = {rmsnorm_bwd, "x w mod"},
    [FD_OP_gate_residual_fwd] = {gate_residual_bwd, "x a mod"},
    [FD_OP_heads_fwd] = {heads_bwd, "qkv text_kv q_norm k_norm"},
    [FD_OP_attention_fwd] = {attention_bwd, "q k v"},
    [FD_OP_embed_fwd] = {embed_bwd, "table"},
    [FD_OP_conv2d_fwd] = {conv2d_bwd, "x w bias residual"},
    [FD_OP_groupnorm_fwd] = {groupnorm_bwd, "x w b"},
    [FD_OP_upsample2x_fwd] = {upsample2x_bwd, "x"},
    [FD_OP_patchify] = {patchify_bwd, "x"},
    [FD_OP_unpatchify] = {unpatchify_bwd, "x"},
    [FD_OP_posterior_fwd] = {posterior_bwd, "moments"},
    [FD_OP_channel_affine] = {channel_affine_bwd, "x"},
    [FD_OP_flow_loss_fwd] = {flow_loss_bwd, "out"},
    [FD_OP_cast] = {cast_bwd, "x"},
};

static bool listed(const char *slots, const char *slot) {
  size_t n = strlen(slot);
  for (const char *p = slots; p && *p; p += strcspn(p, " "), p += *p == ' ')
    if (strncmp(p, slot, n) == 0 && (p[n] == ' ' || !p[n])) return true;
  return false;
}

/* ---- recompute --------------------------------------------------------------------------------------------------- */

/* What backward reads in the place of v. */
static fd_var recomputed(struct bw *b, fd_var v) {
  fd_graph *g = b->g;
  if (!v || !b->fresh[base_of(b, v)]) return v;
  fd_var base = b->fresh[base_of(b, v)];
  const struct fd_value *x = g->values[v];
  if (x->kind != FD_VALUE_VIEW) return base;
  return fd_graph_view_at(g, base, x->offset, x->t.dtype, x->t.ndim, x->t.shape, x->rows);
}

/* Append the segment's ops again, writing fresh values, except those all of whose results are still there. */
static void recompute(struct bw *b, const struct fd_segment *seg, const bool *stays) {
  fd_graph *g = b->g;
  const char *phase = g->phase;
  bool any = false;
  for (int i = seg->first; i < seg->end; i++) any = any || b->active[i];
  if (!any) return;
  g->phase = "recompute";
  for (int i = seg->first; i < seg->end && fd_graph_ok(g); i++) {
    const struct fd_node node = g->nodes[i]; /* the list grows */
    const struct fd_op_info *info = fd_op_info(node.op);
    fd_var slot[FD_MAX_SLOTS] = {0};
    bool again = false;
    for (int s = 0; s < info->n_slots; s++)
      if (node.slot[s] && info->dir[s] == 'o' && !stays[base_of(b, node.slot[s])]) again = true;
    for (int s = 0; s < info->n_slots; s++)
      if (again && node.slot[s] && (info->dir[s] == 'b' || (info->dir[s] == 'o' && (*fd_op_acc(node.op, node.args) >> s & 1))))
        fd_graph_fail(g, FD_ERR_UNSUPPORTED, "%s: an op that changes a value (slot %s) cannot be recomputed", info->name, info->slot[s]);
    if (!again) continue;
    for (int s = 0; s < info->n_slots && fd_graph_ok(g); s++) {
      fd_var v = node.slot[s];
      if (!v) continue;
      if (info->dir[s] == 'i') {
        slot[s] = recomputed(b, v);
      } else if (stays[base_of(b, v)]) {
        slot[s] = info->optional[s] ? 0 : like(g, v); /* written for nobody */
      } else {
        if (!b->fresh[base_of(b, v)]) b->fresh[base_of(b, v)] = like(g, base_of(b, v));
        slot[s] = recomputed(b, v);
      }
    }
    fd_graph_emit(g, node.op, node.args, slot);
  }
  g->phase = phase;
}

/* ---- the walk ---------------------------------------------------------------------------------------------------- */

void fd_graph_on_grad_done(fd_graph *g, fd_graph_grad_done *f, void *user) {
  g->grad_done = f;
  g->grad_done_user = user;
}

void fd_graph_new_grads(fd_graph *g) { g->new_grads = true; }

void fd_graph_want_grad(fd_graph *g, fd_var v, fd_var grad) {
  if (!fd_graph_ok(g)) return;
  FD_WANT_OR(, v > 0 && v < g->n_values, "want_grad: value %d does not exist", v);
  FD_WANT_OR(, !g->differentiated, "want_grad: %s comes after fd_graph_backward", fd_graph_text(g, v));
  struct fd_value *b = fd_graph_base(g, v);
  FD_WANT_OR(, !g->values[v]->rows, "want_grad: %s is a view of some rows", fd_graph_text(g, v));
  FD_WANT_OR(, b->t.dtype == FD_F32 || b->t.dtype == FD_BF16, "want_grad: %s is neither f32 nor bf16", fd_graph_text(g, v));
  if (grad) {
    FD_WANT_OR(, grad < g->n_values, "want_grad: gradient %d of %s does not exist", grad, fd_graph_text(g, v));
    const fd_tensor *t = fd_graph_get(g, grad);
    FD_WANT_OR(, fd_graph_base(g, grad)->kind == FD_VALUE_EXTERNAL && t->dtype == FD_F32 && fd_tensor_numel(t) == fd_tensor_numel(&b->t),
               "want_grad: gradient %s of %s, wanted an external f32 value of as many elements", fd_graph_text(g, grad), fd_graph_text(g, v));
    FD_WANT_OR(, b->n_writes == 0, "want_grad: %s is the output of an op, it cannot have an external gradient", fd_graph_text(g, v));
  }
  b->wanted = true;
  b->want = grad;
}

fd_var fd_graph_grad(const fd_graph *g, fd_var v) {
  if (v < 1 || v >= g->n_values) return 0;
  return fd_graph_base(g, v)->grad;
}

static void find_active(struct bw *b, int n, const fd_var *out) {
  fd_graph *g = b->g;
  for (int v = 1; v < b->n_values; v++) b->needs[v] = g->values[v]->wanted;
  for (int i = 0; i < b->n_nodes; i++) {
    const struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    bool any = false;
    for (int s = 0; s < info->n_slots; s++)
      if (node->slot[s] && info->dir[s] != 'o' && needs(b, node->slot[s])) any = true;
    for (int s = 0; any && s < info->n_slots; s++)
      if (node->slot[s] && info->dir[s] != 'i') b->needs[base_of(b, node->slot[s])] = true;
  }
  for (int i = 0; i < n; i++) b->reached[base_of(b, out[i])] = true;
  for (int i = b->n_nodes - 1; i >= 0; i--) {
    const struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    bool in = false, to = false;
    for (int s = 0; s < info->n_slots; s++) {
      if (!node->slot[s]) continue;
      if (info->dir[s] != 'o' && needs(b, node->slot[s])) in = true;
      if (info->dir[s] != 'i' && b->reached[base_of(b, node->slot[s])]) to = true;
    }
    b->active[i] = in && to;
    for (int s = 0; b->active[i] && s < info->n_slots; s++)
      if (node->slot[s] && info->dir[s] != 'o' && needs(b, node->slot[s])) b->reached[base_of(b, node->slot[s])] = true;
  }
}

/* Can this op be differentiated as it is used? */
static void check_node(struct bw *b, const struct fd_node *node) {
  fd_graph *g = b->g;
  const struct fd_op_info *info = fd_op_info(node->op);
  if (!table[node->op].build) {
    fd_graph_fail(g, FD_ERR_UNSUPPORTED, "%s: this op has no backward, but a wanted gradient passes through it", info->name);
    return;
  }
  for (int s = 0; s < info->n_slots; s++) {
    fd_var v = node->slot[s];
    if (!v) continue;
    if (info->dir[s] == 'i' && needs(b, v) && !listed(table[node->op].slots, info->slot[s]))
      fd_graph_fail(g, FD_ERR_UNSUPPORTED, "%s: a gradient with respect to slot %s (%s) is not built", info->name, info->slot[s],
                    fd_graph_text(g, v));
    const struct fd_value *x = fd_graph_base(g, v);
    if (x->n_writes > (x->kind == FD_VALUE_TENSOR))
      fd_graph_fail(g, FD_ERR_UNSUPPORTED, "%s: slot %s (%s) is changed by another op, so it cannot be differentiated", info->name,
                    info->slot[s], fd_graph_text(g, v));
  }
}

static void call_grad_done(struct bw *b, fd_var grad) {
  fd_graph *g = b->g;
  const char *phase = g->phase;
  if (b->empty[grad]) emit_zero(g, grad); /* nothing was added */
  b->empty[grad] = false;
  if (g->grad_done && fd_graph_ok(g)) g->grad_done(g->grad_done_user, g, grad);
  g->phase = phase;
}

/* Append the backward of one op. The node is a copy, since the list grows. */
static void differentiate(struct bw *b, struct fd_node node) {
  fd_graph *g = b->g;
  const struct fd_op_info *info = fd_op_info(node.op);
  bool flows = false;
  check_node(b, &node);
  for (int s = 0; s < info->n_slots; s++)
    if (node.slot[s] && info->dir[s] == 'o' && b->grad[base_of(b, node.slot[s])]) flows = true;
  if (!flows || !fd_graph_ok(g)) return;
  b->node = &node;
  for (int s = 0; s < info->n_slots; s++) b->in[s] = recomputed(b, node.slot[s]);
  table[node.op].build(b);
  done(b);
  b->node = NULL;
  for (int s = 0; s < info->n_slots && fd_graph_ok(g); s++) {
    if (!node.slot[s] || info->dir[s] != 'o') continue;
    fd_var y = base_of(b, node.slot[s]);
    if (!b->grad[y] || g->values[y]->wanted) continue;
    fd_graph_base(g, b->grad[y])->refs--; /* all who had to read it are appended */
    b->grad[y] = 0;
  }
}

static void walk(struct bw *b, int n, const fd_var *out, const fd_var *dout, const bool *stays, const int *done_at) {
  fd_graph *g = b->g;
  for (int v = 1; v < b->n_values; v++) {
    const struct fd_value *x = g->values[v];
    if (!x->wanted || !x->want) continue;
    b->grad[v] = shaped(g, x->want, v);
    b->empty[x->want] = g->new_grads;
    if (!fd_graph_ok(g)) return;
    fd_graph_base(g, b->grad[v])->refs = 1;
  }
  for (int i = 0; i < n; i++) {
    if (!needs(b, out[i])) continue;
    fd_graph_base(g, dout[i])->refs += 2; /* the caller's: never added to in place */
    b->node = NULL;
    FD_WANT_OR(, !g->values[out[i]]->rows, "backward: output %s is a view of some rows", fd_graph_text(g, out[i]));
    contribute(b, out[i], dout[i]);
  }
  for (fd_var v = 1; v < b->n_values; v++)
    if (done_at[v] == b->n_nodes) call_grad_done(b, v);
  for (int i = b->n_nodes - 1; i >= 0 && fd_graph_ok(g); i--) {
    for (int s = 0; s < g->n_segments; s++)
      if (g->segments[s].end == i + 1) recompute(b, &g->segments[s], stays);
    if (!b->active[i] || !fd_graph_ok(g)) continue;
    differentiate(b, g->nodes[i]);
    for (fd_var v = 1; v < b->n_values; v++)
      if (done_at[v] == i) call_grad_done(b, v);
  }
  for (int v = 1; v < b->n_values && fd_graph_ok(g); v++) {
    struct fd_value *x = g->values[v];
    if (!x->wanted) continue;
    x->grad = x->want ? x->want : shaped(g, b->grad[v], v);
    if (x->grad) fd_graph_keep(g, x->grad);
  }
}

void fd_graph_backward(fd_graph *g, int n, const fd_var *out, const fd_var *dout) {
  if (!fd_graph_ok(g)) return;
  FD_WANT_OR(, !g->differentiated, "differentiated twice");
  FD_WANT_OR(, g->open_segment < 0, "differentiated inside a recompute segment");
  for (int i = 0; i < n; i++) {
    FD_WANT_OR(, out[i] > 0 && out[i] < g->n_values && dout[i] > 0 && dout[i] < g->n_values, "backward: output %d or its gradient does not exist", i);
    const fd_tensor *y = fd_graph_get(g, out[i]), *dy = fd_graph_get(g, dout[i]);
    FD_WANT_OR(, y->dtype == dy->dtype && fd_tensor_numel(y) == fd_tensor_numel(dy), "backward: output %s, gradient %s: they must be alike",
               fd_graph_text(g, out[i]), fd_graph_text(g, dout[i]));
  }
  g->differentiated = true;
  struct bw b = {.g = g, .n_nodes = g->n_nodes, .n_values = g->n_values};
  size_t nv = (size_t)g->n_values, nn = (size_t)g->n_nodes + 1;
  b.grad = calloc(nv, sizeof *b.grad);
  b.fresh = calloc(nv, sizeof *b.fresh);
  b.open = calloc(nv, 1);
  b.empty = calloc(nv, 1);
  b.needs = calloc(nv, 1);
  b.reached = calloc(nv, 1);
  b.active = calloc(nn, 1);
  bool *stays = calloc(nv, 1);
  int *done_at = malloc(nv * sizeof *done_at); /* of an external gradient: the op whose backward is the last to add to it */
  if (!b.grad || !b.fresh || !b.open || !b.empty || !b.needs || !b.reached || !b.active || !stays || !done_at) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for the backward pass");
    goto done;
  }
  find_active(&b, n, out);

  /* values of a segment that are needed after it, or are no values of ops at all, stay */
  for (int v = 1; v < b.n_values; v++) stays[v] = g->values[v]->kind != FD_VALUE_TENSOR || g->values[v]->keep || g->values[v]->wanted;
  for (int i = 0; i < n; i++) stays[base_of(&b, out[i])] = true;
  for (int s = 0; s < g->n_segments; s++) {
    bool *inside = calloc(nv, 1);
    if (!inside) {
      fd_graph_fail(g, FD_ERR_NOMEM, "no memory for the backward pass");
      goto done;
    }
    for (int i = g->segments[s].first; i < b.n_nodes; i++) {
      const struct fd_node *node = &g->nodes[i];
      const struct fd_op_info *info = fd_op_info(node->op);
      for (int k = 0; k < info->n_slots; k++) {
        if (!node->slot[k]) continue;
        fd_var base = base_of(&b, node->slot[k]);
        if (i < g->segments[s].end) inside[base] = inside[base] || info->dir[k] != 'i';
        else if (inside[base]) stays[base] = true;
      }
    }
    free(inside);
  }

  for (int v = 0; v < b.n_values; v++) done_at[v] = -1;
  for (int v = 1; v < b.n_values; v++)
    if (g->values[v]->wanted && g->values[v]->want && done_at[g->values[v]->want] < 0) done_at[g->values[v]->want] = b.n_nodes;
  for (int i = b.n_nodes - 1; i >= 0; i--) {
    const struct fd_node *node = &g->nodes[i];
    const struct fd_op_info *info = fd_op_info(node->op);
    for (int s = 0; b.active[i] && s < info->n_slots; s++) {
      if (!node->slot[s] || info->dir[s] != 'i') continue;
      fd_var want = fd_graph_base(g, node->slot[s])->want;
      if (want) done_at[want] = i;
    }
  }
  walk(&b, n, out, dout, stays, done_at);
done:
  free(b.grad);
  free(b.fresh);
  free(b.open);
  free(b.empty);
  free(b.needs);
  free(b.reached);
  free(b.active);
  free(stays);
  free(done_at);
}
