"""Which algorithm a convolution on a CPU takes: by the table of costs, by what was timed, and what is said about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import bench.costs
import deepcontrol_cuda as dc
from bench import rows
from bench.rows import Row, Run, Setting
from deepcontrol_cuda import _ops, backends, costs, tuning
from deepcontrol_cuda.timing import Shape

pytestmark = pytest.mark.skipif(_ops.extension is None, reason="the extension is not built")
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No table, nothing timed, a cache of its own; afterwards everything is as it was."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "cache"))
    for name, value in (("_timed", {}), ("_cache", None), ("_costs", ()), ("tune", False)):
        monkeypatch.setattr(backends, name, value)
    _ops.extension.set_costs_cpu([])
    _ops.extension.forget_fastest_cpu()
    yield
    monkeypatch.undo()
    _ops.extension.forget_fastest_cpu()
    backends._read_costs()


def layer(channels=16, filters=32, size=12, batch=4):
    """A 1x1 convolution that the matrix product takes, where the instruction set has one."""
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    w = torch.randn(filters, channels, 1, 1)
    if reason := plan(x, w)["forward"]["obstacles"]["product"]:
        pytest.skip(reason)
    return x, w


def plan(x, w):
    return _ops.extension.plan_conv_cpu(backends._case_cpu(x, w, GEOMETRY))


def chosen(x, w):
    return [(plan(x, w)[mode]["chosen"], plan(x, w)[mode]["source"]) for mode in tuning.PASSES]


def cost(algorithm, milliseconds, mode="forward", threads=None, error=0.1, **other):
    """Of 1x1 layers, whatever their size."""
    values = {
        "backend": "cpu", "hardware": _ops.extension.info()["isa"], "threads": threads or torch.get_num_threads(),
        "dtype": "float32", "layout": "channels_last", "kind": "1x1", "mode": mode, "algorithm": algorithm,
        "fixed_microseconds": milliseconds * 1e3, "milliseconds_per_gigaoperation": 0.0,
        "milliseconds_per_gigabyte": 0.0, "layers": 3, "error": error, "results": "x.json",
    }  # fmt: skip
    return costs.Cost(**values | other)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Makes the given rows the package's table."""
    monkeypatch.setattr(costs, "FILE", tmp_path / "costs.json")

    def make(*found):
        costs.write(found, costs.FILE)
        backends._read_costs()

    return make


def test_the_table_of_the_package_is_sound():
    isas = ("avx512_bf16", "avx512", "avx2", "portable")
    for one in costs.read(costs.FILE):
        assert one.backend == "cpu"
        assert one.hardware in isas
        assert one.mode in tuning.PASSES
        assert one.algorithm in backends.ALGORITHMS["cpu"]


def test_a_table_reads_as_it_was_written(tmp_path):
    found = [cost("product", 1.0), cost("two passes", 2.0)]
    costs.write(reversed(found), tmp_path / "table.json")
    assert list(costs.read(tmp_path / "table.json")) == found


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 9, "costs": []}', '{"format": 1, "costs": [{"backend": "cpu"}]}', None]
)
def test_without_a_table_the_rules_stand(table, content):
    x, w = layer()
    table()
    if content is None:
        costs.FILE.unlink()
    else:
        costs.FILE.write_text(content)
    with pytest.warns(UserWarning, match="by rule alone.*costs.json"):
        backends._read_costs()
    assert chosen(x, w) == [("product", "rule")] * 2


def test_the_choice_follows_the_table(table):
    x, w = layer()
    table(cost("product", 2.0), cost("two passes", 1.0))
    assert chosen(x, w) == [("two passes", "predicted"), ("product", "rule")]
    table(cost("product", 1.0), cost("two passes", 2.0))
    assert chosen(x, w) == [("product", "rule")] * 2
    table(cost("product", 2.0), cost("two passes", 1.0, "backward"), cost("product", 2.0, "backward"))
    assert chosen(x, w) == [("product", "rule"), ("two passes", "predicted")]


