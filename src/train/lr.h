// SPDX-License-Identifier: Apache-2.0
// What changes from step to step by a formula: the learning rate (schedules as diffusers' get_scheduler means them)
// and the decay of the EMA.
#ifndef FD_TRAIN_LR_H
#define FD_TRAIN_LR_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

enum fd_lr_kind { FD_LR_CONSTANT = 0, FD_LR_CONSTANT_WITH_WARMUP, FD_LR_LINEAR, FD_LR_COSINE };

/** lr_scheduler.name. FD_ERR_CONFIG lists the names. */
fd_status fd_lr_parse(const char *name, enum fd_lr_kind *out);

/** Factor on the base learning rate of step s = 0, 1, ..., with w warm-up steps of T in all.
 *  constant: 1, no warm-up even if w > 0. The others: s / w while s < w, then
 *  constant_with_warmup 1, linear (T - s) / (T - w), cosine (1 + cos(pi (s - w) / (T - w))) / 2; never below 0. */
double fd_lr_factor(enum fd_lr_kind kind, int64_t s, int64_t w, int64_t T);

/** Decay of the EMA's update number n = 0, 1, ...: decay, or with warm-up min(decay, (1 + n) / (10 + n)). */
double fd_ema_decay(double decay, bool warmup, int64_t n);

#endif
