// The tiles part of cross_attention on the CPU, forward and backward: any number of queries, in tiles. Each panel of
// queries is multiplied only with the blocks of keys that it sees.
//
// No sum depends on how the work is divided: each runs over keys, or over queries, in order and in one thread.
// Everything is accumulated in float32.
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

namespace calm_fast::cross_attention::tiles {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kBlock = 64;      // keys per block
constexpr int64_t kPanels = 4;      // panels of queries that share a staged block of keys
constexpr int64_t kKeyBlocks = 4;   // blocks of keys per unit of work for dk and dv
constexpr int64_t kMaxKeys = 1 << 23;  // index + 0.5 must be exact in float32

inline bool is_finite(float x) { return std::isfinite(x); }

// One KV head of one sequence and the group of query heads that read it.
struct Head {
  const void *q, *k, *v;  // query 0 of the group's first head, key 0
  void* out;              // as q
  float* lse;             // (group, m)
  const int32_t *lo, *hi; // (m,)
  int64_t q_token, q_head, k_token, v_token, out_token;  // strides; heads of out lie d apart
  int64_t m, n, group, d, width;                         // width: d rounded up to a whole vector
  float scale, scale_log2;
};

// The backward pass's further inputs and its outputs. It also reads Head::out and Head::lse.
struct Gradients {
  const void* dout;   // as out
  const float* dlse;  // (group, m) or null
  void* dq;           // as out, or null where not wanted
  float *dk, *dv;     // (keys, width), or null
};

template <class T>
struct Typed {
  void (*forward)(const Head&, int64_t, int64_t, float*);
  void (*backward)(const Head&, const Gradients&, int64_t, int64_t, int64_t, int64_t, float*);
  void (*write_keys)(T*, int64_t, const float*, float, int64_t, const Head&);
};

struct Functions {
  int width, panel;
  int64_t (*forward_floats)(int64_t);
  int64_t (*backward_floats)(int64_t);
  Typed<float> of_float;
  Typed<BFloat16> of_bfloat16;
  Typed<Half> of_half;

  const Typed<float>& of(float) const { return of_float; }
  const Typed<BFloat16>& of(BFloat16) const { return of_bfloat16; }
  const Typed<Half>& of(Half) const { return of_half; }
};

#define LANE inline
namespace scalar_lane {
using namespace calm_fast::scalar;
constexpr int kRows = 2;
#include "cross_attention/tiles_lane.h"
}  // namespace scalar_lane
#undef LANE
#if CALM_FAST_X86
#define LANE CALM_FAST_AVX2 inline
namespace avx2_lane {
using namespace calm_fast::avx2;
constexpr int kRows = 4;
#include "cross_attention/tiles_lane.h"
}  // namespace avx2_lane
#undef LANE
#define LANE CALM_FAST_AVX512 inline
namespace avx512_lane {
using namespace calm_fast::avx512;
constexpr int kRows = 8;
#include "cross_attention/tiles_lane.h"
}  // namespace avx512_lane
#undef LANE
#endif

const Functions& functions(Lane lane) {
#if CALM_FAST_X86
  if (lane >= Lane::avx512) return avx512_lane::kFunctions;
  if (lane == Lane::avx2) return avx2_lane::kFunctions;
#endif
  return scalar_lane::kFunctions;
}

// Returns the address of element `offset` of a float tensor.
const void* pointer(const Tensor& tensor, int64_t offset) {
  const int64_t size = tensor.scalar_type() == ScalarType::Float ? 4 : 2;
  return static_cast<const char*>(tensor.const_data_ptr()) + offset * size;
}

// Returns lo and hi of every sequence, (batch, 2, m), clamped to [0, n].
std::vector<int32_t> intervals(
    const Shape& s, const std::optional<Tensor>& lo, const std::optional<Tensor>& hi, bool causal) {
  std::vector<int32_t> bounds(static_cast<size_t>(2 * s.batch * s.m));
  const int32_t *low = bounds_data(lo), *high = bounds_data(hi);
  int32_t* to = bounds.data();
  for (int64_t b = 0; b < s.batch; ++b, to += 2 * s.m) {
    for (int64_t i = 0; i < s.m; ++i) {
      const int64_t seen = causal ? std::clamp<int64_t>(i + 1 + s.n - s.m, 0, s.n) : s.n;
      to[i] = low ? std::max(low[b * s.m + i], 0) : 0;
      to[s.m + i] = static_cast<int32_t>(high ? std::min<int64_t>(high[b * s.m + i], s.n) : seen);
    }
  }
  return bounds;
}

// Returns the Head of KV head `index`, counted over all sequences. out (B, M, H, D) and lse (B, H, M) are contiguous.
struct Heads {
  const Shape& s;
  const Tensor &q, &k, &v;
  const std::vector<int32_t>& bounds;
  void* out;
  float* lse;
  double scale;
  int64_t width;

