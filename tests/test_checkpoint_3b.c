// SPDX-License-Identifier: Apache-2.0
// The layout of a checkpoint of the production model (2.66 G parameters, 42.6 GB), as a sparse file: 64-bit offsets, alignment, what is
// wasted, and that HDF5 finds everything. Needs a few megabytes of disk.
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <unistd.h>

#include "io/checkpoint_layout.h"

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static struct fd_layout_entry entry[4 * 465];
static int n_entries;

static void add(const char *family, const char *name, int64_t a, int64_t b) {
  struct fd_layout_entry *e = &entry[n_entries++];
  snprintf(e->name, sizeof e->name, "%s/%s", family, name);
  e->ndim = b ? 2 : 1;
  e->shape[0] = a;
  e->shape[1] = b;
  e->numel = a * (b ? b : 1);
}

static void add_family(const char *family) {
  static const struct {
    const char *name;
    int64_t a, b;
  } layer[] = {{"input_layernorm.linear.weight", 12288, 2048}, {"input_layernorm.linear.bias", 12288, 0}, {"input_layernorm.norm.weight", 2048, 0},
               {"self_attn.q_norm.weight", 128, 0},            {"self_attn.k_norm.weight", 128, 0},       {"self_attn.q_proj.weight", 2048, 2048},
               {"self_attn.k_proj.weight", 512, 2048},         {"self_attn.v_proj.weight", 512, 2048},    {"self_attn.text_k_proj.weight", 512, 2048},
               {"self_attn.text_v_proj.weight", 512, 2048},    {"self_attn.o_proj.weight", 2048, 2048},   {"post_attention_layernorm.weight", 2048, 0},
               {"mlp.gate_proj.weight", 8192, 2048},           {"mlp.up_proj.weight", 8192, 2048},       {"mlp.down_proj.weight", 2048, 8192}},
    rest[] = {{"patch_embed.proj.bias", 2048, 0},    {"timestep_embedder.0.weight", 2048, 256}, {"timestep_embedder.0.bias", 2048, 0},
              {"timestep_embedder.2.weight", 2048, 2048}, {"timestep_embedder.2.bias", 2048, 0},     {"context_embedder.0.weight", 2048, 0},
              {"context_embedder.1.weight", 2048, 2048},  {"context_embedder.1.bias", 2048, 0},      {"norm_out.linear.weight", 4096, 2048},
              {"norm_out.linear.bias", 4096, 0},          {"norm_out.norm.weight", 2048, 0},         {"proj_out.weight", 64, 2048},
              {"proj_out.bias", 64, 0}};
  char name[128];
  for (int l = 0; l < 30; l++) {
    for (size_t i = 0; i < sizeof layer / sizeof layer[0]; i++) {
      snprintf(name, sizeof name, "layers.%d.%s", l, layer[i].name);
      add(family, name, layer[i].a, layer[i].b);
    }
  }
  add(family, "patch_embed.proj.weight", 2048, 16);
  entry[n_entries - 1].ndim = 4; /* a convolution [2048, 16, 2, 2] */
  entry[n_entries - 1].shape[2] = entry[n_entries - 1].shape[3] = 2;
  entry[n_entries - 1].numel *= 4;
  for (size_t i = 0; i < sizeof rest / sizeof rest[0]; i++) add(family, rest[i].name, rest[i].a, rest[i].b);
}

static int by_place(const void *a, const void *b) {
  int64_t x = ((const struct fd_layout_entry *)a)->at, y = ((const struct fd_layout_entry *)b)->at;
  return x < y ? -1 : x > y;
}

