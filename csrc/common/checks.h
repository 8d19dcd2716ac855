// Checks at the door of a native function. The public op has validated its arguments; these keep a wrong direct call
// of torch.ops.calm_fast._<op>_native_<part> from reading outside a tensor. They throw, so never call them inside parallel_for.
#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

namespace calm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

// Shape `sizes` (-1: any length there), row-major without gaps, the given dtype.
inline void check_tensor(
    const char* op, const char* name, const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes,
    ScalarType dtype) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::string expected;
  int64_t i = 0;
  for (int64_t size : sizes) {
    fits = fits && (size < 0 || tensor.size(i) == size);
    expected += (i++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  STD_TORCH_CHECK(fits, op, ": `", name, "` must have shape (", expected, "), got ", shape_text(tensor));
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": `", name, "` must be contiguous");
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": `", name, "` has the wrong dtype (", static_cast<int>(tensor.scalar_type()),
      " instead of ", static_cast<int>(dtype), " in torch's numbering)");
}

}  // namespace calm_fast
