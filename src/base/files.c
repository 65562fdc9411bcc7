// SPDX-License-Identifier: Apache-2.0
// Folders are made from the top down, as mkdir -p does.
#include "base/files.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

fd_status fd_folder_make(const char *path) {
  char part[4096];
  struct stat info;
  if (!*path) return FD_FAIL(FD_ERR_IO, "a folder without a name cannot be made");
  if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part) return FD_FAIL(FD_ERR_IO, "%s: the name is too long", path);
  for (char *p = part + 1;; p++) {
    if (*p != '/' && *p) continue;
    const char c = *p;
    *p = 0;
    if (mkdir(part, 0777) != 0 && errno != EEXIST) return FD_FAIL(FD_ERR_IO, "%s: cannot make the folder: %s", part, strerror(errno));
    *p = c;
    if (!c) break;
  }
  if (stat(path, &info) != 0 || !S_ISDIR(info.st_mode)) return FD_FAIL(FD_ERR_IO, "%s: is not a folder", path);
  return FD_OK;
}
