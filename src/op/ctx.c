// SPDX-License-Identifier: Apache-2.0
// Contexts, and the one door through which every op runs.
#include "op/ctx.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

static fd_op_hook *op_hook;
static void *op_hook_user;

fd_status fd_backend_check(const struct fd_backend *backend) {
  char names[512] = "";
  size_t n = 0;
#define X(name, slots) \
  if (!backend->ops->name && n < sizeof names) n += (size_t)snprintf(names + n, sizeof names - n, " %s", #name);
#include "op/ops.def"
#undef X
  return n ? FD_FAIL(FD_ERR_UNSUPPORTED, "backend %s has no kernel for%s", backend->name, names) : FD_OK;
}

fd_status fd_ctx_create(const struct fd_backend *backend, int n_threads, struct fd_comm *comm, fd_ctx **out) {
  return fd_ctx_create_with(backend, n_threads, comm, 0, out);
}

fd_status fd_ctx_create_with(const struct fd_backend *backend, int n_threads, struct fd_comm *comm, unsigned flags, fd_ctx **out) {
  fd_status st = FD_OK;
  fd_ctx *ctx = NULL;
  if (backend->not_built)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "%s: not built, %s", backend->name, backend->not_built));
  ctx = calloc(1, sizeof *ctx);
  if (!ctx) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a context"));
  if (n_threads < 1) {
    cpu_set_t set;
    n_threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  }
  ctx->backend = backend;
  ctx->n_threads = n_threads;
  ctx->comm = comm;
  ctx->deterministic = flags & FD_CTX_DETERMINISTIC;
  ctx->share_device = flags & FD_CTX_SHARE_DEVICE;
  ctx->record = backend->record_begin && !(flags & FD_CTX_NO_RECORD);
  FD_TRY(backend->open(ctx));
  *out = ctx;
  ctx = NULL;
done:
  free(ctx); /* open failed: it cleaned up after itself */
  return st;
}

void fd_ctx_destroy(fd_ctx **ctx) {
  if (!*ctx) return;
  (*ctx)->backend->close(*ctx);
  free(*ctx);
  *ctx = NULL;
}

int64_t fd_count_tile(const fd_ctx *ctx, int64_t *capacity, int64_t least) {
  const int64_t steps = ctx->backend->count_steps, n = steps ? (*capacity + steps - 1) / steps : least;
  const int64_t tile = (n + least - 1) / least * least;
  *capacity = steps ? tile * steps : (*capacity + tile - 1) / tile * tile;
  return tile;
}

bool fd_op_hooked(void) { return op_hook != NULL; }

void fd_op_set_hook(fd_op_hook *hook, void *user) {
  op_hook = hook;
  op_hook_user = user;
}

fd_status fd_op_run(fd_ctx *ctx, enum fd_op op, const void *args) {
  fd_status st = FD_OK;
  if (op_hook) op_hook(op_hook_user, ctx, op, args, false);
  switch (op) {
#define X(name, slots)                                      \
  case FD_OP_##name:                                        \
    st = ctx->backend->ops->name(ctx, args);                \
    break;
#include "op/ops.def"
#undef X
    default: st = FD_FAIL(FD_ERR_ARG, "op %d does not exist", (int)op);
  }
  if (op_hook) op_hook(op_hook_user, ctx, op, args, true);
  return st;
}
