// SPDX-License-Identifier: Apache-2.0
// The HDF5 side of a checkpoint: which data set lies where. Private to io/checkpoint.c; local, called by rank 0 only.
#ifndef FD_IO_CHECKPOINT_LAYOUT_H
#define FD_IO_CHECKPOINT_LAYOUT_H

#include "io/checkpoint.h"

#define FD_LAYOUT_NAME 208
#define FD_LAYOUT_VERSION 1

/** One data set. Plain data: it travels between ranks as bytes. */
struct fd_layout_entry {
  char name[FD_LAYOUT_NAME]; /* "model/layers.0..." without the first slash */
  int ndim;
  int64_t shape[FD_CHECKPOINT_MAX_NDIM];
  int64_t numel;
  int64_t at; /* byte in the file */
  uint64_t sum;
};

/** At most so many bytes will the file have. */
int64_t fd_layout_most_bytes(const struct fd_checkpoint_meta *meta, int n, const struct fd_layout_entry *entry);
/** Make the file: attributes, then all data sets of float32 with space but without data, and checksums of 0. Sets entry[].at
 *  and *bytes, the length of the file. FD_ERR_IO. */
fd_status fd_layout_create(const char *path, const struct fd_checkpoint_meta *meta, int n, struct fd_layout_entry *entry,
                           int64_t *bytes);
/** Overwrite the checksums in place: the file keeps its length. */
fd_status fd_layout_set_sums(const char *path, int n, const struct fd_layout_entry *entry);

/** Strings of meta are in `text`, which the caller frees. */
struct fd_layout_text {
  char *config, *vae_hash, *text_encoder_hash;
  char counter[FD_CHECKPOINT_MAX_COUNTERS][64];
};
void fd_layout_text_free(struct fd_layout_text *text);
/** All data sets, sorted by name (strcmp); the caller frees *entry. */
fd_status fd_layout_read(const char *path, struct fd_checkpoint_meta *meta, struct fd_layout_text *text, int *n,
                         struct fd_layout_entry **entry);

/** The checksum of io/checkpoint.h over n elements, the first of which is number i0. */
uint64_t fd_layout_sum(const void *data, int64_t i0, int64_t n);

#endif
