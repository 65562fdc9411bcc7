// SPDX-License-Identifier: Apache-2.0
// The one table of backends.
#ifndef FD_GRAPH_BACKEND_H
#define FD_GRAPH_BACKEND_H

#include "op/ctx.h"

/** By name: "cpu", "cuda", or "auto", the best one that is built. FD_ERR_UNSUPPORTED with what to do if it is not built,
 *  FD_ERR_CONFIG for another name. */
fd_status fd_backend_find(const char *name, const struct fd_backend **out);

/** Backend i of the table, built or not (`not_built`); NULL past the end. For --version. */
const struct fd_backend *fd_backend_at(int i);

#endif
