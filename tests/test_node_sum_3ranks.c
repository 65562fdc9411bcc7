// SPDX-License-Identifier: Apache-2.0
// Sums through shared memory: the sum in the order of the ranks, to the bit, whatever the sizes, the order of waiting and the
// speed of the ranks; several at a time and again and again; beside sums that go through MPI.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm.h"

static int failed;
#define CHECK(c)                                                                      \
  do {                                                                                \
    if (!(c)) failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c), fflush(stdout); \
  } while (0)

static float value(int rank, int round, int64_t i) {
  uint32_t x = (uint32_t)(i * 2654435761u) ^ (uint32_t)(rank * 40503 + round * 9176);
  x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
  return (float)((double)x / 4294967296.0 - 0.5) * (float)(1 << (x % 20));
}

static void run(fd_comm *comm, int rounds) {
  static const int64_t sizes[] = {1, 0, 15, 16, 17, 65535, 65536, 65537, 300001, 3};
  enum { N = sizeof sizes / sizeof sizes[0] };
  float *x[N];
  for (int k = 0; k < N; k++) x[k] = malloc((size_t)(sizes[k] + 1) * sizeof(float));
  for (int round = 0; round < rounds; round++) {
    double sum = comm->rank + 1;
    if ((round + comm->rank) % 4 == 3) usleep(3000); /* one rank is late */
    for (int k = 0; k < N; k++) {
      for (int64_t i = 0; i < sizes[k]; i++) x[k][i] = value(comm->rank, round * N + k, i);
      x[k][sizes[k]] = 7; /* must stay */
      CHECK(fd_comm_reduce_start(comm, k, x[k], sizes[k], FD_F32) == FD_OK);
      if (k == 4) CHECK(fd_comm_reduce_start(comm, N, &sum, 1, FD_F64) == FD_OK);
      if (k % 3 == comm->rank) CHECK(fd_comm_progress(comm) == FD_OK);
    }
    for (int j = 0; j < N; j++) {
      const int k = round % 2 ? N - 1 - j : j;
      CHECK(fd_comm_reduce_wait(comm, k) == FD_OK);
      int bad = x[k][sizes[k]] != 7;
      for (int64_t i = 0; i < sizes[k]; i++) {
        float want = value(0, round * N + k, i);
        for (int r = 1; r < comm->size; r++) want += value(r, round * N + k, i);
        bad += memcmp(&want, &x[k][i], sizeof want) != 0;
      }
      CHECK(!bad);
      if (bad) printf("%d ranks, round %d, %lld elements: %d wrong\n", comm->size, round, (long long)sizes[k], bad);
    }
    CHECK(fd_comm_reduce_wait(comm, N) == FD_OK && sum == comm->size * (comm->size + 1) / 2);
  }
  for (int k = 0; k < N; k++) free(x[k]);
}

int main(void) {
  fd_comm *world = NULL, *two = NULL;
  if (fd_comm_create(&world) != FD_OK) return 1;
  run(world, 9);
  CHECK(fd_comm_split(world, world->rank < 2 ? 0 : -1, &two) == FD_OK);
  if (two) {
    float x = 1;
    run(two, 5);
    CHECK(fd_comm_reduce_start(two, 0, &x, 1, FD_F32) == FD_OK);
    CHECK(fd_comm_reduce_start(two, 0, &x, 1, FD_F32) == FD_ERR_ARG);
    CHECK(fd_comm_reduce_wait(two, 0) == FD_OK && x == 2);
    CHECK(fd_comm_reduce_wait(two, 0) == FD_ERR_ARG);
    fd_comm_destroy(&two);
  }
  int64_t any = failed;
  fd_comm_allreduce_i64(world, &any, 1, FD_COMM_MAX);
  fd_comm_destroy(&world);
  return (int)any;
}
