// SPDX-License-Identifier: Apache-2.0
// Finding models on this machine.
#include "base/models.h"

#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Publishers and models whose licence is accepted on the model's page before a download is allowed. */
static const char *const gated[] = {
    "google/gemma", "google/paligemma", "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3", "meta-llama/",
};

static fd_status no_memory(void) { return FD_FAIL(FD_ERR_NOMEM, "no memory for the name of a folder"); }

static bool is_folder(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static bool is_file(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

/* folder/subfolder if it is one, else NULL. */
static char *inside(const char *folder, const char *subfolder) {
  char *path = NULL;
  if (asprintf(&path, "%s%s%s", folder, *subfolder ? "/" : "", subfolder) < 0) return NULL;
  if (is_folder(path)) return path;
  free(path);
  return NULL;
}

/* <cache>/models--ORG--NAME; NULL if there is no cache or no such model */
static char *in_hub(const char *name) {
  const char *cache = getenv("HF_HUB_CACHE"), *home = getenv("HF_HOME"), *user = getenv("HOME");
  char *path = NULL;
  int n = -1;
  if (cache && *cache)
    n = asprintf(&path, "%s/models--%s", cache, name);
  else if (home && *home)
    n = asprintf(&path, "%s/hub/models--%s", home, name);
  else if (user && *user)
    n = asprintf(&path, "%s/.cache/huggingface/hub/models--%s", user, name);
  if (n < 0) return NULL;
  char *slash = path + strlen(path) - strlen(name);
  slash = strchr(slash, '/');
  if (slash) { /* ORG/NAME is kept as ORG--NAME */
    char *longer = malloc(strlen(path) + 2);
    if (longer) sprintf(longer, "%.*s--%s", (int)(slash - path), path, slash + 1);
    free(path);
    path = longer;
  }
  if (path && is_folder(path)) return path;
  free(path);
  return NULL;
}

/* the snapshot that refs/main names; else the only one, or the first by name */
static char *snapshot_of(const char *hub) {
  char path[PATH_MAX], commit[128] = "";
  char *out = NULL;
  snprintf(path, sizeof path, "%s/refs/main", hub);
  FILE *f = fopen(path, "r");
  if (f) {
    if (fscanf(f, "%127s", commit) != 1) commit[0] = 0;
    fclose(f);
  }
  if (*commit && asprintf(&out, "%s/snapshots/%s", hub, commit) >= 0) {
    if (is_folder(out)) return out;
    free(out);
    out = NULL;
  }
  snprintf(path, sizeof path, "%s/snapshots", hub);
  struct dirent **names = NULL;
  int n = scandir(path, &names, NULL, alphasort);
  for (int i = 0; i < n; i++) {
    if (!out && names[i]->d_name[0] != '.' && asprintf(&out, "%s/%s", path, names[i]->d_name) >= 0 && !is_folder(out)) {
      free(out);
      out = NULL;
    }
    free(names[i]);
  }
  free(names);
  return out;
}

static bool looks_like_hub_name(const char *name) {
  const char *slash = strchr(name, '/');
  return slash && slash != name && slash[1] && !strchr(slash + 1, '/') && name[0] != '.' && name[0] != '~';
}

fd_status fd_models_input_folder(char **folder) {
  static const char *const near[] = {"input", "../input", "../../input", "../../../input", "../share/fdhpc/input"};
  const char *given = getenv("FDHPC_INPUT");
  char exe[PATH_MAX];
  if (given && *given) {
    if (!is_folder(given)) return FD_FAIL(FD_ERR_IO, "FDHPC_INPUT is %s, which is no folder", given);
    *folder = strdup(given);
    return *folder ? FD_OK : no_memory();
  }
  ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
  if (n > 0) {
    exe[n] = 0;
    char *slash = strrchr(exe, '/');
    if (slash) *slash = 0;
    for (size_t i = 0; i < sizeof near / sizeof near[0]; i++) {
      char *path = NULL, *models = NULL;
      if (asprintf(&path, "%s/%s", exe, near[i]) < 0) return no_memory();
      models = inside(path, "models");
      free(models);
      if (models) {
        *folder = path;
        return FD_OK;
      }
      free(path);
    }
  }
  return FD_FAIL(FD_ERR_IO, "the folder input/ that comes with fdhpc is not beside the program; set FDHPC_INPUT to it");
}

/* A folder with nothing of a model's own in it is not the model: one of these must be there. */
static bool holds_model(const char *folder) {
  static const char *const files[] = {"config.json", "scheduler_config.json", "tokenizer.model", "tokenizer_config.json", "model_index.json"};
  char path[PATH_MAX];
  for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
    snprintf(path, sizeof path, "%s/%s", folder, files[i]);
    if (is_file(path)) return true;
  }
  return false;
}

static fd_status find(const struct fd_options *opt, const char *key, const char *name, const char *subfolder, bool config_will_do,
                      char **folder, bool *shipped) {
  fd_status st = FD_OK;
  char *path = NULL, *base = NULL, *hub = NULL, *found_without = NULL;
  if (!*name) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s is not set; wanted a folder or a Hugging Face name such as REPA-E/e2e-flux-vae", key));
  for (int place = 0; place < (config_will_do ? 4 : 3); place++) {
    free(base), base = NULL;
    if (place == 0) {
      base = strdup(name);
    } else if (name[0] == '/') {
      break;
    } else if (place == 1) {
      if (!*opt->paths.models) continue;
      if (asprintf(&base, "%s/%s", opt->paths.models, name) < 0) FD_TRY(no_memory());
    } else if (place == 2) {
      free(hub);
      hub = in_hub(name);
      if (hub) base = snapshot_of(hub);
    } else {
      char *input = NULL;
      if (fd_models_input_folder(&input) != FD_OK) continue;
      int n = asprintf(&base, "%s/models/%s", input, name);
      free(input);
      if (n < 0) FD_TRY(no_memory());
    }
    if (!base || !is_folder(base)) continue;
    path = inside(base, subfolder);
    if (path && holds_model(path)) {
      *shipped = place == 3;
      *folder = path;
      path = NULL;
      goto done;
    }
    if (path || *subfolder) {
      free(found_without);
      if (asprintf(&found_without, "%s%s%s", base, *subfolder ? "/" : "", subfolder) < 0) FD_TRY(no_memory());
    }
    free(path), path = NULL;
  }
  if (found_without)
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s has no config.json, tokenizer.model or scheduler_config.json%s", key, found_without,
                   *subfolder ? "" : " (set the subfolder if the model is in one)"));
  if (!looks_like_hub_name(name))
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: there is no folder %s%s%s", key, name, *opt->paths.models ? ", nor one under paths.models = " : "",
                   opt->paths.models));
  bool licence = false;
  for (size_t i = 0; i < sizeof gated / sizeof gated[0]; i++) licence |= !strncasecmp(name, gated[i], strlen(gated[i]));
  FD_TRY(FD_FAIL(FD_ERR_IO,
                 "%s: %s is neither a folder, nor under paths.models%s%s%s, nor in the local Hugging Face cache. To download it:\n"
                 "  huggingface-cli download %s%s%s%s%s",
                 key, name, *opt->paths.models ? " (" : "", opt->paths.models, *opt->paths.models ? ")" : "", name,
                 *subfolder ? " --include \"" : "", subfolder, *subfolder ? "/*\"" : "",
                 licence ? "\nIts licence must be accepted on its page first; then huggingface-cli login" : ""));
