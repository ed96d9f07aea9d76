// The carried state, and how the decay weighs what is added to it.
#pragma once

namespace attn::linear::ATTN_ISA {

// Tokens that are processed at a time: whole tiles and panels, and few, since scores grow with
// their square. AMX spends little on scores and much on rounding the state, which it does once per
// chunk.
constexpr int kChunk = ATTN_ISA_LEVEL == 3 ? 64 : kTileRows == 8 ? 32 : 48;
constexpr int kScorePitch = kChunk + 16;  // an odd number of cache lines of floats

// Powers of one head's decay, and 0 for the keys after a query.
template <class T>
class Fade {
 public:
  void read(const Problem& p, int64_t head) {
    gamma_ = 1;
    if (p.decay) load_row(&gamma_, p.decay, head * p.decay.stride[0], 1, 1);
    double power = 1;
    for (int64_t i = 0; i <= kChunk; ++i, power *= gamma_) powers_[i] = static_cast<T>(power);
    for (int64_t i = 0; i < kChunk; ++i) reversed_[i] = powers_[kChunk - 1 - i];
    std::fill(reversed_ + kChunk, reversed_ + 2 * kChunk, T(0));
    std::reverse_copy(reversed_, reversed_ + 2 * kChunk, forward_);
  }

  bool any() const { return gamma_ != 1; }
  // What is left of a state so many tokens later.
  T after(int64_t tokens) const {
    return tokens <= kChunk ? powers_[tokens]
                            : static_cast<T>(std::pow(double{gamma_}, double(tokens)));
  }
  // [column]: of the keys that the query in a row sees.
  const T* weights(int64_t row, int64_t column) const {
    return reversed_ + kChunk - 1 + column - row;
  }
  // [column]: of the key in a row, as the queries see it.
  const T* weights_of_queries(int64_t row, int64_t column) const {
    return forward_ + kChunk + column - row;
  }
  // [row]: of the state before the chunk, as a query sees it.
  const T* of_past() const { return powers_ + 1; }
  // [row]: of a key, as the state after the chunk sees it.
  const T* of_keys(int64_t count) const { return reversed_ + kChunk - count; }

 private:
  T gamma_ = 1;
  T powers_[kChunk + 1];
  T reversed_[2 * kChunk], forward_[2 * kChunk];
};

// A matrix [rows, columns] as the right operand of products over its rows: panels
// [columns / kPanel][rows][kPanel], rows padded to whole tiles and panels.
template <class T>
struct Panels {
  int64_t rows, columns, padded;

  Panels(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        padded(round_up(round_up(rows, kPanel<T>), kTileRows) + kTileRows) {}

  int64_t count() const { return round_up(columns, kPanel<T>) / kPanel<T>; }
  int64_t size() const { return count() * padded * kPanel<T>; }
  // Row `row` of the panel that begins at a column.
  int64_t at(int64_t row, int64_t column) const {
    return (column / kPanel<T> * padded + row) * kPanel<T> + column % kPanel<T>;
  }
};

// [F, E] and the sum over keys [F]; or their gradients.
template <class T>
class State {
 public:
  State(int64_t features, int64_t width)
      : panels(features, width),
        data_(size_of(features, width)),
        sum_(data_.get() + panels.size()) {}

  static int64_t size_of(int64_t features, int64_t width) {
    return Panels<T>(features, width).size() + round_up(features, kPanel<T>);
  }

  const Panels<T> panels;

  T* at(int64_t row, int64_t column) const { return data_.get() + panels.at(row, column); }
  T* sum() const { return sum_; }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_of(panels.rows, panels.columns); }

  void clear() { std::fill(data_.get(), data_.get() + size(), T(0)); }

  // Absent tensors are zeros.
  void read(const View& state, const View& sum, int64_t batch, int64_t head) {
    clear();
    const int64_t offset = batch * state.stride[0] + head * state.stride[1];
    for (int64_t f = 0; f < panels.rows && state; ++f) {
      for (int64_t e = 0; e < panels.columns; e += kPanel<T>) {
        load_row(at(f, e), state, offset + f * state.stride[2] + e * state.stride[3],
                 state.stride[3], std::min<int64_t>(kPanel<T>, panels.columns - e));
      }
    }
    if (!sum) return;
    load_row(sum_, sum, batch * sum.stride[0] + head * sum.stride[1], sum.stride[2], panels.rows);
  }

  // Contiguous tensors [heads, F, E] and [heads, F], absent ones are not wanted.
  void write(const View& state, const View& sum, int64_t head) const {
    for (int64_t f = 0; f < panels.rows && state; ++f) {
      for (int64_t e = 0; e < panels.columns; e += kPanel<T>) {
        store_row(state, (head * panels.rows + f) * panels.columns + e, at(f, e),
                  std::min<int64_t>(kPanel<T>, panels.columns - e));
      }
    }
    if (sum) store_row(sum, head * panels.rows, sum_, panels.rows);
  }

  // this = factor * this + other
  void fade_and_add(T factor, const T* other) {
    T* mine = data_.get();
    for (int64_t i = 0; i < size(); ++i) mine[i] = mine[i] * factor + other[i];
  }

 private:
  Scratch<T> data_;
  T* sum_;
};

// [E + 1, F]: the transposed state, the sum over keys as its last row. The right operand of
// products over the width of values.
template <class T>
class TransposedState {
 public:
  TransposedState(int64_t features, int64_t width)
      : panels(width + 1, features), width_(width), data_(panels.size()) {}

  const Panels<T> panels;

  T* at(int64_t row, int64_t column) const { return data_.get() + panels.at(row, column); }

  void clear() { std::fill(data_.get(), data_.get() + panels.size(), T(0)); }

  // Features [begin, end) of a state; begin is the first of a panel.
  void read(const State<T>& state, int64_t begin, int64_t end) {
    constexpr int lanes = Simd<T>::lanes;
    for (int64_t f = begin; f < end; f += lanes) {
      for (int64_t e = 0; e < width_; e += lanes) {
        transpose_square<T>(at(e, f), state.at(f, e), kPanel<T>);
      }
      store<T>(at(width_, f), load(state.sum() + f));
    }
  }

 private:
  int64_t width_;
  Scratch<T> data_;
};

}  // namespace attn::linear::ATTN_ISA
