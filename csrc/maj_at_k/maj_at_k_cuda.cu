// Resampled maj_at_k on a GPU: checks, scratch, launches. The kernels are in maj_at_k.cuh.
#include "common/cuda.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "maj_at_k/maj_at_k.cuh"

namespace calm_fast {
namespace {

// Returns credit (Q, len(ks)) float64. `lane` is for the CPU only.
Tensor maj_at_k_resample_cuda(
    Tensor answers, Tensor correct, std::optional<Tensor> scores, std::optional<Tensor> valid, std::vector<int64_t> ks,
    int64_t resamples, bool adaptive, double lam, int64_t seed, int64_t /*lane*/) {
  check_tensor("maj_at_k", "answers", answers, {-1, -1}, ScalarType::Long);
  const int64_t questions = answers.size(0), samples = answers.size(1), columns = static_cast<int64_t>(ks.size());
  check_tensor("maj_at_k", "correct", correct, {questions}, ScalarType::Long);
  check_same_device("maj_at_k", "correct", correct, answers);
  const bool doubles = scores.has_value() && scores->scalar_type() == ScalarType::Double;
  if (scores.has_value()) {
    check_tensor("maj_at_k", "scores", *scores, {questions, samples}, doubles ? ScalarType::Double : ScalarType::Float);
    check_same_device("maj_at_k", "scores", *scores, answers);
  }
  if (valid.has_value()) {
    check_tensor("maj_at_k", "valid", *valid, {questions, samples}, ScalarType::Bool);
    check_same_device("maj_at_k", "valid", *valid, answers);
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(
      samples <= kMost, "maj_at_k: `answers` must have at most 2^31 - 1 samples per question, got ", samples);
  STD_TORCH_CHECK(
      resamples >= 1 && resamples <= std::numeric_limits<uint32_t>::max(),
      "maj_at_k: `resamples` must be from 1 to 2^32 - 1, got ", resamples);
  const OnDeviceOf device(answers);
  const Tensor credit = torch::stable::new_empty(answers, {questions, columns}, ScalarType::Double);
  if (questions == 0 || columns == 0) return credit;
  if (samples == 0) return torch::stable::zero_(const_cast<Tensor&>(credit));

  const maj_at_k::Plan plan = maj_at_k::plan(questions, samples, resamples, scores.has_value());
  const Tensor scratch = torch::stable::new_empty(answers, {simt::ceil_div(plan.scratch, 8)}, ScalarType::Double);
  const int64_t partials = plan.chunks > 1 ? questions * plan.chunks * maj_at_k::kSizes : 0;
  const Tensor partial = torch::stable::new_empty(answers, {partials}, ScalarType::Double);
  maj_at_k::Args args = {};
  args.answers = data<int64_t>(answers);
  args.correct = data<int64_t>(correct);
  args.scores32 = doubles ? nullptr : data<float>(scores);
  args.scores64 = doubles ? data<double>(scores) : nullptr;
  args.valid = data<bool>(valid);
  args.credit = mutable_data<double>(credit);
  args.partial = mutable_data<double>(partial);
  args.scratch = static_cast<unsigned char*>(scratch.mutable_data_ptr());
  args.questions = questions;
  args.columns = columns;
  args.resamples = resamples;
  args.chunk = plan.chunk;
  args.chunks = plan.chunks;
  args.samples = static_cast<int>(samples);
  args.adaptive = adaptive;
  args.lam = lam;
  args.key[0] = static_cast<uint32_t>(seed);
  args.key[1] = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);

  std::vector<int64_t> order(columns);  // columns by ascending k
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ks[a] < ks[b]; });
  for (int64_t begin = 0; begin < columns; begin += maj_at_k::kSizes) {
    args.sizes.used = static_cast<int>(std::min<int64_t>(maj_at_k::kSizes, columns - begin));
    for (int i = 0; i < args.sizes.used; ++i) {
      const int64_t column = order[begin + i];
      args.sizes.size[i] = static_cast<int>(std::min(ks[column], samples));  // K or more: all samples
      args.sizes.column[i] = static_cast<int>(column);
    }
    check_launch("maj_at_k", maj_at_k::launch(args, plan, device.stream()));
  }
  return credit;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CUDA, m) {
  m.impl("_maj_at_k_native_resample", TORCH_BOX(&maj_at_k_resample_cuda));
}

}  // namespace calm_fast
