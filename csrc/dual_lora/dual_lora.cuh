// dual_lora for few tokens on a GPU: everything after the products with down and C1, in one launch.
//
// A block takes up to eight tokens and some columns of the output. It first computes the gate of its tokens and the mix
// into shared memory: the weighted z of the paper's form (R numbers per token) or the weighted sum of two gelus of the
// released form (m numbers per token). It then computes its columns of y + mix last^T, where `last` is `up` or C2.
// Every block repeats the first part, which costs less than a second launch. Where m is large, `mix_kernel` computes
// the mix once and torch does the product. Everything is float32, rounded once at the end. No torch headers: the CPU
// emulation compiles this file too.
#pragma once

#include "common/packed.cuh"
#include "dual_lora/gate.h"

namespace calm_fast::dual_lora {

using simt::Global;
using simt::kAllLanes;
using simt::kWarpSize;
using simt::Shared;

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
constexpr int kTile = 8;      // tokens of a block
constexpr int kEach = 8;      // elements of a weight row that a thread reads at a time
constexpr int kLanes = 4;     // threads that share a column of the output
constexpr int kColumns = kThreads / kLanes;  // columns that a block computes at a time
constexpr int kMaxTokens = 64, kMaxRank = 1024;
constexpr int kMaxFused = 512;  // hidden units (m) up to which every block computes the mix itself

template <class T>
struct Args {
  Global<const T> zg;    // (T, 2 R)
  Global<const T> u;     // (T, m) = y C1^T; null in the paper's form
  Global<const T> up;    // (m, R); null in the paper's form, where `last` is up
  Global<const T> last;  // (N, inner): C2 (N, m), or up (N, R) in the paper's form
  Global<const T> y;     // (T, N)
  Global<T> out;         // (T, N), or the mix (T, m) of mix_kernel
  int tokens, r, r_pos, hidden, inner, n;
  int block_columns;     // of the output, a multiple of kColumns
};

// Reads elements at .. at + 8 of a row of `width` elements, with zeros beyond its end. kWide: width is a multiple of 8
// and rows are 16-byte aligned.
template <class T, bool kWide>
__device__ __forceinline__ void read_each(Global<const T> row, int at, int width, float (&to)[kEach]) {
  if constexpr (kWide) {
    SIMT_UNROLL
    for (int e = 0; e < kEach; e += simt::kPack<T>) simt::unpack<T>(simt::load<uint4>(row + at + e), to + e);
  } else {
    SIMT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      to[e] = 0.0f;
      if (at + e < width) {
        const T x = row[at + e];
        to[e] = simt::to_float(x);
      }
    }
  }
}

// The exact gelu. erfc keeps the relative precision of small results, which 1 + erf loses.
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(-0.70710678f * x); }

// Computes the gate, one warp per token: a_neg = tanh(z . g / 2) / 2, then give(t, i, z_i, a_neg) for each rank i. z is 0
// for tokens beyond the last.
template <class T, class Give>
__device__ __forceinline__ void gate(const Args<T>& a, int first, Give give) {
  const int lane = threadIdx.x % kWarpSize;
  for (int t = threadIdx.x / kWarpSize; t < kTile; t += kWarps) {
    const bool exists = first + t < a.tokens;
    Global<const T> z = a.zg + static_cast<int64_t>(exists ? first + t : 0) * 2 * a.r;
    // Scores: the logit difference, summed over the warp.
    float logit = 0.0f;
    for (int i = lane; i < a.r; i += kWarpSize) {
      const T own = z[i], gate = z[a.r + i];
      logit += simt::to_float(own) * simt::to_float(gate);
    }
    SIMT_UNROLL
    for (int step = kWarpSize / 2; step > 0; step /= 2) logit += __shfl_xor_sync(kAllLanes, logit, step);
    // Softmax over the two, then store through `give`.
    const float a_neg = negative_weight(logit);
    for (int i = lane; i < a.r; i += kWarpSize) {
      const T own = z[i];
      give(t, i, exists ? simt::to_float(own) : 0.0f, a_neg);
    }
  }
}

