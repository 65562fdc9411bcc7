// SPDX-License-Identifier: Apache-2.0
// The HDF5 side of a checkpoint. Invariant: metadata come first in the file and are never moved, so that even a file that
// was cut off says which data sets it lost.
#include "io/checkpoint_layout.h"

#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clones.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes are written as they are in memory");

static const char units[] =
    "step: optimizer steps done; samples_seen: pictures trained on, all ranks together; parameters: trained numbers; "
    "counter_*: events since step 0; model, ema: weights, no unit; exp_avg, exp_avg_sq: first and second moment of the "
    "gradient per element; checksum: io/checkpoint.h";

FD_CLONES static uint64_t sum_words(const uint32_t *b, uint64_t i0, int64_t n) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; i++) {
    uint64_t t = (i0 + (uint64_t)i) * UINT64_C(0x9E3779B97F4A7C15) + b[i];
    t ^= t >> 32;
    t *= UINT64_C(0xD6E8FEB86659FD93);
    t ^= t >> 32;
    sum += t;
  }
  return sum;
}

uint64_t fd_layout_sum(const void *data, int64_t i0, int64_t n) { return sum_words(data, (uint64_t)i0, n); }

/* The words of a text, the last filled up with zeros, then its length. */
static uint64_t sum_text(const char *s) {
  uint64_t n = strlen(s), sum = 0;
  for (uint64_t i = 0; i < n; i += 4) {
    uint32_t w = 0;
    memcpy(&w, s + i, n - i < 4 ? n - i : 4);
    sum += sum_words(&w, i / 4, 1);
  }
  return sum + n;
}

/* Attributes have no checksum of their own in HDF5 (a long text is stored as bare bytes), so the file carries one. */
static uint64_t sum_meta(const struct fd_checkpoint_meta *m) {
  char line[256];
  snprintf(line, sizeof line, "%lld %lld %lld %llu %s %s", (long long)m->step, (long long)m->samples_seen, (long long)m->parameters,
           (unsigned long long)m->seed, m->vae_hash, m->text_encoder_hash);
  uint64_t sum = sum_text(line) + 3 * sum_text(m->config);
  for (int i = 0; i < m->n_counters; i++) { /* read back in another order: a plain sum */
    snprintf(line, sizeof line, "%s=%lld", m->counters[i].name, (long long)m->counters[i].value);
    sum += 5 * sum_text(line);
  }
  return sum;
}

/* ---- HDF5's errors in our words ------------------------------------------------------------------------------------ */

static herr_t first_error(unsigned n, const H5E_error2_t *e, void *text) {
  if (n == 0) snprintf(text, 512, "%s", e->desc ? e->desc : "unknown");
  return 0;
}

static fd_status h5_failed(const char *file, int line, fd_status code, const char *path, const char *what) {
  char text[512] = "unknown";
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first_error, text);
  return fd_fail(code, file, line, "%s: %s: HDF5 says: %s", path, what, text);
}

#define TRY_H5(call, code, what)                                         \
  do {                                                                   \
    if ((call) < 0) {                                                    \
      st = h5_failed(__FILE__, __LINE__, (code), path, (what));          \
      goto done;                                                         \
    }                                                                    \
  } while (0)

/* The library prints its stack by itself unless told not to; the message goes another way here. */
struct quiet {
  H5E_auto2_t f;
  void *data;
};
static void quiet_begin(struct quiet *q) {
  H5Eget_auto2(H5E_DEFAULT, &q->f, &q->data);
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}
static void quiet_end(struct quiet *q) { H5Eset_auto2(H5E_DEFAULT, q->f, q->data); }

/* ---- writing ------------------------------------------------------------------------------------------------------- */

static herr_t put_attribute(hid_t at, const char *name, hid_t file_type, hid_t mem_type, const void *value) {
  hid_t space = H5Screate(H5S_SCALAR);
  hid_t a = space < 0 ? -1 : H5Acreate2(at, name, file_type, space, H5P_DEFAULT, H5P_DEFAULT);
  herr_t rc = a < 0 ? -1 : H5Awrite(a, mem_type, value);
  if (a >= 0 && H5Aclose(a) < 0) rc = -1;
  if (space >= 0) H5Sclose(space);
  return rc;
}

