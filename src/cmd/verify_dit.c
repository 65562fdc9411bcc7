// SPDX-License-Identifier: Apache-2.0
// Kind dit: one evaluation of the DiT and its gradients; or, for a case with `init`, its table of parameters and their first values.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "cmd/verify_model.h"

#define TILE 16

/* ---- init.json --------------------------------------------------------------------------------------------------------- */

static bool close_to(double x, double ref, double tolerance) { return fabs(x - ref) <= tolerance * fabs(ref); }

static bool same_shape(const struct fd_param *r, const json_t *shape) {
  if (json_array_size(shape) != (size_t)r->ndim) return false;
  for (int i = 0; i < r->ndim; i++)
    if (json_integer_value(json_array_get(shape, (size_t)i)) != r->shape[i]) return false;
  return true;
}

static void check_tensor(struct fd_verify *v, const fd_params *p, int row, const json_t *t, double tolerance) {
  const char *name = json_string_value(json_object_get(t, "name")), *distribution = json_string_value(json_object_get(t, "distribution"));
  const struct fd_param *r = row < fd_params_count(p) ? fd_params_row(p, row) : NULL;
  char record[160];
  snprintf(record, sizeof record, "tensor %s", name);
  if (!r || strcmp(r->name, name) != 0) {
    fd_verify_report(v, record, INFINITY, tolerance, false, "at its place in the order is %s", r ? r->name : "nothing");
    return;
  }
  if (!same_shape(r, json_object_get(t, "shape"))) {
    fd_verify_report(v, record, INFINITY, tolerance, false, "its shape begins with %lld", (long long)r->shape[0]);
    return;
  }
  bool pass = false;
  double found = 0, wanted = 0;
  if (strcmp(distribution, "zeros") == 0) {
    pass = r->init == FD_INIT_ZERO;
  } else if (strcmp(distribution, "uniform") == 0) {
    wanted = json_number_value(json_object_get(t, "bound"));
    found = fd_param_bound(r);
    pass = r->init == FD_INIT_XAVIER && close_to(found, wanted, tolerance);
  } else if (strcmp(distribution, "normal") == 0) {
    wanted = json_number_value(json_object_get(t, "std"));
    found = r->std;
    pass = r->init == FD_INIT_NORMAL && close_to(found, wanted, tolerance) && json_number_value(json_object_get(t, "mean")) == 0;
  }
  fd_verify_report(v, record, pass && wanted > 0 ? fabs(found - wanted) / wanted : pass ? 0 : INFINITY, tolerance, pass, "%s, %.9g recorded; %.9g here",
                   distribution, wanted, found);
}

/* Values at a place must be equal to the bit, sums to the rounding of a sum in double. */
static void check_values(struct fd_verify *v, const char *record, const float *values, int64_t numel, int64_t at, const json_t *list) {
  size_t i;
  json_t *e;
  json_array_foreach(list, i, e) {
    const bool inside = at + (int64_t)i < numel;
    const float ref = (float)json_number_value(e), x = inside ? values[at + (int64_t)i] : NAN;
    if (x == ref) continue;
    fd_verify_report(v, record, INFINITY, 0, false, "element %lld is %.9g, recorded %.9g", (long long)at + (long long)i, (double)x, (double)ref);
    return;
  }
  fd_verify_report(v, record, 0, 0, true, "bit-equal");
}

