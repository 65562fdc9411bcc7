// SPDX-License-Identifier: Apache-2.0
// Schedules: noise tables, densities, learning rates, EMA decay, against numbers worked out from the formulas.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "train/density.h"
#include "train/lr.h"
#include "train/scheduler.h"

static int failed;
#define CHECK(c)                                                    \
  do {                                                              \
    if (!(c)) failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c); \
  } while (0)

static int near(double a, double b, double tolerance) { return fabs(a - b) <= tolerance; }

static void test_tables(void) {
  fd_scheduler *s = NULL;
  CHECK(fd_scheduler_create(1000, 3.0, &s) == FD_OK);
  CHECK(s->sigmas[0] == 1.0f && s->timesteps[0] == 1000.0f);
  CHECK(near(s->timesteps[1], 999.666, 1e-3) && near(s->sigmas[999], 0.0029940, 1e-7));
  for (int i = 1; i < 1000; i++) CHECK(s->sigmas[i] < s->sigmas[i - 1] && s->sigmas[i] > 0);
  float sigmas[26], t[25];
  CHECK(fd_scheduler_sampling(s, 25, sigmas, t) == FD_OK);
  const double expect[] = {1, 0.98576, 0.97068};
  for (int i = 0; i < 3; i++) CHECK(near(sigmas[i], expect[i], 6e-6) && near(t[i], 1000 * expect[i], 6e-3));
  CHECK(near(sigmas[22], 0.22031, 6e-6) && near(sigmas[23], 0.12268, 6e-6) && near(sigmas[24], 0.0089286, 6e-8));
  CHECK(sigmas[25] == 0.0f);
  CHECK(fd_scheduler_sampling(s, 1, sigmas, t) == FD_OK && sigmas[0] == 1.0f && sigmas[1] == 0.0f && t[0] == 1000.0f);
  CHECK(fd_scheduler_sampling(s, 0, sigmas, t) == FD_ERR_CONFIG);
  fd_scheduler_destroy(&s);
  CHECK(s == NULL);
  CHECK(fd_scheduler_create(10, 1.0, &s) == FD_OK);
  for (int i = 0; i < 10; i++) CHECK(near(s->sigmas[i], (10 - i) / 10.0, 1e-7));
  fd_scheduler_destroy(&s);
  CHECK(fd_scheduler_create(0, 1.0, &s) == FD_ERR_CONFIG);
  CHECK(fd_scheduler_create(10, 0.0, &s) == FD_ERR_CONFIG);
  CHECK(fd_scheduler_create(10, NAN, &s) == FD_ERR_CONFIG);
}

/* Write `text` to a file and read it as scheduler_config.json. */
static fd_status read_text(const char *text, fd_scheduler **s) {
  char path[] = "/tmp/fdhpc-scheduler-XXXXXX";
  int fd = mkstemp(path);
  FILE *f = fd < 0 ? NULL : fdopen(fd, "w");
  if (!f) return FD_ERR_IO;
  fputs(text, f);
  fclose(f);
  fd_status st = fd_scheduler_read(path, s);
  unlink(path);
  return st;
}

static void test_read(void) {
  fd_scheduler *s = NULL;
  CHECK(read_text("{\"_class_name\": \"FlowMatchEulerDiscreteScheduler\", \"shift\": 3.0}", &s) == FD_OK);
  CHECK(s && s->num_train_timesteps == 1000 && s->shift == 3.0);
  fd_scheduler_destroy(&s);
  CHECK(read_text("{\"num_train_timesteps\": 10, \"shift\": 2, \"use_karras_sigmas\": false, \"shift_terminal\": null}", &s) == FD_OK);
  CHECK(s && s->num_train_timesteps == 10 && s->shift == 2.0);
  fd_scheduler_destroy(&s);
  CHECK(read_text("{\"use_dynamic_shifting\": true}", &s) == FD_ERR_UNSUPPORTED);
  CHECK(read_text("{\"_class_name\": \"DDPMScheduler\"}", &s) == FD_ERR_UNSUPPORTED);
  CHECK(read_text("{\"shift\": \"3\"}", &s) == FD_ERR_FORMAT);
  CHECK(read_text("{\"shift\": 3", &s) == FD_ERR_FORMAT);
  CHECK(fd_scheduler_read("/nonexistent/scheduler_config.json", &s) == FD_ERR_IO);
  CHECK(s == NULL);
}

