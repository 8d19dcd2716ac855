// Checks the tensors of the vocabulary kernels and turns them into plain pointers and strides.
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
  check_float_dtype(op, name, dtype);
  return dtype == ScalarType::Float ? Type::float32 : dtype == ScalarType::Half ? Type::float16 : Type::bfloat16;
}

// Returns a matrix of any strides that must have `columns` columns (-1: any number).
inline Matrix matrix_of(const char* op, const char* name, const Tensor& tensor, int64_t columns) {
  const bool fits = tensor.dim() == 2 && (columns < 0 || tensor.size(1) == columns);
  STD_TORCH_CHECK(
      fits, op, ": `", name, "` must have shape (*, ", columns < 0 ? std::string("*") : std::to_string(columns),
      "), got ", shape_text(tensor));
  return Matrix{
      tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1),
      type_of(op, name, tensor)};
}

// Returns hidden states (T, d), which must have the width and dtype of the head's weight.
inline Matrix rows_of(const char* op, const char* name, const Tensor& tensor, const Head& head, int64_t tokens = -1) {
  const Matrix rows = matrix_of(op, name, tensor, head.weight.columns);
  STD_TORCH_CHECK(
      rows.type == head.weight.type, op, ": `", name, "` must have the dtype of `weight`, got ",
      dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(
      tokens < 0 || rows.rows == tokens, op, ": `", name, "` must have ", tokens, " rows, got ", rows.rows);
  return rows;
}

// Returns the LM head of this weight. bias: (V,) float32 or none.
inline Head numbers_of(
    const char* op, const Matrix& weight, const std::optional<Tensor>& bias, double temperature,
    std::optional<double> softcap) {
  Head head{weight, nullptr, 0.0f, static_cast<float>(temperature)};
  STD_TORCH_CHECK(temperature > 0, op, ": `temperature` must be positive, got ", temperature);
  STD_TORCH_CHECK(softcap.value_or(1.0) > 0, op, ": `softcap` must be positive, got ", softcap.value_or(1.0));
  if (softcap) head.softcap = static_cast<float>(*softcap);
  if (bias) {
    check_tensor(op, "bias", *bias, {weight.rows}, ScalarType::Float);
    head.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  return head;
}

// Returns the LM head. bias: (V,) float32 or none.
inline Head head_of(
    const char* op, const Tensor& weight, const std::optional<Tensor>& bias, double temperature,
    std::optional<double> softcap) {
  const Matrix rows = matrix_of(op, "weight", weight, -1);
  STD_TORCH_CHECK(
      rows.rows > 0 && rows.columns > 0, op, ": `weight` must not be empty, got shape ", shape_text(weight));
  return numbers_of(op, rows, bias, temperature, softcap);
}

inline const int64_t* targets_of(const char* op, const Tensor& targets, int64_t tokens, int64_t vocabulary) {
  check_tensor(op, "targets", targets, {tokens}, ScalarType::Long);
  const auto* values = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t i = 0; i < tokens; ++i) {
    STD_TORCH_CHECK(
        values[i] >= 0 && values[i] < vocabulary, op, ": `targets` must lie in [0, ", vocabulary, "), got ", values[i]);
  }
  return values;
}

inline const float* floats_of(const char* op, const char* name, const Tensor& tensor, int64_t size) {
  check_tensor(op, name, tensor, {size}, ScalarType::Float);
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Returns the tile for logit gradients: `out` (columns, T) in weight's dtype, whose first row is column `first`.
inline Tile tile_of(const char* op, const Tensor& out, const Head& head, int64_t tokens, int64_t first) {
  STD_TORCH_CHECK(
      type_of(op, "out", out) == head.weight.type, op, ": `out` must have the dtype of `weight`, got ",
      dtype_name(out.scalar_type()));
  check_tensor(op, "out", out, {-1, tokens}, out.scalar_type());
  STD_TORCH_CHECK(
      out.size(0) <= head.weight.rows, op, ": `out` must have at most ", head.weight.rows, " rows, got ", out.size(0));
  STD_TORCH_CHECK(
      first >= 0 && first + out.size(0) <= head.weight.rows, op, ": `first` must lie in [0, ",
      head.weight.rows - out.size(0), "] for an `out` of ", out.size(0), " columns, got ", first);
  STD_TORCH_CHECK(
      out.size(0) < (int64_t{1} << 24), op, ": `out` must have fewer than 2^24 columns, got ", out.size(0));
  return Tile{out.mutable_data_ptr(), first, out.size(0), tokens};
}

// Takes memory from torch's allocator, so that its profiler sees it, and runs on torch's threads.
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
