// SPDX-License-Identifier: Apache-2.0
// The registry of models, and filling them with weights. Invariant: a model whose load succeeded holds every row of its table.
#include "model/model.h"

#include <fnmatch.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "io/safetensors.h"
#include "comm/comm.h"
#include "graph/build.h"
#include "model/classes.h"

static const char *const ignore_text[] = {"lm_head.*", "*.rotary_emb.inv_freq", NULL};
static const char *const ignore_none[] = {NULL};

static const struct fd_model_class classes[] = {
    {.name = "DiT", .model_type = "DiT", .family = FD_FAMILY_DIT, .config_bytes = sizeof(struct fd_dit_config),
     .read = fd_dit_read, .declare = fd_dit_declare, .ignore = ignore_none},
    {.name = "FuseDiT", .model_type = "FuseDiT", .family = FD_FAMILY_DIT, .not_built = "the FuseDiT is not built yet"},
    {.name = "GemmaForCausalLM", .model_type = "gemma", .family = FD_FAMILY_TEXT, .config_bytes = sizeof(struct fd_gemma_config),
     .read = fd_gemma_read, .declare = fd_gemma_declare, .ignore = ignore_text},
    {.name = "Gemma2ForCausalLM", .model_type = "gemma2", .family = FD_FAMILY_TEXT, .config_bytes = sizeof(struct fd_gemma_config),
     .read = fd_gemma2_read, .declare = fd_gemma_declare, .ignore = ignore_text},
    {.name = "AutoencoderKL", .family = FD_FAMILY_VAE, .config_bytes = sizeof(struct fd_vae_kl_config),
     .read = fd_vae_kl_read, .declare = fd_vae_kl_declare, .ignore = ignore_none},
    {.name = "AutoencoderKLQwenImage", .family = FD_FAMILY_VAE, .not_built = "the Qwen-Image VAE is not built yet"},
};
enum { N_CLASSES = sizeof classes / sizeof *classes };

static const struct fd_model_class *find_class(const json_t *json) {
  const char *name = json_string_value(json_object_get(json, "_class_name"));
  if (!name) name = json_string_value(json_array_get(json_object_get(json, "architectures"), 0));
  const char *type = json_string_value(json_object_get(json, "model_type"));
  for (int i = 0; i < N_CLASSES; i++)
    if (name && strcmp(classes[i].name, name) == 0) return &classes[i];
  for (int i = 0; i < N_CLASSES; i++)
    if (type && classes[i].model_type && strcmp(classes[i].model_type, type) == 0) return &classes[i];
  return NULL;
}

fd_status fd_model_create(const char *name, const json_t *json, fd_model **out) {
  fd_status st = FD_OK;
  fd_model *m = calloc(1, sizeof *m);
  if (!m) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", name));
  m->name = strdup(name);
  m->json = json_deep_copy(json);
  if (!m->name || !m->json) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", name));
  m->cls = find_class(json);
  if (!m->cls) {
    char known[256] = "";
    for (int i = 0; i < N_CLASSES; i++) {
      size_t used = strlen(known);
      snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", classes[i].name);
    }
    const char *found = json_string_value(json_object_get(json, "_class_name"));
    if (!found) found = json_string_value(json_object_get(json, "model_type"));
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "%s: config.json is of class %s; known are %s", name, found ? found : "(none named)", known));
  }
  if (m->cls->not_built) FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s", name, m->cls->not_built));
  m->config = calloc(1, m->cls->config_bytes);
  if (!m->config) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", name));
  st = m->cls->read(json, m->config, &m->dims);
  if (st != FD_OK) FD_TRY(fd_fail_in(st, "%s", name));
  FD_TRY(fd_params_create(name, &m->params));
  m->cls->declare(m->config, m->params);
  *out = m;
  m = NULL;
done:
  fd_model_destroy(&m);
  return st;
}

