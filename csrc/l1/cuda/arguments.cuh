// The host's side of the L1 kernels: tensors in, a checked Problem out.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>

#include "common/checks.h"

#include "common/cuda/launch.cuh"
#include "common/visibility.h"
#include "l1/cuda/prepass.cuh"

namespace attn::cuda::l1 {

using torch::stable::new_empty;

constexpr const char* kOp = "l1";

// The arguments that the forward and the backward share.
struct Arguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const OptionalTensor& mask;
  const OptionalTensor& bias;
  const OptionalTensor& relative_bias;
  const OptionalTensor& sink;
  const OptionalTensor& start;
  const OptionalTensor& stop;
  int64_t left, right;
  double scale;
  std::optional<double> eps;
};

inline Array array(const Tensor& tensor) {
  const View v = view(tensor);
  return {v.data, {v.stride[0], v.stride[1], v.stride[2], v.stride[3]}};
}
inline Array array(const OptionalTensor& tensor) {
  return tensor.has_value() ? array(*tensor) : Array{};
}

// Elements 2i and 2i + 1 of every row can be loaded as one word.
inline bool in_pairs(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return false;
  bool even = tensor.size(3) % 2 == 0 && tensor.stride(3) == 1;
  for (int dim = 0; dim < 3; ++dim) even = even && tensor.stride(dim) % 2 == 0;
  return even && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % sizeof(uint32_t) == 0;
}

inline void check_device(const Tensor& query, const char* name, const OptionalTensor& tensor) {
  STD_TORCH_CHECK(!tensor.has_value() || tensor->device() == query.device(), kOp, ": ", name,
                  " must be on the device of query");
}

inline void check_options(const Arguments& a) {
  const ScalarType dtype = a.query.scalar_type();
  const int64_t B = a.query.size(0), H = a.query.size(1), M = a.query.size(2), N = a.key.size(2);
  if (a.mask.has_value()) {
    check_dtype(kOp, "mask", *a.mask, ScalarType::Bool);
    check_shape(kOp, "mask", *a.mask, {B, H, M, N}, /*or_one=*/true);
  }
  if (a.bias.has_value()) {
    if (a.bias->scalar_type() != dtype) check_dtype(kOp, "bias", *a.bias, compute_dtype(dtype));
    check_shape(kOp, "bias", *a.bias, {B, H, M, N}, /*or_one=*/true);
  }
  if (M + N > 0) check_parameter(kOp, "relative_bias", a.relative_bias, dtype, {H, M + N - 1});
  check_parameter(kOp, "sink", a.sink, dtype, {H});
  for (const auto& [name, tensor] :
       {std::pair("mask", &a.mask), std::pair("bias", &a.bias), std::pair("sink", &a.sink),
        std::pair("relative_bias", &a.relative_bias), std::pair("start", &a.start),
        std::pair("stop", &a.stop)}) {
    check_device(a.query, name, *tensor);
  }
  STD_TORCH_CHECK(a.start.has_value() == a.stop.has_value(),
                  "l1: start and stop must be given together");
  if (!a.start.has_value()) return;
  for (const auto& [name, tensor] : {std::pair("start", &*a.start), std::pair("stop", &*a.stop)}) {
    check_dtype(kOp, name, *tensor, ScalarType::Int);
    check_shape(kOp, name, *tensor, {tensor->dim() == 2 && tensor->size(0) == 1 ? 1 : B, M});
  }
}

// What distances need: query, key, scale and eps. Positions are 32-bit, offsets 64-bit.
inline Problem make_problem(const Tensor& query, const Tensor& key, double scale,
                            std::optional<double> eps) {
  constexpr int64_t kLongest = int64_t{1} << 30;
  STD_TORCH_CHECK(query.scalar_type() != ScalarType::Double,
                  "l1: float64 has no CUDA kernel; the formula serves it");
  STD_TORCH_CHECK(query.size(2) <= kLongest && key.size(2) <= kLongest &&
                      query.size(0) * query.size(1) <= kLongest,
                  "l1: lengths and batch times heads must be at most 2**30 on CUDA");
  check_device(query, "key", key);
  Problem p{};
  p.B = static_cast<int>(query.size(0));
  p.H = static_cast<int>(query.size(1));
  p.Hk = static_cast<int>(key.size(1));
  p.M = static_cast<int>(query.size(2));
  p.N = static_cast<int>(key.size(2));
  p.D = static_cast<int>(query.size(3));
  p.inverse = eps.has_value();
  p.scale = static_cast<float>(scale);
  p.eps = static_cast<float>(eps.value_or(0.0));
  p.query = array(query);
  p.key = array(key);
  p.query_in_pairs = in_pairs(query);
  p.key_in_pairs = in_pairs(key);
  return p;
}

inline Problem make_problem(const Arguments& a) {
  check_query_key_value(kOp, a.query, a.key, a.value);
  check_options(a);
  check_device(a.query, "value", a.value);
  Problem p = make_problem(a.query, a.key, a.scale, a.eps);
  p.E = static_cast<int>(a.value.size(3));
  p.left = Visibility::clamp_band(a.left);
  p.right = Visibility::clamp_band(a.right);
  p.start = array(a.start);
  p.stop = array(a.stop);
  p.value = array(a.value);
  p.value_in_pairs = in_pairs(a.value);
  p.mask = array(a.mask);
  p.bias = array(a.bias);
  p.bias_is_float = a.bias.has_value() && a.bias->scalar_type() == ScalarType::Float;
  p.relative_bias = array(a.relative_bias);
  p.sink = array(a.sink);
  return p;
}

// Calls f with a value of the element type of `dtype`.
template <class F>
void with_type(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) return f(float{});
  if (dtype == ScalarType::Half) return f(Half{});
  f(BFloat{});
}

// Launches the pass over queries and keys that 16-bit distances and a grid (range.cuh) need. The
// result must live until the last kernel is launched.
inline Tensor launch_largest(const Device& device, const Tensor& query, Problem& p) {
  const int64_t rows = int64_t{p.H / p.Hk} * p.M + p.N;
  p.largest_parts = static_cast<int>(std::min<int64_t>(kLargestParts, rows / 64 + 1));
  Tensor largest = new_empty(query, {int64_t{p.B} * p.Hk * p.largest_parts}, ScalarType::Float);
  p.largest = static_cast<float*>(largest.data_ptr());
  const dim3 grid(static_cast<unsigned>(largest.numel()));
  with_type(query.scalar_type(), [&](auto zero) {
    launch(device, "l1: largest", &largest_kernel<decltype(zero)>, grid, kPrepassThreads,
           kPrepassThreads / 32 * sizeof(float), p);
  });
  return largest;
}

// The same for kernels that hold float32 as it is.
inline OptionalTensor find_largest(const Device& device, const Tensor& query, Problem& p) {
  if (query.scalar_type() == ScalarType::Float) return std::nullopt;
  return launch_largest(device, query, p);
}

}  // namespace attn::cuda::l1
