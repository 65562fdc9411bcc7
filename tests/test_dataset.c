// SPDX-License-Identifier: Apache-2.0
// Data sets: patterns, names, damaged and spanning tars on several ranks, index used again and made anew, packs, errors.
#include <fcntl.h>

#include "datatest.h"
#include "io/dataset.h"
#include "io/tar_index.h"

static const char *joined(char *const *list, int64_t n) {
  static char text[4096];
  text[0] = 0;
  for (int64_t i = 0; i < n; i++) {
    if (i) strcat(text, " ");
    strcat(text, list[i]);
  }
  return text;
}

static void test_patterns(void) {
  static const char *const good[][2] = {
      {"a.tar", "a.tar"},
      {"a_{000..003}.tar", "a_000.tar a_001.tar a_002.tar a_003.tar"},
      {"{8..11}", "8 9 10 11"},
      {"{08..11..3}", "08 11"},
      {"{3..1}", "3 2 1"},
      {"{-1..1}", "-1 0 1"},
      {"{a..c}x", "ax bx cx"},
      {"x{a,b}y{1,2}", "xay1 xay2 xby1 xby2"},
      {"{a,b{1..2}}", "a b1 b2"},
      {"{a,}z", "az z"},
      {"p{1..2}.tar::q.tar", "p1.tar p2.tar q.tar"},
      {"/data/{00000..00001}.tar", "/data/00000.tar /data/00001.tar"},
  };
  static const char *const bad[] = {"a{1..2.tar", "a}b", "a{1}.tar", "a{x..10}", "", "a.tar::", "http://x/a.tar", "https://x/{0..9}.tar", "s3://b/a.tar", "pipe:cat a.tar",
                                    "ok.tar::pipe:cat a", "{0..99999999}"};
  char **list;
  int64_t n;
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    CHECK(fd_paths_expand(&good[i][0], 1, &list, &n) == FD_OK);
    if (strcmp(joined(list, n), good[i][1]) != 0) failed = 1, fprintf(stderr, "%s gave %s\n", good[i][0], joined(list, n));
    free(list);
  }
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    if (fd_paths_expand(&bad[i], 1, &list, &n) != FD_ERR_CONFIG) failed = 1, fprintf(stderr, "\"%s\" was taken\n", bad[i]);
}

static void test_names(void) {
  static const struct {
    const char *name;
    int dot;
  } names[] = {{"a.jpg", 1}, {"a.0.jpg", 1}, {"x.y/a.jpg", 5}, {"./a.jpg", 3}, {"README", -1}, {"d.x/README", -1}, {".hidden", -1}, {"a/.hidden.jpg", 2}, {"a.b/.hidden.jpg", -1},
               {"._a.jpg", -1}, {"__meta__", -1}, {"__meta__/a.jpg", -1}, {"__meta__.json", 8}, {"__m/a.jpg", 5}, {"tail.", 4}, {"", -1}, {"x.y/a/.h.jpg", 6}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (fd_tar_split_name(names[i].name, strlen(names[i].name)) != names[i].dot)
      failed = 1, fprintf(stderr, "%s: dot at %lld\n", names[i].name, (long long)fd_tar_split_name(names[i].name, strlen(names[i].name)));
}

static struct fd_dataset_config config_of(const char *const *path, const char *index) {
  return (struct fd_dataset_config){.paths = path, .n_paths = 1, .image_column = "jpg", .caption_columns = {"txt", ""}, .index_path = index, .strict = true};
}

/* keys in order, separated by blanks */
static const char *keys(const fd_dataset *d) {
  static char text[8192];
  size_t n = 0;
  for (int64_t i = 0; i < fd_dataset_samples(d); i++) {
    struct fd_sample_info info;
    fd_dataset_info(d, i, &info);
    n += (size_t)snprintf(text + n, sizeof text - n, "%s%.*s", i ? " " : "", info.key_bytes, info.key);
  }
  return text;
}

static void write_file(const char *name, const void *data, size_t n) {
  FILE *f = fopen(dt_path(name), "wb");
  CHECK(f && fwrite(data, 1, n, f) == n && fclose(f) == 0);
}

/* Five tars in which one key goes on over three of them, and each rank's share begins within it. */
static void test_span(fd_comm *comm) {
  static const char *const members[5][4] = {{"a.jpg", "a.txt", "b.jpg", NULL}, {"b.json", NULL}, {"b.txt", "b.jpg", NULL}, {"b.txt", NULL}, {"c.txt", "c.jpg", "b.jpg", "b.txt"}};
  if (comm->rank == 0)
    for (int t = 0; t < 5; t++) {
      char name[32];
      fd_tar_writer *w = NULL;
      snprintf(name, sizeof name, "span%d.tar", t);
      CHECK(fd_tar_writer_create(dt_path(name), &w) == FD_OK);
      for (int m = 0; m < 4 && members[t][m]; m++) {
        if (strstr(members[t][m], "jpg"))
          dt_add_jpeg(w, members[t][m], t);
        else
          dt_add_text(w, members[t][m], strstr(members[t][m], "json") ? "{}" : t == 3 ? "the second b" : "a caption");
      }
      CHECK(fd_tar_writer_close(&w) == FD_OK);
    }
  fd_comm_barrier(comm);
  const char *path = dt_path("span{0..4}.tar");
  const struct fd_dataset_config config = config_of(&path, dt_path("span.h5"));
  fd_dataset *d = NULL;
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK);
  if (!d) return;
  CHECK(strcmp(keys(d), "a b b c b") == 0);
  struct fd_sample_info info;
  fd_dataset_info(d, 1, &info);
  CHECK(info.image.shard == 0 && info.caption[0].shard == 2 && info.caption[1].bytes < 0);
  fd_dataset_info(d, 2, &info);
  CHECK(info.image.shard == 2 && info.caption[0].shard == 3);
  struct fd_sample s = {0};
  CHECK(fd_dataset_read(d, 2, 1, &s) == FD_BAD_NONE && s.caption_bytes[0] == 12 && strcmp(s.caption[0], "the second b") == 0);
  fd_sample_free(&s);
  CHECK(fd_dataset_lost(d, FD_BAD_NO_IMAGE) == 0 && fd_dataset_lost(d, FD_BAD_NO_CAPTION) == 0);
  fd_dataset_destroy(&d);
}

