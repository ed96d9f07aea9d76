"""`torch.compile` where the conformance suite does not ask: heads, backward, vmap, caches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import attn_ops
from tests.comparison import assert_same
from tests.conformance.evaluate import cotangents, scalar, with_gradients
from tests.conformance.spec import OpSpec

ROOT = Path(__file__).parent.parent.parent


def test_batch_and_heads_compile_once(spec: OpSpec, device: torch.device) -> None:
    """Sizes that are all different: equal ones are taken for one size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.run, backend=counter, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(specialize_float=True):
        for batch, heads, kv_heads in ((3, 10, 5), (7, 22, 11), (9, 34, 17)):
            case = spec.resized(spec.cases["everything"], 21, 27, batch)
            case = case.but(heads=heads, kv_heads=kv_heads)
            arguments = spec.build(case, torch.float32, device)
            grads = cotangents(*spec.run(**arguments))
            expected = with_gradients(spec, spec.run, arguments, *grads)
            for name, result in with_gradients(spec, compiled, arguments, *grads).items():
                assert_same(name, result, expected[name])
    assert counter.frame_count == 1


def test_cuda_graphs_read_inputs_anew(spec: OpSpec, device: torch.device) -> None:
    """Forward and backward are replayed with other numbers each time."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs")
    compiled = torch.compile(spec.run, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):  # the first calls record
        case = spec.cases["everything"].but(seed=seed)
        arguments = spec.build(case, torch.float32, device)
        grads = cotangents(*spec.run(**arguments))
        expected = with_gradients(spec, spec.run, arguments, *grads)
        torch.compiler.cudagraph_mark_step_begin()
        for name, result in with_gradients(spec, compiled, arguments, *grads).items():
            assert_same(name, result, expected[name])


def test_compiled_autograd_gives_the_same_gradients(spec: OpSpec, device: torch.device) -> None:
    """The backward pass is captured as one graph."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    expected = torch.autograd.grad(scalar(spec.run(**arguments)), leaves)
    counters.clear()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        scalar(spec.run(**arguments)).backward()
    assert counters["compiled_autograd"]["captures"] == 1
    for name, leaf, e in zip(spec.floating(arguments), leaves, expected):
        assert leaf.grad is not None
        assert_same(name, leaf.grad, e)


def test_compiled_autograd_takes_options_for_what_they_are(
    spec: OpSpec, device: torch.device
) -> None:
    """The graph of one call does not serve another that differs in a bool or a number alone."""
    case = spec.resized(spec.cases["plain"], 6, 6, 2)
    plain = spec.build(case, torch.float32, device)
    schema = spec.ops[0].default._schema.arguments
    flags = {x.name: not x.default_value for x in schema if str(x.type) == "bool"}
    numbers = {x.name: 2.0 for x in schema if x.name in ("scale", "eps")}
    calls = [{}, *({name: value} for name, value in (flags | numbers).items())]
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for options in calls:
        arguments = plain | options
        leaves = [x.detach().requires_grad_() for x in spec.floating(plain).values()]
        arguments |= dict(zip(spec.floating(plain), leaves))
        expected = torch.autograd.grad(scalar(spec.run(**arguments)), leaves)
        with torch._dynamo.compiled_autograd._enable(compiler):
            scalar(spec.run(**arguments)).backward()
        for leaf, e in zip(leaves, expected):
            assert leaf.grad is not None
            assert_same(f"gradient with {options}", leaf.grad, e)


def test_vmap_inside_of_a_compiled_function(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    names = tuple(spec.floating(arguments))
    copies = tuple(torch.stack([arguments[n], arguments[n] * 0.75]) for n in names)

    def mapped(*values: Tensor) -> Any:
        return torch.func.vmap(lambda *xs: spec.run(**(arguments | dict(zip(names, xs)))))(*values)

    compiled = torch.compile(mapped, backend="aot_eager", fullgraph=True)
    for name, a, e in zip(spec.results, compiled(*copies), mapped(*copies)):
        assert_same(name, a, e)


@pytest.mark.ops("cosine_sim")
def test_scale_that_is_a_tensor_does_not_compile_again(device: torch.device) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, scale: attn_ops.cosine_sim_attention(x, x, x, scale=scale),
        backend=counter,
        fullgraph=True,
    )
    x = torch.randn(1, 2, 5, 4, device=device)
    for value in (1.0, 8.0, 30.0):
        scale = torch.full((2,), value, device=device, requires_grad=True)
        out = compiled(x, scale)
        assert_same("out", out, attn_ops.cosine_sim_attention(x, x, x, scale=value))
        (grad,) = torch.autograd.grad(out.square().sum(), scale)
        assert grad.abs().max() > 0
    assert counter.frame_count == 1


# Compiles forward and backward of every op; prints how often the caches had the answer.
COMPILES = """
import json, sys, torch
from torch._dynamo.utils import counters
from tests.conformance.evaluate import scalar
from tests.conformance.spec import all_specs
found = {}
for spec in all_specs():
    torch.compiler.reset()
    counters.clear()
    arguments = spec.build(spec.cases["plain"], torch.float32, torch.device(sys.argv[1]))
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    compiled = torch.compile(spec.run, fullgraph=True)
    torch.autograd.grad(scalar(compiled(**arguments)), leaves)
    aot, inductor = counters["aot_autograd"], counters["inductor"]
    found[spec.name] = [
        aot["autograd_cache_" + what] + inductor["fxgraph_cache_" + what]
        for what in ("hit", "miss")
    ]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hits_and_misses(
    tmp_path_factory: pytest.TempPathFactory, device: torch.device
) -> list[dict[str, list[int]]]:
    """Of two processes that share Inductor's folder: the first finds it empty."""
    folder = tmp_path_factory.mktemp("inductor")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", COMPILES, device.type],
            env=environment,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def test_second_process_compiles_nothing(
    spec: OpSpec, hits_and_misses: list[dict[str, list[int]]]
) -> None:
    """The ops are no obstacle to the caches of AOTAutograd and Inductor."""
    first, second = (found[spec.name] for found in hits_and_misses)
    assert first[0] == 0 and first[1] > 0
    assert second[0] > 0 and second[1] == 0
