// Resampled maj_at_k on a GPU: a block draws many subsets of one question, and a thread one subset at a time.
//
// The draws are Philox4x32-10 of (draw / 4, resample, question, 0) under the seed. They drive a partial Fisher-Yates
// shuffle of the question's valid samples, so the subsets depend on those numbers alone and are the same on every
// device (calm_fast/_ops/maj_at_k/reference.py). One shuffle serves every k. Credits are added in a fixed order,
// without atomics. No torch headers: the CPU emulation compiles this file too.
#pragma once

#include <type_traits>

#include "common/simt.cuh"
#include "common/tie.h"

namespace calm_fast::maj_at_k {

using simt::Global;
using simt::Shared;

constexpr int kSizes = 64;      // values of k that one launch serves
constexpr int kMostThreads = 128;
constexpr int64_t kBusyBlocks = 1056;    // 8 blocks on each of an H200's 132 multiprocessors
constexpr int64_t kScratchBlocks = 264;  // blocks of a launch whose samples do not fit into shared memory

// The values of k that one launch serves.
struct Sizes {
  int size[kSizes];     // ascending
  int column[kSizes];   // the column of credit for each size
  int used;
};

struct Args {
  Global<const int64_t> answers;  // (Q, K), negative: does not vote
  Global<const int64_t> correct;  // (Q,)
  Global<const float> scores32;   // (Q, K), NaN: unscored; both null: every sample weighs 1
  Global<const double> scores64;
  Global<const bool> valid;       // (Q, K), or null: all vote
  Global<double> credit;          // (Q, columns)
  Global<double> partial;         // (Q, chunks, sizes.used); null with one chunk
  Global<unsigned char> scratch;  // Plan::scratch bytes
  int64_t questions, columns, resamples, chunk, chunks;
  int samples;
  bool adaptive;  // a sample weighs 1 + lam s, else s
  double lam;
  uint32_t key[2];  // the seed
  Sizes sizes;
};

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
SIMT_HOST_DEVICE Words philox(uint32_t key0, uint32_t key1, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * x0, p1 = uint64_t(0xCD9E8D57u) * x2;
    x0 = uint32_t(p1 >> 32) ^ x1 ^ key0;
    x1 = uint32_t(p1);
    x2 = uint32_t(p0 >> 32) ^ x3 ^ key1;
    x3 = uint32_t(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

// The weight of a class without samples in the subset: 0 for a count, minus infinity for a float64 sum.
template <class Sum>
SIMT_HOST_DEVICE Sum no_sample() {
  if constexpr (std::is_same_v<Sum, double>) {
    return -HUGE_VAL;
  } else {
    return 0;
  }
}

template <class Sum>
SIMT_HOST_DEVICE Sum added(Sum sum, double weight) {
  if constexpr (std::is_same_v<Sum, double>) {
    return (sum == no_sample<Sum>() ? 0.0 : sum) + weight;
  } else {
    return static_cast<Sum>(sum + 1);
  }
}

template <class Sum>
SIMT_HOST_DEVICE bool is_tied(Sum top, Sum sum) {
  if constexpr (std::is_same_v<Sum, double>) {
    return sum >= tie_limit(top);  // false for an absent class
  } else {
    return sum == top && sum > 0;
  }
}

// Returns 1 / ties if class `right` is tied at the top of sums[c * stride], else 0. right = -1: no sample has the gold
// answer.
template <class Sum>
__device__ __forceinline__ double tie_credit(Shared<const Sum> sums, int classes, int stride, int right) {
  if (right < 0) return 0.0;
  Sum top = sums[0];
  for (int c = 1; c < classes; ++c) {
    const Sum other = sums[int64_t(c) * stride];
    top = other > top ? other : top;
  }
  if (!is_tied<Sum>(top, sums[int64_t(right) * stride])) return 0.0;
  int ties = 0;
  for (int c = 0; c < classes; ++c) ties += is_tied<Sum>(top, sums[int64_t(c) * stride]);
  return 1.0 / ties;
}

// The arrays of one block, in shared memory or, where that is too small, in scratch.
template <class Index, class Sum>
struct Workspace {
  Shared<int64_t> answers;  // (K,), -1: does not vote
  Shared<double> weights;   // (K,) of the valid samples; unused with counts
  Shared<Index> opener;     // (K,) first sample with the same answer
  Shared<Index> classes;    // (K,) class of each valid sample, numbered in order of appearance
  Shared<Sum> sums;         // (K, threads)
  Shared<Index> order;      // (K, threads) the shuffled samples
};

// Returns the bytes of the arrays that `cut` takes.
template <class Index, class Sum>
SIMT_HOST_DEVICE int64_t workspace_bytes(int64_t samples, int64_t threads) {
  return simt::SharedBytes()
      .add<int64_t>(samples)
      .template add<double>(std::is_same_v<Sum, double> ? samples : 0)
      .template add<Index>(samples)
      .template add<Index>(samples)
      .template add<Sum>(samples * threads)
      .template add<Index>(samples * threads)
      .total();
}

template <class Index, class Sum, class Pool>
__device__ __forceinline__ Workspace<Index, Sum> cut(Pool& pool, int64_t samples, int64_t threads) {
  Workspace<Index, Sum> w;
  w.answers = pool.template take<int64_t>(samples, "answers");
  w.weights = pool.template take<double>(std::is_same_v<Sum, double> ? samples : 0, "weights");
  w.opener = pool.template take<Index>(samples, "opener");
  w.classes = pool.template take<Index>(samples, "classes");
  w.sums = pool.template take<Sum>(samples * threads, "sums");
  w.order = pool.template take<Index>(samples * threads, "order");
  return w;
}

// Adds up the credits of one question and one chunk of resamples. kShared: the workspace is in shared memory, otherwise
// in a.scratch.
template <class Index, class Sum, bool kShared>
__global__ void __launch_bounds__(kMostThreads, 1) resample_kernel(Args a) {
  constexpr bool kWeighted = std::is_same_v<Sum, double>;
  const int k = a.samples, t = threadIdx.x, threads = blockDim.x;
  const int lane = t % simt::kWarpSize, warp = t / simt::kWarpSize, warps = threads / simt::kWarpSize;
  simt::SharedPool pool;
  Shared<double> mean_cell = pool.take<double>(1, "mean_cell");
  Shared<int> cells = pool.take<int>(3, "cells");  // valid samples, classes, class of the gold answer
  Shared<double> earned = pool.take<double>(warps * kSizes, "earned");
  Workspace<Index, Sum> w;
  if constexpr (kShared) {
    w = cut<Index, Sum>(pool, k, threads);
  } else {
    simt::ScratchPool scratch(a.scratch + blockIdx.x * workspace_bytes<Index, Sum>(k, threads));
    w = cut<Index, Sum>(scratch, k, threads);
  }

  const auto score = [&](int64_t at) -> double {
    if (a.scores32) return a.scores32[at];
    return a.scores64[at];
  };

  for (int64_t item = blockIdx.x; item < a.questions * a.chunks; item += gridDim.x) {
    // Load: the answers, -1 for samples that do not vote.
    const int64_t q = item / a.chunks, chunk = item % a.chunks;
    for (int i = t; i < k; i += threads) {
      const int64_t answer = a.answers[q * k + i];
      w.answers[i] = answer >= 0 && (!a.valid || a.valid[q * k + i]) ? answer : -1;
    }
    for (int i = t; i < warps * kSizes; i += threads) earned[i] = 0.0;
    if (t == 0) cells[2] = -1;
    __syncthreads();

    // Classes: the mean score for unscored samples, and the first sample with each answer.
    if constexpr (kWeighted) {
      if (t == 0) {
        double sum = 0;
        int known = 0;
        for (int i = 0; i < k; ++i) {
          const double s = score(q * k + i);
          if (w.answers[i] >= 0 && s == s) {
            sum += s;
            ++known;
          }
        }
        *mean_cell = known ? sum / known : 1.0;
      }
    }
    for (int i = t; i < k; i += threads) {
      const int64_t mine = w.answers[i];
      int first = i;
      for (int j = 0; j < first && mine >= 0; ++j) {
        if (w.answers[j] == mine) first = j;
      }
      w.opener[i] = static_cast<Index>(first);
    }
    __syncthreads();

    // Class and weight of each valid sample; i == k counts them.
    for (int i = t; i <= k; i += threads) {
      const int first = i < k ? int(w.opener[i]) : k;
      int place = 0, number = 0;
      for (int j = 0; j < i; ++j) {
        const bool votes = w.answers[j] >= 0;
        place += votes;
        number += votes && j < first && w.opener[j] == j;
      }
      if (i == k) {
        cells[0] = place;
        cells[1] = number;
      } else if (w.answers[i] >= 0) {
        w.classes[place] = static_cast<Index>(number);
        if (first == i && w.answers[i] == a.correct[q]) cells[2] = number;
        if constexpr (kWeighted) {
          double s = score(q * k + i);
          if (s != s) s = *mean_cell;
          // The product is rounded by itself: a fused multiply-add would give other bits than the definition.
          w.weights[place] = a.adaptive ? __dadd_rn(1.0, __dmul_rn(a.lam, s)) : s;
        }
      }
    }
    __syncthreads();

    const int n = cells[0], classes = cells[1], right = cells[2];
    int sampled = 0, draws = 0;  // sizes below n, and the largest of them
    while (sampled < a.sizes.used && a.sizes.size[sampled] < n) draws = a.sizes.size[sampled++];
    Shared<Sum> sums = w.sums + t;
    Shared<Index> order = w.order + t;
    const auto weight_of = [&](int i) -> double {
      if constexpr (kWeighted) return w.weights[i];
      return 1.0;
    };

    // Draw and accumulate: one resample per thread, whose class sums grow draw by draw; at each size its credit is
    // added over the warp.
    const int64_t begin = chunk * a.chunk;
    const int64_t end = begin + a.chunk < a.resamples ? begin + a.chunk : a.resamples;
    for (int64_t base = begin + warp * simt::kWarpSize; base < end && draws; base += threads) {
      const bool active = base + lane < end;  // all lanes take part in the sums over the warp
      for (int i = 0; i < n; ++i) order[int64_t(i) * threads] = static_cast<Index>(i);
      for (int c = 0; c < classes; ++c) sums[int64_t(c) * threads] = no_sample<Sum>();
      Words words = {};
      int at = 0;
      for (int i = 0; i < draws; ++i) {
        if (i % 4 == 0) words = philox(a.key[0], a.key[1], i / 4, uint32_t(base + lane), uint32_t(q), 0);
        const uint32_t u =
            i % 4 == 0 ? words.word[0] : i % 4 == 1 ? words.word[1] : i % 4 == 2 ? words.word[2] : words.word[3];
        const int j = i + static_cast<int>(__umulhi(u, static_cast<uint32_t>(n - i)));
        const Index drawn = order[int64_t(j) * threads];
        order[int64_t(j) * threads] = Index(order[int64_t(i) * threads]);
        const int c = int(w.classes[drawn]);
        sums[int64_t(c) * threads] = added<Sum>(sums[int64_t(c) * threads], weight_of(drawn));
        for (; at < sampled && a.sizes.size[at] == i + 1; ++at) {
          double credit = active ? tie_credit<Sum>(sums, classes, threads, right) : 0.0;
          for (int step = simt::kWarpSize / 2; step > 0; step /= 2) {
            credit += __shfl_xor_sync(simt::kAllLanes, credit, step);
          }
          if (lane == 0) earned[warp * kSizes + at] += credit;
        }
      }
    }

    double whole = 0.0;  // credit of all valid samples together, for every k >= n
    if (t == 0 && n > 0) {
      for (int c = 0; c < classes; ++c) sums[int64_t(c) * threads] = no_sample<Sum>();
      for (int i = 0; i < n; ++i) {
        const int c = int(w.classes[i]);
        sums[int64_t(c) * threads] = added<Sum>(sums[int64_t(c) * threads], weight_of(i));
      }
      whole = tie_credit<Sum>(sums, classes, threads, right);
    }
    // Store: the sums of the warps, in order.
    __syncthreads();
    if (t == 0) {
      for (int at = 0; at < a.sizes.used; ++at) {
        double sum = 0;
        for (int i = 0; i < warps; ++i) sum += earned[i * kSizes + at];
        const int64_t column = q * a.columns + a.sizes.column[at];
        if (a.chunks > 1) a.partial[item * a.sizes.used + at] = at < sampled ? sum : NAN;
        if (at >= sampled && chunk == 0) a.credit[column] = whole;
        if (at < sampled && a.chunks == 1) a.credit[column] = sum / static_cast<double>(a.resamples);
      }
    }
    __syncthreads();  // before the next question overwrites the sums that thread 0 reads
  }
}

// Adds up the chunks of a question, in order. NaN marks a credit that resample_kernel has written.
__global__ void __launch_bounds__(kMostThreads, 1) combine_kernel(Args a) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= a.questions * a.sizes.used) return;
  const int64_t q = at / a.sizes.used, size = at % a.sizes.used;
  double sum = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) sum += a.partial[(q * a.chunks + chunk) * a.sizes.used + size];
  if (sum == sum) a.credit[q * a.columns + a.sizes.column[size]] = sum / static_cast<double>(a.resamples);
}

