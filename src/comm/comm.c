// SPDX-License-Identifier: Apache-2.0
// MPI behind comm.h. Invariant: errors of MPI come back as FD_ERR_COMM with MPI's own words; nothing aborts by itself.
#include "comm/comm.h"

#include <mpi.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/clones.h"
#include "base/log.h"
#include "comm/node_sum.h"

#define PIECE_BYTES ((size_t)1 << 30)
#define PIECE_ELEMENTS (((int64_t)1 << 30) - 1)

struct fd_comm_impl {
  MPI_Comm world, node;
  bool owns_mpi;
  size_t piece_bytes;
  MPI_Datatype bf16;
  MPI_Op bf16_sum;
  /* outstanding pieces, and for each the request that it belongs to; n_open[r]: pieces of request r still on their way */
  MPI_Request *pending;
  int *owner, *done;
  int n_pending, cap_pending;
  int *n_open; /* -1: not started */
  int n_requests;
  fd_node_sum *node_sum; /* for f32 where all ranks are on one node; made by the first reduction */
  bool node_sum_tried;
  double wait_s;
  atomic_int waiting; /* for the watchdog: within a blocking call */
};

struct fd_shared_impl {
  MPI_Win win;
};

#define TRY_MPI(call)                                      \
  do {                                                     \
    int mpi_rc = (call);                                   \
    if (mpi_rc != MPI_SUCCESS) {                           \
      st = mpi_failed(__FILE__, __LINE__, #call, mpi_rc);  \
      goto done;                                           \
    }                                                      \
  } while (0)

/* A blocking call: others may see that this rank waits. */
#define TRY_WAIT(comm, call)                                                      \
  do {                                                                            \
    atomic_store_explicit(&(comm)->impl->waiting, 1, memory_order_relaxed);       \
    int wait_rc = (call);                                                         \
    atomic_store_explicit(&(comm)->impl->waiting, 0, memory_order_relaxed);       \
    if (wait_rc != MPI_SUCCESS) {                                                 \
      st = mpi_failed(__FILE__, __LINE__, #call, wait_rc);                        \
      goto done;                                                                  \
    }                                                                             \
  } while (0)

static fd_status mpi_failed(const char *file, int line, const char *call, int rc) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int n = 0;
  MPI_Error_string(rc, text, &n);
  return fd_fail(FD_ERR_COMM, file, line, "%.*s: %s", (int)strcspn(call, "("), call, text);
}

FD_CLONES static void add_bf16(const fd_bf16 *x, fd_bf16 *y, int n) {
  for (int i = 0; i < n; i++) y[i] = fd_f32_to_bf16(fd_bf16_to_f32(x[i]) + fd_bf16_to_f32(y[i]));
}

static void sum_bf16(void *in, void *inout, int *n, MPI_Datatype *type) {
  (void)type;
  add_bf16(in, inout, *n);
}

/* Takes `world` over, whether it succeeds or not. */
static fd_status wrap(MPI_Comm world, bool owns_mpi, fd_comm **out) {
  fd_status st = FD_OK;
  int *lowest = NULL;
  fd_comm *comm = calloc(1, sizeof *comm);
  struct fd_comm_impl *impl = calloc(1, sizeof *impl);
  if (!comm || !impl) {
    free(comm);
    free(impl);
    MPI_Comm_free(&world);
    return FD_FAIL(FD_ERR_NOMEM, "no memory for a communicator");
  }
  comm->impl = impl;
  impl->world = world;
  impl->node = MPI_COMM_NULL;
  impl->bf16 = MPI_DATATYPE_NULL;
  impl->bf16_sum = MPI_OP_NULL;
  impl->owns_mpi = owns_mpi;
  impl->piece_bytes = PIECE_BYTES;
  MPI_Comm_set_errhandler(world, MPI_ERRORS_RETURN);
  TRY_MPI(MPI_Comm_rank(world, &comm->rank));
  TRY_MPI(MPI_Comm_size(world, &comm->size));
  TRY_MPI(MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, comm->rank, MPI_INFO_NULL, &impl->node));
  MPI_Comm_set_errhandler(impl->node, MPI_ERRORS_RETURN);
  TRY_MPI(MPI_Comm_rank(impl->node, &comm->node_rank));
  TRY_MPI(MPI_Comm_size(impl->node, &comm->node_size));
  TRY_MPI(MPI_Type_contiguous(2, MPI_BYTE, &impl->bf16));
  TRY_MPI(MPI_Type_commit(&impl->bf16));
  TRY_MPI(MPI_Op_create(sum_bf16, 1, &impl->bf16_sum));
  if (gethostname(comm->host, sizeof comm->host - 1) != 0) snprintf(comm->host, sizeof comm->host, "unknown");

  /* a node is named by the lowest rank on it */
  lowest = malloc((size_t)comm->size * sizeof *lowest);
  if (!lowest) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d ranks", comm->size));
  int mine = comm->rank;
  TRY_MPI(MPI_Bcast(&mine, 1, MPI_INT, 0, impl->node));
  TRY_MPI(MPI_Allgather(&mine, 1, MPI_INT, lowest, 1, MPI_INT, world));
  for (int r = 0; r < comm->size; r++) {
    if (lowest[r] != r) continue;
    if (r == mine) comm->node = comm->n_nodes;
    comm->n_nodes++;
  }
  *out = comm;
  comm = NULL;
done:
  free(lowest);
  fd_comm_destroy(&comm);
  return st;
}

