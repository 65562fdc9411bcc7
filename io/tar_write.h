// SPDX-License-Identifier: Apache-2.0
// Writes a tar: plain ustar, with PAX headers only where a name is long or not ASCII. Times and owners are 0, so that
// the same members give the same bytes.
#ifndef FD_IO_TAR_WRITE_H
#define FD_IO_TAR_WRITE_H

#include <stddef.h>

#include "base/status.h"

typedef struct fd_tar_writer fd_tar_writer;

/** Writes to `path`.part until fd_tar_writer_close renames it. FD_ERR_IO. */
fd_status fd_tar_writer_create(const char *path, fd_tar_writer **out);
/** Append a regular file. FD_ERR_IO. */
fd_status fd_tar_writer_add(fd_tar_writer *w, const char *name, const void *data, size_t bytes);
/** Finish and rename. *w becomes NULL, also on failure. FD_ERR_IO (a full disk shows here at the latest). */
fd_status fd_tar_writer_close(fd_tar_writer **w);
/** Give up: nothing but the .part file is left. Accepts NULL. */
void fd_tar_writer_destroy(fd_tar_writer **w);

#endif
