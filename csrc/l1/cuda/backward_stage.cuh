// Tiles of the backward on their way to shared memory: words of queries and keys as columns
// (distance.cuh), those of values and grad_out as rows, once and for all pairs of 16-bit elements.
//
// Rows that start at multiples of 16 bytes (`aligned`) move 16 bytes at a time, any others by
// words.
#pragma once

#include "l1/cuda/stage.cuh"

namespace attn::cuda::l1 {

// Rows of one batch and head, from `first` on; `width` elements each.
template <class T>
struct Source {
  const T* data;
  int64_t row_stride, stride;
  int first, count, width;
  bool aligned;

  ATTN_DEVICE bool exists(int r) const { return first + r < count; }
  ATTN_DEVICE const T* row(int r) const {
    return data + static_cast<int64_t>(first + r) * row_stride;
  }
  // A word of a row as it is; zeros beyond its elements.
  ATTN_DEVICE uint32_t word(int r, int word) const {
    const int element = word * kWordElements<T>;
    if (!exists(r) || element >= width) return 0;
    if constexpr (sizeof(T) == 4) {
      return float_bits(row(r)[element * stride]);
    } else {
      return load_pair(row(r), stride, element, width);
    }
  }
  // Four words, if aligned.
  ATTN_DEVICE uint4 four(int r, int word) const {
    if (!exists(r) || word * kWordElements<T> >= width) return uint4{0, 0, 0, 0};
    return load4(reinterpret_cast<const uint32_t*>(row(r)) + word);
  }
};

ATTN_DEVICE uint32_t scaled_word(uint32_t word, float, float) {
  return word;
}
ATTN_DEVICE uint32_t scaled_word(uint32_t pair, float factor, Half kind) {
  return scaled_pair(pair, factor, kind);
}
ATTN_DEVICE uint32_t scaled_word(uint32_t pair, float factor, BFloat kind) {
  return scaled_pair(pair, factor, kind);
}

// To [word][row]; 16 bits as halves times the factor. A warp moves 8 words of 16 rows at once:
// whole sectors of global memory, and all banks.
template <class T, class P, int kRows, int kPitch>
ATTN_DEVICE void stage_columns(const Source<T>& from, float factor, uint32_t* to) {
  constexpr int kRowGroups = kRows / 16;
  constexpr int kGroups = kRowGroups * (P::kWords / 8) / P::kWarps;  // of a warp
  constexpr int kAtOnce = kGroups < 4 ? kGroups : 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!from.aligned) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * P::kWords; i += P::kThreads) {
      const int word = i % 8 + i / (8 * kRows) * 8, row = i / 8 % kRows;
      to[word * kPitch + row] = scaled_word(from.word(row, word), factor, T{});
    }
    return;
  }
  // Group k of a warp: rows 16 * (k % kRowGroups) and on, words 8 * (k / kRowGroups) and on.
#pragma unroll 1
  for (int k = 0; k < kGroups; k += kAtOnce) {
    uint4 held[kAtOnce];
    ATTN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int group = (k + i) * P::kWarps + warp;
      held[i] =
          from.four(group % kRowGroups * 16 + lane % 16, group / kRowGroups * 8 + lane / 16 * 4);
    }
    ATTN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int group = (k + i) * P::kWarps + warp;
      uint32_t* target = to + (group / kRowGroups * 8 + lane / 16 * 4) * kPitch +
                         group % kRowGroups * 16 + lane % 16;
      target[0] = scaled_word(held[i].x, factor, T{});
      target[kPitch] = scaled_word(held[i].y, factor, T{});
      target[2 * kPitch] = scaled_word(held[i].z, factor, T{});
      target[3 * kPitch] = scaled_word(held[i].w, factor, T{});
    }
  }
}

// To [place of row][word], in the background where it can be. `words`: a multiple of 8.
template <class T, class P, int kRows, class PlaceOf>
ATTN_DEVICE void stage_rows(const Source<T>& from, int words, int pitch, PlaceOf place_of,
                            uint32_t* to) {
  if (!from.aligned) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * P::kWords; i += P::kThreads) {
      const int row = i / P::kWords, word = i % P::kWords;
      if (word < words) to[place_of(row) * pitch + word] = from.word(row, word);
    }
    return;
  }
  constexpr int kEach = P::kWords / 4,
                kStep = P::kThreads / kEach;  // threads of a row, rows at once
  const int first = threadIdx.x / kEach, word = threadIdx.x % kEach * 4;
  if (word >= words) return;
  const int size = word * kWordElements<T> < from.width ? from.count - from.first : 0;
  const T* source = from.row(first) + word * kWordElements<T>;
  ATTN_UNROLL
  for (int row = first; row < first + kRows; row += kStep) {
    copy16_async(to + place_of(row) * pitch + word, row < size ? source : from.data, row < size);
    source += kStep * from.row_stride;
  }
}

}  // namespace attn::cuda::l1
