// Resampled credits on the CPU: the draws of 16 resamples in vector registers (draws.h), then the shuffles (rows.h) and
// votes of 64 resamples.
//
// Credits are added up in the order of the resamples, so every lane returns the bits of the definition. Where k takes
// all samples there is one credit and no average.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "maj_at_k/draws.h"
#include "maj_at_k/question.h"
#include "maj_at_k/rows.h"

namespace calm_fast::maj_at_k_cpu {

// Memory of one thread besides the question's.
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
  double *weights, *own;  // weights of all samples; of the voting samples, in order
  double *sums, *absent;  // per class; (classes, kRow) with up to kByteSamples voting samples
  double* credits;        // per size
};

// Adds 1 to `sum` where a == b, in two instructions: an AVX-512 comparison gives a mask, the others give -1 where
// equal.
template <class V>
inline __attribute__((always_inline)) void add_equal(V& sum, const V& a, const V& b) {
  if constexpr (sizeof(V) == 64) {
    sum = a == b ? sum + 1 : sum;
  } else {
    sum -= (V)(a == b);
  }
}

// Adds the credits of sizes at .. at + kSizes - 1 in the order of the resamples. The sums are independent of each
// other.
template <int kSizes>
inline void add_credits(const ByteShuffles& s, int64_t at, int64_t resamples, const double* inverse, double* credits) {
  double sums[kSizes];
  for (int k = 0; k < kSizes; ++k) sums[k] = credits[at + k];
  for (int64_t g = 0; g < resamples; ++g) {
    for (int k = 0; k < kSizes; ++k) sums[k] += inverse[s.ties[at + k][g]];
  }
  for (int k = 0; k < kSizes; ++k) credits[at + k] = sums[k];
}

// Adds the credits of the first `resamples` of a row. Counters in memory would depend on each other, so kClasses
// classes at a time are compared with the drawn classes instead. Classes beyond the last one get no votes.
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

constexpr double kAbsent = -std::numeric_limits<double>::infinity();  // the sum of a class without samples

// The same with weights, where s.drawn holds places; sums are in the order of the draws. The resamples are interleaved,
// because an addition to a sum in memory waits for the one before it. `absent` is minus infinity until a class has a
// sample, then 0, which avoids unpredictable branches and keeps every sum over the classes in vectors.
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
    double top[kRow], limit[kRow], ties[kRow] = {};
    for (double& own : top) own = kAbsent;
    for (int64_t c = 0; c < question.classes * kRow; c += kRow) {
      for (int64_t g = 0; g < kRow; ++g) {
        const double sum = sums[c + g] + absent[c + g];
        top[g] = sum > top[g] ? sum : top[g];
      }
    }
    for (int64_t g = 0; g < kRow; ++g) limit[g] = tie_limit(top[g]);
    for (int64_t c = 0; c < question.classes * kRow; c += kRow) {
      for (int64_t g = 0; g < kRow; ++g) ties[g] += sums[c + g] + absent[c + g] >= limit[g] ? 1.0 : 0.0;
    }
    for (int64_t g = 0; g < kRow; ++g) ties[g] = sums[g] + absent[g] >= limit[g] ? ties[g] : 0.0;
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

// The functions of one lane for a row of 64 resamples.
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

// Adds the credits of one resample, for any weights and any number of samples; sums are in the order of the draws.
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
    const double limit = tie_limit(top);
    if (!(s.sums[0] >= limit)) continue;
    int32_t ties = 0;
    for (int32_t c = 0; c < question.classes; ++c) ties += s.sums[c] >= limit;
    s.credits[at] += 1.0 / ties;
  }
}

// Returns the credit of all voting samples together, weighted.
inline double whole_weighted(const Question& question, const ShuffleScratch& s) {
  for (int32_t c = 0; c < question.classes; ++c) s.sums[c] = kAbsent;
  double top = kAbsent;
  for (int64_t i = 0; i < question.n; ++i) {
    double& sum = s.sums[question.classes_of[i]];
    sum = (sum == kAbsent ? 0.0 : sum) + s.own[i];
  }
  for (int32_t c = 0; c < question.classes; ++c) top = s.sums[c] > top ? s.sums[c] : top;
  const double limit = tie_limit(top);
  if (!(s.sums[0] >= limit)) return 0.0;
  int32_t ties = 0;
  for (int32_t c = 0; c < question.classes; ++c) ties += s.sums[c] >= limit;
  return 1.0 / ties;
}

// Adds the credits of all resamples to s.credits, for the first `used` sizes, all below question.n, and up to
// kByteSamples samples. Each sample weighs 1 or, if `weighted`, s.own.
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
      if (n <= kTraceSamples) {
        lane.draw(keys, number, resample, draws, n, shuffles.from[0] + group * kGroup, kRow);
      } else {
        lane.draw_words(keys, number, resample, draws, n, s.draws, kGroup);
        shuffle(shuffles, s.draws, draws, group);
      }
    }
    if (n <= kTraceSamples) {
      const int64_t drawn = (rest + kGroup - 1) / kGroup * kGroup;  // places beyond the last group are arbitrary
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

// The same for any number of samples, always with s.own.
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
