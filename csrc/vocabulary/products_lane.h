// Packing, products and elementwise epilogues of one lane. Included once per lane by vocabulary_lanes_cpu.cpp, inside
// that lane's namespace (common/vectors.h). LANE is the attribute of the lane's functions and kRows the number of
// weight rows in a tile. No include guard on purpose.
//
// The elements of a vector are tokens. The hidden states of a group of kGroup tokens are packed with tokens innermost,
// the entries of a weight row are broadcast, and every running sum is a vector of tokens; nothing is summed across a
// vector. The bits of a token therefore depend neither on the other tokens nor on the number of threads.

constexpr int kVectors = 3;
constexpr int kGroup = kVectors * kWidth;

#include "vocabulary/softcap_lane.h"

// ---- packing ---------------------------------------------------------------------------------------------------------

LANE int64_t words(int64_t d) { return kPairs ? (d + 1) / 2 : d; }

// Returns a row as 32-bit operands of dot: the row itself where its memory has that form, else a copy in `spare`.
LANE const uint32_t* row_words(const Matrix& m, int64_t row, uint32_t* spare) {
  const int64_t d = m.columns, step = m.column_stride, start = row * m.row_stride;
  const bool whole = step == 1 && (kPairs ? d % 2 == 0 : m.type == Type::float32);
  if (m.type == Type::float32) {
    const float* from = static_cast<const float*>(m.data) + start;
    if (whole) return reinterpret_cast<const uint32_t*>(from);
    for (int64_t i = 0; i < d; ++i) std::memcpy(spare + i, from + i * step, 4);
    return spare;
  }
  const uint16_t* from = static_cast<const uint16_t*>(m.data) + start;
  if (kPairs) {
    if (whole) return reinterpret_cast<const uint32_t*>(from);
    uint16_t* to = reinterpret_cast<uint16_t*>(spare);
    for (int64_t i = 0; i < d; ++i) to[i] = from[i * step];
    if (d % 2) to[d] = 0;
  } else if (m.type == Type::bfloat16) {
    if (step == 1) {
      for (int64_t i = 0; i < d; ++i) spare[i] = static_cast<uint32_t>(from[i]) << 16;
    } else {
      for (int64_t i = 0; i < d; ++i) spare[i] = static_cast<uint32_t>(from[i * step]) << 16;
    }
  } else {
    const Half* halves = reinterpret_cast<const Half*>(from);
    float* to = reinterpret_cast<float*>(spare);
    int64_t i = 0;
#if CALM_FAST_X86
    if constexpr (kWidth >= 8) {
      for (; step == 1 && i + 8 <= d; i += 8) _mm256_storeu_ps(to + i, load8(halves + i));
    }
#endif
    for (; i < d; ++i) to[i] = to_float(halves[i * step]);
  }
  return spare;
}

// Writes word k of row r to to[k * width + r], for 4 rows.
LANE void interleave4(uint32_t* to, int64_t width, const uint32_t* const* rows, int64_t count) {
  int64_t k = 0;
#if CALM_FAST_X86
  for (; k + 4 <= count; k += 4) {
    __m128 a, b, c, d;
    std::memcpy(&a, rows[0] + k, 16);
    std::memcpy(&b, rows[1] + k, 16);
    std::memcpy(&c, rows[2] + k, 16);
    std::memcpy(&d, rows[3] + k, 16);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    std::memcpy(to + k * width, &a, 16);
    std::memcpy(to + (k + 1) * width, &b, 16);
    std::memcpy(to + (k + 2) * width, &c, 16);
    std::memcpy(to + (k + 3) * width, &d, 16);
  }
#endif
  for (; k < count; ++k) {
    for (int r = 0; r < 4; ++r) std::memcpy(to + k * width + r, rows[r] + k, 4);
  }
}