def test_a_difference_within_the_error_of_the_costs_changes_nothing(table):
    x, w = layer()
    table(cost("product", 1.0, error=0.1), cost("two passes", 0.91, error=0.05))
    assert chosen(x, w)[0] == ("product", "rule")
    table(cost("product", 1.0, error=0.1), cost("two passes", 0.89, error=0.05))
    assert chosen(x, w)[0] == ("two passes", "predicted")


@pytest.mark.parametrize(
    "other", [{"hardware": "riscv"}, {"dtype": "bfloat16"}, {"layout": "contiguous"}, {"kind": "3x3"}], ids=str
)
def test_rows_of_other_layers_and_machines_say_nothing(table, other):
    x, w = layer()
    table(cost("product", 2.0, **other), cost("two passes", 1.0, **other))
    assert chosen(x, w)[0] == ("product", "rule")


def test_the_nearest_number_of_threads_counts(table):
    x, w = layer()
    here = torch.get_num_threads()
    near, far = [(2.0, 1.0), (1.0, 2.0)]
    rows_of = {4 * here: near, 64 * here: far}
    table(
        *[cost(name, ms, threads=n) for n, both in rows_of.items() for name, ms in zip(("product", "two passes"), both)]
    )
    assert chosen(x, w)[0] == ("two passes", "predicted")


def test_costs_are_those_of_the_layer(table):
    x, w = layer()
    table(cost("product", 0.5, milliseconds_per_gigaoperation=3.0, milliseconds_per_gigabyte=7.0))
    operations, size = 2 * 4 * 144 * 16 * 32, 4 * (4 * 144 * (16 + 32) + 16 * 32)
    of_pass = plan(x, w)["forward"]
    assert (of_pass["operations"]["product"], of_pass["bytes"]) == (operations, size)
    assert of_pass["seconds"]["product"] == pytest.approx(0.5e-3 + operations * 3e-12 + size * 7e-12)
    assert of_pass["seconds"]["product"] == pytest.approx(backends._costs[0].seconds(operations, size))
    assert of_pass["seconds"]["two passes"] is None


@pytest.mark.parametrize(
    ("algorithm", "shape", "forward", "backward"),
    [
        ("two passes", Shape(24, 40, 3, 14), 2 * 196 * 40 * 24 * 9, 4 * 196 * 40 * 24 * 9),
        # Vectors of 16 filters forward, of as many channels backward: one, two or four of them.
        ("product", Shape(24, 40, 1, 14), 2 * 196 * 64 * 24, 4 * 196 * 40 * 32),
        ("product", Shape(72, 136, 1, 14), 2 * 196 * 144 * 72, 4 * 196 * 136 * 80),
        ("direct", Shape(40, 40, 3, 14, groups=40), 2 * 196 * 48 * 9, 4 * 196 * 48 * 9),
        # Tiles of 4 x 2 of a whole map, of 2 x 2 for the weight, panels of 64 but the weight's channels.
        ("winograd", Shape(96, 128, 3, 15), 2 * 24 * 32 * 128 * 96, 2 * 24 * 32 * 128 * 128 + 2 * 16 * 64 * 128 * 96),
    ],
    ids=str,
)
def test_operations_count_what_fills_up_vectors_and_tiles(algorithm, shape, forward, backward):
    plans = _ops.extension.plan_conv_cpu(bench.costs.case(shape, Setting("float32", "channels_last", "forward", 3, 2)))
    found = [plans[name]["operations"][algorithm] for name in ("forward", "backward")]
    assert found == [3 * forward, 3 * backward]


