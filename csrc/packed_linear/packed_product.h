// out (T, n) = x (T, k) w^T [+ add], float32, with w (n, k) packed once, on AVX-512.
//
// w is stored in panels of 32 rows, (ceil(n / 32), k, 32), zero beyond row n, so that the kernel reads contiguous
// memory. A tile is 14 tokens x 32 columns, which fills 28 of the 32 registers. The rows of x are copied first, because
// rows whose length is a power of two all fall into the same sets of the cache. The order of the sum over k depends
// neither on the number of threads nor on the number of tokens.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "common/lanes.h"
#include "common/parallel.h"

namespace calm_fast {

constexpr int64_t kPanel = 32;           // columns of a panel: two vectors
constexpr int64_t kTileRows = 14;        // tokens of a tile
constexpr int64_t kDepth = 256;          // k at a time: a tile of x is 14 KiB
constexpr int64_t kPackedRow = 256 + 16; // floats between copied rows of x; not a power of two
// Tokens that one pass over the weight serves. A weight larger than the L2 cache (1 MiB and up) is read from farther
// away in every pass, so a pass then serves as many tokens as leave the L2 cache room for panels.
constexpr int64_t kChunkRows = 9 * kTileRows, kMostRows = 27 * kTileRows;
constexpr int64_t kLargeWeight = int64_t{1} << 21;
constexpr int64_t kGroupFloats = 32 << 10;  // panels that stay in the L2 cache while all tiles of a chunk use them

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

inline void pack_panels(const float* w, int64_t n, int64_t k, float* packed) {
  constexpr int64_t kStep = 64;  // values of one row at a time: reads are contiguous, writes stay in the L1 cache
  parallel_for(panels(n), 4, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t rows = std::min(kPanel, n - p * kPanel);
      float* to = packed + p * k * kPanel;
      if (rows < kPanel) std::memset(to, 0, sizeof(float) * k * kPanel);
      for (int64_t from = 0; from < k; from += kStep) {
        for (int64_t i = 0; i < rows; ++i) {
          const float* row = w + (p * kPanel + i) * k;
          for (int64_t j = from; j < std::min(k, from + kStep); ++j) to[j * kPanel + i] = row[j];
        }
      }
    }
  });
}

#if CALM_FAST_X86

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
    const __m512 b0 = _mm512_loadu_ps(b + j * kPanel), b1 = _mm512_loadu_ps(b + j * kPanel + 16);
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

using Tile = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t, int64_t, Ahead);
inline constexpr Tile kTiles[kTileRows] = {
    tile_avx512<1>,  tile_avx512<2>,  tile_avx512<3>,  tile_avx512<4>,  tile_avx512<5>,
    tile_avx512<6>,  tile_avx512<7>,  tile_avx512<8>,  tile_avx512<9>,  tile_avx512<10>,
    tile_avx512<11>, tile_avx512<12>, tile_avx512<13>, tile_avx512<14>,
};

struct Product {
  const float *x, *packed, *add;
  float* out;
  int64_t tokens, n, k;
};

// Computes rows [begin, end) of the output and the columns of panels [first, last); end - begin <= kMostRows. Returns
// false if memory ran out.
inline bool product_part(const Product& s, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t n = s.n, k = s.k, rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
  // Up to 411 KB, which is too much for some threads' stacks.
  const std::unique_ptr<float[]> copy(new (std::nothrow) float[rows * kPackedRow]);
  if (!copy) return false;
  float* const copied = copy.get();
  for (int64_t from = 0; from == 0 || from < k; from += kDepth) {  // k = 0 still writes `add` or zeros
    const int64_t depth = std::min(kDepth, k - from);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(copied + i * kPackedRow, s.x + (begin + i) * k + from, sizeof(float) * depth);
    }
    // The part of x that is read next: the same rows further right, then the next chunk's rows.
    const bool further = from + kDepth < k;
    const int64_t next_row = further ? begin : end, next_column = further ? from + kDepth : 0;
    const int64_t group = std::max<int64_t>(1, kGroupFloats / (std::max<int64_t>(1, depth) * kPanel));
    for (int64_t g = first; g < last; g += group) {
      const int64_t stop = std::min(g + group, last);
      for (int64_t tile = 0; tile < tiles; ++tile) {  // tiles of nearly equal height
        const int64_t top = tile * rows / tiles, height = (tile + 1) * rows / tiles - top;
        for (int64_t p = g; p < stop; ++p) {
          const int64_t columns = std::min(kPanel, n - p * kPanel), at = (begin + top) * n + p * kPanel;
          const float* start = from ? s.out + at : s.add ? s.add + at : nullptr;
          Ahead ahead{nullptr, 0, 0, 0, 0};
          if (k > kDepth && g == first && next_row + top + height <= s.tokens) {
            const int64_t lines = height * (kDepth / 16);
            ahead = {s.x + (next_row + top) * k + next_column, k, 4, (p - g) * lines / (stop - g),
                     (p + 1 - g) * lines / (stop - g)};
          } else if (k <= kDepth && s.add && p + 1 < stop) {
            ahead = {s.add + at + kPanel, n, 1, 0, 2 * height};
          }
          kTiles[height - 1](
              copied + top * kPackedRow, s.packed + (p * k + from) * kPanel, depth, start, s.out + at, n, columns,
              ahead);
        }
      }
    }
  }
  return true;
}

#endif  // CALM_FAST_X86

// Computes the whole product; k may be 0. The caller has checked that the CPU has AVX-512.
inline void packed_product(
    const float* x, const float* packed, const float* add, float* out, int64_t tokens, int64_t n, int64_t k) {
#if CALM_FAST_X86
  if (tokens == 0 || n == 0) return;
  const int64_t threads = torch::stable::get_num_threads(), count = panels(n);
  const int64_t most = (tokens + kTileRows - 1) / kTileRows;
  const int64_t rows = n * k < kLargeWeight ? kChunkRows : kMostRows;
  int64_t chunks = std::max((tokens + rows - 1) / rows, std::min(threads, most));
  chunks = std::min(most, (chunks + threads - 1) / threads * threads);  // equally many for every thread
  const int64_t parts = std::min(count, (threads + chunks - 1) / chunks);
  const Product s{x, packed, add, out, tokens, n, k};
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown inside parallel_for
  parallel_for(chunks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      const int64_t first = part * count / parts, last = (part + 1) * count / parts;
      if (!product_part(s, chunk * tokens / chunks, (chunk + 1) * tokens / chunks, first, last)) out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "packed_linear: out of memory");
#else
  (void)x, (void)packed, (void)add, (void)out, (void)tokens, (void)n, (void)k;
#endif
}

}  // namespace calm_fast
