// SPDX-License-Identifier: Apache-2.0
// The one table of backends, the best first. A backend that is not built stays in it under its name.
#include "graph/backend.h"

#include <string.h>

#include "base/log.h"
#include "cpu/cpu.h"
#ifdef FD_WITH_CUDA
#include "cuda/cuda.h"
#else
static const struct fd_backend fd_cuda_backend = {.name = "cuda", .not_built = "reconfigure with --with-cuda=DIR"};
#endif

static const struct fd_backend *const backends[] = {&fd_cuda_backend, &fd_cpu_backend};

const struct fd_backend *fd_backend_at(int i) {
  return i >= 0 && i < (int)(sizeof backends / sizeof *backends) ? backends[i] : NULL;
}

fd_status fd_backend_find(const char *name, const struct fd_backend **out) {
  const struct fd_backend *b;
  bool automatic = strcmp(name, "auto") == 0;
  char why[256];
  for (int i = 0; (b = fd_backend_at(i)); i++) {
    if (automatic ? b->not_built != NULL : strcmp(name, b->name) != 0) continue;
    if (automatic && b->usable && !b->usable(why, sizeof why)) {
      fd_log_info("backend %s is not used: %s", b->name, why);
      continue;
    }
    if (b->not_built) return FD_FAIL(FD_ERR_UNSUPPORTED, "backend %s is not built: %s", b->name, b->not_built);
    fd_status st = fd_backend_check(b);
    if (st == FD_OK) *out = b;
    return st;
  }
  return FD_FAIL(FD_ERR_CONFIG, "backend \"%s\" does not exist: choose auto, cpu or cuda", name);
}
