// SPDX-License-Identifier: Apache-2.0
// ops.def as data. Invariant: slot i of an op is the i-th pointer of its args struct.
#include "op/ops.h"

#include <string.h>

#define X(name, slots)                                                                                        \
  _Static_assert(sizeof(struct fd_##name##_args) <= FD_OP_ARGS_MAX, #name ": raise FD_OP_ARGS_MAX");
#include "op/ops.def"
#undef X
_Static_assert(sizeof(struct fd_ops) == FD_OP_COUNT * sizeof(void (*)(void)), "struct fd_ops has a member that is no row");

static const struct {
  const char *name, *slots;
  size_t args_bytes, acc_offset;
} rows[FD_OP_COUNT] = {
#define X(name, slots) {#name, slots, sizeof(struct fd_##name##_args), offsetof(struct fd_##name##_args, acc)},
#include "op/ops.def"
#undef X
};

static struct fd_op_info infos[FD_OP_COUNT];

__attribute__((constructor)) static void parse(void) {
  for (int op = 0; op < FD_OP_COUNT; op++) {
    struct fd_op_info *info = &infos[op];
    info->name = rows[op].name;
    info->args_bytes = rows[op].args_bytes;
    for (const char *p = rows[op].slots; *p;) {
      int i = info->n_slots++;
      info->optional[i] = *p >= 'A' && *p <= 'Z';
      info->dir[i] = (char)(*p | 0x20);
      p += 2; /* letter and colon */
      size_t n = strcspn(p, " ");
      memcpy(info->slot[i], p, n < sizeof info->slot[i] ? n : sizeof info->slot[i] - 1);
      p += n;
      if (*p == ' ') p++;
    }
    /* the row and the struct disagree: nothing built on them can be right */
    if (rows[op].acc_offset != (size_t)info->n_slots * sizeof(fd_tensor *)) __builtin_trap();
  }
}

const struct fd_op_info *fd_op_info(enum fd_op op) { return &infos[op]; }
