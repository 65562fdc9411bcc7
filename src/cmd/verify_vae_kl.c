// SPDX-License-Identifier: Apache-2.0
// Kind vae_kl: a picture encoded, sampled with the record's noise, decoded; and the gradients of all of it.
#include <stdio.h>
#include <stdlib.h>

#include "cmd/verify_model.h"

fd_status fd_verify_vae_kl(struct fd_verify *v) {
  fd_status st = FD_OK;
  struct fd_verify_graph x = {0};
  fd_model *m = NULL;
  enum { MEAN, LOGVAR, LATENT, MODEL_LATENT, DECODED, N_OUT };
  static const char *const names[N_OUT] = {"mean", "logvar", "latent", "model_latent", "decoded"};
  fd_var out[N_OUT] = {0}, cotangent[N_OUT] = {0}, ends[N_OUT], dends[N_OUT], pixels = 0, noise = 0;
  char record[64];
  int n_ends = 0;
  /* gradients are not judged in bf16, and a frozen VAE keeps its norms and biases in f32, as in a run */
  const bool grads = v->dtype == FD_F32 && fd_h5_exists(v->io, "grad");

  FD_TRY(fd_verify_model_open(v, "", NULL, grads, &m));
  FD_TRY(fd_verify_graph_open(v, "vae", &x));
  if (grads) fd_params_grads(m->params, x.g);
  FD_TRY(fd_verify_image_input(&x, "input/pixel_values", false, &pixels));
  FD_TRY(fd_verify_image_input(&x, "input/noise", true, &noise));
  if (grads) fd_graph_want_grad(x.g, pixels, 0);
  fd_vae_encode(m, x.g, pixels, noise, &out[MEAN], &out[LOGVAR], &out[LATENT]);
  out[MODEL_LATENT] = fd_vae_normalise(m, x.g, out[LATENT], FD_F32);
  fd_var z = v->dtype == FD_F32 ? out[LATENT] : fd_cast(x.g, out[LATENT], v->dtype, 1);
  out[DECODED] = fd_vae_decode(m, x.g, z);
  for (int i = 0; i < N_OUT; i++) {
    fd_graph_keep(x.g, out[i]);
    snprintf(record, sizeof record, "input/cotangent/%s", names[i]);
    if (!grads || !fd_h5_exists(v->io, record)) continue;
    FD_TRY(fd_verify_image_input(&x, record, i != DECODED, &cotangent[i]));
    ends[n_ends] = out[i];
    dends[n_ends++] = cotangent[i];
  }
  if (grads) fd_graph_backward(x.g, n_ends, ends, dends);
  FD_TRY(fd_verify_graph_ready(&x, 1, &m));

  FD_TRY(fd_verify_set_image(&x, "input/pixel_values", pixels));
  FD_TRY(fd_verify_set_image(&x, "input/noise", noise));
  for (int i = 0; i < N_OUT; i++) {
    snprintf(record, sizeof record, "input/cotangent/%s", names[i]);
    if (cotangent[i]) FD_TRY(fd_verify_set_image(&x, record, cotangent[i]));
  }
  FD_TRY(fd_graph_run(x.g));
  for (int i = 0; i < N_OUT; i++) {
    snprintf(record, sizeof record, "output/%s", names[i]);
    FD_TRY(fd_verify_compare_image(&x, record, out[i]));
  }
  if (grads) {
    if (fd_h5_exists(v->io, "grad/input/pixel_values")) FD_TRY(fd_verify_compare_image(&x, "grad/input/pixel_values", fd_graph_grad(x.g, pixels)));
    FD_TRY(fd_verify_param_grads(&x, m));
  }
done:
  fd_verify_graph_close(&x);
  fd_model_destroy(&m);
  return st;
}
