// SPDX-License-Identifier: Apache-2.0
// Parameter tables. Invariant: rows keep the order of the state dict; only offsets know about groups, alignment and padding.
#include "model/params.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/rng.h"
#include "comm/comm.h"

#define ALIGN_ELEMENTS 64

struct value { /* what a graph calls a row, a group or a constant */
  fd_graph *g; /* borrowed */
  char *name;  /* owned */
  fd_var var, grad;
  int row;           /* first row of it; -1: a constant */
  int64_t numel;
  void *constant;    /* device memory, owned */
};

struct fd_params {
  char *model;
  struct fd_param *row;
  int n, capacity;
  fd_status st; /* first failure of fd_params_add */
  char message[512];
  bool laid_out, trainable;
  int64_t flat_numel, frozen_f32_numel, frozen_numel;
  /* memory */
  fd_ctx *ctx; /* borrowed */
  bool has_memory;
  fd_dtype dtype;
  char *flat, *frozen_f32, *frozen;
  float *grad;
  fd_comm *share;    /* borrowed; set: frozen memory is one per node */
  fd_shared *shared; /* owned; NULL: private memory after all */
  /* values */
  struct value *value;
  int n_values, cap_values;
  fd_graph **with_grads;
  int n_with_grads;
};

fd_status fd_params_create(const char *model, fd_params **out) {
  fd_params *p = calloc(1, sizeof *p);
  if (p) p->model = strdup(model);
  if (!p || !p->model) {
    free(p);
    return FD_FAIL(FD_ERR_NOMEM, "%s: no memory for its parameter table", model);
  }
  *out = p;
  return FD_OK;
}

static void value_free(fd_params *p, struct value *v) {
  if (v->constant) p->ctx->backend->free(p->ctx, v->constant);
  free(v->name);
}

void fd_params_destroy(fd_params **table) {
  fd_params *p = table ? *table : NULL;
  if (!p) return;
  for (int i = 0; i < p->n; i++) {
    free((char *)p->row[i].name);
    free((char *)p->row[i].group);
    free((char *)p->row[i].alias);
  }
  for (int i = 0; i < p->n_values; i++) value_free(p, &p->value[i]);
  if (p->ctx) {
    void *const owned[] = {p->flat, p->grad, p->frozen_f32, p->frozen};
    for (int i = 0; i < (p->shared ? 2 : 4); i++)
      if (owned[i]) p->ctx->backend->free(p->ctx, owned[i]);
  }
  fd_shared_destroy(&p->shared);
  free(p->with_grads);
  free(p->value);
  free(p->row);
  free(p->model);
  free(p);
  *table = NULL;
}

__attribute__((format(printf, 3, 4))) static void keep_failure(fd_params *p, fd_status st, const char *format, ...) {
  if (p->st != FD_OK) return;
  va_list args;
  va_start(args, format);
  vsnprintf(p->message, sizeof p->message, format, args);
  va_end(args);
  p->st = st;
}

void fd_params_add(fd_params *p, const struct fd_param *row) {
  if (p->st != FD_OK) return;
  struct fd_param r = *row;
  r.offset = 0;
  r.numel = 1;
  if (p->laid_out) return keep_failure(p, FD_ERR_ARG, "%s: %s is added after the layout", p->model, row->name);
  if (r.ndim < 1 || r.ndim > FD_MAX_NDIM) return keep_failure(p, FD_ERR_ARG, "%s: %s has %d dimensions", p->model, row->name, r.ndim);
  for (int i = 0; i < r.ndim; i++)
    if (r.shape[i] < 1 || __builtin_mul_overflow(r.numel, r.shape[i], &r.numel))
      return keep_failure(p, FD_ERR_CONFIG, "%s: %s would have %lld elements in dimension %d", p->model, row->name, (long long)r.shape[i], i);
  if (fd_params_find(p, r.name) >= 0) return keep_failure(p, FD_ERR_ARG, "%s: %s is there twice", p->model, row->name);
  if (p->n == p->capacity) {
    int more = p->capacity ? 2 * p->capacity : 64;
    struct fd_param *grown = realloc(p->row, (size_t)more * sizeof *grown);
    if (!grown) return keep_failure(p, FD_ERR_NOMEM, "%s: no memory for its parameter table", p->model);
    p->row = grown;
    p->capacity = more;
  }
  r.name = strdup(row->name);
  r.group = row->group ? strdup(row->group) : NULL;
  r.alias = row->alias ? strdup(row->alias) : NULL;
  p->row[p->n++] = r;
  if (!r.name || (row->group && !r.group) || (row->alias && !r.alias))
    keep_failure(p, FD_ERR_NOMEM, "%s: no memory for its parameter table", p->model);
}

