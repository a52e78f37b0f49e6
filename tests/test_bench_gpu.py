"""``make gpu`` without a GPU: what it would measure, what it calls proven, and what it writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil

import pytest
import torch
from conftest import harness

pytest.importorskip("tqdm")

from bench import convolutions, gpu, hardware, kernels, record, sanitize_gpu
from bench.__main__ import main
from bench.clock import WallClock, race
from bench.convolutions import Setting
from bench.gpu import Findings, Outcome
from bench.kernels import Case
from bench.rows import Accuracy
from bench.runner import WrongResultError
from deepcontrol_cuda import backends, measured, proven
from deepcontrol_cuda.timing import Shape, summarize

H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}
PASSED = Outcome("op tests", True, "3 passed", 1.0)
FAILED = Outcome("op tests", False, "1 failed", 1.0)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (Case("center", "identity", "bfloat16", "channels_last", (2, 64, 7, 7)), 2 * 2 * 64 * 49 * 2),
        (Case("center", "relu", "float32", "channels_last", (2, 64, 7, 7)), 2 * 2 * 64 * 49 * 4 + 2 * 64 * 49 // 8),
        (Case("center", "relu, residual", "float32", "contiguous", (2, 3, 4, 4)), 3 * 96 * 4 + 96 // 8),
        (Case("center_backward", "relu", "float16", "contiguous", (2, 3, 3, 3)), 2 * 54 * 2 + 6 * 2),
        (Case("window_mean", "3x3", "float64", "contiguous", (2, 3, 3, 3)), 54 * 8),
        (Case("project_kernel_gradients_", "weight 0.9", "bfloat16", "channels_last"), 2 * 2 * 11_326_656),
        (Case("finish_weight_grad_", "gain, projection 0.9", "float32", "channels_last"), 3 * 4 * 11_326_656),
    ],
    ids=str,
)
def test_bytes_that_must_be_moved(case, wanted):
    assert case.bytes == wanted


def test_what_is_required_is_timed_first():
    cases = kernels.timed()
    assert len(set(cases)) == len(cases)
    first = cases[: 2 * 9 * 6]
    assert {(c.dtype, c.layout) for c in first} == {("bfloat16", "channels_last")}
    assert {c.shape[0] for c in first} == {64, 256}
    assert {c.shape[2] for c in first} == {7, 14, 28, 56, 112}
    assert {(c.op, c.variant) for c in first} >= {
        ("center", "identity"), ("center", "relu"), ("center", "relu, residual"), ("center_backward", "relu"),
        ("window_mean", "3x3"),
    }  # fmt: skip
    assert {c.op for c in cases} == set(kernels.OPS)
    assert {(c.dtype, c.layout) for c in cases} >= {("float32", "channels_last"), ("float16", "channels_last")}
    layers = convolutions.timed()
    assert {(setting.mode, batch) for _, setting, batch in layers[:92]} == set(
        itertools.product(("forward", "training"), (64, 256))
    )
    assert {(setting.dtype, setting.layout) for _, setting, _ in layers[:92]} == {("bfloat16", "channels_last")}


def test_depthwise_layers_are_timed():
    shapes = {shape for shape, setting, _ in convolutions.timed() if setting.layout == "channels_last"}
    assert {shape.stride for shape in shapes if shape.groups == shape.in_channels} == {1, 2}


def test_every_op_dtype_and_layout_is_checked():
    keys = {(c.op, c.dtype, c.layout) for c in kernels.checks()}
    assert len(keys) == len(kernels.OPS) * 4 * 2


@pytest.mark.parametrize("op", kernels.OPS)
def test_checks_on_the_cpu(op):
    for case in kernels.checks():
        if case.op == op:
            accuracy = kernels.check(case, torch.ops.deepcontrol, "cpu")
            assert 0 <= accuracy.error <= accuracy.budget < 0.1


@pytest.mark.parametrize("op", kernels.OPS)
def test_checks_of_the_cuda_kernels_on_the_cpu(op):
    harness()
    for case in kernels.checks():
        if case.op == op and case.dtype == "bfloat16":
            kernels.check(case, torch.ops.deepcontrol_host_cuda, "cpu")


@pytest.mark.parametrize("shape", convolutions.CHECKED, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_checks_of_layers_on_the_cpu(shape, dtype):
    layout = "channels_last" if dtype == "bfloat16" else "contiguous"
    found = convolutions.check(shape, Setting(dtype, layout, "training"), 4, "cpu", "cpu")
    assert "output" in found
    assert all(0 <= accuracy.error <= accuracy.budget < 0.1 for accuracy in found.values())


class Wrong:
    """The ops of the CPU, but for one whose first result is ten percent off."""

    def __init__(self, op):
        self.op = op

    def __getattr__(self, name):
        right = getattr(torch.ops.deepcontrol, name)
        return right if name != self.op else self.spoilt(right)

    @staticmethod
    def spoilt(right):
        def wrong(first, *rest):
            results = right(first, *rest)
            if results is None or (isinstance(results, torch.Tensor) and first.shape[:1] == results.shape):
                for tensor in first if results is None else [first]:
                    tensor.mul_(1.1)
                return results
            return (results[0] * 1.1, *results[1:]) if isinstance(results, tuple) else results * 1.1

        return wrong


@pytest.mark.parametrize("op", kernels.OPS)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_wrong_result_is_not_timed(op, dtype):
    case = next(c for c in kernels.checks() if c.op == op and c.dtype == dtype)
    with pytest.raises(WrongResultError, match="not timed"):
        kernels.measure(case, Wrong(op), WallClock(), 2)


def test_bits_that_are_wrong_are_noticed():
    class WrongBits:
        @staticmethod
        def center(*arguments):
            output, mean, saved = torch.ops.deepcontrol.center(*arguments)
            return output, mean, saved ^ 1

    with pytest.raises(WrongResultError, match="bits"):
        kernels.check(Case("center", "relu", "float32", "contiguous", (2, 3, 4, 4)), WrongBits, "cpu")


def test_a_kernel_is_timed_against_a_copy_of_as_many_bytes():
    case = Case("center", "relu, residual", "bfloat16", "channels_last", (2, 16, 7, 7))
    timed = kernels.measure(case, torch.ops.deepcontrol, WallClock(), 3)
    kernel, copy = timed.seconds["kernel"].median, timed.seconds["copy"].median
    assert timed.bytes_per_second == case.bytes / kernel > 0
    assert timed.share_of_copy == copy / kernel > 0


def test_contestants_take_turns():
    turns = []
    times = race(WallClock(), {name: [lambda n=name: turns.append(n)] * 2 for name in "ab"}, rounds=4)
    # Each goes through its calls once before, untimed.
    assert turns[:4] == ["a", "a", "b", "b"]
    assert sorted(turns[4:]) == ["a"] * 8 + ["b"] * 8
    assert times["a"].minimum > 0


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_layers_against_their_peers(mode):
    setting = Setting("float32", "channels_last", mode)
    row = convolutions.measure(Shape(4, 8, 3, 6), setting, 2, ["cpu"], WallClock(), 2)
    grads = {"conv_input_grad", "conv_weight_grad", "cpu_input_grad", "cpu_weight_grad"}
    assert set(row.times) == {*convolutions.PEERS, "cpu", *({"conv"} if mode == "forward" else grads)}
    assert len(row.accuracies["cpu"]) == (1 if mode == "forward" else 6)
    assert row.ratio("cpu", "conv_relu") > 0


def test_a_backend_that_is_wrong_is_not_timed_and_others_are(monkeypatch):
    right = convolutions.check

    def check(shape, setting, batch, backend, device):
        if backend == "triton":
            raise WrongResultError("ten percent off")
        return right(shape, setting, batch, backend, device)

    monkeypatch.setattr(convolutions, "check", check)
    setting = Setting("float32", "channels_last", "training")
    row = convolutions.measure(Shape(4, 8, 3, 6), setting, 2, ["cpu", "triton"], WallClock(), 2)
    assert row.wrong == {"triton": "ten percent off"}
    assert list(row.accuracies) == ["cpu"]
    assert {name.split("_")[0] for name in row.times} == {"conv", "cpu"}


def test_the_first_layer_needs_no_gradient_of_its_input():
    setting = Setting("float32", "contiguous", "training")
    row = convolutions.measure(Shape(3, 8, 3, 6), setting, 2, ["cpu"], WallClock(), 2)
    assert "conv_weight_grad" in row.times
    assert "conv_input_grad" not in row.times


# By each algorithm, with the harness in the place of a GPU.


def test_a_layer_by_each_algorithm_that_takes_it():
    harness()
    shape, setting = Shape(16, 16, 3, 6, groups=16), Setting("bfloat16", "channels_last", "forward")
    found = convolutions.measure_algorithms(shape, setting, 2, "host_cuda", WallClock(), 2)
    assert set(found.accuracies) | set(found.refused) == set(backends.ALGORITHMS["cuda"])
    assert set(found.accuracies) >= {"direct", "two passes"}
    assert set(found.times) == {"conv", *found.accuracies}
    assert all(reason and "\n" not in reason for reason in found.refused.values())
    assert not found.wrong
    output = 2 * 16 * 36
    assert found.operations == 2 * 9 * output
    assert found.bytes == 2 * (output + 16 * 9 + output) + output // 8


def test_the_gradients_by_an_algorithm():
    harness()
    shape, setting = Shape(16, 16, 3, 6, groups=16), Setting("bfloat16", "channels_last", "training")
    assert len(convolutions.check(shape, setting, 2, "host_cuda", "cpu", "direct")) == 6
    with pytest.raises(convolutions.RefusedError, match=r"^[^\n]+$"):
        convolutions.check(Shape(16, 16, 3, 6), setting, 2, "host_cuda", "cpu", "direct")


def test_an_error_of_another_kind_is_no_refusal(monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(convolutions.runner, "check", lost)
    setting = Setting("bfloat16", "channels_last", "forward")
    with pytest.raises(RuntimeError, match="illegal") as error:
        convolutions.check(Shape(4, 8, 3, 5), setting, 2, "cpu", "cpu")
    assert error.type is RuntimeError


# The whole of it, with the CPU's ops in the place of the GPU's.


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which `make gpu` runs through in a second, and writes into tmp_path."""
    for name in hardware.BACKENDS:
        monkeypatch.setitem(
            backends._compiled, name, dataclasses.replace(backends._compiled["cpu"], kernels=lambda: "0")
        )
        monkeypatch.setitem(backends.ops, name, backends.ops["cpu"])
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(record, "gpu", lambda: dict(H100))
    monkeypatch.setattr(gpu, "GpuClock", WallClock)
    monkeypatch.setattr(gpu, "test", lambda findings, *_: findings.outcomes.append(PASSED))
    # Larger ones are checked once, by tests of their own.
    settings, small = ("bfloat16", "float64"), [c for c in kernels.checks() if c.shape != (8, 64, 14, 14)]
    monkeypatch.setattr(gpu, "checked_layers", lambda: [Shape(4, 8, 3, 5)])
    monkeypatch.setattr(convolutions, "algorithms", lambda backend: ())
    monkeypatch.setattr(gpu, "checks", lambda: [c for c in small if c.dtype in settings])
    monkeypatch.setattr(gpu, "cases", lambda: [c for c in kernels.checks() if c.dtype == "bfloat16"][:6])
    layer = (Shape(4, 8, 1, 4), Setting("bfloat16", "channels_last", "training"), 2)
    monkeypatch.setattr(gpu, "layers", lambda: [layer])
    monkeypatch.setattr(proven, "FILE", tmp_path / "proven.json")
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    monkeypatch.setattr(hardware, "FILE", tmp_path / "hardware.md")
    proven.write([], proven.FILE)
    measured.write([], measured.FILE)
    hardware.FILE.write_text(f"# Above\n\n{hardware.BEGIN}\n\n{hardware.table([])}\n\n{hardware.END}\n\nBelow\n")
    return tmp_path


