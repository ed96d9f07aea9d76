"""Softmax over tiles of scores that are in units of BITS bits.

BITS = 1 lets `exp2` take a score as it is. BITS = log2(e), scores in nats, is for biases: only
there is the largest of a row of scores like -1e30 or finfo.min exactly what was added.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def running_maximum_step(score, maximum, BITS: tl.constexpr):
    """weights [R, C] relative to the new maximum [R], and the factor [R] for what came before."""
    new_maximum = tl.maximum(maximum, tl.max(score, 1))
    # Before any visible key the maximum is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2((score - shift[:, None]) * BITS)
    return weights, new_maximum, tl.exp2((maximum - shift) * BITS)


@triton.jit
def log_sum(total, shift, BITS: tl.constexpr):
    """lse [R] in nats, of sums of weights that are relative to `shift`; -inf where nothing was."""
    lse = shift * (BITS * LN_2) + tl.log2(tl.where(total == 0.0, 1.0, total)) * LN_2
    return tl.where(total == 0.0, float("-inf"), lse)


@triton.jit
def log_add(lse, sink):
    """log(exp(lse) + exp(sink)), -inf where both are."""
    top = tl.maximum(lse, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return shift + tl.log(tl.exp(lse - shift) + tl.exp(sink - shift))


@triton.jit
def probabilities(score, lse, BITS: tl.constexpr):
    """exp(score - lse), lse in the unit of the scores and +inf where the row sees nothing."""
    # Rounding differs between the passes: with huge scores it could reach above zero.
    return tl.exp2(tl.minimum(score - lse, 0.0) * BITS)
