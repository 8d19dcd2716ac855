// The decode part of cross_attention on a GPU. The keys of a KV head are cut into splits. A block computes one split
// for up to eight of the rows that read that head, and a second kernel combines the splits in order.
//
// A row is (query, head of the group). A key belongs to a group of kLanes lanes, eight elements per lane, so K and V
// are read once, 16 bytes at a time, for all rows of the tile. The sums over lanes are exchanged so that each lane ends
// with the score of one row. That lane alone computes the row's softmax and hands the weights back. Everything is
// float32. docs/ops/cross_attention.md counts bytes and instructions. No torch headers: the CPU emulation compiles this
// file too.
#pragma once

#include "common/packed.cuh"
#include "cross_attention/limits.h"

namespace calm_fast::cross_attention {

using simt::Global;
using simt::kAllLanes;
using simt::kWarpSize;
using simt::Shared;

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
constexpr int kEach = 8;             // elements of a head that a lane holds
constexpr int kMaxSplits = 128;
constexpr int kCombineThreads = static_cast<int>(kMaxHeadDim) / 4;  // four columns per thread
constexpr float kLowest = -3e38f;    // a maximum over no keys: finite, so that inf - inf cannot arise
constexpr float kHidden = -1.0f;     // weight of a key that the row does not see; other weights are >= 0 or NaN
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

struct Strides {
  int64_t batch, token, head;  // elements; each a multiple of 16 bytes
};

template <class T>
struct Args {
  Global<const T> q, k, v;        // (B, M, H, D), (B, N, Hkv, D): D contiguous, rows 16-byte aligned
  Global<const int32_t> lo, hi;   // (B, M) or null
  Global<T> out;                  // (B, M, H, D)
  Global<float> lse;              // (B, H, M)
  Global<float> acc, max, total;  // (B Hkv, splits, rows[, D]), null with one split
  Strides qs, ks, vs;
  int64_t n, split_keys;
  int m, heads, kv_heads, d;      // 32 bits: a 64-bit division takes a hundred instructions
  int group, rows, tiles, splits; // query heads of a KV head; m * group; tiles of rows
  bool causal;
  float scale_log2;               // scale * log2(e)
};

struct Interval {
  int64_t lo, hi;
};

// Returns the keys [lo, hi) that row `row` sees within [first, last).
template <class T>
__device__ __forceinline__ Interval interval_of(const Args<T>& a, int64_t b, int row, int64_t first, int64_t last) {
  if (row >= a.rows) return {0, 0};
  const int i = row / a.group;
  int64_t lo = 0, hi = a.n;
  if (a.causal) hi = i + 1 + a.n - a.m;
  if (a.lo) {
    const int32_t given = a.lo[b * a.m + i];
    lo = given;
  }
  if (a.hi) {
    const int32_t given = a.hi[b * a.m + i];
    hi = given;
  }
  return {lo < first ? first : lo, hi > last ? last : hi};
}

// Writes four columns of a row's output; the thread with column 0 also writes its lse.
template <class T>
__device__ __forceinline__ void finish(
    const Args<T>& a, int64_t b, int head, int row, int column, float4 acc, float max, float total) {
  const int i = row / a.group, h = head * a.group + row % a.group;
  Global<T> out = a.out + ((b * a.m + i) * a.heads + h) * a.d + column;
  const Interval sees = interval_of(a, b, row, 0, a.n);
  const bool nothing = sees.lo >= sees.hi;
  const float inverse = 1.0f / total;  // a row that sees only scores of -inf gives NaN, as in the definition
  out[0] = simt::from_float<T>(nothing ? 0.0f : acc.x * inverse);
  out[1] = simt::from_float<T>(nothing ? 0.0f : acc.y * inverse);
  out[2] = simt::from_float<T>(nothing ? 0.0f : acc.z * inverse);
  out[3] = simt::from_float<T>(nothing ? 0.0f : acc.w * inverse);
  if (column == 0) {
    a.lse[(b * a.heads + h) * a.m + i] = nothing ? -HUGE_VALF : max * static_cast<float>(kLn2) + logf(total);
  }
}

// The eight elements of a lane in the dtype of memory: one 16-byte load for 16-bit elements, two for float32.
template <class T>
struct Raw {
  static constexpr int kLoads = kEach / simt::kPack<T>;
  uint4 words[kLoads];

