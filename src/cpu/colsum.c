// SPDX-License-Identifier: Apache-2.0
// colsum: rows in pieces cut by their number alone, each piece with a slot in scratch, slots added in order.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

enum { PIECE_ROWS = 256, MOST_PIECES = 32, COLS = 512 };

static int64_t pieces_of(int64_t rows) {
  int64_t n = (rows + PIECE_ROWS - 1) / PIECE_ROWS;
  return n < 1 ? 1 : n > MOST_PIECES ? MOST_PIECES : n;
}

fd_status cpu_colsum_prepare(fd_ctx *ctx, const struct fd_colsum_args *a, size_t *scratch_bytes) {
  (void)ctx;
  int64_t n = fd_tensor_numel(a->y);
  CPU_CHECK(colsum, y, n >= 1 && fd_tensor_numel(a->x) % n == 0, "a number of elements that divides x's %lld",
            (long long)fd_tensor_numel(a->x));
  int64_t pieces = pieces_of(fd_tensor_numel(a->x) / n);
  *scratch_bytes = pieces > 1 ? (size_t)(pieces * n) * 4 : 0;
  return FD_OK;
}

CPU_INLINE void add_rows_of(const void *x, bool bf16, int64_t ld, int64_t first, int64_t last, int64_t col, int64_t cols, bool add,
                            float *restrict y) {
  float sum[COLS];
  for (int64_t c = 0; c < cols; c++) sum[c] = add ? y[c] : 0.0f;
  for (int64_t r = first; r < last; r++)
    for (int64_t c = 0; c < cols; c++) sum[c] += cpu_load(x, bf16, r * ld + col + c);
  for (int64_t c = 0; c < cols; c++) y[c] = sum[c];
}

CPU_CLONES static void add_rows(const void *x, bool bf16, int64_t ld, int64_t first, int64_t last, int64_t col, int64_t cols, bool add,
                                float *y) {
  if (bf16) add_rows_of(x, true, ld, first, last, col, cols, add, y);
  else add_rows_of(x, false, ld, first, last, col, cols, add, y);
}

fd_status cpu_colsum(fd_ctx *ctx, const struct fd_colsum_args *a) {
  int64_t n = fd_tensor_numel(a->y), rows = fd_tensor_numel(a->x) / n, used;
  fd_status st = cpu_rows_used(FD_OP_colsum, a->count, rows, &used);
  if (st != FD_OK) return st;
  int64_t pieces = pieces_of(rows), blocks = (n + COLS - 1) / COLS;
  float *y = a->y->data, *slot = ctx->scratch;
  bool bf16 = a->x->dtype == FD_BF16, add = a->acc != 0;
  int threads = cpu_threads(ctx, used * n);
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < pieces * blocks; task++) {
    int64_t p = task / blocks, col = task % blocks * COLS, cols = n - col < COLS ? n - col : COLS;
    if (pieces == 1) add_rows(a->x->data, bf16, n, 0, used, col, cols, add, y + col);
    else add_rows(a->x->data, bf16, n, cpu_cut(used, pieces, p), cpu_cut(used, pieces, p + 1), col, cols, false, slot + p * n + col);
  }
  if (pieces == 1) return FD_OK;
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t col = b * COLS, cols = n - col < COLS ? n - col : COLS;
    add_rows(slot, false, n, 0, pieces, col, cols, add, y + col);
  }
  return FD_OK;
}