fd_status fd_comm_create(fd_comm **out) {
  fd_status st = FD_OK;
  int started = 0, provided = MPI_THREAD_SINGLE;
  bool owns = false;
  MPI_Comm world;
  TRY_MPI(MPI_Initialized(&started));
  if (!started) {
    TRY_MPI(MPI_Init_thread(NULL, NULL, MPI_THREAD_MULTIPLE, &provided));
    owns = true;
  } else {
    TRY_MPI(MPI_Query_thread(&provided));
  }
  if (provided < MPI_THREAD_SERIALIZED) /* loader threads and the watchdog live beside the thread that talks */
    FD_TRY(FD_FAIL(FD_ERR_COMM, "MPI offers thread level %d, at least %d is needed", provided, MPI_THREAD_SERIALIZED));
  TRY_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &world));
  FD_TRY(wrap(world, owns, out));
done:
  return st;
}

fd_status fd_comm_split(fd_comm *comm, int color, fd_comm **out) {
  fd_status st = FD_OK;
  MPI_Comm part = MPI_COMM_NULL;
  TRY_MPI(MPI_Comm_split(comm->impl->world, color < 0 ? MPI_UNDEFINED : color, comm->rank, &part));
  if (part == MPI_COMM_NULL)
    *out = NULL;
  else
    FD_TRY(wrap(part, false, out));
done:
  return st;
}

void fd_comm_destroy(fd_comm **comm) {
  if (!*comm) return;
  struct fd_comm_impl *impl = (*comm)->impl;
  fd_node_sum_destroy(&impl->node_sum);
  if (impl->bf16_sum != MPI_OP_NULL) MPI_Op_free(&impl->bf16_sum);
  if (impl->bf16 != MPI_DATATYPE_NULL) MPI_Type_free(&impl->bf16);
  if (impl->node != MPI_COMM_NULL) MPI_Comm_free(&impl->node);
  MPI_Comm_free(&impl->world);
  free(impl->pending);
  free(impl->owner);
  free(impl->done);
  free(impl->n_open);
  if (impl->owns_mpi) MPI_Finalize();
  free(impl);
  free(*comm);
  *comm = NULL;
}

void fd_comm_abort(fd_comm *comm, int exit_code) {
  (void)comm;
  fflush(NULL);
  int started = 0;
  MPI_Initialized(&started);
  if (started) MPI_Abort(MPI_COMM_WORLD, exit_code);
  _exit(exit_code);
}

fd_status fd_agree(fd_comm *comm, fd_status st) {
  if (fd_comm_size(comm) == 1) return st;
  fd_status mine = st;
  MPI_Comm world = comm->impl->world;
  struct {
    int status, line;
    char file[256], text[4096];
  } m;
  int first = mine == FD_OK ? comm->size : comm->rank;
  TRY_WAIT(comm, MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT, MPI_MIN, world));
  if (first == comm->size) return FD_OK;
  if (first == comm->rank) {
    memset(&m, 0, sizeof m);
    m.status = (int)mine;
    snprintf(m.file, sizeof m.file, "%s", fd_status_where());
    char *colon = strrchr(m.file, ':');
    if (colon) {
      m.line = atoi(colon + 1);
      *colon = 0;
    }
    if (first)
      snprintf(m.text, sizeof m.text, "rank %d on %s: %s", first, comm->host, fd_status_message());
    else
      snprintf(m.text, sizeof m.text, "%s", fd_status_message());
  }
  TRY_WAIT(comm, MPI_Bcast(&m, (int)sizeof m, MPI_BYTE, first, world));
  st = fd_fail((fd_status)m.status, m.file, m.line, "%s", m.text);
