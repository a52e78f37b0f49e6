"""What becomes of weight gradients: gain, dgain and projection (``reference.finish_weight_grad``, ``project``).

    dw = project(gain * dw'),  dgain = sum(weight * dw'),  project(g) = g - projection * mean over the taps of g

A weight gradient is finished while its partial sums are added up: ``partials + weight + dw`` bytes, and without dgain
not those of the weight. ``project_kernel_gradients_`` reads and writes each gradient once, with one launch for each
device, dtype and kind of tile (``_Tile``). A kernel that is too long for a tile is read twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import accumulation, memory_format
from . import tensors
from .launch import ceil_divide, on

_TILE = 4096
"""Elements of a gradient that a program has in registers at a time, half as many where it finishes a filter."""
_SUMMANDS = 8192
"""Elements of partial sums that it has, of as many splits at a time; half as many where each has its own address."""
_MOST_TAPS = 512
_MOST_REGISTERS = 128
"""Of a thread. Left alone, ptxas spills to have fewer, and 512 threads can have no more."""
_TABLES = 64
"""Tables of gradients that are kept on devices."""
_RESERVE = 1 << 15
"""Numbers of tables that there is pinned memory for when a CUDA graph is captured, at least half of them."""


@triton.jit
def _offsets(rows, columns, VECTOR: tl.constexpr):
    """rows + columns, known to count on over VECTOR columns from a multiple of VECTOR on."""
    offsets = columns[None, :] + rows[:, None]
    # What is said of a function's argument is lost when it is inlined, so it is said here.
    if VECTOR > 1:
        return tl.multiple_of(tl.max_contiguous(offsets, (1, VECTOR)), (1, VECTOR))
    else:
        return offsets


@triton.jit
def _of_filter(first, tap, channel, channels, taps, CHANNELS_INNERMOST: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets into the filter that begins at ``first``, or one for each row, taps down and channels across."""
    if CHANNELS_INNERMOST:
        return _offsets(first + tap * channels, channel, VECTOR)
    else:
        return _offsets(first + tap, channel * taps, 1)


@triton.jit
def _inside(row, column, rows, columns, VECTOR: tl.constexpr):
    """Known to be the same for VECTOR columns, of which the columns are a multiple."""
    return tl.max_constancy((row < rows)[:, None] & (column < columns)[None, :], (1, VECTOR))


