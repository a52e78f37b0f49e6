"""``python -m deepcontrol_cuda evidence``: what was measured is kept, and the report says what the data say."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import resource
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepcontrol_cuda import cli

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

from deepcontrol_cuda.training.errors import TrainingError
from deepcontrol_cuda.training.evidence import (
    analysis,
    claims,
    intervals,
    plan,
    records,
    report,
    runs,
    shapes,
    tasks,
    workers,
)
from deepcontrol_cuda.training.evidence.plan import Setting

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SETTING = Setting("digits", "mean_shift_rejection", 32, 0.05, 96, 0)
QUICK = ["--quick", "--tasks", "digits", "--seeds", "1", "--jobs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence") / "made"
    assert cli.main(["evidence", "--output", str(folder), *QUICK]) == 0
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A folder with the results of the quick runs, and the path of the results."""
    path = tmp_path / "evidence" / "results.jsonl"
    path.parent.mkdir()
    path.write_bytes((folder / "evidence" / "results.jsonl").read_bytes())
    return tmp_path, path


@pytest.fixture
def trained(monkeypatch):
    """The settings that are trained, without training: what the runs give is made up."""
    seen = []

    def train(setting):
        seen.append(setting)
        return run_of(setting)

    monkeypatch.setattr(workers, "train", train)
    return seen


def run_of(setting: Setting, accuracy: float | None = 0.9) -> runs.Run:
    return runs.Run(setting, 1 if accuracy is None else None, None if accuracy is None else 0.5, accuracy, [])


def again(folder: Path) -> int:
    return cli.main(["evidence", "--output", str(folder), *QUICK])


