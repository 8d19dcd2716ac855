// Sweeps of a vocabulary: what linear_nce and linear_logprob do with z = softcap(rows weight^T + bias) on a CPU, a tile
// of logits at a time. No torch here; docs/ops/linear_logprob.md derives it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lanes.h"

namespace calm_fast::vocabulary {

enum class Type { float32, bfloat16, float16 };

// A matrix anywhere in memory; strides count elements.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  Type type;
};

struct Head {
  Matrix weight;       // (V, d)
  const float* bias;   // (V,) or null
  float softcap;       // 0 = none
  float temperature;
};

// What a sweep leaves of each token (T,); null = not wanted.
struct Logprob {
  float* logprob;
  float* entropy;
  int64_t* rank;
  float* lse;  // of the logits over the temperature
};

struct Nce {
  float *lse, *lse_soft, *lse_nat;  // of the student, of the student and of nat over the temperature
  float *hard, *soft, *kl;          // both cross-entropies and KL(p_neg || p_nat)
};

// Where a sweep gets its memory and its threads from.
class Host {
 public:
  virtual ~Host() = default;
  // aligned to a cache line, for as long as the host lives
  virtual float* memory(int64_t words) = 0;
  float* zeroed(int64_t words) {
    float* found = memory(words > 0 ? words : 1);
    std::memset(found, 0, static_cast<size_t>(words) * 4);
    return found;
  }
  // calls body(context, i) for every i < tasks, in any order, some at the same time
  virtual void run(void (*body)(void*, int64_t), void* context, int64_t tasks) = 0;
};

// hidden (T, d), targets (T,) within 0 <= target < V.
void sweep_logprob(
    Lane lane, const Matrix& hidden, const Head& head, const int64_t* targets, const Logprob& out, Host& host);

// Logits that a sweep leaves behind for gradient_nce: (V, stride) for student and nat, stride being T rounded up to 16.
// 16 bits wide they are relative to the logit of their token's target, of which `references` (2, stride) keeps both, and
// the log-sum-exps of the sweep are those of the rounded logits. Beyond 65504 above the target there is no room: infinity,
// and so NaN in that token's gradient.
struct NceKept {
  void *student, *nat;  // null = nothing kept
  float* references;
  int64_t stride;
  Type type;  // float32 or float16
};

// student, nat, neg (T, d); without student only lse_nat and kl, without neg all but kl.
void sweep_nce(
    Lane lane, const Matrix* student, const Matrix& nat, const Matrix* neg, const Head& head, const int64_t* targets,
    const Nce& out, const NceKept& kept, Host& host);

// Columns first .. first + columns of the logit gradients, column by column: out[c * stride + t], in the inputs' type.
struct Tile {
  void* data;
  int64_t first, columns, stride;
};

//   dz = (up (1_target - p) - down p (log p + entropy)) / temperature, times the slope of the softcap
// up, down and entropy (T,), down and entropy null where there is no gradient of the entropy.
struct LogprobGradient {
  const float *lse, *up, *down, *entropy;
};
void dlogits_logprob(
    Lane lane, const Matrix& hidden, const Head& head, const int64_t* targets, const LogprobGradient& in,
    const Tile& out, Host& host);

//   dz = hard (p - 1_target) + soft / temperature (p^tau - p_nat^tau), times the slope of the softcap
struct NceGradient {
  const float *lse, *lse_soft, *lse_nat, *hard, *soft;
};
void dlogits_nce(
    Lane lane, const Matrix& student, const Matrix& nat, const Head& head, const int64_t* targets,
    const NceGradient& in, const Tile& out, Host& host);

// gradient (T, d) = dz weight, from kept logits; bias is in them already.
void gradient_nce(
    Lane lane, const NceKept& kept, const Head& head, const int64_t* targets, int64_t tokens, const NceGradient& in,
    float* gradient, Host& host);

}  // namespace calm_fast::vocabulary
