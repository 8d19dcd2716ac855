// Resampled credits on the CPU: draws of 16 resamples in vector registers, then their shuffles side by side.
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

using Row = uint8_t __attribute__((vector_size(kGroup)));  // one byte for each of 16 resamples

// For questions of up to kByteSamples samples that count 1 each.
struct ByteShuffles {
  // The classes that 16 resamples draw, draw by draw. A sample once drawn is not looked at again, so a swap is one
  // store. The resamples take turns: a load that may meet a store of its own resample comes long after it.
  void shuffle(const Question& question, const uint32_t* draws, int64_t count) {
    const int64_t stride = (question.n + 63) / 64 * 64;
    for (int64_t i = 0; i < question.n; ++i) state[i] = static_cast<uint8_t>(question.classes_of[i]);
    for (int64_t g = 1; g < kGroup; ++g) __builtin_memcpy(state + g * stride, state, question.n);
    for (int64_t i = 0; i < count; ++i) {
      alignas(kGroup) uint8_t row[kGroup];
      for (int64_t g = 0; g < kGroup; ++g) {
        const int64_t from = g * stride + draws[i * kGroup + g];
        row[g] = state[from];
        state[from] = state[g * stride + i];
      }
      __builtin_memcpy(drawn + i, row, kGroup);
    }
  }

  // Adds the credits of the first `group` resamples. A class at a time: counters in memory would wait for each other.
  void count(
      int32_t classes, const int64_t* ascending, int64_t used, int64_t group, const double* inverse, double* credits) {
    for (int32_t c = 0; c < classes; ++c) votes[c] = Row{};
    int64_t begin = 0;
    for (int64_t at = 0; at < used; ++at) {
      const int64_t end = ascending[at];
      Row top{};
      for (int32_t c = 0; c < classes; ++c) {
        const Row own = Row{} + static_cast<uint8_t>(c);
        Row sum = votes[c];
        for (int64_t i = begin; i < end; ++i) sum -= reinterpret_cast<Row>(drawn[i] == own);  // equal is -1
        votes[c] = sum;
        top = sum > top ? sum : top;
      }
      Row ties{};
      for (int32_t c = 0; c < classes; ++c) ties -= reinterpret_cast<Row>(votes[c] == top);
      ties &= reinterpret_cast<Row>(votes[0] == top);  // inverse[0] is 0
      double credit = credits[at];
      for (int64_t g = 0; g < group; ++g) credit += inverse[ties[g]];
      credits[at] = credit;
      begin = end;
    }
  }

  uint8_t state[(kByteSamples + 1) * kGroup];
  Row drawn[kByteSamples + 1], votes[kByteSamples + 1];
};

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
    Draw draw, const double* inverse, const ShuffleScratch& s) {
  ByteShuffles shuffles;
  const int64_t draws = sizes.ascending[used - 1];
  for (int64_t first = 0; first < resamples; first += kGroup) {
    draw(seed, number, static_cast<uint32_t>(first), draws, question.n, s.draws);
    shuffles.shuffle(question, s.draws, draws);
    const int64_t group = resamples - first < kGroup ? resamples - first : kGroup;
    shuffles.count(question.classes, sizes.ascending.data(), used, group, inverse, s.credits);
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
