// The sweeps of one lane: running sums, logit gradients and the walk that hands tiles to them. Included after
// products_lane.h, under the same rules.

// ---- running sums ----------------------------------------------------------------------------------------------------

// per token of a group: sum exp2(scale z - max), and the same sum weighted
enum class Weigh { nothing, exponent, values };

// drift, where given, are further weights, whose sum is `drifted`
template <Weigh kWeigh, bool kWhole, bool kDrift>
LANE void account(
    const Running& to, int64_t at, int vectors, int n, const float* z, const float* values, float scale,
    const float* drift, float* drifted) {
  const int rows = kWhole ? kRows : n;
  for (int j = 0; j < vectors; ++j) {
    const float* from = z + j * kWidth;
    const int64_t token = at + j * kWidth;
    V top = load(from);
    for (int r = 1; r < rows; ++r) top = maximum(top, load(from + r * kGroup));
    V max = load(to.max + token), total = load(to.total + token);
    V weighted = kWeigh == Weigh::nothing ? set1(0.0f) : load(to.weighted + token);
    V moved = kDrift ? load(drifted + token) : set1(0.0f);
    const M larger = greater(top, max);
    if (any(larger)) {  // a new maximum is rare after the first tiles
      top = pick(larger, top, max);
      const V shift = maximum(set1(-126.0f), mul(sub(max, top), set1(scale)));
      const V shrink = exp2_of(shift);
      if (kWeigh == Weigh::exponent) weighted = fused(shift, total, weighted);
      weighted = mul(weighted, shrink);
      if (kDrift) moved = mul(moved, shrink);
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
      if (kDrift) moved = fused(power, load(drift + j * kWidth + r * kGroup), moved);
    }
    store(to.total + token, add(total, add(even, odd)));
    if (kWeigh != Weigh::nothing) store(to.weighted + token, weighted);
    if (kDrift) store(drifted + token, moved);
  }
}

