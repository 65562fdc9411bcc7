// SPDX-License-Identifier: Apache-2.0
// Convolutions. In bf16 a library does them (cuda/cudnn_conv.c) where it can; here its weights are put in order ([O, kh, kw, I]; they move once, a
// thousandth of the whole), and its gradients where they belong.
// Else as a matrix product: the patches under the kernel are laid out as rows [pixels, I kh kw] (the order of the stored weights), a few
// pictures at a time. Writing and reading the rows moves kh kw times the input, which is what bounds it: about a third of the matrix peak expected
// for 128 channels, more for 512. 1x1 kernels need no rows.
#include "cuda/device.cuh"
#include "cuda/library.h"

namespace {

enum { BLOCK = 256 };
const size_t MOST_ROWS_BYTES = (size_t)256 << 20;

struct geometry {
  int64_t H, W, I, Ho, Wo, kh, kw;
  int stride, top, left;
};

/* rows[p, (i ky kx)] = x at the pixel that kernel element (ky, kx) of output pixel p reads, 0 outside */
template <class T> __global__ void conv_rows(const T *x, T *rows, geometry g, int64_t n) {
  const int64_t K = g.I * g.kh * g.kw;
  for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < n; e += (int64_t)BLOCK * gridDim.x) {
    const int64_t p = e / K, k = e % K, i = k / (g.kh * g.kw), ky = k / g.kw % g.kh, kx = k % g.kw;
    const int64_t b = p / (g.Ho * g.Wo), y = p / g.Wo % g.Ho * g.stride + ky - g.top, w = p % g.Wo * g.stride + kx - g.left;
    rows[e] = y >= 0 && y < g.H && w >= 0 && w < g.W ? x[((b * g.H + y) * g.W + w) * g.I + i] : (T)0;
  }
}

/* dx = sum over the kernel elements that read a pixel: a gather, so that the order is fixed; rows are f32, so that dx is rounded once */
template <class T> __global__ void conv_gather(const float *rows, T *dx, bool acc, geometry g, int64_t n) {
  const int64_t K = g.I * g.kh * g.kw;
  for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < n; e += (int64_t)BLOCK * gridDim.x) {
    const int64_t i = e % g.I, w = e / g.I % g.W, y = e / (g.I * g.W) % g.H, b = e / (g.I * g.W * g.H);
    float sum = acc ? fd::load(dx + e) : 0.0f;
    for (int64_t ky = 0; ky < g.kh; ky++)
      for (int64_t kx = 0; kx < g.kw; kx++) {
        const int64_t oy = y + g.top - ky, ox = w + g.left - kx;
        if (oy < 0 || ox < 0 || oy % g.stride || ox % g.stride || oy / g.stride >= g.Ho || ox / g.stride >= g.Wo) continue;
        sum += fd::load(rows + ((b * g.Ho + oy / g.stride) * g.Wo + ox / g.stride) * K + (i * g.kh + ky) * g.kw + kx);
      }
    fd::store(dx + e, sum);
  }
}

/* out[o, (ky kx), i] = w[o, i, (ky kx)], rounded to bf16; a bias is one row */
__global__ void conv_weights_to_library(const void *w, int w_bf16, fd::bf16 *out, int64_t I, int64_t sides, int64_t n) {
  for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < n; e += (int64_t)BLOCK * gridDim.x) {
    const int64_t i = e % I, side = e / I % sides, o = e / (I * sides);
    fd::store(out + e, fd::load_any(w, w_bf16, (o * I + i) * sides + side));
  }
}

/* dw[o, i, (ky kx)] = (dw +) from[o, (ky kx), i] */
__global__ void conv_weights_from_library(const float *from, float *dw, bool acc, int64_t I, int64_t sides, int64_t n) {
  for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < n; e += (int64_t)BLOCK * gridDim.x) {
    const int64_t side = e % sides, i = e / sides % I, o = e / (I * sides);
    const float v = from[(o * sides + side) * I + i];
    dw[e] = acc ? dw[e] + v : v;
  }
}

/* One convolution cut into chunks of pictures. */
struct plan {
  geometry g;
  int64_t B, chunk, K, O;
  bool direct; /* 1x1, stride 1, no padding: x itself has the rows */
  size_t rows_bytes;
  size_t weights_bytes; /* behind the rows: a copy of the weights in x's type, where theirs is another */
};

