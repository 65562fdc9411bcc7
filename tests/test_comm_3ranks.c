// SPDX-License-Identifier: Apache-2.0
// Communication on groups of 1, 2 and 3 ranks out of the three: sums in pieces and beside computation, agreement on
// failures, shared memory. Exact: the numbers summed are small integers, or every rank compares its bits with rank 0's.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"

static int failed;
#define CHECK(c)                                                                                    \
  do {                                                                                              \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

enum { N = 10007 };

static void *grab(size_t bytes) {
  void *p = malloc(bytes);
  if (!p) abort();
  return p;
}

/* sum over ranks of (r + 1) * (i % 7) */
static double want(int size, int64_t i) { return size * (size + 1) / 2.0 * (double)(i % 7); }

static void test_reduce(fd_comm *comm, size_t piece_bytes) {
  fd_comm_set_piece_bytes(comm, piece_bytes);
  float *f = grab(N * sizeof *f);
  double *d = grab(N * sizeof *d);
  fd_bf16 *b = grab(N * sizeof *b);
  for (int round = 0; round < 3; round++) { /* requests are used again */
    for (int i = 0; i < N; i++) {
      double v = (comm->rank + 1) * (i % 7);
      f[i] = (float)v;
      d[i] = v;
      b[i] = fd_f32_to_bf16((float)v);
    }
    CHECK(fd_comm_reduce_start(comm, 0, f, N, FD_F32) == FD_OK);
    CHECK(fd_comm_reduce_start(comm, 7, d, N, FD_F64) == FD_OK);
    CHECK(fd_comm_reduce_start(comm, 3, b, N, FD_BF16) == FD_OK);
    CHECK(fd_comm_reduce_start(comm, 4, b, 0, FD_BF16) == FD_OK);
    for (int i = 0; i < 100; i++) CHECK(fd_comm_progress(comm) == FD_OK);
    CHECK(fd_comm_reduce_wait(comm, 3) == FD_OK); /* not in the order of their start */
    CHECK(fd_comm_reduce_wait(comm, 0) == FD_OK);
    CHECK(fd_comm_reduce_wait(comm, 4) == FD_OK);
    CHECK(fd_comm_reduce_wait(comm, 7) == FD_OK);
    int wrong = 0;
    for (int i = 0; i < N; i++)
      wrong += f[i] != (float)want(comm->size, i) || d[i] != want(comm->size, i) ||
               fd_bf16_to_f32(b[i]) != (float)want(comm->size, i);
    CHECK(wrong == 0);
  }
  CHECK(fd_comm_progress(comm) == FD_OK);
  fd_comm_set_piece_bytes(comm, (size_t)1 << 30);
  free(f);
  free(d);
  free(b);
}

/* A rank's part of the sum; every rank's part for all. */
static void test_parts(fd_comm *comm, size_t piece_bytes) {
  fd_comm_set_piece_bytes(comm, piece_bytes);
  const int n = comm->size * 1000, part = 1000;
  float *f = grab((size_t)n * sizeof *f);
  double *d = grab((size_t)n * sizeof *d);
  for (int round = 0; round < 2; round++) {
    for (int i = 0; i < n; i++) f[i] = (float)((comm->rank + 1) * (i % 7)), d[i] = (double)(comm->rank * n + i);
    CHECK(fd_comm_collective_start(comm, FD_COMM_REDUCE_SCATTER, 0, f, n, FD_F32) == FD_OK);
    CHECK(fd_comm_collective_start(comm, FD_COMM_ALL_GATHER, 1, d, n, FD_F64) == FD_OK);
    CHECK(fd_comm_reduce_wait(comm, 1) == FD_OK && fd_comm_reduce_wait(comm, 0) == FD_OK);
    int wrong = 0;
    for (int i = comm->rank * part; i < (comm->rank + 1) * part; i++) wrong += f[i] != (float)want(comm->size, i);
    for (int i = 0; i < n; i++) wrong += d[i] != (double)(i / part * n + i);
    CHECK(wrong == 0);
  }
  fd_comm_set_piece_bytes(comm, (size_t)1 << 30);
  free(f);
  free(d);
}

/* Numbers whose sum depends on the order: all ranks hold the same bits, and again the same in a second run. */
static void test_deterministic(fd_comm *comm, fd_dtype dtype, int n) {
  size_t bytes = (size_t)n * fd_dtype_bytes(dtype);
  void *first = grab(bytes), *again = grab(bytes), *root = grab(bytes);
  for (int round = 0; round < 2; round++) {
    void *x = round ? again : first;
    uint32_t u = 12345u + 77u * (uint32_t)comm->rank;
    for (int i = 0; i < n; i++) {
      u = u * 1664525u + 1013904223u;
      float v = (float)(int32_t)u * 1e-9f;
      if (dtype == FD_F32) ((float *)x)[i] = v;
      if (dtype == FD_BF16) ((fd_bf16 *)x)[i] = fd_f32_to_bf16(v);
    }
    CHECK(fd_comm_reduce_start(comm, 1, x, n, dtype) == FD_OK);
    CHECK(fd_comm_reduce_wait(comm, 1) == FD_OK);
  }
  memcpy(root, first, bytes);
  CHECK(fd_comm_bcast(comm, root, bytes, 0) == FD_OK);
  CHECK(memcmp(root, first, bytes) == 0);
  CHECK(memcmp(again, first, bytes) == 0);
  free(first);
  free(again);
  free(root);
}

static void test_agree(fd_comm *comm) {
  CHECK(fd_agree(comm, FD_OK) == FD_OK);
  int culprit = comm->size - 1;
  fd_status st = comm->rank == culprit ? FD_FAIL(FD_ERR_IO, "disk of rank %d", culprit) : FD_OK;
  CHECK(fd_agree(comm, st) == FD_ERR_IO);
  char text[64];
  snprintf(text, sizeof text, "disk of rank %d", culprit);
  CHECK(strstr(fd_status_message(), text) != NULL);
  CHECK((strstr(fd_status_message(), comm->host) != NULL) == (culprit != 0));
  CHECK(strstr(fd_status_where(), "test_comm") != NULL);
  /* all fail, each in its own way: the lowest rank is heard */
  static const fd_status each[] = {FD_ERR_CONFIG, FD_ERR_DATA, FD_ERR_NOMEM};
  st = FD_FAIL(each[comm->rank], "rank %d's own", comm->rank);
  CHECK(fd_agree(comm, st) == FD_ERR_CONFIG);
  CHECK(strcmp(fd_status_message(), "rank 0's own") == 0);
}

static void test_small(fd_comm *comm) {
  char *text = NULL;
  if (comm->rank == 0) text = strdup("a text");
  CHECK(fd_comm_bcast_text(comm, &text, 0) == FD_OK && text && strcmp(text, "a text") == 0);
  free(text);
  text = NULL;
  CHECK(fd_comm_bcast_text(comm, &text, 0) == FD_OK && text == NULL);

  int mine = 10 * comm->rank, all[3] = {-1, -1, -1};
  CHECK(fd_comm_allgather(comm, &mine, sizeof mine, all) == FD_OK);
  for (int r = 0; r < comm->size; r++) CHECK(all[r] == 10 * r);

  char word[4] = "xyz";
  void *words = NULL;
  size_t *first = NULL;
  CHECK(fd_comm_allgatherv(comm, word, (size_t)comm->rank, &words, &first) == FD_OK);
  for (int r = 0; r < comm->size; r++)
    CHECK(first[r + 1] - first[r] == (size_t)r && memcmp((char *)words + first[r], "xyz", (size_t)r) == 0);
  free(words);
  free(first);

  double d[2] = {comm->rank + 1, -comm->rank};
  CHECK(fd_comm_allreduce_f64(comm, d, 2, FD_COMM_MAX) == FD_OK && d[0] == comm->size && d[1] == 0);
  int64_t i = comm->rank + 5;
  CHECK(fd_comm_allreduce_i64(comm, &i, 1, FD_COMM_MIN) == FD_OK && i == 5);
  uint64_t u = UINT64_C(1) << 63;
  CHECK(fd_comm_allreduce_u64(comm, &u, 1, FD_COMM_SUM) == FD_OK && u == (uint64_t)comm->size << 63);

  fd_comm_set_piece_bytes(comm, 24); /* a broadcast in pieces */
  char long_text[101];
  memset(long_text, comm->rank == 0 ? 'q' : 'z', 100);
  long_text[100] = 0;
  CHECK(fd_comm_bcast(comm, long_text, 100, 0) == FD_OK && strspn(long_text, "q") == 100);
  fd_comm_set_piece_bytes(comm, (size_t)1 << 30);
}

static void test_shared(fd_comm *comm) {
  fd_shared *s = NULL;
  CHECK(fd_shared_create(comm, 1000, &s) == FD_OK);
  char *p = s->data;
  CHECK(((uintptr_t)p & 63) == 0 && p[0] == 0 && p[999] == 0);
  CHECK(fd_comm_node_barrier(comm) == FD_OK);
  p[comm->node_rank] = (char)(comm->node_rank + 1);
  CHECK(fd_comm_node_barrier(comm) == FD_OK);
  for (int r = 0; r < comm->node_size; r++) CHECK(p[r] == r + 1);
  CHECK(fd_comm_node_barrier(comm) == FD_OK);
  fd_shared_destroy(&s);
  CHECK(s == NULL);
}

static void test_misuse(fd_comm *comm) {
  if (comm->size == 1) return; /* one rank: nothing is sent, nothing can be wrong */
  float x[4] = {0};
  CHECK(fd_comm_reduce_wait(comm, 5) == FD_ERR_ARG);
  CHECK(fd_comm_reduce_start(comm, 5, x, 4, FD_I32) == FD_ERR_ARG);
  CHECK(fd_comm_collective_start(comm, FD_COMM_REDUCE_SCATTER, 5, x, comm->size + 1, FD_F32) == FD_ERR_ARG &&
        strstr(fd_status_message(), "no multiple"));
  CHECK(fd_comm_reduce_start(comm, -1, x, 4, FD_F32) == FD_ERR_ARG);
  CHECK(fd_comm_reduce_start(comm, 5, x, 4, FD_F32) == FD_OK);
  CHECK(fd_comm_reduce_start(comm, 5, x, 4, FD_F32) == FD_ERR_ARG); /* not free yet */
  CHECK(fd_comm_reduce_wait(comm, 5) == FD_OK);
  CHECK(fd_comm_take_wait_s(comm) >= 0);
  CHECK(fd_comm_take_wait_s(comm) == 0);
}

int main(void) {
  fd_comm *world = NULL;
  if (fd_comm_create(&world) != FD_OK) {
    fprintf(stderr, "%s\n", fd_status_message());
    return 1;
  }
  CHECK(world->node_size >= 1 && world->n_nodes >= 1 && world->host[0]);
  for (int size = 1; size <= world->size && size <= 3; size++) {
    fd_comm *comm = NULL;
    CHECK(fd_comm_split(world, world->rank < size ? 0 : -1, &comm) == FD_OK);
    CHECK((comm != NULL) == (world->rank < size));
    if (comm) {
      CHECK(comm->size == size && comm->rank == world->rank);
      test_reduce(comm, (size_t)1 << 30);
      test_reduce(comm, 4096);
      test_parts(comm, (size_t)1 << 30);
      test_parts(comm, 1024);
      test_deterministic(comm, FD_F32, 5);
      test_deterministic(comm, FD_F32, 300001);
      test_deterministic(comm, FD_BF16, 300001);
      test_agree(comm);
      test_small(comm);
      test_shared(comm);
      test_misuse(comm);
    }
    fd_comm_destroy(&comm);
  }
  int64_t any = failed;
  CHECK(fd_comm_allreduce_i64(world, &any, 1, FD_COMM_MAX) == FD_OK);
  fd_comm_destroy(&world);
  return failed || any;
}
