// SPDX-License-Identifier: Apache-2.0
// The CPU backend: its tables, its memory, and the checks that all ops share.
#include "cpu/cpu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* ---- tables ------------------------------------------------------------------------------------------------------ */

/* Ops that have a kernel, in the order of ops.def. */
#define KERNELS(K) \
  K(reduce_start)  \
  K(reduce_wait)

#define K(name) .name = cpu_##name,
static const struct fd_ops kernels = {KERNELS(K)};
#undef K

typedef fd_status prepare_fn(fd_ctx *ctx, const void *args, size_t *scratch_bytes);
#define K(name) [FD_OP_##name] = (prepare_fn *)(void (*)(void))cpu_##name##_prepare,
static prepare_fn *const prepares[FD_OP_COUNT] = {KERNELS(K)};
#undef K

/* Element types of each slot, in the order of ops.def.
 *   A  activation: f32 | bf16, all of a call the same     W  f32 | bf16, on its own     R  f32 | bf16 | f64
 *   F  f32   D  f64   I  i32   U  u32   B  u8 */
static const char *const types[FD_OP_COUNT] = {
    [FD_OP_matmul] = "AAWIW",
    [FD_OP_colsum] = "AIF",
    [FD_OP_add_fwd] = "AWIA",
    [FD_OP_act_fwd] = "AIA",
    [FD_OP_act_bwd] = "AAIA",
    [FD_OP_geglu_fwd] = "AIA",
    [FD_OP_geglu_bwd] = "AAIA",
    [FD_OP_rmsnorm_fwd] = "AWWIAF",
    [FD_OP_rmsnorm_bwd] = "AAWFWIAFW",
    [FD_OP_gate_residual_fwd] = "AAWIA",
    [FD_OP_gate_residual_bwd] = "AAWIAW",
    [FD_OP_heads_fwd] = "AAWWFIIIAAAFF",
    [FD_OP_heads_bwd] = "AAAAAWWFIIIFFAAFF",
    [FD_OP_attention_fwd] = "AAAIAF",
    [FD_OP_attention_bwd] = "AAAAAFIAAA",
    [FD_OP_embed_fwd] = "IWIA",
    [FD_OP_embed_bwd] = "AIIF",
    [FD_OP_conv2d_fwd] = "AWWAA",
    [FD_OP_conv2d_bwd_data] = "AWA",
    [FD_OP_conv2d_bwd_weights] = "AAFF",
    [FD_OP_groupnorm_fwd] = "AWWAF",
    [FD_OP_groupnorm_bwd] = "AAWWFAFF",
    [FD_OP_upsample2x_fwd] = "AA",
    [FD_OP_upsample2x_bwd] = "AA",
    [FD_OP_patchify] = "AA",
    [FD_OP_unpatchify] = "AA",
    [FD_OP_timestep_embed] = "FFA",
    [FD_OP_posterior_fwd] = "AFFFF",
    [FD_OP_posterior_bwd] = "FFFAFA",
    [FD_OP_channel_affine] = "WFFW",
    [FD_OP_pixels_fwd] = "BW",
    [FD_OP_randn] = "UF",
    [FD_OP_flow_noise] = "FFFW",
    [FD_OP_flow_loss_fwd] = "AFFWFFF",
    [FD_OP_flow_loss_bwd] = "FAFFWFFA",
    [FD_OP_cfg_euler] = "AFF",
    [FD_OP_cast] = "WW",
    [FD_OP_fill] = "R",
    [FD_OP_sumsq] = "FD",
    [FD_OP_clip] = "DF",
    [FD_OP_adamw] = "FFFFFWF",
    [FD_OP_reduce_start] = "R",
    [FD_OP_reduce_wait] = "R",
};