plan plan_of(const fd_tensor *x, const fd_tensor *y, const fd_tensor *w, int stride, int top, int left) {
  plan p;
  p.g = geometry{x->shape[1], x->shape[2], x->shape[3], y->shape[1], y->shape[2], w->shape[2], w->shape[3], stride, top, left};
  p.B = x->shape[0];
  p.O = w->shape[0];
  p.K = p.g.I * p.g.kh * p.g.kw;
  p.direct = p.g.kh == 1 && p.g.kw == 1 && stride == 1 && top == 0 && left == 0 && p.g.Ho == p.g.H && p.g.Wo == p.g.W;
  const size_t one = (size_t)(p.g.Ho * p.g.Wo * p.K) * fd_dtype_bytes(x->dtype);
  p.chunk = one ? (int64_t)(MOST_ROWS_BYTES / one) : p.B;
  if (p.chunk < 1) p.chunk = 1;
  if (p.chunk > p.B) p.chunk = p.B;
  p.rows_bytes = p.direct ? 0 : fd_cuda_aligned(one * (size_t)p.chunk);
  p.weights_bytes = w->dtype == x->dtype ? 0 : fd_cuda_aligned((size_t)(p.O * p.K) * fd_dtype_bytes(x->dtype));
  return p;
}

/* Of the data's gradient: the product writes rows in fp32, which are then gathered. */
plan data_plan_of(const struct fd_conv2d_bwd_data_args *a) {
  plan p = plan_of(a->dx, a->dy, a->w, a->stride, a->pad_top, a->pad_left);
  p.direct = false;
  p.rows_bytes = fd_cuda_aligned((size_t)(p.chunk * p.g.Ho * p.g.Wo * p.K) * sizeof(float));
  return p;
}

/* The weights in the type of x; `copy` is filled when they are not. */
fd_status weights_of(fd_ctx *ctx, const plan &p, const fd_tensor *w, fd_dtype dtype, fd_tensor *copy) {
  *copy = *w;
  if (!p.weights_bytes) return FD_OK;
  copy->dtype = dtype;
  copy->data = (char *)ctx->scratch + p.rows_bytes;
  struct fd_cast_args cast = {};
  cast.x = (fd_tensor *)w, cast.y = copy;
  return cuda_cast(ctx, &cast);
}

fd_tensor matrix(void *data, int64_t rows, int64_t cols, fd_dtype dtype) {
  fd_tensor t = {};
  t.data = data;
  t.ndim = 2;
  t.shape[0] = rows;
  t.shape[1] = cols;
  t.dtype = dtype;
  return t;
}

void *at(const fd_tensor *t, int64_t element) { return (char *)t->data + (size_t)element * fd_dtype_bytes(t->dtype); }

/* The matrix product of n pictures: forward, data or weights. `rows` may be NULL while planning. */
struct product {
  fd_tensor a, b, c, bias;
  struct fd_matmul_args args;
};

enum what { FORWARD, DATA, WEIGHTS };

void product_of(product *m, enum what what, const plan &p, int64_t n, void *rows, const fd_tensor *y, void *y_at, const fd_tensor *w,
                const fd_tensor *bias, unsigned acc) {
  const int64_t pixels = n * p.g.Ho * p.g.Wo;
  const fd_tensor r = matrix(rows, pixels, p.K, what == DATA ? FD_F32 : y->dtype), ym = matrix(y_at, pixels, p.O, y->dtype);
  const fd_tensor wm = matrix(w->data, p.O, p.K, w->dtype);
  *m = product{};
  m->args.acc = acc;
  if (what == FORWARD) {
    m->a = r, m->b = wm, m->c = ym;
    m->args.trans_b = 1;
    if (bias) m->bias = *bias;
  } else if (what == DATA) {
    m->a = ym, m->b = wm, m->c = r;
  } else {
    m->a = ym, m->b = r, m->c = wm;
    m->args.trans_a = 1;
  }
  m->args.a = &m->a, m->args.b = &m->b, m->args.c = &m->c;
  m->args.bias = what == FORWARD && bias ? &m->bias : NULL;
}

