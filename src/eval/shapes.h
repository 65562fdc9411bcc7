// SPDX-License-Identifier: Apache-2.0
// The demo's world: one coloured shape on a plain background, and the sentence that says so. Used by `fdhpc demo`, which
// draws training pictures, and by tests/judge.c, which measures pictures against their sentence.
#ifndef FD_EVAL_SHAPES_H
#define FD_EVAL_SHAPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FD_SHAPES_COLOURS = 8, FD_SHAPES_SHAPES = 6, FD_SHAPES_SIZES = 2, FD_SHAPES_PLACES = 5 };

/** What a sentence says; indices into the word lists. */
struct fd_shape_words {
  int colour, background, shape, size, place;
};

/** Where the object is drawn exactly; lengths in units of the picture's side. */
struct fd_shape_pose {
  double x, y, radius, rotation; /* rotation in radians */
};

extern const char *const fd_shapes_colour[FD_SHAPES_COLOURS];
extern const unsigned char fd_shapes_rgb[FD_SHAPES_COLOURS][3];
extern const char *const fd_shapes_shape[FD_SHAPES_SHAPES];
extern const char *const fd_shapes_size[FD_SHAPES_SIZES];
extern const double fd_shapes_radius[FD_SHAPES_SIZES];
extern const char *const fd_shapes_place[FD_SHAPES_PLACES];
extern const double fd_shapes_centre[FD_SHAPES_PLACES][2];

/** Pairs that no training picture shows: (colour + shape) mod 8 == 7. They test whether a model composes what it knows. */
bool fd_shapes_held_out(int colour, int shape);

/** Words and pose of sample i under a seed. held_out: words only from the held-out pairs, else only from the others. */
void fd_shapes_draw_words(uint64_t seed, uint64_t i, bool held_out, struct fd_shape_words *w);
void fd_shapes_draw_pose(uint64_t seed, uint64_t i, const struct fd_shape_words *w, struct fd_shape_pose *pose);

/** "a small red circle on a blue background, left" */
void fd_shapes_sentence(const struct fd_shape_words *w, char *out, size_t bytes);
/** The inverse. false if it is no such sentence. */
bool fd_shapes_parse(const char *sentence, struct fd_shape_words *w);

/** Share of each pixel that the shape covers (edges over one pixel): out [side, side] in 0..1. */
void fd_shapes_coverage(int shape, const struct fd_shape_pose *pose, int side, float *out);

/** Picture of sample i: rgb [side, side, 3]. Background shaded by up to 7 % across, noise of standard deviation 2. */
void fd_shapes_render(uint64_t seed, uint64_t i, const struct fd_shape_words *w, const struct fd_shape_pose *pose, int side,
                      unsigned char *rgb);

#endif
