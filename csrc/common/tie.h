// The tie rule of vote and maj_at_k, for the CPU, the GPU and the emulation. No torch headers.
#pragma once

#ifdef __CUDACC__
#define CALM_FAST_TIE_FUNCTION __host__ __device__ inline
#else
#define CALM_FAST_TIE_FUNCTION inline
#endif

namespace calm_fast {

constexpr double kTieTolerance = 1e-9;  // classes this close to the top, relative to it, are tied with it

// Returns the least weight that is tied with `top`. One product, so that no compiler can fuse it and every engine has
// the same bits.
CALM_FAST_TIE_FUNCTION double tie_limit(double top) {
  return top * (top >= 0 ? 1 - kTieTolerance : 1 + kTieTolerance);
}

}  // namespace calm_fast