fd_status prepare(fd_ctx *ctx, enum what what, const plan &p, const fd_tensor *y, const fd_tensor *w, const fd_tensor *bias, size_t *scratch) {
  size_t most = 0;
  const int64_t rest = p.chunk ? p.B % p.chunk : 0;
  for (int last = 0; last < 2; last++) {
    const int64_t n = last ? rest : p.chunk;
    for (unsigned acc = 0; acc < 2 && n > 0; acc++) {
      product m;
      size_t bytes;
      product_of(&m, what, p, n, NULL, y, NULL, w, bias, acc ? 16u : 0u);
      fd_status st = cuda_matmul_prepare(ctx, FD_OP_matmul, &m.args, &bytes);
      if (st != FD_OK) return st;
      if (bytes > most) most = bytes;
    }
  }
  *scratch = p.rows_bytes + p.weights_bytes + most;
  return FD_OK;
}

template <class T> fd_status make_rows(fd_ctx *ctx, const plan &p, const T *x, T *rows, int64_t n) {
  const int64_t count = n * p.g.Ho * p.g.Wo * p.K;
  if (count == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(conv_rows<T>, fd::stride_blocks(ctx, count, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), x, rows, p.g, count));
}

/* The product may use the scratch behind the rows. */
fd_status multiply(fd_ctx *ctx, const plan &p, const product *m) {
  fd_ctx inner = *ctx;
  inner.scratch = (char *)ctx->scratch + p.rows_bytes + p.weights_bytes;
  inner.scratch_bytes = ctx->scratch_bytes - p.rows_bytes - p.weights_bytes;
  return cuda_matmul(&inner, &m->args);
}

fd_status rows_of(fd_ctx *ctx, const plan &p, const fd_tensor *x, int64_t first, int64_t n, void **rows) {
  void *from = at(x, first * p.g.H * p.g.W * p.g.I);
  *rows = p.direct ? from : ctx->scratch;
  if (p.direct) return FD_OK;
  return x->dtype == FD_BF16 ? make_rows(ctx, p, (const fd::bf16 *)from, (fd::bf16 *)*rows, n) : make_rows(ctx, p, (const float *)from, (float *)*rows, n);
}

template <class T> fd_status gather(fd_ctx *ctx, const plan &p, const float *rows, T *dx, bool acc, int64_t n) {
  const int64_t count = n * p.g.H * p.g.W * p.g.I;
  if (count == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(conv_gather<T>, fd::stride_blocks(ctx, count, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), rows, dx, acc, p.g, count));
}

/* ---- by a library ------------------------------------------------------------------------------------------------ */

/* One convolution for the library, and how scratch is cut for it: weights in its order, bias in bf16, x's gradient before it is added, its own. */
struct job {
  struct fd_cuda_conv c;
  bool acc;
  size_t weights, bias, sum, own;
};

size_t bytes_of(const job &j) { return j.weights + j.bias + j.sum + j.own; }

/* x, w, y: those that are read, or their gradients. *found = 0: not a case for a library. */
template <class Args>
fd_status job_of(fd_ctx *ctx, fd_cuda_conv_op op, const Args *a, const fd_tensor *x, const fd_tensor *w, const fd_tensor *y, const fd_tensor *bias,
                 const fd_tensor *residual, bool acc, int *found, job *j) {
  const int64_t sides = w->shape[2] * w->shape[3];
  *j = job{};
  *found = 0;
  if (x->dtype != FD_BF16 || y->dtype != FD_BF16 || fd_tensor_numel(x) == 0 || fd_tensor_numel(y) == 0 || fd_tensor_numel(w) == 0) return FD_OK;
  struct fd_cuda_conv *c = &j->c;
  c->op = op, c->B = x->shape[0], c->H = x->shape[1], c->W = x->shape[2], c->I = x->shape[3], c->Ho = y->shape[1], c->Wo = y->shape[2];
  c->O = w->shape[0], c->kh = w->shape[2], c->kw = w->shape[3];
  c->stride = a->stride, c->top = a->pad_top, c->left = a->pad_left, c->bottom = a->pad_bottom, c->right = a->pad_right;
  c->has_bias = bias != NULL, c->has_residual = residual != NULL;
  c->x = x->data, c->w = w->data, c->y = y->data, c->bias = fd::data(bias), c->residual = fd::data(residual);
  j->acc = acc;
  if (op == FD_CUDA_CONV_WEIGHTS ? sides > 1 || acc : sides > 1 || w->dtype != FD_BF16)
    j->weights = fd_cuda_aligned((size_t)fd_tensor_numel(w) * (op == FD_CUDA_CONV_WEIGHTS ? sizeof(float) : sizeof(fd::bf16)));
  if (bias && bias->dtype != FD_BF16) j->bias = fd_cuda_aligned((size_t)c->O * sizeof(fd::bf16));
  c->f32_data = op == FD_CUDA_CONV_DATA && acc; /* the sum with what is there is rounded once */
  if (c->f32_data) j->sum = fd_cuda_aligned((size_t)fd_tensor_numel(x) * sizeof(float));
  return fd_cuda_conv_prepare(ctx, c, found, &j->own);
}

