// SPDX-License-Identifier: Apache-2.0
// The option table made from options.def, defaults, and looking keys up.
#include "base/options.h"

#include <string.h>

#define FIELD(group, key) offsetof(struct fd_options, group.key)
#define PATH(group, key) #group "." #key

const struct fd_option fd_option_table[] = {
#define FD_GROUP(before, group, h) {.type = FD_OPTION_GROUP, .key = before #group, .unit = "", .choices = "", .help = h},
#define FD_GROUP_END(group) {.type = FD_OPTION_GROUP_END, .key = #group, .unit = "", .choices = ""},
#define FD_BOOL(group, key_, dflt, used, h) \
  {.type = FD_OPTION_BOOL, .key = PATH(group, key_), .unit = "", .choices = "", .unused = used, .help = h, .offset = FIELD(group, key_), .int_default = dflt},
#define INT_ROW(group, key_, dflt, lo, hi, unit_, used, h, null_)                                                                                             \
  {.type = FD_OPTION_INT, .key = PATH(group, key_), .unit = unit_, .choices = "", .unused = used, .help = h, .offset = FIELD(group, key_), .nullable = null_, \
   .int_default = dflt, .int_lo = lo, .int_hi = hi},
#define FD_INT(group, key_, dflt, lo, hi, unit_, used, h) INT_ROW(group, key_, dflt, lo, hi, unit_, used, h, false)
#define FD_INT0(group, key_, dflt, lo, hi, unit_, used, h) INT_ROW(group, key_, dflt, lo, hi, unit_, used, h, true)
#define FD_PAIR(group, key_, first, second, lo, hi, unit_, used, h)                                                                          \
  {.type = FD_OPTION_PAIR, .key = PATH(group, key_), .unit = unit_, .choices = "", .unused = used, .help = h, .offset = FIELD(group, key_), \
   .real_default = {first, second}, .real_lo = lo, .real_hi = hi},
#define FD_REAL(group, key_, dflt, lo, hi, unit_, used, h)                                                                                   \
  {.type = FD_OPTION_REAL, .key = PATH(group, key_), .unit = unit_, .choices = "", .unused = used, .help = h, .offset = FIELD(group, key_), \
   .real_default = {dflt}, .real_lo = lo, .real_hi = hi},
#define FD_TEXT(group, key_, dflt, choices_, used, h)                                                                                        \
  {.type = FD_OPTION_TEXT, .key = PATH(group, key_), .unit = "", .choices = choices_, .unused = used, .help = h, .offset = FIELD(group, key_), \
   .text_default = dflt},
#define FD_STEP(group, key_, dflt, used, h)                                                                                            \
  {.type = FD_OPTION_STEP, .key = PATH(group, key_), .unit = "", .choices = "", .unused = used, .help = h, .offset = FIELD(group, key_), \
   .text_default = dflt},
#define FD_LIST(group, key_, used, h) \
  {.type = FD_OPTION_LIST, .key = PATH(group, key_), .unit = "", .choices = "", .unused = used, .help = h, .offset = FIELD(group, key_)},
#include "base/options.def"
};

const int fd_option_count = sizeof fd_option_table / sizeof fd_option_table[0];

void fd_options_defaults(struct fd_options *opt) {
  memset(opt, 0, sizeof *opt);
  for (int i = 0; i < fd_option_count; i++) {
    const struct fd_option *o = &fd_option_table[i];
    void *field = (char *)opt + o->offset;
    switch (o->type) {
      case FD_OPTION_BOOL: *(bool *)field = o->int_default != 0; break;
      case FD_OPTION_INT: *(int64_t *)field = o->int_default; break;
      case FD_OPTION_PAIR: memcpy(field, o->real_default, sizeof o->real_default); break;
      case FD_OPTION_REAL: *(double *)field = o->real_default[0]; break;
      case FD_OPTION_TEXT:
      case FD_OPTION_STEP: *(const char **)field = o->text_default; break;
      case FD_OPTION_LIST:
      case FD_OPTION_GROUP:
      case FD_OPTION_GROUP_END: break; /* a list is empty */
    }
  }
}

const struct fd_option *fd_option_find(const char *key) {
  for (int i = 0; i < fd_option_count; i++)
    if (fd_option_table[i].type != FD_OPTION_GROUP_END && !strcmp(fd_option_table[i].key, key)) return &fd_option_table[i];
  return NULL;
}

int fd_edit_distance(const char *a, const char *b) {
  enum { MOST = 64 };
  int na = (int)strnlen(a, MOST), nb = (int)strnlen(b, MOST);
  int d[MOST + 1][MOST + 1];
  for (int i = 0; i <= na; i++) d[i][0] = i;
  for (int j = 0; j <= nb; j++) d[0][j] = j;
  for (int i = 1; i <= na; i++)
    for (int j = 1; j <= nb; j++) {
      int best = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
      if (d[i - 1][j] + 1 < best) best = d[i - 1][j] + 1;
      if (d[i][j - 1] + 1 < best) best = d[i][j - 1] + 1;
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && d[i - 2][j - 2] + 1 < best) best = d[i - 2][j - 2] + 1;
      d[i][j] = best;
    }
  return d[na][nb];
}

static const char *last_part(const char *key) {
  const char *dot = strrchr(key, '.');
  return dot ? dot + 1 : key;
}

const char *fd_option_nearest(const char *key) {
  const char *best = NULL;
  int best_cost = INT32_MAX;
  for (int i = 0; i < fd_option_count; i++) {
    const struct fd_option *o = &fd_option_table[i];
    if (o->type == FD_OPTION_GROUP_END) continue;
    int last = fd_edit_distance(last_part(key), last_part(o->key));
    int allowed = 1 + (int)strlen(last_part(key)) / 3;
    if (last > allowed) continue;
    /* the right name in the wrong group comes before a similar name in the right one */
    int cost = 4 * last + fd_edit_distance(key, o->key);
    if (cost < best_cost) best = o->key, best_cost = cost;
  }
  return best;
}
