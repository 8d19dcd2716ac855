// Drivers of the forward sweeps: they give each split of the vocabulary its sums, and combine the sums of all splits.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "vocabulary/blocks.h"

namespace calm_fast::vocabulary {
namespace {

// Running sums of every split, `count` arrays of `most` tokens each.
class Sums {
 public:
  Sums(Host& host, const Plan& plan, int64_t count)
      : most_(plan.most()), count_(count), memory_(host.zeroed(plan.splits * count * most_)) {}
  float* array(int64_t split, int64_t index) { return memory_ + (split * count_ + index) * most_; }
  Running running(int64_t split, int64_t index) {
    return Running{array(split, index), array(split, index + 1), array(split, index + 2)};
  }

 private:
  int64_t most_, count_;
  float* memory_;
};

void clear(const Running& sums, int64_t tokens) {
  // -FLT_MAX and not -infinity, whose differences are NaN. The first finite logit replaces it.
  std::fill(sums.max, sums.max + tokens, -FLT_MAX);
  std::fill(sums.total, sums.total + tokens, 0.0f);
  std::fill(sums.weighted, sums.weighted + tokens, 0.0f);
}

// Combines the running sums of all splits in float64: sum 2^(scale (z - max)), and the same sum weighted.
struct Total {
  double max = -FLT_MAX, sum = 0, weighted = 0, scale;

  explicit Total(float scale) : scale(scale) {}

