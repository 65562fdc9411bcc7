// SPDX-License-Identifier: Apache-2.0
// Entries of the CPU backend's table for sums over ranks; contracts in op/ops.h.
#ifndef FD_CPU_REDUCE_H
#define FD_CPU_REDUCE_H

#include "op/ctx.h"

fd_status cpu_reduce_start(fd_ctx *ctx, const struct fd_reduce_start_args *args);
fd_status cpu_reduce_wait(fd_ctx *ctx, const struct fd_reduce_wait_args *args);

#endif
