// SPDX-License-Identifier: Apache-2.0
// Values of a config.json. Invariant: the first failure stays; later reads return defaults.
#include "model/json.h"

#include <math.h>

static const json_t *get(const struct fd_json *c, const char *key) {
  const json_t *v = json_object_get(c->json, key);
  return json_is_null(v) ? NULL : v;
}

bool fd_json_has(const struct fd_json *c, const char *key) { return get(c, key) != NULL; }
bool fd_json_is_null(const struct fd_json *c, const char *key) { return json_is_null(json_object_get(c->json, key)); }

#define WRONG(c, ...) ((c)->st == FD_OK ? (void)((c)->st = FD_FAIL(FD_ERR_FORMAT, __VA_ARGS__)) : (void)0)

int64_t fd_json_int(struct fd_json *c, const char *key, int64_t otherwise, int64_t low, int64_t high) {
  const json_t *v = get(c, key);
  if (!v) {
    if (otherwise == FD_JSON_REQUIRED) WRONG(c, "config.json: %s%s is missing", c->where, key);
    return otherwise == FD_JSON_REQUIRED ? low : otherwise;
  }
  int64_t n = json_integer_value(v);
  if (json_is_real(v) && json_real_value(v) == floor(json_real_value(v))) n = (int64_t)json_real_value(v);
  else if (!json_is_integer(v)) n = low - 1;
  if (n < low || n > high) {
    if (json_is_number(v))
      WRONG(c, "config.json: %s%s is %g, an integer from %lld to %lld is wanted", c->where, key, json_number_value(v), (long long)low,
            (long long)high);
    else WRONG(c, "config.json: %s%s is no integer", c->where, key);
    return low;
  }
  return n;
}

double fd_json_num(struct fd_json *c, const char *key, double otherwise) {
  const json_t *v = get(c, key);
  if (!v) {
    if (isnan(otherwise)) WRONG(c, "config.json: %s%s is missing", c->where, key);
    return otherwise;
  }
  if (!json_is_number(v)) WRONG(c, "config.json: %s%s is no number", c->where, key);
  return json_number_value(v);
}

bool fd_json_bool(struct fd_json *c, const char *key, bool otherwise) {
  const json_t *v = get(c, key);
  if (!v) return otherwise;
  if (!json_is_boolean(v)) WRONG(c, "config.json: %s%s is neither true nor false", c->where, key);
  return json_is_true(v);
}

const char *fd_json_text(struct fd_json *c, const char *key, const char *otherwise) {
  const json_t *v = get(c, key);
  if (!v) return otherwise;
  if (!json_is_string(v)) {
    WRONG(c, "config.json: %s%s is no text", c->where, key);
    return otherwise;
  }
  return json_string_value(v);
}

int fd_json_choice(struct fd_json *c, const char *key, const char *const *words, int otherwise) {
  const char *word = fd_json_text(c, key, NULL);
  char list[256] = "";
  if (!word) return otherwise;
  for (int i = 0; words[i]; i++) {
    if (strcmp(words[i], word) == 0) return i;
    size_t used = strlen(list);
    snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "", words[i]);
  }
  WRONG(c, "config.json: %s%s is \"%s\", known are: %s", c->where, key, word, list);
  return otherwise;
}

int fd_json_ints(struct fd_json *c, const char *key, int max, int64_t low, int64_t high, int64_t *out) {
  const json_t *v = get(c, key);
  if (!v) return 0;
  if (!json_is_array(v) || json_array_size(v) > (size_t)max) {
    WRONG(c, "config.json: %s%s is no list of at most %d integers", c->where, key, max);
    return 0;
  }
  int n = (int)json_array_size(v);
  for (int i = 0; i < n; i++) {
    const json_t *e = json_array_get(v, (size_t)i);
    out[i] = json_integer_value(e);
    if (!json_is_integer(e) || out[i] < low || out[i] > high)
      WRONG(c, "config.json: %s%s[%d] is no integer from %lld to %lld", c->where, key, i, (long long)low, (long long)high);
  }
  return n;
}

bool fd_json_nums(struct fd_json *c, const char *key, int n, float *out) {
  const json_t *v = get(c, key);
  if (!v) return false;
  if (!json_is_array(v) || json_array_size(v) != (size_t)n) {
    WRONG(c, "config.json: %s%s is no list of %d numbers", c->where, key, n);
    return false;
  }
  for (int i = 0; i < n; i++) {
    const json_t *e = json_array_get(v, (size_t)i);
    if (!json_is_number(e)) WRONG(c, "config.json: %s%s[%d] is no number", c->where, key, i);
    out[i] = (float)json_number_value(e);
  }
  return true;
}

enum fd_act fd_json_activation(struct fd_json *c) {
  static const char *const words[] = {"gelu_pytorch_tanh", "gelu", "silu", "gelu_new", "swish", NULL}; /* the last two: the same, older names */
  static const enum fd_act acts[] = {FD_ACT_GELU_TANH, FD_ACT_GELU_ERF, FD_ACT_SILU, FD_ACT_GELU_TANH, FD_ACT_SILU};
  return acts[fd_json_choice(c, "hidden_activation", words, 0)];
}
