// SPDX-License-Identifier: Apache-2.0
// Convolutions on oneDNN, NHWC. Weights come as [O, I, kh, kw]; oneDNN wants its own order ("any"): given oihw it runs a
// reference loop 200 times slower. So weights are reordered (and converted): constant ones once, others at each call.
// Without AVX-512 oneDNN has no bf16 convolution: a few images at a time are widened to f32.
// The gradient of weights is summed by threads in pieces: its bits depend on the number of threads.
#include <stdio.h>
#include <stdlib.h>

#include "cpu/conv2d.h"
#include "cpu/dnnl.h"
#include "cpu/vmath.h"

enum { FWD, BWD_DATA, BWD_WEIGHTS };
enum { KEY_CONV = 10, KEY_KEPT = 20, KEY_REORDER };
enum { WIDEN_BYTES = 32 << 20 };

struct conv {
  int kind;
  int64_t B, H, W, I, O, kh, kw, Ho, Wo;
  int64_t stride, top, left, bottom, right;
  fd_dtype type, w_type, bias_type; /* as given */
  bool bias, add;                   /* add: sum post-op (residual) */
  /* what oneDNN is given */
  int64_t n;        /* images at once */
  fd_dtype run, out; /* type of the computation, of its result */
};

/* ---- shapes --------------------------------------------------------------------------------------------------------- */

#define CONV_CHECKS(op, xx, yy, ww)                                                                                       \
  CPU_CHECK(op, xx, a->xx->ndim == 4, "[B, H, W, channels]");                                                           \
  CPU_CHECK(op, ww, a->ww->ndim == 4 && a->ww->shape[1] == a->xx->shape[3] && a->ww->shape[2] >= 1 && a->ww->shape[3] >= 1, \
            "[O, %lld, kh, kw]", (long long)a->xx->shape[3]);                                                             \
  CPU_CHECK_ARG(op, a->stride >= 1, "stride = %d, expected 1 or more", a->stride);                                       \
  CPU_CHECK_ARG(op, a->pad_top >= 0 && a->pad_left >= 0 && a->pad_bottom >= 0 && a->pad_right >= 0, "negative padding"); \
  do {                                                                                                                   \
    int64_t ho = out_length(a->xx->shape[1], a->pad_top + a->pad_bottom, a->ww->shape[2], a->stride);                     \
    int64_t wo = out_length(a->xx->shape[2], a->pad_left + a->pad_right, a->ww->shape[3], a->stride);                     \
    CPU_CHECK_ARG(op, ho >= 1 && wo >= 1, "the kernel is larger than the padded picture");                               \
    CPU_CHECK(op, yy, a->yy->ndim == 4 && a->yy->shape[0] == a->xx->shape[0] && a->yy->shape[1] == ho &&                 \
                  a->yy->shape[2] == wo && a->yy->shape[3] == a->ww->shape[0],                                            \
              "[%lld, %lld, %lld, %lld]", (long long)a->xx->shape[0], (long long)ho, (long long)wo, (long long)a->ww->shape[0]); \
  } while (0)

static int64_t out_length(int64_t n, int64_t pads, int64_t kernel, int64_t stride) { return (n + pads - kernel) / stride + 1; }

static struct conv conv_of(int kind, bool has_bf16, const fd_tensor *x, const fd_tensor *y, const fd_tensor *w, int stride, int top,
                           int left, int bottom, int right) {
  struct conv c = {.kind = kind, .B = x->shape[0], .H = x->shape[1], .W = x->shape[2], .I = x->shape[3], .O = w->shape[0],
                   .kh = w->shape[2], .kw = w->shape[3], .Ho = y->shape[1], .Wo = y->shape[2], .stride = stride, .top = top,
                   .left = left, .bottom = bottom, .right = right, .type = x->dtype, .w_type = w->dtype};
  c.n = c.B;
  c.run = c.out = c.type;
  if (c.type == FD_BF16 && !has_bf16) {
    c.run = c.out = FD_F32;
    int64_t per_image = (c.H * c.W * c.I + c.Ho * c.Wo * c.O) * 4;
    while (c.n > 1 && (c.B % c.n != 0 || c.n * per_image > WIDEN_BYTES)) c.n--;
  }
  return c;
}

static bool widened(const struct conv *c) { return c->run != c->type; }

/* ---- primitives ----------------------------------------------------------------------------------------------------- */

