// SPDX-License-Identifier: Apache-2.0
// State of AdamW and EMA in flat buffers. Everything that touches device memory goes through the backend's copies or an op.
#include "train/optim.h"

#include <stdlib.h>
#include <string.h>

#include "train/zero.h"

/* What a family's copy needs to know. */
struct part_ref {
  fd_optim *o;
  enum fd_optim_part part;
  bool reading;
};

struct fd_optim {
  fd_ctx *ctx;       /* borrowed */
  fd_params *params; /* borrowed */
  struct fd_optim_config config;
  int64_t first, n; /* this rank's shard of the flat space */
  float *part[FD_OPTIM_PARTS]; /* device, owned, n elements each */
  struct part_ref ref[2 * FD_OPTIM_PARTS];
  fd_var grad_all, grad, value[FD_OPTIM_PARTS], compute;
};

/* The average is the last part. */
static int n_parts(const fd_optim *o) { return o->config.ema ? FD_OPTIM_PARTS : FD_OPTIM_EMA; }

fd_status fd_optim_create(fd_ctx *ctx, fd_params *params, const struct fd_optim_config *config, fd_optim **out) {
  if (config->zero_stage != 0)
    return FD_FAIL(FD_ERR_UNSUPPORTED, "trainer.zero_stage is %lld; this build has stage 0 only (every rank keeps the whole state)",
                   (long long)config->zero_stage);
  if (fd_params_flat_numel(params) < 1) return FD_FAIL(FD_ERR_ARG, "optimiser: the table has no trainable parameters");
  fd_optim *o = calloc(1, sizeof *o);
  if (!o) return FD_FAIL(FD_ERR_NOMEM, "no memory for the optimiser");
  o->ctx = ctx;
  o->params = params;
  o->config = *config;
  fd_zero_shard_range((int)config->zero_stage, fd_params_flat_numel(params), fd_comm_rank(ctx->comm), fd_comm_size(ctx->comm),
                      &o->first, &o->n);
  for (int i = 0; i < 2 * FD_OPTIM_PARTS; i++)
    o->ref[i] = (struct part_ref){o, (enum fd_optim_part)(i % FD_OPTIM_PARTS), i >= FD_OPTIM_PARTS};
  *out = o;
  return FD_OK;
}

void fd_optim_destroy(fd_optim **o) {
  if (!o || !*o) return;
  for (int i = 0; i < FD_OPTIM_PARTS; i++)
    if ((*o)->part[i]) (*o)->ctx->backend->free((*o)->ctx, (*o)->part[i]);
  free(*o);
  *o = NULL;
}

void fd_optim_bytes(const fd_optim *o, size_t *master, size_t *moments, size_t *ema) {
  const size_t bytes = (size_t)o->n * sizeof(float);
  if (master) *master = bytes;
  if (moments) *moments = 2 * bytes;
  if (ema) *ema = o->config.ema ? bytes : 0;
}

void fd_optim_build(fd_optim *o, fd_graph *g, fd_var control) {
  static const char *const names[] = {"master", "exp_avg", "exp_avg_sq", "ema"};
  const int64_t one = 1, all = fd_params_flat_numel(o->params);
  o->grad_all = fd_graph_external(g, "gradient", FD_F32, 1, &all, 0);
  o->grad = fd_graph_external(g, "gradient of the shard", FD_F32, 1, &o->n, 0);
  for (int i = 0; i < n_parts(o); i++) o->value[i] = fd_graph_external(g, names[i], FD_F32, 1, &o->n, 0);
  o->compute = fd_graph_external(g, "weights", o->config.compute, 1, &o->n, 0);
  const fd_var sum = fd_graph_tensor(g, FD_F64, 1, &one);
  fd_graph_emit(g, FD_OP_sumsq, &(struct fd_sumsq_args){0}, (fd_var[]){o->grad_all, sum});
  fd_graph_emit(g, FD_OP_clip, &(struct fd_clip_args){.max_norm = (float)o->config.max_norm}, (fd_var[]){sum, control});
  const struct fd_adamw_args adamw = {.beta1 = o->config.beta1,
                                      .beta2 = o->config.beta2,
                                      .eps = (float)o->config.eps,
                                      .weight_decay = (float)o->config.weight_decay,
                                      .keep_g = o->config.keep_g};
  fd_graph_emit(g, FD_OP_adamw, &adamw,
                (fd_var[]){o->value[FD_OPTIM_MASTER], o->grad, o->value[FD_OPTIM_EXP_AVG], o->value[FD_OPTIM_EXP_AVG_SQ],
                           o->value[FD_OPTIM_EMA], o->compute, control});
}

fd_status fd_optim_alloc(fd_optim *o) {
  fd_status st = FD_OK;
  for (int i = 0; i < n_parts(o); i++)
    FD_TRY(o->ctx->backend->alloc(o->ctx, (size_t)o->n * sizeof(float), (void **)&o->part[i]));
done:
  return st;
}

void fd_optim_bind(fd_optim *o, fd_graph *g) {
  fd_graph_bind(g, o->grad_all, fd_params_flat_grad(o->params));
  fd_graph_bind(g, o->grad, fd_params_flat_grad(o->params) + o->first);
  for (int i = 0; i < n_parts(o); i++) fd_graph_bind(g, o->value[i], o->part[i]);
  fd_graph_bind(g, o->compute,
                (char *)fd_params_flat(o->params) + (size_t)o->first * fd_dtype_bytes(o->config.compute));
}

