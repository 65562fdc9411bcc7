// SPDX-License-Identifier: Apache-2.0
// HDF5 files of one process. Invariant: every HDF5 id made here is closed on every path.
#include "io/h5.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The library prints its error stack by default; our messages replace it. */
__attribute__((constructor)) static void quiet(void) { H5Eset_auto2(H5E_DEFAULT, NULL, NULL); }

hid_t fd_h5_type(fd_dtype dtype) {
  switch (dtype) {
    case FD_F32: return H5T_NATIVE_FLOAT;
    case FD_F64: return H5T_NATIVE_DOUBLE;
    case FD_I32: return H5T_NATIVE_INT32;
    case FD_I64: return H5T_NATIVE_INT64;
    case FD_U8: return H5T_NATIVE_UINT8;
    case FD_U32: return H5T_NATIVE_UINT32;
    default: return -1;
  }
}

/* Read-only media and network file systems often refuse locks. */
static hid_t access_list(void) {
  hid_t list = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_alignment(list, 1, 8); /* columns of what we write may be mapped and read in place */
#if H5_VERSION_GE(1, 10, 7)
  H5Pset_file_locking(list, 1, 1);
#endif
  return list;
}

static const char *file_name(hid_t file, char *buf, size_t bytes) {
  if (H5Fget_name(file, buf, bytes) < 0) snprintf(buf, bytes, "(unnamed)");
  return buf;
}

fd_status fd_h5_open_read(const char *path, hid_t *out) {
  fd_status st = FD_OK;
  hid_t list = -1, file;
  if (access(path, R_OK) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot be read: %s", path, strerror(errno)));
  list = access_list();
  file = H5Fopen(path, H5F_ACC_RDONLY, list);
  if (file < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: is no HDF5 file, or is truncated", path));
  *out = file;
done:
  if (list >= 0) H5Pclose(list);
  return st;
}

fd_status fd_h5_create(const char *path, hid_t *out) {
  fd_status st = FD_OK;
  hid_t list = access_list();
  hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, list);
  if (file < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot be created: %s", path, strerror(errno)));
  *out = file;
done:
  H5Pclose(list);
  return st;
}

fd_status fd_h5_close(hid_t *file) {
  fd_status st = FD_OK;
  char name[512];
  if (*file < 0) return FD_OK;
  file_name(*file, name, sizeof name);
  if (H5Fclose(*file) < 0) st = FD_FAIL(FD_ERR_IO, "%s: closing failed: is the disk full?", name);
  *file = -1;
  return st;
}

void fd_h5_array_free(struct fd_h5_array *a) {
  if (!a) return;
  free(a->data);
  *a = (struct fd_h5_array){0};
}

bool fd_h5_exists(hid_t file, const char *name) {
  char part[1024];
  if (file < 0 || strlen(name) >= sizeof part) return false;
  /* every link on the way must exist, else H5Lexists fails */
  for (const char *end = name;; end++) {
    if (*end != '/' && *end) continue;
    memcpy(part, name, (size_t)(end - name));
    part[end - name] = 0;
    if (end > name && end[-1] != '/' && H5Lexists(file, part, H5P_DEFAULT) <= 0) return false;
    if (!*end) break;
  }
  return true;
}

/* Open a data set and describe it. *set is the caller's to close. */
static fd_status open_set(hid_t file, const char *name, hid_t *set, struct fd_h5_array *a) {
  fd_status st = FD_OK;
  char path[512];
  hid_t d = -1, space = -1, type = -1;
  hsize_t dims[H5S_MAX_RANK];
  if (!fd_h5_exists(file, name))
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: has no data set /%s", file_name(file, path, sizeof path), name + (*name == '/')));
  d = H5Dopen2(file, name, H5P_DEFAULT);
  if (d < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: /%s is no data set", file_name(file, path, sizeof path), name + (*name == '/')));
  space = H5Dget_space(d);
  type = H5Dget_type(d);
  int ndim = H5Sget_simple_extent_ndims(space);
  H5T_class_t cls = H5Tget_class(type);
  if (ndim < 0 || ndim > FD_H5_MAX_NDIM || (cls != H5T_INTEGER && cls != H5T_FLOAT))
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: /%s: is not a numeric array of at most %d dimensions", file_name(file, path, sizeof path),
                   name + (*name == '/'), FD_H5_MAX_NDIM));
  H5Sget_simple_extent_dims(space, dims, NULL);
  a->ndim = ndim;
  a->numel = 1;
  for (int i = 0; i < ndim; i++) a->shape[i] = (int64_t)dims[i], a->numel *= (int64_t)dims[i];
  *set = d;
  d = -1;
done:
  if (d >= 0) H5Dclose(d);
  if (space >= 0) H5Sclose(space);
  if (type >= 0) H5Tclose(type);
  return st;
}

fd_status fd_h5_shape(hid_t file, const char *name, struct fd_h5_array *out) {
  struct fd_h5_array a = {0};
  hid_t set = -1;
  fd_status st = open_set(file, name, &set, &a);
  if (st != FD_OK) return st;
  H5Dclose(set);
  *out = a;
  return FD_OK;
}

fd_status fd_h5_read(hid_t file, const char *name, fd_dtype as, struct fd_h5_array *out) {
  fd_status st = FD_OK;
  char path[512];
  struct fd_h5_array a = {0};
  hid_t set = -1, type = fd_h5_type(as);
  if (type < 0) FD_TRY(FD_FAIL(FD_ERR_ARG, "fd_h5_read: %s has no HDF5 type", fd_dtype_name(as)));
  FD_TRY(open_set(file, name, &set, &a));
  a.dtype = as;
  size_t bytes = (size_t)a.numel * fd_dtype_bytes(as);
  a.data = malloc(bytes ? bytes : 1);
  if (!a.data) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: /%s: no memory for %zu bytes", file_name(file, path, sizeof path), name, bytes));
  if (a.numel && H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, a.data) < 0)
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: /%s: reading failed: the file is damaged", file_name(file, path, sizeof path), name));
  *out = a;
  a.data = NULL;
done:
  free(a.data);
  if (set >= 0) H5Dclose(set);
  return st;
}

