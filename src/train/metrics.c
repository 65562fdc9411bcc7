// SPDX-License-Identifier: Apache-2.0
// metrics.csv and lines for people. Numbers are printed so that loss and gradient norm read back to float precision.
#include "train/metrics.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const char header[] =
    "step,loss,loss_mean,grad_norm,lr,images_per_s,seconds,seconds_data,seconds_comm,seconds_vae,seconds_text,seconds_forward,"
    "seconds_backward,seconds_optimizer,bad_samples,skipped_steps,samples_seen\n";

/* Copy the rows up to `step`; a last row without its newline (a crash) is dropped. */
static fd_status keep_rows(const char *path, int64_t step) {
  fd_status st = FD_OK;
  char *line = NULL, part[4096];
  size_t capacity = 0;
  ssize_t n;
  FILE *in = NULL, *out = NULL;
  if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: path too long", path));
  in = fopen(path, "r");
  out = fopen(part, "w");
  if (!out) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", part, strerror(errno)));
  fputs(header, out);
  while (in && (n = getline(&line, &capacity, in)) > 0) {
    char *end;
    const long long s = strtoll(line, &end, 10);
    if (end != line && *end == ',' && s <= step && line[n - 1] == '\n') fputs(line, out);
  }
  if (fflush(out) || ferror(out) || rename(part, path)) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno)));
done:
  free(line);
  if (in) fclose(in);
  if (out) fclose(out);
  return st;
}

fd_status fd_metrics_open(const char *path, int64_t step, FILE **out) {
  fd_status st = FD_OK;
  FD_TRY(keep_rows(path, step));
  FILE *f = fopen(path, "a");
  if (!f) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno)));
  *out = f;
done:
  return st;
}

fd_status fd_metrics_write(FILE *f, const struct fd_metrics_row *r) {
  fprintf(f, "%lld,%.9g,%.9g,%.9g,%.9g,%.6g,%.6g,%.6g,%.6g", (long long)r->step, r->loss, r->loss_mean, r->grad_norm, r->lr,
          r->images_per_s, r->seconds, r->data_s, r->comm_s);
  for (int i = 0; i < FD_METRICS_PHASES; i++) fprintf(f, ",%.6g", r->phase_s[i]);
  fprintf(f, ",%lld,%lld,%lld\n", (long long)r->bad_samples, (long long)r->skipped_steps, (long long)r->samples_seen);
  if (fflush(f)) return FD_FAIL(FD_ERR_IO, "metrics.csv: %s", strerror(errno));
  return FD_OK;
}

void fd_format_duration(double seconds, char *text, size_t bytes) {
  const long long s = seconds > 0 ? (long long)(seconds + 0.5) : 0;
  if (s >= 172800)
    snprintf(text, bytes, "%lld d %02lld h", s / 86400, s % 86400 / 3600);
  else if (s >= 3600)
    snprintf(text, bytes, "%lld h %02lld min", s / 3600, s % 3600 / 60);
  else if (s >= 60)
    snprintf(text, bytes, "%lld min %02lld s", s / 60, s % 60);
  else
    snprintf(text, bytes, "%lld s", s);
}

void fd_format_bytes(double bytes, char *text, size_t size) {
  static const char *const unit[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  int i = 0;
  while (i < 5 && bytes >= 999.5) bytes /= 1000, i++;
  snprintf(text, size, i && bytes < 99.5 ? "%.2f %s" : "%.0f %s", bytes, unit[i]);
}