def run_it(folder, *arguments):
    status = main(["gpu", "--repeats", "2", "--commit", "0123abcd", "--output", str(folder), *arguments])
    (file,) = folder.glob("*.json") if folder != proven.FILE.parent else folder.glob("*_gpu_*.json")
    return status, json.loads(file.read_text()), file.name


def test_everything_is_written(machine, capsys):
    status, run, name = run_it(machine)
    assert status == 0, capsys.readouterr()
    assert name == f"{run['date']}_gpu_nvidia-h100-80gb-hbm3_gpu.json"
    assert run["gpu"] == H100
    assert run["complete"]
    assert [row["backend"] for row in run["kernels"]] == ["cuda"] * 6 + ["triton"] * 6
    assert len(run["layers"]) == 1
    assert run["wrong"] == []
    assert all(0 <= row["error"] <= row["budget"] for row in run["accuracies"])

    proofs = proven.read(proven.FILE)
    assert {(p.capability, p.gpu, p.commit, p.date) for p in proofs} == {("9.0", H100["name"], "0123abcd", run["date"])}
    # Convolutions are checked in all dtypes, the others here in two.
    assert len(proofs) == 2 * (len(kernels.OPS) * 2 * 2 + 2 * 4 * 2)
    assert {(p.backend, p.op) for p in proofs} == set(itertools.product(hardware.BACKENDS, hardware.OPS))
    assert {p.kernels for p in proofs} == {"0"}

    (row,) = run["layers"]
    layer = measured.layer((1, 1), 4, 8, (1, 1), 1)
    times = {time.backend: time for time in measured.read(measured.FILE)}
    assert times.keys() == set(hardware.BACKENDS)
    for backend, time in times.items():
        assert time.place == ("9.0", "bfloat16", "channels_last", layer)
        assert (time.seconds, time.gpu, time.result) == (row["times"][backend]["median"], H100["name"], name)

    text = hardware.FILE.read_text()
    assert text.startswith("# Above\n")
    assert text.endswith("\n\nBelow\n")
    entries = hardware.read(text)
    assert {entry.state for entry in entries} == {"proven"}
    assert len(entries) == len(proofs)
    assert [entry for entry in entries if entry.speed != "-"]
    out = capsys.readouterr().out
    assert "share of a copy, geometric mean" in out
    assert f"{len(proofs)} of {len(proofs)} combinations of backend, op, dtype and layout are proven" in out


