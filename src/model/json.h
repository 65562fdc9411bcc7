// SPDX-License-Identifier: Apache-2.0
// Reading a model's config.json: values with a default, checked, with messages that name the key.
#ifndef FD_MODEL_JSON_H
#define FD_MODEL_JSON_H

#include <jansson.h>
#include <stdbool.h>

#include "op/ops.h"

/** A JSON object and the first thing wrong with it. A key that is absent or null takes the default; FD_JSON_REQUIRED has none. */
struct fd_json {
  const json_t *json;
  const char *where; /* prefix of messages, e.g. "base_config." */
  fd_status st;
};
#define FD_JSON_REQUIRED INT64_MIN

bool fd_json_has(const struct fd_json *c, const char *key);
/** The key is there and says null, where that means something else than its absence. */
bool fd_json_is_null(const struct fd_json *c, const char *key);
int64_t fd_json_int(struct fd_json *c, const char *key, int64_t otherwise, int64_t low, int64_t high);
double fd_json_num(struct fd_json *c, const char *key, double otherwise);
bool fd_json_bool(struct fd_json *c, const char *key, bool otherwise);
/** `otherwise` may be NULL. */
const char *fd_json_text(struct fd_json *c, const char *key, const char *otherwise);
/** Index in a NULL-ended list of allowed words; `otherwise` if absent. */
int fd_json_choice(struct fd_json *c, const char *key, const char *const *words, int otherwise);
/** Array of integers in [low, high]; their number, at most max; 0 if absent. */
int fd_json_ints(struct fd_json *c, const char *key, int max, int64_t low, int64_t high, int64_t *out);
/** Array of exactly n numbers; false if absent. */
bool fd_json_nums(struct fd_json *c, const char *key, int n, float *out);
/** hidden_activation as Gemma means it: null is gelu_pytorch_tanh, hidden_act is never read. */
enum fd_act fd_json_activation(struct fd_json *c);

#endif
