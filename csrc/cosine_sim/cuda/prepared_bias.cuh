// relative_bias, made ready for the kernels that read it.
#pragma once

#include <vector>

#include "common/checks.h"
#include "cosine_sim/cuda/host.cuh"
#include "cosine_sim/cuda/relative_bias.cuh"

namespace attn::cuda::cosine {

struct PrepareBias {
  const float* bias;  // [H, M + N - 1]
  int64_t head, entry;
  Band band;  // which keys a query sees
  float *bits, *greatest, *shift;
  int columns, origin, padded;
  int row_blocks;  // the first of the grid find what is greatest, the others write bits
};

// The greatest of bias[begin .. end).
ATTN_DEVICE float greatest_of(const PrepareBias& p, const float* bias, int begin, int end, int step,
                              float greatest) {
  for (int i = begin; i < end; i += step) greatest = fmaxf(greatest, bias[i * p.entry]);
  return greatest;
}

// A block has 256 neighbours of a head: what all of these queries see is read once.
__global__ void __launch_bounds__(256) prepare_bias_kernel(const __grid_constant__ PrepareBias p) {
  const float* bias = p.bias + blockIdx.y * p.head;
  const int queries = p.band.rows, span = queries + p.band.columns - 1, thread = threadIdx.x;
  if (static_cast<int>(blockIdx.x) >= p.row_blocks) {
    const int i = (blockIdx.x - p.row_blocks) * 256 + thread;
    const int entry = i - p.origin + queries - 1;
    if (i >= p.columns) return;
    const bool inside = entry >= 0 && entry < span;
    p.bits[int64_t{blockIdx.y} * p.columns + i] = inside ? in_bits(bias[entry * p.entry]) : 0.0f;
    return;
  }
  // Entries that a query sees, which from query to query do not increase.
  const auto seen = [&](int query) {
    const int n = p.band.columns, before = queries - 1 - query;
    return Interval{within(query + p.band.first, 0, n) + before,
                    within(query + p.band.past, 0, n) + before};
  };
  const int first = blockIdx.x * 256, query = first + thread;
  const int last = first + 255 < queries ? first + 255 : queries - 1;
  const int begin = seen(first < last ? first : last).first, past = seen(last).past,
            end = past > begin ? past : begin;
  float* warps = shared_memory<float>();
  float of_all = greatest_of(p, bias, begin + thread, end, 256, -INFINITY);
  ATTN_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) of_all = fmaxf(of_all, shuffle_xor(of_all, mask));
  if (thread % 32 == 0) warps[thread / 32] = of_all;
  __syncthreads();
  ATTN_UNROLL
  for (int i = 0; i < 8; ++i) of_all = fmaxf(of_all, warps[i]);
  const int64_t at = int64_t{blockIdx.y} * p.padded + query;
  if (query >= p.padded) return;
  float greatest = -INFINITY;
  if (query < queries) {
    const Interval own = seen(query);
    const int before = own.past < begin ? own.past : begin;
    if (own.past > own.first) {
      greatest = greatest_of(p, bias, own.first, before, 1, of_all);
      greatest = greatest_of(p, bias, own.first > end ? own.first : end, own.past, 1, greatest);
    }
  }
  p.greatest[at] = greatest;
  p.shift[at] = greatest == -INFINITY ? 0.0f : in_bits(greatest);
}

// relative_bias of a call, with what the device found of it: entries in bits, and for `reach` the
// greatest of each query.
class PreparedBias {
 public:
  PreparedBias(const char* op, const Tensor& query, const Tensor& key, const OptionalTensor& bias,
               const Reach* reach, const OptionalTensor& grad) {
    if (!bias) return;
    const int64_t H = query.size(1), M = query.size(2), N = key.size(2), span = M + N - 1;
    check_dtype(op, "relative_bias", *bias, ScalarType::Float);
    check_shape(op, "relative_bias", *bias, {H, span});
    bias_.span = static_cast<int>(span), bias_.queries = static_cast<int>(M);
    if (grad) {
      check_dtype(op, "grad_relative_bias", *grad, ScalarType::Float);
      check_shape(op, "grad_relative_bias", *grad, {H, span});
      STD_TORCH_CHECK(grad->is_contiguous(), op, ": grad_relative_bias must be contiguous");
      bias_.grad = static_cast<float*>(grad->data_ptr());
    }
    if (M == 0) return;
    // Tiles of the backward, and of the forward without a window, begin at multiples of 16 bytes.
    const int64_t origin = RelativeBias::kBefore + (-M & 3) + M - 1;
    const int64_t columns = (origin + N + RelativeBias::kBehind + 3) / 4 * 4;
    bias_.origin = static_cast<int>(origin), bias_.columns = static_cast<int>(columns);
    bias_.padded = static_cast<int>((M + 191) / 192 * 192);
    const Device device(query);
    PrepareBias p{static_cast<const float*>(bias->data_ptr()), bias->stride(0), bias->stride(1)};
    p.columns = bias_.columns, p.origin = bias_.origin, p.padded = bias_.padded;
    p.band = (reach ? *reach : Reach{0, 0}).keys_seen(M, N, 1);
    bias_.bits = p.bits = list(query, H * columns);
    if (reach) {
      p.row_blocks = (p.padded + 255) / 256;
      bias_.greatest = p.greatest = list(query, H * p.padded);
      bias_.shift = p.shift = list(query, H * p.padded);
    }
    const int blocks = p.row_blocks + (p.columns + 255) / 256;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(H));
    launch<&prepare_bias_kernel>(device, "cosine_sim: relative bias", grid, 256, 32, p);
  }

  // That of the heads of a part, with `group` heads to a key/value head.
  RelativeBias of(const Part& part, int64_t group) const {
    RelativeBias x = bias_;
    if (x.bits == nullptr) return x;
    const int64_t head = part.head * group;
    x.bits += head * x.columns;
    if (x.greatest) x.greatest += head * x.padded, x.shift += head * x.padded;
    if (x.grad) x.grad += head * x.span;
    return x;
  }

 private:
  float* list(const Tensor& like, int64_t size) {
    held_.push_back(allocate(like, {size}, ScalarType::Float));
    return static_cast<float*>(held_.back().data_ptr());
  }

  RelativeBias bias_{};
  std::vector<Tensor> held_;
};

}  // namespace attn::cuda::cosine
