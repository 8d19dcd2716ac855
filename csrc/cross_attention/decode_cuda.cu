// The decode part of cross_attention on a GPU: checks, memory for the splits, launches. The kernels are in decode.cuh.
#include "common/cuda.h"

#include <limits>

#include "cross_attention/decode.cuh"

namespace calm_fast {
namespace {

constexpr const char* kOp = "cross_attention";

// Checks shape (B, *, *, D), q's dtype, a contiguous D, and rows that begin at multiples of 16 bytes. Returns the
// strides.
cross_attention::Strides check_heads(
    const char* name, const Tensor& tensor, int64_t batch, int64_t d, ScalarType dtype, int64_t pack) {
  STD_TORCH_CHECK(
      tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(3) == d && tensor.scalar_type() == dtype,
      kOp, ": `", name, "` must have q's batch size, head dim and dtype, got shape ", shape_text(tensor), " and ",
      dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(
      tensor.stride(3) == 1 && tensor.stride(0) % pack == 0 && tensor.stride(1) % pack == 0 &&
          tensor.stride(2) % pack == 0 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
      kOp, ": `", name, "` must have contiguous rows that begin at multiples of 16 bytes, got strides ",
      strides_text(tensor), "; call .contiguous()");
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <class T>
void run(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lo, const std::optional<Tensor>& hi,
    bool causal, double scale, const Tensor& out, const Tensor& lse, const cross_attention::Strides (&strides)[3],
    cudaStream_t stream) {
  const cross_attention::Plan plan = cross_attention::plan(
      q.size(0), q.size(1), q.size(2), k.size(2), k.size(1), q.size(3), sizeof(T),
      processors_of(kOp, q.get_device_index()));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(
      plan.units * plan.splits * plan.tiles <= kMost && q.size(0) * q.size(1) * q.size(2) <= kMost,
      kOp, ": `q` must have few enough sequences, heads and queries for one launch, got shape ", shape_text(q),
      "; split the batch");
  const Tensor floats = torch::stable::new_empty(q, {plan.floats}, ScalarType::Float);
  cross_attention::Args<T> args = {};
  args.q = data<T>(q);
  args.k = data<T>(k);
  args.v = data<T>(v);
  args.lo = data<int32_t>(lo);
  args.hi = data<int32_t>(hi);
  args.out = mutable_data<T>(out);
  args.lse = mutable_data<float>(lse);
  args.qs = strides[0];
  args.ks = strides[1];
  args.vs = strides[2];
  args.n = k.size(1);
  args.m = static_cast<int>(q.size(1));
  args.heads = static_cast<int>(q.size(2));
  args.kv_heads = static_cast<int>(k.size(2));
  args.d = static_cast<int>(q.size(3));
  args.causal = causal;
  args.scale_log2 = static_cast<float>(scale * cross_attention::kLog2e);
  cross_attention::apply(args, plan, mutable_data<float>(floats));
  check_launch(kOp, cross_attention::launch(args, plan, stream));
}

// Returns out (B, M, H, D) in q's dtype and lse (B, H, M) float32. `lane` is for the CPU only.
std::tuple<Tensor, Tensor> cross_attention_decode_cuda(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> lo, std::optional<Tensor> hi, bool causal, double scale,
    int64_t /*lane*/) {
  using cross_attention::kMaxHeadDim, cross_attention::kMaxQueries;
  STD_TORCH_CHECK(q.dim() == 4, kOp, ": `q` must have shape (B, M, H, D), got ", shape_text(q));
  STD_TORCH_CHECK(k.dim() == 4, kOp, ": `k` must have shape (B, N, Hkv, D), got ", shape_text(k));
  const int64_t batch = q.size(0), m = q.size(1), heads = q.size(2), d = q.size(3), n = k.size(1), kv_heads = k.size(2);
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(m <= kMaxQueries, kOp, ": `q` must have at most ", kMaxQueries, " queries, got M = ", m);
  STD_TORCH_CHECK(
      d >= 8 && d <= kMaxHeadDim && d % 8 == 0, kOp, ": `q` must have a head dim that is a multiple of 8 up to ",
      kMaxHeadDim, ", got ", d);
  check_float_dtype(kOp, "q", dtype);
  STD_TORCH_CHECK(scale > 0, kOp, ": `scale` must be positive, got ", scale);
  STD_TORCH_CHECK(
      kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0, kOp,
      ": `k` must have a number of KV heads that divides the ", heads, " heads of `q`, got ", kv_heads);
  STD_TORCH_CHECK(
      v.dim() == 4 && v.size(1) == n && v.size(2) == kv_heads, kOp, ": `v` must have k's shape ", shape_text(k),
      ", got ", shape_text(v));
  constexpr int64_t kMostKeys = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(n <= kMostKeys, kOp, ": `k` must have at most ", kMostKeys, " keys, got N = ", n);
  const int64_t pack = dtype == ScalarType::Float ? 4 : 8;
  const cross_attention::Strides strides[3] = {
      check_heads("q", q, batch, d, dtype, pack), check_heads("k", k, batch, d, dtype, pack),
      check_heads("v", v, batch, d, dtype, pack)};
  check_same_device(kOp, "k", k, q);
  check_same_device(kOp, "v", v, q);
  for (const auto& [name, bound] : {std::pair{"lo", lo}, std::pair{"hi", hi}}) {
    if (!bound.has_value()) continue;
    check_tensor(kOp, name, *bound, {batch, m}, ScalarType::Int);
    check_same_device(kOp, name, *bound, q);
  }
  const OnDeviceOf device(q);
  std::tuple<Tensor, Tensor> result(
      torch::stable::new_empty(q, {batch, m, heads, d}),
      torch::stable::new_empty(q, {batch, heads, m}, ScalarType::Float));
  if (batch == 0 || m == 0) return result;
  const auto& [out, lse] = result;
  if (dtype == ScalarType::Float) run<float>(q, k, v, lo, hi, causal, scale, out, lse, strides, device.stream());
  else if (dtype == ScalarType::BFloat16)
    run<simt::bfloat16>(q, k, v, lo, hi, causal, scale, out, lse, strides, device.stream());
  else run<simt::float16>(q, k, v, lo, hi, causal, scale, out, lse, strides, device.stream());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CUDA, m) {
  m.impl("_cross_attention_native_decode", TORCH_BOX(&cross_attention_decode_cuda));
}

}  // namespace calm_fast
