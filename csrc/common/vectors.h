// Vectors of float32 in four lanes. Each lane is a namespace with the same names: V, kWidth, arithmetic, comparisons
// and exp2_of. NaN survives: maximum(a, b) returns b where either is NaN, so pass the data as b.
//
//   fused(a, b, c)       a b + c, rounded once where the lane has a fused multiply-add
//   dot(acc, a, b)       acc plus the product of 32-bit operands: one float32 each, or two bfloat16 each (kPairs), as
//                        paired(even, odd) makes them
//   store_half, load_half                IEEE half precision in memory
//   greater(a, b), same(a, b)            masks for any(mask) and pick(mask, x, y)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/Half.h>

#include "common/lanes.h"

namespace calm_fast {

// exp2_of(x) = 2^x for x <= 127, to 1.4 units of 2^-24. Below x = -126 it returns 2^-126 or less, not 0; NaN stays NaN.
#define CALM_FAST_EXP2                                                   \
  LANE V exp2_of(V x) {                                                  \
    x = maximum(set1(-126.0f), x);                                       \
    const I n = nearest(x);                                              \
    const V f = sub(x, whole(n));                                        \
    V p = fused(set1(0x1.41fbb8p-13f), f, set1(0x1.5f3e54p-10f));        \
    p = fused(p, f, set1(0x1.3b2d4cp-7f));                               \
    p = fused(p, f, set1(0x1.c6aee8p-5f));                               \
    p = fused(p, f, set1(0x1.ebfbdcp-3f));                               \
    p = fused(p, f, set1(0x1.62e430p-1f));                               \
    p = fused(p, f, set1(1.0f));                                         \
    return scaled(p, n);                                                 \
  }

namespace scalar {
#define LANE inline
constexpr int kWidth = 4;
constexpr bool kPairs = false;
struct V {
  float x[kWidth];
};
struct M {
  bool x[kWidth];
};
struct I {
  int32_t x[kWidth];
};
#define CALM_FAST_EACH(expression)                                \
  V out;                                                          \
  for (int i = 0; i < kWidth; ++i) out.x[i] = (expression);       \
  return out
LANE V set1(float value) { CALM_FAST_EACH(value); }
LANE V load(const float* from) { CALM_FAST_EACH(from[i]); }
LANE void store(float* to, V a) {
  for (int i = 0; i < kWidth; ++i) to[i] = a.x[i];
}
LANE V add(V a, V b) { CALM_FAST_EACH(a.x[i] + b.x[i]); }
LANE V sub(V a, V b) { CALM_FAST_EACH(a.x[i] - b.x[i]); }
LANE V mul(V a, V b) { CALM_FAST_EACH(a.x[i] * b.x[i]); }
LANE V over(V a, V b) { CALM_FAST_EACH(a.x[i] / b.x[i]); }
LANE V fused(V a, V b, V c) { CALM_FAST_EACH(a.x[i] * b.x[i] + c.x[i]); }
LANE V dot(V acc, V a, V b) { return fused(a, b, acc); }
LANE V maximum(V a, V b) { CALM_FAST_EACH(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
LANE V minimum(V a, V b) { CALM_FAST_EACH(a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
LANE M greater(V a, V b) {
  M out;
  for (int i = 0; i < kWidth; ++i) out.x[i] = a.x[i] > b.x[i];
  return out;
}
LANE M same(V a, V b) {
  M out;
  for (int i = 0; i < kWidth; ++i) out.x[i] = a.x[i] == b.x[i];
  return out;
}
LANE bool any(M mask) {
  bool found = false;
  for (int i = 0; i < kWidth; ++i) found = found || mask.x[i];
  return found;
}
LANE V pick(M mask, V a, V b) { CALM_FAST_EACH(mask.x[i] ? a.x[i] : b.x[i]); }
// nearest(x): the nearest integers. 0 of a NaN, up to a multiple of 512, so that scaled() leaves its bits alone.
LANE I nearest(V x) {
  I out;
  for (int i = 0; i < kWidth; ++i) out.x[i] = x.x[i] == x.x[i] ? static_cast<int32_t>(std::lrint(x.x[i])) : 0;
  return out;
}
LANE V whole(I n) { CALM_FAST_EACH(static_cast<float>(n.x[i])); }
// Returns a 2^n.
LANE V scaled(V a, I n) {
  V out;
  for (int i = 0; i < kWidth; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.x[i], 4);
    bits += static_cast<uint32_t>(n.x[i]) << 23;
    std::memcpy(&out.x[i], &bits, 4);
  }
  return out;
}
LANE void store_half(uint16_t* to, V a) {
  for (int i = 0; i < kWidth; ++i) to[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(a.x[i]);
}
LANE V load_half(const uint16_t* from) { CALM_FAST_EACH(torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i])); }
LANE V paired(V even, V) { return even; }
CALM_FAST_EXP2
#undef CALM_FAST_EACH
#undef LANE
}  // namespace scalar

#if CALM_FAST_X86

namespace avx2 {
#define LANE CALM_FAST_AVX2 inline
constexpr int kWidth = 8;
constexpr bool kPairs = false;
using V = __m256;
using M = __m256;
using I = __m256i;
LANE V set1(float value) { return _mm256_set1_ps(value); }
LANE V load(const float* from) { return _mm256_loadu_ps(from); }
LANE void store(float* to, V a) { _mm256_storeu_ps(to, a); }
LANE V add(V a, V b) { return _mm256_add_ps(a, b); }
LANE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
LANE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
LANE V over(V a, V b) { return _mm256_div_ps(a, b); }
LANE V fused(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
LANE V dot(V acc, V a, V b) { return _mm256_fmadd_ps(a, b, acc); }
LANE V maximum(V a, V b) { return _mm256_max_ps(a, b); }
LANE V minimum(V a, V b) { return _mm256_min_ps(a, b); }
LANE M greater(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
LANE M same(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
LANE bool any(M mask) { return _mm256_movemask_ps(mask) != 0; }
LANE V pick(M mask, V a, V b) { return _mm256_blendv_ps(b, a, mask); }
LANE I nearest(V x) { return _mm256_cvtps_epi32(x); }
LANE V whole(I n) { return _mm256_cvtepi32_ps(n); }
LANE V scaled(V a, I n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(n, 23)));
}
LANE void store_half(uint16_t* to, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LANE V load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
LANE V paired(V even, V) { return even; }
CALM_FAST_EXP2
#undef LANE
}  // namespace avx2

// The two AVX-512 lanes differ only in their target and in dot and paired.
#define CALM_FAST_AVX512_VECTORS                                                                          \
  constexpr int kWidth = 16;                                                                              \
  using V = __m512;                                                                                       \
  using M = __mmask16;                                                                                    \
  using I = __m512i;                                                                                      \
  LANE V set1(float value) { return _mm512_set1_ps(value); }                                              \
  LANE V load(const float* from) { return _mm512_loadu_ps(from); }                                        \
  LANE void store(float* to, V a) { _mm512_storeu_ps(to, a); }                                            \
  LANE V add(V a, V b) { return _mm512_add_ps(a, b); }                                                    \
  LANE V sub(V a, V b) { return _mm512_sub_ps(a, b); }                                                    \
  LANE V mul(V a, V b) { return _mm512_mul_ps(a, b); }                                                    \
  LANE V over(V a, V b) { return _mm512_div_ps(a, b); }                                                   \
  LANE V fused(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }                                        \
  LANE V maximum(V a, V b) { return _mm512_max_ps(a, b); }                                                \
  LANE V minimum(V a, V b) { return _mm512_min_ps(a, b); }                                                \
  LANE M greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }                               \
  LANE M same(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }                                  \
  LANE bool any(M mask) { return mask != 0; }                                                             \
  LANE V pick(M mask, V a, V b) { return _mm512_mask_blend_ps(mask, b, a); }                              \
  LANE I nearest(V x) { return _mm512_cvtps_epi32(x); }                                                   \
  LANE V whole(I n) { return _mm512_cvtepi32_ps(n); }                                                     \
  LANE V scaled(V a, I n) {                                                                               \
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(n, 23)));       \
  }                                                                                                       \
  LANE void store_half(uint16_t* to, V a) {                                                               \
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;                               \
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a, kNearest));                    \
  }                                                                                                       \
  LANE V load_half(const uint16_t* from) {                                                                \
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));                   \
  }

namespace avx512 {
#define LANE CALM_FAST_AVX512 inline
constexpr bool kPairs = false;
CALM_FAST_AVX512_VECTORS
LANE V dot(V acc, V a, V b) { return _mm512_fmadd_ps(a, b, acc); }
LANE V paired(V even, V) { return even; }
CALM_FAST_EXP2
#undef LANE
}  // namespace avx512

namespace avx512_bf16 {
#define LANE CALM_FAST_AVX512_BF16 inline
constexpr bool kPairs = true;
CALM_FAST_AVX512_VECTORS
LANE V dot(V acc, V a, V b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
LANE V paired(V even, V odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
CALM_FAST_EXP2
#undef LANE
}  // namespace avx512_bf16
#undef CALM_FAST_AVX512_VECTORS

#endif
#undef CALM_FAST_EXP2

}  // namespace calm_fast
