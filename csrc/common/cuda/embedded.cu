// attn::_launch: runs a Triton kernel whose machine code a package carries with it
// (attn_ops/_triton/embed.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/cuda/launch.cuh"
#include "common/text.h"

namespace attn::cuda {
namespace {

using torch::stable::Tensor;

// The bytes of base64 without padding.
std::vector<uint8_t> decode(std::string_view text) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<uint8_t> bytes;
  uint32_t bits = 0;
  int count = 0;
  for (const char digit : text) {
    bits = bits << 6 | static_cast<uint32_t>(kDigits.find(digit));
    count += 6;
    if (count < 8) continue;
    count -= 8;
    bytes.push_back(static_cast<uint8_t>(bits >> count));
  }
  return bytes;
}

// `name`: of the function, and after a colon a digest of `code`. Loaded once for a device.
const void* find_kernel(const Device& device, std::string_view name, std::string_view code,
                        int64_t shared) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, std::string>, cudaKernel_t> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int32_t, std::string> key{device.index(), name};
  const auto found = loaded.find(key);
  if (found != loaded.end()) return found->second;
  const std::string function(name.substr(0, name.find(':')));
  const std::vector<uint8_t> bytes = decode(code);
  cudaLibrary_t library = nullptr;
  cudaKernel_t kernel = nullptr;
  check_cuda(cudaLibraryLoadData(&library, bytes.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
             function.c_str());
  check_cuda(cudaLibraryGetKernel(&kernel, library, function.c_str()), function.c_str());
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)),
             function.c_str());
  loaded.emplace(key, kernel);
  return kernel;
}

// What a kernel is passed, each in eight bytes of its own.
class Arguments {
 public:
  explicit Arguments(size_t count) { slots_.reserve(count + 2); }

  void add_pointer(const Tensor& x, bool aligned) {
    const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
    STD_TORCH_CHECK(!aligned || address % 16 == 0,
                    "attn_ops: a tensor must begin at a multiple of 16 bytes, as the one that the "
                    "package was compiled with did");
    slots_.push_back(address);
  }
  void add_integer(int64_t value, bool wide) {
    STD_TORCH_CHECK(wide || (value >= std::numeric_limits<int32_t>::min() &&
                             value <= std::numeric_limits<int32_t>::max()),
                    "attn_ops: the package was compiled for sizes and strides below 2**31, got ",
                    value);
    slots_.push_back(static_cast<uint64_t>(value));  // the lower half comes first
  }
  void add_float(double value) {
    const auto narrow = static_cast<float>(value);
    uint32_t bits = 0;
    std::memcpy(&bits, &narrow, sizeof(bits));
    slots_.push_back(bits);
  }
  std::vector<void*> pointers() {
    // Triton's last parameters are two buffers that these kernels do not use.
    slots_.resize(slots_.size() + 2, 0);
    std::vector<void*> result;
    for (uint64_t& slot : slots_) result.push_back(&slot);
    return result;
  }

 private:
  std::vector<uint64_t> slots_;
};

// kinds: a letter for every parameter. r, w: the next tensor that is read or written, R and W if it
// begins at a multiple of 16 bytes; i, l: the next integer in 32 or 64 bits; f: the next float.
Arguments collect(std::string_view kinds, const std::vector<Tensor>& read,
                  const std::vector<Tensor>& written, const std::vector<int64_t>& integers,
                  const std::vector<double>& floats) {
  size_t reads = 0, writes = 0, integer = 0, number = 0;
  Arguments arguments(kinds.size());
  for (const char kind : kinds) {
    switch (kind) {
      case 'r':
      case 'R':
        arguments.add_pointer(read.at(reads++), kind == 'R');
        break;
      case 'w':
      case 'W':
        arguments.add_pointer(written.at(writes++), kind == 'W');
        break;
      case 'f':
        arguments.add_float(floats.at(number++));
        break;
      default:
        arguments.add_integer(integers.at(integer++), kind == 'l');
    }
  }
  return arguments;
}

// The op, its arguments on the stack.
void run(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Text kernel(to<StringHandle>(stack[0])), code(to<StringHandle>(stack[1]));
  const Text kinds(to<StringHandle>(stack[2]));
  const auto read = to<std::vector<Tensor>>(stack[3]);
  const auto written = to<std::vector<Tensor>>(stack[4]);
  const auto integers = to<std::vector<int64_t>>(stack[5]);
  const auto floats = to<std::vector<double>>(stack[6]);
  const auto programs = to<int64_t>(stack[7]);
  const auto threads = to<int64_t>(stack[8]), shared = to<int64_t>(stack[9]);
  STD_TORCH_CHECK(programs <= std::numeric_limits<int32_t>::max(),
                  "attn_ops: too many rows for one launch: ", programs, " programs");
  if (programs == 0) return;
  const Device device(written.at(0));
  const void* function = find_kernel(device, kernel.view(), code.view(), shared);
  Arguments arguments = collect(kinds.view(), read, written, integers, floats);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(programs));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = device.stream();
  check_cuda(cudaLaunchKernelExC(&config, function, arguments.pointers().data()),
             "attn_ops: a kernel of a package");
}

STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {
  m.def(
      "_launch(str kernel, str code, str kinds, Tensor[] read, Tensor(a!)[] written, SymInt[] "
      "integers, float[] floats, SymInt programs, int threads, int shared) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(attn, CUDA, m) {
  m.impl("_launch", &run);
}

}  // namespace
}  // namespace attn::cuda
