// SPDX-License-Identifier: Apache-2.0
// judge PICTURES PROMPTS.json [--min background=90,colour=60,...]: measures the pictures of the demo against their prompts, without any
// model, and prints the share (%) that has the right background, colour, place, size and shape; for prompts of trained
// pairs and of held-out pairs (eval/shapes.h) apart. Picture i of the list is PICTURES/%05d.png. Exit 1 below a minimum.
//
// How: the background is the median of the border; the object is what differs from it; its colour the median of that;
// size, shape and place are those of the template (6 shapes, 2 sizes x 3 radii, 3 rotations, moved over the object)
// that overlaps best.
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "eval/shapes.h"
#include "io/image.h"

enum { BACKGROUND, COLOUR, PLACE, SIZE, SHAPE, N_FIGURES };
static const char *const figure_name[N_FIGURES] = {"background", "colour", "place", "size", "shape"};

enum { SIDE = 64, PIXELS = SIDE * SIDE, N_RADII = 6, N_ROTATIONS = 3, N_TEMPLATES = FD_SHAPES_SHAPES * N_RADII * N_ROTATIONS };

/* A template drawn with its centre in the middle of a canvas of twice the side, so that it can be moved without clipping. */
struct template {
  int shape, size;
  float cover[4 * PIXELS];
};

static struct template *make_templates(void) {
  static const double scale[3] = {0.92, 1.0, 1.08}, rotation[N_ROTATIONS] = {-0.1, 0, 0.1};
  struct template *t = calloc(N_TEMPLATES, sizeof *t);
  if (!t) exit(7);
  int n = 0;
  for (int shape = 0; shape < FD_SHAPES_SHAPES; shape++)
    for (int radius = 0; radius < N_RADII; radius++)
      for (int r = 0; r < N_ROTATIONS; r++, n++) {
        t[n].shape = shape;
        t[n].size = radius / 3;
        struct fd_shape_pose pose = {0.5, 0.5, 0.5 * fd_shapes_radius[radius / 3] * scale[radius % 3], rotation[r]};
        fd_shapes_coverage(shape, &pose, 2 * SIDE, t[n].cover);
      }
  return t;
}

static int by_byte(const void *a, const void *b) { return *(const unsigned char *)a - *(const unsigned char *)b; }

/* Median colour of the pixels chosen by `in`; false if there are none. */
static bool median(const unsigned char *rgb, const bool *in, double out[3]) {
  static unsigned char values[PIXELS];
  for (int k = 0; k < 3; k++) {
    size_t n = 0;
    for (int p = 0; p < PIXELS; p++)
      if (in[p]) values[n++] = rgb[3 * p + k];
    if (n == 0) return false;
    qsort(values, n, 1, by_byte);
    out[k] = values[n / 2];
  }
  return true;
}

static double distance(const double a[3], const double b[3]) {
  return sqrt((a[0] - b[0]) * (a[0] - b[0]) + (a[1] - b[1]) * (a[1] - b[1]) + (a[2] - b[2]) * (a[2] - b[2]));
}

/* The named colour nearest to c, in direction and lightness; `not` is passed over. */
static int nearest_colour(const double c[3], int not) {
  int best = -1;
  double best_distance = 1e30;
  for (int i = 0; i < FD_SHAPES_COLOURS; i++) {
    const double named[3] = {fd_shapes_rgb[i][0], fd_shapes_rgb[i][1], fd_shapes_rgb[i][2]};
    double d = distance(c, named);
    if (i != not && d < best_distance) best_distance = d, best = i;
  }
  return best;
}

static double overlap(const struct template *t, const float *mask, double mask_sum, int cx, int cy) {
  double both = 0, mine = 0;
  for (int y = 0; y < SIDE; y++)
    for (int x = 0; x < SIDE; x++) {
      /* template pixel whose canvas centre (SIDE, SIDE) lies at (cx, cy) */
      double c = t->cover[(y - cy + SIDE) * 2 * SIDE + (x - cx + SIDE)];
      both += fmin(c, mask[y * SIDE + x]);
      mine += c;
    }
  return both / (mine + mask_sum - both + 1e-9);
}

