// SPDX-License-Identifier: Apache-2.0
// The contract of every op, once, for every backend.
//
// Each op is (ctx, const struct fd_<op>_args *). An args struct begins with its tensor slots, in the order of ops.def,
// then `acc`; the graph fills both by position, so that order is part of the contract (checked by static asserts
// in ops.c). What changes between steps (counts, lengths, learning rate, keys) is the content of a tensor.
//
// Common to all, not repeated below:
//  - Local, asynchronous on the context's stream, deterministic for one number of threads.
//  - Activations (x, y, dx, ...) are f32 or bf16, the same type within one call unless said otherwise; sums, norms,
//    softmax and exponentials are formed in f32. Weights, biases and norm weights are f32 or bf16, on their own.
//  - Gradients of weights (dw, dbias, dq_norm, ...) are f32. Gradients of activations have the activation's type.
//  - acc: bit s set means slot s is added to. Allowed for every `o` slot of matmul, colsum and all *_bwd ops.
//  - count: i32 [1], rows in use out of the capacity that the shape gives; 0 <= count <= rows. Rows beyond it are
//    neither read nor written. NULL: all rows. (With graph capture the count is rounded up to a tile by its writer.)
//  - 0 rows is a no-op (with acc clear, an output that is a sum over rows is set to 0).
//  - Outputs may not alias inputs unless said.
//  - Wrong shapes or types: FD_ERR_ARG naming op, slot and what was found. Checked when the graph is prepared.
//  - Scratch: what fd_backend.scratch_bytes asks for this op and these shapes is at ctx->scratch during the call.
//
// Letters: B batch, C channels, H W latent, P patch, N image tokens per sample, T packed text rows (capacity),
// L text capacity per sample, D width, A heads, K kv heads, E head dim, F mlp, R rows of any kind.
#ifndef FD_OP_OPS_H
#define FD_OP_OPS_H

#include "base/status.h"
#include "op/tensor.h"

struct fd_ctx;
typedef struct fd_ctx fd_ctx;

enum fd_op {
#define X(name, slots) FD_OP_##name,
#include "op/ops.def"
#undef X
  FD_OP_COUNT
};

#define FD_MAX_SLOTS 20

/** Activation functions (reference: torch.nn.functional).
 *  gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), gelu_erf the exact form, silu x sigmoid(x). */
enum fd_act { FD_ACT_NONE = 0, FD_ACT_SILU, FD_ACT_GELU_TANH, FD_ACT_GELU_ERF };

/** c = op(a) op(b) + bias: matrices as stored, row-major.
 *    a      in   [M, K], or [K, M] if trans_a     f32 | bf16
 *    b      in   [K, N], or [N, K] if trans_b     f32 | bf16, as a (weights are stored [out, in]: trans_b)
 *    bias   in   [N]
 *    count       stored rows of a in use: M, or K if trans_a (then rows of b too)
 *    c      out  [M, N]                           as a, or f32 (weight gradients)
 *  More than two dimensions are read as [rows, cols]. Sums in f32. acc allowed: c += op(a) op(b).
 *  Linear layer: y = matmul(x, w, trans_b); dx = matmul(dy, w); dw = matmul(dy, x, trans_a). */
struct fd_matmul_args {
  fd_tensor *a, *b, *bias, *count, *c;
  unsigned acc;
  int trans_a, trans_b;
};

/** y[c] = sum over rows r of x[r, c]: gradient of a bias, or of what was broadcast over rows.
 *    x in [R, n] (any leading shape; n = numel(y));  y out [n] f32.  Rows are added in a fixed order. acc allowed. */
struct fd_colsum_args {
  fd_tensor *x, *count, *y;
  unsigned acc;
};

/** z = x + y, y repeated along the leading dimensions of x (numel(y) divides numel(x); y f32 or as x). z may alias x. */
struct fd_add_fwd_args {
  fd_tensor *x, *y, *count, *z;
  unsigned acc;
};

/** y = act(x). y may alias x. */
struct fd_act_fwd_args {
  fd_tensor *x, *count, *y;
  unsigned acc;
  enum fd_act act;
};

