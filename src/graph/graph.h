// SPDX-License-Identifier: Apache-2.0
// The graph: built once, differentiated, planned, then run every step without allocating anything.
//
// A model is a function that adds ops. A value is an fd_var, a small number. Builders never fail visibly: the first
// failure is kept in the graph, later builders do nothing and return 0, and fd_graph_plan reports it. So models read
// like mathematics.
#ifndef FD_GRAPH_GRAPH_H
#define FD_GRAPH_GRAPH_H

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
/** Rows [first, first + n) of the first dimension, as a view. Not differentiable. */
fd_var fd_graph_rows(fd_graph *g, fd_var v, int64_t first, int64_t n);

/** Shape and type; data is NULL until planned and bound. Valid until the next value is added. */
const fd_tensor *fd_graph_get(const fd_graph *g, fd_var v);

/** Host copies, for inputs and kept values. `bytes` must be those of the value, or fewer for a leading part. */
fd_status fd_graph_set(fd_graph *g, fd_var v, const void *host, size_t bytes);
fd_status fd_graph_read(fd_graph *g, fd_var v, void *host, size_t bytes);

/** Append an op. `args` is an args struct of `op` (copied) whose scalars are set and whose slots are ignored;
 *  `slot[i]` is the value of slot i, 0 for none. Outputs exist already (fd_graph_tensor). */
void fd_graph_emit(fd_graph *g, enum fd_op op, const void *args, const fd_var *slot);

/** The graph's first failure, or FD_OK. Builders of models call fd_graph_fail for their own checks. */
fd_status fd_graph_status(const fd_graph *g);
void fd_graph_fail(fd_graph *g, fd_status st, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* ---- differentiation (src/graph/backward.c) ---------------------------------------------------------------------- */

/** v is a leaf whose gradient is wanted. `grad` != 0: an external f32 value of the same number of elements, always added
 *  to (flat gradient buffer). grad 0: a kept value is made, see fd_graph_grad. */
void fd_graph_want_grad(fd_graph *g, fd_var v, fd_var grad);

/** Append the backward ops of everything that leads from wanted leaves to the n outputs, whose gradients are dout[i]
 *  (same shape). An op without a backward between them is FD_ERR_UNSUPPORTED by name. At most once per graph. */
void fd_graph_backward(fd_graph *g, int n, const fd_var *out, const fd_var *dout);
/** After fd_graph_backward; 0 if nothing leads to v. */
fd_var fd_graph_grad(const fd_graph *g, fd_var v);

/** Values made between begin and end are not kept for backward but computed again right before it, except
 *  those used after `end`. Segments do not nest. (enable_gradient_checkpointing; Chen et al. 2016) */
void fd_graph_segment_begin(fd_graph *g);
void fd_graph_segment_end(fd_graph *g);

/** Called by backward when the last op that adds to `grad` was appended: where a bucket's reduction is emitted. */
typedef void fd_graph_grad_done(void *user, fd_graph *g, fd_var grad);
void fd_graph_on_grad_done(fd_graph *g, fd_graph_grad_done *f, void *user);

/* ---- plan and run ------------------------------------------------------------------------------------------------ */

/** Name the ops that follow, for timing: "vae", "text", "forward", "backward", ... Borrowed string. */
void fd_graph_phase(fd_graph *g, const char *phase);

/** Lifetimes, offsets, kernels' preparation. Returns the arena's size; allocates no arena. Ends building. */
fd_status fd_graph_plan(fd_graph *g, size_t *arena_bytes);

/** Give the graph its arena (device memory, 256-byte aligned, at least what plan said; several graphs that do not run
 *  at the same time may share one; inputs then keep their content only until another graph runs). Borrowed. */
fd_status fd_graph_attach(fd_graph *g, void *arena, size_t bytes);

/** Run all ops in order. Between ops the context's communicator makes progress. */
fd_status fd_graph_run(fd_graph *g);

/** Cost of what was built: FLOP of one run (matmul, conv, attention; a multiply-add is two) by phase; phase NULL: all. */
double fd_graph_flop(const fd_graph *g, const char *phase);

/** For bench: iterate the ops in order. */
int fd_graph_n_nodes(const fd_graph *g);
enum fd_op fd_graph_node(const fd_graph *g, int node, const void **args, const char **phase);
/** Run nodes [first, last). */
fd_status fd_graph_run_nodes(fd_graph *g, int first, int last);
/** FLOP and bytes of memory that an op moves at least, from its shapes (counts at capacity). */
void fd_op_cost(enum fd_op op, const void *args, double *flop, double *bytes);

/** A printable list of ops with shapes and offsets. */
void fd_graph_print(const fd_graph *g, void (*line)(void *user, const char *text), void *user);

#endif