def test_explain_has_every_algorithm_with_its_cost_or_the_reason(table):
    x, w = layer()
    table(cost("product", 2.0), cost("two passes", 1.0))
    head, *lines = backends.explain(x, weight=w).splitlines()
    assert head == backends.explain(x)
    predicted = "predicted (median error 10%, from x.json)"
    assert [line.split()[0] for line in lines] == [mode for mode in tuning.PASSES for _ in backends.ALGORITHMS["cpu"]]
    texts = [line.split(maxsplit=1)[1] for line in lines]
    assert f"product     2 ms, {predicted}" in texts
    assert f"two passes  1 ms, {predicted}; chosen, predicted to be the fastest" in texts
    assert "product     cost unknown; chosen, by rule" in texts
    assert "two passes  cost unknown" in texts
    of_3x3 = backends.explain(x, weight=torch.ones(4, 16, 3, 3), padding=1)
    assert "product     does not take it: the kernel has more than one tap" in of_3x3
    with backends.prefer("product", "cpu"):
        assert "product     2 ms, predicted (median error 10%, from x.json); chosen, preferred" in backends.explain(
            x, weight=w
        )


def test_a_layer_is_timed_once_and_others_read_it(monkeypatch):
    x, w = layer()
    monkeypatch.setattr(backends, "tune", True)
    asked = []
    time_on_cpu = tuning.time_on_cpu
    monkeypatch.setattr(tuning, "time_on_cpu", lambda *a: asked.append(a) or time_on_cpu(*a))
    for _ in range(2):
        dc.functional.deep_control_conv2d(x, w)
    assert len(asked) == 1
    (timed,) = backends._timed.values()
    assert chosen(x, w) == [(timed.fastest(mode), "timed") for mode in tuning.PASSES]
    assert "timed here; chosen, the fastest that was timed here" in backends.explain(x, weight=w)

    # As another process would.
    for name, value in (("_timed", {}), ("_cache", None)):
        monkeypatch.setattr(backends, name, value)
    _ops.extension.forget_fastest_cpu()
    dc.functional.deep_control_conv2d(x, w)
    assert len(asked) == 1
    assert chosen(x, w) == [(timed.fastest(mode), "timed") for mode in tuning.PASSES]
    dc.functional.deep_control_conv2d(x[:2], w)
    assert len(asked) == 2


def test_explain_reads_what_earlier_processes_timed(monkeypatch):
    """Before the layer's first call, without timing and without writing."""
    x, w = layer()
    tuning.Cache(tuning.folder(), tuning.situation()).add(
        backends._layer_text(x, w, GEOMETRY),
        tuning.Timed({"product": 2.0, "two passes": 1.0}, {"product": 1.0, "two passes": 2.0}),
    )
    (path,) = tuning.folder().iterdir()
    before = path.stat()
    monkeypatch.setattr(tuning, "time_on_cpu", lambda *_: pytest.fail("timed"))
    assert "timed here" not in backends.explain(x, weight=w)
    monkeypatch.setattr(backends, "tune", True)
    said = [line.split(maxsplit=1)[1] for line in backends.explain(x, weight=w).splitlines() if "; chosen" in line]
    assert said == [
        "two passes  1e+03 ms, timed here; chosen, the fastest that was timed here",
        "product     1e+03 ms, timed here; chosen, the fastest that was timed here",
    ]
    dc.functional.deep_control_conv2d(x, w)
    assert chosen(x, w) == [("two passes", "timed"), ("product", "timed")]
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_explain_says_that_a_call_would_time(monkeypatch):
    x, w = layer()
    monkeypatch.setattr(tuning, "time_on_cpu", lambda *_: pytest.fail("timed"))
    assert "not timed yet" not in backends.explain(x, weight=w)
    monkeypatch.setattr(backends, "tune", True)
    last = backends.explain(x, weight=w).splitlines()[-1]
    assert last == "  not timed yet: the first call times those that take it, and the fastest is chosen from then on"
    assert not tuning.folder().exists()
    with backends.prefer("two passes", "cpu"):
        assert "not timed yet" not in backends.explain(x, weight=w)


