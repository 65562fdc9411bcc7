// SPDX-License-Identifier: Apache-2.0
// Captioned pictures: an index of webdataset tars, or a packed HDF5 file. Both are the same tables (doc/formats.md).
//
// Invariants: sample i is found in O(1) and read with one pread per member; HDF5 is touched only on opening; the tables are
// mapped, so the ranks of a node share them. Samples are consecutive members of one key over the list of tars in order,
// so one may span two tars and keys are not unique. Samples without a picture or a caption are counted, not indexed.
#ifndef FD_IO_DATASET_H
#define FD_IO_DATASET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "comm/comm.h"

/** What can be wrong with a sample. */
enum fd_bad {
  FD_BAD_NONE = 0,
  FD_BAD_NO_IMAGE,      /* no member with the picture's extension (found on indexing) */
  FD_BAD_NO_CAPTION,    /* no member with the caption's extension (found on indexing) */
  FD_BAD_READ,          /* its bytes cannot be read */
  FD_BAD_IMAGE_UNKNOWN, /* neither JPEG nor PNG nor WebP */
  FD_BAD_IMAGE_DAMAGED,
  FD_BAD_IMAGE_LARGE,
  FD_BAD_CAPTION_UTF8, /* the caption is not UTF-8 */
  FD_BAD_COUNT
};
const char *fd_bad_text(enum fd_bad kind);

/** What became of a tar. The last two lose the tar, or stop the run if `strict`. */
enum fd_shard_state {
  FD_SHARD_WHOLE = 0,
  FD_SHARD_CUT,        /* ends within a member: those before it count */
  FD_SHARD_DAMAGED,    /* a header is wrong: members before it count */
  FD_SHARD_MISSING,
  FD_SHARD_EMPTY,      /* zero bytes */
  FD_SHARD_NOT_TAR,
  FD_SHARD_COMPRESSED, /* gzip, bzip2, xz, zstd: cannot be read at an offset */
  FD_SHARD_SPARSE,     /* has sparse members */
  FD_SHARD_STATES
};
const char *fd_shard_text(enum fd_shard_state state);

struct fd_dataset_config {
  const char *const *paths; /* data.data_path: tars with {000..999} or {a,b}, "::" joins; or packs (*.h5) */
  int n_paths;
  const char *image_column;       /* extension of the picture: "jpg" */
  const char *caption_columns[2]; /* extensions: [0] synthetic, [1] original; "" or NULL: not wanted. At least one. */
  const char *index_path;         /* where the index of tars is kept; NULL or "": index_dir, or beside the first tar */
  const char *index_dir;          /* folder for it if the first tar's is not writable; NULL: none */
  bool strict;                    /* compressed and sparse tars are errors, not counted losses */
  bool verbose;                   /* log what was found */
};

typedef struct fd_dataset fd_dataset;

/** Collective: all ranks index some of the tars; an index that is there and fits is used again, one whose tars changed
 *  (size or time) is made anew. A pack needs no more than reading its tables. FD_ERR_CONFIG: http:, s3:, pipe: or a bad
 *  pattern; FD_ERR_DATA: no sample at all, with what was found instead; FD_ERR_UNSUPPORTED: compressed or sparse; FD_ERR_IO. */
fd_status fd_dataset_open(fd_comm *comm, const struct fd_dataset_config *config, fd_dataset **out);
void fd_dataset_destroy(fd_dataset **d);

int64_t fd_dataset_samples(const fd_dataset *d);
/** A number that is the same for the same samples in the same order: for checkpoints to notice other data. */
uint64_t fd_dataset_fingerprint(const fd_dataset *d);
/** Samples found but lost on indexing, by kind; tars by state. */
int64_t fd_dataset_lost(const fd_dataset *d, enum fd_bad kind);
int64_t fd_dataset_shards(const fd_dataset *d, enum fd_shard_state state);
/** Every tar or pack, in order. */
int64_t fd_dataset_n_shards(const fd_dataset *d);
const char *fd_dataset_shard_path(const fd_dataset *d, int64_t shard, enum fd_shard_state *state);
/** Whether a caption column is there (samples of `original` may lack it one by one). */
bool fd_dataset_has_caption(const fd_dataset *d, int column);
/** Extension of caption column 0 or 1 as configured, "" if not wanted; column -1: of the picture. */
const char *fd_dataset_column(const fd_dataset *d, int column);

/** Where a sample lies, for messages and packs. `key` is not terminated. bytes < 0: this sample lacks that member. */
struct fd_member {
  int64_t shard, offset, bytes;
};
struct fd_sample_info {
  const char *key;
  int key_bytes;
  struct fd_member image, caption[2];
};
void fd_dataset_info(const fd_dataset *d, int64_t i, struct fd_sample_info *info);

/** Bytes of one sample; starts as {0}, grows, is used again. One per thread. */
struct fd_sample {
  uint8_t *image; /* owned */
  size_t image_bytes, image_capacity;
  char *caption[2]; /* owned; NULL bytes allowed within */
  int64_t caption_bytes[2]; /* -1: this sample has none */
  size_t caption_capacity[2];
};
void fd_sample_free(struct fd_sample *s);

/** Read sample i; any thread. `columns`: bit c = caption column c is wanted. FD_BAD_NONE or FD_BAD_READ (fd_status_message says why). */
enum fd_bad fd_dataset_read(fd_dataset *d, int64_t i, unsigned columns, struct fd_sample *s);

/** Write a pack: the samples of `d` that decode, with their bytes, into `path` (by way of path.part). Collective: ranks copy in
 *  parallel. counts [FD_BAD_COUNT]: samples skipped by kind, all ranks; counts[FD_BAD_NONE]: written. progress: log lines. */
fd_status fd_dataset_pack(fd_comm *comm, fd_dataset *d, const char *path, bool progress, int64_t counts[FD_BAD_COUNT]);

/* ---- patterns ---------------------------------------------------------------------------------------------------- */

/** Expand "a_{000..999}.tar::b_{x,y}.tar" over all paths, in order. *list and its strings are one allocation: free(*list).
 *  FD_ERR_CONFIG for http:, https:, s3:, gs:, pipe: and unbalanced braces, FD_ERR_NOMEM. */
fd_status fd_paths_expand(const char *const *paths, int n_paths, char ***list, int64_t *n);

#endif
