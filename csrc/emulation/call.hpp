// Entry point of an emulated kernel: one C function per op with the same signature for all, called through ctypes
// (calm_fast/verify/emulation.py).
//
//   CALM_EMULATED(vote) { ... in.tensor<const int64_t>(0, "answers", Use::input) ...  return vote::launch(...); }
#pragma once

#include "common/simt.cuh"

namespace calm_fast::emulation {

struct RawTensor {
  void* data;  // null stands for None
  int64_t count;
};

struct Call {
  const RawTensor* tensors;
  const int64_t* integers;
  const double* floats;
  int64_t order, seed, resident;
  char* message;  // receives the error message
  int64_t message_size;

  template <class T>
  Buffer<T> tensor(int i, const char* name, Use use) const {
    return Buffer<T>(name, const_cast<void*>(static_cast<const void*>(tensors[i].data)), tensors[i].count, use);
  }
  Schedule schedule() const { return {static_cast<Order>(order), static_cast<uint64_t>(seed), static_cast<int>(resident)}; }
};

// Runs `body`. Returns 0, or 1 with the error in call.message.
inline int guarded(const Call& call, const char* (*body)(const Call&)) {
  std::string message;
  try {
    const char* problem = body(call);
    if (!problem) return 0;
    message = problem;
  } catch (const std::exception& problem) {
    message = problem.what();
  }
  std::snprintf(call.message, static_cast<size_t>(call.message_size), "%s", message.c_str());
  return 1;
}

}  // namespace calm_fast::emulation

#define CALM_EMULATED(op)                                                                                       \
  static const char* emulated_##op(const calm_fast::emulation::Call& in);                                       \
  extern "C" int calm_fast_emulated_##op(const calm_fast::emulation::Call* call) {                              \
    return calm_fast::emulation::guarded(*call, emulated_##op);                                                 \
  }                                                                                                             \
  static const char* emulated_##op(const calm_fast::emulation::Call& in)