class Choice:
    """Two algorithms of backend "cuda", both the CPU's ops in truth; a third one takes nothing."""

    def __init__(self, monkeypatch, wrong=()):
        self.times = {"direct": 1.0, "two passes": 2.0}
        self.wrong = wrong
        right = convolutions.check

        def check(shape, setting, batch, backend, device, algorithm=None):
            if algorithm == "held sm90":
                raise convolutions.RefusedError("no tensor cores here")
            if algorithm in wrong:
                raise WrongResultError(f"{algorithm} is ten percent off")
            return right(shape, setting, batch, backend, device)

        names = (*self.times, "held sm90")
        monkeypatch.setattr(convolutions, "algorithms", lambda backend: names if backend == "cuda" else ())
        monkeypatch.setattr(convolutions, "check", check)
        monkeypatch.setattr(convolutions, "_chosen", lambda backend, algorithm: backends.use(backend))


def test_algorithms_are_checked_timed_and_the_fastest_is_kept(machine, monkeypatch, capsys):
    Choice(monkeypatch)
    shape, batch = Shape(4, 8, 1, 4), 2
    settings = [Setting("bfloat16", "channels_last", mode) for mode in ("training", "forward")]
    monkeypatch.setattr(gpu, "layers", lambda: [(shape, setting, batch) for setting in settings])
    status, run, _ = run_it(machine)
    assert status == 0
    assert [row["backend"] for row in run["algorithms"]] == ["cuda"] * 2
    training, forward = run["algorithms"]
    assert set(training["times"]) == {"direct", "two passes"}
    assert set(forward["times"]) == {"direct", "two passes", "conv"}
    assert forward["refused"] == {"held sm90": "no tensor cores here"}
    times = {time.backend: time for time in measured.read(measured.FILE)}
    seconds = {name: time["median"] for name, time in training["times"].items()}
    assert times["cuda"].algorithm == min(seconds, key=seconds.get)
    assert times["cuda"].seconds == min(seconds.values())
    assert times["triton"].algorithm == ""
    out = capsys.readouterr().out
    assert "tensor cores of H100 SXM" in out
    assert re.search(rf"{re.escape(str(shape))}, .* \| 2 +\| direct", out)


