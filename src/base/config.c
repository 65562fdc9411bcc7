// SPDX-License-Identifier: Apache-2.0
// Reading, checking and writing configurations (libconfig).
//
// Invariants: each value is checked against its row of options.def where it is read, so a struct fd_options is always
// valid row by row; integers that libconfig would cut to 32 bits are found in the text before libconfig sees it.
#include "base/config.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <libconfig.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "base/models.h"

enum { MAX_LAYERS = 16, MAX_INCLUDES = 16 };

struct fd_config {
  struct fd_options opt;
  char **where;    /* [fd_option_count] NULL: default; owned */
  char *shift_from; /* NULL, or whence the values of noise_scheduler came that were left open */
  void **owned;    /* strings and lists that opt points to */
  int n_owned;
};

/* ---- memory -------------------------------------------------------------------------------------------------------- */

/* Hand a block to the config; NULL if memory is out (the block is freed). */
static void *own(fd_config *c, void *block) {
  if (!block) return NULL;
  void **more = realloc(c->owned, sizeof *more * (size_t)(c->n_owned + 1));
  if (!more) {
    free(block);
    return NULL;
  }
  c->owned = more;
  c->owned[c->n_owned++] = block;
  return block;
}

fd_status fd_config_create(fd_config **out) {
  fd_config *c = calloc(1, sizeof *c);
  if (!c) return FD_FAIL(FD_ERR_NOMEM, "no memory for the configuration");
  c->where = calloc((size_t)fd_option_count, sizeof *c->where);
  if (!c->where) {
    free(c);
    return FD_FAIL(FD_ERR_NOMEM, "no memory for the configuration");
  }
  fd_options_defaults(&c->opt);
  *out = c;
  return FD_OK;
}

void fd_config_destroy(fd_config **config) {
  fd_config *c = config ? *config : NULL;
  if (!c) return;
  for (int i = 0; i < c->n_owned; i++) free(c->owned[i]);
  for (int i = 0; i < fd_option_count; i++) free(c->where[i]);
  free(c->owned);
  free(c->where);
  free(c->shift_from);
  free(c);
  *config = NULL;
}

const struct fd_options *fd_config_options(const fd_config *config) { return &config->opt; }

static int row_of(const char *key) {
  const struct fd_option *o = fd_option_find(key);
  return o && o->type != FD_OPTION_GROUP ? (int)(o - fd_option_table) : -1;
}

bool fd_config_is_set(const fd_config *config, const char *key) {
  int i = row_of(key);
  return i >= 0 && config->where[i] != NULL;
}

const char *fd_config_where(const fd_config *config, const char *key) {
  int i = row_of(key);
  return i >= 0 && config->where[i] ? config->where[i] : "default";
}

/* ---- one value into one field -------------------------------------------------------------------------------------- */

/* A value as it was written, before it is checked. */
struct value {
  enum { IS_NONE, IS_BOOL, IS_INT, IS_REAL, IS_TEXT, IS_LIST } kind;
  int64_t i;
  double r;
  const char *text;
  const struct value *items; /* IS_LIST */
  int n;
};

