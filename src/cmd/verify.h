// SPDX-License-Identifier: Apache-2.0
// `fdhpc verify`: golden records against this program. One row per kind of record in verify.c; a kind is one function in
// src/cmd/verify_<kind>.c that computes and calls fd_verify_compare for each record. doc/formats.md describes the folders.
#ifndef FD_CMD_VERIFY_H
#define FD_CMD_VERIFY_H

#include <jansson.h>

#include "io/h5.h"
#include "op/ctx.h"

/** One case while it runs. A kind reads from it and reports into it; it owns nothing of it. */
struct fd_verify {
  const char *dir;      /* folder of the case */
  const char *kind, *name;
  json_t *info;         /* case.json */
  json_t *config;       /* config.json; NULL if there is none */
  hid_t io;             /* io.h5; -1 if there is none */
  fd_dtype dtype;       /* F32, or BF16: the run's type of weights and activations */
  double tol_output;    /* tolerance.output */
  double tol_grad;      /* tolerance.grad; 0 if there is none */
  fd_ctx *ctx;          /* one rank, CPU backend unless asked otherwise; NULL before fd_verify_ctx */
  const struct fd_verify_options *options;
  struct fd_verify_results *results;
};

struct fd_verify_options {
  fd_dtype dtype;
  const char *backend; /* NULL: cpu */
  int n_threads;       /* 0: all cores of this process */
  bool verbose;        /* a line per record, not only the worst of a case */
};

typedef fd_status fd_verify_fn(struct fd_verify *v);
struct fd_verify_kind {
  const char *kind;
  fd_verify_fn *run;
};

/** Kinds, one function per src/cmd/verify_<kind>.c; the table is in verify.c. */
#define X(kind) fd_verify_fn fd_verify_##kind;
#include "cmd/verify.def"
#undef X

/** Run all cases at or below the given paths and print the table. FD_ERR_FAILED if one fails, or if there is none. Local. */
fd_status fd_verify_run(int n, const char *const *paths, const struct fd_verify_options *options);

/* ---- for kinds ----------------------------------------------------------------------------------------------------- */

/** The context to compute with; opened on first use, closed after the case. */
fd_status fd_verify_ctx(struct fd_verify *v, fd_ctx **out);

/** case.json's tolerance.<name>; `otherwise` if absent. */
double fd_verify_tolerance(const struct fd_verify *v, const char *name, double otherwise);

/** "dir/file" in a buffer that the next call overwrites. */
const char *fd_verify_path(const struct fd_verify *v, const char *file);

/** An array of io.h5 ("input/latents"), as the type asked for. */
fd_status fd_verify_read(struct fd_verify *v, const char *name, fd_dtype as, struct fd_h5_array *out);

/** Compare x, n elements in the record's own order, with array `record` of io.h5 ("output/sample", "grad/param/..."):
 *  pass if max|x - ref| <= tolerance * max(max|ref|, 1e-6); bf16: output/... within 16 * 2^-8 * max|ref|, gradients are listed but not
 *  judged. tolerance < 0: tolerance.output or tolerance.grad by the record's name. NaN never passes.
 *  rows_where: NULL, or one int64 per row (n_rows of them): only rows where it is not 0 are looked at, for max|ref| too.
 *  A difference is a reported result, not a failing status; a wrong size or a missing record is FD_ERR_FORMAT. */
fd_status fd_verify_compare(struct fd_verify *v, const char *record, const float *x, int64_t n, double tolerance,
                            const int64_t *rows_where, int64_t n_rows);

/** The same against values that the kind has itself. */
void fd_verify_compare_with(struct fd_verify *v, const char *record, const float *x, const float *ref, int64_t n, double tolerance,
                            const int64_t *rows_where, int64_t n_rows);

/** Anything else: a result with a text that is shown if it fails (what was found, what was expected). */
void fd_verify_report(struct fd_verify *v, const char *record, double error, double tolerance, bool pass, const char *format, ...)
    __attribute__((format(printf, 6, 7)));

#endif
