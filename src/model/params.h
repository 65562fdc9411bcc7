// SPDX-License-Identifier: Apache-2.0
// The parameter table of a model: one row per tensor of its published state dict, in that order.
// Invariant: names, shapes and order are those of the file; the layout in memory is this program's business alone.
#ifndef FD_MODEL_PARAMS_H
#define FD_MODEL_PARAMS_H

#include "graph/graph.h"

enum fd_init {
  FD_INIT_ZERO = 0,
  FD_INIT_XAVIER, /* uniform in +- sqrt(6 / (fan_in + fan_out)); a convolution counts as [out, in kh kw] */
  FD_INIT_NORMAL, /* mean 0, standard deviation `std` */
  FD_INIT_TABLE,  /* computed by `fill` (sincos positions) */
  FD_INIT_NONE    /* must come from a file, or from the model itself (buffers) */
};

struct fd_param {
  const char *name; /* as in the state dict; owned by the table */
  int ndim;
  int64_t shape[FD_MAX_NDIM];
  enum fd_init init;
  float std;
  void (*fill)(const struct fd_param *row, float *out); /* FD_INIT_TABLE; may read arg */
  double arg[2];
  bool buffer;     /* in the state dict but never trained, e.g. patch_embed.pos_embed */
  const char *group; /* NULL, or the name under which neighbours lie back to back, e.g. "layers.0.self_attn.qkv" */
  const char *alias; /* NULL, or an older name that files may carry */
  /* set by fd_params_layout */
  int64_t offset;  /* elements from the start of the flat buffer (trainable) or of the frozen buffer (the others) */
  int64_t numel;
};

typedef struct fd_params fd_params;

fd_status fd_params_create(const char *model, fd_params **out);
void fd_params_destroy(fd_params **p);

/** Append a row; strings are copied. The first failure is kept and reported by fd_params_layout. */
void fd_params_add(fd_params *p, const struct fd_param *row);
/** name built from a format: fd_params_addf(p, &row, "layers.%d.mlp.down_proj.weight", i) */
void fd_params_addf(fd_params *p, const struct fd_param *row, const char *format, ...) __attribute__((format(printf, 3, 4)));

/** Layout of buffers and groups: members of a group lie at the place of its first row, in the order of the rows, though other rows (biases)
 *  may stand between them in the table. Offsets of frozen rows count from the start of the frozen f32 memory (one dimension, or a buffer)
 *  or of the frozen `dtype` memory (the others): fd_params_frozen_f32. */
bool fd_params_frozen_f32(const fd_params *p, int i);
/** Bytes of frozen memory with weights of type `dtype`; for plans. */
size_t fd_params_frozen_bytes(const fd_params *p, fd_dtype dtype);
/** Offsets: each row starts at a multiple of 64 elements, members of a group back to back (the group starts at one).
 *  trainable: rows that are no buffers go to the flat space, padded to 64 * ranks at the end; else everything is frozen. */
fd_status fd_params_layout(fd_params *p, bool trainable, int ranks);

int fd_params_count(const fd_params *p);
const struct fd_param *fd_params_row(const fd_params *p, int i);
/** -1 if absent. Names and aliases. */
int fd_params_find(const fd_params *p, const char *name);
int64_t fd_params_flat_numel(const fd_params *p);   /* padded length of the flat space; 0 if frozen */
int64_t fd_params_frozen_numel(const fd_params *p);
/** Number of parameters as people count them: no buffers, no padding. */
int64_t fd_params_total(const fd_params *p);

/** The type that fd_params_alloc will be given, for graphs that are built before there is memory (plans). Before the first value is made. */
void fd_params_set_type(fd_params *p, fd_dtype dtype);

/** Before fd_params_alloc: the ranks of a node share one copy of the frozen weights where these lie in the host's memory. Then fd_params_alloc,
 *  fd_model_load and fd_model_init are collective (same status everywhere), only one rank of a node reads and writes them, and
 *  fd_params_destroy is collective too. Without enough shared memory each rank keeps its own copy, and the log says so. */
void fd_params_share(fd_params *p, struct fd_comm *comm);
/** NULL if nothing is shared; else the communicator to agree over. *writes: does this rank fill the frozen weights? */
struct fd_comm *fd_params_shared(const fd_params *p, bool *writes);
/** Memory. Compute weights: flat (trainable rows, type `dtype`) and frozen (f32 rows of one dimension, `dtype` the others;
 *  each row's own type: fd_params_dtype). Allocates on the context's device; owned by the table. The flat f32 gradient
 *  buffer exists if the table is trainable and want_grad. */
fd_status fd_params_alloc(fd_params *p, fd_ctx *ctx, fd_dtype dtype, bool want_grad);
void *fd_params_flat(const fd_params *p);      /* device, `dtype` */
float *fd_params_flat_grad(const fd_params *p); /* device, f32; NULL if none */
void *fd_params_data(const fd_params *p, int i);
fd_dtype fd_params_dtype(const fd_params *p, int i);

/** The value of a row, or of a whole group ([sum of rows, columns], or [sum] for biases), in graph g. Made once per graph
 *  and name. Frozen values are FD_T_CONST. If fd_params_grads(p, g) was called before, trainable ones want their gradient,
 *  bound to the flat gradient buffer. An unknown name fails the graph. When memory exists the values are bound to it by
 *  fd_params_bind, once, after the graph is planned. */
fd_var fd_params_var(fd_params *p, fd_graph *g, const char *name);
/** A constant of the model that is in no file (rotation tables, crops, frequencies): copied to device memory that the table owns, made once per
 *  graph and name. `host` holds the values. */
fd_var fd_params_const(fd_params *p, fd_graph *g, const char *name, fd_dtype dtype, int ndim, const int64_t *shape, const void *host);
fd_var fd_params_varf(fd_params *p, fd_graph *g, const char *format, ...) __attribute__((format(printf, 3, 4)));
void fd_params_grads(fd_params *p, fd_graph *g);
fd_status fd_params_bind(fd_params *p, fd_graph *g);
/** Before destroying graph g while the table lives on: forget its values (a new graph may get the same address). */
void fd_params_forget(fd_params *p, const fd_graph *g);
/** Which elements of the flat space a gradient value of graph g (as fd_graph_on_grad_done reports it) stands for: buckets of the
 *  reduction are counted down by it. False if `grad` is no gradient of this table. Known as soon as the value is made. */
bool fd_params_grad_range(const fd_params *p, const fd_graph *g, fd_var grad, int64_t *first, int64_t *numel);

/** The bound of FD_INIT_XAVIER for a row. */
double fd_param_bound(const struct fd_param *row);
/** Fill a host f32 buffer of row i's numel with its initial value (Philox, purpose init, sample = row number). */
fd_status fd_params_init_row(const fd_params *p, int i, uint64_t seed, float *out);
/** Write host f32 values into the compute weights of row i (rounded to its type). */
fd_status fd_params_set(fd_params *p, int i, const float *host);
fd_status fd_params_get(const fd_params *p, int i, float *host);

#endif
