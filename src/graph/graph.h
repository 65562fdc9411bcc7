// SPDX-License-Identifier: Apache-2.0
// The graph: built once, differentiated, planned, then run every step without allocating anything.
//
// A model is a function that adds ops. A value is an fd_var, a small number. Builders never fail visibly: the first
// failure is kept in the graph, later builders do nothing and return 0, and fd_graph_plan reports it. So models read
// like mathematics.
#ifndef FD_GRAPH_GRAPH_H
#define FD_GRAPH_GRAPH_H

#include <stdbool.h>

#include "op/ctx.h"

typedef struct fd_graph fd_graph;
typedef int fd_var; /* > 0; 0 is "none", allowed wherever an op's slot is optional */

/** `name` is used in messages, plans and benchmarks. Owned by the caller. ctx is borrowed. */
fd_status fd_graph_create(fd_ctx *ctx, const char *name, fd_graph **out);
void fd_graph_destroy(fd_graph **g);
fd_ctx *fd_graph_ctx(const fd_graph *g);

/* ---- values ---------------------------------------------------------------------------------------------------- */

/** A value whose memory the caller binds before fd_graph_run (weights, flat gradients). `name` is copied. */
fd_var fd_graph_external(fd_graph *g, const char *name, fd_dtype dtype, int ndim, const int64_t *shape, unsigned flags);
void fd_graph_bind(fd_graph *g, fd_var v, void *data);

/** A value in the arena that is never overwritten by another: the caller fills it between runs (fd_graph_set). */
fd_var fd_graph_input(fd_graph *g, const char *name, fd_dtype dtype, int ndim, const int64_t *shape);

/** A value in the arena, for the outputs of ops. Builders call it. */
fd_var fd_graph_tensor(fd_graph *g, fd_dtype dtype, int ndim, const int64_t *shape);

/** The caller reads v after the run: its memory is not reused. */
void fd_graph_keep(fd_graph *g, fd_var v);

/** The same memory with another shape of the same number of elements. Differentiable (the gradient is a view too). */
fd_var fd_graph_view(fd_graph *g, fd_var v, int ndim, const int64_t *shape);
/** Rows [first, first + n) of the first dimension, as a view. Not differentiable: FD_ERR_UNSUPPORTED if a gradient must pass. */
fd_var fd_graph_rows(fd_graph *g, fd_var v, int64_t first, int64_t n);

/** Shape and type; data is NULL until attached or bound. Valid until the graph is destroyed. For 0 (a builder failed):
 *  a value of one element, so that models may read shapes without asking. */
const fd_tensor *fd_graph_get(const fd_graph *g, fd_var v);

/** Host copies, for inputs, kept and bound external values. `bytes` must be those of the value, or fewer for a leading
 *  part. FD_ERR_ARG for a value whose memory the plan may give to others. */
fd_status fd_graph_set(fd_graph *g, fd_var v, const void *host, size_t bytes);
fd_status fd_graph_read(fd_graph *g, fd_var v, void *host, size_t bytes);

/** Append an op. `args` is an args struct of `op` (copied) whose scalars are set and whose slots are ignored;
 *  `slot[i]` is the value of slot i, 0 for none. Outputs exist already (fd_graph_tensor). */
void fd_graph_emit(fd_graph *g, enum fd_op op, const void *args, const fd_var *slot);

