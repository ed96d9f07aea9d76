"""Features of queries and keys, made in registers, and the gradients through them."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.linear.triton_core import load_tokens, product


@triton.jit
def elementwise(x, FEATURES: tl.constexpr):
    """phi(x) of the maps that have as many features as inputs."""
    if FEATURES == "relu":
        return tl.maximum(x, 0.0)
    elif FEATURES == "elu_plus_one":
        return tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        small = tl.exp(tl.minimum(x, 20.0))
        # Where 1 + small rounds, its logarithm is scaled back: log(1 + y) = y log(u) / (u - 1).
        above = (1.0 + small) - 1.0
        log = small * (tl.log(1.0 + small) / tl.where(above == 0.0, 1.0, above))
        return tl.where(x > 20.0, x, tl.where(above == 0.0, small, log))


@triton.jit
def slope(x, FEATURES: tl.constexpr):
    """The derivative of `elementwise`."""
    if FEATURES == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif FEATURES == "elu_plus_one":
        return tl.exp(tl.minimum(x, 0.0))
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def taylor_pairs(begin, D: tl.constexpr, PF: tl.constexpr):
    """first, second [PF]: from `begin` on, a feature of x = (input, 1) is x[first] * x[second].

    Beyond the last feature they are no column of x; `taylor_weights` has its weight.
    """
    f = begin + tl.arange(0, PF)
    n: tl.constexpr = D + 1
    first = tl.zeros([PF], tl.int32)
    for i in tl.static_range(1, n + 1):
        first += tl.where(f >= i * n - i * (i - 1) // 2, 1, 0)
    second = f - (first * n - first * (first - 1) // 2) + first
    # So far 0 is the one, which stands behind the inputs.
    first, second = tl.where(first > 0, first - 1, D), tl.where(second > 0, second - 1, D)
    last: tl.constexpr = n * (n + 1) // 2
    return tl.where(f < last, first, -1), tl.where(f < last, second, -1)


@triton.jit
def taylor_weights(begin, D: tl.constexpr, PF: tl.constexpr):
    """[PF]: what the products of `taylor_pairs` are multiplied by; ones where there are none."""
    first, second = taylor_pairs(begin, D, PF)
    quarter: tl.constexpr = D**-0.25
    weight = tl.where(first != D, quarter, 1.0) * tl.where(second != D, quarter, 1.0)
    weight = tl.where((first == second) & (first != D), weight * 0.5**0.5, weight)
    return tl.where(first < 0, 1.0, weight)


@triton.jit
def one_hot(choice, PD: tl.constexpr, OPERAND: tl.constexpr):
    """[PD, PF]: x [C, PD] times it are the columns `choice` [PF] of x, exactly."""
    return (tl.arange(0, PD)[:, None] == choice[None, :]).to(OPERAND)


@triton.jit
def load_inputs(
    view, batch, head, first, seen, column, FEATURES: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, PD: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """[C, PD] of what features are made of: columns, for taylor with a one behind the last."""
    x = load_tokens(view, batch, head, first, seen, column, D, C, PD, HIDES)
    if FEATURES != "taylor":
        return x
    else:
        ones = tl.full([C], 1.0, x.dtype)
        if seen is not None:
            ones = seen.to(x.dtype)
        return tl.where((tl.arange(0, PD) == D)[None, :], ones[:, None], x)


@triton.jit
def features(
    x, seen, column, block: tl.constexpr, FEATURES: tl.constexpr, D: tl.constexpr,
    PD: tl.constexpr, PF: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of phi [C, PF] of `load_inputs`, zero where not seen and beyond F.

    taylor's come without their weights, see `read`.
    """
    if FEATURES == "identity":
        return x
    elif FEATURES == "taylor":
        first, second = taylor_pairs(block * PF, D, PF)
        tile = tl.dot(x.to(OPERAND), one_hot(first, PD, OPERAND), input_precision=PRECISION)
        tile *= tl.dot(x.to(OPERAND), one_hot(second, PD, OPERAND), input_precision=PRECISION)
        return tile.to(OPERAND)
    else:
        phi = elementwise(x.to(tl.float32), FEATURES)
        if FEATURES != "relu":  # the others are not zero at zero
            phi = tl.where((column + tl.arange(0, PD) < D)[None, :], phi, 0.0)
            if seen is not None:
                phi = tl.where(seen[:, None], phi, 0.0)
        return phi.to(OPERAND)


@triton.jit
def through_features(
    acc, grad, x, begin, FEATURES: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
    PF: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [C, PD] plus the gradient of `load_inputs` from that of the features from `begin` on."""
    if FEATURES == "identity":
        return acc + grad
    elif FEATURES == "taylor":
        first, second = taylor_pairs(begin, D, PF)
        to_first = one_hot(first, PD, OPERAND)
        to_second = one_hot(second, PD, OPERAND)
        other = tl.dot(x.to(OPERAND), to_second, input_precision=PRECISION)
        acc += product(grad * other, tl.trans(to_first), OPERAND, PRECISION)
        other = tl.dot(x.to(OPERAND), to_first, input_precision=PRECISION)
        return acc + product(grad * other, tl.trans(to_second), OPERAND, PRECISION)
    else:
        return acc + grad * slope(x.to(tl.float32), FEATURES)


@triton.jit
def half_of_taylor(x, y, D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """s = x·y / sqrt(D) of every pair, each with a one behind; taylor's products are 1+s+s²/2."""
    return (product(x, tl.trans(y), OPERAND, PRECISION) - 1.0) * (D**-0.5)


@triton.jit
def pair_scores(
    x, y, phi_x, phi_y, seen, ROWS_SEEN: tl.constexpr, FEATURES: tl.constexpr, D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(x)·phi(y) of every pair of two chunks, zero where a key is not seen.

    Keys are the columns, or the rows. taylor takes it from the inputs: they are fewer.
    """
    if FEATURES != "taylor":
        return product(phi_x, tl.trans(phi_y), OPERAND, PRECISION)
    else:
        s = half_of_taylor(x, y, D, OPERAND, PRECISION)
        score = 1.0 + s + 0.5 * s * s
        if seen is not None:
            if ROWS_SEEN:
                score = tl.where(seen[:, None], score, 0.0)
            else:
                score = tl.where(seen[None, :], score, 0.0)
        return score


@triton.jit
def through_pairs(
    grad, x, y, phi_y, FEATURES: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of x [C, PD] from that of the pairs' scores; y are the keys or queries of a pair."""
    if FEATURES == "taylor":
        s = half_of_taylor(x, y, D, OPERAND, PRECISION)
        return product(grad * ((1.0 + s) * (D**-0.5)), y, OPERAND, PRECISION)
    else:
        grad_phi = product(grad, phi_y, OPERAND, PRECISION)
        if FEATURES != "identity":
            grad_phi *= slope(x.to(tl.float32), FEATURES)
        return grad_phi
