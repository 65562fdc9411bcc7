// SPDX-License-Identifier: Apache-2.0
// Decoders and encoders. What is kept of a damaged file is decided here, as Pillow does it with LOAD_TRUNCATED_IMAGES.
#include "io/image.h"

#include <errno.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jpeglib.h>
#include <png.h>
#include <webp/demux.h>

const char *fd_image_loss_text(enum fd_image_loss loss) {
  switch (loss) {
    case FD_IMAGE_KEPT: return "decoded";
    case FD_IMAGE_UNKNOWN: return "neither JPEG nor PNG nor WebP";
    case FD_IMAGE_DAMAGED: return "damaged beyond use";
    case FD_IMAGE_TOO_LARGE: return "more pixels than are allowed";
    case FD_IMAGE_NOMEM: return "no memory to decode it";
  }
  return "?";
}

void fd_image_free(fd_image *img) {
  free(img->rgb);
  *img = (fd_image){0};
}

fd_status fd_image_reserve(fd_image *img, int w, int h) {
  if (w < 1 || h < 1) return FD_FAIL(FD_ERR_ARG, "a picture of %d x %d pixels", w, h);
  const size_t need = (size_t)w * (size_t)h * 3 + FD_IMAGE_SLACK;
  if (need > img->capacity) {
    uint8_t *rgb = malloc(need);
    if (!rgb) return FD_FAIL(FD_ERR_NOMEM, "no memory for a picture of %d x %d pixels", w, h);
    free(img->rgb);
    img->rgb = rgb;
    img->capacity = need;
  }
  img->w = w;
  img->h = h;
  memset(img->rgb + need - FD_IMAGE_SLACK, 0, FD_IMAGE_SLACK);
  return FD_OK;
}

static enum fd_image_loss reserve(fd_image *img, int64_t w, int64_t h) {
  if (w < 1 || h < 1) return FD_IMAGE_DAMAGED;
  if (w > FD_IMAGE_MAX_PIXELS || h > FD_IMAGE_MAX_PIXELS || w * h > FD_IMAGE_MAX_PIXELS) return FD_IMAGE_TOO_LARGE;
  return fd_image_reserve(img, (int)w, (int)h) == FD_OK ? FD_IMAGE_KEPT : FD_IMAGE_NOMEM;
}

static void fill(fd_image *img, int64_t first_row, int level) {
  if (first_row < img->h) memset(img->rgb + (size_t)first_row * (size_t)img->w * 3, level, (size_t)(img->h - first_row) * (size_t)img->w * 3);
}

/* ---- JPEG -------------------------------------------------------------------------------------------------------- */

struct jpeg_escape {
  struct jpeg_error_mgr manager; /* first: libjpeg knows only this */
  jmp_buf jump;
  bool ended; /* the end marker was given */
};

static void jpeg_escape_exit(j_common_ptr info) { longjmp(((struct jpeg_escape *)info->err)->jump, 1); }
static void jpeg_silent(j_common_ptr info) { (void)info; }
static void jpeg_count_warning(j_common_ptr info, int level) {
  if (level < 0) info->err->num_warnings++;
}

/* Where the bytes end comes one end marker. What wants still more is a table that is cut: libjpeg gets no further, as in Pillow. */
static boolean jpeg_end(j_decompress_ptr info) {
  static const JOCTET end[2] = {0xff, JPEG_EOI};
  struct jpeg_escape *escape = (struct jpeg_escape *)info->err;
  if (escape->ended) longjmp(escape->jump, 1);
  escape->ended = true;
  info->src->next_input_byte = end;
  info->src->bytes_in_buffer = sizeof end;
  return TRUE;
}

/* Walk over the header's segments as Pillow does, up to and including the scan header. False: the picture is lost. Sets the
 * size and the number of components of the frame. */
