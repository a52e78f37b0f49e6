"""The tiles of matrix products: there is one for every product, and the tuner keeps what it finds."""

from __future__ import annotations

import json
import types
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from deepcontrol_cuda.triton_kernels import launch, tuning

# Compute capability, multiprocessors and bytes of shared memory a block: A100, RTX 3090 and 4090, H100, RTX 5090.
GPUS = [
    launch.Device(*numbers)
    for numbers in ((80, 108, 163 << 10), (86, 82, 99 << 10), (90, 132, 227 << 10), (120, 170, 99 << 10))
]
A100, H100 = GPUS[0], GPUS[2]
SQUARE = tuning.Product(4096, 4096, 1, 4096, 1, 2, 2, 16)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu.capability))
@pytest.mark.parametrize("across", [False, True], ids=("forward", "weight gradient"))
def test_every_product_has_a_tile(gpu, across):
    tiles = tuning.WEIGHT_GRAD_TILES if across else tuning.FORWARD_TILES
    for itemsize, run, rows, columns in product((2, 4), (1, 2, 4, 8, 16), (1, 49, 10**6), (1, 24, 2048)):
        ranked = tuning.rank(tiles, tuning.Product(rows, columns, 9, 64, 1, itemsize, 4, run, across=across), gpu)
        assert ranked
        assert all(tuning.shared_memory(tile, itemsize) <= gpu.shared_memory for tile in ranked)


def test_tiles_hold_maps_whole_or_there_is_none():
    for gpu, itemsize, run, whole in product(GPUS, (2, 4), (1, 16), (16, 32, 64, 128, 256)):
        held = tuning.Product(64 * whole, 256, 9, 64, 1, itemsize, itemsize, run, whole)
        ranked = tuning.rank(tuning.FORWARD_TILES, held, gpu)
        assert all(tile.m % whole == 0 for tile in ranked)
        assert ranked or (itemsize, whole) == (4, 256)
    # 256 rows of float32 are more than an RTX 4090 has room for.
    assert not tuning.rank(tuning.FORWARD_TILES, tuning.Product(256, 64, 1, 64, 1, 4, 4, 16, 256), GPUS[1])


def test_the_prediction_prefers_large_tiles_for_large_products():
    small = SQUARE._replace(rows=49, columns=64)
    assert (
        tuning.rank(tuning.FORWARD_TILES, SQUARE, H100)[0].m * tuning.rank(tuning.FORWARD_TILES, SQUARE, H100)[0].n
        == 128 * 256
    )
    assert tuning.rank(tuning.FORWARD_TILES, small, H100)[0].m <= 64


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The tuner on a GPU that is not there, on which the last tile that is tried is the fastest."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_picked", {})
    monkeypatch.setattr(tuning, "device_of", lambda tensor: H100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(name="NVIDIA H100"))
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    tried = []

    def benchmark(call, quantiles):
        call()
        return [-float(len(tried))] * len(quantiles)

    active = types.SimpleNamespace(get_benchmarker=lambda: benchmark)
    monkeypatch.setattr(tuning.triton.runtime.driver, "_active", active)
    kernel = type("Kernel", (), {"cache_key": "0123"})()

    def pick(key=(1,)):
        return tuning.pick(kernel, tuning.FORWARD_TILES, key, lambda: SQUARE, torch.empty(1), tried.append)

    pick.tried, pick.capturing, pick.kernel, pick.folder = tried, capturing, kernel, tmp_path
    return pick


def test_the_fastest_tile_is_kept_in_the_process_and_in_a_file(tuner, monkeypatch):
    tile = tuner()
    assert len(tuner.tried) == 5
    assert tile == tuner.tried[-1]
    assert tuner() == tile
    assert len(tuner.tried) == 5
    # Another process.
    monkeypatch.setattr(tuning, "_picked", {})
    assert tuner() == tile
    assert len(tuner.tried) == 5
    # Another product, and kernels that have changed.
    tuner((2,))
    assert len(tuner.tried) == 10
    monkeypatch.setattr(tuning, "_picked", {})
    tuner.kernel.cache_key = "4567"
    tuner()
    assert len(tuner.tried) == 15


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "[1, 1, 1, 1, 1]", "3"], ids=["empty", "cut", "few", "foreign", "number"]
)
def test_a_file_that_cannot_be_used_is_made_again(tuner, monkeypatch, content):
    tile = tuner()
    (file,) = tuner.folder.rglob("*.json")
    file.write_text(content)
    monkeypatch.setattr(tuning, "_picked", {})
    if content == "[1, 1, 1, 1, 1]":
        assert tuner() == tile
    else:
        with pytest.warns(UserWarning, match="times tiles again, since .* cannot be read"):
            assert tuner() == tile
    assert len(tuner.tried) == 10
    assert json.loads(file.read_text()) == list(tile)


def test_nothing_is_timed_while_a_graph_is_captured(tuner):
    tuner.capturing.append(True)
    assert tuner() == tuning.rank(tuning.FORWARD_TILES, SQUARE, H100)[0]
    assert not tuner.tried
    tuner.capturing.clear()
    assert tuner() == tuner.tried[-1]


def test_a_tile_that_does_not_run_is_left_out(tuner):
    failing = tuning.rank(tuning.FORWARD_TILES, SQUARE, H100)[4]

    def launch(tile):
        if tile == failing:
            raise tuning.OutOfResources(1, 0, "shared memory")
        tuner.tried.append(tile)

    assert (
        tuning.pick(tuner.kernel, tuning.FORWARD_TILES, (3,), lambda: SQUARE, torch.empty(1), launch) == tuner.tried[-1]
    )
    assert failing not in tuner.tried