template <Weigh kWeigh, bool kDrift = false>
LANE void account(
    const Running& to, int64_t at, int vectors, int n, const float* z, const float* values, float scale,
    const float* drift = nullptr, float* drifted = nullptr) {
  if (n == kRows) return account<kWeigh, true, kDrift>(to, at, vectors, n, z, values, scale, drift, drifted);
  account<kWeigh, false, kDrift>(to, at, vectors, n, z, values, scale, drift, drifted);
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

// 0 for -infinity: a probability of 0 times it would be NaN.
LANE void finite(const Place& p, float* z) {
  for (int r = 0; r < p.n; ++r) {
    for (int j = 0; j < p.vectors; ++j) {
      const V value = load(z + r * kGroup + j * kWidth);
      store(z + r * kGroup + j * kWidth, pick(same(value, set1(-kInfinity)), set1(0.0f), value));
    }
  }
}

// A group's tile to where it outlives the sweep; `drift` is what rounding to 16 bits adds there, or 0.
LANE void keep(const KeptLogits& to, const Place& p, const float* z, float* drift) {
  const int64_t token = to.first_token + p.at;
  for (int r = 0; r < p.n; ++r) {
    const int64_t at = to.place(p.first + r, token, kGroup);
    for (int j = 0; j < p.vectors; ++j) {
      const int i = r * kGroup + j * kWidth;
      const V value = load(z + i);
      if (to.type == Type::float32) {
        store(static_cast<float*>(to.data) + at + j * kWidth, value);
      } else {
        const V reference = load(to.reference + token + j * kWidth);
        uint16_t* half = static_cast<uint16_t*>(to.data) + at + j * kWidth;
        store_half(half, sub(value, reference));
        const V added = maximum(set1(-1.0f), sub(add(load_half(half), reference), value));
        store(drift + i, pick(same(value, set1(-kInfinity)), set1(0.0f), added));
      }
    }
  }
}

// What a sweep without kept logits, or with exact ones, does; the sums of a sweep whose logits are rounded know by how
// much that moves the log-sum-exp, so that the probabilities add up to 1. Without that a certain token's p - 1, or the
// difference of two certain probabilities, would be nothing but rounding.
template <Weigh kWeigh>
LANE void account(
    const NceSweep& s, const Running& to, float* drifted, const Place& p, const float* z, const float* values,
    float scale, const float* drift) {
  if (s.rounds) return account<kWeigh, true>(to, p.at, p.vectors, p.n, z, values, scale, drift, drifted);
  account<kWeigh>(to, p.at, p.vectors, p.n, z, values, scale);
}

LANE void visit(const NceSweep& s, const Place& p, float* z) {
  const NceSums& to = s.sums[p.split];
  float *nat = z + (s.student ? kRows * kGroup : 0), *neg = nat + kRows * kGroup;
  alignas(64) float drift[2][kRows * kGroup];
  if (s.kept[0].data) {
    keep(s.kept[0], p, z, drift[0]);
    keep(s.kept[1], p, nat, drift[1]);
  }
  if (s.student) account<Weigh::nothing>(s, to.student, to.student_drift, p, z, nullptr, kLog2e, drift[0]);
  if (!s.plain) {
    if (s.student) account<Weigh::nothing>(s, to.soft_student, to.soft_student_drift, p, z, nullptr, s.scale, drift[0]);
    account<Weigh::nothing>(to.nat, p.at, p.vectors, p.n, nat, nullptr, kLog2e);
  }
  if (s.banned) finite(p, z);
  if (s.student) {
    account<Weigh::values>(s, to.soft_nat, to.nat_drift, p, nat, z, s.scale, drift[1]);
  } else {
    account<Weigh::nothing>(to.soft_nat, p.at, p.vectors, p.n, nat, nullptr, s.scale);
  }
  if (!s.neg) return;
  for (int r = 0; r < p.n; ++r) {  // averaged as a difference, not as two large means
    for (int j = 0; j < p.vectors; ++j) {
      const int i = r * kGroup + j * kWidth;
      const V gap = sub(load(neg + i), load(nat + i));
      // both -infinity where a bias of -infinity rules the column out
      store(nat + i, s.banned ? pick(same(load(neg + i), set1(-kInfinity)), set1(0.0f), gap) : gap);
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

// dz of one column and a vector of tokens
LANE V nce_slope(const NceSlope& s, int64_t token, V column, V z, V nat) {
  const V hard = load(s.hard + token), soft = load(s.soft + token);
  const V power = exp2_of(fused(z, set1(s.scale), load(s.minus_lse_soft + token)));
  V dz;
  if (s.plain) {
    dz = mul(power, add(hard, soft));
  } else {
    dz = fused(exp2_of(fused(z, set1(kLog2e), load(s.minus_lse + token))), hard, mul(power, soft));
  }
  const V teacher = fused(nat, set1(s.scale), load(s.minus_lse_nat + token));
  dz = sub(dz, mul(exp2_of(teacher), soft));
  const M here = same(load(s.target + token), column);
  if (any(here)) dz = sub(dz, pick(here, hard, set1(0.0f)));
  return slope(dz, z, s.softcap);
}

LANE void visit(const NceSlope& s, const Place& p, float* z) {
  const float* nat = z + kRows * kGroup;
  for (int r = 0; r < p.n; ++r) {
    const V column = set1(static_cast<float>(p.first + r - s.out.first));
    float* row = z + r * kGroup;
    for (int j = 0; j < p.vectors; ++j) {
      const V dz = nce_slope(s, p.at + j * kWidth, column, load(row + j * kWidth), load(nat + r * kGroup + j * kWidth));
      store(row + j * kWidth, dz);
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

// The logit of each token's target in one stream, by the very operations of a tile.
LANE void target_logits(const Walk& walk, int64_t stream, const int64_t* targets, float* out) {
  const Matrix& weight = walk.head->weight;
  const int64_t count = words(weight.columns);
  for (int64_t at = 0; at < walk.tokens; at += kWidth) {
    const int64_t tokens = walk.tokens - at < kWidth ? walk.tokens - at : kWidth;
    const int64_t group = at / kGroup * kGroup, inside = walk.tokens - group < kGroup ? walk.tokens - group : kGroup;
    const int64_t width = (inside + kWidth - 1) / kWidth * kWidth;
    const uint32_t* hidden = walk.panels + (stream * walk.padded + group) * count + (at - group);
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
