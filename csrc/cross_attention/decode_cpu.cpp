// The decode part of cross_attention on the CPU: few queries against many keys, one pass over keys and values.
//
// The keys of each KV head are cut into splits of a fixed length, which run in parallel and are combined in order, so
// the result does not depend on the number of threads. Everything is accumulated in float32.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "common/vectors.h"
#include "cross_attention/inputs_cpu.h"

namespace calm_fast::cross_attention::decode {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int kBlock = 32;        // keys per block: with head dim 128 their float32 rows fill half of a 32 KiB L1 cache
constexpr int64_t kSplit = 1024;  // keys of a unit of work

// A unit of work: one KV head of one sequence, keys [first, last), and the query rows that read that head.
struct Unit {
  const float* q;        // (rows, width), padded with zeros
  const void *k, *v;     // key 0 of this head
  int64_t k_stride, v_stride, first, last, rows, d, width;
  const int32_t *lo, *hi;  // (rows,)
  float scale_log2;
  float *acc, *max, *total;  // (rows, width), (rows,), (rows,): the outputs
  float *scores, *spare;     // (rows, kBlock), (kBlock, width)
};

struct LaneFunctions {
  int width;
  void (*attend_float)(const Unit&);
  void (*attend_bfloat16)(const Unit&);
  void (*attend_half)(const Unit&);

  void attend(const Unit& unit, float) const { attend_float(unit); }
  void attend(const Unit& unit, BFloat16) const { attend_bfloat16(unit); }
  void attend(const Unit& unit, Half) const { attend_half(unit); }
};

// Writes the sum of each vector: to[0] of a, to[1] of b, and so on.
inline void sum4(float* to, scalar::V a, scalar::V b, scalar::V c, scalar::V d) {
  const scalar::V all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) to[i] = (all[i].x[0] + all[i].x[1]) + (all[i].x[2] + all[i].x[3]);
}
#if CALM_FAST_X86
CALM_FAST_AVX2 inline void sum4(float* to, __m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
CALM_FAST_AVX512 inline __m256 halves(__m512 a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
CALM_FAST_AVX512 inline void sum4(float* to, __m512 a, __m512 b, __m512 c, __m512 d) {
  sum4(to, halves(a), halves(b), halves(c), halves(d));
}
#endif

#define LANE inline
namespace scalar_lane {
using namespace calm_fast::scalar;
#include "cross_attention/decode_lane.h"
}  // namespace scalar_lane
#undef LANE
#if CALM_FAST_X86
#define LANE CALM_FAST_AVX2 inline
namespace avx2_lane {
using namespace calm_fast::avx2;
#include "cross_attention/decode_lane.h"
}  // namespace avx2_lane
#undef LANE
#define LANE CALM_FAST_AVX512 inline
namespace avx512_lane {
using namespace calm_fast::avx512;
#include "cross_attention/decode_lane.h"
}  // namespace avx512_lane
#undef LANE
#endif

const LaneFunctions& functions(Lane lane) {
#if CALM_FAST_X86
  if (lane >= Lane::avx512) return avx512_lane::kFunctions;
  if (lane == Lane::avx2) return avx2_lane::kFunctions;
#endif
  return scalar_lane::kFunctions;
}

struct Sizes : Shape {
  int64_t width, rows, splits;  // d rounded up to a whole vector; query rows of a KV head; splits of the keys
};

// Returns lo and hi of every (sequence, row), where row = query * group + head of the group.
std::vector<int32_t> intervals(const Sizes& s, const int32_t* lo, const int32_t* hi, bool causal) {
  std::vector<int32_t> bounds(static_cast<size_t>(2 * s.batch * s.rows));
  int32_t* to = bounds.data();
  for (int64_t b = 0; b < s.batch; ++b, to += 2 * s.rows) {
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t i = r / s.group, seen = causal ? std::clamp<int64_t>(i + 1 + s.n - s.m, 0, s.n) : s.n;
      to[r] = lo ? std::max(lo[b * s.m + i], 0) : 0;
      to[s.rows + r] = static_cast<int32_t>(hi ? std::min<int64_t>(hi[b * s.m + i], s.n) : seen);
    }
  }
  return bounds;
}

// Combines the splits of one row, in order, into `out` (d,). Returns the log-sum-exp.
float combine(float* out, const Sizes& s, const float* acc, const float* max, const float* total, float scale) {
  float top = -kInfinity;
  for (int64_t i = 0; i < s.splits; ++i) top = std::max(top, max[i * s.rows]);
  const float shift = top == -kInfinity ? 0.0f : top;
  std::fill(out, out + s.d, 0.0f);
  double sum = 0.0;
  for (int64_t i = 0; i < s.splits; ++i) {
    if (total[i * s.rows] == 0.0f) continue;  // the row sees no key of this split; a NaN stays
    const float share = std::exp((max[i * s.rows] - shift) * scale);
    sum += static_cast<double>(total[i * s.rows]) * share;
    for (int64_t c = 0; c < s.d; ++c) out[c] += share * acc[i * s.rows * s.width + c];
  }
  const auto inverse = static_cast<float>(1.0 / sum);
  for (int64_t c = 0; c < s.d; ++c) out[c] *= inverse;
  return static_cast<float>(static_cast<double>(top) * scale + std::log(sum));
}

template <class T>
struct Call {
  Sizes s;
  const T *q, *k, *v;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // batch, token, head
  const int32_t* bounds;  // from `intervals`
  float scale;
  T* out;
  float* lse;
};

template <class T>
void run(const Call<T>& call, const LaneFunctions& lane, float* acc, float* max, float* total, bool& out_of_memory) {
  const Sizes& s = call.s;
  const int64_t heads = s.batch * s.kv_heads, floats = s.rows * (s.width + kBlock) + kBlock * s.width;
  std::atomic<bool> failed{false};  // nothing may be thrown inside parallel_for
  parallel_for(heads * s.splits, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new (std::nothrow) float[static_cast<size_t>(floats)]);
    if (!memory) {
      failed = true;
      return;
    }
    for (int64_t unit = begin; unit < end; ++unit) {
      // Load: the query rows as float32, padded with zeros.
      const int64_t split = unit % s.splits, head = unit / s.splits % s.kv_heads, b = unit / s.splits / s.kv_heads;
      float* rows = memory.get();
      for (int64_t r = 0; r < s.rows; ++r) {
        const int64_t h = head * s.group + r % s.group;
        const T* from = call.q + b * call.q_strides[0] + r / s.group * call.q_strides[1] + h * call.q_strides[2];
        for (int64_t c = 0; c < s.d; ++c) rows[r * s.width + c] = to_float(from[c]);
        std::fill(rows + r * s.width + s.d, rows + (r + 1) * s.width, 0.0f);
      }
      // Scores, softmax, accumulate: the lane's attend.
      const int32_t* bounds = call.bounds + 2 * b * s.rows;
      float* own = acc + unit * s.rows * s.width;
      std::fill(own, own + s.rows * s.width, 0.0f);
      std::fill(max + unit * s.rows, max + (unit + 1) * s.rows, -kInfinity);
      std::fill(total + unit * s.rows, total + (unit + 1) * s.rows, 0.0f);
      lane.attend(
          Unit{
              rows, call.k + b * call.k_strides[0] + head * call.k_strides[2],
              call.v + b * call.v_strides[0] + head * call.v_strides[2], call.k_strides[1], call.v_strides[1],
              split * kSplit, std::min((split + 1) * kSplit, s.n), s.rows, s.d, s.width, bounds,
              bounds + s.rows, static_cast<float>(call.scale * kLog2e), own, max + unit * s.rows,
              total + unit * s.rows, rows + s.rows * s.width, rows + s.rows * (s.width + kBlock)},
          T(0.0f));
    }
  });
  out_of_memory = failed;
  if (failed) return;
  // Store: combine the splits of every row.
  parallel_for(heads, 8, [&](int64_t begin, int64_t end) {
    float row[kMaxHeadDim];
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / s.kv_heads;
      const int32_t* bounds = call.bounds + 2 * b * s.rows;
      for (int64_t r = 0; r < s.rows; ++r) {
        const int64_t i = r / s.group, h = head % s.kv_heads * s.group + r % s.group;
        const int64_t at = head * s.splits * s.rows + r;
        T* out = call.out + ((b * s.m + i) * s.heads + h) * s.d;
        float* lse = call.lse + (b * s.heads + h) * s.m + i;
        if (bounds[r] >= bounds[s.rows + r]) {  // empty interval
          std::fill(out, out + s.d, T(0.0f));
          *lse = -kInfinity;
          continue;
        }
        *lse = combine(row, s, acc + at * s.width, max + at, total + at, call.scale);
        for (int64_t c = 0; c < s.d; ++c) out[c] = from_float<T>(row[c]);
      }
    }
  });
}

