// A chunk of tokens: rows of features, values and gradients as operands, and the products of one
// chunk. Rows behind the last token of a chunk are zero, and so are columns behind the last one.
#pragma once

namespace attn::linear::ATTN_ISA {

// Features that are held at a time; more (taylor of wide inputs) come in several blocks.
template <class T>
constexpr int kFeatureBlock =
    kMaxWidth / std::lcm(kTileRows, kPanel<T>) * std::lcm(kTileRows, kPanel<T>);

inline int64_t feature_block(int64_t features, int64_t several) {
  return features <= kMaxWidth ? features : several;
}

template <class T>
int64_t padded_rows(int64_t count) {
  return round_up(round_up(count, kPanel<T>), kTileRows);
}

// One query head and its key head.
struct Place {
  int64_t batch, head, kv_head;

  Place(const Problem& p, int64_t index)
      : batch(index / p.H), head(index % p.H), kv_head(head / (p.H / p.Hk)) {}
};

// Rows at kRowPitch, also the columns up to a whole tile.
template <class T>
void clear_rows(T* rows, int64_t begin, int64_t end) {
  std::fill(rows + begin * kRowPitch, rows + end * kRowPitch, T(0));
}

// Columns that are loaded of rows of so many elements: zeros behind them.
template <class T>
int64_t loaded_width(int64_t width) {
  return round_up(width, kPanel<T>) + kTileRows;
}

template <class Stored, class T>
ATTN_INLINE void load_stored_rows(T* rows, const Stored* source, int64_t row_stride, int64_t stride,
                                  int64_t count, int64_t width) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t whole = stride == 1 ? width / lanes * lanes : 0;
  const int64_t end = loaded_width<T>(width);
  for (int64_t r = 0; r < count; ++r, rows += kRowPitch, source += row_stride) {
    for (int64_t d = 0; d < whole; d += lanes) {
      for (int i = 0; i < lanes; ++i) rows[d + i] = widen(source[d + i]);
    }
    for (int64_t d = whole; d < width; ++d) rows[d] = widen(source[d * stride]);
    for (int64_t d = width; d < end; ++d) rows[d] = 0;
  }
}

// Calls body(elements of the stored type from row `first` on).
template <class T, class Body>
ATTN_INLINE void with_stored_rows(const View& v, int64_t batch, int64_t head, int64_t first,
                                  const Body& body) {
  const int64_t offset = batch * v.stride[0] + head * v.stride[1] + first * v.stride[2];
  if constexpr (sizeof(T) == 8) {
    body(static_cast<double*>(v.data) + offset);
  } else if (v.dtype == ScalarType::Float) {
    body(static_cast<float*>(v.data) + offset);
  } else if (v.dtype == ScalarType::BFloat16) {
    body(static_cast<Bfloat16*>(v.data) + offset);
  } else {
    body(static_cast<Half*>(v.data) + offset);
  }
}

template <class T>
void load_rows(T* rows, const View& v, int64_t batch, int64_t head, int64_t first, int64_t count,
               int64_t width) {
  with_stored_rows<T>(v, batch, head, first, [&](auto* source) ATTN_INLINE_LAMBDA {
    load_stored_rows(rows, source, v.stride[2], v.stride[3], count, width);
  });
  for (int64_t r = count; r < padded_rows<T>(count); ++r) {
    std::fill_n(rows + r * kRowPitch, loaded_width<T>(width), T(0));
  }
}

// Brings the rows that the next chunk reads and writes into the cache, a few cache lines with every
// tile of this one: then neither memory nor the products wait for the other.
class Prefetch {
 public:
  void clear() { streams_ = current_ = 0; }

  void add(const View& v, int64_t batch, int64_t head, Interval tokens, int64_t width) {
    if (!v || tokens.size() == 0 || (v.stride[3] != 1 && width != 1)) return;
    const int64_t bytes = v.dtype == ScalarType::Double ? 8 : v.dtype == ScalarType::Float ? 4 : 2;
    const int64_t offset = batch * v.stride[0] + head * v.stride[1] + tokens.begin * v.stride[2];
    const char* begin = static_cast<const char*>(v.data) + offset * bytes;
    stream_[streams_++] = {begin, begin, width * bytes, v.stride[2] * bytes, tokens.size()};
  }

  ATTN_INLINE void step() {
    for (int i = 0; i < kLines && current_ < streams_; ++i) {
      Stream& s = stream_[current_];
      __builtin_prefetch(s.line, 0, 2);
      s.line += 64;
      if (s.line < s.row + s.row_bytes) continue;
      s.row += s.row_stride;
      s.line = s.row;
      if (--s.rows == 0) ++current_;
    }
  }