void fd_params_addf(fd_params *p, const struct fd_param *row, const char *format, ...) {
  char name[256];
  struct fd_param r = *row;
  va_list args;
  va_start(args, format);
  vsnprintf(name, sizeof name, format, args);
  va_end(args);
  r.name = name;
  fd_params_add(p, &r);
}

static bool is_frozen(const fd_params *p, int i) { return !p->trainable || p->row[i].buffer; }
bool fd_params_frozen_f32(const fd_params *p, int i) { return p->row[i].ndim == 1 || p->row[i].buffer; }

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

fd_status fd_params_layout(fd_params *p, bool trainable, int ranks) {
  if (p->st != FD_OK) return FD_FAIL(p->st, "%s", p->message);
  if (p->laid_out) return FD_FAIL(FD_ERR_ARG, "%s: laid out twice", p->model);
  if (ranks < 1) return FD_FAIL(FD_ERR_ARG, "%s: layout for %d ranks", p->model, ranks);
  p->trainable = trainable;
  int64_t *const end[] = {&p->flat_numel, &p->frozen_f32_numel, &p->frozen_numel};
  for (int i = 0; i < p->n; i++) p->row[i].offset = -1;
  for (int i = 0; i < p->n; i++) {
    struct fd_param *r = &p->row[i];
    if (r->offset >= 0) continue; /* placed with its group */
    int space = !is_frozen(p, i) ? 0 : fd_params_frozen_f32(p, i) ? 1 : 2;
    int64_t at = round_up(*end[space], ALIGN_ELEMENTS);
    r->offset = at;
    at += r->numel;
    for (int j = i + 1; r->group && j < p->n; j++) {
      struct fd_param *s = &p->row[j];
      if (!s->group || strcmp(s->group, r->group) != 0) continue;
      if (s->ndim != r->ndim || s->buffer != r->buffer || memcmp(s->shape + 1, r->shape + 1, (size_t)(r->ndim - 1) * sizeof *r->shape) != 0)
        return FD_FAIL(FD_ERR_ARG, "%s: %s and %s are no group", p->model, r->name, s->name);
      s->offset = at;
      at += s->numel;
    }
    *end[space] = at;
  }
  p->flat_numel = round_up(p->flat_numel, (int64_t)ALIGN_ELEMENTS * ranks);
  p->frozen_f32_numel = round_up(p->frozen_f32_numel, ALIGN_ELEMENTS);
  p->frozen_numel = round_up(p->frozen_numel, ALIGN_ELEMENTS);
  p->laid_out = true;
  return FD_OK;
}

int fd_params_count(const fd_params *p) { return p->n; }
const struct fd_param *fd_params_row(const fd_params *p, int i) { return &p->row[i]; }

int fd_params_find(const fd_params *p, const char *name) {
  for (int i = 0; i < p->n; i++)
    if (strcmp(p->row[i].name, name) == 0 || (p->row[i].alias && strcmp(p->row[i].alias, name) == 0)) return i;
  return -1;
}

int64_t fd_params_flat_numel(const fd_params *p) { return p->flat_numel; }
int64_t fd_params_frozen_numel(const fd_params *p) { return p->frozen_f32_numel + p->frozen_numel; }

size_t fd_params_frozen_bytes(const fd_params *p, fd_dtype dtype) {
  return (size_t)p->frozen_f32_numel * sizeof(float) + (size_t)p->frozen_numel * fd_dtype_bytes(dtype);
}

int64_t fd_params_total(const fd_params *p) {
  int64_t n = 0;
  for (int i = 0; i < p->n; i++)
    if (!p->row[i].buffer) n += p->row[i].numel;
  return n;
}

void fd_params_set_type(fd_params *p, fd_dtype dtype) { p->dtype = dtype; }

void fd_params_share(fd_params *p, struct fd_comm *comm) { p->share = comm; }

struct fd_comm *fd_params_shared(const fd_params *p, bool *writes) {
  *writes = !p->shared || p->share->node_rank == 0;
  return p->shared ? p->share : NULL;
}

