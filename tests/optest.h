// SPDX-License-Identifier: Apache-2.0
// Harness of the op tests. A test makes tensors (ot_new), fills an args struct, runs the op (ot_run: prepare, scratch with
// guards around it, run), and compares with a double-precision reference (ot_check) at c eps(dtype) sqrt(terms).
//
// Tensors live until ot_reset. Memory behind each tensor is guarded; ot_run checks the guards, so a kernel that writes past
// a tensor fails its test. Outputs start as NaN unless filled, so an element that is not written is found.
//
//   static void body(struct ot *t) { ... }              one backend, one number of threads
//   int main(void) { return ot_main(body); }            runs it with 1 and with 3 threads
//   ... ot_main_same_bits(body)                         and every output must have the same bits with both
//
// The same file is built up to three times: for the CPU backend; for the CUDA backend's kernels on the CPU (FD_EMULATE); for the CUDA
// backend on a GPU (FD_DEVICE), where the test skips itself (exit code 77) if there is none.
#ifndef FD_TESTS_OPTEST_H
#define FD_TESTS_OPTEST_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "cpu/cpu.h"
/* OT_ON_DEVICE: what is found at run time only the CPU can say. OT_EMULATED: threads are fibers, so large shapes take too long. */
#if defined FD_EMULATE
#include "cuda/cuda.h"
#define OT_BACKEND fd_cuda_backend
enum { OT_ROUNDS = 3, OT_ON_DEVICE = 1, OT_EMULATED = 1 };
#elif defined FD_DEVICE
#include "cuda/cuda.h"
#define OT_BACKEND fd_cuda_backend
enum { OT_ROUNDS = 3, OT_ON_DEVICE = 1, OT_EMULATED = 0 };
#else
#define OT_BACKEND fd_cpu_backend
enum { OT_ROUNDS = 2, OT_ON_DEVICE = 0, OT_EMULATED = 0 };
#endif

#define OT_UNUSED __attribute__((unused))
enum { OT_MAX_TENSORS = 512, OT_GUARD = 64 };

struct ot {
  fd_ctx *ctx;
  int failed, checks;
  const char *what; /* set by the test: which shape and type is on, for messages */
  char what_text[256];
  uint64_t draws;
  fd_tensor tensor[OT_MAX_TENSORS];
  int n_tensors;
  uint64_t *hash; /* of the outputs of each ot_run with 1 thread */
  int n_hashes, at_hash;
  bool first_pass, same_bits;
};

#define OT_FAIL(t, ...)                                                           \
  do {                                                                            \
    if ((t)->failed++ < 20) {                                                     \
      printf("%s:%d: [%s, %d threads] ", __FILE__, __LINE__, (t)->what, (t)->ctx->n_threads); \
      printf(__VA_ARGS__);                                                        \
      printf("\n");                                                               \
    }                                                                             \
  } while (0)
