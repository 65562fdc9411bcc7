// SPDX-License-Identifier: Apache-2.0
// Small helpers around HDF5 for files that one process reads or writes alone; checkpoints (collective) are io/checkpoint.h.
// The library's own error printing is switched off: a failure names file and data set.
#ifndef FD_IO_H5_H
#define FD_IO_H5_H

#include <hdf5.h>
#include <stdbool.h>

#include "base/dtype.h"
#include "base/status.h"

#define FD_H5_MAX_NDIM 8

/** HDF5's memory type of an element type; F16 and BF16 have none (-1). */
hid_t fd_h5_type(fd_dtype dtype);

/** Open for reading. FD_ERR_IO if the file cannot be opened, FD_ERR_FORMAT if it is no HDF5 file. *out is left alone on failure. */
fd_status fd_h5_open_read(const char *path, hid_t *out);
/** Create (truncate) a file for fd_h5_write. */
fd_status fd_h5_create(const char *path, hid_t *out);
/** Accepts a negative id and sets it to -1. The status matters after writing. */
fd_status fd_h5_close(hid_t *file);

/** A whole data set in memory. */
struct fd_h5_array {
  void *data; /* owned; see fd_h5_array_free */
  fd_dtype dtype;
  int ndim;
  int64_t shape[FD_H5_MAX_NDIM];
  int64_t numel;
};
void fd_h5_array_free(struct fd_h5_array *a);

/** Is there an object of this name (any depth)? False if not, or if the file is not open. */
bool fd_h5_exists(hid_t file, const char *name);

/** Read a numeric data set of any type, converted to `as` (F32, F64, I32, I64, U8, U32). Free with fd_h5_array_free. */
fd_status fd_h5_read(hid_t file, const char *name, fd_dtype as, struct fd_h5_array *out);
/** Shape only; out->data stays NULL. */
fd_status fd_h5_shape(hid_t file, const char *name, struct fd_h5_array *out);

/** Names of the members of a group, in alphabetical order; with `deep`, of all data sets below it as relative paths
 *  ("param/a.weight"). One allocation: free(*names). An absent group gives 0 names. */
fd_status fd_h5_list(hid_t file, const char *group, bool deep, int *n, char ***names);

/** Write a whole array as a contiguous data set of its own type; groups in the name are made. dtype as fd_h5_read's. */
fd_status fd_h5_write(hid_t file, const char *name, fd_dtype dtype, int ndim, const int64_t *shape, const void *data);

/** Attributes of the object `name` ("/" for the file). */
fd_status fd_h5_attr_write_text(hid_t file, const char *name, const char *attr, const char *text);
fd_status fd_h5_attr_write_f64(hid_t file, const char *name, const char *attr, double value);
fd_status fd_h5_attr_write_i64(hid_t file, const char *name, const char *attr, int64_t value);
/** *text is allocated (free it). */
fd_status fd_h5_attr_read_text(hid_t file, const char *name, const char *attr, char **text);
fd_status fd_h5_attr_read_f64(hid_t file, const char *name, const char *attr, double *value);
fd_status fd_h5_attr_read_i64(hid_t file, const char *name, const char *attr, int64_t *value);

#endif
