// SPDX-License-Identifier: Apache-2.0
// cuDNN's backend interface: a descriptor is made, its attributes set, then finalized. Graph -> heuristics -> configurations -> plan.
// Host work only. Invariant: after an error the graph's status stays, so that building needs no check after each call.
#include "cuda/cudnn_graph.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/files.h"
#include "base/log.h"
#include "comm/comm.h"

enum { MAX_CONFIGS = 64, FORMAT = 1 /* of the keys: another number when a graph of the same key changes */ };

struct fd_dnn {
  cudnnHandle_t handle;                /* NULL: without a device */
  cudnnBackendDescriptor_t properties; /* of the device that is not there */
  char device[320];
  struct fd_dnn_plan **plan;
  int n;
};

/* ---- building ---------------------------------------------------------------------------------------------------- */

static bool ok(struct fd_dnn_graph *g, cudnnStatus_t s, const char *what) {
  if (g->status != CUDNN_STATUS_SUCCESS) return false;
  if (s == CUDNN_STATUS_SUCCESS) return true;
  char text[400] = "";
  cudnnGetLastErrorString(text, sizeof text);
  g->status = s;
  snprintf(g->why, sizeof g->why, "%s: %s%s%s", what, cudnnGetErrorString(s), *text ? ": " : "", text);
  return false;
}

static cudnnBackendDescriptor_t make(struct fd_dnn_graph *g, cudnnBackendDescriptorType_t type, const char *what) {
  cudnnBackendDescriptor_t d = NULL;
  if (g->status != CUDNN_STATUS_SUCCESS) return NULL;
  if (g->n_owned == FD_DNN_MAX_DESCRIPTORS) {
    g->status = CUDNN_STATUS_INTERNAL_ERROR;
    snprintf(g->why, sizeof g->why, "more than %d descriptors", FD_DNN_MAX_DESCRIPTORS);
    return NULL;
  }
  if (ok(g, cudnnBackendCreateDescriptor(type, &d), what)) g->owned[g->n_owned++] = d;
  return d;
}

static void set(struct fd_dnn_graph *g, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n,
                const void *value, const char *what) {
  if (g->status == CUDNN_STATUS_SUCCESS) ok(g, cudnnBackendSetAttribute(d, name, type, n, value), what);
}
#define SET(g, d, name, type, n, value) set(g, d, CUDNN_ATTR_##name, CUDNN_TYPE_##type, n, value, #name)

static void set_descriptor(struct fd_dnn_graph *g, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendDescriptor_t value,
                           const char *what) {
  if (value || g->status != CUDNN_STATUS_SUCCESS) set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value, what);
}
#define LINK(g, d, name, value) set_descriptor(g, d, CUDNN_ATTR_##name, value, #name)

static void finish(struct fd_dnn_graph *g, cudnnBackendDescriptor_t d, const char *what) {
  if (g->status == CUDNN_STATUS_SUCCESS) ok(g, cudnnBackendFinalize(d), what);
}

static void add_op(struct fd_dnn_graph *g, cudnnBackendDescriptor_t op, const char *what) {
  finish(g, op, what);
  if (g->status != CUDNN_STATUS_SUCCESS) return;
  if (g->n_ops == FD_DNN_MAX_OPS) {
    g->status = CUDNN_STATUS_INTERNAL_ERROR;
    snprintf(g->why, sizeof g->why, "more than %d operations", FD_DNN_MAX_OPS);
    return;
  }
  g->op[g->n_ops++] = op;
}

static fd_dnn_tensor tensor(struct fd_dnn_graph *g, int64_t uid, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4], bool inner,
                            bool by_value) {
  cudnnBackendDescriptor_t t = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR, "tensor");
  const int64_t align = type == CUDNN_DATA_INT32 ? 4 : 16; /* lengths may begin in the middle of a batch */
  SET(g, t, TENSOR_DATA_TYPE, DATA_TYPE, 1, &type);
  SET(g, t, TENSOR_DIMENSIONS, INT64, 4, dim);
  SET(g, t, TENSOR_STRIDES, INT64, 4, stride);
  SET(g, t, TENSOR_UNIQUE_ID, INT64, 1, &uid);
  SET(g, t, TENSOR_BYTE_ALIGNMENT, INT64, 1, &align);
  if (inner) SET(g, t, TENSOR_IS_VIRTUAL, BOOLEAN, 1, &inner);
  if (by_value) SET(g, t, TENSOR_IS_BY_VALUE, BOOLEAN, 1, &by_value);
  finish(g, t, "tensor");
  return t;
}

