// vote.cuh in the emulation (? marks an optional tensor).
//   tensors: answers, scores in float32?, scores in float64?, valid?, winner, weight, total, margin, ties
//   integers: Q, K, adaptive, most blocks (0: as planned)
//   floats: lam
#include "emulation/call.hpp"
#include "vote/vote.cuh"

using calm_fast::emulation::Use;

CALM_EMULATED(vote) {
  auto answers = in.tensor<const int64_t>(0, "answers", Use::input);
  auto scores32 = in.tensor<const float>(1, "scores32", Use::input);
  auto scores64 = in.tensor<const double>(2, "scores64", Use::input);
  auto valid = in.tensor<const bool>(3, "valid", Use::input);
  auto winner = in.tensor<int64_t>(4, "winner", Use::output);
  auto weight = in.tensor<double>(5, "weight", Use::output);
  auto total = in.tensor<double>(6, "total", Use::output);
  auto margin = in.tensor<double>(7, "margin", Use::output);
  auto ties = in.tensor<int64_t>(8, "ties", Use::output);
  const int64_t questions = in.integers[0], samples = in.integers[1];
  auto plan = calm_fast::vote::plan(questions, samples, in.tensors[1].data || in.tensors[2].data);
  if (in.integers[3] > 0) plan.grid = std::min(plan.grid, in.integers[3]);  // so that a block takes several questions
  std::vector<double> scratch_data(plan.scratch);
  calm_fast::emulation::Buffer<double> scratch("scratch", scratch_data.data(), plan.scratch, Use::output);
  const calm_fast::vote::Args args = {
      answers.get(), scores32.get(), scores64.get(), valid.get(), scratch.get(), winner.get(), weight.get(),
      total.get(), margin.get(), ties.get(), questions, samples, in.integers[2] != 0, in.floats[0]};
  return calm_fast::vote::launch(args, plan, in.schedule());
}