def test_an_algorithm_that_is_wrong_proves_nothing_for_its_backend(machine, monkeypatch):
    Choice(monkeypatch, wrong=("direct",))
    status, run, _ = run_it(machine)
    assert status == 1
    assert {row["what"] for row in run["wrong"]} == {"direct is ten percent off"}
    assert {(p.backend, p.op) for p in proven.read(proven.FILE) if p.layout == "channels_last"} >= {
        ("cuda", "center"), ("triton", "conv_center"),
    }  # fmt: skip
    assert not [
        p for p in proven.read(proven.FILE) if (p.backend, p.op, p.layout) == ("cuda", "conv_center", "channels_last")
    ]
    (time,) = [time for time in measured.read(measured.FILE) if time.backend == "cuda"]
    assert time.algorithm == "two passes"


def test_no_time_of_a_backend_whose_algorithms_were_left_out(machine, monkeypatch):
    Choice(monkeypatch)
    monkeypatch.setattr(gpu, "_time_algorithms", lambda *_: [])
    assert run_it(machine)[0] == 0
    assert {time.backend for time in measured.read(measured.FILE)} == {"triton"}


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.5), ("float32", 1.0)])
def test_shares_of_the_data_sheet(dtype, share):
    ceilings = gpu.BY_GENERATION[9]
    setting, operations = Setting(dtype, "channels_last", "forward"), int(ceilings.operations)
    times = {"direct": summarize([2.0, 2.0])}
    one = convolutions.Algorithms("cuda", setting, "", "", 1, int(ceilings.bytes), operations, times, {}, {}, {})
    assert gpu._shares(one, "direct", ceilings) == pytest.approx([share, 0.5])
    assert gpu._shares(one, "direct", None) == []


