// SPDX-License-Identifier: Apache-2.0
// Checkpoints: one HDF5 file per step that every rank writes a part of and any number of ranks can read.
//
//   DIR/step-N.h5     /model/<name> /ema/<name> /optimizer/exp_avg/<name> /optimizer/exp_avg_sq/<name>: float32, contiguous,
//                     in their real shapes; attributes of the file: struct fd_checkpoint_meta; of each data set: its checksum
//   DIR/latest        a text file with the name of the newest whole checkpoint ("step-N.h5")
//   DIR/step-N.h5.part  one that is being written, or what is left of one
//
// Invariant: a name without .part is a whole, verified file, and `latest` changes last, so a crash at any moment leaves
// what was there before. Rank 0 alone calls the HDF5 library (layout and attributes: one status, no collective metadata);
// bytes go by pwrite and pread from every rank, to the offsets that HDF5 gave. doc/formats.md describes the file.
//
// Checksum of a data set with n elements, whose bits as little-endian uint32 are b[i] (all arithmetic modulo 2^64):
//   sum over i of f(i * 0x9E3779B97F4A7C15 + b[i]),  f(t): t ^= t >> 32; t *= 0xD6E8FEB86659FD93; t ^= t >> 32
// Any order and any cut give the same sum, so each rank sums its own part; f is one-to-one, so a change of one element is
// always found.
#ifndef FD_IO_CHECKPOINT_H
#define FD_IO_CHECKPOINT_H

#include "comm/comm.h"

#define FD_CHECKPOINT_MAX_NDIM 4
#define FD_CHECKPOINT_MAX_COUNTERS 8

/** One tensor of the model, as model/params.h lays it out. */
struct fd_checkpoint_row {
  const char *name;
  int ndim;
  int64_t shape[FD_CHECKPOINT_MAX_NDIM];
  int64_t offset;    /* of its first element in the flat space; rows do not overlap, gaps are not stored */
  bool buffer;       /* not in the flat space (pos_embed): stored in families with `buffers` only */
  const float *data; /* buffer: its value for writing; rank 0's is stored. Else unused */
};

/** A flat space's worth of data sets, of which this rank has the elements [first, first + n). */
struct fd_checkpoint_family {
  const char *path; /* "model", "ema", "optimizer/exp_avg", ... without a slash at the ends */
  bool buffers;     /* rows that are buffers belong to it too */
  int64_t first, n;
  /** Element `first` and what follows, in host memory; or NULL, then `copy` brings elements [at, at + count) of the flat
   *  space into host (writing a checkpoint) or takes them from it (reading). Called in ascending order, parts of rows only. */
  float *data;
  fd_status (*copy)(void *user, int64_t at, int64_t count, float *host);
  void *user;
};

struct fd_checkpoint_meta {
  int64_t step;         /* optimizer steps done */
  int64_t samples_seen; /* pictures trained on, over all ranks */
  int64_t parameters;   /* trained, without padding and buffers */
  uint64_t seed;
  const char *config;   /* the whole configuration as text, of any length */
  const char *vae_hash, *text_encoder_hash; /* fd_checkpoint_hash_files; "" if none */
  int n_counters;       /* further integers that go on over a resume: skipped_steps, bad_samples, ... */
  struct {
    const char *name;
    int64_t value;
  } counters[FD_CHECKPOINT_MAX_COUNTERS];
};

/** An even share of the flat space, cut at multiples of 64 elements. */
static inline void fd_checkpoint_share(int64_t numel, int rank, int size, int64_t *first, int64_t *n) {
  int64_t blocks = (numel + 63) / 64, a = blocks * rank / size * 64, b = blocks * (rank + 1) / size * 64;
  if (a > numel) a = numel;
  if (b > numel) b = numel;
  *first = a;
  *n = b - a;
}

/** Write DIR/step-<meta->step>.h5 (DIR and its parents are made) and point `latest` at it. The ranks' ranges together are
 *  the flat space, each element once, in any order. Collective; on failure the .part file is removed and everything that was
 *  there before is untouched.
 *  FD_ERR_IO names the file and, from the data on, the data set; a full disk is found before any data is written. */
fd_status fd_checkpoint_write(fd_comm *comm, const char *dir, const struct fd_checkpoint_meta *meta, int n_rows,
                              const struct fd_checkpoint_row *rows, int n_families, const struct fd_checkpoint_family *families);

/** The checkpoint that `which` names: "latest" (what DIR/latest says; without that file the highest step; *path = NULL if there is
 *  none at all), a step ("1000" or "step-1000"; not there: FD_ERR_IO lists what is), "" (*path = NULL: start anew) or a path
 *  of a file. The caller frees *path. Collective. */
fd_status fd_checkpoint_choose(fd_comm *comm, const char *dir, const char *which, char **path);
/** Steps of the whole checkpoints in DIR, ascending; the caller frees. No folder: none. Local. */
fd_status fd_checkpoint_list(const char *dir, int *n, int64_t **steps);

typedef struct fd_checkpoint fd_checkpoint;

/** Read the layout and attributes. FD_ERR_IO, FD_ERR_FORMAT: not there, not HDF5, cut off (names the first data set that is),
 *  not float32 or not contiguous, no checksum, attributes changed. Collective. */
fd_status fd_checkpoint_open(fd_comm *comm, const char *path, fd_checkpoint **out);
void fd_checkpoint_close(fd_checkpoint **c);
/** Strings live as long as the checkpoint. */
const struct fd_checkpoint_meta *fd_checkpoint_meta(const fd_checkpoint *c);
/** The value of a counter, 0 if it has none of that name. */
int64_t fd_checkpoint_counter(const fd_checkpoint *c, const char *name);
bool fd_checkpoint_has(const fd_checkpoint *c, const char *family);

/** Every row of a family is there in its shape, and nothing else: FD_ERR_FORMAT lists what is not. Rows that are buffers must be
 *  there with `buffers` and may be there without. Local, the same on all ranks. */
fd_status fd_checkpoint_match(const fd_checkpoint *c, const char *family, bool buffers, int n_rows,
                              const struct fd_checkpoint_row *rows);

/** Read this rank's range of each family (fd_checkpoint_match is called first). All ranks read everything, or their ranges together are
 *  everything, so that checksums can be compared: FD_ERR_FORMAT names file and data set. What lies between rows is not
 *  touched; buffers are checked and not returned. On failure the memory holds some of the data. Collective. */
fd_status fd_checkpoint_read(fd_checkpoint *c, int n_rows, const struct fd_checkpoint_row *rows, int n_families,
                             const struct fd_checkpoint_family *families);

/** One whole data set into host memory, checked (for sampling: no flat space needed). Local. */
fd_status fd_checkpoint_read_row(fd_checkpoint *c, const char *family, const struct fd_checkpoint_row *row, float *out);

/** A hash over the content of files, which does not depend on the number of ranks, as 16 hex digits: which VAE and text encoder a
 *  checkpoint was trained with. The ranks share the reading. Collective. */
fd_status fd_checkpoint_hash_files(fd_comm *comm, int n, const char *const *paths, char hash[17]);

#endif
