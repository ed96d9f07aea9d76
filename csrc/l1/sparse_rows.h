// Rows that edges lead to, and what is added up over the edges of a row.
#pragma once

namespace attn::l1::sparse::ATTN_ISA {

using namespace attn::ATTN_ISA;
using namespace attn::l1::ATTN_ISA;

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kAhead = 6;  // edges whose rows are on their way while one is computed

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// The rows of one head of a tensor [B, heads, length, width].
template <class T>
class Rows {
 public:
  Rows(const View& v, int64_t batch, int64_t head, int64_t width) : view_(v), width_(width) {
    offset_ = batch * v.stride[0] + head * v.stride[1];
    const bool dense = v.stride[3] == 1 || width == 1;
    if (v && dense && element_size(v.dtype) == sizeof(T)) {
      direct_ = static_cast<const T*>(v.data) + offset_;
    }
    if (v && dense) {
      const int64_t size = element_size(v.dtype);
      bytes_ = static_cast<const char*>(v.data) + offset_ * size;
      pitch_ = v.stride[2] * size;
      row_bytes_ = width * size;
    }
  }

  // Where row n is, or its conversion in `room`.
  ATTN_INLINE const T* at(int64_t n, T* room) const {
    if (direct_ != nullptr) return direct_ + n * view_.stride[2];
    load_row(room, view_, offset_ + n * view_.stride[2], view_.stride[3], width_);
    return room;
  }

  ATTN_INLINE void prefetch(int64_t n) const {
    const char* row = bytes_ + n * pitch_;
    for (int64_t i = 0; i < row_bytes_; i += 64) __builtin_prefetch(row + i);
  }

  explicit operator bool() const { return static_cast<bool>(view_); }

 private:
  View view_;
  int64_t width_;
  int64_t offset_ = 0;
  const T* direct_ = nullptr;
  const char* bytes_ = nullptr;
  int64_t pitch_ = 0, row_bytes_ = 0;
};

// sum += factor * x
template <class T>
ATTN_INLINE void add_scaled(T* sum, T factor, const T* x, int64_t count) {
  constexpr int lanes = Simd<T>::lanes;
  const Vec<T> factors = splat<T>(factor);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store<T>(sum + i, load(sum + i) + factors * load(x + i));
  for (; i < count; ++i) sum[i] += factor * x[i];
}

// sum += factor * sign(a - b)
template <class T>
ATTN_INLINE void add_signs(T* sum, T factor, const T* a, const T* b, int64_t count) {
  constexpr int lanes = Simd<T>::lanes;
  const Vec<T> factors = splat<T>(factor);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vec<T> sign = sign_of<T>(load(a + i) - load(b + i));
    store<T>(sum + i, load(sum + i) + factors * sign);
  }
  for (; i < count; ++i) {
    const T difference = a[i] - b[i];
    sum[i] += difference > 0 ? factor : difference < 0 ? -factor : T(0);
  }
}

// The sum of a row's terms. Long rows are added up in parts, so that roundings of a large sum are
// few. `part` has room for the current part, at most kMaxWidth numbers, and as many for the sum.
template <class T>
class RowSum {
 public:
  RowSum(T* part, int64_t width) : part_(part), sum_(part + kRowPitch), width_(width) {
    std::fill(part_, part_ + width, T(0));
    std::fill(sum_, sum_ + width, T(0));
  }

  ATTN_INLINE void add_scaled(T factor, const T* x) {
    attn::l1::sparse::ATTN_ISA::add_scaled(part_, factor, x, width_);
    if (++terms_ % kTerms == 0) flush();
  }

  ATTN_INLINE void add_signs(T factor, const T* a, const T* b) {
    attn::l1::sparse::ATTN_ISA::add_signs(part_, factor, a, b, width_);
    if (++terms_ % kTerms == 0) flush();
  }

  // Factor times the sum, to row `row` of a contiguous tensor.
  void store(const View& target, int64_t row, T factor) {
    flush();
    for (int64_t i = 0; i < width_; ++i) sum_[i] *= factor;
    store_row(target, row * width_, sum_, width_);
  }

 private:
  static constexpr int64_t kTerms = 64;

  void flush() {
    for (int64_t i = 0; i < width_; ++i) sum_[i] += part_[i];
    std::fill(part_, part_ + width_, T(0));
  }

  T *part_, *sum_;
  int64_t width_, terms_ = 0;
};

// The part of a [B, H, L] tensor that belongs to one head.
template <class T>
ATTN_INLINE T* per_edge(const View& v, int64_t matrix, int64_t num_edges) {
  return static_cast<T*>(v.data) + matrix * num_edges;
}

// worker.run(matrix, row) for all rows of all matrices; every thread makes a worker of its own.
template <class Make>
void run_rows(int64_t matrices, int64_t rows, const Make& make) {
  const int64_t blocks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  run_tasks(matrices * blocks, [&](TaskQueue& queue) {
    auto worker = make();
    for (int64_t i; (i = queue.next()) >= 0;) {
      const int64_t end = std::min(i % blocks * kRowsPerTask + kRowsPerTask, rows);
      for (int64_t row = i % blocks * kRowsPerTask; row < end; ++row) worker.run(i / blocks, row);
    }
  });
}

}  // namespace attn::l1::sparse::ATTN_ISA
