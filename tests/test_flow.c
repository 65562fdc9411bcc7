// SPDX-License-Identifier: Apache-2.0
// Around the model: timestep sinusoids, VAE posterior, channel statistics, pixels, noising, loss, Euler step.
#include "optest.h"

static void timestep(struct ot *t, int64_t B, int64_t n, fd_dtype dt) {
  ot_reset(t);
  ot_what(t, "timestep B %d n %d %s", (int)B, (int)n, fd_dtype_name(dt));
  fd_tensor *s = OT_NEW(t, FD_F32, B), *freqs = OT_NEW(t, FD_F32, n), *y = OT_NEW(t, dt, B, 2 * n);
  for (int64_t b = 0; b < B; b++) ot_set(s, b, b == 0 ? 1000 : b == 1 ? 0 : 999.66644 / (double)b);
  for (int64_t k = 0; k < n; k++) ot_set(freqs, k, exp(-log(10000.0) * (double)k / (double)n));
  OT_RUN(t, timestep_embed, .t = s, .freqs = freqs, .y = y);
  for (int64_t b = 0; b < B; b++)
    for (int64_t k = 0; k < n; k++) {
      double angle = (double)((float)ot_get(s, b) * (float)ot_get(freqs, k)), bound = dt == FD_BF16 ? 0x1p-9 : 1e-7;
      OT_CHECK(t, fabs(ot_get(y, 2 * n * b + k) - cos(angle)) <= bound && fabs(ot_get(y, 2 * n * b + n + k) - sin(angle)) <= bound);
    }
}

static void posterior(struct ot *t, int64_t R, int64_t Z, bool noisy, fd_dtype dt, bool acc) {
  ot_reset(t);
  ot_what(t, "posterior R %d Z %d noise %d %s acc %d", (int)R, (int)Z, noisy, fd_dtype_name(dt), acc);
  fd_tensor *m = OT_RAND(t, dt, R, 2 * Z), *noise = noisy ? OT_RAND(t, FD_F32, R, Z) : NULL, *mean = OT_NEW(t, FD_F32, R, Z),
            *logvar = OT_NEW(t, FD_F32, R, Z), *latent = OT_NEW(t, FD_F32, R, Z);
  const double edge[] = {-31, -30, 20, 21}; /* outside, at, at, outside the clamp */
  for (int64_t k = 0; k < 4 && k < R; k++) ot_set(m, k * 2 * Z + Z, edge[k]);
  double *a = calloc((size_t)(2 * R * Z + 1), sizeof *a), *b = calloc((size_t)(R * Z + 1), sizeof *b), *c = calloc((size_t)(R * Z + 1), sizeof *c);
  OT_RUN(t, posterior_fwd, .moments = m, .noise = noise, .mean = mean, .logvar = logvar, .latent = latent);
  for (int64_t i = 0; i < R * Z; i++) {
    a[i] = ot_get(m, i / Z * 2 * Z + i % Z);
    b[i] = fmin(fmax(ot_get(m, i / Z * 2 * Z + Z + i % Z), -30), 20);
    c[i] = a[i] + (noisy ? exp(b[i] / 2) * ot_get(noise, i) : 0);
  }
  OT_COMPARE(t, mean, a, 1);
  OT_COMPARE(t, logvar, b, 1);
  for (int64_t i = 0; i < R * Z; i++) OT_CHECK(t, fabs(ot_get(latent, i) - c[i]) <= 4e-7 * (fabs(a[i]) + fabs(c[i] - a[i])));
  OT_RUN(t, posterior_fwd, .moments = m, .noise = noise, .mean = mean, .logvar = logvar);
  OT_COMPARE(t, mean, a, 1);
  for (unsigned have = 0; have < 8; have++) {
    fd_tensor *dmean = have & 1 ? OT_RAND(t, FD_F32, R, Z) : NULL, *dlogvar = have & 2 ? OT_RAND(t, FD_F32, R, Z) : NULL,
              *dlatent = have & 4 ? OT_RAND(t, FD_F32, R, Z) : NULL, *dm = acc ? OT_RAND(t, dt, R, 2 * Z) : OT_NEW(t, dt, R, 2 * Z);
    for (int64_t i = 0; i < R * Z; i++) {
      int64_t at = i / Z * 2 * Z + i % Z;
      double raw = ot_get(m, at + Z), gl = dlatent ? ot_get(dlatent, i) : 0;
      a[at] = (dmean ? ot_get(dmean, i) : 0) + gl + (acc ? ot_get(dm, at) : 0);
      double gv = (dlogvar ? ot_get(dlogvar, i) : 0) + (noisy ? gl * ot_get(noise, i) * 0.5 * exp(0.5 * raw) : 0);
      a[at + Z] = (raw < -30 || raw > 20 ? 0 : gv) + (acc ? ot_get(dm, at + Z) : 0);
    }
    OT_RUN(t, posterior_bwd, .dmean = dmean, .dlogvar = dlogvar, .dlatent = dlatent, .moments = m, .noise = noise, .dmoments = dm,
           .acc = acc ? 32 : 0);
    for (int64_t i = 0; i < 2 * R * Z; i++)
      OT_CHECK(t, fabs(ot_get(dm, i) - a[i]) <= (dt == FD_BF16 ? 0x1p-8 : 4e-7) * (fabs(a[i]) + 3));
  }
  free(a), free(b), free(c);
}

