// dual_lora.cuh in the emulation (? marks an optional tensor).
//   tensors: zg, u?, up, last?, y?, out; without `last` only the mix is computed
//   integers: dtype (0 float32, 1 bfloat16, 2 float16), T, R, R_pos, m (0: the paper's form), N, multiprocessors
#include "dual_lora/dual_lora.cuh"
#include "emulation/call.hpp"

using calm_fast::emulation::Use;

namespace {

template <class T>
const char* run(const calm_fast::emulation::Call& in) {
  namespace op = calm_fast::dual_lora;
  const int64_t* sizes = in.integers + 1;
  const int64_t tokens = sizes[0], r = sizes[1], hidden = sizes[3], n = sizes[4];
  auto zg = in.tensor<const T>(0, "zg", Use::input);
  auto u = in.tensor<const T>(1, "u", Use::input);
  auto up = in.tensor<const T>(2, "up", Use::input);
  auto last = in.tensor<const T>(3, "last", Use::input);
  auto y = in.tensor<const T>(4, "y", Use::input);
  auto out = in.tensor<T>(5, "out", Use::output);
  op::Args<T> args = {};
  args.zg = zg.get();
  args.u = u.get();
  args.up = up.get();
  args.last = last.get();
  args.y = y.get();
  args.out = out.get();
  args.tokens = static_cast<int>(tokens);
  args.r = static_cast<int>(r);
  args.r_pos = static_cast<int>(sizes[2]);
  args.hidden = static_cast<int>(hidden);
  args.inner = static_cast<int>(hidden ? hidden : r);
  args.n = static_cast<int>(n);
  const bool wide = r % op::kEach == 0 && hidden % op::kEach == 0;
  if (!args.last) return op::launch_mix(args, op::plan_mix(tokens, r, hidden), wide, in.schedule());
  return op::launch_update(args, op::plan_update(tokens, r, args.inner, n, hidden > 0, sizes[5]), wide, in.schedule());
}

}  // namespace

CALM_EMULATED(dual_lora) {
  if (in.integers[0] == 1) return run<calm_fast::simt::bfloat16>(in);
  if (in.integers[0] == 2) return run<calm_fast::simt::float16>(in);
  return run<float>(in);
}