/* What the picture shows. false where no object was found (only the background is set then). */
static bool measure(const struct template *templates, const unsigned char *rgb, struct fd_shape_words *w) {
  static bool in[PIXELS];
  static float mask[PIXELS];
  double ground[3], object[3], pixel[3], sum = 0, mx = 0, my = 0;
  for (int p = 0; p < PIXELS; p++) {
    int x = p % SIDE, y = p / SIDE;
    in[p] = x < 2 || y < 2 || x >= SIDE - 2 || y >= SIDE - 2;
  }
  median(rgb, in, ground);
  *w = (struct fd_shape_words){-1, nearest_colour(ground, -1), -1, -1, -1};
  /* first the pixels that are clearly something else, then all that lie nearer to their colour than to the ground's */
  for (int p = 0; p < PIXELS; p++) {
    for (int k = 0; k < 3; k++) pixel[k] = rgb[3 * p + k];
    in[p] = distance(pixel, ground) > 55;
    sum += in[p];
  }
  if (sum < 0.01 * PIXELS || !median(rgb, in, object)) return false;
  w->colour = nearest_colour(object, w->background);
  double length = distance(object, ground);
  sum = 0;
  for (int p = 0; p < PIXELS; p++) {
    double along = 0;
    for (int k = 0; k < 3; k++) along += (rgb[3 * p + k] - ground[k]) * (object[k] - ground[k]);
    mask[p] = (float)fmin(1, fmax(0, along / (length * length)));
    if (mask[p] < 0.25f) mask[p] = 0; /* shading and noise of the background */
    sum += mask[p];
    mx += mask[p] * (p % SIDE + 0.5);
    my += mask[p] * (p / SIDE + 0.5);
  }
  if (sum < 1) return false;
  mx /= sum;
  my /= sum;
  double best = -1, best_x = 0, best_y = 0;
  for (int t = 0; t < N_TEMPLATES; t++) {
    /* climb from the mask's centre of mass; a clipped or lopsided shape moves away from it by a few pixels */
    int cx = (int)mx, cy = (int)my;
    double here = overlap(&templates[t], mask, sum, cx, cy);
    for (int step = 4; step >= 1;) {
      static const int way[4][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}};
      int to = -1;
      for (int k = 0; k < 4; k++) {
        int nx = cx + step * way[k][0], ny = cy + step * way[k][1];
        if (nx < 0 || ny < 0 || nx >= SIDE || ny >= SIDE) continue;
        double there = overlap(&templates[t], mask, sum, nx, ny);
        if (there > here) here = there, to = k;
      }
      if (to < 0)
        step /= 2;
      else
        cx += step * way[to][0], cy += step * way[to][1];
    }
    if (here > best) best = here, best_x = cx, best_y = cy, w->shape = templates[t].shape, w->size = templates[t].size;
  }
  double nearest = 1e30;
  for (int i = 0; i < FD_SHAPES_PLACES; i++) {
    double d = hypot(best_x / SIDE - fd_shapes_centre[i][0], best_y / SIDE - fd_shapes_centre[i][1]);
    if (d < nearest) nearest = d, w->place = i;
  }
  return true;
}

static int usage(const char *problem, const char *what) {
  fprintf(stderr, "judge: %s%s\nusage: judge PICTURES PROMPTS.json [--min background=90,colour=60,place=90]\n", problem, what);
  return 2;
}

int main(int argc, char **argv) {
  double min[N_FIGURES] = {0};
  if (argc != 3 && argc != 5) return usage("two arguments are needed", "");
  if (argc == 5) {
    if (strcmp(argv[3], "--min")) return usage("unknown option ", argv[3]);
    for (char *save, *item = strtok_r(argv[4], ",", &save); item; item = strtok_r(NULL, ",", &save)) {
      int f = 0;
      char *is = strchr(item, '=');
      while (is && f < N_FIGURES && strncmp(item, figure_name[f], (size_t)(is - item))) f++;
      if (!is || f == N_FIGURES) return usage("no such figure: ", item);
      min[f] = atof(is + 1);
    }
  }
  json_error_t error;
  json_t *prompts = json_load_file(argv[2], 0, &error);
  if (!json_is_array(prompts) || json_array_size(prompts) == 0) {
    fprintf(stderr, "judge: %s: no list of prompts: %s\n", argv[2], error.text);
    return 4;
  }
  struct template *templates = make_templates();
  int right[2][N_FIGURES] = {{0}}, count[2] = {0};
  for (size_t i = 0; i < json_array_size(prompts); i++) {
    const char *sentence = json_string_value(json_array_get(prompts, i));
    struct fd_shape_words want, got;
    if (!sentence || !fd_shapes_parse(sentence, &want)) {
      fprintf(stderr, "judge: %s: prompt %zu is no sentence of the demo: %s\n", argv[2], i, sentence ? sentence : "(no text)");
      return 4;
    }
    char path[4096];
    snprintf(path, sizeof path, "%s/%05zu.png", argv[1], i);
    struct fd_image image = {0};
    if (fd_image_read(path, &image) != FD_OK) {
      fprintf(stderr, "judge: %s\n", fd_status_message());
      return 3;
    }
    if (image.w != SIDE || image.h != SIDE) {
      fprintf(stderr, "judge: %s: %d x %d pixels, expected %d x %d\n", path, image.w, image.h, SIDE, SIDE);
      return 4;
    }
    measure(templates, image.rgb, &got);
    fd_image_free(&image);
    int kind = fd_shapes_held_out(want.colour, want.shape);
    count[kind]++;
    right[kind][BACKGROUND] += got.background == want.background;
    right[kind][COLOUR] += got.colour == want.colour;
    right[kind][PLACE] += got.place == want.place;
    right[kind][SIZE] += got.size == want.size;
    right[kind][SHAPE] += got.shape == want.shape;
  }
  int below = 0, all = count[0] + count[1];
  printf("%-22s %8s", "right (%)", "pictures");
  for (int f = 0; f < N_FIGURES; f++) printf(" %10s", figure_name[f]);
  printf("\n");
  for (int kind = 0; kind < 2; kind++) {
    if (!count[kind]) continue;
    printf("%-22s %8d", kind ? "held-out pairs" : "trained pairs", count[kind]);
    for (int f = 0; f < N_FIGURES; f++) printf(" %10.1f", 100.0 * right[kind][f] / count[kind]);
    printf("\n");
  }
  printf("%-22s %8d", "all", all);
  for (int f = 0; f < N_FIGURES; f++) printf(" %10.1f", 100.0 * (right[0][f] + right[1][f]) / all);
  printf("\n");
  for (int f = 0; f < N_FIGURES; f++) {
    double share = 100.0 * (right[0][f] + right[1][f]) / all;
    if (share < min[f]) {
      printf("%s is %.1f %%, below the minimum of %g %%\n", figure_name[f], share, min[f]);
      below = 1;
    }
  }
  free(templates);
  json_decref(prompts);
  return below;
}
