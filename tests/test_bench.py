"""``python -m bench``: it times what is right, refuses what is wrong, and its files say how they came about."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm")

from bench import (
    bandwidth,
    blocks,
    bootstrap,
    memory,
    models,
    networks,
    peers,
    record,
    report,
    roofline,
    rows,
    runner,
    scaling,
)
from bench.__main__ import main
from bench.cases import SETS
from bench.rows import Accuracy, Ceilings, Row, Run, Setting, Verdict
from bench.runner import Box, Contestant
from deepcontrol_cuda import autograd, backends
from deepcontrol_cuda.memory import peak_bytes
from deepcontrol_cuda.timing import Shape, Step, interleaved

TINY = (Shape(8, 16, 3, 6), Shape(16, 8, 1, 5))
# One thread, so that a busy machine does not make the tests slow.
QUICK = ("layers", "--quick", "--rounds", "2", "--threads", "1", "--batch", "2")
SETTING = Setting("float32", "channels_last", "training", 8, 2)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small layers, and ceilings that cost no second each."""
    monkeypatch.setitem(SETS, "resnet50", TINY)
    monkeypatch.setattr(roofline, "measure", lambda device: Ceilings(torch.get_num_threads(), 1e9, 2e9, 3e9))


def written(folder) -> Run:
    (path,) = folder.glob("*.json")
    json.loads(path.read_text(), parse_constant=pytest.fail)
    return rows.read(path)


def test_layers_are_timed_and_checked(tmp_path, capsys):
    others = ("--peers", "conv_bn_relu_folded", "algorithms", "--layout", *("channels_last", "contiguous"))
    assert main([*QUICK, *others, "--output", str(tmp_path / "made")]) == 0
    out = capsys.readouterr().out
    run = written(tmp_path / "made")
    assert run.complete
    assert run.command == "layers"
    assert {"cpu", "cores", "memory_gib"} <= run.machine.keys()
    assert {"python", "torch", "onednn", "deepcontrol_cuda"} <= run.versions.keys()
    assert run.conditions["batch"] == 2
    assert run.conditions["quick"]
    assert run.ceilings == (Ceilings(1, 1e9, 2e9, 3e9),)

    # Two shapes, two dtypes, two layouts, two modes.
    assert len(run.rows) == len({(row.case, row.setting) for row in run.rows}) == 16
    for row in run.rows:
        training = row.setting.mode == "training"
        assert row.setting.threads == 1
        everywhere = {"conv_relu", "conv_bn_relu", "ours", "ours, reference", "ours, two passes"}
        assert everywhere <= row.seconds.keys()
        assert ("conv_bn_relu_folded" in row.seconds) == (not training)
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row.seconds.values())
        assert row.accuracies.keys() == {name for name in row.seconds if name.startswith("ours")}
        for found in row.accuracies.values():
            assert len(found) == (6 if training else 1)
            assert all(0 <= accuracy.error <= accuracy.budget < 0.1 for accuracy in found.values())
        assert row.bytes > 0
        assert row.operations > 0
    assert run.skipped["conv_bn_relu_folded: 3x3, 8 to 16, 6x6, float32, channels_last, training, batch 2, 1 thread"]
    for verdict in run.verdicts:
        assert verdict.low <= verdict.value <= verdict.high
        assert verdict.what in out
    assert "The targets are set for" in out


