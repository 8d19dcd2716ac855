// The sweeps of one lane: running sums, logit gradients, and the loop over the vocabulary that produces the tiles for
// both. Included after products_lane.h, under the same rules.

// ---- running sums ----------------------------------------------------------------------------------------------------

// Weights of the second running sum: none, the exponent itself (for the entropy), an array of values, or z - max minus
// the values.
enum class Weigh { nothing, exponent, values, difference };

// Stands for the difference of a logit of -infinity to the maximum: the product with its power, at most 2^-126, is nothing.
constexpr float kNoLogit = -1e20f;

// A weighted sum whose values are differences to the maximum of another stream: they change where that maximum moves.
struct Follower {
  const Running* sums;  // null: none
  float sign;
};

// Adds a tile to the running sums of each token of a group: sum 2^(scale (z - max)), and the same sum weighted.
// kDrift adds a third sum, `drifted`, whose weights are `drift`. kWhole: the tile has kRows rows, not n. kStore: the tile
// becomes z - max.
template <Weigh kWeigh, bool kStore, bool kWhole, bool kDrift>
LANE void accumulate(
    const Running& to, const Follower& follower, int64_t at, int vectors, int n, float* z, const float* values,
    float scale, const float* drift, float* drifted) {
  const int rows = kWhole ? kRows : n;
  for (int j = 0; j < vectors; ++j) {
    float* from = z + j * kWidth;
    const int64_t token = at + j * kWidth;
    // Load: the running sums, and the maximum of the tile.
    V top = load(from);
    for (int r = 1; r < rows; ++r) top = maximum(top, load(from + r * kGroup));
    V max = load(to.max + token), total = load(to.total + token);
    V weighted = kWeigh == Weigh::nothing ? set1(0.0f) : load(to.weighted + token);
    V moved = kDrift ? load(drifted + token) : set1(0.0f);
    const M larger = greater(top, max);
    // Softmax: rescale the sums to the new maximum, which is rare after the first tiles.
    if (any(larger)) {
      top = pick(larger, top, max);
      const V shift = maximum(set1(-126.0f), mul(sub(max, top), set1(scale)));
      const V shrink = exp2_of(shift);
      if (kWeigh == Weigh::exponent) weighted = fused(shift, total, weighted);
      if (kWeigh == Weigh::difference) weighted = fused(sub(max, top), total, weighted);
      if (kStore && follower.sums) {
        const V moved = mul(sub(max, top), set1(follower.sign));
        float* mean = follower.sums->weighted + token;
        store(mean, fused(moved, load(follower.sums->total + token), load(mean)));
      }
      weighted = mul(weighted, shrink);
      if (kDrift) moved = mul(moved, shrink);
      total = mul(total, shrink);
      max = top;
      store(to.max + token, max);
    }
    // Accumulate: two chains of additions, so that they overlap.
    V even = set1(0.0f), odd = set1(0.0f);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      V difference = sub(load(from + r * kGroup), max);
      if (kStore || kWeigh == Weigh::difference) difference = maximum(set1(kNoLogit), difference);
      if (kStore) store(from + r * kGroup, difference);
      const V x = mul(difference, set1(scale));
      const V power = exp2_of(x);
      if (r % 2) {
        odd = add(odd, power);
      } else {
        even = add(even, power);
      }
      if (kWeigh == Weigh::exponent) weighted = fused(power, maximum(set1(-126.0f), x), weighted);
      if (kWeigh == Weigh::values) weighted = fused(power, load(values + j * kWidth + r * kGroup), weighted);
      if (kWeigh == Weigh::difference) {
        weighted = fused(power, sub(difference, load(values + j * kWidth + r * kGroup)), weighted);
      }
      if (kDrift) moved = fused(power, load(drift + j * kWidth + r * kGroup), moved);
    }
    // Store.
    store(to.total + token, add(total, add(even, odd)));
    if (kWeigh != Weigh::nothing) store(to.weighted + token, weighted);
    if (kDrift) store(drifted + token, moved);
  }
}