/** dx = dy act'(x). dx may alias dy. */
struct fd_act_bwd_args {
  fd_tensor *dy, *x, *count, *dx;
  unsigned acc;
  enum fd_act act;
};

/** y = act(gate) * up.   gate_up in [R, 2F], gate in columns 0..F-1, up in F..2F-1;  y out [R, F]. */
struct fd_geglu_fwd_args {
  fd_tensor *gate_up, *count, *y;
  unsigned acc;
  enum fd_act act;
};
struct fd_geglu_bwd_args {
  fd_tensor *dy, *gate_up, *count, *dgate_up;
  unsigned acc;
  enum fd_act act;
};

/** n = x rstd (1 + w), rstd = 1/sqrt(mean(x^2) + eps) per row (Gemma form: the stored weight is offset by one);
 *  y = n (1 + scale) + shift, where scale and shift are columns of mod.
 *    x     in   [R, D]
 *    w     in   [D]
 *    mod   in   [R / rows_per_mod, S]  row r uses mod row r / rows_per_mod; NULL: y = n
 *    y     out  [R, D]  as x, or bf16 of an f32 x
 *    rstd  out  [R]  f32
 *  shift_col, scale_col: first column in mod of each vector of D, or -1 for none. */
struct fd_rmsnorm_fwd_args {
  fd_tensor *x, *w, *mod, *count, *y, *rstd;
  unsigned acc;
  float eps;
  int64_t rows_per_mod;
  int64_t shift_col, scale_col;
};
/** dw [D] f32; dmod [R / rows_per_mod, S] as mod: only its shift and scale columns are touched (so it is always in acc,
 *  from zeros). dx in acc is the usual case: the residual stream feeds the norm and the sum. dx may alias dy. */
struct fd_rmsnorm_bwd_args {
  fd_tensor *dy, *x, *w, *rstd, *mod, *count, *dx, *dw, *dmod;
  unsigned acc;
  float eps;
  int64_t rows_per_mod;
  int64_t shift_col, scale_col;
};

/** y = x + gate a, gate = columns gate_col .. gate_col + D - 1 of mod [R / rows_per_mod, S]; mod NULL: gate 1. y may alias x.
 *  x and y of one type, a of it too, or bf16. */
struct fd_gate_residual_fwd_args {
  fd_tensor *x, *a, *mod, *count, *y;
  unsigned acc;
  int64_t rows_per_mod;
  int64_t gate_col;
};
/** da = gate dy; dmod columns += sum over the sample's rows of a dy (always in acc). The gradient of x is dy itself. */
struct fd_gate_residual_bwd_args {
  fd_tensor *dy, *a, *mod, *count, *da, *dmod;
  unsigned acc;
  int64_t rows_per_mod;
  int64_t gate_col;
};

/** From the joint projection to what attention reads: split into heads, norm of q and k over E, rotation, and the text's
 *  keys and values put behind the image's.
 *    qkv      in   [B N, (A + 2K) E]   per row: q (A heads), k (K heads), v (K heads)
 *    text_kv  in   [T, 2 K E]          packed text rows: k (K heads), v (K heads); NULL: no text
 *    q_norm   in   [E], k_norm in [E]  y = x rstd (1 + w) per head; NULL: no norm. k_norm applies to text keys too.
 *    rope     in   [positions, E] f32  cos of the E/2 angles, then their sin; NULL: no rotation. Image rows only:
 *                                      (x_i, x_{i+E/2}) -> (x_i c - x_{i+E/2} s, x_{i+E/2} c + x_i s), after the norm
 *    pos      in   i32 [B N]           row of `rope` for each row of qkv; NULL: row r uses r mod N
 *    text     in   i32 [B, 2]          first packed row and number of rows of each sample, number <= L
 *    count         rows of qkv in use (B = 1: packed text of a language model)
 *    q        out  [B N, A, E]
 *    k, v     out  [B (N + L), K, E]   sample b: rows b (N + L) .. : N image rows, then its text rows; rows beyond
 *                                      belong to nobody: a backend leaves them or sets them to 0. Without text L = 0.
 *    q_rstd   out  [B N, A] f32,  k_rstd out [B (N + L), K] f32 (with norms)  */