fd_dnn_tensor fd_dnn_bound(struct fd_dnn_graph *g, int64_t uid, cudnnDataType_t type, const int64_t dim[4], const int64_t stride[4]) {
  return tensor(g, uid, type, dim, stride, false, false);
}

fd_dnn_tensor fd_dnn_scalar(struct fd_dnn_graph *g, int64_t uid) {
  static const int64_t one[4] = {1, 1, 1, 1};
  return tensor(g, uid, CUDNN_DATA_FLOAT, one, one, false, true);
}

fd_dnn_tensor fd_dnn_inner(struct fd_dnn_graph *g, cudnnDataType_t type, const int64_t dim[4], const int64_t *stride) {
  const int64_t packed[4] = {dim[1] * dim[2] * dim[3], dim[2] * dim[3], dim[3], 1};
  return tensor(g, g->next_uid++, type, dim, stride ? stride : packed, true, false);
}

void fd_dnn_pointwise(struct fd_dnn_graph *g, cudnnPointwiseMode_t mode, cudnnDataType_t precision, int64_t axis, fd_dnn_tensor x, fd_dnn_tensor b,
                      fd_dnn_tensor t, fd_dnn_tensor y) {
  const float one = 1;
  cudnnBackendDescriptor_t p = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR, "pointwise");
  SET(g, p, POINTWISE_MODE, POINTWISE_MODE, 1, &mode);
  SET(g, p, POINTWISE_MATH_PREC, DATA_TYPE, 1, &precision);
  if (mode == CUDNN_POINTWISE_GEN_INDEX) SET(g, p, POINTWISE_AXIS, INT64, 1, &axis);
  finish(g, p, "pointwise");
  cudnnBackendDescriptor_t op = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, "pointwise operation");
  LINK(g, op, OPERATION_POINTWISE_PW_DESCRIPTOR, p);
  LINK(g, op, OPERATION_POINTWISE_XDESC, x);
  LINK(g, op, OPERATION_POINTWISE_YDESC, y);
  LINK(g, op, OPERATION_POINTWISE_BDESC, b);
  LINK(g, op, OPERATION_POINTWISE_TDESC, t);
  SET(g, op, OPERATION_POINTWISE_ALPHA1, FLOAT, 1, &one);
  SET(g, op, OPERATION_POINTWISE_ALPHA2, FLOAT, 1, &one);
  add_op(g, op, "pointwise operation");
}

void fd_dnn_reduce(struct fd_dnn_graph *g, cudnnReduceTensorOp_t how, fd_dnn_tensor x, fd_dnn_tensor y) {
  const cudnnDataType_t f32 = CUDNN_DATA_FLOAT;
  const bool deterministic = false; /* no attention plan exists with it; its own reductions are within a block */
  cudnnBackendDescriptor_t r = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR, "reduction");
  SET(g, r, REDUCTION_COMP_TYPE, DATA_TYPE, 1, &f32);
  SET(g, r, REDUCTION_OPERATOR, REDUCTION_OPERATOR_TYPE, 1, &how);
  SET(g, r, REDUCTION_IS_DETERMINISTIC, BOOLEAN, 1, &deterministic);
  finish(g, r, "reduction");
  cudnnBackendDescriptor_t op = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, "reduction operation");
  LINK(g, op, OPERATION_REDUCTION_DESC, r);
  LINK(g, op, OPERATION_REDUCTION_XDESC, x);
  LINK(g, op, OPERATION_REDUCTION_YDESC, y);
  add_op(g, op, "reduction operation");
}

