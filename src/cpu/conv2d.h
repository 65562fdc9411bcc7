// SPDX-License-Identifier: Apache-2.0
// What the memory plan asks of the convolutions.
#ifndef FD_CPU_CONV2D_H
#define FD_CPU_CONV2D_H

#include "op/ctx.h"

/** Bytes that the context will keep for the reordered copy of this op's weights if they are constant (FD_T_CONST); else 0.
 *  Ops that share weights and geometry share the copy. The op must have been prepared. */
size_t cpu_conv2d_kept_bytes(fd_ctx *ctx, enum fd_op op, const void *args);

#endif
