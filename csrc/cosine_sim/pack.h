// Normalised rows, and keys and values packed into the panels that the register tiles read.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

using namespace attn::ATTN_ISA;

constexpr double kLog2E = 1.4426950408889634;
constexpr double kSmallestNorm = 1e-12;

// 1 / max(|x|, 1e-12) of one slice; 0 for a zero slice, so that it normalises to zero.
template <class T>
ATTN_INLINE T inverse_norm(T squared_norm) {
  const T norm = std::sqrt(squared_norm);
  const T inverse = 1 / (norm > T(kSmallestNorm) ? norm : T(kSmallestNorm));
  return squared_norm == 0 ? T(0) : inverse;
}

template <class T>
void normalize_row(T* row, int64_t width, int64_t groups) {
  if (groups == 0) return;
  const int64_t slice = width / groups;
  for (int64_t g = 0; g < groups; ++g, row += slice) {
    const T inverse = inverse_norm(dot(row, row, slice));
    for (int64_t d = 0; d < slice; ++d) row[d] *= inverse;
  }
}

// grad: gradient of the normalised row in, of the row itself out.
template <class T>
void normalize_row_backward(T* grad, const T* row, int64_t width, int64_t groups) {
  if (groups == 0) return;
  const int64_t slice = width / groups;
  for (int64_t g = 0; g < groups; ++g, row += slice, grad += slice) {
    const T squared_norm = dot(row, row, slice);
    const T inverse = inverse_norm(squared_norm);
    // Below the smallest norm the divisor is a constant: no projection.
    const bool clamped = !(std::sqrt(squared_norm) > T(kSmallestNorm));
    const T along = clamped ? T(0) : dot(row, grad, slice) * inverse * inverse;
    for (int64_t d = 0; d < slice; ++d) grad[d] = inverse * (grad[d] - row[d] * along);
  }
}

template <class T>
struct Parameters {
  std::vector<T> query_gain, key_gain;  // [H,D], [Hk,D], empty when absent
  std::vector<T> scale;                 // [H]: scale * head_scale
  std::vector<T> sink;                  // [H]: -inf when absent
  std::vector<T> relative_bias;         // [H,M+N-1], empty when absent

  explicit Parameters(const Problem& p)
      : scale(read_parameter<T>(p.head_scale, p.H, 1, 1)),
        sink(read_parameter<T>(p.sink, p.H, 1, -std::numeric_limits<T>::infinity())) {
    if (p.query_gain) query_gain = read_parameter<T>(p.query_gain, p.H, p.D, 1);
    if (p.key_gain) key_gain = read_parameter<T>(p.key_gain, p.Hk, p.D, 1);
    if (p.relative_bias && p.M + p.N > 0) {
      relative_bias = read_parameter<T>(p.relative_bias, p.H, p.M + p.N - 1, 0);
    }
    for (T& s : scale) s *= static_cast<T>(p.scale);
  }
};

// Normalised (times gain, if any) row of query or key.
template <class T>
ATTN_INLINE void load_normalized(T* target, const View& v, int64_t batch, int64_t head,
                                 int64_t position, const Problem& p, const std::vector<T>& gain) {
  load_padded(target, v, batch, head, position, p.D);
  normalize_row(target, p.D, p.groups);
  if (gain.empty()) return;
  const T* head_gain = gain.data() + head * p.D;
  for (int64_t d = 0; d < p.D; ++d) target[d] *= head_gain[d];
}

// squares += |column|^2 of count rows of a panel.
template <class T>
ATTN_INLINE void add_squares(Vec<T> (&squares)[kTileVectors], const T* rows, int64_t count) {
  for (int64_t d = 0; d < count; ++d) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const Vec<T> x = load(rows + d * kPanel<T> + v * Simd<T>::lanes);
      squares[v] += x * x;
    }
  }
}

// Normalises the columns of a panel [D][kPanel], times gain [D] if any. Returns the largest
// |column|^2.
template <class T>
T normalize_columns(T* panel, const Problem& p, const T* gain) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t slice = p.groups == 0 ? p.D : p.D / p.groups;
  for (int64_t begin = 0; begin < p.D && p.groups > 0; begin += slice) {
    Vec<T> factor[kTileVectors] = {};
    add_squares<T>(factor, panel + begin * kPanel<T>, slice);
    for (int v = 0; v < kTileVectors; ++v) {
      for (int i = 0; i < lanes; ++i) factor[v][i] = inverse_norm<T>(factor[v][i]);
    }
    for (int64_t d = begin; d < begin + slice; ++d) {
      const Vec<T> scale = splat<T>(gain == nullptr ? T(1) : gain[d]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        T* at = panel + d * kPanel<T> + v * lanes;
        store<T>(at, load(at) * factor[v] * scale);
      }
    }
  }
  Vec<T> squares[kTileVectors] = {};
  add_squares<T>(squares, panel, p.D);
  Vec<T> largest = squares[0];
  for (int v = 1; v < kTileVectors; ++v) largest = maximum<T>(squares[v], largest);
  return horizontal_max<T>(largest);
}