// Interleaves rows first .. first + rows of `m`, or those that `index` names, into a panel of `width` rows; missing
// rows are 0. `spare` has room for 4 rows of words.
LANE void pack(
    uint32_t* to, int64_t width, const Matrix& m, int64_t first, int64_t rows, const int64_t* index, uint32_t* spare) {
  const int64_t count = words(m.columns);
  for (int64_t at = 0; at < width; at += 4) {
    const uint32_t* from[4];
    for (int64_t r = 0; r < 4; ++r) {
      uint32_t* own = spare + r * count;
      if (at + r < rows) {
        from[r] = row_words(m, index ? index[at + r] : first + at + r, own);
      } else {
        std::memset(own, 0, static_cast<size_t>(count) * 4);
        from[r] = own;
      }
    }
    interleave4(to + at, width, from, count);
  }
}

// Prefetches part `part` of `parts` of rows first .. first + rows into the L2 cache, from which the next panel is
// packed.
LANE void prefetch(const Matrix& m, int64_t first, int64_t rows, int64_t part, int64_t parts) {
  if (m.column_stride != 1) return;
  const int64_t size = m.type == Type::float32 ? 4 : 2, lines = (m.columns * size + 63) / 64;
  for (int64_t r = first; r < first + rows; ++r) {
    const char* row = static_cast<const char*>(m.data) + r * m.row_stride * size;
    for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) {
      __builtin_prefetch(row + i * 64, 0, 2);
      asm volatile("");  // GCC drops the calls of a function that does nothing but prefetch
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

LANE V broadcast(const uint32_t* word) {
  float value;
  std::memcpy(&value, word, 4);
  return set1(value);
}

// Computes z[r * kGroup + token] = hidden . weight row r for kRows rows and Count vectors of tokens.
template <int Count>
LANE void product(float* z, const uint32_t* hidden, const uint32_t* weight, int64_t count) {
  V acc[kRows][Count];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < Count; ++j) acc[r][j] = set1(0.0f);
  }
  // Accumulate: one step of k multiplies Count vectors of tokens by kRows broadcast weights.
  for (int64_t k = 0; k < count; ++k) {
    V h[Count];
#pragma GCC unroll 8
    for (int j = 0; j < Count; ++j) h[j] = load(reinterpret_cast<const float*>(hidden) + (k * Count + j) * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V w = broadcast(weight + k * kRows + r);
#pragma GCC unroll 8
      for (int j = 0; j < Count; ++j) acc[r][j] = dot(acc[r][j], h[j], w);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < Count; ++j) store(z + r * kGroup + j * kWidth, acc[r][j]);
  }
}

LANE void product(int vectors, float* z, const uint32_t* hidden, const uint32_t* weight, int64_t count) {
  if (vectors == 3) return product<3>(z, hidden, weight, count);
  if (vectors == 2) return product<2>(z, hidden, weight, count);
  product<1>(z, hidden, weight, count);
}

// ---- elementwise -----------------------------------------------------------------------------------------------------

// Applies bias and softcap to the tile of columns first .. first + n, in place.
LANE void bias_and_softcap(float* z, int vectors, int n, const Head& head, int64_t first) {
  if (!head.bias && head.softcap == 0) return;
  for (int r = 0; r < n; ++r) {
    for (int j = 0; j < vectors; ++j) {
      float* at = z + r * kGroup + j * kWidth;
      V value = load(at);
      if (head.bias) value = add(value, set1(head.bias[first + r]));
      if (head.softcap != 0) value = softcapped(value, head.softcap);
      store(at, value);
    }
  }
}

// Stores float32 numbers rounded to the nearest of `type`.
LANE void store_as(Type type, void* to, int64_t at, const float* from, int64_t count) {
  if (type == Type::float32) {
    std::memcpy(static_cast<float*>(to) + at, from, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to) + at;
  if (type == Type::bfloat16) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
    }
    return;
  }
  Half* halves = reinterpret_cast<Half*>(out);
  int64_t i = 0;
#if CALM_FAST_X86
  if constexpr (kWidth >= 8) {
    for (; i + 8 <= count; i += 8) store8(halves + i, _mm256_loadu_ps(from + i));
  }
#endif
  for (; i < count; ++i) halves[i] = from_float<Half>(from[i]);
}