static bool jpeg_walk(const uint8_t *p, size_t n, int *w, int *h, int *components) {
  size_t i = 2; /* at the first marker's 0xff */
  *components = 0;
  for (;;) {
    while (i < n && p[i] != 0xff) i++; /* junk */
    while (i < n && p[i] == 0xff) i++; /* fill bytes */
    if (i >= n) return false;
    const int marker = p[i++];
    if (marker == 0) continue; /* an escaped 0xff */
    if (marker < 0xc0) return false;
    const bool bare = marker == 0xc8 || marker == 0xcc || (marker >= 0xd0 && marker <= 0xd9) || (marker >= 0xf0 && marker <= 0xfd);
    if (bare) continue; /* the contents of 0xcc (arithmetic tables) are passed over as junk */
    if (i + 2 > n) return false;
    const size_t length = (size_t)p[i] << 8 | p[i + 1];
    if (length < 2 || i + length > n) return false;
    const bool frame = (marker <= 0xcf && marker != 0xc4) || marker == 0xde;
    if (frame) {
      if (length < 8 || (length - 8) % 3 != 0) return false; /* 3 bytes a component */
      if (p[i + 2] != 8) return false;                       /* 12 bits a sample */
      *h = p[i + 3] << 8 | p[i + 4];
      *w = p[i + 5] << 8 | p[i + 6];
      *components = p[i + 7];
      if (*components != 1 && *components != 3 && *components != 4) return false;
    }
    if (marker == 0xdb) { /* quantization tables of 8 or 16 bits */
      size_t table = i + 2;
      while (table < i + length) table += p[table] >> 4 ? 129 : 65;
      if (table != i + length) return false;
    }
    i += length;
    if (marker == 0xda) return *components != 0;
  }
}

static int mul255(int a, int b) {
  const int t = a * b + 128;
  return ((t >> 8) + t) >> 8;
}

/* Inverted, which is Adobe's convention, with or without Adobe's marker: Pillow does not look for it. */
static void cmyk_row(const uint8_t *cmyk, int w, uint8_t *rgb) {
  for (int x = 0; x < w; x++, cmyk += 4, rgb += 3) {
    const int nk = cmyk[3];
    for (int c = 0; c < 3; c++) {
      const int v = nk - mul255(255 - cmyk[c], nk);
      rgb[c] = (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
    }
  }
}

static enum fd_image_loss decode_jpeg(const uint8_t *bytes, size_t n, int fast_side, fd_image *img) {
  int w = 0, h = 0, components = 0;
  if (!jpeg_walk(bytes, n, &w, &h, &components)) return FD_IMAGE_DAMAGED;
  enum fd_image_loss loss = reserve(img, w, h);
  if (loss) return loss;
  const int missing = components == 4 ? 255 : 0; /* rows that do not come are 0 in the file's colours; no ink is white */

  struct jpeg_decompress_struct info;
  struct jpeg_escape escape = {.ended = false};
  uint8_t *volatile line = NULL; /* a row of CMYK */
  volatile int64_t rows = 0;     /* rows that are complete */
  info.err = jpeg_std_error(&escape.manager);
  escape.manager.error_exit = jpeg_escape_exit;
  escape.manager.output_message = jpeg_silent;
  escape.manager.emit_message = jpeg_count_warning;
  if (setjmp(escape.jump)) { /* a fatal error after the header: what has come is kept */
    jpeg_destroy_decompress(&info);
    free(line);
    fill(img, rows, missing);
    return FD_IMAGE_KEPT;
  }
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, bytes, (unsigned long)n);
  info.src->fill_input_buffer = jpeg_end;
  jpeg_read_header(&info, TRUE);
  info.out_color_space = info.num_components == 4 ? JCS_CMYK : JCS_RGB;
  if (fast_side > 0) {
    const int64_t side = img->w < img->h ? img->w : img->h;
    int eighths = 8;
    while (eighths > 1 && (side * (eighths - 1) + 7) / 8 >= fast_side) eighths--;
    info.scale_num = (unsigned)eighths;
    info.scale_denom = 8;
  }
  jpeg_start_decompress(&info);
  if ((int)info.output_width != img->w || (int)info.output_height != img->h) {
    loss = reserve(img, info.output_width, info.output_height);
    if (loss) {
      jpeg_destroy_decompress(&info);
      return loss;
    }
  }
  const size_t stride = (size_t)img->w * 3;
  if (info.out_color_space == JCS_CMYK) {
    line = malloc((size_t)img->w * 4);
    if (!line) {
      jpeg_destroy_decompress(&info);
      return FD_IMAGE_NOMEM;
    }
  }
  while (info.output_scanline < info.output_height) {
    uint8_t *out = img->rgb + (size_t)info.output_scanline * stride;
    JSAMPROW row = line ? line : out;
    if (jpeg_read_scanlines(&info, &row, 1) != 1) break;
    if (line) cmyk_row(line, img->w, out);
    rows = info.output_scanline;
  }
  jpeg_destroy_decompress(&info); /* not finish: what follows the last row is of no interest */
  free(line);
  fill(img, rows, missing);
  return FD_IMAGE_KEPT;
}

