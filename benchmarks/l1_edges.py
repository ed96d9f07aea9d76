"""`l1_sparse` in the runner: against gathering rows and scattering sums in PyTorch.

`python -m benchmarks.l1_sparse` measures other kinds of graphs, and the making of an EdgeList.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Bar, Call, Contender, Entry, Inputs, Setting, draw
from benchmarks.l1 import per_query_head
from benchmarks.l1_sparse_formula import formula, random_edges

COPY = 4278  # GB/s that an H200 copies, bytes read and written


def draw_graph(setting: Setting) -> Inputs:
    """Both ends of every edge at random; `edges` of them for each query on average."""
    count = setting.length * (setting.edges or 0)
    edges = random_edges(setting.length, count, setting.device, power=False)
    return replace(draw(setting), edges=edges)


def gathered(inputs: Inputs) -> Tensor:
    """The formula, with the sink."""
    assert inputs.edges is not None
    heads = inputs.query.shape[1]
    key, value = (per_query_head(x, heads) for x in (inputs.key, inputs.value))
    return formula(inputs.query, key, value, inputs.edges)


def ours(inputs: Inputs, setting: Setting) -> Call:
    """The op of this library, on a graph that was sorted before."""
    from attn_ops import EdgeList, l1_sparse_attention

    assert inputs.edges is not None
    graph = EdgeList(inputs.edges, setting.length, setting.length)
    return lambda: l1_sparse_attention(inputs.query, inputs.key, inputs.value, graph)


def eager(inputs: Inputs, setting: Setting) -> Call:
    """The formula as it is."""
    return lambda: gathered(inputs)


def compiled(inputs: Inputs, setting: Setting) -> Call:
    """The formula, compiled for these sizes."""
    run = torch.compile(gathered, fullgraph=True, dynamic=False)
    return lambda: run(inputs)


def reference(inputs: Inputs, setting: Setting, with_norm: bool) -> Tensor:
    """The formula on float64 inputs."""
    return gathered(inputs)


def work(setting: Setting) -> dict[str, float]:
    """Bytes of the rows that each edge needs: q, k, v forward, and the gradient of out backward."""
    size = torch.empty(0, dtype=setting.dtype).element_size()
    edges = float(size * setting.batch * setting.heads * setting.length * (setting.edges or 0))
    forward = edges * (2 * setting.width + setting.value_width)
    backward = forward + edges * setting.value_width
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def cpu_held(setting: Setting) -> bool:
    """The settings of the bar on a CPU."""
    return setting.device == "cpu" and setting.threads == 2


def cuda_held(setting: Setting) -> bool:
    """The setting of the bar on a GPU."""
    its = (setting.device, setting.dtype, setting.length, setting.edges, setting.width)
    return its == ("cuda", torch.float32, 100_000, 20, 64)


CUDA_PRESET = {
    "device": "cuda",
    "shapes": [[1, 8, 100_000, 64]],
    "edges": [20],
    "passes": ["forward", "backward"],
    "num_times": 20,
    "budget": 1.0,
}

ENTRY = Entry(
    ours=Contender("attn_ops", ours),
    peers=(
        Contender("gather and scatter", eager),
        Contender("gather and scatter, compiled", compiled, compiled=True),
    ),
    reference=reference,
    work=work,
    unit=("GB/s", 1e9),
    bars=(
        Bar("float32 on a CPU, 2 threads", "forward+backward", 3.0, cpu_held),
        Bar("a third of a copy, float32", "forward", COPY / 3, cuda_held, True),
    ),
    draw=draw_graph,
    takes={"edges": [20]},
    presets={
        "cpu": (
            {
                "device": "cpu",
                "dtype": ["float32"],
                "seq_lens": [4096],
                "head_dim": [64],
                "edges": [5, 20],
                "threads": [1, 2],
                "budget": 2.0,
            },
        ),
        "cuda": (
            {**CUDA_PRESET, "dtype": ["float32"]},
            {**CUDA_PRESET, "dtype": ["bfloat16"], "skip": ["compiled"]},
        ),
    },
)
