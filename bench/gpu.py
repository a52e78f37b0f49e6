"""``make gpu``: tests, checks and times the kernels on this machine's GPU, and writes down what was found.

Tests and sanitizers run in processes of their own, since an error of a kernel ends all use of the GPU in its process.
What comes of it: one file in bench/results, the table of docs/hardware.md, and deepcontrol_cuda/proven.json, from which
the planner knows what it may choose. Nothing is called proven unless every test passed and its error is in its budget.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from xml.etree import ElementTree

import torch
from torch.utils import cpp_extension

from deepcontrol_cuda import backends, measured, proven
from deepcontrol_cuda.ceilings import BY_GENERATION, Ceilings
from deepcontrol_cuda.timing import Shape
from deepcontrol_cuda.training.table import markdown_table

from . import convolutions, hardware, kernels, record, report
from .clock import Clock, GpuClock
from .convolutions import Setting
from .kernels import Case, Measured
from .rows import Accuracy, Verdict
from .runner import WrongResultError

ROOT = Path(__file__).resolve().parents[1]
# Without it cuBLAS is not deterministic, and torch refuses it in the tests that fill new memory with NaN.
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_SANITIZER_FOUND = 99
# Shares of all the time that a step may take before it is stopped.
_OP_TESTS, _GPU_TESTS, _SANITIZER = 0.5, 0.2, 0.1
_SHARE_OF_COPY = 0.95
# Of a layer's forward over the bare convolution, and of the weight's gradient with projection over that without.
_OVER_CONV, _TARGETS = 1.05, ("conv", "conv_weight_grad")
_WORKERS = 8
# Of the build and the tests.
_PACKAGES = ("hypothesis", "ninja", "pytest", "setuptools")

Key = tuple[str, str, str, str]
"""Backend, op, dtype and layout."""


@dataclass(frozen=True)
class Outcome:
    """Of tests or a sanitizer; ``passed`` is None where they could not run."""

    what: str
    passed: bool | None
    summary: str
    seconds: float


@dataclass
class Findings:
    """All that a run finds; what an interruption or a broken GPU left undone is missing in it."""

    outcomes: list[Outcome] = field(default_factory=list)
    checked: dict[Key, Accuracy] = field(default_factory=dict)
    wrong: dict[Key, str] = field(default_factory=dict)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    """By backend."""
    layers: list[convolutions.Row] = field(default_factory=list)
    algorithms: list[convolutions.Algorithms] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What there was no time for."""
    error: str | None = None

    @property
    def tests_passed(self) -> bool:
        return bool(self.outcomes) and all(outcome.passed is not False for outcome in self.outcomes)

    @property
    def sound(self) -> bool:
        return self.tests_passed and not self.wrong and self.error is None and bool(self.checked)

    def proven(self) -> list[Key]:
        if not self.tests_passed or self.error is not None:
            return []
        return [key for key in self.checked if key not in self.wrong]


