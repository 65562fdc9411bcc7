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

static const struct {
  enum fd_op op;
  make_args *make;
} cases[] = {
#define C(name) {FD_OP_##name, name}
    C(rmsnorm_fwd), C(rmsnorm_bwd),
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
