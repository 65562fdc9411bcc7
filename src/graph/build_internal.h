// SPDX-License-Identifier: Apache-2.0
// Checks that the builders share. Each returns false after it has failed the graph.
#ifndef FD_GRAPH_BUILD_INTERNAL_H
#define FD_GRAPH_BUILD_INTERNAL_H

#include <stdio.h>

#include "graph/build.h"
#include "graph/internal.h"

bool fd_build_count(fd_graph *g, const char *op, fd_var count);                              /* 0 or [1] i32 */
bool fd_build_float(fd_graph *g, const char *op, const char *slot, fd_var v);                /* there, f32 or bf16 */
bool fd_build_vector(fd_graph *g, const char *op, const char *slot, fd_var v, int64_t n);    /* there, n floats */
bool fd_build_shape(fd_graph *g, const char *op, const char *slot, fd_var v, fd_dtype dtype, int ndim, const int64_t *shape);
fd_var fd_build_like(fd_graph *g, fd_var x); /* a new value of x's shape and type */

#endif
