// The CUDA C++ that device code may use in the emulation: qualifiers, indices, barriers, warp collectives, atomics,
// types. It has what our kernels use. Add what a new kernel needs, with CUDA's own name and meaning.
#pragma once

#include <cmath>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define CALM_EMU_TEXT_(x) #x
#define CALM_EMU_TEXT(x) CALM_EMU_TEXT_(x)
#define CALM_EMU_SITE __FILE__ ":" CALM_EMU_TEXT(__LINE__)

#define threadIdx (::calm_fast::emulation::self().index)
#define blockIdx (::calm_fast::emulation::self().block->index)
#define blockDim (::calm_fast::emulation::g_grid->block)
#define gridDim (::calm_fast::emulation::g_grid->grid)

#define __syncthreads() ((void)::calm_fast::emulation::barrier("__syncthreads", CALM_EMU_SITE))
#define __syncthreads_or(p) (::calm_fast::emulation::barrier("__syncthreads_or", CALM_EMU_SITE, (p) != 0, 1) != 0)
#define __syncthreads_and(p) (::calm_fast::emulation::barrier("__syncthreads_and", CALM_EMU_SITE, !(p), 1) == 0)
#define __syncthreads_count(p) \
  (static_cast<int>(::calm_fast::emulation::barrier("__syncthreads_count", CALM_EMU_SITE, (p) != 0, 1)))
#define __syncwarp(...) (::calm_fast::emulation::sync_warp(CALM_EMU_SITE __VA_OPT__(, ) __VA_ARGS__))
#define __shfl_sync(mask, ...) (::calm_fast::emulation::shuffle(CALM_EMU_SITE, mask, __VA_ARGS__))
#define __shfl_xor_sync(mask, ...) (::calm_fast::emulation::shuffle_xor(CALM_EMU_SITE, mask, __VA_ARGS__))
#define __shfl_down_sync(mask, ...) (::calm_fast::emulation::shuffle_down(CALM_EMU_SITE, mask, __VA_ARGS__))
#define __shfl_up_sync(mask, ...) (::calm_fast::emulation::shuffle_up(CALM_EMU_SITE, mask, __VA_ARGS__))
#define __ballot_sync(mask, p) (::calm_fast::emulation::ballot(CALM_EMU_SITE, mask, (p) != 0))
#define __any_sync(mask, p) (::calm_fast::emulation::ballot(CALM_EMU_SITE, mask, (p) != 0) != 0)
#define __all_sync(mask, p) (::calm_fast::emulation::ballot(CALM_EMU_SITE, mask, !(p)) == 0)
#define __activemask() (::calm_fast::emulation::no_active_mask())

constexpr int warpSize = 32;

