// SPDX-License-Identifier: Apache-2.0
// Rates of matmul, convolution and attention at the sizes that matter, beside oneDNN's own rate for one large matmul in the same
// run; then one demo-sized training step put together from its matmul, attention and AdamW calls alone.
// bench_kernels [part of a name] [threads] [seconds per row]. Not a test.
#include <time.h>

#include "cpu/dnnl.h"
#include "optest.h"

/* With one thread its own processor time, so that a shared machine disturbs less. */
static clockid_t watch = CLOCK_MONOTONIC;

static double now(void) {
  struct timespec ts;
  clock_gettime(watch, &ts);
  return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static double budget = 0.15, large_rate[2]; /* seconds per row; GFLOP/s by type */

/* Best time of one call: the machine may be shared. */
static double time_op(struct ot *t, enum fd_op op, const void *args) {
  size_t bytes = 0;
  if (t->ctx->backend->prepare(t->ctx, op, args, &bytes) != FD_OK) {
    printf("%s\n", fd_status_message());
    exit(1);
  }
  void *scratch = aligned_alloc(64, cpu_align(bytes + 64));
  memset(scratch, 0, bytes);
  t->ctx->scratch = scratch, t->ctx->scratch_bytes = bytes;
  double best = 1e30, begin = now();
  int64_t calls = 1;
  for (int round = 0; round < 4 || now() - begin < budget; round++) {
    double from = now();
    for (int64_t i = 0; i < calls; i++)
      if (fd_op_run(t->ctx, op, args) != FD_OK) {
        printf("%s\n", fd_status_message());
        exit(1);
      }
    double each = (now() - from) / (double)calls;
    if (each < best) best = each;
    if (round == 0) calls = 1 + (int64_t)(0.1 * budget / each);
  }
  t->ctx->scratch = NULL;
  free(scratch);
  return best;
}

static void row(const char *what, fd_dtype type, double seconds, double flop) {
  printf("%-44s %-5s %10.1f us %8.1f GFLOP/s %5.0f %%\n", what, fd_dtype_name(type), seconds * 1e6, flop / seconds * 1e-9,
         100 * flop / seconds * 1e-9 / large_rate[type]);
}

/* Values do not matter to the time, but must not be NaN or subnormal. */
static fd_tensor *ones(struct ot *t, fd_dtype type, int64_t a, int64_t b) { return ot_fill(OT_NEW(t, type, a, b), 0.5); }

/* ---- matmul --------------------------------------------------------------------------------------------------------- */

enum form { FWD, BIAS, COUNT, DX, DX_ADD, DW };
static const char *const form_name[] = {"y", "y + bias", "y, 3/4 used", "dx", "dx +=", "dw +="};

/* y [M, N] = x [M, K] w^T and its gradients. */
static double time_matmul(struct ot *t, int64_t M, int64_t N, int64_t K, fd_dtype type, enum form form, double *flop) {
  ot_reset(t);
  fd_tensor *x = ones(t, type, M, K), *w = ones(t, type, N, K), *y = ones(t, type, M, N), *dw = ones(t, FD_F32, N, K);
  fd_tensor *bias = ot_fill(OT_NEW(t, FD_F32, N), 1), *count = ot_count(t, M * 3 / 4);
  *flop = 2.0 * (double)(form == COUNT ? M * 3 / 4 : M) * (double)N * (double)K;
  struct fd_matmul_args a = {.a = x, .b = w, .bias = form == BIAS ? bias : NULL, .count = form == COUNT ? count : NULL, .c = y, .trans_b = 1};
  if (form == DX || form == DX_ADD) a = (struct fd_matmul_args){.a = y, .b = w, .c = x, .acc = form == DX_ADD ? 1u << 4 : 0};
  if (form == DW) a = (struct fd_matmul_args){.a = y, .b = x, .c = dw, .acc = 1u << 4, .trans_a = 1};
  return time_op(t, FD_OP_matmul, &a);
}

/* What oneDNN reaches on one large product of its own choice of layout. */
static double time_large(struct ot *t, fd_dtype type) {
  double flop, best = 0;
  ot_reset(t);
  enum { M = 2048, N = 2048, K = 4096 };
  struct cpu_dnnl *d;
  dnnl_memory_desc_t a, b, c;
  dnnl_matmul_desc_t desc;
  dnnl_data_type_t dt = cpu_dnnl_type(type);
  struct cpu_prim *p;
  if (cpu_dnnl(t->ctx, &d) != FD_OK) exit(1);
  dnnl_memory_desc_init_by_tag(&a, 2, (dnnl_dims_t){M, K}, dt, dnnl_ab);
  dnnl_memory_desc_init_by_tag(&b, 2, (dnnl_dims_t){K, N}, dt, dnnl_format_tag_any);
  dnnl_memory_desc_init_by_tag(&c, 2, (dnnl_dims_t){M, N}, dt, dnnl_ab);
  dnnl_matmul_desc_init(&desc, &a, &b, NULL, &c);
  dnnl_primitive_attr_t attr;
  dnnl_primitive_attr_create(&attr);
  dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
  int64_t key[CPU_PRIM_KEY] = {-1, type};
  fd_status st = cpu_prim_make(d, key, "large", &desc, attr, NULL, 3, (int[]){DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST}, false, &p);
  if (st == FD_OK) {
    fd_tensor *x = ones(t, type, M, K), *w = ones(t, FD_F32, K, N), *y = ones(t, type, M, N);
    void *scratch = aligned_alloc(64, cpu_align(p->scratch_bytes + 64));
    for (int i = 0; i < 5; i++) {
      double from = now();
      cpu_prim_run(d, p, (void *[]){x->data, w->data, y->data}, scratch);
      double rate = 2.0 * M * N * K / (now() - from) * 1e-9;
      if (rate > best) best = rate;
    }
    printf("%-44s %-5s %s: %.1f GFLOP/s\n", "oneDNN, 2048 x 2048 x 4096, weights as it wants", fd_dtype_name(type), p->impl, best);
    free(scratch);
  } else printf("%s\n", fd_status_message()); /* bf16 without AVX-512 */
  dnnl_primitive_attr_destroy(attr);
  double ours = 2.0 * M * N * K / time_matmul(t, M, N, K, type, FWD, &flop) * 1e-9;
  return best > 0 ? best : ours;
}

static void matmuls(struct ot *t, const char *part) {
  static const struct {
    const char *name;
    int64_t M, N, K;
  } at[] = {
      {"demo qkv", 512, 320, 192},       {"demo gate up", 512, 1024, 192}, {"demo down", 512, 192, 512}, {"demo adaln", 32, 1152, 192},
      {"demo text kv", 640, 128, 192},   {"mid qkv", 1024, 768, 512},      {"mid gate up", 1024, 4096, 512}, {"mid down", 1024, 512, 2048},
      {"production qkv", 2048, 3072, 2048}, {"production gate up", 2048, 4096, 2048},
  };
  for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
    for (fd_dtype type = FD_F32; type <= FD_BF16; type++)
      for (enum form f = FWD; f <= DW; f++) {
        char what[80];
        double flop;
        snprintf(what, sizeof what, "matmul %s %lldx%lldx%lld %s", at[i].name, (long long)at[i].M, (long long)at[i].N, (long long)at[i].K,
                 form_name[f]);
        if (!strstr(what, part)) continue;
        double s = time_matmul(t, at[i].M, at[i].N, at[i].K, type, f, &flop);
        row(what, type, s, flop);
      }
}

/* ---- convolution ----------------------------------------------------------------------------------------------------- */

static void convs(struct ot *t, const char *part) {
  static const struct {
    const char *name;
    int64_t B, H, I, O, k, stride;
  } at[] = {
      {"demo in", 32, 64, 3, 32, 3, 1},  {"demo", 32, 64, 32, 32, 3, 1},     {"demo down", 32, 64, 32, 32, 3, 2}, {"mid", 4, 256, 64, 64, 3, 1},
      {"mid", 4, 128, 128, 128, 3, 1},   {"mid", 4, 64, 256, 256, 3, 1},     {"mid shortcut", 4, 64, 128, 256, 1, 1},
      {"flux", 1, 128, 256, 256, 3, 1},  {"flux", 1, 32, 512, 512, 3, 1},    {"flux out", 1, 256, 128, 3, 3, 1},
  };
  for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
    for (fd_dtype type = FD_F32; type <= FD_BF16; type++)
      for (int kind = 0; kind < 3; kind++) {
        static const char *const kinds[] = {"y", "dx", "dw"};
        int64_t B = at[i].B, H = at[i].H, I = at[i].I, O = at[i].O, k = at[i].k, s = at[i].stride, Ho = s == 1 ? H : H / 2;
        int pad = k == 3 && s == 1, after = k == 3;
        char what[80];
        snprintf(what, sizeof what, "conv2d %s %lldx%lldx%lld %lld>%lld %lldx%lld/%lld %s", at[i].name, (long long)B, (long long)H, (long long)H,
                 (long long)I, (long long)O, (long long)k, (long long)k, (long long)s, kinds[kind]);
        if (!strstr(what, part)) continue;
        ot_reset(t);
        fd_tensor *x = ot_fill(OT_NEW(t, type, B, H, H, I), 0.5), *w = ot_fill(OT_NEW(t, type, O, I, k, k), 0.5);
        fd_tensor *y = ot_fill(OT_NEW(t, type, B, Ho, Ho, O), 0.5), *dw = ot_fill(OT_NEW(t, FD_F32, O, I, k, k), 0.5);
        fd_tensor *bias = ot_fill(OT_NEW(t, FD_F32, O), 0.5);
        double flop = 2.0 * (double)(B * Ho * Ho * O * I * k * k), sec;
        w->flags = FD_T_CONST;
#define SHAPE .stride = (int)s, .pad_top = pad, .pad_left = pad, .pad_bottom = after, .pad_right = after
        if (kind == 0) sec = time_op(t, FD_OP_conv2d_fwd, &(struct fd_conv2d_fwd_args){.x = x, .w = w, .bias = bias, .y = y, SHAPE});
        else if (kind == 1) sec = time_op(t, FD_OP_conv2d_bwd_data, &(struct fd_conv2d_bwd_data_args){.dy = y, .w = w, .dx = x, SHAPE});
        else sec = time_op(t, FD_OP_conv2d_bwd_weights, &(struct fd_conv2d_bwd_weights_args){.dy = y, .x = x, .dw = dw, .dbias = bias, SHAPE});
        row(what, type, sec, flop);
      }
}

/* ---- attention ------------------------------------------------------------------------------------------------------- */

static double time_attention(struct ot *t, int64_t S, int64_t N, int64_t M, int A, int K, int E, int causal, fd_dtype type, bool backward,
                             double *flop) {
  ot_reset(t);
  fd_tensor *q = ot_normal(t, OT_NEW(t, type, S * N, A, E), 0, 1), *k = ot_normal(t, OT_NEW(t, type, S * M, K, E), 0, 1);
  fd_tensor *v = ot_normal(t, OT_NEW(t, type, S * M, K, E), 0, 1), *o = ot_fill(OT_NEW(t, type, S * N, A, E), 0.5);
  fd_tensor *lse = ot_fill(OT_NEW(t, FD_F32, S * N, A), 0), *ranges = OT_NEW(t, FD_I32, S, 4);
  fd_tensor *dq = OT_NEW(t, type, S * N, A, E), *dk = OT_NEW(t, type, S * M, K, E), *dv = OT_NEW(t, type, S * M, K, E);
  for (int64_t s = 0; s < S; s++) {
    int64_t r[] = {s * N, N, s * M, M};
    for (int i = 0; i < 4; i++) ot_set(ranges, 4 * s + i, (double)r[i]);
  }
  /* causal: the pairs that are seen */
  *flop = 4.0 * (double)(S * A * E) * (causal ? 0.5 * (double)(N * (N + 1)) : (double)(N * M)) * (backward ? 2.5 : 1);
#define COMMON .A = A, .K = K, .E = E, .scale = 1.0f / sqrtf((float)E), .causal = causal, .max_q = N, .max_k = M
  struct fd_attention_fwd_args fwd = {.q = q, .k = k, .v = v, .ranges = ranges, .o = o, .lse = lse, COMMON};
  double s = time_op(t, FD_OP_attention_fwd, &fwd);
  if (!backward) return s;
  return time_op(t, FD_OP_attention_bwd, &(struct fd_attention_bwd_args){.d_o = q, .q = q, .k = k, .v = v, .o = o, .lse = lse,
                     .ranges = ranges, .dq = dq, .dk = dk, .dv = dv, COMMON});
}

static void attentions(struct ot *t, const char *part) {
  static const struct {
    const char *name;
    int64_t S, N, M;
    int A, K, E, causal;
  } at[] = {
      {"demo", 32, 16, 36, 6, 2, 32, 0},          {"mid", 4, 256, 376, 8, 2, 64, 0},    {"mid text", 4, 120, 120, 8, 1, 64, 1},
      {"production", 4, 256, 512, 16, 4, 128, 0}, {"vae", 1, 1024, 1024, 1, 1, 512, 0}, {"mid vae", 4, 1024, 1024, 1, 1, 256, 0},
  };
  for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
    for (fd_dtype type = FD_F32; type <= FD_BF16; type++)
      for (int backward = 0; backward < 2; backward++) {
        char what[80];
        double flop;
        snprintf(what, sizeof what, "attention %s %s %lldx(%lldx%lld) %d/%dx%d", backward ? "bwd" : "fwd", at[i].name, (long long)at[i].S,
                 (long long)at[i].N, (long long)at[i].M, at[i].A, at[i].K, at[i].E);
        if (!strstr(what, part)) continue;
        double s = time_attention(t, at[i].S, at[i].N, at[i].M, at[i].A, at[i].K, at[i].E, at[i].causal, type, backward, &flop);
        row(what, type, s, flop);
      }
}

/* ---- one step of the demo's transformer -------------------------------------------------------------------------------- */

static void step(struct ot *t, const char *part) {
  enum { B = 32, LAYERS = 6, N = 16, TEXT = 20, D = 192, HEADS = 6, KV = 2, E = 32, F = 512 };
  static const struct {
    const char *name;
    int64_t M, N, K;
    int times;
    bool no_dx;
  } at[] = {
      {"qkv", B * N, (HEADS + 2 * KV) * E, D, LAYERS, false}, {"text kv", B * TEXT, 2 * KV * E, D, LAYERS, false},
      {"o", B * N, D, HEADS * E, LAYERS, false},              {"gate up", B * N, 2 * F, D, LAYERS, false},
      {"down", B * N, D, F, LAYERS, false},                   {"adaln", B, 6 * D, D, LAYERS, false},
      {"patches", B * N, D, 64, 1, true},                     {"text in", B * TEXT, D, 256, 2, false},
      {"time", B, D, 256, 2, false},                          {"out", B * N, 64, D, 1, false},
  };
  if (!strstr("step", part)) return;
  for (fd_dtype type = FD_F32; type <= FD_BF16; type++) {
    double matmul = 0, attention = 0, adamw, flop, all = 0;
    int64_t parameters = 0;
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++) {
      parameters += at[i].times * at[i].N * at[i].K;
      for (enum form f = BIAS; f <= DW; f++) {
        if (f == COUNT || f == DX_ADD || (f == DX && at[i].no_dx)) continue;
        matmul += at[i].times * time_matmul(t, at[i].M, at[i].N, at[i].K, type, f, &flop);
        all += at[i].times * flop;
      }
    }
    for (int backward = 0; backward < 2; backward++) {
      attention += LAYERS * time_attention(t, B, N, N + TEXT, HEADS, KV, E, 0, type, backward, &flop);
      all += LAYERS * flop;
    }
    ot_reset(t);
    fd_tensor *p = ones(t, FD_F32, 1, parameters), *g = ones(t, FD_F32, 1, parameters), *m = ones(t, FD_F32, 1, parameters);
    fd_tensor *v = ones(t, FD_F32, 1, parameters), *ema = ones(t, FD_F32, 1, parameters), *c = ones(t, FD_BF16, 1, parameters);
    fd_tensor *control = ot_fill(OT_NEW(t, FD_F32, FD_CONTROL_COUNT), 0.5);
    ot_set(control, FD_CONTROL_SKIP, 0);
    adamw = time_op(t, FD_OP_adamw, &(struct fd_adamw_args){.p = p, .g = g, .m = m, .v = v, .ema = ema, .compute = type == FD_BF16 ? c : NULL,
                                                            .control = control, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f});
    double total = matmul + attention + adamw;
    printf("step demo %-5s batch %d: matmul %.2f ms, attention %.2f ms, adamw %.2f ms (%.1f M parameters); %.2f GFLOP; %.0f images/s\n",
           fd_dtype_name(type), B, matmul * 1e3, attention * 1e3, adamw * 1e3, (double)parameters * 1e-6, all * 1e-9, B / total);
  }
}

int main(int argc, char **argv) {
  static struct ot t;
  const char *part = argc > 1 ? argv[1] : "";
  if (fd_ctx_create(&fd_cpu_backend, argc > 2 ? atoi(argv[2]) : 0, NULL, &t.ctx) != FD_OK) return printf("%s\n", fd_status_message()), 1;
  if (t.ctx->n_threads == 1) watch = CLOCK_THREAD_CPUTIME_ID;
  if (argc > 3) budget = atof(argv[3]);
  t.what = "bench";
  printf("%d threads\n", t.ctx->n_threads);
  for (fd_dtype type = FD_F32; type <= FD_BF16; type++) large_rate[type] = time_large(&t, type);
  matmuls(&t, part);
  convs(&t, part);
  attentions(&t, part);
  step(&t, part);
  ot_reset(&t);
  fd_ctx_destroy(&t.ctx);
  return 0;
}
