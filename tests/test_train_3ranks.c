// SPDX-License-Identifier: Apache-2.0
// Training on 1, 2 and 3 ranks: the same losses; the same bits when repeated or resumed; accumulation equals a larger batch.
// test_train_avx2_3ranks is the same with kernels of AVX2 at most.
#include "traintest.h"

enum { STEPS = 20 };

static void train(fd_comm *world, int ranks, const char *run, const char *const *more) {
  tt_train_on(world, ranks, run, FD_OK, more);
}

/* Step 1 within 1e-6, all within 1e-5 */
static void check_close(const char *run_a, const char *run_b) { tt_check_close(run_a, run_b, STEPS, 1e-6, 1e-5, INFINITY); }

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
  train(world, 1, "one", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=24"));
  train(world, 2, "two", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=12"));
  train(world, 3, "three", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=8"));
  train(world, 2, "again", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=12"));
#ifndef TT_AVX2 /* the rest does not depend on the kernels */
  /* stopped and resumed, on the same rank count and on another */
  train(world, 2, "resumed", TT_SETTINGS("trainer.max_steps=10", "data.batch_size=12"));
  train(world, 2, "resumed", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=12"));
  train(world, 2, "moved", TT_SETTINGS("trainer.max_steps=10", "data.batch_size=12"));
  train(world, 3, "moved", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=8"));
  /* three micro-batches of 8, in place of one of 24 */
  train(world, 1, "accumulated", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=8", "trainer.gradient_accumulation_steps=3"));
  train(world, 2, "accumulated2", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=6", "trainer.gradient_accumulation_steps=2"));
  /* layers computed again in backward: the same numbers */
  train(world, 2, "recomputed", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=12", "trainer.enable_gradient_checkpointing=true"));
  /* bf16: the same bits when repeated */
  train(world, 2, "bf16", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=12", "trainer.mixed_precision=bf16"));
  train(world, 2, "bf16again", TT_SETTINGS("trainer.max_steps=20", "data.batch_size=12", "trainer.mixed_precision=bf16"));
  /* a step that blows up is skipped, and too many end the run */
  tt_train_on(world, 2, "burst", FD_ERR_NUMERIC,
              TT_SETTINGS("trainer.max_steps=20", "data.batch_size=4", "optimizer.lr=1000", "optimizer.weight_decay=1000",
                  "trainer.max_skipped_steps=3", "lr_scheduler.name=constant"));
#endif
  if (world->rank == 0) {
    check_close("two", "one");
    check_close("three", "one");
    tt_check_same("again", "two", STEPS);
#ifndef TT_AVX2
    struct tt_row r[STEPS + 1], h[STEPS + 1];
    tt_check_same("resumed", "two", STEPS);
    check_close("moved", "two");
    check_close("accumulated", "one");
    check_close("accumulated2", "one");
    tt_check_same("recomputed", "two", STEPS);
    tt_check_same("bf16again", "bf16", STEPS);
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