static herr_t put_i64(hid_t at, const char *name, int64_t v) {
  return put_attribute(at, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &v);
}
static herr_t put_u64(hid_t at, const char *name, uint64_t v) {
  return put_attribute(at, name, H5T_STD_U64LE, H5T_NATIVE_UINT64, &v);
}
static herr_t put_text(hid_t at, const char *name, const char *text) {
  hid_t type = H5Tcopy(H5T_C_S1);
  herr_t rc = -1;
  if (type >= 0 && H5Tset_size(type, strlen(text) + 1) >= 0 && H5Tset_cset(type, H5T_CSET_UTF8) >= 0)
    rc = put_attribute(at, name, type, type, text);
  if (type >= 0) H5Tclose(type);
  return rc;
}

/* The groups above a data set, made as they first appear. */
static herr_t make_groups(hid_t file, hid_t gcpl, const char *name) {
  char part[FD_LAYOUT_NAME];
  for (const char *slash = strchr(name, '/'); slash; slash = strchr(slash + 1, '/')) {
    snprintf(part, sizeof part, "%.*s", (int)(slash - name), name);
    htri_t there = H5Lexists(file, part, H5P_DEFAULT);
    if (there < 0) return -1;
    if (there) continue;
    hid_t g = H5Gcreate2(file, part, H5P_DEFAULT, gcpl, H5P_DEFAULT);
    if (g < 0 || H5Gclose(g) < 0) return -1;
  }
  return 0;
}

/* Returns the bytes of all data. */
static int64_t sizes(const struct fd_checkpoint_meta *meta, int n, const struct fd_layout_entry *entry, hsize_t *align,
                     hsize_t *meta_block) {
  int64_t bytes = 0;
  for (int i = 0; i < n; i++) bytes += 4 * entry[i].numel;
  /* a large file is aligned to the stripes of parallel file systems, a small one to pages */
  *align = bytes >= ((int64_t)1 << 30) ? (hsize_t)1 << 20 : 4096;
  /* metadata come in one block, all before the data */
  *meta_block = (hsize_t)65536 + (hsize_t)n * 1024 + strlen(meta->config);
  return bytes;
}

int64_t fd_layout_most_bytes(const struct fd_checkpoint_meta *meta, int n, const struct fd_layout_entry *entry) {
  hsize_t align, meta_block;
  int64_t bytes = sizes(meta, n, entry, &align, &meta_block);
  return bytes + (int64_t)((hsize_t)(n + 2) * align + 3 * meta_block);
}

