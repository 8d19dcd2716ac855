// The gradient of the hidden states from kept logits, in one lane. Included after sweep_lane.h, under the same rules,
// and last, because it ends with the table of the lane's functions.
//
// gradient = dz W uses the product of products_lane.h with other operands: dz, packed with tokens innermost, in place
// of the hidden states, and columns of W in place of its rows. The gradient is accumulated in float32.

constexpr int kStrip = 4 * kRows;  // columns of W packed at once: with kRows = 8 and 16 bits, 64 bytes of a row

// Returns the kept logits of one column for a vector of tokens in the group that starts at `group`.
LANE V kept_logits(const KeptLogits& from, int64_t column, int64_t group, int64_t token) {
  const int64_t at = from.place(column, group, kGroup) + token - group;
  if (from.type == Type::float32) return load(static_cast<const float*>(from.data) + at);
  // The lower bound replaces -infinity, for which the derivative of the softcap is NaN; its exponential is 0 as well.
  const V relative = maximum(set1(-65504.0f), load_half(static_cast<const uint16_t*>(from.data) + at));
  return add(relative, load(from.reference + token));
}

// Returns the panel of the logit gradients of column block `block` and the group of tokens that starts at `at`.
LANE uint32_t* panel_of(const NceHiddenGradient& s, int64_t block, int64_t at) {
  return s.panels + words(kDepth) * (block * s.width + at);
}

// Computes and packs the logit gradients of one group of tokens and kDepth columns.
LANE void pack_dlogits(void* context, int64_t task) {
  const NceHiddenGradient& s = *static_cast<const NceHiddenGradient*>(context);
  const int64_t groups = (s.tokens + kGroup - 1) / kGroup, block = task / groups, at = task % groups * kGroup;
  const int64_t begin = s.first + block * kDepth, end = begin + kDepth < s.last ? begin + kDepth : s.last;
  const int64_t width = s.width - at < kGroup ? s.width - at : kGroup;
  uint32_t* to = panel_of(s, block, at);
  for (int64_t column = begin; column < end; column += kPairs ? 2 : 1) {
    for (int64_t j = 0; j < width; j += kWidth, to += kWidth) {
      const int64_t token = at + j;
      V dz[2] = {set1(0.0f), set1(0.0f)};
      for (int i = 0; i < (kPairs ? 2 : 1) && column + i < end; ++i) {
        const V z = kept_logits(s.kept[0], column + i, at, token);
        const V nat = kept_logits(s.kept[1], column + i, at, token);
        dz[i] = nce_dlogits(s.dlogits, token, set1(static_cast<float>(column + i)), z, nat);
      }
      store(reinterpret_cast<float*>(to), kPairs ? paired(dz[0], dz[1]) : dz[0]);
    }
  }
}