struct fd_heads_fwd_args {
  fd_tensor *qkv, *text_kv, *q_norm, *k_norm, *rope, *pos, *text, *count, *q, *k, *v, *q_rstd, *k_rstd;
  unsigned acc;
  int64_t B, N, L;
  int A, K, E;
  float eps;
};
/** dtext_kv: rows that no sample names are set to 0. dq_norm, dk_norm [E] f32. Reads dk, dv only where k, v were written. */
struct fd_heads_bwd_args {
  fd_tensor *dq, *dk, *dv, *qkv, *text_kv, *q_norm, *k_norm, *rope, *pos, *text, *count, *q_rstd, *k_rstd;
  fd_tensor *dqkv, *dtext_kv, *dq_norm, *dk_norm;
  unsigned acc;
  int64_t B, N, L;
  int A, K, E;
  float eps;
};

/** o = softmax(scale q k^T) v over ranges of rows, without a [Tq, Tk] matrix in memory (Dao et al. 2022).
 *    q       in   [Tq, A, E]
 *    k, v    in   [Tk, K, E]     query head a reads kv head a / (A / K)
 *    ranges  in   i32 [S, 4]     per sequence: first row of q, rows of q, first row of k, rows of k (may be 0 rows)
 *    o       out  [Tq, A, E]     only rows inside ranges; a query with no key gives 0
 *    lse     out  [Tq, A] f32    log of the sum of exponentials of the scaled scores. The CPU's order is this; another backend's
 *                                may differ where q_stride is given, since only its own attention_bwd reads it
 *  causal: query i of a sequence sees keys j <= i. window > 0: and i - j < window.
 *  softcap > 0: scores become softcap tanh(score / softcap), after the scale.
 *  max_q, max_k: most rows of one sequence (for scratch and plans).
 *  q_stride, k_stride: 0, or a promise that sequence s is the q_stride rows of q from row s q_stride on, and begins at row s k_stride of
 *  k and v with at least one key: a batch as libraries know it. Both or none. Rows of k and v between a sequence's end and the next one's
 *  beginning must then be finite, since a library may multiply them by 0; the same rows of dk and dv may be overwritten. */
struct fd_attention_fwd_args {
  fd_tensor *q, *k, *v, *ranges, *o, *lse;
  unsigned acc;
  int A, K, E;
  float scale;
  int causal;
  int64_t window;
  float softcap;
  int64_t max_q, max_k;
  int64_t q_stride, k_stride;
};
/** dq, dk, dv: only rows inside ranges (but see k_stride above); each row of q (of k) belongs to at most one range. `do` is d_o in C. */
struct fd_attention_bwd_args {
  fd_tensor *d_o, *q, *k, *v, *o, *lse, *ranges, *dq, *dk, *dv;
  unsigned acc;
  int A, K, E;
  float scale;
  int causal;
  int64_t window;
  float softcap;
  int64_t max_q, max_k;
  int64_t q_stride, k_stride;
};

/** y[r] = table[ids[r]] * scale.   ids i32 [R], table [V, D], y [R, D] (f32 or bf16). An id outside 0..V-1: FD_ERR_ARG on
 *  the CPU; the writer of ids checks them for every backend. */
struct fd_embed_fwd_args {
  fd_tensor *ids, *table, *count, *y;
  unsigned acc;
  float scale;
  int64_t padding_idx; /* for the backward only: -1, or the row that is not trained */
};
/** dtable[ids[r]] += scale dy[r], f32, rows in order; ids equal to padding_idx (>= 0) give nothing. */
struct fd_embed_bwd_args {
  fd_tensor *dy, *ids, *count, *dtable;
  unsigned acc;
  float scale;
  int64_t padding_idx;
};

/** y = conv(x, w) + bias + residual, NHWC, zero padding. w and bias of a wider type than x may be rounded to x's first.
 *    x  in  [B, H, W, I]   w in [O, I, kh, kw] (as PyTorch stores it)   bias in [O]   residual in, as y
 *    y  out [B, Ho, Wo, O], Ho = (H + pad_top + pad_bottom - kh) / stride + 1 */
