// SPDX-License-Identifier: Apache-2.0
// Sums of f32 over the ranks of one node, through memory that they share: several times faster than MPI's own collectives where
// a process may not read another's memory (containers), and it moves on with a few copies per call. Used by comm.c only.
//
// All requests of a rank form one sequence of chunks, the same on every rank. A chunk has a slot of the shared memory, with a row
// per rank, and is cut into one slice per rank. Three stages, each counted per rank: everybody writes the others' slices of its chunk
// into its own row; when all have, each rank adds up its slice over the rows, in the order of the ranks, into its own row and its data;
// when all have, everybody copies the other slices out. A slot is used again when all have copied.
// So an element is summed by one rank, in one order, and all get the same bits.
#ifndef FD_COMM_NODE_SUM_H
#define FD_COMM_NODE_SUM_H

#include "comm/comm.h"

typedef struct fd_node_sum fd_node_sum;

/** For a communicator whose ranks are all on one node. Collective. FD_ERR_NOMEM: no shared memory. */
fd_status fd_node_sum_create(fd_comm *comm, fd_node_sum **out);
/** Collective. */
void fd_node_sum_destroy(fd_node_sum **s);

/** Queue data[n]; *chunks: how many there are. FD_ERR_NOMEM. */
fd_status fd_node_sum_start(fd_node_sum *s, int request, float *data, int64_t n, int *chunks);
/** Do what can be done now; open[request] is counted down by each chunk that is complete. False if nothing could be done. */
bool fd_node_sum_progress(fd_node_sum *s, int *open);
/** Whether anything is queued. */
bool fd_node_sum_busy(const fd_node_sum *s);

#endif
