"""What reads the results of ``python -m bench``: comparison, pictures, report and README say what the files hold."""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("matplotlib")

import bench_runs

from bench import compare, page, peers, pictures, plot, readme, report, rows
from bench.__main__ import main
from bench.rows import Verdict

ROOT = Path(__file__).resolve().parents[1]
FEW = {"conv_relu": 1.0, "conv_bn_relu": 1.2, "ours": 0.9}


@pytest.fixture(autouse=True, scope="module")
def threads():
    """One, since the tensors here are small and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def few(factors=FEW, seed=0, day=1.0, count=3, **values):
    """The first layers of one dtype and layout, for speed."""
    run = bench_runs.layers(factors, seed, day, **values)
    chosen = [row for row in run.rows if (row.setting.dtype, row.setting.layout) == ("float32", "channels_last")]
    cases = list(dict.fromkeys(row.case for row in chosen))[:count]
    return replace(run, rows=tuple(row for row in chosen if row.case in cases), verdicts=())


def write(folder: Path, name: str, run) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(run.to_json()))
    return str(path)


@pytest.mark.parametrize("day", [1.0, 1.4], ids=["as fast a day", "a slower day"])
def test_the_same_code_on_another_day_is_no_difference(day):
    found = compare.compare(few(), few(seed=1, day=day))
    assert {change.verdict for change in (*found.changes, *found.means)} == {"no difference", None}
    (bn, ours) = [c for c in found.means if c.peer != "conv_relu" and c.setting.mode == "training"]
    assert bn.normalised.value == pytest.approx(1, abs=0.02)
    assert ours.plain.value == pytest.approx(day, rel=0.05)
    assert not found.slower()


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "slower"), (1.0, "no difference"), (1.1, "faster")])
def test_a_change_of_ours_is_seen_in_ours_alone(factor, verdict):
    found = compare.compare(few({**FEW, "ours": 0.9 * factor}), few(seed=1))
    by_peer = {peer: {c.verdict for c in (*found.changes, *found.means) if c.peer == peer} for peer in FEW}
    assert by_peer == {"conv_relu": {None}, "conv_bn_relu": {"no difference"}, "ours": {verdict}}


def test_noise_as_large_as_the_change_hides_it():
    before, after = few(), few({**FEW, "ours": 0.99}, seed=1)
    assert {c.verdict for c in compare.compare(before, after).changes if c.peer == "ours"} == {"slower"}
    wild = [replace(row, seconds=bench_runs.seconds({**FEW, "ours": 0.99}, 1.0, row.case, 0.5)) for row in after.rows]
    found = compare.compare(before, replace(after, rows=tuple(wild)))
    assert {c.verdict for c in found.changes if c.peer == "ours"} == {"no difference"}


def test_a_change_below_the_least_is_none():
    before, after = few(), few({**FEW, "ours": 0.99}, seed=1)
    assert compare.compare(before, after, least=0.05).slower()
    assert not compare.compare(before, after, least=0.15).slower()


def test_compare_tells_of_everything_that_differs(tmp_path, capsys):
    before = few()
    before = replace(before, verdicts=(Verdict("ours, worst", 0.99, 0.98, 1.01, "<= 1.00", True),))
    row = before.rows[0]
    others = [replace(row, case="another layer"), *before.rows[1:]]
    after = replace(
        before, rows=tuple(others), complete=False, versions={**before.versions, "torch": "2.14.0"},
        commit={"hash": "f" * 12, "dirty": True}, machine={**before.machine, "cores": 4},
        conditions={**before.conditions, "quick": True, "load_average_before": [9.0, 9.0, 9.0]},
        verdicts=(Verdict("ours, worst", 1.02, 1.0, 1.04, "<= 1.00", False),),
    )  # fmt: skip
    assert main(["compare", write(tmp_path, "a", before), write(tmp_path, "b", after)]) == 0
    out = capsys.readouterr().out
    for words in (
        "B is incomplete", "B was measured with changes", "versions, torch: 2.13.0+cpu in A, 2.14.0 in B",
        "machine, cores: 2 in A, 4 in B", "conditions, quick: False in A, True in B", "| ours, worst | <= 1.00 |",
        "0.990 (0.980 to 1.010), reached", "1.020 (1.000 to 1.040), missed",
        f"Only in A:\n- {row.case}, {row.setting}", f"Only in B:\n- another layer, {row.setting}",
    ):  # fmt: skip
        assert words in out
    assert "load_average" not in out


def test_runs_of_different_layers_are_not_compared(tmp_path, capsys):
    """Even where they have rows in common: their means and worst rows are of other layers."""
    conditions = few().conditions
    before, after = (few(conditions={**conditions, "set": name}) for name in ("resnet50", "mobilenet_v2"))
    assert main(["compare", write(tmp_path, "a", before), write(tmp_path, "b", after)]) == 2
    error = capsys.readouterr().err
    assert "the sets 'resnet50' and 'mobilenet_v2', wanted two of the same set" in error


def test_kept_bytes_that_differ_are_listed():
    before = bench_runs.memory()
    more = [replace(row, kept_bytes={**row.kept_bytes, "ours": 5_000_000}) for row in before.rows[:1]]
    (found,) = compare.compare(before, replace(before, rows=(*more, *before.rows[1:]))).bytes
    assert (found.peer, found.what, found.before, found.after) == ("ours", "kept", 4_973_568, 5_000_000)


def test_fail_on_slower_is_an_exit_status(tmp_path):
    fast, slow = write(tmp_path, "a", few()), write(tmp_path, "b", few({**FEW, "ours": 1.0}, seed=1))
    assert main(["compare", fast, slow]) == 0
    assert main(["compare", fast, slow, "--fail-on-slower"]) == 1
    assert main(["compare", slow, fast, "--fail-on-slower"]) == 0
    one = few()
    row = replace(one.rows[0], seconds=bench_runs.seconds({**FEW, "ours": 0.99}, 1.0, "one"))
    many = [replace(row, case=f"{row.case}, {i}") for i in range(8)]
    fast = write(tmp_path, "many", replace(one, rows=tuple(many)))
    slower = replace(many[0], seconds=bench_runs.seconds({**FEW, "ours": 1.09}, 1.0, "other"))
    slow = write(tmp_path, "one of many", replace(one, rows=(slower, *many[1:])))
    assert main(["compare", fast, slow, "--fail-on-slower"]) == 0
    assert main(["compare", fast, slow, "--fail-on-slower", "row"]) == 1


@pytest.mark.parametrize("lacks", ["peer", "row"])
def test_what_b_lacks_of_ours_fails_too(lacks, tmp_path, capsys):
    run = few()
    first, *rest = run.rows
    seconds = {peer: values for peer, values in first.seconds.items() if peer != "ours"}
    rows = rest if lacks == "row" else [replace(first, seconds=seconds), *rest]
    files = [write(tmp_path, "a.json", run), write(tmp_path, "b.json", replace(run, rows=tuple(rows)))]
    assert main(["compare", *files]) == 0
    assert main(["compare", *files, "--fail-on-slower"]) == 1
    assert "B lacks of ours" in capsys.readouterr().out


def test_what_cannot_be_compared_or_read_is_refused(tmp_path, capsys):
    layers, models = write(tmp_path, "layers", few()), write(tmp_path, "models", bench_runs.models())
    elsewhere = write(tmp_path, "elsewhere", replace(few(), rows=tuple(replace(r, case="x") for r in few().rows)))
    text, old, array = (tmp_path / name for name in ("text.json", "old.json", "array.json"))
    text.write_text("no JSON")
    old.write_text('{"command": "layers", "rows": []}')
    array.write_text("[]")
    for arguments, words in (
        (["compare", layers, models], "runs of 'layers' and 'models', wanted two of the same command"),
        (["compare", layers, elsewhere], "no row is in both files"),
        (["compare", layers, str(tmp_path / "none.json")], "none.json: cannot be read: No such file"),
        (["compare", layers, str(text)], "text.json: is no JSON"),
        (["plot", str(old)], "old.json: is of format 1"),
        (["report", str(array)], "array.json: is no run"),
        (["plot", write(tmp_path, "what", bench_runs.run("what"))], "a run of 'what' with nothing to draw"),
        (["readme", "--results", str(tmp_path / "empty"), "--root", str(ROOT)], "no whole run of 'layers'"),
        (["readme", "--root", str(tmp_path)], "README.md cannot be read"),
    ):
        output = ["--output", str(tmp_path / "out")] if arguments[0] in ("plot", "report") else []
        assert main([*arguments, *output]) == 2, arguments
        assert words in capsys.readouterr().err


def test_without_matplotlib_pictures_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert main(["plot", write(tmp_path, "a", few()), "--output", str(tmp_path)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "names"), [
    ("layers", {"means", "ratios_float32", "ratios_bfloat16", "roofline"}), ("bandwidth", {"bandwidth"}),
    ("models", {"ratios_float32", "ratios_bfloat16", "memory"}), ("memory", {"memory"}), ("scaling", {"scaling"}),
    ("overhead", {"overhead"}),
])  # fmt: skip
def test_each_command_has_its_pictures(command, names):
    assert set(pictures.pictures(bench_runs.ALL[command]())) == names


def test_pictures_are_the_same_bytes_and_know_their_numbers(tmp_path):
    run = replace(few(count=2), complete=False)
    path = write(tmp_path, "a", run)
    made = []
    for folder in ("first", "second"):
        assert main(["plot", path, "--output", str(tmp_path / folder)]) == 0
        made.append({file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == {f"a_{n}.{s}" for n in ("means", "ratios_float32", "roofline") for s in ("png", "svg")}
    for name, content in made[0].items():
        assert plot.digest([run]).encode() in content
        if name.endswith("svg"):
            ElementTree.fromstring(content)
        else:
            assert content.startswith(b"\x89PNG")
    other = [replace(row, seconds={**row.seconds, "ours": (1.0,) * bench_runs.ROUNDS}) for row in run.rows]
    assert plot.digest([replace(run, rows=tuple(other))]) != plot.digest([run])


def test_bars_are_the_ratios_of_the_file():
    run = few()
    figure = pictures.ratios(run.rows, "float32")
    panel = next(axes for axes in figure.axes if axes.get_title() == "channels_last, training")
    drawn = {bars.get_label(): [bar.get_width() for bar in bars] for bars in panel.containers}
    own = [row for row in run.rows if row.setting.mode == "training"]
    for peer, name in (("ours", "Deep Control"), ("conv_bn_relu", "conv + BN + ReLU")):
        assert drawn[name] == pytest.approx([*(row.ratio(peer).value for row in own), pictures.typical(own, peer)])


def test_bars_of_overhead_are_microseconds():
    run = bench_runs.overhead()
    (panel,) = pictures.overhead(run).axes
    drawn = {bars.get_label(): [bar.get_width() for bar in bars] for bars in panel.containers}
    assert panel.get_xlabel() == "microseconds"
    assert len(panel.get_yticks()) == len(run.rows)
    for peer, name in (("ours", "Deep Control"), ("conv_bn_relu", "conv + BN + ReLU"), ("conv_relu", "conv + ReLU")):
        assert drawn[name] == pytest.approx(
            [1e6 * sorted(row.seconds[peer])[bench_runs.ROUNDS // 2] for row in run.rows]
        )


def test_points_lie_below_the_roof():
    run = few()
    panel = pictures.roofline(run).axes[0]
    left, ridge, right = zip(*panel.lines[0].get_data())
    assert left[1] / left[0] == pytest.approx(50)
    assert ridge[1] == right[1] == pytest.approx(220)
    (points,) = (c.get_offsets() for c in panel.collections if c.get_label() == "Deep Control")
    row = run.rows[0]
    median = sorted(row.seconds["ours"])[bench_runs.ROUNDS // 2]
    assert list(points[0]) == pytest.approx([row.operations / row.bytes, row.operations / median / 1e9])


def test_scaling_has_a_curve_for_each_axis():
    figure = pictures.scaling(bench_runs.scaling())
    panels = {axes.get_xlabel().splitlines()[0]: axes for axes in figure.axes if "training" in axes.get_title()}
    assert set(panels) == {"batch", "channels", "size", "threads"}
    line = next(line for line in panels["channels"].lines if line.get_label() == "Deep Control")
    assert list(line.get_xdata()) == [16, 32, 64, 128, 256]
    assert "batch 8" in panels["channels"].get_xlabel()


def test_the_report_is_one_file_without_network(tmp_path):
    run = replace(few(), skipped={"inplace_abn": "cannot <be> imported"}, complete=False)
    paths = [write(tmp_path, "a", run), write(tmp_path, "b", bench_runs.memory())]
    out = tmp_path / "report"
    assert main(["report", *paths, "--output", str(out)]) == 0
    text, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    for words in ("INCOMPLETE", "Made-up CPU", "2.13.0+cpu", "220", "50.0", "1.0e-07", "inplace_abn", "4973568"):
        assert words in text
        assert words in html
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (out / name).is_file()
    assert "cannot &lt;be&gt; imported" in html
    # But for the names of XML's own vocabularies nothing points elsewhere.
    assert not re.search(r"""(src|href)="(?!#)|@import|<script|<link""", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(names)


