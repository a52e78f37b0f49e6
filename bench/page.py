"""Makes of runs one page that people read: Markdown with pictures beside it, and HTML that is one file."""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Iterator, Mapping

from deepcontrol_cuda import files
from deepcontrol_cuda.training.table import markdown_table

from . import plot
from .pictures import label, pictures
from .reading import heading, read
from .report import by_setting, rows_table, verdicts_table
from .rows import Run

HELP = "make one page of files: Markdown, and HTML that needs no other file"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #8886; padding: .2rem .6rem; text-align: left }
figure { margin: 1rem 0; background: white; overflow-x: auto } svg { max-width: 100%; height: auto }
""".strip()  # fmt: skip # noqa: E501


def markdown(runs: Mapping[str, Run]) -> str:
    """Of runs by the stem of their files; pictures are ``STEM_NAME.svg`` beside it."""
    parts = ["# Measurements of Deep Control"]
    for stem, run in runs.items():
        parts += _run(stem, run)
    return "\n\n".join(parts) + "\n"


def _run(stem: str, run: Run) -> Iterator[str]:
    yield f"## {heading(run)}"
    facts = {**run.machine, **run.content.get("gpu", {}), **run.versions, **run.conditions}
    yield markdown_table([["of the run", ""], *([_cell(name), _cell(value)] for name, value in facts.items())])
    if run.ceilings:
        yield "What this machine reached in the run, without anything of ours"
        lines = [["threads", "copy, GB/s", "float32, GFLOP/s", "bfloat16, GFLOP/s"]]
        for one in run.ceilings:
            found = one.copy_bytes_per_second, one.float32_operations_per_second, one.bfloat16_operations_per_second
            lines.append([str(one.threads), *("-" if value is None else f"{value / 1e9:.0f}" for value in found)])
        yield markdown_table(lines)
    if run.verdicts:
        yield "### Verdicts"
        yield verdicts_table(run.verdicts)
    for name in pictures(run):
        yield f"![{name}]({stem}_{name}.svg)"
    timed = [row for row in run.rows if row.seconds]
    if timed:
        yield "### Times"
        yield (
            "Medians over the rounds; ratios are medians of those within each round, with 95 % intervals over the "
            "rounds. Errors are relative to float64, the largest of the results of ours, beside what is let pass."
        )
    for setting, rows in by_setting(timed).items():
        yield f"#### {setting}"
        yield rows_table(rows)
    if counted := [row for row in run.rows if row.kept_bytes or row.peak_bytes]:
        yield "### Bytes"
        lines = [["case", "setting", "peer", "kept for backward", "most at a time"]]
        for row in counted:
            for peer in dict.fromkeys([*row.kept_bytes, *row.peak_bytes]):
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


def run(options: argparse.Namespace) -> int:
    plot.wanted()
    runs = {path.stem: read(path) for path in options.files}
    text, drawings = markdown(runs), {}
    for stem, found in runs.items():
        for name, draw in pictures(found).items():
            drawings[f"{stem}_{name}.svg"] = plot.image(draw(), "svg", plot.digest([found]))
    for name, content in drawings.items():
        files.replace(options.output / name, content)
    written = page(text, {name: content.decode() for name, content in drawings.items()})
    for name, content in (("report.md", text), ("report.html", written)):
        files.replace(options.output / name, content.encode())
        print(options.output / name)
    return 0
