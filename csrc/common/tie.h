// The tie tolerance of vote and maj_at_k, for the CPU, the GPU and the emulation. No torch headers.
#pragma once

namespace calm_fast {

constexpr double kTieTolerance = 1e-9;  // classes whose weights are this close to the top are tied with it

}  // namespace calm_fast
