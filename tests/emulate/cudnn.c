// SPDX-License-Identifier: Apache-2.0
// The emulated twin of cuda/cudnn_attention.c and cudnn_conv.c, on copies: attention by the CPU backend, convolutions by plain loops. It is
// strict where cuDNN is only undefined: rows between sequences must be finite, and NaN is written to those of dk and dv.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "cpu/cpu.h"
#include "cuda/library.h"

/* Memory of one call, on the host. */
struct host {
  void *block[24];
  int n;
};

static void *host_new(struct host *h, size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
  if (!p) abort(); /* a test */
  return h->block[h->n++] = p;
}

static void *host_copy(struct host *h, const void *device, size_t bytes) {
  void *p = host_new(h, bytes);
  if (cudaMemcpy(p, device, bytes, cudaMemcpyDeviceToHost) != cudaSuccess) abort();
  return p;
}

static void host_free(struct host *h) {
  while (h->n > 0) free(h->block[--h->n]);
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

fd_status fd_cuda_sdpa_prepare(fd_ctx *ctx, const struct fd_cuda_sdpa *a, int *found, size_t *scratch_bytes) {
  (void)ctx;
  *found = a->E % 8 == 0 && a->E <= 256;
  *scratch_bytes = 0;
  return FD_OK;
}

/* [B, A, N] <-> [B N, A] */
static void turn(const struct fd_cuda_sdpa *a, float *by_head, float *by_row, bool back) {
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t h = 0; h < a->A; h++)
      for (int64_t i = 0; i < a->N; i++) {
        float *x = by_head + (b * a->A + h) * a->N + i, *y = by_row + (b * a->N + i) * a->A + h;
        if (back)
          *x = *y;
        else
          *y = *x;
      }
}

static bool gaps_are_finite(const struct fd_cuda_sdpa *a, const fd_bf16 *x, const int *m) {
  const int64_t row = (int64_t)a->K * a->E;
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t i = (b * a->M + m[b]) * row; i < (b + 1) * a->M * row; i++)
      if (!isfinite(fd_bf16_to_f32(x[i]))) return false;
  return true;
}

static void spoil_gaps(const struct fd_cuda_sdpa *a, fd_bf16 *x, const int *m) {
  const int64_t row = (int64_t)a->K * a->E;
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t i = (b * a->M + m[b]) * row; i < (b + 1) * a->M * row; i++) x[i] = fd_f32_to_bf16(NAN);
}

static fd_status status; /* of the last call; its message is the thread's */

