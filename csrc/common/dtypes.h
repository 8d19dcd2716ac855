// float32, bfloat16 and float16 in memory, float32 in registers.
//
//   to_float(value), from_float<T>(value)          scalar
//   load16 / load16_part, store16 / store16_part   AVX-512: 16 values, or the first `count` < 16 of them (rest 0)
//   load8 / store8                                 AVX2: 8 values
//   dispatch_float(dtype, op, name, [&](auto zero) { using T = decltype(zero); ... })
#pragma once

#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/checks.h"
#include "common/lanes.h"

namespace calm_fast {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return static_cast<float>(value); }
inline float to_float(Half value) { return static_cast<float>(value); }

template <class T>
inline T from_float(float value) {
  return static_cast<T>(value);
}

// Calls `body` with a zero of the C++ type of `dtype`, the dtype of argument `name`; refuses any other dtype.
template <class Body>
inline void dispatch_float(ScalarType dtype, const char* op, const char* name, const Body& body) {
  check_float_dtype(op, name, dtype);
  if (dtype == ScalarType::Float) {
    body(float{0});
  } else if (dtype == ScalarType::BFloat16) {
    body(BFloat16(0.0f));
  } else {
    body(Half(0.0f));
  }
}

#if CALM_FAST_X86

CALM_FAST_AVX512 inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
CALM_FAST_AVX512 inline __m512 widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
CALM_FAST_AVX512 inline __m512 load16(const BFloat16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CALM_FAST_AVX512 inline __m512 load16(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Rounds to nearest even. A NaN becomes the quiet NaN, because rounding its upper bits might give infinity.
CALM_FAST_AVX512 inline __m256i narrow_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
CALM_FAST_AVX512 inline __m256i narrow_half(__m512 value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CALM_FAST_AVX512 inline void store16(float* p, __m512 value) { _mm512_storeu_ps(p, value); }
CALM_FAST_AVX512 inline void store16(BFloat16* p, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(value));
}
CALM_FAST_AVX512 inline void store16(Half* p, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_half(value));
}

CALM_FAST_AVX512 inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1u);
}
CALM_FAST_AVX512 inline __m512 load16_part(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(first(count), p);
}
CALM_FAST_AVX512 inline __m512 load16_part(const BFloat16* p, int64_t count) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first(count), p));
}
CALM_FAST_AVX512 inline __m512 load16_part(const Half* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}
CALM_FAST_AVX512 inline void store16_part(float* p, __m512 value, int64_t count) {
  _mm512_mask_storeu_ps(p, first(count), value);
}
CALM_FAST_AVX512 inline void store16_part(BFloat16* p, __m512 value, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow_bf16(value));
}
CALM_FAST_AVX512 inline void store16_part(Half* p, __m512 value, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow_half(value));
}

CALM_FAST_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
CALM_FAST_AVX2 inline __m256 load8(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
CALM_FAST_AVX2 inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CALM_FAST_AVX2 inline void store8(float* p, __m256 value) { _mm256_storeu_ps(p, value); }
CALM_FAST_AVX2 inline void store8(BFloat16* p, __m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(kept, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
CALM_FAST_AVX2 inline void store8(Half* p, __m256 value) {
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif  // CALM_FAST_X86

}  // namespace calm_fast
