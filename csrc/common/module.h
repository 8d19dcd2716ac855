// The Python module around the library: PyInit_<name> with build_info() -> dict and limit_lane(str). Limited C API only.
#pragma once

#include <Python.h>

#include "common/lanes.h"

#define CALM_FAST_TEXT_(x) #x
#define CALM_FAST_TEXT(x) CALM_FAST_TEXT_(x)

#if !defined(Py_LIMITED_API) || Py_LIMITED_API > 0x030a0000
#error "the wheel is tagged cp310-abi3: Py_LIMITED_API must be 0x030a0000 or older"
#endif

namespace calm_fast {

inline PyObject* build_info(PyObject*, PyObject*) {
#if defined(CALM_FAST_CUDA_MODULE)
#define CALM_FAST_DEVICE_COMPILER ", nvcc " CALM_FAST_TEXT(CALM_FAST_CUDA_MODULE)
#else
#define CALM_FAST_DEVICE_COMPILER ""
#endif
#if defined(__clang__)
  const char* compiler = __VERSION__ CALM_FAST_DEVICE_COMPILER;
#else
  const char* compiler = "GCC " __VERSION__ CALM_FAST_DEVICE_COMPILER;
#endif
  return Py_BuildValue(
      "{s:s,s:s,s:s,s:s,s:s}",
      "compiler", compiler,
      "built with torch", CALM_FAST_TEXT(CALM_FAST_TORCH),
      "stable ABI target", CALM_FAST_TEXT(TORCH_TARGET_VERSION),
      "Python ABI", CALM_FAST_TEXT(Py_LIMITED_API),
      "best lane here", lane_name(best_lane()));
}

inline PyObject* limit_lane_by_name(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  if (!limit_lane(text)) {
    return PyErr_Format(
        PyExc_ValueError,
        "limit_lane: `lane` must be 'scalar', 'avx2', 'avx512' or 'avx512_bf16', got '%s'", text);
  }
  Py_RETURN_NONE;
}

}  // namespace calm_fast

#define CALM_FAST_MODULE(name)                                                                      \
  PyMODINIT_FUNC PyInit_##name() {                                                                  \
    static PyMethodDef methods[] = {                                                                \
        {"build_info", calm_fast::build_info, METH_NOARGS, "Return how this module was built, as a dict."},\
        {"limit_lane", calm_fast::limit_lane_by_name, METH_O, "Use no SIMD lane beyond the one named."},\
        {nullptr, nullptr, 0, nullptr}};                                                            \
    static PyModuleDef definition = {                                                               \
        PyModuleDef_HEAD_INIT, #name, "Compiled part of calm_fast.", 0, methods, nullptr, nullptr,  \
        nullptr, nullptr};                                                                          \
    return PyModule_Create(&definition);                                                            \
  }
