// SPDX-License-Identifier: Apache-2.0
// Ranks and what they say to each other: MPI behind a small interface that needs no mpi.h.
//
// Invariants: every message is cut into pieces below 2 GiB and 2^30 elements (counts of MPI are ints). Sums are formed
// in an order that depends on the number of ranks and elements only, and every rank gets the same bits.
// All functions are called from one thread, except fd_comm_abort and fd_comm_is_waiting. Floor 2: it knows types, not tensors,
// so io may use it.
#ifndef FD_COMM_COMM_H
#define FD_COMM_COMM_H

#include <stdbool.h>

#include "base/dtype.h"
#include "base/status.h"

typedef struct fd_comm fd_comm;

struct fd_comm {
  int rank, size;           /* in this communicator */
  int node_rank, node_size; /* among the ranks that share this node's memory */
  int node, n_nodes;        /* number of this node, in order of its lowest rank */
  char host[64];
  struct fd_comm_impl *impl;
};

/** All ranks of the program. The first call starts MPI (a program started without mpirun is one rank); the destroy of that
 *  communicator ends MPI, so it goes last. Collective. FD_ERR_COMM. */
fd_status fd_comm_create(fd_comm **out);
/** Ranks with the same `color` (>= 0) form a communicator, in the order of their ranks; color < 0: *out = NULL. Collective. */
fd_status fd_comm_split(fd_comm *comm, int color, fd_comm **out);
void fd_comm_destroy(fd_comm **comm);

/** In all that follows comm may be NULL: one rank. */
static inline int fd_comm_rank(const fd_comm *comm) { return comm ? comm->rank : 0; }
static inline int fd_comm_size(const fd_comm *comm) { return comm ? comm->size : 1; }

/** End the whole job at once with this exit code. Any thread. Does not return. */
void fd_comm_abort(fd_comm *comm, int exit_code) __attribute__((noreturn));

/** Every rank gets the status and message of the lowest rank that failed (with "rank R on HOST: " before it unless R is 0),
 *  or FD_OK if none did. The end of collective set-up and I/O; never inside a step. Collective. */
fd_status fd_agree(fd_comm *comm, fd_status st);

/* ---- small, blocking; all collective ----------------------------------------------------------------------------- */

enum fd_comm_op { FD_COMM_SUM = 0, FD_COMM_MIN, FD_COMM_MAX };

fd_status fd_comm_barrier(fd_comm *comm);
fd_status fd_comm_node_barrier(fd_comm *comm);
/** `bytes` from rank `root` to all; every rank gives the same `bytes`. */
fd_status fd_comm_bcast(fd_comm *comm, void *data, size_t bytes, int root);
/** A string: root gives *text; the others get their own copy, which they free. NULL travels as NULL. */
fd_status fd_comm_bcast_text(fd_comm *comm, char **text, int root);
/** all[r * bytes ..] = rank r's `mine`. all: size * bytes, may not overlap mine. */
fd_status fd_comm_allgather(fd_comm *comm, const void *mine, size_t bytes, void *all);
/** As above with different lengths: *all (calloc'd, the caller frees) holds the ranks' bytes one behind the other,
 *  (*first)[r] .. (*first)[r + 1] are those of rank r. */
fd_status fd_comm_allgatherv(fd_comm *comm, const void *mine, size_t bytes, void **all, size_t **first);
fd_status fd_comm_allreduce_f64(fd_comm *comm, double *values, int64_t n, enum fd_comm_op op);
fd_status fd_comm_allreduce_i64(fd_comm *comm, int64_t *values, int64_t n, enum fd_comm_op op);
fd_status fd_comm_allreduce_u64(fd_comm *comm, uint64_t *values, int64_t n, enum fd_comm_op op); /* SUM is mod 2^64 */

/* ---- sums of gradients, beside the computation -------------------------------------------------------------------- */

enum fd_comm_kind { FD_COMM_ALL_REDUCE = 0, FD_COMM_REDUCE_SCATTER, FD_COMM_ALL_GATHER };

/** Begin, in place: the sum over ranks of data[i]; of rank r's part of data only (the others are undefined then); or every rank's part
 *  for all. Rank r's part are elements [r n / size, (r + 1) n / size); n is a multiple of size for the last two, else FD_ERR_ARG. f32, f64 or bf16
 *  (each sum of two is rounded). `request` (0..) names the pair until fd_comm_reduce_wait; it must be free. Nobody touches data until then.
 *  Collective: every rank calls the same requests in the same order. */
fd_status fd_comm_collective_start(fd_comm *comm, enum fd_comm_kind kind, int request, void *data, int64_t n, fd_dtype dtype);
static inline fd_status fd_comm_reduce_start(fd_comm *comm, int request, void *data, int64_t n, fd_dtype dtype) {
  return fd_comm_collective_start(comm, FD_COMM_ALL_REDUCE, request, data, n, dtype);
}
/** Return when `request` is done. A request that was not started is FD_ERR_ARG. With one rank both do nothing. */
fd_status fd_comm_reduce_wait(fd_comm *comm, int request);
/** Push outstanding messages on (OpenMPI moves nothing outside its calls). Cheap when none is outstanding. */
fd_status fd_comm_progress(fd_comm *comm);

/** Seconds that fd_comm_reduce_wait has waited since the last call of this: what was not hidden behind computation. Local. */
double fd_comm_take_wait_s(fd_comm *comm);
/** Whether this rank is waiting for others just now, within any function of this file. Any thread. */
bool fd_comm_is_waiting(const fd_comm *comm);
/** For a backend with messages of its own (NCCL): that it waits, or no longer; and seconds that it has waited for a sum. Local. */
void fd_comm_set_waiting(fd_comm *comm, bool waiting);
void fd_comm_add_wait_s(fd_comm *comm, double seconds);
/** Largest message in bytes, for tests of the cutting: sums of f32 then go through MPI on one node too. Default and most: 1 GiB. The same on all ranks, none outstanding. */
void fd_comm_set_piece_bytes(fd_comm *comm, size_t bytes);

/* ---- memory that the ranks of a node share ------------------------------------------------------------------------- */

typedef struct fd_shared {
  void *data; /* the same bytes for all ranks of the node, zeroed; 64-byte aligned */
  size_t bytes;
  struct fd_shared_impl *impl;
} fd_shared;

/** One piece of memory per node ("ranks of a node read weights once and share"): node_rank 0 fills it, then
 *  fd_comm_node_barrier. The same bytes on all ranks. Collective. FD_ERR_NOMEM names the bytes. */
fd_status fd_shared_create(fd_comm *comm, size_t bytes, fd_shared **out);
/** Collective, before the communicator goes. */
void fd_shared_destroy(fd_shared **shared);

#endif
