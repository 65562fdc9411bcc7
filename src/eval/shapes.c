// SPDX-License-Identifier: Apache-2.0
// The demo's pictures. Every number of sample i comes from (seed, i) alone, so that any rank may draw any sample.
#include "eval/shapes.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/rng.h"

const char *const fd_shapes_colour[] = {"red", "green", "blue", "yellow", "purple", "orange", "white", "black"};
const unsigned char fd_shapes_rgb[][3] = {{220, 40, 40},  {40, 170, 70},  {50, 90, 220},   {240, 210, 50},
                                          {150, 60, 190}, {240, 140, 40}, {240, 240, 240}, {25, 25, 25}};
const char *const fd_shapes_shape[] = {"circle", "square", "triangle", "star", "ring", "cross"};
const char *const fd_shapes_size[] = {"small", "large"};
const double fd_shapes_radius[] = {0.18, 0.34};
const char *const fd_shapes_place[] = {"left", "right", "top", "bottom", "center"};
const double fd_shapes_centre[][2] = {{.3, .5}, {.7, .5}, {.5, .3}, {.5, .7}, {.5, .5}};

enum { CIRCLE, SQUARE, TRIANGLE, STAR, RING, CROSS };

/* Streams of one sample. Words use elements 0.. of DRAW, poses of POSE, so that adding to one does not move the other. */
enum { STREAM_WORDS = 0, STREAM_POSE = 1, STREAM_NOISE = 2 };

static double uniform(uint64_t seed, uint64_t sample, int stream, uint32_t i) {
  return fd_rng_uniform(seed, FD_RNG_SYNTHETIC + ((uint32_t)stream << 16), sample, i);
}

bool fd_shapes_held_out(int colour, int shape) { return (colour + shape) % 8 == 7; }

void fd_shapes_draw_words(uint64_t seed, uint64_t i, bool held_out, struct fd_shape_words *w) {
  uint32_t k = 0;
#define PICK(n) (int)(uniform(seed, i, STREAM_WORDS, k++) * (n))
  do {
    w->colour = PICK(FD_SHAPES_COLOURS);
    w->shape = PICK(FD_SHAPES_SHAPES);
  } while (fd_shapes_held_out(w->colour, w->shape) != held_out);
  w->background = PICK(FD_SHAPES_COLOURS - 1);
  if (w->background >= w->colour) w->background++;
  w->size = PICK(FD_SHAPES_SIZES);
  w->place = PICK(FD_SHAPES_PLACES);
#undef PICK
}

void fd_shapes_draw_pose(uint64_t seed, uint64_t i, const struct fd_shape_words *w, struct fd_shape_pose *pose) {
#define BETWEEN(k, a, b) ((a) + ((b) - (a)) * uniform(seed, i, STREAM_POSE, k))
  pose->x = fd_shapes_centre[w->place][0] + BETWEEN(0, -0.04, 0.04);
  pose->y = fd_shapes_centre[w->place][1] + BETWEEN(1, -0.04, 0.04);
  pose->radius = fd_shapes_radius[w->size] * BETWEEN(2, 0.9, 1.1);
  pose->rotation = BETWEEN(3, -0.15, 0.15);
#undef BETWEEN
}

void fd_shapes_sentence(const struct fd_shape_words *w, char *out, size_t bytes) {
  snprintf(out, bytes, "a %s %s %s on a %s background, %s", fd_shapes_size[w->size], fd_shapes_colour[w->colour],
           fd_shapes_shape[w->shape], fd_shapes_colour[w->background], fd_shapes_place[w->place]);
}

static int word_index(const char *const *list, int n, const char *word) {
  for (int i = 0; i < n; i++)
    if (strcmp(list[i], word) == 0) return i;
  return -1;
}

bool fd_shapes_parse(const char *sentence, struct fd_shape_words *w) {
  char size[16], colour[16], shape[16], background[16], place[16];
  int end = 0;
  if (sscanf(sentence, "a %15s %15s %15s on a %15s background, %15s%n", size, colour, shape, background, place, &end) != 5 ||
      sentence[end])
    return false;
  *w = (struct fd_shape_words){.colour = word_index(fd_shapes_colour, FD_SHAPES_COLOURS, colour),
                               .background = word_index(fd_shapes_colour, FD_SHAPES_COLOURS, background),
                               .shape = word_index(fd_shapes_shape, FD_SHAPES_SHAPES, shape),
                               .size = word_index(fd_shapes_size, FD_SHAPES_SIZES, size),
                               .place = word_index(fd_shapes_place, FD_SHAPES_PLACES, place)};
  return w->colour >= 0 && w->background >= 0 && w->shape >= 0 && w->size >= 0 && w->place >= 0;
}

