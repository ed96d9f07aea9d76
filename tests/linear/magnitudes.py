"""How large the numbers are that rounding acts on, of float64 arguments of the linear ops.

For each result its largest value and the largest root of the sum of its squared terms: a gradient
may be far smaller than the terms that it is the difference of, while their roundings add up like
independent numbers. There are two ways to a sum over keys: the weights of all keys, and the query's
features times a state that sums up the keys. An op may go either: the squares of both are added.

Below, a name in `_2` is the square of such a number. Letters as in formula.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tests.linear.formula import Parts, linear, linear_with_state


def chained(parts: Parts, x: Tensor, grad_2: Tensor) -> Tensor:
    """Squares of the gradient of features, through the derivative of the feature map."""
    if not parts.is_taylor:
        derivative = torch.func.jvp(parts.features, (x,), (torch.ones_like(x),))[1]
        return grad_2 * derivative.square()
    if not x.numel():
        return torch.zeros_like(x)
    rows = x.flatten(0, -2)
    jacobian = torch.func.vmap(torch.func.jacfwd(parts.features))(rows)  # [BHM, F, D]
    return (grad_2.flatten(0, -2).unsqueeze(-1) * jacobian.square()).sum(1).view(x.shape)


class Squares:
    """Squares of all that is summed."""

    def __init__(self, parts: Parts, *grads: Tensor) -> None:
        self.p = p = parts
        out, denominator = p.out()
        sizes = (out.shape, p.state.shape, p.key_sum.shape)
        grads_2 = [grad.square().reshape(size) for grad, size in zip(grads, sizes)]
        zeros = [x.new_zeros(size) for x, size in zip((out, p.state, p.key_sum), sizes)]
        self.grad_out, self.grad_state, self.grad_key_sum = grads_2 + zeros[len(grads_2) :]
        self.inverse = torch.where(denominator == 0, 0, denominator.pow(-2)).unsqueeze(-1)
        self.phi_q, self.phi_k = p.phi_query.square(), p.phi_key.square()
        self.value, self.power = p.value.square(), p.power.square()
        self.weight = (p.phi_query @ p.phi_key.mT).square() * self.power

        before = p.before[..., None, None]
        state = torch.einsum("hmn,bhnf,bhne->bhmfe", p.power, p.phi_key, p.value)
        self.state = (state + before * p.state.unsqueeze(2)).square()  # [B, H, M, F, E]
        key_sum = p.power @ p.phi_key + before.squeeze(-1) * p.key_sum.unsqueeze(2)
        self.key_sum = key_sum.square()  # [B, H, M, F]

        numerator = self.weight @ self.value + torch.einsum(
            "bhmf,bhmfe->bhme", self.phi_q, self.state
        )
        of_denominator = self.weight.sum(-1) + (self.phi_q * self.key_sum).sum(-1)
        normalized = p.eps is not None
        self.out = (
            numerator + normalized * out.square() * of_denominator.unsqueeze(-1)
        ) * self.inverse
        self.grad_numerator = self.grad_out * self.inverse
        delta = (self.grad_out * (out.square() + self.out)).sum(-1, keepdim=True)
        self.grad_denominator = normalized * delta * self.inverse  # [B, H, M, 1]
        self.grad_weight = self.grad_numerator @ self.value.mT + self.grad_denominator
        # The same two sums seen from a key: over the queries that see it.
        grad_numerator = torch.where(
            self.inverse == 0, 0, grads[0].reshape(out.shape) * self.inverse.sqrt()
        )
        self.grad_state_of_key = torch.einsum(
            "hmn,bhmf,bhme->bhnfe", p.power, p.phi_query, grad_numerator
        ).square()
        of_queries = p.phi_query * self.grad_denominator.sqrt()
        self.grad_key_sum_of_key = (p.power.mT @ of_queries).square()

    def phi_query(self) -> Tensor:
        by_state = torch.einsum("bhme,bhmfe->bhmf", self.grad_numerator, self.state)
        by_weight = (self.grad_weight * self.power) @ self.phi_k
        return by_weight + by_state + self.grad_denominator * self.key_sum

    def phi_key(self) -> Tensor:
        by_weight = (self.grad_weight * self.power).mT @ self.phi_q
        by_state = torch.einsum("bhne,bhnfe->bhnf", self.value, self.grad_state_of_key)
        after = self.p.after.square().unsqueeze(-1)
        at_the_end = self.value @ self.grad_state.mT + self.grad_key_sum.unsqueeze(2)
        return by_weight + by_state + self.grad_key_sum_of_key + after * at_the_end

    def grad_value(self) -> Tensor:
        by_state = torch.einsum("bhnf,bhnfe->bhne", self.phi_k, self.grad_state_of_key)
        after = self.p.after.square().unsqueeze(-1)
        at_the_end = (after * self.phi_k) @ self.grad_state
        return self.weight.mT @ self.grad_numerator + by_state + at_the_end

    def decay(self) -> Tensor:
        """The derivative of decay ** age is age * decay ** (age - 1)."""
        p = self.p

        def slope(power_2: Tensor, age: Tensor) -> Tensor:
            decay = p.decay.reshape(-1, *[1] * age.dim())
            return power_2 * (age / decay).square()

        ages = (p.m[:, None] - p.n).clamp_min(0)
        weight = (p.phi_query @ p.phi_key.mT).square() * slope(self.power, ages)
        state_2, key_sum_2 = p.state.square(), p.key_sum.square().unsqueeze(2)
        given = self.grad_numerator @ state_2.mT + self.grad_denominator * key_sum_2
        given = (self.phi_q * given).sum(-1) * slope(p.before.square(), p.m + 1)
        at_the_end = self.value @ self.grad_state.mT + self.grad_key_sum.unsqueeze(2)
        kept = (self.phi_k * at_the_end).sum(-1)
        kept = kept * slope(p.after.square(), len(p.n) - 1 - p.n)
        left = (state_2 * self.grad_state).sum((2, 3)) + (
            key_sum_2[:, :, 0] * self.grad_key_sum
        ).sum(2)
        left = left * slope(p.left.square(), p.n.new_tensor([len(p.n)])).squeeze(-1)
        return (self.grad_weight * weight).sum((0, 2, 3)) + (given.sum(2) + kept.sum(2) + left).sum(
            0
        )


def terms(squares: Squares) -> dict[str, Tensor]:
    """The sum of the squared terms of every result and gradient."""
    p, left = squares.p, squares.p.left.square()
    seen_before = p.before.square().unsqueeze(-1) * squares.phi_q
    still_seen = p.after.square().unsqueeze(-1) * squares.phi_k
    return {
        "out": squares.out,
        "final_state": left[..., None] * p.state.square() + still_seen.mT @ squares.value,
        "final_key_sum": left * p.key_sum.square() + still_seen.sum(2),
        "query": chained(p, p.query, squares.phi_query()),
        "key": chained(p, p.key, p.per_kv_head(squares.phi_key())),
        "value": p.per_kv_head(squares.grad_value()),
        "state": seen_before.mT @ squares.grad_numerator + left[..., None] * squares.grad_state,
        "key_sum": (seen_before * squares.grad_denominator).sum(2) + left * squares.grad_key_sum,
        "decay": squares.decay(),
    }


def values(
    results: dict[str, Tensor], leaves: dict[str, Tensor], grads: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The results and the gradients of the leaves."""
    pairs = [(y, grad) for y, grad in zip(results.values(), grads) if y.requires_grad]
    gradients = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], materialize_grads=True
    )
    return results | dict(zip(leaves, gradients))


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def magnitudes(arguments: dict[str, Any], *grads: Tensor) -> tuple[float, dict[str, float]]:
    """Of the op that has as many results as there are gradients.

    No exponential is taken of a score: its size does not matter. Features of the second degree are
    products, rounded to 16 bits once more on both sides. Sums of one sign are larger than the root
    of their squared terms, and are off by roundings of themselves.
    """
    with_state = len(grads) > 1
    law: Any = linear_with_state if with_state else linear
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if is_floating(x)}
    results = dict(zip(("out", "final_state", "final_key_sum"), law(**(arguments | leaves))))
    exact = values(results, leaves, grads)
    with torch.no_grad():
        parts = Parts(arguments | ({"causal": True} if with_state else {}))
        squared = terms(Squares(parts, *grads))
    roots = {name: largest(x) ** 0.5 for name, x in squared.items()}
    of_features = 2.0 if arguments.get("feature_map") == "taylor" else 0.0
    return of_features, {name: math.hypot(roots[name], largest(x)) for name, x in exact.items()}


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