  // reference: what the values of this split are relative to.
  void add(const Running& part, int64_t token, bool by_exponent, double reference = 0) {
    const double other = part.max[token], top = other > max ? other : max;
    const double old = (max - top) * scale, add = (other - top) * scale;
    const double keep = std::exp2(old), take = std::exp2(add);
    if (by_exponent) weighted += sum == 0 ? 0 : old * sum;
    const double moved = by_exponent ? add : reference;
    weighted = weighted * keep + (part.weighted[token] + moved * part.total[token]) * take;
    sum = sum * keep + part.total[token] * take;
    max = top;
  }
  // NaN where every logit was -infinity, as in a softmax.
  double log2_sum() const { return max == -FLT_MAX ? std::numeric_limits<double>::quiet_NaN() : std::log2(sum); }
  double log_sum() const { return (max * scale + log2_sum()) * kLn2; }
  double log_share(float logit) const {
    const double share = ((logit - max) * scale - log2_sum()) * kLn2;
    return share > 0 ? 0 : share;
  }
  double entropy() const {
    const double found = (log2_sum() - weighted / sum) * kLn2;
    return found < 0 ? 0 : found;
  }
  double mean() const { return weighted / sum; }
};

}  // namespace

void sweep_logprob(
    Lane lane, const Matrix& hidden, const Head& head, const int64_t* targets, const Logprob& out, Host& host) {
  Plan plan(host, lane, head, hidden.rows, 1, 0, head.weight.rows);
  Sums memory(host, plan, 4);
  float* at_target = host.zeroed(plan.most());
  std::vector<LogprobSums> sums;
  for (int64_t i = 0; i < plan.splits; ++i) sums.push_back({memory.running(i, 0), memory.array(i, 3)});
  const float scale = kLog2e / head.temperature;
  const LogprobSweep sweep{sums.data(), at_target, scale, out.entropy != nullptr, out.rank != nullptr};
  const Matrix* streams[] = {&hidden};
  for (int64_t first = 0; first < hidden.rows; first += plan.most()) {
    const int64_t tokens = std::min(plan.most(), hidden.rows - first);
    plan.take(streams, first, tokens);
    plan.target_logits(0, targets + first, at_target);
    for (const LogprobSums& s : sums) {
      clear(s.running, plan.most());
      std::fill(s.larger, s.larger + plan.most(), 0.0f);
    }
    plan.run(plan.lane().sweep_logprob, &sweep);
    for (int64_t t = 0; t < tokens; ++t) {
      Total total(scale);
      double larger = 0;
      for (const LogprobSums& s : sums) {
        total.add(s.running, t, true);
        larger += s.larger[t];
      }
      out.logprob[first + t] = static_cast<float>(total.log_share(at_target[t]));
      out.top[first + t] = static_cast<float>(total.max);
      out.total[first + t] = static_cast<float>(total.sum);
      if (out.entropy) out.entropy[first + t] = static_cast<float>(total.entropy());
      if (out.rank) out.rank[first + t] = 1 + static_cast<int64_t>(larger);
    }
  }
}

void sweep_nce(
    Lane lane, const Matrix* student, const Matrix& nat, const Matrix* neg, const Head& head, const int64_t* targets,
    const Nce& out, const NceKept& kept, Host& host) {
  const bool plain = head.temperature == 1.0f;
  std::vector<const Matrix*> streams;
  if (student) streams.push_back(student);
  streams.push_back(&nat);
  if (neg) streams.push_back(neg);
  Plan plan(host, lane, head, nat.rows, static_cast<int64_t>(streams.size()), 0, head.weight.rows);
  const bool rounds = kept.nat && kept.type == Type::float16;
  Sums memory(host, plan, 18);
  float *at_target = host.zeroed(plan.most()), *nat_at_target = host.zeroed(plan.most());
  std::vector<NceSums> sums;
  for (int64_t i = 0; i < plan.splits; ++i) {
    NceSums s{
        memory.running(i, 0), {}, {}, memory.running(i, 3), memory.running(i, 6), memory.array(i, 15),
        memory.array(i, plain ? 15 : 16), memory.array(i, 17)};
    s.soft_student = plain ? s.student : memory.running(i, 9);
    s.nat = plain ? s.soft_nat : memory.running(i, 12);
    sums.push_back(s);
  }
  const float scale = kLog2e / head.temperature;
  NceSweep sweep{
      sums.data(), scale, plain, student != nullptr, neg != nullptr,
      {{kept.student, kept.references, kept.stride, head.weight.rows, 0, kept.type},
       {kept.nat, kept.references + kept.stride, kept.stride, head.weight.rows, 0, kept.type}},
      rounds};
  for (int64_t first = 0; first < nat.rows; first += plan.most()) {
    const int64_t tokens = std::min(plan.most(), nat.rows - first);
    plan.take(streams.data(), first, tokens);
    if (student) plan.target_logits(0, targets + first, at_target);
    if (kept.nat) {
      plan.target_logits(1, targets + first, nat_at_target);
      for (int64_t t = 0; t < tokens; ++t) {
        kept.references[first + t] = std::isfinite(at_target[t]) ? at_target[t] : 0.0f;
        kept.references[kept.stride + first + t] = std::isfinite(nat_at_target[t]) ? nat_at_target[t] : 0.0f;
      }
      for (KeptLogits& k : sweep.kept) k.first_token = first;
    }
    for (const NceSums& s : sums) {
      for (const Running& r : {s.student, s.soft_student, s.nat, s.soft_nat, s.neg}) clear(r, plan.most());
      for (float* drift : {s.student_drift, s.soft_student_drift, s.nat_drift}) {
        std::fill(drift, drift + plan.most(), 0.0f);
      }
    }
    plan.run(plan.lane().sweep_nce, &sweep);
    for (int64_t t = 0; t < tokens; ++t) {
      Total one(kLog2e), soft(scale), teacher(kLog2e), soft_teacher(scale), negative(kLog2e);
      Total one_drift(kLog2e), soft_drift(scale), teacher_drift(scale);
      for (const NceSums& s : sums) {
        one_drift.add({s.student.max, s.student.total, s.student_drift}, t, false);
        soft_drift.add({s.soft_student.max, s.soft_student.total, s.soft_student_drift}, t, false);
        teacher_drift.add({s.soft_nat.max, s.soft_nat.total, s.nat_drift}, t, false);
        one.add(s.student, t, false);
        soft.add(s.soft_student, t, false);
        teacher.add(s.nat, t, false);
        const double nat_max = s.soft_nat.max[t];
        soft_teacher.add(s.soft_nat, t, false, s.student.max[t]);
        negative.add(s.neg, t, false, s.neg.max[t] - nat_max);
      }
      // Kept logits are rounded, which moves their sums by the mean rounding error.
      const auto total = [](const Total& sum, const Total& drift, float temperature) {
        return static_cast<float>(sum.sum * std::exp(drift.mean() / temperature));
      };
      out.top_nat[first + t] = static_cast<float>(soft_teacher.max);
      out.total_nat[first + t] = total(soft_teacher, teacher_drift, head.temperature);
      if (neg) out.kl[first + t] = static_cast<float>(negative.mean() - negative.log_sum() + teacher.log_sum());
      if (!student) continue;
      out.top[first + t] = static_cast<float>(one.max);
      out.total[first + t] = total(one, one_drift, 1.0f);
      out.total_soft[first + t] = total(soft, soft_drift, head.temperature);
      out.hard[first + t] = static_cast<float>(-one.log_share(at_target[t]));
      out.soft[first + t] = static_cast<float>(soft.log_sum() - soft_teacher.mean() / head.temperature);
    }
  }
}

void rows_logprob(
    Lane lane, const Matrix& logits, const Head& head, const int64_t* targets, int64_t ignored, const Logprob& out,
    Host& host) {
  const int64_t tokens = logits.rows;
  const float nan = std::numeric_limits<float>::quiet_NaN(), scale = kLog2e / head.temperature;
  const std::vector<int64_t> known = known_targets(targets, tokens, logits.columns);
  std::vector<RowSums> sums(tokens);
  LogitRows rows{
      logits, head, known.data(), scale, out.entropy != nullptr, out.rank != nullptr, sums.data(), nullptr, nullptr,
      nullptr, nullptr, nullptr};
  host.run(functions_of(lane, logits.type).row_sums, &rows, tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (targets[t] == ignored) {
      out.logprob[t] = out.top[t] = out.total[t] = 0.0f;
      if (out.entropy) out.entropy[t] = 0.0f;
      if (out.rank) out.rank[t] = 0;
      continue;
    }
    Total total(scale);
    total.max = sums[t].max, total.sum = sums[t].sum, total.weighted = sums[t].weighted;
    const bool is_known = known[t] >= 0;
    out.logprob[t] = is_known ? static_cast<float>(total.log_share(sums[t].target)) : nan;
    out.top[t] = sums[t].max;
    out.total[t] = static_cast<float>(sums[t].sum);
    if (out.entropy) out.entropy[t] = static_cast<float>(total.entropy());
    if (out.rank) out.rank[t] = is_known ? 1 + static_cast<int64_t>(sums[t].larger) : 0;
  }
}

void rows_nce(
    Lane lane, const Matrix* student, const Matrix& nat, const Matrix* neg, const Head& head, double* sums, Host& host) {
  const int64_t tokens = nat.rows;
  std::vector<NceRowSums> found(tokens);
  NceRows rows{};
  rows.student.logits = student ? *student : nat, rows.nat.logits = nat, rows.neg.logits = neg ? *neg : nat;
  for (LogitRows* stream : {&rows.student, &rows.nat, &rows.neg}) stream->head = head;
  rows.has_student = student != nullptr, rows.has_neg = neg != nullptr;
  rows.scale = kLog2e / head.temperature, rows.plain = head.temperature == 1.0f;
  rows.sums = found.data();
  host.run(functions_of(lane, nat.type).nce_row_sums, &rows, tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    const NceRowSums& s = found[t];
    const double values[kNceRowSums] = {
        s.max, s.total, s.total_soft, s.nat_max, s.nat, s.nat_soft, s.nat_weighted, s.neg_max, s.neg, s.neg_weighted};
    for (int64_t i = 0; i < kNceRowSums; ++i) sums[i * tokens + t] = values[i];
  }
}

}  // namespace calm_fast::vocabulary
