// SPDX-License-Identifier: Apache-2.0
// Kind tokenizer: ids and masks of strings, with instructions and chat turns, against transformers' GemmaTokenizer.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cmd/verify.h"
#include "io/tokenizer.h"

struct text {
  const char *at;
  size_t bytes;
};

static void compare_ids(struct fd_verify *v, const char *record, const int64_t *x, const struct fd_h5_array *ref) {
  const int64_t *r = ref->data;
  int64_t wrong = 0, first = -1;
  for (int64_t i = 0; i < ref->numel; i++)
    if (x[i] != r[i]) {
      if (first < 0) first = i;
      wrong++;
    }
  if (wrong)
    fd_verify_report(v, record, (double)wrong, 0, false, "%lld of %lld differ, first at %lld: %lld, expected %lld", (long long)wrong,
                     (long long)ref->numel, (long long)first, (long long)x[first], (long long)r[first]);
  else
    fd_verify_report(v, record, 0, 0, true, "equal");
}

static fd_status verify_full(struct fd_verify *v, const fd_tokenizer *t, const struct text *texts, int64_t n) {
  fd_status st = FD_OK;
  struct fd_h5_array ids = {0}, offsets = {0};
  int64_t *got = NULL, *first = NULL;
  int32_t *one = NULL;
  FD_TRY(fd_verify_read(v, "output/full/input_ids", FD_I64, &ids));
  FD_TRY(fd_verify_read(v, "output/full/offsets", FD_I64, &offsets));
  if (offsets.numel != n + 1) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: output/full/offsets: %lld values", v->dir, (long long)offsets.numel));
  got = calloc((size_t)ids.numel + 1, sizeof *got);
  first = calloc((size_t)n + 1, sizeof *first);
  one = calloc((size_t)ids.numel + 1, sizeof *one);
  if (!got || !first || !one) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
  for (int64_t i = 0; i < n; i++) {
    const int64_t count = fd_tokenizer_encode(t, texts[i].at, texts[i].bytes, true, one, ids.numel);
    first[i + 1] = first[i] + count;
    for (int64_t k = 0; k < count && k < ids.numel && first[i] + k < ids.numel; k++) got[first[i] + k] = one[k];
  }
  compare_ids(v, "output/full/offsets", first, &offsets);
  compare_ids(v, "output/full/input_ids", got, &ids);
done:
  fd_h5_array_free(&ids);
  fd_h5_array_free(&offsets);
  free(got);
  free(first);
  free(one);
  return st;
}

static fd_status verify_run(struct fd_verify *v, const fd_tokenizer *t, const json_t *run, const struct text *texts, int64_t n_texts) {
  fd_status st = FD_OK;
  struct fd_h5_array ids = {0}, mask = {0};
  fd_prompt *prompt = NULL;
  struct text *chosen = NULL;
  int64_t *got_ids = NULL, *got_mask = NULL, n = 0;
  int32_t *row = NULL;
  char record[256];
  const char *name = json_string_value(json_object_get(run, "name"));
  const json_t *strings = json_object_get(run, "strings");
  const int64_t length = json_integer_value(json_object_get(run, "length"));
  if (!name || !strings || length < 1) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/strings.json: a run needs name, strings, length", v->dir));

  const size_t most = json_is_array(strings) ? json_array_size(strings) : (size_t)n_texts;
  chosen = calloc(most + 1, sizeof *chosen);
  if (!chosen) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
  if (json_is_array(strings)) {
    for (size_t i = 0; i < most; i++) {
      const json_t *s = json_array_get(strings, i);
      chosen[n++] = (struct text){json_string_value(s), json_string_length(s)};
    }
  } else {
    const bool fifth = strcmp(json_string_value(strings), "every fifth") == 0;
    for (int64_t i = 0; i < n_texts; i += fifth ? 5 : 1) chosen[n++] = texts[i];
  }

  const json_t *most_tokens = json_object_get(run, "max_prompt_length");
  const char *instruction = json_string_value(json_object_get(run, "instruction"));
  const struct fd_prompt_config config = {
      .instruction = instruction ? instruction : "",
      .max_prompt_length = most_tokens ? json_integer_value(most_tokens) : length,
      .apply_chat_template = json_is_true(json_object_get(run, "apply_chat_template")),
      .add_generation_prompt = json_is_true(json_object_get(run, "add_generation_prompt")),
  };
  FD_TRY(fd_prompt_create(t, &config, &prompt));
  snprintf(record, sizeof record, "%s/length", name);
  fd_verify_report(v, record, fabs((double)(fd_prompt_length(prompt) - length)), 0, fd_prompt_length(prompt) == length,
                   "length %lld, expected %lld", (long long)fd_prompt_length(prompt), (long long)length);
  if (fd_prompt_length(prompt) != length) goto done;

  got_ids = calloc((size_t)(n * length) + 1, sizeof *got_ids);
  got_mask = calloc((size_t)(n * length) + 1, sizeof *got_mask);
  row = calloc((size_t)length + 1, sizeof *row);
  if (!got_ids || !got_mask || !row) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
  for (int64_t i = 0; i < n; i++) {
    const int64_t count = fd_prompt_encode(prompt, chosen[i].at, chosen[i].bytes, row);
    const int64_t start = fd_tokenizer_pads_left(t) ? length - count : 0;
    for (int64_t k = 0; k < length; k++) {
      const bool real = k >= start && k < start + count;
      got_ids[i * length + k] = real ? row[k - start] : fd_tokenizer_pad_id(t);
      got_mask[i * length + k] = real;
    }
  }
  snprintf(record, sizeof record, "output/%s/input_ids", name);
  FD_TRY(fd_verify_read(v, record, FD_I64, &ids));
  if (ids.numel != n * length) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s: %lld values for %lld strings", v->dir, record, (long long)ids.numel, (long long)n));
  compare_ids(v, record, got_ids, &ids);
  snprintf(record, sizeof record, "output/%s/attention_mask", name);
  FD_TRY(fd_verify_read(v, record, FD_I64, &mask));
  if (mask.numel != n * length) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s: %lld values for %lld strings", v->dir, record, (long long)mask.numel, (long long)n));
  compare_ids(v, record, got_mask, &mask);
done:
  fd_h5_array_free(&ids);
  fd_h5_array_free(&mask);
  fd_prompt_destroy(&prompt);
  free(chosen);
  free(got_ids);
  free(got_mask);
  free(row);
  return st;
}

