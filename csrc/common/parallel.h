// Parallel loops on torch's own thread pool; a second OpenMP runtime would fight with it.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace calm_fast {

// body(begin, end) over parts of [0, count) of at least `grain` items, on at most torch's number of threads.
// The body must not throw: an exception inside a worker thread ends the process.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace calm_fast
