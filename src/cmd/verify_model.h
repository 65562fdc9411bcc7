// SPDX-License-Identifier: Apache-2.0
// What the kinds of records share that run a model: its graph with memory, layouts of arrays, gradients.
#ifndef FD_CMD_VERIFY_MODEL_H
#define FD_CMD_VERIFY_MODEL_H

#include "cmd/verify.h"
#include "graph/build.h"
#include "model/model.h"

struct fd_verify_graph {
  struct fd_verify *v;
  fd_ctx *ctx;   /* borrowed from v */
  fd_graph *g;
  void *arena;
};

/** A graph without memory yet. */
fd_status fd_verify_graph_open(struct fd_verify *v, const char *name, struct fd_verify_graph *out);
/** Plan it, give it memory, bind the models' weights (n of them). Then set inputs, fd_graph_run, read. */
fd_status fd_verify_graph_ready(struct fd_verify_graph *x, int n, fd_model *const *models);
void fd_verify_graph_close(struct fd_verify_graph *x);

/** The model of a folder below the case ("" for the case itself), with its weights of the run's type. `json` NULL: its config.json. */
fd_status fd_verify_model_open(struct fd_verify *v, const char *folder, const json_t *json, bool trainable, fd_model **out);

/** Set an input of any float type from f32; read a kept value as f32. n elements. */
fd_status fd_verify_set(struct fd_verify_graph *x, fd_var var, const float *host, int64_t n);
fd_status fd_verify_get(struct fd_verify_graph *x, fd_var var, float *host, int64_t n);

/** [B, C, H, W] to [B, H, W, C] and back. Out of place. */
void fd_to_nhwc(const float *from, float *to, int64_t B, int64_t C, int64_t H, int64_t W);
void fd_to_nchw(const float *from, float *to, int64_t B, int64_t C, int64_t H, int64_t W);

/** An input of the run's type holding the record `name` ([B, C, H, W]) as [B, H, W, C]; f32 if keep_f32. Set after fd_verify_graph_ready by
 *  fd_verify_set_image. */
fd_status fd_verify_image_input(struct fd_verify_graph *x, const char *name, bool keep_f32, fd_var *out);
fd_status fd_verify_set_image(struct fd_verify_graph *x, const char *name, fd_var var);
/** Compare a kept [B, H, W, C] value with a record [B, C, H, W]. */
fd_status fd_verify_compare_image(struct fd_verify_graph *x, const char *record, fd_var var);

/** Compare the model's gradients with every /grad/param/NAME. */
fd_status fd_verify_param_grads(struct fd_verify_graph *x, fd_model *m);

/** Packed text from a mask int64 [B, L], 1 = a token, at any place of its row. ids int64 [B, L] or NULL. where[r] is the row of the [B, L] array
 *  that packed row r came from; allocated. */
fd_status fd_verify_text(const struct fd_h5_array *mask, const int64_t *ids, int64_t tile, struct fd_text **out, int64_t **where);
/** rows of [B L, D] to packed rows [T, D], the rest 0; and back. */
void fd_pack_rows(const struct fd_text *t, const int64_t *where, int64_t D, const float *from, float *to);
void fd_unpack_rows(const struct fd_text *t, const int64_t *where, int64_t D, const float *from, float *to, int64_t rows);

#endif
