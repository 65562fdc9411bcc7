// SPDX-License-Identifier: Apache-2.0
// What graph.c, backward.c, plan.c and exec.c share. Values are stable in memory: args structs may point to them.
#ifndef FD_GRAPH_INTERNAL_H
#define FD_GRAPH_INTERNAL_H

#include <stdbool.h>

#include "graph/graph.h"

/** Index of a slot of an op, from its args struct: SLOT(matmul, bias). */
#define SLOT(op, member) ((int)(offsetof(struct fd_##op##_args, member) / sizeof(fd_tensor *)))
#define SLOT_BIT(op, member) (1u << SLOT(op, member))

#define FD_GRAPH_ALIGN 256

enum fd_value_kind { FD_VALUE_EXTERNAL, FD_VALUE_INPUT, FD_VALUE_TENSOR, FD_VALUE_VIEW };

struct fd_value {
  fd_tensor t;
  enum fd_value_kind kind;
  fd_var base;    /* of a view: whose memory it is (never a view itself); else the value's own number */
  size_t offset;  /* of a view: bytes from the base */
  bool rows;      /* a view of some rows only */
  bool keep;
  bool read;      /* some op reads it */
  int n_writes;   /* ops that write it, views included (counted at the base) */
  fd_var next_view; /* list of the base's views */
  char *name;     /* owned; NULL for values of ops */
  /* differentiation */
  bool wanted;
  fd_var want; /* external gradient, or 0 */
  fd_var grad; /* result */
  int refs;    /* gradients that live in this memory; more than one: copy before adding */
  /* plan */
  int first, last;  /* node numbers of the first and last touch; first < 0: never touched */
  fd_var store;     /* whose place in the arena it uses; itself unless an op works in place */
  size_t at;        /* bytes from the arena's start */
  size_t copy_bytes; /* of a constant: the backend's copy, counted already */
};

struct fd_node {
  enum fd_op op;
  const char *phase;
  void *args; /* owned */
  fd_var slot[FD_MAX_SLOTS];
  size_t scratch_bytes, scratch_at;
};

struct fd_segment {
  int first, end; /* nodes [first, end) */
};

/* Ops [first, last) as the backend recorded them, for one set of counts; what == NULL: they ran once, not recorded. */
struct fd_recording {
  int first, last;
  void *what; /* owned */
};
enum { FD_GRAPH_RECORDINGS = 1024 /* backward: two a bucket of gradients at most, for 8 counts */ };

struct fd_graph {
  fd_ctx *ctx; /* borrowed */
  char *name;
  const char *phase;
  fd_status st;
  char *message; /* of the first failure */

  struct fd_value **values; /* [0] unused */
  int n_values, cap_values;
  struct fd_node *nodes;
  int n_nodes, cap_nodes;
  struct fd_segment *segments;
  int n_segments, open_segment; /* -1: none open */

  bool differentiated, planned, poison;
  bool new_grads; /* external gradients are overwritten */
  fd_graph_grad_done *grad_done;
  void *grad_done_user;

  struct fd_graph_memory memory;
  char *arena; /* borrowed */
  bool ready;  /* every external is bound */
  struct fd_recording recordings[FD_GRAPH_RECORDINGS];
  int n_recordings;
};

static inline bool fd_graph_ok(const fd_graph *g) { return g->st == FD_OK; }
static inline struct fd_value *fd_graph_value(const fd_graph *g, fd_var v) { return g->values[v]; }
static inline struct fd_value *fd_graph_base(const fd_graph *g, fd_var v) { return g->values[g->values[v]->base]; }

/** "x [2, 3] bf16", "text_proj.weight [64, 32] f32" or "nothing", for messages: one of eight buffers in turn. */
const char *fd_graph_text(const fd_graph *g, fd_var v);

/** Forget recordings, whose addresses are wrong now. */
void fd_graph_drop_recordings(fd_graph *g);

/** May slot `out` of op be the same memory as slot `in`? (op/ops.h) */
bool fd_graph_in_place(enum fd_op op, int out, int in);

/** A view of `bytes` offset inside v's base with any shape and type of v. */
fd_var fd_graph_view_at(fd_graph *g, fd_var base, size_t offset, fd_dtype dtype, int ndim, const int64_t *shape, bool rows);

/** Leave a builder with a message if `cond` does not hold; `none` is what it returns. */
#define FD_WANT_OR(none, cond, ...)                \
  do {                                             \
    if (!(cond)) {                                 \
      fd_graph_fail(g, FD_ERR_ARG, __VA_ARGS__);   \
      return none;                                 \
    }                                              \
  } while (0)
#define FD_WANT(cond, ...) FD_WANT_OR(0, cond, __VA_ARGS__)

#endif
