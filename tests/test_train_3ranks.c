// SPDX-License-Identifier: Apache-2.0
// Training on 1, 2 and 3 ranks: the same losses; the same bits when repeated or resumed; accumulation equals a larger batch.
// test_train_avx2_3ranks is the same with kernels of AVX2 at most.
#include "traintest.h"

enum { STEPS = 20 };

static void show(const char *what, const struct tt_row *a, const struct tt_row *b, int n) {
  for (int i = 0; i < n; i++)
    if (a[i].loss != b[i].loss)
      printf("%s step %ld: loss %.9g and %.9g (%.2g), norm %.9g and %.9g\n", what, a[i].step, a[i].loss, b[i].loss,
             tt_relative(a[i].loss, b[i].loss), a[i].norm, b[i].norm);
}

/* Step 1 within 1e-6, all within 1e-5 */
static void check_close(const char *what, const char *run_a, const char *run_b) {
  struct tt_row a[STEPS + 1], b[STEPS + 1];
  const int n = tt_metrics(run_a, a, STEPS + 1), m = tt_metrics(run_b, b, STEPS + 1);
  CHECK(n == STEPS && m == STEPS);
  if (n != STEPS || m != STEPS) return;
  int bad = tt_relative(a[0].loss, b[0].loss) > 1e-6;
  for (int i = 0; i < STEPS; i++) bad |= !(tt_relative(a[i].loss, b[i].loss) <= 1e-5) || a[i].lr != b[i].lr;
  CHECK(!bad);
  if (bad) show(what, a, b, n);
}

static void check_same(const char *what, const char *run_a, const char *run_b) {
  struct tt_row a[STEPS + 1], b[STEPS + 1];
  const int n = tt_metrics(run_a, a, STEPS + 1), m = tt_metrics(run_b, b, STEPS + 1);
  CHECK(n == STEPS && m == STEPS);
  if (n != STEPS || m != STEPS) return;
  int bad = 0;
  for (int i = 0; i < STEPS; i++) bad |= strcmp(a[i].text, b[i].text);
  CHECK(!bad);
  if (bad) show(what, a, b, n);
  const double d = tt_compare(run_a, run_b, STEPS);
  CHECK(d == 0);
  if (d) printf("%s: checkpoints differ by %g\n", what, d);
}

/* A run on the first `ranks` ranks that ends with this status, the others wait. */
static void train_fails(fd_comm *world, int ranks, const char *run, fd_status want, const char *const *more) {
  fd_comm *comm = NULL;
  if (fd_comm_split(world, fd_comm_rank(world) < ranks ? 0 : -1, &comm) != FD_OK) {
    CHECK(!"split");
    return;
  }
  if (comm) {
    const fd_status st = tt_train(comm, run, more);
    CHECK(st == want);
    if (st != want) printf("%s: %s: %s (%s)\n", run, fd_status_name(st), fd_status_message(), fd_status_where());
    fd_comm_destroy(&comm);
  }
  fd_comm_barrier(world);
}

static void train(fd_comm *world, int ranks, const char *run, const char *const *more) {
  train_fails(world, ranks, run, FD_OK, more);
}

#define SET(...) ((const char *const[]){__VA_ARGS__, NULL})

int main(int argc, char **argv) {
  (void)argc;
#ifdef TT_AVX2
  tt_avx2(argv);
#endif
  (void)argv;
  fd_comm *world = NULL;
  if (fd_comm_create(&world) != FD_OK) return 1;
  fd_log_init(fd_comm_rank(world), NULL);
  if (world->size < 3) {
    if (!world->rank) printf("needs 3 ranks\n");
    fd_comm_destroy(&world);
    return 77;
  }
  CHECK(tt_begin(world, 100) == FD_OK);
  train(world, 1, "one", SET("trainer.max_steps=20", "data.batch_size=24"));
  train(world, 2, "two", SET("trainer.max_steps=20", "data.batch_size=12"));
  train(world, 3, "three", SET("trainer.max_steps=20", "data.batch_size=8"));
  train(world, 2, "again", SET("trainer.max_steps=20", "data.batch_size=12"));
#ifndef TT_AVX2 /* the rest does not depend on the kernels */
  /* stopped and resumed, on the same rank count and on another */
  train(world, 2, "resumed", SET("trainer.max_steps=10", "data.batch_size=12"));
  train(world, 2, "resumed", SET("trainer.max_steps=20", "data.batch_size=12"));
  train(world, 2, "moved", SET("trainer.max_steps=10", "data.batch_size=12"));
  train(world, 3, "moved", SET("trainer.max_steps=20", "data.batch_size=8"));
  /* three micro-batches of 8, in place of one of 24 */
  train(world, 1, "accumulated", SET("trainer.max_steps=20", "data.batch_size=8", "trainer.gradient_accumulation_steps=3"));
  train(world, 2, "accumulated2", SET("trainer.max_steps=20", "data.batch_size=6", "trainer.gradient_accumulation_steps=2"));
  /* layers computed again in backward: the same numbers */
  train(world, 2, "recomputed", SET("trainer.max_steps=20", "data.batch_size=12", "trainer.enable_gradient_checkpointing=true"));
  /* bf16: the same bits when repeated */
  train(world, 2, "bf16", SET("trainer.max_steps=20", "data.batch_size=12", "trainer.mixed_precision=bf16"));
  train(world, 2, "bf16again", SET("trainer.max_steps=20", "data.batch_size=12", "trainer.mixed_precision=bf16"));
  /* a step that blows up is skipped, and too many end the run */
  train_fails(world, 2, "burst", FD_ERR_NUMERIC,
              SET("trainer.max_steps=20", "data.batch_size=4", "optimizer.lr=1000", "optimizer.weight_decay=1000",
                  "trainer.max_skipped_steps=3", "lr_scheduler.name=constant"));
#endif
  if (world->rank == 0) {
    check_close("2 ranks against 1", "two", "one");
    check_close("3 ranks against 1", "three", "one");
    check_same("repeated", "again", "two");
#ifndef TT_AVX2
    struct tt_row r[STEPS + 1], h[STEPS + 1];
    check_same("resumed", "resumed", "two");
    check_close("resumed on 3 ranks", "moved", "two");
    check_close("accumulated on 1 rank", "accumulated", "one");
    check_close("accumulated on 2 ranks", "accumulated2", "one");
    check_same("recomputed", "recomputed", "two");
    check_same("bf16 repeated", "bf16again", "bf16");
    if (tt_metrics("two", r, STEPS + 1) == STEPS && tt_metrics("bf16", h, STEPS + 1) == STEPS) {
      CHECK(r[STEPS - 1].loss < 0.9 * r[0].loss); /* it learns */
      CHECK(r[0].lr == 0 && tt_relative(r[3].lr, 0.75e-3) < 1e-6 && tt_relative(r[10].lr, 1e-3) < 1e-6);
      CHECK(tt_relative(h[0].loss, r[0].loss) < 0.02 && tt_relative(h[STEPS - 1].loss, r[STEPS - 1].loss) < 0.05);
    }
    const int burst = tt_metrics("burst", r, STEPS + 1);
    CHECK(burst >= 4 && burst < STEPS && isfinite(r[0].loss) && !isfinite(r[burst - 1].loss));
#endif
  }
  tt_end(world);
  int64_t failed = tt_failed;
  fd_comm_allreduce_i64(world, &failed, 1, FD_COMM_MAX);
  fd_log_close();
  fd_comm_destroy(&world);
  return (int)failed;
}