def test_without_triton_the_others_are_proven(machine, monkeypatch, capsys):
    absent = dataclasses.replace(backends._compiled["triton"], unavailable=lambda: "triton cannot be imported")
    monkeypatch.setitem(backends._compiled, "triton", absent)
    assert run_it(machine)[0] == 0
    assert {proof.backend for proof in proven.read(proven.FILE)} == {"cuda"}
    assert "backend 'triton' is left out: triton cannot be imported" in capsys.readouterr().out


def test_failed_tests_prove_nothing(machine, monkeypatch, capsys):
    """And take back what was proven on such a GPU before, but nothing of others."""
    before = [
        proven.Proof("cuda", "center", "float32", "contiguous", c, f"GPU {c}", "abc", "2026-01-31", "0123")
        for c in ("8.0", "9.0")
    ]
    proven.write(before, proven.FILE)
    monkeypatch.setattr(gpu, "test", lambda findings, *_: findings.outcomes.extend([PASSED, FAILED]))
    status, run, _ = run_it(machine)
    assert status == 1
    assert len(run["kernels"]) == 12
    assert list(proven.read(proven.FILE)) == before[:1]
    assert {entry.state for entry in hardware.read(hardware.FILE.read_text())} == {"tests failed"}
    assert "FAILED" in capsys.readouterr().out


def test_a_wrong_op_is_not_proven_and_the_others_are(machine, monkeypatch):
    right = kernels.check

    def check(case, library, device):
        if case.op == "center" and case.layout == "contiguous":
            raise WrongResultError("wrong")
        return right(case, library, device)

    monkeypatch.setattr(kernels, "check", check)
    status, run, _ = run_it(machine)
    assert status == 1
    assert {(row["op"], row["layout"]) for row in run["wrong"]} == {("center", "contiguous")}
    proofs = {(p.op, p.layout) for p in proven.read(proven.FILE)}
    assert ("center", "channels_last") in proofs
    assert ("center", "contiguous") not in proofs
    states = {(e.op, e.layout): e.state for e in hardware.read(hardware.FILE.read_text())}
    assert states["center", "contiguous"] == "WRONG RESULT"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access\nmore"), KeyboardInterrupt()])
