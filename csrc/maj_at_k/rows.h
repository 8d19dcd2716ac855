// Rows of 64 resamples, a byte each, and their shuffles: the class that every draw takes. For up to 64 samples, places
// are traced back through the draws in registers; for up to 255, samples are swapped in memory.
#pragma once

#include <cstdint>

#include "maj_at_k/draws.h"

namespace calm_fast::maj_at_k_cpu {

constexpr int64_t kByteSamples = 255;  // samples up to which places, classes and counts fit into bytes
constexpr int64_t kRow = 64;           // resamples of a row, one byte each
constexpr int64_t kTraceSamples = 64;  // samples up to which places are traced back: the reach of four byte shuffles

// The register of each lane. A lane processes a row in pieces of its own size, because GCC 12 splits vectors longer
// than a register into single bytes.
using Bytes16 = uint8_t __attribute__((vector_size(16), may_alias));
using Bytes32 = uint8_t __attribute__((vector_size(32), may_alias));
using Bytes64 = uint8_t __attribute__((vector_size(64), may_alias));
template <class V>
constexpr int64_t kPieces = kRow / static_cast<int64_t>(sizeof(V));

// The arrays of 64 resamples of a question of up to kByteSamples samples. The part that a typical question uses stays
// in the L1 cache.
struct ByteShuffles {
  template <class V>
  static V& piece(uint8_t (&rows)[kByteSamples + 1][kRow], int64_t row, int64_t at) {
    return reinterpret_cast<V*>(rows[row])[at];
  }
  alignas(64) uint8_t from[kByteSamples + 1][kRow];   // per draw: the place from which it takes its sample
  alignas(64) uint8_t drawn[kByteSamples + 1][kRow];  // per draw: the class of its sample
  alignas(64) uint8_t votes[kByteSamples + 1][kRow];  // per class
  alignas(64) uint8_t ties[kByteSamples + 1][kRow];   // per size: classes tied at the top if the gold class is, else 0
  alignas(64) uint8_t deck[kGroup][kByteSamples + 1];
  alignas(64) uint8_t class_at[kByteSamples + 1] = {};
};

// More than kTraceSamples samples: computes the classes that resamples 16 group .. 16 group + 15 of the row draw, by
// swaps in memory. A sample that has been drawn is not read again, so a swap is one store. The resamples are
// interleaved, so that a load that depends on a store of its own resample comes long after it.
inline void shuffle(ByteShuffles& s, const uint32_t* draws, int64_t count, int64_t group) {
  for (auto& own : s.deck) __builtin_memcpy(own, s.class_at, sizeof(own));
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* out = s.drawn[i] + group * kGroup;
#pragma GCC unroll 16
    for (int64_t g = 0; g < kGroup; ++g) {
      const uint32_t from = draws[i * kGroup + g];
      out[g] = s.deck[g][from];
      s.deck[g][from] = s.deck[g][i];
    }
  }
}

// Up to kTraceSamples samples, nothing is swapped. Draw j moved the sample of place j to place from[j]. The sample that
// draw i finds at a place is therefore traced back through the earlier draws to its original place: for j = i - 1 .. 0,
// a sample at from[j] came from j. That takes a comparison and a selection in registers per pair of draws, without a
// store that a load would wait for. The work grows with the square of the draws, so many draws are better swapped.
// kTogether draws run at a time, because each is a chain of dependent operations. drawn[first ..] becomes the places
// before the shuffle.
template <class V, int kTogether>
inline __attribute__((always_inline)) void trace_back(ByteShuffles& s, int64_t first, int64_t p) {
  V at[kTogether];
  for (int t = 0; t < kTogether; ++t) at[t] = s.piece<V>(s.from, first + t, p);
#pragma GCC unroll 8
  for (int j = kTogether - 2; j >= 0; --j) {  // the draws of this group among themselves
    const V own = V{} + static_cast<uint8_t>(first + j);
#pragma GCC unroll 8
    for (int t = j + 1; t < kTogether; ++t) at[t] = at[t] == s.piece<V>(s.from, first + j, p) ? own : at[t];
  }
  V own = V{} + static_cast<uint8_t>(first - 1);
  for (int64_t j = first - 1; j >= 0; --j, own -= 1) {
#pragma GCC unroll 8
    for (int t = 0; t < kTogether; ++t) at[t] = at[t] == s.piece<V>(s.from, j, p) ? own : at[t];
  }
  for (int t = 0; t < kTogether; ++t) s.piece<V>(s.drawn, first + t, p) = at[t];
}

