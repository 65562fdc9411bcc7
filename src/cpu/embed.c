// SPDX-License-Identifier: Apache-2.0
// Rows of a table by number, and their gradient: threads share the columns, so that rows are added in order.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

CPU_CLONES static void copy_row(const void *table, bool t_bf16, void *y, bool y_bf16, float scale, int64_t from, int64_t to, int64_t D) {
#define LOOP(t_bf16, y_bf16) \
  for (int64_t i = 0; i < D; i++) cpu_store(y, y_bf16, to + i, cpu_load(table, t_bf16, from + i) * scale)
  if (t_bf16 && y_bf16) LOOP(true, true);
  else if (t_bf16) LOOP(true, false);
  else if (y_bf16) LOOP(false, true);
  else LOOP(false, false);
#undef LOOP
}

fd_status cpu_embed_fwd_prepare(fd_ctx *ctx, const struct fd_embed_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  int64_t R = fd_tensor_numel(a->ids), D = fd_tensor_cols(a->table);
  CPU_CHECK(embed_fwd, table, a->table->ndim == 2, "[V, D]");
  CPU_CHECK(embed_fwd, y, fd_tensor_rows(a->y) == R && fd_tensor_cols(a->y) == D, "[%lld, %lld]", (long long)R, (long long)D);
  return FD_OK;
}

static fd_status check_ids(enum fd_op op, const int32_t *ids, int64_t n, int64_t V) {
  for (int64_t r = 0; r < n; r++)
    if (ids[r] < 0 || ids[r] >= V) return fd_op_wrong_arg(op, "ids[%lld] = %d, the table has %lld rows", (long long)r, (int)ids[r], (long long)V);
  return FD_OK;
}

fd_status cpu_embed_fwd(fd_ctx *ctx, const struct fd_embed_fwd_args *a) {
  const int64_t D = fd_tensor_cols(a->table);
  const int32_t *ids = a->ids->data;
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_embed_fwd, a->count, fd_tensor_numel(a->ids), &used);
  if (st == FD_OK) st = check_ids(FD_OP_embed_fwd, ids, used, a->table->shape[0]);
  if (st != FD_OK) return st;
  #pragma omp parallel num_threads(cpu_threads(ctx, used * D))
  {
    int64_t lo, hi;
    cpu_share(used, 1, &lo, &hi);
    for (int64_t r = lo; r < hi; r++)
      copy_row(a->table->data, a->table->dtype == FD_BF16, a->y->data, a->y->dtype == FD_BF16, a->scale, ids[r] * D, r * D, D);
  }
  return FD_OK;
}

CPU_CLONES static void add_row(const void *dy, bool bf16, float *dtable, float scale, int64_t from, int64_t to, int64_t n) {
  if (bf16) for (int64_t i = 0; i < n; i++) dtable[to + i] += scale * cpu_load(dy, true, from + i);
  else for (int64_t i = 0; i < n; i++) dtable[to + i] += scale * cpu_load(dy, false, from + i);
}

fd_status cpu_embed_bwd_prepare(fd_ctx *ctx, const struct fd_embed_bwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  int64_t R = fd_tensor_numel(a->ids), D = fd_tensor_cols(a->dtable);
  CPU_CHECK(embed_bwd, dtable, a->dtable->ndim == 2, "[V, D]");
  CPU_CHECK(embed_bwd, dy, fd_tensor_rows(a->dy) == R && fd_tensor_cols(a->dy) == D, "[%lld, %lld]", (long long)R, (long long)D);
  return FD_OK;
}

fd_status cpu_embed_bwd(fd_ctx *ctx, const struct fd_embed_bwd_args *a) {
  const int64_t V = a->dtable->shape[0], D = fd_tensor_cols(a->dtable);
  const int32_t *ids = a->ids->data;
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_embed_bwd, a->count, fd_tensor_numel(a->ids), &used);
  if (st == FD_OK) st = check_ids(FD_OP_embed_bwd, ids, used, V);
  if (st != FD_OK) return st;
  #pragma omp parallel num_threads(cpu_threads(ctx, used * D + (a->acc ? 0 : V * D)))
  {
    int64_t lo, hi;
    cpu_share(D, 16, &lo, &hi);
    if (!(a->acc >> 3 & 1))
      for (int64_t v = 0; v < V; v++) memset((float *)a->dtable->data + v * D + lo, 0, sizeof(float) * (size_t)(hi - lo));
    for (int64_t r = 0; r < used; r++)
      if (ids[r] != a->padding_idx)
        add_row(a->dy->data, a->dy->dtype == FD_BF16, a->dtable->data, a->scale, r * D + lo, ids[r] * D + lo, hi - lo);
  }
  return FD_OK;
}