static void append(char *to, size_t bytes, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void append(char *to, size_t bytes, const char *format, ...) {
  size_t n = strlen(to);
  va_list args;
  va_start(args, format);
  if (n < bytes) vsnprintf(to + n, bytes - n, format, args);
  va_end(args);
}

/* Shortest of the usual lengths that reads back to the same bits, and that libconfig takes for a float. */
static const char *real_text(double r, char out[40]) {
  for (int digits = 6; digits <= 17; digits++) {
    snprintf(out, 40, "%.*g", digits, r);
    if (strtod(out, NULL) == r) break;
  }
  if (!strpbrk(out, ".en")) strcat(out, ".0");
  return out;
}

static void show_value(const struct value *v, char *out, size_t bytes) {
  char number[40];
  switch (v->kind) {
    case IS_BOOL: append(out, bytes, "%s", v->i ? "true" : "false"); break;
    case IS_INT: append(out, bytes, "%" PRId64, v->i); break;
    case IS_REAL: append(out, bytes, "%s", real_text(v->r, number)); break;
    case IS_TEXT: append(out, bytes, strlen(v->text) > 80 ? "\"%.80s...\"" : "\"%s\"", v->text); break;
    case IS_LIST:
      append(out, bytes, "(");
      for (int i = 0; i < v->n && i < 4; i++) {
        if (i) append(out, bytes, ", ");
        show_value(&v->items[i], out, bytes);
      }
      append(out, bytes, v->n > 4 ? ", ...)" : ")");
      break;
    case IS_NONE: append(out, bytes, "{ ... }"); break;
  }
}

static const char *kind_name(const struct value *v) {
  static const char *const names[] = {"a group", "a boolean", "an integer", "a float", "a string", "a list"};
  return names[v->kind];
}

static void show_wanted(const struct fd_option *o, char *out, size_t bytes) {
  char lo[40], hi[40];
  const char *unit = *o->unit ? " " : "";
  switch (o->type) {
    case FD_OPTION_BOOL: append(out, bytes, "true or false"); break;
    case FD_OPTION_INT:
      append(out, bytes, "an integer");
      if (o->int_hi == INT64_MAX)
        append(out, bytes, " of at least %" PRId64, o->int_lo);
      else
        append(out, bytes, " from %" PRId64 " to %" PRId64, o->int_lo, o->int_hi);
      append(out, bytes, "%s%s%s", unit, o->unit, o->nullable ? ", or \"\"" : "");
      break;
    case FD_OPTION_REAL:
    case FD_OPTION_PAIR:
      append(out, bytes, "%s from %s to %s%s%s", o->type == FD_OPTION_PAIR ? "two numbers, each" : "a number",
             real_text(o->real_lo, lo), real_text(o->real_hi, hi), unit, o->unit);
      break;
    case FD_OPTION_TEXT:
      if (!*o->choices) {
        append(out, bytes, "a string");
        break;
      }
      append(out, bytes, "one of");
      for (const char *c = o->choices, *end; c; c = end ? end + 1 : NULL) {
        end = strchr(c, '|');
        append(out, bytes, "%s \"%.*s\"", c == o->choices ? "" : ",", end ? (int)(end - c) : (int)strlen(c), c);
      }
      break;
    case FD_OPTION_STEP: append(out, bytes, "\"latest\", a step or \"\""); break;
    case FD_OPTION_LIST: append(out, bytes, "a string or a list of strings"); break;
    case FD_OPTION_GROUP: append(out, bytes, "a group { ... }"); break;
    case FD_OPTION_GROUP_END: break;
  }
}

static bool among(const char *choices, const char *text) {
  size_t n = strlen(text);
  for (const char *c = choices;;) {
    const char *end = strchr(c, '|');
    size_t m = end ? (size_t)(end - c) : strlen(c);
    if (m == n && !memcmp(c, text, n)) return true;
    if (!end) return false;
    c = end + 1;
  }
}

static fd_status bad_value(const struct fd_option *o, const struct value *v, const char *where, const char *fault) {
  char shown[512] = "", wanted[512] = "";
  show_value(v, shown, sizeof shown);
  show_wanted(o, wanted, sizeof wanted);
  return FD_FAIL(FD_ERR_CONFIG, "%s: %s = %s %s; wanted %s", where, o->key, shown, fault, wanted);
}

static fd_status wrong_type(const struct fd_option *o, const struct value *v, const char *where) {
  char fault[64];
  snprintf(fault, sizeof fault, "is %s", kind_name(v));
  return bad_value(o, v, where, fault);
}

static fd_status no_memory(void) { return FD_FAIL(FD_ERR_NOMEM, "no memory for the configuration"); }

/* Check v against row o and store it. */
static fd_status assign(fd_config *c, const struct fd_option *o, const struct value *v, const char *where) {
  void *field = (char *)&c->opt + o->offset;
  bool null = v->kind == IS_TEXT && !*v->text;
  switch (o->type) {
    case FD_OPTION_BOOL:
      if (v->kind != IS_BOOL) return wrong_type(o, v, where);
      *(bool *)field = v->i != 0;
      break;
    case FD_OPTION_INT:
      if (null && o->nullable) {
        *(int64_t *)field = 0;
        break;
      }
      if (v->kind != IS_INT) return wrong_type(o, v, where);
      if (v->i < o->int_lo || v->i > o->int_hi) return bad_value(o, v, where, "is out of range");
      *(int64_t *)field = v->i;
      break;
    case FD_OPTION_REAL: {
      if (v->kind != IS_REAL && v->kind != IS_INT) return wrong_type(o, v, where);
      double r = v->kind == IS_INT ? (double)v->i : v->r;
      if (!(r >= o->real_lo && r <= o->real_hi)) return bad_value(o, v, where, "is out of range");
      *(double *)field = r;
      break;
    }
    case FD_OPTION_PAIR: {
      if (v->kind != IS_LIST || v->n != 2) return wrong_type(o, v, where);
      double r[2];
      for (int i = 0; i < 2; i++) {
        const struct value *e = &v->items[i];
        if (e->kind != IS_REAL && e->kind != IS_INT) return wrong_type(o, v, where);
        r[i] = e->kind == IS_INT ? (double)e->i : e->r;
        if (!(r[i] >= o->real_lo && r[i] <= o->real_hi)) return bad_value(o, v, where, "is out of range");
      }
      memcpy(field, r, sizeof r);
      break;
    }
    case FD_OPTION_STEP:
    case FD_OPTION_TEXT: {
      char number[32];
      const char *text = v->text;
      if (o->type == FD_OPTION_STEP && v->kind == IS_INT && v->i >= 0) {
        snprintf(number, sizeof number, "%" PRId64, v->i);
        text = number;
      } else if (v->kind != IS_TEXT) {
        return wrong_type(o, v, where);
      }
      if (o->type == FD_OPTION_STEP && *text && strcmp(text, "latest") && strspn(text, "0123456789") != strlen(text))
        return bad_value(o, v, where, "is no step");
      if (*o->choices && !among(o->choices, text)) return bad_value(o, v, where, "is not known");
      char *copy = own(c, strdup(text));
      if (!copy) return no_memory();
      *(const char **)field = copy;
      break;
    }
    case FD_OPTION_LIST: {
      if (v->kind != IS_LIST && v->kind != IS_TEXT) return wrong_type(o, v, where);
      const struct value *items = v->kind == IS_LIST ? v->items : v;
      int n = v->kind == IS_LIST ? v->n : null ? 0 : 1;
      for (int i = 0; i < n; i++)
        if (items[i].kind != IS_TEXT) return wrong_type(o, v, where);
      const char **at = own(c, calloc((size_t)n + 1, sizeof *at));
      if (!at) return no_memory();
      for (int i = 0; i < n; i++)
        if (!(at[i] = own(c, strdup(items[i].text)))) return no_memory();
      *(struct fd_strings *)field = (struct fd_strings){n, at};
      break;
    }
    case FD_OPTION_GROUP:
    case FD_OPTION_GROUP_END: return wrong_type(o, v, where);
  }
  char *copy = strdup(where);
  if (!copy) return no_memory();
  free(c->where[o - fd_option_table]);
  c->where[o - fd_option_table] = copy;
  return FD_OK;
}

static fd_status unknown_key(const char *key, const char *where) {
  const char *near = fd_option_nearest(key);
  if (near) return FD_FAIL(FD_ERR_CONFIG, "%s: unknown key %s; did you mean %s?", where, key, near);
  return FD_FAIL(FD_ERR_CONFIG, "%s: unknown key %s; doc/options.md and fdhpc train --help list all keys", where, key);
}

/* ---- what libconfig would pass over in silence ---------------------------------------------------------------------- */

static fd_status read_all(const char *path, char **out) {
  FILE *f = NULL;
  char *text = NULL;
  fd_status st = FD_OK;
  struct stat info;
  if (stat(path, &info) != 0) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: %s", path, strerror(errno)));
  if (!S_ISREG(info.st_mode) && !S_ISFIFO(info.st_mode) && !S_ISCHR(info.st_mode))
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: not a file", path));
  f = fopen(path, "r");
  if (!f) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: %s", path, strerror(errno)));
  size_t n = 0, room = 0;
  for (;;) {
    if (room - n < 2) {
      room = room ? 2 * room : 8192;
      if (room > (64u << 20)) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: larger than 64 MiB, not a configuration", path));
      char *more = realloc(text, room);
      if (!more) FD_TRY(no_memory());
      text = more;
    }
    size_t got = fread(text + n, 1, room - n - 1, f);
    if (got == 0) break;
    n += got;
  }
  if (ferror(f)) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: cannot be read: %s", path, strerror(errno)));
  if (memchr(text, 0, n)) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: not a text file", path));
  text[n] = 0;
  *out = text;
  text = NULL;
done:
  if (f) fclose(f);
  free(text);
  return st;
}

/* "DIR/name" for a name written in a file of DIR; an absolute name stays. The caller frees it. */
static char *beside(const char *file, const char *name) {
  const char *slash = strrchr(file, '/');
  char *out = NULL;
  if (name[0] == '/' || !slash) return strdup(name);
  if (asprintf(&out, "%.*s/%s", (int)(slash - file), file, name) < 0) return NULL;
  return out;
}

static const char *skip_string(const char *p, int *line) {
  for (p++; *p && *p != '"'; p++) {
    if (*p == '\\' && p[1]) p++;
    if (*p == '\n') ++*line;
  }
  return *p ? p + 1 : p;
}

/* Integers outside 32 bits without L, integers outside 64 bits, and words of other languages for "nothing"; in `text`
 * and in every file that it includes. */
static fd_status scan(const char *text, const char *file, const char *include_dir, int depth) {
  int line = 1;
  bool line_start = true;
  if (depth > MAX_INCLUDES) return FD_FAIL(FD_ERR_CONFIG, "%s: @include goes deeper than %d files", file, MAX_INCLUDES);
  for (const char *p = text; *p;) {
    if (*p == '\n') {
      line++, p++, line_start = true;
    } else if (isspace((unsigned char)*p)) {
      p++;
    } else if (*p == '#' || (*p == '/' && p[1] == '/')) {
      while (*p && *p != '\n') p++;
    } else if (*p == '/' && p[1] == '*') {
      for (p += 2; *p && !(*p == '*' && p[1] == '/'); p++)
        if (*p == '\n') line++;
      if (*p) p += 2;
    } else if (line_start && !strncmp(p, "@include", 8) && isspace((unsigned char)p[8])) {
      fd_status st = FD_OK;
      const char *open = strchr(p, '"'), *close = open ? strchr(open + 1, '"') : NULL;
      char *name = NULL, *path = NULL, *inner = NULL;
      if (!close || memchr(p, '\n', (size_t)(close - p))) return FD_OK; /* libconfig names the fault */
      name = strndup(open + 1, (size_t)(close - open - 1));
      /* libconfig looks in the folder of the first file, whichever file includes */
      if (!name || asprintf(&path, "%s%s%s", *name == '/' ? "" : include_dir, *name == '/' ? "" : "/", name) < 0) st = no_memory();
      if (st == FD_OK) st = read_all(path, &inner);
      if (st != FD_OK) {
        char message[1024];
        snprintf(message, sizeof message, "%s", fd_status_message());
        st = FD_FAIL(st, "%s:%d: @include: %s", file, line, message);
      } else {
        st = scan(inner, path, include_dir, depth + 1);
      }
      free(name), free(path), free(inner);
      if (st != FD_OK) return st;
      p = close + 1;
    } else if (*p == '"') {
      p = skip_string(p, &line);
      line_start = false;
    } else if (isalpha((unsigned char)*p) || *p == '_' || *p == '*') {
      const char *begin = p;
      while (isalnum((unsigned char)*p) || *p == '-' || *p == '_' || *p == '*') p++;
      const char *q = p;
      while (isspace((unsigned char)*q)) q++;
      if (*q != '=' && *q != ':' && ((p - begin == 4 && (!strncasecmp(begin, "null", 4) || !strncasecmp(begin, "none", 4)))))
        return FD_FAIL(FD_ERR_CONFIG, "%s:%d: %.4s: write \"\" for nothing", file, line, begin);
      line_start = false;
    } else if (*p == '.' && isdigit((unsigned char)p[1])) {
      for (p++; isdigit((unsigned char)*p);) p++; /* .5: digits that are no integer */
      line_start = false;
    } else if (isdigit((unsigned char)*p) || ((*p == '-' || *p == '+') && isdigit((unsigned char)p[1]))) {
      const char *begin = p;
      bool hex = false;
      if (*p == '-' || *p == '+') p++;
      if (*p == '0' && (p[1] == 'x' || p[1] == 'X')) hex = true, p += 2;
      while (hex ? isxdigit((unsigned char)*p) : isdigit((unsigned char)*p)) p++;
      bool real = !hex && (*p == '.' || *p == 'e' || *p == 'E');
      int length = (int)(p - begin);
      if (real) {
        while (isdigit((unsigned char)*p) || *p == '.' || ((*p == 'e' || *p == 'E')) || ((*p == '-' || *p == '+') && (p[-1] == 'e' || p[-1] == 'E'))) p++;
      } else {
        char number[80];
        snprintf(number, sizeof number, "%.*s", length, begin);
        errno = 0;
        long long value = strtoll(number, NULL, hex ? 16 : 10);
        bool too_long = errno == ERANGE || length >= (int)sizeof number;
        bool marked = *p == 'L' || *p == 'l';
        while (*p == 'L' || *p == 'l') p++;
        if (too_long) return FD_FAIL(FD_ERR_CONFIG, "%s:%d: %s does not fit into 64 bits", file, line, number);
        if (!marked && (value > INT32_MAX || value < INT32_MIN))
          return FD_FAIL(FD_ERR_CONFIG, "%s:%d: %s does not fit into 32 bits; write %sL", file, line, number, number);
      }
      line_start = false;
    } else {
      p++;
      line_start = false;
    }
  }
  return FD_OK;
}

/* ---- files --------------------------------------------------------------------------------------------------------- */

/* The value of a libconfig setting; items are allocated and freed by free_value. */
static fd_status value_of(const config_setting_t *s, struct value *out) {
  memset(out, 0, sizeof *out);
  switch (config_setting_type(s)) {
    case CONFIG_TYPE_BOOL: *out = (struct value){.kind = IS_BOOL, .i = config_setting_get_bool(s)}; break;
    case CONFIG_TYPE_INT: *out = (struct value){.kind = IS_INT, .i = config_setting_get_int(s)}; break;
    case CONFIG_TYPE_INT64: *out = (struct value){.kind = IS_INT, .i = config_setting_get_int64(s)}; break;
    case CONFIG_TYPE_FLOAT: *out = (struct value){.kind = IS_REAL, .r = config_setting_get_float(s)}; break;
    case CONFIG_TYPE_STRING: {
      const char *text = config_setting_get_string(s);
      *out = (struct value){.kind = IS_TEXT, .text = text ? text : ""};
      break;
    }
    case CONFIG_TYPE_ARRAY:
    case CONFIG_TYPE_LIST: {
      int n = config_setting_length(s);
      struct value *items = calloc((size_t)n + 1, sizeof *items);
      if (!items) return no_memory();
      *out = (struct value){.kind = IS_LIST, .items = items, .n = n};
      for (int i = 0; i < n; i++) {
        const config_setting_t *e = config_setting_get_elem(s, (unsigned)i);
        if (config_setting_is_aggregate(e)) continue; /* stays IS_NONE, which no row takes */
        fd_status st = value_of(e, &items[i]);
        if (st != FD_OK) return st;
      }
      break;
    }
    default: break;
  }
  return FD_OK;
}

static void free_value(struct value *v) { free((void *)v->items); }

static fd_status apply(fd_config *c, const config_setting_t *group, const char *prefix, const char *name) {
  int n = config_setting_length(group);
  for (int i = 0; i < n; i++) {
    const config_setting_t *s = config_setting_get_elem(group, (unsigned)i);
    char key[512], where[PATH_MAX + 32];
    const char *file = config_setting_source_file(s);
    snprintf(key, sizeof key, "%s%s%s", prefix, *prefix ? "." : "", config_setting_name(s));
    snprintf(where, sizeof where, "%s:%u", file ? file : name, config_setting_source_line(s));
    if (!*prefix && !strcmp(key, "extends")) continue;
    const struct fd_option *o = fd_option_find(key);
    fd_status st;
    if (!o) return unknown_key(key, where);
    if (config_setting_is_group(s) && o->type == FD_OPTION_GROUP) {
      st = apply(c, s, key, name);
    } else {
      struct value v;
      st = value_of(s, &v);
      if (st == FD_OK) st = assign(c, o, &v, where);
      free_value(&v);
    }
    if (st != FD_OK) return st;
  }
  return FD_OK;
}

struct layers {
  const char *path[MAX_LAYERS]; /* real paths of the files being read, outermost first */
  int n;
};

static fd_status read_layer(fd_config *c, const char *path, struct layers *above);

/* Line `line` of a file (or of `text`), blanks around it cut. */
static void line_of(const char *file, const char *text, int line, char *out, size_t bytes) {
  char *read = NULL;
  if (file) text = read_all(file, &read) == FD_OK ? read : "";
  for (int i = 1; i < line && text; i++) {
    text = strchr(text, '\n');
    if (text) text++;
  }
  if (!text) text = "";
  text += strspn(text, " \t\n");
  size_t n = strcspn(text, "\n");
  while (n > 0 && isspace((unsigned char)text[n - 1])) n--;
  snprintf(out, bytes, "%.*s", (int)n, text);
  free(read);
}

/* text of `name`; path: the file it came from, or NULL */
static fd_status read_text(fd_config *c, const char *text, const char *name, const char *path, struct layers *above) {
  fd_status st = FD_OK;
  config_t lib;
  char *dir = NULL, *base = NULL;
  config_init(&lib);
  dir = strdup(name);
  if (!dir) FD_TRY(no_memory());
  char *slash = strrchr(dir, '/');
  if (slash && path)
    slash[slash == dir] = 0;
  else
    strcpy(dir, *dir ? "." : "");
  FD_TRY(scan(text, name, dir, 0));
  config_set_include_dir(&lib, dir);
  if (!(path ? config_read_file(&lib, path) : config_read_string(&lib, text))) {
    const char *file = config_error_file(&lib), *fault = config_error_text(&lib), *hint = "";
    char shown[120];
    if (!fault) fault = "cannot be read";
    if (strstr(fault, "syntax")) hint = "; a line reads key = value; a group reads name = { ... }; strings stand in double quotes";
    if (strstr(fault, "mismatched element")) hint = "; write (1, 2.0) where types differ";
    line_of(file && strcmp(file, name) ? file : NULL, text, config_error_line(&lib), shown, sizeof shown);
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s:%d: %s at or before \"%s\"%s", file ? file : name, config_error_line(&lib), fault, shown, hint));
  }
  const config_setting_t *extends = config_lookup(&lib, "extends");
  if (extends) {
    const char *what = config_setting_get_string(extends);
    unsigned line = config_setting_source_line(extends);
    const char *file = config_setting_source_file(extends);
    if (!file) file = name;
    if (!what || !*what) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s:%u: extends: wanted the name of a file in quotes", file, line));
    base = beside(file, what);
    if (!base) FD_TRY(no_memory());
    if (access(base, R_OK) != 0)
      FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s:%u: extends = \"%s\": %s: %s", file, line, what, base, strerror(errno)));
    FD_TRY(read_layer(c, base, above));
  }
  FD_TRY(apply(c, config_root_setting(&lib), "", name));
