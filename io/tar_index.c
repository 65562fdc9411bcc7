// SPDX-License-Identifier: Apache-2.0
// Walks over tars through libarchive. archive_filter_bytes right after a header is the offset of the member's data; the header's
// own position + 512 would be wrong for PAX and GNU long names. No filters: an offset in a compressed file means nothing.
#include "io/tar_index.h"

#include <archive.h>
#include <archive_entry.h>
#include <ctype.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int64_t fd_tar_split_name(const char *name, size_t bytes) {
  if (bytes >= 4 && name[0] == '_' && name[1] == '_') { /* __x__ as the first component */
    const char *slash = memchr(name, '/', bytes);
    const size_t n = slash ? (size_t)(slash - name) : bytes;
    if (n >= 4 && name[n - 1] == '_' && name[n - 2] == '_') return -1;
  }
  size_t base = bytes; /* of the last component */
  while (base > 0 && name[base - 1] != '/') base--;
  const char *dot = memchr(name + base, '.', bytes - base);
  if (!dot) return -1;
  const size_t at = (size_t)(dot - name);
  if (at > base) return (int64_t)at;
  /* ".hidden": the key is then the path before it, if its last component has no dot */
  if (at == 0) return -1;
  size_t from = at - 1;
  while (from > 0 && name[from - 1] != '/') from--;
  return memchr(name + from, '.', at - from) ? -1 : (int64_t)at;
}

/* What the first bytes say, before libarchive looks. */
static enum fd_shard_state first_look(const char *path, int64_t *bytes) {
  static const struct {
    const char *mark;
    size_t n;
  } compressed[] = {{"\x1f\x8b", 2}, {"BZh", 3}, {"\xfd" "7zXZ", 5}, {"\x28\xb5\x2f\xfd", 4}, {"\x04\x22\x4d\x18", 4}, {"\x1f\x9d", 2}, {"PK\x03\x04", 4}, {"LZIP", 4}};
  struct stat about;
  unsigned char head[512];
  *bytes = 0;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return FD_SHARD_MISSING;
  if (fstat(fd, &about) != 0 || !S_ISREG(about.st_mode)) {
    close(fd);
    return FD_SHARD_MISSING;
  }
  *bytes = about.st_size;
  const ssize_t n = pread(fd, head, sizeof head, 0);
  close(fd);
  if (n < 0) return FD_SHARD_MISSING;
  if (n == 0) return FD_SHARD_EMPTY;
  for (size_t i = 0; i < sizeof compressed / sizeof *compressed; i++)
    if ((size_t)n >= compressed[i].n && memcmp(head, compressed[i].mark, compressed[i].n) == 0) return FD_SHARD_COMPRESSED;
  return n < 512 ? FD_SHARD_NOT_TAR : FD_SHARD_WHOLE;
}

fd_status fd_tar_scan(const char *path, fd_status (*each)(void *context, const struct fd_tar_member *member), void *context,
                      enum fd_shard_state *state) {
  fd_status st = FD_OK;
  struct archive *a = NULL;
  char *lower = NULL;
  size_t lower_capacity = 0;
  int64_t file_bytes;
  *state = first_look(path, &file_bytes);
  if (*state != FD_SHARD_WHOLE) return FD_OK;
  a = archive_read_new();
  if (!a) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory to read it", path));
  archive_read_support_format_tar(a);
  archive_read_support_format_gnutar(a);
  if (archive_read_open_filename(a, path, 1 << 14) != ARCHIVE_OK) {
    *state = FD_SHARD_NOT_TAR;
    goto done;
  }
  for (bool first = true;; first = false) {
    struct archive_entry *e;
    const int got = archive_read_next_header(a, &e);
    if (got == ARCHIVE_EOF) break;
    if (got == ARCHIVE_RETRY || got < ARCHIVE_WARN) { /* a wrong or cut header. libarchive would look for the next good one (RETRY); webdataset ends here */
      const char *why = archive_error_string(a);
      const bool cut = why && (strstr(why, "runcated") || strstr(why, "end of file"));
      *state = first && !cut ? FD_SHARD_NOT_TAR : cut ? FD_SHARD_CUT : FD_SHARD_DAMAGED;
      break;
    }
    if (archive_entry_sparse_count(e) > 0) {
      *state = FD_SHARD_SPARSE;
      break;
    }
    const int64_t offset = archive_filter_bytes(a, 0), bytes = archive_entry_size(e);
    if (bytes < 0 || offset < 0 || bytes > file_bytes - offset) {
      *state = FD_SHARD_CUT;
      break;
    }
    if (archive_entry_filetype(e) != AE_IFREG || archive_entry_hardlink(e) || archive_entry_hardlink_utf8(e)) continue;
    /* PAX names are UTF-8 whatever the locale; the others are bytes */
    const char *name = archive_entry_pathname_utf8(e);
    if (!name) name = archive_entry_pathname(e);
    if (!name) continue;
    const size_t n = strlen(name);
    const int64_t dot = fd_tar_split_name(name, n);
    if (dot < 0) continue;
    const size_t extension_bytes = n - (size_t)dot - 1;
    if (extension_bytes + 1 > lower_capacity) {
      char *more = realloc(lower, extension_bytes + 64);
      if (!more) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory to read it", path));
      lower = more;
      lower_capacity = extension_bytes + 64;
    }
    for (size_t i = 0; i <= extension_bytes; i++) {
      const char c = name[(size_t)dot + 1 + i];
      lower[i] = c >= 'A' && c <= 'Z' ? (char)(c + 32) : c;
    }
    const struct fd_tar_member member = {name, lower, (size_t)dot, extension_bytes, offset, bytes};
    FD_TRY(each(context, &member));
  }
done:
  free(lower);
  if (a) archive_read_free(a);
  return st;
}
