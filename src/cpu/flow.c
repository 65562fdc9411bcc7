// SPDX-License-Identifier: Apache-2.0
// Flow matching: the noised sample, the loss per sample with its gradient, and one guided Euler step.
// The loss of a sample is summed in pieces of fixed length, lanes in f32 and pieces in double, in order.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

enum { PIECE = 4096 };

/* ---- flow_noise -------------------------------------------------------------------------------------------------- */

CPU_CLONES static void noised(const float *restrict x, const float *restrict noise, float sigma, void *restrict x_t, bool bf16, int64_t lo,
                              int64_t hi) {
  const float keep = 1.0f - sigma;
  if (bf16) for (int64_t i = lo; i < hi; i++) cpu_store(x_t, true, i, keep * x[i] + sigma * noise[i]);
  else for (int64_t i = lo; i < hi; i++) cpu_store(x_t, false, i, keep * x[i] + sigma * noise[i]);
}

/* Checks `t` has B leading samples of the size of `x`. */
#define SAME_NUMEL(op, slot) \
  CPU_CHECK(op, slot, fd_tensor_numel(a->slot) == fd_tensor_numel(a->x), "%lld elements as x", (long long)fd_tensor_numel(a->x))
#define PER_SAMPLE(op, slot) CPU_CHECK(op, slot, fd_tensor_numel(a->slot) == a->x->shape[0], "[%lld]", (long long)a->x->shape[0])

fd_status cpu_flow_noise_prepare(fd_ctx *ctx, const struct fd_flow_noise_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK(flow_noise, x, a->x->ndim >= 1, "[B, ..]");
  SAME_NUMEL(flow_noise, noise);
  SAME_NUMEL(flow_noise, x_t);
  PER_SAMPLE(flow_noise, sigma);
  return FD_OK;
}

fd_status cpu_flow_noise(fd_ctx *ctx, const struct fd_flow_noise_args *a) {
  const int64_t B = a->x->shape[0], total = fd_tensor_numel(a->x), n = B ? total / B : 0;
  const float *sigma = a->sigma->data;
  #pragma omp parallel num_threads(cpu_threads(ctx, total))
  {
    int64_t lo, hi;
    cpu_share(total, 64, &lo, &hi);
    while (lo < hi) {
      int64_t b = lo / n, end = (b + 1) * n < hi ? (b + 1) * n : hi;
      noised(a->x->data, a->noise->data, sigma[b], a->x_t->data, a->x_t->dtype == FD_BF16, lo, end);
      lo = end;
    }
  }
  return FD_OK;
}

/* ---- flow_loss --------------------------------------------------------------------------------------------------- */

/* pred - target of element i: out - (noise - x), or out (-sigma) + x_t - x with preconditioning. */
CPU_INLINE float difference(const void *out, bool bf16, const float *x, const float *noise, const void *x_t, bool t_bf16, float sigma,
                            int64_t i) {
  const float o = cpu_load(out, bf16, i);
  return x_t ? (o * -sigma + cpu_load(x_t, t_bf16, i)) - x[i] : o - (noise[i] - x[i]);
}

CPU_INLINE float square(float d) { return d * d; }

CPU_CLONES static double sum_of_squares(const void *out, bool bf16, const float *x, const float *noise, const void *x_t, bool t_bf16, float sigma,
                                        int64_t at, int64_t n) {
  float lane[CPU_LANES] = {0};
#define SUM(bf16, x_t, t_bf16) CPU_LANES_ADD(lane, n, square(difference(out, bf16, x, noise, x_t, t_bf16, sigma, at + i)))
  if (!x_t) {
    if (bf16) SUM(true, NULL, false);
    else SUM(false, NULL, false);
  } else if (t_bf16) {
    if (bf16) SUM(true, x_t, true);
    else SUM(false, x_t, true);
  } else {
    if (bf16) SUM(true, x_t, false);
    else SUM(false, x_t, false);
  }
#undef SUM
  return (double)cpu_lanes_sum(lane);
}

static int64_t loss_pieces(int64_t n) { return (n + PIECE - 1) / PIECE; }

#define CHECK_LOSS(op)                                                                          \
  CPU_CHECK(op, x, a->x->ndim >= 1, "[B, ..]");                                                 \
  SAME_NUMEL(op, out);                                                                          \
  SAME_NUMEL(op, noise);                                                                        \
  PER_SAMPLE(op, sigma);                                                                        \
  PER_SAMPLE(op, weight);                                                                       \
  CPU_CHECK(op, x_t, !a->precondition || a->x_t, "a tensor (precondition is set)");             \
  if (a->x_t) SAME_NUMEL(op, x_t)

fd_status cpu_flow_loss_fwd_prepare(fd_ctx *ctx, const struct fd_flow_loss_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx;
  CHECK_LOSS(flow_loss_fwd);
  PER_SAMPLE(flow_loss_fwd, loss);
  const int64_t B = a->x->shape[0], n = B ? fd_tensor_numel(a->x) / B : 0;
  CPU_CHECK(flow_loss_fwd, x, B == 0 || n > 0, "samples of at least one element");
  *scratch_bytes = sizeof(double) * (size_t)(B * loss_pieces(n));
  return FD_OK;
}