fd_status fd_model_open(const char *dir, fd_model **out) {
  fd_status st = FD_OK;
  json_error_t error;
  char path[4096];
  snprintf(path, sizeof path, "%s/config.json", dir);
  json_t *json = json_load_file(path, 0, &error);
  if (!json && error.line < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot be read: a model is a folder with config.json and *.safetensors", path));
  if (!json_is_object(json)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s:%d: %s", path, error.line, json ? "is no JSON object" : error.text));
  FD_TRY(fd_model_create(dir, json, out));
done:
  json_decref(json);
  return st;
}

void fd_model_destroy(fd_model **model) {
  fd_model *m = model ? *model : NULL;
  if (!m) return;
  fd_params_destroy(&m->params);
  json_decref(m->json);
  free(m->config);
  free(m->name);
  free(m);
  *model = NULL;
}

/* ---- weights --------------------------------------------------------------------------------------------------------- */

/* A list of names in one message: all of them if they fit, else their number. */
struct names {
  int n, hidden;
  char text[1100];
};

__attribute__((format(printf, 2, 3))) static void names_add(struct names *l, const char *format, ...) {
  char one[400];
  va_list args;
  va_start(args, format);
  vsnprintf(one, sizeof one, format, args);
  va_end(args);
  size_t used = strlen(l->text);
  l->n++;
  if (used + strlen(one) + 3 > sizeof l->text - 40) l->hidden++;
  else snprintf(l->text + used, sizeof l->text - used, "%s%s", used ? ", " : "", one);
}

static const char *names_end(struct names *l) {
  size_t used = strlen(l->text);
  if (l->hidden) snprintf(l->text + used, sizeof l->text - used, " and %d more", l->hidden);
  return l->text;
}

static const char *shape_text(int ndim, const int64_t *shape, char *buf, size_t bytes) {
  size_t used = (size_t)snprintf(buf, bytes, "[");
  for (int i = 0; i < ndim && used < bytes; i++)
    used += (size_t)snprintf(buf + used, bytes - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
  if (used < bytes) snprintf(buf + used, bytes - used, "]");
  return buf;
}

static bool ignored(const fd_model *m, const char *name) {
  for (int i = 0; m->cls->ignore[i]; i++)
    if (fnmatch(m->cls->ignore[i], name, 0) == 0) return true;
  return false;
}

static fd_status plain_set(void *user, fd_params *p, int row, const float *values) {
  (void)user;
  return fd_params_set(p, row, values);
}

static float *largest_row(const fd_params *p) {
  int64_t most = 1;
  for (int i = 0; i < fd_params_count(p); i++)
    if (fd_params_row(p, i)->numel > most) most = fd_params_row(p, i)->numel;
  return malloc((size_t)most * sizeof(float));
}

/* Shared weights are there for all when all have come here. */
static fd_status finish(struct fd_comm *share, fd_status st) {
  if (!share) return st;
  st = fd_agree(share, st);
  return st == FD_OK ? fd_comm_node_barrier(share) : st;
}

fd_status fd_model_load(fd_model *m, const char *dir, fd_model_set *set, void *user) {
  fd_status st = FD_OK;
  fd_params *p = m->params;
  fd_safetensors *file = NULL;
  float *values = NULL;
  int n = fd_params_count(p);
  int *from = malloc((size_t)(n ? n : 1) * sizeof *from);
  struct names missing = {0}, unknown = {0}, shapes = {0};
  char a[128], b[128];
  bool writes;
  struct fd_comm *share = fd_params_shared(p, &writes);
  if (!set) set = plain_set;
  if (!from) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", dir));
  FD_TRY(fd_safetensors_open(dir, &file));
  bool *used = calloc((size_t)fd_safetensors_count(file) + 1, sizeof *used);
  if (!used) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", dir));
  for (int i = 0; i < n; i++) {
    const struct fd_param *r = fd_params_row(p, i);
    from[i] = fd_safetensors_find(file, r->name);
    if (from[i] < 0 && r->alias) from[i] = fd_safetensors_find(file, r->alias);
    if (from[i] < 0) {
      if (!r->buffer) names_add(&missing, "%s", r->name); /* a buffer is computed if it is not there */
      continue;
    }
    used[from[i]] = true;
    const struct fd_safetensor *t = fd_safetensors_at(file, from[i]);
    if (t->ndim != r->ndim || memcmp(t->shape, r->shape, (size_t)r->ndim * sizeof *r->shape) != 0)
      names_add(&shapes, "%s is %s, config.json means %s", t->name, shape_text(t->ndim, t->shape, a, sizeof a),
                shape_text(r->ndim, r->shape, b, sizeof b));
  }
  for (int i = 0; i < fd_safetensors_count(file); i++)
    if (!used[i] && !ignored(m, fd_safetensors_at(file, i)->name)) names_add(&unknown, "%s", fd_safetensors_at(file, i)->name);
  free(used);
  if (missing.n || unknown.n || shapes.n) {
    char text[3600] = "";
    const struct {
      struct names *l;
      const char *what;
    } part[] = {{&missing, "missing"}, {&unknown, "unknown"}, {&shapes, "of another shape"}};
    for (int i = 0; i < 3; i++) {
      size_t k = strlen(text);
      if (part[i].l->n) snprintf(text + k, sizeof text - k, "%s%d %s: %s", k ? "; " : "", part[i].l->n, part[i].what, names_end(part[i].l));
    }
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: the tensors do not fit %s as config.json describes it; %s", dir, m->cls->name, text));
  }
  values = largest_row(p);
  if (!values) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for its largest tensor", dir));
  for (int i = 0; i < n && writes; i++) {
    if (from[i] < 0) FD_TRY(fd_params_init_row(p, i, 0, values));
    else FD_TRY(fd_safetensors_read(file, from[i], values));
    FD_TRY(set(user, p, i, values));
  }
done:
  free(values);
  fd_safetensors_close(&file);
  free(from);
  return finish(share, st);
}

fd_status fd_model_init(fd_model *m, uint64_t seed, fd_model_set *set, void *user) {
  fd_status st = FD_OK;
  bool writes;
  struct fd_comm *share = fd_params_shared(m->params, &writes);
  float *values = largest_row(m->params);
  if (!set) set = plain_set;
  if (!values) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for its largest tensor", m->name));
  for (int i = 0; i < fd_params_count(m->params) && writes; i++) {
    FD_TRY(fd_params_init_row(m->params, i, seed, values));
    FD_TRY(set(user, m->params, i, values));
  }
done:
  free(values);
  return finish(share, st);
}

/* ---- graphs, by class ------------------------------------------------------------------------------------------------ */

static bool is_family(fd_model *m, fd_graph *g, enum fd_family family, const char *what) {
  if (m->cls->family == family) return true;
  fd_graph_fail(g, FD_ERR_CONFIG, "%s: a %s is no %s", m->name, m->cls->name, what);
  return false;
}

fd_var fd_text_states(fd_model *m, fd_graph *g, const struct fd_text_vars *text, int index, fd_dtype dtype) {
  return is_family(m, g, FD_FAMILY_TEXT, "text encoder") ? fd_gemma_states(m, g, text, index, dtype) : 0;
}

void fd_vae_encode(fd_model *m, fd_graph *g, fd_var pixels, fd_var noise, fd_var *mean, fd_var *logvar, fd_var *latent) {
  fd_var *const out[] = {mean, logvar, latent};
  for (int i = 0; i < 3; i++)
    if (out[i]) *out[i] = 0;
  if (is_family(m, g, FD_FAMILY_VAE, "VAE")) fd_vae_kl_encode(m, g, pixels, noise, mean, logvar, latent);
}

fd_var fd_vae_decode(fd_model *m, fd_graph *g, fd_var latent) {
  return is_family(m, g, FD_FAMILY_VAE, "VAE") ? fd_vae_kl_decode(m, g, latent) : 0;
}

static fd_var affine(fd_model *m, fd_graph *g, fd_var x, int inverse, fd_dtype dtype) {
  const float *sub, *mul;
  if (!is_family(m, g, FD_FAMILY_VAE, "VAE")) return 0;
  fd_vae_kl_statistics(m->config, &sub, &mul);
  const int64_t Z = m->dims.latent_channels;
  fd_var s = fd_params_const(m->params, g, "latents.shift", FD_F32, 1, &Z, sub);
  fd_var k = fd_params_const(m->params, g, "latents.scale", FD_F32, 1, &Z, mul);
  return fd_channel_affine(g, x, s, k, inverse, dtype);
}

fd_var fd_vae_normalise(fd_model *m, fd_graph *g, fd_var latent, fd_dtype dtype) { return affine(m, g, latent, 0, dtype); }
fd_var fd_vae_unnormalise(fd_model *m, fd_graph *g, fd_var latent, fd_dtype dtype) { return affine(m, g, latent, 1, dtype); }

fd_var fd_rope_table(fd_params *p, fd_graph *g, const char *name, int64_t positions, int E, const float *angles) {
  const int64_t shape[] = {positions, E};
  const int64_t half = E / 2;
  float *table = malloc((size_t)(positions * E) * sizeof *table);
  if (!table) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for a rotation table of %lld positions", (long long)positions);
    return 0;
  }
  for (int64_t r = 0; r < positions; r++)
    for (int64_t k = 0; k < half; k++) {
      table[r * E + k] = cosf(angles[r * half + k]);
      table[r * E + half + k] = sinf(angles[r * half + k]);
    }
  fd_var v = fd_params_const(p, g, name, FD_F32, 2, shape, table);
  free(table);
  return v;
}
