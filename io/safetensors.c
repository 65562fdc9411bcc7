// SPDX-License-Identifier: Apache-2.0
// Safetensors: 8 bytes of header length, a JSON header, the tensors' bytes. Invariant: after open every tensor's range lies within
// its file, ranges neither overlap nor leave holes, and their lengths agree with shape and type.
#include "io/safetensors.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_HEADER_BYTES (100 << 20) /* as the reference implementation */
#define READ_BYTES (8 << 20)         /* a pread may not move 2 GiB or more; small pieces also keep the copy in cache */

struct file {
  char *path;
  int fd;
};

struct fd_safetensors {
  int n_files, n, capacity;
  struct file *file;
  struct fd_safetensor *tensor; /* sorted by name; names and types are owned */
};

static const struct {
  const char *name;
  fd_dtype dtype;
  int bytes;
} types[] = {
    {"F32", FD_F32, 4},  {"BF16", FD_BF16, 2}, {"F16", FD_F16, 2}, {"F64", FD_F64, 8}, {"I64", FD_I64, 8}, {"I32", FD_I32, 4},
    {"U32", FD_U32, 4},  {"U8", FD_U8, 1},     {"I8", FD_DTYPE_COUNT, 1}, {"I16", FD_DTYPE_COUNT, 2}, {"U16", FD_DTYPE_COUNT, 2},
    {"U64", FD_DTYPE_COUNT, 8}, {"BOOL", FD_DTYPE_COUNT, 1}, {"F8_E4M3", FD_DTYPE_COUNT, 1}, {"F8_E5M2", FD_DTYPE_COUNT, 1},
};

void fd_safetensors_close(fd_safetensors **set) {
  fd_safetensors *s = set ? *set : NULL;
  if (!s) return;
  for (int i = 0; i < s->n_files; i++) {
    if (s->file[i].fd >= 0) close(s->file[i].fd);
    free(s->file[i].path);
  }
  for (int i = 0; i < s->n; i++) {
    free((char *)s->tensor[i].name);
    free((char *)s->tensor[i].type);
  }
  free(s->file);
  free(s->tensor);
  free(s);
  *set = NULL;
}

static fd_status read_all(int fd, const char *path, void *to, int64_t bytes, int64_t offset) {
  char *p = to;
  while (bytes > 0) {
    ssize_t got = pread(fd, p, (size_t)(bytes < READ_BYTES ? bytes : READ_BYTES), (off_t)offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FD_FAIL(FD_ERR_IO, "%s: reading failed: %s", path, strerror(errno));
    if (got == 0) return FD_FAIL(FD_ERR_FORMAT, "%s: ends at byte %lld, %lld more were expected: the file is truncated", path,
                                 (long long)offset, (long long)bytes);
    p += got;
    offset += got;
    bytes -= got;
  }
  return FD_OK;
}

static fd_status add_tensor(fd_safetensors *s, const struct fd_safetensor *t) {
  if (s->n == s->capacity) {
    int more = s->capacity ? 2 * s->capacity : 256;
    struct fd_safetensor *grown = realloc(s->tensor, (size_t)more * sizeof *grown);
    if (!grown) return FD_FAIL(FD_ERR_NOMEM, "no memory for the list of tensors");
    s->tensor = grown;
    s->capacity = more;
  }
  struct fd_safetensor *row = &s->tensor[s->n];
  *row = *t;
  row->name = strdup(t->name);
  row->type = strdup(t->type);
  s->n++; /* counted first: close frees what is there */
  return row->name && row->type ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for the list of tensors");
}

/* One header entry: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]} */
static fd_status parse_tensor(const char *path, const char *name, const json_t *entry, int64_t data_bytes, struct fd_safetensor *t) {
  const char *type = json_string_value(json_object_get(entry, "dtype"));
  const json_t *shape = json_object_get(entry, "shape"), *offsets = json_object_get(entry, "data_offsets");
  if (!type || !json_is_array(shape) || !json_is_array(offsets) || json_array_size(offsets) != 2 ||
      !json_is_integer(json_array_get(offsets, 0)) || !json_is_integer(json_array_get(offsets, 1)))
    return FD_FAIL(FD_ERR_FORMAT, "%s: %s: the header lacks dtype, shape or data_offsets", path, name);
  if (json_array_size(shape) > FD_SAFETENSORS_MAX_NDIM)
    return FD_FAIL(FD_ERR_FORMAT, "%s: %s: %zu dimensions, at most %d are read", path, name, json_array_size(shape), FD_SAFETENSORS_MAX_NDIM);
  *t = (struct fd_safetensor){.name = name, .type = type, .dtype = FD_DTYPE_COUNT, .ndim = (int)json_array_size(shape), .numel = 1};
  for (int i = 0; i < t->ndim; i++) {
    const json_t *d = json_array_get(shape, (size_t)i);
    t->shape[i] = json_is_integer(d) ? json_integer_value(d) : -1;
    if (t->shape[i] < 0 || __builtin_mul_overflow(t->numel, t->shape[i], &t->numel))
      return FD_FAIL(FD_ERR_FORMAT, "%s: %s: shape has a bad length in dimension %d", path, name, i);
  }
  int64_t begin = json_integer_value(json_array_get(offsets, 0)), end = json_integer_value(json_array_get(offsets, 1));
  if (begin < 0 || end < begin || end > data_bytes)
    return FD_FAIL(FD_ERR_FORMAT, "%s: %s: bytes %lld to %lld lie outside the file's %lld bytes of data: the file is truncated or damaged",
                   path, name, (long long)begin, (long long)end, (long long)data_bytes);
  t->offset = begin;
  t->bytes = end - begin;
  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (strcmp(types[i].name, type) == 0) {
      int64_t want;
      t->dtype = types[i].dtype;
      if (__builtin_mul_overflow(t->numel, types[i].bytes, &want) || want != t->bytes)
        return FD_FAIL(FD_ERR_FORMAT, "%s: %s: %lld bytes, but its shape and type %s need %lld", path, name, (long long)t->bytes, type,
                       (long long)want);
    }
  return FD_OK;
}

static int by_offset(const void *a, const void *b) {
  const struct fd_safetensor *x = a, *y = b;
  if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
  return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const struct fd_safetensor *)a)->name, ((const struct fd_safetensor *)b)->name);
}

