// The backward of L1 attention: a block owns a tile of keys of one batch and key/value head, with
// their gradients in shared memory, and goes over the queries of the group's heads that see them.
//
// The gradient of a tile of queries is a sum over blocks, made in the order of the key tiles: block
// j adds after the flag of the query tile says that those before it have (deterministic). Blocks
// take their tile from a counter, so that whoever is waited for has started earlier.
#pragma once

#include "l1/cuda/backward_tile.cuh"

namespace attn::cuda::l1 {

// Which tiles of keys a tile of queries sees, `all` of its pairs with this one's keys.
struct Reach {
  int first, last;
  bool all;
};

template <class P>
ATTN_DEVICE Reach reach_of(const Problem& p, int b, int first_query, int first_key) {
  int begin = p.N, end = 0, latest_begin = 0, earliest_end = p.N;
  for (int r = threadIdx.x % 32; r < P::kQueries; r += 32) {
    const int m = first_query + r;
    const Interval seen = m < p.M ? visible_keys(p, b, m) : Interval{0, 0};
    if (seen.begin < seen.end) {
      begin = seen.begin < begin ? seen.begin : begin;
      end = seen.end > end ? seen.end : end;
    }
    latest_begin = seen.begin > latest_begin ? seen.begin : latest_begin;
    earliest_end = seen.end < earliest_end ? seen.end : earliest_end;
  }
  ATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other_begin = shuffle_xor(begin, mask), other_end = shuffle_xor(end, mask);
    const int other_latest = shuffle_xor(latest_begin, mask);
    const int other_earliest = shuffle_xor(earliest_end, mask);
    begin = other_begin < begin ? other_begin : begin;
    end = other_end > end ? other_end : end;
    latest_begin = other_latest > latest_begin ? other_latest : latest_begin;
    earliest_end = other_earliest < earliest_end ? other_earliest : earliest_end;
  }
  const bool all = latest_begin <= first_key && earliest_end >= first_key + P::kKeys;
  if (begin >= end) return {1, 0, false};
  return {begin / P::kKeys, (end - 1) / P::kKeys, all};
}

// Tiles of queries among which are all that the band lets see a tile of keys.
template <class P>
ATTN_DEVICE Interval query_tiles(const Problem& p, int first_key) {
  const int64_t shift = int64_t{p.N} - p.M;
  int64_t begin = first_key - p.right - shift;
  int64_t end = first_key + P::kKeys + p.left - shift;
  begin = begin > 0 ? begin : 0;
  end = end < p.M ? end : p.M;
  if (begin >= end) return {0, 0};
  return {static_cast<int>(begin / P::kQueries),
          static_cast<int>((end + P::kQueries - 1) / P::kQueries)};
}

template <class T, int kWidth, bool kExtras>
class KeyTile {
  using P = Plan<T, kWidth>;
  using Memory = BackwardMemory<T, P>;
  // Warps that hold pairs of a tile: all of them but for the widest heads.
  static constexpr int kTileRows = P::kKeys / 32;
  static constexpr int kTileWarps = kTileRows * (P::kQueries / 16);

 public:
  ATTN_DEVICE KeyTile(const Problem& p, const Gradients& g, int head, int tile)
      : p_(p),
        g_(g),
        memory_(shared_memory<uint32_t>()),
        columns_(reinterpret_cast<float*>(memory_ + Memory::kColumns)),
        b_(head / p.Hk),
        hk_(head % p.Hk),
        tile_(tile),
        first_key_(tile * P::kKeys),
        factor_(common_factor<T>(p, b_, hk_)) {}

  ATTN_DEVICE void run() {
    stage_keys();
    for (int i = threadIdx.x; i < Memory::kColumns - Memory::kKeySums; i += P::kThreads) {
      memory_[Memory::kKeySums + i] = 0;
    }
    const int group = p_.H / p_.Hk;
    const Interval tiles = query_tiles<P>(p_, first_key_);
    for (int h = hk_ * group; h < (hk_ + 1) * group; ++h) {
#pragma unroll 1
      for (int i = tiles.begin; i < tiles.end; ++i) {
        const Reach reach = reach_of<P>(p_, b_, i * P::kQueries, first_key_);
        if (tile_ >= reach.first && tile_ <= reach.last) query_tile(h, i, reach);
      }
    }
    copies_wait<0>();
    __syncthreads();
    if (g_.key) store_keys(static_cast<T*>(g_.key));
    if (g_.value) store_values(static_cast<T*>(g_.value));
  }