  Head operator()(int64_t index) const {
    const int64_t b = index / s.kv_heads, head = index % s.kv_heads, first = head * s.group;
    const int32_t* own = bounds.data() + 2 * b * s.m;
    return Head{
        pointer(q, b * q.stride(0) + first * q.stride(2)), pointer(k, b * k.stride(0) + head * k.stride(2)),
        pointer(v, b * v.stride(0) + head * v.stride(2)), const_cast<void*>(pointer_of(out, b, first)),
        lse + (b * s.heads + first) * s.m, own, own + s.m, q.stride(1), q.stride(2), k.stride(1), v.stride(1),
        s.heads * s.d, s.m, s.n, s.group, s.d, width, static_cast<float>(scale),
        static_cast<float>(scale * kLog2e)};
  }
  // Returns the address of head `first` of sequence b in a contiguous (B, M, H, D) tensor of q's dtype.
  void* pointer_of(void* data, int64_t b, int64_t first) const {
    const int64_t size = q.scalar_type() == ScalarType::Float ? 4 : 2;
    return data ? static_cast<char*>(data) + (b * s.m * s.heads + first) * s.d * size : nullptr;
  }
};

// Calls body(task, scratch) for every task, with `floats` of scratch memory per thread. Returns false if memory ran
// out.
template <class Body>
bool each_task(int64_t count, int64_t floats, const Body& body) {
  std::atomic<bool> failed{false};  // nothing may be thrown inside parallel_for
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new (std::nothrow) float[static_cast<size_t>(floats)]);
    if (!memory) {
      failed = true;
      return;
    }
    for (int64_t task = begin; task < end; ++task) body(task, memory.get());
  });
  return !failed;
}

// Returns out (B, M, H, D) in q's dtype and lse (B, H, M) float32.
std::tuple<Tensor, Tensor> cross_attention_fwd_cpu(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> lo, std::optional<Tensor> hi, bool causal, double scale,
    int64_t lane) {
  const Shape s = check_inputs(q, k, v, lo, hi, scale, kMaxKeys);
  const Functions& chosen = functions(choose_lane(kOp, lane));
  const int64_t width = (s.d + chosen.width - 1) / chosen.width * chosen.width;
  Tensor out = torch::stable::new_empty(q, {s.batch, s.m, s.heads, s.d});
  Tensor lse = torch::stable::new_empty(q, {s.batch, s.heads, s.m}, ScalarType::Float);
  const std::vector<int32_t> bounds = intervals(s, lo, hi, causal);
  const Heads heads{s, q, k, v, bounds, out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()), scale,
                    width};
  const int64_t panels = (s.m + chosen.panel - 1) / chosen.panel * s.group, parts = (panels + kPanels - 1) / kPanels;
  bool fine = true;
  dispatch_float(q.scalar_type(), kOp, "q", [&](auto zero) {
    const auto& typed = chosen.of(zero);
    fine = each_task(s.batch * s.kv_heads * parts, chosen.forward_floats(width), [&](int64_t task, float* memory) {
      const int64_t part = task % parts;
      typed.forward(heads(task / parts), part * kPanels, std::min((part + 1) * kPanels, panels), memory);
    });
  });
  STD_TORCH_CHECK(fine, kOp, ": out of memory");
  return {out, lse};
}

