// Rows of the logits of linear_nce's three streams that products have stored already, in one lane. Included after
// rows_lane.h, under the same rules. One task is one row, so a token's bits depend on its logits alone.

// Returns the sum of a vector.
LANE double lanes_of(V values) {
  alignas(64) float lanes[kWidth];
  store(lanes, values);
  double sum = 0;
  for (int j = 0; j < kWidth; ++j) sum += lanes[j];
  return sum;
}

// Makes the sums relative to larger maxima. The weights of a weighted sum are relative to a maximum too and move with it.
LANE void raise(const NceRows& s, NceRowSums& to, float top, float nat_top, float neg_top) {
  if (top > to.max) {
    const double moved = static_cast<double>(to.max) - top;
    to.nat_weighted += moved * to.nat_soft;
    to.total *= std::exp2(moved * kLog2e);
    to.total_soft *= std::exp2(moved * s.scale);
    to.max = top;
  }
  if (nat_top > to.nat_max) {
    const double moved = static_cast<double>(to.nat_max) - nat_top, shrink = std::exp2(moved * s.scale);
    to.neg_weighted -= moved * to.neg;
    to.nat *= std::exp2(moved * kLog2e);
    to.nat_soft *= shrink;
    to.nat_weighted *= shrink;
    to.nat_max = nat_top;
  }
  if (neg_top > to.neg_max) {
    const double moved = static_cast<double>(to.neg_max) - neg_top, shrink = std::exp2(moved * kLog2e);
    to.neg_weighted = (to.neg_weighted + moved * to.neg) * shrink;
    to.neg *= shrink;
    to.neg_max = neg_top;
  }
}

// Returns max(z - top, a number that stands for -infinity).
LANE V below(V z, V top) { return maximum(set1(kNoLogit), sub(z, top)); }

// Computes the sums of a row. Within a piece they are float32, across pieces float64.
LANE void nce_row_sums(void* context, int64_t row) {
  const NceRows& s = *static_cast<const NceRows*>(context);
  alignas(64) float z[kPiece], nat[kPiece], neg[kPiece];
  NceRowSums to{0, 0, 0, 0, 0, 0, 0, -FLT_MAX, -FLT_MAX, -FLT_MAX};
  const V scale = set1(s.scale), plain = set1(kLog2e), zero = set1(0.0f);
  for (int64_t first = 0; first < s.nat.logits.columns; first += kPiece) {
    const int64_t rest = s.nat.logits.columns - first, n = rest < kPiece ? rest : kPiece;
    // Load: a piece of each stream in float32.
    if (s.has_student) widen(s.student, row, first, n, z);
    widen(s.nat, row, first, n, nat);
    if (s.has_neg) widen(s.neg, row, first, n, neg);
    raise(
        s, to, s.has_student ? raised(to.max, z, n) : to.max, raised(to.nat_max, nat, n),
        s.has_neg ? raised(to.neg_max, neg, n) : to.neg_max);
    // Softmax: powers relative to the maxima. Each stream leaves its differences to the maximum for the next one.
    V one = zero, soft = zero, weighted = zero;
    const V top = set1(to.max), nat_top = set1(to.nat_max), neg_top = set1(to.neg_max);
    if (s.has_student) {
      for (int64_t i = 0; i < n; i += kWidth) {
        const V difference = below(load(z + i), top);
        store(z + i, difference);
        one = add(one, exp2_of(mul(difference, plain)));
        if (!s.plain) soft = add(soft, exp2_of(mul(difference, scale)));
      }
      to.total += lanes_of(one);
      to.total_soft += lanes_of(s.plain ? one : soft);
    }
    one = soft = zero;
    for (int64_t i = 0; i < n; i += kWidth) {
      const V difference = below(load(nat + i), nat_top), power = exp2_of(mul(difference, scale));
      store(nat + i, difference);
      soft = add(soft, power);
      if (s.has_student) weighted = fused(power, load(z + i), weighted);
      if (!s.plain) one = add(one, exp2_of(mul(difference, plain)));
    }
    to.nat_soft += lanes_of(soft);
    to.nat += lanes_of(s.plain ? soft : one);
    to.nat_weighted += lanes_of(weighted);
    if (!s.has_neg) continue;
    one = weighted = zero;
    for (int64_t i = 0; i < n; i += kWidth) {
      const V difference = below(load(neg + i), neg_top), power = exp2_of(mul(difference, plain));
      one = add(one, power);
      weighted = fused(power, sub(difference, load(nat + i)), weighted);
    }
    to.neg += lanes_of(one);
    to.neg_weighted += lanes_of(weighted);
  }
  s.sums[row] = to;
}

// Writes the logit gradients of a row: `nce_dlogits` for neighbouring columns.
LANE void nce_row_gradient(void* context, int64_t row) {
  const NceRows& s = *static_cast<const NceRows*>(context);
  const NceDlogits& by = s.dlogits;
  alignas(64) float z[kPiece], nat[kPiece];
  const V top = set1(by.top[row]), top_nat = set1(by.top_nat[row]), scale = set1(s.scale), plain = set1(kLog2e);
  const V soft = set1(by.soft[row]), plain_hard = set1(by.plain_hard[row]), teacher = set1(by.teacher[row]);
  for (int64_t first = 0; first < s.nat.logits.columns; first += kPiece) {
    const int64_t rest = s.nat.logits.columns - first, n = rest < kPiece ? rest : kPiece;
    widen(s.student, row, first, n, z);
    widen(s.nat, row, first, n, nat);
    const int64_t target = s.target[row] - first;
    for (int64_t i = 0; i < n; i += kWidth) {
      const V value = load(z + i), difference = sub(value, top);
      V dz = mul(exp2_of(mul(difference, scale)), soft);
      if (!s.plain) dz = fused(exp2_of(mul(difference, plain)), plain_hard, dz);
      dz = sub(dz, mul(exp2_of(mul(sub(load(nat + i), top_nat), scale)), teacher));
      if (target >= i && target < i + kWidth) {
        float hard[kWidth] = {};
        hard[target - i] = by.hard[row];
        dz = sub(dz, load(hard));
      }
      store(z + i, softcap_backward(dz, value, by.softcap));
    }
    store_as(s.nat.logits.type, s.gradient, row * s.stride + first, z, n);
  }
}
