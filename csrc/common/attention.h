// One call of a softmax attention as its kernels see it: what its rooms have in common.
//
// B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, E value width.
#pragma once

#include "common/checks.h"
#include "common/view.h"
#include "common/visibility.h"

namespace attn {

struct AttentionProblem {
  int64_t B, H, Hk, M, N, D, E;
  Visibility visible;
  View query, key, value;
  View mask;           // bool [B,H,M,N], broadcast by strides
  View bias;           // [B,H,M,N], broadcast by strides
  View relative_bias;  // [H,M+N-1]
  View sink;           // [H]
  View out, lse;       // [B,H,M,E], [B,H,M]

  // Anything that is added to scores, -inf for what an element mask hides.
  bool has_extras() const { return mask || bias || relative_bias; }
  int64_t multiplications() const { return B * H * M * N * (D + E); }
};

// What the backward reads and writes besides. An absent gradient is not wanted.
struct AttentionGradients {
  View grad_out, grad_lse;
  View query, key, value;
  View bias;  // compute dtype, zeroed, contiguous, stride 0 where bias is broadcast
  int64_t bias_size = 0;
  // Whether the gradient of bias is summed over a dimension.
  bool sum_over_batch = false, sum_over_heads = false, sum_over_queries = false;
  View relative_bias, sink;  // zeroed
};

struct AttentionArguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const OptionalTensor& mask;
  const OptionalTensor& bias;
  const OptionalTensor& relative_bias;
  const OptionalTensor& sink;
  const OptionalTensor& start;
  const OptionalTensor& stop;
  int64_t left, right;
};

// Checks the arguments and describes them in the problem.
void read_arguments(const char* op, const AttentionArguments& arguments, AttentionProblem& problem);

// What the forward returned and what comes back for it; out and lse contiguous.
struct AttentionOutputs {
  const Tensor& grad_out;
  const OptionalTensor& grad_lse;
  const Tensor& out;
  const Tensor& lse;
};

void read_outputs(const char* op, const AttentionOutputs& outputs, AttentionProblem& problem,
                  AttentionGradients& grads);

// The gradient of an input if it is wanted, else an empty tensor.
Tensor new_gradient(const Tensor& query, const OptionalTensor& input, bool wanted, View& target);

// The same for a parameter, whose gradient is summed over rows into zeros.
Tensor new_sum(const Tensor& query, const OptionalTensor& input, bool wanted, View& target);

// The gradient of bias is summed in the compute dtype.
Tensor new_bias_gradient(const Tensor& query, const OptionalTensor& bias, bool wanted,
                         AttentionGradients& grads);

}  // namespace attn
