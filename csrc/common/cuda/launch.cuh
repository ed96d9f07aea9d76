// The host's side of a launch: the current device and stream of a tensor, and errors with a name.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "common/cuda/device.cuh"

#ifndef ATTN_EMULATE
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace attn::cuda {

#ifndef ATTN_EMULATE

#define ATTN_DISPATCH_KEY CUDA

// Makes the tensor's device the current one while it lives, and knows its current stream.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Runs kernel<<<grid, threads, shared bytes>>>(arguments) on the device's stream.
template <class... Parameters, class... Arguments>
void launch(const Device& device, const char* name, void (*kernel)(Parameters...), dim3 grid,
            int threads, size_t shared, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)),
               name);
  }
  kernel<<<grid, threads, shared, device.stream()>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

#else

#define ATTN_DISPATCH_KEY CPU

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(const Device&, const char*, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared, const Arguments&... arguments) {
  emulator::run(grid, threads, shared, [&] { kernel(arguments...); });
}

#endif

}  // namespace attn::cuda
