// SPDX-License-Identifier: Apache-2.0
// The HDF5 file behind a data set: an index of tars, or a pack with the bytes inside. Layout (doc/formats.md):
//
//   /                     attributes: format "fdhpc data set", version, kind "index" or "pack", image_column, caption_columns,
//                         source (hash of the list of paths), fingerprint, lost_<kind>
//   /shard/path           [S] text, as given; a pack has one row: itself
//   /shard/bytes, mtime_ns, state   [S] i64
//   /image/{shard,offset,size}           [n] i32, i64, i64
//   /caption/<column>/{shard,offset,size}    size -1: this sample has none
//   /key/offset [n + 1] i64, /key/text u8    key of sample i is text[offset[i] .. offset[i + 1]]
//   /data                 (pack) u8: the members' bytes, and holes where a sample was left out
//
// All are contiguous: ranks write their rows with pwrite, readers map them. Internal to io.
#ifndef FD_IO_DATASET_FILE_H
#define FD_IO_DATASET_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/dataset.h"

enum { FD_DATASET_VERSION = 1 };

struct fd_place {
  int64_t offset, bytes;
  int32_t shard;
};

/** A list of samples that grows: rows and the text of their keys. Starts as {0}. */
struct fd_rows {
  struct fd_row {
    struct fd_place image, caption[2];
    int64_t key; /* in `text` */
    int32_t key_bytes;
  } *at;
  int64_t n, capacity;
  char *text;
  int64_t text_bytes, text_capacity;
};
fd_status fd_rows_add(struct fd_rows *rows, const struct fd_row *row, const char *key);
void fd_rows_free(struct fd_rows *rows);

struct fd_shard_info {
  char *path; /* owned by whoever made the list */
  int64_t bytes, mtime_ns;
  int64_t state;
};

/** What a file is to hold, but for the samples. The same on all ranks. */
struct fd_dataset_about {
  bool pack;
  const char *image_column, *caption_columns[2]; /* "" if absent */
  uint64_t source;
  int64_t lost[FD_BAD_COUNT];
  int64_t n_shards;
  const struct fd_shard_info *shards; /* read on rank 0 only */
};

/** Write tables of all ranks' rows, rank after rank, into `path`. pack_data: the file is there already, with its /data; else it is
 *  created. Collective; agreed. FD_ERR_IO. */
fd_status fd_dataset_file_write(fd_comm *comm, const char *path, bool pack_data, const struct fd_dataset_about *about, const struct fd_rows *rows);

/** Create a pack's file with /data of `bytes`, room reserved; *offset: where its bytes begin. Local. */
fd_status fd_dataset_file_create_data(const char *path, int64_t bytes, int64_t *offset);

/** Whether `path` is an index of exactly these tars, unchanged, for these columns. *why (static text) says what differs. Local. */
bool fd_dataset_file_fits(const char *path, const struct fd_dataset_about *about, const char **why);

/* HDF5 puts small tables anywhere: a mapped one need not be aligned. */
typedef int64_t fd_mapped_i64 __attribute__((aligned(1)));
typedef int32_t fd_mapped_i32 __attribute__((aligned(1)));

/** The tables of one file, mapped. */
struct fd_dataset_map {
  bool pack;
  int64_t n, n_shards;
  struct fd_place_columns {
    const fd_mapped_i32 *shard; /* NULL: the file has no such column */
    const fd_mapped_i64 *offset, *bytes;
  } image, caption[2];
  const fd_mapped_i64 *key_offset;
  const char *key_text;
  int64_t key_text_bytes;
  struct fd_shard_info *shards; /* owned, paths too */
  char *image_column; /* owned */
  uint64_t fingerprint;
  int64_t lost[FD_BAD_COUNT];
  struct {
    void *at;
    size_t bytes;
  } maps[12];
  int n_maps;
};
/** Map the columns asked for. FD_ERR_IO, FD_ERR_FORMAT with what is wrong; FD_ERR_CONFIG if a column is not there. Local. */
fd_status fd_dataset_map_open(const char *path, const char *image_column, const char *const caption_columns[2], struct fd_dataset_map *map);
void fd_dataset_map_close(struct fd_dataset_map *map);

/** Mixes for hashes: 64 bits in, 64 out. */
uint64_t fd_hash_bytes(uint64_t seed, const void *data, size_t bytes);

#endif