// Returns out (B, M, H, D) in q's dtype and lse (B, H, M) float32.
std::tuple<Tensor, Tensor> cross_attention_decode_cpu(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> lo, std::optional<Tensor> hi, bool causal, double scale,
    int64_t lane) {
  Sizes s{check_inputs(q, k, v, lo, hi, scale, std::numeric_limits<int32_t>::max()), 0, 0, 0};
  STD_TORCH_CHECK(s.m <= kMaxQueries, kOp, ": `q` must have at most ", kMaxQueries, " queries, got M = ", s.m);
  const LaneFunctions& chosen = functions(choose_lane(kOp, lane));
  s.rows = s.m * s.group;
  s.width = (s.d + chosen.width - 1) / chosen.width * chosen.width;
  s.splits = std::max<int64_t>(1, (s.n + kSplit - 1) / kSplit);

  Tensor out = torch::stable::new_empty(q, {s.batch, s.m, s.heads, s.d});
  Tensor lse = torch::stable::new_empty(q, {s.batch, s.heads, s.m}, ScalarType::Float);
  const int64_t units = s.batch * s.kv_heads * s.splits;
  Tensor partial = torch::stable::new_empty(q, {units * s.rows * (s.width + 2)}, ScalarType::Float);
  auto* acc = static_cast<float*>(partial.mutable_data_ptr());
  float* max = acc + units * s.rows * s.width;
  const std::vector<int32_t> bounds = intervals(s, bounds_data(lo), bounds_data(hi), causal);
  bool out_of_memory = false;
  dispatch_float(q.scalar_type(), kOp, "q", [&](auto zero) {
    using T = decltype(zero);
    Call<T> call{
        s, static_cast<const T*>(q.const_data_ptr()), static_cast<const T*>(k.const_data_ptr()),
        static_cast<const T*>(v.const_data_ptr()), {}, {}, {}, bounds.data(), static_cast<float>(scale),
        static_cast<T*>(out.mutable_data_ptr()), static_cast<float*>(lse.mutable_data_ptr())};
    for (int i = 0; i < 3; ++i) {
      call.q_strides[i] = q.stride(i);
      call.k_strides[i] = k.stride(i);
      call.v_strides[i] = v.stride(i);
    }
    run(call, chosen, acc, max, max + units * s.rows, out_of_memory);
  });
  STD_TORCH_CHECK(!out_of_memory, kOp, ": out of memory");
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_cross_attention_native_decode", TORCH_BOX(&cross_attention_decode_cpu));
}

}  // namespace calm_fast::cross_attention::decode
