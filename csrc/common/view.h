// What a kernel needs to know of a tensor, read once through the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A borrowed tensor: elements are addressed as data + sum(index * stride), strides in elements.
// Broadcast dimensions (size 1) have stride 0, so that every index is legal in them.
struct View {
  void* data = nullptr;  // null: the optional tensor is absent
  ScalarType dtype = ScalarType::Undefined;
  int64_t stride[4] = {0, 0, 0, 0};

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

inline Tensor empty_like_dtype(const Tensor& like, std::initializer_list<int64_t> sizes,
                               ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace attn
