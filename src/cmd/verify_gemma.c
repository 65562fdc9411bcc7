// SPDX-License-Identifier: Apache-2.0
// Kinds gemma and gemma2: hidden states at every recorded index and gradients of all parameters, on packed text.
#include <stdio.h>
#include <stdlib.h>

#include "cmd/verify_model.h"

#define MAX_STATES 16
#define TILE 16

static fd_status gradients(struct fd_verify_graph *x, int n, char **names, const fd_var *states, fd_var *cotangent) {
  fd_var out[MAX_STATES], dout[MAX_STATES];
  int k = 0;
  for (int i = 0; i < n; i++) {
    char record[320];
    snprintf(record, sizeof record, "input/cotangent/%s", names[i]);
    if (!fd_h5_exists(x->v->io, record)) continue;
    const fd_tensor *t = fd_graph_get(x->g, states[i]);
    cotangent[i] = fd_graph_input(x->g, record, t->dtype, t->ndim, t->shape);
    out[k] = states[i];
    dout[k++] = cotangent[i];
  }
  fd_graph_backward(x->g, k, out, dout);
  return fd_graph_status(x->g);
}

static fd_status run(struct fd_verify *v) {
  fd_status st = FD_OK;
  struct fd_verify_graph x = {0};
  struct fd_text *text = NULL;
  struct fd_text_vars in;
  struct fd_h5_array mask = {0}, ids = {0}, a = {0};
  fd_model *m = NULL;
  int64_t *where = NULL;
  float *packed = NULL, *full = NULL;
  char **names = NULL, record[320];
  int n = 0;
  fd_var states[MAX_STATES], cotangent[MAX_STATES] = {0};
  json_t *json = json_deep_copy(v->config);
  const json_t *how = json_object_get(v->info, "attn_implementation");
  if (how) json_object_set(json, "attn_implementation", (json_t *)how);
  /* gradients are not judged in bf16, and a frozen encoder keeps its norms in f32, as in a run */
  const bool grads = v->dtype == FD_F32 && fd_h5_exists(v->io, "grad/param");

  FD_TRY(fd_verify_read(v, "input/attention_mask", FD_I64, &mask));
  FD_TRY(fd_verify_read(v, "input/input_ids", FD_I64, &ids));
  if (mask.ndim != 2 || ids.numel != mask.numel) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: attention_mask and input_ids differ in shape", v->dir));
  FD_TRY(fd_verify_model_open(v, "", json, grads, &m));
  FD_TRY(fd_verify_text(&mask, ids.data, TILE, &text, &where));
  FD_TRY(fd_h5_list(v->io, "output", false, &n, &names));
  if (n > MAX_STATES) n = MAX_STATES;

  FD_TRY(fd_verify_graph_open(v, "text", &x));
  if (grads) fd_params_grads(m->params, x.g);
  fd_text_inputs(x.g, "text", text, 0, &in);
  for (int i = 0; i < n; i++) {
    int index;
    if (sscanf(names[i], "hidden_states_%d", &index) != 1) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: output %s is unknown", v->dir, names[i]));
    states[i] = fd_text_states(m, x.g, &in, index, v->dtype);
    fd_graph_keep(x.g, states[i]);
  }
  if (grads) FD_TRY(gradients(&x, n, names, states, cotangent));
  FD_TRY(fd_verify_graph_ready(&x, 1, &m));

  const int64_t D = m->dims.width;
  packed = malloc((size_t)(text->T * D) * sizeof *packed);
  full = malloc((size_t)(mask.numel * D) * sizeof *full);
  if (!packed || !full) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for hidden states"));
  FD_TRY(fd_text_set(x.g, &in, text));
  for (int i = 0; i < n; i++) {
    if (!cotangent[i]) continue;
    snprintf(record, sizeof record, "input/cotangent/%s", names[i]);
    FD_TRY(fd_verify_read(v, record, FD_F32, &a));
    if (a.numel != mask.numel * D) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s has another shape", v->dir, record));
    fd_pack_rows(text, where, D, a.data, packed);
    fd_h5_array_free(&a);
    FD_TRY(fd_verify_set(&x, cotangent[i], packed, text->T * D));
  }
  FD_TRY(fd_graph_run(x.g));
  for (int i = 0; i < n; i++) {
    FD_TRY(fd_verify_get(&x, states[i], packed, text->T * D));
    fd_unpack_rows(text, where, D, packed, full, mask.numel);
    snprintf(record, sizeof record, "output/%s", names[i]);
    FD_TRY(fd_verify_compare(v, record, full, mask.numel * D, -1, mask.data, mask.numel));
  }
  if (grads) FD_TRY(fd_verify_param_grads(&x, m));
done:
  fd_verify_graph_close(&x);
  free(names);
  free(full);
  free(packed);
  free(where);
  fd_text_destroy(&text);
  fd_model_destroy(&m);
  json_decref(json);
  fd_h5_array_free(&a);
  fd_h5_array_free(&ids);
  fd_h5_array_free(&mask);
  return st;
}

fd_status fd_verify_gemma(struct fd_verify *v) { return run(v); }
fd_status fd_verify_gemma2(struct fd_verify *v) { return run(v); }
