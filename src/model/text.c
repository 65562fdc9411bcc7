// SPDX-License-Identifier: Apache-2.0
// Packed text. Invariant: after fd_text_pack every row of ranges and first lies below count, and count is a multiple of tile.
#include "model/text.h"

#include <stdio.h>
#include <stdlib.h>

fd_status fd_text_create(int64_t B, int64_t T, int64_t L, int64_t tile, struct fd_text **out) {
  fd_status st = FD_OK;
  struct fd_text *t = NULL;
  if (B < 1 || T < 1 || L < 1 || tile < 1 || T > INT32_MAX - tile)
    FD_TRY(FD_FAIL(FD_ERR_ARG, "text: %lld samples, %lld rows, %lld tokens of one at most: each must be 1 or more", (long long)B, (long long)T, (long long)L));
  t = calloc(1, sizeof *t);
  if (!t) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for packed text"));
  t->B = B;
  t->T = (T + tile - 1) / tile * tile;
  t->L = L;
  t->tile = tile;
  t->tails = tile > 1 ? (tile - 1 + L - 1) / L : 1;
  t->ids = calloc((size_t)t->T, sizeof *t->ids);
  t->pos = calloc((size_t)t->T, sizeof *t->pos);
  t->ranges = calloc((size_t)(B + t->tails) * 4, sizeof *t->ranges);
  t->first = calloc((size_t)B * 2, sizeof *t->first);
  if (!t->ids || !t->pos || !t->ranges || !t->first) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for packed text of %lld rows", (long long)t->T));
  *out = t;
  t = NULL;
done:
  fd_text_destroy(&t);
  return st;
}

void fd_text_destroy(struct fd_text **text) {
  struct fd_text *t = text ? *text : NULL;
  if (!t) return;
  free(t->ids);
  free(t->pos);
  free(t->ranges);
  free(t->first);
  free(t);
  *text = NULL;
}

fd_status fd_text_pack(struct fd_text *t, int64_t b, const int32_t *ids, int64_t stride, const int32_t *len) {
  int64_t total = 0;
  if (b < 0 || b > t->B) return FD_FAIL(FD_ERR_ARG, "%lld samples of text, room for %lld", (long long)b, (long long)t->B);
  for (int64_t i = 0; i < b; i++) {
    if (len[i] < 0 || len[i] > t->L)
      return FD_FAIL(FD_ERR_DATA, "text of %d tokens, from 0 to %lld are possible (data.max_prompt_length)", len[i], (long long)t->L);
    total += len[i];
  }
  if (total > t->T) return FD_FAIL(FD_ERR_DATA, "%lld tokens in one batch, room for %lld", (long long)total, (long long)t->T);
  int32_t at = 0;
  for (int64_t i = 0; i < t->B; i++) {
    int32_t n = i < b ? len[i] : 0;
    for (int32_t k = 0; k < n; k++) {
      t->ids[at + k] = ids ? ids[i * stride + k] : 0;
      t->pos[at + k] = k;
    }
    int32_t *range = t->ranges + 4 * i, *first = t->first + 2 * i;
    range[0] = range[2] = first[0] = at;
    range[1] = range[3] = first[1] = n;
    at += n;
  }
  t->count = (int32_t)((at + t->tile - 1) / t->tile * t->tile);
  for (int64_t i = 0; i < t->tails; i++) {
    int32_t *tail = t->ranges + 4 * (t->B + i), from = at + (int32_t)(i * t->L);
    if (from > t->count) from = t->count;
    tail[0] = tail[2] = from;
    tail[1] = tail[3] = t->count - from < (int32_t)t->L ? t->count - from : (int32_t)t->L;
  }
  for (int64_t r = at; r < t->T; r++) {
    t->ids[r] = 0;
    t->pos[r] = r < t->count ? (int32_t)((r - at) % t->L) : 0;
  }
  return FD_OK;
}

