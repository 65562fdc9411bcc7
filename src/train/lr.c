// SPDX-License-Identifier: Apache-2.0
// Learning-rate schedules and EMA decay: pure functions of the step, so that a resumed run needs no state for them.
#include "train/lr.h"

#include <math.h>
#include <string.h>

fd_status fd_lr_parse(const char *name, enum fd_lr_kind *out) {
  static const char *const names[] = {"constant", "constant_with_warmup", "linear", "cosine"};
  for (int i = 0; i < 4; i++) {
    if (strcmp(name, names[i])) continue;
    *out = (enum fd_lr_kind)i;
    return FD_OK;
  }
  return FD_FAIL(FD_ERR_CONFIG, "lr_scheduler.name is \"%s\", wanted constant, constant_with_warmup, linear or cosine", name);
}

double fd_lr_factor(enum fd_lr_kind kind, int64_t s, int64_t w, int64_t T) {
  if (kind == FD_LR_CONSTANT) return 1.0;
  if (s < w) return (double)s / (double)w;
  if (kind == FD_LR_CONSTANT_WITH_WARMUP) return 1.0;
  const double n = T > w ? (double)(T - w) : 1.0;
  const double f = kind == FD_LR_LINEAR ? (double)(T - s) / n : 0.5 * (1.0 + cos(M_PI * (double)(s - w) / n));
  return f > 0.0 ? f : 0.0;
}

double fd_ema_decay(double decay, bool warmup, int64_t n) {
  const double d = (double)(1 + n) / (double)(10 + n);
  return warmup && d < decay ? d : decay;
}
