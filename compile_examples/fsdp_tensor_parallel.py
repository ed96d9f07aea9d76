"""Trains the GPT with its heads and its parameters spread over processes, as one process would.

Tensor parallelism by `parallelize_module` (each process has some heads; no `to_local`), FSDP2 with
bfloat16 parameters, selective activation checkpointing and torch.compile, together.

python compile_examples/fsdp_tensor_parallel.py  (starts two processes itself)
torchrun --nproc-per-node 4 compile_examples/fsdp_tensor_parallel.py --tensor 2
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt.data import batch, load_corpus
from gpt.model import ATTENTIONS, GPT, GPTConfig
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.func import functional_call
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from attn_ops.checkpointing import save_list

STEPS, BATCH, LENGTH = 20, 8, 64
HEADS = ColwiseParallel(use_local_output=False)  # a DTensor [B, M, heads * D] with sharded heads
PLAN: dict[str, ParallelStyle] = {f"attention.{name}_proj": HEADS for name in "qkv"}
PLAN |= {
    "attention.out_proj": RowwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


def parallelize(model: GPT, mesh: DeviceMesh, backend: str) -> None:
    contexts = partial(create_selective_checkpoint_contexts, save_list())
    shard = partial(
        fully_shard,
        mesh=mesh["data"],
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    for i, block in enumerate(model.blocks):
        parallelize_module(block, mesh["tensor"], PLAN)
        model.blocks[i] = checkpoint_wrapper(block, context_fn=contexts)
        model.blocks[i].compile(fullgraph=True, backend=backend)
        shard(model.blocks[i])
    shard(model)


def in_bfloat16(model: nn.Module, tokens: Tensor) -> Tensor:
    parameters = {name: p.bfloat16() for name, p in model.named_parameters()}
    return functional_call(model, parameters, tokens)


def train(model: nn.Module, logits, part: slice, device: torch.device) -> Tensor:
    """The loss of each step, on this part of the batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    text, generator = load_corpus(Path(__file__).parent).train, torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        tokens = batch(text, BATCH, LENGTH, generator)[part].to(device)
        predicted = logits(tokens[:, :-1]).flatten(0, 1).float()
        loss = F.cross_entropy(predicted, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def worker(rank: int, world: int, meeting_point: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    kind = "cuda" if torch.cuda.device_count() >= world else "cpu"
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else "cpu")
    transport = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(transport, meeting_point, rank=rank, world_size=world)
    mesh = init_device_mesh(
        kind, (world // args.tensor, args.tensor), mesh_dim_names=("data", "tensor")
    )
    config = GPTConfig(args.attention, dim=64, layers=2)
    torch.manual_seed(0)
    model, alone = GPT(config).to(device), GPT(config).to(device)
    alone.load_state_dict(model.state_dict())
    parallelize(model, mesh, args.backend)
    here = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    total = sum(p.numel() for p in alone.parameters())
    print(f"process {rank}: {here} of {total} parameters are here", flush=True)
    with implicit_replication():  # rotary angles are ordinary tensors beside sharded heads
        part = slice(mesh["data"].get_local_rank(), None, mesh["data"].size())
        losses = train(model, model, part, device)
    dist.all_reduce(losses)
    losses /= world
    if rank == 0:
        expected = train(alone, partial(in_bfloat16, alone), slice(None), device)
        for step, (together, one) in enumerate(zip(losses.tolist(), expected.tolist())):
            print(f"step {step}: loss {together:.4f} in {world} processes, {one:.4f} in one")
        torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
        assert expected[-1] < expected[0] / 1.2
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=sorted(ATTENTIONS), default="cosine_sim")
    parser.add_argument("--tensor", type=int, default=2, help="processes that share the heads")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun started this process
        worker(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", args)
    else:  # a file to meet at needs no free port
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(worker, (2, f"file://{folder}/store", args), nprocs=2)


if __name__ == "__main__":
    main()