/* One piece of memory per node for both kinds of frozen rows; private memory if there is none. Collective. */
static fd_status share_frozen(fd_params *p) {
  const size_t f32_bytes = (size_t)p->frozen_f32_numel * sizeof(float), bytes = fd_params_frozen_bytes(p, p->dtype);
  fd_status st = fd_shared_create(p->share, bytes, &p->shared);
  if (st == FD_ERR_NOMEM) {
    if (p->share->node_rank == 0) fd_log_warn("%s: %s; each rank keeps its own copy of the weights", p->model, fd_status_message());
    p->shared = NULL;
    return FD_OK;
  }
  if (st != FD_OK) return st;
  p->frozen_f32 = p->shared->data;
  p->frozen = p->frozen_f32 + f32_bytes; /* a multiple of 64 elements: aligned */
  return FD_OK;
}

fd_status fd_params_alloc(fd_params *p, fd_ctx *ctx, fd_dtype dtype, bool want_grad) {
  fd_status st = FD_OK;
  if (!p->laid_out || p->has_memory) FD_TRY(FD_FAIL(FD_ERR_ARG, "%s: memory needs a layout, and is given once", p->model));
  if (dtype != FD_F32 && dtype != FD_BF16) FD_TRY(FD_FAIL(FD_ERR_ARG, "%s: weights of type %s", p->model, fd_dtype_name(dtype)));
  p->ctx = ctx;
  p->has_memory = true;
  p->dtype = dtype;
  const bool share = p->share && p->share->size > 1 && strcmp(ctx->backend->name, "cpu") == 0;
  if (!share) p->share = NULL;
  else FD_TRY(share_frozen(p));
  const struct {
    void **at;
    size_t bytes;
  } want[] = {{(void **)&p->flat, (size_t)p->flat_numel * fd_dtype_bytes(dtype)},
              {(void **)&p->frozen_f32, (size_t)p->frozen_f32_numel * sizeof(float)},
              {(void **)&p->frozen, (size_t)p->frozen_numel * fd_dtype_bytes(dtype)},
              {(void **)&p->grad, want_grad ? (size_t)p->flat_numel * sizeof(float) : 0}};
  for (int i = 0; i < 4; i++)
    if (want[i].bytes && !*want[i].at) FD_TRY(ctx->backend->alloc(ctx, want[i].bytes, want[i].at));
done:
  return p->share ? fd_agree(p->share, st) : st;
}

void *fd_params_flat(const fd_params *p) { return p->flat; }
float *fd_params_flat_grad(const fd_params *p) { return p->grad; }

fd_dtype fd_params_dtype(const fd_params *p, int i) {
  return is_frozen(p, i) && fd_params_frozen_f32(p, i) ? FD_F32 : p->dtype;
}

void *fd_params_data(const fd_params *p, int i) {
  char *base = !is_frozen(p, i) ? p->flat : fd_params_frozen_f32(p, i) ? p->frozen_f32 : p->frozen;
  return base ? base + (size_t)p->row[i].offset * fd_dtype_bytes(fd_params_dtype(p, i)) : NULL;
}

/* ---- values in graphs ------------------------------------------------------------------------------------------------ */

static struct value *value_find(const fd_params *p, const fd_graph *g, const char *name) {
  for (int i = p->n_values - 1; i >= 0; i--) /* the newest graph is asked most */
    if (p->value[i].g == g && strcmp(p->value[i].name, name) == 0) return &p->value[i];
  return NULL;
}

static struct value *value_add(fd_params *p, fd_graph *g, const char *name) {
  if (p->n_values == p->cap_values) {
    int more = p->cap_values ? 2 * p->cap_values : 64;
    struct value *grown = realloc(p->value, (size_t)more * sizeof *grown);
    if (!grown) return NULL;
    p->value = grown;
    p->cap_values = more;
  }
  struct value *v = &p->value[p->n_values];
  *v = (struct value){.g = g, .name = strdup(name), .row = -1};
  if (!v->name) return NULL;
  p->n_values++;
  return v;
}

static bool has_grads(const fd_params *p, const fd_graph *g) {
  for (int i = 0; i < p->n_with_grads; i++)
    if (p->with_grads[i] == g) return true;
  return false;
}

void fd_params_grads(fd_params *p, fd_graph *g) {
  if (has_grads(p, g)) return;
  fd_graph **grown = realloc(p->with_grads, (size_t)(p->n_with_grads + 1) * sizeof *grown);
  if (!grown) return fd_graph_fail(g, FD_ERR_NOMEM, "%s: no memory", p->model);
  p->with_grads = grown;
  p->with_grads[p->n_with_grads++] = g;
}

