// SPDX-License-Identifier: Apache-2.0
// Time of single ops at the sizes of a demo step and of bench-mid: bench_ops [part of a name] [seconds]. Not a test.
// A row of `cases` names the op and a function that makes its tensors. GB/s counts each slot's bytes once.
#include <time.h>

#include "optest.h"

static double now(void) {
  struct timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

struct size {
  const char *name;
  int64_t B, N, D, F, H, C; /* samples, image tokens, width, mlp; side and channels of a picture in the VAE */
};
static const struct size sizes[] = {{"demo", 16, 64, 192, 576, 16, 32}, {"mid", 4, 256, 512, 2048, 64, 128}};

/* Fill args (given as zeros) for these sizes. */
typedef void make_args(struct ot *t, const struct size *s, fd_dtype dt, void *args);

static void rmsnorm_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_rmsnorm_fwd_args *)args = (struct fd_rmsnorm_fwd_args){
      .x = OT_RAND(t, dt, s->B * s->N, s->D), .w = OT_RAND(t, dt, s->D), .mod = OT_RAND(t, dt, s->B, 6 * s->D),
      .y = OT_NEW(t, dt, s->B * s->N, s->D), .rstd = OT_NEW(t, FD_F32, s->B * s->N), .eps = 1e-6f, .rows_per_mod = s->N, .scale_col = s->D};
}
static void rmsnorm_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_rmsnorm_bwd_args *)args = (struct fd_rmsnorm_bwd_args){
      .dy = OT_RAND(t, dt, s->B * s->N, s->D), .x = OT_RAND(t, dt, s->B * s->N, s->D), .w = OT_RAND(t, dt, s->D),
      .rstd = ot_fill(OT_NEW(t, FD_F32, s->B * s->N), 1), .mod = OT_RAND(t, dt, s->B, 6 * s->D),
      .dx = ot_fill(OT_NEW(t, dt, s->B * s->N, s->D), 0), .dw = ot_fill(OT_NEW(t, FD_F32, s->D), 0),
      .dmod = ot_fill(OT_NEW(t, dt, s->B, 6 * s->D), 0), .acc = 7u << 6, .eps = 1e-6f, .rows_per_mod = s->N, .scale_col = s->D};
}