done:
  config_destroy(&lib);
  free(dir);
  free(base);
  return st;
}

static fd_status read_layer(fd_config *c, const char *path, struct layers *above) {
  fd_status st = FD_OK;
  char *text = NULL, *real = realpath(path, NULL);
  FD_TRY(read_all(path, &text));
  for (int i = 0; real && i < above->n; i++)
    if (!strcmp(above->path[i], real))
      FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: extends itself, by way of %s", path, above->path[above->n - 1]));
  if (above->n == MAX_LAYERS) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: extends goes deeper than %d files", path, MAX_LAYERS));
  above->path[above->n++] = real ? real : path;
  st = read_text(c, text, path, path, above);
  above->n--;
done:
  free(text);
  free(real);
  return st;
}

fd_status fd_config_read(fd_config *config, const char *path) {
  struct layers above = {.n = 0};
  return read_layer(config, path, &above);
}

fd_status fd_config_read_text(fd_config *config, const char *text, const char *name) {
  struct layers above = {.n = 0};
  return read_text(config, text, name, NULL, &above);
}

/* ---- the command line ---------------------------------------------------------------------------------------------- */

/* "0.9, 0.99", "(a, b)", "[1, 2]" by libconfig's own rules */
static fd_status list_from_text(config_t *lib, const char *text, struct value *out, bool *ok) {
  char *line = NULL;
  bool bare = *text != '(' && *text != '[';
  *ok = false;
  if (asprintf(&line, "v = %s%s%s;", bare ? "(" : "", text, bare ? ")" : "") < 0) return no_memory();
  bool read = scan(line, "--set", ".", 0) == FD_OK && config_read_string(lib, line);
  free(line);
  const config_setting_t *s = read ? config_lookup(lib, "v") : NULL;
  if (!s || !config_setting_is_aggregate(s) || config_setting_is_group(s)) return FD_OK;
  *ok = true;
  return value_of(s, out);
}

