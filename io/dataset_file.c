// SPDX-License-Identifier: Apache-2.0
// Tables of a data set in an HDF5 file: rank 0 lays the file out, all ranks write their rows, readers map them.
#include "io/dataset_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/h5.h"

/* 64-bit FNV-1a, finished by the mixer of splitmix64 */
uint64_t fd_hash_bytes(uint64_t seed, const void *data, size_t bytes) {
  const unsigned char *p = data;
  uint64_t h = seed ^ 0xcbf29ce484222325u;
  for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 0x100000001b3u;
  h ^= h >> 30, h *= 0xbf58476d1ce4e5b9u;
  h ^= h >> 27, h *= 0x94d049bb133111ebu;
  return h ^ h >> 31;
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

fd_status fd_rows_add(struct fd_rows *rows, const struct fd_row *row, const char *key) {
  if (rows->n == rows->capacity) {
    const int64_t capacity = rows->capacity ? rows->capacity * 3 / 2 : 1024;
    struct fd_row *at = realloc(rows->at, (size_t)capacity * sizeof *at);
    if (!at) return FD_FAIL(FD_ERR_NOMEM, "no memory for the index of %lld samples", (long long)capacity);
    rows->at = at;
    rows->capacity = capacity;
  }
  if (rows->text_bytes + row->key_bytes > rows->text_capacity) {
    const int64_t capacity = (rows->text_bytes + row->key_bytes) * 3 / 2 + 4096;
    char *text = realloc(rows->text, (size_t)capacity);
    if (!text) return FD_FAIL(FD_ERR_NOMEM, "no memory for the keys of %lld samples", (long long)rows->n);
    rows->text = text;
    rows->text_capacity = capacity;
  }
  rows->at[rows->n] = *row;
  rows->at[rows->n].key = rows->text_bytes;
  memcpy(rows->text + rows->text_bytes, key, (size_t)row->key_bytes);
  rows->text_bytes += row->key_bytes;
  rows->n++;
  return FD_OK;
}

void fd_rows_free(struct fd_rows *rows) {
  free(rows->at);
  free(rows->text);
  *rows = (struct fd_rows){0};
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

/* attributes lost_<name>, by enum fd_bad */
static const char *const lost_names[FD_BAD_COUNT] = {"",           "no_image",    "no_caption",  "read",
                                                     "unknown_image", "damaged_image", "large_image", "caption_not_utf8"};

/* columns in the file, in this order */
enum { IMAGE_SHARD, IMAGE_OFFSET, IMAGE_SIZE, CAPTION_SHARD, CAPTION_OFFSET, CAPTION_SIZE, KEY_OFFSET = 9, KEY_TEXT, N_COLUMNS };

static fd_status write_at(int fd, const char *path, const void *data, size_t bytes, int64_t offset) {
  const char *p = data;
  while (bytes) {
    const size_t piece = bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30;
    const ssize_t n = pwrite(fd, p, piece, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return FD_FAIL(FD_ERR_IO, "%s: cannot write %zu bytes at %lld: %s", path, bytes, (long long)offset, n ? strerror(errno) : "disk full");
    p += n;
    bytes -= (size_t)n;
    offset += n;
  }
  return FD_OK;
}

static fd_status reserve_room(const char *path, int64_t from, int64_t bytes) {
  const int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return FD_FAIL(FD_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
  int why = bytes > 0 ? posix_fallocate(fd, from, bytes) : 0;
  close(fd);
  if (why == EOPNOTSUPP || why == EINVAL) why = 0; /* a file system that cannot: the writes will tell */
  if (why) return FD_FAIL(FD_ERR_IO, "%s: cannot reserve %lld bytes: %s", path, (long long)bytes, strerror(why));
  return FD_OK;
}

/* A contiguous data set whose place in the file is known at once. */
static fd_status create_column(hid_t file, const char *path, const char *name, hid_t type, int64_t n, int64_t *offset) {
  fd_status st = FD_OK;
  const hsize_t dims = (hsize_t)n;
  hid_t space = H5Screate_simple(1, &dims, NULL), create = H5Pcreate(H5P_DATASET_CREATE), link = H5Pcreate(H5P_LINK_CREATE), set = -1;
  H5Pset_layout(create, H5D_CONTIGUOUS);
  H5Pset_alloc_time(create, H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(create, H5D_FILL_TIME_NEVER);
  H5Pset_create_intermediate_group(link, 1);
  set = H5Dcreate2(file, name, type, space, link, create, H5P_DEFAULT);
  const haddr_t at = set < 0 ? HADDR_UNDEF : H5Dget_offset(set);
  if (set < 0 || at == HADDR_UNDEF) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot make %s [%lld]", path, name, (long long)n));
  *offset = (int64_t)at;
done:
  if (set >= 0) H5Dclose(set);
  H5Pclose(link);
  H5Pclose(create);
  H5Sclose(space);
  return st;
}

static fd_status open_to_change(const char *path, hid_t *file) {
  hid_t list = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_alignment(list, 1, 8); /* columns are mapped and read in place */
#if H5_VERSION_GE(1, 10, 7)
  H5Pset_file_locking(list, 1, 1);
#endif
  *file = H5Fopen(path, H5F_ACC_RDWR, list);
  H5Pclose(list);
  return *file < 0 ? FD_FAIL(FD_ERR_IO, "%s: cannot be opened for writing", path) : FD_OK;
}

fd_status fd_dataset_file_create_data(const char *path, int64_t bytes, int64_t *offset) {
  fd_status st = FD_OK;
  hid_t file = -1;
  FD_TRY(fd_h5_create(path, &file));
  FD_TRY(create_column(file, path, "/data", H5T_STD_U8LE, bytes, offset));
  FD_TRY(fd_h5_close(&file));
  FD_TRY(reserve_room(path, *offset, bytes));
done:
  if (file >= 0) fd_h5_close(&file);
  return st;
}

static fd_status write_shards(hid_t file, const char *path, const struct fd_dataset_about *about) {
  fd_status st = FD_OK;
  size_t longest = 1;
  char *text = NULL;
  int64_t *column = NULL;
  hid_t type = -1, space = -1, set = -1;
  const int64_t n = about->n_shards;
  for (int64_t i = 0; i < n; i++)
    if (strlen(about->shards[i].path) > longest) longest = strlen(about->shards[i].path);
  text = calloc((size_t)n, longest);
  column = calloc((size_t)n, sizeof *column);
  if (!text || !column) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for %lld tars", path, (long long)n));
  static const char *const names[] = {"/shard/bytes", "/shard/mtime_ns", "/shard/state"};
  for (int c = 0; c < 3; c++) {
    for (int64_t i = 0; i < n; i++)
      column[i] = c == 0 ? about->shards[i].bytes : c == 1 ? about->shards[i].mtime_ns : about->shards[i].state;
    FD_TRY(fd_h5_write(file, names[c], FD_I64, 1, &n, column));
  }
  for (int64_t i = 0; i < n; i++) memcpy(text + (size_t)i * longest, about->shards[i].path, strlen(about->shards[i].path));
  const hsize_t dims = (hsize_t)n;
  type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, longest);
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  space = H5Screate_simple(1, &dims, NULL);
  set = H5Dcreate2(file, "/shard/path", type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  if (set < 0 || H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text) < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot write /shard/path", path));
done:
  if (set >= 0) H5Dclose(set);
  if (space >= 0) H5Sclose(space);
  if (type >= 0) H5Tclose(type);
  free(text);
  free(column);
  return st;
}

struct layout {
  int64_t offset[N_COLUMNS];
};

static fd_status lay_out(const char *path, bool pack_data, const struct fd_dataset_about *about, int64_t n, int64_t text_bytes, uint64_t fingerprint,
                         struct layout *layout) {
  fd_status st = FD_OK;
  hid_t file = -1;
  char name[1024];
  if (pack_data)
    FD_TRY(open_to_change(path, &file));
  else
    FD_TRY(fd_h5_create(path, &file));
  static const char *const parts[] = {"shard", "offset", "size"};
  for (int c = 0; c < 3; c++) {
    const char *column = c == 0 ? "" : about->caption_columns[c - 1];
    if (c > 0 && !*column) continue;
    for (int part = 0; part < 3; part++) {
      snprintf(name, sizeof name, c == 0 ? "/image%s/%s" : "/caption/%s/%s", column, parts[part]);
      FD_TRY(create_column(file, path, name, part == 0 ? H5T_STD_I32LE : H5T_STD_I64LE, n, &layout->offset[3 * c + part]));
    }
  }
  FD_TRY(create_column(file, path, "/key/offset", H5T_STD_I64LE, n + 1, &layout->offset[KEY_OFFSET]));
  FD_TRY(create_column(file, path, "/key/text", H5T_STD_U8LE, text_bytes, &layout->offset[KEY_TEXT]));
  FD_TRY(write_shards(file, path, about));
  FD_TRY(fd_h5_attr_write_text(file, "/", "format", "fdhpc data set"));
  FD_TRY(fd_h5_attr_write_i64(file, "/", "version", FD_DATASET_VERSION));
  FD_TRY(fd_h5_attr_write_text(file, "/", "kind", about->pack ? "pack" : "index"));
  FD_TRY(fd_h5_attr_write_i64(file, "/", "samples", n));
  FD_TRY(fd_h5_attr_write_text(file, "/", "image_column", about->image_column));
  FD_TRY(fd_h5_attr_write_text(file, "/", "caption_column", about->caption_columns[0]));
  FD_TRY(fd_h5_attr_write_text(file, "/", "caption_column_original", about->caption_columns[1]));
  FD_TRY(fd_h5_attr_write_i64(file, "/", "source", (int64_t)about->source));
  FD_TRY(fd_h5_attr_write_i64(file, "/", "fingerprint", (int64_t)fingerprint));
  for (int kind = FD_BAD_NONE + 1; kind < FD_BAD_COUNT; kind++) {
    snprintf(name, sizeof name, "lost_%s", lost_names[kind]);
    if (about->lost[kind]) FD_TRY(fd_h5_attr_write_i64(file, "/", name, about->lost[kind]));
  }
  FD_TRY(fd_h5_close(&file));
done:
  if (file >= 0) fd_h5_close(&file);
  return st;
}

/* One column of this rank's rows, 64 Ki rows at a time. */
static fd_status write_column(int fd, const char *path, const struct fd_rows *rows, int column, int64_t first, int64_t offset) {
  fd_status st = FD_OK;
  enum { AT_ONCE = 65536 };
  const bool narrow = column % 3 == 0 && column != KEY_OFFSET;
  int64_t *wide = malloc(AT_ONCE * sizeof *wide), key = 0;
  if (!wide) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path));
  int32_t *small = (int32_t *)wide;
  for (int64_t from = 0; from < rows->n; from += AT_ONCE) {
    const int64_t n = rows->n - from < AT_ONCE ? rows->n - from : AT_ONCE;
    for (int64_t i = 0; i < n; i++) {
      const struct fd_row *row = &rows->at[from + i];
      const struct fd_place *place = column < 3 ? &row->image : column < 6 ? &row->caption[0] : &row->caption[1];
      if (column == KEY_OFFSET)
        wide[i] = key, key += row->key_bytes;
      else if (narrow)
        small[i] = place->shard;
      else
        wide[i] = column % 3 == 1 ? place->offset : place->bytes;
    }
    if (column == KEY_OFFSET)
      for (int64_t i = 0; i < n; i++) wide[i] += first; /* here `first` is the rank's first byte of text */
    const size_t width = narrow ? 4 : 8;
    FD_TRY(write_at(fd, path, wide, (size_t)n * width, offset + from * (int64_t)width));
  }
done:
  free(wide);
  return st;
}

fd_status fd_dataset_file_write(fd_comm *comm, const char *path, bool pack_data, const struct fd_dataset_about *about, const struct fd_rows *rows) {
  fd_status st = FD_OK;
  const int rank = fd_comm_rank(comm), size = fd_comm_size(comm);
  int fd = -1;
  int64_t mine[2] = {rows->n, rows->text_bytes}, first[2] = {0, 0}, total[2] = {0, 0};
  int64_t *all = malloc((size_t)size * sizeof mine);
  struct layout layout = {{0}};
  FD_TRY(fd_agree(comm, all ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path)));
  FD_TRY(fd_comm_allgather(comm, mine, sizeof mine, all));
  for (int r = 0; r < size; r++)
    for (int k = 0; k < 2; k++) {
      if (r < rank) first[k] += all[2 * r + k];
      total[k] += all[2 * r + k];
    }
  if (total[0] < 1 || total[1] < 1) FD_TRY(FD_FAIL(FD_ERR_DATA, "%s: no samples to write", path));

  uint64_t fingerprint = 0;
  for (int64_t i = 0; i < rows->n; i++) {
    const struct fd_row *row = &rows->at[i];
    const int64_t about_row[4] = {first[0] + i, row->image.bytes, row->caption[0].bytes, row->caption[1].bytes};
    fingerprint += fd_hash_bytes(fd_hash_bytes(0, about_row, sizeof about_row), rows->text + row->key, (size_t)row->key_bytes);
  }
  FD_TRY(fd_comm_allreduce_u64(comm, &fingerprint, 1, FD_COMM_SUM));

  if (rank == 0) st = lay_out(path, pack_data, about, total[0], total[1], fingerprint, &layout);
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_bcast(comm, &layout, sizeof layout, 0));

  fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) st = FD_FAIL(FD_ERR_IO, "%s: cannot open: %s (must all ranks see this folder?)", path, strerror(errno));
  for (int c = 0; c < 9 && st == FD_OK; c++) {
    if (c >= 3 && !*about->caption_columns[c / 3 - 1]) continue;
    st = write_column(fd, path, rows, c, 0, layout.offset[c] + first[0] * (c % 3 == 0 ? 4 : 8));
  }
  if (st == FD_OK) st = write_column(fd, path, rows, KEY_OFFSET, first[1], layout.offset[KEY_OFFSET] + first[0] * 8);
  if (st == FD_OK && rank == 0) st = write_at(fd, path, &total[1], 8, layout.offset[KEY_OFFSET] + total[0] * 8);
  if (st == FD_OK) st = write_at(fd, path, rows->text, (size_t)rows->text_bytes, layout.offset[KEY_TEXT] + first[1]);
  if (st == FD_OK && fsync(fd) != 0) st = FD_FAIL(FD_ERR_IO, "%s: cannot sync: %s", path, strerror(errno));
  FD_TRY(fd_agree(comm, st));
done:
  if (fd >= 0) close(fd);
  free(all);
  return st;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

static fd_status read_shards(hid_t file, const char *path, struct fd_dataset_map *map) {
  fd_status st = FD_OK;
  struct fd_h5_array columns[3] = {{0}};
  hid_t set = -1, type = -1;
  char *text = NULL;
  static const char *const names[] = {"/shard/bytes", "/shard/mtime_ns", "/shard/state"};
  for (int c = 0; c < 3; c++) FD_TRY(fd_h5_read(file, names[c], FD_I64, &columns[c]));
  map->n_shards = columns[0].numel;
  set = H5Dopen2(file, "/shard/path", H5P_DEFAULT);
  if (set >= 0) type = H5Dget_type(set);
  if (type < 0 || H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) > 0 || map->n_shards < 1 || columns[1].numel != map->n_shards ||
      columns[2].numel != map->n_shards)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: /shard is not what fdhpc writes", path));
  const size_t width = H5Tget_size(type);
  hid_t space = H5Dget_space(set);
  const int64_t n = H5Sget_simple_extent_npoints(space);
  H5Sclose(space);
  text = calloc((size_t)map->n_shards + 1, width);
  map->shards = calloc((size_t)map->n_shards, sizeof *map->shards);
  if (!text || !map->shards) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for %lld tars", path, (long long)map->n_shards));
  if (n != map->n_shards || H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text) < 0)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: /shard/path cannot be read", path));
  for (int64_t i = 0; i < map->n_shards; i++) {
    map->shards[i] = (struct fd_shard_info){strndup(text + (size_t)i * width, width), ((int64_t *)columns[0].data)[i],
                                            ((int64_t *)columns[1].data)[i], ((int64_t *)columns[2].data)[i]};
    if (!map->shards[i].path) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path));
  }
