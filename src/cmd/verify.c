// SPDX-License-Identifier: Apache-2.0
// `fdhpc verify DIR...`: finds cases, runs their kinds, prints the table. Invariant: what is not compared is never called passed.
#include "cmd/verify.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "cmd/cmd.h"
#include "graph/backend.h"

static const struct fd_verify_kind kinds[] = {
#define X(kind) {#kind, fd_verify_##kind},
#include "cmd/verify.def"
#undef X
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

struct result {
  char record[128];
  double error, tolerance;
  bool pass, judged;
  char text[400];
};

struct fd_verify_results {
  struct result *at;
  int n, capacity;
  bool failed_to_keep;
  /* over all cases */
  int cases, passed, not_built;
};

/* ---- for kinds ------------------------------------------------------------------------------------------------------- */

fd_status fd_verify_ctx(struct fd_verify *v, fd_ctx **out) {
  fd_status st = FD_OK;
  const struct fd_backend *backend;
  if (!v->ctx) {
    FD_TRY(fd_backend_find(v->options->backend ? v->options->backend : "cpu", &backend));
    FD_TRY(fd_ctx_create(backend, v->options->n_threads, NULL, &v->ctx));
  }
  *out = v->ctx;
done:
  return st;
}

double fd_verify_tolerance(const struct fd_verify *v, const char *name, double otherwise) {
  const json_t *t = json_object_get(json_object_get(v->info, "tolerance"), name);
  return json_is_number(t) ? json_number_value(t) : otherwise;
}

const char *fd_verify_path(const struct fd_verify *v, const char *file) {
  static char path[4096];
  snprintf(path, sizeof path, "%s/%s", v->dir, file);
  return path;
}

fd_status fd_verify_read(struct fd_verify *v, const char *name, fd_dtype as, struct fd_h5_array *out) {
  if (v->io < 0) return FD_FAIL(FD_ERR_FORMAT, "%s: has no io.h5", v->dir);
  return fd_h5_read(v->io, name, as, out);
}

static struct result *add_result(struct fd_verify *v, const char *record) {
  struct fd_verify_results *r = v->results;
  if (r->n == r->capacity) {
    int more = r->capacity ? 2 * r->capacity : 64;
    struct result *grown = realloc(r->at, (size_t)more * sizeof *grown);
    if (!grown) {
      r->failed_to_keep = true;
      return NULL;
    }
    r->at = grown;
    r->capacity = more;
  }
  struct result *e = &r->at[r->n++];
  *e = (struct result){.judged = true};
  snprintf(e->record, sizeof e->record, "%s", record);
  return e;
}

void fd_verify_report(struct fd_verify *v, const char *record, double error, double tolerance, bool pass, const char *format, ...) {
  struct result *e = add_result(v, record);
  if (!e) return;
  va_list args;
  va_start(args, format);
  vsnprintf(e->text, sizeof e->text, format, args);
  va_end(args);
  e->error = error;
  e->tolerance = tolerance;
  e->pass = pass;
}

void fd_verify_compare_with(struct fd_verify *v, const char *record, const float *x, const float *ref, int64_t n, double tolerance,
                            const int64_t *rows_where, int64_t n_rows) {
  struct result *e = add_result(v, record);
  if (!e) return;
  const bool gradient = strncmp(record, "grad/", 5) == 0;
  if (tolerance < 0) tolerance = gradient ? v->tol_grad : v->tol_output;
  const int64_t cols = rows_where ? n / n_rows : n;
  double worst = 0, largest = 0;
  int64_t at = -1, looked = 0;
  for (int64_t i = 0; i < n; i++) {
    if (rows_where && !rows_where[i / cols]) continue;
    const double d = fabs((double)x[i] - ref[i]);
    looked++;
    if (fabs(ref[i]) > largest) largest = fabs(ref[i]);
    if (!(d <= worst)) { /* NaN too */
      worst = isnan(d) ? INFINITY : d;
      at = i;
    }
  }
  const double scale = largest > 1e-6 ? largest : 1e-6;
  e->error = worst / scale;
  e->tolerance = tolerance;
  if (v->dtype == FD_BF16) {
    e->judged = !gradient; /* the records set no bound for gradients in bf16 */
    e->tolerance = 16.0 / 256;
  }
  e->pass = e->error <= e->tolerance;
  if (!looked) e->judged = false; /* an empty record, or text of which no row counts */
  if (!e->pass && at >= 0)
    snprintf(e->text, sizeof e->text, "element %lld is %.9g, recorded %.9g; largest recorded %.4g", (long long)at, (double)x[at],
             (double)ref[at], largest);
}

fd_status fd_verify_compare(struct fd_verify *v, const char *record, const float *x, int64_t n, double tolerance,
                            const int64_t *rows_where, int64_t n_rows) {
  fd_status st = FD_OK;
  struct fd_h5_array ref = {0};
  FD_TRY(fd_verify_read(v, record, FD_F32, &ref));
  if (ref.numel != n || (rows_where && (n_rows < 1 || n % n_rows)))
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s has %lld elements, %lld were computed", v->dir, record, (long long)ref.numel, (long long)n));
  fd_verify_compare_with(v, record, x, ref.data, n, tolerance, rows_where, n_rows);
done:
  fd_h5_array_free(&ref);
  return st;
}

/* ---- cases ----------------------------------------------------------------------------------------------------------- */

static double ratio(const struct result *e) {
  if (e->pass && e->error == 0) return 0;
  return e->tolerance > 0 ? e->error / e->tolerance : INFINITY;
}

static void print_row(const char *name, int records, const char *record, double error, double tolerance, const char *verdict) {
  char count[16] = "", err[16] = "", tol[16] = "";
  if (records >= 0) snprintf(count, sizeof count, "%d", records);
  if (error >= 0) snprintf(err, sizeof err, "%.2e", error);
  if (tolerance >= 0) snprintf(tol, sizeof tol, "%.1e", tolerance);
  printf("%-36s %7s  %-46s %9s %9s  %s\n", name, count, record, err, tol, verdict);
}

/* One line for the case, with its worst record; one for each record that failed. */
static bool print_case(const struct fd_verify *v, const char *label) {
  const struct fd_verify_results *r = v->results;
  const struct result *worst = NULL;
  bool pass = r->n > 0 && !r->failed_to_keep;
  int judged = 0;
  for (int i = 0; i < r->n; i++) {
    const struct result *e = &r->at[i];
    if (v->options->verbose) print_row(label, -1, e->record, e->error, e->tolerance, !e->judged ? "not judged" : e->pass ? "ok" : "FAILED");
    if (!e->judged) continue;
    judged++;
    if (!e->pass) pass = false;
    if (!worst || (worst->pass && !e->pass) || (worst->pass == e->pass && ratio(e) > ratio(worst))) worst = e;
  }
  if (!judged) pass = false;
  print_row(label, judged, worst ? worst->record : "", worst ? worst->error : -1, worst ? worst->tolerance : -1,
            pass ? "ok" : judged ? "FAILED" : "FAILED: nothing was compared");
  for (int i = 0, shown = 0; i < r->n; i++) {
    const struct result *e = &r->at[i];
    if (!e->judged || e->pass) continue;
    if (++shown > 20) {
      printf("    ...\n");
      break;
    }
    printf("    %s: error %.3e, tolerance %.1e: %s\n", e->record, e->error, e->tolerance, e->text);
  }
  return pass;
}

static fd_status load_case(struct fd_verify *v) {
  fd_status st = FD_OK;
  json_error_t error;
  v->info = json_load_file(fd_verify_path(v, "case.json"), 0, &error);
  if (!v->info) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/case.json:%d: %s", v->dir, error.line, error.text));
  v->kind = json_string_value(json_object_get(v->info, "kind"));
  v->name = json_string_value(json_object_get(v->info, "case"));
  if (!v->kind) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/case.json: names no kind", v->dir));
  if (!v->name) v->name = "";
  v->tol_output = fd_verify_tolerance(v, "output", 0);
  v->tol_grad = fd_verify_tolerance(v, "grad", 0);
  struct stat info;
  if (stat(fd_verify_path(v, "config.json"), &info) == 0) {
    v->config = json_load_file(fd_verify_path(v, "config.json"), 0, &error);
    if (!v->config) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s/config.json:%d: %s", v->dir, error.line, error.text));
  }
  if (stat(fd_verify_path(v, "io.h5"), &info) == 0) FD_TRY(fd_h5_open_read(fd_verify_path(v, "io.h5"), &v->io));
done:
  return st;
}

static void run_case(const char *dir, bool asked_for, const struct fd_verify_options *options, struct fd_verify_results *results) {
  fd_status st = FD_OK;
  char label[256];
  struct fd_verify v = {.dir = dir, .io = -1, .dtype = options->dtype, .options = options, .results = results};
  results->n = 0;
  results->failed_to_keep = false;
  results->cases++;
  snprintf(label, sizeof label, "%s", dir);
  FD_TRY(load_case(&v));
  snprintf(label, sizeof label, "%s/%s", v.kind, v.name);
  st = FD_FAIL(FD_ERR_UNSUPPORTED, "kind %s is not built", v.kind);
  for (int i = 0; i < N_KINDS; i++)
    if (strcmp(kinds[i].kind, v.kind) == 0) st = kinds[i].run(&v);
  if (st == FD_OK) results->passed += print_case(&v, label);
done:
  if (st == FD_ERR_UNSUPPORTED && !asked_for) {
    results->not_built++;
    print_row(label, -1, "", -1, -1, "not built");
    printf("    %s\n", fd_status_message());
  } else if (st != FD_OK) {
    print_row(label, -1, "", -1, -1, "FAILED");
    printf("    %s\n", fd_status_message());
  }
  fflush(stdout);
  fd_ctx_destroy(&v.ctx);
  fd_h5_close(&v.io);
  json_decref(v.config);
  json_decref(v.info);
}

static int no_dots(const struct dirent *e) { return e->d_name[0] != '.'; }

static fd_status walk(const char *dir, bool asked_for, const struct fd_verify_options *options, struct fd_verify_results *results) {
  char path[4096];
  struct stat info;
  snprintf(path, sizeof path, "%s/case.json", dir);
  if (stat(path, &info) == 0) {
    run_case(dir, asked_for, options, results);
    return FD_OK;
  }
  struct dirent **list;
  int n = scandir(dir, &list, no_dots, alphasort);
  if (n < 0) return FD_FAIL(FD_ERR_IO, "%s: %s", dir, strerror(errno));
  fd_status st = FD_OK;
  for (int i = 0; i < n; i++) {
    snprintf(path, sizeof path, "%s/%s", dir, list[i]->d_name);
    if (st == FD_OK && stat(path, &info) == 0 && S_ISDIR(info.st_mode)) st = walk(path, false, options, results);
    free(list[i]);
  }
  free(list);
  return st;
}

fd_status fd_verify_run(int n, const char *const *paths, const struct fd_verify_options *options) {
  fd_status st = FD_OK;
  struct fd_verify_results results = {0};
  printf("%-36s %7s  %-46s %9s %9s  %s\n", "case", "records", "worst record", "error", "tolerance", "verdict");
  for (int i = 0; i < n; i++) FD_TRY(walk(paths[i], true, options, &results));
  const int failed = results.cases - results.passed - results.not_built;
  printf("%d cases: %d passed, %d failed, %d not built\n", results.cases, results.passed, failed, results.not_built);
  if (results.cases == 0) FD_TRY(FD_FAIL(FD_ERR_FAILED, "%s: no case.json in it or below it", paths[0]));
  if (failed) FD_TRY(FD_FAIL(FD_ERR_FAILED, "%d of %d cases failed", failed, results.cases));
  if (!results.passed) FD_TRY(FD_FAIL(FD_ERR_FAILED, "none of %d cases is of a kind that is built", results.cases));
done:
  fflush(stdout);
  free(results.at);
  return st;
}

/* ---- the command ----------------------------------------------------------------------------------------------------- */

static fd_status run(struct fd_run *r) {
  fd_status st = FD_OK;
  struct fd_verify_options options = {.dtype = FD_F32, .backend = fd_run_flag(r, "--backend"), .verbose = fd_run_switch(r, "--records", false)};
  const char *dtype = fd_run_flag(r, "--dtype");
  if (dtype && strcmp(dtype, "bf16") == 0) options.dtype = FD_BF16;
  else if (dtype && strcmp(dtype, "f32") != 0 && strcmp(dtype, "fp32") != 0)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "--dtype %s: f32 or bf16 is wanted", dtype));
  if (fd_comm_rank(r->comm) == 0) st = fd_verify_run(r->n_args, r->args, &options); /* a case is computed by one rank */
done:
  return fd_agree(r->comm, st);
}

static const struct fd_flag flags[] = {
    {"--dtype", "TYPE", NULL, "f32 (default), or bf16: outputs within 16 * 2^-8 of the largest recorded value"},
    {"--backend", "NAME", NULL, "where to compute (cpu)"},
    {"--records -v", NULL, NULL, "a line for every record, not only the worst of each case"},
    {0},
};

const struct fd_command fd_cmd_verify = {
    .name = "verify", .args = "DIR...", .help = "compare with golden records", .least_args = 1, .most_args = -1, .flags = flags, .groups = "",
    .more = "DIR is a case (a folder with case.json) or a folder of cases. Prints a table of case, worst record, error and tolerance.\n"
            "Exit 1 if a case fails.\n",
    .run = run};
