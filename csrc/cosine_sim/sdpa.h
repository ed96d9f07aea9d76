// bfloat16 on machines with bfloat16 matrix instructions: the norm here, the rest in PyTorch's
// flash attention for the CPU, whose products run on those instructions (AMX) through oneDNN. The
// register tiles of this library widen to float32 and would be slower there.
#pragma once

#include "cosine_sim/problem.h"

namespace attn::cosine_sim {

// Whether this machine prefers PyTorch's attention for this problem, which must be one that it can
// express: no more than a causal mask, one key head per query head, equal widths.
bool prefers_sdpa(const Problem& p);

void sdpa_forward(const Problem& p, const Kernels& kernels, const Tensor& query, const Tensor& key,
                  const Tensor& value, Tensor& out, Tensor& lse);

// Writes the gradients of query, key and value that are wanted.
void sdpa_backward(const Problem& p, const Gradients& grads, const Kernels& kernels,
                   const Tensor& grad_out, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& out, const Tensor& lse);

}  // namespace attn::cosine_sim
