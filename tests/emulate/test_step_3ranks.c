// SPDX-License-Identifier: Apache-2.0
// Training through the CUDA backend's own code, emulated, on 1, 2 and 3 ranks: the losses of the CPU backend. From its second step on each
// rank replays what it recorded; with trainer.cuda_graph off it issues op by op: the same bits.
#include "tests/emulate/emulate.h"
#include "tests/traintest.h"

enum { STEPS = 4 };

static void train(fd_comm *world, int ranks, const char *run, const char *backend, const char *batch, const char *more) {
  char backend_text[64];
  snprintf(backend_text, sizeof backend_text, "trainer.backend=%s", backend);
  const long before = fd_emu_graph_launches();
  tt_train_on(world, ranks, run, FD_OK,
              TT_SETTINGS(backend_text, batch, "trainer.max_steps=4", "data.resolution=32", "trainer.deterministic=true", more));
  /* the first step is issued; then text, VAE, forward, backward and the optimiser are replayed */
  const long launches = fd_emu_graph_launches() - before;
  const bool records = fd_comm_rank(world) < ranks && !strcmp(backend, "cuda") && !(more && strstr(more, "cuda_graph=false"));
  CHECK(records ? launches >= 5 * (STEPS - 1) : launches == 0);
}

/* Losses within `tolerance`, gradient norms within ten of it, relative. */
static void close_to(const char *run_a, const char *run_b, double tolerance) {
  tt_check_close(run_a, run_b, STEPS, tolerance, tolerance, 10 * tolerance);
}

int main(void) {
  fd_comm *world = NULL;
  if (fd_comm_create(&world) != FD_OK) return 1;
  fd_log_init(fd_comm_rank(world), NULL);
  if (world->size < 3) {
    if (!world->rank) printf("needs 3 ranks\n");
    fd_comm_destroy(&world);
    return 77;
  }
  CHECK(tt_begin(world, 24) == FD_OK);
  train(world, 1, "cpu", "cpu", "data.batch_size=6", NULL);
  train(world, 1, "cuda1", "cuda", "data.batch_size=6", NULL);
  train(world, 2, "cuda2", "cuda", "data.batch_size=3", NULL);
  train(world, 3, "cuda3", "cuda", "data.batch_size=2", NULL);
  train(world, 3, "issued", "cuda", "data.batch_size=2", "trainer.cuda_graph=false");
  train(world, 3, "accumulated", "cuda", "data.batch_size=1", "trainer.gradient_accumulation_steps=2");
  train(world, 1, "cpu16", "cpu", "data.batch_size=6", "trainer.mixed_precision=bf16");
  train(world, 1, "cuda16", "cuda", "data.batch_size=6", "trainer.mixed_precision=bf16");
  if (world->rank == 0) {
    close_to("cuda1", "cpu", 1e-5);
    close_to("cuda2", "cpu", 1e-5);
    close_to("cuda3", "cpu", 1e-5);
    close_to("accumulated", "cpu", 1e-5);
    close_to("cuda16", "cpu16", 0.02);
    tt_check_same("issued", "cuda3", STEPS);
  }
  tt_end(world);
  int64_t failed = tt_failed;
  fd_comm_allreduce_i64(world, &failed, 1, FD_COMM_MAX);
  fd_log_close();
  fd_comm_destroy(&world);
  return (int)failed;
}