done:
  for (int c = 0; c < 3; c++) fd_h5_array_free(&columns[c]);
  if (type >= 0) H5Tclose(type);
  if (set >= 0) H5Dclose(set);
  free(text);
  return st;
}

/* Map a contiguous data set; *elements: its length. */
static fd_status map_column(hid_t file, int fd, const char *path, const char *name, size_t width, struct fd_dataset_map *map, const void **at,
                            int64_t *elements) {
  fd_status st = FD_OK;
  hid_t set = H5Dopen2(file, name, H5P_DEFAULT), type = -1, space = -1, create = -1;
  if (set < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: no %s", path, name));
  type = H5Dget_type(set);
  space = H5Dget_space(set);
  create = H5Dget_create_plist(set);
  const haddr_t offset = H5Dget_offset(set);
  struct stat about;
  const int64_t n = H5Sget_simple_extent_npoints(space);
  if (H5Tget_class(type) != H5T_INTEGER || H5Tget_size(type) != width || H5Pget_layout(create) != H5D_CONTIGUOUS || n < 1 || offset == HADDR_UNDEF)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s is not what fdhpc writes", path, name));
  if (fstat(fd, &about) != 0 || (int64_t)offset + n * (int64_t)width > about.st_size)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s ends behind the end of the file: it is truncated", path, name));
  const int64_t page = sysconf(_SC_PAGESIZE), start = (int64_t)offset / page * page;
  const size_t bytes = (size_t)((int64_t)offset - start + n * (int64_t)width);
  void *m = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, start);
  if (m == MAP_FAILED) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot map %s: %s", path, name, strerror(errno)));
  map->maps[map->n_maps].at = m;
  map->maps[map->n_maps++].bytes = bytes;
  *at = (char *)m + ((int64_t)offset - start);
  *elements = n;
done:
  if (create >= 0) H5Pclose(create);
  if (space >= 0) H5Sclose(space);
  if (type >= 0) H5Tclose(type);
  if (set >= 0) H5Dclose(set);
  return st;
}

