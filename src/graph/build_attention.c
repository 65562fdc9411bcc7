// SPDX-License-Identifier: Apache-2.0
// Builders of attention: splitting into heads, and the product itself.
#include "graph/build_internal.h"

void fd_heads(fd_graph *g, const struct fd_heads *h, fd_var *q, fd_var *k, fd_var *v) {
  const char *op = "heads";
  *q = *k = *v = 0;
  if (!fd_graph_ok(g)) return;
  const int64_t B = h->B, N = h->N, L = h->L, A = h->A, K = h->K, E = h->E;
  FD_WANT_OR(, B >= 0 && N >= 0 && L >= 0, "heads: B %lld, N %lld, L %lld", (long long)B, (long long)N, (long long)L);
  FD_WANT_OR(, A >= 1 && K >= 1 && E >= 1 && A % K == 0, "heads: %lld heads, %lld kv heads of %lld: kv heads must divide heads",
             (long long)A, (long long)K, (long long)E);
  if (!fd_build_float(g, op, "qkv", h->qkv) || !fd_build_count(g, op, h->count)) return;
  const fd_tensor *t = fd_graph_get(g, h->qkv);
  FD_WANT_OR(, fd_tensor_numel(t) == B * N * (A + 2 * K) * E && fd_tensor_cols(t) == (A + 2 * K) * E,
             "heads: qkv is %s, wanted [%lld, %lld]: B N rows of (A + 2 K) E", fd_graph_text(g, h->qkv), (long long)(B * N),
             (long long)((A + 2 * K) * E));
  if (h->text_kv) {
    if (!fd_build_float(g, op, "text_kv", h->text_kv)) return;
    const fd_tensor *x = fd_graph_get(g, h->text_kv);
    FD_WANT_OR(, x->dtype == t->dtype && fd_tensor_cols(x) == 2 * K * E, "heads: text_kv is %s, wanted [T, %lld] %s",
               fd_graph_text(g, h->text_kv), (long long)(2 * K * E), fd_dtype_name(t->dtype));
    FD_WANT_OR(, h->text, "heads: text_kv without text (first row and rows of each sample)");
    if (!fd_build_shape(g, op, "text", h->text, FD_I32, 2, (int64_t[]){B, 2})) return;
  } else {
    FD_WANT_OR(, L == 0, "heads: L is %lld without text_kv", (long long)L);
  }
  if (h->q_norm && !fd_build_vector(g, op, "q_norm", h->q_norm, E)) return;
  if (h->k_norm && !fd_build_vector(g, op, "k_norm", h->k_norm, E)) return;
  if (h->rope) {
    const fd_tensor *x = fd_graph_get(g, h->rope);
    FD_WANT_OR(, x->dtype == FD_F32 && x->ndim == 2 && x->shape[1] == E && E % 2 == 0 && (h->pos || x->shape[0] >= N),
               "heads: rope is %s, wanted [positions, %lld] f32", fd_graph_text(g, h->rope), (long long)E);
  }
  if (h->pos) {
    const fd_tensor *x = fd_graph_get(g, h->pos);
    FD_WANT_OR(, x->dtype == FD_I32 && fd_tensor_numel(x) == B * N, "heads: pos is %s, wanted [%lld] i32", fd_graph_text(g, h->pos),
               (long long)(B * N));
  }
  *q = fd_graph_tensor(g, t->dtype, 3, (int64_t[]){B * N, A, E});
  *k = fd_graph_tensor(g, t->dtype, 3, (int64_t[]){B * (N + L), K, E});
  *v = fd_graph_tensor(g, t->dtype, 3, (int64_t[]){B * (N + L), K, E});
  fd_var q_rstd = h->q_norm ? fd_graph_tensor(g, FD_F32, 2, (int64_t[]){B * N, A}) : 0;
  fd_var k_rstd = h->k_norm ? fd_graph_tensor(g, FD_F32, 2, (int64_t[]){B * (N + L), K}) : 0;
  struct fd_heads_fwd_args args = {.B = B, .N = N, .L = L, .A = h->A, .K = h->K, .E = h->E, .eps = h->eps};
  fd_graph_emit(g, FD_OP_heads_fwd, &args,
                (fd_var[]){h->qkv, h->text_kv, h->q_norm, h->k_norm, h->rope, h->pos, h->text_kv ? h->text : 0, h->count, *q, *k, *v,
                           q_rstd, k_rstd});
}

