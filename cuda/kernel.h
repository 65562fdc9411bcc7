/* What every .cu includes, and every C test of one.  Under nvcc the macros are plain
 * CUDA; with -DFD_EMULATE the same source runs on the CPU (emulate.h). */
#ifndef FD_KERNEL_H
#define FD_KERNEL_H

#include <stdint.h>

#ifdef FD_EMULATE
#include "tests/emulate/emulate.h"
#else
#include <cuda_runtime_api.h>
#define fd_emu_seed(seed) ((void)(seed))

#ifdef __CUDACC__
#include <cuda_bf16.h>
/* An expression of type cudaError_t.  Put a kernel with template commas in parentheses. */
#define FD_LAUNCH(kernel, grid, block, smem, stream, ...) \
    ((kernel)<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__), cudaGetLastError())
/* The block's dynamic shared memory, as T name[]. */
#define FD_SMEM(T, name) extern __shared__ __align__(16) unsigned char fd_smem[]; T *const name = (T *)fd_smem
#endif
#endif

#endif
