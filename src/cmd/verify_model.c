// SPDX-License-Identifier: Apache-2.0
// Shared by the kinds that run a model. Invariant: arrays of a record keep the original's layout, values of a graph ours; only
// the functions here translate.
#include "cmd/verify_model.h"

#include <stdio.h>
#include <stdlib.h>

fd_status fd_verify_graph_open(struct fd_verify *v, const char *name, struct fd_verify_graph *out) {
  *out = (struct fd_verify_graph){.v = v};
  fd_status st = fd_verify_ctx(v, &out->ctx);
  return st == FD_OK ? fd_graph_create(out->ctx, name, &out->g) : st;
}

fd_status fd_verify_graph_ready(struct fd_verify_graph *x, int n, fd_model *const *models) {
  fd_status st = FD_OK;
  size_t bytes;
  FD_TRY(fd_graph_plan(x->g, &bytes));
  FD_TRY(x->ctx->backend->alloc(x->ctx, bytes ? bytes : 64, &x->arena));
  FD_TRY(fd_graph_attach(x->g, x->arena, bytes));
  for (int i = 0; i < n; i++) FD_TRY(fd_params_bind(models[i]->params, x->g));
done:
  return st;
}

void fd_verify_graph_close(struct fd_verify_graph *x) {
  fd_graph_destroy(&x->g);
  if (x->arena) x->ctx->backend->free(x->ctx, x->arena);
  x->arena = NULL;
}

fd_status fd_verify_model_open(struct fd_verify *v, const char *folder, const json_t *json, bool trainable, fd_model **out) {
  fd_status st = FD_OK;
  fd_ctx *ctx;
  fd_model *m = NULL;
  char dir[4096];
  snprintf(dir, sizeof dir, "%s%s%s", v->dir, *folder ? "/" : "", folder);
  FD_TRY(fd_verify_ctx(v, &ctx));
  if (json) FD_TRY(fd_model_create(dir, json, &m));
  else FD_TRY(fd_model_open(dir, &m));
  FD_TRY(fd_params_layout(m->params, trainable, 1));
  FD_TRY(fd_params_alloc(m->params, ctx, v->dtype, trainable));
  FD_TRY(fd_model_load(m, dir, NULL, NULL));
  *out = m;
  m = NULL;
done:
  fd_model_destroy(&m);
  return st;
}

fd_status fd_verify_set(struct fd_verify_graph *x, fd_var var, const float *host, int64_t n) {
  fd_dtype dtype = fd_graph_get(x->g, var)->dtype;
  if (dtype == FD_F32) return fd_graph_set(x->g, var, host, (size_t)n * sizeof *host);
  void *copy = malloc((size_t)n * fd_dtype_bytes(dtype) + 1);
  if (!copy) return FD_FAIL(FD_ERR_NOMEM, "no memory for an input");
  fd_convert(copy, dtype, host, FD_F32, n);
  fd_status st = fd_graph_set(x->g, var, copy, (size_t)n * fd_dtype_bytes(dtype));
  if (st == FD_OK) st = x->ctx->backend->sync(x->ctx);
  free(copy);
  return st;
}

fd_status fd_verify_get(struct fd_verify_graph *x, fd_var var, float *host, int64_t n) {
  fd_dtype dtype = fd_graph_get(x->g, var)->dtype;
  if (dtype == FD_F32) return fd_graph_read(x->g, var, host, (size_t)n * sizeof *host);
  void *copy = malloc((size_t)n * fd_dtype_bytes(dtype) + 1);
  if (!copy) return FD_FAIL(FD_ERR_NOMEM, "no memory for an output");
  fd_status st = fd_graph_read(x->g, var, copy, (size_t)n * fd_dtype_bytes(dtype));
  if (st == FD_OK) fd_convert(host, FD_F32, copy, dtype, n);
  free(copy);
  return st;
}

void fd_to_nhwc(const float *from, float *to, int64_t B, int64_t C, int64_t H, int64_t W) {
  for (int64_t b = 0; b < B; b++)
    for (int64_t c = 0; c < C; c++)
      for (int64_t i = 0; i < H * W; i++) to[(b * H * W + i) * C + c] = from[(b * C + c) * H * W + i];
}

void fd_to_nchw(const float *from, float *to, int64_t B, int64_t C, int64_t H, int64_t W) {
  for (int64_t b = 0; b < B; b++)
    for (int64_t c = 0; c < C; c++)
      for (int64_t i = 0; i < H * W; i++) to[(b * C + c) * H * W + i] = from[(b * H * W + i) * C + c];
}

