"""The convolutions of the CUDA backend, each algorithm at its boundaries: on the host harness, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import GPU, assert_within_budget, harness, library
from conv_cases import BY_ID, CASES, Case, check_convolution
from test_ops import name_of

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, backends

on_cuda = pytest.mark.parametrize(
    "backend", ["host_cuda", *(param for param in GPU if param.values[0] == "cuda")], indirect=True
)
pytestmark = on_cuda
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NEEDS_NEWER = "needs compute capability 9.0"


def takes(algorithm: str, case: Case) -> bool:
    """As the legality functions of csrc/cuda have it, for tensors in 16 bits or TF32."""
    if len(case.size) == 1:  # PyTorch has no channels_last for these
        return False
    if algorithm == "direct":
        return case.is_direct and case.channels // case.groups <= 8
    if case.groups > 1 and case.filters // case.groups % 8:
        return False
    if not algorithm.endswith("sm90"):
        return True
    channels = case.channels // case.groups
    held = algorithm.startswith("held")
    return channels % 8 == 0 and (case.groups == 1 or channels % 64 == 0) and (not held or case.pixels >= 21)


def runs(algorithm: str, dtype: torch.dtype, *ids: str):
    """A parameter for each case that the algorithm takes, of all or of those named."""
    cases = [BY_ID[id] for id in ids] if ids else CASES
    return [
        pytest.param(case, algorithm, dtype, id=f"{algorithm}-{name_of(dtype)}-{case.id}")
        for case in cases
        if takes(algorithm, case)
    ]


@pytest.fixture
def prefer(backend):
    """Prefers an algorithm, where the GPU has it."""

    def prefer(algorithm: str):
        if backend == "cuda" and algorithm.endswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip(NEEDS_NEWER)
        return backends.prefer(algorithm, backend)

    return prefer


@pytest.mark.parametrize(
    ("case", "algorithm", "dtype"),
    [
        *runs("fused sm80", F32),
        *runs("held sm80", BF16),
        *runs("fused sm90", F16),
        *runs("held sm90", BF16),
        *runs("direct", F32),
        *runs("direct", F64, "depthwise", "depthwise-two-filters-a-channel"),
        *runs("direct", BF16, "depthwise-strided", "depthwise", "odd-groups"),
        *runs("fused sm80", F16, "3x3-odd-channels", "3x3-strided", "two-groups"),
        *runs("two passes", F32, "3x3"),
    ],
)
def test_convolutions(backend, prefer, case, algorithm, dtype, poisoned_memory):
    check_convolution(case, backend, dtype, prefer(algorithm))


# Layers that a GPU of so few processors cuts like this: samples, channels, filters, size and taps a side.
PLANS = [
    ("fused sm80", BF16, 1, (1, 8, 8, 7, 1), {"rows": 64, "columns": 64}),
    ("fused sm80", BF16, 1, (1, 8, 8, 14, 1), {"rows": 128, "columns": 64}),
    ("fused sm80", BF16, 1, (3, 32, 8, 7, 3), {"rows": 256, "columns": 64}),
    ("fused sm80", F16, 1, (1, 24, 72, 9, 3), {"rows": 128, "columns": 128}),
    ("fused sm80", BF16, 1, (3, 8, 72, 7, 3), {"rows": 256, "columns": 128}),
    ("fused sm80", F32, 1, (1, 8, 8, 14, 1), {"rows": 128, "columns": 64}),
    ("held sm80", BF16, 1, (1, 8, 72, 14, 1), {"rows": 256, "columns": 128}),
    ("held sm80", BF16, 4, (1, 72, 72, 14, 3), {"rows": 128, "columns": 128, "splits": 2}),
    ("held sm80", F32, 1, (2, 64, 64, 14, 1), {"rows": 64, "columns": 64, "splits": 2}),
    ("fused sm90", BF16, 1, (1, 8, 8, 7, 1), {"columns": 64, "shared_tile": False}),
    ("fused sm90", F16, 1, (1, 8, 72, 7, 3), {"columns": 128, "shared_tile": False}),
    ("fused sm90", BF16, 1, (3, 8, 72, 7, 1), {"columns": 128, "shared_tile": True}),
    ("held sm90", BF16, 1, (1, 8, 256, 28, 1), {"columns": 128, "shared_tile": False, "cluster": 7}),
    ("held sm90", F16, 1, (3, 8, 8, 7, 3), {"columns": 64, "shared_tile": False, "cluster": 3}),
    ("held sm90", BF16, 1, (2, 8, 8, 17, 1), {"columns": 64, "shared_tile": False, "cluster": 8}),
    ("held sm90", F16, 1, (3, 8, 8, 7, 1), {"columns": 128, "shared_tile": True, "cluster": 1}),
    ("held sm90", BF16, 1, (2, 8, 72, 17, 1), {"columns": 128, "shared_tile": True, "cluster": 3}),
    ("held sm90", BF16, 1, (5, 8, 8, 20, 1), {"columns": 128, "shared_tile": True, "cluster": 8}),
    ("weight_grad", BF16, 1, (3, 8, 8, 7, 1), {"rows": 64, "columns": 64, "splits": 5}),
    ("weight_grad", F32, 1, (1, 32, 8, 7, 3), {"rows": 64, "columns": 128, "splits": 1}),
    ("weight_grad", F16, 1, (1, 8, 264, 7, 1), {"rows": 128, "columns": 64, "splits": 1}),
    ("weight_grad", F32, 1, (1, 8, 72, 7, 3), {"rows": 128, "columns": 128, "splits": 2}),
    ("weight_grad", BF16, 2, (1, 16, 8, 7, 3), {"rows": 128, "columns": 256, "splits": 2}),
    ("weight_grad", F32, 1, (1, 16, 72, 7, 3), {"rows": 128, "columns": 256, "splits": 1}),
    ("weight_grad", F16, 1, (1, 8, 136, 7, 3), {"rows": 256, "columns": 128, "splits": 1}),
    ("weight_grad", F32, 2, (1, 8, 136, 7, 3), {"rows": 256, "columns": 128, "splits": 2}),
]


@pytest.mark.parametrize(("what", "dtype", "processors", "layer", "wanted"), PLANS)
def test_every_tile(backend, prefer, what, dtype, processors, layer, wanted, poisoned_memory):
    """Of the forward pass and of the weight gradient, whether it is split, and clusters of any number of blocks."""
    if backend != "host_cuda":
        pytest.skip("a GPU has as many processors as it has")
    samples, channels, filters, size, taps = layer
    harness().configure(processors=processors)
    ones, triple = (1, 1, 1), (1, taps, taps)
    plans = _ops.extension.plan_conv(
        samples, channels, filters, 1, (1, size, size), triple, ones, (0, taps // 2, taps // 2), ones,
        str(dtype).removeprefix("torch."), processors=processors,
    )  # fmt: skip
    plan = plans["weight_grad"] if what == "weight_grad" else plans["algorithms"][what]
    assert {key: plan[key] for key in wanted} == wanted
    case = Case("plan", channels, filters, (size, size), taps, padding=taps // 2, batch=samples)
    check_convolution(case, backend, dtype, prefer("fused sm80" if what == "weight_grad" else what))


@pytest.mark.parametrize("algorithm", ["fused sm80", "fused sm90", "direct"])
def test_a_mean_that_is_left_in(backend, prefer, algorithm, poisoned_memory):
    case = BY_ID["depthwise-strided" if algorithm == "direct" else "3x3"]
    check_convolution(case, backend, F16, prefer(algorithm), mean_scale=0.0)


def forward(backend: str, x, w, *geometry, constant=1.0, activation="identity", save=False):
    return library(backend).conv_center(x, w, None, None, constant, None, None, *geometry, activation, 0.0, save)


ONE = ([1, 1], [1, 1], [1, 1], 1)


def channels_last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("algorithm", ["fused sm80", "held sm80"])
def test_operands_are_rounded_to_tf32(backend, prefer, algorithm):
    """To the nearest: then all that is left is the rounding of float32's sums."""
    x, w = channels_last(2, 64, 7, 7, dtype=F32), channels_last(40, 64, 3, 3, dtype=F32)

    def rounded(tensor):
        bits = tensor.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(F32)

    # Means that are known before are those of numbers that nobody has rounded.
    constant = 1.0 if algorithm.startswith("held") else 0.0
    with prefer(algorithm), torch.backends.cudnn.flags(allow_tf32=True):
        output, map_mean, _ = forward(backend, x, w, *ONE, constant=constant)
    z = torch.nn.functional.conv2d(rounded(x).double(), rounded(w).double(), padding=1)
    low = torch.nn.functional.conv2d(rounded(x), rounded(w), padding=1)
    wanted, of_low = (tensor - constant * tensor.mean((2, 3), keepdim=True) for tensor in (z, low))
    assert_within_budget(output, wanted, of_low, F32, z.abs().max().item())
    if constant:
        assert_within_budget(map_mean, z.mean((2, 3)), low.mean((2, 3)), F32, z.abs().max().item())


