// SPDX-License-Identifier: Apache-2.0
// Building the index of tars on all ranks. Internal to io.
#ifndef FD_IO_DATASET_INDEX_H
#define FD_IO_DATASET_INDEX_H

#include "io/dataset_file.h"

/** Size and time of every tar (bytes -1: not there), each rank asking for some. Collective. */
fd_status fd_shards_stat(fd_comm *comm, struct fd_shard_info *shards, int64_t n);

/** Walk over the tars: this rank's samples into *rows (rank after rank they are in the order of the list), all tars' states into
 *  `shards`, lost samples of all ranks into about->lost. Collective; agreed. */
fd_status fd_dataset_index_build(fd_comm *comm, struct fd_dataset_about *about, struct fd_shard_info *shards, bool strict, bool verbose,
                                 struct fd_rows *rows);

#endif