struct fd_conv2d_fwd_args {
  fd_tensor *x, *w, *bias, *residual, *y;
  unsigned acc;
  int stride, pad_top, pad_left, pad_bottom, pad_right;
};
struct fd_conv2d_bwd_data_args {
  fd_tensor *dy, *w, *dx;
  unsigned acc;
  int stride, pad_top, pad_left, pad_bottom, pad_right;
};
/** dw [O, I, kh, kw] f32, dbias [O] f32. */
struct fd_conv2d_bwd_weights_args {
  fd_tensor *dy, *x, *dw, *dbias;
  unsigned acc;
  int stride, pad_top, pad_left, pad_bottom, pad_right;
};

/** GroupNorm over (H W, C / groups), biased variance, affine per channel, then act (none or silu).
 *    x in [B, H, W, C] or [B, HW, C];  w, b in [C];  y out, as x;  stats out [B, groups, 2] f32: mean, 1/sqrt(var + eps) */
struct fd_groupnorm_fwd_args {
  fd_tensor *x, *w, *b, *y, *stats;
  unsigned acc;
  int groups;
  float eps;
  enum fd_act act;
};
struct fd_groupnorm_bwd_args {
  fd_tensor *dy, *x, *w, *b, *stats, *dx, *dw, *db;
  unsigned acc;
  int groups;
  float eps;
  enum fd_act act;
};

/** Nearest neighbour: y[b, h, w, c] = x[b, h/2, w/2, c]. x [B, H, W, C], y [B, 2H, 2W, C]. */
struct fd_upsample2x_fwd_args {
  fd_tensor *x, *y;
  unsigned acc;
};
struct fd_upsample2x_bwd_args {
  fd_tensor *dy, *dx;
  unsigned acc;
};

/** Tokens from an image and back; each is the other's gradient (acc allowed).
 *    image  [B, H, W, C],  tokens [B, (H/P) (W/P), C P P], token t = row * (W/P) + column
 *  Order within a token: channel_last 0: (c, p, q), as a convolution kernel [D, C, P, P] reads it (DiT input);
 *  1: (p, q, c) (DiT output). */
struct fd_patchify_args {
  fd_tensor *x, *y;
  unsigned acc;
  int P;
  int channel_last;
};
struct fd_unpatchify_args {
  fd_tensor *x, *y;
  unsigned acc;
  int P;
  int channel_last;
};

/** y = [cos(t f_k), sin(t f_k)].  t in [B] f32; freqs in [n] f32 (formed in double, rounded once); y out [B, 2n].
 *  The angle is one f32 product. cos and sin of angles up to 1000 to 1e-7. */
struct fd_timestep_embed_args {
  fd_tensor *t, *freqs, *y;
  unsigned acc;
};

/** Diagonal Gaussian of a VAE: moments [.., 2Z] = (mean, logvar); logvar is clamped to [-30, 20].
 *    noise in [.., Z] f32;  mean, logvar, latent out [.., Z] f32;  latent = mean + exp(logvar / 2) noise
 *  noise NULL: latent = mean (the mode). */
struct fd_posterior_fwd_args {
  fd_tensor *moments, *noise, *mean, *logvar, *latent;
  unsigned acc;
};
/** A missing gradient counts as 0. The clamp's gradient is 1 inside and at the bounds, 0 outside. */
struct fd_posterior_bwd_args {
  fd_tensor *dmean, *dlogvar, *dlatent, *moments, *noise, *dmoments;
  unsigned acc;
};

/** y = (x - sub[c]) * mul[c] over the last dimension; with `inverse`: y = x / mul[c] + sub[c].
 *  x f32 | bf16; sub, mul f32 [C]; y f32 | bf16 (VAE latents: sub = latents_mean or shift, mul = 1/latents_std or scale). */
struct fd_channel_affine_args {
  fd_tensor *x, *sub, *mul, *y;
  unsigned acc;
  int inverse;
};

/** y = (byte / 255 - 0.5) / 0.5, each operation rounded to f32 (torchvision's ToTensor and Normalize).
 *  bytes u8 [..], y f32 | bf16 of the same shape. */