done:
  return st;
}

fd_status fd_comm_barrier(fd_comm *comm) {
  fd_status st = FD_OK;
  if (fd_comm_size(comm) > 1) TRY_WAIT(comm, MPI_Barrier(comm->impl->world));
done:
  return st;
}

fd_status fd_comm_node_barrier(fd_comm *comm) {
  fd_status st = FD_OK;
  if (comm && comm->node_size > 1) TRY_WAIT(comm, MPI_Barrier(comm->impl->node));
done:
  return st;
}

fd_status fd_comm_bcast(fd_comm *comm, void *data, size_t bytes, int root) {
  fd_status st = FD_OK;
  if (fd_comm_size(comm) == 1) return st;
  for (size_t at = 0; at < bytes;) {
    size_t n = bytes - at < comm->impl->piece_bytes ? bytes - at : comm->impl->piece_bytes;
    TRY_WAIT(comm, MPI_Bcast((char *)data + at, (int)n, MPI_BYTE, root, comm->impl->world));
    at += n;
  }
done:
  return st;
}

fd_status fd_comm_bcast_text(fd_comm *comm, char **text, int root) {
  fd_status st = FD_OK;
  char *copy = NULL;
  if (fd_comm_size(comm) == 1) return st;
  bool is_root = comm->rank == root;
  uint64_t bytes = is_root && *text ? strlen(*text) + 1 : 0;
  FD_TRY(fd_comm_bcast(comm, &bytes, sizeof bytes, root));
  if (bytes && !is_root) copy = malloc(bytes);
  if (bytes && !is_root && !copy) FD_FAIL(FD_ERR_NOMEM, "no memory for a text of %llu bytes", (unsigned long long)bytes);
  FD_TRY(fd_agree(comm, bytes && !is_root && !copy ? FD_ERR_NOMEM : FD_OK));
  if (bytes) FD_TRY(fd_comm_bcast(comm, is_root ? *text : copy, bytes, root));
  if (!is_root) {
    *text = copy;
    copy = NULL;
  }
done:
  free(copy);
  return st;
}

fd_status fd_comm_allgather(fd_comm *comm, const void *mine, size_t bytes, void *all) {
  fd_status st = FD_OK;
  int size = fd_comm_size(comm), rank = fd_comm_rank(comm);
  if (bytes) memcpy((char *)all + (size_t)rank * bytes, mine, bytes);
  /* one broadcast per rank: sizes are small or rare, and the cutting is that of the broadcast */
  if (size > 1 && bytes < ((size_t)1 << 20)) {
    TRY_WAIT(comm, MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, all, (int)bytes, MPI_BYTE, comm->impl->world));
  } else {
    for (int r = 0; r < size; r++) FD_TRY(fd_comm_bcast(comm, (char *)all + (size_t)r * bytes, bytes, r));
  }
done:
  return st;
}

fd_status fd_comm_allgatherv(fd_comm *comm, const void *mine, size_t bytes, void **all, size_t **first) {
  fd_status st = FD_OK;
  int size = fd_comm_size(comm), rank = fd_comm_rank(comm);
  char *data = NULL;
  uint64_t n = bytes, *lengths = malloc((size_t)size * sizeof *lengths);
  size_t *at = calloc((size_t)size + 1, sizeof *at);
  if (!lengths || !at) FD_FAIL(FD_ERR_NOMEM, "no memory for %d ranks", size);
  FD_TRY(fd_agree(comm, lengths && at ? FD_OK : FD_ERR_NOMEM));
  FD_TRY(fd_comm_allgather(comm, &n, sizeof n, lengths));
  for (int r = 0; r < size; r++) at[r + 1] = at[r] + lengths[r];
  data = calloc(at[size] + 1, 1);
  if (!data) FD_FAIL(FD_ERR_NOMEM, "no memory for %zu bytes", at[size]);
  FD_TRY(fd_agree(comm, data ? FD_OK : FD_ERR_NOMEM));
  if (bytes) memcpy(data + at[rank], mine, bytes);
  for (int r = 0; r < size; r++) FD_TRY(fd_comm_bcast(comm, data + at[r], at[r + 1] - at[r], r));
  *all = data;
  *first = at;
  data = NULL;
  at = NULL;
done:
  free(data);
  free(at);
  free(lengths);
  return st;
}