void fd_dnn_matmul(struct fd_dnn_graph *g, fd_dnn_tensor a, fd_dnn_tensor b, fd_dnn_tensor c, fd_dnn_tensor m, fd_dnn_tensor n, fd_dnn_tensor k) {
  const cudnnDataType_t f32 = CUDNN_DATA_FLOAT;
  cudnnBackendDescriptor_t p = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR, "matmul");
  SET(g, p, MATMUL_COMP_TYPE, DATA_TYPE, 1, &f32);
  finish(g, p, "matmul");
  cudnnBackendDescriptor_t op = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, "matmul operation");
  LINK(g, op, OPERATION_MATMUL_ADESC, a);
  LINK(g, op, OPERATION_MATMUL_BDESC, b);
  LINK(g, op, OPERATION_MATMUL_CDESC, c);
  LINK(g, op, OPERATION_MATMUL_DESC, p);
  LINK(g, op, OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, m);
  LINK(g, op, OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, n);
  LINK(g, op, OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, k);
  add_op(g, op, "matmul operation");
}

void fd_dnn_reshape(struct fd_dnn_graph *g, fd_dnn_tensor x, fd_dnn_tensor y) {
  cudnnBackendDescriptor_t op = make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, "reshape operation");
  LINK(g, op, OPERATION_RESHAPE_XDESC, x);
  LINK(g, op, OPERATION_RESHAPE_YDESC, y);
  add_op(g, op, "reshape operation");
}

