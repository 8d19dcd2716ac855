// Drivers of the vocabulary sweeps: memory, blocks of tokens, splits of the vocabulary, and the sums over the splits.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "vocabulary/lane_types.h"

namespace calm_fast::vocabulary {
namespace {

// Bytes of a block's packed hidden states, which are read again for every few columns: a third of a common L3 cache.
// With 640 KiB, within the L2 cache, d = 4096 took a quarter longer, because a packed weight row served too few tokens.
constexpr int64_t kBlockBytes = 4 << 20;
// Most tasks of the product with logit gradients; each packs weights into its own memory.
constexpr int64_t kTasks = 32;

// Cuts the tokens into blocks and columns first .. last into splits, and owns the memory that all blocks share.
class Plan {
 public:
  Plan(Host& host, Lane lane, const Head& head, int64_t tokens, int64_t streams, int64_t first, int64_t last)
      : host_(host),
        lane_(functions_of(lane, head.weight.type)),
        words_(lane_.pairs ? (head.weight.columns + 1) / 2 : head.weight.columns),
        splits(last > first ? (last - first + kSplit - 1) / kSplit : 0),
        most_(block_of(tokens, streams)),
        scratch_words_(whole((lane_.rows + 4) * words_, 16) + streams * lane_.rows * lane_.group) {
    const int64_t panel_words = (lane_.rows + 4) * words_;
    float* panels = host.zeroed(streams * most_ * words_);
    float* scratch = host.zeroed(std::max(splits * scratch_words_, (4 + lane_.width) * words_));
    block_ = Block{
        &head, nullptr, nullptr, 0, reinterpret_cast<uint32_t*>(panels), reinterpret_cast<uint32_t*>(scratch),
        scratch_words_, whole(panel_words, 16) - panel_words, streams, 0, most_, first, last, splits};
  }

  // Tokens of a block, rounded up to whole groups.
  int64_t most() const { return most_; }
  const LaneFunctions& lane() const { return lane_; }

  // Packs tokens first .. first + tokens of each stream.
  void take(const Matrix* const* hidden, int64_t first, int64_t tokens) {
    block_.hidden = hidden;
    block_.first_token = first;
    block_.tokens = tokens;
    host_.run(lane_.pack_tokens, &block_, splits);
  }
  void target_logits(int64_t stream, const int64_t* targets, float* out) const {
    lane_.target_logits(block_, stream, targets, out);
  }
  void run(void (*body)(void*, int64_t), const void* visitor) {
    block_.visitor = visitor;
    host_.run(body, &block_, splits);
  }

 private:
  int64_t block_of(int64_t tokens, int64_t streams) const {
    const int64_t fit = std::max<int64_t>(1, kBlockBytes / (streams * words_ * 4 * lane_.group)) * lane_.group;
    const int64_t blocks = std::max<int64_t>(1, (tokens + fit - 1) / fit);
    return std::min(fit, whole((std::max<int64_t>(tokens, 1) + blocks - 1) / blocks, lane_.group));
  }

  Host& host_;
  const LaneFunctions& lane_;
  int64_t words_;

 public:
  const int64_t splits;

 private:
  int64_t most_, scratch_words_;
  Block block_;
};

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

// ---- sums over the splits --------------------------------------------------------------------------------------------

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

namespace {

// Writes targets relative to the tile's first column as floats, which are exact there; -1 outside the tile.
void local_targets(const int64_t* targets, int64_t tokens, const Tile& out, float* to) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t local = targets[t] - out.first;
    to[t] = local >= 0 && local < out.columns ? static_cast<float>(local) : -1.0f;
  }
}

// Factors of a token's logit gradients: dz = 2^x (constant + linear x), plus up at the target.
struct Factors {
  float up, constant, linear;
};

// up: the gradient of the token's log-probability. From p = 2^x / total and log p = x ln 2 - log total.
Factors factors_of(const LogprobGradient& in, int64_t token, float up, float temperature) {
  const float given = up / temperature, down = in.down ? in.down[token] / temperature : 0.0f;
  const double total = in.total[token];
  const double constant = in.down ? -given - down * (in.entropy[token] - std::log(total)) : -given;
  return {given, static_cast<float>(constant / total), static_cast<float>(-down * kLn2 / total)};
}

// Returns the targets with -1 for those outside the vocabulary.
std::vector<int64_t> known_targets(const int64_t* targets, int64_t tokens, int64_t vocabulary) {
  std::vector<int64_t> found(targets, targets + tokens);
  for (int64_t& target : found) target = target >= 0 && target < vocabulary ? target : -1;
  return found;
}

}  // namespace

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

void gradient_rows_logprob(
    Lane lane, const Matrix& logits, const Head& head, const int64_t* targets, const LogprobGradient& in,
    void* gradient, Host& host) {
  const int64_t tokens = logits.rows;
  const std::vector<int64_t> known = known_targets(targets, tokens, logits.columns);
  float *constant = host.zeroed(3 * tokens), *linear = constant + tokens, *up = linear + tokens;
  for (int64_t t = 0; t < tokens; ++t) {
    const float given = known[t] < 0 ? std::numeric_limits<float>::quiet_NaN() : in.up[t];
    const Factors factors = factors_of(in, t, given, head.temperature);
    up[t] = factors.up, constant[t] = factors.constant, linear[t] = factors.linear;
  }
  LogitRows rows{
      logits, head, known.data(), kLog2e / head.temperature, false, false, nullptr, in.top, constant,
      in.down ? linear : nullptr, up, gradient};
  host.run(functions_of(lane, logits.type).row_gradient, &rows, tokens);
}

