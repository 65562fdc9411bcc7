// SPDX-License-Identifier: Apache-2.0
// Builders of the ops on rows of tokens: linear, norm, residual, activation, embedding, conversion.
// Invariant of all build_*.c: on a failure the graph holds the message, and the builder returns 0.
#include "graph/build.h"

#include <string.h>

#include "graph/build_internal.h"

bool fd_build_count(fd_graph *g, const char *op, fd_var count) {
  if (!count) return true;
  const fd_tensor *t = fd_graph_get(g, count);
  FD_WANT_OR(false, t->dtype == FD_I32 && fd_tensor_numel(t) == 1, "%s: count is %s, wanted [1] i32", op, fd_graph_text(g, count));
  return true;
}

bool fd_build_shape(fd_graph *g, const char *op, const char *slot, fd_var v, fd_dtype dtype, int ndim, const int64_t *shape) {
  const fd_tensor *t = fd_graph_get(g, v);
  bool same = t->dtype == dtype && t->ndim == ndim;
  for (int i = 0; same && i < ndim; i++) same = t->shape[i] == shape[i];
  if (same) return true;
  char wanted[120];
  int n = 0;
  for (int i = 0; i < ndim; i++) n += snprintf(wanted + n, sizeof wanted - (size_t)n, "%s%lld", i ? ", " : "", (long long)shape[i]);
  wanted[n] = 0;
  fd_graph_fail(g, FD_ERR_ARG, "%s: %s is %s, wanted [%s] %s", op, slot, fd_graph_text(g, v), wanted, fd_dtype_name(dtype));
  return false;
}

/* A vector of n weights. */
bool fd_build_vector(fd_graph *g, const char *op, const char *slot, fd_var v, int64_t n) {
  const fd_tensor *t = fd_graph_get(g, v);
  FD_WANT_OR(false, v, "%s: %s is missing", op, slot);
  FD_WANT_OR(false, fd_tensor_numel(t) == n && (t->dtype == FD_F32 || t->dtype == FD_BF16), "%s: %s is %s, wanted %lld elements, f32 or bf16",
             op, slot, fd_graph_text(g, v), (long long)n);
  return true;
}

bool fd_build_float(fd_graph *g, const char *op, const char *slot, fd_var v) {
  FD_WANT_OR(false, v, "%s: %s is missing", op, slot);
  fd_dtype dtype = fd_graph_get(g, v)->dtype;
  FD_WANT_OR(false, dtype == FD_F32 || dtype == FD_BF16, "%s: %s is %s, wanted f32 or bf16", op, slot, fd_graph_text(g, v));
  return true;
}

fd_var fd_build_like(fd_graph *g, fd_var x) {
  const fd_tensor *t = fd_graph_get(g, x);
  return fd_graph_tensor(g, t->dtype, t->ndim, t->shape);
}

/* mod [R / rows_per_mod, S] with D columns from each of the given first columns (-1: none). */
static bool check_mod(fd_graph *g, const char *op, fd_var x, const struct fd_mod *mod, int64_t col0, int64_t col1) {
  if (!mod || !mod->mod) return true;
  if (!fd_build_float(g, op, "mod", mod->mod)) return false;
  const fd_tensor *m = fd_graph_get(g, mod->mod), *t = fd_graph_get(g, x);
  int64_t rows = fd_tensor_rows(t), cols = fd_tensor_cols(m), D = fd_tensor_cols(t), last = col0 > col1 ? col0 : col1;
  FD_WANT_OR(false, mod->rows_per_mod >= 1 && rows % mod->rows_per_mod == 0 && fd_tensor_rows(m) == rows / mod->rows_per_mod,
             "%s: mod is %s, wanted %lld / %lld rows for x %s", op, fd_graph_text(g, mod->mod), (long long)rows,
             (long long)mod->rows_per_mod, fd_graph_text(g, x));
  FD_WANT_OR(false, col0 >= -1 && col1 >= -1 && last + D <= cols, "%s: mod is %s, but its columns %lld and %lld begin vectors of %lld", op,
             fd_graph_text(g, mod->mod), (long long)col0, (long long)col1, (long long)D);
  return true;
}

