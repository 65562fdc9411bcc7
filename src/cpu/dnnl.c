// SPDX-License-Identifier: Apache-2.0
// oneDNN's engine, the table of primitives and what is kept for constant weights. Owned by the context, freed on close.
#include "cpu/dnnl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/vmath.h"

enum { TABLE = 1024 };

struct kept {
  struct kept *next;
  int64_t key[CPU_PRIM_KEY];
  void *data; /* owned */
  size_t bytes;
};

struct cpu_dnnl {
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  bool bf16;
  struct cpu_prim *table[TABLE];
  struct kept *kept;
  size_t kept_bytes;
};

fd_status cpu_dnnl_status(dnnl_status_t s, const char *call) {
  if (s == dnnl_success) return FD_OK;
  static const char *const text[] = {"success", "out of memory", "invalid arguments", "unimplemented", "iterator ends", "runtime error",
                                     "not required"};
  const char *what = (unsigned)s < sizeof text / sizeof text[0] ? text[s] : "unknown status";
  fd_status st = s == dnnl_out_of_memory ? FD_ERR_NOMEM : s == dnnl_unimplemented ? FD_ERR_UNSUPPORTED : FD_ERR_FAILED;
  return FD_FAIL(st, "oneDNN: %s: %.60s", what, call);
}

static void prim_free(struct cpu_prim *p) {
  for (int i = 0; i <= CPU_PRIM_ARGS; i++)
    if (p->args[i].memory) dnnl_memory_destroy(p->args[i].memory);
  if (p->prim) dnnl_primitive_destroy(p->prim);
  free(p);
}

static void close_dnnl(struct cpu_dnnl *d) {
  for (int i = 0; i < TABLE; i++)
    for (struct cpu_prim *p = d->table[i], *next; p; p = next) {
      next = p->next;
      prim_free(p);
    }
  for (struct kept *k = d->kept, *next; k; k = next) {
    next = k->next;
    free(k->data);
    free(k);
  }
  if (d->stream) dnnl_stream_destroy(d->stream);
  if (d->engine) dnnl_engine_destroy(d->engine);
  free(d);
}

fd_status cpu_dnnl(fd_ctx *ctx, struct cpu_dnnl **out) {
  fd_status st = FD_OK;
  struct cpu_state *state = ctx->state;
  struct cpu_dnnl *d = NULL;
  if (omp_get_max_threads() != ctx->n_threads) omp_set_num_threads(ctx->n_threads);
  if (state->dnnl) {
    *out = state->dnnl;
    return FD_OK;
  }
  d = calloc(1, sizeof *d);
  if (!d) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for oneDNN's table"));
  FD_TRY(CPU_DNNL(dnnl_engine_create(&d->engine, dnnl_cpu, 0)));
  FD_TRY(CPU_DNNL(dnnl_stream_create(&d->stream, d->engine, dnnl_stream_default_flags)));
  /* bf16 exists from avx512_core on (emulated without the instruction); each level is a set of bits over the one below */
  d->bf16 = (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core) == dnnl_cpu_isa_avx512_core;
  *out = state->dnnl = d;
  state->dnnl_close = close_dnnl;
  d = NULL;
done:
  if (d) close_dnnl(d);
  return st;
}

dnnl_engine_t cpu_dnnl_engine(struct cpu_dnnl *d) { return d->engine; }
dnnl_stream_t cpu_dnnl_stream(struct cpu_dnnl *d) { return d->stream; }
bool cpu_dnnl_has_bf16(struct cpu_dnnl *d) { return d->bf16; }

static unsigned slot_of(const int64_t key[CPU_PRIM_KEY]) {
  uint64_t h = 1469598103934665603u;
  for (int i = 0; i < CPU_PRIM_KEY; i++) h = (h ^ (uint64_t)key[i]) * 1099511628211u;
  return (unsigned)(h >> 40) % TABLE;
}

struct cpu_prim *cpu_prim_find(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY]) {
  for (struct cpu_prim *p = d->table[slot_of(key)]; p; p = p->next)
    if (memcmp(p->key, key, sizeof p->key) == 0) return p;
  return NULL;
}