static fd_status image_shape(struct fd_verify *v, const char *name, struct fd_h5_array *a) {
  fd_status st = FD_OK;
  if (v->io < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: has no io.h5", v->dir));
  FD_TRY(fd_h5_shape(v->io, name, a));
  if (a->ndim != 4) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s has %d dimensions, 4 are wanted", v->dir, name, a->ndim));
done:
  return st;
}

fd_status fd_verify_image_input(struct fd_verify_graph *x, const char *name, bool keep_f32, fd_var *out) {
  fd_status st = FD_OK;
  struct fd_h5_array a;
  FD_TRY(image_shape(x->v, name, &a));
  *out = fd_graph_input(x->g, name, keep_f32 ? FD_F32 : x->v->dtype, 4, (int64_t[]){a.shape[0], a.shape[2], a.shape[3], a.shape[1]});
done:
  return st;
}

fd_status fd_verify_set_image(struct fd_verify_graph *x, const char *name, fd_var var) {
  fd_status st = FD_OK;
  struct fd_h5_array a = {0};
  float *to = NULL;
  FD_TRY(fd_verify_read(x->v, name, FD_F32, &a));
  to = malloc((size_t)a.numel * sizeof *to + 1);
  if (!to) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %s", name));
  fd_to_nhwc(a.data, to, a.shape[0], a.shape[1], a.shape[2], a.shape[3]);
  FD_TRY(fd_verify_set(x, var, to, a.numel));
done:
  free(to);
  fd_h5_array_free(&a);
  return st;
}

fd_status fd_verify_compare_image(struct fd_verify_graph *x, const char *record, fd_var var) {
  fd_status st = FD_OK;
  const fd_tensor *t = fd_graph_get(x->g, var);
  const int64_t n = fd_tensor_numel(t);
  float *ours = malloc((size_t)n * 2 * sizeof *ours + 1);
  if (!ours) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %s", record));
  FD_TRY(fd_verify_get(x, var, ours, n));
  fd_to_nchw(ours, ours + n, t->shape[0], t->shape[3], t->shape[1], t->shape[2]);
  FD_TRY(fd_verify_compare(x->v, record, ours + n, n, -1, NULL, 0));
done:
  free(ours);
  return st;
}

fd_status fd_verify_param_grads(struct fd_verify_graph *x, fd_model *m) {
  fd_status st = FD_OK;
  int n = 0;
  char **names = NULL, record[320];
  const int64_t all = fd_params_flat_numel(m->params);
  float *flat = malloc((size_t)all * sizeof *flat + 1);
  if (!flat) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for gradients"));
  FD_TRY(x->ctx->backend->from_device(x->ctx, flat, fd_params_flat_grad(m->params), (size_t)all * sizeof *flat));
  FD_TRY(fd_h5_list(x->v->io, "grad/param", false, &n, &names));
  for (int i = 0; i < n; i++) {
    const int row = fd_params_find(m->params, names[i]);
    if (row < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: a gradient of %s is recorded, the model has no such parameter", x->v->dir, names[i]));
    const struct fd_param *r = fd_params_row(m->params, row);
    snprintf(record, sizeof record, "grad/param/%s", names[i]);
    FD_TRY(fd_verify_compare(x->v, record, flat + r->offset, r->numel, -1, NULL, 0));
  }
done:
  free(names);
  free(flat);
  return st;
}

fd_status fd_verify_text(const struct fd_h5_array *mask, const int64_t *ids, int64_t tile, struct fd_text **out, int64_t **where) {
  fd_status st = FD_OK;
  const int64_t B = mask->shape[0], L = mask->shape[1], *m = mask->data;
  struct fd_text *t = NULL;
  int32_t *packed = calloc((size_t)(B * L), sizeof *packed), *len = calloc((size_t)B, sizeof *len);
  int64_t *from = calloc((size_t)(B * L), sizeof *from), n = 0;
  if (!packed || !len || !from) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for text"));
  for (int64_t b = 0; b < B; b++)
    for (int64_t k = 0; k < L; k++)
      if (m[b * L + k]) {
        from[n++] = b * L + k;
        packed[b * L + len[b]++] = ids ? (int32_t)ids[b * L + k] : 0;
      }
  FD_TRY(fd_text_create(B, B * L, L, tile, &t));
  FD_TRY(fd_text_pack(t, B, packed, L, len));
  *out = t;
  *where = from;
  t = NULL;
  from = NULL;
done:
  fd_text_destroy(&t);
  free(from);
  free(len);
  free(packed);
  return st;
}

static int64_t packed_rows(const struct fd_text *t) { return t->ranges[4 * t->B]; } /* where the tail begins */

void fd_pack_rows(const struct fd_text *t, const int64_t *where, int64_t D, const float *from, float *to) {
  memset(to, 0, (size_t)(t->T * D) * sizeof *to);
  for (int64_t r = 0; r < packed_rows(t); r++) memcpy(to + r * D, from + where[r] * D, (size_t)D * sizeof *to);
}

void fd_unpack_rows(const struct fd_text *t, const int64_t *where, int64_t D, const float *from, float *to, int64_t rows) {
  memset(to, 0, (size_t)(rows * D) * sizeof *to);
  for (int64_t r = 0; r < packed_rows(t); r++) memcpy(to + where[r] * D, from + r * D, (size_t)D * sizeof *to);
}
