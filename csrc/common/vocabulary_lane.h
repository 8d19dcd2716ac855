// The sweeps of one lane. Included once per lane by vocabulary_cpu.cpp, inside that lane's namespace (common/vectors.h)
// with LANE the attribute of its functions and kRows the weight rows of a tile; no include guard on purpose.
//
// A vector's elements are tokens: the hidden states of a group of kGroup tokens are packed with tokens innermost, a
// weight row's entries are broadcast, and every running sum is a vector of tokens, without sums across a vector. A token's
// bits therefore depend neither on the other tokens nor on the number of threads.

constexpr int kVectors = 3;
constexpr int kGroup = kVectors * kWidth;

// ---- packing ---------------------------------------------------------------------------------------------------------

LANE int64_t words(int64_t d) { return kPairs ? (d + 1) / 2 : d; }

// The row as 32-bit operands of dot; `spare` holds them where they are not in memory as they are.
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

// to[k * width + r] = word k of row r, for 4 rows
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

// Rows first .. of `m`, or those that `index` names, interleaved into a panel `width` wide; what is missing is 0.
// spare: 4 rows of words.
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

// Part `part` of `parts` of rows first .. first + rows on its way into the L2 cache: what the next panel is packed from.
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

// z[r * kGroup + token] = hidden . weight row r: kRows rows by `Count` vectors of tokens
template <int Count>
LANE void product(float* z, const uint32_t* hidden, const uint32_t* weight, int64_t count) {
  V acc[kRows][Count];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < Count; ++j) acc[r][j] = set1(0.0f);
  }
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

LANE V capped(V z, float softcap) {
  V y = over(z, set1(softcap));
  y = minimum(set1(10.0f), maximum(set1(-10.0f), y));  // tanh is 1 there
  const V power = exp2_of(mul(y, set1(2 * kLog2e)));
  return mul(set1(softcap), sub(set1(1.0f), over(set1(2.0f), add(power, set1(1.0f)))));
}

// bias and softcap of the tile of columns first .. first + n, in place
LANE void finish(float* z, int vectors, int n, const Head& head, int64_t first) {
  if (!head.bias && head.softcap == 0) return;
  for (int r = 0; r < n; ++r) {
    for (int j = 0; j < vectors; ++j) {
      float* at = z + r * kGroup + j * kWidth;
      V value = load(at);
      if (head.bias) value = add(value, set1(head.bias[first + r]));
      if (head.softcap != 0) value = capped(value, head.softcap);
      store(at, value);
    }
  }
}

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

// ---- running sums ----------------------------------------------------------------------------------------------------

// per token of a group: sum exp2(scale z - max), and the same sum weighted
enum class Weigh { nothing, exponent, values };

template <Weigh kWeigh, bool kWhole>
LANE void account(const Running& to, int64_t at, int vectors, int n, const float* z, const float* values, float scale) {
  const int rows = kWhole ? kRows : n;
  for (int j = 0; j < vectors; ++j) {
    const float* from = z + j * kWidth;
    const int64_t token = at + j * kWidth;
    V top = load(from);
    for (int r = 1; r < rows; ++r) top = maximum(top, load(from + r * kGroup));
    V max = load(to.max + token), total = load(to.total + token);
    V weighted = kWeigh == Weigh::nothing ? set1(0.0f) : load(to.weighted + token);
    const M larger = greater(top, max);
    if (any(larger)) {  // a new maximum is rare after the first tiles
      top = pick(larger, top, max);
      const V shift = maximum(set1(-126.0f), mul(sub(max, top), set1(scale)));
      const V shrink = exp2_of(shift);
      if (kWeigh == Weigh::exponent) weighted = fused(shift, total, weighted);
      weighted = mul(weighted, shrink);
      total = mul(total, shrink);
      max = top;
      store(to.max + token, max);
    }
    V even = set1(0.0f), odd = set1(0.0f);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V x = mul(sub(load(from + r * kGroup), max), set1(scale));
      const V power = exp2_of(x);
      if (r % 2) {
        odd = add(odd, power);
      } else {
        even = add(even, power);
      }
      if (kWeigh == Weigh::exponent) weighted = fused(power, maximum(set1(-126.0f), x), weighted);
      if (kWeigh == Weigh::values) weighted = fused(power, load(values + j * kWidth + r * kGroup), weighted);
    }
    store(to.total + token, add(total, add(even, odd)));
    if (kWeigh != Weigh::nothing) store(to.weighted + token, weighted);
  }
}

template <Weigh kWeigh>
LANE void account(const Running& to, int64_t at, int vectors, int n, const float* z, const float* values, float scale) {
  if (n == kRows) return account<kWeigh, true>(to, at, vectors, n, z, values, scale);
  account<kWeigh, false>(to, at, vectors, n, z, values, scale);
}

