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

// What the first three rounds give that is the same for every resample: only the resample differs between counters, and
// it takes two rounds to reach all four words. Spares each lane 4 of its 20 multiplications.
struct SharedRounds {
  SharedRounds(uint64_t seed, uint32_t question, uint32_t block) {
    key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    const uint64_t first0 = static_cast<uint64_t>(kMultiplier0) * block;
    const uint64_t first1 = static_cast<uint64_t>(kMultiplier1) * question;
    into_x0 = static_cast<uint32_t>(first1 >> 32) ^ key0;  // round 1: x0 = this ^ resample
    const uint64_t second1 = static_cast<uint64_t>(kMultiplier1) * (static_cast<uint32_t>(first0 >> 32) ^ key1);
    key0 += kStep0, key1 += kStep1;
    into_x2 = static_cast<uint32_t>(first0) ^ key1;  // round 2: x2 = this ^ high(M0 x0), x3 = low(M0 x0)
    const uint32_t x0 = static_cast<uint32_t>(second1 >> 32) ^ static_cast<uint32_t>(first1) ^ key0;
    key0 += kStep0, key1 += kStep1;
    const uint64_t third0 = static_cast<uint64_t>(kMultiplier0) * x0;
    into_third_x0 = static_cast<uint32_t>(second1) ^ key0;  // round 3: x0 = this ^ high(M1 x2), x1 = low(M1 x2)
    into_third_x2 = static_cast<uint32_t>(third0 >> 32) ^ key1;  // x2 = this ^ x3 of round 2
    third_x3 = static_cast<uint32_t>(third0);
    key0 += kStep0, key1 += kStep1;
  }
  uint32_t into_x0, into_x2, into_third_x0, into_third_x2, third_x3;
  uint32_t key0, key1;  // of the fourth round
};

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
    const SharedRounds shared(seed, question, static_cast<uint32_t>(begin / 4));
    for (int part = 0; part < 4; part += 2) {  // 2 x 4 resamples: their chains overlap
      __m256i x[2][4];
      for (int h = 0; h < 2; ++h) {
        const __m256i resample =
            _mm256_add_epi64(_mm256_set1_epi64x(first + 4 * (part + h)), _mm256_setr_epi64x(0, 1, 2, 3));
        const __m256i second0 =
            _mm256_mul_epu32(_mm256_xor_si256(resample, _mm256_set1_epi64x(shared.into_x0)), multiplier0);
        const __m256i x2 = _mm256_xor_si256(_mm256_srli_epi64(second0, 32), _mm256_set1_epi64x(shared.into_x2));
        x[h][1] = _mm256_mul_epu32(x2, multiplier1);
        x[h][0] = _mm256_xor_si256(_mm256_srli_epi64(x[h][1], 32), _mm256_set1_epi64x(shared.into_third_x0));
        x[h][2] = _mm256_xor_si256(second0, _mm256_set1_epi64x(shared.into_third_x2));
        x[h][3] = _mm256_set1_epi64x(shared.third_x3);
      }
      uint32_t key0 = shared.key0, key1 = shared.key1;
      for (int round = 3; round < 10; ++round) {
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
  const __m512i upper_words = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  for (int64_t begin = 0; begin < draws; begin += 4) {
    const SharedRounds shared(seed, question, static_cast<uint32_t>(begin / 4));
    __m512i x[2][4];  // 2 x 8 resamples: their chains overlap
    for (int h = 0; h < 2; ++h) {
      const __m512i resample = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first) + 8 * h), count);
      const __m512i second0 =
          _mm512_mul_epu32(_mm512_xor_si512(resample, _mm512_set1_epi64(shared.into_x0)), multiplier0);
      const __m512i x2 = _mm512_xor_si512(_mm512_srli_epi64(second0, 32), _mm512_set1_epi64(shared.into_x2));
      x[h][1] = _mm512_mul_epu32(x2, multiplier1);
      x[h][0] = _mm512_xor_si512(_mm512_srli_epi64(x[h][1], 32), _mm512_set1_epi64(shared.into_third_x0));
      x[h][2] = _mm512_xor_si512(second0, _mm512_set1_epi64(shared.into_third_x2));
      x[h][3] = _mm512_set1_epi64(shared.third_x3);
    }
    uint32_t key0 = shared.key0, key1 = shared.key1;
    for (int round = 3; round < 10; ++round) {
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
    for (int64_t i = begin; i < draws && i < begin + 4; ++i) {
      const __m512i left = _mm512_set1_epi64(n - i);
      const __m512i far = _mm512_permutex2var_epi32(
          _mm512_mul_epu32(x[0][i - begin], left), upper_words, _mm512_mul_epu32(x[1][i - begin], left));
      _mm512_storeu_si512(out + i * kGroup, _mm512_add_epi32(far, _mm512_set1_epi32(static_cast<int32_t>(i))));
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
