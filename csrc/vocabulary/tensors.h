// Tensors at the door of the vocabulary sweeps: checked, and handed over as plain pointers and strides.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "common/parallel.h"
#include "vocabulary/vocabulary.h"

namespace calm_fast::vocabulary {

inline Type type_of(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      op, ": `", name, "` must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? Type::float32 : dtype == ScalarType::Half ? Type::float16 : Type::bfloat16;
}

// A matrix of any strides with `columns` columns (-1: any number).
inline Matrix matrix_of(const char* op, const char* name, const Tensor& tensor, int64_t columns) {
  const bool fits = tensor.dim() == 2 && (columns < 0 || tensor.size(1) == columns);
  STD_TORCH_CHECK(fits, op, ": `", name, "` must have two dims and the others' width, got ", shape_text(tensor));
  return Matrix{
      tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1),
      type_of(op, name, tensor)};
}

// Hidden states that belong to the head.
inline Matrix rows_of(const char* op, const char* name, const Tensor& tensor, const Head& head, int64_t tokens = -1) {
  const Matrix rows = matrix_of(op, name, tensor, head.weight.columns);
  STD_TORCH_CHECK(rows.type == head.weight.type, op, ": `", name, "` must have weight's dtype");
  STD_TORCH_CHECK(tokens < 0 || rows.rows == tokens, op, ": `", name, "` must have ", tokens, " rows");
  return rows;
}

// bias: (V,) float32 or none.
inline Head head_of(
    const char* op, const Tensor& weight, const std::optional<Tensor>& bias, double temperature,
    std::optional<double> softcap) {
  Head head{matrix_of(op, "weight", weight, -1), nullptr, 0.0f, static_cast<float>(temperature)};
  STD_TORCH_CHECK(head.weight.rows > 0 && head.weight.columns > 0, op, ": `weight` must not be empty");
  STD_TORCH_CHECK(temperature > 0 && softcap.value_or(1.0) > 0, op, ": `temperature` and `softcap` must be positive");
  if (softcap) head.softcap = static_cast<float>(*softcap);
  if (bias) {
    check_tensor(op, "bias", *bias, {head.weight.rows}, ScalarType::Float);
    head.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  return head;
}

inline const int64_t* targets_of(const char* op, const Tensor& targets, int64_t tokens, int64_t vocabulary) {
  check_tensor(op, "targets", targets, {tokens}, ScalarType::Long);
  const auto* values = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t i = 0; i < tokens; ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < vocabulary, op, ": `targets` holds ", values[i]);
  }
  return values;
}

inline const float* floats_of(const char* op, const char* name, const Tensor& tensor, int64_t size) {
  check_tensor(op, name, tensor, {size}, ScalarType::Float);
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Where logit gradients go: `out` (columns, T) in weight's dtype, its first row being column `first`.
inline Tile tile_of(const char* op, const Tensor& out, const Head& head, int64_t tokens, int64_t first) {
  STD_TORCH_CHECK(type_of(op, "out", out) == head.weight.type, op, ": `out` must have weight's dtype");
  check_tensor(op, "out", out, {-1, tokens}, out.scalar_type());
  STD_TORCH_CHECK(
      first >= 0 && first + out.size(0) <= head.weight.rows, op, ": `out` reaches from column ", first, " beyond ",
      head.weight.rows);
  STD_TORCH_CHECK(out.size(0) < (int64_t{1} << 24), op, ": `out` has too many columns");
  return Tile{out.mutable_data_ptr(), first, out.size(0), tokens};
}

// torch's allocator, so that its profiler sees what a sweep holds, and torch's threads.
class TorchHost final : public Host {
 public:
  explicit TorchHost(const Tensor& like) : like_(like) {}
  float* memory(int64_t words) override {
    held_.push_back(torch::stable::new_empty(like_, {words}, ScalarType::Float));
    return static_cast<float*>(held_.back().mutable_data_ptr());
  }
  void run(void (*body)(void*, int64_t), void* context, int64_t tasks) override {
    parallel_for(tasks, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(context, i);
    });
  }

 private:
  Tensor like_;
  std::vector<Tensor> held_;
};

}  // namespace calm_fast::vocabulary