 private:
  static constexpr int kLines = 24;
  struct Stream {
    const char* row;
    const char* line;
    int64_t row_bytes, row_stride, rows;
  };
  Stream stream_[7];
  int streams_ = 0, current_ = 0;
};

template <class Stored, class T>
ATTN_INLINE void store_stored_rows(Stored* target, const T* rows, int64_t count, int64_t width) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t whole = width / lanes * lanes;
  for (int64_t r = 0; r < count; ++r, rows += kRowPitch, target += width) {
    for (int64_t d = 0; d < whole; d += lanes) {
      for (int i = 0; i < lanes; ++i) narrow(rows[d + i], target[d + i]);
    }
    for (int64_t d = whole; d < width; ++d) narrow(rows[d], target[d]);
  }
}

// Rows from row `first` on of a contiguous tensor [heads, length, width].
template <class T>
void store_rows(const View& v, int64_t first, const T* rows, int64_t count, int64_t width) {
  View flat = v;
  flat.stride[2] = width;
  with_stored_rows<T>(flat, 0, 0, first, [&](auto* target) ATTN_INLINE_LAMBDA {
    store_stored_rows(target, rows, count, width);
  });
}

// u = x / D**(1/4) of one row, with zeros behind.
template <class T>
void load_taylor_row(T* u, const Problem& p, const View& v, int64_t batch, int64_t head,
                     int64_t position) {
  std::fill(u, u + kRowPitch, T(0));
  load_padded(u, v, batch, head, position, p.D);
  const T scale = taylor_scale<T>(p.D);
  for (int64_t d = 0; d < p.D; ++d) u[d] *= scale;
}

// Features in a block of `count` tokens from `first` on.
template <class T>
void load_features(T* rows, const Problem& p, const View& v, int64_t batch, int64_t head,
                   int64_t first, int64_t count, Block block) {
  if (p.feature_map != FeatureMap::taylor) {
    load_rows(rows, v, batch, head, first, count, p.D);
    if (p.feature_map == FeatureMap::identity) return;
    for (int64_t r = 0; r < count; ++r) map_row(p.feature_map, rows + r * kRowPitch, p.D);
    return;
  }
  T u[kRowPitch];
  clear_rows(rows, 0, padded_rows<T>(count));
  for (int64_t r = 0; r < count; ++r) {
    load_taylor_row(u, p, v, batch, head, first + r);
    taylor_features(rows + r * kRowPitch, u, p.D, block);
  }
}

inline bool is_hidden(const Problem& p, const Place& place, int64_t key) {
  if (!p.mask) return false;
  const int64_t* stride = p.mask.stride;
  return !static_cast<const bool*>(
      p.mask.data)[place.batch * stride[0] + place.head * stride[1] + key * stride[3]];
}

template <class T>
void load_keys(T* rows, const Problem& p, const Place& place, int64_t first, int64_t count,
               Block block) {
  load_features(rows, p, p.key, place.batch, place.kv_head, first, count, block);
  for (int64_t r = 0; r < count && p.mask; ++r) {
    if (is_hidden(p, place, first + r)) clear_rows(rows, r, r + 1);
  }
}

template <class T>
void scale_rows(T* rows, const T* factors, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    T* row = rows + r * kRowPitch;
    for (int64_t d = 0; d < width; ++d) row[d] *= factors[r];
  }
}

// Right operands of products over the width: [rows / kPanel][width][kPanel].
template <class T>
void pack_columns(T* columns, const T* rows, int64_t count, int64_t width) {
  for (int64_t n = 0; n < count; n += kPanel<T>) {
    pack_transposed(columns + n * width, rows + n * kRowPitch, kRowPitch, width);
  }
}

// Right operands of products over tokens: [width / kPanel][kChunk][kPanel].
template <class T>
void pack_panels(T* panels, const T* rows, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    pack_row(panels + r * kPanel<T>, rows + r * kRowPitch, width, kChunk * kPanel<T>);
  }
}

template <class T>
ATTN_INLINE void scale_tile(Tile<T>& tile, const T* factors) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) tile.at[r][v] *= splat<T>(factors[r]);
  }
}

// left panel: a product of rows at kRowPitch, or as said, and a panel.
template <class T>
struct Product {
  const T* left;
  const T* panel;
  int64_t depth;
};

// epilogue((initial + left panel) factors + left2 panel2): factors per row; initial, at kRowPitch,
// and factors may be null. Element (row, k) of left2 is left2[row * RowStep + k * DepthStep].
template <int RowStep, int DepthStep, class T, class Epilogue>
__attribute__((noinline)) void multiply_two(const T* initial, const Product<T>& first,
                                            const T* factors, const Product<T>& second,
                                            const Epilogue& epilogue) {
  Tile<T> tile;
  clear(tile);
  multiply_add<kRowPitch, 1>(tile, first.left, first.panel, first.depth);
  if (initial != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        tile.at[r][v] += load(initial + r * kRowPitch + v * Simd<T>::lanes);
      }
    }
  }
  if (factors != nullptr) scale_tile(tile, factors);
  multiply_add<RowStep, DepthStep>(tile, second.left, second.panel, second.depth);
  epilogue(tile);
}