static void affine(struct ot *t, int64_t R, int64_t C, int inverse, fd_dtype xt, fd_dtype yt) {
  ot_reset(t);
  ot_what(t, "affine R %d C %d inverse %d %s %s", (int)R, (int)C, inverse, fd_dtype_name(xt), fd_dtype_name(yt));
  fd_tensor *x = OT_RAND(t, xt, R, C), *sub = OT_RAND(t, FD_F32, C), *mul = ot_normal(t, OT_NEW(t, FD_F32, C), 3, 0.5), *y = OT_NEW(t, yt, R, C);
  OT_RUN(t, channel_affine, .x = x, .sub = sub, .mul = mul, .y = y, .inverse = inverse);
  for (int64_t i = 0; i < R * C; i++) {
    float v = (float)ot_get(x, i), s = (float)ot_get(sub, i % C), m = (float)ot_get(mul, i % C), r = inverse ? v / m + s : (v - s) * m;
    OT_CHECK(t, ot_get(y, i) == (yt == FD_F32 ? r : fd_bf16_to_f32(fd_f32_to_bf16(r))));
  }
}

static void pixels(struct ot *t) {
  for (int dt = FD_F32; dt <= FD_BF16; dt++) {
    ot_reset(t);
    ot_what(t, "pixels %s", fd_dtype_name(dt));
    fd_tensor *x = OT_NEW(t, FD_U8, 1, 17, 19, 3), *y = OT_NEW(t, dt, 1, 17, 19, 3);
    for (int64_t i = 0; i < 17 * 19 * 3; i++) ot_set(x, i, (double)(i % 256));
    OT_RUN(t, pixels_fwd, .bytes = x, .y = y);
    for (int64_t i = 0; i < 17 * 19 * 3; i++) {
      float v = (float)(i % 256) / 255.0f;
      v = (v - 0.5f) / 0.5f;
      OT_CHECK(t, ot_get(y, i) == (dt == FD_F32 ? v : fd_bf16_to_f32(fd_f32_to_bf16(v))));
    }
  }
}