@triton.jit
def _added(source, first, first_tap, channel, channels, splits, split_stride, T: tl.constexpr,
           CHANNELS_INNERMOST: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr,
           VECTOR: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """The sum of the splits (TAPS, CHANNELS), in fixed order: every SPLITS-th, then the SPLITS sums."""
    row = tl.arange(0, SPLITS * TAPS)
    split = row // TAPS
    tap = first_tap + row % TAPS
    offsets = _of_filter(split * split_stride, tap, channel, channels, T, CHANNELS_INNERMOST, VECTOR)
    sums = tl.zeros((SPLITS * TAPS, CHANNELS), SUM)
    for first_split in tl.range(0, splits, SPLITS, loop_unroll_factor=2):
        # A row without a split has no tap either.
        inside = _inside(tl.where(split < splits - first_split, tap, T), channel, T, channels, VECTOR)
        place = tl.multiple_of(first + first_split * split_stride.to(tl.int64), VECTOR)
        sums += tl.load(source + place + offsets, inside, 0.0).to(SUM)
    return tl.sum(tl.reshape(sums, (SPLITS, TAPS, CHANNELS)), 0)


@triton.jit(do_not_specialize=("split_stride", "channels"))
def _finish_filter(
    source, target, weight, factor, divisor, dgain, projection: tl.float64, splits, split_stride, channels,
    T: tl.constexpr, PROJECT: tl.constexpr, SOURCE_INNERMOST: tl.constexpr, CHANNELS_INNERMOST: tl.constexpr,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """target = project(factor * source) and dgain = sum(weight * source / divisor) of one filter.

    source (splits, filters, T taps, channels), target, which may be the source, and weight (filters, T taps, channels);
    taps and channels the other way round where channels are not innermost. VECTOR divides channels.
    """
    SUM: tl.constexpr = tl.float64 if target.dtype.element_ty == tl.float64 else tl.float32
    filter = tl.program_id(0).to(tl.int64)
    start = tl.multiple_of(filter * T * channels, VECTOR)
    # The number is not to make the rest float64.
    scale = tl.full((), 1.0, SUM)
    mean = (scale * projection).to(SUM) / T
    if factor is not None:
        scale = tl.load(factor + filter)
    if dgain is not None:
        dots = tl.zeros((CHANNELS,), SUM)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        sums = tl.zeros((CHANNELS,), SUM)
        if T > TAPS and PROJECT:
            for first_tap in range(0, T, TAPS):
                sums += tl.sum(_added(source, start, first_tap, channel, channels, splits, split_stride, T,
                                      SOURCE_INNERMOST, TAPS, CHANNELS, SPLITS, VECTOR, SUM), 0)  # fmt: skip
        for first_tap in range(0, T, TAPS):
            tap = first_tap + tl.arange(0, TAPS)
            inside = _inside(tap, channel, T, channels, VECTOR)
            grads = _added(source, start, first_tap, channel, channels, splits, split_stride, T, SOURCE_INNERMOST,
                           TAPS, CHANNELS, SPLITS, VECTOR, SUM)  # fmt: skip
            offsets = _of_filter(start, tap, channel, channels, T, CHANNELS_INNERMOST, VECTOR)
            if dgain is not None:
                dots += tl.sum(grads * tl.load(weight + offsets, inside, 0.0).to(SUM), 0)
            if T <= TAPS and PROJECT:
                sums = tl.sum(grads, 0)
            tl.store(target + offsets, (grads - (sums * mean)[None, :]) * scale, inside)
    if dgain is not None:
        dot = tl.sum(dots, 0)
        if divisor is not None:
            dot /= tl.load(divisor + filter)
        tl.store(dgain + filter, dot)


@triton.jit(do_not_specialize=("rows", "length"))
def _scale_rows(weight, gain, scaled, rows, length, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """scaled = gain * weight, (rows, length); gain (rows). VECTOR divides the length."""
    blocks = tl.cdiv(length, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    offsets = _offsets(row.to(tl.int64) * length, column, VECTOR)
    inside = _inside(row, column, rows, length, VECTOR)
    gains = tl.load(gain + row, row < rows, 0.0)[:, None]
    tl.store(scaled + offsets, tl.load(weight + offsets, inside, 0.0).to(gains.dtype) * gains, inside)


@triton.jit
def _project_tiles(
    table, projection: tl.float64, COUNT: tl.constexpr, DTYPE: tl.constexpr, TAPS: tl.constexpr,
    KERNELS: tl.constexpr, CHANNELS_INNERMOST: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """In place on KERNELS of a gradient's kernels, which count on from filter to filter.

    table (5, COUNT): the first program of each gradient, its address, kernels, channels and taps. WHOLE kernels have at
    most TAPS taps.
    """
    first_programs = tl.load(table + tl.arange(0, COUNT))
    entry = table + (tl.sum((first_programs <= tl.program_id(0)).to(tl.int32), 0) - 1)
    first = (tl.program_id(0) - tl.load(entry)).to(tl.int32) * KERNELS
    gradient = tl.load(entry + COUNT).to(tl.pointer_type(DTYPE))
    SUM: tl.constexpr = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    if VECTOR > 1:
        gradient = tl.multiple_of(gradient, 16)
    kernels = tl.load(entry + 2 * COUNT).to(tl.int32)
    channels = tl.load(entry + 3 * COUNT).to(tl.int32)
    taps = tl.load(entry + 4 * COUNT).to(tl.int32)
    mean = (tl.full((), 1.0, SUM) * projection).to(SUM) / taps
    kernel = first + tl.arange(0, KERNELS)
    if CHANNELS_INNERMOST:
        stride = channels
        start = kernel.to(tl.int64) + (kernel // channels).to(tl.int64) * ((taps - 1) * channels)
    else:
        stride = 1
        start = kernel.to(tl.int64) * taps
    sums = tl.zeros((KERNELS,), SUM)
    if not WHOLE:
        for first_tap in range(0, taps, TAPS):
            tap = first_tap + tl.arange(0, TAPS)
            pointers = gradient + _offsets(tap * stride, start, VECTOR)
            sums += tl.sum(tl.load(pointers, _inside(tap, kernel, taps, kernels, VECTOR), 0.0).to(SUM), 0)
    for first_tap in range(0, TAPS if WHOLE else taps, TAPS):
        tap = first_tap + tl.arange(0, TAPS)
        pointers = gradient + _offsets(tap * stride, start, VECTOR)
        inside = _inside(tap, kernel, taps, kernels, VECTOR)
        grads = tl.load(pointers, inside, 0.0).to(SUM)
        if WHOLE:
            sums = tl.sum(grads, 0)
        tl.store(pointers, grads - (sums * mean)[None, :], inside)


def _vector(row: int, *operands: Tensor | None) -> int:
    """Elements of 16 bytes of the narrowest operand if all are aligned to them and rows are made of them, else 1."""
    given = [tensor for tensor in operands if tensor is not None]
    elements = 16 // min(tensor.element_size() for tensor in given)
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in given)
    return elements if aligned and row % elements == 0 else 1


def _innermost(weight: Tensor) -> bool:
    """Whether the channels of a dense (O, C, *kernel) tensor are innermost; one tap or channel is either way."""
    return memory_format(weight) is not torch.contiguous_format


def _taps(weight: Tensor) -> int:
    return weight.shape[2:].numel()


def _finish(
    source: Tensor, splits: int, source_innermost: bool, target: Tensor, weight: Tensor | None, factor: Tensor | None,
    divisor: Tensor | None, projection: float,
) -> Tensor | None:  # fmt: skip
    """Into ``target``, dense in its memory format; returns dgain if there is a weight, dense in the same format."""
    filters, channels, taps = target.shape[0], target.shape[1], _taps(target)
    dgain = None if weight is None else target.new_empty((filters,), dtype=accumulation(target))
    innermost = _innermost(target)
    tap_block = min(_MOST_TAPS, triton.next_power_of_2(taps))
    block = min(_TILE // 2 // tap_block, triton.next_power_of_2(channels))
    vector = min(block, _vector(channels, source, target, weight))
    summands = _SUMMANDS if vector > 1 else _SUMMANDS // 2
    split_block = min(summands // (tap_block * block), triton.next_power_of_2(splits))
    with on(target):
        _finish_filter[filters,](
            source, target, weight, factor, divisor, dgain, projection, splits, target.numel(), channels,
            T=taps, PROJECT=projection != 0.0 and taps > 1, SOURCE_INNERMOST=source_innermost,
            CHANNELS_INNERMOST=innermost, TAPS=tap_block, CHANNELS=block, SPLITS=split_block,
            VECTOR=vector, num_warps=max(1, min(16, split_block * tap_block * block // 256)), maxnreg=_MOST_REGISTERS,
        )  # fmt: skip
    return dgain


def finish(
    partials: Tensor, weight: Tensor, gain: Tensor | None, projection: float, dots: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``weight`` (O, C, *kernel), dense, and of its gain (O,) if ``dots``, else None.

    ``partials`` (splits, O, taps, C), dense, in the accumulation type, add up to the gradient of ``gain * weight``.
    """
    grad_weight = torch.empty_like(weight)
    if weight.numel() == 0:
        return grad_weight, weight.new_zeros((weight.shape[0],), dtype=accumulation(weight)) if dots else None
    dense_weight = weight if dots else None
    return grad_weight, _finish(partials, partials.shape[0], True, grad_weight, dense_weight, gain, None, projection)


def finish_in_place(
    grad: Tensor, weight: Tensor, factor: Tensor | None, divisor: Tensor | None, projection: float, dots: bool
) -> Tensor | None:
    """``grad = project(factor * grad)``, dense; returns ``sum(weight * grad / divisor)`` (O,) if ``dots``."""
    if grad.numel() == 0:
        return grad.new_zeros((grad.shape[0],), dtype=accumulation(grad)) if dots else None
    if not dots and factor is None and (projection == 0.0 or _taps(grad) == 1):
        return None
    dense_weight = weight.contiguous(memory_format=memory_format(grad)) if dots else None
    return _finish(grad, 1, _innermost(grad), grad, dense_weight, factor, divisor, projection)


def scale_filters(weight: Tensor, gain: Tensor) -> Tensor:
    """``gain * weight`` of each filter, in the dtype of ``weight`` and dense; gain (O,) in the accumulation type."""
    weight = tensors.dense(weight)
    scaled = torch.empty_like(weight)
    if weight.numel() == 0:
        return scaled
    rows, length = weight.shape[0], weight[0].numel()
    block = min(2048, triton.next_power_of_2(length))
    with on(weight):
        _scale_rows[ceil_divide(rows, 2048 // block) * ceil_divide(length, block),](
            weight, gain, scaled, rows, length, ROWS=2048 // block, BLOCK=block, VECTOR=_vector(length, weight, scaled),
            num_warps=4,
        )  # fmt: skip
    return scaled


def finish_weight_grad_(
    grad_weight: Tensor, weight: Tensor, gain: Tensor | None, scale: Tensor | None, projection: float
) -> Tensor:
    tensors.check_dtype(grad_weight)
    tensors.check_same("grad_weight", grad_weight, weight)
    factor = tensors.vector_of(gain, weight.shape[0], weight, "gain")
    divisor = tensors.vector_of(scale, weight.shape[0], weight, "scale")
    if divisor is not None:
        factor = divisor.reciprocal() if factor is None else factor / divisor
    grad = tensors.dense(grad_weight)
    dgain = finish_in_place(grad, weight, factor, divisor, projection, True)
    if grad is not grad_weight:
        grad_weight.copy_(grad)
    tensors.mark_changed(grad_weight)
    return dgain


class _Sent(NamedTuple):
    table: Tensor
    host: Tensor
    stream: torch.cuda.Stream
    event: torch.cuda.Event


_sent: OrderedDict[tuple, _Sent] = OrderedDict()
# CUDA graphs read what was there when they were captured: a table, and from where they copy it if nothing has yet.
_captured: dict[tuple, tuple[Tensor, Tensor | None]] = {}
# Pinned memory for the tables of graphs, since none can be had while one is captured.
_reserve = torch.empty(0, dtype=torch.int64, device="cpu")


def _on_device(rows: tuple[tuple[int, ...], ...], like: Tensor) -> Tensor:
    """The table on the device of ``like``; kept, since gradients mostly stay where they are from step to step."""
    global _reserve
    if like.device.type != "cuda":
        return torch.tensor(rows, device=like.device)
    key = (like.device, rows)
    if torch.cuda.is_current_stream_capturing():
        return _for_graph(key)
    if _reserve.numel() < _RESERVE // 2:
        _reserve = torch.empty(_RESERVE, dtype=torch.int64, device="cpu", pin_memory=True)
    stream = torch.cuda.current_stream(like.device)
    sent = _sent.pop(key, None)
    if sent is None:
        host = torch.tensor(rows, device="cpu").pin_memory()
        sent = _Sent(host.to(like.device, non_blocking=True), host, stream, stream.record_event())
    _sent[key] = sent
    if len(_sent) > _TABLES:
        _sent.popitem(last=False)
    if sent.stream != stream:
        stream.wait_event(sent.event)
        sent.table.record_stream(stream)
    return sent.table


def _for_graph(key: tuple) -> Tensor:
    """The table for the graph that is captured. Gradients that it allocates itself are where none were before."""
    global _reserve
    if key not in _captured:
        device, rows = key
        if key in _sent:
            # A capture begins when the device has finished what it was given before.
            _captured[key] = _sent[key].table, None
        else:
            numbers = torch.tensor(rows, device="cpu")
            if _reserve.numel() < numbers.numel():
                raise RuntimeError("project_kernel_gradients_: run one step before a CUDA graph is captured")
            host, _reserve = _reserve[: numbers.numel()].view_as(numbers), _reserve[numbers.numel() :]
            _captured[key] = torch.empty_like(numbers, device=device), host.copy_(numbers)
    table, host = _captured[key]
    if host is not None:
        # In every graph, since any may run first.
        table.copy_(host, non_blocking=True)
    return table


class _Tile(NamedTuple):
    """What is compiled for; gradients that are alike in it share a launch."""

    taps: int
    channels_innermost: bool
    vector: int
    whole: bool


def _tile_of(gradient: Tensor) -> _Tile:
    innermost, taps = _innermost(gradient), _taps(gradient)
    block = min(_MOST_TAPS, triton.next_power_of_2(taps))
    return _Tile(block, innermost, _vector(gradient.shape[1], gradient) if innermost else 1, taps <= block)


def _project(gradients: Sequence[Tensor], tile: _Tile, weight: float) -> None:
    """In one launch, of dense gradients of one dtype on one device."""
    entries, programs, per_program = [], 0, _TILE // tile.taps
    for gradient in gradients:
        kernels = gradient.shape[0] * gradient.shape[1]
        entries.append((programs, gradient.data_ptr(), kernels, gradient.shape[1], _taps(gradient)))
        programs += ceil_divide(kernels, per_program)
    count = triton.next_power_of_2(len(entries))
    entries += [(programs, 0, 0, 0, 0)] * (count - len(entries))
    first = gradients[0]
    with on(first):
        _project_tiles[programs,](
            _on_device(tuple(zip(*entries)), first), weight, COUNT=count, DTYPE=_TRITON[first.dtype], TAPS=tile.taps,
            KERNELS=per_program, CHANNELS_INNERMOST=tile.channels_innermost, VECTOR=tile.vector, WHOLE=tile.whole,
            num_warps=8,
        )  # fmt: skip


_TRITON = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


def project_kernel_gradients_(gradients: Sequence[Tensor], weight: float) -> None:
    changed = [g for g in gradients if g.dim() >= 3 and _taps(g) > 1 and g.numel() > 0]
    launches: dict[tuple, list[Tensor]] = {}
    dense_gradients: dict[tuple, Tensor] = {}
    times: dict[int, int] = {}
    for gradient in changed:
        tensors.check_dtype(gradient)
        dense = dense_gradients.setdefault(_view(gradient), tensors.dense(gradient))
        # The same gradient again waits for the launch that changes it.
        place = dense.data_ptr()
        times[place] = times.get(place, 0) + 1
        launches.setdefault((gradient.device, gradient.dtype, _tile_of(dense), times[place]), []).append(dense)
    for (*_, tile, _), alike in launches.items():
        _project(alike, tile, weight)
    for gradient in changed:
        projected = dense_gradients[_view(gradient)]
        if projected.data_ptr() != gradient.data_ptr():
            gradient.copy_(projected)
        tensors.mark_changed(gradient)


def _view(tensor: Tensor) -> tuple:
    """Equal for tensors that are the same numbers."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
