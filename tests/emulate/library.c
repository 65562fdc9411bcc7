// SPDX-License-Identifier: Apache-2.0
// What cuda/library.c wants of cuDNN, whose calls are emulated one level higher (cudnn.c): nothing is kept there.
#include "cuda/library_state.h"
#include "tests/emulate/cudnn_graph.h"

size_t cudnnGetVersion(void) { return 0; }

void fd_dnn_close(fd_ctx *ctx) { (void)ctx; }