#define OT_CHECK(t, c)                          \
  do {                                          \
    (t)->checks++;                              \
    if (!(c)) OT_FAIL(t, "not so: %s", #c);     \
  } while (0)

/** Say which case is on. */
OT_UNUSED __attribute__((format(printf, 2, 3))) static void ot_what(struct ot *t, const char *format, ...) {
  va_list ap;
  va_start(ap, format);
  vsnprintf(t->what_text, sizeof t->what_text, format, ap);
  va_end(ap);
  t->what = t->what_text;
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

OT_UNUSED static double ot_get(const fd_tensor *x, int64_t i) {
  switch (x->dtype) {
    case FD_F32: return ((const float *)x->data)[i];
    case FD_BF16: return fd_bf16_to_f32(((const fd_bf16 *)x->data)[i]);
    case FD_F64: return ((const double *)x->data)[i];
    case FD_I32: return ((const int32_t *)x->data)[i];
    case FD_U32: return ((const uint32_t *)x->data)[i];
    case FD_U8: return ((const uint8_t *)x->data)[i];
    default: return NAN;
  }
}

static void ot_set(fd_tensor *x, int64_t i, double v) {
  switch (x->dtype) {
    case FD_F32: ((float *)x->data)[i] = (float)v; break;
    case FD_BF16: ((fd_bf16 *)x->data)[i] = fd_f32_to_bf16((float)v); break;
    case FD_F64: ((double *)x->data)[i] = v; break;
    case FD_I32: ((int32_t *)x->data)[i] = (int32_t)v; break;
    case FD_U32: ((uint32_t *)x->data)[i] = (uint32_t)v; break;
    case FD_U8: ((uint8_t *)x->data)[i] = (uint8_t)v; break;
    default: break;
  }
}

/** A tensor of this shape, floats NaN, integers 0. Up to 4 lengths. */
static fd_tensor *ot_new(struct ot *t, fd_dtype dtype, int ndim, ...) {
  if (t->n_tensors == OT_MAX_TENSORS) abort();
  fd_tensor *x = &t->tensor[t->n_tensors++];
  *x = (fd_tensor){.dtype = dtype, .ndim = ndim};
  va_list ap;
  va_start(ap, ndim);
  for (int i = 0; i < ndim; i++) x->shape[i] = va_arg(ap, int64_t);
  va_end(ap);
  size_t bytes = fd_tensor_bytes(x), all = (bytes + 2 * OT_GUARD + 63) & ~(size_t)63;
  char *p = aligned_alloc(64, all);
  if (!p) abort();
  memset(p, 0xa5, all);
  x->data = p + OT_GUARD;
  int64_t n = fd_tensor_numel(x);
  if (dtype == FD_F32 || dtype == FD_BF16 || dtype == FD_F64)
    for (int64_t i = 0; i < n; i++) ot_set(x, i, NAN);
  else memset(x->data, 0, bytes);
  return x;
}
/* ot_new with int lengths: OT_NEW(t, FD_F32, 3, 5) */
#define OT_SHAPE_N(a, b, c, d, n, ...) n
#define OT_NDIM(...) OT_SHAPE_N(__VA_ARGS__, 4, 3, 2, 1, 0)
#define OT_SHAPE_1(a) (int64_t)(a)
#define OT_SHAPE_2(a, b) (int64_t)(a), (int64_t)(b)
#define OT_SHAPE_3(a, b, c) (int64_t)(a), (int64_t)(b), (int64_t)(c)
#define OT_SHAPE_4(a, b, c, d) (int64_t)(a), (int64_t)(b), (int64_t)(c), (int64_t)(d)
#define OT_SHAPE_PICK(n) OT_SHAPE_##n
#define OT_SHAPE_OF(n) OT_SHAPE_PICK(n)
#define OT_NEW(t, dtype, ...) ot_new(t, dtype, OT_NDIM(__VA_ARGS__), OT_SHAPE_OF(OT_NDIM(__VA_ARGS__))(__VA_ARGS__))

OT_UNUSED static fd_tensor *ot_normal(struct ot *t, fd_tensor *x, double mean, double std) {
  uint64_t stream = t->draws++;
  int64_t n = fd_tensor_numel(x);
  for (int64_t i = 0; i < n; i += 4) {
    float z[4];
    fd_rng_normal4(9, 77, stream, (uint32_t)(i / 4), z);
    for (int64_t j = i; j < n && j < i + 4; j++) ot_set(x, j, mean + std * z[j - i]);
  }
  return x;
}
/** Whole numbers lo .. hi - 1. */
OT_UNUSED static fd_tensor *ot_integers(struct ot *t, fd_tensor *x, int64_t lo, int64_t hi) {
  uint64_t stream = t->draws++;
  for (int64_t i = 0; i < fd_tensor_numel(x); i++)
    ot_set(x, i, (double)(lo + (int64_t)(fd_rng_uniform(9, 78, stream, (uint32_t)i) * (float)(hi - lo))));
  return x;
}
OT_UNUSED static fd_tensor *ot_fill(fd_tensor *x, double v) {
  for (int64_t i = 0; i < fd_tensor_numel(x); i++) ot_set(x, i, v);
  return x;
}
/** A new normal tensor, the usual input. */
#define OT_RAND(t, dtype, ...) ot_normal(t, OT_NEW(t, dtype, __VA_ARGS__), 0, 1)
/** i32 [1] */
OT_UNUSED static fd_tensor *ot_count(struct ot *t, int64_t n) { return ot_fill(OT_NEW(t, FD_I32, 1), (double)n); }

/** Values as double, in memory the caller frees. NULL for NULL. */
OT_UNUSED static double *ot_doubles(const fd_tensor *x) {
  if (!x) return NULL;
  int64_t n = fd_tensor_numel(x);
  double *d = malloc(sizeof *d * (size_t)(n ? n : 1));
  for (int64_t i = 0; i < n; i++) d[i] = ot_get(x, i);
  return d;
}

OT_UNUSED static void ot_reset(struct ot *t) {
  for (int i = 0; i < t->n_tensors; i++) free((char *)t->tensor[i].data - OT_GUARD);
  t->n_tensors = 0;
}

/* ---- running ----------------------------------------------------------------------------------------------------- */

OT_UNUSED static void ot_check_guards(struct ot *t, const char *op) {
  for (int k = 0; k < t->n_tensors; k++) {
    const unsigned char *p = (const unsigned char *)t->tensor[k].data, *end = p + fd_tensor_bytes(&t->tensor[k]);
    for (int i = 0; i < OT_GUARD; i++)
      if (p[-1 - i] != 0xa5 || end[i] != 0xa5) {
        OT_FAIL(t, "%s wrote outside tensor %d", op, k);
        return;
      }
  }
}

/* With 1 thread remember the outputs' bits, with several compare. */
static void ot_check_bits(struct ot *t, enum fd_op op, const void *args) {
  const struct fd_op_info *info = fd_op_info(op);
  uint64_t h = 14695981039346656037u;
  for (int s = 0; s < info->n_slots; s++) {
    const fd_tensor *x = ((fd_tensor *const *)args)[s];
    if (!x || info->dir[s] == 'i') continue;
    const unsigned char *p = (const unsigned char *)x->data;
    for (size_t i = 0; i < fd_tensor_bytes(x); i++) h = (h ^ p[i]) * 1099511628211u;
  }
  if (t->first_pass) {
    if ((t->n_hashes & (t->n_hashes + 1)) == 0) t->hash = realloc(t->hash, sizeof *t->hash * 2 * (size_t)(t->n_hashes + 1));
    if (!t->hash) abort();
    t->hash[t->n_hashes++] = h;
  } else if (t->same_bits) {
    t->checks++;
    if (t->at_hash >= t->n_hashes || t->hash[t->at_hash] != h) OT_FAIL(t, "%s: other bits than with 1 thread", info->name);
    t->at_hash++;
  }
}

#if defined FD_EMULATE || defined FD_DEVICE
/* Guards around device memory: none where something else sees each step over an edge, that is in the emulator and, with
 * OT_EXACT=1, under compute-sanitizer. */
static size_t ot_device_guard(void) { return OT_EMULATED || getenv("OT_EXACT") ? 0 : 256; }

/* Device memory between guards, filled from `from` or with 0xff (NaN in every float type). *whole is what is to be freed. */
static fd_status ot_device_new(struct ot *t, const void *from, size_t bytes, void **whole, void **data) {
  const struct fd_backend *device = t->ctx->backend;
  const size_t guard = ot_device_guard(), all = bytes + 2 * guard;
  if (!from && OT_EMULATED) { /* never written: the emulator says who reads it first */
    if (cudaMalloc(whole, all) != cudaSuccess) return FD_ERR_NOMEM;
    *data = *whole;
    return FD_OK;
  }
  fd_status st = device->alloc(t->ctx, all, whole);
  unsigned char *p = malloc(all ? all : 1);
  if (!p) abort();
  memset(p, 0xa5, all);
  if (from) memcpy(p + guard, from, bytes);
  else memset(p + guard, 0xff, bytes);
  if (st == FD_OK && guard) st = device->to_device(t->ctx, *whole, p, all);
  if (st == FD_OK) *data = (char *)*whole + guard;
  /* by itself: the backend remembers counts of rows by their place (cuda/cuda.h) */
  if (st == FD_OK) st = device->to_device(t->ctx, *data, p + guard, bytes);
  if (st == FD_OK) st = device->sync(t->ctx);
  free(p);
  return st;
}

static bool ot_device_guards_hold(struct ot *t, const void *whole, size_t bytes) {
  const size_t guard = ot_device_guard(), all = bytes + 2 * guard;
  bool hold = true;
  if (!guard) return true;
  unsigned char *p = malloc(all);
  if (!p) abort();
  if (t->ctx->backend->from_device(t->ctx, p, whole, all) != FD_OK) hold = false;
  for (size_t i = 0; i < guard && hold; i++) hold = p[i] == 0xa5 && p[guard + bytes + i] == 0xa5;
  free(p);
  return hold;
}

/* Every slot and the scratch in device memory of its own. */
static void ot_run(struct ot *t, enum fd_op op, const void *args) {
  const struct fd_op_info *info = fd_op_info(op);
  const struct fd_backend *device = t->ctx->backend;
  char copy[FD_OP_ARGS_MAX];
  fd_tensor on_device[FD_MAX_SLOTS], **slot = fd_op_slots(copy);
  void *memory[FD_MAX_SLOTS] = {0}, *scratch = NULL;
  size_t bytes = 0;
  t->checks++;
  memcpy(copy, args, info->args_bytes);
  bool ok = device->prepare(t->ctx, op, args, &bytes) == FD_OK;
  for (int s = 0; s < info->n_slots && ok; s++) {
    if (!slot[s]) continue;
    int same = 0; /* a slot that aliases another stays one */
    while (same < s && !(fd_op_slots((void *)args)[same] && fd_op_slots((void *)args)[same]->data == slot[s]->data)) same++;
    on_device[s] = *slot[s];
    if (same < s) on_device[s].data = on_device[same].data;
    else ok = ot_device_new(t, slot[s]->data, fd_tensor_bytes(slot[s]), &memory[s], &on_device[s].data) == FD_OK;
    slot[s] = &on_device[s];
  }
  if (ok && bytes) ok = ot_device_new(t, NULL, bytes, &scratch, &t->ctx->scratch) == FD_OK;
  t->ctx->scratch_bytes = bytes;
  ok = ok && fd_op_run(t->ctx, op, copy) == FD_OK && device->sync(t->ctx) == FD_OK;
  for (int s = 0; s < info->n_slots && ok; s++)
    if (slot[s] && info->dir[s] != 'i')
      ok = device->from_device(t->ctx, fd_op_slots((void *)args)[s]->data, slot[s]->data, fd_tensor_bytes(slot[s])) == FD_OK;
  if (!ok) OT_FAIL(t, "%s: %s", info->name, fd_status_message());
  for (int s = 0; s < info->n_slots; s++) {
    if (ok && memory[s] && !ot_device_guards_hold(t, memory[s], fd_tensor_bytes(slot[s]))) OT_FAIL(t, "%s wrote outside slot %d", info->name, s);
    if (memory[s]) device->free(t->ctx, memory[s]);
  }
  if (ok && scratch && !ot_device_guards_hold(t, scratch, bytes)) OT_FAIL(t, "%s wrote outside its scratch of %zu bytes", info->name, bytes);
  if (scratch) device->free(t->ctx, scratch);
  t->ctx->scratch = NULL;
  ot_check_bits(t, op, args);
}
#else
/** Prepare and run; both must be FD_OK. Scratch is exactly what was asked for, poisoned and guarded. */
OT_UNUSED static void ot_run(struct ot *t, enum fd_op op, const void *args) {
  const char *name = fd_op_info(op)->name;
  size_t bytes = 0;
  t->checks++;
  if (t->ctx->backend->prepare(t->ctx, op, args, &bytes) != FD_OK) {
    OT_FAIL(t, "%s: prepare: %s", name, fd_status_message());
    return;
  }
  size_t all = (bytes + 2 * OT_GUARD + 63) & ~(size_t)63;
  unsigned char *p = aligned_alloc(64, all);
  if (!p) abort();
  memset(p, 0xa5, OT_GUARD);
  memset(p + OT_GUARD, 0xff, bytes); /* NaN in every float type */
  memset(p + OT_GUARD + bytes, 0xa5, OT_GUARD);
  t->ctx->scratch = p + OT_GUARD;
  t->ctx->scratch_bytes = bytes;
  if (fd_op_run(t->ctx, op, args) != FD_OK) OT_FAIL(t, "%s: %s", name, fd_status_message());
  t->ctx->scratch = NULL;
  for (int i = 0; i < OT_GUARD; i++)
    if (p[i] != 0xa5 || p[OT_GUARD + bytes + (size_t)i] != 0xa5) {
      OT_FAIL(t, "%s wrote outside its scratch of %zu bytes", name, bytes);
      break;
    }
  free(p);
  ot_check_guards(t, name);
  ot_check_bits(t, op, args);
}
#endif
#define OT_RUN(t, op, ...) ot_run(t, FD_OP_##op, &(struct fd_##op##_args){__VA_ARGS__})

/** Misuse: prepare must fail with FD_ERR_ARG, and the message must name the op and `part` (a slot or an argument). */
OT_UNUSED static void ot_misuse(struct ot *t, enum fd_op op, const void *args, const char *part, int line) {
  size_t bytes;
  const char *name = fd_op_info(op)->name;
  t->checks++;
  fd_status st = t->ctx->backend->prepare(t->ctx, op, args, &bytes);
  if (st != FD_ERR_ARG) OT_FAIL(t, "line %d: %s with a wrong %s is %s, expected FD_ERR_ARG", line, name, part, fd_status_name(st));
  else if (strncmp(fd_status_message(), name, strlen(name)) != 0 || !strstr(fd_status_message() + strlen(name), part))
    OT_FAIL(t, "line %d: the message does not name %s: %s", line, part, fd_status_message());
}
#define OT_MISUSE(t, part, op, ...) ot_misuse(t, FD_OP_##op, &(struct fd_##op##_args){__VA_ARGS__}, part, __LINE__)

/* ---- comparing --------------------------------------------------------------------------------------------------- */

static double ot_eps(fd_dtype dtype) { return dtype == FD_BF16 ? 0x1p-8 : dtype == FD_F64 ? 0x1p-52 : 0x1p-23; }

/** |x - ref| <= c (eps(dtype of x) |ref| + eps(f32) sqrt(terms) size) for every element: rounded once to its type, summed in
 *  f32. size is the root mean square of ref, or `least_size` if that is more: the size of what is summed, where the sum may
 *  cancel. c = 4 unless there is a reason. */
OT_UNUSED static void ot_compare(struct ot *t, const char *name, const fd_tensor *x, const double *ref, double terms, double c, double least_size,
                       int line) {
  int64_t n = fd_tensor_numel(x), worst = -1;
  double square = 0, most = 1;
  for (int64_t i = 0; i < n; i++) square += ref[i] * ref[i];
  double size = fmax(least_size, n ? sqrt(square / (double)n) : 0);
  t->checks++;
  for (int64_t i = 0; i < n; i++) {
    double v = ot_get(x, i), tol = c * (ot_eps(x->dtype) * fabs(ref[i]) + 0x1p-23 * sqrt(terms) * (fabs(ref[i]) + size)) + 1e-37;
    double off = v == ref[i] ? 0 : fabs(v - ref[i]) / tol;
    if (!(off <= most)) worst = i, most = isnan(off) ? INFINITY : off;
  }
  if (worst >= 0)
    OT_FAIL(t, "line %d: %s[%lld] = %.9g, expected %.9g: %.3g times the tolerance", line, name, (long long)worst,
            ot_get(x, worst), ref[worst], most);
}
#define OT_COMPARE(t, x, ref, terms) ot_compare(t, #x, x, ref, terms, 4, 0, __LINE__)
#define OT_COMPARE_C(t, x, ref, terms, c) ot_compare(t, #x, x, ref, terms, c, 0, __LINE__)
#define OT_COMPARE_SIZE(t, x, ref, terms, least_size) ot_compare(t, #x, x, ref, terms, 4, least_size, __LINE__)

/** Gradient of a double-precision function of x[0..n-1] by central differences. To turn a reference of the forward op into
 *  elementwise gradients: f returns sum over outputs of dy y. */
OT_UNUSED static void ot_numeric_gradient(double (*f)(void *user), void *user, double *x, int64_t n, double *dx) {
  for (int64_t i = 0; i < n; i++) {
    double keep = x[i], h = 1e-4 * (1 + fabs(keep)), d1, d2;
    x[i] = keep + h, d1 = f(user);
    x[i] = keep - h, d1 -= f(user);
    x[i] = keep + 2 * h, d2 = f(user);
    x[i] = keep - 2 * h, d2 -= f(user);
    x[i] = keep;
    dx[i] = (8 * d1 - d2) / (12 * h);
  }
}

/** Backward kernel against forward kernel, both in f32: for each pair (x, dx), the change of L = sum dy y along a random
 *  direction u of x must be sum dx u. Run the backward before; `fwd` is run again here and leaves y of the unchanged x.
 *  y and dy: outputs and their gradients. Pairs whose dx is NULL are skipped. The tolerance is that of central differences in
 *  f32 (step^2 and eps / step meet near 1e-3). */
OT_UNUSED static void ot_finite_difference(struct ot *t, enum fd_op fwd, const void *fwd_args, int n_out, fd_tensor *const *y,
                                           fd_tensor *const *dy, int n_in, fd_tensor *const *x, fd_tensor *const *dx, int line) {
  const double h = 4e-3;
  for (int k = 0; k < n_in; k++) {
    if (!x[k] || !dx[k]) continue;
    for (int direction = 0; direction < 3; direction++) {
      int64_t n = fd_tensor_numel(x[k]);
      double *keep = ot_doubles(x[k]), analytic = 0, size = 0, numeric = 0;
      uint64_t stream = t->draws++;
      float *u = malloc(sizeof *u * (size_t)(n + 4));
      for (int64_t i = 0; i < n; i += 4) fd_rng_normal4(9, 79, stream, (uint32_t)(i / 4), u + i);
      for (int64_t i = 0; i < n; i++) {
        double d = ot_get(dx[k], i) * u[i];
        analytic += d, size += d * d;
      }
      for (int side = -1; side <= 1; side += 2) {
        for (int64_t i = 0; i < n; i++) ot_set(x[k], i, keep[i] + side * h * u[i]);
        ot_run(t, fwd, fwd_args);
        for (int o = 0; o < n_out; o++)
          for (int64_t i = 0; i < fd_tensor_numel(y[o]); i++) {
            double v = ot_get(y[o], i), g = ot_get(dy[o], i);
            if (g != 0) numeric += side * v * g / (2 * h);
          }
      }
      for (int64_t i = 0; i < n; i++) ot_set(x[k], i, keep[i]);
      t->checks++;
      if (!(fabs(numeric - analytic) <= 4e-3 * (sqrt(size) + 1e-2)))
        OT_FAIL(t, "line %d: gradient %d: finite differences give %.6g, the backward %.6g (size %.3g)", line, k, numeric,
                analytic, sqrt(size));
      free(keep), free(u);
    }
  }
  ot_run(t, fwd, fwd_args);
}
#define OT_LIST(...) ((fd_tensor *[]){__VA_ARGS__})

/* ---- the program --------------------------------------------------------------------------------------------------- */

OT_UNUSED static int ot_main_with(void (*body)(struct ot *), bool same_bits) {
  static struct ot t;
  t.same_bits = same_bits;
  for (int round = 0; round < OT_ROUNDS; round++) {
    const int threads = OT_ON_DEVICE ? 1 : 1 + 2 * round;
#ifdef FD_EMULATE
    fd_emu_seed((unsigned)round); /* another order of blocks, warps and lanes */
#endif
    if (fd_ctx_create(&OT_BACKEND, threads, NULL, &t.ctx) != FD_OK) {
      char why[256] = ""; /* it is in the message of open, too */
      const bool usable = !OT_BACKEND.usable || OT_BACKEND.usable(why, sizeof why);
      printf("%s%s\n", usable ? "" : "skipped: ", fd_status_message());
      return usable ? 1 : 77;
    }
    if (OT_ON_DEVICE && !OT_EMULATED) t.ctx->cache_dir = getenv("OT_CACHE"); /* plans take seconds; rounds and tests share them */
    t.what = "";
    t.draws = 0;
    t.first_pass = round == 0;
    t.at_hash = 0;
    if (threads > 1) cpu_grain = 1; /* small shapes are shared out too */
    body(&t);
    ot_reset(&t);
    fd_ctx_destroy(&t.ctx);
  }
  free(t.hash);
  printf("%d checks, %d failed\n", t.checks, t.failed);
  return t.failed != 0 || t.checks == 0;
}

OT_UNUSED static int ot_main(void (*body)(struct ot *)) { return ot_main_with(body, false); }
OT_UNUSED static int ot_main_same_bits(void (*body)(struct ot *)) { return ot_main_with(body, true); }

#endif