def test_a_broken_run_proves_nothing_and_is_written(machine, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(convolutions, "measure", broken)
    status, run, _ = run_it(machine)
    assert status == 1
    assert not run["complete"]
    assert run["error"] in ("interrupted", "RuntimeError: CUDA error: an illegal memory access")
    assert run["accuracies"]
    assert proven.read(proven.FILE) == ()


def test_no_time_left(machine, monkeypatch):
    """Checked and proven all the same; what was not timed is listed."""
    monkeypatch.setattr(gpu.Progress, "left", 0.0)
    status, run, _ = run_it(machine)
    assert status == 0
    assert not run["complete"]
    assert len(run["left_out"]) == 2 * 6 + 1
    assert proven.read(proven.FILE)


def test_a_table_of_proofs_that_cannot_be_read_is_made_anew(machine, capsys):
    proven.FILE.write_text("{")
    assert run_it(machine)[0] == 0
    assert "made anew" in capsys.readouterr().out
    assert proven.read(proven.FILE)


def test_without_tests_nothing_is_proven():
    findings = Findings(checked={("cuda", "center", "float32", "contiguous"): Accuracy(0.0, 1.0)})
    assert findings.proven() == []
    findings.outcomes = [Outcome("memcheck", None, "not installed", 0.0), PASSED]
    assert findings.proven() == [("cuda", "center", "float32", "contiguous")]


def test_hardware_keeps_other_gpus(tmp_path):
    file = tmp_path / "hardware.md"
    file.write_text(f"{hardware.BEGIN}\n{hardware.END}\n")
    a100, h100 = (
        hardware.Entry("cuda", "center", "float32", "contiguous", "proven", g, "abc") for g in ("A100", "H100")
    )
    hardware.rewrite(file, "A100", [a100])
    hardware.rewrite(file, "H100", [h100])
    assert hardware.read(file.read_text()) == [a100, h100]
    hardware.rewrite(file, "A100", [])
    assert hardware.read(file.read_text()) == [h100]
    assert file.read_text().count(hardware.NOT_RUN) == 2 * len(hardware.OPS) - 1
    file.write_text("no such lines")
    with pytest.raises(ValueError, match="lacks the line"):
        hardware.rewrite(file, "H100", [h100])


def test_the_document_is_as_the_program_writes_it():
    text = hardware.FILE.read_text()
    entries = hardware.read(text)
    assert hardware.table(entries) in text
    proofs = {(p.backend, p.op, p.dtype, p.layout, p.gpu) for p in proven.read(proven.FILE)}
    assert proofs <= {(e.backend, e.op, e.dtype, e.layout, e.gpu) for e in entries if e.state == "proven"}


# The processes that it starts.


def file_with(folder, body):
    file = folder / "test_of_a_gpu.py"
    file.write_text(f"import time, pytest\npytestmark = pytest.mark.gpu\n{body}")
    return str(file)


@pytest.mark.parametrize(
    ("body", "passed", "summary"),
    [
        ("def test_a(): pass\ndef test_b(): pytest.skip('why')", True, "1 passed, 0 failed, 1 skipped"),
        ("def test_a(): pass\ndef test_b(): assert False", False, "1 passed, 1 failed, 0 skipped"),
        ("def test_a(): pytest.skip('why')", False, "0 passed, 0 failed, 1 skipped"),
        ("", False, "0 passed, 0 failed, 0 skipped"),
        ("def test_a(): time.sleep(60)", False, "stopped after"),
    ],
    ids=["passed", "failed", "all-skipped", "none", "slow"],
)
def test_pytest_in_a_process(tmp_path, body, passed, summary):
    limit = 3 if "sleep" in body else 60
    outcome = gpu.pytest("op tests", [file_with(tmp_path, body)], limit)
    assert outcome.passed is passed
    assert outcome.summary.startswith(summary)


@pytest.mark.parametrize(
    ("script", "passed", "summary"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", True, "ERROR SUMMARY: 0 errors"),
        ("echo '========= Invalid write'; echo '========= ERROR SUMMARY: 1 error'; exit 99", False, "ERROR SUMMARY: 1"),
        ("echo '========= Error: Device not supported'; exit 1", None, "Error: Device not supported"),
        ("exit 1", False, "no output"),
        ("sleep 60", None, "stopped after 1 s"),
    ],
    ids=["clean", "found", "unsupported", "crashed", "slow"],
)
def test_sanitizer_in_a_process(monkeypatch, tmp_path, script, passed, summary):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    outcome = gpu.sanitize("memcheck", [], 1)
    assert outcome.passed is passed
    assert summary in outcome.summary


def test_without_a_sanitizer(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    outcome = gpu.sanitize("racecheck", ["convolutions"], 1)
    assert outcome == Outcome("racecheck convolutions", None, "compute-sanitizer is not installed", 0.0)


@pytest.mark.parametrize(("which", "calls"), [([], 8 * (3 * 3 * 2 * 4 + 8 + 5)), (["convolutions"], 8 * 5 * 2)])
def test_what_the_sanitizers_run(monkeypatch, capsys, which, calls):
    # Without the large ones, which differ on a GPU alone.
    monkeypatch.setattr(sanitize_gpu, "SHAPES", sanitize_gpu.SHAPES[:3])
    assert sanitize_gpu.main("cpu", *which) == 0
    assert capsys.readouterr().out == f"{calls} calls\n"


def test_what_the_sanitizers_run_of_the_convolutions_of_cuda(monkeypatch, capsys):
    """Every algorithm; between them they take every layer in channels_last."""
    harness()
    monkeypatch.setattr(sanitize_gpu, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(sanitize_gpu, "FORMATS", (torch.channels_last,))
    monkeypatch.setattr(sanitize_gpu, "CONVOLUTIONS", sanitize_gpu.CONVOLUTIONS[::2])
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert sanitize_gpu.main("host_cuda", "own") == 0
    assert capsys.readouterr().out == "16 calls\n"


def test_order_of_the_steps(monkeypatch):
    called = []
    monkeypatch.setattr(gpu, "pytest", lambda *a: called.append(a[0]) or PASSED)
    absent = Outcome("x", None, "absent", 0.0)
    monkeypatch.setattr(gpu, "sanitize", lambda tool, which, _: called.append(" ".join([tool, *which])) or absent)
    findings = Findings()
    gpu.test(findings, gpu.Progress(60), ["cuda", "triton"])
    steps = ("memcheck {}", "memcheck {} convolutions", "racecheck {}")
    checks = [*(step.format("cuda") for step in steps), "racecheck cuda own"]
    checks += [*(step.format("triton") for step in steps), "racecheck triton convolutions"]
    assert called == ["op tests", "GPU tests", *checks]
    assert findings.tests_passed
    findings.outcomes.append(FAILED)
    assert not findings.tests_passed


# What is missing.


@pytest.fixture
def complete(monkeypatch):
    """A machine that has all that is needed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_gpu", lambda index: backends._Gpu("NVIDIA H100", (9, 0)))
    monkeypatch.setattr(gpu.cpp_extension, "CUDA_HOME", "/cuda")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    return monkeypatch


def test_nothing_is_missing(complete):
    assert gpu.missing() == []


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        (lambda m: m.setattr(torch.version, "cuda", None), "a torch that is built for CUDA; .*make gpu VENV=none"),
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "a GPU: .*CUDA_VISIBLE_DEVICES"),
        (
            lambda m: m.setattr(backends, "_gpu", lambda index: backends._Gpu("Tesla V100", (7, 0))),
            "a newer GPU: Tesla V100 has compute capability 7.0, wanted 8.0",
        ),
        (lambda m: m.setattr(gpu.cpp_extension, "CUDA_HOME", None), "nvcc, of the CUDA toolkit"),
        (lambda m: m.setattr(shutil, "which", lambda name: name if "nvcc" in name else None), "a C\\+\\+ compiler"),
    ],
    ids=["torch", "gpu", "old", "nvcc", "compiler"],
)
def test_what_is_missing_is_said(complete, capsys, lack, words):
    lack(complete)
    (text,) = gpu.missing()
    assert re.match(words, text)
    assert main(["gpu"]) == 1
    assert text in capsys.readouterr().err


def test_an_extension_without_cuda_is_refused(complete, capsys):
    complete.setattr(backends, "_built_with_cuda", lambda: False)
    assert main(["gpu"]) == 1
    assert "backend 'cuda': the extension is built without CUDA kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "wanted"), [((8, 0), "8.0"), ((8, 9), "8.9"), ((9, 0), "9.0a"), ((12, 0), "12.0a")]
)
def test_architecture(complete, capsys, capability, wanted):
    complete.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert main(["gpu", "--architecture"]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "1"], "--repeats: got '1', wanted an integer of at least 2"),
        (["--seconds", "0"], "--seconds: got"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["gpu", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
