// The vote of one question on the CPU, without tensors: sample weights, classes, winner.
//
// Every lane sums in float64 in the order of the samples, so all lanes return the bits of
// calm_fast/_ops/vote/reference.py. Compile with -ffp-contract=off, because 1 + lam s must be rounded twice.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/lanes.h"
#include "common/tie.h"

namespace calm_fast::vote_cpu {

constexpr int64_t kByteSamples = 256;  // samples up to which classes are found by comparing bytes
constexpr int64_t kByteBlocks = kByteSamples / 64;
constexpr int64_t kByteClasses = 40;  // with more classes the hash table is faster

struct Vote {
  int64_t winner = -1;
  double weight = 0.0, total = 0.0, margin = 0.0;
  int64_t ties = 0;
};

// Memory of one thread for questions of k samples, cut out of one allocation.
struct Scratch {
  static int64_t table_size(int64_t k) {
    int64_t size = 16;
    while (size < 2 * k) size *= 2;
    return size;
  }
  static int64_t bytes(int64_t k) { return (k + kByteClasses) * 8 + k * 16 + table_size(k) * 4 + k; }
  Scratch(char* memory, int64_t k) : table(table_size(k)) {
    weights = reinterpret_cast<double*>(memory);
    sums = weights + k;
    ids = reinterpret_cast<int64_t*>(sums + k + kByteClasses);
    slots = reinterpret_cast<int32_t*>(ids + k);
    votes = reinterpret_cast<uint8_t*>(slots + table);
  }
  int64_t table;  // a power of two
  double* weights;  // (k,) of the samples
  double* sums;     // (k + kByteClasses,) of the classes, in order of appearance; SIMD stores write whole registers
  int64_t* ids;     // (k,) of the classes
  int32_t* slots;   // (table,) the class in each slot; -1: none
  uint8_t* votes;   // (k,) whether a sample votes, where that is not `valid`
};

// Returns which samples of a question vote, null if all do. A negative answer does not, though nobody has checked it; then
// the mask is written to `own` (k,).
inline const uint8_t* voting_samples(const int64_t* answers, const uint8_t* valid, int64_t k, uint8_t* own) {
  int64_t signs = 0;
  for (int64_t i = 0; i < k; ++i) signs |= answers[i];
  if (signs >= 0) return valid;
  for (int64_t i = 0; i < k; ++i) own[i] = answers[i] >= 0 && (valid == nullptr || valid[i]);
  return own;
}

// Computes the weight of each sample: s, or 1 + lam s. A NaN score takes the mean of the other valid scores, or 1 if
// there is none. A sample that does not vote weighs 0, which changes no bit of a sum.
template <class Score>
void weigh(const Score* scores, const uint8_t* valid, int64_t k, bool adaptive, double lam, double* weights) {
  int64_t unscored = 0;  // as wide as a double, so that the loop vectorises
  for (int64_t i = 0; i < k; ++i) {
    weights[i] = static_cast<double>(scores[i]);
    unscored += weights[i] != weights[i];
  }
  if (unscored) {
    double sum = 0.0;
    int64_t known = 0;
    for (int64_t i = 0; i < k; ++i) {
      if ((valid == nullptr || valid[i]) && weights[i] == weights[i]) sum += weights[i], ++known;
    }
    const double mean = known ? sum / static_cast<double>(known) : 1.0;
    for (int64_t i = 0; i < k; ++i) weights[i] = weights[i] == weights[i] ? weights[i] : mean;
  }
  if (adaptive) {
    for (int64_t i = 0; i < k; ++i) weights[i] = 1.0 + lam * weights[i];
  }
  for (int64_t i = 0; valid != nullptr && i < k; ++i) weights[i] = valid[i] ? weights[i] : 0.0;
}

inline double total_weight(const uint8_t* valid, int64_t k, const double* weights) {
  if (weights == nullptr) {  // integers: the order does not matter
    int64_t voting = valid == nullptr ? k : 0;
    for (int64_t i = 0; valid != nullptr && i < k; ++i) voting += valid[i] != 0;
    return static_cast<double>(voting);
  }
  double total = 0.0;
  for (int64_t i = 0; i < k; ++i) total += weights[i];
  return total;
}

// Finds the classes, in order of appearance, and their sums with a hash table (linear probing), for any ids and any k.
// Without weights it counts. Returns the number of classes.
inline int64_t sum_by_table(
    const int64_t* answers, const uint8_t* valid, int64_t k, const double* weights, const Scratch& scratch,
    double& total) {
  std::memset(scratch.slots, 0xff, scratch.table * sizeof(int32_t));
  const int shift = 64 - __builtin_ctzll(static_cast<uint64_t>(scratch.table));
  int32_t classes = 0;
  for (int64_t i = 0; i < k; ++i) {
    if (valid != nullptr && !valid[i]) continue;
    const int64_t id = answers[i];
    int64_t slot = static_cast<int64_t>((static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15ULL) >> shift);
    int32_t found;
    while ((found = scratch.slots[slot]) >= 0 && scratch.ids[found] != id) slot = (slot + 1) & (scratch.table - 1);
    if (found < 0) {
      found = scratch.slots[slot] = classes++;
      scratch.ids[found] = id;
      scratch.sums[found] = 0.0;
    }
    scratch.sums[found] += weights == nullptr ? 1.0 : weights[i];
  }
  total = total_weight(valid, k, weights);
  return classes;
}

// The samples of a question as bytes, for the SIMD lanes.
struct Bytes {
  alignas(64) uint8_t of[kByteSamples];      // answer id
  alignas(64) uint8_t number[kByteSamples];  // class, numbered in order of appearance
  uint64_t left[kByteBlocks];                // bits: samples whose class is not known yet
};

constexpr uint8_t kNoClass = 255;  // class of a sample that does not vote

// Packs the ids into bytes and the voting samples into `left`. Returns false if an id does not fit into a byte.
__attribute__((always_inline)) inline bool pack(const int64_t* answers, const uint8_t* valid, int64_t k, Bytes& bytes) {
  uint64_t any = 0;
  for (int64_t b = 0; b < (k + 63) / 64; ++b) bytes.left[b] = b < k / 64 ? ~0ULL : (1ULL << (k % 64)) - 1;
  if (valid == nullptr) {
    for (int64_t i = 0; i < k; ++i) {
      any |= static_cast<uint64_t>(answers[i]);
      bytes.of[i] = static_cast<uint8_t>(answers[i]);
    }
    return any < 256;
  }
  for (int64_t i = 0; i < k; ++i) {
    const uint64_t id = static_cast<uint64_t>(answers[i]) & (valid[i] ? ~0ULL : 0ULL);
    any |= id;
    bytes.of[i] = static_cast<uint8_t>(id);
  }
  return any < 256;
}

#if CALM_FAST_X86
// Adds up the weights by class, 8 N classes in N registers; a sample changes one element. Returns the total.
template <int N>
CALM_FAST_AVX512 inline double add_up_avx512(const Bytes& bytes, const double* weights, int64_t k, double* sums) {
  const __m512i first = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512d sum[N];
  __m512i number[N];
  double total = 0.0;
  for (int n = 0; n < N; ++n) {
    sum[n] = _mm512_setzero_pd();
    number[n] = _mm512_add_epi64(first, _mm512_set1_epi64(8 * n));
  }
  for (int64_t i = 0; i < k; ++i) {
    const __m512i own = _mm512_set1_epi64(bytes.number[i]);
    const __m512d weight = _mm512_set1_pd(weights[i]);
    total += weights[i];
    for (int n = 0; n < N; ++n) {
      sum[n] = _mm512_mask_add_pd(sum[n], _mm512_cmpeq_epi64_mask(number[n], own), sum[n], weight);
    }
  }
  for (int n = 0; n < N; ++n) _mm512_storeu_pd(sums + 8 * n, sum[n]);
  return total;
}

// Finds the classes, in order of appearance, and their sums. Returns their number, or -1 if the table must be used,
// because an id is too large or there are too many classes.
CALM_FAST_AVX512 inline int64_t sum_by_bytes_avx512(
    const int64_t* answers, const uint8_t* valid, int64_t k, const double* weights, const Scratch& scratch,
    double& total) {
  Bytes bytes;
  if (!pack(answers, valid, k, bytes)) return -1;
  const int64_t blocks = (k + 63) / 64;
  for (int64_t b = 0; valid != nullptr && b < blocks; ++b) {
    const __m512i votes = _mm512_maskz_loadu_epi8(bytes.left[b], valid + 64 * b);
    bytes.left[b] = _mm512_test_epi8_mask(votes, votes);
  }
  for (int64_t b = 0; weights != nullptr && b < blocks; ++b) {
    _mm512_store_si512(bytes.number + 64 * b, _mm512_set1_epi8(static_cast<char>(kNoClass)));
  }
  int64_t classes = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    while (bytes.left[b]) {
      if (classes == kByteClasses) return -1;
      const int64_t first = 64 * b + __builtin_ctzll(bytes.left[b]);
      const __m512i id = _mm512_set1_epi8(static_cast<char>(bytes.of[first]));
      const __m512i number = _mm512_set1_epi8(static_cast<char>(classes));
      int64_t count = 0;
      for (int64_t c = b; c < blocks; ++c) {
        const __m512i block = _mm512_load_si512(bytes.of + 64 * c);
        const uint64_t same = _mm512_mask_cmpeq_epi8_mask(bytes.left[c], block, id);
        bytes.left[c] ^= same;
        count += _mm_popcnt_u64(same);
        if (weights != nullptr) _mm512_mask_storeu_epi8(bytes.number + 64 * c, same, number);
      }
      scratch.ids[classes] = answers[first];
      scratch.sums[classes++] = static_cast<double>(count);
    }
  }
  total = 0.0;
  for (int64_t c = 0; weights == nullptr && c < classes; ++c) total += scratch.sums[c];
  if (weights == nullptr) return classes;
  switch ((classes + 7) / 8) {
    case 0:
      break;
    case 1:
      total = add_up_avx512<1>(bytes, weights, k, scratch.sums);
      break;
    case 2:
      total = add_up_avx512<2>(bytes, weights, k, scratch.sums);
      break;
    case 3:
      total = add_up_avx512<3>(bytes, weights, k, scratch.sums);
      break;
    case 4:
      total = add_up_avx512<4>(bytes, weights, k, scratch.sums);
      break;
    default:
      total = add_up_avx512<kByteClasses / 8>(bytes, weights, k, scratch.sums);
  }
  return classes;
}