static fd_status make(struct cpu_dnnl *d, const struct conv *c, struct cpu_prim **out) {
  fd_status st = FD_OK;
  int64_t key[CPU_PRIM_KEY] = {KEY_CONV + c->kind, c->n, c->H, c->W, c->I, c->O, c->kh, c->kw, c->stride, c->top, c->left, c->bottom,
                               c->right, c->bias, c->add, c->bias_type, c->run, c->out};
  dnnl_primitive_attr_t attr = NULL;
  dnnl_post_ops_t sum = NULL;
  dnnl_primitive_desc_t hint = NULL;
  dnnl_convolution_desc_t desc, fwd;
  dnnl_memory_desc_t x, y, w, b;
  char name[96];
  *out = cpu_prim_find(d, key);
  if (*out) goto done;
  dnnl_data_type_t run = cpu_dnnl_type(c->run), result = cpu_dnnl_type(c->out);
  dnnl_dims_t xs = {c->n, c->I, c->H, c->W}, ys = {c->n, c->O, c->Ho, c->Wo}, ws = {c->O, c->I, c->kh, c->kw}, bs = {c->O};
  dnnl_dims_t strides = {c->stride, c->stride}, dilates = {0, 0}, before = {c->top, c->left}, after = {c->bottom, c->right};
  FD_TRY(CPU_DNNL(dnnl_memory_desc_init_by_tag(&x, 4, xs, c->kind == BWD_DATA ? result : run, dnnl_nhwc)));
  FD_TRY(CPU_DNNL(dnnl_memory_desc_init_by_tag(&y, 4, ys, c->kind == FWD ? result : run, dnnl_nhwc)));
  FD_TRY(CPU_DNNL(dnnl_memory_desc_init_by_tag(&w, 4, ws, c->kind == BWD_WEIGHTS ? dnnl_f32 : run, dnnl_format_tag_any)));
  FD_TRY(CPU_DNNL(dnnl_memory_desc_init_by_tag(&b, 1, bs, cpu_dnnl_type(c->bias_type), dnnl_a)));
  FD_TRY(CPU_DNNL(dnnl_primitive_attr_create(&attr)));
  FD_TRY(CPU_DNNL(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user)));
  static const char *const kinds[] = {"fwd", "bwd_data", "bwd_weights"};
  snprintf(name, sizeof name, "conv2d %s %s %lldx%lldx%lldx%lld>%lld %lldx%lld/%lld%s%s", kinds[c->kind], fd_dtype_name(c->run),
           (long long)c->n, (long long)c->H, (long long)c->W, (long long)c->I, (long long)c->O, (long long)c->kh, (long long)c->kw,
           (long long)c->stride, c->bias ? " bias" : "", c->add ? " add" : "");
  if (c->kind == FWD) {
    FD_TRY(CPU_DNNL(dnnl_dilated_convolution_forward_desc_init(&desc, dnnl_forward_training, dnnl_convolution_direct, &x, &w,
                                                               c->bias ? &b : NULL, &y, strides, dilates, before, after)));
    if (c->add) {
      FD_TRY(CPU_DNNL(dnnl_post_ops_create(&sum)));
      FD_TRY(CPU_DNNL(dnnl_post_ops_append_sum(sum, 1.0f)));
      FD_TRY(CPU_DNNL(dnnl_primitive_attr_set_post_ops(attr, sum)));
    }
    FD_TRY(cpu_prim_make(d, key, name, &desc, attr, NULL, c->bias ? 4 : 3,
                         (int[]){DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST, DNNL_ARG_BIAS}, false, out));
    goto done;
  }
  /* the backward ones want the forward one's description as a hint; only its types and shapes matter */
  dnnl_memory_desc_t hx = x, hy = y, hw = w;
  hx.data_type = hy.data_type = hw.data_type = run;
  FD_TRY(CPU_DNNL(dnnl_dilated_convolution_forward_desc_init(&fwd, dnnl_forward_training, dnnl_convolution_direct, &hx, &hw, NULL, &hy,
                                                             strides, dilates, before, after)));
  FD_TRY(CPU_DNNL(dnnl_primitive_desc_create(&hint, &fwd, NULL, cpu_dnnl_engine(d), NULL)));
  if (c->kind == BWD_DATA) {
    FD_TRY(CPU_DNNL(dnnl_dilated_convolution_backward_data_desc_init(&desc, dnnl_convolution_direct, &x, &w, &y, strides, dilates, before,
                                                                     after)));
    FD_TRY(cpu_prim_make(d, key, name, &desc, attr, hint, 3, (int[]){DNNL_ARG_DIFF_DST, DNNL_ARG_WEIGHTS, DNNL_ARG_DIFF_SRC}, false,
                         out));
  } else {
    FD_TRY(CPU_DNNL(dnnl_dilated_convolution_backward_weights_desc_init(&desc, dnnl_convolution_direct, &x, &w, c->bias ? &b : NULL, &y,
                                                                        strides, dilates, before, after)));
    FD_TRY(cpu_prim_make(d, key, name, &desc, attr, hint, c->bias ? 4 : 3,
                         (int[]){DNNL_ARG_SRC, DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_WEIGHTS, DNNL_ARG_DIFF_BIAS}, false, out));
  }
