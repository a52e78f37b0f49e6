"""The harness that runs CUDA kernels on the CPU lets right kernels pass and notices what is wrong with others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_cuda import build, faulty

HERE = Path(__file__).resolve().parent
SEEDS = range(20)

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(
    scope="module",
    params=[pytest.param(path, id="triton" if "triton" in path.parts else "toolkit") for path in build.cuda_headers()],
)
def kernels(request) -> faulty.Faulty:
    """Built with the headers of a CUDA toolkit and with those of Triton, where they are there."""
    return faulty.Faulty(build.faulty_library(cuda=request.param))


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return build.faulty_library(sanitize=True)


@pytest.fixture(autouse=True)
def gpu(request):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels").emulator.configure()


def outcomes(kernels, kernel: str, mistake: str) -> list[str]:
    """For each of a handful of seeds: "right", "wrong" or the message."""
    found = []
    for seed in SEEDS:
        kernels.emulator.configure(seed=seed)
        try:
            found.append("right" if getattr(kernels, kernel)(mistake) else "wrong")
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("kernel", ["sum_block", "sum_cluster", "sum_told"])
def test_right_kernels_pass_in_every_order(kernels, kernel):
    assert outcomes(kernels, kernel, "none") == ["right"] * len(SEEDS)


TILES = {
    "bf16": {"dtype": torch.bfloat16},
    "bf16 transposed": {"dtype": torch.bfloat16, "transposed": True},
    "f16": {"dtype": torch.float16},
    "f16 transposed": {"dtype": torch.float16, "transposed": True},
    "tf32": {"dtype": torch.float32},
    "bf16 and zeros": {"dtype": torch.bfloat16, "there": 16},
    "tf32 and zeros": {"dtype": torch.float32, "there": 48},
}


@pytest.mark.parametrize("case", TILES)
def test_tensor_cores_multiply(kernels, case):
    assert kernels.multiply_tile(**TILES[case])


def test_tf32_that_is_not_rounded_gives_a_wrong_result(kernels):
    assert not kernels.multiply_tile("not_rounded")


CONVOLUTIONS = {
    "bf16": {},
    "f16": {"dtype": torch.float16, "channels": 8, "padding": (0, 1)},
    "3d": {"size": (3, 7, 6), "taps": (2, 3, 3), "stride": (1, 2, 3), "padding": (1, 3, 2), "dilation": (1, 1, 2)},
    "pointwise": {"taps": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "channels": 128},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_boxes_and_products_of_warpgroups_make_a_convolution_in_every_order(kernels, case):
    for seed in SEEDS[:5]:
        kernels.emulator.configure(seed=seed)
        assert kernels.convolve(**CONVOLUTIONS[case])


@pytest.mark.parametrize("mistake", ["reads_sums_early", "no_group_barrier"])
def test_what_other_threads_or_products_still_write_gives_a_wrong_result(kernels, mistake):
    assert outcomes(kernels, "convolve", mistake).count("wrong") >= len(SEEDS) // 2


IM2COL = {"corners": ((-1, -2), (-3, 1)), "box": (64, 128)}
INVALID, NOT_SUPPORTED = 1, 801
MAPS = {
    "tiles": ({}, 0),
    "no swizzle": ({"swizzle": 0, "box": (256, 1, 1, 256)}, 0),
    "strided": ({"steps": (0, 1, 8, 2)}, 0),
    "im2col": (IM2COL, 0),
    "im2col 3d": (IM2COL | {"sizes": (72, 9, 8)}, 0),
    "im2col 5d": (
        IM2COL | {"sizes": (72, 9, 8, 2, 1), "strides": (144, 1296, 10368, 20736), "steps": (1,) * 5}
        | {"corners": ((-1, -2, -16), (0, 0, 15))}, 0,
    ),
    "bytes": ({"dtype": "u8", "box": (128, 1, 1, 1)}, 0),
    "NaN outside": ({"fill": 1}, 0),
    "rank": ({"sizes": (8,) * 6}, INVALID),
    "im2col rank": (IM2COL | {"sizes": (72, 9)}, INVALID),
    "address": ({"address": (1 << 20) + 8}, INVALID),
    "no elements": ({"sizes": (72, 0, 8, 2)}, INVALID),
    "too many elements": ({"sizes": (72, 9, 8, (1 << 32) + 1)}, INVALID),
    "stride": ({"strides": (150, 150 * 9, 150 * 72)}, INVALID),
    "stride of overlapping rows": ({"strides": (128, 128 * 9, 128 * 72)}, INVALID),
    "large stride": ({"strides": (144, 144 * 9, 1 << 40)}, INVALID),
    "empty box": ({"box": (64, 0, 2, 1)}, INVALID),
    "large box": ({"box": (64, 257, 2, 1)}, INVALID),
    "inner bytes": ({"box": (4, 1, 1, 1), "swizzle": 0}, INVALID),
    "more than the swizzle": ({"box": (72, 1, 1, 1)}, INVALID),
    "less than the swizzle": ({"box": (32, 1, 1, 1)}, NOT_SUPPORTED),
    "no step": ({"steps": (1, 0, 1, 1)}, INVALID),
    "long step": ({"steps": (1, 9, 1, 1)}, INVALID),
    "interleaved": ({"interleave": 1}, NOT_SUPPORTED),
    "packed": ({"dtype": "u4"}, NOT_SUPPORTED),
    "NaN in integers": ({"dtype": "i32", "box": (32, 1, 1, 1), "fill": 1}, INVALID),
    "lower corner": (IM2COL | {"corners": ((-129, 0), (0, 0))}, INVALID),
    "upper corner": (IM2COL | {"corners": ((0, 0), (0, 128))}, INVALID),
    "corner 5d": (
        IM2COL | {"sizes": (72, 9, 8, 2, 1), "strides": (144, 1296, 10368, 20736), "steps": (1,) * 5}
        | {"corners": ((0, 0, -17), (0, 0, 0))}, INVALID,
    ),
    "empty bounding box": (IM2COL | {"corners": ((0, 0), (-9, 0))}, INVALID),
    "pixels": (IM2COL | {"box": (64, 1025)}, INVALID),
    "channels": (IM2COL | {"box": (264, 16), "swizzle": 0}, INVALID),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPS)
def test_the_driver_makes_tensor_maps_by_its_rules(kernels, case):
    arguments, wanted = MAPS[case]
    assert kernels.encode(**arguments) == wanted


@pytest.mark.parametrize("mistake", ["no_barrier", "no_barrier_after_copy", "reuses_memory_early"])
def test_a_missing_barrier_gives_a_wrong_result(kernels, mistake):
    assert outcomes(kernels, "sum_block", mistake).count("wrong") >= len(SEEDS) // 2


def test_sums_that_were_not_waited_for_give_a_wrong_result(kernels):
    assert outcomes(kernels, "sum_told", "no_cluster_wait").count("wrong") >= len(SEEDS) // 2


def test_a_read_behind_shared_memory_gives_a_wrong_result(kernels):
    assert outcomes(kernels, "sum_block", "reads_past_shared") == ["wrong"] * len(SEEDS)


ERRORS = {
    ("sum_block", "no_commit"): "exits before it waited for this asynchronous copy",
    ("sum_block", "no_copy_wait"): "exits before it waited for this asynchronous copy",
    ("sum_block", "misaligned_copy"): "copy_async_16 from an address that is no multiple of 16",
    ("sum_block", "misaligned_target"): "of shared memory, no multiple of 16",
    ("sum_block", "copies_past_shared"): "copy_async_16 to byte 2064 of 2064 of shared memory",
    ("sum_block", "source_overwritten"): "the source of this asynchronous copy changed before its end",
    ("sum_block", "target_overwritten"): "something else was written where this asynchronous copy goes",
    ("sum_block", "misaligned_access"): "an access that must be aligned to 16 bytes is ",
    ("sum_block", "writes_past_shared"): "something was written behind its 2064 bytes of shared memory",
    ("sum_block", "divergent_barrier"): "__syncthreads here, while others of the block wait in the one at faulty.cu:",
    ("sum_block", "early_exit"): "threads 96 to 127 have exited",
    ("sum_block", "mismatched_collective"): "of other lanes at faulty.cu:",
    ("sum_block", "partial_collective"): "deadlock: block",
    ("sum_cluster", "no_cluster_barrier"): "load_from_cluster before cluster_wait",
    ("sum_cluster", "no_cluster_wait_at_exit"): "block",
    ("sum_cluster", "no_cluster_wait"): "cluster_arrive twice without cluster_wait",
    ("sum_cluster", "rank_outside"): "load_from_cluster from block 4 of a cluster of 4",
    ("sum_told", "no_cluster_barrier"): "",
    ("sum_told", "no_cluster_wait_at_exit"): "block",
    ("sum_told", "waits_in_block"): "wait_barrier for what other blocks of the cluster did",
    ("multiply_tile", "misaligned_row"): "load_matrices from byte 568 of shared memory, no multiple of 16",
    ("multiply_tile", "row_outside"): "load_matrices from byte 3120 of 3072 of shared memory",
    ("multiply_tile", "skips_load"): "of other lanes at faulty.cu:",
    ("multiply_tile", "parted_lanes"): "multiply_add<f32>, while other lanes wait in the one at faulty.cu:",
    ("convolve", "no_fence_barriers"): "load_pixels with a barrier that no fence_barriers has made known",
    ("convolve", "no_barrier_after_init"): "initialised",
    ("convolve", "no_wait_for_load"): "",
    ("convolve", "no_wait_for_release"): "arrive_and_expect once more than the barrier's 1 arrivals",
    ("convolve", "releases_early"): "the operands of these products changed before products_wait",
    ("convolve", "arrives_twice"): "",
    ("convolve", "wrong_parity"): "",
    ("convolve", "expects_less"): "load_box brings more bytes than the phase of its barrier expects",
    ("convolve", "expects_more"): "0 arrivals are missing, 10304 bytes are announced, 10240 under way",
    ("convolve", "load_not_waited"): "ends before it waited for this load",
    ("convolve", "source_of_load_overwritten"): "the source of this load changed before its end",
    ("convolve", "misaligned_tile"): "",
    ("convolve", "begins_outside"): "load_pixels from -2 in dimension 2; the bounding box is -1 to 7",
    ("convolve", "no_products_begin"): "multiply_add_group without products_begin",
    ("convolve", "no_products_commit"): "exits before products_commit and products_wait for this product",
    ("convolve", "no_products_wait"): "exits before products_wait for this product",
    ("convolve", "changes_sums_early"): "the sums of these products were changed before products_wait",
    ("convolve", "skips_product"): "another warp of the warpgroup did something else in its place",
    ("convolve", "too_many_registers"): "the warpgroups have more than 65536 registers",
}


@pytest.mark.parametrize(("kernel", "mistake"), [pytest.param(*key, id=key[1]) for key in ERRORS])
def test_mistakes_end_the_launch_in_every_order(kernels, kernel, mistake):
    for outcome in outcomes(kernels, kernel, mistake):
        assert re.match(rf"{kernel}(<.*>)? of faulty\.cu: ", outcome)
        assert ERRORS[kernel, mistake] in outcome
        assert "[seed " in outcome
    assert getattr(kernels, kernel)(), "the next launch is not what it should be"


LIMITS = {
    "no blocks": ({"blocks": 0}, "a grid of 0 x 1 x 1 blocks"),
    "threads": ({"threads": 1025}, "1025 threads a block; the limit is 1024"),
    "shared memory": ({"shared": 300_000}, "300000 bytes of shared memory; the device has 232448 a block"),
    "asked for too much": ({"shared": 300_000, "ask": True}, "cudaFuncSetAttribute: 300000 bytes of shared memory"),
    "not asked for": ({"shared": 49_153}, "49153 bytes of shared memory; cudaFuncSetAttribute allowed 49152"),
    "cluster": ({"blocks": 16, "cluster": 16}, "a cluster of 16 blocks; the limit is 8"),
    "part of a cluster": ({"blocks": 6, "cluster": 4}, "a cluster of 4 blocks in a grid of 6"),
    "stream": ({"default_stream": True}, "launched on another than the current stream"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_a_launch(kernels, limit):
    arguments, message = LIMITS[limit]
    with pytest.raises(RuntimeError, match=message):
        kernels.launch(**arguments)


def test_within_the_limits(kernels):
    kernels.launch(threads=1024, shared=232_448, blocks=8, cluster=8, ask=True)
    kernels.launch(shared=49_152)


@pytest.mark.parametrize("capability", [80, 100])
def test_boxes_and_products_of_warpgroups_are_for_one_architecture(kernels, capability):
    kernels.emulator.configure(capability=capability)
    with pytest.raises(RuntimeError, match=r"fence_barriers is for capability 9\.0 alone"):
        kernels.convolve()


def test_an_older_gpu_has_no_clusters(kernels):
    kernels.emulator.configure(capability=80, shared_memory=163 * 1024)
    with pytest.raises(RuntimeError, match=r"a cluster of 2 blocks needs capability 9\.0"):
        kernels.launch(blocks=2, cluster=2)
    with pytest.raises(RuntimeError, match="the device has 166912 a block"):
        kernels.launch(shared=166_913)


def test_a_gpu_with_little_shared_memory(kernels):
    kernels.emulator.configure(shared_memory=4096)
    kernels.launch(shared=4096)
    with pytest.raises(RuntimeError, match="4097 bytes of shared memory; the device has 4096 a block"):
        kernels.launch(shared=4097)


def test_counts(kernels):
    kernels.emulator.take_counts()
    kernels.sum_block(blocks=5)
    kernels.sum_block(blocks=5)
    kernels.sum_cluster(clusters=2, cluster=4)
    counts = kernels.emulator.take_counts()
    assert counts == {"sum_block of faulty.cu": (2, 10, 0), "sum_cluster of faulty.cu": (1, 8, 1)}
    assert kernels.emulator.take_counts() == {}


def test_static_shared_memory_does_not_compile(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void f() { __shared__ float x[4]; x[0] = 1; }\n")
    command = [*build.FLAGS, "-isystem", build.HERE / "include", "-isystem", build.cuda_headers()[0], *build.KERNEL]
    with pytest.raises(RuntimeError, match=r"all shared memory of a kernel is dynamic_shared\(\)"):
        build.run([*build.COMPILER, *command, "-fsyntax-only", source])


def run_sanitized(module: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | build.sanitizer_environment() | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kernel", ["sum_block", "sum_cluster", "multiply_tile", "convolve"])
def test_right_kernels_pass_the_sanitizers(sanitized, kernel):
    finished = run_sanitized("host_cuda.faulty", kernel, "none")
    assert finished.stdout == "right\n", finished.stderr


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("reads_past_global", "AddressSanitizer: heap-buffer-overflow"),
        ("reads_past_shared", "AddressSanitizer: heap-buffer-overflow"),
        ("writes_past_shared", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned_access", "runtime error: member access within misaligned address"),
        ("reads_past_array", "runtime error: index 4 out of bounds"),
    ],
)
def test_the_sanitizers_notice(sanitized, mistake, report):
    finished = run_sanitized("host_cuda.faulty", "sum_block", mistake)
    assert finished.returncode != 0
    assert report in finished.stderr
    assert "faulty.cu:" in finished.stderr


@pytest.mark.slow
def test_the_ops_pass_the_sanitizers():
    """A part of test_ops.py and of test_conv_cuda.py: each kernel, each layout, whole and in parts."""
    build.library(sanitize=True)
    center = "center and bf16 and (relu6 or silu) and not conv"
    others = "(f32 or bf16) and (project_kernel or window_mean and 2d)"
    # Not those that raise: under its preloaded library AddressSanitizer stops at an exception.
    convolutions = "every_tile or test_convolutions and (direct or 3x3-odd or image or two-groups)"
    chosen = f"host_cuda and (edge_shapes or strange_strides or {center} or {others} or {convolutions})"
    files = [HERE / name for name in ("test_ops.py", "test_conv_cuda.py")]
    finished = run_sanitized("pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-6000:]
