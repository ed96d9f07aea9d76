// The host's side of the copy engine: maps of tensors, encoded by the driver.
#pragma once

#include "common/cuda/hopper.cuh"
#include "common/cuda/launch.cuh"
#include "common/view.h"

namespace attn::cuda {

#ifdef ATTN_EMULATE

inline TensorMap encode_map(const Tensor& x, const uint64_t (&sizes)[4],
                            const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
  TensorMap map{};
  map.base = static_cast<const unsigned char*>(x.data_ptr());
  map.element = 2;
  for (int i = 0; i < 4; ++i) {
    map.size[i] = static_cast<int64_t>(sizes[i]);
    map.stride[i] = i == 0 ? 2 : static_cast<int64_t>(strides[i - 1]);
    map.box[i] = static_cast<int>(box[i]);
  }
  return map;
}

#else

// The library does not link to the driver: a machine without a GPU has none.
inline decltype(&cuTensorMapEncodeTiled) find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                              cudaEnableDefault, &result),
             "cuTensorMapEncodeTiled");
  STD_TORCH_CHECK(found != nullptr, "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

inline TensorMap encode_map(const Tensor& x, const uint64_t (&sizes)[4],
                            const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
  static const auto encode = find_encode();
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t));
  constexpr cuuint32_t kSteps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type = x.scalar_type() == ScalarType::Half
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  TensorMap map;
  const CUresult result =
      encode(&map, type, 4, x.data_ptr(), reinterpret_cast<const cuuint64_t*>(sizes),
             reinterpret_cast<const cuuint64_t*>(strides), box, kSteps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS,
                  "the driver refused a tensor map: ", static_cast<int>(result));
  return map;
}

#endif

// x [B, H, L, D] of 16 bits as load_panel reads it: 64 columns of `rows` rows of a head, zeros for
// columns and rows past the end. Rows are neighbours at multiples of 16 bytes.
inline TensorMap map_of(const Tensor& x, int rows) {
  const auto size = [&](int dim) { return static_cast<uint64_t>(x.size(dim)); };
  // The stride of one element means nothing, and need not be one that the driver takes.
  const auto bytes = [&](int dim) {
    return x.size(dim) == 1 ? uint64_t{128} : static_cast<uint64_t>(2 * x.stride(dim));
  };
  return encode_map(x, {size(3), size(2), size(1), size(0)}, {bytes(2), bytes(1), bytes(0)},
                    {64, static_cast<uint32_t>(rows), 1, 1});
}

}  // namespace attn::cuda