template <class T>
ATTN_INLINE void store_scores(T* scores, const Tile<T>& sums, const Fade<T>& fade, int64_t row,
                              int64_t column, bool is_first, bool weigh) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t n = column + v * Simd<T>::lanes;
      T* target = scores + (row + r) * kScorePitch + n;
      Vec<T> sum = sums.at[r][v];
      if (!is_first) sum += load(target);
      if (weigh) {
        const Vec<T> weight = load(fade.weights(row + r, n));
        sum = weight != Vec<T>{} ? sum * weight : Vec<T>{};
      }
      store<T>(target, sum);
    }
  }
}

// scores[m][n] += left row m · column n of the keys n <= m, weighed once they are complete.
template <class T>
void multiply_scores(T* scores, const T* left, const T* columns, int64_t depth, int64_t count,
                     const Fade<T>& fade, Prefetch& ahead, bool is_first, bool is_last) {
  for (int64_t n = 0; n < count; n += kPanel<T>) {
    for (int64_t row = n / kTileRows * kTileRows; row < count; row += kTileRows) {
      ahead.step();
      const bool weigh = is_last && (fade.any() || n + kPanel<T> > row + 1);
      multiply(left + row * kRowPitch, columns + n * depth, depth,
               [&](const Tile<T>& sums) ATTN_INLINE_LAMBDA {
                 store_scores(scores, sums, fade, row, n, is_first, weigh);
               });
    }
  }
}

// Keys in a row of scores that were computed: whole panels.
template <class T>
int64_t scores_in_row(int64_t row, int64_t count) {
  return round_up(std::min(row / kTileRows * kTileRows + kTileRows, count), kPanel<T>);
}

// target = factor * target + leftᵀ panel
template <class T>
__attribute__((noinline)) void update_tile(T* target, T factor, const T* left, const T* panel,
                                           int64_t depth) {
  Tile<T> tile;
  clear(tile);
  multiply_add<1, kRowPitch>(tile, left, panel, depth);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      T* row = target + r * kPanel<T> + v * Simd<T>::lanes;
      store<T>(row, load(row) * splat<T>(factor) + tile.at[r][v]);
    }
  }
}

// sum = factor * sum + sum over rows of weight * row; weights at kRowPitch, null: 1.
template <class T>
void update_sum(T* sum, T factor, const T* rows, const T* weights, int64_t count, int64_t width) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t d = 0; d < width; d += kPanel<T>) {
    Vec<T> total[kTileVectors] = {};
    for (int64_t r = 0; r < count; ++r) {
      const Vec<T> weight = splat<T>(weights == nullptr ? T(1) : weights[r * kRowPitch]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        total[v] += load(rows + r * kRowPitch + d + v * lanes) * weight;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      T* target = sum + d + v * lanes;
      store<T>(target, load(target) * splat<T>(factor) + total[v]);
    }
  }
}

// Adds a chunk to the features of a block: left rows [tokens, features], panels of values.
template <class T>
void update_state(State<T>& state, T factor, const T* left, const T* panels, int64_t count,
                  Block block, Prefetch& ahead) {
  for (int64_t e = 0; e < state.panels.columns; e += kPanel<T>) {
    for (int64_t f = 0; f < block.size(); f += kTileRows) {
      ahead.step();
      update_tile(state.at(block.begin + f, e), factor, left + f, panels + e * kChunk, count);
    }
  }
}

// Calls body(first, count, next) for the chunks of an interval, in their order or from the last
// one; next is the chunk that follows.
template <class Body>
ATTN_INLINE void for_each_chunk(Interval all, bool reversed, const Body& body) {
  const int64_t chunks = (all.size() + kChunk - 1) / kChunk;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t at = reversed ? chunks - 1 - i : i, next = reversed ? at - 1 : at + 1;
    const Interval tokens = piece(all, kChunk, at);
    const bool is_end = i == chunks - 1;
    body(tokens.begin, tokens.size(), is_end ? Interval{0, 0} : piece(all, kChunk, next));
  }
}

template <class T, class Body>
ATTN_INLINE void for_each_block(const Problem& p, const Body& body) {
  const int64_t size = feature_block(p.F, kFeatureBlock<T>);
  for (int64_t f = 0; f < p.F; f += size) body(Block{f, std::min(f + size, p.F)});
}

}  // namespace attn::linear::ATTN_ISA
