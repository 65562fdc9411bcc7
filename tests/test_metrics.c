// SPDX-License-Identifier: Apache-2.0
// metrics.csv over a resume: rows beyond the step that a run starts from are cut, as is a row that a crash left half written.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "train/metrics.h"

static int failed;
#define CHECK(c)                                                    \
  do {                                                              \
    if (!(c)) failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c); \
  } while (0)

static void write_rows(const char *path, int64_t from, int64_t to) {
  FILE *f = NULL;
  CHECK(fd_metrics_open(path, from, &f) == FD_OK && f);
  for (int64_t s = from + 1; f && s <= to; s++) {
    const struct fd_metrics_row row = {.step = s, .loss = 1.0 / 3, .grad_norm = 2, .lr = 1e-4, .samples_seen = 24 * s};
    CHECK(fd_metrics_write(f, &row) == FD_OK);
  }
  if (f) fclose(f);
}

/* Steps of the rows are 1, 2, ..., n and each row has as many fields as the header. */
static int count_rows(const char *path) {
  char line[1024];
  int n = 0, columns = 0;
  FILE *f = fopen(path, "r");
  while (f && fgets(line, sizeof line, f)) {
    int commas = 0;
    for (const char *c = line; *c; c++) commas += *c == ',';
    if (n == 0) columns = commas;
    CHECK(commas == columns && commas > 10);
    if (n) CHECK(atoi(line) == n && strstr(line, ",0.333333333,"));
    n++;
  }
  if (f) fclose(f);
  return n - 1;
}

static void check_text(void (*format)(double, char *, size_t), double x, const char *want) {
  char text[32];
  format(x, text, sizeof text);
  CHECK(!strcmp(text, want));
  if (strcmp(text, want)) printf("%g: %s, wanted %s\n", x, text, want);
}

int main(void) {
  char path[] = "/tmp/fdhpc-metrics-XXXXXX";
  const int fd = mkstemp(path);
  CHECK(fd >= 0);
  if (fd >= 0) close(fd);
  write_rows(path, 0, 10);
  CHECK(count_rows(path) == 10);
  FILE *f = fopen(path, "a");
  CHECK(f != NULL);
  if (f) fputs("11,0.33", f), fclose(f);
  write_rows(path, 7, 12);
  CHECK(count_rows(path) == 12);
  write_rows(path, 0, 3);
  CHECK(count_rows(path) == 3);
  unlink(path);
  CHECK(fd_metrics_open("/nonexistent/metrics.csv", 0, &f) == FD_ERR_IO);
  check_text(fd_format_bytes, 0, "0 B");
  check_text(fd_format_bytes, 1500, "1.50 kB");
  check_text(fd_format_bytes, 42.57e9, "42.57 GB");
  check_text(fd_format_bytes, 999.6e6, "1.00 GB");
  check_text(fd_format_bytes, 123e6, "123 MB");
  check_text(fd_format_duration, 59.6, "1 min 00 s");
  check_text(fd_format_duration, 12, "12 s");
  check_text(fd_format_duration, 3720, "1 h 02 min");
  check_text(fd_format_duration, -1, "0 s");
  return failed;
}
