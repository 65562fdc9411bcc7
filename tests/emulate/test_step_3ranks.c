// SPDX-License-Identifier: Apache-2.0
// Training through the CUDA backend's own code, emulated, on 1, 2 and 3 ranks: the losses of the CPU backend. From its second step on each
// rank replays what it recorded; with trainer.cuda_graph off it issues op by op: the same bits.
#include "tests/emulate/emulate.h"
#include "tests/traintest.h"

enum { STEPS = 4 };

static void train(fd_comm *world, int ranks, const char *run, const char *backend, const char *batch, const char *more) {
  fd_comm *comm = NULL;
  char backend_text[64];
  snprintf(backend_text, sizeof backend_text, "trainer.backend=%s", backend);
  const long launches = fd_emu_graph_launches();
  fd_status st = fd_comm_split(world, fd_comm_rank(world) < ranks ? 0 : -1, &comm);
  if (st == FD_OK && comm) {
    const char *const set[] = {backend_text, batch, "trainer.max_steps=4", "data.resolution=32", "trainer.deterministic=true", more, NULL};
    st = tt_train(comm, run, set);
    if (st != FD_OK) printf("%s: %s: %s (%s)\n", run, fd_status_name(st), fd_status_message(), fd_status_where());
    /* the first step is issued; then text, VAE, forward, backward and the optimiser are replayed */
    const bool records = !strcmp(backend, "cuda") && !(more && strstr(more, "cuda_graph=false"));
    CHECK(records ? fd_emu_graph_launches() - launches >= 5 * (STEPS - 1) : fd_emu_graph_launches() == launches);
    fd_comm_destroy(&comm);
  }
  CHECK(st == FD_OK);
  fd_comm_barrier(world);
}

/* Losses and gradient norms within `tolerance`, relative. */
static void close_to(const char *run_a, const char *run_b, double tolerance) {
  struct tt_row a[STEPS + 1], b[STEPS + 1];
  const int n = tt_metrics(run_a, a, STEPS + 1), m = tt_metrics(run_b, b, STEPS + 1);
  CHECK(n == STEPS && m == STEPS);
  for (int i = 0; i < n && i < m; i++) {
    const bool ok = tt_relative(a[i].loss, b[i].loss) <= tolerance && tt_relative(a[i].norm, b[i].norm) <= 10 * tolerance;
    CHECK(ok);
    if (!ok) printf("%s, %s: step %ld: loss %.9g and %.9g, norm %.9g and %.9g\n", run_a, run_b, a[i].step, a[i].loss, b[i].loss, a[i].norm, b[i].norm);
  }
}

static void same_bits(const char *run_a, const char *run_b) {
  struct tt_row a[STEPS + 1], b[STEPS + 1];
  const int n = tt_metrics(run_a, a, STEPS + 1), m = tt_metrics(run_b, b, STEPS + 1);
  CHECK(n == STEPS && m == STEPS);
  for (int i = 0; i < n && i < m; i++) CHECK(!strcmp(a[i].text, b[i].text));
  const double d = tt_compare(run_a, run_b, STEPS);
  CHECK(d == 0);
  if (d != 0) printf("%s, %s: checkpoints differ by %g\n", run_a, run_b, d);
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
    same_bits("issued", "cuda3");
  }
  tt_end(world);
  int64_t failed = tt_failed;
  fd_comm_allreduce_i64(world, &failed, 1, FD_COMM_MAX);
  fd_log_close();
  fd_comm_destroy(&world);
  return (int)failed;
}