  // Load c of lane l reads the elements from (c lanes + l) kPack on, so that a load of all lanes is contiguous.
  __device__ __forceinline__ void read(Global<const T> row, int lane, int lanes, int d, bool wanted) {
    SIMT_UNROLL
    for (int c = 0; c < kLoads; ++c) {
      const int at = (c * lanes + lane) * simt::kPack<T>;
      words[c] = {0, 0, 0, 0};
      if (wanted && at < d) words[c] = simt::load<uint4>(row + at);
    }
  }
  __device__ __forceinline__ void widen(float (&to)[kEach]) const {
    SIMT_UNROLL
    for (int c = 0; c < kLoads; ++c) simt::unpack<T>(words[c], to + c * simt::kPack<T>);
  }
};

// Sums kRows values each over kLanes lanes; lane l ends with the sum of row l / (kLanes / kRows).
template <int kRows, int kLanes>
__device__ __forceinline__ float scatter_sum(float (&x)[kRows], int lane) {
  int step = kLanes / 2;
  SIMT_UNROLL
  for (int half = kRows / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = lane & step;
    SIMT_UNROLL
    for (int i = 0; i < half; ++i) {
      const float give = upper ? x[i] : x[i + half], keep = upper ? x[i + half] : x[i];
      x[i] = keep + __shfl_xor_sync(kAllLanes, give, step);
    }
  }
  SIMT_UNROLL
  for (; step > 0; step /= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], step);
  return x[0];
}

// Keys per step of a lane group: enough 16-byte loads in flight, without spilling registers.
template <class T, int kRows>
constexpr int kUnrolled = sizeof(T) == 4 && kRows > 1 ? 2 : 4;

constexpr int64_t step_keys(int lanes, int unrolled) { return static_cast<int64_t>(kThreads / lanes) * unrolled; }