static fd_status check_buffer(struct fd_verify *v, const fd_params *p, const json_t *b) {
  fd_status st = FD_OK;
  float *values = NULL;
  const char *name = json_string_value(json_object_get(b, "name")), *key;
  const int row = fd_params_find(p, name);
  const struct fd_param *r = row < 0 ? NULL : fd_params_row(p, row);
  char record[200];
  json_t *value;
  if (!r || !r->buffer || !same_shape(r, json_object_get(b, "shape"))) {
    snprintf(record, sizeof record, "buffer %s", name);
    fd_verify_report(v, record, INFINITY, 0, false, r ? "is no buffer of this shape" : "is missing");
    return FD_OK;
  }
  values = malloc((size_t)r->numel * sizeof *values);
  if (!values) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %s", name));
  FD_TRY(fd_params_init_row(p, row, 0, values));
  const int64_t D = r->shape[r->ndim - 1], side = (int64_t)llround(sqrt((double)(r->numel / D)));
  long double sum = 0, squares = 0, weighted = 0; /* so that only the recorded sums are rounded */
  for (int64_t i = 0; i < r->numel; i++) {
    sum += values[i];
    squares += (long double)values[i] * values[i];
    weighted += (long double)values[i] * (long double)i / (long double)r->numel;
  }
  json_object_foreach((json_t *)b, key, value) {
    int at_row, at_column, from;
    snprintf(record, sizeof record, "buffer %s %s", name, key);
    if (strcmp(key, "first") == 0) {
      for (size_t k = 0; k < json_array_size(value); k++) check_values(v, record, values, r->numel, (int64_t)k * D, json_array_get(value, k));
    } else if (sscanf(key, "row_%d_column_%d_from_%d", &at_row, &at_column, &from) == 3) {
      check_values(v, record, values, r->numel, (at_row * side + at_column) * D + from, value);
    } else if (strncmp(key, "float64_", 8) == 0) {
      const double x = (double)(strcmp(key, "float64_sum") == 0 ? sum : strcmp(key, "float64_weighted_sum") == 0 ? weighted : squares);
      const double error = fabs(x - json_number_value(value)) / fabs(json_number_value(value));
      fd_verify_report(v, record, error, 1e-11, error <= 1e-11, "%.17g, recorded %.17g", x, json_number_value(value));
    }
  }
done:
  free(values);
  return st;
}

static fd_status verify_init(struct fd_verify *v, const char *file) {
  fd_status st = FD_OK;
  json_error_t error;
  fd_model *m = NULL;
  json_t *init = json_load_file(fd_verify_path(v, file), 0, &error), *e;
  size_t i;
  if (!init) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/%s:%d: %s", v->dir, file, error.line, error.text));
  FD_TRY(fd_model_open(v->dir, &m));
  FD_TRY(fd_params_layout(m->params, true, 1));
  const int64_t wanted = json_integer_value(json_object_get(init, "parameters")), found = fd_params_total(m->params);
  fd_verify_report(v, "parameters", (double)llabs(found - wanted), 0, found == wanted, "%lld, recorded %lld", (long long)found, (long long)wanted);
  int row = 0, count = fd_params_count(m->params);
  json_array_foreach(json_object_get(init, "tensors"), i, e) {
    while (row < count && fd_params_row(m->params, row)->buffer) row++;
    check_tensor(v, m->params, row++, e, v->tol_output);
  }
  while (row < count && fd_params_row(m->params, row)->buffer) row++;
  fd_verify_report(v, "end of the table", row < count ? 1 : 0, 0, row >= count, "%s follows", row < count ? fd_params_row(m->params, row)->name : "");
  json_array_foreach(json_object_get(init, "buffers"), i, e) FD_TRY(check_buffer(v, m->params, e));
done:
  fd_model_destroy(&m);
  json_decref(init);
  return st;
}

/* ---- one evaluation ------------------------------------------------------------------------------------------------------ */

