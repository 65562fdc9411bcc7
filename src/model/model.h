// SPDX-License-Identifier: Apache-2.0
// The registry of models: one row per class of published model. A model is its configuration, its parameter table and functions that
// add it to a graph. `_class_name` (diffusers), `architectures[0]` or `model_type` (transformers) of config.json picks the row.
#ifndef FD_MODEL_MODEL_H
#define FD_MODEL_MODEL_H

#include <jansson.h>

#include "model/params.h"
#include "model/text.h"

enum fd_family { FD_FAMILY_DIT, FD_FAMILY_TEXT, FD_FAMILY_VAE };

/** What the rest of the program needs to know of a model's sizes; 0 where it has no meaning. */
struct fd_model_dims {
  int64_t width;        /* DiT: D; text: hidden size, of the states it returns */
  int64_t layers;
  int64_t vocab;        /* text: ids are 0 .. vocab - 1 */
  int64_t pad_id;       /* text */
  int64_t text_width;   /* DiT: width of the text states it wants */
  int64_t in_channels, out_channels; /* DiT: of latents; VAE: of pictures */
  int64_t latent_channels;           /* VAE */
  int64_t factor;       /* VAE: picture side / latent side */
  int64_t patch;        /* DiT */
  int64_t max_side;     /* DiT: most patches along one side of its position table; 0: no limit */
};

typedef struct fd_model fd_model;

struct fd_model_class {
  const char *name;        /* "AutoencoderKL" */
  const char *model_type;  /* "gemma"; NULL if none */
  enum fd_family family;
  const char *not_built;   /* NULL, or why asking for it is FD_ERR_UNSUPPORTED */
  size_t config_bytes;
  /** Parse, check, fill dims. Messages name the key. Unknown keys are ignored (published files have many). */
  fd_status (*read)(const json_t *json, void *config, struct fd_model_dims *dims);
  /** Rows in the order of the state dict. */
  void (*declare)(const void *config, fd_params *p);
  /** NULL-ended patterns ("lm_head.*", "*.num_batches_tracked") of tensors that files may have and the model does not use. */
  const char *const *ignore;
};

struct fd_model {
  const struct fd_model_class *cls;
  void *config;               /* the class's own struct; owned */
  struct fd_model_dims dims;
  fd_params *params;          /* owned; declared, not laid out yet */
  json_t *json;               /* config.json; owned */
  char *name;                 /* for messages: the folder, or "model"; owned */
};

/** From a configuration as in config.json. `name` is for messages. Local; no weights, no memory on the device. */
fd_status fd_model_create(const char *name, const json_t *json, fd_model **out);
/** From a folder's config.json. */
fd_status fd_model_open(const char *dir, fd_model **out);
void fd_model_destroy(fd_model **m);

/** Fill every row from the safetensors of a folder. Local, or collective if the table is shared (fd_params_share). The table is laid out and has memory. One error lists all tensors that are missing,
 *  unknown or of another shape. `set` receives each row as f32 (NULL: fd_params_set), so that a master copy can be filled too. */
typedef fd_status fd_model_set(void *user, fd_params *p, int row, const float *values);
fd_status fd_model_load(fd_model *m, const char *dir, fd_model_set *set, void *user);
/** Fill every row with its initial value instead. Values depend on seed and the row alone. */
fd_status fd_model_init(fd_model *m, uint64_t seed, fd_model_set *set, void *user);

/** The DiT's configuration as in its config.json, from the keys of the `model` group and the text encoder's config.json (base_config). */
struct fd_options;
fd_status fd_dit_config(const struct fd_options *opt, const json_t *text_config, json_t **out);

/* ---- graphs. `dtype` is the activations' type: F32 or BF16 ------------------------------------------------------------ */

/** Text states [T, width] of packed ids: index -1 after the final norm, -2 the last layer's input, ..., as `hidden_states` of transformers
 *  (layers + 1 entries; 0 the scaled embedding). Uses text->ids, pos, ranges, count. */
fd_var fd_text_states(fd_model *m, fd_graph *g, const struct fd_text_vars *text, int index, fd_dtype dtype);

/** Pixels [B, H, W, 3] in [-1, 1] -> posterior. mean, logvar, latent: [B, h, w, Z] f32, each may be NULL. noise [B, h, w, Z] f32, 0: the mode. */
void fd_vae_encode(fd_model *m, fd_graph *g, fd_var pixels, fd_var noise, fd_var *mean, fd_var *logvar, fd_var *latent);
/** The VAE's own latents [B, h, w, Z] (not normalised) -> pixels [B, H, W, 3], not clamped. The type is the input's. */
fd_var fd_vae_decode(fd_model *m, fd_graph *g, fd_var latent);
/** (latent - shift) * scale, what the DiT learns, and back. */
fd_var fd_vae_normalise(fd_model *m, fd_graph *g, fd_var latent, fd_dtype dtype);
fd_var fd_vae_unnormalise(fd_model *m, fd_graph *g, fd_var model_latent, fd_dtype dtype);

/** One evaluation of the DiT.
 *    x       [B, H, W, C] of `dtype`    t [B] f32, 1..1000    states [T, text_width] of `dtype`
 *    text    first, count, image_ranges are used; text->N = (H / patch) (W / patch)
 *  -> [B, H, W, C_out] of `dtype`.  checkpoint: one recompute segment per layer. */
struct fd_dit_inputs {
  fd_var x, t, states;
  struct fd_text_vars *text; /* borrowed; given to fd_text_set later */
  bool checkpoint;
};
fd_var fd_dit(fd_model *m, fd_graph *g, const struct fd_dit_inputs *in);

#endif
