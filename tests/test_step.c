// SPDX-License-Identifier: Apache-2.0
// One training step on given latents and text: the update against AdamW in double precision, what is not finite is skipped,
// and a wrong size is an error.
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "graph/backend.h"
#include "train/step.h"

static int failed;
#define CHECK(c)                                                                      \
  do {                                                                                \
    if (!(c)) failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c), fflush(stdout); \
  } while (0)

enum { B = 2, SIDE = 4, C = 4, L = 5, DT = 12 };

static const char config_text[] =
    "{\"model_type\": \"DiT\", \"attention\": \"self\", \"dit_hidden_size\": 24, \"dit_num_hidden_layers\": 2, \"in_channels\": 4,"
    " \"out_channels\": 4, \"patch_size\": 2, \"pos_embed\": \"ape\", \"pos_embed_max_size\": 4, \"qk_norm\": true, \"sample_size\": 4,"
    " \"sandwich_norm\": false, \"text_hidden_size\": 12, \"timestep_conditioning\": \"adaln-zero\", \"architectures\": [\"DiT\"],"
    " \"base_config\": {\"attention_bias\": false, \"head_dim\": 8, \"hidden_activation\": \"gelu_pytorch_tanh\", \"hidden_size\": 24,"
    " \"initializer_range\": 0.1, \"intermediate_size\": 40, \"num_attention_heads\": 3,"
    " \"num_hidden_layers\": 2, \"vocab_size\": 64, \"num_key_value_heads\": 1,"
    " \"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0}}";

struct world {
  fd_ctx *ctx;
  fd_model *dit;
  fd_step *step;
  float latents[B * SIDE * SIDE * C], noise[B * SIDE * SIDE * C], text[B * L * DT];
  struct fd_step_batch batch;
};

static fd_status open_world(struct world *w, struct fd_step_config *config) {
  fd_status st = FD_OK;
  const struct fd_backend *cpu;
  json_t *json = json_loads(config_text, 0, NULL);
  FD_TRY(fd_backend_find("cpu", &cpu));
  FD_TRY(fd_ctx_create(cpu, 1, NULL, &w->ctx));
  FD_TRY(fd_model_create("test", json, &w->dit));
  FD_TRY(fd_params_layout(w->dit->params, true, 1));
  *config = (struct fd_step_config){.dit = w->dit,
                                    .batch = B,
                                    .accumulation = 1,
                                    .height = SIDE,
                                    .width = SIDE,
                                    .max_length = L,
                                    .given_noise = true,
                                    .optim = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.1, .max_norm = 0.05, .ema = true}};
done:
  json_decref(json);
  return st;
}

static fd_status start(struct world *w, const struct fd_step_config *config) {
  static const int32_t lengths[B] = {5, 2};
  static const float sigma[B] = {0.3f, 0.8f}, t[B] = {300, 800}, weight[B] = {1, 2};
  static const int64_t sample[B] = {7, 8};
  fd_status st = FD_OK;
  FD_TRY(fd_step_create(w->ctx, config, &w->step));
  FD_TRY(fd_params_alloc(w->dit->params, w->ctx, FD_F32, true));
  FD_TRY(fd_step_alloc(w->step));
  FD_TRY(fd_model_init(w->dit, 3, fd_optim_fill, fd_step_optim(w->step)));
  FD_TRY(fd_optim_publish(fd_step_optim(w->step)));
  for (int i = 0; i < B * SIDE * SIDE * C; i++) w->latents[i] = (float)sin(i), w->noise[i] = (float)cos(7 * i);
  for (int i = 0; i < B * L * DT; i++) w->text[i] = (float)cos(3 * i);
  w->batch = (struct fd_step_batch){.latents = w->latents,
                                    .noise = w->noise,
                                    .text = w->text,
                                    .lengths = lengths,
                                    .sigma = sigma,
                                    .timestep = t,
                                    .weight = weight,
                                    .sample = sample,
                                    .seed = 5};
done:
  return st;
}

