// Resampled credits on the CPU: draws of 16 resamples in vector registers, then shuffles and votes of 64 of them.
//
// Credits are added up in the order of the resamples, so every lane returns the same bits as the definition (where k
// leaves samples out; else the one credit is not averaged).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "maj_at_k/draws.h"
#include "maj_at_k/question.h"

namespace calm_fast::maj_at_k_cpu {

constexpr int64_t kByteSamples = 255;  // so many samples, their classes and their counts fit into bytes
constexpr int64_t kRow = 64;  // resamples a row, one byte each
constexpr int64_t kFollowed = 64;  // so many samples are followed back: four byte shuffles look up so many places

// Memory of one thread beside the question's.
struct ShuffleScratch {
  ShuffleScratch(Arena& arena, int64_t samples, int64_t sizes)
      : draws(arena.take<uint32_t>((samples + 4) * kGroup)),
        state(arena.take<uint32_t>(samples)),
        weights(arena.take<double>(samples)),
        own(arena.take<double>(samples)),
        sums(arena.take<double>(std::max((std::min(samples, kByteSamples) + 1) * kRow, samples + 1))),
        absent(arena.take<double>((std::min(samples, kByteSamples) + 1) * kRow)),
        credits(arena.take<double>(sizes)) {}
  uint32_t *draws, *state;
  double *weights, *own;  // of all samples, of the voting ones in their order
  double *sums, *absent;  // of the classes; with up to kByteSamples voting samples (classes, kRow)
  double* credits;  // of the sizes
};

// A register of each lane. A lane works on a row in pieces of its own size: GCC 12 takes vectors that are longer than a
// register apart into single bytes.
using Bytes16 = uint8_t __attribute__((vector_size(16), may_alias));
using Bytes32 = uint8_t __attribute__((vector_size(32), may_alias));
using Bytes64 = uint8_t __attribute__((vector_size(64), may_alias));
template <class V>
constexpr int64_t kPieces = kRow / static_cast<int64_t>(sizeof(V));

// What 64 resamples of a question of up to kByteSamples samples work on; what the usual question uses of it stays in
// the L1 cache.
struct ByteShuffles {
  template <class V>
  static V& piece(uint8_t (&rows)[kByteSamples + 1][kRow], int64_t row, int64_t at) {
    return reinterpret_cast<V*>(rows[row])[at];
  }
  alignas(64) uint8_t from[kByteSamples + 1][kRow];  // draw by draw: the place that the draw takes its sample from
  alignas(64) uint8_t drawn[kByteSamples + 1][kRow];  // draw by draw: the class of the sample
  alignas(64) uint8_t votes[kByteSamples + 1][kRow];  // of each class
  alignas(64) uint8_t ties[kByteSamples + 1][kRow];  // of each size: classes tied with the right one at the top, else 0
  alignas(64) uint8_t deck[kGroup][kByteSamples + 1];
  alignas(64) uint8_t class_at[kByteSamples + 1] = {};
};

// More than kFollowed samples: the classes that resamples 16 group .. of the row draw, by swaps in memory. A sample
// once drawn is not looked at again, so a swap is one store. The resamples take turns: a load that may meet a store of
// its own resample comes long after it.
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

// Up to kFollowed samples, nothing is swapped. Draw j moved the sample of place j to place from[j]; so what draw i
// finds at a place is followed back through the draws before it to where it lay at first: for j = i - 1 .. 0, at
// from[j] means it came from j. That is a comparison and a selection in registers for each pair of draws, without a
// store that a load would wait for. The work grows with the square of the draws: many draws are better swapped.
// kTogether draws at a time: each is a chain of steps that wait for each other. drawn[first ..] becomes the places
// before the shuffle.
template <class V, int kTogether>
inline __attribute__((always_inline)) void follow_back(ByteShuffles& s, int64_t first, int64_t p) {
  V at[kTogether];
  for (int t = 0; t < kTogether; ++t) at[t] = s.piece<V>(s.from, first + t, p);
#pragma GCC unroll 8
  for (int j = kTogether - 2; j >= 0; --j) {  // the draws among themselves
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
    for (; i + kTogether <= count; i += kTogether) follow_back<V, kTogether>(s, i, p);
    for (; i < count; ++i) follow_back<V, 1>(s, i, p);
  }
}

// drawn: the classes of 64 resamples of a question of up to kFollowed samples.
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
  __m256i classes[4];  // 16 places each: so many a byte shuffle looks up
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
#pragma GCC diagnostic ignored "-Wuninitialized"  // inside GCC 12's own AVX-512 header
CALM_FAST_AVX512 inline void drawn_classes_avx512(ByteShuffles& s, int64_t count) {
  places_drawn<Bytes64, 8>(s, count);
  __m512i classes[4];  // 16 places each: so many a byte shuffle looks up
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

// sum += 1 where a == b, in two instructions: an AVX-512 comparison gives a mask, the others' give -1 where equal.
template <class V>
inline __attribute__((always_inline)) void add_equal(V& sum, const V& a, const V& b) {
  if constexpr (sizeof(V) == 64) {
    sum = a == b ? sum + 1 : sum;
  } else {
    sum -= (V)(a == b);
  }
}

// Adds the credits of sizes at .. at + kSizes - 1 in the order of the resamples; the sums do not wait for each other.
template <int kSizes>
inline void add_credits(const ByteShuffles& s, int64_t at, int64_t resamples, const double* inverse, double* credits) {
  double sums[kSizes];
  for (int k = 0; k < kSizes; ++k) sums[k] = credits[at + k];
  for (int64_t g = 0; g < resamples; ++g) {
    for (int k = 0; k < kSizes; ++k) sums[k] += inverse[s.ties[at + k][g]];
  }
  for (int k = 0; k < kSizes; ++k) credits[at + k] = sums[k];
}

// Adds the credits of the first `resamples` of a row. Counters in memory would wait for each other: instead kClasses
// classes at a time are compared with what was drawn. Classes behind the last one get no vote.
template <class V>
inline __attribute__((always_inline)) void count_row(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  constexpr int32_t kClasses = 4;
  static_assert((kByteSamples + 1) % kClasses == 0);
  for (int64_t p = 0; p < kPieces<V>; ++p) {
    for (int32_t c = 0; c < (classes + kClasses - 1) / kClasses * kClasses; ++c) s.piece<V>(s.votes, c, p) = V{};
    int64_t begin = 0;
    for (int64_t at = 0; at < used; ++at) {
      const int64_t end = ascending[at];
      V top{};
      for (int32_t c = 0; c < classes; c += kClasses) {
        const V own0 = V{} + static_cast<uint8_t>(c), own1 = own0 + 1, own2 = own0 + 2, own3 = own0 + 3;
        V &votes0 = s.piece<V>(s.votes, c, p), &votes1 = s.piece<V>(s.votes, c + 1, p);
        V &votes2 = s.piece<V>(s.votes, c + 2, p), &votes3 = s.piece<V>(s.votes, c + 3, p);
        V sum0 = votes0, sum1 = votes1, sum2 = votes2, sum3 = votes3;  // in registers
        for (int64_t i = begin; i < end; ++i) {
          const V drawn = s.piece<V>(s.drawn, i, p);
          add_equal(sum0, drawn, own0);
          add_equal(sum1, drawn, own1);
          add_equal(sum2, drawn, own2);
          add_equal(sum3, drawn, own3);
        }
        votes0 = sum0, votes1 = sum1, votes2 = sum2, votes3 = sum3;
        const V lower = sum0 > sum1 ? sum0 : sum1, upper = sum2 > sum3 ? sum2 : sum3;
        const V own = lower > upper ? lower : upper;
        top = own > top ? own : top;
      }
      V ties{};
      for (int32_t c = 0; c < classes; ++c) add_equal(ties, s.piece<V>(s.votes, c, p), top);
      s.piece<V>(s.ties, at, p) = ties & (V)(s.piece<V>(s.votes, 0, p) == top);  // inverse[0] is 0
      begin = end;
    }
  }
  int64_t at = 0;
  for (; at + 4 <= used; at += 4) add_credits<4>(s, at, resamples, inverse, credits);
  for (; at < used; ++at) add_credits<1>(s, at, resamples, inverse, credits);
}

using CountRow = void (*)(ByteShuffles&, int32_t, const int64_t*, int64_t, int64_t, const double*, double*);

inline void count_row_scalar(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  count_row<Bytes16>(s, classes, ascending, used, resamples, inverse, credits);
}

#if CALM_FAST_X86
CALM_FAST_AVX2 inline void count_row_avx2(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  count_row<Bytes32>(s, classes, ascending, used, resamples, inverse, credits);
}

CALM_FAST_AVX512 inline void count_row_avx512(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  count_row<Bytes64>(s, classes, ascending, used, resamples, inverse, credits);
}
#endif

constexpr double kAbsent = -std::numeric_limits<double>::infinity();  // the sum of a class without a sample

// The same for weights, where s.drawn holds places: sums in the order of the draws. The resamples take turns, since an
// addition to a sum in memory waits for the one before it. `absent` is minus infinity until a class has a sample, then
// 0: no branch that cannot be foreseen, and every sum over the classes runs in vectors.
inline __attribute__((always_inline)) void weigh_row(
    const ByteShuffles& s, const Question& question, const int64_t* ascending, int64_t used, int64_t resamples,
    const double* inverse, const ShuffleScratch& scratch) {
  double* __restrict__ const sums = scratch.sums;
  double* __restrict__ const absent = scratch.absent;
  for (int64_t at = 0; at < question.classes * kRow; ++at) sums[at] = 0.0, absent[at] = kAbsent;
  int64_t i = 0;
  for (int64_t at = 0; at < used; ++at) {
    for (; i < ascending[at]; ++i) {
      for (int64_t g = 0; g < resamples; ++g) {
        const uint8_t place = s.drawn[i][g];
        const int64_t own = question.classes_of[place] * kRow + g;
        sums[own] += scratch.own[place];
        absent[own] = 0.0;
      }
    }
    double top[kRow], ties[kRow] = {};
    for (double& own : top) own = kAbsent;
    for (int64_t c = 0; c < question.classes * kRow; c += kRow) {
      for (int64_t g = 0; g < kRow; ++g) {
        const double sum = sums[c + g] + absent[c + g];
        top[g] = sum > top[g] ? sum : top[g];
      }
    }
    for (int64_t c = 0; c < question.classes * kRow; c += kRow) {
      for (int64_t g = 0; g < kRow; ++g) ties[g] += top[g] - (sums[c + g] + absent[c + g]) <= kTied ? 1.0 : 0.0;
    }
    for (int64_t g = 0; g < kRow; ++g) ties[g] = top[g] - (sums[g] + absent[g]) <= kTied ? ties[g] : 0.0;
    for (int64_t g = 0; g < resamples; ++g) scratch.credits[at] += inverse[static_cast<int64_t>(ties[g])];
  }
}

using WeighRow = void (*)(
    const ByteShuffles&, const Question&, const int64_t*, int64_t, int64_t, const double*, const ShuffleScratch&);

inline void weigh_row_scalar(
    const ByteShuffles& s, const Question& question, const int64_t* ascending, int64_t used, int64_t resamples,
    const double* inverse, const ShuffleScratch& scratch) {
  weigh_row(s, question, ascending, used, resamples, inverse, scratch);
}

#if CALM_FAST_X86
CALM_FAST_AVX2 inline void weigh_row_avx2(
    const ByteShuffles& s, const Question& question, const int64_t* ascending, int64_t used, int64_t resamples,
    const double* inverse, const ShuffleScratch& scratch) {
  weigh_row(s, question, ascending, used, resamples, inverse, scratch);
}

CALM_FAST_AVX512 inline void weigh_row_avx512(
    const ByteShuffles& s, const Question& question, const int64_t* ascending, int64_t used, int64_t resamples,
    const double* inverse, const ShuffleScratch& scratch) {
  weigh_row(s, question, ascending, used, resamples, inverse, scratch);
}
#endif

// What one lane does with a row of 64 resamples.
struct RowLane {
  Draw<uint8_t> draw;
  Draw<uint32_t> draw_words;
  DrawnClasses drawn_classes;
  CountRow count;
  WeighRow weigh;
};

inline RowLane row_lane_for(Lane lane) {
#if CALM_FAST_X86
  if (lane >= Lane::avx512) {
    return {draw_avx512<uint8_t>, draw_avx512<uint32_t>, drawn_classes_avx512, count_row_avx512, weigh_row_avx512};
  }
  if (lane == Lane::avx2) {
    return {draw_avx2<uint8_t>, draw_avx2<uint32_t>, drawn_classes_avx2, count_row_avx2, weigh_row_avx2};
  }
#endif
  return {draw_scalar<uint8_t>, draw_scalar<uint32_t>, drawn_classes_scalar, count_row_scalar, weigh_row_scalar};
}

// Any weights and any number of samples: sums in the order of the draws.
inline void weighted_shuffle(
    const Question& question, const Sizes& sizes, int64_t used, const uint32_t* draws, const ShuffleScratch& s) {
  for (int64_t i = 0; i < question.n; ++i) s.state[i] = static_cast<uint32_t>(i);
  for (int32_t c = 0; c < question.classes; ++c) s.sums[c] = kAbsent;
  int64_t i = 0;
  for (int64_t at = 0; at < used; ++at) {
    for (; i < sizes.ascending[at]; ++i) {
      const uint32_t from = draws[i * kGroup], drawn = s.state[from];
      s.state[from] = s.state[i];
      double& sum = s.sums[question.classes_of[drawn]];
      sum = (sum == kAbsent ? 0.0 : sum) + s.own[drawn];
    }
    double top = kAbsent;
    for (int32_t c = 0; c < question.classes; ++c) top = s.sums[c] > top ? s.sums[c] : top;
    if (!(top - s.sums[0] <= kTied)) continue;
    int32_t ties = 0;
    for (int32_t c = 0; c < question.classes; ++c) ties += top - s.sums[c] <= kTied;
    s.credits[at] += 1.0 / ties;
  }
}

// The credit of all voting samples together, weighted.
inline double whole_weighted(const Question& question, const ShuffleScratch& s) {
  for (int32_t c = 0; c < question.classes; ++c) s.sums[c] = kAbsent;
  double top = kAbsent;
  for (int64_t i = 0; i < question.n; ++i) {
    double& sum = s.sums[question.classes_of[i]];
    sum = (sum == kAbsent ? 0.0 : sum) + s.own[i];
  }
  for (int32_t c = 0; c < question.classes; ++c) top = s.sums[c] > top ? s.sums[c] : top;
  if (!(top - s.sums[0] <= kTied)) return 0.0;
  int32_t ties = 0;
  for (int32_t c = 0; c < question.classes; ++c) ties += top - s.sums[c] <= kTied;
  return 1.0 / ties;
}

// Sums of credits of the first `used` sizes, all below question.n, over the resamples, into s.credits. Up to
// kByteSamples samples, each counting 1 or, weighted, s.own.
inline void byte_resamples(
    const Question& question, const Sizes& sizes, int64_t used, int64_t resamples, const RoundKeys& keys,
    uint32_t number, const RowLane& lane, bool weighted, const double* inverse, const ShuffleScratch& s) {
  ByteShuffles shuffles;
  const int64_t draws = sizes.ascending[used - 1], n = question.n;
  for (int64_t i = 0; i < n; ++i) shuffles.class_at[i] = static_cast<uint8_t>(weighted ? i : question.classes_of[i]);
  for (int64_t first = 0; first < resamples; first += kRow) {
    const int64_t rest = resamples - first < kRow ? resamples - first : kRow;
    for (int64_t group = 0; group * kGroup < rest; ++group) {
      const auto resample = static_cast<uint32_t>(first + group * kGroup);
      if (n <= kFollowed) {
        lane.draw(keys, number, resample, draws, n, shuffles.from[0] + group * kGroup, kRow);
      } else {
        lane.draw_words(keys, number, resample, draws, n, s.draws, kGroup);
        shuffle(shuffles, s.draws, draws, group);
      }
    }
    if (n <= kFollowed) {
      const int64_t drawn = (rest + kGroup - 1) / kGroup * kGroup;  // behind the last group: any places
      for (int64_t i = 0; drawn < kRow && i < draws; ++i) __builtin_memset(shuffles.from[i] + drawn, 0, kRow - drawn);
      lane.drawn_classes(shuffles, draws);
    }
    if (weighted) {
      lane.weigh(shuffles, question, sizes.ascending.data(), used, rest, inverse, s);
    } else {
      lane.count(shuffles, question.classes, sizes.ascending.data(), used, rest, inverse, s.credits);
    }
  }
}

inline void weighted_resamples(
    const Question& question, const Sizes& sizes, int64_t used, int64_t resamples, const RoundKeys& keys,
    uint32_t number, Draw<uint32_t> draw, const ShuffleScratch& s) {
  const int64_t draws = sizes.ascending[used - 1];
  for (int64_t first = 0; first < resamples; first += kGroup) {
    draw(keys, number, static_cast<uint32_t>(first), draws, question.n, s.draws, kGroup);
    const int64_t group = resamples - first < kGroup ? resamples - first : kGroup;
    for (int64_t g = 0; g < group; ++g) weighted_shuffle(question, sizes, used, s.draws + g, s);
  }
}

}  // namespace calm_fast::maj_at_k_cpu
