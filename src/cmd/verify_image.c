// SPDX-License-Identifier: Apache-2.0
// Kind image: files decoded, resized and cropped against Pillow's bytes. Errors are in levels of a byte (0..255).
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cmd/verify.h"
#include "io/image.h"

static fd_status read_file(const char *path, uint8_t **bytes, size_t *n) {
  fd_status st = FD_OK;
  *bytes = NULL;
  FILE *f = fopen(path, "rb");
  if (!f) return FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno));
  size_t capacity = 1 << 16;
  *n = 0;
  for (;;) {
    uint8_t *more = realloc(*bytes, capacity);
    if (!more) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path));
    *bytes = more;
    *n += fread(*bytes + *n, 1, capacity - *n, f);
    if (*n < capacity) break;
    capacity *= 2;
  }
  if (ferror(f)) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot read", path));
done:
  fclose(f);
  return st;
}

static fd_status compare_bytes(struct fd_verify *v, const char *record, const uint8_t *x, int64_t n, double levels, bool required) {
  fd_status st = FD_OK;
  struct fd_h5_array ref = {0};
  FD_TRY(fd_verify_read(v, record, FD_U8, &ref));
  if (ref.numel != n) {
    fd_verify_report(v, record, INFINITY, levels, !required, "%lld values, expected %lld", (long long)n, (long long)ref.numel);
    goto done;
  }
  int worst = 0;
  int64_t where = 0;
  for (int64_t i = 0; i < n; i++) {
    const int d = abs((int)x[i] - (int)((const uint8_t *)ref.data)[i]);
    if (d > worst) worst = d, where = i;
  }
  fd_verify_report(v, record, worst, levels, worst <= levels || !required, "largest difference %d of 255 at value %lld%s", worst,
                   (long long)where, required ? "" : " (not required: a choice)");
done:
  fd_h5_array_free(&ref);
  return st;
}

static fd_status verify_file(struct fd_verify *v, const char *name, const json_t *about, int R, bool required) {
  fd_status st = FD_OK;
  char record[512];
  uint8_t *bytes = NULL, *cropped = NULL;
  float *pixels = NULL;
  size_t n = 0;
  fd_image img = {0};
  const double levels = json_number_value(json_object_get(about, "levels"));
  const char *status = json_string_value(json_object_get(about, "status"));
  if (!status) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: files.%s has no status", v->dir, name));
  if (json_is_false(json_object_get(about, "required"))) required = false;
  snprintf(record, sizeof record, "files/%s", name);
  FD_TRY(read_file(fd_verify_path(v, record), &bytes, &n));
  const enum fd_image_loss loss = fd_image_decode(bytes, n, 0, &img);
  const bool decoded = strcmp(status, "decoded") == 0;
  if (decoded != (loss == FD_IMAGE_KEPT)) {
    fd_verify_report(v, record, INFINITY, 0, !required, "%s, expected: %s", fd_image_loss_text(loss), status);
    goto done;
  }
  fd_verify_report(v, record, 0, 0, true, "%s", status);
  if (!decoded) goto done;

  snprintf(record, sizeof record, "output/%s/decoded", name);
  FD_TRY(compare_bytes(v, record, img.rgb, (int64_t)img.w * img.h * 3, levels, required));
  cropped = malloc((size_t)R * (size_t)R * 3);
  pixels = malloc((size_t)R * (size_t)R * 3 * sizeof *pixels);
  if (!cropped || !pixels) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
  FD_TRY(fd_image_fit(&img, R, NULL, cropped));
  snprintf(record, sizeof record, "output/%s/cropped", name);
  FD_TRY(compare_bytes(v, record, cropped, (int64_t)R * R * 3, levels, required));
  for (int c = 0; c < 3; c++)
    for (int64_t i = 0; i < (int64_t)R * R; i++) pixels[(int64_t)c * R * R + i] = ((float)cropped[3 * i + c] / 255.0f - 0.5f) / 0.5f;
  snprintf(record, sizeof record, "output/%s/pixel_values", name);
  if (required) /* relative to max|ref| <= 1, so a level more than enough of slack where levels > 0 */
    FD_TRY(fd_verify_compare(v, record, pixels, (int64_t)R * R * 3, levels > 0 ? (levels + 1) * 2 / 255 : v->tol_output, NULL, 0));
done:
  fd_image_free(&img);
  free(bytes);
  free(cropped);
  free(pixels);
  return st;
}

fd_status fd_verify_image(struct fd_verify *v) {
  fd_status st = FD_OK;
  const json_t *files = json_object_get(v->info, "files");
  const json_int_t R = json_integer_value(json_object_get(v->info, "resolution"));
  const bool required = !json_is_false(json_object_get(v->info, "required"));
  if (!json_is_object(files) || R < 1 || R > FD_IMAGE_MAX_SIDE)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/case.json: needs files and resolution", v->dir));
  const char *name;
  json_t *about;
  json_object_foreach((json_t *)(uintptr_t)files, name, about) FD_TRY(verify_file(v, name, about, (int)R, required));
done:
  return st;
}