struct fd_pixels_fwd_args {
  fd_tensor *bytes, *y;
  unsigned acc;
};

/** Standard normal numbers, counter-based: independent of rank count, threads and backend.
 *    keys  in   u32 [B, 4]  (seed low, seed high, sample low, sample high) per sample, sample = global sample index
 *    y     out  [B, ...] f32; element e of a sample comes from Philox4x32-10 with key (seed low, seed high) and counter
 *               (e / 4, purpose, sample low, sample high), numbers (0,1) and (2,3) by Box-Muller:
 *               u = (x + 1) 2^-32 -> radius sqrt(-2 ln u); angle 2 pi x' 2^-32; (cos, sin)
 *  The scalar form is fd_rng_normal4 (base/rng.h). */
struct fd_randn_args {
  fd_tensor *keys, *y;
  unsigned acc;
  uint32_t purpose; /* enum fd_rng_purpose */
};

/** x_t = (1 - sigma_b) x + sigma_b noise.  x, noise f32 [B, ...], sigma f32 [B], x_t f32 | bf16. */
struct fd_flow_noise_args {
  fd_tensor *x, *noise, *sigma, *x_t;
  unsigned acc;
};

/** loss[b] = weight_b * mean over the sample of (pred - target)^2, f32, summed in a fixed order.
 *  precondition 0: pred = out, target = noise - x.  1: pred = out (-sigma_b) + x_t, target = x (x_t required, f32 | bf16).
 *    out f32 | bf16 [B, ...]; x, noise f32; sigma, weight, loss f32 [B] */
struct fd_flow_loss_fwd_args {
  fd_tensor *out, *x, *noise, *x_t, *sigma, *weight, *loss;
  unsigned acc;
  int precondition;
};
/** dout = dloss_b * d loss_b / d out. */
struct fd_flow_loss_bwd_args {
  fd_tensor *dloss, *out, *x, *noise, *x_t, *sigma, *weight, *dout;
  unsigned acc;
  int precondition;
};

/** One Euler step with classifier-free guidance: v = uncond + guidance (cond - uncond); sample += dsigma v.
 *    model_out in [2B, ...] f32 | bf16: first the B unconditional, then the B conditional; or [B, ...]: v = model_out
 *    step      in f32 [2]: guidance, dsigma = sigma_next - sigma (negative)
 *    sample    inout [B, ...] f32 */
struct fd_cfg_euler_args {
  fd_tensor *model_out, *step, *sample;
  unsigned acc;
};

/** y = x converted; numel(x) divides numel(y), x is repeated along a new leading dimension. f32, bf16. acc allowed: y += x. */
struct fd_cast_args {
  fd_tensor *x, *y;
  unsigned acc;
};

/** y = value, any float type. */
struct fd_fill_args {
  fd_tensor *y;
  unsigned acc;
  float value;
};

/** y[0] = sum of x^2.  x f32 of any shape, y f64 [1]. Fixed partial sums, in double. acc allowed. */
struct fd_sumsq_args {
  fd_tensor *x, *y;
  unsigned acc;
};

/** What the optimiser reads each step; f32 [FD_CONTROL_COUNT], written by the host and by `clip`. */
enum fd_control {
  FD_CONTROL_LR = 0,    /* learning rate of this step */
  FD_CONTROL_BIAS1,     /* 1 - beta1^k, k = 1 in the first step */
  FD_CONTROL_BIAS2,     /* 1 - beta2^k */
  FD_CONTROL_EMA_DECAY, /* this step's decay; 1: the average does not move */
  FD_CONTROL_GRAD_SCALE, /* 1 / world, for gradients that were summed; read by clip */
  FD_CONTROL_NORM,      /* out of clip: the gradient's norm before clipping */
  FD_CONTROL_CLIP,      /* out of clip: GRAD_SCALE * min(1, max_norm / (norm + 1e-6)) */
  FD_CONTROL_SKIP,      /* out of clip: 1 if the norm or the loss is not finite, then adamw only clears g */
  FD_CONTROL_LOSS,      /* mean loss over ranks; clip looks at it for SKIP only */
  FD_CONTROL_COUNT = 16
};

