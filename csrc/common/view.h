// What a kernel needs to know of a tensor, read once through the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

namespace attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMostDimensions = 4;

// A borrowed tensor: elements are addressed as data + sum(index * stride), strides in elements.
// Broadcast dimensions (size 1) have stride 0, so that every index is legal in them.
struct View {
  void* data = nullptr;  // null: the optional tensor is absent
  ScalarType dtype = ScalarType::Undefined;
  int64_t stride[kMostDimensions] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
};

inline View view(const Tensor& tensor) {
  // An empty tensor may have no storage, and is still present.
  static char nothing;
  View result;
  void* data = tensor.data_ptr();
  result.data = data == nullptr ? &nothing : data;
  result.dtype = tensor.scalar_type();
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    result.stride[dim] = sizes[dim] == 1 ? 0 : strides[dim];
  }
  return result;
}

inline View view(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? view(*tensor) : View{};
}

// A new contiguous tensor on the device of `like`, in its dtype unless another one is given.
// torch::stable::new_empty looks its op up by name in every call, which costs more than the memory;
// on the CPU this is not even an op.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType chosen = dtype.value_or(like.scalar_type());
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(chosen));
  int64_t strides[kMostDimensions], elements = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = elements;
    elements *= std::max<int64_t>(sizes[dim], 1);
  }
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides, code, device,
                                                         like.get_device_index(), &result));
  return Tensor(result);
}

}  // namespace attn
