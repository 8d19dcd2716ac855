// The random draws of 16 resamples at once: Philox4x32-10 of (draw / 4, resample, question, 0) under the seed.
//
// Draw i of a shuffle swaps sample i with sample i + floor(u_i (n - i) / 2^32). The lanes keep a 32-bit word in each
// 64-bit element, so that a product is one instruction and its upper half one shift. The upper half of an element is
// ignored.
#pragma once

#include <cstdint>

#include "common/lanes.h"

namespace calm_fast::maj_at_k_cpu {

constexpr int kGroup = 16;  // resamples of a group

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;
constexpr int kRounds = 10, kShared = 3;  // SharedRounds computes the common part of the first kShared rounds

// The keys of Philox's rounds, in memory, from which one instruction broadcasts a key over a register.
struct RoundKeys {
  explicit RoundKeys(uint64_t seed) {
    for (uint32_t round = 0; round < kRounds; ++round) {
      key0[round] = static_cast<uint32_t>(seed) + round * kStep0;
      key1[round] = static_cast<uint32_t>(seed >> 32) + round * kStep1;
    }
  }
  uint64_t key0[kRounds], key1[kRounds];  // 32-bit words
};

// Writes out (draws, 16), with rows `stride` apart: the place from which each draw takes its sample, for resamples
// first .. first + 15. Place is uint32_t, or uint8_t where n is at most 255.
template <class Place>
using Draw = void (*)(
    const RoundKeys& keys, uint32_t question, uint32_t first, int64_t draws, int64_t n, Place* out, int64_t stride);

// The part of the first three rounds that is the same for every resample: the counters differ in the resample alone,
// which takes two rounds to reach all four words. This saves each lane 4 of its 20 multiplications.
struct SharedRounds {
  SharedRounds(const RoundKeys& keys, uint32_t question, uint32_t block) {
    const auto key0 = [&](int round) { return static_cast<uint32_t>(keys.key0[round]); };
    const auto key1 = [&](int round) { return static_cast<uint32_t>(keys.key1[round]); };
    const uint64_t first0 = static_cast<uint64_t>(kMultiplier0) * block;
    const uint64_t first1 = static_cast<uint64_t>(kMultiplier1) * question;
    into_x0 = static_cast<uint32_t>(first1 >> 32) ^ key0(0);  // round 1: x0 = this ^ resample
    const uint64_t second1 = static_cast<uint64_t>(kMultiplier1) * (static_cast<uint32_t>(first0 >> 32) ^ key1(0));
    into_x2 = static_cast<uint32_t>(first0) ^ key1(1);  // round 2: x2 = this ^ high(M0 x0), x3 = low(M0 x0)
    const uint32_t x0 = static_cast<uint32_t>(second1 >> 32) ^ static_cast<uint32_t>(first1) ^ key0(1);
    const uint64_t third0 = static_cast<uint64_t>(kMultiplier0) * x0;
    into_third_x0 = static_cast<uint32_t>(second1) ^ key0(2);  // round 3: x0 = this ^ high(M1 x2), x1 = low(M1 x2)
    into_third_x2 = static_cast<uint32_t>(third0 >> 32) ^ key1(2);  // x2 = this ^ x3 of round 2
    third_x3 = static_cast<uint32_t>(third0);
  }
  uint32_t into_x0, into_x2, into_third_x0, into_third_x2, third_x3;
};

template <class Place>
inline void draw_scalar(
    const RoundKeys& keys, uint32_t question, uint32_t first, int64_t draws, int64_t n, Place* out, int64_t stride) {
  for (int64_t begin = 0; begin < draws; begin += 4) {
    for (uint32_t lane = 0; lane < kGroup; ++lane) {
      uint32_t x[4] = {static_cast<uint32_t>(begin / 4), first + lane, question, 0};
      for (int round = 0; round < kRounds; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * x[0];
        const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * x[2];
        x[0] = static_cast<uint32_t>(product1 >> 32) ^ x[1] ^ static_cast<uint32_t>(keys.key0[round]);
        x[1] = static_cast<uint32_t>(product1);
        x[2] = static_cast<uint32_t>(product0 >> 32) ^ x[3] ^ static_cast<uint32_t>(keys.key1[round]);
        x[3] = static_cast<uint32_t>(product0);
      }
      for (int64_t i = begin; i < draws && i < begin + 4; ++i) {
        const uint64_t far = static_cast<uint64_t>(x[i - begin]) * static_cast<uint64_t>(n - i) >> 32;
        out[i * stride + lane] = static_cast<Place>(i + far);
      }
    }
  }
}

#if CALM_FAST_X86
CALM_FAST_AVX2 inline void store_places(uint32_t* out, __m128i places) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), places);
}
CALM_FAST_AVX2 inline void store_places(uint8_t* out, __m128i places) {
  const __m128i lowest = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_shuffle_epi8(places, lowest));
  __builtin_memcpy(out, &bytes, sizeof(bytes));
}