/* The first row of a name: a row, or a group. *rows: how many. */
static int find_rows(const fd_params *p, const char *name, int *rows) {
  int first = -1;
  *rows = 0;
  for (int i = 0; i < p->n; i++)
    if (p->row[i].group && strcmp(p->row[i].group, name) == 0) {
      if (first < 0) first = i;
      ++*rows;
    }
  if (first >= 0) return first;
  *rows = 1;
  return fd_params_find(p, name);
}

fd_var fd_params_var(fd_params *p, fd_graph *g, const char *name) {
  if (fd_graph_status(g) != FD_OK) return 0;
  struct value *v = value_find(p, g, name);
  if (v) return v->var;
  int rows, row = find_rows(p, name, &rows);
  if (row < 0) {
    fd_graph_fail(g, FD_ERR_ARG, "%s: no parameter or group is called %s", p->model, name);
    return 0;
  }
  if (!p->laid_out) {
    fd_graph_fail(g, FD_ERR_ARG, "%s: used before its layout", p->model);
    return 0;
  }
  const struct fd_param *r = &p->row[row];
  int64_t shape[FD_MAX_NDIM];
  memcpy(shape, r->shape, sizeof shape);
  for (int i = row + 1; rows > 1 && i < p->n; i++)
    if (p->row[i].group && strcmp(p->row[i].group, name) == 0) shape[0] += p->row[i].shape[0];
  bool frozen = is_frozen(p, row);
  fd_dtype dtype = fd_params_dtype(p, row);
  v = value_add(p, g, name);
  if (!v) {
    fd_graph_fail(g, FD_ERR_NOMEM, "%s: no memory", p->model);
    return 0;
  }
  v->row = row;
  v->numel = r->numel / r->shape[0] * shape[0];
  v->var = fd_graph_external(g, name, dtype, r->ndim, shape, frozen ? FD_T_CONST : 0);
  if (!frozen && has_grads(p, g)) {
    char label[300];
    snprintf(label, sizeof label, "d %s", name);
    v->grad = fd_graph_external(g, label, FD_F32, r->ndim, shape, 0);
    fd_graph_want_grad(g, v->var, v->grad);
  }
  return v->var;
}

fd_var fd_params_varf(fd_params *p, fd_graph *g, const char *format, ...) {
  char name[256];
  va_list args;
  va_start(args, format);
  vsnprintf(name, sizeof name, format, args);
  va_end(args);
  return fd_params_var(p, g, name);
}

fd_var fd_params_const(fd_params *p, fd_graph *g, const char *name, fd_dtype dtype, int ndim, const int64_t *shape, const void *host) {
  if (fd_graph_status(g) != FD_OK) return 0;
  struct value *v = value_find(p, g, name);
  if (v) return v->var;
  fd_ctx *ctx = fd_graph_ctx(g);
  v = value_add(p, g, name);
  if (!v) {
    fd_graph_fail(g, FD_ERR_NOMEM, "%s: no memory", p->model);
    return 0;
  }
  v->var = fd_graph_external(g, name, dtype, ndim, shape, FD_T_CONST);
  size_t bytes = fd_dtype_bytes(dtype);
  for (int i = 0; i < ndim; i++) bytes *= (size_t)shape[i];
  if (!p->ctx) p->ctx = ctx; /* frees it */
  fd_status st = ctx->backend->alloc(ctx, bytes, &v->constant);
  if (st == FD_OK) st = ctx->backend->to_device(ctx, v->constant, host, bytes);
  if (st == FD_OK) st = ctx->backend->sync(ctx); /* `host` is the caller's and may go */
  if (st != FD_OK) fd_graph_fail(g, st, "%s: constant %s: %s", p->model, name, fd_status_message());
  return v->var;
}

fd_status fd_params_bind(fd_params *p, fd_graph *g) {
  for (int i = 0; i < p->n_values; i++) {
    struct value *v = &p->value[i];
    if (v->g != g) continue;
    void *data = v->row < 0 ? v->constant : fd_params_data(p, v->row);
    if (!data) return FD_FAIL(FD_ERR_ARG, "%s: %s has no memory to bind", p->model, v->name);
    fd_graph_bind(g, v->var, data);
    if (!v->grad) continue;
    if (!p->grad) return FD_FAIL(FD_ERR_ARG, "%s: gradients are wanted but have no memory", p->model);
    fd_graph_bind(g, v->grad, p->grad + p->row[v->row].offset);
  }
  return FD_OK;
}

void fd_params_forget(fd_params *p, const fd_graph *g) {
  int n = 0;
  for (int i = 0; i < p->n_values; i++) {
    if (p->value[i].g == g) value_free(p, &p->value[i]);
    else p->value[n++] = p->value[i];
  }
  p->n_values = n;
  n = 0;
  for (int i = 0; i < p->n_with_grads; i++)
    if (p->with_grads[i] != g) p->with_grads[n++] = p->with_grads[i];
  p->n_with_grads = n;
}