def test_the_report_has_a_legend_of_the_peers_that_occur(tmp_path):
    paths = [write(tmp_path, "a", few()), write(tmp_path, "b", bench_runs.bandwidth())]
    assert main(["report", *paths, "--output", str(tmp_path)]) == 0
    for name in ("report.md", "report.html"):
        text = html.unescape((tmp_path / name).read_text())
        for peer in ("conv_relu", "conv_bn_relu", "ours", "copy"):
            assert text.count(peers.describe(peer)) == 1
        assert peers.describe("conv_group_norm_relu") not in text


def test_every_peer_is_described():
    found = {*peers.PEERS, *peers.NETWORK_PEERS, *peers.ways("cpu"), "ours, cuda, held sm90", "ours, triton"}
    for path in (ROOT / "bench/results").glob("*.json"):
        found |= {peer for row in json.loads(path.read_text()).get("rows", ()) for peer in row["seconds"]}
    assert [peer for peer in found if peers.describe(peer) == peers.describe("unknown")] == []


def test_rows_of_other_peers_are_in_the_markdown_only_if_asked_for(tmp_path):
    run = few(bench_runs.LAYERS, count=2)
    path, found = write(tmp_path, "a", run), {}
    for asked in ((), ("--all",)):
        assert main(["report", path, *asked, "--output", str(tmp_path)]) == 0
        for name in ("report.md", "report.html"):
            text = re.sub(r"<td>|</td>| *\| *", "|", (tmp_path / name).read_text()).replace("||", "|")
            found[(name, *asked)] = {peer: text.count(f"|{run.rows[0].case}|{peer}|") for peer in bench_runs.LAYERS}
            assert "geometric mean|conv_group_norm_relu|" in text
    modes = len(bench_runs.MODES)
    few_peers = {peer: modes * (peer in ("conv_relu", "conv_bn_relu", "ours")) for peer in bench_runs.LAYERS}
    every = dict.fromkeys(bench_runs.LAYERS, modes)
    assert found.pop(("report.md",)) == few_peers
    assert list(found.values()) == [every] * 3