void fd_dnn_convolution(struct fd_dnn_graph *g, enum fd_dnn_conv_op what, const struct fd_dnn_conv *how, fd_dnn_tensor x, fd_dnn_tensor w,
                        fd_dnn_tensor y) {
  const cudnnDataType_t f32 = CUDNN_DATA_FLOAT;
  const cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
  const int64_t two = 2, dilation[2] = {1, 1};
  const float one = 1, zero = 0;
  cudnnBackendDescriptor_t c = make(g, CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, "convolution"), op;
  SET(g, c, CONVOLUTION_COMP_TYPE, DATA_TYPE, 1, &f32);
  SET(g, c, CONVOLUTION_CONV_MODE, CONVOLUTION_MODE, 1, &mode);
  SET(g, c, CONVOLUTION_SPATIAL_DIMS, INT64, 1, &two);
  SET(g, c, CONVOLUTION_PRE_PADDINGS, INT64, 2, how->before);
  SET(g, c, CONVOLUTION_POST_PADDINGS, INT64, 2, how->after);
  SET(g, c, CONVOLUTION_DILATIONS, INT64, 2, dilation);
  SET(g, c, CONVOLUTION_FILTER_STRIDES, INT64, 2, how->stride);
  finish(g, c, "convolution");
#define CONVOLUTION(TYPE, NAME, X, W, Y)                            \
  do {                                                              \
    op = make(g, CUDNN_BACKEND_OPERATION_##TYPE##_DESCRIPTOR, #TYPE); \
    LINK(g, op, OPERATION_##NAME##_##X, x);                         \
    LINK(g, op, OPERATION_##NAME##_##W, w);                         \
    LINK(g, op, OPERATION_##NAME##_##Y, y);                         \
    LINK(g, op, OPERATION_##NAME##_CONV_DESC, c);                   \
    SET(g, op, OPERATION_##NAME##_ALPHA, FLOAT, 1, &one);           \
    SET(g, op, OPERATION_##NAME##_BETA, FLOAT, 1, &zero);           \
    add_op(g, op, #TYPE);                                           \
  } while (0)
  if (what == FD_DNN_CONV_FORWARD)
    CONVOLUTION(CONVOLUTION_FORWARD, CONVOLUTION_FORWARD, X, W, Y);
  else if (what == FD_DNN_CONV_DATA)
    CONVOLUTION(CONVOLUTION_BACKWARD_DATA, CONVOLUTION_BWD_DATA, DX, W, DY);
  else
    CONVOLUTION(CONVOLUTION_BACKWARD_FILTER, CONVOLUTION_BWD_FILTER, X, DW, DY);
}

static void graph_free(struct fd_dnn_graph *g) {
  while (g->n_owned > 0) cudnnBackendDestroyDescriptor(g->owned[--g->n_owned]);
}

/* ---- from a graph to a plan -------------------------------------------------------------------------------------- */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Number of the configuration's engine, and whether it may give other bits each time. */
static void engine_of(cudnnBackendDescriptor_t config, int64_t *number, bool *varies) {
  cudnnBackendDescriptor_t engine = NULL;
  cudnnBackendNumericalNote_t note[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
  int64_t n = 0;
  *number = -1;
  *varies = true;
  if (cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine) != CUDNN_STATUS_SUCCESS) return;
  if (cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &n, &engine) == CUDNN_STATUS_SUCCESS) {
    cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &n, number);
    n = 0;
    if (cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE, CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &n, note) ==
        CUDNN_STATUS_SUCCESS) {
      *varies = false;
      for (int64_t i = 0; i < n && i < CUDNN_NUMERICAL_NOTE_TYPE_COUNT; i++) *varies |= note[i] == CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC;
    }
  }
  cudnnBackendDestroyDescriptor(engine);
}

static cudnnStatus_t workspace_of(struct fd_dnn_plan *p) {
  int64_t n;
  return cudnnBackendGetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n, &p->workspace);
}

/* One configuration: true if it became the plan. Else g->why says why not, but the graph is still good. */
static bool try_config(struct fd_dnn *dnn, struct fd_dnn_graph *g, cudnnBackendDescriptor_t config, bool deterministic, struct fd_dnn_plan *p) {
  bool varies;
  engine_of(config, &p->engine, &varies);
  if (deterministic && varies) {
    snprintf(g->why, sizeof g->why, "engine %lld is not deterministic", (long long)p->engine);
    return false;
  }
  cudnnStatus_t s = cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &p->plan);
  if (s == CUDNN_STATUS_SUCCESS && dnn->handle)
    s = cudnnBackendSetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &dnn->handle);
  if (s == CUDNN_STATUS_SUCCESS)
    s = cudnnBackendSetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config);
  if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendFinalize(p->plan);
  if (s == CUDNN_STATUS_SUCCESS) s = workspace_of(p);
  if (s == CUDNN_STATUS_SUCCESS) return true;
  char text[400] = "";
  cudnnGetLastErrorString(text, sizeof text);
  snprintf(g->why, sizeof g->why, "engine %lld: %s%s%s", (long long)p->engine, cudnnGetErrorString(s), *text ? ": " : "", text);
  if (p->plan) cudnnBackendDestroyDescriptor(p->plan);
  p->plan = NULL;
  return false;
}

static void try_heuristic(struct fd_dnn *dnn, struct fd_dnn_graph *g, cudnnBackendDescriptor_t graph, cudnnBackendHeurMode_t mode,
                          bool deterministic, struct fd_dnn_plan *p) {
  cudnnBackendDescriptor_t h = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, "heuristics"), config[MAX_CONFIGS];
  int64_t n = 0, made = 0;
  LINK(g, h, ENGINEHEUR_OPERATION_GRAPH, graph);
  SET(g, h, ENGINEHEUR_MODE, HEUR_MODE, 1, &mode);
  if (!dnn->handle) LINK(g, h, ENGINEHEUR_DEVICEPROP, dnn->properties);
  if (g->status != CUDNN_STATUS_SUCCESS) return;
  cudnnStatus_t s = cudnnBackendFinalize(h);
  if (s != CUDNN_STATUS_SUCCESS) {
    char text[400] = "";
    cudnnGetLastErrorString(text, sizeof text);
    snprintf(g->why, sizeof g->why, "heuristics: %s%s%s", cudnnGetErrorString(s), *text ? ": " : "", text);
    return; /* the next kind of heuristics may know more */
  }
  while (made < MAX_CONFIGS && cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, &config[made]) == CUDNN_STATUS_SUCCESS) made++;
  cudnnBackendGetAttribute(h, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, made, &n, config);
  if (n > made) n = made;
  if (n == 0) snprintf(g->why, sizeof g->why, "the heuristics know no engine");
  for (int64_t i = 0; i < n && !p->plan; i++) (void)try_config(dnn, g, config[i], deterministic, p);
  for (int64_t i = 0; i < made; i++) cudnnBackendDestroyDescriptor(config[i]); /* a plan keeps its own */
}