/* The shard's compute weights from one of the parts. */
static fd_status publish(fd_optim *o, enum fd_optim_part part) {
  fd_status st = FD_OK;
  size_t scratch = 0;
  const fd_dtype dtype = o->config.compute;
  fd_tensor x = {.data = o->part[part], .shape = {o->n}, .ndim = 1, .dtype = FD_F32};
  fd_tensor y = {.data = (char *)fd_params_flat(o->params) + (size_t)o->first * fd_dtype_bytes(dtype),
                 .shape = {o->n},
                 .ndim = 1,
                 .dtype = dtype};
  const struct fd_cast_args args = {.x = &x, .y = &y};
  FD_TRY(o->ctx->backend->prepare(o->ctx, FD_OP_cast, &args, &scratch));
  FD_TRY(fd_op_run(o->ctx, FD_OP_cast, &args));
done:
  return st;
}

fd_status fd_optim_publish(fd_optim *o) { return publish(o, FD_OPTIM_MASTER); }
fd_status fd_optim_use_ema(fd_optim *o, bool ema) {
  return publish(o, ema && o->config.ema ? FD_OPTIM_EMA : FD_OPTIM_MASTER);
}

static fd_status locate(const fd_optim *o, enum fd_optim_part part, int row, float **at, size_t *bytes) {
  const struct fd_param *p = fd_params_row(o->params, row);
  if (p->buffer || p->offset < o->first || p->offset + p->numel > o->first + o->n)
    return FD_FAIL(FD_ERR_ARG, "optimiser: %s is not in this rank's shard", p->name);
  *at = o->part[part] + (p->offset - o->first);
  *bytes = (size_t)p->numel * sizeof(float);
  return FD_OK;
}

fd_status fd_optim_set(fd_optim *o, enum fd_optim_part part, int row, const float *host) {
  fd_status st = FD_OK;
  float *at = NULL;
  size_t bytes = 0;
  FD_TRY(locate(o, part, row, &at, &bytes));
  FD_TRY(o->ctx->backend->to_device(o->ctx, at, host, bytes));
done:
  return st;
}

fd_status fd_optim_get(const fd_optim *o, enum fd_optim_part part, int row, float *host) {
  fd_status st = FD_OK;
  float *at = NULL;
  size_t bytes = 0;
  FD_TRY(locate(o, part, row, &at, &bytes));
  FD_TRY(o->ctx->backend->from_device(o->ctx, host, at, bytes));
done:
  return st;
}

fd_status fd_optim_fill(void *optim, fd_params *params, int row, const float *values) {
  fd_status st = FD_OK;
  fd_optim *o = optim;
  if (fd_params_row(params, row)->buffer) return fd_params_set(params, row, values);
  FD_TRY(fd_optim_set(o, FD_OPTIM_MASTER, row, values));
  if (o->config.ema) FD_TRY(fd_optim_set(o, FD_OPTIM_EMA, row, values));
done:
  return st;
}

static fd_status copy_part(void *user, int64_t at, int64_t count, float *host) {
  const struct part_ref *r = user;
  float *device = r->o->part[r->part] + (at - r->o->first);
  const size_t bytes = (size_t)count * sizeof(float);
  return r->reading ? r->o->ctx->backend->to_device(r->o->ctx, device, host, bytes)
                    : r->o->ctx->backend->from_device(r->o->ctx, host, device, bytes);
}

int fd_optim_families(fd_optim *o, bool reading, struct fd_checkpoint_family families[FD_OPTIM_PARTS]) {
  static const char *const paths[] = {"model", "optimizer/exp_avg", "optimizer/exp_avg_sq", "ema"};
  /* Stage 0: every rank has everything; each writes an even share and reads all of it. */
  int64_t first = o->first, n = o->n;
  if (o->config.zero_stage == 0 && !reading)
    fd_checkpoint_share(o->n, fd_comm_rank(o->ctx->comm), fd_comm_size(o->ctx->comm), &first, &n);
  for (int i = 0; i < n_parts(o); i++)
    families[i] = (struct fd_checkpoint_family){.path = paths[i],
                                                .buffers = i == FD_OPTIM_MASTER || i == FD_OPTIM_EMA,
                                                .first = first,
                                                .n = n,
                                                .copy = copy_part,
                                                .user = &o->ref[i + (reading ? FD_OPTIM_PARTS : 0)]};
  return n_parts(o);
}

fd_status fd_optim_rows(const fd_params *params, struct fd_checkpoint_row **out) {
  fd_status st = FD_OK;
  const int count = fd_params_count(params);
  struct fd_checkpoint_row *rows = calloc((size_t)count, sizeof *rows);
  if (!rows) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the checkpoint's table"));
  for (int i = 0; i < count; i++) {
    const struct fd_param *p = fd_params_row(params, i);
    rows[i] = (struct fd_checkpoint_row){.name = p->name, .ndim = p->ndim, .offset = p->offset, .buffer = p->buffer};
    for (int d = 0; d < p->ndim; d++) rows[i].shape[d] = p->shape[d];
    if (!p->buffer) continue;
    float *host = malloc((size_t)p->numel * sizeof(float));
    if (!host) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %s", p->name));
    rows[i].data = host;
    FD_TRY(fd_params_get(params, i, host));
  }
  *out = rows;
  rows = NULL;
done:
  fd_optim_free_rows(params, &rows);
  return st;
}

void fd_optim_free_rows(const fd_params *params, struct fd_checkpoint_row **rows) {
  if (!*rows) return;
  for (int i = 0; i < fd_params_count(params); i++) free((void *)(*rows)[i].data);
  free(*rows);
  *rows = NULL;
}