fd_status fd_verify_dit(struct fd_verify *v) {
  fd_status st = FD_OK;
  struct fd_verify_graph x = {0};
  fd_model *m = NULL;
  struct fd_text *text = NULL;
  struct fd_text_vars tv;
  struct fd_h5_array mask = {0}, t = {0}, states = {0}, latents = {0};
  int64_t *where = NULL;
  float *packed = NULL, *full = NULL;
  fd_var cotangent = 0;
  const char *init = json_string_value(json_object_get(v->info, "init"));
  if (init) return verify_init(v, init);
  const bool grads = fd_h5_exists(v->io, "grad");

  FD_TRY(fd_verify_read(v, "input/attention_mask", FD_I64, &mask));
  FD_TRY(fd_verify_read(v, "input/timestep", FD_F32, &t));
  FD_TRY(fd_verify_read(v, "input/text_hidden_states", FD_F32, &states));
  FD_TRY(fd_h5_shape(v->io, "input/hidden_states", &latents));
  FD_TRY(fd_verify_model_open(v, "", NULL, grads, &m));
  FD_TRY(fd_verify_text(&mask, NULL, TILE, &text, &where));
  const int64_t width = m->dims.text_width, P = m->dims.patch;
  if (mask.ndim != 2 || states.numel != mask.numel * width || latents.ndim != 4 || t.numel != latents.shape[0])
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: the inputs do not fit each other or config.json", v->dir));

  FD_TRY(fd_verify_graph_open(v, "dit", &x));
  if (grads) fd_params_grads(m->params, x.g);
  fd_text_inputs(x.g, "text", text, latents.shape[2] / P * (latents.shape[3] / P), &tv);
  struct fd_dit_inputs in = {.text = &tv, .checkpoint = grads}; /* recomputation must not change a thing */
  FD_TRY(fd_verify_image_input(&x, "input/hidden_states", false, &in.x));
  in.t = fd_graph_input(x.g, "timestep", FD_F32, 1, t.shape);
  in.states = fd_graph_input(x.g, "text_hidden_states", v->dtype, 2, (int64_t[]){text->T, width});
  if (grads) {
    fd_graph_want_grad(x.g, in.x, 0);
    fd_graph_want_grad(x.g, in.states, 0);
  }
  fd_var sample = fd_dit(m, x.g, &in);
  fd_graph_keep(x.g, sample);
  if (grads) {
    FD_TRY(fd_verify_image_input(&x, "input/cotangent", false, &cotangent));
    fd_graph_backward(x.g, 1, &sample, &cotangent);
  }
  FD_TRY(fd_verify_graph_ready(&x, 1, &m));

  packed = malloc((size_t)(text->T * width) * sizeof *packed);
  full = malloc((size_t)states.numel * sizeof *full);
  if (!packed || !full) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for text states"));
  fd_pack_rows(text, where, width, states.data, packed);
  FD_TRY(fd_text_set(x.g, &tv, text));
  FD_TRY(fd_verify_set(&x, in.states, packed, text->T * width));
  if (fd_graph_get(x.g, in.t)->data) FD_TRY(fd_verify_set(&x, in.t, t.data, t.numel)); /* no op reads it without time conditioning */
  FD_TRY(fd_verify_set_image(&x, "input/hidden_states", in.x));
  if (grads) FD_TRY(fd_verify_set_image(&x, "input/cotangent", cotangent));
  FD_TRY(fd_graph_run(x.g));
  FD_TRY(fd_verify_compare_image(&x, "output/sample", sample));
  if (grads) {
    if (fd_h5_exists(v->io, "grad/input/hidden_states"))
      FD_TRY(fd_verify_compare_image(&x, "grad/input/hidden_states", fd_graph_grad(x.g, in.x)));
    if (fd_h5_exists(v->io, "grad/input/text_hidden_states")) {
      FD_TRY(fd_verify_get(&x, fd_graph_grad(x.g, in.states), packed, text->T * width));
      fd_unpack_rows(text, where, width, packed, full, mask.numel);
      FD_TRY(fd_verify_compare(v, "grad/input/text_hidden_states", full, states.numel, -1, mask.data, mask.numel));
    }
    FD_TRY(fd_verify_param_grads(&x, m));
  }
done:
  fd_verify_graph_close(&x);
  free(full);
  free(packed);
  free(where);
  fd_text_destroy(&text);
  fd_model_destroy(&m);
  fd_h5_array_free(&latents);
  fd_h5_array_free(&states);
  fd_h5_array_free(&t);
  fd_h5_array_free(&mask);
  return st;
}
