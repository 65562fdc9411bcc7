// SPDX-License-Identifier: Apache-2.0
// `fdhpc vae encode|decode MODEL IN OUT`: a VAE by itself. Latents go to an HDF5 file: /latents [n, Z, h, w] float32, the VAE's own (not
// normalised), as diffusers' encode(...).latent_dist.mode() gives them, with the pictures' names in an attribute.
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/files.h"
#include "base/log.h"
#include "base/models.h"
#include "cmd/cmd.h"
#include "graph/build.h"
#include "io/h5.h"
#include "io/image.h"
#include "train/job.h"

/* One direction for pictures of one size; a batch is one picture, so that sizes may differ. */
struct coder {
  fd_ctx *ctx;
  fd_model *vae;
  fd_graph *graph;
  fd_var in, out;
  void *arena;
  int64_t h, w; /* pixels */
  bool decode;
};

static void coder_close(struct coder *c) {
  fd_graph_destroy(&c->graph);
  if (c->arena) c->ctx->backend->free(c->ctx, c->arena);
  c->arena = NULL;
}

static fd_status coder_open(struct coder *c, bool decode, int64_t h, int64_t w, fd_dtype dtype) {
  fd_status st = FD_OK;
  size_t bytes;
  const int64_t f = c->vae->dims.factor;
  if (c->graph && c->decode == decode && c->h == h && c->w == w) return FD_OK;
  coder_close(c);
  c->decode = decode;
  c->h = h;
  c->w = w;
  FD_TRY(fd_graph_create(c->ctx, decode ? "vae decode" : "vae encode", &c->graph));
  if (decode) {
    c->in = fd_graph_input(c->graph, "latent", FD_F32, 4, (int64_t[]){1, h / f, w / f, c->vae->dims.latent_channels});
    c->out = fd_cast(c->graph, fd_vae_decode(c->vae, c->graph, fd_cast(c->graph, c->in, dtype, 1)), FD_F32, 1);
  } else {
    c->in = fd_graph_input(c->graph, "pixels", FD_U8, 4, (int64_t[]){1, h, w, 3});
    fd_vae_encode(c->vae, c->graph, fd_pixels(c->graph, c->in, dtype), 0, &c->out, NULL, NULL);
  }
  fd_graph_keep(c->graph, c->out);
  FD_TRY(fd_graph_plan(c->graph, &bytes));
  FD_TRY(c->ctx->backend->alloc(c->ctx, bytes, &c->arena));
  FD_TRY(fd_params_bind(c->vae->params, c->graph));
  FD_TRY(fd_graph_attach(c->graph, c->arena, bytes));
done:
  return st;
}

static fd_status coder_run(struct coder *c, const void *in, size_t in_bytes, float *out, size_t out_bytes) {
  fd_status st = FD_OK;
  FD_TRY(fd_graph_set(c->graph, c->in, in, in_bytes));
  FD_TRY(fd_graph_run(c->graph));
  FD_TRY(fd_graph_read(c->graph, c->out, out, out_bytes));
done:
  return st;
}

/* ---- the list of pictures ---------------------------------------------------------------------------------------- */

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static bool is_picture(const char *name) {
  static const char *const ends[] = {".jpg", ".jpeg", ".png", ".webp"};
  const size_t n = strlen(name);
  for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++)
    if (n > strlen(ends[i]) && strcasecmp(name + n - strlen(ends[i]), ends[i]) == 0) return true;
  return false;
}

/* Names of the pictures in a folder, sorted; or the one file. The caller frees the list and its strings. */
static fd_status list_pictures(const char *path, char ***names, int *n) {
  fd_status st = FD_OK;
  struct stat info;
  DIR *dir = NULL;
  char **list = NULL;
  int count = 0, room = 0;
  if (stat(path, &info) != 0) return FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno));
  if (S_ISDIR(info.st_mode)) {
    dir = opendir(path);
    if (!dir) return FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno));
  }
  for (struct dirent *e = NULL; !dir || (e = readdir(dir));) {
    if (dir && !is_picture(e->d_name)) continue;
    if (count == room) {
      char **more = realloc(list, (size_t)(room = 2 * room + 64) * sizeof *list);
      if (!more) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the list of pictures"));
      list = more;
    }
    if (asprintf(&list[count], "%s%s%s", path, dir ? "/" : "", dir ? e->d_name : "") < 0) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
    count++;
    if (!dir) break;
  }
  if (count == 0) FD_TRY(FD_FAIL(FD_ERR_DATA, "%s: no picture (.jpg .jpeg .png .webp)", path));
  qsort(list, (size_t)count, sizeof *list, by_name);
  *names = list;
  *n = count;
  list = NULL;
done:
  if (dir) closedir(dir);
  if (list) {
    for (int i = 0; i < count; i++) free(list[i]);
    free(list);
  }
  return st;
}

