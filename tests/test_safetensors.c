// SPDX-License-Identifier: Apache-2.0
// Safetensors: every type is read right, and every way in which a file can be wrong is refused with a message that names it.
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/h5.h"
#include "io/safetensors.h"

static int failed;
#define CHECK(c)                                                                            \
  do {                                                                                      \
    if (!(c)) failed = 1, printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static char folder[] = "/tmp/fdhpc-safetensors-XXXXXX";

static const char *path(const char *name) {
  static char at[4][4096];
  static int turn;
  char *p = at[turn++ % 4];
  snprintf(p, sizeof at[0], "%s/%s", folder, name);
  return p;
}

static void write_text(const char *name, const char *text) {
  FILE *f = fopen(path(name), "wb");
  fwrite(text, 1, strlen(text), f);
  fclose(f);
}

/* A file with this header text and data; `length` is written as the header's, -1: the real one. */
static void write_file(const char *name, const char *header, int64_t length, const void *data, size_t bytes) {
  FILE *f = fopen(path(name), "wb");
  uint64_t n = length < 0 ? strlen(header) : (uint64_t)length;
  for (int i = 0; i < 8; i++) fputc((int)(n >> (8 * i) & 255), f);
  fwrite(header, 1, strlen(header), f);
  fwrite(data, 1, bytes, f);
  fclose(f);
}

static void clear(void) {
  DIR *d = opendir(folder);
  for (struct dirent *e; (e = readdir(d));)
    if (e->d_name[0] != '.') remove(path(e->d_name));
  closedir(d);
}

static void refused(const char *header, int64_t length, size_t bytes, fd_status want, const char *text) {
  static const char data[64];
  fd_safetensors *s = NULL;
  clear();
  write_file("model.safetensors", header, length, data, bytes);
  fd_status st = fd_safetensors_open(folder, &s);
  if (st != want || s || !strstr(fd_status_message(), text)) {
    failed = 1;
    printf("refused: %s\n  status %s: %s\n  expected: %s\n", header, fd_status_name(st), fd_status_message(), text);
  }
  fd_safetensors_close(&s);
}

static void test_types(void) {
  struct {
    float f32[2];
    double f64[2];
    uint16_t bf16[2], f16[2];
    int64_t i64[1];
  } data = {{1.5f, -2.25f}, {0.1, -1e-3}, {0x3fc0, 0xc010}, {0x3e00, 0x0001}, {7}};
  const char *header =
      "{\"__metadata__\":{\"format\":\"pt\"},"
      "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
      "\"b\":{\"dtype\":\"F64\",\"shape\":[1,2],\"data_offsets\":[8,24]},"
      "\"c\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[24,28]},"
      "\"d\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[28,32]},"
      "\"num_batches_tracked\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[32,40]},"
      "\"empty\":{\"dtype\":\"F32\",\"shape\":[0,3],\"data_offsets\":[40,40]}}   ";
  fd_safetensors *s = NULL;
  float x[2];
  clear();
  write_file("only_one.safetensors", header, -1, &data, sizeof data);
  CHECK(fd_safetensors_open(folder, &s) == FD_OK);
  if (!s) return;
  CHECK(fd_safetensors_count(s) == 6 && fd_safetensors_find(s, "e") == -1);
  CHECK(fd_safetensors_read(s, fd_safetensors_find(s, "a"), x) == FD_OK && x[0] == 1.5f && x[1] == -2.25f);
  CHECK(fd_safetensors_read(s, fd_safetensors_find(s, "b"), x) == FD_OK && x[0] == 0.1f && x[1] == -1e-3f);
  CHECK(fd_safetensors_read(s, fd_safetensors_find(s, "c"), x) == FD_OK && x[0] == 1.5f && x[1] == -2.25f);
  CHECK(fd_safetensors_read(s, fd_safetensors_find(s, "d"), x) == FD_OK && x[0] == 1.5f && x[1] == 0x1p-24f);
  CHECK(fd_safetensors_read(s, fd_safetensors_find(s, "empty"), x) == FD_OK);
  CHECK(fd_safetensors_read(s, fd_safetensors_find(s, "num_batches_tracked"), x) == FD_ERR_UNSUPPORTED);
  CHECK(strstr(fd_status_message(), "num_batches_tracked has type I64"));
  CHECK(fd_safetensors_at(s, fd_safetensors_find(s, "c"))->shape[0] == 2);
  fd_safetensors_close(&s);
  fd_safetensors_close(&s);
}

static void test_refused(void) {
  const fd_status bad = FD_ERR_FORMAT;
  refused("{}", 1000, 0, bad, "does not fit");
  refused("{}", (int64_t)1 << 40, 0, bad, "does not fit");
  refused("{\"a\":", -1, 0, bad, "no JSON object");
  refused("[1]", -1, 0, bad, "no JSON object");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 7, bad, "a: bytes 0 to 8 lie outside");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 9, bad, "1 bytes at the end");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", -1, 8, bad, "8 bytes, but its shape and type F32 need 12");
  refused("{\"a\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 8, bad, "need 4");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", -1, 8, bad, "bad length");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}", -1, 8, bad, "bad length");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", -1, 8, bad, "lie outside");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", -1, 8, bad, "lacks dtype, shape or data_offsets");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", -1, 12,
          bad, "b overlaps a");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", -1, 12,
          bad, "4 bytes before b belong to no tensor");
  refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", -1, 8, bad,
          "JSON");
  fd_safetensors *s = NULL;
  clear();
  CHECK(fd_safetensors_open(folder, &s) == FD_ERR_IO && strstr(fd_status_message(), "no *.safetensors"));
  CHECK(fd_safetensors_open("/nonexistent/folder", &s) == FD_ERR_IO);
  write_text("model.safetensors", "short");
  CHECK(fd_safetensors_open(folder, &s) == FD_ERR_FORMAT);
}

