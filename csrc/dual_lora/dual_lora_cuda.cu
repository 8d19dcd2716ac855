// dual_lora for few tokens on a GPU: checks and launches. The kernels are in dual_lora.cuh.
#include "common/cuda.h"

#include <limits>

#include "dual_lora/dual_lora.cuh"

namespace calm_fast {
namespace {

constexpr const char* kOp = "dual_lora";

// Checks zg (T, 2 R), up (m or N, R) and r_pos.
void check_ranks(const Tensor& zg, const Tensor& up, int64_t r_pos) {
  STD_TORCH_CHECK(
      zg.dim() == 2 && zg.size(1) >= 2 && zg.size(1) % 2 == 0, kOp, ": `zg` must have shape (T, 2 R), got ",
      shape_text(zg));
  const ScalarType dtype = zg.scalar_type();
  check_float_dtype(kOp, "zg", dtype);
  const int64_t r = zg.size(1) / 2;
  check_tensor(kOp, "zg", zg, {-1, -1}, dtype);
  check_tensor(kOp, "up", up, {-1, r}, dtype);
  check_same_device(kOp, "up", up, zg);
  STD_TORCH_CHECK(
      zg.size(0) <= dual_lora::kMaxTokens, kOp, ": `zg` must have at most ", dual_lora::kMaxTokens, " tokens, got ",
      zg.size(0));
  STD_TORCH_CHECK(
      r <= dual_lora::kMaxRank, kOp, ": `zg` must have shape (T, 2 R) with R at most ", dual_lora::kMaxRank,
      ", got R = ", r);
  STD_TORCH_CHECK(r_pos >= 0 && r_pos <= r, kOp, ": `r_pos` must lie in [0, ", r, "], got ", r_pos);
}

// Checks shape (rows, width), zg's dtype and device.
void check_like_zg(
    const char* name, const Tensor& tensor, int64_t rows, int64_t width, const Tensor& zg) {
  check_tensor(kOp, name, tensor, {rows, width}, zg.scalar_type());
  check_same_device(kOp, name, tensor, zg);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  STD_TORCH_CHECK(
      tensor.size(0) <= kMost && tensor.size(1) <= kMost, kOp, ": `", name, "` must have at most ", kMost,
      " rows and columns, got ", shape_text(tensor));
}

bool aligned(const Tensor& tensor) {
  return tensor.size(1) % dual_lora::kEach == 0 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

template <class T>
dual_lora::Args<T> arguments(const Tensor& zg, int64_t r_pos, const Tensor& out) {
  dual_lora::Args<T> args = {};
  args.zg = data<T>(zg);
  args.out = mutable_data<T>(out);
  args.tokens = static_cast<int>(zg.size(0));
  args.r = static_cast<int>(zg.size(1) / 2);
  args.r_pos = static_cast<int>(r_pos);
  return args;
}

template <class Body>
void for_dtype(const Tensor& tensor, Body body) {
  if (tensor.scalar_type() == ScalarType::Float) body(0.0f);
  else if (tensor.scalar_type() == ScalarType::BFloat16) body(simt::bfloat16());
  else body(simt::float16());
}

// Returns out (T, N) = y + mix last^T. With u (T, m) and c2 (N, m) the released form, where up is (m, R); without them
// the paper's form, where up is (N, R).
Tensor dual_lora_update_cuda(
    Tensor zg, Tensor y, Tensor up, std::optional<Tensor> u, std::optional<Tensor> c2, int64_t r_pos) {
  check_ranks(zg, up, r_pos);
  const int64_t tokens = zg.size(0), r = zg.size(1) / 2;
  check_like_zg("y", y, tokens, -1, zg);
  const int64_t n = y.size(1), hidden = u.has_value() ? up.size(0) : 0;
  STD_TORCH_CHECK(
      u.has_value() == c2.has_value(), kOp, ": `c2` must be given if and only if `u` is, got ",
      u.has_value() ? "`u` alone" : "`c2` alone");
  if (u.has_value()) {
    check_like_zg("u", *u, tokens, hidden, zg);
    check_like_zg("c2", *c2, n, hidden, zg);
    STD_TORCH_CHECK(
        hidden <= dual_lora::kMaxFused, kOp, ": `u` must have shape (T, m) with m at most ", dual_lora::kMaxFused,
        ", got m = ", hidden);
  } else {
    check_like_zg("up", up, n, r, zg);
  }
  const OnDeviceOf device(zg);
  const Tensor out = torch::stable::new_empty(y, {tokens, n});
  if (tokens == 0 || n == 0) return out;
  const Tensor& last = u.has_value() ? *c2 : up;
  const dual_lora::Plan plan = dual_lora::plan_update(
      tokens, r, last.size(1), n, u.has_value(), processors_of(kOp, zg.get_device_index()));
  for_dtype(zg, [&](auto zero) {
    using T = decltype(zero);
    dual_lora::Args<T> args = arguments<T>(zg, r_pos, out);
    args.y = data<T>(y);
    args.last = data<T>(last);
    args.up = u.has_value() ? data<T>(up) : nullptr;
    args.u = data<T>(u);
    args.hidden = static_cast<int>(hidden);
    args.inner = static_cast<int>(last.size(1));
    args.n = static_cast<int>(n);
    check_launch(kOp, dual_lora::launch_update(args, plan, aligned(last) && aligned(up), device.stream()));
  });
  return out;
}

// Returns the mix (T, m) of the released form. `lane` is for the CPU only.
Tensor dual_lora_mix_cuda(Tensor zg, Tensor u, Tensor up, int64_t r_pos, int64_t /*lane*/) {
  check_ranks(zg, up, r_pos);
  const int64_t tokens = zg.size(0), hidden = up.size(0);
  check_like_zg("u", u, tokens, hidden, zg);
  const OnDeviceOf device(zg);
  const Tensor mix = torch::stable::new_empty(u, {tokens, hidden});
  if (tokens == 0 || hidden == 0) return mix;
  for_dtype(zg, [&](auto zero) {
    using T = decltype(zero);
    dual_lora::Args<T> args = arguments<T>(zg, r_pos, mix);
    args.u = data<T>(u);
    args.up = data<T>(up);
    args.hidden = static_cast<int>(hidden);
    const dual_lora::Plan plan = dual_lora::plan_mix(tokens, args.r, hidden);
    check_launch(kOp, dual_lora::launch_mix(args, plan, aligned(up), device.stream()));
  });
  return mix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CUDA, m) {
  m.impl("_dual_lora_native_update", TORCH_BOX(&dual_lora_update_cuda));
  m.impl("_dual_lora_native_mix", TORCH_BOX(&dual_lora_mix_cuda));
}

}  // namespace calm_fast
