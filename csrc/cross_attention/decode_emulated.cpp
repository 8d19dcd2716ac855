// decode.cuh in the emulation (? marks an optional tensor).
//   tensors: q, k, v (whole storages), lo?, hi?, out, lse
//   integers: dtype (0 float32, 1 bfloat16, 2 float16), B, M, H, N, Hkv, D, causal, multiprocessors, then the
//             offset and the batch, token and head stride of q, of k and of v
//   floats: scale
#include "cross_attention/decode.cuh"
#include "emulation/call.hpp"

using calm_fast::emulation::Use;

namespace {

template <class T>
const char* run(const calm_fast::emulation::Call& in) {
  namespace op = calm_fast::cross_attention;
  const int64_t* sizes = in.integers + 1;
  const int64_t batch = sizes[0], m = sizes[1], heads = sizes[2], n = sizes[3], kv_heads = sizes[4], d = sizes[5];
  if (m > op::kMaxQueries) {
    throw calm_fast::emulation::Failure(
        "cross_attention: `q` must have at most " + std::to_string(op::kMaxQueries) + " queries, got M = " +
        std::to_string(m));
  }
  auto q = in.tensor<const T>(0, "q", Use::input);
  auto k = in.tensor<const T>(1, "k", Use::input);
  auto v = in.tensor<const T>(2, "v", Use::input);
  auto lo = in.tensor<const int32_t>(3, "lo", Use::input);
  auto hi = in.tensor<const int32_t>(4, "hi", Use::input);
  auto out = in.tensor<T>(5, "out", Use::output);
  auto lse = in.tensor<float>(6, "lse", Use::output);
  const op::Plan plan = op::plan(batch, m, heads, kv_heads, n, d, sizeof(T), sizes[7]);
  std::vector<float> floats(plan.floats);
  // Three arrays with bounds of their own, so that an index that runs from one into the next is found.
  const int64_t places = plan.floats / (d + 2);
  const auto part = [&](const char* name, int64_t from, int64_t count) {
    return calm_fast::emulation::Buffer<float>(name, floats.data() + from, count, Use::output);
  };
  auto acc = part("acc", 0, places * d), max = part("max", places * d, places);
  auto total = part("total", places * (d + 1), places);
  const auto strides = [](const int64_t* s) { return op::Strides{s[1], s[2], s[3]}; };
  const int64_t* layout = sizes + 8;
  op::Args<T> args = {};
  args.q = q.get() + layout[0];
  args.k = k.get() + layout[4];
  args.v = v.get() + layout[8];
  args.lo = lo.get();
  args.hi = hi.get();
  args.out = out.get();
  args.lse = lse.get();
  args.qs = strides(layout);
  args.ks = strides(layout + 4);
  args.vs = strides(layout + 8);
  args.n = n;
  args.m = static_cast<int>(m);
  args.heads = static_cast<int>(heads);
  args.kv_heads = static_cast<int>(kv_heads);
  args.d = static_cast<int>(d);
  args.causal = sizes[6] != 0;
  args.scale_log2 = static_cast<float>(in.floats[0] * op::kLog2e);
  op::apply(args, plan, acc.get());
  if (plan.splits > 1) {
    args.max = max.get();
    args.total = total.get();
  }
  return op::launch(args, plan, in.schedule());
}

}  // namespace

CALM_EMULATED(cross_attention) {
  if (in.integers[0] == 1) return run<calm_fast::simt::bfloat16>(in);
  if (in.integers[0] == 2) return run<calm_fast::simt::float16>(in);
  return run<float>(in);
}
