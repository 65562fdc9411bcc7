// SPDX-License-Identifier: Apache-2.0
// Rows of a table by id, and the table's gradient. Forward reads a row of the table and writes a row: memory bound, 80 % of the bandwidth expected.
// Backward: a thread owns a column and adds the rows in order, so that the sums' order is fixed: bound by latency (about 1 us a row). Production runs
// never call it, since the text encoder is frozen.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 128 };

template <class T, int V>
__global__ void embed_forward(const int *ids, const void *table, int table_bf16, T *y, const int *count, int64_t rows, int64_t D, float scale) {
  const int64_t row = blockIdx.x;
  if (row >= fd::rows_in_use(count, rows)) return;
  const int64_t from = (int64_t)ids[row] * D;
  for (int64_t d = V * threadIdx.x; d < D; d += V * BLOCK) {
    fd::pack<V> v = fd::load_pack_any<V>(table, table_bf16, from + d);
    for (int k = 0; k < V; k++) v.f[k] *= scale;
    fd::store_pack<V>(y + row * D + d, v);
  }
}

template <class T>
__global__ void embed_backward(const T *dy, const int *ids, float *dtable, const int *count, int64_t rows, int64_t D, float scale, int64_t padding) {
  const int64_t d = (int64_t)blockIdx.x * BLOCK + threadIdx.x, n = fd::rows_in_use(count, rows);
  if (d >= D) return;
  for (int64_t row = 0; row < n; row++)
    if (ids[row] != padding) dtable[(int64_t)ids[row] * D + d] += scale * fd::load(dy + row * D + d);
}

__global__ void embed_clear(float *dtable, int64_t n) {
  for (int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (int64_t)BLOCK * gridDim.x) dtable[i] = 0.0f;
}

template <class T, int V> fd_status forward(fd_ctx *ctx, const struct fd_embed_fwd_args *a) {
  const int64_t rows = fd_tensor_numel(a->ids), D = fd_tensor_cols(a->y);
  if (rows * D == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((embed_forward<T, V>), (unsigned)rows, BLOCK, 0, fd_cuda_stream(ctx), (const int *)a->ids->data, a->table->data,
                           fd::is_bf16(a->table), (T *)a->y->data, fd::count_of(a->count), rows, D, a->scale));
}

}  // namespace

extern "C" fd_status cuda_embed_fwd(fd_ctx *ctx, const struct fd_embed_fwd_args *a) {
  return FD_BY_TYPE(FD_OP_embed_fwd, a, a->y, fd_tensor_cols(a->y), forward, ctx, a);
}

extern "C" fd_status cuda_embed_bwd(fd_ctx *ctx, const struct fd_embed_bwd_args *a) {
  const int64_t rows = fd_tensor_numel(a->ids), D = fd_tensor_cols(a->dtable), n = fd_tensor_numel(a->dtable);
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (n == 0) return FD_OK;
  if (!(a->acc >> 3 & 1)) st = FD_CUDA(FD_LAUNCH(embed_clear, fd::stride_blocks(ctx, n, BLOCK), BLOCK, 0, stream, (float *)a->dtable->data, n));
  if (st != FD_OK || rows == 0) return st;
  if (a->dy->dtype == FD_BF16)
    return FD_CUDA(FD_LAUNCH(embed_backward<fd::bf16>, fd::blocks(D, BLOCK), BLOCK, 0, stream, (const fd::bf16 *)a->dy->data,
                             (const int *)a->ids->data, (float *)a->dtable->data, fd::count_of(a->count), rows, D, a->scale, a->padding_idx));
  return FD_CUDA(FD_LAUNCH(embed_backward<float>, fd::blocks(D, BLOCK), BLOCK, 0, stream, (const float *)a->dy->data, (const int *)a->ids->data,
                           (float *)a->dtable->data, fd::count_of(a->count), rows, D, a->scale, a->padding_idx));
}
