// linear_nce on the CPU: three products, running sums and logit gradients, a tile at a time (vocabulary/sweep_lane.h),
// and the gradient of the hidden states from logits that a sweep kept (vocabulary/hidden_gradient_lane.h).

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "vocabulary/tensors.h"

namespace calm_fast {
namespace {

using namespace vocabulary;

constexpr const char* kOp = "linear_nce";

// Returns the memory of kept logits: (2, V, stride), float16 for bfloat16 inputs, else float32.
NceKept kept_of(const Tensor& kept, const Tensor& references, const Head& head, int64_t tokens) {
  const bool wide = head.weight.type != Type::bfloat16;
  const int64_t stride = (tokens + 15) / 16 * 16;
  STD_TORCH_CHECK(
      head.weight.rows < (int64_t{1} << 24), kOp,
      ": `weight` must have fewer than 2^24 rows where logits are kept, got ", head.weight.rows);
  check_tensor(kOp, "kept", kept, {2, head.weight.rows, stride}, wide ? ScalarType::Float : ScalarType::Half);
  check_tensor(kOp, "references", references, {2, stride}, ScalarType::Float);
  char* data = static_cast<char*>(kept.mutable_data_ptr());
  return NceKept{
      data, data + head.weight.rows * stride * (wide ? 4 : 2), static_cast<float*>(references.mutable_data_ptr()),
      stride, wide ? Type::float32 : Type::float16};
}

// Returns the inputs of the logit gradients: coefficients (2, T) and norms (5, T), as the sweep returns them.
NceGradient gradient_of(const Tensor& coefficients, const Tensor& norms, int64_t tokens) {
  check_tensor(kOp, "coefficients", coefficients, {2, tokens}, ScalarType::Float);
  check_tensor(kOp, "norms", norms, {5, tokens}, ScalarType::Float);
  const auto* hard = static_cast<const float*>(coefficients.const_data_ptr());
  const auto* sums = static_cast<const float*>(norms.const_data_ptr());
  return NceGradient{
      sums, sums + tokens, sums + 2 * tokens, sums + 3 * tokens, sums + 4 * tokens, hard, hard + tokens};
}

// Returns norms, losses and references, all float32.
//   norms (5, T): the largest logit of the student, its sums of exp(z - top) and exp((z - top) / temperature), the
//       largest logit of nat and its sum of exp((z - top) / temperature)
//   losses (3, T): the hard and the soft cross-entropy and KL(p_neg || p_nat) of each token; 0 if a stream is missing
//   references (2, stride): the offsets of 16-bit kept logits, empty without `kept`
// Fills `kept`, which requires the student; the sums are then those of the logits as they are kept.
std::tuple<Tensor, Tensor, Tensor> linear_nce_fwd_cpu(
    std::optional<Tensor> student, Tensor nat, std::optional<Tensor> neg, Tensor weight, std::optional<Tensor> bias,
    Tensor targets, double temperature, std::optional<double> softcap, std::optional<Tensor> kept, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix nats = rows_of(kOp, "nat", nat, head);
  const int64_t tokens = nats.rows;
  std::optional<Matrix> rows, negs;
  if (student) rows = rows_of(kOp, "student", *student, head, tokens);
  if (neg) negs = rows_of(kOp, "neg", *neg, head, tokens);
  const int64_t* at = targets_of(kOp, targets, tokens, head.weight.rows);
  const Lane chosen = choose_lane(kOp, lane);
  TorchHost host(nat);

  STD_TORCH_CHECK(student || !kept, kOp, ": `student` must be given where logits are kept, got `kept` without it");
  Tensor references = torch::stable::new_zeros(nat, {2, kept ? (tokens + 15) / 16 * 16 : 0}, ScalarType::Float);
  const NceKept memory = kept ? kept_of(*kept, references, head, tokens) : NceKept{};
  Tensor norms = torch::stable::new_zeros(nat, {5, tokens}, ScalarType::Float);
  Tensor losses = torch::stable::new_zeros(nat, {3, tokens}, ScalarType::Float);
  float *sums = static_cast<float*>(norms.mutable_data_ptr()), *loss = static_cast<float*>(losses.mutable_data_ptr());
  const Nce out{
      sums, sums + tokens, sums + 2 * tokens, sums + 3 * tokens, sums + 4 * tokens, loss, loss + tokens,
      loss + 2 * tokens};
  sweep_nce(chosen, rows ? &*rows : nullptr, nats, negs ? &*negs : nullptr, head, at, out, memory, host);
  return {norms, losses, references};
}

// Fills out (columns, T), in weight's dtype, with the logit gradients of columns first .. first + columns.
// coefficients (2, T) float32 are the weights of the hard and the soft cross-entropy.
void linear_nce_dlogits_cpu(
    Tensor coefficients, Tensor student, Tensor nat, Tensor weight, std::optional<Tensor> bias, Tensor targets,
    Tensor norms, double temperature, std::optional<double> softcap, int64_t first, Tensor out, int64_t lane) {
  const Head head = head_of(kOp, weight, bias, temperature, softcap);
  const Matrix rows = rows_of(kOp, "student", student, head);
  const int64_t tokens = rows.rows;
  const Matrix nats = rows_of(kOp, "nat", nat, head, tokens);
  const int64_t* at = targets_of(kOp, targets, tokens, head.weight.rows);
  const NceGradient in = gradient_of(coefficients, norms, tokens);
  TorchHost host(student);
  const Tile tile = tile_of(kOp, out, head, tokens, first);
  dlogits_nce(choose_lane(kOp, lane), rows, nats, head, at, in, tile, host);
}

// Returns the gradient (T, d) float32 of the hidden states whose logits are in `kept`; coefficients and norms as above.
Tensor linear_nce_gradient_cpu(
    Tensor coefficients, Tensor kept, Tensor references, Tensor weight, Tensor targets, Tensor norms, double temperature,
    std::optional<double> softcap, int64_t lane) {
  const Head head = head_of(kOp, weight, std::nullopt, temperature, softcap);
  const int64_t tokens = targets.numel();
  const int64_t* at = targets_of(kOp, targets, tokens, head.weight.rows);
  const NceKept memory = kept_of(kept, references, head, tokens);
  const NceGradient in = gradient_of(coefficients, norms, tokens);
  const Lane chosen = choose_lane(kOp, lane);
  TorchHost host(weight);
  Tensor gradient = torch::stable::new_empty(weight, {tokens, head.weight.columns}, ScalarType::Float);
  gradient_nce(chosen, memory, head, at, tokens, in, static_cast<float*>(gradient.mutable_data_ptr()), host);
  return gradient;
}

// Returns logits (T, C) in rows whose columns are neighbours; `like`: another stream, whose shape and dtype they have.
Matrix logits_of(const char* name, const Tensor& logits, const Matrix* like) {
  const Matrix rows = matrix_of(kOp, name, logits, like ? like->columns : -1);
  STD_TORCH_CHECK(
      rows.columns > 0 && rows.column_stride == 1, kOp, ": `", name, "` must have columns that are neighbours, got shape ",
      shape_text(logits), " and stride ", rows.column_stride);
  STD_TORCH_CHECK(
      !like || (rows.rows == like->rows && rows.type == like->type), kOp, ": `", name,
      "` must have the shape and dtype of `nat`, got shape ", shape_text(logits), " and ",
      dtype_name(logits.scalar_type()));
  return rows;
}

// Returns the head of C columns without its weight.
Head columns_of(
    const Matrix& logits, const std::optional<Tensor>& bias, double temperature, std::optional<double> softcap) {
  return numbers_of(kOp, Matrix{nullptr, logits.columns, 0, 0, 0, logits.type}, bias, temperature, softcap);
}

// Returns the sums (10, T) float64 of some columns' logits, before bias and softcap: see vocabulary.h.
Tensor linear_nce_rows_cpu(
    std::optional<Tensor> student, Tensor nat, std::optional<Tensor> neg, std::optional<Tensor> bias, double temperature,
    std::optional<double> softcap, int64_t lane) {
  const Matrix nats = logits_of("nat", nat, nullptr);
  std::optional<Matrix> rows, negs;
  if (student) rows = logits_of("student", *student, &nats);
  if (neg) negs = logits_of("neg", *neg, &nats);
  TorchHost host(nat);
  Tensor sums = torch::stable::new_empty(nat, {kNceRowSums, nats.rows}, ScalarType::Double);
  rows_nce(
      choose_lane(kOp, lane), rows ? &*rows : nullptr, nats, negs ? &*negs : nullptr,
      columns_of(nats, bias, temperature, softcap), static_cast<double*>(sums.mutable_data_ptr()), host);
  return sums;
}

// Replaces the student's logits (T, C) by their gradients. targets (T,): relative to the first column; one outside
// belongs to other columns.
void linear_nce_row_gradients_cpu(
    Tensor coefficients, Tensor student, Tensor nat, std::optional<Tensor> bias, Tensor targets, Tensor norms,
    double temperature, std::optional<double> softcap, int64_t lane) {
  const Matrix nats = logits_of("nat", nat, nullptr), rows = logits_of("student", student, &nats);
  check_tensor(kOp, "targets", targets, {nats.rows}, ScalarType::Long);
  TorchHost host(nat);
  gradient_rows_nce(
      choose_lane(kOp, lane), rows, nats, columns_of(nats, bias, temperature, softcap),
      static_cast<const int64_t*>(targets.const_data_ptr()), gradient_of(coefficients, norms, nats.rows),
      student.mutable_data_ptr(), rows.row_stride, host);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_linear_nce_native_fwd", TORCH_BOX(&linear_nce_fwd_cpu));
  m.impl("_linear_nce_native_dlogits", TORCH_BOX(&linear_nce_dlogits_cpu));
  m.impl("_linear_nce_native_rows", TORCH_BOX(&linear_nce_rows_cpu));
  m.impl("_linear_nce_native_row_gradients", TORCH_BOX(&linear_nce_row_gradients_cpu));
  m.impl("_linear_nce_native_gradient", TORCH_BOX(&linear_nce_gradient_cpu));
}

}  // namespace calm_fast
