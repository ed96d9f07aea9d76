"""What only a GPU has: captured graphs, streams, several devices, and room for long tensors."""

import pytest
import torch
from torch import Tensor

import attn_ops
from tests.conftest import DEVICE

pytestmark = pytest.mark.skipif(
    not DEVICE.startswith("cuda"), reason="needs a GPU: ATTN_OPS_TEST_DEVICE=cuda"
)
SHAPE = (2, 4, 300, 64)
CLOCKS = 100_000_000  # that the device waits: about 50 ms
GIB = 1 << 30


def drawn(shape: tuple[int, ...] = SHAPE, seed: int = 0, device: str = DEVICE) -> list[Tensor]:
    """Query, key, value and the gradient of the result."""
    generator = torch.Generator(device).manual_seed(seed)
    kwargs = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    return [torch.randn(shape, **kwargs) for _ in range(4)]  # type: ignore[call-overload]


def with_gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The result and the gradients of query, key and value."""
    *leaves, grad_out = [x.detach() for x in inputs]
    leaves = [x.requires_grad_() for x in leaves]
    out = attn_ops.cosine_sim_attention(*leaves, causal=True)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(("out", "query", "key", "value"), actual, expected, strict=True):
        assert torch.equal(a, e), name


def test_shortest_way_gives_what_the_op_gives() -> None:
    """The function's plain call goes past the dispatcher, the op's does not."""
    inputs = drawn()[:3]
    out, lse = attn_ops.cosine_sim_attention(*inputs, causal=True, scale=5.0, return_lse=True)
    expected = torch.ops.attn.cosine_sim_with_lse(*inputs, causal=True, scale=5.0)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_captured_graph_follows_its_inputs() -> None:
    """Forward and backward: no synchronisation with the host, and no memory but the graph's."""
    static = drawn()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with_gradients(static)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(static)
    for seed in (1, 2):
        inputs = drawn(seed=seed)
        for x, new in zip(static, inputs):
            x.copy_(new)
        graph.replay()
        assert_equal(captured, with_gradients(inputs))


def test_work_goes_to_the_current_stream() -> None:
    """Inputs become ready late, on a stream that nobody else waits for."""
    ready = drawn()
    expected = with_gradients(ready)
    late = [torch.full_like(x, torch.nan) for x in ready]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CLOCKS)
        for x, new in zip(late, ready):
            x.copy_(new)
        actual = with_gradients(late)
    side.synchronize()
    assert_equal(actual, expected)


def test_device_of_the_inputs_need_not_be_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = with_gradients(drawn())
    with torch.cuda.device(0):
        actual = with_gradients([x.to("cuda:1") for x in drawn()])
    assert all(x.device.index == 1 for x in actual)
    assert_equal(tuple(x.to(DEVICE) for x in actual), expected)


def test_tensors_beyond_32_bits_of_elements() -> None:
    """The end of them is what it is alone; a window keeps it short."""
    tokens, heads, width, window = (1 << 17) + 512, 128, 128, 256
    if torch.cuda.mem_get_info()[0] < 60 * GIB:
        pytest.skip("needs 60 GiB of free memory")

    def transposed(seed: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        x = torch.empty(1, tokens, heads, width, device=DEVICE, dtype=torch.bfloat16)
        return x.normal_(generator=generator).transpose(1, 2)

    *leaves, grad_out = [transposed(seed) for seed in range(4)]
    assert leaves[0].numel() > 1 << 31

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        *of_op, grad = [x.detach() for x in inputs]
        of_op = [x.requires_grad_() for x in of_op]
        out = attn_ops.cosine_sim_attention(*of_op, causal=True, window=window)
        return (out.detach(), *torch.autograd.grad(out, of_op, grad))

    whole = [x[:, :, -window:].clone() for x in run(*leaves, grad_out)]
    end = [x[:, :, -2 * window :] for x in (*leaves, grad_out)]
    for name, actual, alone in zip(("out", "query", "key", "value"), whole, run(*end)):
        torch.testing.assert_close(
            actual, alone[:, :, -window:], atol=2e-2, rtol=2e-2, msg=f"{name} differs"
        )