static void test_damage(fd_comm *comm) {
  if (comm->rank == 0) {
    dt_tar("good.tar", 0, 5);
    dt_tar("cut.tar", 5, 9);
    CHECK(truncate(dt_path("cut.tar"), 5400) == 0); /* no multiple of 512: within a header or a member */
    dt_tar("sum.tar", 9, 12);
    FILE *f = fopen(dt_path("sum.tar"), "r+b");
    char head[512];
    CHECK(f && fread(head, 1, 512, f) == 512);
    long at = 512 + (strtol(head + 124, NULL, 8) + 511) / 512 * 512; /* the second header */
    CHECK(fseek(f, at + 148, SEEK_SET) == 0 && fputs("7777", f) >= 0 && fclose(f) == 0);
    write_file("zero.tar", "", 0);
    write_file("page.tar", "<html>not here</html>", 21);
    write_file("gzip.tar", "\x1f\x8b\x08\0\0\0\0\0\0\3 and so on", 20);
    fd_tar_writer *w = NULL;
    CHECK(fd_tar_writer_create(dt_path("lost.tar"), &w) == FD_OK);
    dt_add_jpeg(w, "only_picture.jpg", 1);
    dt_add_text(w, "only_text.txt", "x");
    dt_add_text(w, "neither.json", "{}");
    dt_add_text(w, "README", "passed over");
    CHECK(fd_tar_writer_close(&w) == FD_OK);
  }
  fd_comm_barrier(comm);
  const char *path = dt_path("{good,cut,sum,zero,page,gzip,lost,none}.tar");
  struct fd_dataset_config config = config_of(&path, dt_path("damage.h5"));
  fd_dataset *d = NULL;
  CHECK(fd_dataset_open(comm, &config, &d) == FD_ERR_UNSUPPORTED && strstr(fd_status_message(), "gzip.tar"));
  config.strict = false;
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK);
  if (!d) return;
  CHECK(strncmp(keys(d), "00000 00001 00002 00003 00004 00005", 35) == 0);
  CHECK(fd_dataset_samples(d) >= 6 && fd_dataset_samples(d) <= 8);
  CHECK(fd_dataset_shards(d, FD_SHARD_WHOLE) == 2 && fd_dataset_shards(d, FD_SHARD_CUT) == 1 && fd_dataset_shards(d, FD_SHARD_DAMAGED) == 1);
  CHECK(fd_dataset_shards(d, FD_SHARD_MISSING) == 1 && fd_dataset_shards(d, FD_SHARD_EMPTY) == 1 && fd_dataset_shards(d, FD_SHARD_NOT_TAR) == 1 &&
        fd_dataset_shards(d, FD_SHARD_COMPRESSED) == 1);
  CHECK(fd_dataset_lost(d, FD_BAD_NO_IMAGE) == 2);
  CHECK(fd_dataset_lost(d, FD_BAD_NO_CAPTION) >= 2); /* only_picture, and the picture before the wrong header */
  fd_dataset_destroy(&d);

  static const char *const nothing[] = {"none", "zero", "lost"};
  for (int i = 0; i < 3; i++) {
    char name[32];
    snprintf(name, sizeof name, "%s.tar", nothing[i]);
    path = dt_path(name);
    CHECK(fd_dataset_open(comm, &config, &d) == FD_ERR_DATA);
  }
  path = dt_path("good.tar");
  config.caption_columns[0] = "caption";
  CHECK(fd_dataset_open(comm, &config, &d) == FD_ERR_DATA && strstr(fd_status_message(), ".caption"));
  config.caption_columns[0] = "";
  CHECK(fd_dataset_open(comm, &config, &d) == FD_ERR_CONFIG);
  config = config_of(&path, dt_path("no/such/folder/index.h5"));
  CHECK(fd_dataset_open(comm, &config, &d) == FD_ERR_IO && strstr(fd_status_message(), "data.index"));
  config.n_paths = 0;
  CHECK(fd_dataset_open(comm, &config, &d) == FD_ERR_CONFIG);
}