static void flow(struct ot *t, int64_t B, int64_t n, fd_dtype ot, fd_dtype tt, int precondition, bool acc) {
  ot_reset(t);
  ot_what(t, "flow B %d n %d %s %s precondition %d acc %d", (int)B, (int)n, fd_dtype_name(ot), fd_dtype_name(tt), precondition, acc);
  fd_tensor *x = OT_RAND(t, FD_F32, B, n), *noise = OT_RAND(t, FD_F32, B, n), *sigma = OT_NEW(t, FD_F32, B), *weight = OT_NEW(t, FD_F32, B),
            *x_t = OT_NEW(t, tt, B, n), *out = OT_RAND(t, ot, B, n), *loss = OT_NEW(t, FD_F32, B), *dloss = OT_RAND(t, FD_F32, B),
            *dout = acc ? OT_RAND(t, ot, B, n) : OT_NEW(t, ot, B, n);
  for (int64_t b = 0; b < B; b++) ot_set(sigma, b, ((double)b + 1) / ((double)B + 0.5)), ot_set(weight, b, 1.5 + (double)b);
  double *ref = calloc((size_t)(B * n + 1), sizeof *ref), *sum = calloc((size_t)(B + 1), sizeof *sum);
  OT_RUN(t, flow_noise, .x = x, .noise = noise, .sigma = sigma, .x_t = x_t);
  for (int64_t i = 0; i < B * n; i++) ref[i] = (1 - ot_get(sigma, i / n)) * ot_get(x, i) + ot_get(sigma, i / n) * ot_get(noise, i);
  OT_COMPARE_SIZE(t, x_t, ref, 1, 1);
  OT_RUN(t, flow_loss_fwd, .out = out, .x = x, .noise = noise, .x_t = precondition ? x_t : NULL, .sigma = sigma, .weight = weight, .loss = loss,
         .precondition = precondition);
  for (int64_t i = 0; i < B * n; i++) {
    double s = ot_get(sigma, i / n), w = ot_get(weight, i / n), o = ot_get(out, i);
    double d = precondition ? o * -s + ot_get(x_t, i) - ot_get(x, i) : o - (ot_get(noise, i) - ot_get(x, i));
    sum[i / n] += w * d * d / (double)n;
    ref[i] = ot_get(dloss, i / n) * w * 2 * d / (double)n * (precondition ? -s : 1) + (acc ? ot_get(dout, i) : 0);
  }
  OT_COMPARE_SIZE(t, loss, sum, 1, 1);
  OT_RUN(t, flow_loss_bwd, .dloss = dloss, .out = out, .x = x, .noise = noise, .x_t = precondition ? x_t : NULL, .sigma = sigma,
         .weight = weight, .dout = dout, .precondition = precondition, .acc = acc ? 128 : 0);
  OT_COMPARE_SIZE(t, dout, ref, 1, 4.0 / (double)n);
  if (ot == FD_F32 && n > 8 && !acc) {
    struct fd_flow_loss_fwd_args fwd = {.out = out, .x = x, .noise = noise, .x_t = precondition ? x_t : NULL, .sigma = sigma, .weight = weight,
                                        .loss = loss, .precondition = precondition};
    ot_finite_difference(t, FD_OP_flow_loss_fwd, &fwd, 1, OT_LIST(loss), OT_LIST(dloss), 1, OT_LIST(out), OT_LIST(dout), __LINE__);
  }
  free(ref), free(sum);
}