fd_var fd_attention(fd_graph *g, const struct fd_attention *a) {
  const char *op = "attention";
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, op, "q", a->q) || !fd_build_float(g, op, "k", a->k) || !fd_build_float(g, op, "v", a->v)) return 0;
  FD_WANT(a->A >= 1 && a->K >= 1 && a->E >= 1 && a->A % a->K == 0, "attention: %d heads, %d kv heads of %d: kv heads must divide heads", a->A,
          a->K, a->E);
  const fd_tensor *q = fd_graph_get(g, a->q), *k = fd_graph_get(g, a->k), *v = fd_graph_get(g, a->v), *r = fd_graph_get(g, a->ranges);
  const int64_t AE = (int64_t)a->A * a->E, KE = (int64_t)a->K * a->E;
  int64_t Tq = fd_tensor_numel(q) / AE, Tk = fd_tensor_numel(k) / KE;
  FD_WANT(fd_tensor_numel(q) == Tq * AE, "attention: q is %s, wanted [Tq, %d, %d]", fd_graph_text(g, a->q), a->A, a->E);
  FD_WANT(fd_tensor_numel(k) == Tk * KE && k->dtype == q->dtype, "attention: k is %s, wanted [Tk, %d, %d] %s", fd_graph_text(g, a->k), a->K,
          a->E, fd_dtype_name(q->dtype));
  FD_WANT(fd_tensor_numel(v) == Tk * KE && v->dtype == q->dtype, "attention: v is %s, wanted the shape and type of k %s",
          fd_graph_text(g, a->v), fd_graph_text(g, a->k));
  FD_WANT(a->ranges && r->dtype == FD_I32 && r->ndim == 2 && r->shape[1] == 4, "attention: ranges is %s, wanted [sequences, 4] i32",
          fd_graph_text(g, a->ranges));
  FD_WANT(a->max_q >= 0 && a->max_k >= 0 && a->max_q <= Tq && a->max_k <= Tk,
          "attention: sequences of at most %lld queries and %lld keys, but q is %s, k is %s", (long long)a->max_q, (long long)a->max_k,
          fd_graph_text(g, a->q), fd_graph_text(g, a->k));
  /* kernels see three dimensions whatever the model gave */
  fd_var q3 = fd_graph_view(g, a->q, 3, (int64_t[]){Tq, a->A, a->E});
  fd_var k3 = fd_graph_view(g, a->k, 3, (int64_t[]){Tk, a->K, a->E});
  fd_var v3 = fd_graph_view(g, a->v, 3, (int64_t[]){Tk, a->K, a->E});
  fd_var o = fd_graph_tensor(g, q->dtype, 3, (int64_t[]){Tq, a->A, a->E});
  fd_var lse = fd_graph_tensor(g, FD_F32, 2, (int64_t[]){Tq, a->A});
  struct fd_attention_fwd_args args = {.A = a->A, .K = a->K, .E = a->E, .scale = a->scale, .causal = a->causal, .window = a->window,
                                       .softcap = a->softcap, .max_q = a->max_q, .max_k = a->max_k, .q_stride = a->q_stride,
                                       .k_stride = a->k_stride};
  fd_graph_emit(g, FD_OP_attention_fwd, &args, (fd_var[]){q3, k3, v3, a->ranges, o, lse});
  return fd_graph_view(g, o, 2, (int64_t[]){Tq, AE});
}
