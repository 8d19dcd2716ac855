// linear_nce on the CPU: three products, running sums and logit gradients a tile at a time (common/vocabulary_lane.h).

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/vocabulary_tensors.h"

namespace calm_fast {
namespace {

using namespace vocabulary;

constexpr const char* kOp = "linear_nce";

// lse (3, T): log-sum-exps of the student, of the student and of nat over the temperature; losses (3, T): the hard and
// the soft cross-entropy and KL(p_neg || p_nat) of each token
std::tuple<Tensor, Tensor> linear_nce_fwd(
    Tensor student, Tensor nat, Tensor neg, Tensor weight, std::optional<Tensor> bias, Tensor targets,
    double temperature, std::optional<double> softcap, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix rows = rows_of(kOp, "student", student, head);
  const int64_t tokens = rows.rows;
  const Matrix nats = rows_of(kOp, "nat", nat, head, tokens), negs = rows_of(kOp, "neg", neg, head, tokens);
  const int64_t* at = targets_of(kOp, targets, tokens, head.weight.rows);
  const Lane chosen = choose_lane(kOp, lane);
  TorchHost host(student);

  Tensor lse = torch::stable::new_empty(student, {3, tokens}, ScalarType::Float);
  Tensor losses = torch::stable::new_empty(student, {3, tokens}, ScalarType::Float);
  float *sums = static_cast<float*>(lse.mutable_data_ptr()), *loss = static_cast<float*>(losses.mutable_data_ptr());
  const Nce out{sums, sums + tokens, sums + 2 * tokens, loss, loss + tokens, loss + 2 * tokens};
  sweep_nce(chosen, rows, nats, negs, head, at, out, host);
  return {lse, losses};
}

// Fills out (columns, T), in weight's dtype, with the logit gradients of columns first .. ; coefficients (2, T) weigh
// the hard and the soft cross-entropy.
void linear_nce_dlogits(
    Tensor coefficients, Tensor student, Tensor nat, Tensor weight, std::optional<Tensor> bias, Tensor targets,
    Tensor lse, double temperature, std::optional<double> softcap, int64_t first, Tensor out, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix rows = rows_of(kOp, "student", student, head);
  const int64_t tokens = rows.rows;
  const Matrix nats = rows_of(kOp, "nat", nat, head, tokens);
  const int64_t* at = targets_of(kOp, targets, tokens, head.weight.rows);
  check_tensor(kOp, "coefficients", coefficients, {2, tokens}, ScalarType::Float);
  check_tensor(kOp, "lse", lse, {3, tokens}, ScalarType::Float);
  const auto* hard = static_cast<const float*>(coefficients.const_data_ptr());
  const auto* sums = static_cast<const float*>(lse.const_data_ptr());
  const NceGradient in{sums, sums + tokens, sums + 2 * tokens, hard, hard + tokens};
  TorchHost host(student);
  const Tile tile = tile_of(kOp, out, head, tokens, first);
  dlogits_nce(choose_lane(kOp, lane), rows, nats, head, at, in, tile, host);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_native_linear_nce_fwd", TORCH_BOX(&linear_nce_fwd));
  m.impl("_native_linear_nce_dlogits", TORCH_BOX(&linear_nce_dlogits));
}

}  // namespace calm_fast