/* Decodes in place of `out`, which has room for 3/4 of the text. */
static size_t from_base64(const char *text, uint8_t *out) {
  static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  uint32_t word = 0;
  int bits = 0;
  size_t n = 0;
  for (; *text && *text != '='; text++) {
    const char *at = strchr(digits, *text);
    if (!at) continue;
    word = word << 6 | (uint32_t)(at - digits);
    bits += 6;
    if (bits >= 8) out[n++] = (uint8_t)(word >> (bits -= 8));
  }
  return n;
}

static fd_status verify_invalid(struct fd_verify *v) {
  fd_status st = FD_OK;
  uint8_t *bytes = NULL;
  const char *path = fd_verify_path(v, "invalid_utf8.json");
  json_t *file = json_load_file(path, 0, NULL), *value;
  size_t i;
  if (!file) return FD_OK; /* a case without such captions */
  json_array_foreach(json_object_get(file, "bytes"), i, value) {
    char record[64];
    const char *text = json_string_value(value);
    if (!text) continue;
    free(bytes);
    bytes = malloc(strlen(text) + 1);
    if (!bytes) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
    const bool valid = fd_utf8_valid(bytes, from_base64(text, bytes));
    snprintf(record, sizeof record, "invalid_utf8/%zu", i);
    fd_verify_report(v, record, valid, 0, !valid, "%s was taken for UTF-8", text);
  }
done:
  free(bytes);
  json_decref(file);
  return st;
}

fd_status fd_verify_tokenizer(struct fd_verify *v) {
  fd_status st = FD_OK;
  fd_tokenizer *t = NULL;
  json_t *strings = NULL, *run;
  struct fd_h5_array bytes = {0}, offsets = {0};
  struct text *texts = NULL;
  size_t i;
  json_error_t error;
  FD_TRY(fd_tokenizer_open(v->dir, &t));
  strings = json_load_file(fd_verify_path(v, "strings.json"), JSON_ALLOW_NUL, &error);
  if (!strings) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/strings.json: line %d: %s", v->dir, error.line, error.text));
  FD_TRY(fd_verify_read(v, "input/text", FD_U8, &bytes));
  FD_TRY(fd_verify_read(v, "input/offsets", FD_I64, &offsets));
  const int64_t n = offsets.numel - 1;
  const int64_t *at = offsets.data;
  texts = calloc((size_t)n + 1, sizeof *texts);
  if (!texts) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
  int64_t invalid = 0;
  for (int64_t k = 0; k < n; k++) {
    if (at[k] < 0 || at[k + 1] < at[k] || at[k + 1] > bytes.numel)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: input/offsets[%lld] = %lld", v->dir, (long long)k, (long long)at[k]));
    texts[k] = (struct text){(const char *)bytes.data + at[k], (size_t)(at[k + 1] - at[k])};
    invalid += !fd_utf8_valid(texts[k].at, texts[k].bytes);
  }
  fd_verify_report(v, "valid_utf8", (double)invalid, 0, invalid == 0, "%lld strings were not taken for UTF-8", (long long)invalid);
  const char *side = json_string_value(json_object_get(strings, "padding_side"));
  if (side)
    fd_verify_report(v, "padding_side", 0, 0, fd_tokenizer_pads_left(t) == (strcmp(side, "left") == 0), "pads %s, expected %s",
                     fd_tokenizer_pads_left(t) ? "left" : "right", side);
  FD_TRY(verify_full(v, t, texts, n));
  json_array_foreach(json_object_get(strings, "runs"), i, run) FD_TRY(verify_run(v, t, run, texts, n));
  FD_TRY(verify_invalid(v));
done:
  fd_tokenizer_destroy(&t);
  json_decref(strings);
  fd_h5_array_free(&bytes);
  fd_h5_array_free(&offsets);
  free(texts);
  return st;
}
