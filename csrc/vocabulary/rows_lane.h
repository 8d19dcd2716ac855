// Rows of logits that a product has stored already, in one lane: few tokens, or a small vocabulary. Included after
// sweep_lane.h, under the same rules.
//
// A vector holds neighbouring columns here, not tokens. One task is one row, so a token's bits depend on its logits
// alone.

constexpr int64_t kPiece = 2048;  // columns that are widened at once: 8 KiB, which stay in the L1 cache

// Widens columns first .. first + n of a row to float32, adds the bias and applies the softcap. Up to the next whole
// vector the rest is -infinity, which no sum and no count sees.
LANE void widen(const LogitRows& s, int64_t row, int64_t first, int64_t n, float* to) {
  const int64_t at = row * s.logits.row_stride + first;
  if (s.logits.type == Type::float32) {
    std::memcpy(to, static_cast<const float*>(s.logits.data) + at, static_cast<size_t>(n) * 4);
  } else if (s.logits.type == Type::bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(s.logits.data) + at;
    uint32_t* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(s.logits.data) + at;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, load_half(from + i));
    uint16_t bits[kWidth] = {};
    float rest[kWidth];
    for (int64_t j = i; j < n; ++j) bits[j - i] = from[j];
    store(rest, load_half(bits));
    for (int64_t j = i; j < n; ++j) to[j] = rest[j - i];
  }
  for (int64_t i = n; i % kWidth != 0; ++i) to[i] = -kInfinity;
  if (s.head.bias) {
    for (int64_t i = 0; i < n; ++i) to[i] += s.head.bias[first + i];
  }
  if (s.head.softcap != 0) {
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, softcapped(load(to + i), s.head.softcap));
    for (int64_t i = n; i % kWidth != 0; ++i) to[i] = -kInfinity;
  }
}

// Returns one logit with the bits that `widen` gives it.
LANE float one_logit(const LogitRows& s, int64_t row, int64_t column) {
  float z[kWidth];
  widen(s, row, column, 1, z);
  return z[0];
}

// Returns the largest of `max` and a piece of n logits, in two chains. A NaN is passed over; it spoils the sums.
LANE float raised(float max, const float* z, int64_t n) {
  alignas(64) float lanes[kWidth];
  V even = set1(-FLT_MAX), odd = even;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    even = maximum(load(z + i), even);
    odd = maximum(load(z + i + kWidth), odd);
  }
  for (; i < n; i += kWidth) even = maximum(load(z + i), even);
  store(lanes, maximum(even, odd));
  for (int j = 0; j < kWidth; ++j) max = lanes[j] > max ? lanes[j] : max;
  return max;
}

// Computes the largest logit of a row and its sums relative to it. Within a piece the sums are float32, across pieces
// float64.
LANE void row_sums(void* context, int64_t row) {
  const LogitRows& s = *static_cast<const LogitRows*>(context);
  alignas(64) float z[kPiece];
  alignas(64) float lanes[3 * kWidth];
  const V scale = set1(s.scale);
  const float target = s.target[row] < 0 ? kInfinity : one_logit(s, row, s.target[row]);
  double sum = 0, weighted = 0, larger = 0;
  float max = -FLT_MAX;
  for (int64_t first = 0; first < s.logits.columns; first += kPiece) {
    const int64_t n = s.logits.columns - first < kPiece ? s.logits.columns - first : kPiece;
    widen(s, row, first, n, z);
    const float top = raised(max, z, n);
    int64_t i = 0;
    if (top > max) {
      // The sums so far are relative to the old maximum.
      const double shift = (static_cast<double>(max) - top) * s.scale, shrink = sum == 0 ? 0 : std::exp2(shift);
      weighted = sum == 0 ? 0 : (weighted + shift * sum) * shrink;
      sum *= shrink;
      max = top;
    }
    // Softmax: powers relative to the maximum, summed in two chains.
    const V reference = set1(max);
    V total = set1(0.0f), other = total, mean = total, count = total;
    if (!s.want_entropy && !s.want_rank) {
      for (i = 0; i + 2 * kWidth <= n; i += 2 * kWidth) {
        total = add(total, exp2_of(mul(sub(load(z + i), reference), scale)));
        other = add(other, exp2_of(mul(sub(load(z + i + kWidth), reference), scale)));
      }
      for (; i < n; i += kWidth) total = add(total, exp2_of(mul(sub(load(z + i), reference), scale)));
    } else {
      const V limit = set1(target);
      for (i = 0; i < n; i += kWidth) {
        const V value = load(z + i), x = mul(sub(value, reference), scale), power = exp2_of(x);
        total = add(total, power);
        mean = fused(power, maximum(set1(-126.0f), x), mean);
        count = add(count, pick(greater(value, limit), set1(1.0f), set1(0.0f)));
      }
    }
    store(lanes, add(total, other));
    store(lanes + kWidth, mean);
    store(lanes + 2 * kWidth, count);
    for (int j = 0; j < kWidth; ++j) sum += lanes[j], weighted += lanes[kWidth + j], larger += lanes[2 * kWidth + j];
  }
  s.sums[row] = RowSums{sum, weighted, larger, max, target};
}

// Writes the logit gradients of a row: dz = 2^x (constant + linear x), x = scale (z - top), plus `up` at the target.
LANE void row_gradient(void* context, int64_t row) {
  const LogitRows& s = *static_cast<const LogitRows*>(context);
  alignas(64) float z[kPiece];
  const V top = set1(s.top[row]), scale = set1(s.scale), constant = set1(s.constant[row]);
  const V linear = set1(s.linear ? s.linear[row] : 0.0f);
  for (int64_t first = 0; first < s.logits.columns; first += kPiece) {
    const int64_t n = s.logits.columns - first < kPiece ? s.logits.columns - first : kPiece;
    widen(s, row, first, n, z);
    const int64_t target = s.target[row] - first;
    for (int64_t i = 0; i < n; i += kWidth) {
      const V value = load(z + i), x = mul(sub(value, top), scale);
      // A bias of -infinity gives x = -infinity and a power of 0; their product must be 0, not NaN.
      const V factor = s.linear ? fused(linear, maximum(set1(-126.0f), x), constant) : constant;
      V dz = mul(exp2_of(x), factor);
      if (target >= i && target < i + kWidth) {
        float up[kWidth] = {};
        up[target - i] = s.up[row];
        dz = add(dz, load(up));
      }
      store(z + i, softcap_backward(dz, value, s.head.softcap));
    }
    store_as(s.logits.type, s.gradient, row * s.logits.columns + first, z, n);
  }
}
