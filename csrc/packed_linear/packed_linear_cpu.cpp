// x w^T with a weight that is kept packed: what layers multiply with in inference (calm_fast/_ops/packed_linear/api.py).

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "common/lanes.h"
#include "packed_linear/packed_product.h"

namespace calm_fast {
namespace {

// w (n, k) float32 in panels for packed_linear; (0,) where this CPU has no use for them
Tensor packed_linear_pack(const Tensor& w, int64_t lane) {
  const char* op = "_packed_linear_native_pack";
  if (choose_lane(op, lane) < Lane::avx512) return torch::stable::new_empty(w, {0});
  check_tensor(op, "w", w, {-1, -1}, ScalarType::Float);
  const int64_t n = w.size(0), k = w.size(1);
  Tensor packed = torch::stable::new_empty(w, {panels(n), k, kPanel});
  pack_panels(static_cast<const float*>(w.data_ptr()), n, k, static_cast<float*>(packed.data_ptr()));
  return packed;
}

// x (..., k) w^T [+ add (..., n)], float32, w (n, k) as packed_linear_pack gives it
Tensor packed_linear(
    const Tensor& x, const Tensor& packed, int64_t n, const std::optional<Tensor>& add, int64_t lane) {
  const char* op = "_packed_linear_native_fwd";
  STD_TORCH_CHECK(
      choose_lane(op, lane) >= Lane::avx512, op, ": packed products need AVX-512, which lane ", lane, " does not have");
  STD_TORCH_CHECK(x.dim() > 0, op, ": `x` must have shape (..., k), got no dimension");
  STD_TORCH_CHECK(n >= 0, op, ": `n` must not be negative, got ", n);
  std::vector<int64_t> shape(x.dim());
  int64_t tokens = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    shape[i] = x.size(i);
    if (i + 1 < x.dim()) tokens *= shape[i];
  }
  const int64_t k = shape.back();
  check_tensor(op, "x", x, shape, ScalarType::Float);
  check_tensor(op, "packed", packed, {panels(n), k, kPanel}, ScalarType::Float);
  shape.back() = n;
  if (add) check_tensor(op, "add", *add, shape, ScalarType::Float);
  Tensor out = torch::stable::new_empty(x, shape);
  packed_product(
      static_cast<const float*>(x.data_ptr()), static_cast<const float*>(packed.data_ptr()),
      add ? static_cast<const float*>(add->data_ptr()) : nullptr, static_cast<float*>(out.data_ptr()), tokens, n, k);
  return out;
}

}  // namespace
}  // namespace calm_fast

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_packed_linear_native_fwd", TORCH_BOX(&calm_fast::packed_linear));
  m.impl("_packed_linear_native_pack", TORCH_BOX(&calm_fast::packed_linear_pack));
}