/* Signed distance to a closed polygon, negative inside (crossing rule). */
static double polygon_distance(const double (*v)[2], int n, double x, double y) {
  double best = 1e30;
  bool inside = false;
  for (int i = 0, j = n - 1; i < n; j = i++) {
    double ex = v[j][0] - v[i][0], ey = v[j][1] - v[i][1], wx = x - v[i][0], wy = y - v[i][1];
    double t = fmin(1, fmax(0, (wx * ex + wy * ey) / (ex * ex + ey * ey)));
    double dx = wx - ex * t, dy = wy - ey * t;
    best = fmin(best, dx * dx + dy * dy);
    if ((v[i][1] > y) != (v[j][1] > y) && x < (v[j][0] - v[i][0]) * (y - v[i][1]) / (v[j][1] - v[i][1]) + v[i][0])
      inside = !inside;
  }
  return inside ? -sqrt(best) : sqrt(best);
}

/* Corners of the polygons at radius 1, y downwards, a corner up. */
static int polygon(int shape, double v[12][2]) {
  if (shape == CROSS) {
    static const double third = 1.0 / 3;
    const double c[12][2] = {{-third, -1}, {third, -1}, {third, -third}, {1, -third}, {1, third},   {third, third},
                             {third, 1},   {-third, 1}, {-third, third}, {-1, third}, {-1, -third}, {-third, -third}};
    memcpy(v, c, sizeof c);
    return 12;
  }
  if (shape == SQUARE) {
    const double c[4][2] = {{-.85, -.85}, {.85, -.85}, {.85, .85}, {-.85, .85}};
    memcpy(v, c, sizeof c);
    return 4;
  }
  int n = shape == STAR ? 10 : 3;
  for (int i = 0; i < n; i++) {
    double r = shape == STAR && i % 2 ? 0.42 : 1, a = -M_PI / 2 + 2 * M_PI * i / n;
    v[i][0] = r * cos(a);
    v[i][1] = r * sin(a);
  }
  return n;
}

void fd_shapes_coverage(int shape, const struct fd_shape_pose *pose, int side, float *out) {
  double v[12][2], c = cos(pose->rotation), s = sin(pose->rotation), r = pose->radius * side;
  int n = shape == CIRCLE || shape == RING ? 0 : polygon(shape, v);
  for (int py = 0; py < side; py++)
    for (int px = 0; px < side; px++) {
      double dx = (px + 0.5 - pose->x * side) / r, dy = (py + 0.5 - pose->y * side) / r;
      double x = c * dx + s * dy, y = -s * dx + c * dy, length = sqrt(x * x + y * y);
      double d = shape == CIRCLE ? length - 1 : shape == RING ? fabs(length - 0.75) - 0.25 : polygon_distance(v, n, x, y);
      out[py * side + px] = (float)fmin(1, fmax(0, 0.5 - d * r));
    }
}

void fd_shapes_render(uint64_t seed, uint64_t i, const struct fd_shape_words *w, const struct fd_shape_pose *pose, int side,
                      unsigned char *rgb) {
  float cover[side * side];
  fd_shapes_coverage(w->shape, pose, side, cover);
  double angle = 2 * M_PI * uniform(seed, i, STREAM_POSE, 4), shade = 0.14 * uniform(seed, i, STREAM_POSE, 5) - 0.07;
  double ax = cos(angle) * shade, ay = sin(angle) * shade;
  uint32_t block = 0;
  float z[4];
  for (int p = 0, at = 0; p < side * side; p++) {
    double light = 1 + 2 * (ax * ((p % side + 0.5) / side - 0.5) + ay * ((p / side + 0.5) / side - 0.5));
    for (int k = 0; k < 3; k++, at++) {
      if (at % 4 == 0) fd_rng_normal4(seed, FD_RNG_SYNTHETIC + ((uint32_t)STREAM_NOISE << 16), i, block++, z);
      double value = cover[p] * fd_shapes_rgb[w->colour][k] + (1 - cover[p]) * fd_shapes_rgb[w->background][k] * light + 2 * z[at % 4];
      rgb[at] = (unsigned char)fmin(255, fmax(0, rint(value)));
    }
  }
}