fd_status job_of(fd_ctx *ctx, const struct fd_conv2d_fwd_args *a, int *found, job *j) {
  return job_of(ctx, FD_CUDA_CONV_FORWARD, a, a->x, a->w, a->y, a->bias, a->residual, false, found, j);
}
fd_status job_of(fd_ctx *ctx, const struct fd_conv2d_bwd_data_args *a, int *found, job *j) {
  return job_of(ctx, FD_CUDA_CONV_DATA, a, a->dx, a->w, a->dy, NULL, NULL, (a->acc >> 2 & 1) != 0, found, j);
}
fd_status job_of(fd_ctx *ctx, const struct fd_conv2d_bwd_weights_args *a, int *found, job *j) {
  return job_of(ctx, FD_CUDA_CONV_WEIGHTS, a, a->x, a->dw, a->dy, NULL, NULL, (a->acc >> 2 & 1) != 0, found, j);
}

fd_status to_library(fd_ctx *ctx, const fd_tensor *w, void *out, int64_t I, int64_t sides) {
  const int64_t n = fd_tensor_numel(w);
  return FD_CUDA(FD_LAUNCH(conv_weights_to_library, fd::stride_blocks(ctx, n, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const void *)w->data,
                           fd::is_bf16(w), (fd::bf16 *)out, I, sides, n));
}

fd_status run_job(fd_ctx *ctx, job *j, const fd_tensor *x, const fd_tensor *w, const fd_tensor *bias) {
  struct fd_cuda_conv *c = &j->c;
  const int64_t n = fd_tensor_numel(w), sides = c->kh * c->kw;
  char *scratch = (char *)ctx->scratch;
  fd_status st = FD_OK;
  if (j->weights) c->w = scratch;
  if (j->bias) c->bias = scratch + j->weights;
  if (j->sum) c->x = scratch + j->weights + j->bias;
  if (j->weights && c->op != FD_CUDA_CONV_WEIGHTS) st = to_library(ctx, w, c->w, c->I, sides);
  if (st == FD_OK && j->bias) st = to_library(ctx, bias, (void *)c->bias, c->O, 1);
  if (st == FD_OK) st = fd_cuda_conv(ctx, c, scratch + j->weights + j->bias + j->sum);
  if (st == FD_OK && j->weights && c->op == FD_CUDA_CONV_WEIGHTS)
    st = FD_CUDA(FD_LAUNCH(conv_weights_from_library, fd::stride_blocks(ctx, n, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const float *)c->w,
                           (float *)w->data, j->acc, c->I, sides, n));
  if (st == FD_OK && j->sum) {
    fd_tensor from = *x;
    from.data = c->x, from.dtype = FD_F32;
    struct fd_cast_args add = {};
    add.x = &from, add.y = (fd_tensor *)x, add.acc = 1u << 1;
    st = cuda_cast(ctx, &add);
  }
  return st;
}

fd_status check(enum fd_op op, const fd_tensor *x, const fd_tensor *w, const fd_tensor *y, const char *wname, const char *yname, int stride, int top, int left, int bottom, int right) {
  if (x->ndim != 4) return fd_op_wrong_slot(op, "x", x, "[B, H, W, I]");
  if (y->ndim != 4) return fd_op_wrong_slot(op, yname, y, "[B, Ho, Wo, O]");
  if (w->ndim != 4 || w->shape[1] != x->shape[3]) return fd_op_wrong_slot(op, wname, w, "[O, %lld, kh, kw]", (long long)x->shape[3]);
  if (stride < 1 || top < 0 || left < 0 || bottom < 0 || right < 0) return fd_op_wrong_arg(op, "stride %d, padding %d %d %d %d", stride, top, left, bottom, right);
  const int64_t Ho = (x->shape[1] + top + bottom - w->shape[2]) / stride + 1, Wo = (x->shape[2] + left + right - w->shape[3]) / stride + 1;
  if (y->shape[0] != x->shape[0] || y->shape[1] != Ho || y->shape[2] != Wo || y->shape[3] != w->shape[0])
    return fd_op_wrong_slot(op, yname, y, "[%lld, %lld, %lld, %lld]", (long long)x->shape[0], (long long)Ho, (long long)Wo, (long long)w->shape[0]);
  return FD_OK;
}

}  // namespace