fd_var fd_linear(fd_graph *g, fd_var x, fd_var w, fd_var b, fd_var count) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "linear", "x", x) || !fd_build_float(g, "linear", "w", w) || !fd_build_count(g, "linear", count)) return 0;
  const fd_tensor *tx = fd_graph_get(g, x), *tw = fd_graph_get(g, w);
  int64_t in = fd_tensor_cols(tx), out = fd_tensor_rows(tw), shape[FD_MAX_NDIM] = {0};
  FD_WANT(tx->ndim >= 1 && tw->ndim >= 2, "linear: x is %s, w is %s, wanted [.., in] and [out, in]", fd_graph_text(g, x), fd_graph_text(g, w));
  FD_WANT(fd_tensor_cols(tw) == in || fd_tensor_numel(tw) == tw->shape[0] * in, "linear: w is %s, wanted [out, %lld] for x %s",
          fd_graph_text(g, w), (long long)in, fd_graph_text(g, x));
  if (fd_tensor_cols(tw) != in) { /* a convolution kernel [out, C, P, P] read as a matrix */
    out = tw->shape[0];
    w = fd_graph_view(g, w, 2, (int64_t[]){out, in});
  }
  FD_WANT(tx->dtype == tw->dtype, "linear: x is %s, w is %s: types differ", fd_graph_text(g, x), fd_graph_text(g, w));
  if (b && !fd_build_vector(g, "linear", "b", b, out)) return 0;
  memcpy(shape, tx->shape, sizeof shape);
  shape[tx->ndim - 1] = out;
  fd_var y = fd_graph_tensor(g, tx->dtype, tx->ndim, shape);
  struct fd_matmul_args args = {.trans_b = 1};
  fd_graph_emit(g, FD_OP_matmul, &args, (fd_var[]){x, w, b, count, y});
  return y;
}

fd_var fd_rmsnorm(fd_graph *g, fd_var x, fd_var w, float eps, const struct fd_mod *mod, fd_var count) {
  return fd_rmsnorm_as(g, x, w, eps, mod, count, fd_graph_get(g, x)->dtype);
}

fd_var fd_rmsnorm_as(fd_graph *g, fd_var x, fd_var w, float eps, const struct fd_mod *mod, fd_var count, fd_dtype dtype) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "rmsnorm", "x", x) || !fd_build_count(g, "rmsnorm", count)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  if (!fd_build_vector(g, "rmsnorm", "w", w, fd_tensor_cols(t))) return 0;
  if (mod && !mod->mod) mod = NULL;
  if (mod && !check_mod(g, "rmsnorm", x, mod, mod->shift_col, mod->scale_col)) return 0;
  int64_t rows = fd_tensor_rows(t);
  fd_var y = fd_graph_tensor(g, dtype, t->ndim, t->shape), rstd = fd_graph_tensor(g, FD_F32, 1, &rows);
  struct fd_rmsnorm_fwd_args args = {.eps = eps, .rows_per_mod = mod ? mod->rows_per_mod : 1, .shift_col = mod ? mod->shift_col : -1,
                                     .scale_col = mod ? mod->scale_col : -1};
  fd_graph_emit(g, FD_OP_rmsnorm_fwd, &args, (fd_var[]){x, w, mod ? mod->mod : 0, count, y, rstd});
  return y;
}

fd_var fd_residual(fd_graph *g, fd_var x, fd_var a, const struct fd_mod *mod, fd_var count) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "residual", "x", x) || !fd_build_float(g, "residual", "a", a) || !fd_build_count(g, "residual", count)) return 0;
  const fd_tensor *tx = fd_graph_get(g, x), *ta = fd_graph_get(g, a);
  if (mod && !mod->mod) mod = NULL;
  FD_WANT((tx->dtype == ta->dtype || (!mod && ta->dtype == FD_BF16)) && fd_tensor_numel(tx) == fd_tensor_numel(ta) && fd_tensor_cols(tx) == fd_tensor_cols(ta),
          "residual: a is %s, wanted the shape and type of x %s", fd_graph_text(g, a), fd_graph_text(g, x));
  if (mod && !check_mod(g, "residual", x, mod, mod->gate_col, -1)) return 0;
  FD_WANT(!mod || mod->gate_col >= 0, "residual: gate_col is %lld with a mod", (long long)mod->gate_col);
  fd_var y = fd_build_like(g, x);
  struct fd_gate_residual_fwd_args args = {.rows_per_mod = mod ? mod->rows_per_mod : 1, .gate_col = mod ? mod->gate_col : 0};
  fd_graph_emit(g, FD_OP_gate_residual_fwd, &args, (fd_var[]){x, a, mod ? mod->mod : 0, count, y});
  return y;
}

fd_var fd_add(fd_graph *g, fd_var x, fd_var y, fd_var count) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "add", "x", x) || !fd_build_float(g, "add", "y", y) || !fd_build_count(g, "add", count)) return 0;
  const fd_tensor *tx = fd_graph_get(g, x), *ty = fd_graph_get(g, y);
  int64_t nx = fd_tensor_numel(tx), ny = fd_tensor_numel(ty);
  FD_WANT(ny > 0 ? nx % ny == 0 && (nx == ny || ny % fd_tensor_cols(tx) == 0) : nx == 0,
          "add: y is %s, which does not repeat along the leading dimensions of x %s", fd_graph_text(g, y), fd_graph_text(g, x));
  FD_WANT(!count || nx == ny || ny == fd_tensor_cols(tx), "add: a count needs y %s to be one row of x %s, or as long as x", fd_graph_text(g, y),
          fd_graph_text(g, x));
  fd_var z = fd_build_like(g, x);
  struct fd_add_fwd_args args = {0};
  fd_graph_emit(g, FD_OP_add_fwd, &args, (fd_var[]){x, y, count, z});
  return z;
}

