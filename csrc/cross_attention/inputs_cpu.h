// Checks of the CPU kernels of cross_attention, decode and tiles.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "common/checks.h"
#include "cross_attention/limits.h"

namespace calm_fast::cross_attention {

constexpr const char* kOp = "cross_attention";

struct Shape {
  int64_t batch, m, heads, n, kv_heads, d;
  int64_t group;  // query heads of a KV head
};

// Checks q (B, M, H, D), k and v (B, N, Hkv, D), lo and hi (B, M), and returns their shape.
inline Shape check_inputs(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lo, const std::optional<Tensor>& hi,
    double scale, int64_t max_keys) {
  STD_TORCH_CHECK(q.dim() == 4, kOp, ": `q` must have shape (B, M, H, D), got ", shape_text(q));
  STD_TORCH_CHECK(k.dim() == 4, kOp, ": `k` must have shape (B, N, Hkv, D), got ", shape_text(k));
  Shape s{q.size(0), q.size(1), q.size(2), k.size(1), k.size(2), q.size(3), 0};
  check_float_dtype(kOp, "q", q.scalar_type());
  STD_TORCH_CHECK(
      s.d >= 1 && s.d <= kMaxHeadDim, kOp, ": `q` must have a head dim of 1 to ", kMaxHeadDim, ", got ", s.d);
  STD_TORCH_CHECK(
      q.stride(3) == 1 || s.d == 1, kOp, ": `q` must have a contiguous last dimension, got strides ", strides_text(q));
  STD_TORCH_CHECK(
      s.kv_heads >= 1 && s.heads % s.kv_heads == 0, kOp, ": `k` must have a number of KV heads that divides the ",
      s.heads, " heads of `q`, got ", s.kv_heads);
  STD_TORCH_CHECK(s.n <= max_keys, kOp, ": `k` must have at most ", max_keys, " keys, got N = ", s.n);
  STD_TORCH_CHECK(scale > 0, kOp, ": `scale` must be positive, got ", scale);
  for (const auto& [name, tensor] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    STD_TORCH_CHECK(
        tensor->dim() == 4 && tensor->size(0) == s.batch && tensor->size(1) == s.n && tensor->size(2) == s.kv_heads &&
            tensor->size(3) == s.d && tensor->scalar_type() == q.scalar_type() &&
            (tensor->stride(3) == 1 || s.d == 1),
        kOp, ": `", name, "` must have shape (B, N, Hkv, D), q's dtype and a contiguous last dimension, got shape ",
        shape_text(*tensor), ", ", dtype_name(tensor->scalar_type()), " and strides ", strides_text(*tensor));
  }
  if (lo.has_value()) check_tensor(kOp, "lo", *lo, {s.batch, s.m}, ScalarType::Int);
  if (hi.has_value()) check_tensor(kOp, "hi", *hi, {s.batch, s.m}, ScalarType::Int);
  s.group = s.heads / s.kv_heads;
  return s;
}

inline const int32_t* bounds_data(const std::optional<Tensor>& bounds) {
  return bounds.has_value() ? static_cast<const int32_t*>(bounds->const_data_ptr()) : nullptr;
}

}  // namespace calm_fast::cross_attention