int main(void) {
  const char *rank = getenv("OMPI_COMM_WORLD_RANK"), *tmp = getenv("TMPDIR");
  if (rank && strcmp(rank, "0") != 0) return 0;
  add_family("model");
  int64_t parameters = 0, bytes = 0;
  for (int i = 0; i < n_entries; i++) parameters += entry[i].numel;
  CHECK(n_entries == 464 && parameters == 2660490816);
  add_family("ema");
  add_family("optimizer/exp_avg");
  add_family("optimizer/exp_avg_sq");

  char path[4096];
  snprintf(path, sizeof path, "%s/fdhpc-3b-XXXXXX", tmp && tmp[0] ? tmp : "/tmp");
  int fd = mkstemp(path);
  if (fd < 0) return perror(path), 1;
  struct fd_checkpoint_meta meta = {.step = 50000, .samples_seen = 50000LL * 1024, .parameters = parameters, .seed = 42, .config = "trainer : {}",
                                    .vae_hash = "", .text_encoder_hash = ""};
  CHECK(fd_layout_create(path, &meta, n_entries, entry, &bytes) == FD_OK);
  CHECK(bytes <= fd_layout_most_bytes(&meta, n_entries, entry));
  CHECK(bytes >= 16 * parameters && bytes < 16 * parameters + 16 * parameters / 50); /* alignment wastes less than 2 % */
  struct stat s;
  CHECK(fstat(fd, &s) == 0 && s.st_size == bytes);
  CHECK(s.st_blocks * 512 < 16 << 20); /* sparse */

  qsort(entry, (size_t)n_entries, sizeof *entry, by_place);
  /* the last number of the last data set in the file, beyond 42 GB, through HDF5 */
  struct fd_layout_entry *last = &entry[n_entries - 1];
  float x = 1.5f, back = 0;
  CHECK(last->at > INT64_C(42000000000) && last->ndim == 2);
  CHECK(pwrite(fd, &x, sizeof x, last->at + 4 * (last->numel - 1)) == 4);
  for (int i = 0; i < n_entries; i++) entry[i].sum = (uint64_t)i + 1;
  CHECK(fd_layout_set_sums(path, n_entries, entry) == FD_OK);
  hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
  hid_t set = H5Dopen2(file, last->name, H5P_DEFAULT), space = H5Dget_space(set), one = H5Screate(H5S_SCALAR);
  hsize_t point[2] = {(hsize_t)last->shape[0] - 1, (hsize_t)last->shape[1] - 1};
  CHECK(H5Sselect_elements(space, H5S_SELECT_SET, 1, point) >= 0);
  CHECK(H5Dread(set, H5T_NATIVE_FLOAT, one, space, H5P_DEFAULT, &back) >= 0 && back == 1.5f);
  H5Sclose(one);
  H5Sclose(space);
  H5Dclose(set);
  H5Fclose(file);

  struct fd_checkpoint_meta read_meta;
  struct fd_layout_text text;
  struct fd_layout_entry *found = NULL;
  int n = 0;
  CHECK(fd_layout_read(path, &read_meta, &text, &n, &found) == FD_OK && n == n_entries);
  if (n == n_entries) {
    CHECK(read_meta.step == 50000 && read_meta.parameters == parameters);
    fd_layout_text_free(&text);
    qsort(found, (size_t)n, sizeof *found, by_place);
    int wrong = 0;
    for (int i = 0; i < n; i++) { /* none over another, large ones on stripes, sums in place */
      wrong += strcmp(found[i].name, entry[i].name) != 0 || found[i].at != entry[i].at || found[i].sum != entry[i].sum;
      wrong += i + 1 < n && found[i].at + 4 * found[i].numel > found[i + 1].at;
      wrong += 4 * found[i].numel >= 65536 && found[i].at % (1 << 20) != 0;
    }
    CHECK(wrong == 0);
  }
  /* all metadata lie before the data, or a file that is cut off could not say what it lost */
  CHECK(truncate(path, found[0].at + 1000) == 0);
  CHECK(fd_layout_read(path, &read_meta, &text, &n, &found) == FD_ERR_FORMAT);
  CHECK(strstr(fd_status_message(), "cut off") && strstr(fd_status_message(), entry[0].name));
  free(found);
  close(fd);
  if (failed)
    fprintf(stderr, "the file is kept: %s\n", path);
  else
    unlink(path);
  return failed;
}
