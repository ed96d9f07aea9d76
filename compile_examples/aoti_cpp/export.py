"""Compiles a model of all attentions ahead of time, for a program without Python.

python compile_examples/aoti_cpp/export.py FOLDER [cpu|cuda]  writes into it
  model.pt2      the AOTInductor package
  libraries.txt  the libraries that a program opens before it loads the package
  cases.pt       inputs of several sizes, and what the model makes of them in Python
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import attn_ops
from attn_ops import _library
from attn_ops.nn import MultiheadAttention

DIM, HEADS, KV_HEADS = 32, 4, 2
SIZES = ((2, 16), (1, 3), (5, 70))


def by_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """L1 attention whose softmax is PyTorch's."""
    weight = attn_ops.l1_scores(query, key).softmax(-1)
    return weight @ value.repeat_interleave(HEADS // KV_HEADS, 1)


def to_itself_and_the_one_before(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """L1 attention over two edges of each token."""
    token = torch.arange(query.shape[2], device=query.device)
    edges = torch.cat([torch.stack([token, x], -1) for x in (token, (token - 1).clamp_min(0))])
    return attn_ops.l1_sparse_attention(query, key, value, edges)


def from_a_state(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Linear attention that could go on."""
    return attn_ops.linear_attention_with_state(query, key, value, feature_map="softplus")[0]


ATTENTIONS = (
    partial(attn_ops.cosine_sim_attention, causal=True),
    partial(attn_ops.l1_attention, causal=True),
    by_scores,
    to_itself_and_the_one_before,
    partial(attn_ops.linear_attention, causal=True, feature_map="elu_plus_one"),
    from_a_state,
)


class Model(nn.Module):
    """A residual block per kind of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MultiheadAttention(
                DIM, HEADS, kv_heads=KV_HEADS, attention=attention, rotary_base=10000.0
            )
            for attention in ATTENTIONS
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def main(folder: Path, device: str = "cpu") -> None:
    torch.manual_seed(0)
    model = Model().eval().to(device)
    inputs = [torch.randn(batch, length, DIM, device=device) for batch, length in SIZES]
    sizes = {0: Dim("batch", max=64), 1: Dim.AUTO(min=2, max=4096)}
    with torch.no_grad():
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=(sizes,))
        expected = [model(x) for x in inputs]
    folder.mkdir(parents=True, exist_ok=True)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    # PyTorch's own comes first: those of attn_ops look for its names.
    libraries = ["libtorch_cuda.so"] * (device == "cuda") + _library.loaded_libraries
    (folder / "libraries.txt").write_text("".join(f"{name}\n" for name in libraries))
    torch.save(inputs + expected, folder / "cases.pt")
    print(f"{folder / 'model.pt2'} holds {len(ATTENTIONS)} kinds of attention for {device}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
