// SPDX-License-Identifier: Apache-2.0
// Copies to the device: the caller's memory is free at once, however late the device reads, and whatever came before.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)
#define OK(call) CHECK((call) == FD_OK)

enum { ALL = 11 << 20 }; /* more than the pinned memory holds */

static unsigned char value(size_t i, int round) { return (unsigned char)(i * 7 + i / 255 + (size_t)round); }

int main(void) {
  static const size_t lengths[] = {1, 4, 3 << 20, 64, (size_t)5 << 20, 4096, 13, (size_t)1 << 20};
  fd_ctx *ctx = NULL;
  unsigned char *host = malloc(ALL), *back = malloc(ALL);
  void *device = NULL;
  OK(fd_ctx_create(&fd_cuda_backend, 1, NULL, &ctx));
  OK(ctx->backend->alloc(ctx, ALL, &device));
  for (int round = 0; round < 3 && !failed; round++) {
    size_t at = 0, wrong = 0;
    for (int k = 0; at < ALL; k++) {
      size_t n = lengths[k % (int)(sizeof lengths / sizeof *lengths)];
      if (n > ALL - at) n = ALL - at;
      for (size_t i = 0; i < n; i++) host[i] = value(at + i, round);
      OK(ctx->backend->to_device(ctx, (char *)device + at, host, n));
      memset(host, 0xee, n); /* used again */
      at += n;
    }
    OK(ctx->backend->from_device(ctx, back, device, ALL));
    for (size_t i = 0; i < ALL; i++) wrong += back[i] != value(i, round);
    CHECK(wrong == 0);
  }
  ctx->backend->free(ctx, device);
  fd_ctx_destroy(&ctx);
  free(host);
  free(back);
  return failed;
}