/* The part of prepare that asks the library, whose args are checked. */
extern "C" fd_status cuda_conv2d_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, int *found, size_t *scratch) {
  job j;
  fd_status st;
  if (op == FD_OP_conv2d_fwd)
    st = job_of(ctx, (const struct fd_conv2d_fwd_args *)args, found, &j);
  else if (op == FD_OP_conv2d_bwd_data)
    st = job_of(ctx, (const struct fd_conv2d_bwd_data_args *)args, found, &j);
  else
    st = job_of(ctx, (const struct fd_conv2d_bwd_weights_args *)args, found, &j);
  if (*found) *scratch = bytes_of(j);
  return st;
}

extern "C" fd_status cuda_conv2d_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch) {
  fd_status st;
  int found = 0;
  *scratch = 0;
  if (op == FD_OP_conv2d_fwd) {
    const struct fd_conv2d_fwd_args *a = (const struct fd_conv2d_fwd_args *)args;
    st = check(op, a->x, a->w, a->y, "w", "y", a->stride, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right);
    if (st == FD_OK && a->bias && fd_tensor_numel(a->bias) != a->w->shape[0])
      st = fd_op_wrong_slot(op, "bias", a->bias, "[%lld]", (long long)a->w->shape[0]);
    if (st == FD_OK && a->residual && fd_tensor_numel(a->residual) != fd_tensor_numel(a->y)) st = fd_op_wrong_slot(op, "residual", a->residual, "as y");
    if (st == FD_OK) st = cuda_conv2d_library_prepare(ctx, op, args, &found, scratch);
    if (found) return st;
    fd_tensor w = *a->w;
    w.dtype = a->x->dtype;
    return st == FD_OK ? prepare(ctx, FORWARD, plan_of(a->x, a->y, a->w, a->stride, a->pad_top, a->pad_left), a->y, &w, a->bias, scratch) : st;
  }
  if (op == FD_OP_conv2d_bwd_data) {
    const struct fd_conv2d_bwd_data_args *a = (const struct fd_conv2d_bwd_data_args *)args;
    st = check(op, a->dx, a->w, a->dy, "w", "dy", a->stride, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right);
    if (st == FD_OK) st = cuda_conv2d_library_prepare(ctx, op, args, &found, scratch);
    if (st != FD_OK || found) return st;
    fd_tensor w = *a->w;
    w.dtype = a->dx->dtype;
    return prepare(ctx, DATA, data_plan_of(a), a->dy, &w, NULL, scratch);
  }
  const struct fd_conv2d_bwd_weights_args *a = (const struct fd_conv2d_bwd_weights_args *)args;
  st = check(op, a->x, a->dw, a->dy, "dw", "dy", a->stride, a->pad_top, a->pad_left, a->pad_bottom, a->pad_right);
  if (st == FD_OK) st = cuda_conv2d_library_prepare(ctx, op, args, &found, scratch);
  if (st == FD_OK && !found) st = prepare(ctx, WEIGHTS, plan_of(a->x, a->dy, a->dw, a->stride, a->pad_top, a->pad_left), a->dy, a->dw, NULL, scratch);
  if (st == FD_OK && a->dbias) {
    struct fd_colsum_args sum = {};
    size_t bytes;
    sum.x = a->dy, sum.y = a->dbias;
    st = ctx->backend->prepare(ctx, FD_OP_colsum, &sum, &bytes);
    if (bytes > *scratch) *scratch = bytes;
  }
  return st;
}

