// What the drivers of forward and backward passes share: blocks of tokens, splits of the vocabulary, unknown targets.

#pragma once

#include <algorithm>
#include <vector>

#include "vocabulary/lane_types.h"

namespace calm_fast::vocabulary {

// Bytes of a block's packed hidden states, which are read again for every few columns: a third of a common L3 cache.
// With 640 KiB, within the L2 cache, d = 4096 took a quarter longer, because a packed weight row served too few tokens.
inline constexpr int64_t kBlockBytes = 4 << 20;

// Cuts the tokens into blocks and columns first .. last into splits, and owns the memory that all blocks share.
class Plan {
 public:
  Plan(Host& host, Lane lane, const Head& head, int64_t tokens, int64_t streams, int64_t first, int64_t last)
      : host_(host),
        lane_(functions_of(lane, head.weight.type)),
        words_(lane_.pairs ? (head.weight.columns + 1) / 2 : head.weight.columns),
        split_(split_of(last - first)),
        splits(last > first ? (last - first + split_ - 1) / split_ : 0),
        most_(block_of(tokens, streams)),
        scratch_words_(whole((lane_.rows + 4) * words_, 16) + streams * lane_.rows * lane_.group) {
    const int64_t panel_words = (lane_.rows + 4) * words_;
    float* panels = host.zeroed(streams * most_ * words_);
    float* scratch = host.zeroed(std::max(splits * scratch_words_, (4 + lane_.width) * words_));
    block_ = Block{
        &head, nullptr, nullptr, 0, reinterpret_cast<uint32_t*>(panels), reinterpret_cast<uint32_t*>(scratch),
        scratch_words_, whole(panel_words, 16) - panel_words, streams, 0, most_, first, last, split_, splits};
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
  int64_t words_, split_;

 public:
  const int64_t splits;

 private:
  int64_t most_, scratch_words_;
  Block block_;
};

// Returns the targets with -1 for those outside the vocabulary.
inline std::vector<int64_t> known_targets(const int64_t* targets, int64_t tokens, int64_t vocabulary) {
  std::vector<int64_t> found(targets, targets + tokens);
  for (int64_t& target : found) target = target >= 0 && target < vocabulary ? target : -1;
  return found;
}

}  // namespace calm_fast::vocabulary