static fd_status add_file(fd_safetensors *s, const char *path) {
  fd_status st = FD_OK;
  unsigned char head[8];
  char *text = NULL;
  json_t *header = NULL;
  struct stat info;
  struct file *grown = realloc(s->file, (size_t)(s->n_files + 1) * sizeof *grown);
  if (!grown) return FD_FAIL(FD_ERR_NOMEM, "no memory for a list of files");
  s->file = grown;
  struct file *f = &s->file[s->n_files];
  f->path = strdup(path);
  f->fd = open(path, O_RDONLY | O_CLOEXEC);
  s->n_files++;
  if (f->fd < 0 || fstat(f->fd, &info) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot be read: %s", path, strerror(errno)));
  int64_t file_bytes = (int64_t)info.st_size;
  if (file_bytes < 8) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %lld bytes are no safetensors file", path, (long long)file_bytes));
  FD_TRY(read_all(f->fd, path, head, 8, 0));
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | head[i]; /* little endian on any machine */
  if (header_bytes > MAX_HEADER_BYTES || (int64_t)header_bytes > file_bytes - 8)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: a header of %llu bytes does not fit: no safetensors file, or truncated (a Git LFS pointer?)", path,
                   (unsigned long long)header_bytes));
  text = malloc((size_t)header_bytes + 1);
  if (!text) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for its header", path));
  FD_TRY(read_all(f->fd, path, text, (int64_t)header_bytes, 8));
  json_error_t error;
  header = json_loadb(text, (size_t)header_bytes, JSON_REJECT_DUPLICATES, &error);
  if (!json_is_object(header)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: its header is no JSON object: %s", path, error.text));
  int64_t data = 8 + (int64_t)header_bytes, data_bytes = file_bytes - data;
  const char *name;
  json_t *entry;
  int first = s->n;
  json_object_foreach(header, name, entry) {
    if (strcmp(name, "__metadata__") == 0) continue;
    struct fd_safetensor t;
    FD_TRY(parse_tensor(path, name, entry, data_bytes, &t));
    t.file = s->n_files - 1;
    FD_TRY(add_tensor(s, &t));
  }
  if (s->n > first) qsort(s->tensor + first, (size_t)(s->n - first), sizeof *s->tensor, by_offset);
  int64_t at = 0;
  for (int i = first; i < s->n; at = s->tensor[i].offset + s->tensor[i].bytes, s->tensor[i].offset += data, i++) {
    const struct fd_safetensor *t = &s->tensor[i];
    if (t->offset < at)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s overlaps %s", path, t->name, i > first ? s->tensor[i - 1].name : "the header"));
    if (t->offset > at)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %lld bytes before %s belong to no tensor", path, (long long)(t->offset - at), t->name));
  }
  if (at != data_bytes)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %lld bytes at the end belong to no tensor", path, (long long)(data_bytes - at)));
done:
  json_decref(header);
  free(text);
  return st;
}