/* ---- HDF5 -------------------------------------------------------------------------------------------------------- */

static fd_status write_latents(const char *path, const float *latents, const int64_t shape[4], char *const *names, const char *model) {
  fd_status st = FD_OK;
  hid_t file = -1;
  size_t bytes = 1;
  for (int64_t i = 0; i < shape[0]; i++) bytes += strlen(names[i]) + 1;
  char *text = malloc(bytes), *end = text;
  if (!text) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %lld names", (long long)shape[0]));
  *text = 0;
  for (int64_t i = 0; i < shape[0]; i++) end += sprintf(end, "%s%s", i ? "\n" : "", names[i]);
  FD_TRY(fd_h5_create(path, &file));
  FD_TRY(fd_h5_write(file, "latents", FD_F32, 4, shape, latents));
  FD_TRY(fd_h5_attr_write_text(file, "latents", "vae", model));
  FD_TRY(fd_h5_attr_write_text(file, "latents", "pictures", text));
  FD_TRY(fd_h5_close(&file));
done:
  if (file >= 0) (void)fd_h5_close(&file);
  free(text);
  return st;
}

/* ---- the two directions ------------------------------------------------------------------------------------------ */

/* [h, w, Z] -> [Z, h, w], as PyTorch has latents; back with `to_channels_last`. */
static void transpose(const float *in, float *out, int64_t pixels, int64_t Z, bool to_channels_last) {
  for (int64_t p = 0; p < pixels; p++)
    for (int64_t z = 0; z < Z; z++) {
      if (to_channels_last)
        out[p * Z + z] = in[z * pixels + p];
      else
        out[z * pixels + p] = in[p * Z + z];
    }
}

static double psnr(const unsigned char *a, const float *decoded, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = (double)a[i] - fd_image_byte(decoded[i]);
    sum += d * d;
  }
  return sum > 0 ? 10 * log10(255.0 * 255.0 * (double)n / sum) : INFINITY;
}

static fd_status encode(struct coder *c, const char *model, const char *in, const char *out, fd_dtype dtype, bool round_trip) {
  fd_status st = FD_OK;
  char **names = NULL;
  int n = 0, h = 0, w = 0;
  fd_image picture = {0};
  float *latents = NULL, *one = NULL, *pixels = NULL;
  const int64_t f = c->vae->dims.factor, Z = c->vae->dims.latent_channels;
  struct coder back = {.ctx = c->ctx, .vae = c->vae};
  double sum = 0, worst = INFINITY;
  FD_TRY(list_pictures(in, &names, &n));
  for (int i = 0; i < n; i++) {
    FD_TRY(fd_image_read(names[i], &picture));
    if (i == 0) {
      h = picture.h, w = picture.w;
      if (h % f || w % f) FD_TRY(FD_FAIL(FD_ERR_DATA, "%s: %d x %d pixels; sides must be multiples of %lld", names[i], w, h, (long long)f));
      latents = malloc((size_t)n * (size_t)(h / f * (w / f) * Z) * sizeof *latents);
      one = malloc((size_t)(h / f * (w / f) * Z) * sizeof *one);
      pixels = malloc((size_t)h * (size_t)w * 3 * sizeof *pixels);
      if (!latents || !one || !pixels) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d latents", n));
    }
    if (picture.h != h || picture.w != w)
      FD_TRY(FD_FAIL(FD_ERR_DATA, "%s: %d x %d pixels, but %s has %d x %d; one file of latents needs pictures of one size", names[i], picture.w, picture.h, names[0], w, h));
    const size_t bytes = (size_t)(h / f * (w / f) * Z) * sizeof *one;
    FD_TRY(coder_open(c, false, h, w, dtype));
    FD_TRY(coder_run(c, picture.rgb, (size_t)h * (size_t)w * 3, one, bytes));
    transpose(one, latents + (int64_t)i * (h / f) * (w / f) * Z, h / f * (w / f), Z, false);
    if (round_trip) {
      FD_TRY(coder_open(&back, true, h, w, dtype));
      FD_TRY(coder_run(&back, one, bytes, pixels, (size_t)h * (size_t)w * 3 * sizeof *pixels));
      const double db = psnr(picture.rgb, pixels, (int64_t)h * w * 3);
      sum += db;
      if (db < worst) worst = db;
      fd_log_info("%s: PSNR %.2f dB", names[i], db);
    }
  }
  FD_TRY(write_latents(out, latents, (const int64_t[]){n, Z, h / f, w / f}, names, model));
  fd_log_info("%s: %d latents [%lld, %lld, %lld]", out, n, (long long)Z, (long long)(h / f), (long long)(w / f));
  if (round_trip) fd_log_info("PSNR of the round trip: mean %.2f dB, lowest %.2f dB", sum / n, worst);
done:
  coder_close(&back);
  for (int i = 0; i < n; i++) free(names[i]);
  free(names);
  fd_image_free(&picture);
  free(latents);
  free(one);
  free(pixels);
  return st;
}