done:
  if (hint) dnnl_primitive_desc_destroy(hint);
  if (sum) dnnl_post_ops_destroy(sum);
  if (attr) dnnl_primitive_attr_destroy(attr);
  return st;
}

/* ---- weights --------------------------------------------------------------------------------------------------------- */

static uint64_t md_hash(const dnnl_memory_desc_t *md) {
  uint64_t h = 1469598103934665603u;
#define MIX(v) h = (h ^ (uint64_t)(v)) * 1099511628211u
  MIX(md->data_type);
  MIX(md->format_kind);
  for (int i = 0; i < md->ndims; i++) MIX(md->dims[i]), MIX(md->padded_dims[i]), MIX(md->format_desc.blocking.strides[i]);
  for (int i = 0; i < md->format_desc.blocking.inner_nblks; i++)
    MIX(md->format_desc.blocking.inner_blks[i]), MIX(md->format_desc.blocking.inner_idxs[i]);
#undef MIX
  return h;
}

/* The reorder between oihw of `plain` type and `md`; its scratch is small and oneDNN's own. */
static fd_status make_reorder(struct cpu_dnnl *d, const struct conv *c, const dnnl_memory_desc_t *md, fd_dtype plain, bool to_plain,
                              struct cpu_prim **out) {
  fd_status st = FD_OK;
  dnnl_memory_desc_t oihw;
  int64_t key[CPU_PRIM_KEY] = {KEY_REORDER, (int64_t)md_hash(md), plain, to_plain, c->O, c->I, c->kh, c->kw};
  *out = cpu_prim_find(d, key);
  if (*out) goto done;
  FD_TRY(CPU_DNNL(dnnl_memory_desc_init_by_tag(&oihw, 4, (dnnl_dims_t){c->O, c->I, c->kh, c->kw}, cpu_dnnl_type(plain), dnnl_oihw)));
  FD_TRY(cpu_prim_make_reorder(d, key, "reorder", to_plain ? md : &oihw, to_plain ? &oihw : md, out));
done:
  return st;
}

/* A few numbers of the weights: constant memory that was freed and reused by other weights must not find the old copy. */
static uint64_t fingerprint(const fd_tensor *w) {
  uint64_t h = 1469598103934665603u;
  int64_t n = fd_tensor_numel(w), step = n / 509 + 1;
  const unsigned char *p = w->data;
  size_t size = fd_dtype_bytes(w->dtype);
  for (int64_t i = 0; i < n; i += step) {
    uint32_t v = 0;
    memcpy(&v, p + (size_t)i * size, size);
    h = (h ^ v) * 1099511628211u;
  }
  return h;
}

/* Weights as primitive `p` wants them, argument `arg` of it: kept, or made in `scratch`. */
static fd_status weights(struct cpu_dnnl *d, const struct conv *c, struct cpu_prim *p, const fd_tensor *w, void *scratch, void **out) {
  fd_status st = FD_OK;
  struct cpu_prim *reorder;
  const dnnl_memory_desc_t *md = &p->md[1];
  void *to = scratch;
  bool fresh = true;
  if (w->flags & FD_T_CONST) {
    int64_t key[CPU_PRIM_KEY] = {KEY_KEPT, (int64_t)(intptr_t)w->data, (int64_t)md_hash(md), w->dtype, c->O, c->I, c->kh, c->kw,
                                 (int64_t)fingerprint(w)};
    FD_TRY(cpu_dnnl_keep(d, key, dnnl_memory_desc_get_size(md), &to, &fresh));
  }
  *out = to;
  if (!fresh) goto done;
  FD_TRY(make_reorder(d, c, md, w->dtype, false, &reorder));
  FD_TRY(cpu_prim_run(d, reorder, (void *[]){w->data, to}, NULL));
done:
  return st;
}

/* ---- scratch: named parts, laid out one behind the other -------------------------------------------------------------- */

struct parts {
  size_t prim, w, x, y, bias, sum, sum_bias; /* bytes */
};