static fd_status allreduce(fd_comm *comm, void *values, int64_t n, size_t bytes, MPI_Datatype type, enum fd_comm_op op) {
  static const MPI_Op ops[] = {[FD_COMM_SUM] = MPI_SUM, [FD_COMM_MIN] = MPI_MIN, [FD_COMM_MAX] = MPI_MAX};
  fd_status st = FD_OK;
  if (fd_comm_size(comm) == 1) return st;
  int64_t most = (int64_t)(comm->impl->piece_bytes / bytes);
  for (int64_t at = 0; at < n;) {
    int64_t k = n - at < most ? n - at : most;
    TRY_WAIT(comm, MPI_Allreduce(MPI_IN_PLACE, (char *)values + (size_t)at * bytes, (int)k, type, ops[op], comm->impl->world));
    at += k;
  }
done:
  return st;
}

fd_status fd_comm_allreduce_f64(fd_comm *comm, double *values, int64_t n, enum fd_comm_op op) {
  return allreduce(comm, values, n, sizeof *values, MPI_DOUBLE, op);
}
fd_status fd_comm_allreduce_i64(fd_comm *comm, int64_t *values, int64_t n, enum fd_comm_op op) {
  return allreduce(comm, values, n, sizeof *values, MPI_INT64_T, op);
}
fd_status fd_comm_allreduce_u64(fd_comm *comm, uint64_t *values, int64_t n, enum fd_comm_op op) {
  return allreduce(comm, values, n, sizeof *values, MPI_UINT64_T, op);
}

void fd_comm_set_piece_bytes(fd_comm *comm, size_t bytes) {
  if (!comm) return;
  if (bytes < 8) bytes = 8;
  comm->impl->piece_bytes = bytes < PIECE_BYTES ? bytes : PIECE_BYTES;
}

/* Room for `pieces` more outstanding pieces and for request number `request`: grows in the first step only. */
static fd_status reserve(struct fd_comm_impl *impl, int request, int64_t pieces) {
  fd_status st = FD_OK;
  if (request >= impl->n_requests) {
    int n = request + 32;
    int *p = realloc(impl->n_open, (size_t)n * sizeof *p);
    if (!p) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d requests", n));
    for (int i = impl->n_requests; i < n; i++) p[i] = -1;
    impl->n_open = p;
    impl->n_requests = n;
  }
  if (impl->n_pending + pieces > impl->cap_pending) {
    int64_t n = 2 * (impl->n_pending + pieces) + 64;
    MPI_Request *a = realloc(impl->pending, (size_t)n * sizeof *a);
    if (a) impl->pending = a;
    int *b = realloc(impl->owner, (size_t)n * sizeof *b);
    if (b) impl->owner = b;
    int *c = realloc(impl->done, (size_t)n * sizeof *c);
    if (c) impl->done = c;
    if (!a || !b || !c) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %lld pieces", (long long)n));
    impl->cap_pending = (int)n;
  }
done:
  return st;
}

/* One message of k elements of rank `root`'s part (of all, for a sum). */
static int start_piece(struct fd_comm_impl *impl, enum fd_comm_kind kind, int root, int rank, void *data, int k, MPI_Datatype type, MPI_Op op,
                       MPI_Request *request) {
  switch (kind) {
    case FD_COMM_ALL_GATHER: return MPI_Ibcast(data, k, type, root, impl->world, request);
    case FD_COMM_REDUCE_SCATTER:
      return MPI_Ireduce(root == rank ? MPI_IN_PLACE : data, root == rank ? data : NULL, k, type, op, root, impl->world, request);
    default: return MPI_Iallreduce(MPI_IN_PLACE, data, k, type, op, impl->world, request);
  }
}

