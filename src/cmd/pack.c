// SPDX-License-Identifier: Apache-2.0
// `fdhpc pack CONFIG -o FILE.h5`: the data set of a configuration as one file, for sites where reading from tars is slow.
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "cmd/cmd.h"
#include "io/dataset.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static fd_status run(struct fd_run *run) {
  fd_status st = FD_OK;
  const struct fd_options *opt = run->opt;
  fd_dataset *d = NULL;
  char *index = NULL;
  int64_t counts[FD_BAD_COUNT];
  const char *out = fd_run_flag(run, "--output");
  const double t0 = now();
  if (!out || !*out) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "pack: say where to: -o FILE.h5"));
  const size_t n = strlen(out);
  if (n < 4 || strcmp(out + n - 3, ".h5") != 0)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "pack: -o %s: the name must end in .h5, so that data.data_path knows it", out));
  for (int i = 0; i < opt->data.data_path.n; i++)
    if (strcmp(opt->data.data_path.at[i], out) == 0) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "pack: -o %s is also read (data.data_path)", out));
  if (asprintf(&index, "%s.index", out) < 0) {
    index = NULL;
    FD_TRY(FD_FAIL(FD_ERR_NOMEM, "pack: no memory"));
  }
  const struct fd_dataset_config config = {.paths = opt->data.data_path.at,
                                           .n_paths = opt->data.data_path.n,
                                           .image_column = opt->data.image_column,
                                           .caption_columns = {opt->data.caption_column.synthetic, opt->data.caption_column.original},
                                           .index_path = *opt->data.index ? opt->data.index : index,
                                           .strict = true,
                                           .verbose = true};
  FD_TRY(fd_dataset_open(run->comm, &config, &d));
  FD_TRY(fd_dataset_pack(run->comm, d, out, true, counts));
  const double seconds = now() - t0;
  fd_log_info("pack: %lld samples in %s, %.1f s, %.0f a second", (long long)counts[FD_BAD_NONE], out, seconds, (double)counts[FD_BAD_NONE] / seconds);
  for (int k = FD_BAD_NONE + 1; k < FD_BAD_COUNT; k++)
    if (counts[k]) fd_log_info("pack: left out %lld: %s", (long long)counts[k], fd_bad_text((enum fd_bad)k));
  for (int s = FD_SHARD_CUT; s < FD_SHARD_STATES; s++)
    if (fd_dataset_shards(d, (enum fd_shard_state)s))
      fd_log_info("pack: %lld files: %s", (long long)fd_dataset_shards(d, (enum fd_shard_state)s), fd_shard_text((enum fd_shard_state)s));
  fd_log_info("pack: to train on it, set data.data_path = (\"%s\")", out);
done:
  fd_dataset_destroy(&d);
  if (index && fd_comm_rank(run->comm) == 0) unlink(index);
  free(index);
  return fd_agree(run->comm, st);
}

static const struct fd_flag flags[] = {
    {"--output -o", "FILE.h5", NULL, "the file to write"},
    {NULL, NULL, NULL, NULL},
};

const struct fd_command fd_cmd_pack = {
    .name = "pack",
    .args = "CONFIG",
    .help = "copy the data set of a configuration into one HDF5 file",
    .takes_config = true,
    .flags = flags,
    .groups = "data",
    .more = "All ranks copy in parallel. Samples that cannot be used are left out and counted by reason.",
    .run = run,
};
