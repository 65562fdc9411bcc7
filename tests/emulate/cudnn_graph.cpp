// SPDX-License-Identifier: Apache-2.0
// cuDNN's backend interface on the CPU: descriptors, graphs, plans, and an interpreter of graphs, on copies. It refuses what the real library
// refuses, and is strict where that one leaves a result undefined:
//  - Memory is read and written when the stream gets there; by-value scalars are copied when the plan is handed over.
//  - The workspace is spoilt before and after each run.
//  - A matrix product beyond the lengths that override M and N: NaN in memory, huge numbers inside the graph; NaN there if an operand has one.
//    The length that overrides K shortens nothing: what lies beyond must be multiplied by zeros that the graph itself makes.
//  - A bound tensor that a product writes and a later operation reads is added to, in an order that changes from run to run (dq of attention).
#include "tests/emulate/cudnn_graph.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "tests/emulate/emulate.h"

struct cudnnContext {
  cudaStream_t stream;
};

namespace {

enum { FORMAT = 1, NONE = -1, ENGINES = 2, MAX_BOUND = 32 };
const size_t VERSION = 90000;
const int64_t WORKSPACE[ENGINES] = {768, 512};
const float HUGE_BUT_FINITE = 0x1p126f;

/* ---- errors ------------------------------------------------------------------------------------------------------ */

std::string last_error;

__attribute__((format(printf, 2, 3))) cudnnStatus_t no(cudnnStatus_t s, const char *format, ...) {
  char text[400];
  va_list ap;
  va_start(ap, format);
  vsnprintf(text, sizeof text, format, ap);
  va_end(ap);
  last_error = text;
  return s;
}
#define BAD(...) return no(CUDNN_STATUS_BAD_PARAM, __VA_ARGS__)
#define UNSUPPORTED(...) return no(CUDNN_STATUS_NOT_SUPPORTED, __VA_ARGS__)

/* ---- graphs ------------------------------------------------------------------------------------------------------ */

struct tensor { /* all int64_t: written to disk as such */
  int64_t uid, type, align, inner, by_value, dim[4], stride[4];
};
struct op {
  int64_t kind; /* the descriptor's type */
  int64_t mode, precision, axis;
  int64_t x, b, t, y, m, n, k; /* uids, or NONE. matmul: y = x b; convolution: x, b = weights, y */
  int64_t before[2], after[2], stride[2];
};
struct program {
  std::map<int64_t, tensor> tensors;
  std::vector<op> ops;
  const tensor &at(int64_t uid) const { return tensors.at(uid); }
};

int64_t result_of(const op &o) {
  return o.kind == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR     ? o.x
         : o.kind == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR ? o.b
                                                                                   : o.y;
}
std::vector<int64_t> operands_of(const op &o) {
  std::vector<int64_t> all;
  for (int64_t uid : {o.x, o.b, o.t, o.y, o.m, o.n, o.k})
    if (uid != NONE && uid != result_of(o)) all.push_back(uid);
  return all;
}

int64_t count(const tensor &t) { return t.dim[0] * t.dim[1] * t.dim[2] * t.dim[3]; }
int64_t extent(const tensor &t) { /* elements from the first to the last */
  int64_t n = 1;
  for (int i = 0; i < 4; i++) n += (t.dim[i] - 1) * t.stride[i];
  return n;
}
size_t bytes_of(int64_t type) { return type == CUDNN_DATA_BFLOAT16 ? 2 : type == CUDNN_DATA_BOOLEAN ? 1 : 4; }
bool is_float(const tensor &t) { return t.type == CUDNN_DATA_FLOAT || t.type == CUDNN_DATA_BFLOAT16; }
bool same_lengths(const tensor &a, const tensor &b) { return std::equal(a.dim, a.dim + 4, b.dim); }
bool broadcasts(const tensor &a, const tensor &to) {
  for (int i = 0; i < 4; i++)
    if (a.dim[i] != to.dim[i] && a.dim[i] != 1) return false;
  return true;
}

int operands(int64_t mode) {
  switch (mode) {
  case CUDNN_POINTWISE_EXP: case CUDNN_POINTWISE_LOG: case CUDNN_POINTWISE_IDENTITY: case CUDNN_POINTWISE_GEN_INDEX: return 1;
  case CUDNN_POINTWISE_ADD: case CUDNN_POINTWISE_SUB: case CUDNN_POINTWISE_MUL: case CUDNN_POINTWISE_DIV: case CUDNN_POINTWISE_CMP_GE: case CUDNN_POINTWISE_CMP_LT:
  case CUDNN_POINTWISE_LOGICAL_AND: return 2;
  case CUDNN_POINTWISE_BINARY_SELECT: return 3;
  }
  return 0;
}

cudnnStatus_t check_pointwise(const program &p, const op &o) {
  const tensor &x = p.at(o.x), &y = p.at(o.y);
  const int n = operands(o.mode);
  if (n == 0) UNSUPPORTED("pointwise mode %lld", (long long)o.mode);
  if ((o.b != NONE) != (n > 1) || (o.t != NONE) != (n > 2)) BAD("pointwise mode %lld takes %d tensors", (long long)o.mode, n);
  if (!same_lengths(x, y)) BAD("pointwise: x and y have different lengths");
  if ((n > 1 && !broadcasts(p.at(o.b), y)) || (n > 2 && !broadcasts(p.at(o.t), y))) BAD("pointwise: a length is neither that of y nor 1");
  bool right;
  int64_t precision = CUDNN_DATA_FLOAT;
  switch (o.mode) {
  case CUDNN_POINTWISE_GEN_INDEX:
    right = y.type == CUDNN_DATA_INT32 && o.axis >= 0 && o.axis < 4;
    precision = CUDNN_DATA_INT32;
    break;
  case CUDNN_POINTWISE_CMP_GE: case CUDNN_POINTWISE_CMP_LT:
    right = x.type == p.at(o.b).type && x.type != CUDNN_DATA_BOOLEAN && y.type == CUDNN_DATA_BOOLEAN;
    precision = CUDNN_DATA_BOOLEAN;
    break;
  case CUDNN_POINTWISE_LOGICAL_AND:
    right = x.type == CUDNN_DATA_BOOLEAN && p.at(o.b).type == CUDNN_DATA_BOOLEAN && y.type == CUDNN_DATA_BOOLEAN;
    precision = CUDNN_DATA_BOOLEAN;
    break;
  default: right = is_float(x) && is_float(y) && (n < 2 || is_float(p.at(o.b))) && (n < 3 || p.at(o.t).type == CUDNN_DATA_BOOLEAN);
  }
  if (!right || o.precision != precision) BAD("pointwise mode %lld: types, precision or axis do not fit", (long long)o.mode);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t check_reduction(const tensor &x, const tensor &y) {
  for (int i = 0; i < 4; i++) /* heads: also to one for each group */
    if (y.dim[i] != x.dim[i] && y.dim[i] != 1 && (i != 1 || x.dim[1] % y.dim[1])) BAD("reduction: lengths");
  if (!is_float(x) || !is_float(y)) BAD("reduction: types");
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t check_matmul(const program &p, const op &o) {
  const tensor &a = p.at(o.x), &b = p.at(o.b), &c = p.at(o.y);
  if (!is_float(a) || !is_float(b) || !is_float(c)) BAD("matmul: types");
  if (a.dim[3] != b.dim[2] || c.dim[2] != a.dim[2] || c.dim[3] != b.dim[3]) BAD("matmul: lengths of rows and columns");
  if (b.dim[0] != a.dim[0] || c.dim[0] != a.dim[0] || c.dim[1] != a.dim[1] || a.dim[1] % b.dim[1]) BAD("matmul: batch or heads");
  for (int64_t uid : {o.m, o.n, o.k}) {
    if (uid == NONE) continue;
    const tensor &l = p.at(uid);
    if (l.type != CUDNN_DATA_INT32 || l.inner || l.dim[0] != a.dim[0] || count(l) != l.dim[0]) BAD("matmul: lengths must be int32 [B, 1, 1, 1]");
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t check_convolution(const program &p, const op &o) {
  const tensor &x = p.at(o.x), &w = p.at(o.b), &y = p.at(o.y);
  if (!is_float(x) || !is_float(w) || !is_float(y)) BAD("convolution: types");
  if (x.dim[0] != y.dim[0] || x.dim[1] != w.dim[1] || y.dim[1] != w.dim[0]) BAD("convolution: batch or channels");
  for (int i = 0; i < 2; i++) {
    const int64_t padded = x.dim[2 + i] + o.before[i] + o.after[i];
    if (o.before[i] < 0 || o.after[i] < 0 || o.stride[i] < 1 || padded < w.dim[2 + i] ||
        y.dim[2 + i] != (padded - w.dim[2 + i]) / o.stride[i] + 1)
      BAD("convolution: y is %lld long, not as x, padding and stride say", (long long)y.dim[2 + i]);
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t check_op(const program &p, const op &o) {
  switch (o.kind) {
  case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR: return check_pointwise(p, o);
  case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR: return check_matmul(p, o);
  case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR:
    if (o.mode != CUDNN_REDUCE_TENSOR_ADD && o.mode != CUDNN_REDUCE_TENSOR_MAX) UNSUPPORTED("reduction %lld", (long long)o.mode);
    return check_reduction(p.at(o.x), p.at(o.y));
  case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR:
    if (count(p.at(o.x)) != count(p.at(o.y)) || extent(p.at(o.x)) != extent(p.at(o.y)) || !is_float(p.at(o.x)) || !is_float(p.at(o.y)))
      BAD("reshape: other elements than before");
    return CUDNN_STATUS_SUCCESS;
  default: return check_convolution(p, o);
  }
}

/* What holds for every graph: lengths and types fit, and each tensor is given or made once, before it is read. */
cudnnStatus_t check(const program &p) {
  std::set<int64_t> made, read;
  if (p.ops.empty()) BAD("a graph without operations");
  for (const op &o : p.ops) {
    const tensor &y = p.at(result_of(o));
    for (int64_t uid : operands_of(o)) {
      if (p.at(uid).inner && !made.count(uid)) BAD("tensor %lld is read before an operation has made it", (long long)uid);
      read.insert(uid);
    }
    if (y.by_value || read.count(y.uid) || !made.insert(y.uid).second) BAD("tensor %lld is given, read before or made twice", (long long)y.uid);
    if (!y.inner && extent(y) != count(y)) UNSUPPORTED("tensor %lld: a result with gaps or overlaps", (long long)y.uid);
    const cudnnStatus_t s = check_op(p, o);
    if (s != CUDNN_STATUS_SUCCESS) return s;
  }
  for (const auto &t : p.tensors)
    if (t.second.inner && !read.count(t.first)) BAD("tensor %lld is made and never read", (long long)t.first);
  return CUDNN_STATUS_SUCCESS;
}

/* Bound tensors that products add to, because a later operation reads them. */
std::set<int64_t> accumulators(const program &p) {
  std::set<int64_t> products, both;
  for (const op &o : p.ops) {
    for (int64_t uid : operands_of(o))
      if (products.count(uid)) both.insert(uid);
    if (o.kind == CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR && !p.at(o.y).inner && p.at(o.y).type == CUDNN_DATA_FLOAT) products.insert(o.y);
  }
  return both;
}

/* Whether an engine can do it. The real library has other limits; these leave some work to the backend's own kernels, so that both are tested. */
cudnnStatus_t supported(const program &p, int64_t engine) {
  std::set<int64_t> masked;
  if (engine == 1 && !accumulators(p).empty()) UNSUPPORTED("a result that blocks add to in any order");
  for (const op &o : p.ops) {
    const int64_t y = result_of(o);
    bool after_mask = o.mode == CUDNN_POINTWISE_BINARY_SELECT && o.kind == CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR;
    for (int64_t uid : operands_of(o)) after_mask |= masked.count(uid) != 0;
    if (after_mask) masked.insert(y);
    switch (o.kind) {
    case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
      if (!p.at(o.x).inner && !p.at(o.b).inner && (p.at(o.x).dim[3] % 8 || p.at(o.x).dim[3] > 256))
        UNSUPPORTED("attention: %lld elements a head", (long long)p.at(o.x).dim[3]);
      break;
    case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR:
      /* on sm_90 kernels without it give NaN for some lengths */
      if (o.mode == CUDNN_POINTWISE_EXP && !after_mask) UNSUPPORTED("attention without a length mask");
      break;
    case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR: case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR: break;
    default:
      if (p.at(o.x).dim[1] % 8) UNSUPPORTED("convolution of %lld channels", (long long)p.at(o.x).dim[1]);
      for (int64_t uid : {o.x, o.b, o.y}) {
        const tensor &t = p.at(uid);
        if (t.stride[1] != 1) UNSUPPORTED("convolution: channels are not last");
        if (t.type != CUDNN_DATA_BFLOAT16 && !(t.uid == y && t.inner)) UNSUPPORTED("convolution: f32 in memory");
      }
    }
  }
  return CUDNN_STATUS_SUCCESS;
}

/* ---- plans as text ----------------------------------------------------------------------------------------------- */

template <class T> json_t *numbers_of(const T &x) {
  json_t *list = json_array();
  for (size_t i = 0; i < sizeof x / sizeof(int64_t); i++) json_array_append_new(list, json_integer(((const int64_t *)&x)[i]));
  return list;
}
template <class T> bool from_numbers(const json_t *list, T *x) {
  if (json_array_size(list) != sizeof *x / sizeof(int64_t)) return false;
  for (size_t i = 0; i < json_array_size(list); i++) {
    if (!json_is_integer(json_array_get(list, i))) return false;
    ((int64_t *)x)[i] = json_integer_value(json_array_get(list, i));
  }
  return true;
}

std::string text_of(const program &p, int64_t engine) {
  json_t *tensors = json_array(), *ops = json_array();
  for (const auto &t : p.tensors) json_array_append_new(tensors, numbers_of(t.second));
  for (const op &o : p.ops) json_array_append_new(ops, numbers_of(o));
  json_t *all = json_pack("{s:i, s:I, s:I, s:o, s:o}", "emulated", (int)FORMAT, "version", (json_int_t)VERSION, "engine", (json_int_t)engine, "tensors",
                          tensors, "ops", ops);
  char *text = json_dumps(all, JSON_COMPACT);
  const std::string s = text;
  free(text);
  json_decref(all);
  return s;
}

bool names_tensors(const program &p, const op &o) {
  const int64_t kinds[] = {CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR,
                           CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR,
                           CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR, CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
                           CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR};
  const bool two = o.kind == kinds[0] || o.kind == kinds[2] || o.kind == kinds[3]; /* the others need b */
  for (int64_t uid : {o.x, o.b, o.t, o.y, o.m, o.n, o.k})
    if (uid != NONE && !p.tensors.count(uid)) return false;
  return std::count(kinds, kinds + 7, o.kind) && o.x != NONE && o.y != NONE && (two || o.b != NONE);
}

cudnnStatus_t from_text(const char *text, size_t bytes, program *p, int64_t *engine) {
  json_error_t error;
  json_t *tensors, *ops, *all = json_loadb(text, strnlen(text, bytes), 0, &error);
  int format;
  json_int_t version, number;
  if (!all) BAD("not JSON: %s", error.text);
  std::unique_ptr<json_t, void (*)(json_t *)> owner(all, json_decref);
  if (json_unpack_ex(all, &error, 0, "{s:i, s:I, s:I, s:o, s:o}", "emulated", &format, "version", &version, "engine", &number, "tensors", &tensors,
                     "ops", &ops))
    BAD("not a plan: %s", error.text);
  if (format != FORMAT || version != (json_int_t)VERSION) BAD("a plan of another version");
  if (number < 0 || number >= ENGINES) BAD("engine %lld", (long long)number);
  for (size_t i = 0; i < json_array_size(tensors); i++) {
    tensor t;
    if (!from_numbers(json_array_get(tensors, i), &t)) BAD("tensor %zu of the plan", i);
    p->tensors[t.uid] = t;
  }
  for (size_t i = 0; i < json_array_size(ops); i++) {
    op o;
    if (!from_numbers(json_array_get(ops, i), &o) || !names_tensors(*p, o)) BAD("operation %zu of the plan", i);
    p->ops.push_back(o);
  }
  *engine = number;
  return check(*p);
}

/* ---- descriptors ------------------------------------------------------------------------------------------------- */

struct descriptor;
typedef std::shared_ptr<descriptor> ref;
struct value {
  int64_t n;
  std::vector<char> bytes;
  std::vector<ref> refs;
};
struct descriptor {
  int type;
  bool finalized;
  std::map<int, value> set;
  std::shared_ptr<program> graph; /* of a graph, configuration or plan */
  int64_t engine;
};
struct holder { /* what a caller's pointer points at; copies of the descriptor live on in others */
  ref d;
};
std::set<void *> holders;
long executions;

/* Attributes that may be set: of which descriptor, element type, how many, whether one must; which descriptor it names (ANY_OPERATION: an
   operation) */
enum { ANY_OPERATION = -2 };
struct rule {
  int descriptor, attribute, type;
  int64_t least, most;
  bool must;
  int names;
};
#define RULE(D, A, T, LEAST, MOST, MUST) {CUDNN_BACKEND_##D##_DESCRIPTOR, CUDNN_ATTR_##A, CUDNN_TYPE_##T, LEAST, MOST, MUST, NONE}
#define NAMES(D, A, MUST, OF) \
  {CUDNN_BACKEND_##D##_DESCRIPTOR, CUDNN_ATTR_##A, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, 1, MUST, CUDNN_BACKEND_##OF##_DESCRIPTOR}
#define CONVOLUTION(D, A, X, W, Y)                                                                                         \
  NAMES(D, A##_CONV_DESC, true, CONVOLUTION), NAMES(D, A##_##X, true, TENSOR), NAMES(D, A##_##W, true, TENSOR),             \
      NAMES(D, A##_##Y, true, TENSOR), RULE(D, A##_ALPHA, FLOAT, 1, 1, true), RULE(D, A##_BETA, FLOAT, 1, 1, true)
const rule rules[] = {
    RULE(TENSOR, TENSOR_DATA_TYPE, DATA_TYPE, 1, 1, true),
    RULE(TENSOR, TENSOR_DIMENSIONS, INT64, 4, 4, true),
    RULE(TENSOR, TENSOR_STRIDES, INT64, 4, 4, true),
    RULE(TENSOR, TENSOR_UNIQUE_ID, INT64, 1, 1, true),
    RULE(TENSOR, TENSOR_BYTE_ALIGNMENT, INT64, 1, 1, true),
    RULE(TENSOR, TENSOR_IS_VIRTUAL, BOOLEAN, 1, 1, false),
    RULE(TENSOR, TENSOR_IS_BY_VALUE, BOOLEAN, 1, 1, false),
    RULE(POINTWISE, POINTWISE_MODE, POINTWISE_MODE, 1, 1, true),
    RULE(POINTWISE, POINTWISE_MATH_PREC, DATA_TYPE, 1, 1, true),
    RULE(POINTWISE, POINTWISE_AXIS, INT64, 1, 1, false),
    RULE(REDUCTION, REDUCTION_OPERATOR, REDUCTION_OPERATOR_TYPE, 1, 1, true),
    RULE(REDUCTION, REDUCTION_COMP_TYPE, DATA_TYPE, 1, 1, true),
    RULE(REDUCTION, REDUCTION_IS_DETERMINISTIC, BOOLEAN, 1, 1, false),
    RULE(MATMUL, MATMUL_COMP_TYPE, DATA_TYPE, 1, 1, true),
    RULE(CONVOLUTION, CONVOLUTION_COMP_TYPE, DATA_TYPE, 1, 1, true),
    RULE(CONVOLUTION, CONVOLUTION_CONV_MODE, CONVOLUTION_MODE, 1, 1, true),
    RULE(CONVOLUTION, CONVOLUTION_SPATIAL_DIMS, INT64, 1, 1, true),
    RULE(CONVOLUTION, CONVOLUTION_PRE_PADDINGS, INT64, 2, 2, true),
    RULE(CONVOLUTION, CONVOLUTION_POST_PADDINGS, INT64, 2, 2, true),
    RULE(CONVOLUTION, CONVOLUTION_DILATIONS, INT64, 2, 2, true),
    RULE(CONVOLUTION, CONVOLUTION_FILTER_STRIDES, INT64, 2, 2, true),
    NAMES(OPERATION_POINTWISE, OPERATION_POINTWISE_PW_DESCRIPTOR, true, POINTWISE),
    NAMES(OPERATION_POINTWISE, OPERATION_POINTWISE_XDESC, true, TENSOR),
    NAMES(OPERATION_POINTWISE, OPERATION_POINTWISE_BDESC, false, TENSOR),
    NAMES(OPERATION_POINTWISE, OPERATION_POINTWISE_TDESC, false, TENSOR),
    NAMES(OPERATION_POINTWISE, OPERATION_POINTWISE_YDESC, true, TENSOR),
    RULE(OPERATION_POINTWISE, OPERATION_POINTWISE_ALPHA1, FLOAT, 1, 1, false),
    RULE(OPERATION_POINTWISE, OPERATION_POINTWISE_ALPHA2, FLOAT, 1, 1, false),
    NAMES(OPERATION_REDUCTION, OPERATION_REDUCTION_DESC, true, REDUCTION),
    NAMES(OPERATION_REDUCTION, OPERATION_REDUCTION_XDESC, true, TENSOR),
    NAMES(OPERATION_REDUCTION, OPERATION_REDUCTION_YDESC, true, TENSOR),
    NAMES(OPERATION_MATMUL, OPERATION_MATMUL_DESC, true, MATMUL),
    NAMES(OPERATION_MATMUL, OPERATION_MATMUL_ADESC, true, TENSOR),
    NAMES(OPERATION_MATMUL, OPERATION_MATMUL_BDESC, true, TENSOR),
    NAMES(OPERATION_MATMUL, OPERATION_MATMUL_CDESC, true, TENSOR),
    NAMES(OPERATION_MATMUL, OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, false, TENSOR),
    NAMES(OPERATION_MATMUL, OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, false, TENSOR),
    NAMES(OPERATION_MATMUL, OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, false, TENSOR),
    NAMES(OPERATION_RESHAPE, OPERATION_RESHAPE_XDESC, true, TENSOR),
    NAMES(OPERATION_RESHAPE, OPERATION_RESHAPE_YDESC, true, TENSOR),
    CONVOLUTION(OPERATION_CONVOLUTION_FORWARD, OPERATION_CONVOLUTION_FORWARD, X, W, Y),
    CONVOLUTION(OPERATION_CONVOLUTION_BACKWARD_DATA, OPERATION_CONVOLUTION_BWD_DATA, DX, W, DY),
    CONVOLUTION(OPERATION_CONVOLUTION_BACKWARD_FILTER, OPERATION_CONVOLUTION_BWD_FILTER, X, DW, DY),
    {CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, 100, true, ANY_OPERATION},
    RULE(OPERATIONGRAPH, OPERATIONGRAPH_HANDLE, HANDLE, 1, 1, false),
    RULE(DEVICEPROP, DEVICEPROP_JSON_REPRESENTATION, CHAR, 1, INT64_MAX, true),
    NAMES(ENGINEHEUR, ENGINEHEUR_OPERATION_GRAPH, true, OPERATIONGRAPH),
    RULE(ENGINEHEUR, ENGINEHEUR_MODE, HEUR_MODE, 1, 1, true),
    NAMES(ENGINEHEUR, ENGINEHEUR_DEVICEPROP, false, DEVICEPROP),
    RULE(EXECUTION_PLAN, EXECUTION_PLAN_HANDLE, HANDLE, 1, 1, false),
    NAMES(EXECUTION_PLAN, EXECUTION_PLAN_DEVICEPROP, false, DEVICEPROP),
    NAMES(EXECUTION_PLAN, EXECUTION_PLAN_ENGINE_CONFIG, false, ENGINECFG),
    RULE(EXECUTION_PLAN, EXECUTION_PLAN_JSON_REPRESENTATION, CHAR, 1, INT64_MAX, false),
    RULE(VARIANT_PACK, VARIANT_PACK_UNIQUE_IDS, INT64, 1, MAX_BOUND, true),
    RULE(VARIANT_PACK, VARIANT_PACK_DATA_POINTERS, VOID_PTR, 1, MAX_BOUND, true),
    RULE(VARIANT_PACK, VARIANT_PACK_WORKSPACE, VOID_PTR, 1, 1, false),
};
#undef CONVOLUTION

size_t element_bytes(int type) {
  switch (type) {
  case CUDNN_TYPE_BOOLEAN: case CUDNN_TYPE_CHAR: return 1;
  case CUDNN_TYPE_HANDLE: case CUDNN_TYPE_INT64: case CUDNN_TYPE_VOID_PTR: case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
  default: return 4; /* enumerations and floats */
  }
}

const rule *rule_of(int descriptor, int attribute) {
  for (const rule &r : rules)
    if (r.descriptor == descriptor && r.attribute == attribute) return &r;
  return NULL;
}

descriptor *open(void *p) {
  if (holders.count(p)) return ((holder *)p)->d.get();
  no(CUDNN_STATUS_BAD_PARAM, "not a descriptor");
  return NULL;
}

template <class T> T get(const descriptor &d, int name, T otherwise) {
  const auto v = d.set.find(name);
  if (v != d.set.end()) memcpy(&otherwise, v->second.bytes.data(), sizeof otherwise);
  return otherwise;
}
int64_t get_enum(const descriptor &d, int name) { return get<int32_t>(d, name, NONE); }
const descriptor *named(const descriptor &d, int name) {
  const auto v = d.set.find(name);
  return v == d.set.end() ? NULL : v->second.refs[0].get();
}

cudnnStatus_t read_tensor(const descriptor &d, tensor *t) {
  t->type = get_enum(d, CUDNN_ATTR_TENSOR_DATA_TYPE);
  t->uid = get<int64_t>(d, CUDNN_ATTR_TENSOR_UNIQUE_ID, NONE);
  t->align = get<int64_t>(d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, 0);
  t->inner = get(d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, false);
  t->by_value = get(d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, false);
  memcpy(t->dim, d.set.at(CUDNN_ATTR_TENSOR_DIMENSIONS).bytes.data(), sizeof t->dim);
  memcpy(t->stride, d.set.at(CUDNN_ATTR_TENSOR_STRIDES).bytes.data(), sizeof t->stride);
  for (int i = 0; i < 4; i++)
    if (t->dim[i] < 1 || t->stride[i] < 1) BAD("tensor %lld: length %lld, stride %lld", (long long)t->uid, (long long)t->dim[i], (long long)t->stride[i]);
  if (t->uid < 1) BAD("tensor: unique id %lld", (long long)t->uid);
  if (t->align < (int64_t)bytes_of(t->type) || (t->align & (t->align - 1))) BAD("tensor %lld: alignment %lld", (long long)t->uid, (long long)t->align);
  if (t->by_value && (t->inner || count(*t) != 1 || t->type != CUDNN_DATA_FLOAT)) BAD("tensor %lld: by value, but no single float", (long long)t->uid);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t take_tensor(program *p, const descriptor &operation, int name, int64_t *uid) {
  const descriptor *d = named(operation, name);
  tensor t;
  *uid = NONE;
  if (!d) return CUDNN_STATUS_SUCCESS;
  const cudnnStatus_t s = read_tensor(*d, &t);
  if (s != CUDNN_STATUS_SUCCESS) return s;
  const auto known = p->tensors.insert({t.uid, t});
  if (memcmp(&known.first->second, &t, sizeof t)) BAD("two different tensors have the unique id %lld", (long long)t.uid);
  *uid = t.uid;
  return CUDNN_STATUS_SUCCESS;
}

/* The operation in d. */
cudnnStatus_t take_op(program *p, const descriptor &d) {
  op o;
  memset(&o, 0, sizeof o);
  o.kind = d.type;
  o.x = o.b = o.t = o.y = o.m = o.n = o.k = NONE;
  cudnnStatus_t s = CUDNN_STATUS_SUCCESS;
  auto take = [&](int name, int64_t *uid) {
    if (s == CUDNN_STATUS_SUCCESS) s = take_tensor(p, d, name, uid);
  };
  auto convolution = [&](int how, int x, int w, int y, int alpha, int beta) {
    const descriptor &c = *named(d, how);
    int64_t dilation[2];
    take(x, &o.x), take(w, &o.b), take(y, &o.y);
    memcpy(o.before, c.set.at(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS).bytes.data(), sizeof o.before);
    memcpy(o.after, c.set.at(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS).bytes.data(), sizeof o.after);
    memcpy(o.stride, c.set.at(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES).bytes.data(), sizeof o.stride);
    memcpy(dilation, c.set.at(CUDNN_ATTR_CONVOLUTION_DILATIONS).bytes.data(), sizeof dilation);
    if (s == CUDNN_STATUS_SUCCESS && (get<int64_t>(c, CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, 0) != 2 || dilation[0] != 1 || dilation[1] != 1 ||
                                      get_enum(c, CUDNN_ATTR_CONVOLUTION_COMP_TYPE) != CUDNN_DATA_FLOAT || get(d, alpha, 0.0f) != 1 ||
                                      get_enum(c, CUDNN_ATTR_CONVOLUTION_CONV_MODE) != CUDNN_CROSS_CORRELATION || get(d, beta, 1.0f) != 0))
      s = no(CUDNN_STATUS_NOT_SUPPORTED, "convolution: dimensions, dilation, type, mode, alpha or beta");
  };
  switch (d.type) {
  case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR: {
    const descriptor &how = *named(d, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR);
    o.mode = get_enum(how, CUDNN_ATTR_POINTWISE_MODE);
    o.precision = get_enum(how, CUDNN_ATTR_POINTWISE_MATH_PREC);
    o.axis = get<int64_t>(how, CUDNN_ATTR_POINTWISE_AXIS, NONE);
    if (get(d, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA1, 1.0f) != 1 || get(d, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA2, 1.0f) != 1)
      UNSUPPORTED("pointwise: alpha");
    take(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &o.x), take(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &o.b);
    take(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &o.t), take(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &o.y);
    break;
  }
  case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR: {
    const descriptor &how = *named(d, CUDNN_ATTR_OPERATION_REDUCTION_DESC);
    o.mode = get_enum(how, CUDNN_ATTR_REDUCTION_OPERATOR);
    if (get_enum(how, CUDNN_ATTR_REDUCTION_COMP_TYPE) != CUDNN_DATA_FLOAT) UNSUPPORTED("reduction: type");
    if (get(how, CUDNN_ATTR_REDUCTION_IS_DETERMINISTIC, false)) UNSUPPORTED("reduction: deterministic");
    take(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &o.x), take(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &o.y);
    break;
  }
  case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
    if (get_enum(*named(d, CUDNN_ATTR_OPERATION_MATMUL_DESC), CUDNN_ATTR_MATMUL_COMP_TYPE) != CUDNN_DATA_FLOAT) UNSUPPORTED("matmul: type");
    take(CUDNN_ATTR_OPERATION_MATMUL_ADESC, &o.x), take(CUDNN_ATTR_OPERATION_MATMUL_BDESC, &o.b), take(CUDNN_ATTR_OPERATION_MATMUL_CDESC, &o.y);
    take(CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, &o.m), take(CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, &o.n);
    take(CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, &o.k);
    break;
  case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR:
    take(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, &o.x), take(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, &o.y);
    break;
#define CONVOLUTION(A, X, W, Y) \
  convolution(CUDNN_ATTR_##A##_CONV_DESC, CUDNN_ATTR_##A##_##X, CUDNN_ATTR_##A##_##W, CUDNN_ATTR_##A##_##Y, CUDNN_ATTR_##A##_ALPHA, CUDNN_ATTR_##A##_BETA)
  case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR: CONVOLUTION(OPERATION_CONVOLUTION_FORWARD, X, W, Y); break;
  case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR: CONVOLUTION(OPERATION_CONVOLUTION_BWD_DATA, DX, W, DY); break;
  case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR: CONVOLUTION(OPERATION_CONVOLUTION_BWD_FILTER, X, DW, DY); break;
#undef CONVOLUTION
  default: BAD("descriptor of type %d is no operation", d.type);
  }
  p->ops.push_back(o);
  return s;
}

cudnnStatus_t finalize_plan(descriptor *d) {
  const auto text = d->set.find(CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION);
  const descriptor *config = named(*d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG);
  if (!get<void *>(*d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, NULL) && !named(*d, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP)) BAD("a plan for no device");
  if (!config == (text == d->set.end())) BAD("a plan needs either a configuration or a text");
  if (config) {
    d->graph = config->graph;
    d->engine = config->engine;
  } else {
    d->graph = std::make_shared<program>();
    const cudnnStatus_t s = from_text(text->second.bytes.data(), text->second.bytes.size(), d->graph.get(), &d->engine);
    if (s != CUDNN_STATUS_SUCCESS) return s;
  }
  return supported(*d->graph, d->engine);
}

cudnnStatus_t finalize(descriptor *d) {
  cudnnStatus_t s = CUDNN_STATUS_SUCCESS;
  tensor t;
  for (const rule &r : rules)
    if (r.descriptor == d->type && r.must && !d->set.count(r.attribute)) BAD("descriptor of type %d without attribute %d", d->type, r.attribute);
  switch (d->type) {
  case CUDNN_BACKEND_TENSOR_DESCRIPTOR: return read_tensor(*d, &t);
  case CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR:
    d->graph = std::make_shared<program>();
    for (const ref &o : d->set.at(CUDNN_ATTR_OPERATIONGRAPH_OPS).refs)
      if (s == CUDNN_STATUS_SUCCESS) s = take_op(d->graph.get(), *o);
    return s == CUDNN_STATUS_SUCCESS ? check(*d->graph) : s;
  case CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR: d->graph = named(*d, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH)->graph; return s;
  case CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR: return finalize_plan(d);
  case CUDNN_BACKEND_ENGINE_DESCRIPTOR: case CUDNN_BACKEND_ENGINECFG_DESCRIPTOR: UNSUPPORTED("configurations come from heuristics");
  default: return s;
  }
}

/* ---- the interpreter --------------------------------------------------------------------------------------------- */

struct run { /* copied as bytes */
  const program *graph;
  int64_t engine;
  int n;
  void *workspace;
  struct {
    int64_t uid;
    void *data;
    float value;
  } bound[MAX_BOUND];
};

typedef std::vector<float> memory; /* of one tensor, by its strides; whole numbers and truth values, too */
typedef std::map<int64_t, memory> memories;

float rounded(int64_t type, float v) { return type == CUDNN_DATA_BFLOAT16 ? fd_bf16_to_f32(fd_f32_to_bf16(v)) : v; }

int64_t place(const tensor &t, int64_t i, int64_t j, int64_t k, int64_t l) { /* a length of 1 serves all indices */
  return (t.dim[0] > 1 ? i * t.stride[0] : 0) + (t.dim[1] > 1 ? j * t.stride[1] : 0) + (t.dim[2] > 1 ? k * t.stride[2] : 0) +
         (t.dim[3] > 1 ? l * t.stride[3] : 0);
}
template <class F> void each(const tensor &t, F f) {
  for (int64_t i = 0; i < t.dim[0]; i++)
    for (int64_t j = 0; j < t.dim[1]; j++)
      for (int64_t k = 0; k < t.dim[2]; k++)
        for (int64_t l = 0; l < t.dim[3]; l++) f(i, j, k, l);
}

cudaError_t load(const tensor &t, const void *device, memory *to) {
  const size_t n = (size_t)extent(t), bytes = n * bytes_of(t.type);
  std::vector<char> raw(bytes);
  to->resize(n);
  const cudaError_t e = cudaMemcpy(raw.data(), device, bytes, cudaMemcpyDeviceToHost);
  for (size_t i = 0; i < n; i++) {
    if (t.type == CUDNN_DATA_BFLOAT16) (*to)[i] = fd_bf16_to_f32(((const fd_bf16 *)raw.data())[i]);
    else if (t.type == CUDNN_DATA_FLOAT) (*to)[i] = ((const float *)raw.data())[i];
    else if (t.type == CUDNN_DATA_INT32) (*to)[i] = (float)((const int32_t *)raw.data())[i];
    else (*to)[i] = raw[i] != 0;
  }
  return e;
}

cudaError_t store(const tensor &t, void *device, const memory &from) {
  const size_t n = from.size(), bytes = n * bytes_of(t.type);
  std::vector<char> raw(bytes);
  for (size_t i = 0; i < n; i++) {
    if (t.type == CUDNN_DATA_BFLOAT16) ((fd_bf16 *)raw.data())[i] = fd_f32_to_bf16(from[i]);
    else if (t.type == CUDNN_DATA_FLOAT) ((float *)raw.data())[i] = from[i];
    else if (t.type == CUDNN_DATA_INT32) ((int32_t *)raw.data())[i] = (int32_t)from[i];
    else raw[i] = from[i] != 0;
  }
  return cudaMemcpy(device, raw.data(), bytes, cudaMemcpyHostToDevice);
}

float formed(const op &o, float x, float b, float t, int64_t index) {
  switch (o.mode) {
  case CUDNN_POINTWISE_ADD: return x + b;
  case CUDNN_POINTWISE_SUB: return x - b;
  case CUDNN_POINTWISE_MUL: return x * b;
  case CUDNN_POINTWISE_DIV: return x / b;
  case CUDNN_POINTWISE_EXP: return expf(x);
  case CUDNN_POINTWISE_LOG: return logf(x);
  case CUDNN_POINTWISE_CMP_GE: return x >= b;
  case CUDNN_POINTWISE_CMP_LT: return x < b;
  case CUDNN_POINTWISE_LOGICAL_AND: return x != 0 && b != 0;
  case CUDNN_POINTWISE_GEN_INDEX: return (float)index;
  case CUDNN_POINTWISE_BINARY_SELECT: return t != 0 ? x : b;
  default: return x;
  }
}

void do_pointwise(const program &p, const op &o, memories *all) {
  const tensor &x = p.at(o.x), &y = p.at(o.y), &b = o.b == NONE ? x : p.at(o.b), &t = o.t == NONE ? x : p.at(o.t);
  const memory &mx = all->at(o.x), &mb = all->at(b.uid), &mt = all->at(t.uid);
  memory &my = all->at(o.y);
  each(y, [&](int64_t i, int64_t j, int64_t k, int64_t l) {
    const int64_t index[4] = {i, j, k, l};
    my[(size_t)place(y, i, j, k, l)] = rounded(y.type, formed(o, mx[(size_t)place(x, i, j, k, l)], mb[(size_t)place(b, i, j, k, l)],
                                                              mt[(size_t)place(t, i, j, k, l)], index[o.axis < 0 ? 0 : o.axis]));
  });
}

void do_reduction(const program &p, const op &o, memories *all) {
  const tensor &x = p.at(o.x), &y = p.at(o.y);
  const memory &mx = all->at(o.x);
  memory &my = all->at(o.y);
  const bool add = o.mode == CUDNN_REDUCE_TENSOR_ADD;
  std::vector<double> sum(my.size(), add ? 0.0 : -INFINITY);
  each(x, [&](int64_t i, int64_t j, int64_t k, int64_t l) {
    double &s = sum[(size_t)place(y, i, j / (x.dim[1] / y.dim[1]), k, l)];
    const double v = mx[(size_t)place(x, i, j, k, l)];
    s = add ? s + v : isnan(s) || isnan(v) ? NAN : std::max(s, v);
  });
  for (size_t i = 0; i < my.size(); i++) my[i] = rounded(y.type, (float)sum[i]);
}

void do_reshape(const program &p, const op &o, memories *all) { /* the memory as it is, seen by other lengths and strides */
  const memory &mx = all->at(o.x);
  memory &my = all->at(o.y);
  for (size_t i = 0; i < my.size(); i++) my[i] = rounded(p.at(o.y).type, mx[i]);
}

/* y += f x */
__attribute__((optimize("O3"))) void add_scaled(float *__restrict__ y, const float *__restrict__ x, float f, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += f * x[i];
}

bool length_of(const memories &all, int64_t uid, int64_t sample, int64_t most, int64_t *length) {
  *length = most;
  if (uid == NONE) return true;
  *length = (int64_t)all.at(uid)[(size_t)sample];
  if (*length >= 1 && *length <= most) return true;
  no(CUDNN_STATUS_EXECUTION_FAILED, "sample %lld: length %lld of %lld", (long long)sample, (long long)*length, (long long)most);
  return false;
}

bool do_matmul(const program &p, const op &o, memories *all, bool backwards, bool adds) {
  const tensor &a = p.at(o.x), &b = p.at(o.b), &c = p.at(o.y);
  const memory &ma = all->at(o.x), &mb = all->at(o.b);
  memory &mc = all->at(o.y);
  const int64_t M = c.dim[2], N = c.dim[3], K = a.dim[3], group = a.dim[1] / b.dim[1];
  std::vector<float> right((size_t)(K * N)), row((size_t)N);
  for (int64_t s = 0; s < a.dim[0]; s++) {
    int64_t m_used, n_used, k_used;
    if (!length_of(*all, o.m, s, M, &m_used) || !length_of(*all, o.n, s, N, &n_used) || !length_of(*all, o.k, s, K, &k_used)) return false;
    for (int64_t h = 0; h < a.dim[1]; h++) {
      for (int64_t k = 0; k < K; k++)
        for (int64_t n = 0; n < N; n++) right[(size_t)(k * N + n)] = mb[(size_t)place(b, s, h / group, k, n)];
      for (int64_t m = 0; m < M; m++) {
        std::fill(row.begin(), row.end(), 0.0f);
        for (int64_t i = 0; i < K; i++) {
          const int64_t k = backwards ? K - 1 - i : i;
          const float left = ma[(size_t)place(a, s, h, m, k)]; /* the matrix units take both as one type */
          add_scaled(row.data(), &right[(size_t)(k * N)], rounded(b.type, left), N);
        }
        for (int64_t n = 0; n < N; n++) {
          float v = row[(size_t)n], &to = mc[(size_t)place(c, s, h, m, n)];
          if (m >= m_used || n >= n_used) v = !c.inner || !isfinite(v) ? NAN : (m + n) % 2 ? -HUGE_BUT_FINITE : HUGE_BUT_FINITE;
          to = rounded(c.type, adds ? to + v : v);
        }
      }
    }
  }
  return true;
}

/* As [dim 0, dim 2, dim 3, dim 1] without gaps. */
memory channels_last(const tensor &t, const memory &from) {
  memory to((size_t)count(t));
  each(t, [&](int64_t i, int64_t c, int64_t h, int64_t w) {
    to[(size_t)(((i * t.dim[2] + h) * t.dim[3] + w) * t.dim[1] + c)] = from[(size_t)place(t, i, c, h, w)];
  });
  return to;
}

void do_convolution(const program &p, const op &o, memories *all) {
  const tensor &x = p.at(o.x), &w = p.at(o.b), &y = p.at(o.y);
  const int64_t I = x.dim[1], O = y.dim[1], H = x.dim[2], W = x.dim[3], Ho = y.dim[2], Wo = y.dim[3], kh = w.dim[2], kw = w.dim[3];
  const bool forward = o.kind == CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR;
  const bool data = o.kind == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR;
  memory px = channels_last(x, all->at(o.x)), py = channels_last(y, all->at(o.y)), pw((size_t)count(w)); /* [kh, kw, I, O] or (data) [kh, kw, O, I] */
  const auto at_w = [&](int64_t out, int64_t in, int64_t ky, int64_t kx) {
    return (size_t)((ky * kw + kx) * I * O + (data ? out * I + in : in * O + out));
  };
  each(w, [&](int64_t out, int64_t in, int64_t ky, int64_t kx) { pw[at_w(out, in, ky, kx)] = all->at(o.b)[(size_t)place(w, out, in, ky, kx)]; });
  memory &sum = forward ? py : data ? px : pw;
  std::fill(sum.begin(), sum.end(), 0.0f);
  for (int64_t pixel = 0; pixel < y.dim[0] * Ho * Wo; pixel++)
    for (int64_t tap = 0; tap < kh * kw; tap++) {
      const int64_t b = pixel / (Ho * Wo), iy = pixel / Wo % Ho * o.stride[0] + tap / kw - o.before[0];
      const int64_t ix = pixel % Wo * o.stride[1] + tap % kw - o.before[1];
      if (iy < 0 || iy >= H || ix < 0 || ix >= W) continue;
      float *to_x = &px[(size_t)(((b * H + iy) * W + ix) * I)], *to_y = &py[(size_t)(pixel * O)], *to_w = &pw[(size_t)(tap * I * O)];
      for (int64_t c = 0; c < (data ? O : I); c++)
        if (data) add_scaled(to_x, to_w + c * I, to_y[c], I);
        else if (forward) add_scaled(to_y, to_w + c * O, to_x[c], O);
        else add_scaled(to_w + c * O, to_y, to_x[c], O);
    }
  const tensor &r = p.at(result_of(o));
  memory &to = all->at(r.uid);
  each(r, [&](int64_t i, int64_t c, int64_t h, int64_t l) {
    const size_t from = r.uid == o.b ? at_w(i, c, h, l) : (size_t)(((i * r.dim[2] + h) * r.dim[3] + l) * r.dim[1] + c);
    to[(size_t)place(r, i, c, h, l)] = rounded(r.type, sum[from]);
  });
}

int execute(void *data) {
  static unsigned runs;
  const run &r = *(const run *)data;
  const program &p = *r.graph;
  const std::set<int64_t> sums = accumulators(p);
  const bool backwards = r.engine == 0 && runs++ % 2;
  memories all;
  cudaError_t e = r.workspace ? cudaMemset(r.workspace, 0xff, (size_t)WORKSPACE[r.engine]) : cudaSuccess;
  for (const auto &t : p.tensors) all[t.first].assign((size_t)extent(t.second), NAN);
  for (int i = 0; i < r.n && e == cudaSuccess; i++) {
    const tensor &t = p.at(r.bound[i].uid);
    if (t.by_value)
      all[t.uid][0] = r.bound[i].value;
    else
      e = load(t, r.bound[i].data, &all[t.uid]);
  }
  for (const op &o : p.ops) {
    if (e != cudaSuccess) break;
    switch (o.kind) {
    case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR: do_pointwise(p, o, &all); break;
    case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR: do_reduction(p, o, &all); break;
    case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR: do_reshape(p, o, &all); break;
    case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
      if (!do_matmul(p, o, &all, backwards && sums.count(o.y), sums.count(o.y) != 0)) {
        fprintf(stderr, "emulated cuDNN: %s\n", last_error.c_str()); /* the launch of a graph says only that it failed */
        return 1;
      }
      break;
    default: do_convolution(p, o, &all);
    }
    for (int i = 0; i < r.n && e == cudaSuccess; i++)
      if (r.bound[i].uid == result_of(o)) e = store(p.at(result_of(o)), r.bound[i].data, all[result_of(o)]);
  }
  if (e == cudaSuccess && r.workspace) e = cudaMemset(r.workspace, 0xff, (size_t)WORKSPACE[r.engine]);
  if (e == cudaSuccess) return 0;
  no(CUDNN_STATUS_EXECUTION_FAILED, "a bound tensor or the workspace: %s", cudaGetErrorName(e));
  fprintf(stderr, "emulated cuDNN: %s\n", last_error.c_str());
  return 1;
}

bool on_device(const void *p) {
  cudaPointerAttributes a;
  return cudaPointerGetAttributes(&a, p) == cudaSuccess && a.type == cudaMemoryTypeDevice;
}

}  // namespace

/* ---- the interface ----------------------------------------------------------------------------------------------- */

extern "C" {

size_t cudnnGetVersion(void) { return VERSION; }

const char *cudnnGetErrorString(cudnnStatus_t s) {
  switch (s) {
  case CUDNN_STATUS_SUCCESS: return "CUDNN_STATUS_SUCCESS";
  case CUDNN_STATUS_NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
  case CUDNN_STATUS_BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
  case CUDNN_STATUS_NOT_SUPPORTED: return "CUDNN_STATUS_NOT_SUPPORTED";
  case CUDNN_STATUS_EXECUTION_FAILED: return "CUDNN_STATUS_EXECUTION_FAILED";
  default: return "CUDNN_STATUS_INTERNAL_ERROR";
  }
}

void cudnnGetLastErrorString(char *message, size_t max_size) {
  snprintf(message, max_size, "%s", last_error.c_str());
  last_error.clear();
}

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
  *handle = new cudnnContext();
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
  delete handle;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *out) {
  holder *h = new holder{std::make_shared<descriptor>()};
  h->d->type = type;
  h->d->finalized = false;
  h->d->engine = NONE;
  holders.insert(h);
  *out = h;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d) {
  if (!holders.erase(d)) BAD("not a descriptor");
  delete (holder *)d;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t p) {
  descriptor *d = open(p);
  if (!d) return CUDNN_STATUS_BAD_PARAM;
  if (d->finalized) BAD("finalized twice");
  const cudnnStatus_t s = finalize(d);
  d->finalized = s == CUDNN_STATUS_SUCCESS;
  return s;
}

cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t p, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n,
                                       const void *elements) {
  descriptor *d = open(p);
  if (!d) return CUDNN_STATUS_BAD_PARAM;
  const rule *r = rule_of(d->type, name);
  value v = {n, {}, {}};
  if (d->finalized) return no(CUDNN_STATUS_NOT_INITIALIZED, "attribute %d: the descriptor is finalized", name);
  if (!r) BAD("attribute %d: not of a descriptor of type %d", name, d->type);
  if (type != r->type) BAD("attribute %d: type %d, not %d", name, type, r->type);
  if (n < r->least || n > r->most || !elements) BAD("attribute %d: %lld elements", name, (long long)n);
  if (r->type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    for (int64_t i = 0; i < n; i++) {
      const descriptor *from = open(((const cudnnBackendDescriptor_t *)elements)[i]);
      if (!from) return CUDNN_STATUS_BAD_PARAM;
      if (!from->finalized || (r->names != ANY_OPERATION && from->type != r->names)) BAD("attribute %d: not finalized, or of type %d", name, from->type);
      v.refs.push_back(((const holder *)((const cudnnBackendDescriptor_t *)elements)[i])->d);
    }
  } else {
    const char *from = (const char *)elements;
    v.bytes.assign(from, from + (size_t)n * element_bytes(type));
  }
  d->set[name] = v;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t p, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                       int64_t requested, int64_t *n, void *elements) {
  descriptor *d = open(p);
  if (!d) return CUDNN_STATUS_BAD_PARAM;
  if (!d->finalized) return no(CUDNN_STATUS_NOT_INITIALIZED, "attribute %d: the descriptor is not finalized", name);
#define GETS(DESCRIPTOR, NAME, TYPE) \
  (d->type == CUDNN_BACKEND_##DESCRIPTOR##_DESCRIPTOR && name == CUDNN_ATTR_##DESCRIPTOR##_##NAME && type == CUDNN_TYPE_##TYPE)
  if (GETS(EXECUTION_PLAN, JSON_REPRESENTATION, CHAR)) {
    const std::string text = text_of(*d->graph, d->engine);
    *n = (int64_t)text.size() + 1;
    if (elements) memcpy(elements, text.c_str(), (size_t)std::min(requested, *n));
    return CUDNN_STATUS_SUCCESS;
  }
  if (GETS(ENGINEHEUR, RESULTS, BACKEND_DESCRIPTOR)) {
    const int64_t first = get_enum(*d, CUDNN_ATTR_ENGINEHEUR_MODE) == CUDNN_HEUR_MODE_A ? 0 : 1;
    *n = ENGINES - first;
    for (int64_t i = 0; elements && i < *n && i < requested; i++) {
      descriptor *to = open(((cudnnBackendDescriptor_t *)elements)[i]);
      if (!to || to->type != CUDNN_BACKEND_ENGINECFG_DESCRIPTOR) BAD("results need descriptors of configurations");
      to->graph = d->graph, to->engine = first + i, to->finalized = true;
    }
    return CUDNN_STATUS_SUCCESS;
  }
  if (requested < 1 || !elements) BAD("attribute %d: no room", name);
  if (GETS(ENGINECFG, ENGINE, BACKEND_DESCRIPTOR)) {
    descriptor *to = open(*(cudnnBackendDescriptor_t *)elements);
    if (!to || to->type != CUDNN_BACKEND_ENGINE_DESCRIPTOR) BAD("an engine needs its descriptor");
    to->engine = d->engine, to->finalized = true;
  } else if (GETS(ENGINE, GLOBAL_INDEX, INT64)) {
    *(int64_t *)elements = d->engine;
  } else if (GETS(ENGINE, NUMERICAL_NOTE, NUMERICAL_NOTE)) {
    *n = d->engine == 0;
    if (*n) *(cudnnBackendNumericalNote_t *)elements = CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC;
    return CUDNN_STATUS_SUCCESS;
  } else if (GETS(EXECUTION_PLAN, WORKSPACE_SIZE, INT64)) {
    *(int64_t *)elements = WORKSPACE[d->engine];
  } else {
    BAD("attribute %d: not to be had of a descriptor of type %d", name, d->type);
  }
  *n = 1;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t p, cudnnBackendDescriptor_t v) {
  static std::set<std::shared_ptr<program>> kept; /* a captured run may be launched after its plan was destroyed */
  const descriptor *plan = open(p), *pack = plan ? open(v) : NULL;
  if (!pack) return CUDNN_STATUS_BAD_PARAM;
  if (!plan->finalized || plan->type != CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR || !pack->finalized || pack->type != CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)
    BAD("a plan and a variant pack, both finalized, are wanted");
  if (!handle || !handle->stream || get<cudnnHandle_t>(*plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, NULL) != handle) BAD("no stream, or a handle not of the plan");
  const value &uids = pack->set.at(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS), &data = pack->set.at(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
  run r;
  memset(&r, 0, sizeof r);
  r.graph = plan->graph.get(), r.engine = plan->engine, r.n = (int)uids.n;
  r.workspace = get<void *>(*pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, NULL);
  if (uids.n != data.n) BAD("%lld unique ids, %lld pointers", (long long)uids.n, (long long)data.n);
  std::set<int64_t> missing;
  for (const auto &t : r.graph->tensors)
    if (!t.second.inner) missing.insert(t.first);
  for (int i = 0; i < r.n; i++) {
    r.bound[i].uid = ((const int64_t *)uids.bytes.data())[i];
    r.bound[i].data = ((void *const *)data.bytes.data())[i];
    if (!missing.erase(r.bound[i].uid)) BAD("tensor %lld is not to be bound, or bound twice", (long long)r.bound[i].uid);
    const tensor &t = r.graph->at(r.bound[i].uid);
    if (!r.bound[i].data || on_device(r.bound[i].data) == (t.by_value != 0) || (size_t)r.bound[i].data % (size_t)(t.by_value ? 4 : t.align))
      BAD("tensor %lld: a wrong pointer, or not aligned to %lld bytes", (long long)t.uid, (long long)t.align);
    if (t.by_value) r.bound[i].value = *(const float *)r.bound[i].data;
  }
  if (!missing.empty()) BAD("tensor %lld is not bound", (long long)*missing.begin());
  if (!on_device(r.workspace) || (size_t)r.workspace % 256) BAD("the workspace is not in the device's memory, or not aligned");
  kept.insert(plan->graph);
  executions++;
  return fd_emu_host(execute, &r, sizeof r) == cudaSuccess ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}

long fd_emu_cudnn_descriptors(void) { return (long)holders.size(); }
long fd_emu_cudnn_executions(void) { return executions; }

}
