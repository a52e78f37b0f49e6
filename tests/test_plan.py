"""How the CUDA kernels cut maps into blocks: fits the GPU, covers every map, keeps several blocks a multiprocessor."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepcontrol_cuda import _ops

plan_center = _ops.extension.plan_center
H100 = {"capability": 90, "processors": 132, "shared_memory": 227 * 1024}
A100 = {"capability": 80, "processors": 108, "shared_memory": 163 * 1024}
RTX_3090 = {"capability": 86, "processors": 82, "shared_memory": 99 * 1024}
GPUS = {"H100": H100, "A100": A100, "RTX 3090": RTX_3090}
DTYPES = ("float32", "bfloat16", "float16", "float64")


@settings(max_examples=400, deadline=None)
@given(
    samples=st.integers(1, 300), channels=st.integers(1, 4100), side=st.integers(1, 300), innermost=st.booleans(),
    dtype=st.sampled_from(DTYPES), backward=st.booleans(), smooth=st.booleans(), gpu=st.sampled_from(list(GPUS)),
)  # fmt: skip
def test_every_plan_fits_and_covers(samples, channels, side, innermost, dtype, backward, smooth, gpu):
    pixels = side * side
    plan = plan_center(samples, channels, pixels, innermost, dtype, backward, smooth, **GPUS[gpu])
    vector = {"float32": 4, "bfloat16": 8, "float16": 8, "float64": 1}[dtype] if plan["vectorized"] else 1
    assert plan["shared"] <= GPUS[gpu]["shared_memory"]
    assert plan["parts"] * plan["part"] >= pixels
    assert plan["lanes"] * vector % 8 == 0 or not innermost  # whole bytes of bits
    if plan["cluster"]:
        assert GPUS[gpu]["capability"] >= 90
        assert plan["parts"] in (2, 4, 8)
    else:
        assert (plan["parts"] - 1) * plan["part"] < pixels  # no block for nothing
    tiles = -(-channels // (plan["lanes"] * vector)) if innermost else -(-channels * samples // plan["maps"])
    assert plan["blocks"] == tiles * (samples if innermost else 1) * plan["parts"]
    if not innermost and plan["parts"] > 1:
        assert plan["maps"] == 1
        assert plan["part"] % 8 == 0


RESNET_MAPS = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]


@pytest.mark.parametrize("backward", [False, True], ids=("forward", "backward"))
@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize(("channels", "side"), RESNET_MAPS)
def test_resnet_maps_are_read_once_in_whole_sectors_on_hopper(channels, side, batch, backward):
    """bfloat16 channels_last: on chip, rows of 64 bytes or more, two blocks a multiprocessor."""
    plan = plan_center(batch, channels, side * side, True, backward=backward, **H100)
    assert plan["parts"] == 1 or plan["cluster"]
    assert plan["vectorized"]
    assert plan["lanes"] * 16 >= 64
    assert 2 * (plan["shared"] + 1024) <= 228 * 1024


def test_without_clusters_the_largest_maps_take_two_launches():
    plan = plan_center(64, 64, 112 * 112, True, **A100)
    assert plan["parts"] > 1
    assert not plan["cluster"]


@pytest.mark.parametrize("innermost", [False, True], ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(("channels", "side"), [*RESNET_MAPS, (19, 9)])
def test_how_a_map_is_summed_does_not_depend_on_the_batch(channels, side, innermost):
    plans = [plan_center(batch, channels, side * side, innermost, **H100) for batch in (1, 2, 64, 1000)]
    assert len({(p["lanes"], p["part"], p["parts"]) for p in plans}) == 1


plan_conv = _ops.extension.plan_conv


@settings(max_examples=300, deadline=None)
@given(
    samples=st.integers(1, 300), groups=st.sampled_from((1, 1, 1, 2, 32)), channels=st.integers(1, 160),
    filters=st.integers(1, 160), size=st.lists(st.integers(1, 60), min_size=3, max_size=3),
    kernel=st.lists(st.integers(1, 5), min_size=3, max_size=3), stride=st.integers(1, 3), padding=st.integers(0, 3),
    dilation=st.integers(1, 2), dtype=st.sampled_from(DTYPES), centred=st.booleans(), gpu=st.sampled_from(list(GPUS)),
)  # fmt: skip
def test_every_plan_of_a_convolution_fits_and_covers(
    samples, groups, channels, filters, size, kernel, stride, padding, dilation, dtype, centred, gpu
):
    output = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel)]
    if min(output) < 1:
        return
    plans = plan_conv(
        samples, channels * groups, filters * groups, groups, size, kernel, [stride] * 3, [padding] * 3, [dilation] * 3,
        dtype, centred=centred, **GPUS[gpu],
    )  # fmt: skip
    pixels, taken = math.prod(output), {}
    for name, plan in plans["algorithms"].items():
        if isinstance(plan, str):
            assert plan
            continue
        taken[name] = plan["seconds"]
        assert plan["seconds"] > 0
        if name == "two passes":
            continue
        assert 0 < plan["blocks"] < 2**31
        assert plan["shared"] <= GPUS[gpu]["shared_memory"]
        if name == "direct":
            continue
        # What a tile has of each split, or of a cluster's maps.
        rows = plan["used"] if plan["splits"] <= 1 and plan["held"] else plan["rows"]
        blocks = -(-samples * pixels // rows) * -(-filters // plan["columns"]) * groups
        if name.endswith("sm80"):
            assert plan["blocks"] == blocks * plan["splits"]
            assert (plan["workspace"] > 0) == (plan["splits"] > 1)
        else:
            assert GPUS[gpu]["capability"] == 90
            assert plan["blocks"] % plan["cluster"] == 0
            assert plan["blocks"] <= GPUS[gpu]["processors"]
        if name.startswith("held"):
            assert centred
            assert plan["samples"] * pixels <= plan["cluster"] * plan["used"]
    assert plans["chosen"] == min(taken, key=taken.__getitem__)
    product = plans["weight_grad"]
    if not isinstance(product, str):
        assert (
            product["splits"] * product["of_split"] >= samples * pixels > (product["splits"] - 1) * product["of_split"]
        )
        assert product["shared"] <= GPUS[gpu]["shared_memory"]
        assert product["workspace"] >= 4 * product["splits"] * filters * groups * math.prod(kernel) * channels


@pytest.mark.parametrize("gpu", ["A100", "RTX 3090"])
def test_other_gpus_have_no_kernels_of_the_h100(gpu):
    ones = (1, 1, 1)
    plans = plan_conv(64, 64, 64, 1, (1, 28, 28), ones, ones, (0, 0, 0), ones, **GPUS[gpu])
    assert plans["algorithms"]["fused sm90"] == "the GPU's compute capability is not 9.0"
    plans = plan_conv(64, 64, 64, 1, (1, 28, 28), ones, ones, (0, 0, 0), ones, sm90a=False)
    assert plans["algorithms"]["held sm90"].startswith("this build has no code for sm_90a")
    assert "sm90" not in plans["chosen"]


def test_a_large_layer_has_something_to_compute():
    """Its numbers multiply to a power of two that 64 bits do not hold."""
    ones = (1, 1, 1)
    plans = plan_conv(4, 128, 128, 1, (256, 256, 256), ones, ones, (0, 0, 0), ones)
    assert plans["chosen"] != "two passes"


def test_the_weight_gradient_is_taken_where_it_saves_a_pass():
    ones, triple = (1, 1, 1), (1, 3, 3)
    plans = plan_conv(256, 256, 256, 1, (1, 14, 14), triple, ones, (0, 1, 1), ones, **A100)
    assert plans["weight_grad"]["seconds"] < plans["library_weight_grad"]
    # wgmma, which the library has, is faster.
    plans = plan_conv(256, 256, 256, 1, (1, 14, 14), triple, ones, (0, 1, 1), ones, **H100)
    assert plans["weight_grad"]["seconds"] > plans["library_weight_grad"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 0}, "groups: got 0, wanted a divisor of 64 channels"),
        ({"groups": 3}, "groups: got 3"),
        ({"stride": (1, 0, 1)}, "stride"),
        ({"samples": -1}, "samples"),
        ({"processors": 0}, "processors"),
        ({"capability": 75}, "compute capability 8.0"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"size": (1, 2, 2), "kernel": (1, 3, 3)}, "larger than the padded input"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layer_that_cannot_be_is_refused(change, words):
    ones = (1, 1, 1)
    layer = {
        "samples": 2, "channels": 64, "filters": 64, "groups": 1, "size": (1, 8, 8), "kernel": ones, "stride": ones,
        "padding": (0, 0, 0), "dilation": ones,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        plan_conv(**(layer | change))
