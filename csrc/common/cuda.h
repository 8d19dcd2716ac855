// Host helpers of every <part>_cuda.cu beside checks.h: a tensor's device and stream, its pointers, launch errors.
#pragma once

#include "common/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cuda_runtime.h>

namespace calm_fast {

// Makes the tensor's GPU current for the lifetime of the object; stream() is torch's current stream on that GPU.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void check_launch(const char* op, const char* problem) {
  STD_TORCH_CHECK(problem == nullptr, op, ": the CUDA launch failed: ", problem);
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(),
      op, ": `", name, "` must be on CUDA device ", first.get_device_index(), ", got ",
      tensor.is_cuda() ? "CUDA device " + std::to_string(tensor.get_device_index()) : std::string("a CPU tensor"));
}

inline int64_t processors_of(const char* op, int device) {
  int count = 0;
  const cudaError_t problem = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(
      problem == cudaSuccess, op, ": CUDA cannot tell the number of multiprocessors: ", cudaGetErrorString(problem));
  return count;
}

}  // namespace calm_fast