/* ---- PNG --------------------------------------------------------------------------------------------------------- */

struct png_target {
  fd_image *img;
  enum fd_image_loss loss;
  bool started; /* the data chunk was reached: the picture is kept */
  bool interlaced;
};

static void png_header(png_structp png, png_infop info) {
  struct png_target *target = png_get_progressive_ptr(png);
  target->loss = reserve(target->img, png_get_image_width(png, info), png_get_image_height(png, info));
  if (target->loss) png_error(png, "refused");
  fill(target->img, 0, 0);
  png_colorp palette = NULL;
  int colors = 0;
  if (png_get_color_type(png, info) == PNG_COLOR_TYPE_PALETTE && png_get_PLTE(png, info, &palette, &colors) && colors > 0) {
    const uint8_t first[3] = {palette[0].red, palette[0].green, palette[0].blue}; /* of rows that do not come: colour 0 */
    const size_t pixels = (size_t)target->img->w * (size_t)target->img->h;
    for (size_t i = 0; i < pixels; i++) memcpy(target->img->rgb + 3 * i, first, 3);
  }
  png_set_crc_action(png, PNG_CRC_QUIET_USE, PNG_CRC_QUIET_USE); /* the data's sums do not matter */
  png_set_expand(png);
  png_set_strip_16(png);
  png_set_strip_alpha(png);
  png_set_gray_to_rgb(png);
  target->interlaced = png_get_interlace_type(png, info) != PNG_INTERLACE_NONE;
  png_start_read_image(png); /* interlaced passes come as they are; png_row spreads them */
  target->started = true;
}

/* The pull reader loses everything when a chunk is cut; this one gives each row that is complete. */
static void png_row(png_structp png, png_bytep row, png_uint_32 y, int pass) {
  static const uint8_t first_x[7] = {0, 4, 0, 2, 0, 1, 0}, step_x[7] = {8, 8, 4, 4, 2, 2, 1};
  static const uint8_t first_y[7] = {0, 0, 4, 0, 2, 0, 1}, step_y[7] = {8, 8, 8, 4, 4, 2, 2};
  const struct png_target *target = png_get_progressive_ptr(png);
  fd_image *img = target->img;
  const int p = target->interlaced ? pass : 6;
  const int64_t line = target->interlaced ? first_y[p] + (int64_t)y * step_y[p] : (int64_t)y;
  if (!row || line >= img->h) return;
  uint8_t *out = img->rgb + (size_t)line * (size_t)img->w * 3;
  if (!target->interlaced) {
    memcpy(out, row, (size_t)img->w * 3);
    return;
  }
  for (int x = first_x[p]; x < img->w; x += step_x[p], row += 3) memcpy(out + (size_t)x * 3, row, 3);
}