// Computes the mix of hidden unit h for all tokens of the tile.
template <class T, bool kWide>
__device__ __forceinline__ void mix_unit(
    const Args<T>& a, int first, int h, Shared<const float> z, Shared<const float> a_negs, float (&mix)[kTile]) {
  // Load: u, where both sums start.
  float pos[kTile], neg[kTile];
  SIMT_UNROLL
  for (int t = 0; t < kTile; ++t) {
    pos[t] = 0.0f;
    if (first + t < a.tokens) {
      const T u = a.u[static_cast<int64_t>(first + t) * a.hidden + h];
      pos[t] = simt::to_float(u);
    }
    neg[t] = pos[t];
  }
  // Accumulate: the rank updates of both LoRAs.
  Global<const T> up = a.up + static_cast<int64_t>(h) * a.r;
  for (int i = 0; i < a.r; i += kEach) {
    float w[kEach];
    read_each<T, kWide>(up, i, a.r, w);
    SIMT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      if (i + e >= a.r) break;
      const float4 low = simt::load<float4>(z + (i + e) * kTile), high = simt::load<float4>(z + (i + e) * kTile + 4);
      const float each[kTile] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      SIMT_UNROLL
      for (int t = 0; t < kTile; ++t) {
        if (i + e < a.r_pos) pos[t] += each[t] * w[e];  // the branch is the same for every thread
        else neg[t] += each[t] * w[e];
      }
    }
  }
  // Epilogue: the gate's weighted sum of the two gelus.
  SIMT_UNROLL
  for (int t = 0; t < kTile; ++t) {
    const float a_neg = a_negs[t];
    const GateWeights weights = gate_weights(a_neg);
    mix[t] = weights.pos * gelu(pos[t]) + weights.neg * gelu(neg[t]);
  }
}

SIMT_HOST_DEVICE int padded(int inner) { return (inner + kEach - 1) / kEach * kEach; }

// Computes out = y + mix last^T. kGelu: the released form.
template <class T, bool kGelu, bool kWide>
__global__ void __launch_bounds__(kThreads, 4) update_kernel(Args<T> a) {
  const int first = blockIdx.y * kTile, width = padded(a.inner);
  simt::SharedPool pool;
  Shared<float> mix = pool.take<float>(kTile * width, "mix");  // (tokens, width), zeros beyond inner
  // Scores and softmax: the gate, and from it the mix.
  if constexpr (kGelu) {
    Shared<float> z = pool.take<float>(a.r * kTile, "z");  // (R, tokens)
    Shared<float> a_negs = pool.take<float>(kTile, "a_negs");
    gate(a, first, [&](int t, int i, float own, float a_neg) {
      z[i * kTile + t] = own;
      if (i == 0) a_negs[t] = a_neg;
    });
    __syncthreads();
    for (int h = threadIdx.x; h < width; h += kThreads) {
      float values[kTile] = {};
      if (h < a.inner) mix_unit<T, kWide>(a, first, h, z, a_negs, values);
      SIMT_UNROLL
      for (int t = 0; t < kTile; ++t) mix[t * width + h] = values[t];
    }
  } else {
    gate(a, first, [&](int t, int i, float own, float a_neg) {
      mix[t * width + i] = rank_weight(a_neg, i, a.r_pos) * own;
    });
    const int padding = width - a.inner;
    for (int index = threadIdx.x; index < kTile * padding; index += kThreads) {
      mix[index / padding * width + a.inner + index % padding] = 0.0f;
    }
  }
  __syncthreads();

  // Accumulate: kLanes threads share a column, each with every kLanes-th group of kEach elements of the mix.
  const int lane = threadIdx.x % kLanes;
  const int begin = blockIdx.x * a.block_columns, end = begin + a.block_columns < a.n ? begin + a.block_columns : a.n;
  for (int start = begin; start < end; start += kColumns) {
    const int column = start + threadIdx.x / kLanes;
    const bool exists = column < end;
    float acc[kTile] = {};
    Global<const T> row = a.last + static_cast<int64_t>(exists ? column : 0) * a.inner;
    for (int k = lane * kEach; k < a.inner && exists; k += kLanes * kEach) {
      float w[kEach];
      read_each<T, kWide>(row, k, a.inner, w);
      SIMT_UNROLL
      for (int t = 0; t < kTile; ++t) {
        SIMT_UNROLL
        for (int e = 0; e < kEach; e += 4) {
          const float4 x = simt::load<float4>(mix + t * width + k + e);
          acc[t] += w[e] * x.x;
          acc[t] += w[e + 1] * x.y;
          acc[t] += w[e + 2] * x.z;
          acc[t] += w[e + 3] * x.w;
        }
      }
    }
    // Store: add the threads' sums, and let each thread write two of the tokens.
    SIMT_UNROLL
    for (int t = 0; t < kTile; ++t) {
      SIMT_UNROLL
      for (int step = 1; step < kLanes; step *= 2) acc[t] += __shfl_xor_sync(kAllLanes, acc[t], step);
      if (t % kLanes == lane && exists && first + t < a.tokens) {
        const int64_t at = static_cast<int64_t>(first + t) * a.n + column;
        const T y = a.y[at];
        a.out[at] = simt::from_float<T>(simt::to_float(y) + acc[t]);
      }
    }
  }
}

