// Parallel loops on torch's own thread pool. A second OpenMP runtime would compete with it for the cores.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace calm_fast {

// Calls body(begin, end) on ranges of [0, count) with at least `grain` items, on at most torch's number of threads.
// The body must not throw: an exception in a worker thread ends the process.
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
