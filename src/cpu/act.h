// SPDX-License-Identifier: Apache-2.0
// Activation functions and their derivatives for one value, inlined with a constant `act` (enum fd_act, op/ops.h).
#ifndef FD_CPU_ACT_H
#define FD_CPU_ACT_H

#include "cpu/vmath.h"
#include "op/ops.h"

/* gelu_tanh(x) = x/2 (1 + tanh(u)) = x sigmoid(2u): one exponential, and no cancellation where tanh is near -1. */
CPU_INLINE float cpu_act(enum fd_act act, float x) {
  switch (act) {
    case FD_ACT_SILU: return x * cpu_sigmoidf(x);
    case FD_ACT_GELU_TANH: return x * cpu_sigmoidf(1.5957691216f * x * cpu_fma(0.044715f * x, x, 1.0f));
    case FD_ACT_GELU_ERF: return 0.5f * x * (1.0f + cpu_erff(0.707106781f * x));
    default: return x;
  }
}

/** *value = act(x), returns act'(x). */
CPU_INLINE float cpu_act_grad(enum fd_act act, float x, float *value) {
  switch (act) {
    case FD_ACT_SILU: {
      float s = cpu_sigmoidf(x);
      *value = x * s;
      return s * cpu_fma(x, 1.0f - s, 1.0f);
    }
    case FD_ACT_GELU_TANH: {
      float x2 = x * x;
      float e = cpu_expf_bounded(-1.5957691216f * x * cpu_fma(0.044715f, x2, 1.0f));
      float s = 1.0f / (1.0f + e);
      *value = x * s;
      return cpu_fma((e * s) * s, x * 1.5957691216f * cpu_fma(0.134145f, x2, 1.0f), s); /* 1 - s = e s */
    }
    case FD_ACT_GELU_ERF: {
      float phi = cpu_fma(0.5f, cpu_erff(0.707106781f * x), 0.5f);
      *value = x * phi;
      return cpu_fma(x * 0.398942280f, cpu_expf_bounded(-0.5f * x * x), phi);
    }
    default: *value = x; return 1.0f;
  }
}

/** Run BODY(act) with a constant act. */
#define CPU_ACT_SWITCH(act, BODY)                            \
  switch (act) {                                             \
    case FD_ACT_SILU: BODY(FD_ACT_SILU); break;              \
    case FD_ACT_GELU_TANH: BODY(FD_ACT_GELU_TANH); break;    \
    case FD_ACT_GELU_ERF: BODY(FD_ACT_GELU_ERF); break;      \
    default: BODY(FD_ACT_NONE); break;                       \
  }

#define CPU_CHECK_ACT(op) \
  CPU_CHECK_ARG(op, (unsigned)a->act <= FD_ACT_GELU_ERF, "act = %d, expected one of enum fd_act", (int)a->act)

#endif
