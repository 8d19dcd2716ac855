// linear_logprob on the CPU: products, running sums and logit gradients, a tile at a time (vocabulary/sweep_lane.h).

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "vocabulary/tensors.h"

namespace calm_fast {
namespace {

using namespace vocabulary;

constexpr const char* kOp = "linear_logprob";

// The results of a forward pass over T tokens: logprob (T,) float32, entropy (T,) float32, rank (T,) int64 and norms
// (2, T) float32: the largest logit and the sum of exp((z - top) / temperature). entropy and rank are empty where not
// wanted.
struct Outputs {
  Outputs(const Tensor& like, int64_t tokens, bool want_entropy, bool want_rank)
      : logprob(fresh(like, tokens, ScalarType::Float)),
        entropy(fresh(like, want_entropy ? tokens : 0, ScalarType::Float)),
        rank(fresh(like, want_rank ? tokens : 0, ScalarType::Long)),
        norms(torch::stable::new_empty(like, {2, tokens}, ScalarType::Float)) {
    float* top = static_cast<float*>(norms.mutable_data_ptr());
    pointers = Logprob{
        static_cast<float*>(logprob.mutable_data_ptr()),
        want_entropy ? static_cast<float*>(entropy.mutable_data_ptr()) : nullptr,
        want_rank ? static_cast<int64_t*>(rank.mutable_data_ptr()) : nullptr, top, top + tokens};
  }
  static Tensor fresh(const Tensor& like, int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(like, {size}, dtype);
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors() const { return {logprob, entropy, rank, norms}; }

  Tensor logprob, entropy, rank, norms;
  Logprob pointers;
};

LogprobGradient gradient_of(
    const Tensor& up, const std::optional<Tensor>& down, const Tensor& norms, const std::optional<Tensor>& entropy,
    int64_t tokens) {
  STD_TORCH_CHECK(
      down.has_value() == entropy.has_value(), kOp, ": `entropy` must be given if and only if `down` is, got ",
      down ? "`down` alone" : "`entropy` alone");
  check_tensor(kOp, "norms", norms, {2, tokens}, ScalarType::Float);
  const auto* top = static_cast<const float*>(norms.const_data_ptr());
  return LogprobGradient{
      top, top + tokens, floats_of(kOp, "up", up, tokens), down ? floats_of(kOp, "down", *down, tokens) : nullptr,
      entropy ? floats_of(kOp, "entropy", *entropy, tokens) : nullptr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob_fwd_cpu(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets, double temperature,
    std::optional<double> softcap, bool want_entropy, bool want_rank, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix rows = rows_of(kOp, "hidden", hidden, head);
  const int64_t* at = targets_of(kOp, targets, rows.rows, head.weight.rows);
  const Lane chosen = choose_lane(kOp, lane);
  TorchHost host(hidden);

  Outputs out(hidden, rows.rows, want_entropy, want_rank);
  sweep_logprob(chosen, rows, head, at, out.pointers, host);
  return out.tensors();
}

// Fills out (columns, T), in weight's dtype, with the logit gradients of columns first .. first + columns.
void linear_logprob_dlogits_cpu(
    Tensor up, std::optional<Tensor> down, Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets,
    Tensor norms, std::optional<Tensor> entropy, double temperature, std::optional<double> softcap, int64_t first,
    Tensor out, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix rows = rows_of(kOp, "hidden", hidden, head);
  const int64_t tokens = rows.rows;
  const int64_t* at = targets_of(kOp, targets, tokens, head.weight.rows);
  const LogprobGradient in = gradient_of(up, down, norms, entropy, tokens);
  TorchHost host(hidden);
  const Tile tile = tile_of(kOp, out, head, tokens, first);
  dlogits_logprob(choose_lane(kOp, lane), rows, head, at, in, tile, host);
}

// Returns logits (T, V) in rows whose columns are neighbours, and the head without its weight.
std::pair<Matrix, Head> logits_of(
    const Tensor& logits, const std::optional<Tensor>& bias, double temperature, std::optional<double> softcap) {
  const Matrix rows = matrix_of(kOp, "logits", logits, -1);
  STD_TORCH_CHECK(
      rows.columns > 0 && rows.column_stride == 1, kOp, ": `logits` must have columns that are neighbours, got shape ",
      shape_text(logits), " and stride ", rows.column_stride);
  return {rows, numbers_of(kOp, Matrix{nullptr, rows.columns, 0, 0, 0, rows.type}, bias, temperature, softcap)};
}

// Scores rows of logits (T, V), before bias and softcap; results as above. Where a target is not in the vocabulary,
// logprob is NaN and rank 0; all results of a token whose target is `ignore_index` are 0. strict: a target that is neither
// makes all results empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob_rows_cpu(
    Tensor logits, std::optional<Tensor> bias, Tensor targets, double temperature, std::optional<double> softcap,
    int64_t ignore_index, bool want_entropy, bool want_rank, bool strict, int64_t lane) {
  const auto [rows, head] = logits_of(logits, bias, temperature, softcap);
  check_tensor(kOp, "targets", targets, {rows.rows}, ScalarType::Long);
  const auto* at = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t t = 0; strict && t < rows.rows; ++t) {
    if (at[t] != ignore_index && (at[t] < 0 || at[t] >= rows.columns)) return Outputs(logits, 0, false, false).tensors();
  }
  Outputs out(logits, rows.rows, want_entropy, want_rank);
  TorchHost host(logits);
  rows_logprob(choose_lane(kOp, lane), rows, head, at, ignore_index, out.pointers, host);
  return out.tensors();
}

// Returns the gradients (T, V) of such logits, in their dtype; NaN where the target is unknown.
Tensor linear_logprob_row_gradients_cpu(
    Tensor up, std::optional<Tensor> down, Tensor logits, std::optional<Tensor> bias, Tensor targets, Tensor norms,
    std::optional<Tensor> entropy, double temperature, std::optional<double> softcap, int64_t lane) {
  const auto [rows, head] = logits_of(logits, bias, temperature, softcap);
  check_tensor(kOp, "targets", targets, {rows.rows}, ScalarType::Long);
  const LogprobGradient in = gradient_of(up, down, norms, entropy, rows.rows);
  TorchHost host(logits);
  Tensor gradient = torch::stable::new_empty(logits, {rows.rows, rows.columns});
  const auto* at = static_cast<const int64_t*>(targets.const_data_ptr());
  gradient_rows_logprob(choose_lane(kOp, lane), rows, head, at, in, gradient.mutable_data_ptr(), host);
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_linear_logprob_native_fwd", TORCH_BOX(&linear_logprob_fwd_cpu));
  m.impl("_linear_logprob_native_rows", TORCH_BOX(&linear_logprob_rows_cpu));
  m.impl("_linear_logprob_native_row_gradients", TORCH_BOX(&linear_logprob_row_gradients_cpu));
  m.impl("_linear_logprob_native_dlogits", TORCH_BOX(&linear_logprob_dlogits_cpu));
}

}  // namespace calm_fast