def test_what_was_timed_goes_before_the_table_and_what_is_preferred_before_both(monkeypatch, table):
    x, w = layer()
    table(cost("product", 2.0), cost("two passes", 1.0))
    seconds = {"product": 1.0, "two passes": 2.0}
    monkeypatch.setattr(tuning, "time_on_cpu", lambda *_: tuning.Timed(seconds, seconds))
    backends.time_layer(x, w, GEOMETRY)
    assert chosen(x, w) == [("product", "timed")] * 2
    with backends.prefer("two passes", "cpu"):
        assert chosen(x, w) == [("two passes", "preferred")] * 2


def test_timing_changes_no_choice_of_other_threads(monkeypatch):
    x, w = layer()
    seen = []

    def seconds(call, algorithms, run):
        thread = threading.Thread(target=lambda: seen.append(chosen(x, w)))
        _ops.extension.prefer_algorithm_cpu("two passes", of_thread=True)
        thread.start()
        thread.join()
        return {"product": 1.0, "two passes": 2.0}

    monkeypatch.setattr(tuning, "_interleaved", seconds)
    backends.time_layer(x, w, GEOMETRY)
    assert seen == [[("product", "rule")] * 2] * 2
    assert chosen(x, w) == [("product", "timed")] * 2


def test_nothing_is_timed_while_a_graph_is_made(monkeypatch):
    x, w = layer()
    monkeypatch.setattr(backends, "tune", True)
    monkeypatch.setattr(tuning, "time_on_cpu", lambda *_: pytest.fail("timed"))
    conv = dc.functional.deep_control_conv2d
    torch.compile(conv, fullgraph=True, backend="eager")(x, w)
    torch.compiler.reset()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return conv(x, w)

    torch.export.export(Layer(), (x,))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        conv(torch.empty(4, 16, 12, 12), torch.empty(32, 16, 1, 1))
    torch.func.vmap(lambda one: conv(one, w, backend="reference"))(x[None])
    conv(x.to("meta"), w.to("meta"))
    conv(x, w, backend="reference")
    assert backends._timed == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "foreign", "damaged", b"\xff\xfe"], ids=repr)
def test_a_cache_that_cannot_be_used_is_told_once_and_replaced(content):
    where, about = tuning.folder(), {"torch": "1"}
    where.mkdir()
    path = tuning.Cache(where, about).path
    timed = tuning.Timed({"product": 1.0}, {"product": 1.0})
    if content == "foreign":
        content = json.dumps({"format": 1, "situation": {"torch": "2"}, "layers": {"a": timed._asdict()}})
    if content == "damaged":
        content = json.dumps({"format": 1, "situation": about, "layers": {"a": {"forward": {}, "backward": {}}}})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="times layers again, since .*timed-") as caught:
        tuning.Cache(where, about).add("b", timed)
    assert len(caught) == 1
    assert tuning.Cache(where, about).known == {"b": timed}


def known(about):
    """Layers in the file, in its order."""
    return list(tuning.Cache(tuning.folder(), about).known)


def test_the_oldest_layers_go(monkeypatch):
    monkeypatch.setattr(tuning, "MOST_LAYERS", 3)
    about, timed = {"torch": "1"}, tuning.Timed({"product": 1.0}, {"product": 1.0})
    one = tuning.Cache(tuning.folder(), about)
    for name in "cbad":
        one.add(name, timed)
    assert known(about) == list("bad")
    one.add("b", timed)
    assert known(about) == list("adb")
    # What another process dropped does not come back with the layers that this one knows.
    tuning.Cache(tuning.folder(), about).add("e", timed)
    one.add("f", timed)
    assert known(about) == list("bef")


def test_what_could_not_be_written_is_written_with_the_next(monkeypatch):
    about, timed = {"torch": "1"}, tuning.Timed({"product": 1.0}, {"product": 1.0})
    cache = tuning.Cache(tuning.folder(), about)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr(tuning.files, "replace", full)
        with pytest.warns(UserWarning, match="keeps no times of layers for later processes: no space left"):
            cache.add("a", timed)
    assert list(cache.known) == ["a"]
    cache.add("b", timed)
    assert known(about) == ["a", "b"]