static ino_t inode(const char *path) {
  struct stat about;
  return stat(path, &about) == 0 ? about.st_ino : 0;
}

static void test_reuse(fd_comm *comm) {
  const char *path = dt_path("r{0..2}.tar");
  char index[256], index_as_data[256];
  snprintf(index, sizeof index, "%s", dt_path("reuse.h5"));
  const struct fd_dataset_config config = config_of(&path, index);
  fd_dataset *d = NULL;
  if (comm->rank == 0) {
    dt_tar("r0.tar", 0, 4);
    dt_tar("r1.tar", 4, 8);
    dt_tar("r2.tar", 8, 12);
  }
  fd_comm_barrier(comm);
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK && fd_dataset_samples(d) == 12);
  const uint64_t fingerprint = d ? fd_dataset_fingerprint(d) : 0;
  fd_dataset_destroy(&d);
  const ino_t first = inode(index);
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK && inode(index) == first && fd_dataset_fingerprint(d) == fingerprint);
  /* a tar that changes while it is in use is noticed when it is opened */
  fd_comm_barrier(comm);
  if (comm->rank == 0) dt_tar("r1.tar", 4, 9);
  fd_comm_barrier(comm);
  struct fd_sample s = {0};
  CHECK(fd_dataset_read(d, 5, 1, &s) == FD_BAD_READ && strstr(fd_status_message(), "r1.tar"));
  CHECK(fd_dataset_read(d, 11, 1, &s) == FD_BAD_NONE);
  CHECK(fd_dataset_read(d, 12, 1, &s) == FD_BAD_READ);
  fd_sample_free(&s);
  fd_dataset_destroy(&d);
  /* the index itself as the data: refused */
  snprintf(index_as_data, sizeof index_as_data, "%s", index);
  const char *as_data = index_as_data;
  const struct fd_dataset_config direct = config_of(&as_data, NULL);
  CHECK(fd_dataset_open(comm, &direct, &d) == FD_ERR_FORMAT && strstr(fd_status_message(), "r1.tar"));
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK && inode(index) != first && fd_dataset_samples(d) == 13 && fd_dataset_fingerprint(d) != fingerprint);
  fd_dataset_destroy(&d);
  CHECK(fd_dataset_open(comm, &direct, &d) == FD_OK && fd_dataset_samples(d) == 13);
  fd_dataset_destroy(&d);
  /* a broken index is made anew, as data it is an error */
  fd_comm_barrier(comm);
  if (comm->rank == 0) CHECK(truncate(index, 3000) == 0);
  fd_comm_barrier(comm);
  CHECK(fd_dataset_open(comm, &direct, &d) == FD_ERR_FORMAT);
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK && fd_dataset_samples(d) == 13);
  fd_dataset_destroy(&d);
}