/** The graph's first failure, or FD_OK. Builders of models call fd_graph_fail for their own checks. */
fd_status fd_graph_status(const fd_graph *g);
void fd_graph_fail(fd_graph *g, fd_status st, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* ---- differentiation (src/graph/backward.c) ---------------------------------------------------------------------- */

/** v is a leaf (external or input) whose gradient is wanted. `grad` != 0: an external f32 value of the same number of
 *  elements, added to or (fd_graph_new_grads) written. grad 0: a kept value is made, overwritten by each run, see
 *  fd_graph_grad; then v may be the output of an op too. Its type is f32 for a weight, else that of v. */
void fd_graph_want_grad(fd_graph *g, fd_var v, fd_var grad);
/** Before fd_graph_backward: external gradients are written, not added to, so what they hold does not count and nobody has to clear them;
 *  those to which nothing is added become 0. */
void fd_graph_new_grads(fd_graph *g);

/** Append the backward ops of everything that leads from wanted leaves to the n outputs, whose gradients are dout[i]
 *  (same shape and type; never written). An op without a backward between them is FD_ERR_UNSUPPORTED by name. At most once
 *  per graph. Ops appended after it (clip, adamw) are not differentiated.
 *  Rows beyond a count, and rows of attention that no range covers, have no gradient and are not read. So where gradients flow
 *  through attention on packed rows, ranges cover all rows that are counted (a range may have keys and no queries). */
void fd_graph_backward(fd_graph *g, int n, const fd_var *out, const fd_var *dout);
/** After fd_graph_backward; 0 if nothing leads to v. */
fd_var fd_graph_grad(const fd_graph *g, fd_var v);

/** Values made between begin and end are not kept for backward but computed again right before it, except
 *  those used after `end`; the ops that do so run in phase "recompute". Segments do not nest. (enable_gradient_checkpointing; Chen et al. 2016) */
void fd_graph_segment_begin(fd_graph *g);
void fd_graph_segment_end(fd_graph *g);

/** Called by backward when the last op that adds to `grad` was appended: where a bucket's reduction is emitted. Once for
 *  every external gradient; first for those to which nothing is added. */
typedef void fd_graph_grad_done(void *user, fd_graph *g, fd_var grad);
void fd_graph_on_grad_done(fd_graph *g, fd_graph_grad_done *f, void *user);

/* ---- plan and run ------------------------------------------------------------------------------------------------ */

/** Name the ops that follow, for timing: "vae", "text", "forward", "backward", ... Borrowed string. */
void fd_graph_phase(fd_graph *g, const char *phase);

/** Lifetimes, offsets, kernels' preparation. Returns the arena's size; allocates no arena. Ends building.
 *  Ops whose results nobody reads (no later op, no fd_graph_keep, no external) are dropped; so are optional outputs. */
fd_status fd_graph_plan(fd_graph *g, size_t *arena_bytes);

/** Bytes, after planning. external is the caller's memory, all else lies in the arena. */
struct fd_graph_memory {
  size_t external;
  size_t copies;      /* what the backend keeps beside it: reordered constant weights */
  size_t inputs;      /* written by the host, never reused */
  size_t kept;        /* read by the host, not reused once written */
  size_t activations; /* all else that lives at the same time, at the worst op; */
  size_t scratch;     /* and the largest scratch of one op */
  size_t arena;       /* the whole arena */
  size_t needed;      /* lower bound of the arena: what lives, kept, inputs and scratch included, at the worst op */
};
void fd_graph_memory(const fd_graph *g, struct fd_graph_memory *out);

/** Give the graph its arena (device memory, 256-byte aligned, at least what plan said; several graphs that do not run
 *  at the same time may share one; inputs then keep their content only until another graph runs). Borrowed. */
fd_status fd_graph_attach(fd_graph *g, void *arena, size_t bytes);

/** Run all ops in order. Between ops the context's communicator makes progress. Where the backend records, the second run of the same
 *  ops with the same counts is recorded, and later ones are replayed. */
fd_status fd_graph_run(fd_graph *g);

/** For tests: fill memory with NaN before an op writes it and after its last reader, and scratch before each op. A plan that
 *  overlaps live values, or an op that reads what nobody wrote, then shows as NaN. Slow. */
void fd_graph_set_poison(fd_graph *g, bool on);

/** Cost of what was built: FLOP of one run (matmul, conv, attention; a multiply-add is two) by phase; phase NULL: all. */
double fd_graph_flop(const fd_graph *g, const char *phase);

/** For bench: iterate the ops in order. */
int fd_graph_n_nodes(const fd_graph *g);
enum fd_op fd_graph_node(const fd_graph *g, int node, const void **args, const char **phase);
/** Run nodes [first, last). */
fd_status fd_graph_run_nodes(fd_graph *g, int first, int last);
/** FLOP and bytes of memory that an op moves at least, from its shapes (counts at capacity). */
void fd_op_cost(enum fd_op op, const void *args, double *flop, double *bytes);

/** A printable list of ops with shapes and offsets, one call per line. */
void fd_graph_print(const fd_graph *g, void (*line)(void *user, const char *text), void *user);

#endif
