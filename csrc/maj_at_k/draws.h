// The random draws of 16 resamples at once: Philox4x32-10 of (draw / 4, resample, question, 0) under the seed.
//
// Draw i of a shuffle swaps sample i with sample i + floor(u_i (n - i) / 2^32). Lanes keep a 32-bit word in each 64-bit
// element: a product then is one instruction, its upper half one shift, and what stands above a word does not matter.
#pragma once

#include <cstdint>

#include "common/lanes.h"

namespace calm_fast::maj_at_k_cpu {

constexpr int kGroup = 16;  // resamples a group

// out (draws, 16): for resamples first .. first + 15 the place that each draw takes its sample from
using Draw = void (*)(uint64_t seed, uint32_t question, uint32_t first, int64_t draws, int64_t n, uint32_t* out);

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;

inline void draw_scalar(
    uint64_t seed, uint32_t question, uint32_t first, int64_t draws, int64_t n, uint32_t* out) {
  for (int64_t begin = 0; begin < draws; begin += 4) {
    for (uint32_t lane = 0; lane < kGroup; ++lane) {
      uint32_t x[4] = {static_cast<uint32_t>(begin / 4), first + lane, question, 0};
      uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * x[0];
        const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * x[2];
        x[0] = static_cast<uint32_t>(product1 >> 32) ^ x[1] ^ key0;
        x[1] = static_cast<uint32_t>(product1);
        x[2] = static_cast<uint32_t>(product0 >> 32) ^ x[3] ^ key1;
        x[3] = static_cast<uint32_t>(product0);
        key0 += kStep0;
        key1 += kStep1;
      }
      for (int64_t i = begin; i < draws && i < begin + 4; ++i) {
        const uint64_t far = static_cast<uint64_t>(x[i - begin]) * static_cast<uint64_t>(n - i) >> 32;
        out[i * kGroup + lane] = static_cast<uint32_t>(i + far);
      }
    }
  }
}

#if CALM_FAST_X86
CALM_FAST_AVX2 inline void draw_avx2(
    uint64_t seed, uint32_t question, uint32_t first, int64_t draws, int64_t n, uint32_t* out) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0), multiplier1 = _mm256_set1_epi64x(kMultiplier1);
  const __m256i lower_words = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  for (int64_t begin = 0; begin < draws; begin += 4) {
    for (int part = 0; part < 4; part += 2) {  // 2 x 4 resamples: their chains overlap
      __m256i x[2][4];
      for (int h = 0; h < 2; ++h) {
        x[h][0] = _mm256_set1_epi64x(begin / 4);
        x[h][1] = _mm256_add_epi64(_mm256_set1_epi64x(first + 4 * (part + h)), _mm256_setr_epi64x(0, 1, 2, 3));
        x[h][2] = _mm256_set1_epi64x(question);
        x[h][3] = _mm256_setzero_si256();
      }
      uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
        for (int h = 0; h < 2; ++h) {
          const __m256i product0 = _mm256_mul_epu32(x[h][0], multiplier0);
          const __m256i product1 = _mm256_mul_epu32(x[h][2], multiplier1);
          x[h][0] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(x[h][1], k0));
          x[h][1] = product1;
          x[h][2] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(x[h][3], k1));
          x[h][3] = product0;
        }
        key0 += kStep0;
        key1 += kStep1;
      }
      for (int h = 0; h < 2; ++h) {
        for (int64_t i = begin; i < draws && i < begin + 4; ++i) {
          __m256i far = _mm256_mul_epu32(x[h][i - begin], _mm256_set1_epi64x(n - i));
          far = _mm256_add_epi64(_mm256_srli_epi64(far, 32), _mm256_set1_epi64x(i));
          const __m128i places = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(far, lower_words));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kGroup + 4 * (part + h)), places);
        }
      }
    }
  }
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own AVX-512 header
CALM_FAST_AVX512 inline void draw_avx512(
    uint64_t seed, uint32_t question, uint32_t first, int64_t draws, int64_t n, uint32_t* out) {
  const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0), multiplier1 = _mm512_set1_epi64(kMultiplier1);
  const __m512i count = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t begin = 0; begin < draws; begin += 4) {
    __m512i x[2][4];  // 2 x 8 resamples: their chains overlap
    for (int h = 0; h < 2; ++h) {
      x[h][0] = _mm512_set1_epi64(begin / 4);
      x[h][1] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first) + 8 * h), count);
      x[h][2] = _mm512_set1_epi64(question);
      x[h][3] = _mm512_setzero_si512();
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m512i k0 = _mm512_set1_epi64(key0), k1 = _mm512_set1_epi64(key1);
      for (int h = 0; h < 2; ++h) {
        const __m512i product0 = _mm512_mul_epu32(x[h][0], multiplier0);
        const __m512i product1 = _mm512_mul_epu32(x[h][2], multiplier1);
        x[h][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), x[h][1], k0, 0x96);
        x[h][1] = product1;
        x[h][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), x[h][3], k1, 0x96);
        x[h][3] = product0;
      }
      key0 += kStep0;
      key1 += kStep1;
    }
    for (int h = 0; h < 2; ++h) {
      for (int64_t i = begin; i < draws && i < begin + 4; ++i) {
        __m512i far = _mm512_mul_epu32(x[h][i - begin], _mm512_set1_epi64(n - i));
        far = _mm512_add_epi64(_mm512_srli_epi64(far, 32), _mm512_set1_epi64(i));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out + i * kGroup + 8 * h), _mm512_cvtepi64_epi32(far));
      }
    }
  }
}
#pragma GCC diagnostic pop
#endif

inline Draw draw_for(Lane lane) {
#if CALM_FAST_X86
  if (lane >= Lane::avx512) return draw_avx512;
  if (lane == Lane::avx2) return draw_avx2;
#endif
  return draw_scalar;
}

}  // namespace calm_fast::maj_at_k_cpu
