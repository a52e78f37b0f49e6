"""What a forward keeps for backward, and what a whole step holds at most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that ``module(x)`` keeps for backward, each once; ``x`` counts if it is kept.

    Parameters and buffers, which live anyway, do not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    # While these are held no storage is freed, so none can return at the address of another.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    if not output.requires_grad:
        raise ValueError("module: got an output that needs no gradient, wanted one that does")
    return sum(sizes.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors on the CPU that ``call`` holds at a time, above what is there before it.

    As PyTorch's allocator tells its profiler; scratch memory that a library takes from the system is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