static void png_escape(png_structp png, png_const_charp message) {
  (void)message;
  png_longjmp(png, 1);
}
/* A chunk that no one knows is passed over, even one whose name says that it is needed; behind the first data it ends the data. */
static int png_unknown(png_structp png, png_unknown_chunkp chunk) {
  const struct png_target *target = png_get_user_chunk_ptr(png);
  (void)chunk;
  return target->started ? -1 : 1;
}
static void png_silent(png_structp png, png_const_charp message) {
  (void)png;
  (void)message;
}

/* Pillow loses a picture with a chunk that is cut and not data. It looks no further than the end, the next picture of an animated
 * one, and a name that is not ASCII. */
static bool png_chunk_cut(const uint8_t *p, size_t n) {
  bool data = false;
  for (size_t i = 8; i + 4 <= n;) {
    const size_t length = png_get_uint_32(p + i), rest = n - i - 4; /* rest: of name, data and sum */
    const uint8_t *name = p + i + 4;
    for (size_t k = 0; k < 4 && k < rest; k++)
      if (name[k] >= 0x80) return false;
    if (rest < 4) return length > 0;
    if (memcmp(name, "IEND", 4) == 0 || (data && memcmp(name, "fcTL", 4) == 0)) return false;
    const bool is_data = memcmp(name, "IDAT", 4) == 0;
    if (length > rest - 4) return !is_data;
    data |= is_data;
    i += 12 + length;
  }
  return false;
}

static enum fd_image_loss decode_png(const uint8_t *bytes, size_t n, fd_image *img) {
  struct png_target target = {.img = img};
  png_infop info = NULL;
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, NULL, png_escape, png_silent);
  if (!png) return FD_IMAGE_NOMEM;
  info = png_create_info_struct(png);
  if (!info) {
    png_destroy_read_struct(&png, NULL, NULL);
    return FD_IMAGE_NOMEM;
  }
  if (!setjmp(png_jmpbuf(png))) {
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_QUIET_USE); /* until png_header: its own and the palette's count */
    png_set_read_user_chunk_fn(png, &target, png_unknown);
    png_set_benign_errors(png, 1);
    png_set_progressive_read_fn(png, &target, png_header, png_row, NULL);
    for (size_t i = 0; i < n;) { /* pieces: the library takes less than 4 GiB at once */
      const size_t piece = n - i < ((size_t)1 << 30) ? n - i : (size_t)1 << 30;
      png_process_data(png, info, (png_bytep)(uintptr_t)(bytes + i), piece);
      i += piece;
    }
  }
  png_destroy_read_struct(&png, &info, NULL);
  if (target.loss) return target.loss;
  return target.started && !png_chunk_cut(bytes, n) ? FD_IMAGE_KEPT : FD_IMAGE_DAMAGED;
}

/* ---- WebP -------------------------------------------------------------------------------------------------------- */

static enum fd_image_loss decode_webp(const uint8_t *bytes, size_t n, fd_image *img) {
  enum fd_image_loss loss = FD_IMAGE_DAMAGED;
  WebPAnimDecoderOptions options;
  if (!WebPAnimDecoderOptionsInit(&options)) return FD_IMAGE_NOMEM;
  options.color_mode = MODE_RGBA;
  options.use_threads = 0;
  WebPBitstreamFeatures features;
  if (WebPGetFeatures(bytes, n, &features) != VP8_STATUS_OK) return FD_IMAGE_DAMAGED;
  if ((int64_t)features.width * features.height > FD_IMAGE_MAX_PIXELS) return FD_IMAGE_TOO_LARGE;
  const WebPData data = {bytes, n};
  WebPAnimDecoder *decoder = WebPAnimDecoderNew(&data, &options);
  if (!decoder) return FD_IMAGE_DAMAGED;
  WebPAnimInfo about;
  uint8_t *rgba = NULL; /* the decoder's */
  int time_ms = 0;
  if (WebPAnimDecoderGetInfo(decoder, &about) && WebPAnimDecoderGetNext(decoder, &rgba, &time_ms) && rgba) {
    loss = reserve(img, about.canvas_width, about.canvas_height);
    if (loss == FD_IMAGE_KEPT) {
      const size_t pixels = (size_t)img->w * (size_t)img->h;
      for (size_t i = 0; i < pixels; i++) memcpy(img->rgb + 3 * i, rgba + 4 * i, 3);
    }
  }
  WebPAnimDecoderDelete(decoder);
  return loss;
}