CALM_FAST_AVX2 inline uint64_t equal_avx2(const uint8_t* bytes, __m256i id) {
  const __m256i* at = reinterpret_cast<const __m256i*>(bytes);
  const uint32_t low = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_load_si256(at), id));
  const uint32_t high = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_load_si256(at + 1), id));
  return low | static_cast<uint64_t>(high) << 32;
}

// The same with two comparisons per 64 samples, for counts only: weights are added up as fast with the table.
CALM_FAST_AVX2 inline int64_t count_by_bytes_avx2(
    const int64_t* answers, const uint8_t* valid, int64_t k, const Scratch& scratch, double& total) {
  Bytes bytes;
  if (!pack(answers, valid, k, bytes)) return -1;
  const int64_t blocks = (k + 63) / 64;
  for (int64_t i = 0; valid != nullptr && i < k; ++i) {
    bytes.left[i / 64] &= ~(static_cast<uint64_t>(!valid[i]) << i % 64);
  }
  int64_t classes = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    while (bytes.left[b]) {
      if (classes == kByteClasses) return -1;
      const int64_t first = 64 * b + __builtin_ctzll(bytes.left[b]);
      const __m256i id = _mm256_set1_epi8(static_cast<char>(bytes.of[first]));
      int64_t count = 0;
      for (int64_t c = b; c < blocks; ++c) {
        const uint64_t same = equal_avx2(bytes.of + 64 * c, id) & bytes.left[c];
        bytes.left[c] ^= same;
        count += __builtin_popcountll(same);
      }
      scratch.ids[classes] = answers[first];
      scratch.sums[classes++] = static_cast<double>(count);
    }
  }
  total = total_weight(valid, k, nullptr);
  return classes;
}
#endif

