"""Training on several devices and machines: DDP or FSDP2 of stock PyTorch, started by ``torchrun``.

Neither method of this package has statistics over the batch, so nothing but gradients (DDP), or gradients and
parameters (FSDP2), passes between ranks: no call here is of a method.

The order is ``start``, model and its calibration, ``wrap``, optimizer, ``load_state``, steps on ``Ranks.share`` of each
batch, ``model_state`` on every rank and a file from rank 0, ``finish``. What draws its own noise on each rank wants a
seed of its own there.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

KINDS = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Ranks:
    """Which process this is of how many; ``local_rank`` counts those of its machine. One process is rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of the samples of a batch that every rank holds: a view (N / world_size, ...).

        Where ``world_size`` does not divide N, as for the last images of a test set, the first ranks have one more.
        """
        return batch.tensor_split(self.world_size)[self.rank]


def start(parallel: str | None = None, device: str = "cpu", batch_size: int | None = None) -> Ranks:
    """Join the other processes of ``torchrun``, by gloo on the CPU and NCCL on GPUs; alone, initialise nothing.

    Args:
        parallel: None, "ddp" or "fsdp2".
        device: "cpu" or "cuda"; of GPUs each rank takes that of its local rank.
        batch_size: images of a step, of all ranks together.

    Raises:
        ValueError: ``parallel`` without ``torchrun`` or ``torchrun`` without ``parallel``; more ranks than GPUs;
            ``batch_size`` no multiple of the ranks, so that the mean over ranks were not the mean over images.
    """
    if parallel is not None and parallel not in KINDS:
        raise ValueError(f"parallel: got {parallel!r}, wanted one of {', '.join(KINDS)}")
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) if launched else int(default)
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    if parallel and not launched:
        raise ValueError(
            f"parallel: got {parallel!r} in a process without RANK and WORLD_SIZE; start one process a device: "
            f"torchrun --nproc-per-node 2 -m deepcontrol_cuda train --parallel {parallel} ..."
        )
    if world_size > 1 and not parallel:
        raise ValueError(
            f"parallel: torchrun started {world_size} processes, which would all do the same; add --parallel ddp "
            "(or fsdp2), or start without torchrun"
        )
    if batch_size is not None and batch_size % world_size:
        problem = f"{world_size} ranks share a batch of {batch_size} images"
        if batch_size < world_size:
            raise ValueError(f"batch_size: {problem}, some would have none; wanted at least {world_size} images")
        raise ValueError(f"batch_size: {problem}, not evenly; wanted a multiple of {world_size}")
    place = torch.device(device)
    if place.type == "cuda" and parallel:
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(
                f"device: rank {local_rank} of this machine has no GPU, PyTorch sees {gpus}; start at most {gpus} "
                "processes (torchrun --nproc-per-node), or choose --device cpu"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if parallel:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Ranks(rank, world_size, local_rank, place)


def finish() -> None:
    """Leave the other processes; alone, nothing. Let go of what ``wrap`` gave before."""
    if dist.is_initialized():
        # DDP is part of reference cycles and holds the process group. Were it freed last, by the garbage collector,
        # the group's threads and the collector could wait for each other.
        gc.collect()
        dist.destroy_process_group()


def wrap(model: nn.Module, parallel: str | None) -> nn.Module:
    """The model to train: itself, in ``DistributedDataParallel``, or sharded in place by ``fully_shard``.

    Every rank starts with the parameters and buffers of rank 0. FSDP2 gathers one residual block at a time and shards
    on dimension 0, so each kernel's taps stay together. Optimizers are made afterwards: ``fully_shard`` replaces the
    parameters.

    Args:
        model: on the device of ``start``.
        parallel: as in ``start``.
    """
    if parallel is None:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    # fully_shard wants contiguous parameters; maps may be channels_last all the same.
    model.to(memory_format=torch.contiguous_format)
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(tensors[0].device.type, (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of sequences that hold more than one layer with parameters: in a ResNet its residual blocks."""
    for sequence in model.modules():
        if isinstance(sequence, (nn.Sequential, nn.ModuleList)):
            for element in sequence:
                layers = [module for module in element.modules() if any(True for _ in module.parameters(recurse=False))]
                if len(layers) > 1 and not isinstance(element, (nn.Sequential, nn.ModuleList)):
                    yield element


def model_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """What ``state_dict()`` of both gives in a single process: whole tensors, copied to the CPU, on every rank.

    Every rank must call it. Buffers, such as running statistics under FSDP2, are those of the calling rank.
    """
    # The functions of torch.distributed.checkpoint.state_dict take a step of the optimizer where it has no state yet,
    # which counts one in Adam and runs its hooks, so a run resumed from before its first step would differ.
    model = _inner(module).state_dict()
    for name, value in model.items():
        model[name] = _whole(value)
    states = optimizer.state_dict()
    return model, {
        "state": {i: {key: _whole(value) for key, value in state.items()} for i, state in states["state"].items()},
        "param_groups": copy.deepcopy(states["param_groups"]),
    }


def load_state(module: nn.Module, optimizer: torch.optim.Optimizer, model_state: dict, optimizer_state: dict) -> None:
    """Put in place what ``model_state`` gave, in any number of processes of any kind.

    Every rank passes all of it, as read from one file; nothing is sent.

    Raises:
        RuntimeError: names or shapes of the model's state are not those of ``module``.
        ValueError: parameter groups are not those of ``optimizer``.
    """
    module = _inner(module)
    own = module.state_dict()
    module.load_state_dict({name: _part(value, own.get(name)) for name, value in model_state.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    like = dict(zip(numbers, parameters))
    states = {
        i: {key: _part(value, like.get(i)) for key, value in state.items()}
        for i, state in optimizer_state["state"].items()
    }
    optimizer.load_state_dict({**optimizer_state, "state": states})


def mean(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all ranks, on each of them; alone, ``tensor``."""
    if not dist.is_initialized():
        return tensor
    # gloo cannot average.
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics, which FSDP2 leaves to each rank; alone, nothing."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _whole(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value.to("cpu", copy=True)


def _part(value: object, like: object) -> object:
    """``value`` with the placement and the strides of ``like``, if it has its shape: a count of steps has none."""
    if not (isinstance(value, Tensor) and isinstance(like, Tensor) and value.shape == like.shape):
        return value
    if isinstance(like, DTensor):
        value = distribute_tensor(value.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