static bool is_file(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

/* All shards that the index names, each once, and the promise that they hold what it lists. */
static fd_status add_index(fd_safetensors *s, const char *folder, const char *index_path) {
  fd_status st = FD_OK;
  json_error_t error;
  char path[4096];
  const char *name;
  json_t *value, *shards = json_object(), *index = json_load_file(index_path, JSON_REJECT_DUPLICATES, &error);
  json_t *map = json_object_get(index, "weight_map");
  if (!index) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s:%d: %s", index_path, error.line, error.text));
  if (!json_is_object(map) || json_object_size(map) == 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: has no weight_map", index_path));
  json_object_foreach(map, name, value) {
    const char *shard = json_string_value(value);
    if (!shard || !*shard || strchr(shard, '/')) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s names no file of the folder", index_path, name));
    if (json_object_get(shards, shard)) continue;
    json_object_set_new(shards, shard, json_integer(s->n_files));
    snprintf(path, sizeof path, "%s/%s", folder, shard);
    FD_TRY(add_file(s, path));
  }
  json_object_foreach(map, name, value) {
    int file = (int)json_integer_value(json_object_get(shards, json_string_value(value))), i = 0;
    while (i < s->n && (s->tensor[i].file != file || strcmp(s->tensor[i].name, name) != 0)) i++;
    if (i == s->n) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: promises %s in %s, which does not hold it", index_path, name, json_string_value(value)));
  }
done:
  json_decref(shards);
  json_decref(index);
  return st;
}

fd_status fd_safetensors_open(const char *path, fd_safetensors **out) {
  static const char *const stems[] = {"model.safetensors", "diffusion_pytorch_model.safetensors"};
  fd_status st = FD_OK;
  DIR *dir = NULL;
  struct stat info;
  char name[4096], only[4096] = "";
  bool found = false;
  fd_safetensors *s = calloc(1, sizeof *s);
  if (!s) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  if (stat(path, &info) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno)));
  if (!S_ISDIR(info.st_mode)) {
    FD_TRY(add_file(s, path));
    found = true;
  }
  for (int i = 0; i < 4 && !found; i++) {
    snprintf(name, sizeof name, "%s/%s%s", path, stems[i % 2], i < 2 ? "" : ".index.json");
    if (!is_file(name)) continue;
    FD_TRY(i < 2 ? add_file(s, name) : add_index(s, path, name));
    found = true;
  }
  if (!found) {
    int n = 0;
    dir = opendir(path);
    for (struct dirent *e; dir && (e = readdir(dir));) {
      const char *dot = strrchr(e->d_name, '.');
      if (!dot || strcmp(dot, ".safetensors") != 0) continue;
      n++;
      snprintf(only, sizeof only, "%s/%s", path, e->d_name);
    }
    if (n == 0)
      FD_TRY(FD_FAIL(FD_ERR_IO, "%s: holds no *.safetensors; weights in other formats (.bin, .ckpt) are not read: convert them first", path));
    if (n > 1)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: holds %d *.safetensors and no index that says which belong together: name one of them %s", path, n,
                     stems[0]));
    FD_TRY(add_file(s, only));
  }
  if (s->n) qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_name);
  for (int i = 1; i < s->n; i++)
    if (strcmp(s->tensor[i - 1].name, s->tensor[i].name) == 0)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s is there twice, in %s and in %s", path, s->tensor[i].name, fd_safetensors_path(s, i - 1),
                     fd_safetensors_path(s, i)));
  *out = s;
  s = NULL;
done:
  if (dir) closedir(dir);
  fd_safetensors_close(&s);
  return st;
}

int fd_safetensors_count(const fd_safetensors *s) { return s->n; }
const struct fd_safetensor *fd_safetensors_at(const fd_safetensors *s, int i) { return &s->tensor[i]; }
const char *fd_safetensors_path(const fd_safetensors *s, int i) { return s->file[s->tensor[i].file].path; }

int fd_safetensors_find(const fd_safetensors *s, const char *name) {
  struct fd_safetensor key = {.name = name};
  struct fd_safetensor *hit = s->n ? bsearch(&key, s->tensor, (size_t)s->n, sizeof key, by_name) : NULL;
  return hit ? (int)(hit - s->tensor) : -1;
}

fd_status fd_safetensors_read(const fd_safetensors *s, int i, float *out) {
  fd_status st = FD_OK;
  const struct fd_safetensor *t = &s->tensor[i];
  const struct file *f = &s->file[t->file];
  void *piece = NULL;
  if (t->dtype != FD_F32 && t->dtype != FD_BF16 && t->dtype != FD_F16 && t->dtype != FD_F64)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s has type %s; F32, BF16, F16 and F64 are read", f->path, t->name, t->type));
  if (t->dtype == FD_F32) {
    FD_TRY(read_all(f->fd, f->path, out, t->bytes, t->offset));
  } else {
    int64_t size = (int64_t)fd_dtype_bytes(t->dtype), step = READ_BYTES / size;
    piece = malloc(READ_BYTES);
    if (!piece) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory to read %s", f->path, t->name));
    for (int64_t at = 0; at < t->numel; at += step) {
      int64_t n = t->numel - at < step ? t->numel - at : step;
      FD_TRY(read_all(f->fd, f->path, piece, n * size, t->offset + at * size));
      if (fd_convert(out + at, FD_F32, piece, t->dtype, n)) FD_TRY(FD_FAIL(FD_ERR_ARG, "cannot convert %s", t->type));
    }
  }
done:
  free(piece);
  return st;
}