static fd_status one_step(struct world *w, const struct fd_step_rates *rates, struct fd_step_result *r) {
  fd_status st = FD_OK;
  FD_TRY(fd_step_begin(w->step, rates));
  FD_TRY(fd_step_micro(w->step, &w->batch));
  FD_TRY(fd_step_update(w->step));
  FD_TRY(fd_step_result(w->step, r));
done:
  return st;
}

/* All of one part of the state, row after row; the caller frees. */
static float *state(struct world *w, enum fd_optim_part part, int64_t *n) {
  const fd_params *p = w->dit->params;
  float *x = NULL;
  *n = 0;
  for (int i = 0; i < fd_params_count(p); i++) {
    const struct fd_param *row = fd_params_row(p, i);
    if (row->buffer) continue;
    x = realloc(x, (size_t)(*n + row->numel) * sizeof(float));
    CHECK(x && fd_optim_get(fd_step_optim(w->step), part, i, x + *n) == FD_OK);
    *n += row->numel;
  }
  return x;
}

/* Gradients in the same order: forward and backward without the optimiser. What is left in the buffer must not count in the next step. */
static float *gradient(struct world *w, int64_t n) {
  const fd_params *p = w->dit->params;
  float *g = malloc((size_t)n * sizeof(float));
  const struct fd_step_rates none = {.lr = 0, .ema_decay = 1};
  int64_t at = 0;
  CHECK(g && fd_step_begin(w->step, &none) == FD_OK && fd_step_micro(w->step, &w->batch) == FD_OK);
  for (int i = 0; i < fd_params_count(p); i++) {
    const struct fd_param *row = fd_params_row(p, i);
    if (row->buffer) continue;
    float *from = fd_params_flat_grad(p) + row->offset;
    memcpy(g + at, from, (size_t)row->numel * sizeof(float));
    for (int64_t e = 0; e < row->numel; e++) from[e] = NAN;
    at += row->numel;
  }
  return g;
}

static void test_update(struct world *w) {
  int64_t n;
  float *p = state(w, FD_OPTIM_MASTER, &n), *e = state(w, FD_OPTIM_EMA, &n);
  double *m = calloc((size_t)n, sizeof *m), *v = calloc((size_t)n, sizeof *v);
  struct fd_step_result r;
  CHECK(!memcmp(p, e, (size_t)n * sizeof(float)));
  for (int k = 0; k < 3; k++) {
    float *g = gradient(w, n);
    double norm = 0, worst = 0, worst_e = 0;
    for (int64_t i = 0; i < n; i++) norm += (double)g[i] * g[i];
    norm = sqrt(norm);
    const double clip = fmin(1, 0.05 / (norm + 1e-6)), lr = 0.01 / (k + 1), d = k == 1 ? 1 : 0.7;
    const struct fd_step_rates rates = {.lr = lr, .ema_decay = d, .update = k};
    CHECK(one_step(w, &rates, &r) == FD_OK && !r.skipped);
    CHECK(fabs(r.grad_norm - norm) < 1e-5 * norm && norm > 0.05);
    float *p1 = state(w, FD_OPTIM_MASTER, &n), *e1 = state(w, FD_OPTIM_EMA, &n);
    for (int64_t i = 0; i < n; i++) {
      const double gi = clip * g[i];
      m[i] = 0.9 * m[i] + 0.1 * gi;
      v[i] = 0.95 * v[i] + 0.05 * gi * gi;
      const double want = p[i] - lr * (m[i] / (1 - pow(0.9, k + 1)) / (sqrt(v[i] / (1 - pow(0.95, k + 1))) + 1e-6) + 0.1 * p[i]);
      worst = fmax(worst, fabs(p1[i] - want));
      worst_e = fmax(worst_e, fabs(e1[i] - (d * e[i] + (1 - d) * want)));
    }
    /* Adam's quotient turns a relative error of a tiny gradient into one of lr: 1e-3 of lr is far above rounding, far below a slip */
    CHECK(worst < 1e-3 * lr && worst_e < 1e-3 * lr);
    if (worst >= 1e-3 * lr || worst_e >= 1e-3 * lr) printf("update %d: %g, average %g\n", k, worst, worst_e);
    free(g), free(p), free(e);
    p = p1, e = e1;
  }
  free(p), free(e), free(m), free(v);
}