// Computes only the mix (T, m) of the released form.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 4) mix_kernel(Args<T> a) {
  const int first = blockIdx.y * kTile, h = blockIdx.x * kThreads + threadIdx.x;
  simt::SharedPool pool;
  Shared<float> z = pool.take<float>(a.r * kTile, "z");
  Shared<float> a_negs = pool.take<float>(kTile, "a_negs");
  // Scores and softmax: the gate.
  gate(a, first, [&](int t, int i, float own, float a_neg) {
    z[i * kTile + t] = own;
    if (i == 0) a_negs[t] = a_neg;
  });
  __syncthreads();
  // Accumulate and store: a thread per hidden unit.
  if (h >= a.hidden) return;
  float values[kTile];
  mix_unit<T, kWide>(a, first, h, z, a_negs, values);
  SIMT_UNROLL
  for (int t = 0; t < kTile; ++t) {
    if (first + t < a.tokens) a.out[static_cast<int64_t>(first + t) * a.hidden + h] = simt::from_float<T>(values[t]);
  }
}

struct Plan {
  int block_columns;
  int64_t grid_x, grid_y, shared;
};

// Plans the update: the columns per block grow with the tokens, so that there are about two blocks per multiprocessor.
inline Plan plan_update(int64_t tokens, int64_t r, int64_t inner, int64_t n, bool gelu, int64_t processors) {
  Plan p = {};
  p.grid_y = simt::ceil_div(tokens, kTile);
  const int64_t pieces = simt::ceil_div(n, kColumns);
  p.block_columns = static_cast<int>(simt::ceil_div(pieces * p.grid_y, 2 * processors) * kColumns);
  p.grid_x = simt::ceil_div(n, p.block_columns);
  const auto mix = simt::SharedBytes().add<float>(kTile * padded(static_cast<int>(inner)));
  p.shared = (gelu ? mix.add<float>(r * kTile).add<float>(kTile) : mix).total();
  return p;
}

inline Plan plan_mix(int64_t tokens, int64_t r, int64_t hidden) {
  Plan p = {};
  p.grid_y = simt::ceil_div(tokens, kTile);
  p.grid_x = simt::ceil_div(hidden, kThreads);
  p.shared = simt::SharedBytes().add<float>(r * kTile).add<float>(kTile).total();
  return p;
}

// Both launch functions require T, N (or m) and R > 0 and return nullptr or an error message. `wide`: R, m and the
// rows' addresses allow 16-byte loads.
template <class T>
const char* launch_update(Args<T> a, const Plan& p, bool wide, simt::Stream stream) {
  a.block_columns = p.block_columns;
  const dim3 grid(static_cast<unsigned>(p.grid_x), static_cast<unsigned>(p.grid_y));
  if (a.u) {
    if (wide) return SIMT_LAUNCH((update_kernel<T, true, true>), grid, kThreads, p.shared, stream, a);
    return SIMT_LAUNCH((update_kernel<T, true, false>), grid, kThreads, p.shared, stream, a);
  }
  if (wide) return SIMT_LAUNCH((update_kernel<T, false, true>), grid, kThreads, p.shared, stream, a);
  return SIMT_LAUNCH((update_kernel<T, false, false>), grid, kThreads, p.shared, stream, a);
}

template <class T>
const char* launch_mix(const Args<T>& a, const Plan& p, bool wide, simt::Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.grid_x), static_cast<unsigned>(p.grid_y));
  if (wide) return SIMT_LAUNCH((mix_kernel<T, true>), grid, kThreads, p.shared, stream, a);
  return SIMT_LAUNCH((mix_kernel<T, false>), grid, kThreads, p.shared, stream, a);
}

}  // namespace calm_fast::dual_lora