def test_everything_is_written(folder):
    text = (folder / "evidence.md").read_text()
    assert "Incomplete" not in text
    names = {"learning_rates.png", "mean_shift_digits.png", "results.jsonl", "summary.json"}
    assert {path.name for path in (folder / "evidence").iterdir()} == names
    for name in (n for n in names if n.endswith("png")):
        assert f"](evidence/{name})" in text
        assert (folder / "evidence" / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "evidence" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["complete"]
    assert {cell["method"] for cell in summary["cells"]} == set(plan.MEAN_SHIFT_METHODS)
    assert all(claim["verdict"] in text and claim["numbers"] in text for claim in summary["claims"])


def test_what_is_there_is_not_done_again(copy, trained, capsys):
    folder, path = copy
    before = path.read_bytes()
    assert again(folder) == 0
    assert not trained
    assert path.read_bytes() == before


def test_only_what_is_missing_is_done(copy, trained):
    folder, path = copy
    lines = path.read_bytes().splitlines(keepends=True)
    lost = next(line for line in lines if line.startswith(b'{"run"'))
    path.write_bytes(b"".join(line for line in lines if line != lost))
    assert again(folder) == 0
    values = json.loads(lost)["run"]
    assert trained == [Setting(**{name: values[name] for name in Setting.__dataclass_fields__})]
    assert not records.read(path).missing


@pytest.mark.parametrize("damage", ["cut off", "garbage", "binary", "unknown method"])
def test_lines_that_cannot_be_read_are_noted_and_their_runs_done_again(damage, copy, trained, capsys):
    folder, path = copy
    lines = path.read_bytes().splitlines(keepends=True)
    index = max(i for i, line in enumerate(lines) if line.startswith(b'{"run"'))
    if damage == "cut off":
        lines = lines[: index + 1]
        lines[index] = lines[index][:40]
    else:
        lines[index] = {
            "garbage": b"{}\n", "binary": b"\xff\x00\n", "unknown method": b'{"run": {"method": "magic"}}\n'
        }[damage]  # fmt: skip
    path.write_bytes(b"".join(lines))
    assert again(folder) == 0
    assert f"line {index + 1} of {path} cannot be read" in capsys.readouterr().err
    assert len(trained) == 1
    assert records.read(path).complete


def test_files_of_others_are_refused_and_left_alone(copy, trained, capsys):
    folder, path = copy
    for content, message in ((b'{"version":0}\n', "version 0"), (b"hello\n", "was not written by this command")):
        path.write_bytes(content)
        assert again(folder) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "--output" in error
        assert path.read_bytes() == content
    assert not trained


def test_an_interruption_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    done = []

    def train(setting):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(setting)
        return run_of(setting)

    monkeypatch.setattr(workers, "train", train)
    assert again(tmp_path) == 1
    assert "the same command goes on" in capsys.readouterr().err
    kept = records.read(tmp_path / "evidence" / "results.jsonl")
    assert list(kept.runs) == done
    assert "**Incomplete: 9 of 12 runs are missing" in (tmp_path / "evidence.md").read_text()
    assert kept.missing == plan.settings(["digits"], 1, True)[3:]


def test_a_full_disk_is_explained(tmp_path):
    with pytest.raises(TrainingError, match="No space left"):
        records.File(Path("/dev/full"))
    file = records.File(tmp_path / "results.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(TrainingError, match="File too large; all runs that ended before are in it"):
            file.add("conditions", {"text": "x" * 200})
        file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_wrong_options_are_explained(tmp_path, capsys):
    for options, message in (
        (["--tasks", "cats"], "got cats, wanted some of digits, shapes"),
        (["--seeds", "0"], "--seeds: got 0"),
        (["--jobs", "-1"], "--jobs: got -1"),
    ):
        assert cli.main(["evidence", "--output", str(tmp_path), *options]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["evidence", "--output", str(tmp_path / "file")]) == 1
    assert "--output: cannot write into" in capsys.readouterr().err


def test_a_setting_gives_the_same_run_again_also_in_other_processes_which_end_when_told():
    state = torch.get_rng_state()
    first = runs.train(SETTING)
    assert torch.equal(torch.get_rng_state(), state)
    other = replace(SETTING, seed=1)
    torch.manual_seed(5)
    endless = replace(SETTING, images=10**7)
    done = workers.run([SETTING, other, endless], jobs=2)
    assert {run.setting: run for run in (next(done), next(done))} == {SETTING: first, other: runs.train(other)}
    # What an interruption does; the endless run would take hours.
    done.close()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()
    assert first.final_loss != runs.train(other).final_loss


def test_divergence_is_recorded():
    run = runs.train(replace(SETTING, method="none", learning_rate=1e8))
    assert run.diverged_at in (1, 2)
    assert run.accuracy is run.final_loss is None


@pytest.mark.parametrize("method", plan.MEAN_SHIFT_METHODS)
def test_mean_shift_of_every_layer_is_measured(method):
    run = runs.train(replace(SETTING, method=method))
    assert [shift.step for shift in run.mean_shifts] == [0, 1, 2]
    # The input, two of each of four blocks, and one shortcut.
    assert all(len(shift.layers) == 10 for shift in run.mean_shifts)
    assert all(0 <= ratio <= 1 for shift in run.mean_shifts for ratio in shift.layers)
    if method == "deep_control":
        assert max(run.mean_shifts[0].layers) < 1e-3
    assert not runs.train(replace(SETTING, method=method, learning_rate=0.1)).mean_shifts


def test_mean_shift_is_one_for_constants_and_leaves_dead_maps_out():
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 0] = -2
    assert runs._shift(maps) == 1
    maps[:, 1] = torch.tensor([1.0, -1.0]).repeat(8).view(4, 4)
    assert runs._shift(maps) == 0.5
    assert runs._shift(torch.zeros(2, 3, 4, 4)) == 0


def test_shapes_have_the_same_bits_everywhere():
    images, labels = shapes.make(50, seed=3)
    assert images.shape == (50, 3, shapes.SIZE, shapes.SIZE)
    assert labels.tolist() == [i % 10 for i in range(50)]
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    assert digest == "4b90129ea774ee5dbb40224b35bdd7ea949892b8c50cee3aeffcadf7f51be8b5"
    assert (shapes.make(50, seed=4)[0] != images).mean() > 0.9


def test_intervals_are_those_of_student_and_welch():
    from scipy import stats

    first, second = [0.9, 0.95, 0.97, 0.91, 0.93], [0.85, 0.95, 0.80, 0.88, 0.70]
    low, high = stats.t.interval(0.95, 4, statistics.fmean(first), stats.sem(first))
    got = intervals.estimate(first)
    assert (got.mean - got.half, got.mean + got.half) == pytest.approx((low, high))
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    got = intervals.difference(first, second)
    assert (got.mean - got.half, got.mean + got.half) == pytest.approx((expected.low, expected.high))
    assert intervals.estimate([0.5]).half is intervals.difference([0.5], [0.4]).half is None
    assert intervals.difference([0.5, 0.5], [0.4, 0.4]).half == 0


def made_up(accuracies: dict[str, dict[float, list[float | None]]], batch_size: int = 32) -> list[runs.Run]:
    return [
        run_of(Setting("digits", method, batch_size, rate, 96, seed), accuracy)
        for method, rates in accuracies.items()
        for rate, values in rates.items()
        for seed, accuracy in enumerate(values)
    ]


NONE = {0.1: [0.8, 0.82, 0.81], 0.2: [0.8, None, 0.82], 0.4: [None] * 3, 0.8: [None] * 3}
NORM = {rate: [0.90, 0.91, 0.92] for rate in NONE}


def test_the_largest_stable_learning_rate_ends_at_the_first_failure_above_success():
    rates = {0.1: [0.9, 0.2], 0.2: [0.9, 0.6], 0.4: [0.8, 0.5], 0.8: [0.9, 0.4], 1.6: [0.9, 0.9]}
    of = analysis.Analysis(made_up({"none": rates, "batch_norm": {0.1: [0.9, None]}}))
    (sweep,) = of.rate_sweeps()
    assert of.stable_rate(sweep, "none") == 0.4
    assert of.unstable_rates(sweep, "none") == [0.8, 1.6]
    assert of.stable_rate(sweep, "batch_norm") is None


def verdicts(accuracies, batch_size: int = 32) -> dict[str, str]:
    found = claims.check(analysis.Analysis(made_up(accuracies, batch_size)))
    return {claim.text.partition(":")[0] + claim.text.partition(":")[2][:20]: claim.verdict for claim in found}


@pytest.mark.parametrize(("stable", "verdict"), [(0.4, "holds"), (0.2, "does not hold"), (0.0, "undecided")])
def test_claim_of_the_learning_rate(stable, verdict):
    ours = {rate: [0.9, 0.9, 0.9 if rate <= stable else 0.3] for rate in NONE}
    got = verdicts({"none": NONE, "batch_norm": NORM, "mean_shift_rejection": ours})
    assert got["Mean Shift Rejection trains at 4 times t"] == verdict


@pytest.mark.parametrize(
    ("shift", "where", "best"),
    [(0.05, "holds", "holds"), (0.0, "holds", "undecided"), (-0.3, "does not hold", "does not hold")],
)
def test_claims_against_batch_norm(shift, where, best):
    ours = {rate: [value + shift for value in values] for rate, values in NORM.items()}
    got = verdicts({"none": NONE, "batch_norm": NORM, "deep_control": ours})
    assert got["Deep Control at the learning rat"] == where
    assert got["Deep Control higher accuracy tha"] == best


def test_claim_where_none_fails_wants_both_to_train():
    key = "Deep Control at the learning rat"
    ours = NORM | {0.8: [None] * 3}
    assert verdicts({"none": NONE, "batch_norm": NORM, "deep_control": ours})[key] == "holds in part"
    wide = NORM | {0.8: [0.5, 0.5, 0.99]}
    assert verdicts({"none": NONE, "batch_norm": wide, "deep_control": ours})[key] == "holds in part"
    failing = NORM | {0.8: [0.1, 0.5, 0.99]}
    assert verdicts({"none": NONE, "batch_norm": failing, "deep_control": ours})[key] == "holds"


def test_runs_of_some_methods_are_enough_for_a_report(folder):
    """Wherever the command is stopped: every part of a file, from the beginning, has a report."""
    found = list(records.read(folder / "evidence" / "results.jsonl").runs.values())
    more = made_up({"none": NONE, "batch_norm": NORM, "deep_control": NORM, "mean_shift_rejection": NORM})
    for made in (found, more):
        for count in range(len(made) + 1):
            assert "## Claims" in report.markdown(records_of(made[:count]))


def test_claims_of_small_batches_take_the_best_learning_rates():
    accuracies = {"batch_norm": {0.01: [0.5, 0.51, 0.5], 0.02: [0.7, 0.71, 0.7]}}
    for ours, verdict in (
        ([0.8, 0.81, 0.8], "holds"),
        ([0.6, 0.61, 0.6], "does not hold"),
        ([0.6, 0.8, 0.71], "undecided"),
    ):
        accuracies["deep_control"] = {0.01: ours, 0.02: [0.1, 0.1, None]}
        made = made_up(accuracies, 1) + made_up(accuracies, 8)
        found = claims.check(analysis.Analysis(made))
        assert [(c.verdict, "batch size 1," in c.text) for c in found] == [(verdict, True)]


def records_of(made: list[runs.Run]) -> records.Records:
    found = records.Records(plan=[run.setting for run in made])
    for run in made:
        found.add(run)
    return found


def test_ingredients_are_compared_at_the_learning_rates_they_share():
    full = {0.1: [0.7, 0.7], 0.2: [0.9, 0.91], 0.4: [0.95, 0.96]}
    without = {0.1: [0.7, 0.71], 0.2: [0.8, 0.81]}
    made = made_up({"mean_shift_rejection": full, "mean_shift_rejection_noise_off": without})
    text = report.markdown(records_of(made)).partition("## Ingredients")[2]
    assert "at which all of them ran: 0.1, 0.2." in text
    row = next(line for line in text.splitlines() if line.startswith("| MSR, no noise"))
    assert [cell.strip()[:6] for cell in row.strip("|").split("|")] == ["MSR, n", "0.2", "0.805 ", "-0.100", "-0.100"]


def test_a_best_learning_rate_at_the_edge_is_marked():
    accuracies = {"batch_norm": {0.01: [0.5, 0.51], 0.02: [0.7, 0.71]}, "deep_control": {0.01: [0.9, 0.91]}}
    accuracies["deep_control"] |= {0.02: [0.95, 0.96], 0.04: [0.9, 0.9]}
    (claim,) = claims.check(analysis.Analysis(made_up(accuracies, 1) + made_up(accuracies, 8)))
    assert "(at 0.02) against" in claim.numbers
    assert "(at 0.02, the edge of the grid); difference" in claim.numbers


def test_runs_are_counted_by_the_conditions_they_were_done_under(copy, trained, monkeypatch):
    folder, path = copy
    lines = path.read_bytes().splitlines(keepends=True)
    lost = [line for line in lines if line.startswith(b'{"run"')][:2]
    path.write_bytes(b"".join(line for line in lines if line not in lost))
    monkeypatch.setattr("deepcontrol_cuda.training.evidence.command.conditions", lambda: {"CPU": "another"})
    assert again(folder) == 0
    assert records.read(path).counts == [10, 2]
    summary = json.loads((folder / "evidence" / "summary.json").read_text())
    assert [c["runs"] for c in summary["conditions"]] == [10, 2]
    assert "| runs      | 2       |\n| CPU       | another |" in (folder / "evidence.md").read_text()


def test_report_tells_failed_runs():
    made = made_up({"none": NONE, "batch_norm": NORM})
    text = report.markdown(records_of(made))
    row = next(line for line in text.splitlines() if line.startswith("| no norm "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("0.810 ± 0.0")
    assert cells[2].endswith("1 of 3 not trained")
    assert cells[3:] == ["diverged", "diverged"]


def test_the_committed_report_is_what_its_data_give():
    results = DOCS / "evidence" / "results.jsonl"
    assert results.stat().st_size < 1 << 20
    kept = records.read(results)
    assert not kept.notes
    assert kept.complete
    assert (DOCS / "evidence.md").read_text() == report.markdown(kept)
    assert json.loads((DOCS / "evidence" / "summary.json").read_text()) == report.summary(kept)
    assert {s.seed for s in kept.plan} >= set(range(5))
    assert {s.batch_size for s in kept.plan} == {1, 2, 8, 32, 128}
    assert {0.01, 1.6} <= {s.learning_rate for s in kept.plan}
    assert {s.task for s in kept.plan} == set(tasks.TASKS)
    for picture in (DOCS / "evidence").glob("*.png"):
        assert f"](evidence/{picture.name})" in (DOCS / "evidence.md").read_text()


def test_numbers_of_the_readme_are_those_of_the_report():
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Which method when")[2].partition("\n## ")[0]
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    numbers = re.findall(r"0\.\d{3}(?: ± 0\.\d{3})?", section)
    assert len(numbers) > 10
    assert [number for number in numbers if number not in evidence] == []