static void test_pack(fd_comm *comm) {
  const char *path = dt_path("k{0..1}.tar");
  char pack[256];
  snprintf(pack, sizeof pack, "%s", dt_path("pack.h5"));
  const struct fd_dataset_config config = config_of(&path, dt_path("k.h5"));
  fd_dataset *d = NULL, *p = NULL;
  int64_t counts[FD_BAD_COUNT];
  if (comm->rank == 0) {
    dt_tar("k0.tar", 0, 6);
    fd_tar_writer *w = NULL;
    CHECK(fd_tar_writer_create(dt_path("k1.tar"), &w) == FD_OK);
    dt_add_text(w, "x0.jpg", "no picture");
    dt_add_text(w, "x0.txt", "caption");
    dt_add_jpeg(w, "x1.jpg", 3);
    dt_add_text(w, "x1.txt", "caf\xe9");
    dt_add_jpeg(w, "x2.jpg", 4);
    dt_add_text(w, "x2.txt", "");
    dt_add_jpeg(w, "x3.jpg", 4);
    CHECK(fd_tar_writer_close(&w) == FD_OK);
  }
  fd_comm_barrier(comm);
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK && fd_dataset_samples(d) == 9);
  if (!d) return;
  CHECK(fd_dataset_pack(comm, d, pack, false, counts) == FD_OK);
  CHECK(counts[FD_BAD_NONE] == 7 && counts[FD_BAD_IMAGE_UNKNOWN] == 1 && counts[FD_BAD_CAPTION_UTF8] == 1 && counts[FD_BAD_NO_CAPTION] == 1);
  const char *as_data = pack;
  struct fd_dataset_config packed = config_of(&as_data, NULL);
  CHECK(fd_dataset_open(comm, &packed, &p) == FD_OK);
  if (!p) return;
  CHECK(strcmp(keys(p), "00000 00001 00002 00003 00004 00005 x2") == 0);
  struct fd_sample a = {0}, b = {0};
  for (int64_t i = 0; i < 7; i++) {
    CHECK(fd_dataset_read(p, i, 1, &a) == FD_BAD_NONE && fd_dataset_read(d, i < 6 ? i : 8, 1, &b) == FD_BAD_NONE);
    CHECK(a.image_bytes == b.image_bytes && memcmp(a.image, b.image, a.image_bytes) == 0);
    CHECK(a.caption_bytes[0] == b.caption_bytes[0] && memcmp(a.caption[0], b.caption[0], (size_t)a.caption_bytes[0]) == 0);
  }
  fd_sample_free(&a);
  fd_sample_free(&b);
  fd_dataset_destroy(&p);
  fd_dataset_destroy(&d);
  /* a pack and tars together; a column that the pack does not have; a truncated pack */
  const char *both[2] = {dt_path("k0.tar"), pack};
  struct fd_dataset_config mixed = config_of(both, dt_path("mixed.h5"));
  mixed.n_paths = 2;
  CHECK(fd_dataset_open(comm, &mixed, &p) == FD_OK && fd_dataset_samples(p) == 13 && fd_dataset_n_shards(p) == 2);
  fd_dataset_destroy(&p);
  packed.caption_columns[0] = "long";
  CHECK(fd_dataset_open(comm, &packed, &p) == FD_ERR_CONFIG && strstr(fd_status_message(), "txt"));
  packed.caption_columns[0] = "txt";
  fd_comm_barrier(comm);
  if (comm->rank == 0) CHECK(truncate(pack, 9000) == 0);
  fd_comm_barrier(comm);
  CHECK(fd_dataset_open(comm, &packed, &p) == FD_ERR_FORMAT && strstr(fd_status_message(), "pack.h5"));
}

int main(void) {
  fd_comm *comm = NULL;
  if (fd_comm_create(&comm) != FD_OK) return 1;
  dt_open(comm);
  if (comm->rank == 0) {
    test_patterns();
    test_names();
  }
  test_span(comm);
  test_damage(comm);
  test_reuse(comm);
  test_pack(comm);
  dt_close(comm);
  const int result = dt_result(comm);
  fd_comm_destroy(&comm);
  return failed || result;
}
