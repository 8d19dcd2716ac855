// Resampled credits on the CPU: draws of 16 resamples in vector registers, their shuffles side by side, and the votes
// of 64 of them in a register.
//
// Credits are added up in the order of the resamples, so every lane returns the same bits as the definition.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "maj_at_k/draws.h"
#include "maj_at_k/question.h"

namespace calm_fast::maj_at_k_cpu {

constexpr int64_t kByteSamples = 255;  // so many samples, their classes and their counts fit into bytes

// Memory of one thread beside the question's.
struct ShuffleScratch {
  ShuffleScratch(Arena& arena, int64_t samples, int64_t sizes)
      : draws(arena.take<uint32_t>((samples + 4) * kGroup)),
        state(arena.take<uint32_t>(samples)),
        weights(arena.take<double>(samples)),
        own(arena.take<double>(samples)),
        sums(arena.take<double>(samples + 1)),
        credits(arena.take<double>(sizes)) {}
  uint32_t *draws, *state;
  double *weights, *own, *sums;  // of all samples, of the voting ones in their order, of the classes
  double* credits;  // of the sizes
};

// One byte for each of 64 resamples: a whole AVX-512 register, two or four of the lower lanes'.
using Row = uint8_t __attribute__((vector_size(64)));
constexpr int64_t kRow = sizeof(Row), kGroupsPerRow = kRow / kGroup;

// What 64 resamples of a question of up to kByteSamples samples that count 1 each work on, all of it within the L1 cache.
struct ByteShuffles {
  // The classes that resamples 16 group .. of the row draw, draw by draw. A sample once drawn is not looked at again, so
  // a swap is one store. The resamples take turns: a load that may meet a store of its own resample comes long after it.
  // kStride: between the resamples' decks, a constant, so that it is part of the instructions' addresses.
  template <int64_t kStride>
  void shuffle(const Question& question, const uint32_t* draws, int64_t count, int64_t group) {
    for (int64_t i = 0; i < question.n; ++i) deck[i] = static_cast<uint8_t>(question.classes_of[i]);
    for (int64_t g = 1; g < kGroup; ++g) __builtin_memcpy(deck + g * kStride, deck, kStride);
    uint8_t* out = reinterpret_cast<uint8_t*>(drawn) + group * kGroup;
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 16
      for (int64_t g = 0; g < kGroup; ++g) {
        uint8_t* own = deck + g * kStride;
        const uint32_t from = draws[i * kGroup + g];
        out[i * kRow + g] = own[from];
        own[from] = own[i];
      }
    }
  }

  alignas(64) uint8_t deck[(kByteSamples + 1) * kGroup];
  Row drawn[kByteSamples + 1], votes[kByteSamples + 1], ties[kByteSamples + 1];
};

// Adds the credits of the first `resamples` of a row. A class at a time: counters in memory would wait for each other.
inline __attribute__((always_inline)) void count_row(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  for (int32_t c = 0; c < classes; ++c) s.votes[c] = Row{};
  int64_t begin = 0;
  for (int64_t at = 0; at < used; ++at) {
    const int64_t end = ascending[at];
    Row top{};
    for (int32_t c = 0; c < classes; ++c) {
      const Row own = Row{} + static_cast<uint8_t>(c);
      Row sum = s.votes[c];
      for (int64_t i = begin; i < end; ++i) sum -= reinterpret_cast<Row>(s.drawn[i] == own);  // equal is -1
      s.votes[c] = sum;
      top = sum > top ? sum : top;
    }
    Row ties{};
    for (int32_t c = 0; c < classes; ++c) ties -= reinterpret_cast<Row>(s.votes[c] == top);
    s.ties[at] = ties & reinterpret_cast<Row>(s.votes[0] == top);  // inverse[0] is 0
    begin = end;
  }
  for (int64_t g = 0; g < resamples; ++g) {  // in the order of the resamples; the sizes' sums do not wait for each other
    for (int64_t at = 0; at < used; ++at) credits[at] += inverse[s.ties[at][g]];
  }
}

using CountRow = void (*)(ByteShuffles&, int32_t, const int64_t*, int64_t, int64_t, const double*, double*);

inline void count_row_scalar(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  count_row(s, classes, ascending, used, resamples, inverse, credits);
}

#if CALM_FAST_X86
CALM_FAST_AVX2 inline void count_row_avx2(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  count_row(s, classes, ascending, used, resamples, inverse, credits);
}

CALM_FAST_AVX512 inline void count_row_avx512(
    ByteShuffles& s, int32_t classes, const int64_t* ascending, int64_t used, int64_t resamples, const double* inverse,
    double* credits) {
  count_row(s, classes, ascending, used, resamples, inverse, credits);
}
#endif

inline CountRow count_row_for(Lane lane) {
#if CALM_FAST_X86
  if (lane >= Lane::avx512) return count_row_avx512;
  if (lane == Lane::avx2) return count_row_avx2;
#endif
  return count_row_scalar;
}

// Any weights and any number of samples: sums in the order of the draws; a class without a sample stands at minus infinity.
inline void weighted_shuffle(
    const Question& question, const Sizes& sizes, int64_t used, const uint32_t* draws, const ShuffleScratch& s) {
  constexpr double kAbsent = -std::numeric_limits<double>::infinity();
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
  constexpr double kAbsent = -std::numeric_limits<double>::infinity();
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

// Sums of credits of the first `used` sizes, all below question.n, over the resamples, into s.credits.
inline void byte_resamples(
    const Question& question, const Sizes& sizes, int64_t used, int64_t resamples, uint64_t seed, uint32_t number,
    Draw draw, CountRow count, const double* inverse, const ShuffleScratch& s) {
  ByteShuffles shuffles;
  const int64_t draws = sizes.ascending[used - 1];
  for (int64_t first = 0; first < resamples; first += kRow) {
    const int64_t rest = resamples - first < kRow ? resamples - first : kRow;
    for (int64_t group = 0; group * kGroup < rest; ++group) {
      draw(seed, number, static_cast<uint32_t>(first + group * kGroup), draws, question.n, s.draws);
      if (question.n <= 64) {
        shuffles.shuffle<64>(question, s.draws, draws, group);
      } else {
        shuffles.shuffle<kByteSamples + 1>(question, s.draws, draws, group);
      }
    }
    count(shuffles, question.classes, sizes.ascending.data(), used, rest, inverse, s.credits);
  }
}

inline void weighted_resamples(
    const Question& question, const Sizes& sizes, int64_t used, int64_t resamples, uint64_t seed, uint32_t number,
    Draw draw, const ShuffleScratch& s) {
  for (int64_t first = 0; first < resamples; first += kGroup) {
    draw(seed, number, static_cast<uint32_t>(first), sizes.ascending[used - 1], question.n, s.draws);
    const int64_t group = resamples - first < kGroup ? resamples - first : kGroup;
    for (int64_t g = 0; g < group; ++g) weighted_shuffle(question, sizes, used, s.draws + g, s);
  }
}

}  // namespace calm_fast::maj_at_k_cpu
