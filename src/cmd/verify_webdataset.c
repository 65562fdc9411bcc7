// SPDX-License-Identifier: Apache-2.0
// Kind webdataset: a list of tars, some damaged: which samples are found, kept and lost, and their bytes.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cmd/verify.h"
#include "io/dataset.h"
#include "io/image.h"
#include "io/tokenizer.h"

/* ---- SHA-256 (FIPS 180-4) ---------------------------------------------------------------------------------------- */

static void sha256_block(uint32_t h[8], const uint8_t *p) {
  static const uint32_t k[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
      0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
      0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
      0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
      0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
      0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  uint32_t w[64], v[8];
#define ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))
  for (int i = 0; i < 16; i++) w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
  for (int i = 16; i < 64; i++)
    w[i] = w[i - 16] + (ROTATE(w[i - 15], 7) ^ ROTATE(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
           (ROTATE(w[i - 2], 17) ^ ROTATE(w[i - 2], 19) ^ w[i - 2] >> 10);
  memcpy(v, h, sizeof v);
  for (int i = 0; i < 64; i++) {
    const uint32_t a = v[0], e = v[4];
    const uint32_t t1 = v[7] + (ROTATE(e, 6) ^ ROTATE(e, 11) ^ ROTATE(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
    const uint32_t t2 = (ROTATE(a, 2) ^ ROTATE(a, 13) ^ ROTATE(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    memmove(v + 1, v, 7 * sizeof *v);
    v[4] += t1;
    v[0] = t1 + t2;
  }
  for (int i = 0; i < 8; i++) h[i] += v[i];
#undef ROTATE
}

static void sha256_hex(const void *data, size_t n, char hex[65]) {
  uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const uint8_t *p = data;
  uint8_t last[128] = {0};
  const size_t rest = n % 64, blocks = rest < 56 ? 1 : 2;
  for (size_t i = 0; i + 64 <= n; i += 64) sha256_block(h, p + i);
  if (rest) memcpy(last, p + n - rest, rest);
  last[rest] = 0x80;
  for (int i = 0; i < 8; i++) last[64 * blocks - 1 - (size_t)i] = (uint8_t)((uint64_t)n * 8 >> 8 * i);
  for (size_t b = 0; b < blocks; b++) sha256_block(h, last + 64 * b);
  for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", h[i]);
}

/* ---- the case ---------------------------------------------------------------------------------------------------- */

static bool same_text(const json_t *value, const void *text, size_t bytes) {
  return json_is_string(value) && json_string_length(value) == bytes && memcmp(json_string_value(value), text, bytes) == 0;
}

/* Decoded and compared; *kept tells whether it was decodable at all. */
static fd_status check_sample(struct fd_verify *v, const char *record, fd_dataset *d, int64_t i, const json_t *want, int R) {
  fd_status st = FD_OK;
  struct fd_sample sample = {0};
  fd_image img = {0};
  uint8_t *cropped = NULL;
  float *pixels = NULL;
  char hex[65];
  const char *status = json_string_value(json_object_get(want, "status"));
  const bool want_kept = status && strcmp(status, "kept") == 0, free_choice = json_object_get(want, "free") != NULL;
  const char *why = "kept";
  const enum fd_bad bad = fd_dataset_read(d, i, 1, &sample);
  enum fd_image_loss loss = FD_IMAGE_KEPT;
  if (bad != FD_BAD_NONE)
    why = fd_bad_text(bad);
  else if ((loss = fd_image_decode(sample.image, sample.image_bytes, 0, &img)) != FD_IMAGE_KEPT)
    why = fd_image_loss_text(loss);
  else if (!fd_utf8_valid(sample.caption[0], (size_t)sample.caption_bytes[0]))
    why = fd_bad_text(FD_BAD_CAPTION_UTF8);
  const bool kept = strcmp(why, "kept") == 0;
  if (kept != want_kept) {
    fd_verify_report(v, record, free_choice ? 0 : INFINITY, 0, free_choice, "%s, expected %s%s", why, status, free_choice ? " (either is right)" : "");
    goto done;
  }
  const char *wrong = NULL;
  if (kept) {
    cropped = malloc((size_t)R * (size_t)R * 3);
    pixels = malloc((size_t)R * (size_t)R * 3 * sizeof *pixels);
    if (!cropped || !pixels) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
    FD_TRY(fd_image_fit(&img, R, NULL, cropped));
    for (int c = 0; c < 3; c++)
      for (int64_t k = 0; k < (int64_t)R * R; k++) pixels[(int64_t)c * R * R + k] = ((float)cropped[3 * k + c] / 255.0f - 0.5f) / 0.5f;
    if (!same_text(json_object_get(want, "caption"), sample.caption[0], (size_t)sample.caption_bytes[0])) wrong = "caption differs";
    if (json_object_get(want, "width") && (json_integer_value(json_object_get(want, "width")) != img.w || json_integer_value(json_object_get(want, "height")) != img.h))
      wrong = "size differs";
    sha256_hex(img.rgb, (size_t)img.w * (size_t)img.h * 3, hex);
    if (json_object_get(want, "rgb_sha256") && !same_text(json_object_get(want, "rgb_sha256"), hex, 64)) wrong = "decoded picture differs";
    sha256_hex(pixels, (size_t)R * (size_t)R * 3 * sizeof *pixels, hex);
    if (json_object_get(want, "pixel_values_sha256") && !same_text(json_object_get(want, "pixel_values_sha256"), hex, 64)) wrong = "pixel values differ";
  }
  const struct {
    const char *extension;
    const void *bytes;
    int64_t n;
  } members[2] = {{"jpg", sample.image, (int64_t)sample.image_bytes}, {"txt", sample.caption[0], sample.caption_bytes[0]}};
  for (int m = 0; m < 2 && bad == FD_BAD_NONE; m++) {
    const json_t *about = json_object_get(json_object_get(want, "members"), members[m].extension);
    if (!about) continue;
    sha256_hex(members[m].bytes, (size_t)members[m].n, hex);
    if (json_integer_value(json_object_get(about, "bytes")) != members[m].n || !same_text(json_object_get(about, "sha256"), hex, 64)) wrong = "a member's bytes differ";
  }
  fd_verify_report(v, record, wrong ? 1 : 0, 0, !wrong, "%s", wrong ? wrong : why);
done:
  fd_sample_free(&sample);
  fd_image_free(&img);
  free(cropped);
  free(pixels);
  return st;
}

fd_status fd_verify_webdataset(struct fd_verify *v) {
  fd_status st = FD_OK;
  fd_dataset *d = NULL;
  json_t *expected = NULL, *value;
  const char **paths = NULL;
  char *joined = NULL, folder[] = "/tmp/fdhpc-verify-XXXXXX", index[64] = "";
  size_t i, n = 0;
  json_error_t error;
  expected = json_load_file(fd_verify_path(v, "expected.json"), JSON_ALLOW_NUL, &error);
  if (!expected) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/expected.json: line %d: %s", v->dir, error.line, error.text));
  const json_t *shards = json_object_get(expected, "shards"), *samples = json_object_get(expected, "samples");
  const int R = (int)json_integer_value(json_object_get(expected, "resolution"));
  if (!json_array_size(shards) || R < 1) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/expected.json: needs shards and resolution", v->dir));
  paths = calloc(json_array_size(shards), sizeof *paths);
  if (!paths) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", v->dir));
  json_array_foreach((json_t *)(uintptr_t)shards, i, value) {
    const char *name = json_string_value(json_object_get(value, "shard"));
    if (!name || asprintf(&joined, "%s/files/%s", v->dir, name) < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/expected.json: a shard without name", v->dir));
    paths[n++] = joined;
  }
  if (!mkdtemp(folder)) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot be made", folder));
  snprintf(index, sizeof index, "%s/index.h5", folder);
  const struct fd_dataset_config config = {.paths = paths, .n_paths = (int)n, .image_column = "jpg", .caption_columns = {"txt", NULL}, .index_path = index};
  FD_TRY(fd_dataset_open(NULL, &config, &d));

  /* the index leaves out samples without picture or caption: they are counted */
  int64_t at = 0, lost[2] = {0, 0};
  json_array_foreach((json_t *)(uintptr_t)samples, i, value) {
    const json_t *key = json_object_get(value, "key");
    const char *shard = json_string_value(json_object_get(value, "shard"));
    char record[256];
    snprintf(record, sizeof record, "%s/%.100s", shard ? shard : "?", json_string_value(key) ? json_string_value(key) : "?");
    const json_t *members = json_object_get(value, "members"), *status = json_object_get(value, "status");
    const bool no_image = !json_object_get(members, "jpg"), no_caption = !json_object_get(members, "txt");
    if (no_image || no_caption) {
      lost[!no_image]++;
      if (!same_text(status, "lost", 4)) fd_verify_report(v, record, INFINITY, 0, false, "kept without picture or caption: a wrong record");
      continue;
    }
    /* the record names the tar of the first member, which may be one that is not read: the others lie there or behind */
    struct fd_sample_info info = {0};
    bool same = false;
    if (at < fd_dataset_samples(d)) {
      fd_dataset_info(d, at, &info);
      const int64_t first = info.image.shard < info.caption[0].shard ? info.image.shard : info.caption[0].shard;
      for (int64_t k = 0; k <= first && shard; k++) {
        const char *file = strrchr(fd_dataset_shard_path(d, k, NULL), '/');
        if (file && strcmp(file + 1, shard) == 0) same = same_text(key, info.key, (size_t)info.key_bytes);
      }
    }
    if (!same) {
      const bool either = json_object_get(value, "free") != NULL; /* a whole tar that may be refused */
      fd_verify_report(v, record, either ? 0 : INFINITY, 0, either, "not found%s", either ? " (either is right)" : "");
      continue;
    }
    FD_TRY(check_sample(v, record, d, at++, value, R));
  }
  fd_verify_report(v, "number of samples", (double)(fd_dataset_samples(d) - at), 0, at == fd_dataset_samples(d), "%lld found, expected %lld",
                   (long long)fd_dataset_samples(d), (long long)at);
  fd_verify_report(v, "samples without picture", fabs((double)(fd_dataset_lost(d, FD_BAD_NO_IMAGE) - lost[0])), 0,
                   fd_dataset_lost(d, FD_BAD_NO_IMAGE) == lost[0], "%lld, expected %lld", (long long)fd_dataset_lost(d, FD_BAD_NO_IMAGE), (long long)lost[0]);
  fd_verify_report(v, "samples without caption", fabs((double)(fd_dataset_lost(d, FD_BAD_NO_CAPTION) - lost[1])), 0,
                   fd_dataset_lost(d, FD_BAD_NO_CAPTION) == lost[1], "%lld, expected %lld", (long long)fd_dataset_lost(d, FD_BAD_NO_CAPTION),
                   (long long)lost[1]);
done:
  fd_dataset_destroy(&d);
  if (*index) {
    unlink(index);
    rmdir(folder);
  }
  for (i = 0; i < n; i++) free((char *)(uintptr_t)paths[i]);
  free(paths);
  json_decref(expected);
  return st;
}
