"""``python -m deepcontrol_cuda evidence``: does what is missing of the runs, and reports."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from ... import files
from ..conditions import conditions
from ..errors import TrainingError
from ..threads import one_thread
from . import costs, plan, report, workers
from .analysis import Analysis
from .claims import check
from .records import File, Records, read
from .tasks import TASKS

_COST_ROUNDS, _QUICK_COST_ROUNDS = 60, 3


def run(output: Path, tasks: list[str], seeds: int, quick: bool, jobs: int) -> str:
    """Do the runs that are not in ``output`` yet, write the report, and return the table of claims and a sentence.

    Args:
        output: folder; gets evidence.md and a folder evidence with pictures, summary.json and results.jsonl.
        tasks: names of ``TASKS``.
        seeds: how many of them, from 0.
        quick: a few steps of a few methods.
        jobs: processes that do runs, each in one thread.

    Raises:
        TrainingError: the user has to mend something; runs that ended are kept.
        KeyboardInterrupt: the same holds.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise TrainingError(f"--tasks: got {', '.join(unknown) or 'none'}, wanted some of {', '.join(TASKS)}")
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise TrainingError(f"--{name}: got {value}, wanted 1 or more")
    try:
        (output / report.FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"--output: cannot write into {output}: {error.strerror}") from error
    path = output / report.FOLDER / "results.jsonl"
    records = read(path)
    for note in records.notes:
        print(f"note: {note}", file=sys.stderr)
    asked = {"tasks": tasks, "seeds": seeds, "quick": quick}
    records.plan = plan.settings(**asked)
    file = File(path)
    try:
        if not records.complete:
            file.add("plan", asked)
            _conditions(records, file)
            _measure(records, file, tasks, quick, jobs)
    finally:
        file.close()
        written = _report(records, output)
    table = report.claims_table(check(Analysis(records.runs.values())))
    return f"{table}\n\nThe report is {written}"


def _conditions(records: Records, file: File) -> None:
    with one_thread():
        now = conditions()
    records.start(now)
    file.add("conditions", now)


def _measure(records: Records, file: File, tasks: list[str], quick: bool, jobs: int) -> None:
    settings = records.missing
    kept = len(records.plan) - len(settings)
    if kept:
        print(f"{kept} of {len(records.plan)} runs are there already", file=sys.stderr)
    steps = sum(setting.steps for setting in settings)
    with (
        tqdm(total=steps, unit="step", desc="training", dynamic_ncols=True) as bar,
        closing(workers.run(settings, jobs)) as done,
    ):
        for run in done:
            file.add_run(run)
            records.add(run)
            bar.set_description(str(run.setting))
            bar.update(run.setting.steps)
    for task in tasks:
        if task not in records.costs:
            rounds = _QUICK_COST_ROUNDS if quick else _COST_ROUNDS
            with tqdm(total=rounds, unit="round", desc=f"timing {task}", dynamic_ncols=True) as bar:
                records.costs[task] = costs.measure(task, rounds, bar.update)
            file.add_costs(task, records.costs[task])


def _report(records: Records, output: Path) -> Path:
    try:
        return report.write(records, output)
    except files.WriteError as error:
        raise TrainingError(f"{error}. When there is room, the same command writes the report anew") from error
