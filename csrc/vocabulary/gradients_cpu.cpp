// Drivers of the backward passes: they turn the upstream gradients into factors per token, and write logit gradients.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vocabulary/blocks.h"

namespace calm_fast::vocabulary {
namespace {

// Most tasks of the product with logit gradients; each packs weights into its own memory.
constexpr int64_t kTasks = 32;

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

}  // namespace

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
  float *panels = host.zeroed(kMostSplit / kDepth * words * width), *scratch = host.zeroed(tasks * scratch_words);
  float* sums = host.zeroed(columns * width);
  NceHiddenGradient pass{
      token.dlogits,
      {{kept.student, kept.references, kept.stride, head.weight.rows, 0, kept.type},
       {kept.nat, kept.references + kept.stride, kept.stride, head.weight.rows, 0, kept.type}},
      &head.weight, reinterpret_cast<uint32_t*>(panels), reinterpret_cast<uint32_t*>(scratch), sums, scratch_words,
      tokens, width, 0, 0, tasks};
  for (; pass.first < vocabulary; pass.first = pass.last) {
    pass.last = std::min(pass.first + kMostSplit, vocabulary);
    const int64_t blocks = whole(pass.last - pass.first, kDepth) / kDepth;
    host.run(functions.pack_dlogits, &pass, blocks * (whole(tokens, functions.group) / functions.group));
    host.run(functions.hidden_gradient, &pass, tasks);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < columns; ++c) gradient[t * columns + c] = sums[c * width + t];
  }
}

void gradient_rows_nce(
    Lane lane, const Matrix& student, const Matrix& nat, const Head& head, const int64_t* targets,
    const NceGradient& in, void* out, int64_t stride, Host& host) {
  NceTokens token(host, head, Tile{nullptr, 0, nat.columns, 0}, nat.rows);
  token.take(in, targets, 0, nat.rows);
  NceRows rows{};
  rows.student.logits = student, rows.nat.logits = nat;
  rows.student.head = rows.nat.head = head;
  rows.scale = kLog2e / head.temperature, rows.plain = head.temperature == 1.0f;
  rows.dlogits = token.dlogits, rows.target = targets, rows.gradient = out, rows.stride = stride;
  host.run(functions_of(lane, nat.type).nce_row_gradient, &rows, nat.rows);
}

}  // namespace calm_fast::vocabulary
