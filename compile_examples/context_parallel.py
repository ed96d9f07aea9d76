"""Context parallel: two processes share every sequence, and train as one process would.

The model has to say the mean of all tokens so far, most of which other processes hold.

python compile_examples/context_parallel.py  (starts its two processes itself)
torchrun --nproc-per-node 4 compile_examples/context_parallel.py  (also 1; on GPUs where there are)
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from attn_ops import cosine_sim_attention
from attn_ops.distributed.context_parallel import ContextParallel
from attn_ops.nn import MultiheadAttention

STEPS, BATCH, LENGTH, DIM = 40, 8, 64, 64


def make_model(attention=cosine_sim_attention) -> nn.Module:
    torch.manual_seed(0)
    return MultiheadAttention(DIM, 4, 2, attention, learned_scale=1.0)


def train(model: nn.Module, device: torch.device, shard=lambda tensor, dim: tensor) -> Tensor:
    """The loss of each step, over the tokens that `shard` leaves."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, LENGTH, DIM, generator=generator)
        mean = x.cumsum(1) / torch.arange(1, LENGTH + 1)[:, None]
        tokens, target = shard(x, 1).to(device), shard(mean, 1).to(device)
        loss = (model(tokens, causal=True) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def worker(rank: int, world: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    kind = "cuda" if torch.cuda.device_count() >= world else "cpu"
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else "cpu")
    dist.init_process_group(None, meeting_point, rank=rank, world_size=world)
    mesh = init_device_mesh(kind, (world,), mesh_dim_names=("context",))
    context = ContextParallel(mesh, load_balance=True)
    model = make_model(context.cosine_sim_attention).to(device)
    fully_shard(model, mesh=mesh)  # averages the gradients too, as it does with parts of a batch
    losses = train(model, device, context.shard) / world
    dist.all_reduce(losses)
    if rank == 0:
        expected = train(make_model().to(device), device)
        for step, (together, one) in enumerate(zip(losses.tolist(), expected.tolist())):
            print(f"step {step}: loss {together:.6f} in {world} processes, {one:.6f} in one")
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        assert expected[-1] < expected[0] / 2
    dist.barrier()  # a process that leaves while gloo still holds a tensor aborts (pytorch#190489)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started this process
        worker(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
    else:  # a file to meet at needs no free port
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(worker, (2, f"file://{folder}/store"), nprocs=2)