static size_t parts_total(const struct parts *z) {
  return cpu_align(z->prim) + cpu_align(z->w) + cpu_align(z->x) + cpu_align(z->y) + cpu_align(z->bias) + cpu_align(z->sum) +
         cpu_align(z->sum_bias);
}

struct places {
  void *prim, *w, *x, *y, *bias, *sum, *sum_bias;
};

static struct places place(const struct parts *z, void *scratch) {
  char *at = scratch;
  struct places s;
#define NEXT(m) s.m = at, at += cpu_align(z->m)
  NEXT(prim);
  NEXT(w);
  NEXT(x);
  NEXT(y);
  NEXT(bias);
  NEXT(sum);
  NEXT(sum_bias);
#undef NEXT
  return s;
}

/* n consecutive elements, widened. */
static void widen_flat(fd_ctx *ctx, float *dst, const void *src, int64_t n) {
  enum { ROW = 4096 };
  int64_t rows = n / ROW;
  cpu_widen(ctx, dst, ROW, src, ROW, rows, ROW);
  cpu_widen(ctx, dst + rows * ROW, ROW, (const fd_bf16 *)src + rows * ROW, ROW, 1, n - rows * ROW);
}

/* dst (of `type`) = (add ? dst : 0) + src, n elements. */
static void finish_flat(fd_ctx *ctx, void *dst, fd_dtype type, const float *src, bool add, int64_t n) {
  enum { ROW = 4096 };
  int64_t rows = n / ROW;
  cpu_finish(ctx, dst, type, ROW, src, ROW, NULL, FD_F32, add, rows, ROW);
  cpu_finish(ctx, (char *)dst + (size_t)(rows * ROW) * fd_dtype_bytes(type), type, ROW, src + rows * ROW, ROW, NULL, FD_F32, add, 1,
             n - rows * ROW);
}

static void copy_flat(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  #pragma omp parallel num_threads(cpu_threads(ctx, (int64_t)(bytes / 4)))
  {
    int64_t lo, hi;
    cpu_share((int64_t)bytes, 4096, &lo, &hi);
    if (hi > lo) memcpy((char *)dst + lo, (const char *)src + lo, (size_t)(hi - lo));
  }
}

/* ---- 1x1 without padding: a matmul over pixels, or over each stride-th of them ---------------------------------------- */
/* oneDNN 2.6 is wrong here: the bf16 gradient of the data for 8 > 13 channels, the strided gradient of the weights for 3 > 24. */

static bool is_matmul(const fd_tensor *w, int top, int left, int bottom, int right) {
  return w->shape[2] == 1 && w->shape[3] == 1 && !top && !left && !bottom && !right;
}

static fd_tensor flat(const fd_tensor *t, int64_t cols) {
  fd_tensor f = {t->data, {cols ? fd_tensor_numel(t) / cols : 0, cols}, 2, t->dtype, 0};
  return f;
}

/* The pixels of x [B, H, W, I] that a stride hits, as rows, copied from x to `rows`, or back. */
static void hit_pixels(void *rows, const fd_tensor *x, int64_t Ho, int64_t Wo, int64_t stride, bool into_x) {
  int64_t H = x->shape[1], W = x->shape[2], I = x->shape[3];
  size_t size = fd_dtype_bytes(x->dtype), row = (size_t)I * size;
  for (int64_t r = 0; r < x->shape[0] * Ho * Wo; r++) {
    int64_t b = r / (Ho * Wo), h = r / Wo % Ho, w = r % Wo;
    char *at = (char *)x->data + (size_t)((b * H + h * stride) * W + w * stride) * row, *mine = (char *)rows + (size_t)r * row;
    memcpy(into_x ? at : mine, into_x ? mine : at, row);
  }
}

/* Scratch of the matmul, then weights converted to the activations' type, then the pixels hit. */
struct pixel_parts {
  size_t matmul, w, rows;
};

static size_t pixel_total(const struct pixel_parts *z) { return cpu_align(z->matmul) + cpu_align(z->w) + cpu_align(z->rows); }

static void convert_weights(const fd_tensor *w, fd_tensor *m, void *to) {
  fd_convert(to, m->dtype, w->data, w->dtype, fd_tensor_numel(w));
  m->data = to;
}

