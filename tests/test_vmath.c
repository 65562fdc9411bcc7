// SPDX-License-Identifier: Apache-2.0
// Vector functions against libm in double: error in units of the last place over the whole range, and special values.
#include <math.h>
#include <stdio.h>

#include "cpu/vmath.h"

enum { N = 1 << 16 };
static float x[N], y[N], z[N];
static int failed;

CPU_CLONES static void run_exp(void) { for (int i = 0; i < N; i++) y[i] = cpu_expf(x[i]); }
CPU_CLONES static void run_exp_bounded(void) { for (int i = 0; i < N; i++) y[i] = cpu_expf_bounded(x[i]); }
CPU_CLONES static void run_tanh(void) { for (int i = 0; i < N; i++) y[i] = cpu_tanhf(x[i]); }
CPU_CLONES static void run_log(void) { for (int i = 0; i < N; i++) y[i] = cpu_logf(x[i]); }
CPU_CLONES static void run_erf(void) { for (int i = 0; i < N; i++) y[i] = cpu_erff(x[i]); }
CPU_CLONES static void run_sincos(void) { for (int i = 0; i < N; i++) cpu_sincosf(x[i], &y[i], &z[i]); }

static void check(const char *name, void (*run)(void), double (*f)(double), double lo, double hi, bool logarithmic, double bound) {
  double worst = 0, at = 0;
  for (int i = 0; i < N; i++) {
    double u = (i + 0.37) / N;
    x[i] = (float)(logarithmic ? lo * pow(hi / lo, u) : lo + (hi - lo) * u);
  }
  run();
  for (int i = 0; i < N; i++) {
    double r = f((double)x[i]), ulp = (float)r == 0 ? 0x1p-149 : fmax(ldexp(1, ilogb((float)r) - 23), 0x1p-149), e = fabs(y[i] - r) / ulp;
    if (!(e <= worst)) worst = isnan(e) ? INFINITY : e, at = x[i];
  }
  printf("%-12s %12g .. %-12g %.2f ulp at %g\n", name, lo, hi, worst, at);
  if (!(worst <= bound)) failed = 1, printf("  more than %g\n", bound);
}

static void special(const char *name, void (*run)(void), float (*f)(float)) {
  static const float v[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, -1e-40f, 3e38f, -3e38f, 88.7f, 89.5f, -103.0f, -110.0f};
  const int n = sizeof v / sizeof v[0];
  for (int i = 0; i < N; i++) x[i] = v[i % n];
  run();
  for (int i = 0; i < N; i++) {
    float r = f(x[i]), d = fabsf(y[i] - r);
    bool same = isnan(r) ? isnan(y[i]) : y[i] == r || d <= 2e-7f * fabsf(r) || d <= 0x1p-149f;
    if (!same && i < n) failed = 1, printf("%s(%g) = %g, expected %g\n", name, x[i], y[i], r);
  }
}

int main(void) {
  check("exp", run_exp, exp, -87, 88.7, false, 1.5);
  check("exp", run_exp, exp, -104, -87, false, 1.0); /* subnormal results */
  check("exp", run_exp, exp, -1e-3, 1e-3, false, 1.0);
  check("exp bounded", run_exp_bounded, exp, -87, 88, false, 1.5);
  check("tanh", run_tanh, tanh, -12, 12, false, 2.5);
  check("tanh", run_tanh, tanh, 1e-30, 1, true, 2.5);
  check("log", run_log, log, 1e-44, 3e38, true, 1.5);
  check("log", run_log, log, 0.5, 1.9, false, 1.5);
  check("erf", run_erf, erf, -5, 5, false, 2.0);
  check("erf", run_erf, erf, 1e-30, 1, true, 2.0);
  special("exp", run_exp, expf);
  special("tanh", run_tanh, tanhf);
  special("log", run_log, logf);
  special("erf", run_erf, erff);
  for (int k = 0; k < 2; k++) {
    double worst = 0, range = k ? 8192 : 1000;
    for (int i = 0; i < N; i++) x[i] = (float)((i - N / 2) * (range / (N / 2)));
    run_sincos();
    for (int i = 0; i < N; i++) worst = fmax(worst, fmax(fabs(y[i] - sin(x[i])), fabs(z[i] - cos(x[i]))));
    printf("sincos to %g: absolute error %.2e\n", range, worst);
    if (!(worst < 1e-7)) failed = 1;
  }
  for (uint32_t i = 0; i < 1u << 22; i++) { /* bf16: equal to the scalar conversion, also near infinity and for NaN */
    uint32_t u = i * 1021u;
    if (cpu_to_bf16(cpu_from_bits(u)) != fd_f32_to_bf16(cpu_from_bits(u))) failed = 1, printf("bf16 of %08x\n", u), i = 1u << 22;
  }
  return failed;
}
