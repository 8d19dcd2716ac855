// What the drivers of the vocabulary sweeps hand to the lanes, and the lanes' functions.
#pragma once

#include <limits>

#include "vocabulary/vocabulary.h"

namespace calm_fast::vocabulary {

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Columns of one task: a constant, so that neither the other tokens nor the threads change a token's sums.
constexpr int64_t kSplit = 2048;
// Columns whose part of a hidden state's gradient stays in registers: their packed weights fit into an L1 cache.
constexpr int64_t kDepth = 512;

inline int64_t whole(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// ---- what the lanes read and write -----------------------------------------------------------------------------------

struct Running {
  float *max, *total, *weighted;  // per token of a block
};

struct LogprobSums {
  Running running;
  float* larger;
};

struct LogprobSweep {
  const LogprobSums* sums;  // of each split
  const float* at_target;
  float scale;
  bool want_entropy, want_rank;
};

struct NceSums {
  Running student, soft_student, nat, soft_nat, neg;
  float *student_drift, *soft_student_drift, *nat_drift;  // what rounding kept logits adds to them, weighted alike
};

// Logits that outlive a sweep: group by group of tokens, in a group column by column. Where they are 16 bits wide, a
// token's own `reference` less: what is close to it loses nothing.
struct KeptLogits {
  void* data;              // null = not kept
  const float* reference;  // per token of the chunk
  int64_t stride;          // tokens of the chunk, rounded up
  int64_t columns;         // of the vocabulary
  int64_t first_token;     // of the block within the chunk
  Type type;               // float32 or float16

  // a column's first token of the group that starts at `token`
  int64_t place(int64_t column, int64_t token, int64_t group) const {
    return columns * token + column * (stride - token < group ? stride - token : group);
  }
};

struct NceSweep {
  const NceSums* sums;
  float scale;
  bool plain;  // temperature 1
  bool banned;  // a bias may be -infinity, and no softcap ends it
  bool student, neg;  // which streams are there beside nat
  KeptLogits kept[2];  // of the student and of nat
  bool rounds;         // kept logits are not the sweep's own
};

// per token of a block: dz = 2^x (constant + linear x), x = scale z + minus_lse, and `up` more at the target
struct LogprobSlope {
  const float *minus_lse, *constant, *linear, *up, *target;
  float scale, softcap;
  Type type;
  Tile out;
  int64_t first_token;
};

struct NceSlope {
  const float *minus_lse, *minus_lse_soft, *minus_lse_nat, *hard, *soft, *target;
  float scale, softcap;
  bool plain;
  Type type;
  Tile out;
  int64_t first_token;
};

// One split of columns on its way from kept logits to the gradient of the hidden states.
struct NceStep {
  NceSlope slope;  // per token of the chunk
  KeptLogits kept[2];
  const Matrix* weight;
  uint32_t *panels, *scratch;  // logit gradients packed; weight columns packed, per task
  float* sums;                 // (d, width) the gradient so far
  int64_t scratch_words, tokens, width, first, last, tasks;
};

// One block of tokens on its way through the vocabulary.
struct Walk {
  const Head* head;
  const void* visitor;
  const Matrix* const* hidden;  // of each stream
  int64_t first_token;
  uint32_t* panels;   // hidden states packed, stream by stream
  uint32_t* scratch;  // of each split
  int64_t scratch_words, padding, streams, tokens, padded, first, last, splits;
};

struct LaneFunctions {
  int64_t rows, group, width, strip;
  bool pairs;
  void (*pack_tokens)(void*, int64_t);
  void (*target_logits)(const Walk&, int64_t stream, const int64_t* targets, float* out);
  void (*sweep_logprob)(void*, int64_t);
  void (*sweep_nce)(void*, int64_t);
  void (*slope_logprob)(void*, int64_t);
  void (*slope_nce)(void*, int64_t);
  void (*logit_panels)(void*, int64_t);
  void (*hidden_gradient)(void*, int64_t);
};

const LaneFunctions& functions_of(Lane lane, Type type);

}  // namespace calm_fast::vocabulary
