"""Which backend a call gets: chosen, asked for or refused, and how the environment has a say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, backends

X = torch.ones(1, 2, 3, 3)


def python(script: str, **variables: str) -> subprocess.CompletedProcess:
    """``script`` run by a Python of its own, with no variable of this package in its environment but ``variables``."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("DEEPCONTROL_")}
    return subprocess.run(
        [sys.executable, "-c", script], env=foreign | variables, capture_output=True, text=True, check=False
    )


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_ops, "unavailable", "the compiled extension is not built")
    monkeypatch.setattr(backends, "_warned", False)


def test_available_names_every_backend():
    assert tuple(backends.available()) == backends.BACKENDS
    assert backends.available()["reference"] is None


def test_automatic_choice(backend):
    assert backends.choose(X) == backend
    assert backends.choose(X.to("meta")) == "reference"


def test_devices_without_kernels_run_the_reference():
    y = dc.functional.deep_control_conv2d(X.to("meta"), torch.ones(5, 2, 3, 3, device="meta"), activation="relu")
    assert y.shape == (1, 5, 1, 1)
    assert y.device.type == "meta"


def test_without_the_extension_the_reference_runs_and_says_so_once(no_extension):
    assert backends.available()["cpu"] == "the compiled extension is not built"
    with pytest.warns(UserWarning, match="slow reference: the compiled extension is not built") as caught:
        chosen = [backends.choose(X) for _ in range(3)]
    assert chosen == ["reference"] * 3
    assert len(caught) == 1
    assert backends.explain(X) == "reference: the compiled extension is not built"


def test_a_backend_that_cannot_run_is_refused_with_the_reason(no_extension):
    with pytest.raises(RuntimeError, match="backend 'cpu': the compiled extension is not built"):
        dc.functional.deep_control(X, backend="cpu")


def test_a_backend_for_another_device_is_refused(backend):
    with pytest.raises(RuntimeError, match=f"backend '{backend}': input is on meta, wanted a CPU tensor"):
        backends.choose(X.to("meta"), backend)


def test_use_is_a_preference_that_a_call_overrides(backend):
    with backends.use("reference"):
        assert backends.choose(X) == "reference"
        assert backends.choose(X, backend) == backend
        with backends.use(None):
            assert backends.choose(X) == backend
        assert backends.choose(X) == "reference"
    assert backends.choose(X) == backend


def test_use_restores_after_an_exception(backend):
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert backends.choose(X) == backend


def test_use_refuses_an_unknown_name_and_changes_nothing(backend):
    with pytest.raises(ValueError, match="backend: got 'cudnn', wanted one of reference, cpu"), backends.use("cudnn"):
        pass
    assert backends.choose(X) == backend


def test_the_preference_decides_what_runs(monkeypatch):
    """Not only what ``choose`` says: the ops of the extension are not called under ``use("reference")``."""
    monkeypatch.setattr(dc.functional.autograd, "center", lambda *_: pytest.fail("the extension was called"))
    with backends.use("reference"):
        dc.functional.deep_control(X)


@pytest.mark.parametrize(
    ("requested", "preferred", "words"),
    [
        (None, None, "the input is a CPU tensor and the extension is loaded"),
        ("cpu", None, "asked for by the call"),
        ("reference", "cpu", "reference: asked for by the call"),
        (None, "reference", "reference: asked for by backends.use or DEEPCONTROL_BACKEND"),
    ],
    ids=["automatic", "call", "call-over-use", "use"],
)
def test_explain(requested, preferred, words):
    with backends.use(preferred):
        text = backends.explain(X, requested)
    assert text.endswith(words)
    assert (f"{_ops.extension.info()['isa']} kernels" in text) == text.startswith("cpu")


def test_explain_names_the_device_without_kernels():
    assert backends.explain(X.to("meta")) == "reference: no kernels of this package run on meta tensors yet"


EXPLAIN = "import torch, deepcontrol_cuda as dc; print(dc.backends.explain(torch.ones(1, 1, 1)))"


@pytest.mark.parametrize(
    ("value", "words"), [("reference", "reference: asked for by"), ("", "cpu, ")], ids=["reference", "empty"]
)
def test_environment_variable_backend(value, words):
    run = python(EXPLAIN, DEEPCONTROL_BACKEND=value)
    assert run.stdout.startswith(words), run.stderr


def test_environment_variable_backend_invalid():
    run = python(EXPLAIN, DEEPCONTROL_BACKEND="cudnn")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: DEEPCONTROL_BACKEND: got 'cudnn', wanted one of reference, cpu")


def test_environment_variable_isa():
    run = python(EXPLAIN, DEEPCONTROL_ISA="portable")
    assert run.stdout.startswith("cpu, portable kernels around oneDNN"), run.stderr


@pytest.mark.parametrize(
    "script",
    [EXPLAIN, "import torch, deepcontrol_cuda as dc; dc.functional.deep_control(torch.ones(1, 1, 1))"],
    ids=["explain", "call"],
)
def test_environment_variable_isa_invalid(script):
    """An exception that says what this processor can run, and not an abort of the process."""
    run = python(script, DEEPCONTROL_ISA="mmx")
    assert run.returncode == 1, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert "DEEPCONTROL_ISA: got 'mmx', this processor can run " in last
    assert last.endswith("portable")
