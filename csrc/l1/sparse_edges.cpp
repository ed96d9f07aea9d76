// attn::_l1_edges on the CPU: edges sorted by (query, key) and by (key, query).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace attn::l1::sparse {
namespace {

constexpr const char* kOp = "l1_sparse";

int64_t* data(const Tensor& tensor) {
  return static_cast<int64_t*>(tensor.data_ptr());
}

// The first edge out of range: in Python a ValueError, which is what this exception becomes.
[[noreturn]] void refuse(int64_t edge, int64_t query, int64_t key, int64_t num_queries,
                         int64_t num_keys) {
  std::ostringstream text;
  text << kOp << ": edges must be queries from 0 to " << num_queries - 1 << " and keys from 0 to "
       << num_keys - 1 << ", got (" << query << ", " << key << ") in row " << edge;
  throw std::invalid_argument(text.str());
}

template <class Index>
void read(const Tensor& edges, std::vector<int64_t>& queries, std::vector<int64_t>& keys,
          int64_t num_queries, int64_t num_keys) {
  const Index* source = static_cast<const Index*>(edges.data_ptr());
  const int64_t edge_stride = edges.stride(0), end_stride = edges.stride(1);
  for (size_t i = 0; i < queries.size(); ++i) {
    const int64_t edge = static_cast<int64_t>(i);
    const int64_t query = source[edge * edge_stride], key = source[edge * edge_stride + end_stride];
    if (query < 0 || query >= num_queries || key < 0 || key >= num_keys) {
      refuse(edge, query, key, num_queries, num_keys);
    }
    queries[i] = query;
    keys[i] = key;
  }
}

// start[i] = how many of the numbers are below i.
void count(const int64_t* numbers, int64_t length, int64_t* start, int64_t limit) {
  std::fill(start, start + limit + 1, 0);
  for (int64_t i = 0; i < length; ++i) ++start[numbers[i] + 1];
  for (int64_t i = 0; i < limit; ++i) start[i + 1] += start[i];
}

// move(i, place) for a stable sort of 0 .. length - 1 by the numbers.
template <class Move>
void sort_by(const int64_t* numbers, int64_t length, const int64_t* start, int64_t limit,
             const Move& move) {
  std::vector<int64_t> next(start, start + limit);
  for (int64_t i = 0; i < length; ++i) move(i, next[numbers[i]]++);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five sort_edges(const Tensor& edges, int64_t num_queries, int64_t num_keys) {
  check_shape(kOp, "edges", edges, {-1, 2});
  const bool wide = edges.scalar_type() == ScalarType::Long;
  if (!wide) check_dtype(kOp, "edges", edges, ScalarType::Int);
  const int64_t length = edges.size(0);
  std::vector<int64_t> queries(length), keys(length), by_key(length), key_queries(length);
  (wide ? read<int64_t> : read<int32_t>)(edges, queries, keys, num_queries, num_keys);

  const auto list = [&](int64_t size) { return allocate(edges, {size}, ScalarType::Long); };
  Five result{list(num_queries + 1), list(length), list(num_keys + 1), list(length), list(length)};
  int64_t* const row_start = data(std::get<0>(result));
  int64_t* const row_keys = data(std::get<1>(result));
  int64_t* const col_start = data(std::get<2>(result));
  int64_t* const col_queries = data(std::get<3>(result));
  int64_t* const col_edges = data(std::get<4>(result));
  count(queries.data(), length, row_start, num_queries);
  count(keys.data(), length, col_start, num_keys);
  // First by key, then by query, keeping the order of the keys; then by key once more.
  sort_by(keys.data(), length, col_start, num_keys, [&](int64_t i, int64_t place) {
    by_key[place] = keys[i];
    key_queries[place] = queries[i];
  });
  sort_by(key_queries.data(), length, row_start, num_queries, [&](int64_t i, int64_t place) {
    row_keys[place] = by_key[i];
    queries[place] = key_queries[i];
  });
  sort_by(row_keys, length, col_start, num_keys, [&](int64_t i, int64_t place) {
    col_queries[place] = queries[i];
    col_edges[place] = i;
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(attn, CPU, m) {
  m.impl("_l1_edges", TORCH_BOX(&sort_edges));
}

}  // namespace
}  // namespace attn::l1::sparse