struct Plan {
  int threads;
  bool shared_memory;
  int64_t grid, shared, scratch, chunk, chunks;  // scratch: bytes
};

// Plans the launch. The caller must allocate scratch and partial.
inline Plan plan(int64_t questions, int64_t samples, int64_t resamples, bool is_weighted) {
  const auto fixed = [](int threads) {
    return simt::SharedBytes().add<double>(1).add<int>(3).add<double>(threads / simt::kWarpSize * kSizes).total();
  };
  Plan p = {kMostThreads, true, 0, 0, 0, resamples, 1};
  for (;; p.threads /= 2) {
    p.shared = fixed(p.threads) + (is_weighted ? workspace_bytes<uint16_t, double>(samples, p.threads)
                                               : workspace_bytes<uint16_t, uint16_t>(samples, p.threads));
    if (p.shared <= simt::kSharedLimit || p.threads == simt::kWarpSize) break;
  }
  const int64_t most = simt::ceil_div(resamples, p.threads), wanted = simt::ceil_div(kBusyBlocks, questions);
  p.chunks = wanted < most ? wanted : most;
  p.chunk = simt::ceil_div(simt::ceil_div(resamples, p.chunks), p.threads) * p.threads;
  p.chunks = simt::ceil_div(resamples, p.chunk);
  p.grid = questions * p.chunks < 0x7fffffff ? questions * p.chunks : 0x7fffffff;
  if (p.shared > simt::kSharedLimit) {
    p.shared_memory = false;
    p.shared = fixed(p.threads);
    p.grid = p.grid < kScratchBlocks ? p.grid : kScratchBlocks;
    p.scratch = p.grid * (is_weighted ? workspace_bytes<int32_t, double>(samples, p.threads)
                                      : workspace_bytes<int32_t, int32_t>(samples, p.threads));
  }
  return p;
}

// Launches the kernels; requires Q > 0 and K > 0. Returns nullptr or an error message.
inline const char* launch(const Args& a, const Plan& p, simt::Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.grid));
  const bool scored = a.scores32 || a.scores64;
  const char* problem = nullptr;
  if (p.shared_memory && scored) {
    problem = SIMT_LAUNCH((resample_kernel<uint16_t, double, true>), grid, p.threads, p.shared, stream, a);
  } else if (p.shared_memory) {
    problem = SIMT_LAUNCH((resample_kernel<uint16_t, uint16_t, true>), grid, p.threads, p.shared, stream, a);
  } else if (scored) {
    problem = SIMT_LAUNCH((resample_kernel<int32_t, double, false>), grid, p.threads, p.shared, stream, a);
  } else {
    problem = SIMT_LAUNCH((resample_kernel<int32_t, int32_t, false>), grid, p.threads, p.shared, stream, a);
  }
  if (problem || a.chunks == 1) return problem;
  const dim3 rest(static_cast<unsigned>(simt::ceil_div(a.questions * a.sizes.used, kMostThreads)));
  return SIMT_LAUNCH(combine_kernel, rest, kMostThreads, 0, stream, a);
}

}  // namespace calm_fast::maj_at_k