fd_status cpu_flow_loss_fwd(fd_ctx *ctx, const struct fd_flow_loss_fwd_args *a) {
  const int64_t B = a->x->shape[0], total = fd_tensor_numel(a->x), n = B ? total / B : 0, pieces = loss_pieces(n);
  const float *sigma = a->sigma->data, *weight = a->weight->data;
  const void *x_t = a->precondition ? a->x_t->data : NULL;
  double *slot = ctx->scratch;
  #pragma omp parallel num_threads(cpu_threads(ctx, total))
  {
    int64_t lo, hi;
    cpu_share(B * pieces, 1, &lo, &hi);
    for (int64_t p = lo; p < hi; p++) {
      int64_t b = p / pieces, from = p % pieces * PIECE, len = n - from < PIECE ? n - from : PIECE;
      slot[p] = sum_of_squares(a->out->data, a->out->dtype == FD_BF16, a->x->data, a->noise->data, x_t, x_t && a->x_t->dtype == FD_BF16,
                               sigma[b], b * n + from, len);
    }
  }
  for (int64_t b = 0; b < B; b++) {
    double sum = 0;
    for (int64_t p = 0; p < pieces; p++) sum += slot[b * pieces + p];
    ((float *)a->loss->data)[b] = (float)((double)weight[b] * sum / (double)n);
  }
  return FD_OK;
}

CPU_CLONES static void loss_gradient(float scale, const void *out, bool bf16, const float *x, const float *noise, const void *x_t, bool t_bf16,
                                     float sigma, void *dout, bool acc, int64_t lo, int64_t hi) {
#define LOOP(bf16, x_t)                                                                               \
  CPU_IVDEP for (int64_t i = lo; i < hi; i++) {                                            \
    float d = scale * difference(out, bf16, x, noise, x_t, t_bf16, sigma, i);                         \
    cpu_store(dout, bf16, i, acc ? cpu_load(dout, bf16, i) + d : d);                                  \
  }
  if (x_t && bf16) LOOP(true, x_t)
  else if (x_t) LOOP(false, x_t)
  else if (bf16) LOOP(true, NULL)
  else LOOP(false, NULL)
#undef LOOP
}

fd_status cpu_flow_loss_bwd_prepare(fd_ctx *ctx, const struct fd_flow_loss_bwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CHECK_LOSS(flow_loss_bwd);
  PER_SAMPLE(flow_loss_bwd, dloss);
  SAME_NUMEL(flow_loss_bwd, dout);
  return FD_OK;
}

fd_status cpu_flow_loss_bwd(fd_ctx *ctx, const struct fd_flow_loss_bwd_args *a) {
  const int64_t B = a->x->shape[0], total = fd_tensor_numel(a->x), n = B ? total / B : 0;
  const float *sigma = a->sigma->data, *weight = a->weight->data, *dloss = a->dloss->data;
  const void *x_t = a->precondition ? a->x_t->data : NULL;
  #pragma omp parallel num_threads(cpu_threads(ctx, total))
  {
    int64_t lo, hi;
    cpu_share(total, 64, &lo, &hi);
    while (lo < hi) {
      int64_t b = lo / n, end = (b + 1) * n < hi ? (b + 1) * n : hi;
      double scale = 2.0 * (double)dloss[b] * (double)weight[b] / (double)n * (a->precondition ? -(double)sigma[b] : 1.0);
      loss_gradient((float)scale, a->out->data, a->out->dtype == FD_BF16, a->x->data, a->noise->data, x_t, x_t && a->x_t->dtype == FD_BF16,
                    sigma[b], a->dout->data, a->acc >> 7 & 1, lo, end);
      lo = end;
    }
  }
  return FD_OK;
}

/* ---- cfg_euler --------------------------------------------------------------------------------------------------- */

CPU_CLONES static void euler(const void *uncond, const void *cond, bool bf16, float guidance, float dsigma, float *restrict sample, int64_t lo,
                             int64_t hi) {
#define LOOP(bf16)                                                                             \
  for (int64_t i = lo; i < hi; i++) {                                                          \
    float v = cpu_load(uncond, bf16, i);                                                       \
    if (cond) v = v + guidance * (cpu_load(cond, bf16, i) - v);                                \
    sample[i] = sample[i] + dsigma * v;                                                        \
  }
  if (bf16) LOOP(true)
  else LOOP(false)
#undef LOOP
}

fd_status cpu_cfg_euler_prepare(fd_ctx *ctx, const struct fd_cfg_euler_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  const int64_t n = fd_tensor_numel(a->sample), m = fd_tensor_numel(a->model_out);
  CPU_CHECK(cfg_euler, model_out, m == n || m == 2 * n, "%lld elements as sample, or twice as many", (long long)n);
  CPU_CHECK(cfg_euler, step, fd_tensor_numel(a->step) == 2, "[2]");
  return FD_OK;
}

fd_status cpu_cfg_euler(fd_ctx *ctx, const struct fd_cfg_euler_args *a) {
  const int64_t n = fd_tensor_numel(a->sample);
  const bool bf16 = a->model_out->dtype == FD_BF16, guided = fd_tensor_numel(a->model_out) != n;
  const float *step = a->step->data;
  const void *uncond = a->model_out->data, *cond = guided ? (const char *)uncond + (size_t)n * fd_dtype_bytes(a->model_out->dtype) : NULL;
  #pragma omp parallel num_threads(cpu_threads(ctx, n))
  {
    int64_t lo, hi;
    cpu_share(n, 64, &lo, &hi);
    euler(uncond, cond, bf16, step[0], step[1], a->sample->data, lo, hi);
  }
  return FD_OK;
}