namespace calm_fast::emulation {

inline void sync_warp(const char* site, unsigned mask = ~0u) { release(meet("__syncwarp", site, mask, 0)); }

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

// Exchanges the values of a shuffle and returns that of lane `source`, or the lane's own value where `source` is
// outside its segment.
template <class T>
T pick(const char* what, const char* site, unsigned mask, T value, int source, bool inside) {
  Meeting& m = meet(what, site, mask, to_word(value));
  const int lane = inside ? source : self().lane();
  if (!(m.mask >> lane & 1)) {
    fail(std::string(what) + " at " + site + " reads lane " + std::to_string(lane) + ", which takes no part");
  }
  T result;
  std::memcpy(&result, &m.values[lane], sizeof(T));
  release(m);
  return result;
}

template <class T>
T shuffle(const char* site, unsigned mask, T value, int source, int width = 32) {
  const int base = self().lane() / width * width;
  return pick("__shfl_sync", site, mask, value, base + (source & (width - 1)), true);
}

template <class T>
T shuffle_xor(const char* site, unsigned mask, T value, int bits, int width = 32) {
  const int base = self().lane() / width * width, lane = self().lane() ^ bits;
  return pick("__shfl_xor_sync", site, mask, value, lane, lane < base + width);
}

template <class T>
T shuffle_down(const char* site, unsigned mask, T value, unsigned by, int width = 32) {
  const int base = self().lane() / width * width, lane = self().lane() + static_cast<int>(by);
  return pick("__shfl_down_sync", site, mask, value, lane, lane < base + width);
}

template <class T>
T shuffle_up(const char* site, unsigned mask, T value, unsigned by, int width = 32) {
  const int base = self().lane() / width * width, lane = self().lane() - static_cast<int>(by);
  return pick("__shfl_up_sync", site, mask, value, lane, lane >= base);
}

inline unsigned ballot(const char* site, unsigned mask, bool predicate) {
  Meeting& m = meet("__ballot_sync", site, mask, predicate);
  unsigned result = 0;
  for (int lane = 0; lane < kWarp; ++lane) result |= unsigned((m.mask >> lane & 1) && m.values[lane]) << lane;
  release(m);
  return result;
}

inline unsigned no_active_mask() {
  fail("__activemask() returns the lanes that happen to be active, not those that should be: name a mask");
}

// ---- atomics: they return the old value ----------------------------------------------------------------------------

template <class T>
T atomicAdd(Pointer<T> p, std::type_identity_t<T> v) {
  return read_modify_write<T>(p.memory(), p.offset(), [v](T x) { return T(x + v); });
}
template <class T>
T atomicMax(Pointer<T> p, std::type_identity_t<T> v) {
  return read_modify_write<T>(p.memory(), p.offset(), [v](T x) { return std::max(x, v); });
}
template <class T>
T atomicMin(Pointer<T> p, std::type_identity_t<T> v) {
  return read_modify_write<T>(p.memory(), p.offset(), [v](T x) { return std::min(x, v); });
}
template <class T>
T atomicOr(Pointer<T> p, std::type_identity_t<T> v) {
  return read_modify_write<T>(p.memory(), p.offset(), [v](T x) { return T(x | v); });
}
template <class T>
T atomicExch(Pointer<T> p, std::type_identity_t<T> v) {
  return read_modify_write<T>(p.memory(), p.offset(), [v](T) { return v; });
}
// As in CUDA: counts to `last`, then starts again at 0.
inline unsigned atomicInc(Pointer<unsigned> p, unsigned last) {
  return read_modify_write<unsigned>(p.memory(), p.offset(), [last](unsigned x) { return x >= last ? 0u : x + 1; });
}
template <class T>
T atomicCAS(Pointer<T> p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return read_modify_write<T>(p.memory(), p.offset(), [=](T x) { return x == expected ? v : x; });
}

// ld.acquire of a flag that an atomic of another block sets. It yields, so that a thread that waits lets others run.
template <class T>
T load_acquire(Pointer<T> p) {
  yield_turn();
  const unsigned char* at = locate(p.memory(), p.offset(), sizeof(T), alignof(T), "load_acquire");
  meet_releases(at, false);
  std::remove_const_t<T> value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

inline void threadfence() { self().fence = ++g_grid->time; }

// ---- 16-bit floats --------------------------------------------------------------------------------------------------

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline bfloat16 to_bfloat16(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

struct float16 {
  uint16_t bits;
};

inline float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
  const float magnitude = exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25) : std::ldexp(float(fraction), -24);
  return sign ? -magnitude : magnitude;
}

inline float16 to_float16(float x) {  // to nearest, ties to even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {uint16_t(sign | 0x7e00)};
  const float a = std::fabs(x);
  if (a >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (a < 6.103515625e-05f) return {uint16_t(sign | uint16_t(std::nearbyint(a * 16777216.0f)))};
  int exponent;
  std::frexp(a, &exponent);  // a = m 2^exponent, 1/2 <= m < 1
  const int rounded = int(std::nearbyint(std::ldexp(a, 11 - exponent)));  // 1024..2048: 2048 carries over
  return {uint16_t(sign | uint16_t((exponent + 14 - 1) * 1024 + rounded))};
}

}  // namespace calm_fast::emulation

using calm_fast::emulation::atomicAdd;
using calm_fast::emulation::atomicCAS;
using calm_fast::emulation::atomicExch;
using calm_fast::emulation::atomicInc;
using calm_fast::emulation::atomicMax;
using calm_fast::emulation::atomicMin;
using calm_fast::emulation::atomicOr;

inline void __threadfence() { calm_fast::emulation::threadfence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { calm_fast::emulation::yield_turn(); }

template <class T>
T __ldg(calm_fast::emulation::Pointer<const T> p) {
  return *p;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __float_as_uint(float x) { return calm_fast::emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return calm_fast::emulation::bits_as<float>(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
