// SPDX-License-Identifier: Apache-2.0
// Patterns of data.data_path: "::" joins lists, {a,b} and {000..999} (also {0..9..3}, {a..e}) expand as in a shell, nested too.
#include <ctype.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/dataset.h"

enum { MOST_PATHS = 10000000 };

struct strings {
  char **at; /* each owned */
  int64_t n, capacity;
};

static void strings_free(struct strings *s) {
  for (int64_t i = 0; i < s->n; i++) free(s->at[i]);
  free(s->at);
  *s = (struct strings){0};
}

/* takes ownership of `text`, also on failure */
static fd_status strings_take(struct strings *s, char *text) {
  if (text && s->n == s->capacity) {
    const int64_t capacity = s->capacity * 2 + 64;
    char **at = realloc(s->at, (size_t)capacity * sizeof *at);
    if (at) s->at = at, s->capacity = capacity;
  }
  if (!text || s->n == s->capacity) {
    free(text);
    return FD_FAIL(FD_ERR_NOMEM, "data.data_path: no memory for %lld paths", (long long)s->n);
  }
  if (s->n >= MOST_PATHS) {
    free(text);
    return FD_FAIL(FD_ERR_CONFIG, "data.data_path: a pattern gives more than %d paths", MOST_PATHS);
  }
  s->at[s->n++] = text;
  return FD_OK;
}

static char *joined(const char *a, size_t na, const char *b, size_t nb, const char *c, size_t nc) {
  char *s = malloc(na + nb + nc + 1);
  if (!s) return NULL;
  memcpy(s, a, na);
  memcpy(s + na, b, nb);
  memcpy(s + na + nb, c, nc);
  s[na + nb + nc] = 0;
  return s;
}

/* "a..b" or "a..b..step" of n bytes: integers, or single letters */
static bool parse_range(const char *p, size_t n, long long *from, long long *to, long long *step, int *width, bool *letters) {
  char text[64];
  if (n < 4 || n >= sizeof text) return false;
  memcpy(text, p, n);
  text[n] = 0;
  char *second = strstr(text, "..");
  if (!second || second == text) return false;
  *second = 0;
  second += 2;
  char *third = strstr(second, "..");
  if (third) *third = 0, third += 2;
  *step = 1;
  char *end;
  if (third && (*step = strtoll(third, &end, 10), *end || end == third || *step == 0)) return false;
  if (*step < 0) *step = -*step;
  *letters = isalpha((unsigned char)text[0]) && !text[1] && isalpha((unsigned char)second[0]) && !second[1];
  *width = 0;
  if (*letters) {
    *from = text[0], *to = second[0];
    return true;
  }
  *from = strtoll(text, &end, 10);
  if (*end || end == text || isspace((unsigned char)text[0])) return false;
  *to = strtoll(second, &end, 10);
  if (*end || end == second || isspace((unsigned char)second[0])) return false;
  const bool zeros = (text[text[0] == '-'] == '0' && text[1 + (text[0] == '-')]) || (second[second[0] == '-'] == '0' && second[1 + (second[0] == '-')]);
  if (zeros) *width = (int)(strlen(text) > strlen(second) ? strlen(text) : strlen(second));
  return true;
}

/* Expand the first brace of `text` and the rest by recursion. */
static fd_status expand(const char *text, const char *whole, int depth, struct strings *out) {
  fd_status st = FD_OK;
  if (depth > 64) return FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\" has too many braces", whole);
  const size_t n = strlen(text);
  size_t open = strcspn(text, "{"), close = open;
  if (text[open] == 0) {
    if (strchr(text, '}')) return FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\" has a } without {", whole);
    return strings_take(out, strdup(text));
  }
  int level = 0, commas = 0;
  for (; close < n; close++) {
    if (text[close] == '{') level++;
    if (text[close] == '}' && --level == 0) break;
    if (text[close] == ',' && level == 1) commas++;
  }
  if (close == n) return FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\" has a { without }", whole);
  const char *inside = text + open + 1, *after = text + close + 1;
  const size_t inside_bytes = close - open - 1;
  if (commas) {
    size_t start = 0;
    level = 0;
    for (size_t i = 0; i <= inside_bytes; i++) {
      if (i < inside_bytes && inside[i] == '{') level++;
      if (i < inside_bytes && inside[i] == '}') level--;
      if (i < inside_bytes && (inside[i] != ',' || level)) continue;
      char *one = joined(text, open, inside + start, i - start, after, strlen(after));
      st = one ? expand(one, whole, depth + 1, out) : FD_FAIL(FD_ERR_NOMEM, "data.data_path: no memory");
      free(one);
      if (st != FD_OK) return st;
      start = i + 1;
    }
    return FD_OK;
  }
  long long from, to, step;
  int width;
  bool letters;
  if (!parse_range(inside, inside_bytes, &from, &to, &step, &width, &letters))
    return FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\": {%.*s} is neither a range such as {000..999} nor a list such as {a,b}", whole,
                   (int)inside_bytes, inside);
  if ((from < to ? to - from : from - to) / step >= MOST_PATHS)
    return FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\" gives more than %d paths", whole, MOST_PATHS);
  for (long long v = from; from <= to ? v <= to : v >= to; v += from <= to ? step : -step) {
    char word[64];
    const int bytes = letters ? snprintf(word, sizeof word, "%c", (char)v) : snprintf(word, sizeof word, "%0*lld", width, v);
    char *one = joined(text, open, word, (size_t)bytes, after, strlen(after));
    st = one ? expand(one, whole, depth + 1, out) : FD_FAIL(FD_ERR_NOMEM, "data.data_path: no memory");
    free(one);
    if (st != FD_OK) return st;
  }
  return FD_OK;
}

static fd_status refuse_remote(const char *path) {
  static const char *const remote[] = {"http:", "https:", "s3:", "gs:", "hf:", "ftp:"};
  if (strncmp(path, "pipe:", 5) == 0)
    return FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\": commands (pipe:) are not run; samples are read at offsets, so the tars must be files", path);
  for (size_t i = 0; i < sizeof remote / sizeof *remote; i++)
    if (strncmp(path, remote[i], strlen(remote[i])) == 0)
      return FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\": %s is not supported; download the tars and give their paths", path, remote[i]);
  return FD_OK;
}

fd_status fd_paths_expand(const char *const *paths, int n_paths, char ***list, int64_t *n) {
  fd_status st = FD_OK;
  struct strings all = {0};
  char *part = NULL, **flat = NULL;
  for (int i = 0; i < n_paths; i++) {
    const char *from = paths[i];
    for (;;) {
      const char *joint = strstr(from, "::");
      const size_t bytes = joint ? (size_t)(joint - from) : strlen(from);
      free(part);
      part = strndup(from, bytes);
      if (!part) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "data.data_path: no memory"));
      if (!*part) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "data.data_path: \"%s\" holds an empty path", paths[i]));
      FD_TRY(refuse_remote(part));
      FD_TRY(expand(part, part, 0, &all));
      if (!joint) break;
      from = joint + 2;
    }
  }
  size_t bytes = (size_t)all.n * sizeof *flat + 1;
  for (int64_t i = 0; i < all.n; i++) bytes += strlen(all.at[i]) + 1;
  flat = malloc(bytes);
  if (!flat) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "data.data_path: no memory for %lld paths", (long long)all.n));
  char *text = (char *)(flat + all.n);
  for (int64_t i = 0; i < all.n; i++) {
    flat[i] = text;
    text = stpcpy(text, all.at[i]) + 1;
  }
  *list = flat;
  *n = all.n;
done:
  free(part);
  strings_free(&all);
  return st;
}