void fd_text_image_ranges(const struct fd_text *t, int64_t N, int32_t *ranges) {
  for (int64_t i = 0; i < t->B; i++) {
    ranges[4 * i] = (int32_t)(i * N);
    ranges[4 * i + 1] = (int32_t)N;
    ranges[4 * i + 2] = (int32_t)(i * (N + t->L));
    ranges[4 * i + 3] = (int32_t)N + t->first[2 * i + 1];
  }
}

static fd_var input(fd_graph *g, const char *prefix, const char *what, int64_t rows, int64_t cols) {
  char name[128];
  snprintf(name, sizeof name, "%s.%s", prefix, what);
  return fd_graph_input(g, name, FD_I32, cols ? 2 : 1, (int64_t[]){rows, cols});
}

void fd_text_inputs(fd_graph *g, const char *prefix, const struct fd_text *t, int64_t N, struct fd_text_vars *out) {
  *out = (struct fd_text_vars){.B = t->B, .T = t->T, .L = t->L, .N = N, .tile = t->tile, .tails = t->tails};
  out->ids = input(g, prefix, "ids", t->T, 0);
  out->pos = input(g, prefix, "pos", t->T, 0);
  out->ranges = input(g, prefix, "ranges", t->B + t->tails, 4);
  out->first = input(g, prefix, "first", t->B, 2);
  out->count = input(g, prefix, "count", 1, 0);
  if (!N) return;
  out->image_ranges = input(g, prefix, "image_ranges", t->B, 4);
  out->self_ranges = input(g, prefix, "self_ranges", t->B, 4);
  out->cross_ranges = input(g, prefix, "cross_ranges", t->B + t->tails, 4);
  out->head_count = input(g, prefix, "head_count", 1, 0);
}

/* An input that no op reads has no memory: nothing to copy. */
static fd_status set(fd_graph *g, fd_var v, const int32_t *host, int64_t n) {
  return v && fd_graph_get(g, v)->data ? fd_graph_set(g, v, host, (size_t)n * sizeof *host) : FD_OK;
}

fd_status fd_text_set(fd_graph *g, const struct fd_text_vars *v, const struct fd_text *t) {
  fd_status st = FD_OK;
  int32_t *ranges = NULL;
  FD_TRY(set(g, v->ids, t->ids, t->T));
  FD_TRY(set(g, v->pos, t->pos, t->T));
  FD_TRY(set(g, v->ranges, t->ranges, (t->B + t->tails) * 4));
  FD_TRY(set(g, v->first, t->first, t->B * 2));
  FD_TRY(set(g, v->count, &t->count, 1));
  if (v->N) {
    const int32_t head_count = t->count * v->heads, N = (int32_t)v->N;
    ranges = calloc((size_t)(t->B + t->tails) * 4, sizeof *ranges);
    if (!ranges) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for attention ranges"));
    fd_text_image_ranges(t, v->N, ranges);
    FD_TRY(set(g, v->image_ranges, ranges, t->B * 4));
    for (int32_t i = 0; i < (int32_t)t->B; i++) memcpy(ranges + 4 * i, (int32_t[]){i * N, N, i * N, N}, 4 * sizeof *ranges);
    FD_TRY(set(g, v->self_ranges, ranges, t->B * 4));
    for (int64_t i = 0; i < t->B; i++) memcpy(ranges + 4 * i + 2, t->first + 2 * i, 2 * sizeof *ranges);
    for (int64_t i = t->B; i < t->B + t->tails; i++)
      memcpy(ranges + 4 * i, (int32_t[]){(int32_t)t->B * N, 0, t->ranges[4 * i + 2], t->ranges[4 * i + 3]}, 4 * sizeof *ranges);
    FD_TRY(set(g, v->cross_ranges, ranges, (t->B + t->tails) * 4));
    FD_TRY(set(g, v->head_count, &head_count, 1));
  }
done:
  free(ranges);
  return st;
}
