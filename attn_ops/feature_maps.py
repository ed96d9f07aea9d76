"""Feature maps of linear attention, each a function of `[..., D]` that returns `[..., F]`.

`attn_ops.linear_attention(..., feature_map="taylor")` applies them inside of its kernels; as
functions they serve for comparison, and for features that are shared by several calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def identity(x: Tensor) -> Tensor:
    """`x` as it is: products `q·k` of any sign."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1`, elementwise: `x + 1` above zero, `exp(x)` below.

    Source: Katharopoulos et al., Transformers are RNNs, https://arxiv.org/abs/2006.16236
    """
    # Not elu(x) + 1, which is zero where exp(x) is smaller than the rounding of 1.
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`, elementwise; the derivative at zero is zero."""
    return F.relu(x)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, elementwise."""
    return F.softplus(x)


def taylor(x: Tensor) -> Tensor:
    """Second-order Taylor features of `exp(q·k / sqrt(D))`.

    With `u = x / D**(1/4)`: 1, then `u[i]`, then `u[i]**2 / sqrt(2)` and `u[i] u[j]` for i < j, in
    the order of the pairs (0,0), (0,1), ..., (1,1), ... Hence, with `s = q·k / sqrt(D)`,
    `taylor(q) · taylor(k) = 1 + s + s**2 / 2`, which is positive for every s.

    Args:
        x: `[..., D]`.

    Returns:
        `[..., 1 + D + D(D+1)/2]`, 153 features for D = 16.

    Source: Arora et al., Simple linear attention language models, https://arxiv.org/abs/2402.18668
    """
    width = x.shape[-1]
    u = x * width**-0.25
    first, second = torch.triu_indices(width, width, device=x.device)
    pairs = u[..., first] * u[..., second]
    # In x's dtype: torch.where of two numbers is float32, also beside float64.
    factor = (1 + (first == second).to(x.dtype)).rsqrt()
    return torch.cat([torch.ones_like(u[..., :1]), u, pairs * factor], -1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "elu_plus_one": elu_plus_one,
    "relu": relu,
    "softplus": softplus,
    "taylor": taylor,
}


def num_features(name: str, width: int) -> int:
    """F, the width of the features of inputs of this width."""
    return 1 + width + width * (width + 1) // 2 if name == "taylor" else width


def pullback(name: str, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x `[..., D]` from that of its features `[..., F]`, as a formula."""
    if name == "taylor":
        return _pullback_of_taylor(x, grad)
    slopes = {
        "identity": lambda: torch.ones_like(x),
        "elu_plus_one": lambda: torch.where(x > 0, 1, x.clamp_max(0).exp()),
        "relu": lambda: (x > 0).to(x.dtype),
        "softplus": lambda: x.sigmoid(),
    }
    return grad * slopes[name]()


def _pullback_of_taylor(x: Tensor, grad: Tensor) -> Tensor:
    width = x.shape[-1]
    scale = width**-0.25
    first, second = torch.triu_indices(width, width, device=x.device)
    # The pair (i, j) is u[i] u[j], or u[i]**2 / sqrt(2): in a symmetric matrix it counts twice.
    factor = (1 + (first == second).to(x.dtype)).rsqrt()
    matrix = grad.new_zeros(*x.shape[:-1], width, width)
    matrix[..., first, second] = grad[..., 1 + width :] * factor
    of_pairs = ((matrix + matrix.mT) @ (x * scale).unsqueeze(-1)).squeeze(-1)
    return scale * (grad[..., 1 : 1 + width] + of_pairs)