static void euler(struct ot *t, int64_t B, int64_t n, bool guided, fd_dtype dt) {
  ot_reset(t);
  ot_what(t, "euler B %d n %d guided %d %s", (int)B, (int)n, guided, fd_dtype_name(dt));
  fd_tensor *o = OT_RAND(t, dt, guided ? 2 * B : B, n), *step = OT_NEW(t, FD_F32, 2), *s = OT_RAND(t, FD_F32, B, n);
  ot_set(step, 0, 6), ot_set(step, 1, -0.04);
  double *ref = ot_doubles(s);
  for (int64_t i = 0; i < B * n; i++)
    ref[i] += (double)-0.04f * (ot_get(o, i) + (guided ? 6 * (ot_get(o, i + B * n) - ot_get(o, i)) : 0));
  OT_RUN(t, cfg_euler, .model_out = o, .step = step, .sample = s);
  OT_COMPARE_SIZE(t, s, ref, 1, 1);
  free(ref);
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *x = OT_RAND(t, FD_F32, 2, 6), *b2 = OT_RAND(t, FD_F32, 2), *b3 = OT_RAND(t, FD_F32, 3), *odd = OT_RAND(t, FD_F32, 2, 5),
            *u8 = OT_NEW(t, FD_U8, 7), *half = OT_RAND(t, FD_F32, 2, 3), *xb = OT_NEW(t, FD_BF16, 2, 6);
  OT_MISUSE(t, "y is f32 [2, 6]", timestep_embed, .t = b2, .freqs = b2, .y = x);
  OT_MISUSE(t, "freqs is missing", timestep_embed, .t = b2, .y = x);
  OT_MISUSE(t, "moments is f32 [2, 5]", posterior_fwd, .moments = odd, .mean = half, .logvar = half);
  OT_MISUSE(t, "mean is f32 [2, 6]", posterior_fwd, .moments = x, .mean = x, .logvar = half);
  OT_MISUSE(t, "noise is f32 [2, 6]", posterior_fwd, .moments = x, .noise = x, .mean = half, .logvar = half);
  OT_MISUSE(t, "dmoments is f32 [2, 3]", posterior_bwd, .moments = x, .dmoments = half);
  OT_MISUSE(t, "dlatent is f32 [2, 6]", posterior_bwd, .dlatent = x, .moments = x, .dmoments = x);
  OT_MISUSE(t, "sub is f32 [3]", channel_affine, .x = x, .sub = b3, .mul = b3, .y = x);
  OT_MISUSE(t, "mul is f32 [2]", channel_affine, .x = half, .sub = b3, .mul = b2, .y = half);
  OT_MISUSE(t, "y is f32 [2, 6]", channel_affine, .x = half, .sub = b3, .mul = b3, .y = x);
  OT_MISUSE(t, "bytes is f32", pixels_fwd, .bytes = x, .y = x);
  OT_MISUSE(t, "y is f32 [2, 6]", pixels_fwd, .bytes = u8, .y = x);
  OT_MISUSE(t, "noise is f32 [2, 3]", flow_noise, .x = x, .noise = half, .sigma = b2, .x_t = x);
  OT_MISUSE(t, "sigma is f32 [3]", flow_noise, .x = x, .noise = x, .sigma = b3, .x_t = x);
  OT_MISUSE(t, "noise is bf16", flow_noise, .x = x, .noise = xb, .sigma = b2, .x_t = x);
  OT_MISUSE(t, "x_t is missing", flow_loss_fwd, .out = x, .x = x, .noise = x, .sigma = b2, .weight = b2, .loss = b2, .precondition = 1);
  OT_MISUSE(t, "loss is f32 [3]", flow_loss_fwd, .out = x, .x = x, .noise = x, .sigma = b2, .weight = b2, .loss = b3);
  OT_MISUSE(t, "out is f32 [2, 3]", flow_loss_fwd, .out = half, .x = x, .noise = x, .sigma = b2, .weight = b2, .loss = b2);
  OT_MISUSE(t, "dloss is f32 [3]", flow_loss_bwd, .dloss = b3, .out = x, .x = x, .noise = x, .sigma = b2, .weight = b2, .dout = x);
  OT_MISUSE(t, "model_out is f32 [2, 5]", cfg_euler, .model_out = odd, .step = b2, .sample = x);
  OT_MISUSE(t, "step is f32 [3]", cfg_euler, .model_out = x, .step = b3, .sample = x);
}

static void body(struct ot *t) {
  for (int a = FD_F32; a <= FD_BF16; a++) {
    timestep(t, 3, 128, a);
    timestep(t, 1, 1, a);
    timestep(t, 0, 8, a);
    timestep(t, 9, 13, a);
    for (int k = 0; k < 2; k++)
      for (int acc = 0; acc < 2; acc++) {
        posterior(t, 5, 16, k, a, acc);
        posterior(t, 7, 1, k, a, acc);
        posterior(t, 4, 5, k, a, acc);
        posterior(t, 0, 4, k, a, acc);
      }
    for (int b = FD_F32; b <= FD_BF16; b++)
      for (int k = 0; k < 2; k++) {
        affine(t, 9, 16, k, a, b);
        affine(t, 4, 3, k, a, b);
        affine(t, 0, 3, k, a, b);
        for (int acc = 0; acc < 2; acc++) {
          flow(t, 3, 33, a, b, k, acc);
          flow(t, 2, 1, a, b, k, acc);
          flow(t, 0, 8, a, b, k, acc);
        }
        flow(t, 2, 9001, a, b, k, false); /* several pieces */
      }
    euler(t, 2, 37, false, a);
    euler(t, 2, 37, true, a);
    euler(t, 1, 1, true, a);
    euler(t, 0, 3, false, a);
  }
  pixels(t);
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
