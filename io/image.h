// SPDX-License-Identifier: Apache-2.0
// Pictures: JPEG, PNG and WebP to bytes [h, w, 3] and back, resized bit for bit as Pillow does.
//
// Invariants: the kind is found by content, never by name. What a damaged file keeps follows Pillow with
// LOAD_TRUNCATED_IMAGES: a JPEG or PNG cut in its picture data is kept, its missing rows 0 in the file's colours (black; CMYK:
// white; palette: colour 0); one cut in its header and any cut WebP are lost (doc/formats.md has the rest). Alpha, orientation,
// ICC profiles and gamma are ignored. All functions are local and thread-safe.
#ifndef FD_IO_IMAGE_H
#define FD_IO_IMAGE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
  FD_IMAGE_SLACK = 64,                 /* readable bytes behind the last pixel, for vector loads */
  FD_IMAGE_MAX_PIXELS = 178956970,     /* more is refused, as Pillow does */
  FD_IMAGE_MAX_SIDE = 65500,           /* what JPEG can hold */
};

/** A picture that owns its memory; starts as {0} and may be used again and again (it only grows). */
typedef struct fd_image {
  int w, h;
  uint8_t *rgb; /* owned, [h, w, 3] + FD_IMAGE_SLACK bytes */
  size_t capacity;
} fd_image;

/** Why a picture is lost. */
enum fd_image_loss {
  FD_IMAGE_KEPT = 0,
  FD_IMAGE_UNKNOWN,   /* neither JPEG nor PNG nor WebP */
  FD_IMAGE_DAMAGED,   /* its header, a chunk of a PNG, or any of a WebP */
  FD_IMAGE_TOO_LARGE, /* above FD_IMAGE_MAX_PIXELS */
  FD_IMAGE_NOMEM,
};
const char *fd_image_loss_text(enum fd_image_loss loss);

void fd_image_free(fd_image *img);
/** Room for w x h pixels; sets w and h; contents undefined. FD_ERR_NOMEM, FD_ERR_ARG. */
fd_status fd_image_reserve(fd_image *img, int w, int h);

/** Decode the first picture in `bytes`. fast_side = 0: exactly. fast_side = R > 0: a JPEG may be decoded at n/8 of its
 *  size as long as its short side stays >= R (data.fast_jpeg). A lost picture leaves `img` with undefined contents. */
enum fd_image_loss fd_image_decode(const void *bytes, size_t n, int fast_side, fd_image *img);

/** Size of `img` after its short side became R: the long side is R * long / short rounded down. */
void fd_image_resized(int w, int h, int R, int *new_w, int *new_h);

/** Resize (bilinear with antialiasing, 8 bit after each axis, axes in the order of Pillow 13.0.0) so that the short side is R,
 *  and cut R x R out of it. crop NULL: the centre, offset (size - R) / 2 rounded half to even. Else crop[0], crop[1] in [0, 1)
 *  choose the column and row among all that are possible. `out` [R, R, 3]. Equals resizing all and then cropping.
 *  FD_ERR_ARG if R < 1 or the picture is empty; FD_ERR_NOMEM. */
fd_status fd_image_fit(const fd_image *img, int R, const float crop[2], uint8_t *out);

/** Resize to new_w x new_h by the same filter. `out` must not be `img`. */
fd_status fd_image_resize(const fd_image *img, int new_w, int new_h, fd_image *out);

/** A value of a VAE's picture as a byte: 255 clamp(x / 2 + 1/2, 0, 1), halves to even. */
static inline uint8_t fd_image_byte(float x) { return (uint8_t)nearbyintf(255.0f * fminf(1.0f, fmaxf(0.0f, x * 0.5f + 0.5f))); }

/** Read and decode a file. FD_ERR_IO, FD_ERR_FORMAT (with the reason). */
fd_status fd_image_read(const char *path, fd_image *img);

/** Encode into memory: *bytes is malloc'd, the caller frees it. quality 1..100. FD_ERR_NOMEM, FD_ERR_FORMAT. */
fd_status fd_image_encode_png(const uint8_t *rgb, int w, int h, void **bytes, size_t *n);
fd_status fd_image_encode_jpeg(const uint8_t *rgb, int w, int h, int quality, void **bytes, size_t *n);

/** Write a file; its kind by the extension: .png, .jpg, .jpeg (quality 95). Complete or not there. FD_ERR_IO,
 *  FD_ERR_ARG for another extension. */
fd_status fd_image_write(const char *path, const uint8_t *rgb, int w, int h);

/** Contact sheet: n pictures of one size, row by row with `columns` in a row (0: about as many as rows), a white gap of
 *  `gap` pixels between and around. `sheet` is overwritten. */
fd_status fd_image_sheet(const uint8_t *const *rgb, int n, int w, int h, int columns, int gap, fd_image *sheet);

#endif
