// SPDX-License-Identifier: Apache-2.0
// Base: known answers of the generator, the permutation is one, conversions round to nearest even.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/dtype.h"
#include "base/rng.h"
#include "op/ctx.h"

static int failed;
#define CHECK(c)                                                    \
  do {                                                              \
    if (!(c)) failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c); \
  } while (0)

/* A backend that lacks kernels is refused, and the message names them. */
static void check_missing_kernels(void) {
  struct fd_ops ops = {0};
  struct fd_backend backend = {.name = "test", .ops = &ops};
  CHECK(fd_backend_check(&backend) == FD_ERR_UNSUPPORTED && strstr(fd_status_message(), "matmul colsum"));
  memset(&ops, 0xff, sizeof ops);
  CHECK(fd_backend_check(&backend) == FD_OK);
  ops.geglu_bwd = NULL;
  CHECK(fd_backend_check(&backend) == FD_ERR_UNSUPPORTED && strcmp(fd_status_message(), "backend test has no kernel for geglu_bwd") == 0);
}

int main(void) {
  uint32_t r[4];
  fd_rng_block(0, 0, 0, 0, r);
  CHECK(r[0] == 0x6627e8d5u);
  for (int64_t n = 1; n < 200; n += 7) {
    unsigned char seen[200] = {0};
    for (int64_t i = 0; i < n; i++) {
      int64_t p = fd_rng_permute(7, FD_RNG_SHUFFLE, 3, n, i);
      CHECK(p >= 0 && p < n && !seen[p]);
      seen[p] = 1;
    }
  }
  double sum = 0, sum2 = 0;
  for (uint32_t b = 0; b < 25000; b++) {
    float z[4];
    fd_rng_normal4(1, FD_RNG_NOISE, 5, b, z);
    for (int i = 0; i < 4; i++) sum += z[i], sum2 += (double)z[i] * z[i];
  }
  CHECK(fabs(sum / 1e5) < 0.015 && fabs(sum2 / 1e5 - 1) < 0.03);
  CHECK(fd_f32_to_bf16(1.00390625f) == 0x3f80 && fd_f32_to_bf16(1.01171875f) == 0x3f82); /* halves go to even */
  CHECK(isnan(fd_bf16_to_f32(fd_f32_to_bf16(NAN))));
  CHECK(fd_f16_to_f32(0x3c00) == 1.0f && fd_f16_to_f32(1) == 0x1p-24f && isinf(fd_f16_to_f32(0xfc00)));
  CHECK(fd_op_info(FD_OP_matmul)->n_slots == 5 && fd_op_info(FD_OP_matmul)->optional[2]);
  check_missing_kernels();
  return failed;
}