  // Adds the gradients of the scores of a tile, without those of other queries and keys.
  ATTN_DEVICE void add_score_grads(int h, int i, Tile<16>& sums) {
    const Reach reach = reach_of<P>(p_, b_, i * P::kQueries, first_key_);
    if (tile_ < reach.first || tile_ > reach.last) return;
    stage_keys();
    stage_queries(h, i * P::kQueries);
    __syncthreads();
    Tile<16> grads = {};
    if (warp() < kTileWarps) pairs<true>(h, i * P::kQueries, reach.all, grads);
    ATTN_UNROLL
    for (int e = 0; e < 16; ++e)
      sums.at[e / 8][e / 4 % 2][e % 4] += grads.at[e / 8][e / 4 % 2][e % 4];
    __syncthreads();
  }

 private:
  static ATTN_DEVICE int warp() { return threadIdx.x / 32; }

  ATTN_DEVICE Rows<T> rows(const Array& of, int head, int first_row, int count, int width,
                           bool in_pairs, float factor) const {
    return {of.at<T>(b_, head), of.stride[2], of.stride[3], first_row, count, 0,
            P::kWords,          width,        in_pairs,     factor};
  }

  ATTN_DEVICE void stage_keys() {
    stage_words<T, P::kKeyPitch>(
        rows(p_.key, hk_, first_key_, p_.N, p_.D, p_.key_in_pairs, factor_.up), P::kKeys, P::kWarps,
        memory_);
    copies_commit();
  }

  ATTN_DEVICE void query_tile(int h, int i, const Reach& reach) {
    const int first_query = i * P::kQueries;
    stage_queries(h, first_query);
    __syncthreads();
    Tile<16> coefficients = {};
    if (warp() < kTileWarps) pairs<false>(h, first_query, reach.all, coefficients);
    __syncthreads();
    float up = 1.0f, down = 1.0f;
    find_factor(up, down);
    if (!g_.grad_scores.data && g_.value) {
      add_values<T, P>(memory_ + Memory::kWeights, memory_ + Memory::kRows, p_.E,
                       reinterpret_cast<float*>(memory_ + Memory::kValueSums));
    }
    __syncthreads();
    if (warp() < kTileWarps) {
      store_coefficients<T, P>(coefficients, up,
                               memory_ + Memory::kPlanes +
                                   warp() % kTileRows * 32 * P::kQueryPitch +
                                   warp() / kTileRows * 16);
    }
    __syncthreads();
    sweep(down);
    if (g_.query) add_queries(h, i, tile_ - reach.first, tile_ == reach.last);
    if (!g_.query) __syncthreads();
  }

  ATTN_DEVICE void stage_queries(int h, int first_query) {
    stage_words<T, P::kQueryPitch>(
        rows(p_.query, h, first_query, p_.M, p_.D, p_.query_in_pairs, factor_.up), P::kQueries,
        P::kWarps, memory_ + Memory::kQuery);
    if (!g_.grad_scores.data) {
      Rows<T> grad = rows(g_.grad_out, h, first_query, p_.M, p_.E, g_.grad_out_in_pairs, 1.0f);
      grad.words = padded_words<T>(p_.E);
      stage_rows<T>(grad, P::kQueries, P::kWarps, Memory::kRowPitch, memory_ + Memory::kRows);
    }
    if (threadIdx.x < P::kQueries) {
      const int r = threadIdx.x, m = first_query + r;
      const bool exists = m < p_.M;
      const Interval seen = exists ? visible_keys(p_, b_, m) : Interval{0, 0};
      columns_.begin[r] = seen.begin;
      columns_.end[r] = seen.end;
      const int64_t row = (int64_t{b_} * p_.H + h) * p_.M + m;
      const bool given = exists && !g_.grad_scores.data;
      columns_.lse[r] = given ? g_.lse[row] : 0.0f;
      columns_.delta[r] = given ? g_.delta[row] : 0.0f;
    }
    copies_commit();
    copies_wait<0>();
  }

