// SPDX-License-Identifier: Apache-2.0
// The optimiser's ops: sum of squares, clip factor, AdamW with moving average and rounded copy in one pass.
// adamw reads p, g, m, v, ema and writes p, g, m, v, ema, copy: 42 B a parameter with a bf16 copy; memory bound, 90 % of the bandwidth expected.
// sumsq reads 4 B a parameter: 90 % (its double-precision sums need a GPU whose double rate is half the single one, as on A100 and H100).
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256, PARTS = 1024 };

template <int V> __global__ void __launch_bounds__(BLOCK) sumsq_part(const float *x, double *part, int64_t n) {
  __shared__ double slots[32];
  double sum = 0;
#pragma unroll 4
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    const fd::pack<V> v = fd::load_pack<V>(x + i);
    for (int k = 0; k < V; k++) sum = fma((double)v.f[k], (double)v.f[k], sum);
  }
  sum = fd::block_sum(sum, slots);
  if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(BLOCK) sumsq_total(const double *part, double *y, bool acc, int parts) {
  __shared__ double slots[32];
  double sum = 0;
  for (int i = threadIdx.x; i < parts; i += BLOCK) sum += part[i];
  sum = fd::block_sum(sum, slots);
  if (threadIdx.x == 0) y[0] = acc ? y[0] + sum : sum;
}

__global__ void clip_kernel(const double *sumsq, float *control, float max_norm) {
  const float scale = control[FD_CONTROL_GRAD_SCALE], norm = scale * (float)sqrt(sumsq[0]);
  const bool finite = isfinite(norm) && isfinite(control[FD_CONTROL_LOSS]);
  control[FD_CONTROL_NORM] = norm;
  control[FD_CONTROL_CLIP] = finite ? scale * (max_norm > 0 ? fminf(1.0f, max_norm / (norm + 1e-6f)) : 1.0f) : 0.0f;
  control[FD_CONTROL_SKIP] = finite ? 0.0f : 1.0f;
}

/* 1 - beta in double, rounded once */
struct rates {
  float b1, rest1, b2, rest2, eps, wd;
};

template <class C, int V>
__global__ void __launch_bounds__(BLOCK)
    adamw_kernel(float *p, float *g, float *m, float *v, float *ema, C *compute, const float *control, int64_t n, rates r, bool keep_g) {
  const bool skip = control[FD_CONTROL_SKIP] != 0.0f;
  const float decay = control[FD_CONTROL_EMA_DECAY], clip = control[FD_CONTROL_CLIP], lr = control[FD_CONTROL_LR], bias1 = control[FD_CONTROL_BIAS1],
              bias2 = control[FD_CONTROL_BIAS2];
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    if (!skip) {
      fd::pack<V> pp = fd::load_pack<V>(p + i), gg = fd::load_pack<V>(g + i), mm = fd::load_pack<V>(m + i), vv = fd::load_pack<V>(v + i);
      fd::pack<V> ee = ema ? fd::load_pack<V>(ema + i) : pp;
      for (int k = 0; k < V; k++) {
        const float grad = gg.f[k] * clip;
        mm.f[k] = r.b1 * mm.f[k] + r.rest1 * grad;
        vv.f[k] = r.b2 * vv.f[k] + r.rest2 * grad * grad;
        pp.f[k] -= lr * (mm.f[k] / bias1 / (sqrtf(vv.f[k] / bias2) + r.eps) + r.wd * pp.f[k]);
        if (decay != 1.0f) ee.f[k] = decay * ee.f[k] + (1.0f - decay) * pp.f[k];
      }
      fd::store_pack<V>(p + i, pp);
      fd::store_pack<V>(m + i, mm);
      fd::store_pack<V>(v + i, vv);
      if (ema) fd::store_pack<V>(ema + i, ee);
      if (compute) fd::store_pack<V>(compute + i, pp);
    }
    if (!keep_g) fd::store_pack<V>(g + i, fd::same<V>(0.0f));
  }
}

template <class C, int V> fd_status run(fd_ctx *ctx, const struct fd_adamw_args *a) {
  const int64_t n = fd_tensor_numel(a->p);
  const rates r = {(float)a->beta1, (float)(1.0 - a->beta1), (float)a->beta2, (float)(1.0 - a->beta2), a->eps, a->weight_decay};
  if (n == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((adamw_kernel<C, V>), fd::stride_blocks(ctx, n, V * BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (float *)a->p->data,
                           (float *)a->g->data, (float *)a->m->data, (float *)a->v->data, (float *)fd::data(a->ema), (C *)fd::data(a->compute),
                           (const float *)a->control->data, n, r, a->keep_g != 0));
}

}  // namespace

extern "C" size_t cuda_sumsq_scratch(const struct fd_sumsq_args *) { return PARTS * sizeof(double); }

extern "C" fd_status cuda_sumsq(fd_ctx *ctx, const struct fd_sumsq_args *a) {
  const int64_t n = fd_tensor_numel(a->x);
  const int64_t want = (n + 4 * BLOCK - 1) / (4 * BLOCK);
  const unsigned parts = (unsigned)(want < PARTS ? want : (int64_t)PARTS); /* not by device: the same bits everywhere */
  const bool wide = n % 4 == 0 && fd::aligned(FD_OP_sumsq, a);
  fd_status st = FD_OK;
  if (parts > 0)
    st = FD_CUDA(FD_LAUNCH(wide ? sumsq_part<4> : sumsq_part<1>, parts, BLOCK, 0, fd_cuda_stream(ctx), (const float *)a->x->data,
                           (double *)ctx->scratch, n));
  if (st != FD_OK) return st;
  return FD_CUDA(FD_LAUNCH(sumsq_total, 1, BLOCK, 0, fd_cuda_stream(ctx), (const double *)ctx->scratch, (double *)a->y->data, (a->acc >> 1 & 1) != 0,
                           (int)parts));
}

extern "C" fd_status cuda_clip(fd_ctx *ctx, const struct fd_clip_args *a) {
  return FD_CUDA(FD_LAUNCH(clip_kernel, 1, 1, 0, fd_cuda_stream(ctx), (const double *)a->sumsq->data, (float *)a->control->data, a->max_norm));
}

extern "C" fd_status cuda_adamw(fd_ctx *ctx, const struct fd_adamw_args *a) {
  const bool wide = fd_tensor_numel(a->p) % 4 == 0 && fd::aligned(FD_OP_adamw, a);
  if (a->compute && a->compute->dtype == FD_BF16) return wide ? run<fd::bf16, 4>(ctx, a) : run<fd::bf16, 1>(ctx, a);
  return wide ? run<float, 4>(ctx, a) : run<float, 1>(ctx, a);
}