extern "C" fd_status cuda_conv2d_fwd(fd_ctx *ctx, const struct fd_conv2d_fwd_args *a) {
  int found;
  job j;
  fd_status st = job_of(ctx, a, &found, &j);
  if (st != FD_OK) return st;
  if (found) return run_job(ctx, &j, a->x, a->w, a->bias);
  const plan p = plan_of(a->x, a->y, a->w, a->stride, a->pad_top, a->pad_left);
  fd_tensor w;
  st = weights_of(ctx, p, a->w, a->x->dtype, &w);
  if (st == FD_OK && a->residual) { /* first, so that the sum is rounded once */
    struct fd_cast_args cast = {};
    cast.x = a->residual, cast.y = a->y;
    st = cuda_cast(ctx, &cast);
  }
  for (int64_t b = 0; b < p.B && st == FD_OK; b += p.chunk) {
    const int64_t n = p.chunk < p.B - b ? p.chunk : p.B - b;
    void *rows;
    product m;
    st = rows_of(ctx, p, a->x, b, n, &rows);
    product_of(&m, FORWARD, p, n, rows, a->y, at(a->y, b * p.g.Ho * p.g.Wo * p.O), &w, a->bias, a->residual ? 16u : 0u);
    if (st == FD_OK) st = multiply(ctx, p, &m);
  }
  return st;
}

extern "C" fd_status cuda_conv2d_bwd_data(fd_ctx *ctx, const struct fd_conv2d_bwd_data_args *a) {
  const bool acc = (a->acc >> 2 & 1) != 0;
  int found;
  job j;
  fd_status st = job_of(ctx, a, &found, &j);
  if (st != FD_OK) return st;
  if (found) return run_job(ctx, &j, a->dx, a->w, NULL);
  const plan p = data_plan_of(a);
  fd_tensor w;
  st = weights_of(ctx, p, a->w, a->dx->dtype, &w);
  for (int64_t b = 0; b < p.B && st == FD_OK; b += p.chunk) {
    const int64_t n = p.chunk < p.B - b ? p.chunk : p.B - b;
    void *dx = at(a->dx, b * p.g.H * p.g.W * p.g.I);
    product m;
    product_of(&m, DATA, p, n, ctx->scratch, a->dy, at(a->dy, b * p.g.Ho * p.g.Wo * p.O), &w, NULL, 0);
    st = multiply(ctx, p, &m);
    if (st == FD_OK)
      st = a->dx->dtype == FD_BF16 ? gather(ctx, p, (const float *)ctx->scratch, (fd::bf16 *)dx, acc, n)
                                   : gather(ctx, p, (const float *)ctx->scratch, (float *)dx, acc, n);
  }
  return st;
}

/* dw as a matrix product */
static fd_status multiply_weights(fd_ctx *ctx, const struct fd_conv2d_bwd_weights_args *a) {
  plan p = plan_of(a->x, a->dy, a->dw, a->stride, a->pad_top, a->pad_left);
  fd_status st = FD_OK;
  p.weights_bytes = 0; /* dw is written, not read */
  if (fd_tensor_numel(a->dy) == 0 && !(a->acc >> 2 & 1)) st = FD_CUDA(cudaMemsetAsync(a->dw->data, 0, fd_tensor_bytes(a->dw), fd_cuda_stream(ctx)));
  for (int64_t b = 0; b < p.B && st == FD_OK; b += p.chunk) {
    const int64_t n = p.chunk < p.B - b ? p.chunk : p.B - b;
    const bool acc = b > 0 || (a->acc >> 2 & 1);
    void *rows;
    product m;
    st = rows_of(ctx, p, a->x, b, n, &rows);
    product_of(&m, WEIGHTS, p, n, rows, a->dy, at(a->dy, b * p.g.Ho * p.g.Wo * p.O), a->dw, NULL, acc ? 16u : 0u);
    if (st == FD_OK) st = multiply(ctx, p, &m);
  }
  return st;
}

extern "C" fd_status cuda_conv2d_bwd_weights(fd_ctx *ctx, const struct fd_conv2d_bwd_weights_args *a) {
  int found;
  job j;
  fd_status st = job_of(ctx, a, &found, &j);
  if (st == FD_OK) st = found ? run_job(ctx, &j, a->x, a->dw, NULL) : multiply_weights(ctx, a);
  if (st == FD_OK && a->dbias) {
    struct fd_colsum_args sum = {};
    sum.x = a->dy, sum.y = a->dbias;
    sum.acc = a->acc >> 3 & 1 ? 4u : 0u;
    st = cuda_colsum(ctx, &sum);
  }
  return st;
}