void dlogits_logprob(
    Lane lane, const Matrix& hidden, const Head& head, const int64_t* targets, const LogprobGradient& in,
    const Tile& out, Host& host) {
  Plan plan(host, lane, head, hidden.rows, 1, out.first, out.first + out.columns);
  const int64_t most = plan.most();
  float *top = host.zeroed(5 * most), *constant = top + most, *linear = top + 2 * most, *up = top + 3 * most;
  float* target = top + 4 * most;
  const float scale = kLog2e / head.temperature;
  LogprobDlogits dlogits{
      top, constant, in.down ? linear : nullptr, up, target, scale, head.softcap, head.weight.type, out, 0};
  const Matrix* streams[] = {&hidden};
  for (int64_t first = 0; first < hidden.rows; first += most) {
    const int64_t tokens = std::min(most, hidden.rows - first);
    plan.take(streams, first, tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      const Factors factors = factors_of(in, first + t, in.up[first + t], head.temperature);
      top[t] = in.top[first + t];
      up[t] = factors.up;
      constant[t] = factors.constant;
      linear[t] = factors.linear;
    }
    local_targets(targets + first, tokens, out, target);
    dlogits.first_token = first;
    plan.run(plan.lane().dlogits_logprob, &dlogits);
  }
}

namespace {

// The per-token inputs of the logit gradients, for up to `most` tokens.
class NceTokens {
 public:
  NceTokens(Host& host, const Head& head, const Tile& out, int64_t most) : temperature_(head.temperature) {
    float* at = host.zeroed(7 * most);
    for (float*& array : arrays_) array = at, at += most;
    const auto& [top, top_nat, soft, plain_hard, teacher, hard, target] = arrays_;
    dlogits = NceDlogits{
        top, top_nat, soft, plain_hard, teacher, hard, target, kLog2e / head.temperature, head.softcap,
        head.temperature == 1.0f, head.weight.type, out, 0};
  }
  void take(const NceGradient& in, const int64_t* targets, int64_t first, int64_t tokens) {
    const auto& [top, top_nat, soft, plain_hard, teacher, hard, target] = arrays_;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t i = first + t;
      const float weight = in.soft[i] / temperature_;
      top[t] = in.top[i];
      top_nat[t] = in.top_nat[i];
      hard[t] = in.hard[i];
      plain_hard[t] = in.hard[i] / in.total[i];
      soft[t] = (temperature_ == 1.0f ? in.hard[i] + weight : weight) / in.total_soft[i];
      teacher[t] = weight / in.total_nat[i];
    }
    local_targets(targets + first, tokens, dlogits.out, target);
    dlogits.first_token = first;
  }

  NceDlogits dlogits;

 private:
  float temperature_;
  float* arrays_[7];
};

}  // namespace

void dlogits_nce(
    Lane lane, const Matrix& student, const Matrix& nat, const Head& head, const int64_t* targets,
    const NceGradient& in, const Tile& out, Host& host) {
  Plan plan(host, lane, head, student.rows, 2, out.first, out.first + out.columns);
  NceTokens token(host, head, out, plan.most());
  const Matrix* streams[] = {&student, &nat};
  for (int64_t first = 0; first < student.rows; first += plan.most()) {
    const int64_t tokens = std::min(plan.most(), student.rows - first);
    plan.take(streams, first, tokens);
    token.take(in, targets, first, tokens);
    plan.run(plan.lane().dlogits_nce, &token.dlogits);
  }
}

void gradient_nce(
    Lane lane, const NceKept& kept, const Head& head, const int64_t* targets, int64_t tokens, const NceGradient& in,
    float* gradient, Host& host) {
  const LaneFunctions& functions = functions_of(lane, head.weight.type);
  const int64_t columns = head.weight.columns, vocabulary = head.weight.rows, width = whole(tokens, functions.width);
  const int64_t words = functions.pairs ? kDepth / 2 : kDepth;
  const int64_t tasks = std::min<int64_t>(whole(columns, functions.strip) / functions.strip, kTasks);
  const int64_t scratch_words = words * functions.strip + functions.rows * functions.group;
  NceTokens token(host, head, Tile{nullptr, 0, vocabulary, 0}, width);
  token.take(in, targets, 0, tokens);
  float *panels = host.zeroed(kSplit / kDepth * words * width), *scratch = host.zeroed(tasks * scratch_words);
  float* sums = host.zeroed(columns * width);
  NceHiddenGradient pass{
      token.dlogits,
      {{kept.student, kept.references, kept.stride, head.weight.rows, 0, kept.type},
       {kept.nat, kept.references + kept.stride, kept.stride, head.weight.rows, 0, kept.type}},
      &head.weight, reinterpret_cast<uint32_t*>(panels), reinterpret_cast<uint32_t*>(scratch), sums, scratch_words,
      tokens, width, 0, 0, tasks};
  for (; pass.first < vocabulary; pass.first = pass.last) {
    pass.last = std::min(pass.first + kSplit, vocabulary);
    const int64_t blocks = whole(pass.last - pass.first, kDepth) / kDepth;
    host.run(functions.pack_dlogits, &pass, blocks * (whole(tokens, functions.group) / functions.group));
    host.run(functions.hidden_gradient, &pass, tasks);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < columns; ++c) gradient[t * columns + c] = sums[c * width + t];
  }
}

}  // namespace calm_fast::vocabulary