// Keys and values of all heads. Columns: [padded / kPanel][width][kPanel], right operands of
// products over the width. Rows: [width / kPanel][padded][kPanel], of products over the keys.
template <class T>
struct PackedKeys {
  static constexpr int64_t kTask = 64;  // keys

  const Problem& p;
  const Parameters<T>& parameters;
  int64_t padded;            // N up to a multiple of kPanel
  int64_t tasks;             // per head
  Scratch<T> key_columns;    // forward and backward
  Scratch<T> key_rows;       // backward
  Scratch<T> value_columns;  // backward
  Scratch<T> value_rows;     // forward
  Scratch<T> squared_norms;  // forward: [B*Hk, tasks], the largest |k|^2

  PackedKeys(const Problem& problem, const Parameters<T>& parameters, bool backward)
      : p(problem),
        parameters(parameters),
        padded(round_up(p.N, kPanel<T>)),
        tasks((p.N + kTask - 1) / kTask),
        key_columns(heads() * padded * p.D),
        key_rows(backward ? heads() * rows_size(p.D) : 0),
        value_columns(backward ? heads() * padded * p.E : 0),
        value_rows(backward ? 0 : heads() * rows_size(p.E)),
        squared_norms(heads() * tasks) {
    run_tasks(heads() * tasks, [&](TaskQueue& queue) {
      Scratch<T> copies(kPanel<T> * kRowPitch);
      for (int64_t i; (i = queue.next()) >= 0;) {
        const int64_t begin = i % tasks * kTask;
        const int64_t end = std::min(begin + kTask, padded);
        squared_norms.get()[i] = 0;
        for (int64_t n = begin; n < end; n += kPanel<T>) {
          if (backward) {
            pack_for_backward(i / tasks, n, copies.get());
          } else {
            T& largest = squared_norms.get()[i];
            largest = std::max(largest, pack_for_forward(i / tasks, n, copies.get()));
          }
        }
      }
    });
  }

  int64_t heads() const { return p.B * p.Hk; }
  int64_t rows_size(int64_t width) const { return round_up(width, kPanel<T>) * padded; }

  T largest_norm(int64_t head) const {
    const T* squares = squared_norms.get() + head * tasks;
    return tasks == 0 ? T(0) : std::sqrt(*std::max_element(squares, squares + tasks));
  }

 private:
  struct Rows {
    const T* data;
    int64_t pitch;
  };

  // kPanel rows from row n of a head, zero after the last: where they are if they can be read
  // there, else in `copies`.
  Rows read_rows(const View& v, int64_t head, int64_t n, int64_t width, T* copies) const {
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

  void store_rows(T* target, Rows rows, int64_t width) const {
    for (int64_t r = 0; r < kPanel<T>; ++r) {
      pack_row(target + r * kPanel<T>, rows.data + r * rows.pitch, width, padded * kPanel<T>);
    }
  }

  // Returns the largest |k|^2.
  T pack_for_forward(int64_t head, int64_t n, T* copies) const {
    T* columns = key_columns.get() + (head * padded + n) * p.D;
    const Rows keys = read_rows(p.key, head, n, p.D, copies);
    pack_transposed(columns, keys.data, keys.pitch, p.D);
    const std::vector<T>& gains = parameters.key_gain;
    const T* gain = gains.empty() ? nullptr : gains.data() + head % p.Hk * p.D;
    const T largest = normalize_columns(columns, p, gain);
    store_rows(value_rows.get() + head * rows_size(p.E) + n * kPanel<T>,
               read_rows(p.value, head, n, p.E, copies), p.E);
    return largest;
  }

  void pack_for_backward(int64_t head, int64_t n, T* copies) const {
    const Rows values = read_rows(p.value, head, n, p.E, copies);
    pack_transposed(value_columns.get() + (head * padded + n) * p.E, values.data, values.pitch,
                    p.E);
    for (int64_t r = 0; r < kPanel<T>; ++r) {
      T* row = copies + r * kRowPitch;
      if (n + r < p.N) {
        load_normalized(row, p.key, head / p.Hk, head % p.Hk, n + r, p, parameters.key_gain);
      } else {
        std::fill(row, row + round_up(p.D, kPanel<T>), T(0));
      }
    }
    const Rows keys{copies, kRowPitch};
    store_rows(key_rows.get() + head * rows_size(p.D) + n * kPanel<T>, keys, p.D);
    pack_transposed(key_columns.get() + (head * padded + n) * p.D, copies, kRowPitch, p.D);
  }
};

}  // namespace attn::cosine_sim::ATTN_ISA
