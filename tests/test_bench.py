"""``python -m bench``: it times what is right, refuses what is wrong, and its files say how they came about."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm")

from bench import memory, peers, record, report, runner, training_step
from bench.__main__ import main
from bench.cases import SETS
from bench.runner import Row, Setting
from deepcontrol_cuda import backends
from deepcontrol_cuda.memory import peak_bytes
from deepcontrol_cuda.timing import Shape, Step, Times, interleaved

# One thread, so that a busy machine does not make the tests slow.
QUICK = ("layers", "--quick", "--repeats", "2", "--threads", "1", "--set", "mobilenet_v2",
         "--peers", "conv_bn_relu", "conv_bn_relu_folded")  # fmt: skip


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def written(folder) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_layers_are_timed_and_checked(tmp_path, capsys):
    assert main([*QUICK, "--output", str(tmp_path / "made")]) == 0
    out = capsys.readouterr().out
    run = written(tmp_path / "made")
    assert run["complete"]
    assert {"cpu", "cores", "memory_gib"} <= run["machine"].keys()
    assert {"python", "torch", "onednn", "deepcontrol_cuda"} <= run["versions"].keys()
    assert run["conditions"]["threads"] == 1
    assert run["conditions"]["batch"] == 1

    # Two shapes, two dtypes, two layouts, two modes.
    assert len(run["rows"]) == 16
    for row in run["rows"]:
        training = row["setting"]["mode"] == "training"
        assert set(row["times"]) == {"conv_relu", "conv_bn_relu", "ours"} | (
            set() if training else {"conv_bn_relu_folded"}
        )
        for times in row["times"].values():
            assert 0 < times["minimum"] <= times["lower_quartile"] <= times["median"] <= times["upper_quartile"]
            assert f"{1e3 * times['median']:.4g}" in out
        assert len(row["accuracies"]) == (6 if training else 1)
        for accuracy in row["accuracies"].values():
            assert 0 <= accuracy["error"] <= accuracy["budget"] < 0.1
    assert "conv_bn_relu_folded is left out of training" in out
    assert len(run["skipped"]) == 1
    for verdict in run["verdicts"]:
        assert math.isfinite(verdict["value"])
        assert verdict["what"] in out
    assert "The targets are set for" in out


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

    monkeypatch.setitem(backends.ops, "cpu", backends.ops["cpu"]._replace(**{op: wrong}))
    quick = [*QUICK, "--dtype", dtype, "--layout", "channels_last", "--mode", "training"]
    assert main([*quick, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"error of the {what}" in error
    assert "not timed" in error
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_the_other_peers(monkeypatch, tmp_path, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", no_compiler)
    one = ["--dtype", "float32", "--layout", "contiguous", "--mode", "forward"]
    assert main([*QUICK, *one, "--peers", "conv_bn_relu_compiled", "--output", str(tmp_path)]) == 0
    reason = "torch.compile fails: no compiler"
    assert f"conv_bn_relu_compiled is left out of forward: {reason}\n" in capsys.readouterr().out
    run = written(tmp_path)
    assert list(run["skipped"].values()) == [reason]
    assert set(run["rows"][0]["times"]) == set(peers.ALWAYS)


def test_what_was_timed_before_an_interruption_is_kept(monkeypatch, tmp_path, capsys):
    measure = runner.measure
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(runner, "measure", interrupted)
    assert main([*QUICK, "--output", str(tmp_path)]) == 1
    assert "interrupted" in capsys.readouterr().err
    run = written(tmp_path)
    assert not run["complete"]
    assert len(run["rows"]) == 1


def test_memory_is_at_most_half_of_batch_norm(tmp_path, capsys):
    assert main(["memory", "--batch", "2", "--threads", "1", "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    assert len(run["verdicts"]) == len(memory.CHAINS) * 4
    assert all(verdict["reached"] and 0 < verdict["value"] <= 0.5 for verdict in run["verdicts"])
    assert "Written to" in capsys.readouterr().out


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


def test_overhead(tmp_path, capsys):
    assert main(["overhead", "--repeats", "5", "--threads", "1", "--dtype", "float32", "--output", str(tmp_path)]) == 0
    assert [row["setting"]["mode"] for row in written(tmp_path)["rows"]] == ["forward", "training"]
    assert "ours / conv_bn_relu" in capsys.readouterr().out


def test_projection(tmp_path, capsys):
    arguments = ["projection", "--batch", "1", "--size", "32", "--repeats", "2", "--threads", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    run = written(tmp_path)
    assert [list(cost["ratios"]) for cost in run["costs"]] == [["projection / step"], ["projected / not projected"]]
    assert 0 < run["verdicts"][0]["value"] < 1
    assert all(verdict["value"] > 0 for verdict in run["verdicts"])
    assert "between backward and step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["layers", "--batch", "0"], "--batch: got '0', wanted an integer of at least 1"),
        (["layers", "--repeats", "1"], "--repeats: got '1', wanted an integer of at least 2"),
        (["layers", "--threads", "two"], "--threads: got 'two'"),
        (["layers", "--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["layers", "--peers", "conv_lrn"], "--peers: invalid choice: 'conv_lrn'"),
        (["layers", "--set", "vgg"], "--set: invalid choice: 'vgg'"),
        (["memory", "--layout", "nhwc"], "--layout: invalid choice: 'nhwc'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


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


def test_sets():
    eight = [(c, f * c, k, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)) for f, k in ((1, 3), (4, 1))]
    assert SETS["resnet50"] == tuple(Shape(*shape) for shape in eight)
    every = SETS["resnet50_all"]
    assert every[:8] == SETS["resnet50"]
    assert {Shape(3, 64, 7, 224, 2), Shape(1024, 256, 1, 14), Shape(512, 512, 3, 14, 2)} <= set(every)
    assert len(every) == len(set(every)) == 23
    assert Shape(144, 144, 3, 56, 2, groups=144) in SETS["mobilenet_v2"]


def test_verdicts():
    def row(shape, layout, mode, ours, batch_norm):
        times = {"conv_relu": 1.0, "conv_bn_relu": batch_norm, "ours": ours}
        quartiles = {name: Times(t, t, t, t) for name, t in times.items()}
        return Row(Setting("float32", layout, mode), shape, quartiles, {})

    rows = [row("a", "channels_last", "training", 0.5, 1.0), row("b", "channels_last", "training", 1.25, 1.6)]
    rows += [row("a", "contiguous", "forward", 1.2, 1.3)]
    found = {verdict.what: verdict for verdict in report.verdicts(rows)}
    mean = found["float32, channels_last, training: ours / conv_relu, geometric mean"]
    assert mean.value == pytest.approx(0.625**0.5)
    assert mean.reached is True
    assert found["float32, channels_last, training: ours / conv_relu, worst (b)"].reached is False
    assert found["float32, channels_last, training: conv_bn_relu / ours, geometric mean"].reached is True
    assert found["float32, contiguous, forward: ours / conv_relu, geometric mean"].reached is False
    assert found["float32, contiguous, forward: ours / conv_relu, worst (a)"].reached is None
    assert "missed" in report.verdicts_table(found.values())


def test_gradients_do_not_accumulate_between_calls():
    step = Step(nn.Conv2d(2, 2, 1), torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
    first = step.results()
    times = interleaved({"a": step, "b": step}, repeats=3)
    for name, tensor in step.results().items():
        assert torch.equal(tensor, first[name])
    assert times["a"].minimum > 0


def test_a_training_step_before_and_after_the_conversion(tmp_path, capsys):
    options = ("--size", "32", "--batch", "2", "--repeats", "2", "--threads", "1", "--dtype", "float32")
    assert main(["training-step", *options, "--models", "Deep Control", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    run = written(tmp_path)
    assert run["error"] <= 1e-5
    (result,) = run["results"]
    assert set(result["times"]) == {"Batch Norm", "Deep Control"}
    ratio = result["ratios"]["Deep Control"]["median"]
    assert f"{ratio:.3f}" in out
    verdict = next(v for v in run["verdicts"] if v["what"] == "float32: Batch Norm / ours, Deep Control")
    assert verdict["value"] == ratio
    assert verdict["reached"] == (ratio >= 1.15)
    assert 0 < result["peak_bytes"]["Deep Control"] < result["peak_bytes"]["Batch Norm"]


def test_what_a_conversion_gets_wrong_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_step, "TOLERANCE", 0.0)
    assert main(["training-step", "--size", "32", "--output", str(tmp_path)]) == 1
    assert "converted models are off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
