// Tiles of one lane. Included once per lane by tiles_cpu.cpp, inside that lane's namespace (common/vectors.h). LANE is
// the attribute of the lane's functions and kRows the number of rows of a tile. No include guard on purpose.
//
// The elements of a vector are queries. A panel holds kPanel queries of one head, packed with queries innermost, so
// scores and outputs are transposed: (keys, queries) and (columns, queries). Keys and values are broadcast, every
// running maximum and sum is a vector of queries, and nothing is summed across a vector.

constexpr int kVectors = 3;
constexpr int kPanel = kVectors * kWidth;

#include "cross_attention/tiles_products.h"

// ---- panels ----------------------------------------------------------------------------------------------------------

// Up to kPanel queries of one head and the keys they may see.
struct Panel {
  int64_t head, query, rows;         // head of the group, first query, queries
  int64_t first, last;               // keys that any of them sees
  int64_t full_first, full_last;     // keys that all of them see, queries with an empty interval aside
  int vectors;
  float lo[kPanel], hi[kPanel];      // 0, 0 beyond `rows` and for an empty interval
};

LANE Panel panel_of(const Head& u, int64_t index) {
  Panel p;
  p.head = index % u.group;
  p.query = index / u.group * kPanel;
  p.rows = u.m - p.query < kPanel ? u.m - p.query : kPanel;
  p.vectors = static_cast<int>((p.rows + kWidth - 1) / kWidth);
  p.first = p.full_last = u.n;
  p.last = p.full_first = 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    int64_t lo = 0, hi = 0;
    if (i < p.rows) {
      lo = u.lo[p.query + i];
      hi = u.hi[p.query + i];
    }
    if (lo >= hi) {
      p.lo[i] = p.hi[i] = 0.0f;
      continue;
    }
    p.lo[i] = static_cast<float>(lo);
    p.hi[i] = static_cast<float>(hi);
    p.first = lo < p.first ? lo : p.first;
    p.full_first = lo > p.full_first ? lo : p.full_first;
    p.last = hi > p.last ? hi : p.last;
    p.full_last = hi < p.full_last ? hi : p.full_last;
  }
  return p;
}

// The keys [low, high) of a block that a panel sees, as multiples of kRows from the block's start. masked: some query
// does not see all of them.
struct Part {
  int64_t low, high;
  bool masked;
};

LANE Part part_of(const Panel& p, int64_t start) {
  Part part{0, 0, false};
  const int64_t low = (p.first > start ? p.first : start) - start;
  const int64_t high = (p.last < start + kBlock ? p.last : start + kBlock) - start;
  if (low >= high) return part;
  part.low = low / kRows * kRows;
  part.high = (high + kRows - 1) / kRows * kRows;
  part.masked = start + part.low < p.full_first || start + part.high > p.full_last;
  return part;
}

// Returns `value` where lo <= key < hi, else `other`. The half keeps the comparisons strict.
LANE V within(V value, float key, V lo, V hi, V other) {
  const V at = set1(key + 0.5f);
  return pick(greater(at, lo), pick(greater(hi, at), value, other), other);
}

// Copies the rows of a panel's queries as float32. Rows with an empty interval, and those up to a whole vector, are 0.
template <class T>
LANE void query_rows(float* to, const T* from, int64_t stride, const Panel& p, int64_t d, int64_t width) {
  widen(to, from, stride, p.rows, d, width);
  for (int64_t i = 0; i < p.vectors * kWidth; ++i) {
    if (p.lo[i] >= p.hi[i]) std::memset(to + i * width, 0, static_cast<size_t>(width) * sizeof(float));
  }
}

// Copies keys (or values) [low, high) of a block to their places in it as float32; rows beyond the last key are 0.
template <class T>
LANE void stage(float* to, const T* from, int64_t stride, int64_t start, int64_t low, int64_t high, const Head& u) {
  const int64_t there = u.n - start < high ? u.n - start : high;
  widen(to + low * u.width, from + (start + low) * stride, stride, there - low, u.d, u.width);
  if (there < high) std::memset(to + there * u.width, 0, static_cast<size_t>((high - there) * u.width) * sizeof(float));
}