  // The thread's coefficients, or the gradients of its scores; its weights and the warp's largest
  // coefficient go to memory.
  template <bool kOfScores>
  ATTN_DEVICE void pairs(int h, int first_query, bool all, Tile<16>& coefficients) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int row = warp() % kTileRows * 32, column = warp() / kTileRows * 16;
    Tile<16> weights = {};
    if (g_.grad_scores.data) {
      given_pairs(h, first_query + column, first_key_ + row, coefficients);
    } else {
      Tile<16> products = {};
      add_distances<16, P::kKeyPitch, P::kQueryPitch>(
          memory_ + row + 4 * g, memory_ + Memory::kQuery + column + 4 * t, padded_words<T>(p_.D),
          coefficients, SignKind<T>{});
      Rows<T> value = rows(p_.value, hk_, first_key_ + row, p_.N, p_.E, p_.value_in_pairs, 1.0f);
      value.words = padded_words<T>(p_.E);
      multiply_grad_out<T, P>(value, memory_ + Memory::kRows + column * Memory::kRowPitch,
                              products);
      weigh<kOfScores>(h, first_query, row, column, all, products, coefficients, weights);
      store_weights<T, P>(
          weights, memory_ + Memory::kWeights + row * Memory::kWeightPitch + column / P::kPart);
    }
    if constexpr (sizeof(T) == 2) store_largest(coefficients);
  }

  ATTN_DEVICE void given_pairs(int h, int first_query, int first_key,
                               Tile<16>& coefficients) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    ATTN_UNROLL
    for (int e = 0; e < 16; ++e) {
      const int i = e / 4, j = e % 4, n = first_key + 4 * g + i, m = first_query + 4 * t + j;
      if (n < p_.N && m < p_.M) {
        coefficients.at[i / 2][j / 2][i % 2 * 2 + j % 2] =
            given_coefficient<T>(p_, g_, b_, h, m, n);
      }
    }
  }

  // Distances become coefficients or gradients of scores.
  template <bool kOfScores>
  ATTN_DEVICE void weigh(int h, int first_query, int row, int column, bool all,
                         const Tile<16>& products, Tile<16>& coefficients,
                         Tile<16>& weights) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float4 lse = load4(columns_.lse + column + 4 * t);
    const float4 delta = load4(columns_.delta + column + 4 * t);
    const float lses[4] = {lse.x, lse.y, lse.z, lse.w};
    const float deltas[4] = {delta.x, delta.y, delta.z, delta.w};
    ATTN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int query = column + 4 * t + j;
      const int begin = columns_.begin[query], end = columns_.end[query];
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int n = first_key_ + row + 4 * g + i, c = i % 2 * 2 + j % 2;
        float& coefficient = coefficients.at[i / 2][j / 2][c];
        const float distance = coefficient * factor_.down;
        coefficient = 0.0f;
        if (all || (n >= begin && n < end)) {
          const Pair pair = pair_of<T, kExtras>(p_, distance, products.at[i / 2][j / 2][c], lses[j],
                                                deltas[j], b_, h, first_query + query, n);
          coefficient = kOfScores ? pair.grad : pair.grad * pair.slope;
          weights.at[i / 2][j / 2][c] = pair.weight;
        }
      }
    }
  }

  ATTN_DEVICE void store_largest(const Tile<16>& coefficients) {
    float largest = 0.0f;
    ATTN_UNROLL
    for (int e = 0; e < 16; ++e) {
      largest = fmaxf(largest, fabsf(coefficients.at[e / 8][e / 4 % 2][e % 4]));
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) memory_[Memory::kLargest + warp()] = float_bits(largest);
  }

  // 16 bits: the power of two that brings the tile's largest coefficient below 2^15.
  ATTN_DEVICE void find_factor(float& up, float& down) const {
    if constexpr (sizeof(T) == 2) {
      uint32_t largest = 0;
      ATTN_UNROLL
      for (int i = 0; i < kTileWarps; ++i) {
        const uint32_t of_warp = memory_[Memory::kLargest + i];
        largest = of_warp > largest ? of_warp : largest;
      }
      int shift = 14 - (static_cast<int>(largest >> 23) - 127);
      shift = shift < 126 ? shift : 126;
      up = bits_float(static_cast<uint32_t>(127 + shift) << 23);
      down = bits_float(static_cast<uint32_t>(127 - shift) << 23);
    }
  }

  // Warps of one slice of widths take turns at the queries, so that each sum has one writer.
  ATTN_DEVICE void sweep(float down) {
    constexpr int kChunk = P::kQueries / P::kKeySlices;
    const int keys = warp() % P::kKeySlices * 16, slice = warp() / P::kKeySlices * P::kSlice;
    const int word = slice / P::kPart;
    const bool used = slice < p_.D;
    float* query_sums = reinterpret_cast<float*>(memory_ + Memory::kRows) + word * P::kQueryPitch;
    Sweep<T, P> sums(memory_ + word * P::kKeyPitch + keys);
#pragma unroll 1
    for (int turn = 0; turn < P::kKeySlices; ++turn) {
      const int first = (warp() + turn) % P::kKeySlices * kChunk;
#pragma unroll 1
      for (int m = first; used && m < first + kChunk; m += 4) {
        float of_queries[P::kSums][4] = {};
        sums.four_queries(memory_ + Memory::kQuery + word * P::kQueryPitch + m,
                          memory_ + Memory::kPlanes + keys * P::kQueryPitch + m, of_queries);
        sums.flush(of_queries, down, turn == 0, query_sums + m, P::kQueryPitch);
      }
      __syncthreads();
    }
    if (used) {
      sums.flush_keys(
          down, reinterpret_cast<float*>(memory_ + Memory::kKeySums) + word * P::kKeyPitch + keys);
    }
  }

  // The tile's gradient of its queries joins that of the key tiles before; the last one stores it.
  ATTN_DEVICE void add_queries(int h, int tile, int rank, bool last) {
    constexpr int kGroups = P::kQueries / 4 * (kWidth / 8) / P::kWarps;
    const int group = p_.H / p_.Hk, lane = threadIdx.x % 32;
    const int64_t head = int64_t{b_} * p_.H + h;
    int* flag = g_.flags + head * ((p_.M + P::kQueries - 1) / P::kQueries) + tile;
    if (rank > 0 && threadIdx.x == 0) {
      while (load_acquire(flag) < rank) {
      }
    }
    __syncthreads();
    const int first = tile * P::kQueries;
    float* sums = g_.query_sums + ((head - int64_t{g_.first_head} * group) * p_.M + first) * p_.D;
    T* out = static_cast<T*>(g_.query) + (head * p_.M + first) * p_.D;
    const float* own = reinterpret_cast<const float*>(memory_ + Memory::kRows);
#pragma unroll 1
    for (int k = 0; k < kGroups; k += 4) {
      float before[4];
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int of = (k + i) * P::kWarps + warp();
        const int m = of / (kWidth / 8) * 4 + lane / 8, d = of % (kWidth / 8) * 8 + lane % 8;
        const bool exists = first + m < p_.M && d < p_.D;
        before[i] = rank > 0 && exists ? sums[m * p_.D + d] : 0.0f;
      }
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int of = (k + i) * P::kWarps + warp();
        const int m = of / (kWidth / 8) * 4 + lane / 8, d = of % (kWidth / 8) * 8 + lane % 8;
        if (first + m >= p_.M || d >= p_.D) continue;
        const float sum = before[i] + own[P::row_of(d) * P::kQueryPitch + m];
        if (last) {
          out[m * p_.D + d] = from_float<T>(sum);
        } else {
          sums[m * p_.D + d] = sum;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) store_release(flag, rank + 1);
  }

  ATTN_DEVICE void store_keys(T* out) const {
    const float* sums = reinterpret_cast<const float*>(memory_ + Memory::kKeySums);
    out += ((int64_t{b_} * p_.Hk + hk_) * p_.N + first_key_) * p_.D;
    const int keys = p_.N - first_key_ < P::kKeys ? p_.N - first_key_ : P::kKeys;
    for (int i = threadIdx.x; i < keys * p_.D; i += P::kThreads) {
      out[i] = from_float<T>(-sums[P::row_of(i % p_.D) * P::kKeyPitch + i / p_.D]);
    }
  }

  ATTN_DEVICE void store_values(T* out) const {
    const float* sums = reinterpret_cast<const float*>(memory_ + Memory::kValueSums);
    out += ((int64_t{b_} * p_.Hk + hk_) * p_.N + first_key_) * p_.E;
    const int keys = p_.N - first_key_ < P::kKeys ? p_.N - first_key_ : P::kKeys;
    for (int i = threadIdx.x; i < keys * p_.E; i += P::kThreads) {
      out[i] = from_float<T>(sums[i / p_.E * Memory::kValuePitch + i % p_.E]);
    }
  }

  const Problem& p_;
  const Gradients& g_;
  uint32_t* memory_;
  Columns<P> columns_;
  int b_, hk_, tile_, first_key_;
  Factor factor_;
};

template <class T, int kWidth, bool kExtras>
__global__ void __launch_bounds__(Plan<T, kWidth>::kThreads, kWidth <= 64 ? 2 : 1)
    backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Gradients g) {
  using Memory = BackwardMemory<T, Plan<T, kWidth>>;
  int* ticket = shared_memory<int>() + Memory::kTicket;
  if (threadIdx.x == 0) *ticket = atomic_add(g.ticket, 1);
  __syncthreads();
  const int taken = *ticket;
  KeyTile<T, kWidth, kExtras>(p, g, g.first_head + taken / g.key_tiles, taken % g.key_tiles).run();
}

}  // namespace attn::cuda::l1