template <Weigh kWeigh, bool kStore = false, bool kDrift = false>
LANE void accumulate(
    const Running& to, const Follower& follower, int64_t at, int vectors, int n, float* z, const float* values,
    float scale, const float* drift = nullptr, float* drifted = nullptr) {
  if (n == kRows) {
    return accumulate<kWeigh, kStore, true, kDrift>(
        to, follower, at, vectors, n, z, values, scale, drift, drifted);
  }
  accumulate<kWeigh, kStore, false, kDrift>(to, follower, at, vectors, n, z, values, scale, drift, drifted);
}

// ---- visitors of a tile ----------------------------------------------------------------------------------------------

// Position of a tile: columns first .. first + n of the vocabulary by the tokens at .. of the block. Its logits `z` are
// one tile per stream (student, nat, neg).
struct Place {
  int64_t split, at, tokens, first;  // tokens: number of tokens of the group that are not padding
  int vectors, n;
};

LANE void visit(const LogprobSweep& s, const Place& p, float* z) {
  const LogprobSums& to = s.sums[p.split];
  if (s.want_rank) {
    for (int j = 0; j < p.vectors; ++j) {
      const V target = load(s.at_target + p.at + j * kWidth);
      V count = load(to.larger + p.at + j * kWidth);
      // The target's own logit has the same bits as `target`, so it never counts.
      for (int r = 0; r < p.n; ++r) {
        count = add(count, pick(greater(load(z + r * kGroup + j * kWidth), target), set1(1.0f), set1(0.0f)));
      }
      store(to.larger + p.at + j * kWidth, count);
    }
  }
  if (s.want_entropy) return accumulate<Weigh::exponent>(to.running, {}, p.at, p.vectors, p.n, z, nullptr, s.scale);
  accumulate<Weigh::nothing>(to.running, {}, p.at, p.vectors, p.n, z, nullptr, s.scale);
}

// Writes a tile to memory that outlives the sweep. `drift` becomes the error of rounding to 16 bits; it is not written
// for float32.
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

// Adds a tile to the running sums. Where the kept logits are rounded, it also sums by how much rounding moves the
// log-sum-exp, so that the probabilities of the rounded logits add up to 1. Otherwise p - 1 of a near-certain token, or
// the difference of two near-certain probabilities, would be nothing but rounding error.
template <Weigh kWeigh, bool kStore>
LANE void accumulate(
    const NceSweep& s, const Running& to, const Follower& follower, float* drifted, const Place& p, float* z,
    const float* values, float scale, const float* drift) {
  if (s.rounds) {
    return accumulate<kWeigh, kStore, true>(to, follower, p.at, p.vectors, p.n, z, values, scale, drift, drifted);
  }
  accumulate<kWeigh, kStore>(to, follower, p.at, p.vectors, p.n, z, values, scale);
}

LANE void visit(const NceSweep& s, const Place& p, float* z) {
  const NceSums& to = s.sums[p.split];
  float *nat = z + (s.student ? kRows * kGroup : 0), *neg = nat + kRows * kGroup;
  alignas(64) float drift[2][kRows * kGroup];
  if (s.kept[0].data) {
    keep(s.kept[0], p, z, drift[0]);
    keep(s.kept[1], p, nat, drift[1]);
  }
  // The last sum of each stream leaves differences to the maximum in its tile. Averages are those of differences: two
  // large averages would cancel.
  if (s.student) {
    if (!s.plain) {
      accumulate<Weigh::nothing, false>(s, to.soft_student, {}, to.soft_student_drift, p, z, nullptr, s.scale, drift[0]);
    }
    accumulate<Weigh::nothing, true>(
        s, to.student, {&to.soft_nat, 1.0f}, to.student_drift, p, z, nullptr, kLog2e, drift[0]);
  }
  if (!s.plain) accumulate<Weigh::nothing>(to.nat, {}, p.at, p.vectors, p.n, nat, nullptr, kLog2e);
  const Follower gap{s.neg ? &to.neg : nullptr, -1.0f};
  if (s.student) {
    accumulate<Weigh::values, true>(s, to.soft_nat, gap, to.nat_drift, p, nat, z, s.scale, drift[1]);
  } else {
    accumulate<Weigh::nothing, true>(to.soft_nat, gap, p.at, p.vectors, p.n, nat, nullptr, s.scale);
  }
  // KL is the mean of neg - nat, each relative to its maximum.
  if (s.neg) accumulate<Weigh::difference>(to.neg, {}, p.at, p.vectors, p.n, neg, nat, kLog2e);
}

