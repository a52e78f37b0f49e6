"""Which of two runs of one command is faster, row by row, as far as the noise lets one say."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepcontrol_cuda.training.table import markdown_table

from . import bootstrap
from .bootstrap import Interval
from .reading import InputError, heading, is_ours, read
from .rows import Row, Run, Setting, Verdict

LEAST = 0.03
FASTER, SLOWER, SAME = "faster", "slower", "no difference"
_MEAN = "geometric mean"
# Of the conditions these are measured, not chosen.
_NO_CHOICE = ("load_average_before",)
_Key = tuple[str, Setting, str]


@dataclass(frozen=True)
class Change:
    """What became of one peer in one row, or in all rows of a setting.

    Attributes:
        case: "geometric mean" for all rows of the setting.
        normalised: time in B over time in A, each over its baseline's in the same rounds: a slower day cancels. None
            for the baseline itself.
        plain: time in B over time in A.
        least: change that is not called one, as a share; between runs times differ by more than within one.
    """

    setting: Setting
    case: str
    peer: str
    normalised: Interval | None
    plain: Interval
    least: float

    @property
    def verdict(self) -> str | None:
        """ "faster" or "slower" if the whole interval is further than ``least`` from 1; None for the baseline."""
        if self.normalised is None:
            return None
        if self.normalised.high < 1 / (1 + self.least):
            return FASTER
        return SLOWER if self.normalised.low > 1 + self.least else SAME


@dataclass(frozen=True)
class Bytes:
    """Bytes of one peer that differ between the runs; ``what`` is "kept" or "peak"."""

    setting: Setting
    case: str
    peer: str
    what: str
    before: int
    after: int


@dataclass(frozen=True)
class Comparison:
    """Run A, ``before``, and run B, ``after``.

    Attributes:
        only_before, only_after: rows that the other file lacks, in words.
        missing: peers of ours that A has in a row and B lacks there, in words.
        warnings: what else than the code differs, in words.
        contradictions: verdicts on the same target that are not the same, of A and of B.
    """

    changes: tuple[Change, ...]
    means: tuple[Change, ...]
    bytes: tuple[Bytes, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]
    contradictions: tuple[tuple[Verdict, Verdict], ...]

    def slower(self) -> list[Change]:
        """Rows and means of ours that are slower in B."""
        return [c for c in (*self.means, *self.changes) if is_ours(c.peer) and c.verdict == SLOWER]

    def lacks(self) -> list[str]:
        """What A has of ours and B does not, rows and peers in rows."""
        return [*self.only_before, *self.missing]

    def others(self) -> list[Change]:
        """Rows of peers that are not ours, which are the same code in both runs if the versions are."""
        return [c for c in self.changes if c.verdict is not None and not is_ours(c.peer)]


def compare(before: Run, after: Run, least: float = LEAST) -> Comparison:
    """Raises ``InputError`` where nothing can be compared."""
    if before.command != after.command:
        raise InputError(f"got runs of {before.command!r} and {after.command!r}, wanted two of the same command")
    sets = [run.conditions.get("set") for run in (before, after)]
    if None not in sets and sets[0] != sets[1]:
        raise InputError(
            f"got runs of the sets {sets[0]!r} and {sets[1]!r}, wanted two of the same set: their means and worst rows "
            f"are of other layers; make one with python -m bench {before.command} --set {sets[0]}"
        )
    rows, others = _by_key(before), _by_key(after)
    common = [key for key in rows if key in others]
    contradictions = _contradictions(before, after)
    if not common and not _shared_targets(before, after):
        raise InputError(f"no row is in both files: A has {_settings(before)}; B has {_settings(after)}")
    pairs = [(rows[key], others[key]) for key in common]
    return Comparison(
        tuple(change for pair in pairs for change in _changes([pair], pair[0].case, least)),
        tuple(_means(pairs, least)),
        tuple(found for pair in pairs for found in _bytes(*pair)),
        tuple(_words(key) for key in rows if key not in others),
        tuple(_words(key) for key in others if key not in rows),
        tuple(_missing(pairs)),
        tuple(_warnings(before, after)),
        tuple(contradictions),
    )


def _by_key(run: Run) -> dict[_Key, Row]:
    return {(row.case, row.setting, row.baseline): row for row in run.rows}


def _missing(pairs: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    for before, after in pairs:
        for peer in before.seconds:
            if is_ours(peer) and peer not in after.seconds:
                yield f"{peer}: {before.case}, {before.setting}"


def _words(key: _Key) -> str:
    return f"{key[0]}, {key[1]}"


def _settings(run: Run) -> str:
    return "; ".join(dict.fromkeys(str(row.setting) for row in run.rows)) or "no rows"


def _changes(pairs: Sequence[tuple[Row, Row]], case: str, least: float) -> Iterator[Change]:
    """One for each peer that all of ``pairs``, which have one setting and baseline, were timed with in both runs."""
    setting, baseline = pairs[0][0].setting, pairs[0][0].baseline
    for peer in pairs[0][0].seconds:
        if not all(peer in row.seconds for pair in pairs for row in pair):
            continue
        plain = bootstrap.change(*([row.seconds[peer] for row in run] for run in zip(*pairs)))
        normalised = None
        if peer != baseline and all(baseline in row.seconds for pair in pairs for row in pair):
            normalised = bootstrap.change(*([row.ratios(peer) for row in run] for run in zip(*pairs)))
        yield Change(setting, case, peer, normalised, plain, least)


def _means(pairs: Sequence[tuple[Row, Row]], least: float) -> Iterator[Change]:
    groups: dict[tuple[Setting, str], list[tuple[Row, Row]]] = {}
    for pair in pairs:
        groups.setdefault((pair[0].setting, pair[0].baseline), []).append(pair)
    for group in groups.values():
        if len(group) > 1:
            yield from _changes(group, _MEAN, least)


def _bytes(before: Row, after: Row) -> Iterator[Bytes]:
    for what in ("kept", "peak"):
        found, other = (getattr(row, f"{what}_bytes") for row in (before, after))
        for peer in found:
            if other.get(peer, found[peer]) != found[peer]:
                yield Bytes(before.setting, before.case, peer, what, found[peer], other[peer])


def _warnings(before: Run, after: Run) -> Iterator[str]:
    for name, run in (("A", before), ("B", after)):
        if not run.complete:
            yield f"{name} is incomplete: the run was stopped"
        if run.commit and run.commit["dirty"]:
            yield f"{name} was measured with changes that are in no commit"
    for what in ("machine", "versions", "conditions"):
        found, other = getattr(before, what), getattr(after, what)
        for name in dict.fromkeys([*found, *other]):
            if name not in _NO_CHOICE and found.get(name) != other.get(name):
                yield f"{what}, {name}: {_value(found, name)} in A, {_value(other, name)} in B"


def _value(values: Mapping[str, object], name: str) -> str:
    return str(values.get(name, "nothing"))


def _targets(run: Run) -> dict[str, Verdict]:
    """Verdicts by what they are on; which row is the worst is no part of that."""
    return {re.sub(r" \([^()]*\)$", "", v.what): v for v in run.verdicts if v.reached is not None}


def _shared_targets(before: Run, after: Run) -> bool:
    return bool(_targets(before).keys() & _targets(after).keys())


def _contradictions(before: Run, after: Run) -> list[tuple[Verdict, Verdict]]:
    found, other = _targets(before), _targets(after)
    return [
        (found[what], other[what]) for what in found if what in other and found[what].reached != other[what].reached
    ]


def text(comparison: Comparison, everything: bool = False) -> str:
    """Markdown: of rows those of ours and those that changed, or with ``everything`` all."""
    parts = [f"Warning: {warning}." for warning in comparison.warnings]
    shown = [c for c in comparison.changes if everything or is_ours(c.peer) or c.verdict in (FASTER, SLOWER)]
    changes = [*shown, *comparison.means]
    for setting in dict.fromkeys(change.setting for change in changes):
        lines = [["row", "peer", "B / A", "normalised", "95 % interval", "verdict"]]
        lines += [_line(change) for change in changes if change.setting == setting]
        parts.append(f"{setting}\n\n{markdown_table(lines)}")
    if changes:
        least = changes[0].least
        parts.append(
            "Normalised: times over the baseline's of their own run, so that a slower day cancels. Faster or slower: "
            f"the whole interval is further than {least:.0%} from 1."
        )
    if others := comparison.others():
        wrong = sum(change.verdict != SAME for change in others)
        parts.append(
            f"Of {len(others)} rows of other peers {wrong} are called faster or slower. With equal versions they run "
            "the same code, so that is how often a verdict is wrong here."
        )
    if comparison.bytes:
        lines = [["row", "peer", "bytes", "A", "B", "B / A"]]
        for b in comparison.bytes:
            row = f"{b.case}, {b.setting}"
            lines.append([row, b.peer, b.what, str(b.before), str(b.after), f"{b.after / b.before:.3f}"])
        parts.append(markdown_table(lines))
    if comparison.contradictions:
        lines = [["target", "wanted", "A", "B"]]
        lines += [[a.what, a.target or "-", _judged(a), _judged(b)] for a, b in comparison.contradictions]
        parts.append(f"Verdicts that contradict each other\n\n{markdown_table(lines)}")
    else:
        parts.append("No two verdicts on a target contradict each other.")
    for name, words in (("A", comparison.only_before), ("B", comparison.only_after)):
        if words:
            parts.append(f"Only in {name}:\n" + "\n".join(f"- {row}" for row in words))
    return "\n\n".join(parts)


def _line(change: Change) -> list[str]:
    plain, normalised = f"{change.plain.value:.3f}", change.normalised
    if normalised is None:
        return [change.case, change.peer, plain, "-", "-", "baseline"]
    interval = f"{normalised.low:.3f} to {normalised.high:.3f}"
    return [change.case, change.peer, plain, f"{normalised.value:.3f}", interval, change.verdict or "-"]


def _judged(verdict: Verdict) -> str:
    interval = "" if verdict.low is None else f" ({verdict.low:.3f} to {verdict.high:.3f})"
    return f"{verdict.value:.3f}{interval}, {'reached' if verdict.reached else 'missed'}"


HELP = "tell of two files of one command where the second is faster or slower"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A.json", help="the earlier run")
    parser.add_argument("after", type=Path, metavar="B.json", help="the later run, of the same command")
    parser.add_argument("--least", type=_share, default=LEAST, help=f"change not called one (default: {LEAST})")
    parser.add_argument("--all", action="store_true", help="also rows of other peers that did not change")
    # Where memory lies differs between runs, so that among many rows of the same code one may be slower for certain.
    parser.add_argument(
        "--fail-on-slower", nargs="?", choices=("mean", "row"), const="mean",
        help="exit status 1 if ours is slower in a geometric mean (where there is none, in a row), with 'row' in any "
        "row, or if B lacks a row of it",
    )  # fmt: skip


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a share of at least 0 and below 1, as in 0.03")
    return share


def run(options: argparse.Namespace) -> int:
    """Print the comparison; the exit status is 1 where ours is slower and ``--fail-on-slower`` asks for that."""
    before, after = read(options.before), read(options.after)
    comparison = compare(before, after, options.least)
    print(f"A: {heading(before)}\nB: {heading(after)}\n\n{text(comparison, options.all)}")
    slower = comparison.slower()
    if slower:
        print(f"\nOurs is slower in {len(slower)} of the rows and means above.")
    if not options.fail_on_slower:
        return 0
    if lacks := comparison.lacks():
        print("\nB lacks of ours, so that nothing is known of it:\n" + "\n".join(f"- {row}" for row in lacks))
    alone = not any(is_ours(mean.peer) for mean in comparison.means)
    failed = [change for change in slower if alone or change.case == _MEAN or options.fail_on_slower == "row"]
    return 1 if failed or lacks else 0