fd_var fd_activate(fd_graph *g, fd_var x, enum fd_act act, fd_var count) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "activate", "x", x) || !fd_build_count(g, "activate", count)) return 0;
  if (act == FD_ACT_NONE) return x;
  fd_var y = fd_build_like(g, x);
  struct fd_act_fwd_args args = {.act = act};
  fd_graph_emit(g, FD_OP_act_fwd, &args, (fd_var[]){x, count, y});
  return y;
}

fd_var fd_geglu(fd_graph *g, fd_var gate_up, enum fd_act act, fd_var count) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "geglu", "gate_up", gate_up) || !fd_build_count(g, "geglu", count)) return 0;
  const fd_tensor *t = fd_graph_get(g, gate_up);
  FD_WANT(t->ndim >= 1 && fd_tensor_cols(t) % 2 == 0, "geglu: gate_up is %s, wanted an even number of columns", fd_graph_text(g, gate_up));
  int64_t shape[FD_MAX_NDIM];
  memcpy(shape, t->shape, sizeof shape);
  shape[t->ndim - 1] /= 2;
  fd_var y = fd_graph_tensor(g, t->dtype, t->ndim, shape);
  struct fd_geglu_fwd_args args = {.act = act};
  fd_graph_emit(g, FD_OP_geglu_fwd, &args, (fd_var[]){gate_up, count, y});
  return y;
}

fd_var fd_embed(fd_graph *g, fd_var ids, fd_var table, float scale, int64_t padding_idx, fd_dtype dtype, fd_var count) {
  if (!fd_graph_ok(g)) return 0;
  FD_WANT(ids, "embed: ids are missing");
  if (!fd_build_float(g, "embed", "table", table) || !fd_build_count(g, "embed", count)) return 0;
  const fd_tensor *ti = fd_graph_get(g, ids), *tt = fd_graph_get(g, table);
  FD_WANT(ti->dtype == FD_I32 && ti->ndim < FD_MAX_NDIM, "embed: ids are %s, wanted [rows] i32", fd_graph_text(g, ids));
  FD_WANT(tt->ndim == 2, "embed: table is %s, wanted [vocabulary, width]", fd_graph_text(g, table));
  FD_WANT(dtype == FD_F32 || dtype == FD_BF16, "embed: asked for %s, wanted f32 or bf16", fd_dtype_name(dtype));
  FD_WANT(padding_idx < tt->shape[0], "embed: padding_idx %lld lies outside table %s", (long long)padding_idx, fd_graph_text(g, table));
  int64_t shape[FD_MAX_NDIM];
  memcpy(shape, ti->shape, sizeof shape);
  shape[ti->ndim] = tt->shape[1];
  fd_var y = fd_graph_tensor(g, dtype, ti->ndim + 1, shape);
  struct fd_embed_fwd_args args = {.scale = scale, .padding_idx = padding_idx};
  fd_graph_emit(g, FD_OP_embed_fwd, &args, (fd_var[]){ids, table, count, y});
  return y;
}

fd_var fd_timestep_embed(fd_graph *g, fd_var t, fd_var freqs, fd_dtype dtype) {
  if (!fd_graph_ok(g)) return 0;
  FD_WANT(t && freqs, "timestep_embed: t or freqs is missing");
  const fd_tensor *tt = fd_graph_get(g, t), *tf = fd_graph_get(g, freqs);
  FD_WANT(tt->dtype == FD_F32 && tt->ndim == 1, "timestep_embed: t is %s, wanted [B] f32", fd_graph_text(g, t));
  FD_WANT(tf->dtype == FD_F32 && tf->ndim == 1, "timestep_embed: freqs is %s, wanted [n] f32", fd_graph_text(g, freqs));
  fd_var y = fd_graph_tensor(g, dtype, 2, (int64_t[]){tt->shape[0], 2 * tf->shape[0]});
  struct fd_timestep_embed_args args = {0};
  fd_graph_emit(g, FD_OP_timestep_embed, &args, (fd_var[]){t, freqs, y});
  return y;
}

fd_var fd_cast(fd_graph *g, fd_var x, fd_dtype dtype, int64_t repeat) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "cast", "x", x)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  FD_WANT(dtype == FD_F32 || dtype == FD_BF16, "cast: asked for %s, wanted f32 or bf16", fd_dtype_name(dtype));
  FD_WANT(repeat >= 1 && (repeat == 1 || t->ndim >= 1), "cast: repeat is %lld for x %s", (long long)repeat, fd_graph_text(g, x));
  if (repeat == 1 && dtype == t->dtype) return x;
  int64_t shape[FD_MAX_NDIM];
  memcpy(shape, t->shape, sizeof shape);
  shape[0] *= repeat;
  fd_var y = fd_graph_tensor(g, dtype, t->ndim, shape);
  struct fd_cast_args args = {0};
  fd_graph_emit(g, FD_OP_cast, &args, (fd_var[]){x, y});
  return y;
}
