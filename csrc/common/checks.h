// Argument checks of the native kernels. The public op has already validated its arguments; these checks keep a wrong
// direct call of torch.ops.calm_fast._<op>_native_<part> from reading outside a tensor. They throw, so they must not
// run inside parallel_for.
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

inline std::string strides_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.stride(i));
  return text + ")";
}

// A dtype as torch spells it, without the "torch." in front.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Requires float32, bfloat16 or float16.
inline void check_float_dtype(const char* op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(
      is_float_dtype(dtype), op, ": `", name, "` must be float32, bfloat16 or float16, got ", dtype_name(dtype));
}

// Requires shape `sizes` (-1 allows any length there), contiguous memory and the given dtype.
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
  STD_TORCH_CHECK(
      tensor.is_contiguous(), op, ": `", name, "` must be contiguous, got strides ", strides_text(tensor),
      "; call .contiguous()");
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": `", name, "` must be ", dtype_name(dtype), ", got ",
      dtype_name(tensor.scalar_type()));
}

}  // namespace calm_fast
