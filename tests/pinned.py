"""Schemas and graphs as texts, to pin."""

import textwrap

import torch
from torch import Tensor, nn


def wrapped(overload: torch._ops.OpOverload) -> str:
    """A schema, one argument per line."""
    return str(overload._schema).replace(", ", ",\n  ")


def calls(graph: torch.fx.Graph) -> str:
    """The ops of this library in a graph, with their arguments."""
    nodes = [node for node in graph.nodes if "attn" in str(node.target)]
    lines = (f"{node.target}{(*node.args, node.kwargs)}" for node in nodes)
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in lines)


def inputs_of_causal() -> tuple[Tensor, ...]:
    """query, key, value and a bias [H, M, N]."""
    return (
        torch.ones(2, 4, 6, 8),
        torch.ones(2, 2, 9, 8),
        torch.ones(2, 2, 9, 3),
        torch.ones(4, 6, 9),
    )


def exported_causal(module: nn.Module) -> torch.export.ExportedProgram:
    """A module of these inputs, with dynamic batch size and lengths."""
    # Not of 0 or 1, which would be fixed.
    dynamic = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("queries", min=2)}
    keys = {0: dynamic[0], 2: torch.export.Dim("keys", min=2)}
    shapes = (dynamic, keys, keys, {1: dynamic[2], 2: keys[2]})
    return torch.export.export(module, inputs_of_causal(), dynamic_shapes=shapes)
