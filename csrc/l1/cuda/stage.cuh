// Tiles of queries and keys on their way from global to shared memory (layout: distance.cuh).
//
// float32 is copied in the background. 16 bits wait in registers between fetch and commit, where
// they become halves.
#pragma once

#include "l1/cuda/distance.cuh"

namespace attn::cuda::l1 {

template <class T>
ATTN_DEVICE uint32_t pack(float low, float high) {
  return std::is_same_v<T, Half> ? pack_half(low, high) : pack_bfloat(low, high);
}

// Elements i and i + 1 of a row as they are, wherever they stand; zeros from element `size` on.
template <class T>
ATTN_DEVICE uint32_t load_pair(const T* row, int64_t stride, int i, int size) {
  static_assert(sizeof(T) == 2);
  const auto* first = reinterpret_cast<const uint16_t*>(row) + i * stride;
  return (i < size ? first[0] : 0) | (i + 1 < size ? static_cast<uint32_t>(first[stride]) : 0)
                                         << 16;
}

// Halves: a pair times a power of two.
ATTN_DEVICE uint32_t scaled_pair(uint32_t pair, float factor, Half) {
  return pack_half(low_half(pair) * factor, high_half(pair) * factor);
}
ATTN_DEVICE uint32_t scaled_pair(uint32_t pair, float factor, BFloat) {
  return pack_half(bits_float(pair << 16) * factor, bits_float(pair & 0xffff0000u) * factor);
}

// `words` words of D, from `first_word` on, of rows of one batch and head.
template <class T>
struct Rows {
  const T* data;
  int64_t row_stride, stride;
  int first_row, rows;
  int first_word, words, D;
  bool in_pairs;
  float factor;

  // Elements of row r of the tile that exist; the row may be asked for in any case.
  ATTN_DEVICE int size(int r) const { return first_row + r < rows ? D : 0; }
  ATTN_DEVICE const T* row(int r) const {
    return data + static_cast<int64_t>(first_row + r) * row_stride;
  }
};

// A warp copies 8 words of 4 rows at once: a sector of global memory per row, all 32 banks.
constexpr int kGroupWords = 8;
constexpr int kGroupRows = 4;

struct Place {
  int row, column;  // in global memory, in shared memory
};

ATTN_DEVICE Place key_place(int group) {
  const int row = kGroupRows * group + threadIdx.x % 32 / kGroupWords;
  return {row, row};
}
// The four queries of a thread, 8 apart, are neighbours in shared memory.
ATTN_DEVICE Place query_place(int group) {
  const int first = group / 8 * 32, g = group % 8, i = threadIdx.x % 32 / kGroupWords;
  return {first + g + 8 * i, first + 4 * g + i};
}

// One row's words from `word` on, 8 apart: in the background (float32) or at once.
template <class T, int kPitch>
ATTN_DEVICE void copy_row(const Rows<T>& from, int r, int word, uint32_t* to) {
  to += word * kPitch;
  if constexpr (sizeof(T) == 4) {
    const T* source = from.row(r) + (from.first_word + word) * from.stride;
    int left = from.size(r) - from.first_word - word;
#pragma unroll 4
    for (; word < from.words; word += kGroupWords) {
      copy4_async(to, source, left > 0);
      source += kGroupWords * from.stride;
      left -= kGroupWords;
      to += kGroupWords * kPitch;
    }
  } else {
#pragma unroll 1
    for (; word < from.words; word += kGroupWords) {
      *to = scaled_pair(load_pair(from.row(r), from.stride, 2 * word, from.size(r)), from.factor,
                        T{});
      to += kGroupWords * kPitch;
    }
  }
}

template <class T>
ATTN_DEVICE void stage_queries(const Rows<T>& from, uint32_t* to) {
  const int warp = threadIdx.x / 32, word = threadIdx.x % kGroupWords;
#pragma unroll 1
  for (int group = warp; group < kQueries / kGroupRows; group += kWarps) {
    const Place place = query_place(group);
    copy_row<T, kQueryPitch>(from, place.row, word, to + place.column);
  }
}

// A tile of keys, fetched while something else is computed.
template <class T, int kKeys>
class KeyStage {
 public:
  ATTN_DEVICE void fetch(const Rows<T>& from, uint32_t* to) {
    if constexpr (sizeof(T) == 4) {
      copy_in_background(from, to);
      copies_commit();
    } else if (from.in_pairs) {
      ATTN_UNROLL
      for (int i = 0; i < kRowGroups; ++i) {
        const int row = key_place(threadIdx.x / 32 + i * kWarps).row;
        const auto* source = reinterpret_cast<const uint32_t*>(from.row(row)) + first_word();
        const int left = from.size(row) / 2 - first_word();
        ATTN_UNROLL
        for (int j = 0; j < kWordGroups; ++j) {
          held_[i][j] = j * kGroupWords < left ? source[j * kGroupWords] : 0;
        }
      }
    }
  }