fd_status fd_layout_create(const char *path, const struct fd_checkpoint_meta *meta, int n, struct fd_layout_entry *entry,
                           int64_t *bytes) {
  fd_status st = FD_OK;
  hid_t file = -1, fapl = -1, fcpl = -1, gcpl = -1, dcpl = -1, space = -1, set = -1;
  struct quiet q;
  quiet_begin(&q);
  hsize_t align, meta_block;
  sizes(meta, n, entry, &align, &meta_block);
  fapl = H5Pcreate(H5P_FILE_ACCESS);
  fcpl = H5Pcreate(H5P_FILE_CREATE);
  gcpl = H5Pcreate(H5P_GROUP_CREATE);
  dcpl = H5Pcreate(H5P_DATASET_CREATE);
  /* V18: attributes over 64 kB; no locks: file systems without them are common and the name is ours alone */
  if (fapl < 0 || fcpl < 0 || gcpl < 0 || dcpl < 0 || H5Pset_libver_bounds(fapl, H5F_LIBVER_V18, H5F_LIBVER_V110) < 0 ||
      H5Pset_alignment(fapl, 65536, align) < 0 || H5Pset_meta_block_size(fapl, meta_block) < 0 ||
      H5Pset_file_locking(fapl, false, true) < 0 || H5Pset_obj_track_times(fcpl, false) < 0 ||
      H5Pset_obj_track_times(gcpl, false) < 0 || H5Pset_obj_track_times(dcpl, false) < 0 ||
      H5Pset_layout(dcpl, H5D_CONTIGUOUS) < 0 || H5Pset_alloc_time(dcpl, H5D_ALLOC_TIME_EARLY) < 0 ||
      H5Pset_fill_time(dcpl, H5D_FILL_TIME_NEVER) < 0)
    FD_TRY(h5_failed(__FILE__, __LINE__, FD_ERR_IO, path, "properties"));
  TRY_H5(file = H5Fcreate(path, H5F_ACC_TRUNC, fcpl, fapl), FD_ERR_IO, "cannot be created");
  if (put_i64(file, "format_version", FD_LAYOUT_VERSION) < 0 || put_text(file, "units", units) < 0 ||
      put_i64(file, "step", meta->step) < 0 || put_i64(file, "samples_seen", meta->samples_seen) < 0 ||
      put_u64(file, "seed", meta->seed) < 0 || put_i64(file, "parameters", meta->parameters) < 0 ||
      put_text(file, "vae_hash", meta->vae_hash) < 0 || put_text(file, "text_encoder_hash", meta->text_encoder_hash) < 0 ||
      put_text(file, "config", meta->config) < 0 || put_u64(file, "checksum", sum_meta(meta)) < 0)
    FD_TRY(h5_failed(__FILE__, __LINE__, FD_ERR_IO, path, "attributes"));
  for (int i = 0; i < meta->n_counters; i++) {
    char name[96];
    snprintf(name, sizeof name, "counter_%s", meta->counters[i].name);
    TRY_H5(put_i64(file, name, meta->counters[i].value), FD_ERR_IO, name);
  }
  for (int i = 0; i < n; i++) {
    struct fd_layout_entry *e = &entry[i];
    hsize_t dims[FD_CHECKPOINT_MAX_NDIM];
    for (int d = 0; d < e->ndim; d++) dims[d] = (hsize_t)e->shape[d];
    TRY_H5(make_groups(file, gcpl, e->name), FD_ERR_IO, e->name);
    TRY_H5(space = e->ndim ? H5Screate_simple(e->ndim, dims, NULL) : H5Screate(H5S_SCALAR), FD_ERR_IO, e->name);
    TRY_H5(set = H5Dcreate2(file, e->name, H5T_IEEE_F32LE, space, H5P_DEFAULT, dcpl, H5P_DEFAULT), FD_ERR_IO, e->name);
    TRY_H5(put_u64(set, "checksum", 0), FD_ERR_IO, e->name);
    haddr_t at = H5Dget_offset(set);
    if (at == HADDR_UNDEF && e->numel > 0) FD_TRY(h5_failed(__FILE__, __LINE__, FD_ERR_IO, path, e->name));
    e->at = e->numel > 0 ? (int64_t)at : 0;
    TRY_H5(H5Dclose(set), FD_ERR_IO, e->name);
    set = -1;
    TRY_H5(H5Sclose(space), FD_ERR_IO, e->name);
    space = -1;
  }
  hid_t closing = file;
  file = -1;
  TRY_H5(H5Fclose(closing), FD_ERR_IO, "layout");
  struct stat s; /* close may return 0 on a full disk */
  if (stat(path, &s) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno)));
  for (int i = 0; i < n; i++)
    if (entry[i].at + 4 * entry[i].numel > s.st_size)
      FD_TRY(FD_FAIL(FD_ERR_IO, "%s: data set /%s: the layout could not be written", path, entry[i].name));
  *bytes = s.st_size;
done:
  if (set >= 0) H5Dclose(set);
  if (space >= 0) H5Sclose(space);
  if (file >= 0) H5Fclose(file);
  if (dcpl >= 0) H5Pclose(dcpl);
  if (gcpl >= 0) H5Pclose(gcpl);
  if (fcpl >= 0) H5Pclose(fcpl);
  if (fapl >= 0) H5Pclose(fapl);
  quiet_end(&q);
  return st;
}

