// The backward of L1 attention: a block owns a tile of keys of one batch and key/value head, with
// their gradients in shared memory, and goes over the queries of the group's heads that see them.
//
// The gradient of a tile of queries is a sum over blocks, by atomic additions, or (`ordered`, for
// torch.use_deterministic_algorithms) in the order of the key tiles: block j adds after the flag of
// the query tile says that those before it have. Blocks take their tile from a counter, so that
// whoever is waited for has started earlier. The waiting is a quarter of the time.
#pragma once

#include "l1/cuda/backward_reach.cuh"
#include "l1/cuda/backward_tile.cuh"

namespace attn::cuda::l1 {

// `kGeneral`: anything but -(scale * distance) in the scores, gradients of scores given, or rows
// that do not start at multiples of 16 bytes.
template <class T, int kWidth, bool kGeneral>
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
        columns_(memory_ + Memory::kColumns),
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
      // From the last on: of a causal problem that is the one all blocks see, so that they follow
      // each other at the distance of an addition; from the first on each would wait for its
      // predecessor's whole tile.
#pragma unroll 1
      for (int i = tiles.end - 1; i >= tiles.begin; --i) {
        const Reach reach = reach_of<P>(p_, b_, i * P::kQueries);
        if (tile_ >= reach.first && tile_ <= reach.last) query_tile(h, i, reach);
      }
    }
    copies_wait<0>();
    __syncthreads();
    if (g_.key) store_keys(static_cast<T*>(g_.key));
    if (g_.value) {
      T* out = static_cast<T*>(g_.value) + ((int64_t{b_} * p_.Hk + hk_) * p_.N + first_key_) * p_.E;
      value_sums_.store(reinterpret_cast<const float*>(memory_ + Memory::kValueSums),
                        p_.N - first_key_, p_.E, out);
    }
  }

  // Adds the gradients of the scores of a tile, without those of other queries and keys.
  ATTN_DEVICE void add_score_grads(int h, int i, Tile<16>& sums) {
    const Reach reach = reach_of<P>(p_, b_, i * P::kQueries);
    if (tile_ < reach.first || tile_ > reach.last) return;
    stage_keys();
    stage_queries(h, i * P::kQueries);
    __syncthreads();
    Tile<16> grads = {};
    if (warp() < kTileWarps) pairs<true>(h, i * P::kQueries, grads);
    ATTN_UNROLL
    for (int e = 0; e < 16; ++e)
      sums.at[e / 8][e / 4 % 2][e % 4] += grads.at[e / 8][e / 4 % 2][e % 4];
    __syncthreads();
  }

 private:
  ATTN_DEVICE bool scores_given() const { return kGeneral && g_.grad_scores.data; }
  static ATTN_DEVICE int warp() { return threadIdx.x / 32; }

  ATTN_DEVICE Source<T> source(const Array& of, int head, int first, int count, int width) const {
    return {of.at<T>(b_, head),     of.stride[2], of.stride[3], first, count, width,
            !kGeneral || g_.aligned};
  }

  ATTN_DEVICE Source<T> values(int row) const {
    return source(p_.value, hk_, first_key_ + row, p_.N, p_.E);
  }

  ATTN_DEVICE void stage_keys() {
    stage_columns<T, P, P::kKeys, P::kKeyPitch>(source(p_.key, hk_, first_key_, p_.N, p_.D),
                                                factor_.up, memory_);
    if (Memory::kHoldsValues && !scores_given()) {
      stage_rows<T, P, P::kKeys>(values(0), padded_words<T>(p_.E), Memory::kRowPitch, value_place,
                                 memory_ + Memory::kValues);
    }
    copies_commit();
  }

  ATTN_DEVICE void query_tile(int h, int i, const Reach& reach) {
    const int first_query = i * P::kQueries;
    stage_queries(h, first_query);
    __syncthreads();
    Tile<16> coefficients = {};
    if (warp() < kTileWarps) pairs<false>(h, first_query, coefficients);
    __syncthreads();
    float up = 1.0f, down = 1.0f;
    find_factor(up, down);
    if (!scores_given() && g_.value) {
      value_sums_.add(memory_ + Memory::kWeights, memory_ + Memory::kRows, p_.E,
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
    if (!scores_given()) {
      stage_rows<T, P, P::kQueries>(
          source(g_.grad_out, h, first_query, p_.M, p_.E), padded_words<T>(p_.E), Memory::kRowPitch,
          [](int row) { return row; }, memory_ + Memory::kRows);
    }
    copies_commit();
    stage_columns<T, P, P::kQueries, P::kQueryPitch>(source(p_.query, h, first_query, p_.M, p_.D),
                                                     factor_.up, memory_ + Memory::kQuery);
    if (threadIdx.x < P::kQueries) {
      const int r = threadIdx.x, m = first_query + r;
      const bool exists = m < p_.M;
      const Interval seen = exists ? visible_keys(p_, b_, m) : Interval{0, 0};
      columns_.begin[r] = seen.begin;
      columns_.end[r] = seen.end;
      const int64_t row = (int64_t{b_} * p_.H + h) * p_.M + m;
      const bool given = exists && !scores_given();
      columns_.lse[r] = float_bits(given ? g_.lse[row] : 0.0f);
      columns_.delta[r] = float_bits(given ? g_.delta[row] : 0.0f);
    }
    copies_wait<0>();
  }

  // The thread's coefficients, or the gradients of its scores; its weights and the warp's largest
  // coefficient go to memory.
  template <bool kOfScores>
  ATTN_DEVICE void pairs(int h, int first_query, Tile<16>& coefficients) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int row = warp() % kTileRows * 32, column = warp() / kTileRows * 16;
    Tile<16> weights = {};
    if (scores_given()) {
      given_pairs(h, first_query + column, first_key_ + row, coefficients);
    } else {
      Tile<16> products = {};
      add_distances<16, P::kKeyPitch, P::kQueryPitch>(
          memory_ + row + 4 * g, memory_ + Memory::kQuery + column + 4 * t, padded_words<T>(p_.D),
          coefficients, SignKind<T>{});
      const ValueRows<T, P> value(memory_ + Memory::kValues + row * Memory::kRowPitch, values(row));
      multiply_grad_out<T, P>(value, memory_ + Memory::kRows + column * Memory::kRowPitch,
                              padded_words<T>(p_.E), products);
      weigh<kOfScores>(h, first_query, row, column, products, coefficients, weights);
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
  ATTN_DEVICE void weigh(int h, int first_query, int row, int column, const Tile<16>& products,
                         Tile<16>& coefficients, Tile<16>& weights) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float lses[4], deltas[4];
    load_four(lses, columns_.lse + column + 4 * t);
    load_four(deltas, columns_.delta + column + 4 * t);
    const uint4 begin = load4(columns_.begin + column + 4 * t);
    const uint4 end = load4(columns_.end + column + 4 * t);
    const int begins[4] = {int(begin.x), int(begin.y), int(begin.z), int(begin.w)};
    const int ends[4] = {int(end.x), int(end.y), int(end.z), int(end.w)};
    ATTN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int query = column + 4 * t + j;
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int n = first_key_ + row + 4 * g + i, c = i % 2 * 2 + j % 2;
        const bool visible = n >= begins[j] && n < ends[j];
        float& coefficient = coefficients.at[i / 2][j / 2][c];
        float added = 0.0f;
        if (kGeneral && visible) added = added_to_score<T>(p_, b_, h, first_query + query, n);
        const Pair pair = pair_of<kGeneral>(p_, coefficient * factor_.down, added,
                                            products.at[i / 2][j / 2][c], lses[j], deltas[j]);
        const float wanted = kOfScores ? pair.grad : pair.grad * pair.slope;
        coefficient = visible ? wanted : 0.0f;
        weights.at[i / 2][j / 2][c] = visible ? pair.weight : 0.0f;
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

  // The tile's gradient of its queries joins that of other key tiles, in their order if that is
  // wanted: the one after `rank` others waits for them, the last one stores the result.
  ATTN_DEVICE void add_queries(int h, int tile, int rank, bool last) {
    const int group = p_.H / p_.Hk, first = tile * P::kQueries;
    const int64_t head = int64_t{b_} * p_.H + h;
    float* sums = g_.query_sums + ((head - int64_t{g_.first_head} * group) * p_.M + first) * p_.D;
    const int queries = p_.M - first < P::kQueries ? p_.M - first : P::kQueries;
    if (!g_.ordered) {
      add_tile<false>(queries, true, sums, nullptr);
      __syncthreads();
      return;
    }
    int* flag = g_.flags + head * ((p_.M + P::kQueries - 1) / P::kQueries) + tile;
    if (rank > 0 && threadIdx.x == 0) {
      while (load_acquire(flag) < rank) {
      }
    }
    __syncthreads();
    T* out = static_cast<T*>(g_.query) + (head * p_.M + first) * p_.D;
    add_tile<true>(queries, rank > 0, sums, last ? out : nullptr);
    __syncthreads();
    if (threadIdx.x == 0) store_release(flag, rank + 1);
  }

  // `sums` (if there are any yet) plus this tile's gradient of queries, to `out`, or if it is null
  // to `sums`, by atomic additions if others add meanwhile.
  template <bool kAlone>
  ATTN_DEVICE void add_tile(int queries, bool add, float* sums, T* out) const {
    if (!kGeneral || p_.D % 4 == 0) {
      add_fours<kAlone>(queries, add, sums, out);
    } else {
      add_ones<kAlone>(queries, add, sums, out);
    }
  }

  // Four widths at a time: a warp has 16 queries x 8 widths, sectors and no bank twice.
  template <bool kAlone>
  ATTN_DEVICE void add_fours(int queries, bool add, float* sums, T* out) const {
    constexpr int kRows = P::kQueries / 16, kGroups = kRows * (kWidth / 8) / P::kWarps;
    const int lane = threadIdx.x % 32;
    const float* own = reinterpret_cast<const float*>(memory_ + Memory::kRows);
#pragma unroll 1
    for (int k = 0; k < kGroups; k += 4) {
      float4 sum[4];
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int of = (k + i) * P::kWarps + warp();
        const int m = of % kRows * 16 + lane % 16, d = of / kRows * 8 + lane / 16 * 4;
        sum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (kAlone && add && m < queries && d < p_.D) sum[i] = load4(sums + m * p_.D + d);
      }
      ATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int of = (k + i) * P::kWarps + warp();
        const int m = of % kRows * 16 + lane % 16, d = of / kRows * 8 + lane / 16 * 4;
        if (m >= queries || d >= p_.D) continue;
        sum[i].x += own[P::row_of(d) * P::kQueryPitch + m];
        sum[i].y += own[P::row_of(d + 1) * P::kQueryPitch + m];
        sum[i].z += own[P::row_of(d + 2) * P::kQueryPitch + m];
        sum[i].w += own[P::row_of(d + 3) * P::kQueryPitch + m];
        if (!kAlone) {
          atomic_add4(sums + m * p_.D + d, sum[i]);
        } else if (out == nullptr) {
          store4(sums + m * p_.D + d, sum[i]);
        } else {
          store_four(out + m * p_.D + d, sum[i]);
        }
      }
    }
  }

  static ATTN_DEVICE void store_four(T* to, float4 x) {
    if constexpr (sizeof(T) == 4) {
      store4(to, x);
    } else {
      store2(reinterpret_cast<uint32_t*>(to), pack<T>(x.x, x.y), pack<T>(x.z, x.w));
    }
  }

  template <bool kAlone>
  ATTN_DEVICE void add_ones(int queries, bool add, float* sums, T* out) const {
    const float* own = reinterpret_cast<const float*>(memory_ + Memory::kRows);
#pragma unroll 1
    for (int i = threadIdx.x; i < queries * p_.D; i += P::kThreads) {
      const float own_sum = own[P::row_of(i % p_.D) * P::kQueryPitch + i / p_.D];
      if (!kAlone) {
        atomic_add(sums + i, own_sum);
        continue;
      }
      const float sum = (add ? sums[i] : 0.0f) + own_sum;
      if (out == nullptr) {
        sums[i] = sum;
      } else {
        out[i] = from_float<T>(sum);
      }
    }
  }

  ATTN_DEVICE void store_keys(T* out) const {
    const float* sums = reinterpret_cast<const float*>(memory_ + Memory::kKeySums);
    out += ((int64_t{b_} * p_.Hk + hk_) * p_.N + first_key_) * p_.D;
    const int keys = p_.N - first_key_ < P::kKeys ? p_.N - first_key_ : P::kKeys;
    for (int i = threadIdx.x; i < keys * p_.D; i += P::kThreads) {
      out[i] = from_float<T>(-sums[P::row_of(i % p_.D) * P::kKeyPitch + i / p_.D]);
    }
  }

  const Problem& p_;
  const Gradients& g_;
  uint32_t* memory_;
  Columns<P> columns_;
  int b_, hk_, tile_, first_key_;
  Factor factor_;
  ValueSums<T, P> value_sums_;
};

template <class T, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(Plan<T, kWidth>::kThreads, Plan<T, kWidth>::kBlocksOfSM)
    backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Gradients g) {
  using Memory = BackwardMemory<T, Plan<T, kWidth>>;
  int* ticket = shared_memory<int>() + Memory::kTicket;
  if (threadIdx.x == 0) *ticket = atomic_add(g.ticket, 1);
  __syncthreads();
  const int taken = *ticket;
  KeyTile<T, kWidth, kGeneral>(p, g, g.first_head + taken / g.key_tiles, taken % g.key_tiles).run();
}

}  // namespace attn::cuda::l1