// Writes row r of a tile of logit gradients to memory.
LANE void write_gradient(const Tile& out, Type type, const Place& p, int64_t token, int r, const float* from) {
  store_as(type, out.data, (p.first + r - out.first) * out.stride + token, from, p.tokens);
}

LANE void visit(const LogprobDlogits& s, const Place& p, float* z) {
  for (int r = 0; r < p.n; ++r) {
    const V column = set1(static_cast<float>(p.first + r - s.out.first));
    float* row = z + r * kGroup;
    for (int j = 0; j < p.vectors; ++j) {
      const int64_t token = p.at + j * kWidth;
      const V value = load(row + j * kWidth);
      const V x = mul(sub(value, load(s.top + token)), set1(s.scale));
      V factor = load(s.constant + token);
      // A bias of -infinity gives x = -infinity and a power of 0; their product must be 0, not NaN.
      if (s.linear) factor = fused(load(s.linear + token), maximum(set1(-126.0f), x), factor);
      V dz = mul(exp2_of(x), factor);
      const M here = same(load(s.target + token), column);
      if (any(here)) dz = add(dz, pick(here, load(s.up + token), set1(0.0f)));
      store(row + j * kWidth, softcap_backward(dz, value, s.softcap));
    }
    write_gradient(s.out, s.type, p, s.first_token + p.at, r, row);
  }
}

// Returns dz of one column for a vector of tokens.
LANE V nce_dlogits(const NceDlogits& s, int64_t token, V column, V z, V nat) {
  const V difference = sub(z, load(s.top + token)), teacher = sub(nat, load(s.top_nat + token));
  V dz = mul(exp2_of(mul(difference, set1(s.scale))), load(s.soft + token));
  if (!s.plain) dz = fused(exp2_of(mul(difference, set1(kLog2e))), load(s.plain_hard + token), dz);
  dz = sub(dz, mul(exp2_of(mul(teacher, set1(s.scale))), load(s.teacher + token)));
  const M here = same(load(s.target + token), column);
  if (any(here)) dz = sub(dz, pick(here, load(s.hard + token), set1(0.0f)));
  return softcap_backward(dz, z, s.softcap);
}

LANE void visit(const NceDlogits& s, const Place& p, float* z) {
  const float* nat = z + kRows * kGroup;
  for (int r = 0; r < p.n; ++r) {
    const V column = set1(static_cast<float>(p.first + r - s.out.first));
    float* row = z + r * kGroup;
    for (int j = 0; j < p.vectors; ++j) {
      const V dz =
          nce_dlogits(s, p.at + j * kWidth, column, load(row + j * kWidth), load(nat + r * kGroup + j * kWidth));
      store(row + j * kWidth, dz);
    }
    write_gradient(s.out, s.type, p, s.first_token + p.at, r, row);
  }
}

// ---- the loop over the vocabulary ------------------------------------------------------------------------------------