static fd_status fwd_matmul(fd_ctx *ctx, const struct fd_conv2d_fwd_args *a, bool run, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  fd_tensor y = flat(a->y, a->w->shape[0]), w = flat(a->w, a->w->shape[1]), x = flat(a->x, w.shape[1]);
  struct fd_matmul_args m = {.a = &x, .b = &w, .bias = a->bias, .c = &y, .acc = a->residual ? 1u << 4 : 0, .trans_b = 1};
  struct pixel_parts z = {0, 0, 0};
  w.dtype = x.dtype;
  x.shape[0] = y.shape[0];
  FD_TRY(cpu_matmul_prepare(ctx, &m, &z.matmul));
  if (w.dtype != a->w->dtype) z.w = fd_tensor_bytes(&w);
  if (a->stride > 1) z.rows = fd_tensor_bytes(&x);
  *scratch_bytes = pixel_total(&z);
  if (!run) goto done;
  char *w_at = (char *)ctx->scratch + cpu_align(z.matmul), *rows_at = w_at + cpu_align(z.w);
  if (z.w) convert_weights(a->w, &w, w_at);
  if (z.rows) hit_pixels(x.data = rows_at, a->x, a->y->shape[1], a->y->shape[2], a->stride, false);
  if (a->residual && a->residual->data != y.data) copy_flat(ctx, y.data, a->residual->data, fd_tensor_bytes(&y));
  FD_TRY(cpu_matmul(ctx, &m));
done:
  return st;
}

static fd_status bwd_data_matmul(fd_ctx *ctx, const struct fd_conv2d_bwd_data_args *a, bool run, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  fd_tensor dy = flat(a->dy, a->w->shape[0]), w = flat(a->w, a->w->shape[1]), dx = flat(a->dx, w.shape[1]);
  struct fd_matmul_args m = {.a = &dy, .b = &w, .c = &dx, .acc = a->acc ? 1u << 4 : 0};
  struct pixel_parts z = {0, 0, 0};
  w.dtype = dy.dtype;
  dx.shape[0] = dy.shape[0];
  FD_TRY(cpu_matmul_prepare(ctx, &m, &z.matmul));
  if (w.dtype != a->w->dtype) z.w = fd_tensor_bytes(&w);
  if (a->stride > 1) z.rows = fd_tensor_bytes(&dx);
  *scratch_bytes = pixel_total(&z);
  if (!run) goto done;
  char *w_at = (char *)ctx->scratch + cpu_align(z.matmul), *rows_at = w_at + cpu_align(z.w);
  if (z.w) convert_weights(a->w, &w, w_at);
  if (z.rows) {
    dx.data = rows_at;
    if (a->acc) hit_pixels(rows_at, a->dx, a->dy->shape[1], a->dy->shape[2], a->stride, false);
    else memset(a->dx->data, 0, fd_tensor_bytes(a->dx));
  }
  FD_TRY(cpu_matmul(ctx, &m));
  if (z.rows) hit_pixels(rows_at, a->dx, a->dy->shape[1], a->dy->shape[2], a->stride, true);
done:
  return st;
}

static fd_status bwd_weights_matmul(fd_ctx *ctx, const struct fd_conv2d_bwd_weights_args *a, bool run, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  fd_tensor dy = flat(a->dy, a->dw->shape[0]), x = flat(a->x, a->dw->shape[1]), dw = flat(a->dw, a->dw->shape[1]);
  struct fd_matmul_args m = {.a = &dy, .b = &x, .c = &dw, .acc = a->acc >> 2 & 1 ? 1u << 4 : 0, .trans_a = 1};
  struct fd_colsum_args s = {.x = &dy, .y = a->dbias, .acc = a->acc >> 3 & 1 ? 1u << 2 : 0};
  struct pixel_parts z = {0, 0, 0};
  size_t more = 0;
  x.shape[0] = dy.shape[0];
  FD_TRY(cpu_matmul_prepare(ctx, &m, &z.matmul));
  if (a->dbias) FD_TRY(cpu_colsum_prepare(ctx, &s, &more));
  if (more > z.matmul) z.matmul = more;
  if (a->stride > 1) z.rows = fd_tensor_bytes(&x);
  *scratch_bytes = pixel_total(&z);
  if (!run) goto done;
  if (z.rows) hit_pixels(x.data = (char *)ctx->scratch + cpu_align(z.matmul), a->x, a->dy->shape[1], a->dy->shape[2], a->stride, false);
  FD_TRY(cpu_matmul(ctx, &m));
  if (a->dbias) FD_TRY(cpu_colsum(ctx, &s));
done:
  return st;
}

/* ---- forward --------------------------------------------------------------------------------------------------------- */

static struct conv fwd_of(bool has_bf16, const struct fd_conv2d_fwd_args *a) {
  struct conv c = conv_of(FWD, has_bf16, a->x, a->y, a->w, a->stride, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right);
  c.bias = a->bias != NULL;
  c.bias_type = a->bias && c.run == FD_BF16 ? a->bias->dtype : FD_F32;
  c.add = a->residual != NULL;
  return c;
}