// Returns dq, dk and dv, contiguous, in q's dtype.
std::tuple<Tensor, Tensor, Tensor> cross_attention_bwd_cpu(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::optional<Tensor> lo, std::optional<Tensor> hi, bool causal, double scale, int64_t lane) {
  const Shape s = check_inputs(q, k, v, lo, hi, scale, kMaxKeys);
  check_tensor(kOp, "dout", dout, {s.batch, s.m, s.heads, s.d}, q.scalar_type());
  check_tensor(kOp, "out", out, {s.batch, s.m, s.heads, s.d}, q.scalar_type());
  check_tensor(kOp, "lse", lse, {s.batch, s.heads, s.m}, ScalarType::Float);
  if (dlse.has_value()) check_tensor(kOp, "dlse", *dlse, {s.batch, s.heads, s.m}, ScalarType::Float);
  const Functions& chosen = functions(choose_lane(kOp, lane));
  const int64_t width = (s.d + chosen.width - 1) / chosen.width * chosen.width;
  Tensor dq = torch::stable::new_empty(q, {s.batch, s.m, s.heads, s.d});
  Tensor dk = torch::stable::new_empty(q, {s.batch, s.n, s.kv_heads, s.d});
  Tensor dv = torch::stable::new_empty(q, {s.batch, s.n, s.kv_heads, s.d});
  const std::vector<int32_t> bounds = intervals(s, lo, hi, causal);
  const Heads heads{s, q, k, v, bounds, const_cast<void*>(out.const_data_ptr()),
                    const_cast<float*>(static_cast<const float*>(lse.const_data_ptr())), scale, width};
  const int64_t panels = (s.m + chosen.panel - 1) / chosen.panel * s.group, count = s.batch * s.kv_heads;
  const int64_t blocks = (s.n + kBlock - 1) / kBlock, floats = chosen.backward_floats(width);
  void* dq_data = dq.mutable_data_ptr();
  bool fine = true;
  dispatch_float(q.scalar_type(), kOp, "q", [&](auto zero) {
    using T = decltype(zero);
    const auto& typed = chosen.of(zero);
    const auto given = [&](int64_t index) {
      const int64_t b = index / s.kv_heads, first = index % s.kv_heads * s.group;
      return Gradients{
          heads.pointer_of(const_cast<void*>(dout.const_data_ptr()), b, first),
          dlse.has_value() ? static_cast<const float*>(dlse->const_data_ptr()) + (b * s.heads + first) * s.m : nullptr,
          heads.pointer_of(dq_data, b, first), nullptr, nullptr};
    };
    // Computes dk and dv of key blocks [begin, end), and dq too if those are all of them.
    const auto keys = [&](int64_t index, int64_t begin, int64_t end, bool queries_too, float* memory) {
      const Head head = heads(index);
      Gradients gradients = given(index);
      const int64_t size = (end - begin) * kBlock * width, from = begin * kBlock, to = std::min(end * kBlock, s.n);
      if (!queries_too) gradients.dq = nullptr;
      gradients.dk = memory + floats;
      gradients.dv = gradients.dk + size;
      std::memset(gradients.dk, 0, static_cast<size_t>(2 * size) * sizeof(float));
      typed.backward(head, gradients, 0, panels, from, to, memory);
      const int64_t b = index / s.kv_heads, h = index % s.kv_heads, stride = s.kv_heads * s.d;
      const int64_t at = (b * s.n + from) * stride + h * s.d;
      typed.write_keys(static_cast<T*>(dk.mutable_data_ptr()) + at, stride, gradients.dk, head.scale, to - from, head);
      typed.write_keys(static_cast<T*>(dv.mutable_data_ptr()) + at, stride, gradients.dv, 1.0f, to - from, head);
    };
    // Enough heads for all threads: compute the scores once for dq, dk and dv. Else compute dq by panels, and dk and dv
    // by key blocks.
    if (count >= torch::stable::get_num_threads()) {
      fine = each_task(count, floats + 2 * blocks * kBlock * width, [&](int64_t index, float* memory) {
        keys(index, 0, blocks, true, memory);
      });
      return;
    }
    const int64_t parts = (blocks + kKeyBlocks - 1) / kKeyBlocks;
    fine = each_task(count * panels, floats, [&](int64_t task, float* memory) {
      typed.backward(heads(task / panels), given(task / panels), task % panels, task % panels + 1, 0, s.n, memory);
    });
    fine = fine && each_task(count * parts, floats + 2 * kKeyBlocks * kBlock * width, [&](int64_t task, float* memory) {
      const int64_t begin = task % parts * kKeyBlocks;
      keys(task / parts, begin, std::min(begin + kKeyBlocks, blocks), false, memory);
    });
  });
  STD_TORCH_CHECK(fine, kOp, ": out of memory");
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_cross_attention_native_fwd", TORCH_BOX(&cross_attention_fwd_cpu));
  m.impl("_cross_attention_native_bwd", TORCH_BOX(&cross_attention_bwd_cpu));
}

}  // namespace calm_fast::cross_attention::tiles