// ---- numbers that are not finite -------------------------------------------------------------------------------------

// Returns true if any of `count` numbers is NaN or infinite; count is a multiple of kRows vectors.
LANE bool any_not_finite(const float* from, int64_t count) {
  V sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = set1(0.0f);
  for (int64_t i = 0; i < count; i += kRows * kWidth) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V x = load(from + i + r * kWidth);
      sums[r] = add(sums[r], sub(x, x));  // 0, or NaN
    }
  }
  V sum = sums[0];
  for (int r = 1; r < kRows; ++r) sum = add(sum, sums[r]);
  return any(greater(pick(same(sum, set1(0.0f)), set1(0.0f), set1(1.0f)), set1(0.0f)));
}

// Prepares a masked product of weights and rows of keys (or values), some of which are not finite. The weight of a
// hidden key is 0, but 0 times NaN is NaN. So NaN and Inf become 0 in the rows, and the weights of the queries that see
// such a row become NaN. `to` may be `rows`.
LANE void hide_not_finite(
    const Panel& p, float* to, const float* rows, float* weights, int64_t start, const Part& part, int64_t width) {
  const V zero = set1(0.0f), nan = set1(kNan);
  for (int64_t key = part.low; key < part.high; ++key) {
    V sum = zero;
    for (int64_t c = key * width; c < (key + 1) * width; c += kWidth) {
      const V x = load(rows + c), excess = sub(x, x);
      store(to + c, pick(same(excess, zero), x, zero));
      sum = add(sum, excess);
    }
    if (!any(greater(pick(same(sum, zero), zero, set1(1.0f)), zero))) continue;
    for (int j = 0; j < p.vectors; ++j) {
      float* at = weights + key * kPanel + j * kWidth;
      const V lo = load(p.lo + j * kWidth), hi = load(p.hi + j * kWidth);
      store(at, within(nan, static_cast<float>(start + key), lo, hi, load(at)));
    }
  }
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// Online softmax of a block: scores become weights relative to the running maximum; shrink[i] becomes the factor by
// which the sums of query i so far shrink.
template <bool kMasked>
LANE void online_softmax(
    const Panel& p, float* scores, int64_t start, const Part& part, float scale, float* max, float* total,
    float* shrink) {
  const V none = set1(-kInfinity);
  for (int j = 0; j < p.vectors; ++j) {
    const V lo = load(p.lo + j * kWidth), hi = load(p.hi + j * kWidth), old = load(max + j * kWidth);
    float* column = scores + j * kWidth;
    V top = none;
    for (int64_t key = part.low; key < part.high; ++key) {
      V score = load(column + key * kPanel);
      if (kMasked) {
        score = within(score, static_cast<float>(start + key), lo, hi, none);
        store(column + key * kPanel, score);
      }
      top = maximum(top, score);
    }
    top = maximum(top, old);
    // A row whose scores are all -inf gets weights of 0 here, not exp(-inf + inf), which is NaN.
    const V shift = pick(same(top, none), set1(0.0f), top);
    const V less = pick(same(old, none), set1(0.0f), exp2_of(mul(sub(old, shift), set1(scale))));
    V sums = set1(0.0f);
    for (int64_t key = part.low; key < part.high; ++key) {
      const V score = load(column + key * kPanel);
      V weight = exp2_of(mul(sub(score, shift), set1(scale)));
      weight = pick(same(score, none), set1(0.0f), weight);  // exp2_of does not go below 2^-126
      store(column + key * kPanel, weight);
      sums = add(sums, weight);
    }
    store(total + j * kWidth, fused(load(total + j * kWidth), less, sums));
    store(max + j * kWidth, top);
    store(shrink + j * kWidth, less);
  }
}

LANE int64_t forward_floats(int64_t width) {
  return kPanels * (2 * width * kPanel + 2 * kPanel) + 3 * kBlock * width + kBlock * kPanel + kPanel;
}

// Computes out and lse of panels [begin, end) of one KV head; at most kPanels of them.
template <class T>
LANE void forward(const Head& u, int64_t begin, int64_t end, float* memory) {
  Panel panels[kPanels];
  const int64_t count = end - begin, columns = u.width * kPanel;
  float *queries = memory, *outs = queries + kPanels * columns, *max = outs + kPanels * columns;
  float *total = max + kPanels * kPanel, *keys = total + kPanels * kPanel, *values = keys + kBlock * u.width;
  float *finite = values + kBlock * u.width, *scores = finite + kBlock * u.width, *shrink = scores + kBlock * kPanel;
  // Load: the queries, transposed.
  int64_t first = u.n, last = 0;
  for (int64_t i = 0; i < count; ++i) {
    Panel& p = panels[i] = panel_of(u, begin + i);
    first = p.first < first ? p.first : first;
    last = p.last > last ? p.last : last;
    const T* q = static_cast<const T*>(u.q) + p.query * u.q_token + p.head * u.q_head;
    float* rows = outs + i * columns;  // borrows the accumulators until they are cleared
    query_rows(rows, q, u.q_token, p, u.d, u.width);
    transpose(queries + i * columns, kPanel, rows, u.width, p.vectors * kWidth, u.width);
    std::memset(rows, 0, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t r = 0; r < kPanel; ++r) {
      max[i * kPanel + r] = -kInfinity;
      total[i * kPanel + r] = 0.0f;
    }
  }
  for (int64_t start = first / kBlock * kBlock; start < last; start += kBlock) {
    Part parts[kPanels];
    int64_t low = kBlock, high = 0;
    bool masked = false;
    for (int64_t i = 0; i < count; ++i) {
      parts[i] = part_of(panels[i], start);
      if (parts[i].low >= parts[i].high) continue;
      masked = masked || parts[i].masked;
      low = parts[i].low < low ? parts[i].low : low;
      high = parts[i].high > high ? parts[i].high : high;
    }
    if (low >= high) continue;
    // Load: a block of keys and values, for all panels.
    stage(keys, static_cast<const T*>(u.k), u.k_token, start, low, high, u);
    stage(values, static_cast<const T*>(u.v), u.v_token, start, low, high, u);
    const bool hide = masked && any_not_finite(values + low * u.width, (high - low) * u.width);
    for (int64_t i = 0; i < count; ++i) {
      const Panel& p = panels[i];
      const Part& part = parts[i];
      const int64_t size = part.high - part.low;
      if (size <= 0) continue;
      // Scores, softmax, accumulate.
      float* at = scores + part.low * kPanel;
      product<false, false>(
          p.vectors, size, at, keys + part.low * u.width, u.width, queries + i * columns, u.d, nullptr);
      const auto softmax = part.masked ? online_softmax<true> : online_softmax<false>;
      softmax(p, scores, start, part, u.scale_log2, max + i * kPanel, total + i * kPanel, shrink);
      const bool hides = hide && part.masked;
      if (hides) hide_not_finite(p, finite, values, scores, start, part, u.width);
      const float* v = (hides ? finite : values) + part.low * u.width;
      product<true, true>(p.vectors, u.width, outs + i * columns, v, u.width, at, size, shrink);
    }
  }
  // Store.
  for (int64_t i = 0; i < count; ++i) {
    const Panel& p = panels[i];
    float* rows = queries + i * columns;
    transpose(rows, u.width, outs + i * columns, kPanel, u.width, p.vectors * kWidth);
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t query = p.query + r;
      T* out = static_cast<T*>(u.out) + query * u.out_token + p.head * u.d;
      float* lse = u.lse + p.head * u.m + query;
      if (p.lo[r] >= p.hi[r]) {
        for (int64_t c = 0; c < u.d; ++c) out[c] = T(0.0f);
        *lse = -kInfinity;
        continue;
      }
      const double sum = total[i * kPanel + r], top = max[i * kPanel + r];
      narrow(out, rows + r * u.width, static_cast<float>(1.0 / sum), u.d);
      *lse = static_cast<float>(top * u.scale + std::log(sum));
    }
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

// Softmax backward: scores become P = exp(scale s - lse), and dP (in `up`) becomes t = P (dP - delta).
template <bool kMasked>
LANE void softmax_backward(
    const Panel& p, float* scores, float* up, int64_t start, const Part& part, float scale, const float* lse,
    const float* delta) {
  for (int j = 0; j < p.vectors; ++j) {
    const V lo = load(p.lo + j * kWidth), hi = load(p.hi + j * kWidth), zero = set1(0.0f);
    const V end = load(lse + j * kWidth), less = load(delta + j * kWidth);
    for (int64_t key = part.low; key < part.high; ++key) {
      const int64_t at = key * kPanel + j * kWidth;
      const V power = sub(mul(load(scores + at), set1(scale)), end);
      V weight = pick(same(power, set1(-kInfinity)), zero, exp2_of(power));
      V t = mul(weight, sub(load(up + at), less));
      if (kMasked) {
        weight = within(weight, static_cast<float>(start + key), lo, hi, zero);
        t = within(t, static_cast<float>(start + key), lo, hi, zero);
      }
      store(scores + at, weight);
      store(up + at, t);
    }
  }
}

LANE int64_t backward_floats(int64_t width) {
  return 5 * width * kPanel + 2 * kPanel + 2 * kBlock * width + 2 * kBlock * kPanel;
}

// Computes dq of panels [begin, end) of one KV head (unless s.dq is null) and adds their part of dk and dv (unless s.dk
// is null), for its keys [from, to). `from` is a multiple of kBlock.
template <class T>
LANE void backward(
    const Head& u, const Gradients& s, int64_t begin, int64_t end, int64_t from, int64_t to, float* memory) {
  const int64_t columns = u.width * kPanel;
  float *rows = memory, *queries = rows + columns, *given = queries + columns, *ups = given + columns;
  float *dq = ups + columns, *lse = dq + columns, *delta = lse + kPanel, *keys = delta + kPanel;
  float *values = keys + kBlock * u.width, *scores = values + kBlock * u.width, *up = scores + kBlock * kPanel;
  for (int64_t index = begin; index < end; ++index) {
    const Panel p = panel_of(u, index);
    const int64_t padded = p.vectors * kWidth;
    const int64_t first = p.first > from ? p.first : from, last = p.last < to ? p.last : to;
    // Load: out and dout for delta = sum(out dout) - dlse, then the queries and dout, transposed.
    if (first < last) {
      const T* out = static_cast<const T*>(u.out) + p.query * u.out_token + p.head * u.d;
      const T* dout = static_cast<const T*>(s.dout) + p.query * u.out_token + p.head * u.d;
      query_rows(rows, out, u.out_token, p, u.d, u.width);
      query_rows(given, dout, u.out_token, p, u.d, u.width);
      for (int64_t r = 0; r < padded; ++r) {
        lse[r] = delta[r] = 0.0f;
        if (p.lo[r] >= p.hi[r]) continue;
        const int64_t at = p.head * u.m + p.query + r;
        V sums = set1(0.0f);
        for (int64_t c = 0; c < u.width; c += kWidth) {
          sums = fused(load(rows + r * u.width + c), load(given + r * u.width + c), sums);
        }
        float each[kWidth], sum = s.dlse ? -s.dlse[at] : 0.0f;
        store(each, sums);
        for (int i = 0; i < kWidth; ++i) sum += each[i];
        delta[r] = sum;
        // Infinite only if a score is: the weights of such a row are NaN.
        lse[r] = std::isfinite(u.lse[at]) ? static_cast<float>(u.lse[at] * kLog2e) : kNan;
      }
      query_rows(
          rows, static_cast<const T*>(u.q) + p.query * u.q_token + p.head * u.q_head, u.q_token, p, u.d, u.width);
      // A row of q or dout that is not finite makes its weights NaN, so that it reaches the keys that it sees, and
      // becomes 0 itself, so that it reaches no other.
      if (any_not_finite(rows, padded * u.width) || any_not_finite(given, padded * u.width)) {
        for (int64_t r = 0; r < p.rows; ++r) {
          float *q = rows + r * u.width, *g = given + r * u.width;
          if (std::all_of(q, q + u.width, is_finite) && std::all_of(g, g + u.width, is_finite)) continue;
          lse[r] = kNan;
          std::memset(q, 0, static_cast<size_t>(u.width) * sizeof(float));
          std::memset(g, 0, static_cast<size_t>(u.width) * sizeof(float));
        }
      }
      transpose(queries, kPanel, rows, u.width, padded, u.width);
      transpose(ups, kPanel, given, u.width, padded, u.width);
    }
    std::memset(dq, 0, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t start = first / kBlock * kBlock; start < last; start += kBlock) {
      const Part part = part_of(p, start);
      const int64_t size = part.high - part.low;
      if (size <= 0) continue;
      // Load: a block of keys and values.
      stage(keys, static_cast<const T*>(u.k), u.k_token, start, part.low, part.high, u);
      stage(values, static_cast<const T*>(u.v), u.v_token, start, part.low, part.high, u);
      const float *k = keys + part.low * u.width, *v = values + part.low * u.width;
      float *weights = scores + part.low * kPanel, *t = up + part.low * kPanel;
      // Scores and dP, then softmax backward.
      product<false, false>(p.vectors, size, weights, k, u.width, queries, u.d, nullptr);
      product<false, false>(p.vectors, size, t, v, u.width, ups, u.d, nullptr);
      const auto softmax = part.masked ? softmax_backward<true> : softmax_backward<false>;
      softmax(p, scores, up, start, part, u.scale_log2, lse, delta);
      if (part.masked && any_not_finite(k, size * u.width)) hide_not_finite(p, keys, keys, up, start, part, u.width);
      // Accumulate: dq of the panel, dk and dv of the block.
      if (s.dq) product<true, true>(p.vectors, u.width, dq, k, u.width, t, size, nullptr);
      if (s.dk) {
        const int64_t at = (start + part.low - from) * u.width;
        add_to_keys(s.dk + at, t, rows, size, padded, u.width);
        add_to_keys(s.dv + at, weights, given, size, padded, u.width);
      }
    }
    // Store.
    if (!s.dq) continue;
    transpose(rows, u.width, dq, kPanel, u.width, padded);
    T* to_dq = static_cast<T*>(s.dq) + p.query * u.out_token + p.head * u.d;
    for (int64_t r = 0; r < p.rows; ++r) {
      if (p.lo[r] >= p.hi[r]) std::memset(rows + r * u.width, 0, static_cast<size_t>(u.width) * sizeof(float));
      narrow(to_dq + r * u.out_token, rows + r * u.width, u.scale, u.d);
    }
  }
}

// Stores rows of dk or dv, multiplied by `factor`, in the tensor's dtype.
template <class T>
LANE void write_keys(T* to, int64_t stride, const float* from, float factor, int64_t keys, const Head& u) {
  for (int64_t j = 0; j < keys; ++j) narrow(to + j * stride, from + j * u.width, factor, u.d);
}

#define CALM_FAST_TILES(T) \
  { forward<T>, backward<T>, write_keys<T> }
constexpr Functions kFunctions{
    kWidth, kPanel, forward_floats, backward_floats, CALM_FAST_TILES(float), CALM_FAST_TILES(BFloat16),
    CALM_FAST_TILES(Half),
};
#undef CALM_FAST_TILES
