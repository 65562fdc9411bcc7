// SPDX-License-Identifier: Apache-2.0
// Weights as published: a Hugging Face folder with one *.safetensors file or several behind an index, or a single file.
#ifndef FD_IO_SAFETENSORS_H
#define FD_IO_SAFETENSORS_H

#include <stdint.h>

#include "base/dtype.h"
#include "base/status.h"

#define FD_SAFETENSORS_MAX_NDIM 8

typedef struct fd_safetensors fd_safetensors;

struct fd_safetensor {
  const char *name;  /* owned by the set */
  const char *type;  /* as in the file: "F32", "BF16", "F16", "F64", "I64", ... */
  fd_dtype dtype;    /* FD_DTYPE_COUNT if this program cannot convert the type */
  int ndim;
  int64_t shape[FD_SAFETENSORS_MAX_NDIM];
  int64_t numel;
  int file;          /* index of its file */
  int64_t offset;    /* bytes from the start of that file */
  int64_t bytes;
};

/** Open a folder or one file. In a folder: {model,diffusion_pytorch_model}.safetensors, else those with .index.json, else the
 *  only *.safetensors there is. Checks every header completely: truncated, overlapping, with holes, wrong byte counts, names
 *  twice, tensors that the index promises and the files lack: FD_ERR_FORMAT with file and tensor. No file: FD_ERR_IO.
 *  Local. Reads no tensor data. */
fd_status fd_safetensors_open(const char *path, fd_safetensors **out);
void fd_safetensors_close(fd_safetensors **s);

int fd_safetensors_count(const fd_safetensors *s);
const struct fd_safetensor *fd_safetensors_at(const fd_safetensors *s, int i); /* sorted by name */
/** -1 if absent. */
int fd_safetensors_find(const fd_safetensors *s, const char *name);
/** The path of tensor i's file, for messages. */
const char *fd_safetensors_path(const fd_safetensors *s, int i);

/** Tensor i as f32, numel elements, from F32, BF16, F16 or F64; other types are FD_ERR_UNSUPPORTED by name. */
fd_status fd_safetensors_read(const fd_safetensors *s, int i, float *out);

#endif