#define ROWS (s->B * s->N)
static void act_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_act_fwd_args *)args = (struct fd_act_fwd_args){.x = OT_RAND(t, dt, ROWS, s->D), .y = OT_NEW(t, dt, ROWS, s->D), .act = FD_ACT_SILU};
}
static void act_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_act_bwd_args *)args = (struct fd_act_bwd_args){.dy = OT_RAND(t, dt, ROWS, s->D), .x = OT_RAND(t, dt, ROWS, s->D),
      .dx = OT_RAND(t, dt, ROWS, s->D), .act = FD_ACT_SILU, .acc = 8};
}
static void geglu_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_geglu_fwd_args *)args = (struct fd_geglu_fwd_args){
      .gate_up = OT_RAND(t, dt, ROWS, 2 * s->F), .y = OT_NEW(t, dt, ROWS, s->F), .act = FD_ACT_GELU_TANH};
}
static void geglu_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_geglu_bwd_args *)args = (struct fd_geglu_bwd_args){.dy = OT_RAND(t, dt, ROWS, s->F), .gate_up = OT_RAND(t, dt, ROWS, 2 * s->F),
      .dgate_up = OT_NEW(t, dt, ROWS, 2 * s->F), .act = FD_ACT_GELU_TANH};
}
static void gate_residual_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_gate_residual_fwd_args *)args = (struct fd_gate_residual_fwd_args){.x = OT_RAND(t, dt, ROWS, s->D), .a = OT_RAND(t, dt, ROWS, s->D),
      .mod = OT_RAND(t, dt, s->B, 6 * s->D), .y = OT_NEW(t, dt, ROWS, s->D), .rows_per_mod = s->N};
}
static void gate_residual_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_gate_residual_bwd_args *)args = (struct fd_gate_residual_bwd_args){.dy = OT_RAND(t, dt, ROWS, s->D), .a = OT_RAND(t, dt, ROWS, s->D),
      .mod = OT_RAND(t, dt, s->B, 6 * s->D), .da = OT_NEW(t, dt, ROWS, s->D), .dmod = ot_fill(OT_NEW(t, dt, s->B, 6 * s->D), 0), .acc = 32,
      .rows_per_mod = s->N};
}
static void add_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_add_fwd_args *)args = (struct fd_add_fwd_args){.x = OT_RAND(t, dt, ROWS, s->D), .y = OT_RAND(t, dt, ROWS, s->D), .z = OT_NEW(t, dt, ROWS, s->D)};
}
static void cast(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_cast_args *)args = (struct fd_cast_args){.x = OT_RAND(t, dt, ROWS, s->D), .y = OT_NEW(t, dt == FD_F32 ? FD_BF16 : FD_F32, ROWS, s->D)};
}
/* Heads of 32 (demo) or 64, a quarter of them for keys; half as many text rows as image rows. */
#define HEAD (s->D < 512 ? 32 : 64)
static void heads_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  int E = HEAD, A = (int)s->D / E, K = A / 3 + (A % 3 != 0);
  int64_t L = s->N / 2;
  fd_tensor *text = OT_NEW(t, FD_I32, s->B, 2);
  for (int64_t b = 0; b < s->B; b++) ot_set(text, 2 * b, (double)(b * L)), ot_set(text, 2 * b + 1, (double)L);
  *(struct fd_heads_fwd_args *)args = (struct fd_heads_fwd_args){.qkv = OT_RAND(t, dt, ROWS, (A + 2 * K) * E), .text_kv = OT_RAND(t, dt, s->B * L, 2 * K * E),
      .q_norm = OT_RAND(t, dt, E), .k_norm = OT_RAND(t, dt, E), .text = text, .q = OT_NEW(t, dt, ROWS, A, E), .k = OT_NEW(t, dt, s->B * (s->N + L), K, E),
      .v = OT_NEW(t, dt, s->B * (s->N + L), K, E), .q_rstd = OT_NEW(t, FD_F32, ROWS, A), .k_rstd = OT_NEW(t, FD_F32, s->B * (s->N + L), K), .B = s->B,
      .N = s->N, .L = L, .A = A, .K = K, .E = E, .eps = 1e-6f};
}
static void heads_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  struct fd_heads_fwd_args f;
  heads_fwd(t, s, dt, &f);
  *(struct fd_heads_bwd_args *)args = (struct fd_heads_bwd_args){.dq = ot_normal(t, f.q, 0, 1), .dk = ot_normal(t, f.k, 0, 1), .dv = ot_normal(t, f.v, 0, 1),
      .qkv = f.qkv, .text_kv = f.text_kv, .q_norm = f.q_norm, .k_norm = f.k_norm, .text = f.text, .q_rstd = ot_fill(f.q_rstd, 1),
      .k_rstd = ot_fill(f.k_rstd, 1), .dqkv = OT_NEW(t, dt, ROWS, (f.A + 2 * f.K) * f.E), .dtext_kv = OT_NEW(t, dt, s->B * f.L, 2 * f.K * f.E),
      .dq_norm = OT_NEW(t, FD_F32, f.E), .dk_norm = OT_NEW(t, FD_F32, f.E), .B = f.B, .N = f.N, .L = f.L, .A = f.A, .K = f.K, .E = f.E, .eps = 1e-6f};
}
static void groupnorm_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_groupnorm_fwd_args *)args = (struct fd_groupnorm_fwd_args){.x = OT_RAND(t, dt, s->B, s->H, s->H, s->C), .w = OT_RAND(t, dt, s->C),
      .b = OT_RAND(t, dt, s->C), .y = OT_NEW(t, dt, s->B, s->H, s->H, s->C), .stats = OT_NEW(t, FD_F32, s->B, s->C / 2, 2), .groups = (int)s->C / 2,
      .eps = 1e-6f, .act = FD_ACT_SILU};
}
static void groupnorm_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_groupnorm_bwd_args *)args = (struct fd_groupnorm_bwd_args){.dy = OT_RAND(t, dt, s->B, s->H, s->H, s->C),
      .x = OT_RAND(t, dt, s->B, s->H, s->H, s->C), .w = OT_RAND(t, dt, s->C), .b = OT_RAND(t, dt, s->C),
      .stats = ot_fill(OT_NEW(t, FD_F32, s->B, s->C / 2, 2), 1), .dx = OT_NEW(t, dt, s->B, s->H, s->H, s->C), .dw = OT_NEW(t, FD_F32, s->C),
      .db = OT_NEW(t, FD_F32, s->C), .groups = (int)s->C / 2, .eps = 1e-6f, .act = FD_ACT_SILU};
}
static void patchify(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_patchify_args *)args = (struct fd_patchify_args){.x = OT_RAND(t, dt, s->B, s->H, s->H, 16), .y = OT_NEW(t, dt, s->B, s->H * s->H / 4, 64), .P = 2};
}
static void unpatchify(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_unpatchify_args *)args = (struct fd_unpatchify_args){.x = OT_RAND(t, dt, s->B, s->H * s->H / 4, 64), .y = OT_NEW(t, dt, s->B, s->H, s->H, 16),
      .P = 2, .channel_last = 1};
}
static void upsample2x_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_upsample2x_bwd_args *)args = (struct fd_upsample2x_bwd_args){.dy = OT_RAND(t, dt, s->B, 2 * s->H, 2 * s->H, s->C), .dx = OT_NEW(t, dt, s->B, s->H, s->H, s->C)};
}
static void pixels_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_pixels_fwd_args *)args = (struct fd_pixels_fwd_args){.bytes = OT_NEW(t, FD_U8, s->B, 256, 256, 3), .y = OT_NEW(t, dt, s->B, 256, 256, 3)};
}
static void embed_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_embed_fwd_args *)args = (struct fd_embed_fwd_args){.ids = ot_integers(t, OT_NEW(t, FD_I32, ROWS), 0, 5000), .table = OT_RAND(t, dt, 5000, s->D),
      .y = OT_NEW(t, dt, ROWS, s->D), .scale = 1};
}
static void randn(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  (void)dt;
  *(struct fd_randn_args *)args = (struct fd_randn_args){.keys = OT_NEW(t, FD_U32, s->B, 4), .y = OT_NEW(t, FD_F32, s->B, s->H, s->H, 16), .purpose = FD_RNG_NOISE};
}
static void flow_loss_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_flow_loss_fwd_args *)args = (struct fd_flow_loss_fwd_args){.out = OT_RAND(t, dt, s->B, s->H, s->H, 16), .x = OT_RAND(t, FD_F32, s->B, s->H, s->H, 16),
      .noise = OT_RAND(t, FD_F32, s->B, s->H, s->H, 16), .sigma = OT_RAND(t, FD_F32, s->B), .weight = OT_RAND(t, FD_F32, s->B), .loss = OT_NEW(t, FD_F32, s->B)};
}
static void flow_loss_bwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  struct fd_flow_loss_fwd_args f;
  flow_loss_fwd(t, s, dt, &f);
  *(struct fd_flow_loss_bwd_args *)args = (struct fd_flow_loss_bwd_args){.dloss = OT_RAND(t, FD_F32, s->B), .out = f.out, .x = f.x, .noise = f.noise,
      .sigma = f.sigma, .weight = f.weight, .dout = OT_NEW(t, dt, s->B, s->H, s->H, 16)};
}
static void posterior_fwd(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_posterior_fwd_args *)args = (struct fd_posterior_fwd_args){.moments = OT_RAND(t, dt, s->B, s->H, s->H, 32),
      .noise = OT_RAND(t, FD_F32, s->B, s->H, s->H, 16), .mean = OT_NEW(t, FD_F32, s->B, s->H, s->H, 16),
      .logvar = OT_NEW(t, FD_F32, s->B, s->H, s->H, 16), .latent = OT_NEW(t, FD_F32, s->B, s->H, s->H, 16)};
}
static void channel_affine(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  *(struct fd_channel_affine_args *)args = (struct fd_channel_affine_args){.x = OT_RAND(t, FD_F32, s->B, s->H, s->H, 16), .sub = OT_RAND(t, FD_F32, 16),
      .mul = OT_RAND(t, FD_F32, 16), .y = OT_NEW(t, dt, s->B, s->H, s->H, 16)};
}
static void sumsq(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  (void)dt;
  *(struct fd_sumsq_args *)args = (struct fd_sumsq_args){.x = OT_RAND(t, FD_F32, s->D * s->D * 64), .y = OT_NEW(t, FD_F64, 1)};
}
static void adamw(struct ot *t, const struct size *s, fd_dtype dt, void *args) {
  int64_t n = s->D * s->D * 64;
  fd_tensor *control = ot_fill(OT_NEW(t, FD_F32, FD_CONTROL_COUNT), 0.1);
  ot_set(control, FD_CONTROL_SKIP, 0);
  *(struct fd_adamw_args *)args = (struct fd_adamw_args){.p = OT_RAND(t, FD_F32, n), .g = OT_RAND(t, FD_F32, n), .m = ot_fill(OT_NEW(t, FD_F32, n), 0.1),
      .v = ot_fill(OT_NEW(t, FD_F32, n), 0.1), .ema = OT_RAND(t, FD_F32, n), .compute = dt == FD_BF16 ? OT_NEW(t, FD_BF16, n) : NULL, .control = control,
      .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8f, .weight_decay = 1e-4f};
}

