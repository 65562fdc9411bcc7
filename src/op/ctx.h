// SPDX-License-Identifier: Apache-2.0
// A context: where ops run, and with what. One per rank. And the type of a backend.
#ifndef FD_OP_CTX_H
#define FD_OP_CTX_H

#include <stdbool.h>

#include "op/ops.h"

struct fd_comm; /* src/comm/comm.h */

struct fd_backend {
  const char *name;          /* "cpu", "cuda" */
  const char *not_built;     /* NULL if built; else what to do ("reconfigure with --with-cuda=DIR") */
  const struct fd_ops *ops;
  /** Whether "auto" may choose it on this machine (a driver, a device); if not, `why` says what is missing. NULL: yes. */
  bool (*usable)(char *why, size_t why_bytes);

  /** Fill ctx->state and what the backend needs from the device; the other members are set already. */
  fd_status (*open)(fd_ctx *ctx);
  void (*close)(fd_ctx *ctx);
  /** Memory of the device, 64-byte aligned (256 on a GPU), zeroed. Owned by the caller until free. */
  fd_status (*alloc)(fd_ctx *ctx, size_t bytes, void **out);
  void (*free)(fd_ctx *ctx, void *p);
  /** Between host and device memory; ordered with the ops of the context. from_device returns when the data is there. */
  fd_status (*to_device)(fd_ctx *ctx, void *dst, const void *src, size_t bytes);
  fd_status (*from_device)(fd_ctx *ctx, void *dst, const void *src, size_t bytes);
  /** All ops issued so far are done when it returns. */
  fd_status (*sync)(fd_ctx *ctx);
  /** Scratch that `op` needs for these args (tensor data may be NULL); 0 is common. Also checks shapes and types and
   *  creates what the op needs once (oneDNN primitives, cuDNN plans), so that nothing is created in a step. */
  fd_status (*prepare)(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes);
  /** Bytes that the backend will keep, beside the graph's memory, for a copy of this prepared op's constant operand
   *  (FD_T_CONST); ops with the same operand and as many bytes share it. NULL: it keeps none. */
  size_t (*kept_bytes)(fd_ctx *ctx, enum fd_op op, const void *args);

  /** A point in the order of the context's work, for timing: *point NULL makes one, else it moves here. Ops issued before it are
   *  done at that point, and nothing waits. seconds waits for `to`. The caller frees points. */
  fd_status (*mark)(fd_ctx *ctx, void **point);
  fd_status (*seconds)(fd_ctx *ctx, const void *from, const void *to, double *seconds);
  void (*mark_free)(fd_ctx *ctx, void **point);

  /** 0: a count (op/ops.h) may take any value. Else kernels are made for each value that it takes, and its writer rounds it up to a
   *  multiple of 1 / count_steps of its capacity (fd_count_tile). */
  int count_steps;
  /** End of a run of ops: what went to other streams is ordered before what comes next. NULL: there are none. */
  fd_status (*join)(fd_ctx *ctx);
  /** Recording a run of ops, to issue it again at little cost. Between begin and end ops are recorded and not run; end with `out` NULL
   *  drops what was recorded. A recording fits as long as the counts that its ops saw are the same. replay runs it. The executor
   *  (src/graph/exec.c) is the only caller. NULL: ops are cheap to issue. */
  fd_status (*record_begin)(fd_ctx *ctx);
  fd_status (*record_end)(fd_ctx *ctx, void **out);
  bool (*record_fits)(fd_ctx *ctx, const void *recording);
  fd_status (*replay)(fd_ctx *ctx, void *recording);
  void (*record_free)(fd_ctx *ctx, void **recording);
};

struct fd_ctx {
  const struct fd_backend *backend;
  int n_threads;             /* OpenMP threads of this rank */
  void *scratch;             /* of the op that runs */
  size_t scratch_bytes;
  struct fd_comm *comm;      /* borrowed; NULL: one rank */
  bool deterministic;        /* the same bits each time, where a faster kernel would not (trainer.deterministic) */
  bool share_device;         /* several ranks may use one GPU (trainer.share_gpu) */
  bool record;               /* runs of ops may be recorded (trainer.cuda_graph); a backend clears it where it cannot */
  const char *cache_dir;     /* borrowed; where a backend keeps what it measures or compiles for this run; NULL: it measures nothing */
  void *state;               /* the backend's own */
};

enum { FD_CTX_DETERMINISTIC = 1u, FD_CTX_SHARE_DEVICE = 2u, FD_CTX_NO_RECORD = 4u };

/** FD_OK if the backend has a kernel for every op; else FD_ERR_UNSUPPORTED with the names of those that are missing. */
fd_status fd_backend_check(const struct fd_backend *backend);

/** Open a context on a backend. n_threads 0: the cores this process may use. comm may be NULL; else collective. */
fd_status fd_ctx_create(const struct fd_backend *backend, int n_threads, struct fd_comm *comm, fd_ctx **out);
/** The same with FD_CTX_* flags. */
fd_status fd_ctx_create_with(const struct fd_backend *backend, int n_threads, struct fd_comm *comm, unsigned flags, fd_ctx **out);
void fd_ctx_destroy(fd_ctx **ctx);

/** What a count with this capacity is rounded up to, `least` at least; the capacity itself becomes a multiple of it. */
int64_t fd_count_tile(const fd_ctx *ctx, int64_t *capacity, int64_t least);

/** Run one op: the only door to the table, so that timing and checks wrap all ops from one place. */
fd_status fd_op_run(fd_ctx *ctx, enum fd_op op, const void *args);

/** Called around every op when set (bench, NaN checks). `done` is false before, true after. Nothing is recorded while one is set. */
typedef void fd_op_hook(void *user, fd_ctx *ctx, enum fd_op op, const void *args, bool done);
void fd_op_set_hook(fd_op_hook *hook, void *user);
bool fd_op_hooked(void);

#endif
