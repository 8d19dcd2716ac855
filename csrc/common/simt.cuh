// The dialect of CUDA C++ of every <part>.cuh: nvcc compiles it for the GPU, g++ for the emulation on the CPU.
//
//   Global<T>, Shared<T>               a T* to global or shared memory (the emulation checks every access)
//   SIMT_SHARED(T, name, count)        __shared__ T name[count]
//   SharedPool pool; pool.take<T>(n, "name")     dynamic shared memory cut into arrays, each 16-byte aligned;
//                                      SharedBytes().add<T>(n).total() is the size that the launch must pass
//   ScratchPool pool(bytes)            the same cuts out of global memory
//   load<V>(p), store<V>(p, v)         a wide access (float4, uint4, ...) at p, which must be aligned to it
//   SIMT_LAUNCH(kernel, grid, block, shared, stream, arguments...)   returns nullptr or an error message
//   bfloat16, float16, to_float(x), from_float<T>(x)
//   load_acquire(p)                    reads a flag that another block's atomic set
// Rules that the emulation enforces. Name the type of a value that is read (no `auto x = p[i]`). Every thread of a
// block reaches the same __syncthreads. A shuffle does not order memory; __syncwarp does.
#pragma once

#include <cstdint>

#if defined(CALM_FAST_EMULATED)

#include "emulation/cuda_emulation.hpp"

namespace calm_fast::simt {

template <class T>
using Global = emulation::Pointer<T>;
template <class T>
using Shared = emulation::Pointer<T>;
using emulation::bfloat16;
using emulation::float16;
using emulation::load_acquire;
using emulation::ScratchPool;
using emulation::SharedPool;
using emulation::to_float;
using Stream = emulation::Schedule;

template <class V, class T>
V load(emulation::Pointer<T> p) {
  return emulation::read<V>(p.memory(), p.offset());
}
template <class V, class T>
void store(emulation::Pointer<T> p, const V& value) {
  emulation::write<V>(p.memory(), p.offset(), value);
}

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else if constexpr (std::is_same_v<T, bfloat16>) return emulation::to_bfloat16(x);
  else return emulation::to_float16(x);
}

template <class Kernel, class... Args>
const char* emulate(Kernel kernel, dim3 grid, dim3 block, size_t shared, Stream schedule, const Args&... args) {
  emulation::run(grid, block, shared, schedule, [&] { kernel(args...); });  // throws emulation::Failure
  return nullptr;
}

}  // namespace calm_fast::simt

#define SIMT_SHARED(T, name, count) \
  ::calm_fast::simt::Shared<T> name = ::calm_fast::emulation::static_shared<T>(CALM_EMU_SITE, count, #name)
#define SIMT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::calm_fast::simt::emulate(kernel, grid, block, shared, stream, __VA_ARGS__)

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace calm_fast::simt {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;
using bfloat16 = __nv_bfloat16;
using float16 = __half;
using Stream = cudaStream_t;

__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return __float2half_rn(x);
}

template <class V, class T>
__device__ __forceinline__ V load(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <class V, class T>
__device__ __forceinline__ void store(T* p, const V& value) {
  *reinterpret_cast<V*>(p) = value;
}

template <class T>
__device__ __forceinline__ T load_acquire(const T* p) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
  return static_cast<T>(bits);
}

class SharedPool {
 public:
  __device__ SharedPool() {
    extern __shared__ __align__(16) unsigned char calm_fast_dynamic_shared[];
    next_ = calm_fast_dynamic_shared;
  }
  template <class T>
  __device__ T* take(int64_t count, const char*) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 15) / 16 * 16;
    return array;
  }

 private:
  unsigned char* next_;
};

// The same, out of global memory, for arrays that do not fit into shared memory.
class ScratchPool {
 public:
  __device__ explicit ScratchPool(unsigned char* bytes) : next_(bytes) {}
  template <class T>
  __device__ T* take(int64_t count, const char*) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 15) / 16 * 16;
    return array;
  }

 private:
  unsigned char* next_;
};

// A kernel must opt in to more than 48 KiB of dynamic shared memory.
template <class... Parameters, class... Args>
const char* launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Args&... args) {
  if (shared > 48 * 1024) {
    const cudaError_t asked =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (asked != cudaSuccess) return cudaGetErrorString(asked);
  }
  kernel<<<grid, block, shared, stream>>>(args...);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace calm_fast::simt

#define SIMT_SHARED(T, name, count) __shared__ T name[count]
#define SIMT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::calm_fast::simt::launch(kernel, grid, block, shared, stream, __VA_ARGS__)

#endif

#if defined(CALM_FAST_EMULATED)
#define SIMT_HOST_DEVICE inline
#else
#define SIMT_HOST_DEVICE __host__ __device__ __forceinline__
#endif

namespace calm_fast::simt {

SIMT_HOST_DEVICE float to_float(float x) { return x; }

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Dynamic shared memory that a block may use: sm_86 and sm_89 have 99 KiB, the others more.
constexpr int64_t kSharedLimit = 96 * 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adds up the dynamic shared memory of the arrays that a kernel takes from its SharedPool.
class SharedBytes {
 public:
  template <class T>
  constexpr SharedBytes add(int64_t count) const {
    SharedBytes more = *this;
    more.total_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return more;
  }
  constexpr int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
};

}  // namespace calm_fast::simt