/** norm = GRAD_SCALE sqrt(sumsq); writes NORM, CLIP, SKIP.  sumsq f64 [1], already over all ranks.
 *  max_norm <= 0: no clipping. (torch.nn.utils.clip_grad_norm_) */
struct fd_clip_args {
  fd_tensor *sumsq, *control;
  unsigned acc;
  float max_norm;
};

/** AdamW with decoupled decay, on flat buffers (Loshchilov & Hutter 2019; DeepSpeed's FusedAdam, adam_w_mode):
 *  g' = g CLIP; m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2;
 *  p = p - LR ((m / BIAS1) / (sqrt(v / BIAS2) + eps) + wd p); ema = d ema + (1-d) p; compute = p rounded; g = 0.
 *    p, g, m, v, ema  inout [n] f32;  compute  out [n] f32 | bf16 (NULL: p itself is computed with)
 *  With SKIP set only g = 0.  keep_g: g is only read (the next backward pass overwrites it). */
struct fd_adamw_args {
  fd_tensor *p, *g, *m, *v, *ema, *compute, *control;
  unsigned acc;
  double beta1, beta2; /* 1 - beta is formed in double, as PyTorch does: 1 - 0.999f is off by 1.3e-5 */
  float eps, weight_decay;
  int keep_g;
};

/** Between all ranks, in place: start begins it on the communication stream, wait makes later ops see the result.
 *    reduce          x = sum over ranks
 *    reduce_scatter  rank r's part of x = that part of the sum; the other parts are then undefined
 *    all_gather      every part of x = what its rank has there
 *  Rank r's part are elements [r n / ranks, (r + 1) n / ranks); n is a multiple of ranks for the last two.
 *  Collective: every rank runs the same nodes in the same order. x f32 | bf16 | f64, less than 2^30 elements.
 *  With one rank all are no-ops. `request` (0..) names the pair; reduce_wait waits for any of the three. */
struct fd_reduce_start_args {
  fd_tensor *x;
  unsigned acc;
  int request;
};
struct fd_reduce_scatter_start_args {
  fd_tensor *x;
  unsigned acc;
  int request;
};
struct fd_all_gather_start_args {
  fd_tensor *x;
  unsigned acc;
  int request;
};
struct fd_reduce_wait_args {
  fd_tensor *x;
  unsigned acc;
  int request;
};

/** The table of kernels of a backend, in the order of ops.def. A missing kernel is NULL and is named at start-up. */
struct fd_ops {
#define X(name, slots) fd_status (*name)(fd_ctx * ctx, const struct fd_##name##_args *args);
#include "op/ops.def"
#undef X
};

/** What the graph needs to know of an op; from ops.def. */
struct fd_op_info {
  const char *name;
  int n_slots;
  size_t args_bytes;
  char dir[FD_MAX_SLOTS];            /* i, o, b */
  unsigned char optional[FD_MAX_SLOTS];
  char slot[FD_MAX_SLOTS][16];       /* names, for messages */
};
const struct fd_op_info *fd_op_info(enum fd_op op);

/** What all ops share, for a backend's prepare: required slots are there, element types are allowed, activations agree, acc names
 *  outputs that may be added to. FD_ERR_ARG, naming op and slot. */
fd_status fd_op_check(enum fd_op op, const void *args);
/** "op: slot is f32 [3, 4], expected ..." as FD_ERR_ARG. */
fd_status fd_op_wrong_slot(enum fd_op op, const char *slot, const fd_tensor *t, const char *expected, ...)
    __attribute__((format(printf, 4, 5)));
/** "op: ..." as FD_ERR_ARG, for scalar arguments. */
fd_status fd_op_wrong_arg(enum fd_op op, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** The tensor slots and the acc word of any args struct, by position. */
static inline fd_tensor **fd_op_slots(void *args) { return (fd_tensor **)args; }
static inline unsigned *fd_op_acc(enum fd_op op, void *args) {
  return (unsigned *)((char *)args + (size_t)fd_op_info(op)->n_slots * sizeof(fd_tensor *));
}

/** Largest args struct, for storage by value. */
#define FD_OP_ARGS_MAX 256

#endif