static const struct {
  enum fd_op op;
  make_args *make;
} cases[] = {
#define C(name) {FD_OP_##name, name}
    C(rmsnorm_fwd), C(rmsnorm_bwd), C(act_fwd), C(act_bwd), C(geglu_fwd), C(geglu_bwd), C(gate_residual_fwd), C(gate_residual_bwd), C(heads_fwd),
    C(heads_bwd), C(add_fwd), C(cast), C(embed_fwd), C(groupnorm_fwd), C(groupnorm_bwd), C(patchify), C(unpatchify), C(upsample2x_bwd),
    C(pixels_fwd), C(randn), C(flow_loss_fwd), C(flow_loss_bwd), C(posterior_fwd), C(channel_affine), C(sumsq), C(adamw),
#undef C
};

int main(int argc, char **argv) {
  static struct ot t;
  const char *part = argc > 1 ? argv[1] : "";
  double seconds = argc > 2 ? atof(argv[2]) : 0.1;
  if (fd_ctx_create(&fd_cpu_backend, 0, NULL, &t.ctx) != FD_OK) return printf("%s\n", fd_status_message()), 1;
  t.what = "bench";
  printf("%d threads\n%-24s %-5s %-5s %12s %8s\n", t.ctx->n_threads, "op", "size", "type", "us", "GB/s");
  for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
    const struct fd_op_info *info = fd_op_info(cases[c].op);
    if (!strstr(info->name, part)) continue;
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
      for (fd_dtype dt = FD_F32; dt <= FD_BF16; dt++) {
        _Alignas(8) char args[FD_OP_ARGS_MAX] = {0};
        ot_reset(&t);
        cases[c].make(&t, &sizes[s], dt, args);
        size_t scratch = 0, bytes = 0;
        if (t.ctx->backend->prepare(t.ctx, cases[c].op, args, &scratch) != FD_OK) return printf("%s\n", fd_status_message()), 1;
        if (t.ctx->backend->alloc(t.ctx, scratch, &t.ctx->scratch) != FD_OK) return 1;
        for (int i = 0; i < info->n_slots; i++)
          if (fd_op_slots(args)[i]) bytes += fd_tensor_bytes(fd_op_slots(args)[i]);
        double best = 1e9, end = now() + seconds;
        do {
          double from = now();
          if (fd_op_run(t.ctx, cases[c].op, args) != FD_OK) return printf("%s\n", fd_status_message()), 1;
          double took = now() - from;
          if (took < best) best = took;
        } while (now() < end);
        t.ctx->backend->free(t.ctx, t.ctx->scratch);
        printf("%-24s %-5s %-5s %12.1f %8.1f\n", info->name, sizes[s].name, fd_dtype_name(dt), 1e6 * best, 1e-9 * (double)bytes / best);
        fflush(stdout);
      }
  }
  ot_reset(&t);
  fd_ctx_destroy(&t.ctx);
  return 0;
}