// Computes the logits of one split of the vocabulary for one block of tokens and hands every tile to the visitor.
template <class Visitor>
LANE void sweep_split(void* context, int64_t split) {
  const Block& block = *static_cast<const Block*>(context);
  const Visitor& visitor = *static_cast<const Visitor*>(block.visitor);
  const int64_t count = words(block.head->weight.columns), streams = block.streams;
  uint32_t* panel = block.scratch + split * block.scratch_words;
  uint32_t* spare = panel + kRows * count;
  float* z = reinterpret_cast<float*>(spare + 4 * count + block.padding);
  const int64_t start = block.first + split * block.split;
  const int64_t stop = start + block.split < block.last ? start + block.split : block.last;
  const Matrix& weight = block.head->weight;
  for (int64_t first = start; first < stop; first += kRows) {
    Place place{split, 0, 0, first, 0, static_cast<int>(stop - first < kRows ? stop - first : kRows)};
    // Load: a panel of kRows weight rows, packed once for all tokens of the block.
    pack(panel, kRows, weight, first, place.n, nullptr, spare);
    const int64_t rest = stop - first - kRows, groups = (block.tokens + kGroup - 1) / kGroup;
    for (; place.at < block.tokens; place.at += kGroup) {
      prefetch(weight, first + kRows, rest < kRows ? rest : kRows, place.at / kGroup, groups);
      place.tokens = block.tokens - place.at < kGroup ? block.tokens - place.at : kGroup;
      place.vectors = static_cast<int>((place.tokens + kWidth - 1) / kWidth);
      // Scores: one tile of logits per stream.
      for (int64_t i = 0; i < streams; ++i) {
        float* tile = z + i * kRows * kGroup;
        product(place.vectors, tile, block.panels + (i * block.padded + place.at) * count, panel, count);
        bias_and_softcap(tile, place.vectors, place.n, *block.head, first);
      }
      // Softmax and accumulate, or store of the gradient: the visitor's part.
      visit(visitor, place, z);
    }
  }
}

// Packs the tokens of a block, group by group. There are as many tasks as splits; task i uses the scratch of split i.
LANE void pack_tokens(void* context, int64_t task) {
  const Block& block = *static_cast<const Block*>(context);
  const int64_t count = words(block.head->weight.columns);
  uint32_t* spare = block.scratch + task * block.scratch_words;
  for (int64_t at = task * kGroup; at < block.tokens; at += block.splits * kGroup) {
    const int64_t tokens = block.tokens - at < kGroup ? block.tokens - at : kGroup;
    const int64_t width = (tokens + kWidth - 1) / kWidth * kWidth;
    for (int64_t i = 0; i < block.streams; ++i) {
      uint32_t* to = block.panels + (i * block.padded + at) * count;
      pack(to, width, *block.hidden[i], block.first_token + at, tokens, nullptr, spare);
    }
  }
}

// Computes the logit of each token's target in one stream, by the same operations as a tile, so with the same bits.
LANE void target_logits(const Block& block, int64_t stream, const int64_t* targets, float* out) {
  const Matrix& weight = block.head->weight;
  const int64_t count = words(weight.columns);
  for (int64_t at = 0; at < block.tokens; at += kWidth) {
    const int64_t tokens = block.tokens - at < kWidth ? block.tokens - at : kWidth;
    const int64_t group = at / kGroup * kGroup, inside = block.tokens - group < kGroup ? block.tokens - group : kGroup;
    const int64_t width = (inside + kWidth - 1) / kWidth * kWidth;
    const uint32_t* hidden = block.panels + (stream * block.padded + group) * count + (at - group);
    uint32_t* panel = block.scratch + 4 * count;
    pack(panel, kWidth, weight, 0, tokens, targets + at, block.scratch);
    V z = set1(0.0f);
    for (int64_t k = 0; k < count; ++k) {
      const V h = load(reinterpret_cast<const float*>(hidden + k * width));
      z = dot(z, h, load(reinterpret_cast<const float*>(panel + k * kWidth)));
    }
    if (block.head->bias) {
      float bias[kWidth] = {};
      for (int64_t i = 0; i < tokens; ++i) bias[i] = block.head->bias[targets[at + i]];
      z = add(z, load(bias));
    }
    if (block.head->softcap != 0) z = softcapped(z, block.head->softcap);
    store(out + at, z);
  }
}