static int run_sdpa(void *data) {
  fd_status st = FD_OK;
  const struct fd_cuda_sdpa *a = data;
  struct host h = {.n = 0};
  fd_ctx *cpu = NULL;
  const int64_t Tq = a->B * a->N, Tk = a->B * a->M;
  const size_t q_bytes = (size_t)(Tq * a->A * a->E) * 2, k_bytes = (size_t)(Tk * a->K * a->E) * 2, lse_bytes = (size_t)(Tq * a->A) * sizeof(float);
  size_t bytes = 0;
  int *n = host_copy(&h, a->n, (size_t)a->B * sizeof(int)), *m = host_copy(&h, a->m, (size_t)a->B * sizeof(int));
  int32_t *rows = host_new(&h, (size_t)a->B * 4 * sizeof(int32_t));
  for (int64_t b = 0; b < a->B; b++) {
    if (n[b] < (a->backward ? a->N : 1) || n[b] > a->N || m[b] < 1 || m[b] > a->M) FD_TRY(FD_FAIL(FD_ERR_ARG, "sequence %lld: lengths %d, %d", (long long)b, n[b], m[b]));
    rows[4 * b] = (int32_t)(b * a->N), rows[4 * b + 1] = n[b], rows[4 * b + 2] = (int32_t)(b * a->M), rows[4 * b + 3] = m[b];
  }
  fd_tensor q = {host_copy(&h, a->q, q_bytes), {Tq, a->A, a->E}, 3, FD_BF16, 0}, k = {host_copy(&h, a->k, k_bytes), {Tk, a->K, a->E}, 3, FD_BF16, 0};
  fd_tensor v = k, o = q, d_o = q, dq = q, dk = k, dv = k;
  fd_tensor lse = {host_new(&h, lse_bytes), {Tq, a->A}, 2, FD_F32, 0}, ranges = {rows, {a->B, 4}, 2, FD_I32, 0};
  float *by_head = host_new(&h, lse_bytes);
  v.data = host_copy(&h, a->v, k_bytes);
  if (!gaps_are_finite(a, k.data, m) || !gaps_are_finite(a, v.data, m))
    FD_TRY(FD_FAIL(FD_ERR_ARG, "attention: a row of k or v between two sequences is not finite"));
  FD_TRY(fd_ctx_create(&fd_cpu_backend, 1, NULL, &cpu));
#define SAME .ranges = &ranges, .A = a->A, .K = a->K, .E = a->E,   .scale = a->scale, .causal = a->causal, .max_q = a->N, .max_k = a->M
  if (!a->backward) {
    o.data = host_new(&h, q_bytes);
    struct fd_attention_fwd_args args = {.q = &q, .k = &k, .v = &v, .o = &o, .lse = &lse, SAME};
    FD_TRY(fd_cpu_backend.prepare(cpu, FD_OP_attention_fwd, &args, &bytes));
    cpu->scratch = host_new(&h, bytes), cpu->scratch_bytes = bytes;
    FD_TRY(fd_op_run(cpu, FD_OP_attention_fwd, &args));
    turn(a, by_head, lse.data, true);
    FD_TRY(FD_CUDA(cudaMemcpy(a->o, o.data, q_bytes, cudaMemcpyHostToDevice)));
    FD_TRY(FD_CUDA(cudaMemcpy(a->lse, by_head, lse_bytes, cudaMemcpyHostToDevice)));
  } else {
    o.data = host_copy(&h, a->o, q_bytes), d_o.data = host_copy(&h, a->d_o, q_bytes);
    dq.data = host_new(&h, q_bytes), dk.data = host_new(&h, k_bytes), dv.data = host_new(&h, k_bytes);
    FD_TRY(FD_CUDA(cudaMemcpy(by_head, a->lse, lse_bytes, cudaMemcpyDeviceToHost)));
    turn(a, by_head, lse.data, false);
    struct fd_attention_bwd_args args = {.d_o = &d_o, .q = &q, .k = &k, .v = &v, .o = &o, .lse = &lse, .dq = &dq, .dk = &dk, .dv = &dv, SAME};
    FD_TRY(fd_cpu_backend.prepare(cpu, FD_OP_attention_bwd, &args, &bytes));
    cpu->scratch = host_new(&h, bytes), cpu->scratch_bytes = bytes;
    FD_TRY(fd_op_run(cpu, FD_OP_attention_bwd, &args));
    spoil_gaps(a, dk.data, m), spoil_gaps(a, dv.data, m);
    FD_TRY(FD_CUDA(cudaMemcpy(a->dq, dq.data, q_bytes, cudaMemcpyHostToDevice)));
    FD_TRY(FD_CUDA(cudaMemcpy(a->dk, dk.data, k_bytes, cudaMemcpyHostToDevice)));
    FD_TRY(FD_CUDA(cudaMemcpy(a->dv, dv.data, k_bytes, cudaMemcpyHostToDevice)));
  }
done:
  if (cpu) fd_ctx_destroy(&cpu);
  host_free(&h);
  status = st;
  return st != FD_OK;
}

fd_status fd_cuda_sdpa(fd_ctx *ctx, const struct fd_cuda_sdpa *a, void *scratch) {
  (void)ctx, (void)scratch;
  return fd_emu_host(run_sdpa, a, sizeof *a) == cudaSuccess ? FD_OK : status;
}

/* ---- convolution ------------------------------------------------------------------------------------------------- */

fd_status fd_cuda_conv_prepare(fd_ctx *ctx, const struct fd_cuda_conv *c, int *found, size_t *scratch_bytes) {
  (void)ctx;
  *found = c->I % 8 == 0; /* so that the way without a library runs in the tests too */
  *scratch_bytes = 0;
  return FD_OK;
}

