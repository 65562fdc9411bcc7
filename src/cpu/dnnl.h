// SPDX-License-Identifier: Apache-2.0
// What the kernels on oneDNN share: its engine, a table of primitives, and reordered copies of constant weights.
//
// Primitives are made in `prepare`, so a step only looks them up (by shape and types, about 50 ns). Their scratch is ours
// (scratchpad mode "user"). Invariant: oneDNN sees as many OpenMP threads as the context has (cpu_dnnl sets that).
#ifndef FD_CPU_DNNL_H
#define FD_CPU_DNNL_H

#include <dnnl.h>

#include "cpu/cpu.h"

enum { CPU_PRIM_KEY = 20, CPU_PRIM_ARGS = 6 };

/** One primitive with its memory objects, whose data is set at each run. */
struct cpu_prim {
  struct cpu_prim *next;
  int64_t key[CPU_PRIM_KEY];
  char name[96];           /* what it is for, for lists */
  dnnl_primitive_t prim;   /* owned */
  dnnl_exec_arg_t args[CPU_PRIM_ARGS + 1]; /* owned memories; the last is the scratch */
  int n_args;              /* without the scratch */
  size_t scratch_bytes;
  char impl[64];           /* impl_info of oneDNN */
  dnnl_memory_desc_t md[CPU_PRIM_ARGS];
};

struct cpu_dnnl;

/** The context's, made at first use. Sets the number of OpenMP threads to the context's. */
fd_status cpu_dnnl(fd_ctx *ctx, struct cpu_dnnl **out);
dnnl_engine_t cpu_dnnl_engine(struct cpu_dnnl *d);
dnnl_stream_t cpu_dnnl_stream(struct cpu_dnnl *d);
/** bf16 matmul and convolution exist (AVX-512 BF16 or emulated on AVX-512); else blocks are converted to f32. */
bool cpu_dnnl_has_bf16(struct cpu_dnnl *d);

/** NULL if it was not made. Key entries that are not used are 0. */
struct cpu_prim *cpu_prim_find(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY]);

/** Make the primitive of `desc` and put it into the table. arg[i] is the DNNL_ARG_* of argument i; its description comes from
 *  the primitive (so "any" is resolved) and is left in md[i]. no_memory: the caller makes memories (dimensions known at run
 *  time only). */
fd_status cpu_prim_make(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY], const char *name, const_dnnl_op_desc_t desc,
                        const_dnnl_primitive_attr_t attr, const_dnnl_primitive_desc_t hint, int n_args, const int *arg,
                        bool no_memory, struct cpu_prim **out);

/** A reorder from md[0] to md[1]: another order of elements, another type. */
fd_status cpu_prim_make_reorder(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY], const char *name, const dnnl_memory_desc_t *from,
                                const dnnl_memory_desc_t *to, struct cpu_prim **out);

/** Run with data[i] for argument i. */
fd_status cpu_prim_run(struct cpu_dnnl *d, struct cpu_prim *p, void *const *data, void *scratch);

/** Every primitive of the context in turn. */
void cpu_prim_each(fd_ctx *ctx, void (*see)(void *user, const struct cpu_prim *p), void *user);

/** A block of memory that lives as long as the context, found again by its key: reordered constant weights. *fresh tells
 *  that it was just made and must be filled. */
fd_status cpu_dnnl_keep(struct cpu_dnnl *d, const int64_t key[CPU_PRIM_KEY], size_t bytes, void **out, bool *fresh);
/** All bytes kept so, for the memory plan. */
size_t cpu_dnnl_kept_bytes(fd_ctx *ctx);

/** oneDNN's status as ours, with a message that names the call. */
fd_status cpu_dnnl_status(dnnl_status_t s, const char *call);
#define CPU_DNNL(call) cpu_dnnl_status((call), #call)

static inline dnnl_data_type_t cpu_dnnl_type(fd_dtype t) { return t == FD_BF16 ? dnnl_bf16 : dnnl_f32; }

/* ---- conversions, shared by matmul and convolution ------------------------------------------------------------------ */

/** dst[r, c] = src[r, c], rows of `cols` with these strides (elements), bf16 to f32; on the context's threads. */
void cpu_widen(fd_ctx *ctx, float *dst, int64_t ld_dst, const fd_bf16 *src, int64_t ld_src, int64_t rows, int64_t cols);

/** Finish rows of sums in f32: c[r, c] = (add ? c[r, c] : 0) + x[r, c] + bias[c], rounded to c's type. bias may be NULL. */
void cpu_finish(fd_ctx *ctx, void *c, fd_dtype c_type, int64_t ld_c, const float *x, int64_t ld_x, const void *bias,
                fd_dtype bias_type, bool add, int64_t rows, int64_t cols);

#endif