fd_status fd_config_set(fd_config *config, const char *flag, const char *assignment) {
  const char *equals = strchr(assignment, '=');
  char key[256];
  if (!equals || equals == assignment || equals - assignment >= (int)sizeof key)
    return FD_FAIL(FD_ERR_CONFIG, "%s %s: wanted key=value, for example trainer.max_steps=1000", flag, assignment);
  snprintf(key, sizeof key, "%.*s", (int)(equals - assignment), assignment);
  for (size_t n = strlen(key); n > 0 && isspace((unsigned char)key[n - 1]);) key[--n] = 0;
  const char *text = equals + 1;
  while (isspace((unsigned char)*text)) text++;
  const struct fd_option *o = fd_option_find(key);
  if (!o) return unknown_key(key, flag);
  if (o->type == FD_OPTION_GROUP)
    return FD_FAIL(FD_ERR_CONFIG, "%s %s: %s is a group; set its keys one by one", flag, assignment, key);
  /* what the text looks like; the row then decides whether it may */
  struct value v = {.kind = IS_TEXT, .text = text};
  config_t lib;
  config_init(&lib);
  fd_status st = FD_OK;
  char *end = NULL, *unquoted = NULL;
  if (o->type == FD_OPTION_BOOL) {
    if (!strcasecmp(text, "true") || !strcasecmp(text, "false")) v = (struct value){.kind = IS_BOOL, .i = !strcasecmp(text, "true")};
  } else if (o->type == FD_OPTION_INT || o->type == FD_OPTION_REAL) {
    errno = 0;
    long long i = strtoll(text, &end, 10);
    bool whole = errno == 0 && end != text && (!*end || !strcasecmp(end, "L") || !strcasecmp(end, "LL"));
    double r = strtod(text, &end);
    if (whole)
      v = (struct value){.kind = IS_INT, .i = i};
    else if (end != text && !*end)
      v = (struct value){.kind = IS_REAL, .r = r};
  } else if (o->type == FD_OPTION_PAIR || (o->type == FD_OPTION_LIST && (*text == '(' || *text == '['))) {
    bool ok;
    struct value list = {0};
    st = list_from_text(&lib, text, &list, &ok);
    if (st == FD_OK && ok) v = list;
  } else if (*text == '"' && text[1] && text[strlen(text) - 1] == '"') {
    unquoted = strndup(text + 1, strlen(text) - 2); /* quotes as in a file are no part of the text */
    if (!unquoted) st = no_memory();
    v.text = unquoted;
  }
  if (st == FD_OK) st = assign(config, o, &v, flag);
  free_value(&v);
  free(unquoted);
  config_destroy(&lib);
  return st;
}

