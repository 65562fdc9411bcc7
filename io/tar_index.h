// SPDX-License-Identifier: Apache-2.0
// Lists the members of a tar as webdataset sees them, with the place of their bytes. Headers are read, data is skipped.
#ifndef FD_IO_TAR_INDEX_H
#define FD_IO_TAR_INDEX_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "io/dataset.h"

/** A regular member whose name has a key and an extension. Pointers are valid during the call. */
struct fd_tar_member {
  const char *key, *extension; /* extension in lower case, without its dot */
  size_t key_bytes, extension_bytes;
  int64_t offset, bytes;
};

/** Call `each` for every member, in order. *state tells how the tar ended; members before damage were given. A missing file or
 *  one that is no tar is a state, not a failure. Fails only with what `each` returns and FD_ERR_NOMEM. Local. */
fd_status fd_tar_scan(const char *path, fd_status (*each)(void *context, const struct fd_tar_member *member), void *context,
                      enum fd_shard_state *state);

/** Split a member's name into key and extension at the first dot of its last component (folders may have dots). Returns the
 *  position of that dot; -1 if the name does not match or is one of webdataset's own (__x__, __x__/...). */
int64_t fd_tar_split_name(const char *name, size_t bytes);

#endif
