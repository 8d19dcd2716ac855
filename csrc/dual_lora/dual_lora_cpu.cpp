// dual_lora on the CPU: the gate, both rank updates, both gelus and the mix in one pass over u.
//
//   released form: zg = x down^T, u = y C1^T, mix = a_pos gelu(u + up_pos z_pos) + a_neg gelu(u + up_neg z_neg),
//                  out = y + mix C2^T
//   paper's form:  zg = x down^T, mix = [a_pos z_pos, a_neg z_neg], out = y + mix up^T
//
// This file computes the mix. calm_fast/_ops/dual_lora calls it between the products, which are torch's or those of
// packed_linear/packed_linear_cpu.cpp.

#include <cmath>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "dual_lora/gate.h"
#include "dual_lora/gelu.h"

namespace calm_fast::dual_lora {
namespace {

constexpr const char* kOp = "dual_lora";
constexpr int64_t kBlock = 64;  // columns of u at a time, in registers and L1

int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Returns a_neg = tanh(z . g / 2) / 2 of one token; zg holds z and then g, r numbers each.
[[gnu::always_inline]] inline float gate_of(const float* zg, int64_t r) {
  float logit = 0.0f;
  for (int64_t i = 0; i < r; ++i) logit += zg[i] * zg[r + i];
  return negative_weight(logit);
}

struct Mix {
  const float* zg;  // (T, 2 r)
  const float* up;  // (r, padded): transposed, zero beyond column m
  int64_t r_pos, r, m, padded;
};

// Computes mix (T, m) for tokens [begin, end). Inlined into a caller that chooses the instruction set.
template <class T>
[[gnu::always_inline]] inline void mix_tokens(const Mix& s, const T* u, T* mix, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const float* z = s.zg + token * 2 * s.r;
    // Scores and softmax: the gate.
    const GateWeights weights = gate_weights(gate_of(z, s.r));
    for (int64_t at = 0; at < s.m; at += kBlock) {
      const int64_t width = std::min(kBlock, s.m - at);
      const T* from = u + token * s.m + at;
      T* to = mix + token * s.m + at;
      // Load: u, where both sums start.
      float pos[kBlock], neg[kBlock];
      for (int64_t j = 0; j < width; ++j) pos[j] = to_float(from[j]);
      for (int64_t j = width; j < kBlock; ++j) pos[j] = 0.0f;
      std::memcpy(neg, pos, sizeof(pos));
      // Accumulate: the rank updates of both LoRAs.
      for (int64_t i = 0; i < s.r_pos; ++i) {
        const float* row = s.up + i * s.padded + at;
        for (int64_t j = 0; j < kBlock; ++j) pos[j] += z[i] * row[j];
      }
      for (int64_t i = s.r_pos; i < s.r; ++i) {
        const float* row = s.up + i * s.padded + at;
        for (int64_t j = 0; j < kBlock; ++j) neg[j] += z[i] * row[j];
      }
      // Epilogue and store: the gate's weighted sum of the two gelus.
      for (int64_t j = 0; j < kBlock; ++j) pos[j] = weights.pos * gelu(pos[j]) + weights.neg * gelu(neg[j]);
      for (int64_t j = 0; j < width; ++j) to[j] = from_float<T>(pos[j]);
    }
  }
}

template <class T>
void mix_scalar(const Mix& s, const T* u, T* mix, int64_t begin, int64_t end) {
  mix_tokens<T>(s, u, mix, begin, end);
}
#if CALM_FAST_X86
template <class T>
CALM_FAST_AVX2 void mix_avx2(const Mix& s, const T* u, T* mix, int64_t begin, int64_t end) {
  mix_tokens<T>(s, u, mix, begin, end);
}
template <class T>
CALM_FAST_AVX512 void mix_avx512(const Mix& s, const T* u, T* mix, int64_t begin, int64_t end) {
  mix_tokens<T>(s, u, mix, begin, end);
}
#endif

template <class T>
void mix_in_lane(Lane lane, const Mix& s, const T* u, T* mix, int64_t tokens) {
  auto* run = mix_scalar<T>;
#if CALM_FAST_X86
  if (lane >= Lane::avx2) run = mix_avx2<T>;
  if (lane >= Lane::avx512) run = mix_avx512<T>;
#endif
  parallel_for(tokens, 16, [&s, u, mix, run](int64_t begin, int64_t end) { run(s, u, mix, begin, end); });
}

template <class T>
std::vector<float> widened(const Tensor& tensor) {
  const T* from = static_cast<const T*>(tensor.data_ptr());
  std::vector<float> to(tensor.numel());
  for (size_t i = 0; i < to.size(); ++i) to[i] = to_float(from[i]);
  return to;
}

void check_ranks(const Tensor& zg, int64_t r_pos) {
  STD_TORCH_CHECK(
      zg.dim() == 2 && zg.size(1) % 2 == 0, kOp, ": `zg` must have shape (T, 2 R), got ", shape_text(zg));
  check_tensor(kOp, "zg", zg, {-1, -1}, zg.scalar_type());
  STD_TORCH_CHECK(
      r_pos >= 0 && r_pos <= zg.size(1) / 2, kOp, ": `r_pos` must lie in [0, ", zg.size(1) / 2, "], got ", r_pos);
}

// Returns the mix (T, m) of the released form from zg (T, 2 R), u (T, m) and up (m, R), all of one dtype.
Tensor dual_lora_mix_cpu(const Tensor& zg, const Tensor& u, const Tensor& up, int64_t r_pos, int64_t lane) {
  check_ranks(zg, r_pos);
  const int64_t tokens = zg.size(0), r = zg.size(1) / 2;
  check_tensor(kOp, "u", u, {tokens, -1}, zg.scalar_type());
  const int64_t m = u.size(1), padded = rounded_up(m, kBlock);
  check_tensor(kOp, "up", up, {m, r}, zg.scalar_type());
  const Lane chosen = choose_lane(kOp, lane);
  Tensor mix = torch::stable::empty_like(u);
  dispatch_float(zg.scalar_type(), kOp, "zg", [&](auto zero) {
    using T = decltype(zero);
    const std::vector<float> wide = widened<T>(zg), factor = widened<T>(up);
    std::vector<float> turned(r * padded, 0.0f);
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t i = 0; i < r; ++i) turned[i * padded + j] = factor[j * r + i];
    }
    const Mix s{wide.data(), turned.data(), r_pos, r, m, padded};
    mix_in_lane<T>(
        chosen, s, static_cast<const T*>(u.data_ptr()), static_cast<T*>(mix.data_ptr()), tokens);
  });
  return mix;
}

// Returns [a_pos z_pos, a_neg z_neg] (T, R) of the paper's form from zg (T, 2 R).
Tensor dual_lora_weigh_cpu(const Tensor& zg, int64_t r_pos) {
  check_ranks(zg, r_pos);
  const int64_t tokens = zg.size(0), r = zg.size(1) / 2;
  Tensor mix = torch::stable::new_empty(zg, {tokens, r});
  dispatch_float(zg.scalar_type(), kOp, "zg", [&](auto zero) {
    using T = decltype(zero);
    const std::vector<float> wide = widened<T>(zg);
    T* to = static_cast<T*>(mix.data_ptr());
    for (int64_t token = 0; token < tokens; ++token) {
      const float* z = wide.data() + token * 2 * r;
      const float a_neg = gate_of(z, r);
      for (int64_t i = 0; i < r; ++i) {
        to[token * r + i] = from_float<T>(rank_weight(a_neg, i, r_pos) * z[i]);
      }
    }
  });
  return mix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_dual_lora_native_mix", TORCH_BOX(&dual_lora_mix_cpu));
  m.impl("_dual_lora_native_weigh", TORCH_BOX(&dual_lora_weigh_cpu));
}

}  // namespace calm_fast::dual_lora