@pytest.mark.parametrize("algorithm", [name for name in backends.ALGORITHMS["cuda"] if name != "two passes"])
def test_a_sample_does_not_depend_on_its_batch(backend, prefer, algorithm):
    """Bit for bit; means that a tile takes add up its rows in groups, which depend on where the sample begins."""
    groups = 32 if algorithm == "direct" else 1
    x, w = channels_last(5, 32, 9, 9, dtype=BF16), channels_last(32, 32 // groups, 3, 3, dtype=BF16)
    with prefer(algorithm):
        whole, alone = (forward(backend, part, w, *ONE[:3], groups, activation="silu") for part in (x, x[3:4]))
    for of_five, of_one in zip(whole, alone):
        torch.testing.assert_close(of_five[3:4], of_one, rtol=1e-2 if algorithm.startswith("held") else 0, atol=1e-5)


@pytest.mark.parametrize("algorithm", [name for name in backends.ALGORITHMS["cuda"] if name != "two passes"])
def test_runs_are_bit_equal(backend, prefer, algorithm):
    groups = 32 if algorithm == "direct" else 1
    x, w = channels_last(3, 32, 9, 9, dtype=BF16), channels_last(64, 32 // groups, 3, 3, dtype=BF16)
    gain, seed = torch.rand(64) + 0.5, channels_last(3, 64, 9, 9, dtype=BF16)
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, w, gain)]
        with prefer(algorithm):
            y = dc.functional.deep_control_conv2d(
                *leaves, None, None, 1, 1, 1, groups, activation="relu", projection=0.9, backend=backend
            )
            y.backward(seed)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for repeat in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], repeat))