// Attends one tile of kRows rows to one split of the keys.
template <class T, int kRows, int kLanes>
__global__ void __launch_bounds__(kThreads, kRows == 8 ? 2 : kRows == 4 ? 3 : 4) decode_kernel(Args<T> a) {
  constexpr int kUnroll = kUnrolled<T, kRows>, kGroups = kThreads / kLanes, kPerRow = kLanes / kRows;
  constexpr int64_t kStep = step_keys(kLanes, kUnroll);
  const int lane = threadIdx.x % kLanes, key_group = threadIdx.x / kLanes, warp = threadIdx.x / kWarpSize;
  const int mine = lane / kPerRow;  // row of the tile whose softmax this lane computes

  int at = blockIdx.x;  // tiles of one split are adjacent: they read the same keys, the later tiles from L2
  const int tile = at % a.tiles;
  at /= a.tiles;
  const int64_t split = at % a.splits;
  at /= a.splits;
  const int head = at % a.kv_heads;
  const int64_t b = at / a.kv_heads;
  const int64_t first = split * a.split_keys;
  const int64_t last = first + a.split_keys < a.n ? first + a.split_keys : a.n;

  simt::SharedPool pool;
  Shared<float> warp_max = pool.take<float>(kWarps * kRows, "warp_max");
  Shared<float> warp_total = pool.take<float>(kWarps * kRows, "warp_total");
  Shared<float> row_max = pool.take<float>(kRows, "row_max");
  Shared<float> warp_acc = pool.take<float>(kWarps * kRows * a.d, "warp_acc");

  // Load: the query rows of the tile, scaled for exp2.
  float q[kRows][kEach], acc[kRows][kEach];
  SIMT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = tile * kRows + r, i = row / a.group, h = head * a.group + row % a.group;
    Raw<T> raw;
    const bool exists = row < a.rows;
    raw.read(a.q + (exists ? b * a.qs.batch + i * a.qs.token + h * a.qs.head : 0), lane, kLanes, a.d, exists);
    raw.widen(q[r]);
    SIMT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      q[r][e] *= a.scale_log2;
      acc[r][e] = 0.0f;
    }
  }

  // The interval of this lane's row, and the union over the tile's rows, which is the same in every warp.
  const Interval own = interval_of(a, b, tile * kRows + mine, first, last);
  int begin = static_cast<int>(own.lo < own.hi ? own.lo : last);
  int end = static_cast<int>(own.lo < own.hi ? own.hi : first);
  SIMT_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) {
    begin = min(begin, __shfl_xor_sync(kAllLanes, begin, step));
    end = max(end, __shfl_xor_sync(kAllLanes, end, step));
  }

  float top = kLowest, total = 0.0f;
  Global<const T> keys = a.k + b * a.ks.batch + head * a.ks.head;
  Global<const T> values = a.v + b * a.vs.batch + head * a.vs.head;
  // Steps begin at multiples of kStep, so that the lanes that add up a key follow from its index alone, not from the
  // intervals of the other rows.
  for (int64_t start = begin / kStep * kStep; start < end; start += kStep) {
    // Load: all keys and values of the step, before any of them is used.
    Raw<T> key[kUnroll], value[kUnroll];
    SIMT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = start + u * kGroups + key_group;
      key[u].read(keys + j * a.ks.token, lane, kLanes, a.d, j >= begin && j < end);
    }
    SIMT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = start + u * kGroups + key_group;
      value[u].read(values + j * a.vs.token, lane, kLanes, a.d, j >= begin && j < end);
    }
    // Scores: each lane multiplies its elements; the exchange leaves it with the score of its own row.
    float weight[kUnroll], higher = top;
    SIMT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      float x[kEach], sums[kRows];
      key[u].widen(x);
      SIMT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sums[r] = 0.0f;
        SIMT_UNROLL
        for (int e = 0; e < kEach; ++e) sums[r] += q[r][e] * x[e];
      }
      const int64_t j = start + u * kGroups + key_group;
      weight[u] = scatter_sum<kRows, kLanes>(sums, lane);
      if (j >= own.lo && j < own.hi) higher = fmaxf(higher, weight[u]);  // ignores NaN, which stays in the weight
    }
    // Softmax: weights relative to the running maximum.
    const float shrink = exp2f(top - higher);
    const bool moved = __any_sync(kAllLanes, higher != top);
    total *= shrink;
    top = higher;
    SIMT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = start + u * kGroups + key_group;
      const bool seen = j >= own.lo && j < own.hi;
      weight[u] = seen ? exp2f(weight[u] - top) : kHidden;
      total += seen ? weight[u] : 0.0f;
    }
    // Accumulate: rescale the sums if a maximum of the warp has moved, then add the weighted values.
    if (moved) {  // the same for the whole warp
      SIMT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float factor = __shfl_sync(kAllLanes, shrink, r * kPerRow, kLanes);
        SIMT_UNROLL
        for (int e = 0; e < kEach; ++e) acc[r][e] *= factor;
      }
    }
    SIMT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      float x[kEach];
      value[u].widen(x);
      SIMT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float w = __shfl_sync(kAllLanes, weight[u], r * kPerRow, kLanes);
        if (!(w < 0.0f)) {  // a weight of 0 would not do: a hidden value may be NaN
          SIMT_UNROLL
          for (int e = 0; e < kEach; ++e) acc[r][e] += w * x[e];
        }
      }
    }
  }

  // Combine the block: one maximum per row, then the sums relative to it, over the groups of a warp and the warps in
  // order.
  float common = top;
  SIMT_UNROLL
  for (int step = kLanes; step < kWarpSize; step *= 2) common = fmaxf(common, __shfl_xor_sync(kAllLanes, common, step));
  const bool writes = threadIdx.x % kWarpSize < kLanes;  // the first lane group writes for its warp
  if (writes && lane % kPerRow == 0) warp_max[warp * kRows + mine] = common;
  __syncthreads();
  SIMT_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const float other = warp_max[w * kRows + mine];
    common = fmaxf(common, other);
  }
  const float shrink = exp2f(top - common);
  total *= shrink;
  SIMT_UNROLL
  for (int step = kLanes; step < kWarpSize; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
  if (writes && lane % kPerRow == 0) warp_total[warp * kRows + mine] = total;
  SIMT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float factor = __shfl_sync(kAllLanes, shrink, r * kPerRow, kLanes);
    SIMT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      acc[r][e] *= factor;
      SIMT_UNROLL
      for (int step = kLanes; step < kWarpSize; step *= 2) acc[r][e] += __shfl_xor_sync(kAllLanes, acc[r][e], step);
    }
    SIMT_UNROLL
    for (int e = 0; e < kEach; e += 4) {
      constexpr int kPack = simt::kPack<T>;
      const int column = (e / kPack * kLanes + lane) * kPack + e % kPack;
      if (writes && column < a.d) {
        simt::store(warp_acc + (warp * kRows + r) * a.d + column,
                    float4{acc[r][e], acc[r][e + 1], acc[r][e + 2], acc[r][e + 3]});
      }
    }
  }
  // The row's maximum goes through shared memory, because the threads that store the row are in other groups.
  if (warp == 0 && writes && lane % kPerRow == 0) row_max[mine] = common;
  __syncthreads();

  // Store: the output if there is one split, else the split's sums for combine_kernel.
  const int quarters = a.d / 4;
  for (int index = threadIdx.x; index < kRows * quarters; index += kThreads) {
    const int r = index / quarters, column = index % quarters * 4;
    const int row = tile * kRows + r;
    if (row >= a.rows) break;
    const float max = row_max[r];
    float sum = 0.0f;
    float4 columns = {0.0f, 0.0f, 0.0f, 0.0f};
    SIMT_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      const float part = warp_total[w * kRows + r];
      const float4 x = simt::load<float4>(warp_acc + (w * kRows + r) * a.d + column);
      sum += part;
      columns = {columns.x + x.x, columns.y + x.y, columns.z + x.z, columns.w + x.w};
    }
    if (a.splits == 1) {
      finish(a, b, head, row, column, columns, max, sum);
      continue;
    }
    const int64_t place = ((b * a.kv_heads + head) * a.splits + split) * a.rows + row;
    if (column == 0) {
      a.max[place] = max;
      a.total[place] = sum;
    }
    if (sum != 0.0f) simt::store(a.acc + place * a.d + column, columns);  // combine_kernel does not read it otherwise
  }
}

