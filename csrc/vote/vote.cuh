// vote on a GPU: a group of threads per question, which is a warp for few samples and a block for many.
//
// Each thread takes samples i and compares each with all samples j in order. If an earlier sample has the same answer,
// i opens no class. Otherwise the weights of the samples with i's answer, added in order, are the weight of its class.
// No atomics are involved, so the bits are those of the definition (calm_fast/_ops/vote/reference.py). That takes K^2 /
// 2 comparisons, which is cheap for tens to thousands of samples. No torch headers: the CPU emulation compiles this
// file too.
#pragma once

#include "common/simt.cuh"
#include "common/tie.h"

namespace calm_fast::vote {

using simt::Global;
using simt::Shared;

constexpr int kWarpsPerBlock = 4;
constexpr int kBlockThreads = 256;
constexpr int64_t kWarpSamples = 256;    // samples up to which a warp takes a question
constexpr int64_t kScratchBlocks = 512;  // blocks of a launch whose samples do not fit into shared memory

struct Args {
  Global<const int64_t> answers;  // (Q, K), negative: does not vote
  Global<const float> scores32;   // (Q, K), NaN: unscored; both null: every sample weighs 1
  Global<const double> scores64;
  Global<const bool> valid;       // (Q, K), or null: all vote
  Global<double> scratch;         // Plan::scratch doubles, null if that is 0
  Global<int64_t> winner;         // (Q,), as are the following
  Global<double> weight, total, margin;
  Global<int64_t> ties;
  int64_t questions, samples;
  bool adaptive;  // a sample weighs 1 + lam s, else s
  double lam;
};

SIMT_HOST_DEVICE double minus_infinity() { return -HUGE_VAL; }

template <int kThreads>
__device__ __forceinline__ void sync_group() {
  if constexpr (kThreads == simt::kWarpSize) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The two largest class weights.
struct Best {
  double top, second;
};

SIMT_HOST_DEVICE Best merge(Best a, Best b) {
  const double low = a.top < b.top ? a.top : b.top, high = a.top < b.top ? b.top : a.top;
  const double second = a.second < b.second ? b.second : a.second;
  return {high, low < second ? second : low};
}

// Reduces `value` over the group; every thread gets the result. `cells` has one T per warp. A barrier must precede
// their next use.
template <int kThreads, class T, class Merge>
__device__ __forceinline__ T reduce(T value, Shared<T> cells, Merge merge_two) {
  for (int step = simt::kWarpSize / 2; step > 0; step /= 2) value = merge_two(value, step);
  if constexpr (kThreads > simt::kWarpSize) {
    const int warp = threadIdx.x / simt::kWarpSize, lane = threadIdx.x % simt::kWarpSize;
    if (lane == 0) cells[warp] = value;
    __syncthreads();
    value = cells[lane % (kThreads / simt::kWarpSize)];
    for (int step = kThreads / simt::kWarpSize / 2; step > 0; step /= 2) value = merge_two(value, step);
  }
  return value;
}

struct MergeBest {
  __device__ Best operator()(Best mine, int step) const {
    const Best other = {__shfl_xor_sync(simt::kAllLanes, mine.top, step),
                        __shfl_xor_sync(simt::kAllLanes, mine.second, step)};
    return merge(mine, other);
  }
};

// The number of tied classes and the sample that opens the first of them.
struct Tied {
  int64_t count, first;
};

struct MergeTied {
  __device__ Tied operator()(Tied mine, int step) const {
    const int64_t count = __shfl_xor_sync(simt::kAllLanes, mine.count, step);
    const int64_t first = __shfl_xor_sync(simt::kAllLanes, mine.first, step);
    return {mine.count + count, mine.first < first ? mine.first : first};
  }
};

// Votes on one question per group. kThreads: threads of a group. kStaged: the samples fit into shared memory; otherwise
// weights and sums are in scratch.
template <int kThreads, bool kStaged>
__global__ void __launch_bounds__(kThreads == simt::kWarpSize ? kWarpsPerBlock * simt::kWarpSize : kThreads, 2)
    vote_kernel(Args a) {
  constexpr int kGroups = kThreads == simt::kWarpSize ? kWarpsPerBlock : 1;
  constexpr int kCells = kThreads / simt::kWarpSize;
  const int64_t n = a.samples;
  const int group = threadIdx.x / kThreads, me = threadIdx.x % kThreads;
  simt::SharedPool pool;
  Shared<Best> best_cells = pool.take<Best>(kGroups * kCells, "best_cells") + group * kCells;
  Shared<Tied> tied_cells = pool.take<Tied>(kGroups * kCells, "tied_cells") + group * kCells;
  Shared<double> mean_cell = pool.take<double>(kGroups, "mean_cell") + group;
  Shared<int64_t> staged = nullptr;
  Global<double> weights = nullptr, sums = nullptr;
  const bool scored = a.scores32 || a.scores64;
  if constexpr (kStaged) {
    staged = pool.take<int64_t>(kGroups * n, "answers") + group * n;
    sums = pool.take<double>(kGroups * (n + 1), "sums") + group * (n + 1);
    if (scored) weights = pool.take<double>(kGroups * n, "weights") + group * n;
  } else {
    sums = a.scratch + blockIdx.x * (2 * n + 1);
    weights = sums + (n + 1);
  }

  for (int64_t q = int64_t(blockIdx.x) * kGroups + group; q < a.questions; q += int64_t(gridDim.x) * kGroups) {
    Global<const int64_t> answers = a.answers + q * n;
    const auto votes = [&](int64_t i) -> bool { return answers[i] >= 0 && (!a.valid || a.valid[q * n + i]); };
    const auto answer = [&](int64_t i) -> int64_t {
      if constexpr (kStaged) return staged[i];
      return votes(i) ? int64_t(answers[i]) : -1;
    };

    // Load: the answers, -1 for samples that do not vote.
    if constexpr (kStaged) {
      for (int64_t i = me; i < n; i += kThreads) staged[i] = votes(i) ? int64_t(answers[i]) : -1;
    }
    // Scores: the weight of each sample. Unscored samples take the mean of the scored ones, summed in order.
    if (scored) {
      const auto score = [&](int64_t i) -> double {
        if (a.scores32) return a.scores32[q * n + i];
        return a.scores64[q * n + i];
      };
      int unknown = 0;
      for (int64_t i = me; i < n; i += kThreads) {
        const double s = score(i);
        unknown |= votes(i) && s != s;
      }
      if constexpr (kThreads == simt::kWarpSize) {
        unknown = __any_sync(simt::kAllLanes, unknown);
      } else {
        unknown = __syncthreads_or(unknown);
      }
      if (unknown) {  // the same for the whole group
        if (me == 0) {
          double sum = 0;
          int64_t known = 0;
          for (int64_t i = 0; i < n; ++i) {
            const double s = score(i);
            if (votes(i) && s == s) {
              sum += s;
              ++known;
            }
          }
          *mean_cell = known ? sum / static_cast<double>(known) : 1.0;
        }
        sync_group<kThreads>();
      }
      for (int64_t i = me; i < n; i += kThreads) {
        double s = score(i);
        if (s != s) s = unknown ? double(*mean_cell) : 0.0;
        // The product is rounded by itself: a fused multiply-add would give other bits than the definition.
        weights[i] = a.adaptive ? __dadd_rn(1.0, __dmul_rn(a.lam, s)) : s;
      }
    }
    sync_group<kThreads>();

    // Accumulate: the weight of the class that sample i opens, and for i == n the total.
    Best best = {minus_infinity(), minus_infinity()};
    for (int64_t i = me; i <= n; i += kThreads) {  // i == n: the total
      const int64_t mine = i < n ? answer(i) : 0;
      double sum = 0;
      bool opens = mine >= 0;
      for (int64_t j = 0; j < n && opens; ++j) {
        const int64_t other = answer(j);
        if (i == n ? other >= 0 : other == mine) {
          if (j < i && i < n) opens = false;
          sum += scored ? double(weights[j]) : 1.0;
        }
      }
      sums[i] = opens ? sum : minus_infinity();
      if (opens && i < n) best = merge(best, {sum, minus_infinity()});
    }
    best = reduce<kThreads>(best, best_cells, MergeBest());

    // Tie-break: the number of classes at the top, and the first of them.
    const double limit = tie_limit(best.top);
    Tied tied = {0, n};
    for (int64_t i = me; i < n; i += kThreads) {  // the thread's own sums: no barrier needed
      if (sums[i] > minus_infinity() && sums[i] >= limit) tied = {tied.count + 1, tied.first < i ? tied.first : i};
    }
    tied = reduce<kThreads>(tied, tied_cells, MergeTied());
    // Store.
    sync_group<kThreads>();  // before the sums of other threads are read
    if (me == 0) {
      const bool anyone = tied.count > 0;
      a.winner[q] = anyone ? answer(tied.first) : -1;
      a.weight[q] = anyone ? double(sums[tied.first]) : 0.0;
      a.total[q] = sums[n];
      const double ahead = best.second == minus_infinity() ? best.top : best.top - best.second;
      a.margin[q] = tied.count == 1 ? ahead : 0.0;
      a.ties[q] = tied.count;
    }
    sync_group<kThreads>();  // before the next question overwrites the sums that thread 0 reads
  }
}

struct Plan {
  bool warp, staged;
  int64_t grid, shared, scratch;  // blocks, bytes, doubles
};

// Plans the launch for (Q, K). The caller must allocate `scratch`.
inline Plan plan(int64_t questions, int64_t samples, bool scored) {
  Plan p = {samples <= kWarpSamples, true, 0, 0, 0};
  const int64_t groups = p.warp ? kWarpsPerBlock : 1, cells = p.warp ? kWarpsPerBlock : kBlockThreads / simt::kWarpSize;
  const auto fixed = simt::SharedBytes().add<Best>(cells).add<Tied>(cells).add<double>(groups);
  const auto rows = fixed.add<int64_t>(groups * samples).add<double>(groups * (samples + 1));
  p.shared = (scored ? rows.add<double>(groups * samples) : rows).total();
  p.grid = simt::ceil_div(questions, groups);
  if (p.shared > simt::kSharedLimit) {
    p.staged = false;
    p.shared = fixed.total();
    p.grid = questions < kScratchBlocks ? questions : kScratchBlocks;
    p.scratch = p.grid * (2 * samples + 1);
  }
  return p;
}

// Launches the kernel; requires Q > 0. Returns nullptr or an error message.
inline const char* launch(const Args& a, const Plan& p, simt::Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.grid));
  constexpr int kWarpThreads = kWarpsPerBlock * simt::kWarpSize;
  if (p.warp) return SIMT_LAUNCH((vote_kernel<simt::kWarpSize, true>), grid, kWarpThreads, p.shared, stream, a);
  if (p.staged) return SIMT_LAUNCH((vote_kernel<kBlockThreads, true>), grid, kBlockThreads, p.shared, stream, a);
  return SIMT_LAUNCH((vote_kernel<kBlockThreads, false>), grid, kBlockThreads, p.shared, stream, a);
}

}  // namespace calm_fast::vote
