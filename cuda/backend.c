// SPDX-License-Identifier: Apache-2.0
// The CUDA backend: its table, its memory and streams. One rank drives one device, chosen by its number on the node.
// Invariant: every op runs on fd_cuda.stream; only collectives use another stream, tied to it by events.
#include "cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "comm/comm.h"
#include "cpu/cpu.h"
#include "cuda/library.h"

enum { WAIT_US = 20 /* between two looks at the stream */, STAGE = 4 << 20 /* bytes of a half */ };

static const struct fd_ops kernels = {
#define X(name, slots) .name = cuda_##name,
#include "op/ops.def"
#undef X
};

fd_status fd_cuda_status(cudaError_t e, const char *what, const char *file, int line) {
  if (e == cudaSuccess) return FD_OK;
  return fd_fail(e == cudaErrorMemoryAllocation ? FD_ERR_NOMEM : FD_ERR_UNSUPPORTED, file, line, "CUDA: %s: %s%s", what, cudaGetErrorString(e),
                 e == cudaErrorNoKernelImageForDevice ? "; this program has no code for this GPU: reconfigure with --with-cuda-arch=LIST" : "");
}

/* ---- prepare ----------------------------------------------------------------------------------------------------- */

size_t cuda_rmsnorm_bwd_scratch(const struct fd_rmsnorm_bwd_args *a);
size_t cuda_gate_residual_bwd_scratch(const struct fd_gate_residual_bwd_args *a);
size_t cuda_groupnorm_fwd_scratch(const struct fd_groupnorm_fwd_args *a);
size_t cuda_groupnorm_bwd_scratch(const struct fd_groupnorm_bwd_args *a);
size_t cuda_heads_bwd_scratch(const struct fd_heads_bwd_args *a);
size_t cuda_colsum_scratch(const struct fd_colsum_args *a);
size_t cuda_sumsq_scratch(const struct fd_sumsq_args *a);
fd_status cuda_attention_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes);
fd_status cuda_conv2d_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes);

/* What an op needs before it runs, where it needs anything: an amount of scratch, or plans of libraries (which say their scratch). */
typedef size_t scratch_fn(const void *args);
static const struct {
  scratch_fn *scratch;
  fd_status (*prepare)(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes);
  bool checks; /* prepare checks shapes by itself: the CPU's check would make plans of its own libraries */
} needs[FD_OP_COUNT] = {
#define SCRATCH(op) [FD_OP_##op] = {.scratch = (scratch_fn *)(void (*)(void))cuda_##op##_scratch}
    SCRATCH(rmsnorm_bwd),
    SCRATCH(gate_residual_bwd),
    SCRATCH(groupnorm_fwd),
    SCRATCH(groupnorm_bwd),
    SCRATCH(heads_bwd),
    SCRATCH(colsum),
    SCRATCH(sumsq),
    [FD_OP_attention_fwd] = {.prepare = cuda_attention_prepare},
    [FD_OP_attention_bwd] = {.prepare = cuda_attention_prepare},
    [FD_OP_conv2d_fwd] = {.prepare = cuda_conv2d_prepare, .checks = true},
    [FD_OP_conv2d_bwd_data] = {.prepare = cuda_conv2d_prepare, .checks = true},
    [FD_OP_conv2d_bwd_weights] = {.prepare = cuda_conv2d_prepare, .checks = true},
    [FD_OP_matmul] = {.prepare = cuda_matmul_prepare, .checks = true},
};

static fd_status cuda_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  fd_status st = FD_OK;
  *scratch_bytes = 0;
  FD_TRY(fd_op_check(op, args));
  if (!needs[op].checks) FD_TRY(cpu_check(ctx, op, args));
  if (needs[op].scratch) *scratch_bytes = needs[op].scratch(args);
  if (needs[op].prepare) FD_TRY(needs[op].prepare(ctx, op, args, scratch_bytes));
done:
  return st;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

/* How many GPUs this process may use; if none, why. Without a driver the runtime calls it "insufficient", of version 0. */
static int count_gpus(char *why, size_t why_bytes) {
  int n = 0, driver = 0, runtime = 0;
  const cudaError_t e = cudaGetDeviceCount(&n);
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (e == cudaSuccess && n > 0) return n;
  (void)cudaGetLastError(); /* it is reported here */
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  if (driver == 0)
    snprintf(why, why_bytes, "no NVIDIA driver on this machine");
  else if (e == cudaErrorInsufficientDriver)
    snprintf(why, why_bytes, "the NVIDIA driver is too old: it is for CUDA %d.%d, this program is built with CUDA %d.%d; update the driver, or build with CUDA %d",
             driver / 1000, driver / 10 % 100, runtime / 1000, runtime / 10 % 100, driver / 1000);
  else if (e == cudaSuccess || e == cudaErrorNoDevice)
    snprintf(why, why_bytes, "the NVIDIA driver finds no GPU%s%s%s", visible ? " (CUDA_VISIBLE_DEVICES=\"" : "", visible ? visible : "", visible ? "\")" : "");
  else
    snprintf(why, why_bytes, "%s (driver for CUDA %d.%d)", cudaGetErrorString(e), driver / 1000, driver / 10 % 100);
  return 0;
}

