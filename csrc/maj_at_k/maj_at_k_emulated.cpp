// maj_at_k.cuh in the emulation (? marks an optional tensor).
//   tensors: answers, correct, scores in float32?, scores in float64?, valid?, sizes (ascending), columns, credit
//   integers: Q, K, columns, resamples, adaptive, seed, most blocks (0: as planned)
//   floats: lam
#include "emulation/call.hpp"
#include "maj_at_k/maj_at_k.cuh"

using calm_fast::emulation::Buffer;
using calm_fast::emulation::Use;

CALM_EMULATED(maj_at_k) {
  namespace op = calm_fast::maj_at_k;
  auto answers = in.tensor<const int64_t>(0, "answers", Use::input);
  auto correct = in.tensor<const int64_t>(1, "correct", Use::input);
  auto scores32 = in.tensor<const float>(2, "scores32", Use::input);
  auto scores64 = in.tensor<const double>(3, "scores64", Use::input);
  auto valid = in.tensor<const bool>(4, "valid", Use::input);
  auto credit = in.tensor<double>(7, "credit", Use::output);
  const int64_t questions = in.integers[0], samples = in.integers[1], resamples = in.integers[3];
  op::Plan plan = op::plan(questions, samples, resamples, in.tensors[2].data || in.tensors[3].data);
  if (in.integers[6] > 0) plan.grid = std::min(plan.grid, in.integers[6]);  // so that a block takes several questions
  op::Args args = {};
  args.sizes.used = static_cast<int>(in.tensors[5].count);
  for (int i = 0; i < args.sizes.used; ++i) {
    args.sizes.size[i] = static_cast<int>(static_cast<const int64_t*>(in.tensors[5].data)[i]);
    args.sizes.column[i] = static_cast<int>(static_cast<const int64_t*>(in.tensors[6].data)[i]);
  }
  std::vector<double> partial_data(questions * plan.chunks * args.sizes.used);
  std::vector<double> scratch_data(plan.scratch / 8 + 1);
  Buffer<double> partial("partial", partial_data.data(), int64_t(partial_data.size()), Use::output);
  Buffer<unsigned char> scratch("scratch", scratch_data.data(), plan.scratch, Use::output);
  args.answers = answers.get();
  args.correct = correct.get();
  args.scores32 = scores32.get();
  args.scores64 = scores64.get();
  args.valid = valid.get();
  args.credit = credit.get();
  args.partial = partial.get();
  args.scratch = scratch.get();
  args.questions = questions;
  args.columns = in.integers[2];
  args.resamples = resamples;
  args.chunk = plan.chunk;
  args.chunks = plan.chunks;
  args.samples = static_cast<int>(samples);
  args.adaptive = in.integers[4] != 0;
  args.lam = in.floats[0];
  args.key[0] = static_cast<uint32_t>(in.integers[5]);
  args.key[1] = static_cast<uint32_t>(in.integers[5] >> 32);
  return op::launch(args, plan, in.schedule());
}
