// SPDX-License-Identifier: Apache-2.0
// Folders.
#ifndef FD_BASE_FILES_H
#define FD_BASE_FILES_H

#include "base/status.h"

/** Make a folder and its parents; one that is there is fine. FD_ERR_IO names the part that cannot be made. */
fd_status fd_folder_make(const char *path);

#endif