/* ---- the whole ------------------------------------------------------------------------------------------------------ */

fd_status fd_config_finish(fd_config *config) {
  struct fd_options *o = &config->opt;
  if (o->model.in_channels != o->model.out_channels)
    return FD_FAIL(FD_ERR_CONFIG, "%s: model.out_channels = %" PRId64 ", but model.in_channels = %" PRId64 " (%s); they must be equal",
                   fd_config_where(config, "model.out_channels"), o->model.out_channels, o->model.in_channels,
                   fd_config_where(config, "model.in_channels"));
  int64_t heads = o->model.base_config_override.num_attention_heads, kv = o->model.base_config_override.num_key_value_heads;
  if (heads && kv && heads % kv)
    return FD_FAIL(FD_ERR_CONFIG,
                   "%s: model.base_config_override.num_attention_heads = %" PRId64 " is not a multiple of num_key_value_heads = %" PRId64
                   " (%s)",
                   fd_config_where(config, "model.base_config_override.num_attention_heads"), heads, kv,
                   fd_config_where(config, "model.base_config_override.num_key_value_heads"));
  if (!*o->trainer.checkpoint_dir)
    return FD_FAIL(FD_ERR_CONFIG, "%s: trainer.checkpoint_dir is empty; wanted the folder for the run", fd_config_where(config, "trainer.checkpoint_dir"));
  const char *width_key = o->model.dit_hidden_size ? "model.dit_hidden_size" : "model.base_config_override.hidden_size";
  int64_t width = o->model.dit_hidden_size ? o->model.dit_hidden_size : o->model.base_config_override.hidden_size;
  if (!strcmp(o->model.pos_embed, "ape") && width % 4)
    return FD_FAIL(FD_ERR_CONFIG, "%s: %s = %" PRId64 " is no multiple of 4, which model.pos_embed = \"ape\" needs",
                   fd_config_where(config, width_key), width_key, width);
  static const struct {
    const char *key, *value;
  } not_built[] = {{"model.name", "FuseDiT"}, {"model.encoder_type", "clip-llm"}, {"gen.model_type", "fuse-dit"}, {"gen.model_type", "fuse-dit-clip"}};
  for (size_t i = 0; i < sizeof not_built / sizeof not_built[0]; i++) {
    const struct fd_option *row = fd_option_find(not_built[i].key);
    if (!strcmp(*(const char *const *)((const char *)o + row->offset), not_built[i].value))
      return FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s = \"%s\" is not built yet", fd_config_where(config, row->key), row->key, not_built[i].value);
  }
  return fd_models_noise_scheduler(o, &config->shift_from);
}