// Copies `count` <= kStrip columns of one weight row from `first` on as 32-bit words. A 16-bit entry fills the low half
// of its word where products take pairs.
LANE void row_part(const Matrix& m, int64_t row, int64_t first, int64_t count, uint32_t* to) {
  const int64_t step = m.column_stride, start = row * m.row_stride + first * step;
  for (int64_t i = count; i < kStrip; ++i) to[i] = 0;
  if (m.type == Type::float32) {
    const float* from = static_cast<const float*>(m.data) + start;
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i, from + i * step, 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(m.data) + start;
  if (m.type == Type::bfloat16) {
    const int shift = kPairs ? 0 : 16;
    if (step == 1 && count == kStrip) {
#pragma GCC unroll 1
      for (int i = 0; i < kStrip; ++i) to[i] = static_cast<uint32_t>(from[i]) << shift;
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint32_t>(from[i * step]) << shift;
    }
    return;
  }
  float value[kStrip] = {};
  uint16_t bits[kStrip] = {};
  for (int64_t i = 0; i < count; ++i) bits[i] = from[i * step];
  for (int i = 0; i < kStrip; i += kWidth < kStrip ? kWidth : kStrip) store(value + i, load_half(bits + i));
  std::memcpy(to, value, sizeof value);
}

// Packs a strip of weight rows begin .. end as four panels, each kRows columns wide.
LANE void pack_columns(uint32_t* to, const Matrix& m, int64_t begin, int64_t end, int64_t first) {
  const int64_t count = m.columns - first < kStrip ? m.columns - first : kStrip, size = words(kDepth) * kRows;
  alignas(64) uint32_t low[kStrip], high[kStrip];
  for (int64_t row = begin; row < end; row += kPairs ? 2 : 1, to += kRows) {
    row_part(m, row, first, count, low);
    if (kPairs) {
      if (row + 1 < end) {
        row_part(m, row + 1, first, count, high);
      } else {
        std::memset(high, 0, sizeof high);
      }
      for (int i = 0; i < kStrip; ++i) low[i] |= high[i] << 16;
    }
    for (int p = 0; p < 4; ++p) std::memcpy(to + p * size, low + p * kRows, kRows * 4);
  }
}

// Prefetches part `part` of `parts` of the strip that is packed next into the L2 cache.
LANE void prefetch_strip(const Matrix& m, int64_t begin, int64_t end, int64_t first, int64_t part, int64_t parts) {
  if (m.column_stride != 1 || first >= m.columns) return;
  const int64_t size = m.type == Type::float32 ? 4 : 2, rows = end - begin;
  for (int64_t r = begin + rows * part / parts; r < begin + rows * (part + 1) / parts; ++r) {
    const char* line = static_cast<const char*>(m.data) + (r * m.row_stride + first) * size;
    for (int64_t i = 0; i < kStrip * size; i += 64) __builtin_prefetch(line + i, 0, 2);
    asm volatile("");  // as in prefetch
  }
}

// Adds dz W to every s.tasks-th strip of the hidden states' gradient, for all tokens. One task adds up each element, in
// the order of the vocabulary.
LANE void hidden_gradient(void* context, int64_t task) {
  const NceHiddenGradient& s = *static_cast<const NceHiddenGradient*>(context);
  const Matrix& weight = *s.weight;
  uint32_t* packed = s.scratch + task * s.scratch_words;
  float* tile = reinterpret_cast<float*>(packed + words(kDepth) * kStrip);
  const int64_t groups = (s.tokens + kGroup - 1) / kGroup, calls = 4 * groups;
  for (int64_t strip = task * kStrip; strip < weight.columns; strip += s.tasks * kStrip) {
    for (int64_t begin = s.first, block = 0; begin < s.last; begin += kDepth, ++block) {
      const int64_t end = begin + kDepth < s.last ? begin + kDepth : s.last;
      const bool more = end < s.last;
      const int64_t next = more ? end : s.first, after = next + kDepth < s.last ? next + kDepth : s.last;
      // Load: the strip's weights, packed once for all tokens.
      pack_columns(packed, weight, begin, end, strip);
      for (int64_t p = 0; p < 4 && strip + p * kRows < weight.columns; ++p) {
        const int64_t column = strip + p * kRows;
        const int64_t rows = weight.columns - column < kRows ? weight.columns - column : kRows;
        for (int64_t group = 0; group < groups; ++group) {
          prefetch_strip(weight, next, after, more ? strip : strip + s.tasks * kStrip, p * groups + group, calls);
          const int64_t at = group * kGroup, width = s.width - at < kGroup ? s.width - at : kGroup;
          // Accumulate: a tile of dz W, then its sum into the gradient.
          product(
              static_cast<int>(width / kWidth), tile, panel_of(s, block, at), packed + p * kRows * words(kDepth),
              words(end - begin));
          for (int64_t r = 0; r < rows; ++r) {
            float* to = s.sums + (column + r) * s.width + at;
            for (int64_t j = 0; j < width; j += kWidth) store(to + j, add(load(to + j), load(tile + r * kGroup + j)));
          }
        }
      }
    }
  }
}

constexpr LaneFunctions kFunctions{
    kRows, kGroup, kWidth, kStrip, kPairs, pack_tokens, target_logits, sweep_split<LogprobSweep>, sweep_split<NceSweep>,
    sweep_split<LogprobDlogits>, sweep_split<NceDlogits>, row_sums, row_gradient, nce_row_sums,
    nce_row_gradient, pack_dlogits, hidden_gradient,
};
