// Whole tensors through the norm, in their own dtype, for the path that calls PyTorch's attention.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

constexpr int64_t kRowsPerTask = 128;

// target [B, heads, length, D], contiguous = normalised rows of source.
template <class T>
void normalize_tensor(const Problem& p, const View& source, int64_t heads, int64_t length,
                      const View& target) {
  const int64_t tasks = (length + kRowsPerTask - 1) / kRowsPerTask;
  run_tasks(p.B * heads * tasks, [&](TaskQueue& queue) {
    Scratch<T> row(kRowPitch);
    for (int64_t i; (i = queue.next()) >= 0;) {
      const int64_t head = i / tasks;
      const int64_t end = std::min(i % tasks * kRowsPerTask + kRowsPerTask, length);
      for (int64_t n = i % tasks * kRowsPerTask; n < end; ++n) {
        load_padded(row.get(), source, head / heads, head % heads, n, p.D);
        normalize_row(row.get(), p.D, p.groups);
        store_row(target, (head * length + n) * p.D, row.get(), p.D);
      }
    }
  });
}

// target, contiguous = gradient of source, from the gradient of its normalised rows.
template <class T>
void normalize_tensor_backward(const Problem& p, const View& grad, const View& source,
                               int64_t heads, int64_t length, const View& target) {
  const int64_t tasks = (length + kRowsPerTask - 1) / kRowsPerTask;
  run_tasks(p.B * heads * tasks, [&](TaskQueue& queue) {
    Scratch<T> rows(2 * kRowPitch);
    T* plain = rows.get() + kRowPitch;
    for (int64_t i; (i = queue.next()) >= 0;) {
      const int64_t head = i / tasks;
      const int64_t end = std::min(i % tasks * kRowsPerTask + kRowsPerTask, length);
      for (int64_t n = i % tasks * kRowsPerTask; n < end; ++n) {
        load_padded(rows.get(), grad, head / heads, head % heads, n, p.D);
        load_padded(plain, source, head / heads, head % heads, n, p.D);
        normalize_row_backward(rows.get(), plain, p.D, p.groups);
        store_row(target, (head * length + n) * p.D, rows.get(), p.D);
      }
    }
  });
}

}  // namespace attn::cosine_sim::ATTN_ISA
