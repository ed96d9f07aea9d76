"""One compilation serves every batch size and every length.

python compile_examples/dynamic_shapes.py
"""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from attn_ops.nn import MultiheadAttention

SHAPES = [(2, 16), (2, 48), (3, 100), (5, 33), (4, 257)]


def main() -> None:
    torch.manual_seed(0)
    model = MultiheadAttention(64, heads=4, rotary_base=10000.0)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)

    for batch, length in SHAPES:
        x = torch.randn(batch, length, 64)
        out = compiled(x, causal=True)
        out.square().mean().backward()
        torch.testing.assert_close(out, model(x, causal=True))
        print(f"batch {batch}, length {length:3}: compiled {counter.frame_count} time(s) so far")
    assert counter.frame_count == 1

    # What is fixed at compile time is what changes the program: causal, say.
    compiled(torch.randn(2, 16, 64), causal=False)
    print(f"another program, not causal: compiled {counter.frame_count} times")
    assert counter.frame_count == 2


if __name__ == "__main__":
    main()