static void plan_make(struct fd_dnn *dnn, struct fd_dnn_graph *g, bool deterministic, struct fd_dnn_plan *p) {
  cudnnBackendDescriptor_t graph = make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, "graph");
  SET(g, graph, OPERATIONGRAPH_OPS, BACKEND_DESCRIPTOR, g->n_ops, g->op);
  if (dnn->handle) SET(g, graph, OPERATIONGRAPH_HANDLE, HANDLE, 1, &dnn->handle);
  finish(g, graph, "graph");
  try_heuristic(dnn, g, graph, CUDNN_HEUR_MODE_A, deterministic, p);
  if (!p->plan) try_heuristic(dnn, g, graph, CUDNN_HEUR_MODE_FALLBACK, deterministic, p);
}

/* ---- on disk ----------------------------------------------------------------------------------------------------- */

/* The plan's file: its name is a hash of all that the plan depends on. */
static void file_of(fd_ctx *ctx, const struct fd_dnn *dnn, const char *key, char *path, size_t bytes) {
  char all[FD_DNN_KEY + 400];
  uint64_t hash = 14695981039346656037u;
  snprintf(all, sizeof all, "%d %s | %s | cuDNN %zu", FORMAT, key, dnn->device, cudnnGetVersion());
  for (const char *c = all; *c; c++) hash = (hash ^ (unsigned char)*c) * 1099511628211u;
  snprintf(path, bytes, "%s/cudnn-plans/%016llx.json", ctx->cache_dir, (unsigned long long)hash);
}

static void plan_read(struct fd_dnn *dnn, const char *path, struct fd_dnn_plan *p) {
  cudnnStatus_t s = CUDNN_STATUS_INTERNAL_ERROR;
  char *text = NULL, why[400] = "cannot be read";
  FILE *f = fopen(path, "rb");
  if (!f) return; /* nothing kept yet */
  if (fseek(f, 0, SEEK_END) == 0) {
    const long n = ftell(f);
    text = n > 0 ? malloc((size_t)n + 1) : NULL;
    if (text && fseek(f, 0, SEEK_SET) == 0 && fread(text, 1, (size_t)n, f) == (size_t)n) {
      text[n] = 0;
      s = cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &p->plan);
      if (s == CUDNN_STATUS_SUCCESS)
        s = dnn->handle ? cudnnBackendSetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &dnn->handle)
                        : cudnnBackendSetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1,
                                                   &dnn->properties);
      if (s == CUDNN_STATUS_SUCCESS)
        s = cudnnBackendSetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, n + 1, text);
      if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendFinalize(p->plan);
      if (s == CUDNN_STATUS_SUCCESS) s = workspace_of(p);
      if (s != CUDNN_STATUS_SUCCESS) {
        const int used = snprintf(why, sizeof why, "%s: ", cudnnGetErrorString(s));
        cudnnGetLastErrorString(why + used, sizeof why - (size_t)used);
      }
    }
  }
  fclose(f);
  free(text);
  p->engine = -1;
  if (s == CUDNN_STATUS_SUCCESS) return;
  fd_log_info("cuDNN: the plan in %s is not used (%s); it is made again", path, why);
  if (p->plan) cudnnBackendDestroyDescriptor(p->plan);
  p->plan = NULL;
}