  ATTN_DEVICE void commit(const Rows<T>& from, uint32_t* to) {
    if constexpr (sizeof(T) == 4) {
      copies_wait<0>();
    } else if (from.in_pairs) {
      ATTN_UNROLL
      for (int i = 0; i < kRowGroups; ++i) {
        uint32_t* target =
            to + first_word() * kKeyPitch<kKeys> + key_place(threadIdx.x / 32 + i * kWarps).column;
        ATTN_UNROLL
        for (int j = 0; j < kWordGroups; ++j) {
          if (j * kGroupWords >= from.words) break;
          target[j * kGroupWords * kKeyPitch<kKeys>] = scaled_pair(held_[i][j], from.factor, T{});
        }
      }
      if (kWordGroups * kGroupWords < from.words) copy_from(kWordGroups * kGroupWords, from, to);
    } else {
      copy_from(0, from, to);
    }
  }

 private:
  static constexpr int kRowGroups = kKeys / kGroupRows / kWarps;
  // Words that are held: D = 64 of 64 keys, D = 128 of 32.
  static constexpr int kWordGroups = sizeof(T) == 4 ? 1 : 16 / kRowGroups;

  static ATTN_DEVICE int first_word() { return threadIdx.x % kGroupWords; }

  static ATTN_DEVICE void copy_from(int word, const Rows<T>& from, uint32_t* to) {
#pragma unroll 1
    for (int i = 0; i < kRowGroups; ++i) {
      const Place place = key_place(threadIdx.x / 32 + i * kWarps);
      copy_row<T, kKeyPitch<kKeys>>(from, place.row, word + first_word(), to + place.column);
    }
  }

  static ATTN_DEVICE void copy_in_background(const Rows<T>& from, uint32_t* to) {
    const Place place = key_place(threadIdx.x / 32);
    const T* source = from.row(place.row) + (from.first_word + first_word()) * from.stride;
    const int rows = from.rows - from.first_row - place.row;
    const int size = from.D - from.first_word;
    to += first_word() * kKeyPitch<kKeys> + place.column;
#pragma unroll 2
    for (int word = first_word(); word < from.words; word += kGroupWords) {
      ATTN_UNROLL
      for (int i = 0; i < kRowGroups; ++i) {
        const int row = i * kGroupRows * kWarps;
        copy4_async(to + row, source + row * from.row_stride, word < size && row < rows);
      }
      source += kGroupWords * from.stride;
      to += kGroupWords * kKeyPitch<kKeys>;
    }
  }

  uint32_t held_[kRowGroups][kWordGroups];
};

// --- the block's queries, and all of D

// Which block this is. Later queries come first: under a causal band they see more keys.
struct BlockIndex {
  int b, h, hk, first_query, first_column;

  ATTN_DEVICE BlockIndex(const Problem& p, int columns) {
    const int parts = (p.E + columns - 1) / columns;
    const int heads = p.B * p.H * parts;
    const int blocks = (p.M + kQueries - 1) / kQueries;
    int head = blockIdx.x % heads;
    first_query = (blocks - 1 - blockIdx.x / heads) * kQueries;
    first_column = head % parts * columns;
    head /= parts;
    b = head / p.H;
    h = head % p.H;
    hk = h / (p.H / p.Hk);
  }
};

template <class T>
ATTN_DEVICE Rows<T> rows_of(const Array& array, bool in_pairs, int b, int head, int first_row,
                            int rows, int D, float factor) {
  return {array.at<T>(b, head),
          array.stride[2],
          array.stride[3],
          first_row,
          rows,
          0,
          slice_words<T>(D),
          D,
          in_pairs,
          factor};
}

// All of D that is not yet in sums: shared memory holds the first slice of kSliceWords of it, and
// then the later ones (float32 only: 16 bits fit).
template <class T, int kKeys>
ATTN_DEVICE void add_all_distances(Rows<T> queries, Rows<T> keys, uint32_t* query_words,
                                   uint32_t* key_words, bool seen, Tile<kKeys>& sums) {
  const int words = padded_words<T>(keys.D);
#pragma unroll 1
  for (int first = kSliceWords;; first += kSliceWords) {
    if (seen) add_distances<T, kKeys>(query_words, key_words, keys.words, sums);
    if (sizeof(T) == 2 || first >= words) return;
    queries.first_word = keys.first_word = first;
    queries.words = keys.words = words - first < kSliceWords ? words - first : kSliceWords;
    KeyStage<T, kKeys> stage;
    __syncthreads();
    stage_queries(queries, query_words);
    stage.fetch(keys, key_words);
    stage.commit(keys, key_words);
    __syncthreads();
  }
}

}  // namespace attn::cuda::l1
