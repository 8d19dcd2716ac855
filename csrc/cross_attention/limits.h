// Limits of the native kernels of cross_attention, for the CPU, the GPU and the emulation. No torch headers.
#pragma once

#include <cstdint>

namespace calm_fast::cross_attention {

constexpr int64_t kMaxQueries = 16;   // of the decode kernels; NATIVE_MAX_QUERIES in Python
constexpr int64_t kMaxHeadDim = 256;  // of all kernels

}  // namespace calm_fast::cross_attention
