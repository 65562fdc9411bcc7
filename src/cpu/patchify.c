// SPDX-License-Identifier: Apache-2.0
// Tokens from an image and back. One routine walks token by token; the direction decides who is read.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

struct patches {
  int64_t B, H, W, C, P;
};

/* Moves one token. image: its first pixel, `pitch` elements per row of the image. */
CPU_INLINE void move(void *image, void *token, bool bf16, bool to_token, bool acc, bool channel_last, int64_t C, int64_t P, int64_t pitch) {
  void *const to = to_token ? token : image, *const from = to_token ? image : token;
  for (int64_t p = 0; p < P; p++)
    for (int64_t q = 0; q < P; q++) {
      const int64_t at = p * pitch + q * C, first = channel_last ? (p * P + q) * C : p * P + q, step = channel_last ? 1 : P * P;
      CPU_IVDEP for (int64_t c = 0; c < C; c++) {
        const int64_t i = to_token ? at + c : first + c * step, o = to_token ? first + c * step : at + c;
        if (acc) cpu_store(to, bf16, o, cpu_load(to, bf16, o) + cpu_load(from, bf16, i));
        else if (bf16) ((fd_bf16 *)to)[o] = ((const fd_bf16 *)from)[i];
        else ((float *)to)[o] = ((const float *)from)[i];
      }
    }
}

CPU_CLONES static void move_tokens(const struct patches *s, void *image, void *tokens, bool bf16, bool to_token, bool acc, bool channel_last,
                                   int64_t lo, int64_t hi) {
  const int64_t w = s->W / s->P, h = s->H / s->P, size = s->C * s->P * s->P, each = bf16 ? 2 : 4;
  for (int64_t t = lo; t < hi; t++) {
    const int64_t b = t / (h * w), row = t / w % h, column = t % w;
    void *at = (char *)image + ((b * s->H + row * s->P) * s->W + column * s->P) * s->C * each, *token = (char *)tokens + t * size * each;
#define MOVE(bf16, to_token, channel_last) move(at, token, bf16, to_token, acc, channel_last, s->C, s->P, s->W * s->C)
#define BOTH(bf16, to_token)                            \
  do {                                                  \
    if (channel_last) MOVE(bf16, to_token, true);       \
    else MOVE(bf16, to_token, false);                   \
  } while (0)
    if (bf16 && to_token) BOTH(true, true);
    else if (bf16) BOTH(true, false);
    else if (to_token) BOTH(false, true);
    else BOTH(false, false);
#undef BOTH
#undef MOVE
  }
}

static void run(fd_ctx *ctx, const struct patches *s, void *image, void *tokens, bool bf16, bool to_token, bool acc, bool channel_last) {
  const int64_t n = s->B * (s->H / s->P) * (s->W / s->P);
  #pragma omp parallel num_threads(cpu_threads(ctx, s->B * s->H * s->W * s->C))
  {
    int64_t lo, hi;
    cpu_share(n, 1, &lo, &hi);
    move_tokens(s, image, tokens, bf16, to_token, acc, channel_last, lo, hi);
  }
}

/* image [B, H, W, C] and its tokens; `image_slot`, `token_slot`: their names in `op`. */
static fd_status check(enum fd_op op, const char *image_slot, const fd_tensor *image, const char *token_slot, const fd_tensor *tokens, int P) {
  if (P < 1) return fd_op_wrong_arg(op, "P = %d, expected 1 or more", P);
  if (image->ndim != 4 || image->shape[1] % P || image->shape[2] % P)
    return fd_op_wrong_slot(op, image_slot, image, "[B, H, W, C] with H and W multiples of P = %d", P);
  const int64_t n = image->shape[0] * (image->shape[1] / P) * (image->shape[2] / P), size = image->shape[3] * P * P;
  if (fd_tensor_rows(tokens) != n || fd_tensor_cols(tokens) != size)
    return fd_op_wrong_slot(op, token_slot, tokens, "%lld tokens of %lld", (long long)n, (long long)size);
  return FD_OK;
}

#define PATCHES(image, P_) {(image)->shape[0], (image)->shape[1], (image)->shape[2], (image)->shape[3], P_}

fd_status cpu_patchify_prepare(fd_ctx *ctx, const struct fd_patchify_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  return check(FD_OP_patchify, "x", a->x, "y", a->y, a->P);
}

fd_status cpu_patchify(fd_ctx *ctx, const struct fd_patchify_args *a) {
  const struct patches s = PATCHES(a->x, a->P);
  run(ctx, &s, a->x->data, a->y->data, a->x->dtype == FD_BF16, true, a->acc >> 1 & 1, a->channel_last);
  return FD_OK;
}

fd_status cpu_unpatchify_prepare(fd_ctx *ctx, const struct fd_unpatchify_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  return check(FD_OP_unpatchify, "y", a->y, "x", a->x, a->P);
}

fd_status cpu_unpatchify(fd_ctx *ctx, const struct fd_unpatchify_args *a) {
  const struct patches s = PATCHES(a->y, a->P);
  run(ctx, &s, a->y->data, a->x->data, a->x->dtype == FD_BF16, false, a->acc >> 1 & 1, a->channel_last);
  return FD_OK;
}
