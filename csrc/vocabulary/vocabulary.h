// Vocabulary sweeps on a CPU: the losses and gradients of linear_nce and linear_logprob from the logits
// z = softcap(hidden weight^T + bias), computed a tile at a time. No torch headers. Derivation:
// docs/ops/linear_logprob.md.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lanes.h"

namespace calm_fast::vocabulary {

enum class Type { float32, bfloat16, float16 };

// A strided matrix; strides count elements.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  Type type;
};

struct Head {
  Matrix weight;       // (V, d)
  const float* bias;   // (V,) or null
  float softcap;       // 0: none
  float temperature;
};

// Outputs of a sweep, one entry per token (T,); null: not wanted.
struct Logprob {
  float* logprob;
  float* entropy;
  int64_t* rank;
  float *top, *total;  // the largest logit, and the sum of exp((z - top) / temperature)
};

struct Nce {
  // The largest logit of the student and of nat, and sums of exp(z - top) and exp((z - top) / temperature).
  float *top, *total, *total_soft, *top_nat, *total_nat;
  float *hard, *soft, *kl;          // both cross-entropies, and KL(p_neg || p_nat)
};

// Source of a sweep's memory and threads.
class Host {
 public:
  virtual ~Host() = default;
  // Returns memory aligned to a cache line that lives as long as the host.
  virtual float* memory(int64_t words) = 0;
  float* zeroed(int64_t words) {
    float* found = memory(words > 0 ? words : 1);
    std::memset(found, 0, static_cast<size_t>(words) * 4);
    return found;
  }
  // Calls body(context, i) for every i < tasks, in any order and in parallel.
  virtual void run(void (*body)(void*, int64_t), void* context, int64_t tasks) = 0;
};

// Computes the outputs of linear_logprob. hidden (T, d); targets (T,), 0 <= target < V.
void sweep_logprob(
    Lane lane, const Matrix& hidden, const Head& head, const int64_t* targets, const Logprob& out, Host& host);

// Computes the outputs of linear_logprob from logits (T, V) before bias and softcap, whose columns are neighbours.
// targets (T,): where outside the vocabulary, logprob is NaN and rank 0; where `ignored`, all results are 0. Of the head,
// the weight is not read.
void rows_logprob(
    Lane lane, const Matrix& logits, const Head& head, const int64_t* targets, int64_t ignored, const Logprob& out,
    Host& host);

// Sums of rows of logits, before bias and softcap, whose columns are neighbours: some or all columns of the vocabulary.
// What belongs to a missing stream (null) is 0. Of the head, the weight is not read. sums (kNceRowSums, T): the student's
// largest logit `top`, its sums of exp(z - top) and exp((z - top) / temperature); nat's largest logit, the same sums, and
// the student's z - top weighted by the powers of the second; neg's largest logit, its sum of exp(z - top), and
// (neg - its top) - (nat - its top) weighted by its powers.
constexpr int64_t kNceRowSums = 10;
void rows_nce(
    Lane lane, const Matrix* student, const Matrix& nat, const Matrix* neg, const Head& head, double* sums, Host& host);

// Logits that a sweep keeps for gradient_nce: (V, stride) each for student and nat, where stride is T rounded up to 16.
// In 16 bits they are relative to the logit of the token's target, which `references` (2, stride) holds, and the
// totals of the sweep are those of the rounded logits. A logit more than 65504 above the target's overflows to
// infinity, which gives NaN in that token's gradient.
struct NceKept {
  void *student, *nat;  // null: nothing is kept
  float* references;
  int64_t stride;
  Type type;  // float32 or float16
};

// Computes the outputs of linear_nce. student, nat, neg (T, d); without student only top_nat, total_nat and kl, without neg all
// but kl.
void sweep_nce(
    Lane lane, const Matrix* student, const Matrix& nat, const Matrix* neg, const Head& head, const int64_t* targets,
    const Nce& out, const NceKept& kept, Host& host);

// Columns first .. first + columns of the logit gradients, in the inputs' dtype: token t of column first + c is at
// data[c * stride + t].
struct Tile {
  void* data;
  int64_t first, columns, stride;
};

// Inputs of the logit gradients of linear_logprob, each (T,):
//   dz = (up (1_target - p) - down p (log p + entropy)) / temperature, times the derivative of the softcap
// down and entropy are null where the entropy has no gradient.
struct LogprobGradient {
  const float *top, *total, *up, *down, *entropy;
};
void dlogits_logprob(
    Lane lane, const Matrix& hidden, const Head& head, const int64_t* targets, const LogprobGradient& in,
    const Tile& out, Host& host);

// Writes the logit gradients (T, V) of the same logits, in their dtype; they are NaN where the target is unknown.
void gradient_rows_logprob(
    Lane lane, const Matrix& logits, const Head& head, const int64_t* targets, const LogprobGradient& in,
    void* gradient, Host& host);

// Inputs of the logit gradients of linear_nce, each (T,):
//   dz = hard (p - 1_target) + soft / temperature (p^tau - p_nat^tau), times the derivative of the softcap
struct NceGradient {
  const float *top, *total, *total_soft, *top_nat, *total_nat, *hard, *soft;
};
void dlogits_nce(
    Lane lane, const Matrix& student, const Matrix& nat, const Head& head, const int64_t* targets,
    const NceGradient& in, const Tile& out, Host& host);

// Writes the logit gradients of columns (T, C) of such rows, in their dtype; `out` may be the student's logits. targets
// (T,): relative to the first column; one outside 0 .. C belongs to other columns.
void gradient_rows_nce(
    Lane lane, const Matrix& student, const Matrix& nat, const Head& head, const int64_t* targets,
    const NceGradient& in, void* out, int64_t stride, Host& host);

// Computes gradient (T, d) = dz weight from kept logits, which contain the bias already.
void gradient_nce(
    Lane lane, const NceKept& kept, const Head& head, const int64_t* targets, int64_t tokens, const NceGradient& in,
    float* gradient, Host& host);

}  // namespace calm_fast::vocabulary
