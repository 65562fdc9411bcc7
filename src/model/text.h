// SPDX-License-Identifier: Apache-2.0
// Packed text: token sequences behind each other, without padding. The one place that lays them out.
//
// Rows 0 .. sum(len) - 1 are the samples' tokens in order. The count is rounded up to a tile (kernels and captured graphs see few
// different counts); the rounding tail is sequences of its own of at most L rows, so that every row below count is finite.
#ifndef FD_MODEL_TEXT_H
#define FD_MODEL_TEXT_H

#include "graph/graph.h"

struct fd_text {
  int64_t B;    /* samples, capacity */
  int64_t T;    /* packed rows, capacity: a multiple of tile, at least sum of lengths */
  int64_t L;    /* most tokens of one sample */
  int64_t tile;
  int64_t tails; /* sequences that the tail may need */
  /* owned, filled by fd_text_pack */
  int32_t *ids;    /* [T] 0 in the tail and beyond */
  int32_t *pos;    /* [T] position within its sequence */
  int32_t *ranges; /* [B + tails, 4] for attention_fwd: the samples, then the tail (perhaps of 0 rows) */
  int32_t *first;  /* [B, 2] first row and length of each sample: `text` of heads_fwd */
  int32_t count;   /* rows in use, tail included */
};

/** T is rounded up to a multiple of tile. tile >= 1. */
fd_status fd_text_create(int64_t B, int64_t T, int64_t L, int64_t tile, struct fd_text **out);
void fd_text_destroy(struct fd_text **t);

/** Lay out b <= B samples: sample i has len[i] tokens, 0 <= len[i] <= L, at ids + i * stride (ids NULL: all 0). Samples b.. are empty (0 rows).
 *  FD_ERR_DATA if they do not fit T. The same tile always: the count never depends on anything but the lengths. */
fd_status fd_text_pack(struct fd_text *t, int64_t b, const int32_t *ids, int64_t stride, const int32_t *len);

/** ranges [B, 4] of a DiT's joint attention: N image rows each, keys image then text (op/ops.h, heads_fwd). */
void fd_text_image_ranges(const struct fd_text *t, int64_t N, int32_t *ranges);

/** The graph's inputs that hold a layout; a value is 0 if not wanted. */
struct fd_text_vars {
  fd_var ids, pos, ranges, first, count;
  fd_var image_ranges; /* [B, 4] joint attention */
  /* attention of its own for the text: image tokens alone; image rows against packed text, the tail as keys that nobody
     reads (their gradient is 0); count times heads */
  fd_var self_ranges, cross_ranges, head_count;
  int heads; /* kv heads, for head_count; fd_dit sets it */
  int64_t B, T, L, N, tile, tails;
};
/** Make inputs named "<prefix>.ids", ...; N 0: no image_ranges. What no op reads costs nothing. */
void fd_text_inputs(fd_graph *g, const char *prefix, const struct fd_text *t, int64_t N, struct fd_text_vars *out);
/** Copy the layout into them. */
fd_status fd_text_set(fd_graph *g, const struct fd_text_vars *v, const struct fd_text *t);

#endif