struct list {
  int n, capacity;
  char **name;
  bool deep, failed;
};

static void list_add(struct list *l, const char *name) {
  if (l->n == l->capacity) {
    int more = l->capacity ? 2 * l->capacity : 64;
    char **grown = realloc(l->name, (size_t)more * sizeof *grown);
    if (!grown) {
      l->failed = true;
      return;
    }
    l->name = grown;
    l->capacity = more;
  }
  l->name[l->n] = strdup(name);
  if (l->name[l->n]) l->n++;
  else l->failed = true;
}

static herr_t visit_link(hid_t group, const char *name, const H5L_info_t *info, void *user) {
  (void)group;
  (void)info;
  list_add(user, name);
  return 0;
}

static herr_t visit_object(hid_t group, const char *name, const H5O_info_t *info, void *user) {
  (void)group;
  if (info->type == H5O_TYPE_DATASET) list_add(user, name);
  return 0;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

fd_status fd_h5_list(hid_t file, const char *group, bool deep, int *n, char ***names) {
  fd_status st = FD_OK;
  char path[512];
  struct list l = {0};
  hid_t g = -1;
  char **out = NULL;
  if (strcmp(group, "/") != 0 && !fd_h5_exists(file, group)) goto pack;
  g = H5Gopen2(file, group, H5P_DEFAULT);
  if (g < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: /%s is no group", file_name(file, path, sizeof path), group));
  herr_t e = deep ? H5Ovisit(g, H5_INDEX_NAME, H5_ITER_INC, visit_object, &l)
                  : H5Literate(g, H5_INDEX_NAME, H5_ITER_INC, NULL, visit_link, &l);
  if (e < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: listing /%s failed", file_name(file, path, sizeof path), group));
  if (l.failed) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for the names in /%s", file_name(file, path, sizeof path), group));
pack:;
  /* the pointers and the text behind them in one allocation */
  size_t bytes = 0;
  for (int i = 0; i < l.n; i++) bytes += strlen(l.name[i]) + 1;
  out = malloc((size_t)l.n * sizeof *out + bytes + 1);
  if (!out) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d names", l.n));
  if (l.n) qsort(l.name, (size_t)l.n, sizeof *l.name, by_name);
  char *text = (char *)(out + l.n);
  for (int i = 0; i < l.n; i++) {
    size_t len = strlen(l.name[i]) + 1;
    out[i] = memcpy(text, l.name[i], len);
    text += len;
  }
  *n = l.n;
  *names = out;
done:
  if (g >= 0) H5Gclose(g);
  for (int i = 0; i < l.n; i++) free(l.name[i]);
  free(l.name);
  return st;
}

fd_status fd_h5_write(hid_t file, const char *name, fd_dtype dtype, int ndim, const int64_t *shape, const void *data) {
  fd_status st = FD_OK;
  char path[512];
  hid_t space = -1, set = -1, links = -1, type = fd_h5_type(dtype);
  hsize_t dims[FD_H5_MAX_NDIM];
  int64_t numel = 1;
  if (type < 0 || ndim > FD_H5_MAX_NDIM) FD_TRY(FD_FAIL(FD_ERR_ARG, "fd_h5_write: %s, %d dimensions", fd_dtype_name(dtype), ndim));
  for (int i = 0; i < ndim; i++) dims[i] = (hsize_t)shape[i], numel *= shape[i];
  space = ndim ? H5Screate_simple(ndim, dims, NULL) : H5Screate(H5S_SCALAR);
  links = H5Pcreate(H5P_LINK_CREATE);
  H5Pset_create_intermediate_group(links, 1);
  set = H5Dcreate2(file, name, type, space, links, H5P_DEFAULT, H5P_DEFAULT);
  if (set < 0 || (numel && H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0))
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: writing /%s failed: is the disk full?", file_name(file, path, sizeof path), name));
done:
  if (set >= 0) H5Dclose(set);
  if (links >= 0) H5Pclose(links);
  if (space >= 0) H5Sclose(space);
  return st;
}

static fd_status attr_write(hid_t file, const char *name, const char *attr, hid_t type, const void *value) {
  fd_status st = FD_OK;
  char path[512];
  hid_t space = H5Screate(H5S_SCALAR), a = -1;
  if (H5Aexists_by_name(file, name, attr, H5P_DEFAULT) > 0) H5Adelete_by_name(file, name, attr, H5P_DEFAULT);
  a = H5Acreate_by_name(file, name, attr, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  if (a < 0 || H5Awrite(a, type, value) < 0)
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: writing attribute %s of %s failed", file_name(file, path, sizeof path), attr, name));
done:
  if (a >= 0) H5Aclose(a);
  H5Sclose(space);
  return st;
}

fd_status fd_h5_attr_write_text(hid_t file, const char *name, const char *attr, const char *text) {
  hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, strlen(text) + 1);
  H5Tset_cset(type, H5T_CSET_UTF8);
  fd_status st = attr_write(file, name, attr, type, text);
  H5Tclose(type);
  return st;
}

fd_status fd_h5_attr_write_f64(hid_t file, const char *name, const char *attr, double value) {
  return attr_write(file, name, attr, H5T_NATIVE_DOUBLE, &value);
}

fd_status fd_h5_attr_write_i64(hid_t file, const char *name, const char *attr, int64_t value) {
  return attr_write(file, name, attr, H5T_NATIVE_INT64, &value);
}

static fd_status attr_open(hid_t file, const char *name, const char *attr, hid_t *out) {
  char path[512];
  hid_t a = -1;
  if (H5Aexists_by_name(file, name, attr, H5P_DEFAULT) > 0) a = H5Aopen_by_name(file, name, attr, H5P_DEFAULT, H5P_DEFAULT);
  if (a < 0) return FD_FAIL(FD_ERR_FORMAT, "%s: %s has no attribute %s", file_name(file, path, sizeof path), name, attr);
  *out = a;
  return FD_OK;
}

static fd_status attr_read(hid_t file, const char *name, const char *attr, hid_t type, void *value) {
  fd_status st = FD_OK;
  char path[512];
  hid_t a = -1, space = -1;
  FD_TRY(attr_open(file, name, attr, &a));
  space = H5Aget_space(a);
  if (H5Sget_simple_extent_npoints(space) != 1 || H5Aread(a, type, value) < 0)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: attribute %s of %s is no single number", file_name(file, path, sizeof path), attr, name));
done:
  if (space >= 0) H5Sclose(space);
  if (a >= 0) H5Aclose(a);
  return st;
}

fd_status fd_h5_attr_read_f64(hid_t file, const char *name, const char *attr, double *value) {
  return attr_read(file, name, attr, H5T_NATIVE_DOUBLE, value);
}

fd_status fd_h5_attr_read_i64(hid_t file, const char *name, const char *attr, int64_t *value) {
  return attr_read(file, name, attr, H5T_NATIVE_INT64, value);
}

fd_status fd_h5_attr_read_text(hid_t file, const char *name, const char *attr, char **text) {
  fd_status st = FD_OK;
  char path[512];
  hid_t a = -1, type = -1, memory = -1;
  char *out = NULL;
  FD_TRY(attr_open(file, name, attr, &a));
  type = H5Aget_type(a);
  if (H5Tget_class(type) != H5T_STRING)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: attribute %s of %s is no text", file_name(file, path, sizeof path), attr, name));
  memory = H5Tcopy(H5T_C_S1);
  H5Tset_cset(memory, H5Tget_cset(type));
  if (H5Tis_variable_str(type) > 0) {
    char *v = NULL;
    H5Tset_size(memory, H5T_VARIABLE);
    if (H5Aread(a, memory, &v) < 0 || !v)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: attribute %s of %s cannot be read", file_name(file, path, sizeof path), attr, name));
    out = strdup(v);
    H5free_memory(v);
  } else {
    size_t bytes = H5Tget_size(type);
    H5Tset_size(memory, bytes + 1);
    out = calloc(bytes + 2, 1);
    if (out && H5Aread(a, memory, out) < 0)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: attribute %s of %s cannot be read", file_name(file, path, sizeof path), attr, name));
  }
  if (!out) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for attribute %s", attr));
  *text = out;
  out = NULL;
done:
  free(out);
  if (memory >= 0) H5Tclose(memory);
  if (type >= 0) H5Tclose(type);
  if (a >= 0) H5Aclose(a);
  return st;
}