fd_status fd_comm_collective_start(fd_comm *comm, enum fd_comm_kind kind, int request, void *data, int64_t n, fd_dtype dtype) {
  fd_status st = FD_OK;
  if (fd_comm_size(comm) == 1) return st;
  struct fd_comm_impl *impl = comm->impl;
  MPI_Datatype type = dtype == FD_F32 ? MPI_FLOAT : dtype == FD_F64 ? MPI_DOUBLE : impl->bf16;
  MPI_Op op = dtype == FD_BF16 ? impl->bf16_sum : MPI_SUM;
  if (dtype != FD_F32 && dtype != FD_F64 && dtype != FD_BF16)
    FD_TRY(FD_FAIL(FD_ERR_ARG, "reduce of %s: f32, f64 and bf16 are known", fd_dtype_name(dtype)));
  if (request < 0 || n < 0) FD_TRY(FD_FAIL(FD_ERR_ARG, "reduce request %d of %lld elements", request, (long long)n));
  const int64_t parts = kind == FD_COMM_ALL_REDUCE ? 1 : comm->size, part = n / parts;
  if (n % parts) FD_TRY(FD_FAIL(FD_ERR_ARG, "request %d: %lld elements are no multiple of %d ranks", request, (long long)n, comm->size));
  int64_t most = (int64_t)(impl->piece_bytes / fd_dtype_bytes(dtype));
  if (most > PIECE_ELEMENTS) most = PIECE_ELEMENTS;
  int64_t pieces = (part + most - 1) / most * parts;
  FD_TRY(reserve(impl, request, pieces));
  if (impl->n_open[request] >= 0) FD_TRY(FD_FAIL(FD_ERR_ARG, "reduce request %d started twice", request));
  if (!impl->node_sum_tried) {
    impl->node_sum_tried = true;
    if (comm->size == comm->node_size && fd_node_sum_create(comm, &impl->node_sum) != FD_OK && comm->rank == 0)
      fd_log_warn("sums over ranks go through MPI, which is slower: %s", fd_status_message());
  }
  /* on one node memory is what a sum costs, so a part of it costs as much as all */
  if (impl->node_sum && kind != FD_COMM_ALL_GATHER && dtype == FD_F32 && impl->piece_bytes == PIECE_BYTES) {
    FD_TRY(fd_node_sum_start(impl->node_sum, request, data, n, &impl->n_open[request]));
    fd_node_sum_progress(impl->node_sum, impl->n_open);
    goto done;
  }
  impl->n_open[request] = 0;
  for (int64_t p = 0; p < parts; p++)
    for (int64_t at = 0; at < part;) {
      int64_t k = part - at < most ? part - at : most;
      TRY_MPI(start_piece(impl, kind, (int)p, comm->rank, (char *)data + (size_t)(p * part + at) * fd_dtype_bytes(dtype), (int)k, type, op,
                          &impl->pending[impl->n_pending]));
      impl->owner[impl->n_pending++] = request;
      impl->n_open[request]++;
      at += k;
    }
done:
  return st;
}

/* Take the n finished pieces out of the list, the order of the others kept. */
static void retire(struct fd_comm_impl *impl, int n) {
  for (int i = 0; i < n; i++) {
    impl->n_open[impl->owner[impl->done[i]]]--;
    impl->owner[impl->done[i]] = -1;
  }
  int k = 0;
  for (int i = 0; i < impl->n_pending; i++) {
    if (impl->owner[i] < 0) continue;
    impl->pending[k] = impl->pending[i];
    impl->owner[k++] = impl->owner[i];
  }
  impl->n_pending = k;
}

fd_status fd_comm_reduce_wait(fd_comm *comm, int request) {
  fd_status st = FD_OK;
  if (fd_comm_size(comm) == 1) return st;
  struct fd_comm_impl *impl = comm->impl;
  if (request < 0 || request >= impl->n_requests || impl->n_open[request] < 0)
    FD_TRY(FD_FAIL(FD_ERR_ARG, "reduce request %d was not started", request));
  double t = MPI_Wtime();
  atomic_store_explicit(&impl->waiting, 1, memory_order_relaxed);
  while (impl->n_open[request] > 0) {
    int n = 0;
    if (impl->node_sum && fd_node_sum_busy(impl->node_sum)) { /* each kind of sum goes on while the other waits */
      if (!fd_node_sum_progress(impl->node_sum, impl->n_open)) sched_yield();
      FD_TRY(fd_comm_progress(comm));
      continue;
    }
    TRY_MPI(MPI_Waitsome(impl->n_pending, impl->pending, &n, impl->done, MPI_STATUSES_IGNORE));
    retire(impl, n);
  }
  impl->n_open[request] = -1;
  impl->wait_s += MPI_Wtime() - t;
done:
  atomic_store_explicit(&impl->waiting, 0, memory_order_relaxed);
  return st;
}