static void cuda_close(fd_ctx *ctx) {
  struct fd_cuda *c = ctx->state;
  if (!c) return;
  if (c->stream) cudaStreamSynchronize(c->stream);
  fd_cuda_library_close(ctx);
  if (c->comm_event) cudaEventDestroy(c->comm_event);
  for (int i = 0; i < 2; i++)
    if (c->join_event[i]) cudaEventDestroy(c->join_event[i]);
  for (int i = 0; i < 2; i++)
    if (c->stage_done[i]) cudaEventDestroy(c->stage_done[i]);
  if (c->stage) cudaFreeHost(c->stage);
  if (c->comm_stream) cudaStreamDestroy(c->comm_stream);
  if (c->stream) cudaStreamDestroy(c->stream);
  free(c);
  ctx->state = NULL;
}

/* What this rank can do by itself: its GPU, streams, events. */
static fd_status open_device(fd_ctx *ctx) {
  fd_status st = FD_OK;
  struct fd_cuda *c = ctx->state;
  char why[256];
  const int n = count_gpus(why, sizeof why), rank = ctx->comm ? ctx->comm->node_rank : 0;
  if (n == 0) FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "cuda: %s; trainer.backend = \"cpu\" runs without a GPU", why));
  c->device = rank % n;
  FD_TRY(FD_CUDA(cudaSetDevice(c->device)));
  FD_TRY(FD_CUDA(cudaDeviceGetAttribute(&c->sm_count, cudaDevAttrMultiProcessorCount, c->device)));
  FD_TRY(FD_CUDA(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking)));
  FD_TRY(FD_CUDA(cudaStreamCreateWithFlags(&c->comm_stream, cudaStreamNonBlocking)));
  FD_TRY(FD_CUDA(cudaEventCreateWithFlags(&c->comm_event, cudaEventDisableTiming)));
  for (int i = 0; i < 2; i++) FD_TRY(FD_CUDA(cudaEventCreate(&c->join_event[i])));
  FD_TRY(FD_CUDA(cudaMallocHost((void **)&c->stage, 2 * (size_t)STAGE)));
  for (int i = 0; i < 2; i++) FD_TRY(FD_CUDA(cudaEventCreateWithFlags(&c->stage_done[i], cudaEventDisableTiming)));
done:
  return st;
}

/* A GPU is known by its node and uuid: whether ranks see all GPUs of the node or one each (srun --gpus-per-task), numbers do not tell. */
struct place {
  int node, gpus;
  char uuid[16];
};

