// Unpacks 16 bytes of float32, bfloat16 or float16 to floats, for the wide loads of the decode kernels.
#pragma once

#include "common/simt.cuh"

// Loops over registers must be unrolled: an index known only at run time would put the array into memory.
#if defined(CALM_FAST_EMULATED)
#define SIMT_UNROLL
#else
#define SIMT_UNROLL _Pragma("unroll")
#endif

namespace calm_fast::simt {

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

namespace packed {

__device__ __forceinline__ float half_from_bits(uint32_t bits) {
#if defined(CALM_FAST_EMULATED)
  return to_float(float16{static_cast<uint16_t>(bits)});
#else
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#endif
}

template <class T>
__device__ __forceinline__ void unpack_word(uint32_t word, float* to) {
  if constexpr (sizeof(T) == 4) {
    to[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    to[0] = half_from_bits(word & 0xffffu);
    to[1] = half_from_bits(word >> 16);
  }
}

}  // namespace packed

// Writes the elements of type T in `from` to to[0 .. kPack<T>).
template <class T>
__device__ __forceinline__ void unpack(const uint4& from, float* to) {
  constexpr int kEach = kPack<T> / 4;
  packed::unpack_word<T>(from.x, to);
  packed::unpack_word<T>(from.y, to + kEach);
  packed::unpack_word<T>(from.z, to + 2 * kEach);
  packed::unpack_word<T>(from.w, to + 3 * kEach);
}

}  // namespace calm_fast::simt