fd_status fd_comm_progress(fd_comm *comm) {
  fd_status st = FD_OK;
  if (!comm) return st;
  struct fd_comm_impl *impl = comm->impl;
  if (impl->node_sum && fd_node_sum_busy(impl->node_sum)) fd_node_sum_progress(impl->node_sum, impl->n_open);
  if (impl->n_pending == 0) return st;
  int n = 0;
  TRY_MPI(MPI_Testsome(impl->n_pending, impl->pending, &n, impl->done, MPI_STATUSES_IGNORE));
  if (n > 0) retire(impl, n);
done:
  return st;
}

bool fd_comm_is_waiting(const fd_comm *comm) {
  return comm && atomic_load_explicit(&comm->impl->waiting, memory_order_relaxed);
}

void fd_comm_set_waiting(fd_comm *comm, bool waiting) {
  if (comm) atomic_store_explicit(&comm->impl->waiting, waiting, memory_order_relaxed);
}

void fd_comm_add_wait_s(fd_comm *comm, double seconds) {
  if (comm) comm->impl->wait_s += seconds;
}

double fd_comm_take_wait_s(fd_comm *comm) {
  if (!comm) return 0;
  double s = comm->impl->wait_s;
  comm->impl->wait_s = 0;
  return s;
}

/* Open MPI keeps windows in files of this folder. If one does not fit it fails on one rank only, and the others wait for ever: so ask first. */
static fd_status enough_shared_memory(size_t bytes) {
  const size_t margin = (size_t)1 << 20;
  const char *folder = getenv("OMPI_MCA_osc_sm_backing_directory");
  struct statvfs info;
  if (!folder) folder = "/dev/shm";
  if (statvfs(folder, &info) != 0) return FD_OK; /* it will choose another */
  const size_t free_bytes = (size_t)info.f_bavail * info.f_frsize;
  if (free_bytes >= bytes + margin) return FD_OK;
  return FD_FAIL(FD_ERR_NOMEM, "%s has %zu bytes free, shared memory of %zu is wanted", folder, free_bytes, bytes);
}

fd_status fd_shared_create(fd_comm *comm, size_t bytes, fd_shared **out) {
  fd_status st = FD_OK;
  MPI_Aint n = 0;
  int unit = 1;
  fd_shared *s = calloc(1, sizeof *s);
  if (!s) FD_FAIL(FD_ERR_NOMEM, "no memory for a shared buffer");
  FD_TRY(fd_agree(comm, s ? FD_OK : FD_ERR_NOMEM));
  s->bytes = bytes;
  if (!comm || comm->node_size == 1) {
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    s->data = aligned_alloc(4096, rounded ? rounded : 4096);
    if (!s->data)
      FD_FAIL(FD_ERR_NOMEM, "no memory for %zu bytes", bytes);
    else
      memset(s->data, 0, bytes);
    FD_TRY(fd_agree(comm, s->data ? FD_OK : FD_ERR_NOMEM));
  } else {
    s->impl = calloc(1, sizeof *s->impl);
    fd_status mine = s->impl ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for a shared buffer");
    FD_TRY(fd_agree(comm, mine));
    s->impl->win = MPI_WIN_NULL;
    FD_TRY(fd_agree(comm, comm->node_rank == 0 ? enough_shared_memory(bytes) : FD_OK));
    void *base = NULL;
    int rc = MPI_Win_allocate_shared(comm->node_rank == 0 ? (MPI_Aint)bytes + 64 : 0, 1, MPI_INFO_NULL, comm->impl->node, &base,
                                     &s->impl->win);
    if (rc == MPI_SUCCESS) rc = MPI_Win_shared_query(s->impl->win, 0, &n, &unit, &s->data);
    FD_TRY(fd_agree(comm, rc == MPI_SUCCESS ? FD_OK
                                            : FD_FAIL(FD_ERR_NOMEM, "no shared memory for %zu bytes (is /dev/shm too small?)",
                                                      bytes)));
    /* mappings are page-aligned, so every rank rounds to the same byte */
    s->data = (void *)(((uintptr_t)s->data + 63) & ~(uintptr_t)63);
    if (comm->node_rank == 0) memset(s->data, 0, bytes);
    FD_TRY(fd_comm_node_barrier(comm));
  }
  *out = s;
  s = NULL;
done:
  fd_shared_destroy(&s);
  return st;
}

void fd_shared_destroy(fd_shared **shared) {
  if (!*shared) return;
  struct fd_shared_impl *impl = (*shared)->impl;
  if (impl) {
    if (impl->win != MPI_WIN_NULL) MPI_Win_free(&impl->win);
    free(impl);
  } else {
    free((*shared)->data);
  }
  free(*shared);
  *shared = NULL;
}