enum fd_image_loss fd_image_decode(const void *bytes, size_t n, int fast_side, fd_image *img) {
  static const uint8_t png_mark[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  const uint8_t *p = bytes;
  if (n >= 3 && p[0] == 0xff && p[1] == 0xd8 && p[2] == 0xff) return decode_jpeg(p, n, fast_side, img);
  if (n >= 8 && memcmp(p, png_mark, 8) == 0) return decode_png(p, n, img);
  if (n >= 12 && memcmp(p, "RIFF", 4) == 0 && memcmp(p + 8, "WEBP", 4) == 0) return decode_webp(p, n, img);
  return FD_IMAGE_UNKNOWN;
}

fd_status fd_image_read(const char *path, fd_image *img) {
  fd_status st = FD_OK;
  uint8_t *bytes = NULL;
  size_t n = 0;
  FILE *f = fopen(path, "rb");
  if (!f) return FD_FAIL(FD_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
  struct stat about;
  if (fstat(fileno(f), &about) != 0 || !S_ISREG(about.st_mode)) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: not a regular file", path));
  n = (size_t)about.st_size;
  bytes = malloc(n + 1);
  if (!bytes) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for %zu bytes", path, n));
  if (fread(bytes, 1, n, f) != n) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot read %zu bytes", path, n));
  const enum fd_image_loss loss = fd_image_decode(bytes, n, 0, img);
  if (loss) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s", path, fd_image_loss_text(loss)));
done:
  free(bytes);
  fclose(f);
  return st;
}

/* ---- encoders ---------------------------------------------------------------------------------------------------- */

struct sink {
  uint8_t *bytes;
  size_t n, capacity;
};

static void png_to_sink(png_structp png, png_bytep data, size_t n) {
  struct sink *sink = png_get_io_ptr(png);
  if (sink->n + n > sink->capacity) {
    const size_t capacity = (sink->n + n) * 2;
    uint8_t *more = realloc(sink->bytes, capacity);
    if (!more) png_error(png, "no memory");
    sink->bytes = more;
    sink->capacity = capacity;
  }
  memcpy(sink->bytes + sink->n, data, n);
  sink->n += n;
}
static void png_flush_nothing(png_structp png) { (void)png; }

fd_status fd_image_encode_png(const uint8_t *rgb, int w, int h, void **bytes, size_t *n) {
  struct sink sink = {0};
  png_infop info = NULL;
  volatile bool good = false;
  if (w < 1 || h < 1) return FD_FAIL(FD_ERR_ARG, "PNG of %d x %d pixels", w, h);
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, png_escape, png_silent);
  if (png) info = png_create_info_struct(png);
  if (png && info && !setjmp(png_jmpbuf(png))) {
    png_set_write_fn(png, &sink, png_to_sink, png_flush_nothing);
    png_set_IHDR(png, info, (png_uint_32)w, (png_uint_32)h, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                 PNG_FILTER_TYPE_DEFAULT);
    png_write_info(png, info);
    for (int y = 0; y < h; y++) png_write_row(png, (png_bytep)(uintptr_t)(rgb + (size_t)y * (size_t)w * 3));
    png_write_end(png, info);
    good = true;
  }
  png_destroy_write_struct(&png, &info);
  if (!good) {
    free(sink.bytes);
    return FD_FAIL(FD_ERR_NOMEM, "cannot encode a PNG of %d x %d pixels", w, h);
  }
  *bytes = sink.bytes;
  *n = sink.n;
  return FD_OK;
}

fd_status fd_image_encode_jpeg(const uint8_t *rgb, int w, int h, int quality, void **bytes, size_t *n) {
  struct jpeg_compress_struct info;
  struct jpeg_escape escape;
  unsigned char *data = NULL;
  unsigned long size = 0;
  if (w < 1 || h < 1 || w > FD_IMAGE_MAX_SIDE || h > FD_IMAGE_MAX_SIDE || quality < 1 || quality > 100)
    return FD_FAIL(FD_ERR_ARG, "JPEG of %d x %d pixels with quality %d", w, h, quality);
  info.err = jpeg_std_error(&escape.manager);
  escape.manager.error_exit = jpeg_escape_exit;
  escape.manager.output_message = jpeg_silent;
  if (setjmp(escape.jump)) {
    jpeg_destroy_compress(&info);
    free(data);
    return FD_FAIL(FD_ERR_NOMEM, "cannot encode a JPEG of %d x %d pixels", w, h);
  }
  jpeg_create_compress(&info);
  jpeg_mem_dest(&info, &data, &size);
  info.image_width = (JDIMENSION)w;
  info.image_height = (JDIMENSION)h;
  info.input_components = 3;
  info.in_color_space = JCS_RGB;
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, quality, TRUE);
  jpeg_start_compress(&info, TRUE);
  while (info.next_scanline < info.image_height) {
    JSAMPROW row = (JSAMPROW)(uintptr_t)(rgb + (size_t)info.next_scanline * (size_t)w * 3);
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  *bytes = data;
  *n = size;
  return FD_OK;
}

fd_status fd_image_write(const char *path, const uint8_t *rgb, int w, int h) {
  fd_status st = FD_OK;
  void *bytes = NULL;
  size_t n = 0;
  char *part = NULL;
  FILE *f = NULL;
  const char *dot = strrchr(path, '.');
  if (dot && strcasecmp(dot, ".png") == 0)
    FD_TRY(fd_image_encode_png(rgb, w, h, &bytes, &n));
  else if (dot && (strcasecmp(dot, ".jpg") == 0 || strcasecmp(dot, ".jpeg") == 0))
    FD_TRY(fd_image_encode_jpeg(rgb, w, h, 95, &bytes, &n));
  else
    FD_TRY(FD_FAIL(FD_ERR_ARG, "%s: pictures are written as .png, .jpg or .jpeg", path));
  if (asprintf(&part, "%s.part", path) < 0) {
    part = NULL;
    FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path));
  }
  f = fopen(part, "wb");
  if (!f) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot create: %s", part, strerror(errno)));
  const bool written = fwrite(bytes, 1, n, f) == n && fflush(f) == 0;
  const int why = errno;
  if (fclose(f) != 0 || !written) {
    f = NULL;
    unlink(part);
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot write %zu bytes: %s", part, n, strerror(why)));
  }
  f = NULL;
  if (rename(part, path) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot rename to %s: %s", part, path, strerror(errno)));
done:
  if (f) fclose(f);
  free(part);
  free(bytes);
  return st;
}

fd_status fd_image_sheet(const uint8_t *const *rgb, int n, int w, int h, int columns, int gap, fd_image *sheet) {
  fd_status st = FD_OK;
  if (n < 1 || w < 1 || h < 1 || gap < 0) return FD_FAIL(FD_ERR_ARG, "a sheet of %d pictures of %d x %d", n, w, h);
  if (columns < 1)
    for (columns = 1; columns * columns < n;) columns++;
  if (columns > n) columns = n;
  const int rows = (n + columns - 1) / columns;
  FD_TRY(fd_image_reserve(sheet, columns * (w + gap) + gap, rows * (h + gap) + gap));
  memset(sheet->rgb, 0xff, (size_t)sheet->w * (size_t)sheet->h * 3);
  for (int i = 0; i < n; i++) {
    const size_t x = (size_t)(gap + i % columns * (w + gap)), y = (size_t)(gap + i / columns * (h + gap));
    for (int line = 0; line < h; line++)
      memcpy(sheet->rgb + ((y + (size_t)line) * (size_t)sheet->w + x) * 3, rgb[i] + (size_t)line * (size_t)w * 3, (size_t)w * 3);
  }
done:
  return st;
}