def test_threads_are_timed_one_after_the_other(tmp_path):
    one = ("--dtype", "float32", "--mode", "forward", "--threads", "1", "2")
    assert main([*QUICK, *one, "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    assert [row.setting.threads for row in run.rows] == [1, 1, 2, 2]
    assert [ceilings.threads for ceilings in run.ceilings] == [1, 2]


@pytest.mark.parametrize(
    ("op", "position", "what"),
    [("conv_center", 0, "output"), ("conv_center_backward", 0, "gradient of input"),
     ("conv_center_backward", 1, "gradient of weight"), ("conv_center_backward", 4, "gradient of bias")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_result_is_refused(op, position, what, dtype, monkeypatch, tmp_path, capsys):
    right = getattr(backends.ops["cpu"], op)

    def wrong(*arguments):
        results = list(right(*arguments))
        results[position] = results[position] * 1.1
        return tuple(results)

    # The nodes in C++ call the kernels without asking Python for them.
    monkeypatch.setattr(autograd, "_nodes", None)
    monkeypatch.setitem(backends.ops, "cpu", backends.ops["cpu"]._replace(**{op: wrong}))
    quick = [*QUICK, "--dtype", dtype, "--mode", "training"]
    assert main([*quick, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"error of the {what}" in error
    assert "not timed" in error
    assert not list(tmp_path.iterdir())


def test_a_wrong_algorithm_is_left_out_of_its_row(monkeypatch, tmp_path, capsys):
    check = runner.check

    def wrong(step, what, errors):
        if what.startswith(f"ours, reference at {TINY[0]}"):
            raise runner.WrongResultError(f"{what}: wrong; it is not timed")
        return check(step, what, errors)

    monkeypatch.setattr(runner, "check", wrong)
    one = ("--dtype", "float32", "--mode", "forward", "--peers", "algorithms")
    assert main([*QUICK, *one, "--output", str(tmp_path)]) == 1
    run = written(tmp_path)
    assert not run.complete
    assert ["ours, reference" in row.seconds for row in run.rows] == [False, True]
    assert all("ours" in row.seconds for row in run.rows)
    assert "it is not timed" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_the_other_peers(monkeypatch, tmp_path, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", no_compiler)
    one = ["--dtype", "float32", "--mode", "training"]
    assert main([*QUICK, *one, "--peers", "conv_bn_relu_compiled", "--output", str(tmp_path)]) == 0
    reason = "torch.compile fails: no compiler"
    assert f"{reason}\n" in capsys.readouterr().out
    run = written(tmp_path)
    assert run.skipped == {"conv_bn_relu_compiled": reason}
    assert all(set(row.seconds) == set(peers.MAIN) for row in run.rows)


@pytest.mark.parametrize("broken", [None, object()], ids=["not installed", "of another version"])
def test_a_peer_that_cannot_be_imported_is_left_out(broken, monkeypatch, tmp_path):
    peers._why_not_inplace_abn.cache_clear()
    monkeypatch.setitem(sys.modules, "inplace_abn", broken)
    others = ("--dtype", "float32", "--mode", "forward", "--peers", "conv_inplace_abn", "conv_sync_bn_relu")
    assert main([*QUICK, *others, "--output", str(tmp_path)]) == 0
    peers._why_not_inplace_abn.cache_clear()
    run = written(tmp_path)
    assert run.complete
    assert run.skipped.keys() == {"conv_inplace_abn", "conv_sync_bn_relu"}
    assert run.skipped["conv_inplace_abn"].startswith("inplace_abn cannot be imported: ")
    assert all(set(row.seconds) == set(peers.MAIN) for row in run.rows)


class Fake:
    """A call that counts, and fails from one on."""

    def __init__(self, fails_at: int | None = None):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise MemoryError("no memory\nfor that")

    def clear_gradients(self):
        pass


class Ticks:
    """A clock on which call after call takes one second, with a little more at random."""

    def __init__(self, noise: float):
        self.noise, self.random = noise, random.Random(0)

    def seconds(self, prepared) -> float:
        prepared()
        return 1 + self.noise * self.random.random()


BOX = Box(60.0)


def race(noise=0.0, box=BOX, **calls):
    contestants = {name: Contestant(call) for name, call in calls.items()}
    return runner.race(contestants, ("a", "b"), Ticks(noise), box, lambda: None)


def test_a_peer_that_fails_in_the_middle_does_not_take_the_others_with_it():
    seconds, failed = race(a=Fake(), b=Fake(), c=Fake(fails_at=3), box=Box.exactly(4))
    assert failed == {"c": "no memory"}
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4}


def test_a_peer_that_cannot_be_built_is_left_out(monkeypatch, tmp_path):
    def broken(shape):
        raise ValueError("no such norm")

    monkeypatch.setitem(peers._LAYERS, "conv_group_norm_relu", broken)
    one = ("--dtype", "float32", "--mode", "forward", "--peers", "conv_group_norm_relu")
    assert main([*QUICK, *one, "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    assert run.skipped == {"conv_group_norm_relu": "no such norm"}
    assert all(set(row.seconds) == set(peers.MAIN) for row in run.rows)


def test_rounds_go_on_until_the_ratio_is_known():
    quiet, _ = race(a=Fake(), b=Fake())
    noisy, _ = race(a=Fake(), b=Fake(), noise=0.1)
    assert len(quiet["a"]) == BOX.least_main
    assert BOX.least_main < len(noisy["a"]) <= BOX.most
    ratios = [a / b for a, b in zip(noisy["a"], noisy["b"])]
    assert bootstrap.median(ratios).width <= BOX.width or len(noisy["a"]) == BOX.most


def test_a_row_whose_time_is_up_has_the_least_number_of_rounds():
    seconds, _ = race(a=Fake(), b=Fake(), c=Fake(), noise=0.5, box=Box(0.0, least=3, least_main=7))
    assert {name: len(found) for name, found in seconds.items()} == {"a": 7, "b": 7, "c": 3}


def test_what_was_timed_before_an_interruption_is_kept(monkeypatch, tmp_path, capsys):
    measure = runner.measure
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(runner, "measure", interrupted)
    assert main([*QUICK, "--output", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert "incomplete" in captured.out
    run = written(tmp_path)
    assert not run.complete
    assert len(run.rows) == 1
    assert run.verdicts


SMALL_BLOCKS = (
    networks.Network("bottleneck", lambda: networks.Bottleneck(16, 4), (16, 6, 6)),
    networks.Network("inverted residual", lambda: networks.InvertedResidual(8, 8), (8, 6, 6)),
    networks.Network("3D double convolution", lambda: networks.double_conv3d(8, 16), (8, 4, 4, 4)),
)


def test_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "BLOCKS", SMALL_BLOCKS)
    monkeypatch.setattr(blocks, "PEERS", tuple(name for name in blocks.PEERS if "compiled" not in name))
    arguments = ("--rounds", "2", "--threads", "1", "--batch", "2")
    assert main(["blocks", *arguments, "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    assert len(run.rows) == 3 * 2 * 2
    for row in run.rows:
        training = row.setting.mode == "training"
        norms = {"conv_relu", "conv_bn_relu", "conv_instance_norm_relu", "conv_group_norm_relu"}
        assert norms | {"ours", "ours, reference", "ours, two passes"} <= row.seconds.keys()
        assert ("conv_bn_relu_folded" in row.seconds) == (not training)
        assert row.operations > 0
        gradients = {"gradient of input", "gradients of parameters"} if training else set()
        assert row.accuracies["ours"].keys() == {"output"} | gradients


@pytest.mark.parametrize("block", SMALL_BLOCKS, ids=str)
def test_folded_blocks_compute_what_batch_norm_does(block):
    network, x = block.build(), block.random_input(2)
    for _ in range(3):
        network(x)
    network.eval()
    folded = peers.convert("conv_bn_relu_folded", network)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(x), network(x), atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


MODEL = ("models", "--size", "32", "--depth", "8", "--batch", "2", "--rounds", "2", "--threads", "1",
         "--dtype", "float32", "--peers", "ours, mean shift rejection")  # fmt: skip


def test_models_before_and_after_the_conversion(tmp_path, capsys):
    assert main([*MODEL, "--models", "3D U-Net", "--mode", "training", "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    (row,) = run.rows
    assert row.case == "3D U-Net, 1x8x8x8"
    assert set(row.seconds) == {"conv_bn_relu", "ours", "ours, mean shift rejection"}
    assert row.baseline == "conv_bn_relu"
    assert 0 < row.accuracies["ours"]["output of the folded model, float32"].error <= 1e-5
    assert 0 < row.peak_bytes["ours"] < row.peak_bytes["conv_bn_relu"]
    out = capsys.readouterr().out
    assert all(f"{verdict.value:.3f}" in out for verdict in run.verdicts)


def test_the_training_step_of_resnet50_has_targets():
    seconds = {"conv_bn_relu": (2.6, 2.6), "conv_bn_relu_compiled": (2.2, 2.2), "ours": (2.0, 2.0)}
    peaks = {"conv_bn_relu": 100, "ours": 61}
    row = Row("ResNet-50, 3x224x224", SETTING, "conv_bn_relu", seconds, peak_bytes=peaks)
    found = {verdict.what.removeprefix(f"{row.case}, {SETTING}: "): verdict for verdict in models.verdicts([row])}
    norm, compiled = found["conv_bn_relu / ours"], found["conv_bn_relu_compiled / ours"]
    assert (norm.value, norm.target, norm.reached) == (1.3, ">= 1.25", True)
    assert (compiled.value, compiled.target) == (1.1, None)
    peak = found["peak bytes, ours / conv_bn_relu"]
    assert (peak.value, peak.reached) == (0.61, False)
    forward = replace(row, setting=replace(SETTING, mode="forward"), peak_bytes={})
    assert [verdict.target for verdict in models.verdicts([forward])] == [None, None]


@pytest.mark.parametrize(("make", "millions"), [(networks.resnet50, 25.557), (networks.mobilenet_v2, 3.505)])
def test_networks_have_the_parameters_of_their_papers(make, millions):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == pytest.approx(1e6 * millions, rel=1e-4)


def test_inference_of_models(tmp_path):
    assert main([*MODEL, "--models", "3D U-Net", "--mode", "forward", "--output", str(tmp_path)]) == 0
    (row,) = written(tmp_path).rows
    assert set(row.seconds) == {"conv_bn_relu", "ours", "ours, mean shift rejection"}
    assert not row.peak_bytes


def test_what_a_conversion_gets_wrong_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "TOLERANCE", 0.0)
    assert main([*MODEL, "--models", "3D U-Net", "--mode", "forward", "--output", str(tmp_path)]) == 1
    assert "error of the converted model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bandwidth(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bandwidth, "MAPS", ((8, 4),))
    monkeypatch.setattr(bandwidth, "OPS", bandwidth.OPS[:3])
    monkeypatch.setattr(bandwidth, "_cache_bytes", lambda: 2**12)
    arguments = ("--rounds", "2", "--threads", "1", "--batch", "2", "--dtype", "float32")
    assert main(["bandwidth", *arguments, "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    cases = ["center, identity", "center, relu", "center, relu, residual", "center_backward, relu", "window_mean, 3x3"]
    assert [row.case for row in run.rows] == [f"{case}, 8x4x4" for case in cases] * 2
    for row in run.rows:
        assert set(row.seconds) == {"copy", "ours"}
        assert row.bytes >= 2 * 8 * 16 * 4
        assert row.accuracies["ours"]
    assert len(run.verdicts) == 2 * 3
    found = {tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in capsys.readouterr().out.splitlines()}
    assert ("kernel", "setting", "copy, GB/s", "ours, GB/s") in found
    for row in run.rows:
        speeds = [report.significant(row.bytes / sum(row.seconds[peer]) * 2 / 1e9) for peer in ("copy", "ours")]
        assert (row.case, str(row.setting), *speeds) in found


def test_scaling_goes_along_one_axis_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "SHAPE", Shape(8, 8, 3, 6))
    monkeypatch.setattr(scaling, "_QUICK", {"batch": (1, 8), "channels": (4, 8), "size": (5, 6)})
    arguments = ("--quick", "--rounds", "2", "--threads", "1", "--dtype", "float32", "--mode", "forward")
    assert main(["scaling", *arguments, "--axes", "batch", "channels", "size", "--output", str(tmp_path)]) == 0
    places = {(row.case, row.setting.batch) for row in written(tmp_path).rows}
    base = "3x3, 8 to 8, 6x6"
    assert places == {(base, 1), (base, 8), ("3x3, 4 to 4, 6x6", 8), ("3x3, 8 to 8, 5x5", 8)}


def test_memory_is_at_most_half_of_batch_norm(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "BLOCKS", SMALL_BLOCKS)
    assert main(["memory", "--batch", "2", "--threads", "1", "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    assert len(run.rows) == 4 * (len(memory.CHAINS) + len(TINY) + len(SMALL_BLOCKS))
    targeted = [verdict for verdict in run.verdicts if verdict.target]
    assert len(targeted) == len(memory.CHAINS) * 4
    assert all(verdict.reached and 0 < verdict.value <= 0.5 for verdict in targeted)
    for row in run.rows:
        # What is kept is held at the peak; the input, which is there before the step, only counts as kept.
        assert row.peak_bytes["conv_bn_relu"] > row.kept_bytes["conv_bn_relu"] / 2 > 0


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    map_bytes = x.numel() * x.element_size()
    assert memory.saved_bytes(nn.Sequential(nn.ReLU(), nn.ReLU()), x) == 2 * map_bytes
    # The first convolution keeps its input and the second keeps what ReLU already has.
    chain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    assert memory.saved_bytes(chain, x) == 2 * map_bytes


def test_peak_bytes_is_what_is_held_at_once():
    megabyte = 2**20

    def call() -> None:
        first = torch.zeros(3 * megabyte, dtype=torch.uint8)
        second = first + 1
        del first
        torch.zeros(megabyte, dtype=torch.uint8)
        del second
        torch.zeros(2 * megabyte, dtype=torch.uint8)

    peak_bytes(call)
    assert 6 * megabyte <= peak_bytes(call) < 6.1 * megabyte


def test_overhead(tmp_path):
    arguments = ("--rounds", "2", "--threads", "1", "--dtype", "float32", "--output", str(tmp_path))
    assert main(["overhead", *arguments]) == 0
    run = written(tmp_path)
    assert [row.setting.mode for row in run.rows] == ["forward", "training"]
    assert all(verdict.target == "<= 1.00" for verdict in run.verdicts)
    assert len(run.verdicts) == 2


def test_projection(tmp_path):
    arguments = ["projection", "--batch", "1", "--size", "32", "--rounds", "2", "--threads", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    assert [set(row.seconds) for row in run.rows] == [{"step", "projection"}, {"projected", "not projected"}]
    assert 0 < run.verdicts[0].value < 1
    assert "between backward and step" in run.verdicts[0].what
    assert all(verdict.value > 0 for verdict in run.verdicts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["layers", "--batch", "0"], "--batch: got '0', wanted an integer of at least 1"),
        (["layers", "--rounds", "1"], "--rounds: got '1', wanted an integer of at least 2"),
        (["layers", "--threads", "1", "two"], "--threads: got 'two'"),
        (["layers", "--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["layers", "--peers", "conv_lrn"], "--peers: invalid choice: 'conv_lrn'"),
        (["layers", "--set", "vgg"], "--set: invalid choice: 'vgg'"),
        (["layers", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["memory", "--layout", "nhwc"], "--layout: invalid choice: 'nhwc'"),
        (["models", "--models", "VGG"], "--models: invalid choice: 'VGG'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["layers", "blocks", "models", "bandwidth", "memory", "overhead", "scaling"])
def test_a_gpu_that_is_not_there_is_refused(command, tmp_path, capsys):
    assert main([command, "--device", "cuda", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda: ")
    assert error.strip().endswith(backends.available()["cuda"])
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*QUICK, "--output", str(tmp_path / "file")]) == 1
    assert "--output: cannot write into" in capsys.readouterr().err


def test_no_run_is_overwritten(tmp_path):
    run = {"date": "2026-01-31", "machine": {"cpu": "Some(R) CPU @ 2 GHz"}, "command": "layers"}
    names = [record.write(run, tmp_path).name for _ in range(3)]
    stem = "2026-01-31_cpu_some-r-cpu-2-ghz_layers"
    assert names == [f"{stem}.json", f"{stem}_2.json", f"{stem}_3.json"]


def test_preloaded_libraries_are_named_without_their_folders(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/libjemalloc.so.2:/else/libother.so")
    assert record.environment()["LD_PRELOAD"] == "libjemalloc.so.2:libother.so"


def test_sets(monkeypatch):
    monkeypatch.undo()
    eight = [(c, f * c, k, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)) for f, k in ((1, 3), (4, 1))]
    assert SETS["resnet50"] == tuple(Shape(*shape) for shape in eight)
    every = SETS["resnet50_all"]
    assert every[:8] == SETS["resnet50"]
    assert {Shape(3, 64, 7, 224, 2), Shape(1024, 256, 1, 14), Shape(512, 512, 3, 14, 2)} <= set(every)
    assert len(every) == len(set(every)) == 23
    assert Shape(144, 144, 3, 56, 2, groups=144) in SETS["mobilenet_v2"]


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(roofline, "_ROUNDS", 1)
    torch.set_num_threads(1)
    found = roofline.measure("cpu")
    assert found.threads == 1
    assert found.copy_bytes_per_second > 1e8
    assert min(found.float32_operations_per_second, found.bfloat16_operations_per_second) > 1e8


def row_of(ours, batch_norm, setting=SETTING, case="a"):
    return Row(case, setting, "conv_relu", {"conv_relu": (1.0, 2.0), "ours": ours, "conv_bn_relu": batch_norm})


def test_verdicts():
    forward = replace(SETTING, mode="forward")
    timed = [row_of((0.5, 1.0), (1.0, 2.0)), row_of((1.25, 2.5), (1.6, 3.2), case="b")]
    timed += [row_of((1.2, 2.4), (1.3, 2.6), forward)]
    found = {verdict.what: verdict for verdict in report.layer_verdicts(timed)}
    mean = found[f"{SETTING}: ours / conv_relu, geometric mean"]
    assert mean.value == pytest.approx(0.625**0.5)
    assert mean.reached is True
    assert found[f"{SETTING}: ours / conv_relu, worst"].value == pytest.approx(1.25)
    assert found[f"{SETTING}: ours / conv_relu, worst"].reached is False
    assert found[f"{SETTING}: conv_bn_relu / ours, geometric mean"].reached is True
    assert found[f"{forward}: ours / conv_relu, geometric mean"].reached is False
    assert found[f"{forward}: conv_bn_relu / ours, geometric mean"].reached is None
    table = report.verdicts_table(found.values())
    assert "missed" in table
    assert "reached" in table


def test_a_row_without_ours_has_no_verdict():
    row = Row("a", SETTING, "conv_relu", {"conv_relu": (1.0, 2.0), "conv_bn_relu": (1.0, 2.0)})
    assert report.layer_verdicts([row]) == []


def test_ratios_are_paired_within_rounds():
    seconds = {"conv_relu": (1.0, 10.0, 2.0), "ours": (2.0, 20.0, 4.0), "slow": (3.0, 30.0)}
    row = Row("a", SETTING, "conv_relu", seconds)
    assert row.ratio("ours") == bootstrap.Interval(2.0, 2.0, 2.0)
    assert row.ratios("slow") == [3.0, 3.0]
    assert row.ratios("slow", "ours") == [1.5, 1.5]


def test_intervals_hold_the_true_value_in_most_runs():
    """Of 100 runs of known noise about 95 % should; fewer than 87 has a probability of 1e-3."""
    torch.set_num_threads(1)
    noise = random.Random(0)
    held = means = 0
    widths = []
    for _ in range(100):
        ratios = [[1.1 * math.exp(noise.gauss(0, 0.05)) for _ in range(25)] for _ in range(4)]
        one, mean = bootstrap.median(ratios[0]), bootstrap.geometric_mean(ratios)
        held += one.low <= 1.1 <= one.high
        means += mean.low <= 1.1 <= mean.high
        assert one.low <= one.value <= one.high
        widths.append(mean.width / one.width)
    assert held >= 87
    assert means >= 87
    # Four rows together are known about twice as well as one.
    assert 0.4 < sum(widths) / len(widths) < 0.7


def test_intervals_are_the_same_for_the_same_rounds_and_narrow_with_more():
    noise = random.Random(1)
    ratios = [math.exp(noise.gauss(0, 0.05)) for _ in range(100)]
    assert bootstrap.median(ratios) == bootstrap.median(ratios)
    assert bootstrap.median(ratios).width < bootstrap.median(ratios[:10]).width
    assert bootstrap.median([1.5, 1.5]) == bootstrap.Interval(1.5, 1.5, 1.5)
    largest = bootstrap.largest([ratios, [3.0, 3.0]])
    assert largest == bootstrap.Interval(3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="at least one round"):
        bootstrap.geometric_mean([ratios, []])


def test_a_run_is_read_as_it_was_written(tmp_path):
    row = row_of((1.5, 2.5), (3.0, 4.0))
    row = replace(row, accuracies={"ours": {"output": Accuracy(1e-7, 1e-6)}}, bytes=12, peak_bytes={"ours": 3})
    head = ("layers", "2026-01-31", {"cpu": "some"}, {"torch": "2.9"}, {"hash": "0123", "dirty": False}, {"batch": 8})
    verdict = Verdict("what", 1.0, 0.9, 1.1, "<= 1.00", True)
    run = Run(*head, True, {"conv": "reason"}, (Ceilings(2, 1e9),), (row,), (verdict,), {"more": [1]})
    path = record.write(run.to_json(), tmp_path)
    assert rows.read(path) == run
    assert json.loads(path.read_text())["format"] == 2
    assert '"ours": [ 1.5, 2.5 ]' in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"command": "layers", "rows": []}', "of format 1, written by an older version; .*bench layers again"),
        ('{"command": "layers", "format": 3}', "of format 3, written by another version"),
        ('{"command": "layers", "format": 2}', "is damaged .*'date'"),
        ("[]", "is no run"),
        ("{", "is no JSON"),
    ],
)
def test_unknown_formats_are_refused_in_words(text, message, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(rows.UnknownFormatError, match=message):
        rows.read(path)


def test_gradients_do_not_accumulate_between_calls():
    step = Step(nn.Conv2d(2, 2, 1), torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
    first = step.results()
    times = interleaved({"a": step, "b": step}, repeats=3)
    race(a=step, b=step, box=Box.exactly(3))
    for name, tensor in step.results().items():
        assert torch.equal(tensor, first[name])
    assert times["a"].minimum > 0