static int run_conv(void *data) {
  fd_status st = FD_OK;
  const struct fd_cuda_conv *c = data;
  struct host h = {.n = 0};
  const int64_t nx = c->B * c->H * c->W * c->I, ny = c->B * c->Ho * c->Wo * c->O, nw = c->O * c->kh * c->kw * c->I;
  const size_t w_bytes = (size_t)nw * (c->op == FD_CUDA_CONV_WEIGHTS ? 4 : 2);
  fd_bf16 *x = c->op == FD_CUDA_CONV_DATA ? host_new(&h, (size_t)nx * 2) : host_copy(&h, c->x, (size_t)nx * 2);
  fd_bf16 *y = c->op == FD_CUDA_CONV_FORWARD ? host_new(&h, (size_t)ny * 2) : host_copy(&h, c->y, (size_t)ny * 2);
  void *w = c->op == FD_CUDA_CONV_WEIGHTS ? host_new(&h, w_bytes) : host_copy(&h, c->w, w_bytes);
  const int64_t n = c->op == FD_CUDA_CONV_FORWARD ? ny : c->op == FD_CUDA_CONV_DATA ? nx : nw;
  float *sum = host_new(&h, (size_t)n * sizeof(float));
  memset(sum, 0, (size_t)n * sizeof(float));
  for (int64_t p = 0; p < c->B * c->Ho * c->Wo; p++)
    for (int64_t ky = 0; ky < c->kh; ky++)
      for (int64_t kx = 0; kx < c->kw; kx++) {
        const int64_t b = p / (c->Ho * c->Wo), iy = p / c->Wo % c->Ho * c->stride + ky - c->top, ix = p % c->Wo * c->stride + kx - c->left;
        if (iy < 0 || iy >= c->H || ix < 0 || ix >= c->W) continue;
        for (int64_t o = 0; o < c->O; o++)
          for (int64_t i = 0; i < c->I; i++) {
            const int64_t xx = ((b * c->H + iy) * c->W + ix) * c->I + i, yy = p * c->O + o, ww = ((o * c->kh + ky) * c->kw + kx) * c->I + i;
            if (c->op == FD_CUDA_CONV_FORWARD)
              sum[yy] += fd_bf16_to_f32(x[xx]) * fd_bf16_to_f32(((fd_bf16 *)w)[ww]);
            else if (c->op == FD_CUDA_CONV_DATA)
              sum[xx] += fd_bf16_to_f32(y[yy]) * fd_bf16_to_f32(((fd_bf16 *)w)[ww]);
            else
              sum[ww] += fd_bf16_to_f32(y[yy]) * fd_bf16_to_f32(x[xx]);
          }
      }
  if (c->has_residual) {
    const fd_bf16 *r = host_copy(&h, c->residual, (size_t)ny * 2);
    for (int64_t e = 0; e < ny; e++) sum[e] += fd_bf16_to_f32(r[e]);
  }
  if (c->has_bias) {
    const fd_bf16 *bias = host_copy(&h, c->bias, (size_t)c->O * 2);
    for (int64_t e = 0; e < ny; e++) sum[e] += fd_bf16_to_f32(bias[e % c->O]);
  }
  if (c->op == FD_CUDA_CONV_WEIGHTS || c->f32_data) {
    FD_TRY(FD_CUDA(cudaMemcpy(c->f32_data ? c->x : c->w, sum, (size_t)n * sizeof(float), cudaMemcpyHostToDevice)));
  } else {
    fd_bf16 *out = c->op == FD_CUDA_CONV_FORWARD ? y : x;
    for (int64_t e = 0; e < n; e++) out[e] = fd_f32_to_bf16(sum[e]);
    FD_TRY(FD_CUDA(cudaMemcpy(c->op == FD_CUDA_CONV_FORWARD ? c->y : c->x, out, (size_t)n * 2, cudaMemcpyHostToDevice)));
  }
done:
  host_free(&h);
  status = st;
  return st != FD_OK;
}

fd_status fd_cuda_conv(fd_ctx *ctx, const struct fd_cuda_conv *c, void *scratch) {
  (void)ctx, (void)scratch;
  return fd_emu_host(run_conv, c, sizeof *c) == cudaSuccess ? FD_OK : status;
}
