// The exact credits of one question on the CPU. Derivation: docs/ops/maj_at_k.md.
//
// For each number w of samples of the gold class in the subset, and each number t of other classes that also have w,
// there is a polynomial in z, the number of samples taken from the other classes. It counts the subsets in which no
// class has more than w samples, and is a product over the classes. Its coefficients are probabilities of binomials
// with one common parameter (the tilt), so they lie in [0, 1].
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>

#include "common/lanes.h"
#include "maj_at_k/question.h"

namespace calm_fast::maj_at_k_cpu {

constexpr int64_t kOneTilt = 1000;  // samples up to which one tilt serves every k: 2^-1000 is a normal float64

// Computes out[i] = C(n, i) p^i (1 - p)^(n - i) for i = 0 .. most. The exponent is kept apart, so that no step
// underflows or overflows.
inline void binomial_row(double* out, int64_t n, int64_t most, double p) {
  constexpr double kLarge = 0x1p500;
  double value = 1.0;
  int64_t large = 0;  // value * kLarge^large
  for (int64_t i = 0; i < n; ++i) {
    value *= 1.0 - p;
    if (value < 1.0 / kLarge) value *= kLarge, --large;
  }
  const double odds = p / (1.0 - p);
  for (int64_t i = 0; i <= most; ++i) {
    if (i > n) {
      out[i] = 0.0;
      continue;
    }
    out[i] = large == 0 ? value : large < -3 ? 0.0 : std::ldexp(value, static_cast<int>(500 * large));
    value = value * static_cast<double>(n - i) / static_cast<double>(i + 1) * odds;
    if (value > kLarge) value *= 1.0 / kLarge, ++large;
    if (value < 1.0 / kLarge && value > 0.0) value *= kLarge, --large;
  }
}

// Memory that only grows. take() returns nullptr if memory ran out.
class Buffer {
 public:
  double* take(int64_t count) {
    if (count > size_) {
      memory_.reset(new (std::nothrow) double[count]);
      size_ = memory_ ? count : 0;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<double[]> memory_;
  int64_t size_ = 0;
};

struct ExactScratch {
  ExactScratch(Arena& arena, int64_t samples)
      : others(arena.take<int32_t>(samples + 1)),
        rows(arena.take<double>(2 * samples + 2)),
        row_of(arena.take<double*>(samples + 1)),
        right(arena.take<double>(samples + 1)),
        rest(arena.take<double>(samples + 1)),
        all(arena.take<double>(samples + 1)),
        joint(arena.take<double>(samples + 1)) {}
  int32_t* others;  // samples of the other classes, largest first
  double *rows, **row_of;      // binomial rows of the other classes
  double *right, *rest, *all;  // binomial rows of the gold class, of the small classes together, of the question
  double* joint;               // coefficients summed over t
  Buffer polynomials;
};

// A product of factors sum_{i < w} f_i z^i + y f_w z^w, in two buffers. The coefficient of y^t z^s, s >= t w, is in row
// t at s - t w, so that a tie moves a coefficient down a row but not sideways.
struct Product {
  int64_t w, size, most_ties;  // s < size, t <= most_ties
  double *now, *next;
  int64_t length(int64_t t) const { return size - t * w; }
  // Returns how many elements of row t can be nonzero after `factors` factors.
  int64_t reach(int64_t t, int64_t factors) const {
    return std::min(length(t), (factors - t) * (w - 1) + 1);
  }

  [[gnu::always_inline]] inline void multiply(const double* factor, int64_t factors) {
    const int64_t before = std::min(factors, most_ties), after = std::min(factors + 1, most_ties);
    for (int64_t t = 0; t <= after; ++t) {
      const int64_t wide = reach(t, factors + 1);
      double* to = next + t * size;
      if (t > 0) {
        const double* from = now + (t - 1) * size;  // of the same reach
        for (int64_t s = 0; s < wide; ++s) to[s] = from[s] * factor[w];
      } else {
        for (int64_t s = 0; s < wide; ++s) to[s] = 0.0;
      }
      if (t > before) continue;
      const double* from = now + t * size;
      const int64_t old = reach(t, factors);
      for (int64_t i = 0; i < w && i < wide; ++i) {
        const double f = factor[i];
        const int64_t count = std::min(old, wide - i);
        for (int64_t s = 0; s < count; ++s) to[s + i] += from[s] * f;
      }
    }
    std::swap(now, next);
  }
};

// Computes the credits of sizes ascending[first .. last), all below n, with one tilt. Returns false if memory ran out.
[[gnu::always_inline]] inline bool exact_pass(
    const Question& question, const int64_t* ascending, int64_t first, int64_t last, double tilt, int64_t classes,
    ExactScratch& s, double* credits) {
  const int64_t longest = ascending[last - 1], c = question.counts[0];
  binomial_row(s.right, c, longest, tilt);
  binomial_row(s.all, question.n, longest, tilt);
  double* next_row = s.rows;
  int64_t small = 0, rest = -1;  // samples of the classes with fewer than w; the number that s.rest was computed for
  for (int64_t j = 0; j < classes; ++j) {
    const int64_t most = std::min<int64_t>(s.others[j], longest);
    s.row_of[j] = next_row;
    binomial_row(next_row, s.others[j], most, tilt);
    next_row += most + 1;
  }
  for (int64_t at = first; at < last; ++at) credits[at] = 0.0;
  int64_t held = classes;
  for (int64_t w = 1; w <= std::min(c, longest); ++w) {
    for (; held > 0 && s.others[held - 1] < w; --held) small += s.others[held - 1];
    if (small != rest) binomial_row(s.rest, small, longest, tilt);
    rest = small;
    Product product{w, longest - w + 1, std::min<int64_t>(held, (longest - w) / w), nullptr, nullptr};
    const int64_t half = (product.most_ties + 1) * product.size;
    product.now = s.polynomials.take(2 * half);
    if (product.now == nullptr) return false;
    product.next = product.now + half;
    product.now[0] = 1.0;
    for (int64_t j = 0; j < held; ++j) product.multiply(s.row_of[j], j);
    for (int64_t i = 0; i < product.size; ++i) s.joint[i] = 0.0;
    for (int64_t t = 0; t <= product.most_ties; ++t) {
      const double* row = product.now + t * product.size;
      const double share = 1.0 / static_cast<double>(t + 1);
      const int64_t wide = product.reach(t, held);
      for (int64_t i = 0; i < wide; ++i) s.joint[i + t * w] += row[i] * share;
    }
    for (int64_t at = first; at < last; ++at) {
      const int64_t left = ascending[at] - w;
      if (left < 0) continue;
      double sum = 0.0;
      for (int64_t i = std::max<int64_t>(0, left - small); i <= left; ++i) sum += s.joint[i] * s.rest[left - i];
      credits[at] += s.right[w] * sum;
    }
  }
  for (int64_t at = first; at < last; ++at) credits[at] /= s.all[ascending[at]];
  return true;
}

// Computes the credits of the first `used` sizes, all below question.n. Returns false if memory ran out.
[[gnu::always_inline]] inline bool exact_question(
    const Question& question, const int64_t* ascending, int64_t used, ExactScratch& s, double* credits) {
  const int64_t classes = question.classes - 1;
  for (int64_t j = 0; j < classes; ++j) s.others[j] = question.counts[j + 1];
  std::sort(s.others, s.others + classes, std::greater<int32_t>());
  if (question.n <= kOneTilt) return exact_pass(question, ascending, 0, used, 0.5, classes, s, credits);
  for (int64_t at = 0; at < used; ++at) {
    const double tilt = static_cast<double>(ascending[at]) / static_cast<double>(question.n);
    if (!exact_pass(question, ascending, at, at + 1, tilt, classes, s, credits)) return false;
  }
  return true;
}

using Exact = bool (*)(const Question&, const int64_t*, int64_t, ExactScratch&, double*);

inline bool exact_scalar(const Question& q, const int64_t* ascending, int64_t used, ExactScratch& s, double* credits) {
  return exact_question(q, ascending, used, s, credits);
}
#if CALM_FAST_X86
CALM_FAST_AVX2 inline bool exact_avx2(
    const Question& q, const int64_t* ascending, int64_t used, ExactScratch& s, double* credits) {
  return exact_question(q, ascending, used, s, credits);
}
CALM_FAST_AVX512 inline bool exact_avx512(
    const Question& q, const int64_t* ascending, int64_t used, ExactScratch& s, double* credits) {
  return exact_question(q, ascending, used, s, credits);
}
#endif

inline Exact exact_for(Lane lane) {
#if CALM_FAST_X86
  if (lane >= Lane::avx512) return exact_avx512;
  if (lane == Lane::avx2) return exact_avx2;
#endif
  return exact_scalar;
}

}  // namespace calm_fast::maj_at_k_cpu