template <class V, int kTogether>
inline __attribute__((always_inline)) void places_drawn(ByteShuffles& s, int64_t count) {
  for (int64_t p = 0; p < kPieces<V>; ++p) {
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) trace_back<V, kTogether>(s, i, p);
    for (; i < count; ++i) trace_back<V, 1>(s, i, p);
  }
}

// Computes s.drawn, the classes of 64 resamples of a question of up to kTraceSamples samples.
using DrawnClasses = void (*)(ByteShuffles& s, int64_t count);

inline void drawn_classes_scalar(ByteShuffles& s, int64_t count) {
  places_drawn<Bytes16, 2>(s, count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t g = 0; g < kRow; ++g) s.drawn[i][g] = s.class_at[s.drawn[i][g]];
  }
}

#if CALM_FAST_X86
CALM_FAST_AVX2 inline void drawn_classes_avx2(ByteShuffles& s, int64_t count) {
  places_drawn<Bytes32, 4>(s, count);
  __m256i classes[4];  // 16 places each: the reach of a byte shuffle
  for (int part = 0; part < 4; ++part) {
    const __m128i own = _mm_load_si128(reinterpret_cast<const __m128i*>(s.class_at) + part);
    classes[part] = _mm256_broadcastsi128_si256(own);
  }
  __m256i* drawn = reinterpret_cast<__m256i*>(s.drawn);
  for (int64_t i = 0; i < 2 * count; ++i) {
    const __m256i places = _mm256_load_si256(drawn + i);
    const __m256i odd = _mm256_slli_epi16(places, 3), upper = _mm256_slli_epi16(places, 2);  // bits 4, 5 become bit 7
    const __m256i lower_half = _mm256_blendv_epi8(
        _mm256_shuffle_epi8(classes[0], places), _mm256_shuffle_epi8(classes[1], places), odd);
    const __m256i upper_half = _mm256_blendv_epi8(
        _mm256_shuffle_epi8(classes[2], places), _mm256_shuffle_epi8(classes[3], places), odd);
    _mm256_store_si256(drawn + i, _mm256_blendv_epi8(lower_half, upper_half, upper));
  }
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own AVX-512 header
CALM_FAST_AVX512 inline void drawn_classes_avx512(ByteShuffles& s, int64_t count) {
  places_drawn<Bytes64, 8>(s, count);
  __m512i classes[4];  // 16 places each: the reach of a byte shuffle
  for (int part = 0; part < 4; ++part) {
    const __m128i own = _mm_load_si128(reinterpret_cast<const __m128i*>(s.class_at) + part);
    classes[part] = _mm512_broadcast_i32x4(own);
  }
  for (int64_t i = 0; i < count; ++i) {
    const __m512i places = _mm512_load_si512(s.drawn[i]);
    const __mmask64 odd = _mm512_test_epi8_mask(places, _mm512_set1_epi8(16));
    const __mmask64 upper = _mm512_test_epi8_mask(places, _mm512_set1_epi8(32));
    __m512i found = _mm512_shuffle_epi8(classes[0], places);
    found = _mm512_mask_shuffle_epi8(found, odd, classes[1], places);
    found = _mm512_mask_shuffle_epi8(found, upper, classes[2], places);
    found = _mm512_mask_shuffle_epi8(found, odd & upper, classes[3], places);
    _mm512_store_si512(s.drawn[i], found);
  }
}
#pragma GCC diagnostic pop
#endif

}  // namespace calm_fast::maj_at_k_cpu