fd_status fd_layout_set_sums(const char *path, int n, const struct fd_layout_entry *entry) {
  fd_status st = FD_OK;
  hid_t file = -1, fapl = -1, set = -1, a = -1;
  struct quiet q;
  quiet_begin(&q);
  TRY_H5(fapl = H5Pcreate(H5P_FILE_ACCESS), FD_ERR_IO, "properties");
  TRY_H5(H5Pset_file_locking(fapl, false, true), FD_ERR_IO, "properties");
  TRY_H5(file = H5Fopen(path, H5F_ACC_RDWR, fapl), FD_ERR_IO, "cannot be opened");
  for (int i = 0; i < n; i++) {
    /* not H5Aopen_by_name: in HDF5 1.10.8 it opened the attribute of this name of the file itself */
    TRY_H5(set = H5Dopen2(file, entry[i].name, H5P_DEFAULT), FD_ERR_IO, entry[i].name);
    TRY_H5(a = H5Aopen(set, "checksum", H5P_DEFAULT), FD_ERR_IO, entry[i].name);
    TRY_H5(H5Awrite(a, H5T_NATIVE_UINT64, &entry[i].sum), FD_ERR_IO, entry[i].name);
    TRY_H5(H5Aclose(a), FD_ERR_IO, entry[i].name);
    a = -1;
    TRY_H5(H5Dclose(set), FD_ERR_IO, entry[i].name);
    set = -1;
  }
  hid_t closing = file;
  file = -1;
  TRY_H5(H5Fclose(closing), FD_ERR_IO, "checksums");
done:
  if (a >= 0) H5Aclose(a);
  if (set >= 0) H5Dclose(set);
  if (file >= 0) H5Fclose(file);
  if (fapl >= 0) H5Pclose(fapl);
  quiet_end(&q);
  return st;
}

/* ---- reading ------------------------------------------------------------------------------------------------------- */

void fd_layout_text_free(struct fd_layout_text *text) {
  free(text->config);
  free(text->vae_hash);
  free(text->text_encoder_hash);
  memset(text, 0, sizeof *text);
}

static herr_t get_number(hid_t at, const char *name, hid_t mem_type, void *v) {
  hid_t a = H5Aopen(at, name, H5P_DEFAULT);
  if (a < 0) return -1;
  herr_t rc = H5Aread(a, mem_type, v);
  H5Aclose(a);
  return rc;
}

static herr_t get_text(hid_t at, const char *name, char **out) {
  herr_t rc = -1;
  hid_t a = H5Aopen(at, name, H5P_DEFAULT);
  hid_t type = a < 0 ? -1 : H5Aget_type(a);
  if (type >= 0 && H5Tget_class(type) == H5T_STRING && !H5Tis_variable_str(type)) {
    char *s = calloc(H5Tget_size(type) + 1, 1);
    if (s && H5Aread(a, type, s) >= 0) {
      *out = s;
      s = NULL;
      rc = 0;
    }
    free(s);
  }
  if (type >= 0) H5Tclose(type);
  if (a >= 0) H5Aclose(a);
  return rc;
}

struct list {
  const char *path;
  int n, cap;
  struct fd_layout_entry *entry;
  fd_status st;
};

static herr_t visit(hid_t file, const char *name, const H5O_info_t *info, void *user) {
  struct list *l = user;
  if (info->type != H5O_TYPE_DATASET) return 0;
  const char *path = l->path;
  fd_status st = FD_OK;
  hid_t set = -1, space = -1, type = -1, dcpl = -1;
  struct fd_layout_entry e = {.ndim = 0};
  hsize_t dims[FD_CHECKPOINT_MAX_NDIM];
  if (strlen(name) >= sizeof e.name) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: data set /%s: name too long", path, name));
  snprintf(e.name, sizeof e.name, "%s", name);
  TRY_H5(set = H5Dopen2(file, name, H5P_DEFAULT), FD_ERR_FORMAT, name);
  TRY_H5(space = H5Dget_space(set), FD_ERR_FORMAT, name);
  TRY_H5(type = H5Dget_type(set), FD_ERR_FORMAT, name);
  TRY_H5(dcpl = H5Dget_create_plist(set), FD_ERR_FORMAT, name);
  e.ndim = H5Sget_simple_extent_ndims(space);
  if (e.ndim < 0 || e.ndim > FD_CHECKPOINT_MAX_NDIM)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: data set /%s: %d dimensions, at most %d are known", path, name, e.ndim, FD_CHECKPOINT_MAX_NDIM));
  if (H5Tequal(type, H5T_IEEE_F32LE) <= 0 || H5Pget_layout(dcpl) != H5D_CONTIGUOUS)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT,
                   "%s: data set /%s: not stored as contiguous little-endian float32 (h5repack -l CONTI -f NONE unpacks chunks)", path,
                   name));
  TRY_H5(H5Sget_simple_extent_dims(space, dims, NULL), FD_ERR_FORMAT, name);
  e.numel = 1;
  for (int d = 0; d < e.ndim; d++) {
    e.shape[d] = (int64_t)dims[d];
    e.numel *= e.shape[d];
  }
  haddr_t at = H5Dget_offset(set);
  if (e.numel > 0 && at == HADDR_UNDEF) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: data set /%s: has no data", path, name));
  e.at = e.numel > 0 ? (int64_t)at : 0;
  if (get_number(set, "checksum", H5T_NATIVE_UINT64, &e.sum) < 0)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: data set /%s: has no attribute checksum", path, name));
  if (l->n == l->cap) {
    int cap = 2 * l->cap + 64;
    struct fd_layout_entry *p = realloc(l->entry, (size_t)cap * sizeof *p);
    if (!p) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d data sets", cap));
    l->entry = p;
    l->cap = cap;
  }
  l->entry[l->n++] = e;