static struct parts fwd_parts(const struct conv *c, const struct cpu_prim *p, const fd_tensor *w, const fd_tensor *bias) {
  struct parts z = {.prim = p->scratch_bytes};
  if (!(w->flags & FD_T_CONST)) z.w = dnnl_memory_desc_get_size(&p->md[1]);
  if (widened(c)) {
    z.x = (size_t)(c->n * c->H * c->W * c->I) * 4;
    z.y = (size_t)(c->n * c->Ho * c->Wo * c->O) * 4;
  }
  if (bias && bias->dtype != c->bias_type) z.bias = (size_t)c->O * 4;
  return z;
}

fd_status cpu_conv2d_fwd_prepare(fd_ctx *ctx, const struct fd_conv2d_fwd_args *a, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct cpu_prim *p, *r;
  CONV_CHECKS(conv2d_fwd, x, y, w);
  CPU_CHECK(conv2d_fwd, bias, !a->bias || fd_tensor_numel(a->bias) == a->w->shape[0], "[%lld]", (long long)a->w->shape[0]);
  CPU_CHECK(conv2d_fwd, residual, !a->residual || cpu_same_shape(a->residual, a->y), "the shape of y");
  if (fd_tensor_numel(a->y) == 0) return FD_OK;
  if (is_matmul(a->w, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right))
    return fwd_matmul(ctx, a, false, scratch_bytes);
  FD_TRY(cpu_dnnl(ctx, &d));
  struct conv c = fwd_of(cpu_dnnl_has_bf16(d), a);
  FD_TRY(make(d, &c, &p));
  FD_TRY(make_reorder(d, &c, &p->md[1], a->w->dtype, false, &r));
  struct parts z = fwd_parts(&c, p, a->w, a->bias);
  *scratch_bytes = parts_total(&z);
done:
  return st;
}

fd_status cpu_conv2d_fwd(fd_ctx *ctx, const struct fd_conv2d_fwd_args *a) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct cpu_prim *p;
  void *w;
  if (fd_tensor_numel(a->y) == 0) return FD_OK;
  size_t bytes;
  if (is_matmul(a->w, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right))
    return fwd_matmul(ctx, a, true, &bytes);
  FD_TRY(cpu_dnnl(ctx, &d));
  struct conv c = fwd_of(cpu_dnnl_has_bf16(d), a);
  FD_TRY(make(d, &c, &p));
  struct parts z = fwd_parts(&c, p, a->w, a->bias);
  struct places s = place(&z, ctx->scratch);
  FD_TRY(weights(d, &c, p, a->w, s.w, &w));
  void *bias = a->bias ? a->bias->data : NULL;
  if (z.bias) widen_flat(ctx, bias = s.bias, a->bias->data, c.O);
  int64_t n_x = c.n * c.H * c.W * c.I, n_y = c.n * c.Ho * c.Wo * c.O;
  size_t size = fd_dtype_bytes(c.type);
  for (int64_t b = 0; b < c.B; b += c.n) {
    char *x = (char *)a->x->data + (size_t)(b / c.n * n_x) * size, *y = (char *)a->y->data + (size_t)(b / c.n * n_y) * size;
    const char *residual = a->residual ? (char *)a->residual->data + (size_t)(b / c.n * n_y) * size : NULL;
    if (widened(&c)) {
      widen_flat(ctx, s.x, x, n_x);
      if (residual) widen_flat(ctx, s.y, residual, n_y);
      FD_TRY(cpu_prim_run(d, p, (void *[]){s.x, w, s.y, bias}, s.prim));
      finish_flat(ctx, y, c.type, s.y, false, n_y);
    } else {
      if (residual && residual != y) copy_flat(ctx, y, residual, (size_t)n_y * size);
      FD_TRY(cpu_prim_run(d, p, (void *[]){x, w, y, bias}, s.prim));
    }
  }
done:
  return st;
}

/* ---- gradient of the data -------------------------------------------------------------------------------------------- */

static struct conv bwd_data_of(bool has_bf16, const struct fd_conv2d_bwd_data_args *a) {
  struct conv c = conv_of(BWD_DATA, has_bf16, a->dx, a->dy, a->w, a->stride, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right);
  if (a->acc) c.out = FD_F32; /* added to in f32, rounded once */
  return c;
}