done:
  free(path);
  free(base);
  free(hub);
  free(found_without);
  return st;
}

fd_status fd_model_find(const struct fd_options *opt, const char *key, const char *name, const char *subfolder, char **folder) {
  bool shipped;
  return find(opt, key, name, subfolder, false, folder, &shipped);
}

fd_status fd_model_find_config(const struct fd_options *opt, const char *key, const char *name, const char *subfolder, char **folder,
                               bool *shipped) {
  return find(opt, key, name, subfolder, true, folder, shipped);
}

/* ---- noise_scheduler ------------------------------------------------------------------------------------------------- */

/* Published values, so that a model of gigabytes under a licence is not needed for two numbers. */
static const struct {
  const char *name;
  int timesteps;
  double shift;
} schedulers[] = {
    {"", 1000, 3.0},
    {"stabilityai/stable-diffusion-3-medium-diffusers", 1000, 3.0},
};

/* What a configuration may ask for that is not built: a value other than the one that means "off" is an error. */
static fd_status check_off(const char *path, const json_t *root, const char *key) {
  const json_t *v = json_object_get(root, key);
  if (!v || json_is_null(v) || json_is_false(v)) return FD_OK;
  return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s is set; this program has the plain schedule only; noise_scheduler.shift and num_train_timesteps choose it",
                 path, key);
}

fd_status fd_noise_schedule_read(const char *path, int64_t *num_train_timesteps, double *shift) {
  static const char *const off[] = {"use_dynamic_shifting", "shift_terminal",  "use_karras_sigmas",   "use_exponential_sigmas",
                                    "use_beta_sigmas",      "invert_sigmas",   "stochastic_sampling", NULL};
  fd_status st = FD_OK;
  json_error_t error;
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
  *num_train_timesteps = n ? json_integer_value(n) : 1000; /* diffusers' defaults */
  *shift = a ? json_number_value(a) : 1.0;
done:
  json_decref(root);
  return st;
}

fd_status fd_models_noise_scheduler(struct fd_options *opt, char **from) {
  fd_status st = FD_OK;
  const char *name = opt->noise_scheduler.pretrained_model_name_or_path;
  char *folder = NULL, *path = NULL, *text = NULL;
  int64_t steps = opt->noise_scheduler.num_train_timesteps;
  double shift = opt->noise_scheduler.shift;
  if (steps && shift > 0) return FD_OK;
  for (size_t i = 0; i < sizeof schedulers / sizeof schedulers[0]; i++)
    if (!strcmp(name, schedulers[i].name)) {
      if (!steps) steps = schedulers[i].timesteps;
      if (!(shift > 0)) shift = schedulers[i].shift;
      text = strdup(*name ? "the published values (built in)" : "defaults");
      if (!text) FD_TRY(no_memory());
      goto set;
    }
  FD_TRY(fd_model_find(opt, "noise_scheduler.pretrained_model_name_or_path", name, opt->noise_scheduler.subfolder, &folder));
  if (asprintf(&path, "%s/scheduler_config.json", folder) < 0) FD_TRY(no_memory());
  int64_t its_steps;
  double its_shift;
  FD_TRY(fd_noise_schedule_read(path, &its_steps, &its_shift));
  if (!steps) steps = its_steps;
  if (!(shift > 0)) shift = its_shift;
  if (steps < 1 || !(shift > 0)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: num_train_timesteps and shift must be positive", path));
  text = path;
  path = NULL;
set:
  opt->noise_scheduler.num_train_timesteps = steps;
  opt->noise_scheduler.shift = shift;
  *from = text;
  text = NULL;
done:
  free(folder);
  free(path);
  free(text);
  return st;
}