done:
  if (dcpl >= 0) H5Pclose(dcpl);
  if (type >= 0) H5Tclose(type);
  if (space >= 0) H5Sclose(space);
  if (set >= 0) H5Dclose(set);
  l->st = st;
  return st == FD_OK ? 0 : -1;
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const struct fd_layout_entry *)a)->name, ((const struct fd_layout_entry *)b)->name);
}

/* HDF5 does not open a file that is shorter than it says. Its beginning in a sparse file of the right length does open, and
 * tells what the lost part held. `copy` gets the name of that file, which the caller removes; false: no luck. */
static bool mend(int fd, int64_t bytes, int64_t wanted, char *copy, size_t size) {
  const char *tmp = getenv("TMPDIR"), *const places[] = {"/dev/shm", tmp && tmp[0] ? tmp : "/tmp"};
  char buffer[1 << 14];
  int64_t most = bytes < ((int64_t)16 << 20) ? bytes : (int64_t)16 << 20;
  for (int i = 0; i < 2; i++) {
    snprintf(copy, size, "%s/fdhpc-XXXXXX", places[i]);
    int out = mkstemp(copy);
    if (out < 0) continue;
    int64_t at = 0;
    while (at < most) {
      ssize_t k = pread(fd, buffer, sizeof buffer, at);
      if (k <= 0 || pwrite(out, buffer, (size_t)k, at) != k) break;
      at += k;
    }
    bool good = at >= most && ftruncate(out, wanted) == 0;
    close(out);
    if (good) return true;
    unlink(copy);
  }
  copy[0] = 0;
  return false;
}