/* Ops other than *_bwd* whose outputs may be added to. */
static bool may_add(enum fd_op op) {
  switch (op) {
    case FD_OP_matmul:
    case FD_OP_colsum:
    case FD_OP_patchify:
    case FD_OP_unpatchify:
    case FD_OP_cast:
    case FD_OP_sumsq: return true;
    default: return strstr(fd_op_info(op)->name, "_bwd") != NULL;
  }
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

static void describe(const fd_tensor *t, char *out, size_t size) {
  if (!t) {
    snprintf(out, size, "missing");
    return;
  }
  int n = snprintf(out, size, "%s [", fd_dtype_name(t->dtype));
  for (int i = 0; i < t->ndim && i < FD_MAX_NDIM && n < (int)size; i++)
    n += snprintf(out + n, size - (size_t)n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
  if (n < (int)size) snprintf(out + n, size - (size_t)n, "]");
}

fd_status cpu_wrong_slot(enum fd_op op, const char *slot, const fd_tensor *t, const char *expected, ...) {
  char found[160], text[256];
  va_list ap;
  va_start(ap, expected);
  vsnprintf(text, sizeof text, expected, ap);
  va_end(ap);
  describe(t, found, sizeof found);
  return FD_FAIL(FD_ERR_ARG, "%s: %s is %s, expected %s", fd_op_info(op)->name, slot, found, text);
}

fd_status cpu_wrong_arg(enum fd_op op, const char *format, ...) {
  char text[256];
  va_list ap;
  va_start(ap, format);
  vsnprintf(text, sizeof text, format, ap);
  va_end(ap);
  return FD_FAIL(FD_ERR_ARG, "%s: %s", fd_op_info(op)->name, text);
}

fd_status cpu_rows_used(enum fd_op op, const fd_tensor *count, int64_t rows, int64_t *used) {
  *used = rows;
  if (!count) return FD_OK;
  int32_t n = *(const int32_t *)count->data;
  if (n < 0 || n > rows) return cpu_wrong_arg(op, "count = %d, expected 0..%lld", (int)n, (long long)rows);
  *used = n;
  return FD_OK;
}

/* ---- the backend ------------------------------------------------------------------------------------------------- */

static fd_status cpu_open(fd_ctx *ctx) {
  ctx->state = calloc(1, sizeof(struct cpu_state));
  return ctx->state ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for the CPU backend");
}

static void cpu_close(fd_ctx *ctx) {
  struct cpu_state *s = ctx->state;
  if (s && s->dnnl_close) s->dnnl_close(s->dnnl);
  free(s);
  ctx->state = NULL;
}

enum { HUGE_PAGE = 2 << 20 };

static fd_status cpu_alloc(fd_ctx *ctx, size_t bytes, void **out) {
  void *p = NULL;
  size_t size = bytes ? bytes : 1;
  bool large = size >= 2 * (size_t)HUGE_PAGE;
  if (posix_memalign(&p, large ? HUGE_PAGE : 64, size) != 0)
    return FD_FAIL(FD_ERR_NOMEM, "no memory: %zu bytes wanted", bytes);
  if (large) madvise(p, size, MADV_HUGEPAGE); /* advice: a system without huge pages runs as well, slower */
  /* zeroed by the threads that will use it: pages come from the memory next to them */
  #pragma omp parallel num_threads(large ? ctx->n_threads : 1)
  {
    int64_t lo, hi;
    cpu_share((int64_t)size, HUGE_PAGE, &lo, &hi);
    memset((char *)p + lo, 0, (size_t)(hi - lo));
  }
  *out = p;
  return FD_OK;
}

static void cpu_free(fd_ctx *ctx, void *p) {
  (void)ctx;
  free(p);
}

static fd_status cpu_copy(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  (void)ctx;
  if (bytes) memcpy(dst, src, bytes);
  return FD_OK;
}

static fd_status cpu_sync(fd_ctx *ctx) {
  (void)ctx;
  return FD_OK; /* ops are done when they return */
}

static fd_status check_slot(enum fd_op op, int slot, const fd_tensor *t, const fd_tensor **activation) {
  const struct fd_op_info *info = fd_op_info(op);
  const char *name = info->slot[slot];
  if (!t) return info->optional[slot] ? FD_OK : cpu_wrong_slot(op, name, t, "a tensor");
  if (t->ndim < 0 || t->ndim > FD_MAX_NDIM) return cpu_wrong_arg(op, "%s has %d dimensions", name, t->ndim);
  for (int d = 0; d < t->ndim; d++)
    if (t->shape[d] < 0) return cpu_wrong_slot(op, name, t, "no negative length");
  static const struct {
    char letter;
    const char *text;
    unsigned allowed;
  } kinds[] = {
      {'A', "f32 or bf16", 1u << FD_F32 | 1u << FD_BF16},
      {'W', "f32 or bf16", 1u << FD_F32 | 1u << FD_BF16},
      {'R', "f32, bf16 or f64", 1u << FD_F32 | 1u << FD_BF16 | 1u << FD_F64},
      {'F', "f32", 1u << FD_F32},
      {'D', "f64", 1u << FD_F64},
      {'I', "i32", 1u << FD_I32},
      {'U', "u32", 1u << FD_U32},
      {'B', "u8", 1u << FD_U8},
  };
  for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++)
    if (kinds[k].letter == types[op][slot] && !(kinds[k].allowed >> t->dtype & 1))
      return cpu_wrong_slot(op, name, t, "%s", kinds[k].text);
  if (types[op][slot] == 'A') {
    if (!*activation) *activation = t;
    if ((*activation)->dtype != t->dtype)
      return cpu_wrong_slot(op, name, t, "%s as the other activations", fd_dtype_name((*activation)->dtype));
  }
  if (strcmp(name, "count") == 0 && fd_tensor_numel(t) != 1) return cpu_wrong_slot(op, name, t, "[1]");
  return FD_OK;
}

static fd_status cpu_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  if ((unsigned)op >= FD_OP_COUNT) return FD_FAIL(FD_ERR_ARG, "op %d does not exist", (int)op);
  const struct fd_op_info *info = fd_op_info(op);
  fd_tensor *const *slot = args;
  const fd_tensor *activation = NULL;
  *scratch_bytes = 0;
  if (!prepares[op]) return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: the CPU backend has no kernel", info->name);
  for (int s = 0; s < info->n_slots; s++) {
    fd_status st = check_slot(op, s, slot[s], &activation);
    if (st != FD_OK) return st;
  }
  unsigned acc = *(const unsigned *)((const char *)args + (size_t)info->n_slots * sizeof(fd_tensor *));
  for (int s = 0; s < 32; s++)
    if (acc >> s & 1) {
      if (s >= info->n_slots || info->dir[s] != 'o' || !may_add(op))
        return cpu_wrong_arg(op, "acc bit %d (%s): nothing that can be added to", s, s < info->n_slots ? info->slot[s] : "no slot");
    }
  return prepares[op](ctx, args, scratch_bytes);
}

const struct fd_backend fd_cpu_backend = {
    .name = "cpu",
    .ops = &kernels,
    .open = cpu_open,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .to_device = cpu_copy,
    .from_device = cpu_copy,
    .sync = cpu_sync,
    .prepare = cpu_prepare,
};