static fd_status find_sharing(fd_ctx *ctx, const struct cudaDeviceProp *prop) {
  fd_status st = FD_OK;
  struct fd_cuda *c = ctx->state;
  const fd_comm *comm = ctx->comm;
  const int size = fd_comm_size(comm);
  struct place mine = {.node = comm ? comm->node : 0}, *all = calloc((size_t)size, sizeof *all);
  int other = -1, on_node = 0;
  memcpy(mine.uuid, prop->uuid.bytes, sizeof mine.uuid);
  (void)cudaGetDeviceCount(&mine.gpus);
  FD_TRY(fd_agree(ctx->comm, all ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for the list of GPUs")));
  if (size == 1) goto done;
  FD_TRY(fd_comm_allgather(ctx->comm, &mine, sizeof mine, all));
  for (int r = 0; r < size; r++) {
    if (all[r].node != mine.node) continue;
    on_node++;
    if (r != comm->rank && other < 0 && !memcmp(all[r].uuid, mine.uuid, sizeof mine.uuid)) other = r;
  }
  int64_t shared = other >= 0;
  FD_TRY(fd_comm_allreduce_i64(ctx->comm, &shared, 1, FD_COMM_MAX));
  c->shared = shared;
  if (other >= 0 && !ctx->share_device)
    st = FD_FAIL(FD_ERR_UNSUPPORTED,
                 "cuda: ranks %d and %d use the same GPU (%s): %d ranks on this node, and this rank sees %d GPU%s; start at most one rank per GPU, let "
                 "srun give each its own (--gpus-per-task=1), or set trainer.share_gpu = true",
                 comm->rank < other ? comm->rank : other, comm->rank < other ? other : comm->rank, prop->name, on_node, mine.gpus, mine.gpus == 1 ? "" : "s");
  st = fd_agree(ctx->comm, st);
done:
  free(all);
  return st;
}

/* What rank 0 runs on: the first thing to look at when a run is slow or fails. */
static void log_device(fd_ctx *ctx, const struct cudaDeviceProp *prop) {
  const struct fd_cuda *c = ctx->state;
  char libraries[256];
  size_t free_bytes = 0, total = 0;
  int driver = 0, runtime = 0;
  (void)cudaMemGetInfo(&free_bytes, &total);
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  fd_cuda_library_versions(libraries, sizeof libraries);
  fd_log_info("cuda: GPU %d, %s (compute %d.%d, %d multiprocessors), %.1f of %.1f GB free", c->device, prop->name, prop->major, prop->minor, c->sm_count,
              (double)free_bytes * 1e-9, (double)total * 1e-9);
  fd_log_info("cuda: driver for CUDA %d.%d, runtime %d.%d, %s", driver / 1000, driver / 10 % 100, runtime / 1000, runtime / 10 % 100, libraries);
  if (fd_comm_size(ctx->comm) == 1) return;
  if (c->shared)
    fd_log_info("cuda: ranks share a GPU, so sums over ranks go through host memory and MPI, and steps are not recorded");
  else
    fd_log_info("cuda: one GPU for each of %d ranks, sums by NCCL", fd_comm_size(ctx->comm));
}

static fd_status cuda_open(fd_ctx *ctx) {
  fd_status st = FD_OK;
  struct cudaDeviceProp prop;
  ctx->state = calloc(1, sizeof(struct fd_cuda));
  st = ctx->state ? open_device(ctx) : FD_FAIL(FD_ERR_NOMEM, "no memory for the CUDA backend");
  if (st == FD_OK) st = FD_CUDA(cudaGetDeviceProperties(&prop, fd_cuda_of(ctx)->device));
  FD_TRY(fd_agree(ctx->comm, st)); /* before anything that the ranks do together */
  FD_TRY(find_sharing(ctx, &prop));
  st = fd_cuda_library_open(ctx);
  FD_TRY(fd_agree(ctx->comm, st));
  log_device(ctx, &prop);
done:
  if (st != FD_OK) cuda_close(ctx);
  return st;
}

static fd_status cuda_alloc(fd_ctx *ctx, size_t bytes, void **out) {
  void *p = NULL;
  size_t free_bytes = 0, total = 0;
  cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
  if (e == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError(); /* it is reported here, not by the next launch */
    (void)cudaMemGetInfo(&free_bytes, &total);
    return FD_FAIL(FD_ERR_NOMEM, "cuda: no memory: %.2f GB wanted, %.2f of %.2f GB free on GPU %d; `fdhpc plan` shows what a rank needs",
                   (double)bytes * 1e-9, (double)free_bytes * 1e-9, (double)total * 1e-9, fd_cuda_of(ctx)->device);
  }
  if (e != cudaSuccess) return FD_CUDA(e);
  fd_status st = FD_CUDA(cudaMemsetAsync(p, 0, bytes, fd_cuda_stream(ctx)));
  if (st != FD_OK) {
    cudaFree(p);
    return st;
  }
  *out = p;
  return FD_OK;
}

static void cuda_free(fd_ctx *ctx, void *p) {
  (void)ctx;
  cudaFree(p);
}

/* Counts of rows are copied by the host; matrix products need them when they are launched. So a copy of one word is remembered. */
static void remember_word(struct fd_cuda *c, const void *dst, const void *src) {
  int i = 0;
  while (i < c->n_words && c->words[i].at != dst) i++;
  if (i == FD_CUDA_WORDS) i = c->n_words = 0; /* forgotten words are read back from the device */
  if (i == c->n_words) c->n_words++;
  c->words[i].at = dst;
  memcpy(&c->words[i].value, src, sizeof c->words[i].value);
}

bool fd_cuda_word(const struct fd_cuda *c, const void *at, int32_t *value) {
  for (int i = 0; i < c->n_words; i++)
    if (c->words[i].at == at) {
      *value = c->words[i].value;
      return true;
    }
  return false;
}

fd_status fd_cuda_count(fd_ctx *ctx, const fd_tensor *count, int64_t rows, int64_t *used) {
  fd_status st = FD_OK;
  int32_t value;
  *used = rows;
  if (!count) return FD_OK;
  if (!fd_cuda_word(ctx->state, count->data, &value)) FD_TRY(ctx->backend->from_device(ctx, &value, count->data, sizeof value));
  FD_TRY(fd_cuda_record_saw(ctx, count->data, value));
  *used = value < rows ? value : rows;
done:
  return st;
}

static fd_status cuda_to_device(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  fd_status st = FD_OK;
  struct fd_cuda *c = ctx->state;
  if (bytes == sizeof(int32_t)) remember_word(c, dst, src);
  for (size_t done = 0, n; done < bytes; done += n, c->stage_used += n) {
    if (c->stage_used == STAGE) { /* the other half, once its copies are over (none yet: at once) */
      FD_TRY(FD_CUDA(cudaEventRecord(c->stage_done[c->stage_half], c->stream)));
      c->stage_half ^= 1;
      c->stage_used = 0;
      FD_TRY(FD_CUDA(cudaEventSynchronize(c->stage_done[c->stage_half])));
    }
    char *at = c->stage + (size_t)c->stage_half * STAGE + c->stage_used;
    n = bytes - done < STAGE - c->stage_used ? bytes - done : STAGE - c->stage_used;
    memcpy(at, (const char *)src + done, n);
    FD_TRY(FD_CUDA(cudaMemcpyAsync((char *)dst + done, at, n, cudaMemcpyHostToDevice, c->stream)));
  }
done:
  return st;
}

/* Seconds between the events around the last wait for sums, once it is over. */
static fd_status count_wait(fd_ctx *ctx) {
  struct fd_cuda *c = ctx->state;
  float ms = 0;
  if (!c->joined) return FD_OK;
  c->joined = false;
  const fd_status st = FD_CUDA(cudaEventElapsedTime(&ms, c->join_event[0], c->join_event[1]));
  if (st == FD_OK) fd_comm_add_wait_s(ctx->comm, 1e-3 * ms);
  return st;
}

/* Wait for the stream. With other ranks it may wait for a sum that never comes: their errors are asked for meanwhile. */
static fd_status cuda_sync(fd_ctx *ctx) {
  fd_status st = FD_OK;
  cudaError_t e;
  if (fd_comm_size(ctx->comm) == 1) return FD_CUDA(cudaStreamSynchronize(fd_cuda_stream(ctx)));
  fd_comm_set_waiting(ctx->comm, true);
  while ((e = cudaStreamQuery(fd_cuda_stream(ctx))) == cudaErrorNotReady) {
    FD_TRY(fd_cuda_collective_check(ctx));
    FD_TRY(fd_comm_progress(ctx->comm));
    usleep(WAIT_US);
  }
  FD_TRY(FD_CUDA(e));
  FD_TRY(count_wait(ctx));
done:
  fd_comm_set_waiting(ctx->comm, false);
  return st;
}

static fd_status cuda_from_device(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  /* the copy itself waits for the stream, where nothing can be asked meanwhile: so it comes after */
  fd_status st = fd_comm_size(ctx->comm) > 1 ? cuda_sync(ctx) : FD_OK;
  if (st == FD_OK) st = FD_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, fd_cuda_stream(ctx)));
  return st == FD_OK ? FD_CUDA(cudaStreamSynchronize(fd_cuda_stream(ctx))) : st;
}