static void test_density(void) {
  enum fd_weighting w;
  CHECK(fd_weighting_parse("cosmap", &w) == FD_OK && w == FD_WEIGHTING_COSMAP);
  CHECK(fd_weighting_parse("Cosmap", &w) == FD_ERR_CONFIG);
  struct fd_density d = {FD_WEIGHTING_LOGIT_NORMAL, 0.0, 1.0, 1.29};
  CHECK(fd_density_u(&d, 0.0f) == 0.5f && near(fd_density_u(&d, 1.0f), 0.7310586, 1e-7) && fd_density_u(&d, 17.5f) == 1.0f);
  d.logit_mean = 1.0, d.logit_std = 2.0;
  CHECK(near(fd_density_u(&d, -0.5f), 0.5, 1e-7));
  d.scheme = FD_WEIGHTING_MODE;
  CHECK(fd_density_u(&d, 0.0f) == 1.0f);
  CHECK(near(fd_density_u(&d, 0.5f), 0.5 - 1.29 * (0.5 - 1 + 0.5), 1e-7));
  CHECK(fd_density_index(1.0f, 1000) == 999 && fd_density_index(0.0f, 1000) == 0 && fd_density_index(0.5f, 1000) == 500);
  CHECK(fd_density_index(-0.1f, 1000) == 0 && fd_density_index(1.5f, 1000) == 999 && fd_density_index(0.0019999f, 1000) == 1);
  CHECK(fd_density_weight(FD_WEIGHTING_SIGMA_SQRT, 0.5f) == 4.0f && fd_density_weight(FD_WEIGHTING_NONE, 0.5f) == 1.0f);
  CHECK(near(fd_density_weight(FD_WEIGHTING_COSMAP, 0.5f), 4 / M_PI, 1e-6) && fd_density_weight(FD_WEIGHTING_MODE, 0.1f) == 1.0f);
  /* draws: keyed, of the right distribution */
  const int n = 20000;
  double sum = 0, sum2 = 0, uniform = 0;
  struct fd_density normal = {FD_WEIGHTING_LOGIT_NORMAL, 0, 1, 0}, flat = {FD_WEIGHTING_NONE, 0, 1, 0};
  for (int i = 0; i < n; i++) {
    const double z = fd_density_draw(&normal, 42, (uint64_t)i), r = fd_density_draw(&flat, 42, (uint64_t)i);
    sum += z, sum2 += z * z, uniform += r;
    CHECK(r >= 0 && r < 1);
  }
  CHECK(fabs(sum / n) < 0.03 && fabs(sum2 / n - 1) < 0.05 && fabs(uniform / n - 0.5) < 0.01);
  CHECK(fd_density_draw(&normal, 42, 7) == fd_density_draw(&normal, 42, 7));
  CHECK(fd_density_draw(&normal, 42, 7) != fd_density_draw(&normal, 43, 7));
  fd_scheduler *s = NULL;
  float sigma, t, weight;
  CHECK(fd_scheduler_create(1000, 1.0, &s) == FD_OK);
  flat.scheme = FD_WEIGHTING_SIGMA_SQRT;
  fd_density_at(&flat, s, 0.75f, &sigma, &t, &weight);
  CHECK(near(sigma, 0.25, 1e-7) && near(t, 250, 1e-4) && near(weight, 16, 1e-4)); /* index 750: (1000 - 750) / 1000 */
  fd_scheduler_destroy(&s);
}

static void test_rates(void) {
  enum fd_lr_kind k;
  CHECK(fd_lr_parse("cosine", &k) == FD_OK && k == FD_LR_COSINE && fd_lr_parse("polynomial", &k) == FD_ERR_CONFIG);
  CHECK(fd_lr_factor(FD_LR_CONSTANT, 0, 4, 10) == 1.0);
  for (int kind = FD_LR_CONSTANT_WITH_WARMUP; kind <= FD_LR_COSINE; kind++)
    for (int s = 0; s < 4; s++) CHECK(fd_lr_factor((enum fd_lr_kind)kind, s, 4, 10) == s / 4.0);
  CHECK(fd_lr_factor(FD_LR_CONSTANT_WITH_WARMUP, 9, 4, 10) == 1.0);
  CHECK(fd_lr_factor(FD_LR_LINEAR, 4, 4, 10) == 1.0 && near(fd_lr_factor(FD_LR_LINEAR, 7, 4, 10), 0.5, 1e-15));
  CHECK(fd_lr_factor(FD_LR_LINEAR, 12, 4, 10) == 0.0);
  CHECK(fd_lr_factor(FD_LR_COSINE, 4, 4, 10) == 1.0 && near(fd_lr_factor(FD_LR_COSINE, 7, 4, 10), 0.5, 1e-15));
  CHECK(near(fd_lr_factor(FD_LR_COSINE, 10, 4, 10), 0.0, 1e-15));
  CHECK(isfinite(fd_lr_factor(FD_LR_LINEAR, 4, 4, 4)) && isfinite(fd_lr_factor(FD_LR_COSINE, 4, 4, 4)));
  CHECK(fd_ema_decay(0.999, false, 0) == 0.999 && near(fd_ema_decay(0.999, true, 0), 0.1, 1e-15));
  CHECK(near(fd_ema_decay(0.999, true, 90), 0.91, 1e-15) && fd_ema_decay(0.999, true, 100000) == 0.999);
}

int main(void) {
  test_tables();
  test_read();
  test_density();
  test_rates();
  return failed;
}
