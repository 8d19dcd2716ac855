// SIMD lanes: which instructions a function may use is decided at run time, never by a compile flag.
//
//   CALM_FAST_AVX512 void rows_avx512(...)   a function compiled for AVX-512 (F, BW, DQ, VL) whatever the flags
//   choose_lane(lane)                        -1: the best lane of this CPU; else that lane, or an error
//
// Lambdas do NOT inherit their function's target attribute: no intrinsics inside a lambda.
#pragma once

#include <cstdint>

#include "common/checks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define CALM_FAST_X86 1
#define CALM_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#define CALM_FAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define CALM_FAST_AVX512_BF16 \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
// elementwise loops that the compiler vectorises well by itself
#define CALM_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CALM_FAST_X86 0
#define CALM_FAST_CLONES
#endif

namespace calm_fast {

// Each lane has everything of the ones before it; a function without code of its own for one takes the next lower.
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

inline Lane best_lane() {
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

// The lane to run: `wanted` is an argument of every native function, so that tests reach each of them.
inline Lane choose_lane(const char* op, int64_t wanted) {
  if (wanted < 0) return best_lane();
  STD_TORCH_CHECK(
      wanted <= static_cast<int64_t>(best_lane()),
      op, ": lane ", wanted, " (0 scalar, 1 avx2, 2 avx512, 3 avx512_bf16) asked for, but the best of this CPU is ",
      lane_name(best_lane()));
  return static_cast<Lane>(wanted);
}

}  // namespace calm_fast
