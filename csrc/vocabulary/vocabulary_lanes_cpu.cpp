// The four lanes of the vocabulary sweeps: the same sources, compiled for four instruction sets (common/vectors.h).

#include "vocabulary/lane_types.h"

// GCC 12 warns about the undefined operand of its own unmasked AVX-512 intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <cfloat>
#include <cmath>
#include <cstring>

#include "common/dtypes.h"
#include "common/vectors.h"

#define CALM_FAST_VOCABULARY_LANE(name, rows) \
  namespace calm_fast::vocabulary {           \
  namespace {                                 \
  namespace name##_lane {                     \
  using namespace calm_fast::name;            \
  constexpr int kRows = rows;

#define LANE inline
CALM_FAST_VOCABULARY_LANE(scalar, 4)
#include "vocabulary/products_lane.h"
#include "vocabulary/sweep_lane.h"
#include "vocabulary/rows_lane.h"
#include "vocabulary/nce_rows_lane.h"
#include "vocabulary/hidden_gradient_lane.h"
}}}  // NOLINT
#undef LANE
#if CALM_FAST_X86
#define LANE CALM_FAST_AVX2 inline
CALM_FAST_VOCABULARY_LANE(avx2, 4)
#include "vocabulary/products_lane.h"
#include "vocabulary/sweep_lane.h"
#include "vocabulary/rows_lane.h"
#include "vocabulary/nce_rows_lane.h"
#include "vocabulary/hidden_gradient_lane.h"
}}}  // NOLINT
#undef LANE
#define LANE CALM_FAST_AVX512 inline
CALM_FAST_VOCABULARY_LANE(avx512, 8)
#include "vocabulary/products_lane.h"
#include "vocabulary/sweep_lane.h"
#include "vocabulary/rows_lane.h"
#include "vocabulary/nce_rows_lane.h"
#include "vocabulary/hidden_gradient_lane.h"
}}}  // NOLINT
#undef LANE
#define LANE CALM_FAST_AVX512_BF16 inline
CALM_FAST_VOCABULARY_LANE(avx512_bf16, 8)
#include "vocabulary/products_lane.h"
#include "vocabulary/sweep_lane.h"
#include "vocabulary/rows_lane.h"
#include "vocabulary/nce_rows_lane.h"
#include "vocabulary/hidden_gradient_lane.h"
}}}  // NOLINT
#undef LANE
#endif

namespace calm_fast::vocabulary {

const LaneFunctions& functions_of(Lane lane, Type type) {
#if CALM_FAST_X86
  if (lane == Lane::avx512_bf16 && type == Type::bfloat16) return avx512_bf16_lane::kFunctions;
  if (lane >= Lane::avx512) return avx512_lane::kFunctions;
  if (lane == Lane::avx2) return avx2_lane::kFunctions;
#endif
  return scalar_lane::kFunctions;
}

}  // namespace calm_fast::vocabulary
