// vote on a GPU: checks, scratch, launch. The kernel is in vote.cuh.
#include "common/cuda.h"

#include "vote/vote.cuh"

namespace calm_fast {
namespace {

using Votes = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns winner (Q,) int64, weight, total, margin (Q,) float64 and ties (Q,) int64. `lane` is for the CPU only.
Votes vote_fwd_cuda(
    Tensor answers, std::optional<Tensor> scores, std::optional<Tensor> valid, bool adaptive, double lam,
    int64_t /*lane*/) {
  check_tensor("vote", "answers", answers, {-1, -1}, ScalarType::Long);
  const int64_t questions = answers.size(0), samples = answers.size(1);
  const bool doubles = scores.has_value() && scores->scalar_type() == ScalarType::Double;
  if (scores.has_value()) {
    check_tensor("vote", "scores", *scores, {questions, samples}, doubles ? ScalarType::Double : ScalarType::Float);
    check_same_device("vote", "scores", *scores, answers);
  }
  if (valid.has_value()) {
    check_tensor("vote", "valid", *valid, {questions, samples}, ScalarType::Bool);
    check_same_device("vote", "valid", *valid, answers);
  }
  const OnDeviceOf device(answers);
  auto fresh = [&](ScalarType dtype, int64_t count) { return torch::stable::new_empty(answers, {count}, dtype); };
  Votes result(
      fresh(ScalarType::Long, questions), fresh(ScalarType::Double, questions), fresh(ScalarType::Double, questions),
      fresh(ScalarType::Double, questions), fresh(ScalarType::Long, questions));
  if (questions == 0) return result;
  const vote::Plan plan = vote::plan(questions, samples, scores.has_value());
  const Tensor scratch = fresh(ScalarType::Double, plan.scratch);
  vote::Args args = {};
  args.answers = data<int64_t>(answers);
  args.scores32 = doubles ? nullptr : data<float>(scores);
  args.scores64 = doubles ? data<double>(scores) : nullptr;
  args.valid = data<bool>(valid);
  args.scratch = mutable_data<double>(scratch);
  args.winner = mutable_data<int64_t>(std::get<0>(result));
  args.weight = mutable_data<double>(std::get<1>(result));
  args.total = mutable_data<double>(std::get<2>(result));
  args.margin = mutable_data<double>(std::get<3>(result));
  args.ties = mutable_data<int64_t>(std::get<4>(result));
  args.questions = questions;
  args.samples = samples;
  args.adaptive = adaptive;
  args.lam = lam;
  check_launch("vote", vote::launch(args, plan, device.stream()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CUDA, m) {
  m.impl("_vote_native_fwd", TORCH_BOX(&vote_fwd_cuda));
}

}  // namespace calm_fast
