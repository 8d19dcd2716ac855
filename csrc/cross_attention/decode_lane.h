// The decode loop of one lane. Included once per lane by decode_cpu.cpp, inside that lane's namespace
// (common/vectors.h). LANE is the attribute of the lane's functions. No include guard on purpose.
//
// A unit of work is one KV head of one sequence and one split of its keys, with all query rows that read that head
// (M queries x H / Hkv heads), so that each key and value is read from memory once for all of them.

// Copies rows of keys or values to `spare` as float32, padded with zeros to `width`. Returns `spare`.
template <class T>
LANE const float* staged(float* spare, const T* from, int64_t stride, int64_t keys, int64_t d, int64_t width) {
  for (int64_t j = 0; j < keys; ++j) {
    const T* row = from + j * stride;
    float* to = spare + j * width;
    int64_t i = 0;
    if constexpr (std::is_same_v<T, float>) {
      std::memcpy(to, row, static_cast<size_t>(d) * sizeof(float));
      i = d;
    }
#if CALM_FAST_X86
    if constexpr (kWidth == 16) {
      for (; i + 16 <= d; i += 16) _mm512_storeu_ps(to + i, load16(row + i));
    } else if constexpr (kWidth == 8) {
      for (; i + 8 <= d; i += 8) _mm256_storeu_ps(to + i, load8(row + i));
    }
#endif
    for (; i < d; ++i) to[i] = to_float(row[i]);
    for (; i < width; ++i) to[i] = 0.0f;
  }
  return spare;
}

// Loads a vector of float32 from memory of any dtype.
template <class T>
LANE V widened(const T* from) {
  if constexpr (std::is_same_v<T, float>) return load(from);
#if CALM_FAST_X86
  else if constexpr (kWidth == 16) return load16(from);
  else if constexpr (kWidth == 8) return load8(from);
#endif
  else {
    float each[kWidth];
    for (int i = 0; i < kWidth; ++i) each[i] = to_float(from[i]);
    return load(each);
  }
}

// Rows that are read next, prefetched where kAhead is set: the hardware does not predict the jump from keys to values
// and back.
struct Ahead {
  const char* at;
  int64_t stride, bytes, rows;
};

LANE void prefetch(const Ahead& ahead, int64_t row) {
  if (row >= ahead.rows) return;
  for (int64_t i = 0; i < ahead.bytes; i += 64) __builtin_prefetch(ahead.at + row * ahead.stride + i);
  asm volatile("");  // GCC drops the calls of a function that does nothing but prefetch
}

