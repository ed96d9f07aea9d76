// Keys and values of all heads as right operands. Columns: [padded / kPanel][width][kPanel], for
// products over the width. Rows: [width / kPanel][padded][kPanel], for products over the keys.
#pragma once

namespace attn::ATTN_ISA {

// kPanel rows at a pitch.
template <class T>
struct Rows {
  const T* data;
  int64_t pitch;
};

template <class T>
struct PanelPacker {
  static constexpr int64_t kTask = 64;  // keys

  const AttentionProblem& p;
  int64_t padded;  // N up to a multiple of kPanel
  int64_t tasks;   // per head

  explicit PanelPacker(const AttentionProblem& problem)
      : p(problem), padded(round_up(p.N, kPanel<T>)), tasks((p.N + kTask - 1) / kTask) {}

  int64_t heads() const { return p.B * p.Hk; }
  int64_t rows_size(int64_t width) const { return round_up(width, kPanel<T>) * padded; }

  // body(head, n, copies) for every panel of keys, those of a task in order by one thread; copies
  // has room for kPanel rows at kRowPitch.
  template <class Body>
  void for_each_panel(const Body& body) const {
    run_tasks(heads() * tasks, [&](TaskQueue& queue) {
      Scratch<T> copies(kPanel<T> * kRowPitch);
      for (int64_t i; (i = queue.next()) >= 0;) {
        const int64_t begin = i % tasks * kTask;
        const int64_t end = std::min(begin + kTask, padded);
        for (int64_t n = begin; n < end; n += kPanel<T>) body(i / tasks, n, copies.get());
      }
    });
  }

  // Rows from row n of a head, zero after the last: where they are if they can be read there, else
  // in `copies`.
  Rows<T> read_rows(const View& v, int64_t head, int64_t n, int64_t width, T* copies) const {
    const int64_t batch = head / p.Hk;
    constexpr ScalarType dtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
    if (v.dtype == dtype && v.stride[3] == 1 && width % kPanel<T> == 0 && n + kPanel<T> <= p.N) {
      return {static_cast<const T*>(v.data) + batch * v.stride[0] + head % p.Hk * v.stride[1] +
                  n * v.stride[2],
              v.stride[2]};
    }
    for (int64_t r = 0; r < kPanel<T>; ++r) {
      T* row = copies + r * kRowPitch;
      if (n + r < p.N) {
        load_padded(row, v, batch, head % p.Hk, n + r, width);
      } else {
        std::fill(row, row + round_up(width, kPanel<T>), T(0));
      }
    }
    return {copies, kRowPitch};
  }

  void store_columns(T* columns, int64_t head, int64_t n, Rows<T> rows, int64_t width) const {
    pack_transposed(columns + (head * padded + n) * width, rows.data, rows.pitch, width);
  }

  void store_rows(T* target, int64_t head, int64_t n, Rows<T> rows, int64_t width) const {
    target += head * rows_size(width) + n * kPanel<T>;
    for (int64_t r = 0; r < kPanel<T>; ++r) {
      pack_row(target + r * kPanel<T>, rows.data + r * rows.pitch, width, padded * kPanel<T>);
    }
  }
};

}  // namespace attn::ATTN_ISA
