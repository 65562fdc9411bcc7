// SPDX-License-Identifier: Apache-2.0
// Tables of the noise schedule. Which steps are rounded to float and which are double follows diffusers 0.35.
#include "train/scheduler.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

fd_status fd_scheduler_create(int64_t num_train_timesteps, double shift, fd_scheduler **out) {
  fd_status st = FD_OK;
  fd_scheduler *s = NULL;
  const int64_t T = num_train_timesteps;
  if (T < 1 || T > 1000000)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "noise_scheduler.num_train_timesteps is %lld, wanted 1 to 1000000", (long long)T));
  if (!(shift > 0) || !isfinite(shift))
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "noise_scheduler.shift is %g, wanted a positive number", shift));
  s = calloc(1, sizeof *s);
  if (s) {
    s->num_train_timesteps = T;
    s->shift = shift;
    s->sigmas = malloc((size_t)T * sizeof(float));
    s->timesteps = malloc((size_t)T * sizeof(float));
  }
  if (!s || !s->sigmas || !s->timesteps)
    FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a noise schedule of %lld steps", (long long)T));
  const float a = (float)shift, a1 = (float)(shift - 1);
  for (int64_t i = 0; i < T; i++) {
    const float x = (float)(T - i) / (float)T;
    s->sigmas[i] = a * x / (1.0f + a1 * x);
    s->timesteps[i] = s->sigmas[i] * (float)T;
  }
  *out = s;
  s = NULL;
done:
  fd_scheduler_destroy(&s);
  return st;
}

void fd_scheduler_destroy(fd_scheduler **s) {
  if (!s || !*s) return;
  free((*s)->sigmas);
  free((*s)->timesteps);
  free(*s);
  *s = NULL;
}

/* What a configuration may ask for that is not built: a value other than the one that means "off" is an error. */
static fd_status check_off(const char *path, const json_t *root, const char *key) {
  const json_t *v = json_object_get(root, key);
  if (!v || json_is_null(v) || json_is_false(v)) return FD_OK;
  return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s is set; this program has the plain schedule only (shift, num_train_timesteps)",
                 path, key);
}

fd_status fd_scheduler_read(const char *path, fd_scheduler **out) {
  static const char *const off[] = {"use_dynamic_shifting", "shift_terminal",  "use_karras_sigmas",   "use_exponential_sigmas",
                                    "use_beta_sigmas",      "invert_sigmas",   "stochastic_sampling", NULL};
  fd_status st = FD_OK;
  json_error_t error;
  int64_t T = 1000;
  double shift = 1.0;
  json_t *root = json_load_file(path, 0, &error);
  if (!root && error.line < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, error.text));
  if (!root) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: line %d: %s", path, error.line, error.text));
  if (!json_is_object(root)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: not a JSON object", path));
  const json_t *class = json_object_get(root, "_class_name");
  if (class && !(json_is_string(class) && !strcmp(json_string_value(class), "FlowMatchEulerDiscreteScheduler")))
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "%s: _class_name is %s, wanted FlowMatchEulerDiscreteScheduler", path,
                   json_is_string(class) ? json_string_value(class) : "no string"));
  for (int i = 0; off[i]; i++) FD_TRY(check_off(path, root, off[i]));
  const json_t *n = json_object_get(root, "num_train_timesteps"), *a = json_object_get(root, "shift");
  if (n && !json_is_integer(n)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: num_train_timesteps is not an integer", path));
  if (a && !json_is_number(a)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: shift is not a number", path));
  if (n) T = json_integer_value(n);
  if (a) shift = json_number_value(a);
  st = fd_scheduler_create(T, shift, out);
  if (st != FD_OK) st = fd_fail_in(st, "%s", path);
done:
  json_decref(root);
  return st;
}

fd_status fd_scheduler_sampling(const fd_scheduler *s, int64_t n, float *sigmas, float *timesteps) {
  if (n < 1) return FD_FAIL(FD_ERR_CONFIG, "gen.num_inference_steps is %lld, wanted at least 1", (long long)n);
  const double T = (double)s->num_train_timesteps, a = s->shift;
  const double first = (double)s->sigmas[0] * T, last = (double)s->sigmas[s->num_train_timesteps - 1] * T;
  /* numpy.linspace: first + i * step, and the end point exactly */
  const double step = n > 1 ? (last - first) / (double)(n - 1) : 0.0;
  for (int64_t i = 0; i < n; i++) {
    const double x = (i > 0 && i == n - 1 ? last : first + (double)i * step) / T;
    sigmas[i] = (float)(a * x / (1.0 + (a - 1.0) * x));
    timesteps[i] = sigmas[i] * (float)s->num_train_timesteps;
  }
  sigmas[n] = 0.0f;
  return FD_OK;
}
