// vote on the CPU, parallel over questions. vote_core.h computes the vote of one question.
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"
#include "vote/vote_core.h"

namespace calm_fast {
namespace {

using vote_cpu::Scratch;
using vote_cpu::Vote;
using Votes = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kSamplesPerThread = 1 << 14;  // fewer are finished before a second thread wakes up

struct Outputs {
  int64_t* winner;
  double* weight;
  double* total;
  double* margin;
  int64_t* ties;
};

template <class Score>
void vote_rows(
    const int64_t* answers, const Score* scores, const uint8_t* valid, int64_t questions, int64_t k, bool adaptive,
    double lam, Lane lane, const Outputs& out) {
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown inside parallel_for
  parallel_for(questions, kSamplesPerThread / (k + 1) + 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> memory(new (std::nothrow) char[Scratch::bytes(k)]);
    if (!memory) {
      out_of_memory = true;
      return;
    }
    const Scratch scratch(memory.get(), k);
    for (int64_t q = begin; q < end; ++q) {
      const Score* own = nullptr;
      if constexpr (!std::is_void_v<Score>) own = scores + q * k;
      const uint8_t* own_valid = valid == nullptr ? nullptr : valid + q * k;
      const Vote vote = vote_cpu::vote_question(answers + q * k, own, own_valid, k, adaptive, lam, lane, scratch);
      out.winner[q] = vote.winner;
      out.weight[q] = vote.weight;
      out.total[q] = vote.total;
      out.margin[q] = vote.margin;
      out.ties[q] = vote.ties;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "vote: out of memory");
}

// Returns winner (Q,) int64, weight, total, margin (Q,) float64 and ties (Q,) int64.
Votes vote_fwd_cpu(
    Tensor answers, std::optional<Tensor> scores, std::optional<Tensor> valid, bool adaptive, double lam,
    int64_t lane) {
  check_tensor("vote", "answers", answers, {-1, -1}, ScalarType::Long);
  const int64_t questions = answers.size(0), k = answers.size(1);
  STD_TORCH_CHECK(k < (int64_t{1} << 30), "vote: `answers` must have fewer than 2^30 samples per question, got ", k);
  const bool doubles = scores.has_value() && scores->scalar_type() == ScalarType::Double;
  if (scores.has_value()) {
    check_tensor("vote", "scores", *scores, {questions, k}, doubles ? ScalarType::Double : ScalarType::Float);
  }
  if (valid.has_value()) check_tensor("vote", "valid", *valid, {questions, k}, ScalarType::Bool);
  const Lane chosen = choose_lane("vote", lane);

  auto fresh = [&](ScalarType dtype) { return torch::stable::new_empty(answers, {questions}, dtype); };
  Votes result(
      fresh(ScalarType::Long), fresh(ScalarType::Double), fresh(ScalarType::Double), fresh(ScalarType::Double),
      fresh(ScalarType::Long));
  const Outputs out{
      static_cast<int64_t*>(std::get<0>(result).mutable_data_ptr()),
      static_cast<double*>(std::get<1>(result).mutable_data_ptr()),
      static_cast<double*>(std::get<2>(result).mutable_data_ptr()),
      static_cast<double*>(std::get<3>(result).mutable_data_ptr()),
      static_cast<int64_t*>(std::get<4>(result).mutable_data_ptr()),
  };
  const auto* ids = static_cast<const int64_t*>(answers.const_data_ptr());
  const auto* voting = valid.has_value() ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  const void* given = scores.has_value() ? scores->const_data_ptr() : nullptr;
  if (!scores.has_value()) {
    vote_rows<void>(ids, nullptr, voting, questions, k, adaptive, lam, chosen, out);
  } else if (doubles) {
    vote_rows(ids, static_cast<const double*>(given), voting, questions, k, adaptive, lam, chosen, out);
  } else {
    vote_rows(ids, static_cast<const float*>(given), voting, questions, k, adaptive, lam, chosen, out);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calm_fast, CPU, m) {
  m.impl("_vote_native_fwd", TORCH_BOX(&vote_fwd_cpu));
}

}  // namespace calm_fast
