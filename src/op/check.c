// SPDX-License-Identifier: Apache-2.0
// What all ops share of their contracts, checked once for every backend: required slots, element types, what may be added to.
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

#include "op/ops.h"

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
    [FD_OP_rmsnorm_fwd] = "AWWIWF",
    [FD_OP_rmsnorm_bwd] = "AAWFWIAFW",
    [FD_OP_gate_residual_fwd] = "AWWIA",
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
    [FD_OP_reduce_scatter_start] = "R",
    [FD_OP_all_gather_start] = "R",
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

fd_status fd_op_wrong_slot(enum fd_op op, const char *slot, const fd_tensor *t, const char *expected, ...) {
  char found[160], text[256];
  va_list ap;
  va_start(ap, expected);
  vsnprintf(text, sizeof text, expected, ap);
  va_end(ap);
  describe(t, found, sizeof found);
  return FD_FAIL(FD_ERR_ARG, "%s: %s is %s, expected %s", fd_op_info(op)->name, slot, found, text);
}

fd_status fd_op_wrong_arg(enum fd_op op, const char *format, ...) {
  char text[256];
  va_list ap;
  va_start(ap, format);
  vsnprintf(text, sizeof text, format, ap);
  va_end(ap);
  return FD_FAIL(FD_ERR_ARG, "%s: %s", fd_op_info(op)->name, text);
}

static fd_status check_slot(enum fd_op op, int slot, const fd_tensor *t, const fd_tensor **activation) {
  const struct fd_op_info *info = fd_op_info(op);
  const char *name = info->slot[slot];
  if (!t) return info->optional[slot] ? FD_OK : fd_op_wrong_slot(op, name, t, "a tensor");
  if (t->ndim < 0 || t->ndim > FD_MAX_NDIM) return fd_op_wrong_arg(op, "%s has %d dimensions", name, t->ndim);
  for (int d = 0; d < t->ndim; d++)
    if (t->shape[d] < 0) return fd_op_wrong_slot(op, name, t, "no negative length");
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
      return fd_op_wrong_slot(op, name, t, "%s", kinds[k].text);
  if (types[op][slot] == 'A') {
    if (!*activation) *activation = t;
    if ((*activation)->dtype != t->dtype)
      return fd_op_wrong_slot(op, name, t, "%s as the other activations", fd_dtype_name((*activation)->dtype));
  }
  if (strcmp(name, "count") == 0 && fd_tensor_numel(t) != 1) return fd_op_wrong_slot(op, name, t, "[1]");
  return FD_OK;
}

fd_status fd_op_check(enum fd_op op, const void *args) {
  if ((unsigned)op >= FD_OP_COUNT) return FD_FAIL(FD_ERR_ARG, "op %d does not exist", (int)op);
  const struct fd_op_info *info = fd_op_info(op);
  fd_tensor *const *slot = args;
  const fd_tensor *activation = NULL;
  for (int s = 0; s < info->n_slots; s++) {
    fd_status st = check_slot(op, s, slot[s], &activation);
    if (st != FD_OK) return st;
  }
  unsigned acc = *(const unsigned *)((const char *)args + (size_t)info->n_slots * sizeof(fd_tensor *));
  for (int s = 0; s < 32; s++)
    if (acc >> s & 1) {
      if (s >= info->n_slots || info->dir[s] != 'o' || !may_add(op))
        return fd_op_wrong_arg(op, "acc bit %d (%s): nothing that can be added to", s, s < info->n_slots ? info->slot[s] : "no slot");
    }
  return FD_OK;
}