// ---- what happens to a tile ------------------------------------------------------------------------------------------

// One group's tile: `z` one tile per stream of n rows, tokens at .. of the block, columns first .. of the vocabulary.
struct Place {
  int64_t split, at, tokens, first;  // tokens: how many of the group's are real
  int vectors, n;
};

LANE void visit(const LogprobSweep& s, const Place& p, float* z) {
  const LogprobSums& to = s.sums[p.split];
  if (s.want_rank) {
    for (int j = 0; j < p.vectors; ++j) {
      const V target = load(s.at_target + p.at + j * kWidth);
      V count = load(to.larger + p.at + j * kWidth);
      for (int r = 0; r < p.n; ++r) {  // the target's own logit has the same bits: it never counts
        count = add(count, pick(greater(load(z + r * kGroup + j * kWidth), target), set1(1.0f), set1(0.0f)));
      }
      store(to.larger + p.at + j * kWidth, count);
    }
  }
  if (s.want_entropy) return account<Weigh::exponent>(to.running, p.at, p.vectors, p.n, z, nullptr, s.scale);
  account<Weigh::nothing>(to.running, p.at, p.vectors, p.n, z, nullptr, s.scale);
}

LANE void visit(const NceSweep& s, const Place& p, float* z) {
  const NceSums& to = s.sums[p.split];
  float *nat = z + kRows * kGroup, *neg = z + 2 * kRows * kGroup;
  account<Weigh::nothing>(to.student, p.at, p.vectors, p.n, z, nullptr, kLog2e);
  if (!s.plain) {
    account<Weigh::nothing>(to.soft_student, p.at, p.vectors, p.n, z, nullptr, s.scale);
    account<Weigh::nothing>(to.nat, p.at, p.vectors, p.n, nat, nullptr, kLog2e);
  }
  account<Weigh::values>(to.soft_nat, p.at, p.vectors, p.n, nat, z, s.scale);
  for (int r = 0; r < p.n; ++r) {  // averaged as a difference, not as two large means
    for (int j = 0; j < p.vectors; ++j) {
      const int i = r * kGroup + j * kWidth;
      store(nat + i, sub(load(neg + i), load(nat + i)));
    }
  }
  account<Weigh::values>(to.neg, p.at, p.vectors, p.n, neg, nat, kLog2e);
}

// the gradient before the softcap, into the tile and from there to memory
LANE void write(const Tile& out, Type type, const Place& p, int64_t token, int r, const float* from) {
  store_as(type, out.data, (p.first + r - out.first) * out.stride + token, from, p.tokens);
}

LANE V slope(V dz, V z, float softcap) {
  if (softcap == 0) return dz;
  const V y = over(z, set1(softcap));
  return mul(dz, sub(set1(1.0f), mul(y, y)));
}

LANE void visit(const LogprobSlope& s, const Place& p, float* z) {
  for (int r = 0; r < p.n; ++r) {
    const V column = set1(static_cast<float>(p.first + r - s.out.first));
    float* row = z + r * kGroup;
    for (int j = 0; j < p.vectors; ++j) {
      const int64_t token = p.at + j * kWidth;
      const V value = load(row + j * kWidth);
      const V x = fused(value, set1(s.scale), load(s.minus_lse + token));
      V factor = load(s.constant + token);
      // a bias of -infinity gives x = -infinity and power 0; their product must be 0
      if (s.linear) factor = fused(load(s.linear + token), maximum(set1(-126.0f), x), factor);
      V dz = mul(exp2_of(x), factor);
      const M here = same(load(s.target + token), column);
      if (any(here)) dz = add(dz, pick(here, load(s.up + token), set1(0.0f)));
      store(row + j * kWidth, slope(dz, value, s.softcap));
    }
    write(s.out, s.type, p, s.first_token + p.at, r, row);
  }
}

LANE void visit(const NceSlope& s, const Place& p, float* z) {
  const float* nat = z + kRows * kGroup;
  for (int r = 0; r < p.n; ++r) {
    const V column = set1(static_cast<float>(p.first + r - s.out.first));
    float* row = z + r * kGroup;
    for (int j = 0; j < p.vectors; ++j) {
      const int64_t token = p.at + j * kWidth;
      const V value = load(row + j * kWidth), hard = load(s.hard + token), soft = load(s.soft + token);
      const V power = exp2_of(fused(value, set1(s.scale), load(s.minus_lse_soft + token)));
      V dz;
      if (s.plain) {
        dz = mul(power, add(hard, soft));
      } else {
        dz = fused(exp2_of(fused(value, set1(kLog2e), load(s.minus_lse + token))), hard, mul(power, soft));
      }
      const V teacher = fused(load(nat + r * kGroup + j * kWidth), set1(s.scale), load(s.minus_lse_nat + token));
      dz = sub(dz, mul(exp2_of(teacher), soft));
      const M here = same(load(s.target + token), column);
      if (any(here)) dz = sub(dz, pick(here, hard, set1(0.0f)));
      store(row + j * kWidth, slope(dz, value, s.softcap));
    }
    write(s.out, s.type, p, s.first_token + p.at, r, row);
  }
}