bool fd_params_grad_range(const fd_params *p, const fd_graph *g, fd_var grad, int64_t *first, int64_t *numel) {
  for (int i = 0; grad && i < p->n_values; i++) {
    const struct value *v = &p->value[i];
    if (v->g != g || v->grad != grad) continue;
    *first = p->row[v->row].offset;
    *numel = v->numel;
    return true;
  }
  return false;
}

/* ---- content --------------------------------------------------------------------------------------------------------- */

double fd_param_bound(const struct fd_param *r) {
  int64_t receptive = 1; /* a convolution counts as [out, in kh kw] on both sides, as nn.Linear of that shape */
  for (int i = 1; i < r->ndim; i++) receptive *= r->shape[i];
  return sqrt(6.0 / (double)(r->shape[0] + receptive));
}

fd_status fd_params_init_row(const fd_params *p, int i, uint64_t seed, float *out) {
  const struct fd_param *r = &p->row[i];
  const int threads = p->ctx ? p->ctx->n_threads : 1; /* a number depends on its place alone */
  if (r->numel > (int64_t)UINT32_MAX)
    return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s has more elements than one random stream", p->model, r->name);
  switch (r->init) {
    case FD_INIT_ZERO:
      memset(out, 0, (size_t)r->numel * sizeof *out);
      return FD_OK;
    case FD_INIT_XAVIER: {
      float bound = (float)fd_param_bound(r);
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t e = 0; e < r->numel; e += 4) {
        uint32_t word[4];
        fd_rng_block(seed, FD_RNG_INIT, (uint64_t)i, (uint32_t)(e / 4), word);
        for (int64_t k = 0; k < 4 && e + k < r->numel; k++) /* 24 bits in the middle of their cell: symmetric, never at the bound */
          out[e + k] = bound * (2 * ((float)(word[k] >> 8) + 0.5f) * 0x1p-24f - 1);
      }
      return FD_OK;
    }
    case FD_INIT_NORMAL:
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t e = 0; e < r->numel; e += 4) {
        float z[4];
        fd_rng_normal4(seed, FD_RNG_INIT, (uint64_t)i, (uint32_t)(e / 4), z);
        for (int64_t k = 0; k < 4 && e + k < r->numel; k++) out[e + k] = z[k] * r->std;
      }
      return FD_OK;
    case FD_INIT_TABLE:
      r->fill(r, out);
      return FD_OK;
    case FD_INIT_NONE: break;
  }
  return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s has no initial value, it must come from a file", p->model, r->name);
}

fd_status fd_params_set(fd_params *p, int i, const float *host) {
  fd_status st = FD_OK;
  void *copy = NULL;
  const struct fd_param *r = &p->row[i];
  void *to = fd_params_data(p, i);
  fd_dtype dtype = fd_params_dtype(p, i);
  size_t bytes = (size_t)r->numel * fd_dtype_bytes(dtype);
  if (!to) FD_TRY(FD_FAIL(FD_ERR_ARG, "%s: %s has no memory", p->model, r->name));
  if (dtype != FD_F32) {
    copy = malloc(bytes);
    if (!copy) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: %s: no memory", p->model, r->name));
    fd_convert(copy, dtype, host, FD_F32, r->numel);
  }
  FD_TRY(p->ctx->backend->to_device(p->ctx, to, copy ? copy : host, bytes));
  FD_TRY(p->ctx->backend->sync(p->ctx));
done:
  free(copy);
  return st;
}

fd_status fd_params_get(const fd_params *p, int i, float *host) {
  fd_status st = FD_OK;
  void *copy = NULL;
  const struct fd_param *r = &p->row[i];
  const void *from = fd_params_data(p, i);
  fd_dtype dtype = fd_params_dtype(p, i);
  size_t bytes = (size_t)r->numel * fd_dtype_bytes(dtype);
  if (!from) FD_TRY(FD_FAIL(FD_ERR_ARG, "%s: %s has no memory", p->model, r->name));
  if (dtype != FD_F32) {
    copy = malloc(bytes);
    if (!copy) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: %s: no memory", p->model, r->name));
  }
  FD_TRY(p->ctx->backend->from_device(p->ctx, copy ? copy : host, from, bytes));
  if (copy) fd_convert(host, FD_F32, copy, dtype, r->numel);
done:
  free(copy);
  return st;
}
