// The host's side of a launch: the current device and stream of a tensor, and errors with a name.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "common/cuda/device.cuh"

#ifndef ATTN_EMULATE
#include <atomic>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace attn::cuda {

#ifndef ATTN_EMULATE

#define ATTN_DISPATCH_KEY CUDA

// Makes the tensor's device the current one while it lives, and knows its current stream.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int32_t index() const { return index_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int32_t index_;
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

// More than 48 KB of shared memory is asked for once per device, which saves a microsecond of every
// further call.
template <auto kKernel>
void allow_shared(const Device& device, const char* name, size_t shared) {
  static std::atomic<uint64_t> asked{0};  // a bit for each device
  const uint64_t bit = device.index() < 64 ? uint64_t{1} << device.index() : 0;
  if (shared <= 48 * 1024 || asked.load(std::memory_order_relaxed) & bit) return;
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)),
             name);
  asked.fetch_or(bit, std::memory_order_relaxed);
}

// The same for a kernel that is known at compile time.
template <auto kKernel, class... Arguments>
void launch(const Device& device, const char* name, dim3 grid, int threads, size_t shared,
            const Arguments&... arguments) {
  allow_shared<kKernel>(device, name, shared);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  kKernel<<<grid, threads, shared, device.stream()>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

// The kernel may start when every block of the one before has said so, and waits for its end by
// itself (wait_for_kernel_before).
template <auto kKernel, class... Arguments>
void launch_after(const Device& device, const char* name, dim3 grid, int threads, size_t shared,
                  const Arguments&... arguments) {
  allow_shared<kKernel>(device, name, shared);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  config.stream = device.stream();
  config.attrs = &overlap, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kKernel, arguments...), name);
}

inline int multiprocessors(const Device& device) {
  static std::atomic<int> known[64];  // 0: not asked yet
  std::atomic<int>* found = device.index() < 64 ? &known[device.index()] : nullptr;
  int count = found ? found->load(std::memory_order_relaxed) : 0;
  if (count > 0) return count;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index()),
             "the number of multiprocessors");
  if (found) found->store(count, std::memory_order_relaxed);
  return count;
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
template <auto kKernel, class... Arguments>
void launch(const Device& device, const char* name, dim3 grid, int threads, size_t shared,
            const Arguments&... arguments) {
  launch(device, name, kKernel, grid, threads, shared, arguments...);
}
template <auto kKernel, class... Arguments>
void launch_after(const Device& device, const char* name, dim3 grid, int threads, size_t shared,
                  const Arguments&... arguments) {
  launch(device, name, kKernel, grid, threads, shared, arguments...);
}

// Few, so that a block has several tiles.
inline int multiprocessors(const Device&) {
  return 3;
}

#endif

}  // namespace attn::cuda