static void test_skip(struct world *w) {
  int64_t n;
  struct fd_step_result r;
  const struct fd_step_rates rates = {.lr = 0.1, .ema_decay = 0.5, .update = 3};
  const float kept = w->latents[5];
  for (int bad = 0; bad < 2; bad++) {
    float *before[FD_OPTIM_PARTS];
    for (int i = 0; i < FD_OPTIM_PARTS; i++) before[i] = state(w, (enum fd_optim_part)i, &n);
    w->latents[5] = bad ? INFINITY : NAN;
    CHECK(one_step(w, &rates, &r) == FD_OK && r.skipped && !isfinite(r.loss));
    w->latents[5] = kept;
    for (int i = 0; i < FD_OPTIM_PARTS; i++) {
      float *after = state(w, (enum fd_optim_part)i, &n);
      CHECK(!memcmp(before[i], after, (size_t)n * sizeof(float)));
      free(before[i]), free(after);
    }
  }
  CHECK(one_step(w, &rates, &r) == FD_OK && !r.skipped && isfinite(r.loss)); /* and the next one is as if nothing had been */
}

/* Weights for sampling: the average, then the weights again to the bit. */
static void test_average(struct world *w) {
  const int64_t n = fd_params_flat_numel(w->dit->params);
  float *now = malloc((size_t)n * sizeof(float));
  memcpy(now, fd_params_flat(w->dit->params), (size_t)n * sizeof(float));
  CHECK(fd_optim_use_ema(fd_step_optim(w->step), true) == FD_OK);
  CHECK(memcmp(now, fd_params_flat(w->dit->params), (size_t)n * sizeof(float)));
  CHECK(fd_optim_use_ema(fd_step_optim(w->step), false) == FD_OK);
  CHECK(!memcmp(now, fd_params_flat(w->dit->params), (size_t)n * sizeof(float)));
  free(now);
}

static void test_misuse(struct world *w, struct fd_step_config config) {
  fd_step *s = NULL;
  const struct fd_step_config right = config;
  config.height = 5;
  CHECK(fd_step_create(w->ctx, &config, &s) == FD_ERR_CONFIG && strstr(fd_status_message(), "data.resolution"));
  config = right, config.batch = 0;
  CHECK(fd_step_create(w->ctx, &config, &s) == FD_ERR_CONFIG);
  config = right, config.accumulation = 0;
  CHECK(fd_step_create(w->ctx, &config, &s) == FD_ERR_CONFIG);
  config = right, config.optim.zero_stage = 1;
  CHECK(fd_step_create(w->ctx, &config, &s) == FD_ERR_UNSUPPORTED && strstr(fd_status_message(), "trainer.zero_stage"));
  CHECK(s == NULL);
}

int main(void) {
  struct world w = {0};
  struct fd_step_config config;
  fd_status st = open_world(&w, &config);
  if (st == FD_OK) {
    test_misuse(&w, config);
    st = start(&w, &config);
  }
  CHECK(st == FD_OK);
  if (st != FD_OK) printf("%s (%s)\n", fd_status_message(), fd_status_where());
  if (st == FD_OK) {
    test_update(&w);
    test_average(&w);
    test_skip(&w);
    const int32_t lengths[B] = {6, 1};
    w.batch.lengths = lengths;
    CHECK(fd_step_micro(w.step, &w.batch) == FD_ERR_ARG);
  }
  fd_step_destroy(&w.step);
  fd_model_destroy(&w.dit);
  fd_ctx_destroy(&w.ctx);
  return failed;
}