static void test_index(void) {
  static const float x[] = {1, 2, 3};
  fd_safetensors *s = NULL;
  float got[2];
  clear();
  write_file("model-1.safetensors", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, x, 8);
  write_file("model-2.safetensors", "{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", -1, x + 2, 4);
  CHECK(fd_safetensors_open(folder, &s) == FD_ERR_FORMAT && strstr(fd_status_message(), "no index"));
  write_text("model.safetensors.index.json", "{\"weight_map\":{\"a\":\"model-1.safetensors\",\"b\":\"model-2.safetensors\"}}");
  CHECK(fd_safetensors_open(folder, &s) == FD_OK);
  if (!s) return;
  CHECK(fd_safetensors_count(s) == 2 && fd_safetensors_read(s, 1, got) == FD_OK && got[0] == 3);
  CHECK(fd_safetensors_read(s, 0, got) == FD_OK && got[1] == 2);
  fd_safetensors_close(&s);
  write_text("model.safetensors.index.json", "{\"weight_map\":{\"a\":\"model-1.safetensors\",\"c\":\"model-2.safetensors\"}}");
  CHECK(fd_safetensors_open(folder, &s) == FD_ERR_FORMAT && strstr(fd_status_message(), "promises c"));
  write_text("model.safetensors.index.json", "{\"weight_map\":{\"a\":\"model-3.safetensors\"}}");
  CHECK(fd_safetensors_open(folder, &s) == FD_ERR_IO);
  write_text("model.safetensors.index.json", "{\"weight_map\":{\"a\":\"../a.safetensors\"}}");
  CHECK(fd_safetensors_open(folder, &s) == FD_ERR_FORMAT);
  write_text("model.safetensors.index.json", "{}");
  CHECK(fd_safetensors_open(folder, &s) == FD_ERR_FORMAT && strstr(fd_status_message(), "weight_map"));
}

static void test_h5(void) {
  hid_t file = -1;
  const float x[] = {1, 2.5f, -3, 4, 5, 6};
  struct fd_h5_array a = {0};
  char **names = NULL, *text = NULL;
  int n = 0;
  double value = 0;
  int64_t whole = 0;
  CHECK(fd_h5_create(path("x.h5"), &file) == FD_OK);
  CHECK(fd_h5_write(file, "group/deep/x", FD_F32, 2, (int64_t[]){2, 3}, x) == FD_OK);
  CHECK(fd_h5_write(file, "group/a", FD_I64, 1, (int64_t[]){1}, (int64_t[]){(int64_t)1 << 40}) == FD_OK);
  CHECK(fd_h5_attr_write_text(file, "group/a", "unit", "step") == FD_OK);
  CHECK(fd_h5_attr_write_f64(file, "/", "lr", 1e-4) == FD_OK && fd_h5_attr_write_i64(file, "/", "step", 7) == FD_OK);
  CHECK(fd_h5_close(&file) == FD_OK && file == -1 && fd_h5_close(&file) == FD_OK);
  CHECK(fd_h5_open_read(path("x.h5"), &file) == FD_OK);
  CHECK(fd_h5_exists(file, "group/deep/x") && fd_h5_exists(file, "/group") && !fd_h5_exists(file, "group/no/x") && !fd_h5_exists(-1, "x"));
  CHECK(fd_h5_read(file, "/group/deep/x", FD_F64, &a) == FD_OK && a.ndim == 2 && a.shape[1] == 3 && ((double *)a.data)[1] == 2.5);
  fd_h5_array_free(&a);
  CHECK(fd_h5_read(file, "group/a", FD_I64, &a) == FD_OK && ((int64_t *)a.data)[0] == (int64_t)1 << 40);
  fd_h5_array_free(&a);
  CHECK(fd_h5_read(file, "group/none", FD_F32, &a) == FD_ERR_FORMAT && strstr(fd_status_message(), "/group/none"));
  CHECK(fd_h5_read(file, "group", FD_F32, &a) == FD_ERR_FORMAT);
  CHECK(fd_h5_list(file, "group", false, &n, &names) == FD_OK && n == 2 && !strcmp(names[0], "a") && !strcmp(names[1], "deep"));
  free(names);
  CHECK(fd_h5_list(file, "group", true, &n, &names) == FD_OK && n == 2 && !strcmp(names[1], "deep/x"));
  free(names);
  CHECK(fd_h5_list(file, "absent", true, &n, &names) == FD_OK && n == 0);
  free(names);
  CHECK(fd_h5_attr_read_text(file, "group/a", "unit", &text) == FD_OK && !strcmp(text, "step"));
  free(text);
  CHECK(fd_h5_attr_read_f64(file, "/", "lr", &value) == FD_OK && value == 1e-4);
  CHECK(fd_h5_attr_read_i64(file, "/", "step", &whole) == FD_OK && whole == 7);
  CHECK(fd_h5_attr_read_i64(file, "/", "none", &whole) == FD_ERR_FORMAT);
  CHECK(fd_h5_close(&file) == FD_OK);
  CHECK(fd_h5_open_read(path("none.h5"), &file) == FD_ERR_IO);
  write_text("text.h5", "this is no HDF5 file");
  CHECK(fd_h5_open_read(path("text.h5"), &file) == FD_ERR_FORMAT);
}

int main(void) {
  if (!mkdtemp(folder)) return 1;
  test_types();
  test_refused();
  test_index();
  test_h5();
  clear();
  rmdir(folder);
  return failed;
}