/* Why a key that may be read is not read with the other settings as they are; NULL: it is read. */
static const char *not_read(const struct fd_options *o, const struct fd_option *row) {
  const char *k = row->key;
  if (row->unused) return row->unused;
  if ((!strcmp(k, "trainer.logit_mean") || !strcmp(k, "trainer.logit_std")) && strcmp(o->trainer.weighting_scheme, "logit_normal"))
    return "only with trainer.weighting_scheme = \"logit_normal\"";
  if (!strcmp(k, "trainer.mode_scale") && strcmp(o->trainer.weighting_scheme, "mode")) return "only with trainer.weighting_scheme = \"mode\"";
  if (!strcmp(k, "lr_scheduler.num_warmup_steps") && !strcmp(o->lr_scheduler.name, "constant"))
    return "lr_scheduler.name = \"constant\" has no warm-up; \"constant_with_warmup\" has";
  if ((!strcmp(k, "ema.decay") || !strcmp(k, "ema.warmup")) && o->ema.update_steps == 0) return "ema.update_steps is null";
  if (!strcmp(k, "data.caption_column.original") && o->data.original_caption_rate == 0) return "data.original_caption_rate is 0";
  if (!strcmp(k, "data.original_caption_rate") && !*o->data.caption_column.original) return "data.caption_column.original is not set";
  if (!strcmp(k, "data.add_generation_prompt") && !o->data.apply_chat_template) return "data.apply_chat_template is false";
  return NULL;
}