@pytest.mark.parametrize("what", ["deepcontrol_cuda", "torch", "kernels", "cpu"])
def test_another_version_or_machine_has_a_file_of_its_own(what):
    about = tuning.situation()
    assert tuning.Cache(tuning.folder(), about).path == tuning.Cache(tuning.folder(), tuning.situation()).path
    assert tuning.Cache(tuning.folder(), about | {what: "other"}).path != tuning.Cache(tuning.folder(), about).path


def test_a_folder_that_cannot_be_written_costs_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(backends, "tune", True)
    x, w = layer(size=14)
    with pytest.warns(UserWarning, match=f"keeps no times.*{tuning.VARIABLE} names another folder") as caught:
        [dc.functional.deep_control_conv2d(images, w) for images in (x, x[:2])]
    assert len(caught) == 1
    assert {source for _, source in chosen(x, w)} == {"timed"}


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({"DEEPCONTROL_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/deepcontrol_cuda"),
        ({"HOME": "/c"}, "/c/.cache/deepcontrol_cuda"),
    ],
    ids=["own", "xdg", "home"],
)
def test_environment_variable_cache_dir(monkeypatch, variables, path):
    for name in ("DEEPCONTROL_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(tuning.folder()) == path


FOUR = """if True:
    import sys, warnings
    from pathlib import Path
    from deepcontrol_cuda import tuning
    warnings.simplefilter("error")
    cache = tuning.Cache(Path(sys.argv[1]), {"torch": "1"})
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(5):
        cache.add(f"{sys.argv[2]}, {i}", tuning.Timed({"product": 1.0}, {"product": 1.0}))
"""


def test_four_processes_at_once_lose_nothing():
    where = tuning.folder()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", FOUR, str(where), str(i)], **pipes) for i in range(4)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0
    assert tuning.Cache(where, {"torch": "1"}).known.keys() == {f"{i}, {j}" for i in range(4) for j in range(5)}
    assert [path.suffix for path in where.iterdir()] == [".json"]


def test_environment_variable_tune(tmp_path):
    x_w = "torch.ones(4, 16, 12, 12).contiguous(memory_format=torch.channels_last), torch.ones(32, 16, 1, 1)"
    script = f"import torch, deepcontrol_cuda as dc; dc.functional.deep_control_conv2d({x_w})"
    layer()
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"DEEPCONTROL_TUNE": "1"}, check=True)
    assert len(list(tuning.folder().glob("timed-*.json"))) == 1


def measured(isa, seconds_of):
    """A run of four layers whose seconds ``seconds_of(algorithm, operations, bytes)`` gives."""
    found = []
    for shape in [Shape(64, 64, 1, 56), Shape(64, 256, 1, 56), Shape(16, 96, 1, 112), Shape(512, 2048, 1, 7)]:
        for mode in ("forward", "training"):
            setting = Setting("float32", "channels_last", mode, 8, 2)
            passes = ("forward", "backward") if mode == "training" else ("forward",)
            of_passes = [_ops.extension.plan_conv_cpu(bench.costs.case(shape, setting))[name] for name in passes]
            seconds = {}
            for name in ("product", "two passes"):
                value = sum(seconds_of(name, one["operations"][name], one["bytes"]) for one in of_passes)
                seconds[f"ours, {name}"] = (value, value, value)
            found.append(Row(str(shape), setting, "conv_relu", seconds | {"ours, reference": (1.0,), "ours": (1.0,)}))
    versions = {"extension_isa": isa}
    return Run("layers", "2026-01-31", {"cpu": "x"}, versions, None, {}, True, rows=tuple(found))


