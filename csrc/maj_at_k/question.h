// The common part of both methods of maj_at_k on the CPU: the voting samples of a question with their classes, and the
// sizes of the curve.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "common/tie.h"
#include "vote/vote_core.h"

namespace calm_fast::maj_at_k_cpu {

// Cuts arrays out of one allocation. Without a base it only measures.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

// The distinct values of k, ascending, and the position of each of the caller's values among them.
struct Sizes {
  explicit Sizes(const std::vector<int64_t>& ks) : ks(ks), ascending(ks) {
    std::sort(ascending.begin(), ascending.end());
    ascending.erase(std::unique(ascending.begin(), ascending.end()), ascending.end());
    for (int64_t k : ks) {
      at.push_back(std::lower_bound(ascending.begin(), ascending.end(), k) - ascending.begin());
    }
  }
  // Returns how many of the ascending sizes leave out at least one of n samples.
  int64_t below(int64_t n) const {
    return std::lower_bound(ascending.begin(), ascending.end(), n) - ascending.begin();
  }
  const std::vector<int64_t>& ks;
  std::vector<int64_t> ascending, at;
};

// The voting samples of one question, in order. Class 0 is the gold answer's, even if it has no samples.
struct Question {
  Question(Arena& arena, int64_t samples) : table_size(16) {
    while (table_size < 2 * (samples + 1)) table_size *= 2;
    classes_of = arena.take<int32_t>(samples);
    place = arena.take<int32_t>(samples);
    counts = arena.take<int32_t>(samples + 1);
    ids = arena.take<int64_t>(samples + 1);
    table = arena.take<int32_t>(table_size);
    votes = arena.take<uint8_t>(samples);
  }

  void read(const int64_t* answers, const uint8_t* valid, int64_t samples, int64_t right) {
    voting = valid = vote_cpu::voting_samples(answers, valid, samples, votes);
    std::memset(table, 0xff, table_size * sizeof(int32_t));
    n = classes = 0;
    class_number(right);
    for (int64_t i = 0; i < samples; ++i) {
      if (valid != nullptr && !valid[i]) continue;
      const int32_t own = class_number(answers[i]);
      ++counts[own];
      place[n] = static_cast<int32_t>(i);
      classes_of[n++] = own;
    }
  }

  // Returns the credit of all voting samples together, one vote each.
  double whole() const {
    int32_t ties = 0;
    for (int32_t c = 0; c < classes; ++c) {
      if (counts[c] > counts[0]) return 0.0;
      ties += counts[c] == counts[0];
    }
    return counts[0] ? 1.0 / ties : 0.0;
  }

  const uint8_t* voting = nullptr;  // which samples vote, null: all
  int64_t n = 0;
  int32_t classes = 0;
  int32_t *classes_of, *place, *counts;  // class and place of each voting sample; number of samples of each class

 private:
  int32_t class_number(int64_t id) {
    const int shift = 64 - __builtin_ctzll(static_cast<uint64_t>(table_size));
    int64_t slot = static_cast<int64_t>((static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15ULL) >> shift);
    while (table[slot] >= 0 && ids[table[slot]] != id) slot = (slot + 1) & (table_size - 1);
    if (table[slot] < 0) {
      ids[classes] = id;
      counts[classes] = 0;
      table[slot] = classes++;
    }
    return table[slot];
  }

  int64_t table_size;  // a power of two
  int64_t* ids;
  int32_t* table;
  uint8_t* votes;
};

}  // namespace calm_fast::maj_at_k_cpu
