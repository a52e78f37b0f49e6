"""``python -m deepcontrol_cuda``: the demo writes a report whose every part is there, and says what went wrong."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest

from deepcontrol_cuda import __version__, _ops, backends, cli

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from deepcontrol_cuda.training import fine_tuning, layers, loop, report
from deepcontrol_cuda.training.data import digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made" / "report"
    assert cli.main(["demo", "--quick", "--output", str(folder), "--seed", "7"]) == 0
    return folder


def table(text: str, first_head: str) -> list[list[str]]:
    """The cells, without the head, of the first Markdown table whose first head is ``first_head``."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {first_head} "))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_demo_writes_the_report(folder):
    text = (folder / "report.md").read_text()
    assert "Incomplete" not in text
    assert sorted(path.name for path in folder.iterdir()) == ["layers.png", "losses.png", "report.md", "results.json"]
    for picture in ("losses.png", "layers.png"):
        assert f"]({picture})" in text
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert __version__ in dict(table(text, "condition"))["deepcontrol_cuda"]


def test_numbers_in_the_report_parse_and_are_those_measured(folder):
    text = (folder / "report.md").read_text()
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    rows = table(text, "setting")
    assert len(rows) == len(results["runs"]) == 2 * len(loop.NETWORKS)
    for (setting, network, accuracy, loss, diverged), run in zip(rows, results["runs"]):
        assert (setting, network, run["seed"]) == (run["setting"], run["network"], 7)
        assert float(accuracy) == pytest.approx(run["test_accuracy"], abs=1e-4)
        assert math.isfinite(float(loss))
        assert diverged == "no"
    tuned = table(text, "fine-tuned")
    assert [row[0] for row in tuned] == list(fine_tuning.NETWORKS) == [run["network"] for run in results["fine_tuning"]]
    for row, run in zip(tuned, results["fine_tuning"]):
        before, converted, first_step, first_epoch, end = row[1:]
        assert float(before) == float(converted) == pytest.approx(run["before"], abs=1e-4)
        assert float(first_step) == pytest.approx(run["first_step"], abs=1e-4)
        assert float(end) == pytest.approx(run["end"], abs=1e-4)
        # Four steps are no epoch.
        assert first_epoch == "-"
        assert run["deviation"] <= 1e-5
    timings = table(text, "layer")
    assert len(timings) == 1
    spread = timings[0].pop(-2)
    plain, batch_norm, deep_control, *ratios, error = map(float, timings[0][1:])
    assert all(ms > 0 for ms in (plain, batch_norm, deep_control))
    assert ratios[1] == pytest.approx(deep_control / plain, rel=0.1)
    assert float(spread.removesuffix("%")) >= 0
    assert error <= layers.TOLERANCE


def test_divergence_is_reported():
    setting = loop.Setting(batch_size=64, learning_rate=1e6, steps=20)
    run = loop.train("no norm", setting, 0, digits())
    assert run.diverged_at is not None
    assert run.test_accuracy is run.final_loss is None
    assert all(math.isfinite(loss) for loss in run.losses)
    row = next(row for row in table(report.training_table([run]), "setting") if row[1] == "no norm")
    assert row[2:] == ["-", "-", f"step {run.diverged_at}"]


def test_a_seed_gives_the_same_run_again():
    data = digits()
    setting = loop.Setting(batch_size=16, learning_rate=0.1, steps=3)
    first, again, other = (loop.train("Deep Control", setting, seed, data) for seed in (0, 0, 1))
    assert first == again
    assert first.losses != other.losses


def test_a_wrong_layer_is_not_timed(monkeypatch):
    monkeypatch.setattr(layers, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="wanted at most"):
        next(layers.measure(layers.Shape(4, 4, 3, 6), batch_size=1, rounds=1))


def test_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 1
    assert "--output: cannot write into" in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert cli.main(["demo", "--output", str(tmp_path / "report")]) == 1
    error = capsys.readouterr().err
    assert "scikit-learn" in error
    assert "pip install --no-build-isolation '.[train]'" in error


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    rows = {line[:20].split("  ")[0]: line.partition("  ")[2].strip() for line in out.splitlines()}
    assert __version__ in rows["deepcontrol_cuda"]
    assert "threads" in rows["CPU"]
    assert "plain PyTorch" in rows["backend reference"]
    info = _ops.extension.info()
    assert info["isa"] in rows["extension"]
    assert rows["backend cpu"] == f"{info['isa']} kernels, convolutions by them or by oneDNN"
    for name, reason in backends.available().items():
        assert (reason is None) != (rows[f"backend {name}"] == f"not available: {reason}")
    assert rows["chosen on cpu"].startswith("cpu, ")
    with backends.use("reference"):
        assert cli.main(["info"]) == 0
    assert "chosen on cpu      reference: asked for by backends.use" in capsys.readouterr().out


def test_no_command_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "measure", interrupted)
    assert cli.main(["demo", "--quick", "--output", str(tmp_path)]) == 1
    assert "report.md" in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    assert "Incomplete" in text
    assert len(table(text, "setting")) == 2 * len(loop.NETWORKS)