static struct parts bwd_data_parts(const struct conv *c, const struct cpu_prim *p, const fd_tensor *w, bool acc) {
  struct parts z = {.prim = p->scratch_bytes};
  if (!(w->flags & FD_T_CONST)) z.w = dnnl_memory_desc_get_size(&p->md[1]);
  if (widened(c)) z.y = (size_t)(c->n * c->Ho * c->Wo * c->O) * 4;
  if (widened(c) || acc) z.x = (size_t)(c->n * c->H * c->W * c->I) * 4;
  return z;
}

fd_status cpu_conv2d_bwd_data_prepare(fd_ctx *ctx, const struct fd_conv2d_bwd_data_args *a, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct cpu_prim *p, *r;
  CONV_CHECKS(conv2d_bwd_data, dx, dy, w);
  if (fd_tensor_numel(a->dx) == 0) return FD_OK;
  if (is_matmul(a->w, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right))
    return bwd_data_matmul(ctx, a, false, scratch_bytes);
  FD_TRY(cpu_dnnl(ctx, &d));
  struct conv c = bwd_data_of(cpu_dnnl_has_bf16(d), a);
  FD_TRY(make(d, &c, &p));
  FD_TRY(make_reorder(d, &c, &p->md[1], a->w->dtype, false, &r));
  struct parts z = bwd_data_parts(&c, p, a->w, a->acc != 0);
  *scratch_bytes = parts_total(&z);
done:
  return st;
}

fd_status cpu_conv2d_bwd_data(fd_ctx *ctx, const struct fd_conv2d_bwd_data_args *a) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct cpu_prim *p;
  void *w;
  if (fd_tensor_numel(a->dx) == 0) return FD_OK;
  size_t bytes;
  if (is_matmul(a->w, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right))
    return bwd_data_matmul(ctx, a, true, &bytes);
  FD_TRY(cpu_dnnl(ctx, &d));
  struct conv c = bwd_data_of(cpu_dnnl_has_bf16(d), a);
  FD_TRY(make(d, &c, &p));
  struct parts z = bwd_data_parts(&c, p, a->w, a->acc != 0);
  struct places s = place(&z, ctx->scratch);
  FD_TRY(weights(d, &c, p, a->w, s.w, &w));
  int64_t n_x = c.n * c.H * c.W * c.I, n_y = c.n * c.Ho * c.Wo * c.O;
  size_t size = fd_dtype_bytes(c.type);
  for (int64_t b = 0; b < c.B; b += c.n) {
    char *dx = (char *)a->dx->data + (size_t)(b / c.n * n_x) * size, *dy = (char *)a->dy->data + (size_t)(b / c.n * n_y) * size;
    if (widened(&c)) widen_flat(ctx, s.y, dy, n_y);
    FD_TRY(cpu_prim_run(d, p, (void *[]){z.y ? s.y : dy, w, z.x ? s.x : dx}, s.prim));
    if (z.x) finish_flat(ctx, dx, c.type, s.x, a->acc != 0, n_x);
  }
done:
  return st;
}

/* ---- gradient of the weights ----------------------------------------------------------------------------------------- */

static struct conv bwd_weights_of(bool has_bf16, const struct fd_conv2d_bwd_weights_args *a) {
  struct conv c = conv_of(BWD_WEIGHTS, has_bf16, a->x, a->dy, a->dw, a->stride, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right);
  c.bias = a->dbias != NULL;
  c.bias_type = FD_F32;
  return c;
}

static struct parts bwd_weights_parts(const struct conv *c, const struct cpu_prim *p) {
  struct parts z = {.prim = p->scratch_bytes, .w = dnnl_memory_desc_get_size(&p->md[2])};
  if (widened(c)) {
    z.x = (size_t)(c->n * c->H * c->W * c->I) * 4;
    z.y = (size_t)(c->n * c->Ho * c->Wo * c->O) * 4;
  }
  z.sum = (size_t)(c->O * c->I * c->kh * c->kw) * 4;
  z.sum_bias = c->bias ? (size_t)c->O * 4 : 0;
  return z;
}