/* Under another name first, so that no rank reads half of it. A folder that cannot be written costs time in the next run, no more. */
static void plan_write(fd_ctx *ctx, const char *path, const struct fd_dnn_plan *p) {
  char part[4200], folder[4096];
  int64_t n = 0;
  if (fd_comm_rank(ctx->comm) != 0) return;
  snprintf(folder, sizeof folder, "%s/cudnn-plans", ctx->cache_dir);
  snprintf(part, sizeof part, "%s.%ld.part", path, (long)getpid());
  cudnnBackendGetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, 0, &n, NULL);
  char *text = n > 0 ? calloc((size_t)n + 1, 1) : NULL;
  if (!text) return; /* an engine without such a text */
  if (cudnnBackendGetAttribute(p->plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, n, &n, text) == CUDNN_STATUS_SUCCESS) {
    const size_t bytes = strnlen(text, (size_t)n);
    FILE *f = fd_folder_make(folder) == FD_OK ? fopen(part, "wb") : NULL;
    bool good = f && fwrite(text, 1, bytes, f) == bytes;
    if (f) good = fclose(f) == 0 && good;
    if (!good || rename(part, path) != 0) {
      fd_log_info("cuDNN: %s is not kept: %s", path, strerror(errno));
      unlink(part);
    }
  }
  free(text);
}

/* ---- plans of a context ------------------------------------------------------------------------------------------ */

static fd_status dnn_of(fd_ctx *ctx, struct fd_dnn **out) {
  struct fd_cuda *c = fd_cuda_of(ctx);
  if (!c->dnn) {
    struct cudaDeviceProp properties;
    struct fd_dnn *dnn = calloc(1, sizeof *dnn);
    if (!dnn) return FD_FAIL(FD_ERR_NOMEM, "no memory");
    c->dnn = dnn;
    fd_status st = FD_CUDA(cudaGetDeviceProperties(&properties, c->device));
    if (st != FD_OK) return st;
    snprintf(dnn->device, sizeof dnn->device, "%s, %d.%d, %d multiprocessors", properties.name, properties.major, properties.minor,
             properties.multiProcessorCount);
    cudnnStatus_t s = cudnnCreate(&dnn->handle);
    if (s == CUDNN_STATUS_SUCCESS) s = cudnnSetStream(dnn->handle, c->stream);
    if (s != CUDNN_STATUS_SUCCESS) {
      char text[400] = "";
      cudnnGetLastErrorString(text, sizeof text);
      return FD_FAIL(FD_ERR_UNSUPPORTED,
                     "cuDNN %zu does not start on %s: %s: %s; check that driver and cuDNN are of the same CUDA release (nvidia-smi), "
                     "or run with trainer.backend = \"cpu\"",
                     cudnnGetVersion(), dnn->device, cudnnGetErrorString(s), text);
    }
  }
  *out = c->dnn;
  return FD_OK;
}

fd_status fd_dnn_plan_find(fd_ctx *ctx, const char *name, void (*build)(struct fd_dnn_graph *g, const void *shape), const void *shape,
                           const struct fd_dnn_plan **out) {
  struct fd_dnn *dnn = NULL;
  char path[4096] = "", key[FD_DNN_KEY];
  *out = NULL;
  snprintf(key, sizeof key, "%s%s", name, ctx->deterministic ? ", deterministic" : "");
  fd_status st = dnn_of(ctx, &dnn);
  if (st != FD_OK) return st;
  for (int i = 0; i < dnn->n; i++)
    if (strcmp(dnn->plan[i]->key, key) == 0) {
      if (dnn->plan[i]->plan) *out = dnn->plan[i];
      return FD_OK;
    }
  struct fd_dnn_plan **more = realloc(dnn->plan, sizeof *more * (size_t)(dnn->n + 1)), *p = calloc(1, sizeof *p);
  struct fd_dnn_graph *g = calloc(1, sizeof *g);
  if (more) dnn->plan = more;
  if (!more || !p || !g) {
    free(p), free(g);
    return FD_FAIL(FD_ERR_NOMEM, "no memory for a cuDNN plan");
  }
  const double began = now();
  snprintf(p->key, sizeof p->key, "%s", key);
  if (ctx->cache_dir) {
    file_of(ctx, dnn, key, path, sizeof path);
    plan_read(dnn, path, p);
  }
  if (!p->plan) {
    g->next_uid = 100;
    build(g, shape);
    plan_make(dnn, g, ctx->deterministic, p);
    if (p->plan && ctx->cache_dir) plan_write(ctx, path, p);
    if (!p->plan)
      fd_log_info("cuDNN %zu has no plan on %s for %s (%s): the backend's own kernels do it", cudnnGetVersion(), dnn->device, key, g->why);
  }
  p->seconds = now() - began;
  graph_free(g);
  free(g);
  dnn->plan[dnn->n++] = p;
  if (p->plan) *out = p;
  return FD_OK;
}