fd_status fd_layout_read(const char *path, struct fd_checkpoint_meta *meta, struct fd_layout_text *text, int *n,
                         struct fd_layout_entry **entry) {
  fd_status st = FD_OK;
  hid_t file = -1, fapl = -1;
  int fd = -1;
  char copy[4096] = "";
  struct list l = {.path = path};
  struct fd_checkpoint_meta m = {.step = -1};
  struct fd_layout_text t = {.config = NULL};
  struct quiet q;
  quiet_begin(&q);

  fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno)));
  struct stat s;
  if (fstat(fd, &s) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno)));
  unsigned char head[48]; /* superblock of version 2 or 3: signature, version, ..., bytes 28..35 the file's length */
  if (!S_ISREG(s.st_mode) || pread(fd, head, sizeof head, 0) != (ssize_t)sizeof head || memcmp(head, "\211HDF\r\n\032\n", 8) != 0)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: not an HDF5 file (%lld bytes)", path, (long long)s.st_size));
  int64_t wanted = s.st_size;
  if (head[8] == 2 || head[8] == 3) memcpy(&wanted, head + 28, 8);
  bool cut = wanted > s.st_size;
  const char *open_path = cut && mend(fd, s.st_size, wanted, copy, sizeof copy) ? copy : path;
  TRY_H5(fapl = H5Pcreate(H5P_FILE_ACCESS), FD_ERR_IO, "properties");
  TRY_H5(H5Pset_file_locking(fapl, false, true), FD_ERR_IO, "properties");
  file = H5Fopen(open_path, H5F_ACC_RDONLY, fapl);
  if (file < 0 && cut)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: cut off: %lld of %lld bytes are there, and no data set can be found in them", path,
                   (long long)s.st_size, (long long)wanted));
  TRY_H5(file, FD_ERR_FORMAT, "cannot be opened");
  int64_t version = 0;
  if (get_number(file, "format_version", H5T_NATIVE_INT64, &version) < 0)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: no attribute format_version: not a checkpoint of fdhpc", path));
  if (version != FD_LAYOUT_VERSION)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: format_version %lld, this program reads %d", path, (long long)version, FD_LAYOUT_VERSION));
  herr_t rc = H5Ovisit2(file, H5_INDEX_NAME, H5_ITER_INC, visit, &l, H5O_INFO_BASIC);
  if (rc < 0 && l.st == FD_OK) FD_TRY(h5_failed(__FILE__, __LINE__, FD_ERR_FORMAT, path, "data sets cannot be listed"));
  FD_TRY(l.st);
  const struct fd_layout_entry *lost = NULL; /* the first in the file that is not whole */
  for (int i = 0; i < l.n; i++) {
    const struct fd_layout_entry *e = &l.entry[i];
    if (e->at + 4 * e->numel > s.st_size && (!lost || e->at < lost->at)) lost = e;
  }
  if (lost)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: cut off: %lld of %lld bytes are there; the first data set that is not whole is /%s", path,
                   (long long)s.st_size, (long long)wanted, lost->name));
  if (cut)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: cut off: %lld of %lld bytes are there (all data sets are, attributes may not be)", path,
                   (long long)s.st_size, (long long)wanted));

  uint64_t sum = 0;
  if (get_number(file, "step", H5T_NATIVE_INT64, &m.step) < 0 ||
      get_number(file, "samples_seen", H5T_NATIVE_INT64, &m.samples_seen) < 0 ||
      get_number(file, "parameters", H5T_NATIVE_INT64, &m.parameters) < 0 ||
      get_number(file, "seed", H5T_NATIVE_UINT64, &m.seed) < 0 || get_number(file, "checksum", H5T_NATIVE_UINT64, &sum) < 0 ||
      get_text(file, "config", &t.config) < 0 || get_text(file, "vae_hash", &t.vae_hash) < 0 ||
      get_text(file, "text_encoder_hash", &t.text_encoder_hash) < 0)
    FD_TRY(h5_failed(__FILE__, __LINE__, FD_ERR_FORMAT, path, "attributes of the file"));
  m.config = t.config;
  m.vae_hash = t.vae_hash;
  m.text_encoder_hash = t.text_encoder_hash;
  H5O_info_t info;
  TRY_H5(H5Oget_info2(file, &info, H5O_INFO_NUM_ATTRS), FD_ERR_FORMAT, "attributes");
  for (hsize_t i = 0; i < info.num_attrs && m.n_counters < FD_CHECKPOINT_MAX_COUNTERS; i++) {
    char name[96] = "";
    TRY_H5(H5Aget_name_by_idx(file, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name, H5P_DEFAULT), FD_ERR_FORMAT, "attributes");
    if (strncmp(name, "counter_", 8) != 0) continue;
    int k = m.n_counters++;
    snprintf(t.counter[k], sizeof t.counter[k], "%s", name + 8);
    TRY_H5(get_number(file, name, H5T_NATIVE_INT64, &m.counters[k].value), FD_ERR_FORMAT, name);
    m.counters[k].name = t.counter[k];
  }
  if (sum != sum_meta(&m))
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: corrupted: the attributes of the file do not match their checksum", path));
  qsort(l.entry, (size_t)l.n, sizeof *l.entry, by_name);

  *text = t;
  memset(&t, 0, sizeof t);
  *meta = m;
  for (int k = 0; k < m.n_counters; k++) meta->counters[k].name = text->counter[k];
  *n = l.n;
  *entry = l.entry;
  l.entry = NULL;
done:
  if (file >= 0) H5Fclose(file);
  if (fapl >= 0) H5Pclose(fapl);
  if (copy[0]) unlink(copy);
  if (fd >= 0) close(fd);
  free(l.entry);
  fd_layout_text_free(&t);
  quiet_end(&q);
  return st;
}