fd_status cpu_conv2d_bwd_weights_prepare(fd_ctx *ctx, const struct fd_conv2d_bwd_weights_args *a, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct cpu_prim *p, *r;
  CONV_CHECKS(conv2d_bwd_weights, x, dy, dw);
  CPU_CHECK(conv2d_bwd_weights, dbias, !a->dbias || fd_tensor_numel(a->dbias) == a->dw->shape[0], "[%lld]", (long long)a->dw->shape[0]);
  if (fd_tensor_numel(a->x) == 0 || fd_tensor_numel(a->dy) == 0) return FD_OK;
  if (is_matmul(a->dw, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right))
    return bwd_weights_matmul(ctx, a, false, scratch_bytes);
  FD_TRY(cpu_dnnl(ctx, &d));
  struct conv c = bwd_weights_of(cpu_dnnl_has_bf16(d), a);
  FD_TRY(make(d, &c, &p));
  FD_TRY(make_reorder(d, &c, &p->md[2], FD_F32, true, &r));
  struct parts z = bwd_weights_parts(&c, p);
  *scratch_bytes = parts_total(&z);
done:
  return st;
}

fd_status cpu_conv2d_bwd_weights(fd_ctx *ctx, const struct fd_conv2d_bwd_weights_args *a) {
  fd_status st = FD_OK;
  struct cpu_dnnl *d;
  struct cpu_prim *p, *reorder;
  bool acc_w = a->acc >> 2 & 1, acc_b = a->acc >> 3 & 1;
  if (fd_tensor_numel(a->x) == 0 || fd_tensor_numel(a->dy) == 0) { /* an empty sum */
    if (!acc_w) memset(a->dw->data, 0, fd_tensor_bytes(a->dw));
    if (a->dbias && !acc_b) memset(a->dbias->data, 0, fd_tensor_bytes(a->dbias));
    return FD_OK;
  }
  size_t bytes;
  if (is_matmul(a->dw, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right))
    return bwd_weights_matmul(ctx, a, true, &bytes);
  FD_TRY(cpu_dnnl(ctx, &d));
  struct conv c = bwd_weights_of(cpu_dnnl_has_bf16(d), a);
  FD_TRY(make(d, &c, &p));
  FD_TRY(make_reorder(d, &c, &p->md[2], FD_F32, true, &reorder));
  struct parts z = bwd_weights_parts(&c, p);
  struct places s = place(&z, ctx->scratch);
  int64_t n_x = c.n * c.H * c.W * c.I, n_y = c.n * c.Ho * c.Wo * c.O, n_w = c.O * c.I * c.kh * c.kw;
  size_t size = fd_dtype_bytes(c.type);
  for (int64_t b = 0; b < c.B; b += c.n) {
    char *x = (char *)a->x->data + (size_t)(b / c.n * n_x) * size, *dy = (char *)a->dy->data + (size_t)(b / c.n * n_y) * size;
    bool add_w = acc_w || b > 0, add_b = acc_b || b > 0;
    if (widened(&c)) {
      widen_flat(ctx, s.x, x, n_x);
      widen_flat(ctx, s.y, dy, n_y);
      x = s.x, dy = s.y;
    }
    FD_TRY(cpu_prim_run(d, p, (void *[]){x, dy, s.w, a->dbias && !add_b ? a->dbias->data : s.sum_bias}, s.prim));
    FD_TRY(cpu_prim_run(d, reorder, (void *[]){s.w, add_w ? s.sum : a->dw->data}, NULL));
    if (add_w) finish_flat(ctx, a->dw->data, FD_F32, s.sum, true, n_w);
    if (a->dbias && add_b) finish_flat(ctx, a->dbias->data, FD_F32, s.sum_bias, true, c.O);
  }
done:
  return st;
}

/* ---- for the memory plan ----------------------------------------------------------------------------------------------- */

size_t cpu_conv2d_kept_bytes(fd_ctx *ctx, enum fd_op op, const void *args) {
  struct cpu_dnnl *d;
  struct cpu_prim *p = NULL;
  struct conv c;
  const fd_tensor *w;
  if (op != FD_OP_conv2d_fwd && op != FD_OP_conv2d_bwd_data) return 0;
  if (cpu_dnnl(ctx, &d) != FD_OK) return 0;
  if (op == FD_OP_conv2d_fwd) {
    const struct fd_conv2d_fwd_args *a = args;
    w = a->w;
    if (!(w->flags & FD_T_CONST) || fd_tensor_numel(a->y) == 0) return 0;
    if (is_matmul(w, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right)) return 0;
    c = fwd_of(cpu_dnnl_has_bf16(d), a);
  } else {
    const struct fd_conv2d_bwd_data_args *a = args;
    w = a->w;
    if (!(w->flags & FD_T_CONST) || fd_tensor_numel(a->dx) == 0) return 0;
    if (is_matmul(w, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right)) return 0;
    c = bwd_data_of(cpu_dnnl_has_bf16(d), a);
  }
  return make(d, &c, &p) == FD_OK ? dnnl_memory_desc_get_size(&p->md[1]) : 0;
}
