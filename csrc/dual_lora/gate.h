// The gate of dual_lora in one place, for the CPU, the GPU and the emulation.
//
//   (p_pos, p_neg) = softmax over the two logits,  p_neg = sigmoid(logit),  logit = g_n . z_n - g_p . z_p
//   a_neg = p_neg - 1/2 = tanh(logit / 2) / 2,   a_pos = p_pos + 1/2 = 1 - a_neg
//
// The tanh keeps the bits of a small logit, which the subtraction would lose.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define CALM_FAST_GATE __device__ __forceinline__
#else
#define CALM_FAST_GATE [[gnu::always_inline]] inline
#endif

namespace calm_fast::dual_lora {

struct GateWeights {
  float pos, neg;
};

// By expm1, which keeps the same bits and needs fewer registers than tanh on a GPU; it cannot overflow.
CALM_FAST_GATE float negative_weight(float logit) {
  const float less = expm1f(-fabsf(logit));  // in [-1, 0]
  return copysignf(-0.5f * less / (2.0f + less), logit);
}

CALM_FAST_GATE GateWeights gate_weights(float a_neg) { return {1.0f - a_neg, a_neg}; }

// The weight of rank i, the first r_pos of which belong to the positive LoRA.
CALM_FAST_GATE float rank_weight(float a_neg, int64_t i, int64_t r_pos) {
  const GateWeights a = gate_weights(a_neg);
  return i < r_pos ? a.pos : a.neg;
}

}  // namespace calm_fast::dual_lora

#undef CALM_FAST_GATE
