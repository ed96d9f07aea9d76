// The host's side of what rows see.
#pragma once

#include <vector>

#include "common/checks.h"
#include "cosine_sim/cuda/host.cuh"
#include "cosine_sim/cuda/intervals.cuh"

namespace attn::cuda::cosine {

// How a call's queries and keys see each other, with what was found of it on the device.
class Seen {
 public:
  // A mask of keys is [1 or B, N].
  Seen(const char* op, const Tensor& query, const Tensor& key, const OptionalTensor& mask,
       int64_t left, int64_t right)
      : M_(query.size(2)), N_(key.size(2)), reach_{left, right} {
    if (!mask) return;
    batches_ = mask->size(0);
    check_dtype(op, "mask", *mask, ScalarType::Bool);
    check_shape(op, "mask", *mask, {batches_ == 1 ? 1 : query.size(0), N_});
    STD_TORCH_CHECK(mask->is_contiguous(), op, ": mask must be contiguous");
    const Device device(query);
    KeysSeen p{reach_.keys_seen(M_, N_, 1)};
    p.before = visible_first(device, query, *mask);
    p.start = list(query, batches_ * M_), p.stop = list(query, batches_ * M_);
    launch<&keys_seen_kernel>(device, "cosine_sim: keys seen", grid(M_), 256, 0, p);
    reach_.start = p.start, reach_.stop = p.stop;
    reach_.batch = batches_ == 1 ? 0 : M_;
  }

  const Reach& keys_seen() const { return reach_; }
  const Order& order() const { return order_; }

  // The same, where rows are keys in their order.
  Reach queries_seeing(const Tensor& query) {
    if (reach_.start == nullptr) return reach_;
    const Device device(query);
    QueriesSeeing p{reach_.start, reach_.stop, static_cast<int>(M_), static_cast<int>(N_)};
    p.first = list(query, batches_ * N_), p.past = list(query, batches_ * N_);
    launch<&queries_seeing_kernel>(device, "cosine_sim: queries seeing", grid(N_), 256, 0, p);
    Reach reach = reach_;
    reach.start = p.first, reach.stop = p.past, reach.batch = batches_ == 1 ? 0 : N_;
    return reach;
  }

 private:
  dim3 grid(int64_t rows) const {
    return dim3(static_cast<unsigned>((rows + 255) / 256), static_cast<unsigned>(batches_));
  }
  int* list(const Tensor& like, int64_t size) {
    held_.push_back(allocate(like, {size}, ScalarType::Int));
    return static_cast<int*>(held_.back().data_ptr());
  }
  // Sets the order.
  const int* visible_first(const Device& device, const Tensor& like, const Tensor& mask) {
    VisibleFirst p{static_cast<const bool*>(mask.data_ptr()), static_cast<int>(N_)};
    p.order = list(like, batches_ * N_), p.before = list(like, batches_ * (N_ + 1));
    launch<&visible_first_kernel>(device, "cosine_sim: visible keys first",
                                  dim3(static_cast<unsigned>(batches_)), kScanThreads, kScanBytes,
                                  p);
    order_ = {p.order, batches_ == 1 ? 0 : p.N};
    return p.before;
  }

  int64_t M_, N_, batches_ = 1;
  Reach reach_;
  Order order_{};
  std::vector<Tensor> held_;
};

}  // namespace attn::cuda::cosine