static fd_status map_place(hid_t file, int fd, const char *path, const char *group, struct fd_dataset_map *map, struct fd_place_columns *columns) {
  fd_status st = FD_OK;
  const void *at[3];
  static const char *const parts[] = {"shard", "offset", "size"};
  for (int part = 0; part < 3; part++) {
    char name[1024];
    int64_t n;
    snprintf(name, sizeof name, "%s/%s", group, parts[part]);
    FD_TRY(map_column(file, fd, path, name, part == 0 ? 4 : 8, map, &at[part], &n));
    if (map->n == 0) map->n = n;
    if (n != map->n) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s has %lld rows, others %lld", path, name, (long long)n, (long long)map->n));
  }
  *columns = (struct fd_place_columns){at[0], at[1], at[2]};
done:
  return st;
}

/* A text attribute; NULL if it is not there. */
static char *text_attribute(hid_t file, const char *name) {
  char *text = NULL;
  return fd_h5_attr_read_text(file, "/", name, &text) == FD_OK ? text : NULL;
}

fd_status fd_dataset_map_open(const char *path, const char *image_column, const char *const caption_columns[2], struct fd_dataset_map *map) {
  fd_status st = FD_OK;
  hid_t file = -1;
  int fd = -1, n_names = 0;
  char *format = NULL, *kind = NULL, **names = NULL, name[1024];
  int64_t value = 0, n;
  const void *at;
  *map = (struct fd_dataset_map){0};
  (void)image_column; /* a file holds one picture per sample, whatever its extension was */
  FD_TRY(fd_h5_open_read(path, &file));
  format = text_attribute(file, "format");
  kind = text_attribute(file, "kind");
  if (!format || strcmp(format, "fdhpc data set") != 0 || !kind)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: an HDF5 file, but no data set of fdhpc pack", path));
  if (fd_h5_attr_read_i64(file, "/", "version", &value) != FD_OK || value != FD_DATASET_VERSION)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: data set version %lld, this program reads version %d", path, (long long)value, FD_DATASET_VERSION));
  map->pack = strcmp(kind, "pack") == 0;
  if (fd_h5_attr_read_i64(file, "/", "fingerprint", &value) == FD_OK) map->fingerprint = (uint64_t)value;
  for (int k = FD_BAD_NONE + 1; k < FD_BAD_COUNT; k++) {
    snprintf(name, sizeof name, "lost_%s", lost_names[k]);
    if (fd_h5_attr_read_i64(file, "/", name, &value) == FD_OK) map->lost[k] = value;
  }
  map->image_column = text_attribute(file, "image_column");
  FD_TRY(read_shards(file, path, map));

  fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot open: %s", path, strerror(errno)));
  FD_TRY(map_place(file, fd, path, "/image", map, &map->image));
  for (int c = 0; c < 2; c++) {
    if (!caption_columns[c] || !*caption_columns[c]) continue;
    snprintf(name, sizeof name, "/caption/%s", caption_columns[c]);
    if (!fd_h5_exists(file, name)) {
      FD_TRY(fd_h5_list(file, "/caption", false, &n_names, &names));
      FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s: has no captions \"%s\" (data.caption_column); it has \"%s\"%s", path, caption_columns[c],
                     n_names ? names[0] : "", n_names > 1 ? " and another" : ""));
    }
    FD_TRY(map_place(file, fd, path, name, map, &map->caption[c]));
  }
  FD_TRY(map_column(file, fd, path, "/key/offset", 8, map, &at, &n));
  map->key_offset = at;
  if (n != map->n + 1) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: /key/offset has %lld rows for %lld samples", path, (long long)n, (long long)map->n));
  FD_TRY(map_column(file, fd, path, "/key/text", 1, map, &at, &map->key_text_bytes));
  map->key_text = at;
