// SPDX-License-Identifier: Apache-2.0
// A graph of cuDNN's operations from plain C, and the plans made of graphs: kept in memory by a key, and on disk in the run's cache folder.
// cuDNN compiles some plans at run time (seconds each), so that a plan is made while a graph is prepared, never in a step.
#ifndef FD_CUDA_CUDNN_GRAPH_H
#define FD_CUDA_CUDNN_GRAPH_H

#include <cudnn_graph.h>
#include <stdbool.h>

#include "cuda/cuda.h"

typedef cudnnBackendDescriptor_t fd_dnn_tensor;

enum { FD_DNN_MAX_DESCRIPTORS = 192, FD_DNN_MAX_OPS = 40, FD_DNN_MAX_BOUND = 20, FD_DNN_KEY = 200 };

/** A graph under construction. After the first failure every call does nothing and the failure is kept. */
struct fd_dnn_graph {
  cudnnBackendDescriptor_t owned[FD_DNN_MAX_DESCRIPTORS];
  int n_owned;
  cudnnBackendDescriptor_t op[FD_DNN_MAX_OPS];
  int n_ops;
  int64_t next_uid; /* of tensors that exist only inside */
  cudnnStatus_t status;
  char why[512];
};

/** A tensor that the caller binds by `uid` (1 .. 99) when the plan runs; 4 lengths, 4 strides in elements. Aligned to 16 bytes, int32 to 4. */
fd_dnn_tensor fd_dnn_bound(struct fd_dnn_graph *g, int64_t uid, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4]);
/** One float, bound by a host pointer. */
fd_dnn_tensor fd_dnn_scalar(struct fd_dnn_graph *g, int64_t uid);
/** A tensor inside the graph; NULL strides: packed. */
fd_dnn_tensor fd_dnn_inner(struct fd_dnn_graph *g, cudnnDataType_t type, const int64_t dim[4], const int64_t *stride);

/** y = mode(x[, b[, t]]), formed in `precision`. `axis` is for CUDNN_POINTWISE_GEN_INDEX. */
void fd_dnn_pointwise(struct fd_dnn_graph *g, cudnnPointwiseMode_t mode, cudnnDataType_t precision, int64_t axis, fd_dnn_tensor x, fd_dnn_tensor b,
                      fd_dnn_tensor t, fd_dnn_tensor y);
/** y = x reduced, in f32, over the dimensions where y has length 1; from A heads to K: over each group of A / K. */
void fd_dnn_reduce(struct fd_dnn_graph *g, cudnnReduceTensorOp_t how, fd_dnn_tensor x, fd_dnn_tensor y);
/** c[.., m, n] = sum of a[.., m, k] b[.., k, n] in f32; m, n, k: i32 [B, 1, 1, 1], extents of each sample, or NULL. */
void fd_dnn_matmul(struct fd_dnn_graph *g, fd_dnn_tensor a, fd_dnn_tensor b, fd_dnn_tensor c, fd_dnn_tensor m, fd_dnn_tensor n, fd_dnn_tensor k);
/** The same elements with other lengths or strides. */
void fd_dnn_reshape(struct fd_dnn_graph *g, fd_dnn_tensor x, fd_dnn_tensor y);

/** Geometry of a convolution: vertical, horizontal. */
struct fd_dnn_conv {
  int64_t before[2], after[2], stride[2]; /* zeros before the first and behind the last row (column) */
};
enum fd_dnn_conv_op { FD_DNN_CONV_FORWARD, FD_DNN_CONV_DATA, FD_DNN_CONV_WEIGHTS };
/** y, x or w from the other two, in f32. Dimensions are named [B, C, H, W], strides say what memory is. */
void fd_dnn_convolution(struct fd_dnn_graph *g, enum fd_dnn_conv_op op, const struct fd_dnn_conv *how, fd_dnn_tensor x, fd_dnn_tensor w,
                        fd_dnn_tensor y);

/** A plan, ready to run. Owned by the context. */
struct fd_dnn_plan {
  char key[FD_DNN_KEY];
  cudnnBackendDescriptor_t plan; /* NULL: cuDNN has none */
  int64_t workspace;             /* bytes */
  int64_t engine;                /* number of the engine; -1: read from disk */
  double seconds;                /* that it took */
};

/** The plan of `key`: from memory, from disk, or made of the graph that build(g, shape) adds ops to: the first configuration in the order of
 *  cuDNN's heuristics whose plan can be made, with ctx->deterministic the first whose engine gives the same bits each time.
 *  The key names op, types, shape and all else that the graph depends on, but for ctx->deterministic, which is added to it. *plan = NULL if
 *  cuDNN has no plan: said in the log, once a key. */
fd_status fd_dnn_plan_find(fd_ctx *ctx, const char *key, void (*build)(struct fd_dnn_graph *g, const void *shape), const void *shape,
                           const struct fd_dnn_plan **plan);
/** Run it on the context's stream, with n tensors bound. workspace: at least plan->workspace bytes, aligned to 256. */
fd_status fd_dnn_run(fd_ctx *ctx, const struct fd_dnn_plan *plan, int n, const int64_t *uid, void *const *data, void *workspace);

/** All plans that were asked for, in that order, also those that do not exist; returns their number. Valid until the next is asked for. */
int fd_dnn_plans(fd_ctx *ctx, struct fd_dnn_plan *const **plans);

/** Make plans for the device that a JSON file describes (CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION), on a machine without one: nothing can be run.
 *  For tests/cudnn_plans. */
fd_status fd_dnn_open_without_device(fd_ctx *ctx, const char *properties);
/** Frees plans and handle; accepts a context that never asked for a plan. */
void fd_dnn_close(fd_ctx *ctx);

#endif