// Combines the splits of a row in order, a block per row: out = sum_s 2^(max_s - max) acc_s / total, where total is the
// same sum of the splits' totals.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(Args<T> a) {
  SIMT_SHARED(float, shares, kMaxSplits);
  SIMT_SHARED(float, maxima, kCombineThreads / kWarpSize);
  const int unit = static_cast<int>(blockIdx.x) / a.rows, row = static_cast<int>(blockIdx.x) % a.rows;
  const int64_t at = int64_t(unit) * a.splits * a.rows + row;  // split s: at + s rows
  const int splits = a.splits, lane = threadIdx.x % kWarpSize;
  // Softmax: the maximum over the splits, then each split's factor.
  float top = kLowest;
  for (int s = threadIdx.x; s < splits; s += kCombineThreads) {
    const float max = a.max[at + int64_t(s) * a.rows];
    top = fmaxf(top, max);
  }
  SIMT_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
  if (lane == 0) maxima[threadIdx.x / kWarpSize] = top;
  __syncthreads();
  SIMT_UNROLL
  for (int w = 0; w < kCombineThreads / kWarpSize; ++w) {
    const float other = maxima[w];
    top = fmaxf(top, other);
  }
  for (int s = threadIdx.x; s < splits; s += kCombineThreads) {
    const float max = a.max[at + int64_t(s) * a.rows];
    shares[s] = exp2f(max - top);
  }
  __syncthreads();
  // Accumulate and store: four columns per thread.
  const int column = threadIdx.x * 4;
  if (column >= a.d) return;
  float total = 0.0f;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int s = 0; s < splits; ++s) {
    const int64_t place = at + int64_t(s) * a.rows;
    const float part = a.total[place];
    if (part == 0.0f) continue;  // the row sees no key of this split, whose acc is unwritten; a NaN stays
    const float share = shares[s];
    const float4 x = simt::load<float4>(a.acc + place * a.d + column);
    total += share * part;
    sum = {sum.x + share * x.x, sum.y + share * x.y, sum.z + share * x.z, sum.w + share * x.w};
  }
  finish(a, unit / a.kv_heads, unit % a.kv_heads, row, column, sum, top, total);
}

