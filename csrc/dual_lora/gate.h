// The gate of dual_lora in one place, for the CPU, the GPU and the emulation.
//
//   (p_pos, p_neg) = softmax over the two logits,  p_neg = sigmoid(logit),  logit = g_n . z_n - g_p . z_p
//   a_pos = p_pos + 1/2 = 3/2 - p_neg,   a_neg = p_neg - 1/2
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

CALM_FAST_GATE float gate_probability(float logit) { return 1.0f / (1.0f + expf(-logit)); }

CALM_FAST_GATE GateWeights gate_weights(float p_neg) { return {1.5f - p_neg, p_neg - 0.5f}; }

// The weight of rank i, the first r_pos of which belong to the positive LoRA.
CALM_FAST_GATE float rank_weight(float p_neg, int64_t i, int64_t r_pos) {
  const GateWeights a = gate_weights(p_neg);
  return i < r_pos ? a.pos : a.neg;
}

}  // namespace calm_fast::dual_lora

#undef CALM_FAST_GATE
