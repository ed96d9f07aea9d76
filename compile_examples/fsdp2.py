"""FSDP2: two processes share the parameters, and train as one process would.

python compile_examples/fsdp2.py  (starts its two processes itself)
torchrun --nproc-per-node 2 compile_examples/fsdp2.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from attn_ops.nn import MultiheadAttention

STEPS, BATCH, LENGTH, DIM = 8, 8, 32, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiheadAttention(DIM, heads=4, learned_scale=8.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, causal=True)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3)))


def train(model: nn.Module, part: slice) -> Tensor:
    """The loss of each step, on this part of the batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(1))[part]
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - x.roll(1, dims=1)).square().mean()  # say the token before
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def worker(rank: int, world: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting_point, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    model = make_model()
    for block in model:
        fully_shard(block, mesh=mesh)  # the parameters of one block are gathered at a time
    fully_shard(model, mesh=mesh)
    stored = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    total = sum(p.numel() for p in model.parameters())
    print(f"process {rank} of {world} stores {stored} of {total} parameters", flush=True)

    losses = train(model, slice(rank, None, world)) / world
    dist.all_reduce(losses)
    if rank == 0:
        alone = train(make_model(), slice(None))
        for step, (together, one) in enumerate(zip(losses.tolist(), alone.tolist())):
            print(f"step {step}: loss {together:.6f} in {world} processes, {one:.6f} in one")
        torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-5)
        assert alone[-1] < alone[0] / 2
    dist.barrier()  # a process that leaves while gloo still holds a tensor aborts (pytorch#190489)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started this process
        worker(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
    else:  # a file to meet at needs no free port
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(worker, (2, f"file://{folder}/store"), nprocs=2)