/* Everything behind the description: takes `pd`. */
static fd_status finish_prim(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY], const char *name, dnnl_primitive_desc_t pd, int n_args,
                             const int *arg, bool no_memory, struct cpu_prim **out) {
  fd_status st = FD_OK;
  const char *impl = "";
  struct cpu_prim *p = calloc(1, sizeof *p);
  if (!p) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a primitive"));
  memcpy(p->key, key, sizeof p->key);
  snprintf(p->name, sizeof p->name, "%s", name);
  FD_TRY(CPU_DNNL(dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, (void *)&impl)));
  snprintf(p->impl, sizeof p->impl, "%s", impl);
  FD_TRY(CPU_DNNL(dnnl_primitive_create(&p->prim, pd)));
  p->n_args = n_args;
  for (int i = 0; i < n_args; i++) {
    const dnnl_memory_desc_t *md = dnnl_primitive_desc_query_md(pd, dnnl_query_exec_arg_md, arg[i]);
    if (!md) FD_TRY(FD_FAIL(FD_ERR_FAILED, "oneDNN: %s has no argument %d", name, arg[i]));
    p->md[i] = *md;
    p->args[i].arg = arg[i];
    if (!no_memory) FD_TRY(CPU_DNNL(dnnl_memory_create(&p->args[i].memory, md, d->engine, DNNL_MEMORY_NONE)));
  }
  const dnnl_memory_desc_t *scratch = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
  p->scratch_bytes = scratch ? dnnl_memory_desc_get_size(scratch) : 0;
  p->args[n_args].arg = DNNL_ARG_SCRATCHPAD;
  if (p->scratch_bytes)
    FD_TRY(CPU_DNNL(dnnl_memory_create(&p->args[n_args].memory, scratch, d->engine, DNNL_MEMORY_NONE)));
  unsigned at = slot_of(key);
  p->next = d->table[at];
  d->table[at] = p;
  *out = p;
  p = NULL;
done:
  dnnl_primitive_desc_destroy(pd);
  if (p) prim_free(p);
  return st;
}

fd_status cpu_prim_make(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY], const char *name, const_dnnl_op_desc_t desc,
                        const_dnnl_primitive_attr_t attr, const_dnnl_primitive_desc_t hint, int n_args, const int *arg,
                        bool no_memory, struct cpu_prim **out) {
  dnnl_primitive_desc_t pd;
  fd_status st = CPU_DNNL(dnnl_primitive_desc_create(&pd, desc, attr, d->engine, hint));
  if (st != FD_OK) return fd_fail_in(st, "%s", name);
  return finish_prim(d, key, name, pd, n_args, arg, no_memory, out);
}

fd_status cpu_prim_make_reorder(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY], const char *name, const dnnl_memory_desc_t *from,
                                const dnnl_memory_desc_t *to, struct cpu_prim **out) {
  dnnl_primitive_desc_t pd;
  /* its scratch, if any, is oneDNN's own: constants are reordered once, others are small */
  fd_status st = CPU_DNNL(dnnl_reorder_primitive_desc_create(&pd, from, d->engine, to, d->engine, NULL));
  if (st != FD_OK) return fd_fail_in(st, "%s", name);
  return finish_prim(d, key, name, pd, 2, (int[]){DNNL_ARG_FROM, DNNL_ARG_TO}, false, out);
}

fd_status cpu_prim_run(struct cpu_dnnl *d, struct cpu_prim *p, void *const *data, void *scratch) {
  for (int i = 0; i < p->n_args; i++) dnnl_memory_set_data_handle(p->args[i].memory, data[i]);
  int n = p->n_args;
  if (p->scratch_bytes) dnnl_memory_set_data_handle(p->args[n++].memory, scratch);
  return CPU_DNNL(dnnl_primitive_execute(p->prim, d->stream, n, p->args));
}