def missing() -> list[str]:
    """What this machine lacks for ``make gpu``."""
    if torch.version.cuda is None:
        return ["a torch that is built for CUDA; name a Python that has one: make gpu VENV=none PYTHON=python3"]
    if not torch.cuda.is_available():
        return ["a GPU: torch.cuda.is_available() is False. Is the driver loaded, and CUDA_VISIBLE_DEVICES not empty?"]
    lacks = []
    if reason := backends._why_not_this_gpu(0):
        lacks.append(f"a newer GPU: {reason}")
    home = cpp_extension.CUDA_HOME
    if home is None or shutil.which(os.path.join(home, "bin", "nvcc")) is None:
        lacks.append("nvcc, of the CUDA toolkit that torch was built for; CUDA_HOME names its folder")
    packages = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if packages:
        lacks.append(f"the Python packages {', '.join(packages)}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        lacks.append(f"a C++ compiler (looked for {compiler}; CXX names another)")
    return lacks


def architecture(capability: tuple[int, int]) -> str:
    """What TORCH_CUDA_ARCH_LIST is to be for a GPU; from 9.0 on there are instructions of one generation alone."""
    return "{}.{}".format(*capability) + ("a" if capability >= (9, 0) else "")


def run(output: Path, seconds: float, rounds: int, commit: str | None) -> int:
    """All steps in order within about ``seconds``, and the exit status: 0 if everything was right."""
    if reason := backends.available()["cuda"]:
        print(f"error: backend 'cuda': {reason}", file=sys.stderr)
        return 1
    gpu = record.gpu()
    progress = Progress(seconds)
    progress.say(f"{gpu['name']}, compute capability {gpu['capability']}")
    names = ["cuda"]
    if reason := backends.available()["triton"]:
        progress.say(f"backend 'triton' is left out: {reason}")
    else:
        names.append("triton")
    conditions = record.collect("gpu", rounds=rounds, seconds=seconds, cudnn_benchmark=True)
    conditions["gpu"] = gpu
    findings = Findings()
    try:
        test(findings, progress, names)
        measure(findings, progress, GpuClock(), names, rounds)
    except KeyboardInterrupt:
        findings.error = "interrupted"
    except Exception as error:  # such as an illegal access, after which the GPU is lost to this process
        traceback.print_exc()
        findings.error = f"{type(error).__name__}: {error}".splitlines()[0]
    write(findings, conditions, output, commit)
    progress.say("done" if findings.sound else "FAILED")
    return 0 if findings.sound else 1


class Progress:
    """Lines with the time since the start, and how much is left."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start = time.monotonic()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)


def test(findings: Findings, progress: Progress, names: Sequence[str]) -> None:
    """The tests marked gpu, then the sanitizers."""
    workers = ["-n", str(min(_WORKERS, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    own = "tests/test_gpu.py"
    steps = [
        ("op tests", lambda limit: pytest("op tests", ["tests", f"--ignore={own}", *workers], limit), _OP_TESTS),
        ("GPU tests", lambda limit: pytest("GPU tests", [own], limit), _GPU_TESTS),
    ]
    checks = [("memcheck",), ("memcheck", "convolutions"), ("racecheck",)]
    for name in names:
        # Of cuDNN's kernels racecheck knows nothing.
        for tool, *which in [*checks, ("racecheck", "own" if name == "cuda" else "convolutions")]:
            what = " ".join([tool, name, *which])
            steps.append((what, partial(sanitize, tool, [name, *which]), _SANITIZER))
    for what, step, share in steps:
        progress.say(what)
        outcome = step(share * progress.seconds)
        findings.outcomes.append(outcome)
        words = {None: "left out", True: "passed", False: "FAILED"}
        progress.say(f"{what} {words[outcome.passed]}: {outcome.summary}")


def pytest(what: str, arguments: Sequence[str], limit: float) -> Outcome:
    """The tests marked gpu among ``arguments``; to pass, some must have run."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.xml"
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={file}"]
        code, _ = _command([sys.executable, "-m", "pytest", *options, *arguments], limit, show=True)
        counts = _counts(file)
    summary = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no report"
    if code is None:
        summary = f"stopped after {limit:.0f} s"
    return Outcome(what, code == 0 and counts.get("passed", 0) > 0, summary, time.monotonic() - start)


def _counts(file: Path) -> dict[str, int]:
    if not file.exists():
        return {}
    suites = [suite.attrib for suite in ElementTree.parse(file).iter("testsuite")]
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def sanitize(tool: str, arguments: Sequence[str], limit: float) -> Outcome:
    """bench/sanitize_gpu.py under a tool of compute-sanitizer."""
    what = " ".join([tool, *arguments])
    program = shutil.which("compute-sanitizer")
    if program is None and cpp_extension.CUDA_HOME is not None:
        program = shutil.which(os.path.join(cpp_extension.CUDA_HOME, "bin", "compute-sanitizer"))
    if program is None:
        return Outcome(what, None, "compute-sanitizer is not installed", 0.0)
    start = time.monotonic()
    command = [program, "--tool", tool, "--error-exitcode", str(_SANITIZER_FOUND), sys.executable, "-m"]
    # Every tensor is an allocation of its own then, with bounds that memcheck knows.
    code, text = _command([*command, "bench.sanitize_gpu", *arguments], limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    seconds = time.monotonic() - start
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")] or ["no output"]
    if code is None:
        return Outcome(what, None, f"stopped after {limit:.0f} s", seconds)
    if code == 0:
        return Outcome(what, True, lines[-1], seconds)
    if "not supported" in text.lower() and code != _SANITIZER_FOUND:
        return Outcome(what, None, next(line for line in lines if "not supported" in line.lower()), seconds)
    print(text, flush=True)
    return Outcome(what, False, lines[-1], seconds)


def _command(command: Sequence[str], limit: float, show: bool = False, **variables: str) -> tuple[int | None, str]:
    """Exit status and output of a command; None and what there was if ``limit`` seconds were not enough."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | _ENVIRONMENT | variables, text=True, start_new_session=True,
        stdout=None if show else subprocess.PIPE, stderr=None if show else subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text or ""
    except subprocess.TimeoutExpired:
        # Its workers too.
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return None, text or ""
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def measure(findings: Findings, progress: Progress, clock: Clock, names: Sequence[str], rounds: int) -> None:
    """Errors of every backend, op, dtype and layout; then times, until there is no time left."""
    progress.say("errors against float64")
    for name in names:
        _check(findings, name, clock.device)
    for key, text in findings.wrong.items():
        progress.say(f"WRONG: {', '.join(key)}: {text}")

    tasks = [
        (f"{name}: {case}", case, lambda case=case, name=name: _time_kernel(findings, case, name, clock, rounds))
        for case in cases()
        for name in names
    ]
    for shape, setting, batch in layers():
        layer, what = (shape, setting, batch), f"{shape}, {setting}, batch {batch}"
        tasks.append((what, setting, partial(_time_layer, findings, layer, names, clock, rounds)))
        for name in names:
            # Contiguous maps leave no choice.
            if setting.layout == "channels_last" and convolutions.algorithms(name):
                task = partial(_time_algorithms, findings, layer, name, clock, rounds)
                tasks.append((f"algorithms of {name}: {what}", setting, task))
    tasks.sort(key=lambda task: (task[1].dtype, task[1].layout) != ("bfloat16", "channels_last"))
    progress.say(f"times of {len(tasks)} kernels and layers")
    for i, (what, _, task) in enumerate(tasks):
        if progress.left <= 0:
            findings.left_out.append(what)
            continue
        for text in task():
            progress.say(f"WRONG: {text}")
        if i % 20 == 0:
            progress.say(f"{i + 1} of {len(tasks)}: {what}")
    if findings.left_out:
        progress.say(f"no time was left for {len(findings.left_out)} of them")


def _time_kernel(findings: Findings, case: Case, backend: str, clock: Clock, rounds: int) -> list[str]:
    """Of one backend; what is wrong."""
    try:
        timed = kernels.measure(case, _library(backend), clock, rounds)
    except WrongResultError as error:
        findings.wrong[backend, case.op, case.dtype, case.layout] = str(error)
        return [str(error)]
    findings.measured.setdefault(backend, []).append(timed)
    return []


def _time_layer(
    findings: Findings, layer: tuple[Shape, Setting, int], names: Sequence[str], clock: Clock, rounds: int
) -> list[str]:
    """Of all backends, against their peers; what is wrong."""
    row = convolutions.measure(*layer, names, clock, rounds)
    findings.layers.append(row)
    for name, text in row.wrong.items():
        _convolution_is_wrong(findings, name, row.setting, text)
    return list(row.wrong.values())


def _time_algorithms(
    findings: Findings, layer: tuple[Shape, Setting, int], backend: str, clock: Clock, rounds: int
) -> list[str]:
    """Of one backend that has a choice of them; what is wrong."""
    found = convolutions.measure_algorithms(*layer, backend, clock, rounds)
    findings.algorithms.append(found)
    for text in found.wrong.values():
        _convolution_is_wrong(findings, backend, found.setting, text)
    return list(found.wrong.values())


def _convolution_is_wrong(findings: Findings, backend: str, setting: Setting, text: str) -> None:
    for op in ("conv_center", "conv_center_backward"):
        findings.wrong[backend, op, setting.dtype, setting.layout] = text


def _library(backend: str):
    return getattr(torch.ops, backends._compiled[backend].namespace)


# Functions, so that a dry run can have fewer.
def cases() -> list[Case]:
    return kernels.timed()


def layers():
    return convolutions.timed()


def checks() -> list[Case]:
    return kernels.checks()


def checked_layers() -> Sequence[Shape]:
    return convolutions.CHECKED


def _check(findings: Findings, backend: str, device: str) -> None:
    library = _library(backend)
    for case in checks():
        key = (backend, case.op, case.dtype, case.layout)
        _note(findings, key, lambda case=case: [kernels.check(case, library, device)])
    for dtype, layout, shape in product(kernels.DTYPES, kernels.LAYOUTS, checked_layers()):
        setting = Setting(dtype, layout, "training")
        chosen = convolutions.algorithms(backend) if layout == "channels_last" else ()
        for algorithm in (None, *chosen):
            _check_layer(findings, backend, shape, setting, device, algorithm)


def _check_layer(
    findings: Findings, backend: str, shape: Shape, setting: Setting, device: str, algorithm: str | None
) -> None:
    try:
        found = convolutions.check(shape, setting, 4, backend, device, algorithm)
    except convolutions.RefusedError:
        return
    except WrongResultError as error:
        _convolution_is_wrong(findings, backend, setting, str(error))
        return
    output = found.pop("output")
    _note(findings, (backend, "conv_center", setting.dtype, setting.layout), lambda: [output])
    _note(findings, (backend, "conv_center_backward", setting.dtype, setting.layout), found.values)


def _note(findings: Findings, key: Key, check) -> None:
    """Keep the worst accuracy that was found for ``key``."""
    try:
        accuracies: Iterable[Accuracy] = check()
    except WrongResultError as error:
        findings.wrong[key] = str(error)
        return
    before = [findings.checked[key]] if key in findings.checked else []
    findings.checked[key] = max([*before, *accuracies], key=lambda accuracy: accuracy.error / accuracy.budget)


def write(findings: Findings, conditions: dict[str, object], output: Path, commit: str | None) -> None:
    """The JSON, docs/hardware.md and proven.json; proofs of this compute capability from earlier runs are replaced.

    A run that someone interrupted says nothing against them and leaves the last two as they are.
    """
    gpu, date = conditions["gpu"], conditions["date"]
    if commit is None:
        known = conditions["commit"]
        commit = "unknown" if known is None else known["hash"] + (" + changes" if known["dirty"] else "")
    found = verdicts(findings)
    path = record.write(conditions | _as_json(findings, found, commit), output)
    if findings.error == "interrupted":
        print(f"interrupted; what was measured before is in {path}")
        return
    keys = findings.proven()
    proofs = [
        proven.Proof(*key, gpu["capability"], gpu["name"], commit, date, backends._compiled[key[0]].kernels())
        for key in keys
    ]
    others = [proof for proof in _read(proven, "proofs") if proof.capability != gpu["capability"]]
    proven.write([*others, *proofs], proven.FILE)
    times = layer_times(findings, gpu, path.name)
    places = {(time.capability, time.dtype, time.layout, time.layer) for time in times}
    others = [time for time in _read(measured, "times") if time.place not in places]
    measured.write([*others, *times], measured.FILE)
    hardware.rewrite(hardware.FILE, gpu["name"], entries(findings, gpu["name"], commit))
    if findings.measured:
        print(f"\n{_measured_table(findings.measured)}\n")
    if findings.layers:
        print(f"{_layers_table(findings.layers)}\n")
    if findings.algorithms:
        print(f"{_algorithms_table(findings.algorithms, gpu['capability'])}\n")
    if found:
        print(f"{report.verdicts_table(found)}\n")
    total = len(findings.checked | findings.wrong)
    print(f"{len(keys)} of {total} combinations of backend, op, dtype and layout are proven.")
    print(f"Written to {path}, {hardware.FILE}, {proven.FILE} and {measured.FILE}")


def _read(table, what: str) -> Sequence:
    """The rows of ``proven`` or ``measured``."""
    try:
        return table.read(table.FILE)
    except (OSError, ValueError) as error:
        print(f"The table of {what} could not be read and is made anew: {error}")
        return ()


def layer_times(findings: Findings, gpu: dict[str, str], result: str) -> list[measured.Time]:
    """Of training, summed over the batches at which every backend was right and timed; of a backend that has a choice
    the fastest algorithm's."""
    places: dict[tuple[str, str, str], list[convolutions.Row]] = {}
    for row in findings.layers:
        if row.setting.mode == "training" and not row.wrong:
            places.setdefault((row.setting.dtype, row.setting.layout, row.layer), []).append(row)
    found = []
    for place, rows in places.items():
        for backend in dict.fromkeys(name for row in rows for name in row.accuracies):
            seconds = _seconds(findings, backend, rows)
            if seconds:
                fastest = min(seconds, key=seconds.__getitem__)
                times = (backend, fastest, seconds[fastest])
                found.append(measured.Time(gpu["capability"], *place, *times, gpu["name"], result))
    return found


def _seconds(findings: Findings, backend: str, rows: Sequence[convolutions.Row]) -> dict[str, float]:
    """Of ``rows`` together by each algorithm that was right and timed in all of them, "" where there is no choice."""
    if not convolutions.algorithms(backend) or rows[0].setting.layout != "channels_last":
        only = "two passes" if convolutions.algorithms(backend) else ""
        return {only: sum(row.times[backend].median for row in rows if backend in row.accuracies)}
    own = {(one.setting, one.shape, one.batch): one for one in findings.algorithms if one.backend == backend}
    keys = [(row.setting, row.shape, row.batch) for row in rows]
    if not own.keys() >= set(keys):
        return {}
    found = [own[key] for key in keys]
    right = [name for name in found[0].accuracies if all(name in one.accuracies for one in found)]
    return {name: sum(one.times[name].median for one in found) for name in right}


def _as_json(findings: Findings, found: Sequence[Verdict], commit: str) -> dict[str, object]:
    return {
        "commit_of_proofs": commit,
        "complete": findings.error is None and not findings.left_out,
        "error": findings.error,
        "left_out": findings.left_out,
        "times_in": "seconds",
        "outcomes": [asdict(outcome) for outcome in findings.outcomes],
        "accuracies": [_keyed(key) | asdict(accuracy) for key, accuracy in findings.checked.items()],
        "wrong": [_keyed(key) | {"what": text} for key, text in findings.wrong.items()],
        "kernels": [
            {"backend": name, **asdict(m), "bytes_per_second": m.bytes_per_second, "share_of_copy": m.share_of_copy}
            for name, measured in findings.measured.items()
            for m in measured
        ],
        "layers": [asdict(row) for row in findings.layers],
        "algorithms": [asdict(row) for row in findings.algorithms],
        "verdicts": [asdict(verdict) for verdict in found],
    }


def _keyed(key: Key) -> dict[str, str]:
    return dict(zip(("backend", "op", "dtype", "layout"), key))


def verdicts(findings: Findings) -> list[Verdict]:
    """Share of a copy for center and its backward, which have a target, and layers and gradients over their peers."""
    found = []
    for name, timed in findings.measured.items():
        for op in ("center", "center_backward"):
            groups = {(m.case.variant, m.case.dtype, m.case.layout) for m in timed if m.case.op == op}
            for group in sorted(groups):
                shares = [
                    m.share_of_copy
                    for m in timed
                    if (m.case.op, m.case.variant, m.case.dtype, m.case.layout) == (op, *group)
                ]
                what = f"{name}, {op}, {', '.join(group)}: share of a copy, geometric mean"
                found.append(report.at_least(what, geometric_mean(shares), _SHARE_OF_COPY))
    for setting, batch in dict.fromkeys((row.setting, row.batch) for row in findings.layers):
        rows = [row for row in findings.layers if (row.setting, row.batch) == (setting, batch)]
        for name in dict.fromkeys(name for row in rows for name in row.accuracies):
            own = [(name, "conv"), *((f"{name}_{which}_grad", f"conv_{which}_grad") for which in ("weight", "input"))]
            for contestant, to in [(name, "conv_relu"), ("conv_bn_relu", name), *own]:
                ratios = [row.ratio(contestant, to) for row in rows if {contestant, to} <= row.times.keys()]
                if ratios:
                    what = f"{setting}, batch {batch}: {contestant} / {to}, geometric mean"
                    mean = geometric_mean(ratios)
                    found.append(report.at_most(what, mean, _OVER_CONV) if to in _TARGETS else Verdict(what, mean))
    return found


def entries(findings: Findings, gpu: str, commit: str) -> list[hardware.Entry]:
    """A line of docs/hardware.md for every backend, op, dtype and layout that was checked."""
    keys = findings.proven()
    found = []
    for key in dict.fromkeys([*findings.checked, *findings.wrong]):
        if key in findings.wrong:
            state = "WRONG RESULT"
        else:
            failed = "tests failed" if findings.error is None else "run broke off"
            state = "proven" if key in keys else failed
        accuracy = findings.checked.get(key)
        error = f"{accuracy.error:.1e} of {accuracy.budget:.1e}" if accuracy else "-"
        own = findings.measured.get(key[0], ())
        measured = [m for m in own if (m.case.op, m.case.dtype, m.case.layout) == key[1:]]
        found.append(hardware.Entry(*key, state, gpu, commit, error, *_speed(measured)))
    return found


def _speed(measured: Sequence[Measured]) -> tuple[str, str]:
    if not measured:
        return "-", "-"
    speeds = [m.bytes_per_second / 1e9 for m in measured]
    shares = [m.share_of_copy for m in measured]
    share = f"{geometric_mean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
    return f"{min(speeds):.0f} to {max(speeds):.0f}", share


def _measured_table(measured: Mapping[str, Sequence[Measured]]) -> str:
    lines = [["backend", "kernel", "microseconds", "GB/s", "share of a copy"]]
    for name, m in ((name, m) for name, found in measured.items() for m in found):
        median, speed = m.seconds["kernel"].median, m.bytes_per_second / 1e9
        lines.append([name, str(m.case), f"{1e6 * median:.1f}", f"{speed:.0f}", f"{m.share_of_copy:.2f}"])
    return markdown_table(lines)


def _layers_table(rows: Sequence[convolutions.Row]) -> str:
    """Microseconds of conv + ReLU, and all others over that."""
    others = list(dict.fromkeys(name for row in rows for name in row.times if name != "conv_relu"))
    lines = [["layer", "batch", "conv_relu, us", *(f"{name} /" for name in others)]]
    for row in rows:
        ratios = [f"{row.ratio(name, 'conv_relu'):.2f}" if name in row.times else "-" for name in others]
        median = row.times["conv_relu"].median
        lines.append([f"{row.shape}, {row.setting}", str(row.batch), f"{1e6 * median:.1f}", *ratios])
    return markdown_table(lines)


def _algorithms_table(found: Sequence[convolutions.Algorithms], capability: str) -> str:
    """Each algorithm's time, over two passes and over cuDNN's bare convolution, its error, and of the forward pass the
    shares of what the GPU's data sheet promises."""
    ceilings = BY_GENERATION.get(int(capability.partition(".")[0]))
    of = ceilings.name if ceilings else "a data sheet"
    lines = [
        [
            "layer",
            "batch",
            "algorithm",
            "us",
            "/ two passes",
            "/ conv",
            "error",
            f"tensor cores of {of}",
            f"memory of {of}",
        ]
    ]
    for one in found:
        for name, accuracies in one.accuracies.items():
            median = one.times[name].median
            ratios = [
                f"{median / one.times[to].median:.2f}" if to in one.times else "-" for to in ("two passes", "conv")
            ]
            worst = max(accuracies.values(), key=lambda accuracy: accuracy.error / accuracy.budget)
            error = f"{worst.error:.1e} of {worst.budget:.1e}"
            shares = [f"{share:.2f}" for share in _shares(one, name, ceilings)] or ["-", "-"]
            cells = [f"{one.shape}, {one.setting}", str(one.batch), name, f"{1e6 * median:.1f}"]
            lines.append([*cells, *ratios, error, *shares])
    return markdown_table(lines)


def _shares(one: convolutions.Algorithms, algorithm: str, ceilings: Ceilings | None) -> list[float]:
    """Of operations and of bytes that the forward pass needs at least; TF32 takes twice as long as 16 bits."""
    if ceilings is None or one.setting.mode != "forward":
        return []
    seconds, size = one.times[algorithm].median, getattr(torch, one.setting.dtype).itemsize
    return [one.operations * size / 2 / ceilings.operations / seconds, one.bytes / ceilings.bytes / seconds]
