"""The one tolerance of all tests, derived from the dtype.

An op may be off the formula in float64 by at most twice what the formula itself is off when it runs
in the op's dtype, plus what rounding does to numbers of this size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Roundings that a sum accumulated in the compute dtype may add up to, in units of its eps.
ACCUMULATED = 16


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rounding:
    """What rounding acts on.

    dtype: of query, key and value.
    score: the largest |score|, which a relative error of the weights is proportional to.
    magnitudes: for each result the largest root of the sum of its squared terms.
    """

    dtype: torch.dtype
    score: float
    magnitudes: dict[str, float]

    def term(self, name: str) -> float:
        # A score s of two rounded unit vectors is off by about s * eps / 2, its exponential too.
        of_inputs = torch.finfo(self.dtype).eps * (1 + self.score / 2)
        of_sums = ACCUMULATED * torch.finfo(compute_dtype(self.dtype)).eps * (1 + self.score)
        if self.dtype == compute_dtype(self.dtype):
            of_inputs = 0.0
        if name == "lse":  # a logarithm: a relative error of its sum is an absolute one
            return of_inputs + of_sums * (1 + self.magnitudes[name])
        return (of_inputs + of_sums) * self.magnitudes[name]


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """The largest difference; infinities must be equal, and a NaN is an infinite error."""
    actual = actual.detach().to(torch.float64)
    error = torch.where(actual == truth, 0, (actual - truth).abs())
    error = error.nan_to_num(nan=torch.inf)
    return error.max().item() if error.numel() else 0.0


def assert_close(
    name: str, actual: Tensor, same_dtype: Tensor, truth: Tensor, rounding: Rounding
) -> None:
    """`actual` is as near to `truth` as its dtype allows.

    same_dtype: the formula in the dtype of the inputs; truth: the formula in float64.
    """
    assert truth.dtype == torch.float64
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    of_formula = largest_error(same_dtype, truth)
    if of_formula == torch.inf:
        of_formula = 0.0  # the formula overflowed in this dtype: that excuses nothing
    narrow, wide = torch.finfo(actual.dtype), torch.finfo(compute_dtype(actual.dtype))
    smallest = narrow.tiny * narrow.eps + wide.tiny  # below are no numbers, or they become zero
    # A sum of terms of one sign is rounded as the large number that it becomes, not as its terms.
    size = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
    tolerance = 2 * of_formula + rounding.term(name) + smallest + ACCUMULATED * wide.eps * size
    error = largest_error(actual, truth)
    assert error <= tolerance, (
        f"{name} ({actual.dtype}) is off by {error:.3g}, tolerance {tolerance:.3g} "
        f"(formula in this dtype {of_formula:.3g}, rounding {rounding.term(name):.3g}, "
        f"largest value {truth.abs().max().item():.3g})"
    )


def assert_tangent_close(
    name: str, actual: Tensor, same_dtype: Tensor, truth: Tensor, rounded_to: torch.dtype
) -> None:
    """The same of a tangent. rounded_to: the dtype of the narrowest numbers that it is made of."""
    size = max(1.0, truth[truth.isfinite()].abs().max().item())
    rounding = torch.finfo(rounded_to).eps + 256 * torch.finfo(compute_dtype(rounded_to)).eps
    tolerance = 2 * largest_error(same_dtype, truth) + rounding * size
    error = largest_error(actual, truth)
    assert error <= tolerance, f"{name} is off by {error:.3g}, tolerance {tolerance:.3g}"


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Two computations of one number in one dtype agree, up to roundings of numbers of about 1."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    expected = expected.detach().to(torch.float64)
    finite = expected[expected.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    # Derivatives of the third order lose four digits of sixteen; float32 is seen only in few steps.
    roundings = 1 << 14 if actual.dtype == torch.float64 else 1 << 8
    tolerance = roundings * torch.finfo(actual.dtype).eps * max(size, 1)
    error = largest_error(actual, expected)
    assert error <= tolerance, f"{name} is off by {error:.3g}, tolerance {tolerance:.3g}"