fd_status fd_dnn_run(fd_ctx *ctx, const struct fd_dnn_plan *p, int n, const int64_t *uid, void *const *data, void *workspace) {
  struct fd_dnn *dnn = NULL;
  cudnnBackendDescriptor_t pack = NULL;
  fd_status st = dnn_of(ctx, &dnn);
  if (st != FD_OK) return st;
  cudnnStatus_t s = cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
  if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, data);
  if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, uid);
  if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendFinalize(pack);
  if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendExecute(dnn->handle, p->plan, pack);
  if (s != CUDNN_STATUS_SUCCESS) {
    char text[400] = "";
    cudnnGetLastErrorString(text, sizeof text);
    st = FD_FAIL(FD_ERR_UNSUPPORTED, "cuDNN %zu: %s (engine %lld) does not run: %s: %s; remove the folder cudnn-plans if it came from another machine",
                 cudnnGetVersion(), p->key, (long long)p->engine, cudnnGetErrorString(s), text);
  }
  if (pack) cudnnBackendDestroyDescriptor(pack);
  return st;
}

int fd_dnn_plans(fd_ctx *ctx, struct fd_dnn_plan *const **plans) {
  const struct fd_dnn *dnn = fd_cuda_of(ctx)->dnn;
  *plans = dnn ? dnn->plan : NULL;
  return dnn ? dnn->n : 0;
}

fd_status fd_dnn_open_without_device(fd_ctx *ctx, const char *properties) {
  struct fd_dnn *dnn = calloc(1, sizeof *dnn);
  char text[8192];
  FILE *f = fopen(properties, "rb");
  if (!dnn) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  fd_cuda_of(ctx)->dnn = dnn;
  if (!f) return FD_FAIL(FD_ERR_IO, "%s: %s", properties, strerror(errno));
  size_t n = fread(text, 1, sizeof text - 1, f);
  fclose(f);
  while (n > 0 && text[n - 1] == '\n') n--;
  text[n] = 0;
  snprintf(dnn->device, sizeof dnn->device, "the device of %.250s", properties);
  cudnnStatus_t s = cudnnBackendCreateDescriptor(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &dnn->properties);
  if (s == CUDNN_STATUS_SUCCESS)
    s = cudnnBackendSetAttribute(dnn->properties, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, (int64_t)n, text);
  if (s == CUDNN_STATUS_SUCCESS) s = cudnnBackendFinalize(dnn->properties);
  if (s == CUDNN_STATUS_SUCCESS) return FD_OK;
  cudnnGetLastErrorString(text, sizeof text);
  return FD_FAIL(FD_ERR_UNSUPPORTED, "cuDNN %zu: %s: %s: %s", cudnnGetVersion(), properties, cudnnGetErrorString(s), text);
}

void fd_dnn_close(fd_ctx *ctx) {
  struct fd_dnn *dnn = fd_cuda_of(ctx)->dnn;
  if (!dnn) return;
  for (int i = 0; i < dnn->n; i++) {
    if (dnn->plan[i]->plan) cudnnBackendDestroyDescriptor(dnn->plan[i]->plan);
    free(dnn->plan[i]);
  }
  free(dnn->plan);
  if (dnn->properties) cudnnBackendDestroyDescriptor(dnn->properties);
  if (dnn->handle) cudnnDestroy(dnn->handle);
  free(dnn);
  fd_cuda_of(ctx)->dnn = NULL;
}