void fd_config_log_unused(const fd_config *config) {
  for (int i = 0; i < fd_option_count; i++) {
    if (!config->where[i]) continue;
    const char *why = not_read(&config->opt, &fd_option_table[i]);
    if (why) fd_log_info("not used: %s (%s): %s", fd_option_table[i].key, config->where[i], why);
  }
  if (config->shift_from)
    fd_log_info("noise_scheduler: num_train_timesteps %" PRId64 ", shift %g, from %s", config->opt.noise_scheduler.num_train_timesteps,
                config->opt.noise_scheduler.shift, config->shift_from);
}

static void print_quoted(FILE *to, const char *text) {
  fputc('"', to);
  for (; *text; text++) {
    unsigned char ch = (unsigned char)*text;
    if (ch == '"' || ch == '\\')
      fprintf(to, "\\%c", ch);
    else if (ch == '\n')
      fputs("\\n", to);
    else if (ch == '\t')
      fputs("\\t", to);
    else if (ch == '\r')
      fputs("\\r", to);
    else if (ch < 32 || ch == 127)
      fprintf(to, "\\x%02x", ch);
    else
      fputc(ch, to);
  }
  fputc('"', to);
}

/* A value as a libconfig file has it. */
static void print_value(FILE *to, const struct fd_options *opt, const struct fd_option *o, int indent) {
  const void *field = (const char *)opt + o->offset;
  char number[40];
  switch (o->type) {
    case FD_OPTION_BOOL: fputs(*(const bool *)field ? "true" : "false", to); break;
    case FD_OPTION_INT: {
      int64_t i = *(const int64_t *)field;
      if (i == 0 && o->nullable && o->int_lo > 0)
        fputs("\"\"", to); /* null, where 0 itself is not allowed */
      else
        fprintf(to, "%" PRId64 "%s", i, i > INT32_MAX || i < INT32_MIN ? "L" : "");
      break;
    }
    case FD_OPTION_REAL: fputs(real_text(*(const double *)field, number), to); break;
    case FD_OPTION_PAIR: {
      const double *r = field;
      fprintf(to, "(%s, ", real_text(r[0], number));
      fprintf(to, "%s)", real_text(r[1], number));
      break;
    }
    case FD_OPTION_TEXT:
    case FD_OPTION_STEP: print_quoted(to, *(const char *const *)field); break;
    case FD_OPTION_LIST: {
      const struct fd_strings *list = field;
      fputc('(', to);
      for (int i = 0; i < list->n; i++) {
        if (list->n > 1) fprintf(to, "\n%*s", indent + 2, "");
        print_quoted(to, list->at[i]);
        if (i + 1 < list->n) fputc(',', to);
      }
      fputc(')', to);
      break;
    }
    case FD_OPTION_GROUP:
    case FD_OPTION_GROUP_END: break;
  }
}

static const char *last_part(const char *key) {
  const char *dot = strrchr(key, '.');
  return dot ? dot + 1 : key;
}

char *fd_config_text(const fd_config *config) {
  char *text = NULL;
  size_t bytes = 0;
  FILE *to = open_memstream(&text, &bytes);
  int depth = 0;
  if (!to) return NULL;
  fputs("# All settings of this run. fdhpc reads this file back to the same values.\n", to);
  for (int i = 0; i < fd_option_count; i++) {
    const char *why = config->where[i] ? not_read(&config->opt, &fd_option_table[i]) : NULL;
    if (why) fprintf(to, "# not used: %s (%s): %s\n", fd_option_table[i].key, config->where[i], why);
  }
  for (int i = 0; i < fd_option_count; i++) {
    const struct fd_option *o = &fd_option_table[i];
    if (o->type == FD_OPTION_GROUP_END) {
      depth--;
      fprintf(to, "%*s};\n", 2 * depth, "");
    } else if (o->type == FD_OPTION_GROUP) {
      fprintf(to, "%*s%s = {\n", 2 * depth, "", last_part(o->key));
      depth++;
    } else {
      fprintf(to, "%*s%s = ", 2 * depth, "", last_part(o->key));
      print_value(to, &config->opt, o, 2 * depth);
      fputs(";\n", to);
    }
  }
  if (fclose(to) != 0) {
    free(text);
    return NULL;
  }
  return text;
}