def test_numbers_have_three_significant_digits():
    numbers = {0.0123456: "0.0123", 0.9: "0.900", 4.0: "4.00", 31.96: "32.0", 3012.3: "3012"}
    assert {value: report.significant(value) for value in numbers} == numbers


def test_tables_of_the_report_are_whole():
    html = page.page("| a | b |\n|---|---|\n| 1 | x < y |\n|   | 2 |", {})
    assert "<th>a</th><th>b</th>" in html
    assert "<td>1</td><td>x &lt; y</td>" in html
    assert "<td></td><td>2</td>" in html


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A README and its pictures, made from a file of each command."""
    root = tmp_path_factory.mktemp("checkout")
    results = root / "results"
    for command, make in bench_runs.ALL.items():
        write(results, f"2026-01-31_cpu_x_{command}", few(bench_runs.LAYERS) if command == "layers" else make())
    write(results, "2026-01-30_cpu_x_models", bench_runs.run("models"))
    write(results, "2026-02-01_cpu_x_layers", replace(few(), complete=False))
    write(results, "2026-02-02_cpu_x_layers", few(conditions={"quick": True}))
    (results / "2026-02-03_cpu_x_layers.json").write_text('{"command": "layers", "rows": []}')
    (root / "README.md").write_text(f"# Above\n\n{readme.BEGIN}\n\nfrom before\n\n{readme.END}\n\nBelow\n")
    assert main(["readme", "--results", str(results), "--root", str(root)]) == 0
    return root


def test_readme_is_made_of_the_newest_whole_runs(made):
    text = (made / "README.md").read_text()
    before, written, after = readme.parts(text)
    assert (before, after) == ("# Above\n\n", "\n\nBelow\n")
    assert "from before" not in written
    for command in bench_runs.ALL:
        assert f"(bench/results/2026-01-31_cpu_x_{command}.json)" in written
    assert "2026-02" not in written
    for row in few(bench_runs.LAYERS).rows:
        assert row.case in written
    ours = [r for r in few(bench_runs.LAYERS).rows if r.setting.mode == "training"]
    assert f"**{pictures.typical(ours, 'ours'):.2f}**" in written
    for name in re.findall(r"!\[.*\]\((.*)\)", written):
        assert (made / name).is_file()
    # Written again it is the same.
    assert readme.section(readme.newest(made / "results")) == written


def test_a_changed_file_changes_the_readme(made, tmp_path):
    for file in (made / "results").iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    write(tmp_path, "2026-01-31_cpu_x_layers_2", few(bench_runs.LAYERS, seed=1))
    found = readme.newest(tmp_path)
    assert "_layers_2.json" in readme.section(found)
    assert set(readme.stale(found, made)) == {"README.md", "docs/pictures/layers.svg", "docs/pictures/roofline.svg"}
    assert readme.stale(readme.newest(made / "results"), made) == []


def test_other_shapes_and_batches_do_not_take_the_place_of_the_targets(made, tmp_path):
    for file in (made / "results").iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    for number, conditions in enumerate(({"set": "vgg16", "batch": 8}, {"set": "resnet50", "batch": 1}), start=2):
        write(tmp_path, f"2026-01-31_cpu_x_layers_{number}", few(conditions=conditions))
    written = readme.section(readme.newest(tmp_path))
    assert "[`2026-01-31_cpu_x_layers.json`]" in written.partition("\n| ")[0]
    assert "| vgg16 ([`2026-01-31_cpu_x_layers_2.json`]" in written
    assert "| resnet50, batch 1 ([`2026-01-31_cpu_x_layers_3.json`]" in written


def test_readme_agrees_with_the_committed_results():
    found = readme.newest(ROOT / "bench/results")
    if not found:
        pytest.skip("no results of this format are committed yet")
    assert readme.stale(found, ROOT) == [], "run python -m bench readme"


def test_committed_results_can_be_read():
    versions = {json.loads(path.read_text()).get("format", 1) for path in (ROOT / "bench/results").glob("*.json")}
    assert versions <= {1, rows.FORMAT}
