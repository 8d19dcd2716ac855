// x w^T with a weight packed once, for the layers' products in inference (calm_fast/_ops/packed_linear).

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "common/lanes.h"
#include "packed_linear/packed_product.h"

namespace calm_fast {
namespace {

constexpr const char* kOp = "packed_linear";

// Returns w (n, k) float32 in panels for packed_linear_fwd_cpu, or an empty tensor in the scalar lane.
Tensor packed_linear_pack_cpu(const Tensor& w, int64_t lane) {
  const int64_t panel = panel_of(choose_lane(kOp, lane));
  if (panel == 0) return torch::stable::new_empty(w, {0});
  check_tensor(kOp, "w", w, {-1, -1}, ScalarType::Float);
  const int64_t n = w.size(0), k = w.size(1);
  Tensor packed = torch::stable::new_empty(w, {panels(n, panel), k, panel});
  pack_panels(static_cast<const float*>(w.data_ptr()), n, k, panel, static_cast<float*>(packed.data_ptr()));
  return packed;
}

// Returns x (..., k) w^T [+ add (..., n)], float32, where `packed` is w (n, k) from packed_linear_pack_cpu. The panels
// say which lane packed them; it runs, whatever the best lane is now.
Tensor packed_linear_fwd_cpu(
    const Tensor& x, const Tensor& packed, int64_t n, const std::optional<Tensor>& add, int64_t lane) {
  const Lane chosen = choose_lane(kOp, lane);
  STD_TORCH_CHECK(packed.dim() == 3, kOp, ": `packed` must have shape (panels, k, 16 or 32), got ", shape_text(packed));
  const int64_t panel = packed.size(2) == panel_of(Lane::avx512) ? panel_of(Lane::avx512) : panel_of(Lane::avx2);
  STD_TORCH_CHECK(
      panel <= panel_of(chosen), kOp, ": `lane` must be ", lane_name(panel == 16 ? Lane::avx2 : Lane::avx512),
      " or more for these packed products, got ", lane_name(chosen));
  STD_TORCH_CHECK(x.dim() > 0, kOp, ": `x` must have shape (..., k), got ()");
  STD_TORCH_CHECK(n >= 0, kOp, ": `n` must not be negative, got ", n);
  std::vector<int64_t> shape(x.dim());
  int64_t tokens = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    shape[i] = x.size(i);
    if (i + 1 < x.dim()) tokens *= shape[i];
  }
  const int64_t k = shape.back();
  check_tensor(kOp, "x", x, shape, ScalarType::Float);
  check_tensor(kOp, "packed", packed, {panels(n, panel), k, panel}, ScalarType::Float);
  shape.back() = n;
  if (add) check_tensor(kOp, "add", *add, shape, ScalarType::Float);
  Tensor out = torch::stable::new_empty(x, shape);
  packed_product(
      Product{
          static_cast<const float*>(x.data_ptr()), static_cast<const float*>(packed.data_ptr()),
          add ? static_cast<const float*>(add->data_ptr()) : nullptr, static_cast<float*>(out.data_ptr()), tokens, n,
          k},
      panel);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_packed_linear_native_fwd", TORCH_BOX(&packed_linear_fwd_cpu));
  m.impl("_packed_linear_native_pack", TORCH_BOX(&packed_linear_pack_cpu));
}

}  // namespace calm_fast
