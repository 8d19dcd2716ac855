// maj_at_k on the CPU, exact and resampled, parallel over questions.
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "common/parallel.h"
#include "maj_at_k/exact.h"
#include "maj_at_k/shuffles.h"
#include "vote/vote_core.h"

namespace calm_fast {
namespace {

using namespace maj_at_k_cpu;

// The checked arguments that both methods share.
struct Inputs {
  Inputs(
      const char* op, const Tensor& answers, const Tensor& correct, const std::optional<Tensor>& valid,
      const std::vector<int64_t>& ks)
      : questions(answers.dim() == 2 ? answers.size(0) : 0), samples(answers.dim() == 2 ? answers.size(1) : 0) {
    check_tensor(op, "answers", answers, {-1, -1}, ScalarType::Long);
    check_tensor(op, "correct", correct, {questions}, ScalarType::Long);
    if (valid.has_value()) check_tensor(op, "valid", *valid, {questions, samples}, ScalarType::Bool);
    STD_TORCH_CHECK(
        samples < (int64_t{1} << 30), op, ": `answers` must have fewer than 2^30 samples per question, got ", samples);
    STD_TORCH_CHECK(!ks.empty(), op, ": `ks` must not be empty, got []");
    for (int64_t k : ks) STD_TORCH_CHECK(k >= 1, op, ": `ks` must be at least 1 each, got ", k);
    ids = static_cast<const int64_t*>(answers.const_data_ptr());
    right = static_cast<const int64_t*>(correct.const_data_ptr());
    voting = valid.has_value() ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  }
  void read(Question& question, int64_t q) const {
    question.read(ids + q * samples, voting == nullptr ? nullptr : voting + q * samples, samples, right[q]);
  }
  int64_t questions, samples;
  const int64_t *ids, *right;
  const uint8_t* voting;
};

// Returns credit (Q, len(ks)) float64.
Tensor maj_at_k_exact_cpu(
    Tensor answers, Tensor correct, std::optional<Tensor> valid, std::vector<int64_t> ks, int64_t lane) {
  const Inputs in("maj_at_k", answers, correct, valid, ks);
  const Sizes sizes(ks);
  const Exact exact = exact_for(choose_lane("maj_at_k", lane));
  const int64_t width = static_cast<int64_t>(ks.size()), distinct = static_cast<int64_t>(sizes.ascending.size());
  Tensor result = torch::stable::new_empty(answers, {in.questions, width}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown inside parallel_for
  parallel_for(in.questions, 4, [&](int64_t begin, int64_t end) {
    Arena measure;
    Question(measure, in.samples), ExactScratch(measure, in.samples), measure.take<double>(distinct);
    const std::unique_ptr<char[]> memory(new (std::nothrow) char[measure.used() + 64]);
    if (!memory) {
      out_of_memory = true;
      return;
    }
    Arena arena(memory.get());
    Question question(arena, in.samples);
    ExactScratch scratch(arena, in.samples);
    double* credits = arena.take<double>(distinct);
    for (int64_t q = begin; q < end; ++q) {
      in.read(question, q);
      const double whole = question.whole();
      for (int64_t at = 0; at < distinct; ++at) credits[at] = question.counts[0] ? whole : 0.0;
      const int64_t used = question.counts[0] ? sizes.below(question.n) : 0;
      if (used && !exact(question, sizes.ascending.data(), used, scratch, credits)) {
        out_of_memory = true;
        return;
      }
      for (int64_t column = 0; column < width; ++column) out[q * width + column] = credits[sizes.at[column]];
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "maj_at_k: out of memory");
  return result;
}

// Returns credit (Q, len(ks)) float64. scores (Q, K) float32 or float64, NaN: unscored; without scores every sample
// weighs 1.
Tensor maj_at_k_resample_cpu(
    Tensor answers, Tensor correct, std::optional<Tensor> scores, std::optional<Tensor> valid, std::vector<int64_t> ks,
    int64_t resamples, bool adaptive, double lam, int64_t seed, int64_t lane) {
  const Inputs in("maj_at_k", answers, correct, valid, ks);
  STD_TORCH_CHECK(
      resamples >= 1 && resamples < (int64_t{1} << 32), "maj_at_k: `resamples` must be from 1 to 2^32 - 1, got ",
      resamples);
  const bool weighted = scores.has_value(), doubles = weighted && scores->scalar_type() == ScalarType::Double;
  if (weighted) {
    const ScalarType dtype = doubles ? ScalarType::Double : ScalarType::Float;
    check_tensor("maj_at_k", "scores", *scores, {in.questions, in.samples}, dtype);
  }
  const void* given = weighted ? scores->const_data_ptr() : nullptr;
  const Sizes sizes(ks);
  const RowLane rows = row_lane_for(choose_lane("maj_at_k", lane));
  const RoundKeys keys(static_cast<uint64_t>(seed));
  const int64_t width = static_cast<int64_t>(ks.size()), distinct = static_cast<int64_t>(sizes.ascending.size());
  Tensor result = torch::stable::new_empty(answers, {in.questions, width}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  std::vector<double> inverse(in.samples + 2, 0.0);
  for (int64_t ties = 1; ties <= in.samples; ++ties) inverse[ties] = 1.0 / static_cast<double>(ties);
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown inside parallel_for
  parallel_for(in.questions, 1, [&](int64_t begin, int64_t end) {
    Arena measure;
    Question(measure, in.samples), ShuffleScratch(measure, in.samples, distinct);
    const std::unique_ptr<char[]> memory(new (std::nothrow) char[measure.used() + 64]);
    if (!memory) {
      out_of_memory = true;
      return;
    }
    Arena arena(memory.get());
    Question question(arena, in.samples);
    const ShuffleScratch scratch(arena, in.samples, distinct);
    for (int64_t q = begin; q < end; ++q) {
      in.read(question, q);
      const bool present = question.counts[0] > 0;
      double whole = present ? question.whole() : 0.0;
      if (present && weighted) {
        const int64_t at = q * in.samples;
        if (doubles) {
          vote_cpu::weigh(static_cast<const double*>(given) + at, question.voting, in.samples, adaptive, lam, scratch.weights);
        } else {
          vote_cpu::weigh(static_cast<const float*>(given) + at, question.voting, in.samples, adaptive, lam, scratch.weights);
        }
        for (int64_t i = 0; i < question.n; ++i) scratch.own[i] = scratch.weights[question.place[i]];
        whole = whole_weighted(question, scratch);
      }
      const int64_t used = present ? sizes.below(question.n) : 0;
      for (int64_t at = 0; at < distinct; ++at) scratch.credits[at] = at < used ? 0.0 : whole;
      const auto number = static_cast<uint32_t>(q);
      if (used && question.n <= kByteSamples) {
        byte_resamples(
            question, sizes, used, resamples, keys, number, rows, weighted, inverse.data(), scratch);
      } else if (used) {
        for (int64_t i = 0; !weighted && i < question.n; ++i) scratch.own[i] = 1.0;
        weighted_resamples(question, sizes, used, resamples, keys, number, rows.draw_words, scratch);
      }
      for (int64_t at = 0; at < used; ++at) scratch.credits[at] /= static_cast<double>(resamples);
      for (int64_t column = 0; column < width; ++column) out[q * width + column] = scratch.credits[sizes.at[column]];
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "maj_at_k: out of memory");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_maj_at_k_native_exact", TORCH_BOX(&maj_at_k_exact_cpu));
  m.impl("_maj_at_k_native_resample", TORCH_BOX(&maj_at_k_resample_cpu));
}

}  // namespace calm_fast
