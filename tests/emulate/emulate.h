/* CUDA device code as C++: one fiber per thread of a block, blocks one after another.  A thread
 * runs until it must wait for others, so no test passes by lockstep that CUDA does not promise.
 * What is checked, and what cannot be: README.md. */
#ifndef FD_EMULATE_H
#define FD_EMULATE_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C"
#endif
/** Order of blocks, warps and lanes from now on: 0 ascending, 1 descending, else shuffled. */
void fd_emu_seed(unsigned seed);

#ifdef __cplusplus
extern "C"
#endif
/** Work of the host in the order of the stream, for twins of libraries: f(data) is called now or, while the stream is captured, whenever
 *  the graph is launched, with a copy of `bytes` bytes. Not 0 is a failure. */
cudaError_t fd_emu_host(int (*f)(void *data), const void *data, size_t bytes);

#ifdef __cplusplus
extern "C"
#endif
/** The same on a stream that lags behind: f is called as late as may be, when another stream or the host waits for an event that was
 *  recorded after it, or for the stream. So what does not wait finds that nothing was done yet. */
cudaError_t fd_emu_host_later(cudaStream_t stream, int (*f)(void *data), const void *data, size_t bytes);

#ifdef __cplusplus
extern "C"
#endif
/** Calls of cudaGraphLaunch so far. */
long fd_emu_graph_launches(void);

#ifdef __cplusplus
#include <algorithm>
#include <cuda_bf16.h>
#include <math.h>
#include <string.h>
#include <type_traits>
#include <vector_functions.h>

#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#define __shared__ static
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#ifndef FD_EMU_CONST
#define FD_EMU_CONST const /* except where they are set */
#endif
extern FD_EMU_CONST uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

/* ---- launching ---- */

cudaError_t fd_emu_run(const char *name, const void *kernel, dim3 grid, dim3 block, size_t smem,
                       void (*entry)(void *), void *closure, size_t closure_bytes);
void *fd_emu_smem(void);

/* Arguments are evaluated by the host, once, as a launch does. */
template <class... P>
cudaError_t fd_emu_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t,
                          typename std::common_type<P>::type... a) {
  auto f = [=] { kernel(a...); };
  return fd_emu_run(name, (const void *)kernel, grid, block, smem, [](void *p) { (*(decltype(f) *)p)(); }, &f, sizeof f);
}
#define FD_LAUNCH(kernel, grid, block, smem, stream, ...) \
  fd_emu_launch(#kernel, (kernel), (grid), (block), (smem), (stream), __VA_ARGS__)
#define FD_SMEM(T, name) T *const name = (T *)fd_emu_smem()

template <class R, class... A>
cudaError_t cudaFuncSetAttribute(R (*kernel)(A...), cudaFuncAttribute attr, int value) {
  return cudaFuncSetAttribute((const void *)kernel, attr, value);
}

/* ---- barriers and warps ---- */

#define FD_EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
void __syncthreads(FD_EMU_SITE);

/* Each lane of mask gives a value and gets that of lane source.  FD_EMU_BITS: all lanes' lowest
 * bits.  FD_EMU_FENCE: nothing, but memory is ordered, which shuffles and votes do not do. */
enum { FD_EMU_BITS = -1, FD_EMU_FENCE = -2 };
uint64_t fd_emu_warp(unsigned mask, uint64_t value, int source, const char *file, int line);

static inline int fd_emu_lane(void) {
  return (int)((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}
static inline void __syncwarp(unsigned mask = ~0u, FD_EMU_SITE) {
  fd_emu_warp(mask, 0, FD_EMU_FENCE, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int p, FD_EMU_SITE) {
  return (unsigned)fd_emu_warp(mask, p != 0, FD_EMU_BITS, file, line);
}
static inline int __any_sync(unsigned mask, int p, FD_EMU_SITE) {
  return fd_emu_warp(mask, p != 0, FD_EMU_BITS, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int p, FD_EMU_SITE) {
  return fd_emu_warp(mask, p != 0, FD_EMU_BITS, file, line) == mask;
}

/* A source outside the lane's group of width lanes stands for the lane itself. */
template <class T>
T fd_emu_shfl(unsigned mask, T v, int source, int width, const char *file, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  int lane = fd_emu_lane(), first = lane & -width;
  uint64_t bits = 0;
  memcpy((void *)&bits, (const void *)&v, sizeof v);
  bits = fd_emu_warp(mask, bits, source >= first && source < first + width ? source : lane, file, line);
  memcpy((void *)&v, (const void *)&bits, sizeof v);
  return v;
}
#define FD_EMU_SHFL(name, type, source)                                         \
  template <class T>                                                            \
  T name(unsigned mask, T v, type by, int width = 32, FD_EMU_SITE) {            \
    const int lane = fd_emu_lane();                                             \
    return fd_emu_shfl(mask, v, source, width, file, line);                     \
  }
FD_EMU_SHFL(__shfl_sync, int, (lane & -width) | (by & (width - 1)))
FD_EMU_SHFL(__shfl_xor_sync, int, lane ^ by)
FD_EMU_SHFL(__shfl_down_sync, unsigned, lane + (int)by)
FD_EMU_SHFL(__shfl_up_sync, unsigned, lane - (int)by)

/* ---- memory ---- */

void fd_emu_atomic(void *p, size_t bytes, const void *pc);

template <class T, class F>
__attribute__((no_sanitize("thread"), noinline)) T fd_emu_update(T *p, F f) {
  fd_emu_atomic(p, sizeof *p, __builtin_return_address(0));
  T old = *p;
  *p = f(old);
  return old;
}
#define FD_EMU_ATOMIC(name, new_value) \
  template <class T> __forceinline__ T name(T *p, T v) { return fd_emu_update(p, [=](T old) { return new_value; }); }
FD_EMU_ATOMIC(atomicAdd, old + v)
FD_EMU_ATOMIC(atomicMax, old < v ? v : old)
FD_EMU_ATOMIC(atomicMin, v < old ? v : old)
FD_EMU_ATOMIC(atomicExch, (void(old), v))
template <class T> __forceinline__ T atomicCAS(T *p, T is, T v) {
  return fd_emu_update(p, [=](T old) { return old == is ? v : old; });
}

template <class T> __forceinline__ T __ldg(const T *p) { return *p; }
template <class T> __forceinline__ T __ldcs(const T *p) { return *p; }
template <class T> __forceinline__ void __stcs(T *p, T v) { *p = v; }

/* ---- arithmetic: as rounded by libm where the GPU approximates ---- */

using std::max;
using std::min;
#define __expf(x) expf(x) /* macros: glibc declares these names for itself */
#define __logf(x) logf(x)
#define __powf(x, y) powf(x, y)
static inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
static inline float cospif(float x) { return (float)cos(3.14159265358979323846 * (double)x); }
static inline float sinpif(float x) { return (float)sin(3.14159265358979323846 * (double)x); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

template <class T, class F> T fd_emu_bits(F x) {
  static_assert(sizeof(T) == sizeof(F), "same size");
  T y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline int __float_as_int(float x) { return fd_emu_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return fd_emu_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return fd_emu_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return fd_emu_bits<float>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }

#endif
#endif