def test_the_table_of_the_package_is_fitted_to_the_committed_runs():
    paths = sorted(bench.costs.RESULTS.glob("*_cpu_*_layers*.json"))
    samples = [sample for path in paths for sample in bench.costs.samples_of(rows.read(path), path.name)]
    here = _ops.extension.info()["isa"]
    if {sample.place.hardware for sample in samples} != {here}:
        pytest.skip(f"what {here} kernels take is not what was measured, and so nor is what they count")
    found = {(*vars(c).values(),)[:8]: c for c in bench.costs.fit_all(samples)}
    table = {(*vars(c).values(),)[:8]: c for c in costs.read(costs.FILE)}
    assert found.keys() == table.keys()
    for sample in samples:
        key = (*vars(sample.place).values(), sample.algorithm)
        if key in table:
            counts = sample.operations, sample.bytes
            assert table[key].seconds(*counts) == pytest.approx(found[key].seconds(*counts), rel=0.05), sample


def test_a_fit_does_not_follow_what_something_else_made_slow():
    place = bench.costs.Place("cpu", "avx2", 2, "float32", "contiguous", "1x1", "forward")
    law = costs.Cost(*vars(place).values(), "product", 200.0, 2.0, 300.0, 0, 0.0, "")
    samples = []
    for i in range(16):
        operations, size = 1e8 * (1 + i % 4) ** 2, 1e6 * (1 + i // 4) ** 2
        seconds = law.seconds(operations, size) * (3 if i in (3, 6, 11, 12) else 1)
        samples.append(bench.costs.Sample(place, f"layer {i}", 8, "product", operations, size, seconds, "x.json"))
    found = bench.costs.fit(place, "product", samples)
    for name in ("fixed_microseconds", "milliseconds_per_gigaoperation", "milliseconds_per_gigabyte"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.02)


def test_a_table_is_fitted_to_a_run(tmp_path, capsys):
    """Costs that are made of fixed time, operations and bytes are found again, and the table is read by the planner."""
    rates = {"product": (1e-4, 4e-12, 3e-11), "two passes": (0.0, 5e-12, 6e-11)}

    def seconds_of(name, operations, size):
        fixed, per_operation, per_byte = rates[name]
        return fixed + per_operation * operations + per_byte * size

    (tmp_path / "run.json").write_text(json.dumps(measured(_ops.extension.info()["isa"], seconds_of).to_json()))
    rows.read(tmp_path / "run.json")
    from bench.__main__ import main

    assert main(["costs", str(tmp_path / "run.json"), "--table", str(tmp_path / "costs.json")]) == 0
    table = costs.read(tmp_path / "costs.json")
    assert [(one.mode, one.algorithm) for one in table] == [
        (mode, name) for mode in ("backward", "forward") for name in rates
    ]
    for one in table:
        fixed, per_operation, per_byte = rates[one.algorithm]
        assert (one.results, one.layers) == ("run.json", 4)
        assert one.error < 1e-3
        assert one.seconds(1e10, 1e8) == pytest.approx(fixed + per_operation * 1e10 + per_byte * 1e8, rel=1e-3)
    assert "the planner takes the fastest for 8" in capsys.readouterr().out or torch.get_num_threads() != 2


def test_the_command_says_what_it_lacks(tmp_path, capsys):
    from bench.__main__ import main

    (tmp_path / "old.json").write_text('{"command": "layers"}')
    for name, words in (("old.json", "is of format 1"), ("none.json", "No such file")):
        assert main(["costs", str(tmp_path / name), "--table", str(tmp_path / "costs.json")]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "costs.json").exists()


def test_the_choice_takes_little_time():
    """With a table and a thousand layers that were timed; most of it is Python's."""
    x, w = layer()
    case = backends._case_cpu(x, w, GEOMETRY)
    backends._read_costs()
    for size in range(1000):
        other = _ops.extension.ConvCase(
            2, 1, 8, 8, 1, [1, 1, size + 1], *[[1, 1, 1]] * 2, [0, 0, 0], [1, 1, 1], "float32", True, 1
        )
        _ops.extension.remember_fastest_cpu(other, "forward", "two passes")
    start = time.perf_counter()
    for _ in range(1000):
        _ops.extension.plan_conv_cpu(case)
    assert time.perf_counter() - start < 0.5
