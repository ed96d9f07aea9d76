// The host's side of what rows see.
#pragma once

#include <vector>

#include "common/checks.h"
#include "cosine_sim/cuda/host.cuh"
#include "cosine_sim/cuda/intervals.cuh"

namespace attn::cuda::cosine {

// What the ops read: a mask of keys [1 or B, N], intervals [1 or B, M], a band.
struct Given {
  const OptionalTensor &mask, &start, &stop;
  int64_t left, right;
};

// How a call's queries and keys see each other, with what was found of it on the device.
class Seen {
 public:
  Seen(const char* op, const Tensor& query, const Tensor& key, const Given& given)
      : M_(query.size(2)), N_(key.size(2)), reach_{given.left, given.right} {
    const int64_t B = query.size(0);
    check_pair(op, given, B);
    if (!given.mask && !given.start) return;
    const Device device(query);
    KeysSeen p{};
    p.band = reach_.keys_seen(M_, N_, 1);
    if (given.start) {
      batches_ = given.start->size(0);
      p.band.start = static_cast<const int*>(given.start->data_ptr());
      p.band.stop = static_cast<const int*>(given.stop->data_ptr());
      p.band.batch = batches_ == 1 ? 0 : p.band.rows;
    }
    if (given.mask) {
      const int64_t masks = given.mask->size(0);
      batches_ = std::max(batches_, masks);
      p.before = visible_first(device, query, *given.mask);
      p.before_batch = masks == 1 ? 0 : static_cast<int>(N_ + 1);
    }
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
  void check_pair(const char* op, const Given& given, int64_t B) const {
    STD_TORCH_CHECK(given.start.has_value() == given.stop.has_value(), op,
                    ": start and stop must be given together");
    if (given.mask) check_list(op, "mask", *given.mask, ScalarType::Bool, B, N_);
    if (!given.start) return;
    check_list(op, "start", *given.start, ScalarType::Int, B, M_);
    check_list(op, "stop", *given.stop, ScalarType::Int, given.start->size(0), M_);
  }
  static void check_list(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                         int64_t B, int64_t length) {
    check_dtype(op, name, x, dtype);
    check_shape(op, name, x, {x.size(0) == 1 ? 1 : B, length});
    STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
  }

  dim3 grid(int64_t rows) const {
    return dim3(static_cast<unsigned>((rows + 255) / 256), static_cast<unsigned>(batches_));
  }
  int* list(const Tensor& like, int64_t size) {
    held_.push_back(allocate(like, {size}, ScalarType::Int));
    return static_cast<int*>(held_.back().data_ptr());
  }
  // Sets the order.
  const int* visible_first(const Device& device, const Tensor& like, const Tensor& mask) {
    const int64_t masks = mask.size(0);
    VisibleFirst p{static_cast<const bool*>(mask.data_ptr()), static_cast<int>(N_)};
    p.order = list(like, masks * N_), p.before = list(like, masks * (N_ + 1));
    launch<&visible_first_kernel>(device, "cosine_sim: visible keys first",
                                  dim3(static_cast<unsigned>(masks)), kScanThreads, kScanBytes, p);
    order_ = {p.order, masks == 1 ? 0 : p.N};
    return p.before;
  }

  int64_t M_, N_, batches_ = 1;
  Reach reach_;
  Order order_{};
  std::vector<Tensor> held_;
};

}  // namespace attn::cuda::cosine