/* ---- points in time ---------------------------------------------------------------------------------------------- */

static fd_status cuda_mark(fd_ctx *ctx, void **point) {
  fd_status st = FD_OK;
  if (!*point) {
    cudaEvent_t e;
    FD_TRY(FD_CUDA(cudaEventCreate(&e)));
    *point = e;
  }
  FD_TRY(FD_CUDA(cudaEventRecord((cudaEvent_t)*point, fd_cuda_stream(ctx))));
done:
  return st;
}

static fd_status cuda_seconds(fd_ctx *ctx, const void *from, const void *to, double *seconds) {
  fd_status st = FD_OK;
  float ms = 0;
  (void)ctx;
  FD_TRY(FD_CUDA(cudaEventSynchronize((cudaEvent_t)to)));
  FD_TRY(FD_CUDA(cudaEventElapsedTime(&ms, (cudaEvent_t)from, (cudaEvent_t)to)));
  *seconds = 1e-3 * ms;
done:
  return st;
}

static void cuda_mark_free(fd_ctx *ctx, void **point) {
  (void)ctx;
  if (*point) cudaEventDestroy((cudaEvent_t)*point);
  *point = NULL;
}

static bool cuda_usable(char *why, size_t why_bytes) { return count_gpus(why, why_bytes) > 0; }

const struct fd_backend fd_cuda_backend = {
    .name = "cuda",
    .ops = &kernels,
    .usable = cuda_usable,
    .open = cuda_open,
    .close = cuda_close,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .to_device = cuda_to_device,
    .from_device = cuda_from_device,
    .sync = cuda_sync,
    .prepare = cuda_prepare,
    .mark = cuda_mark,
    .seconds = cuda_seconds,
    .mark_free = cuda_mark_free,
    .count_steps = FD_CUDA_COUNT_STEPS,
    .join = fd_cuda_collective_join,
    .record_begin = fd_cuda_record_begin,
    .record_end = fd_cuda_record_end,
    .record_fits = fd_cuda_record_fits,
    .replay = fd_cuda_replay,
    .record_free = fd_cuda_record_free,
};