// Computes scores[r * kBlock + j] = q_r . k_j, kRows rows by 4 keys in registers. The order of each sum does not depend
// on the tile.
template <int kRows, bool kAhead, class T>
LANE void score(
    float* scores, const float* q, const T* k, int64_t stride, int64_t keys, int64_t width, const Ahead& ahead) {
  for (int64_t j = 0; j < keys; j += 4) {
    const T* key[4];
    for (int64_t i = 0; i < 4; ++i) {
      key[i] = k + (j + i < keys ? j + i : keys - 1) * stride;  // scores of surplus keys are overwritten later
      if (kAhead) prefetch(ahead, j + i);
    }
    V acc[kRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = set1(0.0f);
    }
    for (int64_t c = 0; c < width; c += kWidth) {
      V x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = widened(key[i] + c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V y = load(q + r * width + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = fused(y, x[i], acc[r][i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum4(scores + r * kBlock + j, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
  }
}

// Accumulates acc[r][i] = acc[r][i] * shrink[r] + sum_j weights[r][j] values[j][i], kRows rows by kCount vectors of i
// in registers.
template <int kRows, int kCount, bool kAhead, class T>
LANE void weigh_tile(
    float* acc, const float* shrink, const float* weights, const T* values, int64_t stride, int64_t keys,
    int64_t width, const Ahead& ahead) {
  V sums[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) sums[r][c] = mul(load(acc + r * width + c * kWidth), set1(shrink[r]));
  }
  for (int64_t j = 0; j < keys; ++j) {
    if (kAhead) prefetch(ahead, j);
    V x[kCount];
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) x[c] = widened(values + j * stride + c * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V w = set1(weights[r * kBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) sums[r][c] = fused(w, x[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) store(acc + r * width + c * kWidth, sums[r][c]);
  }
}

template <int kRows, bool kAhead, class T>
LANE void weigh(
    float* acc, const float* shrink, const float* weights, const T* values, int64_t stride, int64_t keys,
    int64_t width, const Ahead& ahead) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= width; i += 4 * kWidth) {
    const auto tile = kAhead && i == 0 ? weigh_tile<kRows, 4, kAhead, T> : weigh_tile<kRows, 4, false, T>;
    tile(acc + i, shrink, weights, values + i, stride, keys, width, ahead);
  }
  for (; i < width; i += kWidth) {
    weigh_tile<kRows, 1, false>(acc + i, shrink, weights, values + i, stride, keys, width, ahead);
  }
}

// Online softmax of one row and block: scores [begin, end) become weights relative to the row's running maximum, the
// other scores become 0. Returns the factor by which the sums so far shrink.
LANE float online_softmax(float* scores, int64_t begin, int64_t end, float scale_log2, float& max, float& total) {
  for (int64_t j = 0; j < begin; ++j) scores[j] = -kInfinity;
  for (int64_t j = end; j < kBlock; ++j) scores[j] = -kInfinity;
  V top = set1(max);
  for (int j = 0; j < kBlock; j += kWidth) top = maximum(top, load(scores + j));
  float each[kWidth], largest = max;
  store(each, top);
  for (int i = 0; i < kWidth; ++i) largest = each[i] > largest ? each[i] : largest;
  // A row whose scores are all -inf gets weights of 0 here, not exp(-inf + inf), which is NaN.
  const float shift = largest == -kInfinity ? 0.0f : largest;
  const float shrink = max == -kInfinity ? 0.0f : std::exp2((max - shift) * scale_log2);
  V sums = set1(0.0f);
  for (int j = 0; j < kBlock; j += kWidth) {
    const V score = load(scores + j);
    V weight = exp2_of(mul(sub(score, set1(shift)), set1(scale_log2)));
    weight = pick(same(score, set1(-kInfinity)), set1(0.0f), weight);  // exp2_of does not go below 2^-126
    store(scores + j, weight);
    sums = add(sums, weight);
  }
  float parts[4];
  sum4(parts, sums, set1(0.0f), set1(0.0f), set1(0.0f));
  total = total * shrink + parts[0];
  max = largest;
  return shrink;
}

// Computes the scores of all rows of a unit for one block of keys.
template <class T>
LANE void all_scores(const Unit& u, const T* k, int64_t stride, int64_t keys, const Ahead& ahead) {
  int64_t r = 0;
  for (; r + 4 <= u.rows; r += 4) {
    const auto four = r == 0 ? score<4, true, T> : score<4, false, T>;
    four(u.scores + r * kBlock, u.q + r * u.width, k, stride, keys, u.width, ahead);
  }
  for (; r < u.rows; ++r) {
    const auto one = r == 0 ? score<1, true, T> : score<1, false, T>;
    one(u.scores + r * kBlock, u.q + r * u.width, k, stride, keys, u.width, ahead);
  }
}

// Softmax and accumulation of all rows of a unit for the keys [low, high) of one block, which are those that any row
// sees. v and the scores begin at key `low`.
template <class T>
LANE void all_values(const Unit& u, const T* v, int64_t stride, int64_t low, int64_t high, const Ahead& ahead) {
  bool fetched = false;
  for (int64_t r = 0; r < u.rows;) {
    const int64_t begin = (u.lo[r] > low ? u.lo[r] : low) - low, end = (u.hi[r] < high ? u.hi[r] : high) - low;
    int64_t count = 1;  // rows with this interval, at most 4: the heads of a query share theirs
    while (count < 4 && r + count < u.rows && u.lo[r + count] == u.lo[r] && u.hi[r + count] == u.hi[r]) ++count;
    if (begin < end) {
      count = count < 4 ? 1 : 4;
      float shrink[4];
      for (int64_t i = 0; i < count; ++i) {
        shrink[i] = online_softmax(u.scores + (r + i) * kBlock, begin, end, u.scale_log2, u.max[r + i], u.total[r + i]);
      }
      const auto add = count == 4 ? (fetched ? weigh<4, false, T> : weigh<4, true, T>)
                                  : (fetched ? weigh<1, false, T> : weigh<1, true, T>);
      add(
          u.acc + r * u.width, shrink, u.scores + r * kBlock + begin, v + begin * stride, stride, end - begin, u.width,
          ahead);
      fetched = true;
    }
    r += count;
  }
}

// Attends the rows of a unit to its keys, block by block.
template <class T>
LANE void attend(const Unit& u) {
  const auto* k = static_cast<const T*>(u.k);
  const auto* v = static_cast<const T*>(u.v);
  // 16-bit keys and values are widened once for all rows, or on every read where fewer than 4 rows would share the
  // copy.
  const bool direct = u.d == u.width && (std::is_same_v<T, float> || u.rows < 4);
  const int64_t size = static_cast<int64_t>(sizeof(T)), bytes = u.d * size;
  for (int64_t start = u.first; start < u.last; start += kBlock) {
    const int64_t stop = start + kBlock < u.last ? start + kBlock : u.last;
    int64_t low = stop, high = start;  // bounds of the keys that any row sees
    for (int64_t r = 0; r < u.rows; ++r) {
      const int64_t begin = u.lo[r] > start ? u.lo[r] : start, end = u.hi[r] < stop ? u.hi[r] : stop;
      if (begin >= end) continue;
      low = begin < low ? begin : low;
      high = end > high ? end : high;
    }
    if (low >= high) continue;
    const int64_t keys = high - low, more = u.last - stop < kBlock ? u.last - stop : kBlock;
    const T *block = k + low * u.k_stride, *values = v + low * u.v_stride;
    const Ahead next_values{reinterpret_cast<const char*>(values), u.v_stride * size, bytes, keys};
    const Ahead next_keys{reinterpret_cast<const char*>(k + stop * u.k_stride), u.k_stride * size, bytes, more};
    // Load and scores, then softmax and accumulate.
    if (direct) {
      all_scores(u, block, u.k_stride, keys, next_values);
      all_values(u, values, u.v_stride, low, high, next_keys);
    } else {
      all_scores(u, staged(u.spare, block, u.k_stride, keys, u.d, u.width), u.width, keys, next_values);
      all_values(u, staged(u.spare, values, u.v_stride, keys, u.d, u.width), u.width, low, high, next_keys);
    }
  }
}

constexpr LaneFunctions kFunctions{kWidth, attend<float>, attend<BFloat16>, attend<Half>};