done:
  free(names);
  free(format);
  free(kind);
  if (fd >= 0) close(fd);
  if (file >= 0) fd_h5_close(&file);
  if (st != FD_OK) fd_dataset_map_close(map);
  return st;
}

void fd_dataset_map_close(struct fd_dataset_map *map) {
  for (int i = 0; i < map->n_maps; i++) munmap(map->maps[i].at, map->maps[i].bytes);
  for (int64_t i = 0; map->shards && i < map->n_shards; i++) free(map->shards[i].path);
  free(map->shards);
  free(map->image_column);
  *map = (struct fd_dataset_map){0};
}

static bool same_text(hid_t file, const char *attribute, const char *want) {
  char *text = text_attribute(file, attribute);
  const bool same = text && strcmp(text, want) == 0;
  free(text);
  return same;
}

bool fd_dataset_file_fits(const char *path, const struct fd_dataset_about *about, const char **why) {
  bool fits = false;
  hid_t file = -1;
  int64_t value = 0;
  struct fd_dataset_map map = {0};
  *why = "there is none";
  if (access(path, F_OK) != 0) return false;
  *why = "the old one cannot be read";
  if (fd_h5_open_read(path, &file) != FD_OK) return false;
  if (!same_text(file, "format", "fdhpc data set") || !same_text(file, "kind", "index") ||
      fd_h5_attr_read_i64(file, "/", "version", &value) != FD_OK || value != FD_DATASET_VERSION)
    goto done;
  *why = "data.image_column or data.caption_column changed";
  if (!same_text(file, "image_column", about->image_column) || !same_text(file, "caption_column", about->caption_columns[0]) ||
      !same_text(file, "caption_column_original", about->caption_columns[1]))
    goto done;
  *why = "the list of tars changed";
  if (fd_h5_attr_read_i64(file, "/", "source", &value) != FD_OK || (uint64_t)value != about->source) goto done;
  if (read_shards(file, path, &map) != FD_OK || map.n_shards != about->n_shards) goto done;
  *why = "a tar changed (size or time)";
  for (int64_t i = 0; i < map.n_shards; i++)
    if (map.shards[i].bytes != about->shards[i].bytes || map.shards[i].mtime_ns != about->shards[i].mtime_ns) goto done;
  fits = true;
done:
  fd_dataset_map_close(&map);
  if (file >= 0) fd_h5_close(&file);
  return fits;
}
