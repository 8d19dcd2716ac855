// dual_lora for few tokens on a GPU: checks and launches. The kernels are in dual_lora.cuh.
#include "common/cuda.h"

#include <limits>

#include "dual_lora/dual_lora.cuh"

namespace calm_fast {
namespace {

// Checks zg (T, 2 R), up (m or N, R) and r_pos.
void check_ranks(const char* op, const Tensor& zg, const Tensor& up, int64_t r_pos) {
  STD_TORCH_CHECK(
      zg.dim() == 2 && zg.size(1) >= 2 && zg.size(1) % 2 == 0, op, ": `zg` must have shape (T, 2 R), got ",
      shape_text(zg));
  const ScalarType dtype = zg.scalar_type();
  check_float_dtype(op, "zg", dtype);
  const int64_t r = zg.size(1) / 2;
  check_tensor(op, "zg", zg, {-1, -1}, dtype);
  check_tensor(op, "up", up, {-1, r}, dtype);
  check_same_device(op, "up", up, zg);
  STD_TORCH_CHECK(
      zg.size(0) <= dual_lora::kMaxTokens, op, ": `zg` must have at most ", dual_lora::kMaxTokens, " tokens, got ",
      zg.size(0));
  STD_TORCH_CHECK(
      r <= dual_lora::kMaxRank, op, ": `zg` must have shape (T, 2 R) with R at most ", dual_lora::kMaxRank,
      ", got R = ", r);
  STD_TORCH_CHECK(r_pos >= 0 && r_pos <= r, op, ": `r_pos` must lie in [0, ", r, "], got ", r_pos);
}

// Checks shape (rows, width), zg's dtype and device.
void check_like_zg(
    const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t width, const Tensor& zg) {
  check_tensor(op, name, tensor, {rows, width}, zg.scalar_type());
  check_same_device(op, name, tensor, zg);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  STD_TORCH_CHECK(
      tensor.size(0) <= kMost && tensor.size(1) <= kMost, op, ": `", name, "` must have at most ", kMost,
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
  const char* op = "_dual_lora_native_update";
  check_ranks(op, zg, up, r_pos);
  const int64_t tokens = zg.size(0), r = zg.size(1) / 2;
  check_like_zg(op, "y", y, tokens, -1, zg);
  const int64_t n = y.size(1), hidden = u.has_value() ? up.size(0) : 0;
  STD_TORCH_CHECK(
      u.has_value() == c2.has_value(), op, ": `c2` must be given if and only if `u` is, got ",
      u.has_value() ? "`u` alone" : "`c2` alone");
  if (u.has_value()) {
    check_like_zg(op, "u", *u, tokens, hidden, zg);
    check_like_zg(op, "c2", *c2, n, hidden, zg);
    STD_TORCH_CHECK(
        hidden <= dual_lora::kMaxFused, op, ": `u` must have shape (T, m) with m at most ", dual_lora::kMaxFused,
        ", got m = ", hidden);
  } else {
    check_like_zg(op, "up", up, n, r, zg);
  }
  const OnDeviceOf device(zg);
  const Tensor out = torch::stable::new_empty(y, {tokens, n});
  if (tokens == 0 || n == 0) return out;
  const Tensor& last = u.has_value() ? *c2 : up;
  const dual_lora::Plan plan = dual_lora::plan_update(
      tokens, r, last.size(1), n, u.has_value(), processors_of(op, zg.get_device_index()));
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
    check_launch(op, dual_lora::launch_update(args, plan, aligned(last) && aligned(up), device.stream()));
  });
  return out;
}

// Returns the mix (T, m) of the released form. `lane` is for the CPU only.
Tensor dual_lora_mix_cuda(Tensor zg, Tensor u, Tensor up, int64_t r_pos, int64_t /*lane*/) {
  const char* op = "_dual_lora_native_mix";
  check_ranks(op, zg, up, r_pos);
  const int64_t tokens = zg.size(0), hidden = up.size(0);
  check_like_zg(op, "u", u, tokens, hidden, zg);
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
    check_launch(op, dual_lora::launch_mix(args, plan, aligned(up), device.stream()));
  });
  return mix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CUDA, m) {
  m.impl("_dual_lora_native_update", TORCH_BOX(&dual_lora_update_cuda));
  m.impl("_dual_lora_native_mix", TORCH_BOX(&dual_lora_mix_cuda));
}

}  // namespace calm_fast
