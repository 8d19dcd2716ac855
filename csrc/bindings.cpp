// Schemas of the compiled library and the module's entry point; nothing else.
//
// The same file is in both extension modules. Schemas are defined once, by calm_fast._cpu, which is loaded first;
// csrc/<op>/<op>_cpu.cpp and csrc/<op>/<op>_cuda.cu add their implementations to them.

#include "common/module.h"

#include <torch/csrc/stable/library.h>

#ifndef CALM_FAST_CUDA_MODULE
STABLE_TORCH_LIBRARY_FRAGMENT(calm_fast, m) {
  // Every function takes `lane` last: -1 for the best this CPU has, or one of csrc/common/lanes.h to force it.
  (void)m;
}
CALM_FAST_MODULE(_cpu)
#else
CALM_FAST_MODULE(_cuda)
#endif
