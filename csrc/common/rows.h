// Rows of tensors [B, heads, length, width] as operands of products, and small parameters.
#pragma once

namespace attn::ATTN_ISA {

// A parameter [rows, columns] of any strides as a contiguous array of the compute type; all
// `absent` where the optional tensor is not given.
template <class T>
std::vector<T> read_parameter(const View& v, int64_t rows, int64_t columns, T absent) {
  std::vector<T> values(rows * columns, absent);
  if (!v) return values;
  for (int64_t row = 0; row < rows; ++row) {
    load_row(values.data() + row * columns, v, row * v.stride[0], v.stride[1], columns);
  }
  return values;
}

// Row (batch, head, position) of query, key, value or grad_out, padded with zeros to a panel.
template <class T>
ATTN_INLINE void load_padded(T* target, const View& v, int64_t batch, int64_t head,
                             int64_t position, int64_t width) {
  load_row(target, v, batch * v.stride[0] + head * v.stride[1] + position * v.stride[2],
           v.stride[3], width);
  for (int64_t d = width; d < round_up(width, kPanel<T>); ++d) target[d] = 0;
}

}  // namespace attn::ATTN_ISA
