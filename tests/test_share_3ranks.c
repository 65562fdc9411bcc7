// SPDX-License-Identifier: Apache-2.0
// Frozen weights shared by the ranks of a node: one copy, the same values for all, a failure of the reader is everybody's.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm.h"
#include "cpu/cpu.h"
#include "model/model.h"

static int failed;
#define CHECK(c)                                                                            \
  do {                                                                                      \
    if (!(c)) failed = 1, printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static fd_status spoil(void *user, fd_params *p, int row, const float *values) {
  if (row == *(int *)user) return FD_FAIL(FD_ERR_IO, "row %d cannot be read", row);
  return fd_params_set(p, row, values);
}

static fd_model *make(fd_ctx *ctx, fd_comm *comm) {
  fd_model *m = NULL;
  json_t *json = json_loads("{\"_class_name\":\"AutoencoderKL\",\"block_out_channels\":[8,16],\"norm_num_groups\":4}", 0, NULL);
  CHECK(fd_model_create("vae", json, &m) == FD_OK);
  json_decref(json);
  if (!m) exit(1);
  CHECK(fd_params_layout(m->params, false, comm->size) == FD_OK);
  fd_params_share(m->params, comm);
  CHECK(fd_params_alloc(m->params, ctx, FD_BF16, false) == FD_OK);
  return m;
}

int main(void) {
  fd_comm *comm = NULL;
  fd_ctx *ctx = NULL;
  if (fd_comm_create(&comm) != FD_OK || fd_ctx_create(&fd_cpu_backend, 1, comm, &ctx) != FD_OK) return 1;
  fd_model *m = make(ctx, comm);
  bool writes = false;
  if (!fd_params_shared(m->params, &writes)) {
    printf("no shared memory here: %s\n", fd_status_message());
    fd_model_destroy(&m);
    fd_ctx_destroy(&ctx);
    fd_comm_destroy(&comm);
    return 77;
  }
  CHECK(writes == (comm->node_rank == 0));
  CHECK(fd_model_init(m, 3, NULL, NULL) == FD_OK);
  float *ours = malloc(1 << 20), *want = malloc(1 << 20);
  for (int i = 0; i < fd_params_count(m->params); i++) {
    const struct fd_param *r = fd_params_row(m->params, i);
    CHECK(fd_params_get(m->params, i, ours) == FD_OK && fd_params_init_row(m->params, i, 3, want) == FD_OK);
    for (int64_t k = 0; k < r->numel; k++)
      if (fd_params_dtype(m->params, i) == FD_BF16) want[k] = fd_bf16_to_f32(fd_f32_to_bf16(want[k]));
    CHECK(memcmp(ours, want, (size_t)r->numel * sizeof *ours) == 0);
  }
  /* one copy: what the writer changes, the others see */
  CHECK(fd_comm_barrier(comm) == FD_OK);
  if (writes) {
    ours[0] = 42;
    CHECK(fd_params_set(m->params, 1, ours) == FD_OK);
  }
  CHECK(fd_comm_barrier(comm) == FD_OK);
  CHECK(fd_params_get(m->params, 1, want) == FD_OK && want[0] == 42);
  CHECK(fd_comm_barrier(comm) == FD_OK);
  int bad = 5;
  CHECK(fd_model_init(m, 3, spoil, &bad) == FD_ERR_IO && strstr(fd_status_message(), "row 5 cannot be read"));
  fd_model_destroy(&m);
  free(ours);
  free(want);
  fd_ctx_destroy(&ctx);
  fd_comm_destroy(&comm);
  return failed;
}
