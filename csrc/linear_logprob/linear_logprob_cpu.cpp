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

// Returns logprob (T,) float32, entropy (T,) float32, rank (T,) int64 and lse (T,) float32. entropy and rank are empty
// where not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob_fwd_cpu(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets, double temperature,
    std::optional<double> softcap, bool want_entropy, bool want_rank, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix rows = rows_of(kOp, "hidden", hidden, head);
  const int64_t* at = targets_of(kOp, targets, rows.rows, head.weight.rows);
  const Lane chosen = choose_lane(kOp, lane);
  TorchHost host(hidden);

  auto fresh = [&](bool wanted, ScalarType dtype) {
    return torch::stable::new_empty(hidden, {wanted ? rows.rows : 0}, dtype);
  };
  Tensor logprob = fresh(true, ScalarType::Float), entropy = fresh(want_entropy, ScalarType::Float);
  Tensor rank = fresh(want_rank, ScalarType::Long), lse = fresh(true, ScalarType::Float);
  const Logprob out{
      static_cast<float*>(logprob.mutable_data_ptr()),
      want_entropy ? static_cast<float*>(entropy.mutable_data_ptr()) : nullptr,
      want_rank ? static_cast<int64_t*>(rank.mutable_data_ptr()) : nullptr,
      static_cast<float*>(lse.mutable_data_ptr())};
  sweep_logprob(chosen, rows, head, at, out, host);
  return {logprob, entropy, rank, lse};
}

// Fills out (columns, T), in weight's dtype, with the logit gradients of columns first .. first + columns.
void linear_logprob_dlogits_cpu(
    Tensor up, std::optional<Tensor> down, Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor targets,
    Tensor lse, std::optional<Tensor> entropy, double temperature, std::optional<double> softcap, int64_t first,
    Tensor out, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix rows = rows_of(kOp, "hidden", hidden, head);
  const int64_t tokens = rows.rows;
  const int64_t* at = targets_of(kOp, targets, tokens, head.weight.rows);
  STD_TORCH_CHECK(
      down.has_value() == entropy.has_value(), kOp, ": `entropy` must be given if and only if `down` is, got ",
      down ? "`down` alone" : "`entropy` alone");
  const LogprobGradient in{
      floats_of(kOp, "lse", lse, tokens), floats_of(kOp, "up", up, tokens),
      down ? floats_of(kOp, "down", *down, tokens) : nullptr,
      entropy ? floats_of(kOp, "entropy", *entropy, tokens) : nullptr};
  TorchHost host(hidden);
  const Tile tile = tile_of(kOp, out, head, tokens, first);
  dlogits_logprob(choose_lane(kOp, lane), rows, head, at, in, tile, host);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_linear_logprob_native_fwd", TORCH_BOX(&linear_logprob_fwd_cpu));
  m.impl("_linear_logprob_native_dlogits", TORCH_BOX(&linear_logprob_dlogits_cpu));
}

}  // namespace calm_fast