// Computes winner, weight, margin and ties from the classes, which are in order of appearance.
inline void pick_winner(const Scratch& scratch, int64_t classes, Vote& vote) {
  double top = -std::numeric_limits<double>::infinity(), next = top;
  for (int64_t c = 0; c < classes; ++c) {
    const double sum = scratch.sums[c];
    if (sum > top) {
      next = top, top = sum;
    } else if (sum > next) {
      next = sum;
    }
  }
  const double limit = tie_limit(top);
  int64_t winner = -1;
  for (int64_t c = 0; c < classes; ++c) {
    if (!(scratch.sums[c] >= limit)) continue;
    if (winner < 0) winner = c;
    ++vote.ties;
  }
  if (winner < 0) return;
  vote.winner = scratch.ids[winner];
  vote.weight = scratch.sums[winner];
  vote.margin = vote.ties > 1 ? 0.0 : classes > 1 ? top - next : top;
}

// Returns the vote of one question. Score is void where every sample weighs 1.
template <class Score>
Vote vote_question(
    const int64_t* answers, const Score* scores, const uint8_t* valid, int64_t k, bool adaptive, double lam,
    Lane lane, const Scratch& scratch) {
  Vote vote;
  valid = voting_samples(answers, valid, k, scratch.votes);
  const double* weights = nullptr;
  if constexpr (!std::is_void_v<Score>) {
    weigh(scores, valid, k, adaptive, lam, scratch.weights);
    weights = scratch.weights;
  }
  int64_t classes = -1;
#if CALM_FAST_X86
  if (k <= kByteSamples && lane >= Lane::avx512) {
    classes = sum_by_bytes_avx512(answers, valid, k, weights, scratch, vote.total);
  } else if (k <= kByteSamples && lane == Lane::avx2 && weights == nullptr) {
    classes = count_by_bytes_avx2(answers, valid, k, scratch, vote.total);
  }
#endif
  if (classes < 0) classes = sum_by_table(answers, valid, k, weights, scratch, vote.total);
  pick_winner(scratch, classes, vote);
  return vote;
}

}  // namespace calm_fast::vote_cpu