static fd_status decode(struct coder *c, const char *in, const char *out, fd_dtype dtype) {
  fd_status st = FD_OK;
  hid_t file = -1;
  struct fd_h5_array latents = {0};
  float *one = NULL, *pixels = NULL;
  unsigned char *rgb = NULL;
  const int64_t f = c->vae->dims.factor, Z = c->vae->dims.latent_channels;
  FD_TRY(fd_h5_open_read(in, &file));
  FD_TRY(fd_h5_read(file, "latents", FD_F32, &latents));
  if (latents.ndim != 4 || latents.shape[1] != Z)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: /latents is not [n, %lld, h, w]", in, (long long)Z));
  const int64_t h = latents.shape[2], w = latents.shape[3], values = h * w * Z, bytes = h * f * w * f * 3;
  one = malloc((size_t)values * sizeof *one);
  pixels = malloc((size_t)bytes * sizeof *pixels);
  rgb = malloc((size_t)bytes);
  if (!one || !pixels || !rgb) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a picture"));
  FD_TRY(fd_folder_make(out));
  for (int64_t i = 0; i < latents.shape[0]; i++) {
    char path[4096];
    transpose((const float *)latents.data + i * values, one, h * w, Z, true);
    FD_TRY(coder_open(c, true, h * f, w * f, dtype));
    FD_TRY(coder_run(c, one, (size_t)values * sizeof *one, pixels, (size_t)bytes * sizeof *pixels));
    for (int64_t p = 0; p < bytes; p++) rgb[p] = fd_image_byte(pixels[p]);
    snprintf(path, sizeof path, "%s/%05lld.png", out, (long long)i);
    FD_TRY(fd_image_write(path, rgb, (int)(w * f), (int)(h * f)));
  }
  fd_log_info("%s: %lld pictures of %lld x %lld", out, (long long)latents.shape[0], (long long)(w * f), (long long)(h * f));
done:
  free(one);
  free(pixels);
  free(rgb);
  fd_h5_array_free(&latents);
  if (file >= 0) (void)fd_h5_close(&file);
  return st;
}

/* ---- the command ------------------------------------------------------------------------------------------------- */

static fd_status run_vae(struct fd_run *run) {
  fd_status st = FD_OK;
  const char *way = run->args[0], *name = run->args[1], *in = run->args[2], *out = run->args[3];
  const char *subfolder = fd_run_flag(run, "--subfolder");
  const fd_dtype dtype = strcmp(run->opt->trainer.mixed_precision, "bf16") ? FD_F32 : FD_BF16;
  struct coder c = {0};
  char *dir = NULL;
  const bool decoding = strcmp(way, "decode") == 0;
  if (!decoding && strcmp(way, "encode")) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "vae: the first word is \"%s\", expected encode or decode", way));
  FD_TRY(fd_parts_context(run->opt, run->comm, &c.ctx));
  if (fd_comm_rank(run->comm)) goto done; /* one rank's work */
  FD_TRY(fd_model_find(run->opt, "MODEL", name, subfolder ? subfolder : "", &dir));
  FD_TRY(fd_model_open(dir, &c.vae));
  if (c.vae->cls->family != FD_FAMILY_VAE) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "%s holds a %s, expected a VAE", dir, c.vae->cls->name));
  FD_TRY(fd_params_layout(c.vae->params, false, 1));
  FD_TRY(fd_params_alloc(c.vae->params, c.ctx, dtype, false));
  FD_TRY(fd_model_load(c.vae, dir, NULL, NULL));
  if (decoding)
    FD_TRY(decode(&c, in, out, dtype));
  else
    FD_TRY(encode(&c, name, in, out, dtype, fd_run_switch(run, "--psnr", false)));
done:
  st = fd_agree(run->comm, st);
  if (c.ctx) coder_close(&c);
  fd_model_destroy(&c.vae);
  fd_ctx_destroy(&c.ctx);
  free(dir);
  return st;
}

const struct fd_command fd_cmd_vae = {
    .name = "vae",
    .args = "encode|decode MODEL IN OUT",
    .help = "a VAE by itself: pictures (a file or a folder) to latents (HDF5), or latents to a folder of pictures",
    .least_args = 4,
    .most_args = 4,
    .flags = (const struct fd_flag[]){{"--psnr", NULL, NULL, "encode: decode again and say how close it comes"},
                                      {"--subfolder", "NAME", NULL, "folder inside MODEL that holds config.json"},
                                      {"--mixed_precision", "bf16|no", "trainer.mixed_precision", "type to compute in"},
                                      {0}},
    .groups = "",
    .run = run_vae,
};