// ---- the walk --------------------------------------------------------------------------------------------------------

// One split of the vocabulary against one block of tokens.
template <class Visitor>
LANE void walk_split(void* context, int64_t split) {
  const Walk& walk = *static_cast<const Walk*>(context);
  const Visitor& visitor = *static_cast<const Visitor*>(walk.visitor);
  const int64_t count = words(walk.head->weight.columns), streams = walk.streams;
  uint32_t* panel = walk.scratch + split * walk.scratch_words;
  uint32_t* spare = panel + kRows * count;
  float* z = reinterpret_cast<float*>(spare + 4 * count + walk.padding);
  const int64_t start = walk.first + split * kSplit;
  const int64_t stop = start + kSplit < walk.last ? start + kSplit : walk.last;
  const Matrix& weight = walk.head->weight;
  for (int64_t first = start; first < stop; first += kRows) {
    Place place{split, 0, 0, first, 0, static_cast<int>(stop - first < kRows ? stop - first : kRows)};
    pack(panel, kRows, weight, first, place.n, nullptr, spare);
    const int64_t rest = stop - first - kRows, groups = (walk.tokens + kGroup - 1) / kGroup;
    for (; place.at < walk.tokens; place.at += kGroup) {
      prefetch(weight, first + kRows, rest < kRows ? rest : kRows, place.at / kGroup, groups);
      place.tokens = walk.tokens - place.at < kGroup ? walk.tokens - place.at : kGroup;
      place.vectors = static_cast<int>((place.tokens + kWidth - 1) / kWidth);
      for (int64_t i = 0; i < streams; ++i) {
        float* tile = z + i * kRows * kGroup;
        product(place.vectors, tile, walk.panels + (i * walk.padded + place.at) * count, panel, count);
        finish(tile, place.vectors, place.n, *walk.head, first);
      }
      visit(visitor, place, z);
    }
  }
}

// The tokens of a block packed group by group: task i of as many as there are splits, with the scratch of split i.
LANE void pack_tokens(void* context, int64_t task) {
  const Walk& walk = *static_cast<const Walk*>(context);
  const int64_t count = words(walk.head->weight.columns);
  uint32_t* spare = walk.scratch + task * walk.scratch_words;
  for (int64_t at = task * kGroup; at < walk.tokens; at += walk.splits * kGroup) {
    const int64_t tokens = walk.tokens - at < kGroup ? walk.tokens - at : kGroup;
    const int64_t width = (tokens + kWidth - 1) / kWidth * kWidth;
    for (int64_t i = 0; i < walk.streams; ++i) {
      uint32_t* to = walk.panels + (i * walk.padded + at) * count;
      pack(to, width, *walk.hidden[i], walk.first_token + at, tokens, nullptr, spare);
    }
  }
}

// The logit of each token's target, by the very operations of a tile.
LANE void target_logits(const Walk& walk, const int64_t* targets, float* out) {
  const Matrix& weight = walk.head->weight;
  const int64_t count = words(weight.columns);
  for (int64_t at = 0; at < walk.tokens; at += kWidth) {
    const int64_t tokens = walk.tokens - at < kWidth ? walk.tokens - at : kWidth;
    const int64_t group = at / kGroup * kGroup, inside = walk.tokens - group < kGroup ? walk.tokens - group : kGroup;
    const int64_t width = (inside + kWidth - 1) / kWidth * kWidth;
    const uint32_t* hidden = walk.panels + group * count + (at - group);
    uint32_t* panel = walk.scratch + 4 * count;
    pack(panel, kWidth, weight, 0, tokens, targets + at, walk.scratch);
    V z = set1(0.0f);
    for (int64_t k = 0; k < count; ++k) {
      const V h = load(reinterpret_cast<const float*>(hidden + k * width));
      z = dot(z, h, load(reinterpret_cast<const float*>(panel + k * kWidth)));
    }
    if (walk.head->bias) {
      float bias[kWidth] = {};
      for (int64_t i = 0; i < tokens; ++i) bias[i] = walk.head->bias[targets[at + i]];
      z = add(z, load(bias));
    }
    if (walk.head->softcap != 0) z = capped(z, walk.head->softcap);
    store(out + at, z);
  }
}

constexpr LaneFunctions kFunctions{
    kRows, kGroup, kWidth, kPairs, pack_tokens, target_logits, walk_split<LogprobSweep>, walk_split<NceSweep>,
    walk_split<LogprobSlope>, walk_split<NceSlope>,
};