fd_status fd_config_write(const fd_config *config, const char *path) {
  fd_status st = FD_OK;
  FILE *f = NULL;
  char *text = fd_config_text(config);
  if (!text) FD_TRY(no_memory());
  f = fopen(path, "w");
  if (!f) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot be opened for writing: %s", path, strerror(errno)));
  bool written = fputs(text, f) >= 0;
  written = fclose(f) == 0 && written;
  f = NULL;
  if (!written) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot be written: %s", path, strerror(errno)));
done:
  if (f) fclose(f);
  free(text);
  return st;
}

/* ---- help ------------------------------------------------------------------------------------------------------------ */

static bool wants_group(const char *groups, const char *group) {
  size_t n = strcspn(group, ".");
  if (!groups) return true;
  for (const char *p = groups; *p; p += strcspn(p, " ")) {
    p += strspn(p, " ");
    if (strcspn(p, " ") == n && !strncmp(p, group, n)) return true;
  }
  return false;
}

/* words of `text` from column `column` on, at most 100 wide */
static void print_wrapped(FILE *to, const char *text, int column) {
  int at = column;
  for (const char *p = text; *p;) {
    int n = (int)strcspn(p, " ");
    if (at > column && at + 1 + n > 100) {
      fprintf(to, "\n%*s", column, "");
      at = column;
    } else if (at > column) {
      fputc(' ', to);
      at++;
    }
    fprintf(to, "%.*s", n, p);
    at += n;
    p += n;
    p += strspn(p, " ");
  }
  fputc('\n', to);
}

void fd_config_print_help(FILE *to, const char *groups) {
  struct fd_options defaults;
  fd_options_defaults(&defaults);
  for (int i = 0; i < fd_option_count; i++) {
    const struct fd_option *o = &fd_option_table[i];
    if (o->type == FD_OPTION_GROUP_END || !wants_group(groups, o->key)) continue;
    if (o->type == FD_OPTION_GROUP) {
      fprintf(to, "\n%s: %s\n", o->key, o->help);
      continue;
    }
    char wanted[512] = "";
    show_wanted(o, wanted, sizeof wanted);
    fprintf(to, "  %s = ", o->key);
    print_value(to, &defaults, o, 0);
    fprintf(to, "\n      ");
    print_wrapped(to, o->help, 6);
    fprintf(to, "      ");
    if (o->unused) {
      char text[512];
      snprintf(text, sizeof text, "not used: %s", o->unused);
      print_wrapped(to, text, 6);
    } else {
      print_wrapped(to, wanted, 6);
    }
  }
}

/* "|" would end a cell */
static void print_cell(FILE *to, const char *text) {
  for (; *text; text++) {
    if (*text == '|') fputc('\\', to);
    fputc(*text, to);
  }
}

void fd_config_print_markdown(FILE *to) {
  struct fd_options defaults;
  fd_options_defaults(&defaults);
  fputs("# Options\n\n"
        "Made from `src/base/options.def` by `make options-doc`; do not edit.\n\n"
        "A configuration is a libconfig file: groups `name = { ... };` of lines `key = value;`. The groups and keys are those of the\n"
        "YAML files of the original program, so that one is translated into the other by eye. Keys that mean nothing here are\n"
        "accepted, named in the log, and listed here with the reason.\n\n"
        "- `extends = \"base-3b.cfg\";` reads that file first (relative to the file that says it); the last value of a key wins.\n"
        "- `--set group.key=value` on the command line comes after all files; it may be given many times.\n"
        "- Nothing (`null`) is written `\"\"`. An integer is taken where a number is wanted, never the reverse. An integer outside\n"
        "  32 bits needs an `L` at its end: `5000000000L`.\n"
        "- A list of strings is written `(\"a\", \"b\")`; one string may stand without the brackets.\n"
        "- `used.cfg` in the run folder holds every value of a run; it is a configuration itself.\n",
        to);
  for (int i = 0; i < fd_option_count; i++) {
    const struct fd_option *o = &fd_option_table[i];
    if (o->type == FD_OPTION_GROUP_END) continue;
    if (o->type == FD_OPTION_GROUP) {
      fprintf(to, "\n## %s\n\n%s.\n\n| key | default | wanted | what it does |\n| --- | --- | --- | --- |\n", o->key, o->help);
      continue;
    }
    char wanted[512] = "";
    show_wanted(o, wanted, sizeof wanted);
    fprintf(to, "| `%s` | `", last_part(o->key));
    print_value(to, &defaults, o, 0);
    fputs("` | ", to);
    print_cell(to, wanted);
    fputs(" | ", to);
    if (o->unused) fputs("**not used**: ", to);
    print_cell(to, o->unused ? o->unused : o->help);
    fputs(" |\n", to);
    /* a subgroup is a table of its own, so keys of its parent that follow need a heading again */
    if (i + 2 < fd_option_count && o[1].type == FD_OPTION_GROUP_END && o[2].type != FD_OPTION_GROUP_END &&
        o[2].type != FD_OPTION_GROUP)
      fprintf(to, "\n## %.*s (continued)\n\n| key | default | wanted | what it does |\n| --- | --- | --- | --- |\n",
              (int)(strlen(o[2].key) - strlen(last_part(o[2].key)) - 1), o[2].key);
  }
}
