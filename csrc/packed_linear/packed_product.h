// out (T, n) = x (T, k) w^T [+ add], float32, with w (n, k) packed once, on AVX-512 or AVX2.
//
// w is stored in panels of 32 rows (AVX-512) or 16 (AVX2), (ceil(n / panel), k, panel), zero beyond row n, so that the
// kernel reads contiguous memory. The rows of x are copied first, because rows whose length is a power of two all fall
// into the same sets of the cache. The order of the sum over k depends neither on the number of threads nor on the
// number of tokens.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "common/lanes.h"
#include "common/parallel.h"
#include "packed_linear/packed_tiles.h"

namespace calm_fast {

constexpr int64_t kDepth = 256;  // k at a time: a tile of x is 14 KiB or 6
// A weight larger than the L2 cache (1 MiB and up) is read from farther away in every pass over it, so a pass then
// serves as many tokens as leave the L2 cache room for panels.
constexpr int64_t kLargeWeight = int64_t{1} << 21;

constexpr int64_t kShortGroupFloats = 32 << 10;  // panels that stay in the L2 cache

// Returns the columns of a panel in a lane, 0 where nothing is packed.
inline int64_t panel_of(Lane lane) { return lane >= Lane::avx512 ? 32 : lane == Lane::avx2 ? 16 : 0; }

inline int64_t panels(int64_t n, int64_t panel) { return (n + panel - 1) / panel; }

inline void pack_panels(const float* w, int64_t n, int64_t k, int64_t panel, float* packed) {
  constexpr int64_t kStep = 64;  // values of one row at a time: reads are contiguous, writes stay in the L1 cache
  parallel_for(panels(n, panel), 4, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t rows = std::min(panel, n - p * panel);
      float* to = packed + p * k * panel;
      if (rows < panel) std::memset(to, 0, sizeof(float) * k * panel);
      for (int64_t from = 0; from < k; from += kStep) {
        for (int64_t i = 0; i < rows; ++i) {
          const float* row = w + (p * panel + i) * k;
          for (int64_t j = from; j < std::min(k, from + kStep); ++j) to[j * panel + i] = row[j];
        }
      }
    }
  });
}

struct Product {
  const float *x, *packed, *add;
  float* out;
  int64_t tokens, n, k;
};

#if CALM_FAST_X86

// Computes rows [begin, end) of the output and the columns of panels [first, last); end - begin <= L::kMostRows.
// Returns false if memory ran out.
template <class L>
inline bool product_part(const Product& s, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t n = s.n, k = s.k, rows = end - begin, tiles = (rows + L::kTileRows - 1) / L::kTileRows;
  constexpr int64_t kPanel = L::kPanel;
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
    // A short k leaves little arithmetic per line of `add` and `out`. Panels then change faster than tiles in every
    // lane, so that those lines are read in order; the other order takes them one by one, each from another page.
    const int64_t floats = k <= kDepth ? kShortGroupFloats : L::kGroupFloats;
    const int64_t group = std::max<int64_t>(1, floats / (std::max<int64_t>(1, depth) * kPanel));
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
            ahead = {s.add + at + kPanel, n, kPanel / 32, 0, kPanel / 16 * height};
          }
          L::kTiles[height - 1](
              copied + top * kPackedRow, s.packed + (p * k + from) * kPanel, depth, start, s.out + at, n, columns,
              ahead);
        }
      }
    }
  }
  return true;
}

template <class L>
inline void product_in(const Product& s) {
  if (s.tokens == 0 || s.n == 0) return;
  const int64_t threads = torch::stable::get_num_threads(), count = panels(s.n, L::kPanel);
  const int64_t most = (s.tokens + L::kTileRows - 1) / L::kTileRows;
  const int64_t rows = s.n * s.k < kLargeWeight ? L::kChunkRows : L::kMostRows;
  int64_t chunks = std::max((s.tokens + rows - 1) / rows, std::min(threads, most));
  chunks = std::min(most, (chunks + threads - 1) / threads * threads);  // equally many for every thread
  const int64_t parts = std::min(count, (threads + chunks - 1) / chunks);
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown inside parallel_for
  parallel_for(chunks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      const int64_t top = chunk * s.tokens / chunks, bottom = (chunk + 1) * s.tokens / chunks;
      if (!product_part<L>(s, top, bottom, part * count / parts, (part + 1) * count / parts)) out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "packed_linear: out of memory");
}

// Computes the whole product with panels of 32 or 16 columns; k may be 0. The caller has checked that the CPU has the
// lane.
inline void packed_product(const Product& s, int64_t panel) {
  panel == TilesAvx512::kPanel ? product_in<TilesAvx512>(s) : product_in<TilesAvx2>(s);
}

#else

inline void packed_product(const Product&, int64_t) {}

#endif  // CALM_FAST_X86

}  // namespace calm_fast
