// Normalised rows, and keys and values packed into the panels that the register tiles read.
#pragma once

namespace attn::cosine_sim::ATTN_ISA {

using namespace attn::ATTN_ISA;

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
struct Parameters : ScoreParameters<T> {
  std::vector<T> query_gain, key_gain;  // [H,D], [Hk,D], empty when absent
  std::vector<T> scale;                 // [H]: scale * head_scale

  explicit Parameters(const Problem& p)
      : ScoreParameters<T>(p), scale(read_parameter<T>(p.head_scale, p.H, 1, 1)) {
    if (p.query_gain) query_gain = read_parameter<T>(p.query_gain, p.H, p.D, 1);
    if (p.key_gain) key_gain = read_parameter<T>(p.key_gain, p.Hk, p.D, 1);
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

// Keys and values of all heads as right operands.
template <class T>
struct PackedKeys : PanelPacker<T> {
  using PanelPacker<T>::heads;
  using PanelPacker<T>::padded;
  using PanelPacker<T>::rows_size;
  using PanelPacker<T>::tasks;

  const Problem& p;
  const Parameters<T>& parameters;
  Scratch<T> key_columns;    // forward and backward
  Scratch<T> key_rows;       // backward
  Scratch<T> value_columns;  // backward
  Scratch<T> value_rows;     // forward
  std::vector<T> largest;    // forward: [B*Hk, tasks], the largest |k|^2

  PackedKeys(const Problem& problem, const Parameters<T>& parameters, bool backward)
      : PanelPacker<T>(problem),
        p(problem),
        parameters(parameters),
        key_columns(heads() * padded * p.D),
        key_rows(backward ? heads() * rows_size(p.D) : 0),
        value_columns(backward ? heads() * padded * p.E : 0),
        value_rows(backward ? 0 : heads() * rows_size(p.E)),
        largest(heads() * tasks) {
    this->for_each_panel([&](int64_t head, int64_t n, T* copies) {
      if (backward) {
        pack_for_backward(head, n, copies);
      } else {
        T& of_task = largest[head * tasks + n / this->kTask];
        of_task = std::max(of_task, pack_for_forward(head, n, copies));
      }
    });
  }

  T largest_norm(int64_t head) const {
    const T* squares = largest.data() + head * tasks;
    return tasks == 0 ? T(0) : std::sqrt(*std::max_element(squares, squares + tasks));
  }

 private:
  // Returns the largest |k|^2.
  T pack_for_forward(int64_t head, int64_t n, T* copies) const {
    this->store_columns(key_columns.get(), head, n, this->read_rows(p.key, head, n, p.D, copies),
                        p.D);
    const std::vector<T>& gains = parameters.key_gain;
    const T* gain = gains.empty() ? nullptr : gains.data() + head % p.Hk * p.D;
    const T square = normalize_columns(key_columns.get() + (head * padded + n) * p.D, p, gain);
    this->store_rows(value_rows.get(), head, n, this->read_rows(p.value, head, n, p.E, copies),
                     p.E);
    return square;
  }

  void pack_for_backward(int64_t head, int64_t n, T* copies) const {
    this->store_columns(value_columns.get(), head, n,
                        this->read_rows(p.value, head, n, p.E, copies), p.E);
    for (int64_t r = 0; r < kPanel<T>; ++r) {
      T* row = copies + r * kRowPitch;
      if (n + r < p.N) {
        load_normalized(row, p.key, head / p.Hk, head % p.Hk, n + r, p, parameters.key_gain);
      } else {
        std::fill(row, row + round_up(p.D, kPanel<T>), T(0));
      }
    }
    const Rows<T> keys{copies, kRowPitch};
    this->store_rows(key_rows.get(), head, n, keys, p.D);
    this->store_columns(key_columns.get(), head, n, keys, p.D);
  }
};

}  // namespace attn::cosine_sim::ATTN_ISA