template <class Place>
CALM_FAST_AVX2 inline void draw_avx2(
    const RoundKeys& keys, uint32_t question, uint32_t first, int64_t draws, int64_t n, Place* out, int64_t stride) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0), multiplier1 = _mm256_set1_epi64x(kMultiplier1);
  const __m256i lower_words = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  for (int64_t begin = 0; begin < draws; begin += 4) {
    const SharedRounds shared(keys, question, static_cast<uint32_t>(begin / 4));
    for (int part = 0; part < 4; part += 2) {  // 2 x 4 resamples, so that their dependency chains overlap
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
      for (int round = kShared; round < kRounds; ++round) {
        const __m256i k0 = _mm256_set1_epi64x(keys.key0[round]), k1 = _mm256_set1_epi64x(keys.key1[round]);
        for (int h = 0; h < 2; ++h) {
          const __m256i product0 = _mm256_mul_epu32(x[h][0], multiplier0);
          const __m256i product1 = _mm256_mul_epu32(x[h][2], multiplier1);
          x[h][0] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(x[h][1], k0));
          x[h][1] = product1;
          x[h][2] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(x[h][3], k1));
          x[h][3] = product0;
        }
      }
      for (int h = 0; h < 2; ++h) {
        for (int64_t i = begin; i < draws && i < begin + 4; ++i) {
          __m256i far = _mm256_mul_epu32(x[h][i - begin], _mm256_set1_epi64x(n - i));
          far = _mm256_add_epi64(_mm256_srli_epi64(far, 32), _mm256_set1_epi64x(i));
          const __m128i places = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(far, lower_words));
          store_places(out + i * stride + 4 * (part + h), places);
        }
      }
    }
  }
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own AVX-512 header
CALM_FAST_AVX512 inline void store_places(uint32_t* out, __m512i places) { _mm512_storeu_si512(out, places); }
CALM_FAST_AVX512 inline void store_places(uint8_t* out, __m512i places) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(places));
}

// Computes draws begin .. begin + 4 kBlocks - 1. A round waits for its products; two blocks of 2 x 8 resamples hide the
// latency.
template <int kBlocks, class Place>
CALM_FAST_AVX512 inline __attribute__((always_inline)) void draw_blocks_avx512(
    const RoundKeys& keys, uint32_t question, uint32_t first, int64_t begin, int64_t draws, int64_t n, Place* out,
    int64_t stride) {
  const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0), multiplier1 = _mm512_set1_epi64(kMultiplier1);
  const __m512i count = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i upper_words = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  __m512i x[2 * kBlocks][4];
#pragma GCC unroll 4
  for (int h = 0; h < 2 * kBlocks; ++h) {
    const SharedRounds shared(keys, question, static_cast<uint32_t>(begin / 4) + h / 2);
    const __m512i resample = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first) + 8 * (h % 2)), count);
    const __m512i second0 =
        _mm512_mul_epu32(_mm512_xor_si512(resample, _mm512_set1_epi64(shared.into_x0)), multiplier0);
    const __m512i x2 = _mm512_xor_si512(_mm512_srli_epi64(second0, 32), _mm512_set1_epi64(shared.into_x2));
    x[h][1] = _mm512_mul_epu32(x2, multiplier1);
    x[h][0] = _mm512_xor_si512(_mm512_srli_epi64(x[h][1], 32), _mm512_set1_epi64(shared.into_third_x0));
    x[h][2] = _mm512_xor_si512(second0, _mm512_set1_epi64(shared.into_third_x2));
    x[h][3] = _mm512_set1_epi64(shared.third_x3);
  }
#pragma GCC unroll 8
  for (int round = kShared; round < kRounds; ++round) {
    const __m512i k0 = _mm512_set1_epi64(keys.key0[round]), k1 = _mm512_set1_epi64(keys.key1[round]);
#pragma GCC unroll 4
    for (int h = 0; h < 2 * kBlocks; ++h) {
      const __m512i product0 = _mm512_mul_epu32(x[h][0], multiplier0);
      const __m512i product1 = _mm512_mul_epu32(x[h][2], multiplier1);
      x[h][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), x[h][1], k0, 0x96);
      x[h][1] = product1;
      x[h][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), x[h][3], k1, 0x96);
      x[h][3] = product0;
    }
  }
#pragma GCC unroll 8
  for (int word = 0; word < 4 * kBlocks; ++word) {
    const int64_t i = begin + word;
    if (i >= draws) return;
    const __m512i left = _mm512_set1_epi64(n - i);
    const int h = word / 4 * 2, w = word % 4;
    const __m512i far = _mm512_permutex2var_epi32(
        _mm512_mul_epu32(x[h][w], left), upper_words, _mm512_mul_epu32(x[h + 1][w], left));
    store_places(out + i * stride, _mm512_add_epi32(far, _mm512_set1_epi32(static_cast<int32_t>(i))));
  }
}

template <class Place>
CALM_FAST_AVX512 inline void draw_avx512(
    const RoundKeys& keys, uint32_t question, uint32_t first, int64_t draws, int64_t n, Place* out, int64_t stride) {
  int64_t begin = 0;
  for (; begin + 4 < draws; begin += 8) {
    draw_blocks_avx512<2>(keys, question, first, begin, draws, n, out, stride);
  }
  if (begin < draws) draw_blocks_avx512<1>(keys, question, first, begin, draws, n, out, stride);
}
#pragma GCC diagnostic pop
#endif

}  // namespace calm_fast::maj_at_k_cpu
