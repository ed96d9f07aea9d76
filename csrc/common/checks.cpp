#include "common/checks.h"

#include <torch/csrc/stable/library.h>

#include <sstream>

namespace attn {

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) text << (i > 0 ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

namespace {

std::string expected_text(std::initializer_list<int64_t> expected) {
  std::ostringstream text;
  const char* comma = "";
  for (const int64_t size : expected) {
    text << comma;
    if (size < 0) {
      text << "any";
    } else {
      text << size;
    }
    comma = ", ";
  }
  return text.str();
}

}  // namespace

void check_shape(const char* op, const char* name, const Tensor& tensor,
                 std::initializer_list<int64_t> expected, bool or_one) {
  const auto sizes = tensor.sizes();
  bool fits = sizes.size() == expected.size();
  size_t dim = 0;
  for (const int64_t size : expected) {
    fits = fits && (size < 0 || sizes[dim] == size || (or_one && sizes[dim] == 1));
    ++dim;
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must have shape (", expected_text(expected),
                  or_one ? "), 1 where broadcast, got " : "), got ", shape_text(tensor));
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, op, ": ", name, " must have dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_parameter(const char* op, const char* name, const OptionalTensor& tensor,
                     ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return;
  check_dtype(op, name, *tensor, compute_dtype(dtype));
  check_shape(op, name, *tensor, shape);
}

void check_query_key_value(const char* op, const Tensor& query, const Tensor& key,
                           const Tensor& value) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  op, ": query must be float64, float32, bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
  check_dtype(op, "key", key, dtype);
  check_dtype(op, "value", value, dtype);
  check_shape(op, "query", query, {-1, -1, -1, -1});
  check_shape(op, "key", key, {query.size(0), -1, -1, query.size(3)});
  check_shape(op, "value", value, {query.size(0), key.size(1), key.size(2), -1});
  const int64_t heads = query.size(1);
  STD_TORCH_CHECK(key.size(1) > 0 ? heads % key.size(1) == 0 : heads == 0, op,
                  ": key must have a number of heads that divides H=", heads, ", got ",
                  shape_text(key));
  for (const Tensor* tensor : {&query, &value}) {
    const int64_t width = tensor->size(3);
    STD_TORCH_CHECK(width >= 1 && width <= 256, op, ": ", tensor == &query ? "query" : "value",
                    " must have a width of 1 to 256, got ", shape_text(*tensor));
  }
}

}  // namespace attn
