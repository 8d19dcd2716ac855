// SIMD lanes: the instruction set of a function is chosen at run time, never by a compile flag.
//
//   CALM_FAST_AVX512 void rows_avx512(...)   compiles a function for AVX-512 (F, BW, DQ, VL) whatever the flags
//   choose_lane(op, lane)                    returns the best lane here for -1, else that lane or an error
//   limit_lane(lane)                         makes this process use no lane beyond it, as on a CPU without them
//
// A lambda does NOT inherit its function's target attribute: use no intrinsics inside one.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "common/checks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define CALM_FAST_X86 1
#define CALM_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#define CALM_FAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define CALM_FAST_AVX512_BF16 \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
// For elementwise loops that the compiler vectorises well on its own.
#define CALM_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CALM_FAST_X86 0
#define CALM_FAST_CLONES
#endif

namespace calm_fast {

// Each lane includes the instructions of the lanes before it. A function without code for a lane runs the next lower
// one.
enum class Lane : int64_t { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

inline const char* lane_name(Lane lane) {
  switch (lane) {
    case Lane::avx512_bf16:
      return "avx512_bf16";
    case Lane::avx512:
      return "avx512";
    case Lane::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

// Returns the best lane of this CPU.
inline Lane cpu_lane() {
#if CALM_FAST_X86
  static const Lane best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Lane::scalar;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
      return Lane::avx2;
    }
    return __builtin_cpu_supports("avx512bf16") ? Lane::avx512_bf16 : Lane::avx512;
  }();
  return best;
#else
  return Lane::scalar;
#endif
}

inline std::atomic<int64_t>& lane_limit() {
  static std::atomic<int64_t> limit{static_cast<int64_t>(Lane::avx512_bf16)};
  return limit;
}

// Sets the limit to the lane of this name. Returns false if there is no such lane.
inline bool limit_lane(const char* name) {
  for (int64_t lane = 0; lane <= static_cast<int64_t>(Lane::avx512_bf16); ++lane) {
    if (std::strcmp(name, lane_name(static_cast<Lane>(lane))) != 0) continue;
    lane_limit().store(lane, std::memory_order_relaxed);
    return true;
  }
  return false;
}

// Returns the best lane that this CPU and the process's limit allow.
inline Lane best_lane() {
  const int64_t limit = lane_limit().load(std::memory_order_relaxed), own = static_cast<int64_t>(cpu_lane());
  return static_cast<Lane>(limit < own ? limit : own);
}

// Returns the lane to run. `wanted` is the kernel's argument `lane`, through which tests force each lane.
inline Lane choose_lane(const char* op, int64_t wanted) {
  if (wanted < 0) return best_lane();
  STD_TORCH_CHECK(
      wanted <= static_cast<int64_t>(best_lane()),
      op, ": `lane` must be -1 or at most ", static_cast<int64_t>(best_lane()), ", the best lane here (",
      lane_name(best_lane()), "), got ", wanted);
  return static_cast<Lane>(wanted);
}

}  // namespace calm_fast