void cpu_prim_each(fd_ctx *ctx, void (*see)(void *user, const struct cpu_prim *p), void *user) {
  struct cpu_dnnl *d = ((struct cpu_state *)ctx->state)->dnnl;
  for (int i = 0; d && i < TABLE; i++)
    for (const struct cpu_prim *p = d->table[i]; p; p = p->next) see(user, p);
}

fd_status cpu_dnnl_keep(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY], size_t bytes, void **out, bool *fresh) {
  *fresh = false;
  for (struct kept *k = d->kept; k; k = k->next)
    if (memcmp(k->key, key, sizeof k->key) == 0) {
      *out = k->data;
      return FD_OK;
    }
  struct kept *k = calloc(1, sizeof *k);
  if (k) k->data = aligned_alloc(64, cpu_align(bytes ? bytes : 1));
  if (!k || !k->data) {
    free(k);
    return FD_FAIL(FD_ERR_NOMEM, "no memory for %zu bytes of reordered weights", bytes);
  }
  memcpy(k->key, key, sizeof k->key);
  k->bytes = bytes;
  k->next = d->kept;
  d->kept = k;
  d->kept_bytes += bytes;
  *out = k->data;
  *fresh = true;
  return FD_OK;
}

size_t cpu_dnnl_kept_bytes(fd_ctx *ctx) {
  struct cpu_dnnl *d = ((struct cpu_state *)ctx->state)->dnnl;
  return d ? d->kept_bytes : 0;
}

/* ---- conversions ----------------------------------------------------------------------------------------------------- */

CPU_CLONES static void widen_rows(float *dst, int64_t ld_dst, const fd_bf16 *src, int64_t ld_src, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) dst[r * ld_dst + c] = cpu_load(src, true, r * ld_src + c);
}

void cpu_widen(fd_ctx *ctx, float *dst, int64_t ld_dst, const fd_bf16 *src, int64_t ld_src, int64_t rows, int64_t cols) {
  #pragma omp parallel num_threads(cpu_threads(ctx, rows * cols))
  {
    int64_t lo, hi;
    cpu_share(rows, 1, &lo, &hi);
    widen_rows(dst + lo * ld_dst, ld_dst, src + lo * ld_src, ld_src, hi - lo, cols);
  }
}

CPU_INLINE void finish_row(void *c, bool c_bf16, const float *x, const void *bias, bool bias_bf16, bool add, int64_t cols) {
  for (int64_t i = 0; i < cols; i++) {
    float v = x[i];
    if (bias) v += cpu_load(bias, bias_bf16, i);
    if (add) v += cpu_load(c, c_bf16, i);
    cpu_store(c, c_bf16, i, v);
  }
}

CPU_CLONES static void finish_rows(void *c, bool c_bf16, int64_t ld_c, const float *x, int64_t ld_x, const void *bias, bool bias_bf16,
                                   bool add, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r++) {
    void *to = (char *)c + r * ld_c * (c_bf16 ? 2 : 4);
    const float *from = x + r * ld_x;
    /* constants, so that each form is a loop without branches */
    if (c_bf16) {
      if (!bias) finish_row(to, true, from, NULL, false, add, cols);
      else if (bias_bf16) finish_row(to, true, from, bias, true, add, cols);
      else finish_row(to, true, from, bias, false, add, cols);
    } else {
      if (!bias) finish_row(to, false, from, NULL, false, add, cols);
      else if (bias_bf16) finish_row(to, false, from, bias, true, add, cols);
      else finish_row(to, false, from, bias, false, add, cols);
    }
  }
}

void cpu_finish(fd_ctx *ctx, void *c, fd_dtype c_type, int64_t ld_c, const float *x, int64_t ld_x, const void *bias,
                fd_dtype bias_type, bool add, int64_t rows, int64_t cols) {
  #pragma omp parallel num_threads(cpu_threads(ctx, rows * cols))
  {
    int64_t lo, hi;
    cpu_share(rows, 1, &lo, &hi);
    finish_rows((char *)c + lo * ld_c * (int64_t)fd_dtype_bytes(c_type), c_type == FD_BF16, ld_c, x + lo * ld_x, ld_x, bias,
                bias_type == FD_BF16, add, hi - lo, cols);
  }
}