// The launch of a shape. `floats` is the memory that the caller must allocate for acc, max and total together.
struct Plan {
  int tile_rows, lanes;
  int64_t tiles, splits, split_keys, units, shared, floats;
};

// Plans the launch from the shape, the element size and the number of multiprocessors alone, so that repeated calls
// give the same bits. It splits the keys until every multiprocessor has kBusy blocks, but no split is shorter than two
// steps.
inline Plan plan(
    int64_t batch, int64_t m, int64_t heads, int64_t kv_heads, int64_t n, int64_t d, int64_t element,
    int64_t processors) {
  constexpr int64_t kBusy = 4, kLeastSteps = 2;
  const int64_t rows = m * (heads / kv_heads);
  Plan p = {};
  p.tile_rows = rows == 1 ? 1 : rows <= 4 ? 4 : 8;
  p.lanes = d <= 64 ? 8 : d <= 128 ? 16 : 32;
  p.tiles = simt::ceil_div(rows, p.tile_rows);
  p.units = batch * kv_heads;
  const int64_t step = step_keys(p.lanes, element == 4 && p.tile_rows > 1 ? kUnrolled<float, 8> : kUnrolled<float, 1>);
  const int64_t wanted = simt::ceil_div(kBusy * processors, p.units * p.tiles > 0 ? p.units * p.tiles : 1);
  int64_t most = simt::ceil_div(n, kLeastSteps * step);
  most = most > kMaxSplits ? kMaxSplits : most < 1 ? 1 : most;
  const int64_t splits = wanted < most ? wanted : most;
  p.split_keys = simt::ceil_div(simt::ceil_div(n, splits), step) * step;
  if (p.split_keys < step) p.split_keys = step;
  p.splits = n > 0 ? simt::ceil_div(n, p.split_keys) : 1;
  const int64_t per_row = kWarps * p.tile_rows;
  p.shared = simt::SharedBytes().add<float>(per_row).add<float>(per_row).add<float>(p.tile_rows).add<float>(per_row * d)
                 .total();
  p.floats = p.splits > 1 ? p.units * p.splits * rows * (d + 2) : 0;
  return p;
}

template <class T, int kRows, int kLanes>
const char* launch_decode(const Args<T>& a, const Plan& p, simt::Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.units * p.splits * p.tiles));
  return SIMT_LAUNCH((decode_kernel<T, kRows, kLanes>), grid, kThreads, p.shared, stream, a);
}

template <class T, int kRows>
const char* launch_rows(const Args<T>& a, const Plan& p, simt::Stream stream) {
  if (p.lanes == 8) return launch_decode<T, kRows, 8>(a, p, stream);
  if (p.lanes == 16) return launch_decode<T, kRows, 16>(a, p, stream);
  return launch_decode<T, kRows, 32>(a, p, stream);
}

// Fills the arguments that follow from the plan. acc, max and total are cut out of `floats`, which is 16-byte aligned,
// and null where Plan::floats is 0.
template <class T>
void apply(Args<T>& a, const Plan& p, Global<float> floats) {
  a.group = a.heads / a.kv_heads;
  a.rows = a.m * a.group;
  a.tiles = static_cast<int>(p.tiles);
  a.splits = static_cast<int>(p.splits);
  a.split_keys = p.split_keys;
  if (p.splits == 1) return;
  const int64_t places = p.units * p.splits * a.rows;
  a.acc = floats;
  a.max = floats + places * a.d;
  a.total = a.max + places;
}

// Launches the kernels; requires B, M > 0. Returns nullptr or an error message.
template <class T>
const char* launch(const Args<T>& a, const Plan& p, simt::Stream stream) {
  const char* problem = nullptr;
  if (p.tile_rows == 1) problem = launch_rows<T, 1>(a, p, stream);
  else if (p.tile_rows == 4) problem = launch_rows<T, 4>(a, p, stream);
  else problem = launch_rows<T, 8>(a, p, stream);
  if (problem || p.splits == 1) return problem;
  const dim3 grid(static_cast<unsigned>(p.units * a.rows));
  return SIMT_LAUNCH((combine_kernel<T>), grid, kCombineThreads, 0, stream, a);
}

}  // namespace calm_fast::cross_attention
