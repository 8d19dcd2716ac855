// Resampled credits on the CPU: draws of 16 resamples in vector registers, then their shuffles, four side by side.
//
// Credits are added up in the order of the resamples, so every lane returns the same bits as the definition.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "maj_at_k/draws.h"
#include "maj_at_k/question.h"

namespace calm_fast::maj_at_k_cpu {

// Memory of one thread beside the question's.
struct ShuffleScratch {
  ShuffleScratch(Arena& arena, int64_t samples, int64_t sizes)
      : stride((samples + 1 + 63) / 64 * 64),
        draws(arena.take<uint32_t>((samples + 4) * kGroup)),
        state(arena.take<uint32_t>(4 * stride)),
        counts(arena.take<uint32_t>(4 * stride)),
        weights(arena.take<double>(samples)),
        own(arena.take<double>(samples)),
        sums(arena.take<double>(samples + 1)),
        credits(arena.take<double>(sizes)) {}
  int64_t stride;  // from one resample's state and counts to the next one's
  uint32_t *draws, *state, *counts;
  double *weights, *own, *sums;  // of all samples, of the voting ones in their order, of the classes
  double* credits;  // of the sizes
};

// One vote each. The state holds classes; a sample once drawn is not looked at again, so a swap is one store.
// Wide: 32-bit state and counts, for more than 255 samples.
template <class Cell, int Side>
inline void count_shuffles(
    const Question& question, const Sizes& sizes, int64_t used, const uint32_t* draws, const Cell* start,
    const double* inverse, const ShuffleScratch& s) {
  Cell* state = reinterpret_cast<Cell*>(s.state);
  Cell* counts = reinterpret_cast<Cell*>(s.counts);
  uint32_t top[Side], ties[Side];
  for (int g = 0; g < Side; ++g) {
    std::memcpy(state + g * s.stride, start, question.n * sizeof(Cell));
    std::memset(counts + g * s.stride, 0, question.classes * sizeof(Cell));
    top[g] = ties[g] = 0;
  }
  int64_t i = 0;
  for (int64_t at = 0; at < used; ++at) {
    for (; i < sizes.ascending[at]; ++i) {
      for (int g = 0; g < Side; ++g) {
        Cell* own = state + g * s.stride;
        const uint32_t from = draws[i * kGroup + g];
        const Cell drawn = own[from];
        own[from] = own[i];
        const uint32_t votes = ++counts[g * s.stride + drawn];
        ties[g] = votes > top[g] ? 1 : ties[g] + (votes == top[g]);
        top[g] = votes > top[g] ? votes : top[g];
      }
    }
    for (int g = 0; g < Side; ++g) {
      s.credits[at] += counts[g * s.stride] == top[g] ? inverse[ties[g]] : 0.0;
    }
  }
}

// Any weights: sums in the order of the draws; a class without a sample stands at minus infinity.
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
template <class Cell>
void count_resamples(
    const Question& question, const Sizes& sizes, int64_t used, int64_t resamples, uint64_t seed, uint32_t number,
    Draw draw, const double* inverse, const ShuffleScratch& s) {
  Cell* start = reinterpret_cast<Cell*>(s.sums);  // free here
  for (int64_t i = 0; i < question.n; ++i) start[i] = static_cast<Cell>(question.classes_of[i]);
  const int64_t draws = sizes.ascending[used - 1];
  for (int64_t first = 0; first < resamples; first += kGroup) {
    draw(seed, number, static_cast<uint32_t>(first), draws, question.n, s.draws);
    const int64_t group = resamples - first < kGroup ? resamples - first : kGroup;
    int64_t g = 0;
    for (; g + 4 <= group; g += 4) {
      count_shuffles<Cell, 4>(question, sizes, used, s.draws + g, start, inverse, s);
    }
    for (; g < group; ++g) count_shuffles<Cell, 1>(question, sizes, used, s.draws + g, start, inverse, s);
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