@pytest.mark.parametrize("algorithm", ["fused sm80", "held sm80", "fused sm90", "held sm90", "direct"])
def test_bits_unpack_to_the_mask(backend, prefer, algorithm):
    """Also where the last byte of a row is not full."""
    for filters in (24, 33) if algorithm != "direct" else (16, 32):
        groups = 16 if algorithm == "direct" else 1
        x, w = channels_last(2, 16, 5, 7, dtype=BF16), channels_last(filters, 16 // groups, 3, 3, dtype=BF16)
        with prefer(algorithm):
            output, _, bits = forward(backend, x, w, *ONE[:3], groups, activation="relu", save=True)
        assert torch.equal(_ops.unpack_bits(bits, output.shape, True), output > 0)


REFUSED = {
    "contiguous": ({"x": torch.randn(2, 16, 5, 5), "w": torch.randn(16, 16, 3, 3)}, "not in channels_last"),
    "float64": ({"dtype": F64}, "(no float64|bfloat16 and float16 only)"),
    "float32 without TF32": ({"dtype": F32}, "(TF32|bfloat16 and float16 only)"),
    "odd groups": ({"channels": 9, "filters": 15, "groups": 3}, "group"),
    "no samples": ({"batch": 0}, "nothing to compute"),
}


@pytest.mark.parametrize("algorithm", ["fused sm80", "held sm80", "fused sm90", "held sm90"])
@pytest.mark.parametrize("why", REFUSED)
def test_what_a_kernel_does_not_take_is_refused_with_the_reason(backend, prefer, algorithm, why):
    """By name; the automatic choice passes on."""
    change, words = REFUSED[why]
    dtype, groups = change.get("dtype", BF16), change.get("groups", 1)
    channels, filters = change.get("channels", 16), change.get("filters", 16)
    x = change.get("x", channels_last(change.get("batch", 2), channels, 5, 5, dtype=dtype)).to(dtype)
    w = change.get("w", channels_last(filters, channels // groups, 3, 3, dtype=dtype)).to(dtype)
    geometry = (*ONE[:3], groups)
    with prefer(algorithm), pytest.raises(RuntimeError, match=f"algorithm '{algorithm}': .*{words}"):
        forward(backend, x, w, *geometry)
    y = forward(backend, x, w, *geometry)[0]
    assert y.shape == (len(x), filters, 5, 5)
    if y.numel():
        z = torch.nn.functional.conv2d(x, w, padding=1, groups=groups).double()
        torch.testing.assert_close(y.double(), z - z.mean((2, 3), keepdim=True), rtol=1e-2, atol=5e-2)


REFUSED_BY_ONE = [
    ("held sm80", {"size": 17}, "256 pixels"),
    ("held sm90", {"size": 60}, "pixels"),
    ("fused sm90", {"channels": 12}, "multiple of 8"),
    ("fused sm90", {"stride": 9}, "stride"),
    ("direct", {}, "all channels are one group"),
]


@pytest.mark.parametrize(("algorithm", "change", "words"), REFUSED_BY_ONE)
def test_limits_of_one_kernel(backend, prefer, algorithm, change, words):
    size, channels, stride = change.get("size", 7), change.get("channels", 16), change.get("stride", 1)
    x, w = channels_last(1, channels, size, size, dtype=BF16), channels_last(8, channels, 1, 1, dtype=BF16)
    with prefer(algorithm), pytest.raises(RuntimeError, match=f"algorithm '{algorithm}': .*{words}"):
        forward(backend, x, w, [stride] * 2, [0, 0], [1, 1], 1)


@pytest.mark.parametrize("algorithm", ["fused sm80", "held sm80"])
def test_one_channel_of_many(backend, prefer, algorithm):
    """A slice is channels_last although one channel alone could be either."""
    x, w = channels_last(3, 4, 9, 8, dtype=BF16)[:, 1:2], channels_last(16, 1, 3, 3, dtype=BF16)
    with prefer(algorithm):
        got = forward(backend, x, w.to(memory_format=torch.channels_last), *ONE)[0]
    z = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    torch.testing.assert_close(got.double(), z - z.mean((2, 3), keepdim=True), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("algorithm", ["fused sm80", "fused sm90"])
def test_infinity_stays_infinity_in_a_mean(backend, prefer, algorithm):
    x, w = channels_last(2, 16, 17, 17, dtype=BF16), channels_last(16, 16, 1, 1, dtype=BF16).abs()
    x[0, 3, 5, 5] = float("inf")
    with prefer(algorithm):
        output, map_mean, _ = forward(backend, x, w, [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(map_mean[0], torch.full((16,), float("inf")))
    assert output[0].isnan().sum() == 16  # the pixel itself, of each map
    assert output[1].isfinite().all()


def test_padding_that_leaves_32_bits(backend, prefer):
    x, w = channels_last(1, 8, 3, 4096, dtype=BF16), channels_last(8, 8, 3, 1, dtype=BF16)
    for algorithm in ("fused sm80", "fused sm90"):
        with prefer(algorithm), pytest.raises(RuntimeError, match=r"(padding|stride)"):
            forward(backend, x, w, [2**19, 1], [2**19, 0], [2**19, 1], 1)


def test_a_kernel_that_is_larger_than_the_padded_input(backend, prefer):
    x, w = channels_last(1, 16, 2, 2, dtype=BF16), channels_last(16, 16, 3, 3, dtype=BF16)
    for algorithm in backends.ALGORITHMS["cuda"]:
        with prefer(algorithm), pytest.raises(ValueError, match="leaves an empty output"):
            forward(backend, x, w, [2, 2], [0, 0], [1, 1], 1)


def test_a_gpu_with_too_little_shared_memory(backend, prefer):
    if backend != "host_cuda":
        pytest.skip("played by the harness")
    harness().configure(shared_memory=32 * 1024)
    x, w = channels_last(2, 16, 7, 7, dtype=BF16), channels_last(16, 16, 3, 3, dtype=BF16)
    for algorithm in ("fused sm80", "held sm80", "fused sm90", "held sm90"):
        with prefer(algorithm), pytest.raises(RuntimeError, match=r"(shared memory|no tile holds)"):
            forward(backend, x, w, *ONE)
    assert library(backend).conv_algorithm(x, w, *ONE) == "two passes"


def test_the_fastest_that_was_timed_is_chosen(backend):
    """Of layers of that kernel; 1x3x3 is another one than 3x3."""
    if backend != "host_cuda":
        pytest.skip("what is remembered stays")
    x, w = channels_last(3, 24, 7, 7, dtype=BF16), channels_last(40, 24, 3, 3, dtype=BF16)
    ops = library(backend)
    before = ops.conv_algorithm(x, w, *ONE)
    for name in ("fused sm80", "held sm80", "two passes", before):
        ops.remember_fastest_algorithm("9.0", "bfloat16", "3x3, 24 to 40, stride 1x1, groups 1", name)
        assert ops.conv_algorithm(x, w, *ONE) == name
        deep = (x.unsqueeze(2), w.unsqueeze(2), [1, 1, 1], [0, 1, 1], [1, 1, 1], 1)
        deep = (*(t.contiguous(memory_format=torch.channels_last_3d) for t in deep[:2]), *deep[2:])
        assert ops.conv_algorithm(*deep) == before


def test_an_unknown_algorithm(backend):
    with pytest.raises(ValueError, match="algorithm: got 'fastest', wanted one of 'fused sm90', 'held sm90', "):
        backends.prefer("fastest", backend).__enter__()


def test_the_preference_ends(backend):
    x, w = channels_last(2, 16, 5, 5, dtype=BF16), channels_last(16, 16, 3, 3, dtype=BF16)
    chosen = library(backend).conv_algorithm(x, w, *ONE)
    with backends.prefer("two passes", backend):
        assert library(backend).conv_algorithm(x, w, *ONE) == "two passes"
        with backends.prefer("held sm80", backend):
            assert library(backend).conv_algorithm(x, w, *ONE) == "held sm80"
        assert library(backend).conv_algorithm(x, w, *ONE) == "two passes"
    assert library(backend).conv_algorithm(x, w, *ONE) == chosen


@pytest.mark.parametrize(
    ("algorithm", "launches"),
    [("held sm90", 1), ("held sm80", 1), ("direct", 1), ("fused sm90", 3), ("fused sm80", 3), ("two passes", 1)],
)
def test_launches(backend, algorithm, launches):
    """Of kernels of this package; the library's convolution is one more."""
    if backend != "host_cuda":
        pytest.skip("counted on the harness")
    groups = 16 if algorithm == "direct" else 1
    x, w = channels_last(3, 16, 7, 7, dtype=BF16), channels_last(16, 16 // groups, 3, 3, dtype=BF16)
    emulator = harness()
    # So few that no sum must be split to keep them busy.
    emulator.configure(processors=1)
    emulator.take_counts()
    with backends.prefer(algorithm, backend):
        forward(backend, x, w, *ONE[:3], groups)
    assert sum(count.launches for count in emulator.take_counts().values()) == launches
