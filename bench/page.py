"""Makes of runs one page that people read: Markdown with pictures beside it, and HTML that is one file."""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from deepcontrol_cuda import files
from deepcontrol_cuda.training.table import markdown_table

from . import peers, plot
from .pictures import label, pictures
from .reading import heading, read
from .report import by_setting, rows_table, significant, verdicts_table
from .rows import Row, Run

HELP = "make one page of files: Markdown, and HTML that needs no other file"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #8886; padding: .2rem .6rem; text-align: left }
figure { margin: 1rem 0; background: white; overflow-x: auto } svg { max-width: 100%; height: auto }
""".strip()  # fmt: skip # noqa: E501


def markdown(runs: Mapping[str, Run], everything: bool = True) -> str:
    """Of runs by the stem of their files; pictures are ``STEM_NAME.svg`` beside it.

    Without ``everything`` only the peers of the verdicts have a line in each row.
    """
    parts = ["# Measurements of Deep Control", *_legend(runs.values())]
    for stem, run in runs.items():
        parts += _run(stem, run, everything)
    return "\n\n".join(parts) + "\n"


def _legend(runs: Iterable[Run]) -> Iterator[str]:
    labels: dict[str, dict[str, None]] = {}
    for run in runs:
        for peer in (peer for row in run.rows for peer in _peers(row)):
            labels.setdefault(peer, {})[label(peer, run.command)] = None
    if labels:
        lines = [[peer, " or ".join(names), peers.describe(peer)] for peer, names in labels.items()]
        yield markdown_table([["peer", "in pictures", "what it is"], *lines])


def _peers(row: Row) -> dict[str, None]:
    return dict.fromkeys([*row.seconds, *row.kept_bytes, *row.peak_bytes])


def _few(row: Row) -> Collection[str]:
    """The baseline and the peers of the verdicts; all where ours is not raced against others."""
    found = _peers(row)
    return found.keys() & {row.baseline, *peers.MAIN, peers.MEAN_SHIFT_REJECTION} if "ours" in found else found


def _run(stem: str, run: Run, everything: bool) -> Iterator[str]:
    named = _peers if everything else _few
    yield f"## {heading(run)}"
    facts = {**run.machine, **run.content.get("gpu", {}), **run.versions, **run.conditions}
    yield markdown_table([["of the run", ""], *([_cell(name), _cell(value)] for name, value in facts.items())])
    if run.ceilings:
        yield "What this machine reached in the run, without anything of ours"
        lines = [["threads", "copy, GB/s", "float32, GFLOP/s", "bfloat16, GFLOP/s"]]
        for one in run.ceilings:
            found = one.copy_bytes_per_second, one.float32_operations_per_second, one.bfloat16_operations_per_second
            lines.append([str(one.threads), *("-" if value is None else significant(value / 1e9) for value in found)])
        yield markdown_table(lines)
    if run.verdicts:
        yield "### Verdicts"
        yield verdicts_table(run.verdicts)
    for name in pictures(run):
        yield f"![{name}]({stem}_{name}.svg)"
    if any(len(named(row)) < len(_peers(row)) for row in run.rows):
        yield "Rows here are of the baseline and of the verdicts' peers; the HTML has the others, and so has --all."
    timed = [row for row in run.rows if row.seconds]
    if timed:
        yield "### Times"
        yield (
            "Medians over the rounds; ratios are medians of those within each round, with 95 % intervals over the "
            "rounds. Errors are relative to float64, the largest of the results of ours, beside what is let pass."
        )
    for setting, rows in by_setting(timed).items():
        yield f"#### {setting}"
        yield rows_table(rows, named)
    if counted := [row for row in run.rows if row.kept_bytes or row.peak_bytes]:
        yield "### Bytes"
        lines = [["case", "setting", "peer", "kept for backward", "most at a time"]]
        for row in counted:
            for peer in (peer for peer in dict.fromkeys([*row.kept_bytes, *row.peak_bytes]) if peer in named(row)):
                found = [str(count.get(peer, "-")) for count in (row.kept_bytes, row.peak_bytes)]
                lines.append([row.case, str(row.setting), label(peer), *found])
        yield markdown_table(lines)
    if run.skipped:
        yield "### Left out"
        yield markdown_table([["what", "why"], *([_cell(what), _cell(why)] for what, why in run.skipped.items())])


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {of}" for name, of in value.items())
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return str(value).replace("|", "/").replace("\n", " ")


def page(text: str, drawings: Mapping[str, str]) -> str:
    """HTML of what ``markdown`` made, with SVG by file name written into it."""
    body = []
    for number, block in enumerate(text.strip().split("\n\n")):
        if found := re.fullmatch(r"(#+) (.*)", block):
            level = len(found[1])
            body.append(f"<h{level}>{html.escape(found[2])}</h{level}>")
        elif found := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            body.append(f"<figure>{_inline(drawings[found[2]], number)}</figure>")
        elif block.startswith("|"):
            body.append(_table(block))
        else:
            body.append(f"<p>{html.escape(block)}</p>")
    head = f'<meta charset="utf-8"><title>Measurements of Deep Control</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(block: str) -> str:
    first, _, *others = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in first)
    rows = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in others)
    return f"<table><thead><tr>{head}</tr></thead><tbody>" + "\n".join(rows) + "</tbody></table>"


def _inline(svg: str, number: int) -> str:
    """An SVG element whose names are its own among others on the page."""
    element = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{number}-", element)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plot.add_files(parser)
    parser.add_argument("--all", action="store_true", help="in the Markdown too every peer of every row")


def run(options: argparse.Namespace) -> int:
    plot.wanted()
    runs = {path.stem: read(path) for path in options.files}
    text, drawings = markdown(runs, options.all), {}
    for stem, found in runs.items():
        for name, draw in pictures(found).items():
            drawings[f"{stem}_{name}.svg"] = plot.image(draw(), "svg", plot.digest([found]))
    for name, content in drawings.items():
        files.replace(options.output / name, content)
    written = page(markdown(runs), {name: content.decode() for name, content in drawings.items()})
    for name, content in (("report.md", text), ("report.html", written)):
        files.replace(options.output / name, content.encode())
        print(options.output / name)
    return 0
