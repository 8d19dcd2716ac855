// Data that the drivers of the vocabulary sweeps hand to the lanes, and the table of a lane's functions.
#pragma once

#include <limits>

#include "vocabulary/vocabulary.h"

namespace calm_fast::vocabulary {

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Least and most columns of one task, and about how many tasks there are in between. Each task has memory of its own.
constexpr int64_t kLeastSplit = 512, kMostSplit = 2048, kSplits = 24;
// Columns of the vocabulary per product with logit gradients: their packed weights fit into an L1 cache.
constexpr int64_t kDepth = 512;

inline int64_t whole(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Columns of one task of a sweep over so many. Only the vocabulary has a say, so that a token's sums depend neither on
// the other tokens nor on the threads. Small vocabularies make small tasks, or one thread would do them alone.
inline int64_t split_of(int64_t columns) {
  const int64_t even = whole((columns + kSplits - 1) / kSplits, kLeastSplit / 2);
  return even < kLeastSplit ? kLeastSplit : even < kMostSplit ? even : kMostSplit;
}

// ---- data ------------------------------------------------------------------------------------------------------------

struct Running {
  float *max, *total, *weighted;  // per token of a block
};

struct LogprobSums {
  Running running;
  float* larger;
};

struct LogprobSweep {
  const LogprobSums* sums;  // one per split
  const float* at_target;
  float scale;
  bool want_entropy, want_rank;
};

// Sums of a row of logits, relative to its maximum `max`: of powers, of powers times their exponents, and the number of
// logits above the target's, `target`.
struct RowSums {
  double sum, weighted, larger;
  float max, target;
};

// Rows of logits in memory; each array has one entry per row. The first part is for both passes, `sums` is the result of
// the forward one, and the rest belongs to the gradients, as in LogprobDlogits.
struct LogitRows {
  Matrix logits;  // (T, V), its columns neighbours
  Head head;      // of which bias and softcap count
  const int64_t* target;  // -1: not in the vocabulary
  float scale;
  bool want_entropy, want_rank;
  RowSums* sums;
  const float *top, *constant, *linear, *up;
  void* gradient;  // (T, V), the dtype of logits
};

struct NceSums {
  Running student, soft_student, nat, soft_nat, neg;
  float *student_drift, *soft_student_drift, *nat_drift;  // sums of the rounding errors of kept logits
};

// Logits that outlive a sweep, stored group by group of tokens and within a group column by column. Logits in 16 bits
// are relative to the token's `reference`, so that those close to it stay accurate.
struct KeptLogits {
  void* data;              // null: logits are not kept
  const float* reference;  // per token of the chunk
  int64_t stride;          // tokens of the chunk, rounded up
  int64_t columns;         // of the vocabulary
  int64_t first_token;     // of the block within the chunk
  Type type;               // float32 or float16

  // Returns the position of a column's first token in the group that starts at `token`.
  int64_t place(int64_t column, int64_t token, int64_t group) const {
    return columns * token + column * (stride - token < group ? stride - token : group);
  }
};

struct NceSweep {
  const NceSums* sums;  // one per split
  float scale;
  bool plain;  // temperature 1
  bool student, neg;  // whether these streams exist; nat always does
  KeptLogits kept[2];  // of the student and of nat
  bool rounds;         // kept logits are rounded to 16 bits
};

// Logit gradients of linear_logprob: dz = 2^x (constant + linear x), x = scale (z - top), plus `up` at the target.
// Each array has one entry per token of the block.
struct LogprobDlogits {
  const float *top, *constant, *linear, *up, *target;
  float scale, softcap;
  Type type;
  Tile out;
  int64_t first_token;
};

// Logit gradients of linear_nce; each array has one entry per token. A probability is a power relative to the largest
// logit times one over the sum of powers, which the factors contain: `soft` that of exp((z - top) / temperature),
// `plain_hard` that of exp(z - top) where the temperature is not 1, `teacher` that of nat's power.
struct NceDlogits {
  const float *top, *top_nat, *soft, *plain_hard, *teacher, *hard, *target;
  float scale, softcap;
  bool plain;
  Type type;
  Tile out;
  int64_t first_token;
};

// The gradient of the hidden states from the kept logits of columns first .. last.
struct NceHiddenGradient {
  NceDlogits dlogits;  // per token of the chunk
  KeptLogits kept[2];
  const Matrix* weight;
  uint32_t *panels, *scratch;  // packed logit gradients; packed weight columns and a tile, per task
  float* sums;                 // (d, width): the gradient so far
  int64_t scratch_words, tokens, width, first, last, tasks;
};

// Sums of a row of linear_nce's logits, each relative to its stream's maximum: of exp(z - max), of exp((z - max) /
// temperature), and weighted by these powers: of nat's, the student's z - max; of neg's, how far neg - max is above nat's.
struct NceRowSums {
  double total, total_soft, nat, nat_soft, nat_weighted, neg, neg_weighted;
  float max, nat_max, neg_max;
};

// Rows of the three streams' logits in memory. `sums` is the result of the forward pass; what follows is for gradients,
// with one entry per row.
struct NceRows {
  LogitRows student, nat, neg;  // of which logits and head count
  bool has_student, has_neg;
  float scale;
  bool plain;  // temperature 1
  NceRowSums* sums;
  NceDlogits dlogits;
  const int64_t* target;  // outside the row where another tile has it
  void* gradient;         // (T, V) in the dtype of logits
  int64_t stride;         // of its rows
};

// One block of tokens and its loop over the vocabulary.
struct Block {
  const Head* head;
  const void* visitor;
  const Matrix* const* hidden;  // one per stream
  int64_t first_token;
  uint32_t* panels;   // packed hidden states, stream by stream
  uint32_t* scratch;  // one piece per split
  int64_t scratch_words, padding, streams, tokens, padded, first, last, split, splits;  // split: columns of a task
};

struct LaneFunctions {
  int64_t rows, group, width, strip;
  bool pairs;
  void (*pack_tokens)(void*, int64_t);
  void (*target_logits)(const Block&, int64_t stream, const int64_t* targets, float* out);
  void (*sweep_logprob)(void*, int64_t);
  void (*sweep_nce)(void*, int64_t);
  void (*dlogits_logprob)(void*, int64_t);
  void (*dlogits_nce)(void*, int64_t);
  void (*row_sums)(void*, int64_t);
  void (*row_gradient)(void*, int64_t);
  void (*nce_row_sums)(void*, int64_t);
  void (*nce_row_gradient)(void*, int64_t);
  void (*pack_dlogits)(void*, int64_t);
  void (*hidden_gradient)(void*, int64_t);
};

const LaneFunctions& functions_of(Lane lane, Type type);

}  // namespace calm_fast::vocabulary
