// SPDX-License-Identifier: Apache-2.0
// `fdhpc --version`: commit, backends, versions of the libraries that are really loaded.
#include "config.h"

#include <archive.h>
#include <hdf5.h>
#include <jansson.h>
#include <jpeglib.h>
#include <libconfig.h>
#include <mpi.h>
#include <oneapi/dnnl/dnnl.h>
#include <png.h>
#include <string.h>
#include <webp/decode.h>

#include "cmd/cmd.h"
#include "graph/backend.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

void fd_version_print(FILE *to) {
  unsigned h5[3] = {0, 0, 0};
  char mpi[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int n = 0, webp = WebPGetDecoderVersion();
  const dnnl_version_t *dnnl = dnnl_version();
  H5get_libversion(&h5[0], &h5[1], &h5[2]);
  MPI_Get_library_version(mpi, &n);
  mpi[strcspn(mpi, ",\n")] = 0;
  fprintf(to, "fdhpc %s, commit %s, %s\n", PACKAGE_VERSION, FD_COMMIT, FD_CONFIGURED_CC);
  const struct fd_backend *b;
  fprintf(to, "backends:");
  for (int i = 0; (b = fd_backend_at(i)); i++) {
    fprintf(to, "%s %s", i ? ";" : "", b->name);
    if (b->not_built) fprintf(to, " (not built: %s)", b->not_built);
  }
  fprintf(to, "\n");
  fprintf(to, "%s; HDF5 %u.%u.%u; oneDNN %d.%d.%d; libconfig %d.%d.%d; jansson %s; %s;\n", mpi, h5[0], h5[1], h5[2], dnnl->major,
          dnnl->minor, dnnl->patch, LIBCONFIG_VER_MAJOR, LIBCONFIG_VER_MINOR, LIBCONFIG_VER_REVISION, JANSSON_VERSION,
          archive_version_string());
  fprintf(to, "libjpeg-turbo %s; libpng %s; libwebp %d.%d.%d; SentencePiece %s\n", TEXT(LIBJPEG_TURBO_VERSION),
          png_get_libpng_ver(NULL), webp >> 16, webp >> 8 & 255, webp & 255, FD_SENTENCEPIECE_VERSION);
}
