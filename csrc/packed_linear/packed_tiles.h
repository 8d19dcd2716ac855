// Tiles of the packed product: a few tokens by one panel of columns, for AVX-512 and for AVX2.
#pragma once

#include <cstdint>

#include "common/lanes.h"

#if CALM_FAST_X86

namespace calm_fast {

constexpr int64_t kPackedRow = 256 + 16;  // floats between copied rows of x; not a power of two

// Cache lines that a later tile will read. Line i is at `at` + (i >> shift) rows + (i mod 2^shift) lines of 16 floats.
// The hardware does not predict the jump from row to row, and one prefetch per step of k costs nothing.
struct Ahead {
  const float* at;
  int64_t stride, shift, line, end;
};

// Computes one tile, ROWS tokens by one panel: c = start + a b. start has c's stride; null stands for zero.
template <int ROWS>
CALM_FAST_AVX512 void tile_avx512(
    const float* a, const float* b, int64_t depth, const float* start, float* c, int64_t stride, int64_t columns,
    Ahead ahead) {
  const __mmask16 low = static_cast<__mmask16>(columns >= 16 ? 0xffff : (1u << columns) - 1u);
  const __mmask16 high =
      static_cast<__mmask16>(columns >= 32 ? 0xffff : columns > 16 ? (1u << (columns - 16)) - 1u : 0u);
  __m512 acc[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    _mm_prefetch(reinterpret_cast<const char*>(c + i * stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(c + i * stride + 16), _MM_HINT_T0);
  }
  // Accumulate, with one prefetch per step of k.
  const int64_t within = (int64_t{1} << ahead.shift) - 1;
  for (int64_t j = 0; j < depth; ++j) {
    if (ahead.line < ahead.end) {
      const float* line = ahead.at + (ahead.line >> ahead.shift) * ahead.stride + (ahead.line & within) * 16;
      _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
      ++ahead.line;
    }
    const __m512 b0 = _mm512_loadu_ps(b + j * 32), b1 = _mm512_loadu_ps(b + j * 32 + 16);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const __m512 value = _mm512_set1_ps(a[i * kPackedRow + j]);
      acc[i][0] = _mm512_fmadd_ps(value, b0, acc[i][0]);
      acc[i][1] = _mm512_fmadd_ps(value, b1, acc[i][1]);
    }
  }
  // Store: `start` is added last, so that the sum over k is one of partial sums of 256, whose rounding errors stay
  // small.
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    if (start != nullptr) {
      acc[i][0] = _mm512_add_ps(acc[i][0], _mm512_maskz_loadu_ps(low, start + i * stride));
      acc[i][1] = _mm512_add_ps(acc[i][1], _mm512_maskz_loadu_ps(high, start + i * stride + 16));
    }
    _mm512_mask_storeu_ps(c + i * stride, low, acc[i][0]);
    if (high) _mm512_mask_storeu_ps(c + i * stride + 16, high, acc[i][1]);
  }
}

// The same with AVX2: ROWS tokens by a panel of 16 columns.
template <int ROWS>
CALM_FAST_AVX2 void tile_avx2(
    const float* a, const float* b, int64_t depth, const float* start, float* c, int64_t stride, int64_t columns,
    Ahead ahead) {
  __m256 acc[ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    _mm_prefetch(reinterpret_cast<const char*>(c + i * stride), _MM_HINT_T0);
    if (start != nullptr) _mm_prefetch(reinterpret_cast<const char*>(start + i * stride), _MM_HINT_T0);
  }
  // Accumulate, with one prefetch per step of k.
  const int64_t within = (int64_t{1} << ahead.shift) - 1;
  for (int64_t j = 0; j < depth; ++j) {
    if (ahead.line < ahead.end) {
      const float* line = ahead.at + (ahead.line >> ahead.shift) * ahead.stride + (ahead.line & within) * 16;
      _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
      ++ahead.line;
    }
    const __m256 b0 = _mm256_loadu_ps(b + j * 16), b1 = _mm256_loadu_ps(b + j * 16 + 8);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const __m256 value = _mm256_broadcast_ss(a + i * kPackedRow + j);
      acc[i][0] = _mm256_fmadd_ps(value, b0, acc[i][0]);
      acc[i][1] = _mm256_fmadd_ps(value, b1, acc[i][1]);
    }
  }
  // Store: `start` is added last, as above. AVX2's masks are slow to make, so the last panel goes through memory.
  if (columns >= 16) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      if (start != nullptr) {
        acc[i][0] = _mm256_add_ps(acc[i][0], _mm256_loadu_ps(start + i * stride));
        acc[i][1] = _mm256_add_ps(acc[i][1], _mm256_loadu_ps(start + i * stride + 8));
      }
      _mm256_storeu_ps(c + i * stride, acc[i][0]);
      _mm256_storeu_ps(c + i * stride + 8, acc[i][1]);
    }
    return;
  }
  float sums[16];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    _mm256_storeu_ps(sums, acc[i][0]);
    _mm256_storeu_ps(sums + 8, acc[i][1]);
    for (int64_t n = 0; n < columns; ++n) {
      c[i * stride + n] = start != nullptr ? sums[n] + start[i * stride + n] : sums[n];
    }
  }
}

using Tile = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t, int64_t, Ahead);

// A lane's sizes and tiles. kPanel: columns of a panel, two vectors. kTileRows: tokens of a tile, whose sums fill 28 of
// 32 registers, or 12 of 16. kMostRows: tokens that one pass over a large weight serves, kChunkRows over one that fits
// the L2 cache. kGroupFloats: panels that all tiles of a chunk use before the next group.
struct TilesAvx512 {
  static constexpr int64_t kPanel = 32, kTileRows = 14, kChunkRows = 9 * kTileRows, kMostRows = 27 * kTileRows;
  static constexpr int64_t kGroupFloats = 32 << 10;  // stay in the L2 cache
  static constexpr Tile kTiles[kTileRows] = {
      tile_avx512<1>,  tile_avx512<2>,  tile_avx512<3>,  tile_avx512<4>,  tile_avx512<5>,
      tile_avx512<6>,  tile_avx512<7>,  tile_avx512<8>,  tile_avx512<9>,  tile_avx512<10>,
      tile_avx512<11>, tile_avx512<12>, tile_avx512<13>, tile_avx512<14>,
  };
};

// A tile of 6 tokens uses a panel faster than one of 14, so the panel (16 KiB) stays in the L1 cache for all tiles of a
// chunk, and it is the copied rows (6 KiB a tile) that come from the L2 cache.
struct TilesAvx2 {
  static constexpr int64_t kPanel = 16, kTileRows = 6, kChunkRows = 24 * kTileRows, kMostRows = 32 * kTileRows;
  static constexpr int64_t kGroupFloats = 1;  // one panel
  static constexpr Tile kTiles[kTileRows] = {tile_avx2<1>, tile_avx2<2>, tile_avx2<3>,
                                             tile_avx2<4>, tile_avx2<5>, tile_avx2<6>};
};

}  // namespace calm_fast

#endif  // CALM_FAST_X86
