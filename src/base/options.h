// SPDX-License-Identifier: Apache-2.0
// What a run is told: struct fd_options has one field per row of options.def; struct fd_option describes a row.
#ifndef FD_BASE_OPTIONS_H
#define FD_BASE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fd_strings {
  int n;
  const char **at;
};

/* opt->group.key: text is never NULL, null in a file is "". */
struct fd_options {
#define FD_USED NULL
#define FD_UNUSED(reason) reason
#define FD_GROUP(before, group, help) struct {
#define FD_GROUP_END(group) } group;
#define FD_BOOL(group, key, dflt, used, help) bool key;
#define FD_INT(group, key, dflt, lo, hi, unit, used, help) int64_t key;
#define FD_INT0 FD_INT
#define FD_REAL(group, key, dflt, lo, hi, unit, used, help) double key;
#define FD_PAIR(group, key, first, second, lo, hi, unit, used, help) double key[2];
#define FD_TEXT(group, key, dflt, choices, used, help) const char *key;
#define FD_STEP(group, key, dflt, used, help) const char *key;
#define FD_LIST(group, key, used, help) struct fd_strings key;
#include "base/options.def"
#undef FD_GROUP
#undef FD_GROUP_END
#undef FD_BOOL
#undef FD_INT
#undef FD_INT0
#undef FD_REAL
#undef FD_PAIR
#undef FD_TEXT
#undef FD_STEP
#undef FD_LIST
};

enum fd_option_type {
  FD_OPTION_BOOL,
  FD_OPTION_INT,
  FD_OPTION_REAL,
  FD_OPTION_PAIR,
  FD_OPTION_TEXT,
  FD_OPTION_STEP,
  FD_OPTION_LIST,
  FD_OPTION_GROUP,    /* opens a group: key is its path */
  FD_OPTION_GROUP_END
};

struct fd_option {
  enum fd_option_type type;
  const char *key;     /* full path, "model.base_config_override.head_dim" */
  const char *unit;    /* "" if none */
  const char *choices; /* text: "" or "a|b|c" */
  const char *unused;  /* NULL, or why the key changes nothing */
  const char *help;
  size_t offset;       /* of the field in struct fd_options */
  bool nullable;       /* int: "" reads as 0 */
  int64_t int_default, int_lo, int_hi;
  double real_default[2], real_lo, real_hi;
  const char *text_default;
};

/** The rows of options.def in order, groups' beginnings and ends among them. */
extern const struct fd_option fd_option_table[];
extern const int fd_option_count;

/** Row of a full key, or NULL. Groups are found by their path. */
const struct fd_option *fd_option_find(const char *key);
/** The known key nearest to `key` by edit distance (its last part weighs most), or NULL if none is near. */
const char *fd_option_nearest(const char *key);

/** Edits (insert, delete, change, swap of neighbours) that turn a into b; only the first 64 characters count. */
int fd_edit_distance(const char *a, const char *b);

/** Every field at its default. Strings are static. */
void fd_options_defaults(struct fd_options *opt);

#endif
