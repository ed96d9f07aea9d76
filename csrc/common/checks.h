// The wording of shape and dtype errors, the same as attn_ops/_checks.py has. The Python composites
// have validated their arguments; here only what would read or write out of bounds is checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "common/view.h"

namespace attn {

using OptionalTensor = std::optional<Tensor>;

std::string shape_text(const Tensor& tensor);

// -1 stands for any size, `or_one` allows a size of 1 in place of any other.
void check_shape(const char* op, const char* name, const Tensor& tensor,
                 std::initializer_list<int64_t> expected, bool or_one = false);

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected);

// What sums are accumulated in.
ScalarType compute_dtype(ScalarType dtype);

// A parameter of the compute dtype of `dtype`, or none.
void check_parameter(const char* op, const char* name, const OptionalTensor& tensor,
                     ScalarType dtype, std::initializer_list<int64_t> shape);

// query [B,H,M,D], key [B,Hk,N,D] and value [B,Hk,N,E] of one floating dtype, Hk a divisor of H.
void check_query_key_value(const char* op, const Tensor& query, const Tensor& key,
                           const Tensor& value);

}  // namespace attn
