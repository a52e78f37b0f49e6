"""Which backend a call gets: chosen, asked for or refused, and how the environment has a say."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode, fake_tensor

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, autograd, backends, measured, proven

X = torch.ones(1, 2, 3, 3)


@pytest.fixture
def backend():
    """Of the CPU tensors here."""
    assert backends.available()["cpu"] is None
    return "cpu"


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
    monkeypatch.setattr(backends, "_able", set())


def test_available_names_every_backend():
    assert tuple(backends.available())[: len(backends.BACKENDS)] == backends.BACKENDS
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


def test_explain_names_onednn_where_it_may_run(backend):
    assert "convolutions by them or by oneDNN" in backends.explain(X)
    assert "oneDNN" not in backends.explain(X, op="center")


@pytest.mark.parametrize(
    ("x", "weight", "geometry"),
    [
        (X, torch.ones(4, 3, 1, 1), {}),
        (X, torch.ones(4, 2, 1, 1), {"groups": 2}),
        (X, torch.ones(4, 2, 1, 1), {"groups": 3}),
        (X[0], torch.ones(4, 2, 1, 1), {}),
        (X, torch.ones(4, 2), {}),
        (X, torch.ones(4, 2, 1, 1).double(), {}),
        (X.int(), torch.ones(4, 2, 1, 1), {}),
        (X, torch.ones(4, 2, 1, 1, device="meta"), {}),
        (X, torch.ones(4, 2, 5, 5), {}),
        (X, torch.ones(4, 2, 1, 1), {"stride": 0}),
        (X, torch.ones(4, 2, 1, 1), {"padding": "full"}),
        (X, torch.ones(4, 2, 1, 1), {"dilation": (1, 1, 1)}),
        (X, [1.0], {}),
    ],
    ids=["channels", "group-channels", "groups", "single-image", "weight-rank", "dtype", "integers", "device", "empty",
         "stride", "padding", "dilation", "list"],
)  # fmt: skip
def test_explain_refuses_what_the_op_refuses(x, weight, geometry):
    with pytest.raises((TypeError, ValueError)) as of_op:
        dc.functional.deep_control_conv2d(x, weight, **geometry)
    with pytest.raises(of_op.type) as of_explain:
        backends.explain(x, weight=weight, **geometry)
    assert str(of_explain.value) == str(of_op.value)


def test_explain_refuses_maps_that_the_op_refuses():
    for op in ("center", "conv_center"):
        with pytest.raises(ValueError, match=r"input: got shape \(3, 3\), wanted \(N, C, \*spatial\)"):
            backends.explain(X[0, 0], op=op)
        with pytest.raises(TypeError, match="input: got list, wanted a tensor"):
            backends.explain([1.0], op=op)
    with pytest.raises(ValueError, match=r"input: got an empty map, shape \(1, 2, 3, 0\)"):
        backends.explain(X[..., :0], op="center")
    assert backends.explain(X[0, 0], op="project_kernel_gradients_")


def test_explain_takes_the_paddings_and_autocast_of_the_op(backend):
    weight = torch.ones(4, 2, 3, 3)
    assert backends.explain(X, weight=weight, padding="same") == backends.explain(X, weight=weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        text = backends.explain(X, weight=weight, padding=1)
    assert text == backends.explain(X.bfloat16(), weight=weight.bfloat16(), padding=1)


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


@pytest.mark.parametrize(
    ("value", "on"),
    [("1", True), ("true", True), ("Yes", True), ("ON", True), ("0", False), ("False", False), ("no", False),
     ("oFF", False), ("", False)],
)  # fmt: skip
def test_environment_variable_tune(monkeypatch, value, on):
    monkeypatch.setenv("DEEPCONTROL_TUNE", value)
    assert backends._switch("DEEPCONTROL_TUNE") is on
    monkeypatch.delenv("DEEPCONTROL_TUNE")
    assert backends._switch("DEEPCONTROL_TUNE") is False


def test_environment_variable_tune_invalid():
    run = python(EXPLAIN, DEEPCONTROL_TUNE="maybe")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last == (
        "ValueError: DEEPCONTROL_TUNE: got 'maybe', wanted 1, true, yes, on, or 0, false, no, off or nothing"
    )


@pytest.mark.parametrize("value", ["yes", 1, 0, None])
def test_tune_is_true_or_false(monkeypatch, backend, value):
    monkeypatch.setattr(backends, "tune", value)
    for call in (dc.functional.deep_control_conv2d, lambda x, weight: backends.explain(x, weight=weight)):
        with pytest.raises(TypeError, match=f"backends.tune: got {value!r}, wanted True or False"):
            call(X, torch.ones(4, 2, 3, 3))


def test_environment_variable_isa():
    run = python(EXPLAIN, DEEPCONTROL_ISA="portable")
    assert run.stdout.startswith("cpu, portable kernels, "), run.stderr


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


H100, V100 = backends._Gpu("NVIDIA H100", (9, 0)), backends._Gpu("Tesla V100", (7, 0))
KERNELS = "0123456789abcdef"
OPS = ("center", "center_backward", "conv_center", "conv_center_backward", "project_kernel_gradients_")


def proofs(*ops, backend="cuda", dtype="bfloat16", layout="channels_last", capability="9.0"):
    where = (dtype, layout, capability, "NVIDIA H100", "0123abcd", "2026-01-31", KERNELS)
    return [proven.Proof(backend, op, *where) for op in ops]


def on_gpu(dtype=torch.bfloat16, channels_last=True, index=0, shape=(2, 8, 3, 3)):
    """A tensor that says it is on a GPU, of which nothing is computed."""
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=f"cuda:{index}", memory_format=layout)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, a build for it and a table of proofs, all of them stand-ins; call it to make it another."""
    file = tmp_path / "proven.json"

    def make(gpu=H100, table=(), built=True, visible=True, kernels=KERNELS):
        proven.write(table, file)
        monkeypatch.setattr(backends, "_able", set())
        monkeypatch.setattr(backends, "_choices", {})
        monkeypatch.setattr(backends, "_proofs", None)
        monkeypatch.setattr(backends, "_gpu", lambda index: gpu)
        monkeypatch.setattr(_ops, "kernels", kernels)
        monkeypatch.setattr(backends, "_built_with_cuda", lambda: built)
        monkeypatch.setattr(proven, "FILE", file)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
        # A torch built for CUDA would ask the driver for the GPU of a tensor of which nothing is computed.
        monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)

    make()
    return make


def test_a_gpu_without_proof_gets_the_reference(machine):
    assert backends.available()["cuda"] is None
    assert backends.choose(on_gpu()) == "reference"
    for dtype, layout in ((torch.bfloat16, "channels_last"), (torch.float32, "contiguous")):
        text = backends.explain(on_gpu(dtype, layout == "channels_last"))
        missing = (
            f"not proven on compute capability 9.0 for {str(dtype).removeprefix('torch.')}, {layout} yet: run make gpu"
        )
        assert text == f"reference: cuda: {missing}; triton: {missing}"


def test_kernels_that_changed_since_are_not_proven(machine):
    machine(table=proofs(*OPS))
    assert backends.choose(on_gpu()) == "cuda"
    machine(table=proofs(*OPS), kernels="fedcba9876543210")
    assert backends.choose(on_gpu()) == "reference"
    assert "2026-01-31, but the kernels have changed since: run make gpu; triton: not" in backends.explain(on_gpu())


def test_triton_is_chosen_where_cuda_is_not_proven(machine):
    digest = backends._compiled["triton"].kernels()
    of_triton = [dataclasses.replace(proof, backend="triton", kernels=digest) for proof in proofs(*OPS)]
    machine(table=of_triton)
    assert backends.choose(on_gpu()) == "triton"
    assert backends.explain(on_gpu(), op="center").startswith("triton, one pass: proven on NVIDIA H100")
    machine(table=of_triton, built=False)
    assert backends.choose(on_gpu()) == "triton"
    machine(table=[*of_triton, *proofs(*OPS)])
    assert backends.choose(on_gpu()) == "cuda"
    machine(table=[dataclasses.replace(proof, kernels=KERNELS) for proof in of_triton])
    assert backends.choose(on_gpu()) == "reference"


# That the fastest of each backend was.
ALGORITHM = {"cuda": "held sm90", "triton": ""}


def test_the_faster_of_two_proven_backends_is_chosen(machine, monkeypatch, tmp_path):
    """Where both were timed at this layer, whatever the size of its maps."""
    digest = backends._compiled["triton"].kernels()
    of_triton = [dataclasses.replace(proof, backend="triton", kernels=digest) for proof in proofs(*OPS)]
    table = tmp_path / "measured.json"
    monkeypatch.setattr(measured, "FILE", table)
    # Which of its ways triton takes depends on the GPU.
    triton = dataclasses.replace(backends._compiled["triton"], describe=lambda *_: "one pass")
    monkeypatch.setitem(backends._compiled, "triton", triton)
    told = []
    monkeypatch.setattr(backends, "_remember_fastest", told.append)

    def times(**seconds):
        layer = measured.layer((3, 3), 8, 16, (2, 2), 1)
        place = ("9.0", "bfloat16", "channels_last", layer)
        measured.write(
            [
                measured.Time(*place, name, ALGORITHM[name], value, "NVIDIA H100", "x.json")
                for name, value in seconds.items()
            ],
            table,
        )
        monkeypatch.setattr(backends, "_times", None)
        machine(table=[*of_triton, *proofs(*OPS)])

    x, w = on_gpu(), on_gpu(shape=(16, 8, 3, 3))
    times(cuda=2.0, triton=1.0)
    assert backends.choose(x, weight=w, stride=(2, 2)) == backends.choose(x, weight=w, stride=(2,)) == "triton"
    text = backends.explain(x, weight=w, stride=(2,))
    assert text.endswith("2026-01-31; the fastest that x.json has for this layer")
    assert backends.choose(x, weight=w) == backends.choose(x, op="center") == "cuda"
    assert [(time.backend, time.algorithm) for time in told] == [("cuda", "held sm90")]
    times(cuda=1.0, triton=2.0)
    assert backends.choose(x, weight=w, stride=(2,)) == "cuda"
    times(triton=1.0)
    assert backends.choose(x, weight=w, stride=(2,)) == "cuda"
    times(cuda=2.0, triton=1.0)
    machine(table=proofs(*OPS))
    assert backends.choose(x, weight=w, stride=(2,)) == "cuda"
    machine(table=[*of_triton, *proofs(*OPS)])
    monkeypatch.setattr(backends, "_times", None)
    table.write_text("{")
    with pytest.warns(UserWarning, match="without knowing their times.*measured.json"):
        assert backends.choose(x, weight=w, stride=(2,)) == "cuda"


def test_a_table_of_times_reads_as_it_was_written(tmp_path):
    place = ("9.0", "bfloat16", "channels_last", measured.layer((3, 3), 8, 16, (2, 2), 1))
    table = [measured.Time(*place, name, ALGORITHM[name], 1.5, "NVIDIA H100", "x.json") for name in ("cuda", "triton")]
    measured.write(reversed(table), tmp_path / "table.json")
    assert list(measured.read(tmp_path / "table.json")) == table
    measured.read(measured.FILE)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, r"triton cannot be imported \(.*\); install it with: pip install 'triton>=3.5'"),
        ("3.4.0", r"triton 3\.4\.0 is too old, wanted 3\.5 or newer: pip install -U 'triton>=3.5'"),
    ],
    ids=["missing", "old"],
)
def test_what_triton_lacks_is_said(machine, monkeypatch, version, words):
    monkeypatch.setattr(backends, "_load_triton", backends._load_triton.__wrapped__)
    monkeypatch.setitem(sys.modules, "triton", version and types.SimpleNamespace(__version__=version))
    assert re.fullmatch(words, backends.available()["triton"])
    with pytest.raises(RuntimeError, match=f"backend 'triton': {words}"):
        dc.functional.deep_control(on_gpu(), backend="triton")
    machine(visible=False)
    assert backends.available()["triton"].startswith("torch.cuda.is_available() is False")


@pytest.mark.parametrize("how", ["call", "use"])
def test_an_unproven_kernel_runs_when_it_is_asked_for(machine, how):
    with backends.use("cuda" if how == "use" else None):
        requested = "cuda" if how == "call" else None
        assert backends.choose(on_gpu(), requested) == "cuda"
        text = backends.explain(on_gpu(), requested)
    asked = "asked for by the call" if how == "call" else "asked for by backends.use or DEEPCONTROL_BACKEND"
    assert text == (
        f"cuda, one pass for convolutions that its kernels take: {asked}; "
        "not proven on compute capability 9.0 for bfloat16, channels_last yet: run make gpu"
    )


def test_a_proven_kernel_is_chosen(machine):
    machine(table=proofs(*OPS))
    assert backends.choose(on_gpu()) == "cuda"
    text = backends.explain(on_gpu(), op="center")
    assert text == "cuda, one pass: proven on NVIDIA H100 (compute capability 9.0), commit 0123abcd, 2026-01-31"
    with backends.use("reference"):
        assert backends.choose(on_gpu()) == "reference"
        assert backends.explain(on_gpu()) == "reference: asked for by backends.use or DEEPCONTROL_BACKEND"


@pytest.mark.parametrize(
    ("tensor", "gpu"),
    [
        ({"dtype": torch.float16}, H100),
        ({"channels_last": False}, H100),
        ({}, backends._Gpu("NVIDIA B200", (10, 0))),
        ({}, backends._Gpu("NVIDIA A100", (8, 0))),
    ],
    ids=["dtype", "layout", "newer", "older"],
)
def test_a_proof_is_for_one_dtype_layout_and_generation(machine, tensor, gpu):
    machine(gpu, proofs(*OPS))
    assert backends.choose(on_gpu(**tensor)) == "reference"


def test_backward_must_be_proven_too(machine):
    machine(table=proofs("center", "center_backward", "conv_center"))
    assert backends.choose(on_gpu(), op="center") == "cuda"
    assert backends.choose(on_gpu(), op="conv_center") == "reference"


def test_the_layout_of_a_convolution_is_that_of_its_output(machine):
    machine(table=proofs(*OPS))
    assert backends.choose(on_gpu(channels_last=False)) == "reference"
    assert backends.choose(on_gpu(channels_last=False), weight=on_gpu()) == "cuda"


def test_the_choice_is_made_once(machine, monkeypatch):
    machine(table=proofs(*OPS))
    x = on_gpu()
    assert backends.choose(x) == backends.choose(x, "cuda") == "cuda"
    monkeypatch.setattr(backends, "_gpu", lambda index: pytest.fail("asked again"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked again"))
    assert backends.choose(x) == backends.choose(x, "cuda") == "cuda"


def test_the_choice_is_a_constant_of_a_compiled_graph(monkeypatch):
    """What asks the driver and reads the table is run, not traced, by torch.compile; here for a CPU tensor."""
    asked = []
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends, "_able", set())
    cuda = backends._compiled["cuda"]
    runs = dataclasses.replace(
        cuda, unavailable=lambda: open(os.devnull).close(), unfit=lambda index: open(os.devnull).close()
    )
    monkeypatch.setitem(backends._compiled, "cuda", runs)
    monkeypatch.setattr(backends, "_proof", lambda *key: asked.append(key) or proofs(*OPS)[0])

    def choose(input, requested=None, op="conv_center", weight=None):
        if requested == "cpu":
            return "reference" if backends._obstacle("cpu", None) else "cpu"
        name = backends._automatic_on_gpu(0, op, input.dtype, backends._layout(input, weight), None)
        return "cpu" if name == "cuda" else "reference"

    monkeypatch.setattr(backends, "choose", choose)
    compiled = torch.compile(dc.functional.deep_control, fullgraph=True, backend="eager")
    for requested in ("cpu", None):
        assert torch.equal(compiled(X, backend=requested), torch.zeros_like(X))
    torch.compiler.reset()
    assert asked == [("cuda", 0, "center", torch.float32, "contiguous")]


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ({"built": False}, r"the extension is built without CUDA kernels; .*DEEPCONTROL_CUDA=1 make build"),
        ({"visible": False}, r"torch\.cuda\.is_available\(\) is False: there is no GPU, no driver"),
        ({"gpu": V100}, r"Tesla V100 has compute capability 7\.0, wanted 8\.0 or higher"),
    ],
    ids=["built-without", "no-gpu", "old-gpu"],
)
def test_what_cuda_lacks_is_said(machine, lack, words):
    machine(table=proofs(*OPS), **lack)
    assert backends.choose(on_gpu()) == "reference"
    assert re.match(f"reference: cuda: {words}", backends.explain(on_gpu()))
    with pytest.raises(RuntimeError, match=f"backend 'cuda': {words}"):
        dc.functional.deep_control(on_gpu(), backend="cuda")
    if "gpu" not in lack:
        assert re.match(words, backends.available()["cuda"])


def test_cuda_without_the_extension(machine, no_extension):
    assert backends.available()["cuda"] == "the compiled extension is not built"
    assert backends.choose(on_gpu()) == "reference"


def test_torch_without_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="backend 'cuda': this torch is built without CUDA"):
        backends.choose(on_gpu(), "cuda")


def test_cuda_refuses_a_cpu_tensor(machine):
    with pytest.raises(RuntimeError, match="backend 'cuda': input is on cpu, wanted a CUDA tensor"):
        dc.functional.deep_control(X, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cpu': input is on cuda:0, wanted a CPU tensor"):
        backends.choose(on_gpu(), "cpu")


def test_cuda_here():
    """On this very machine: it runs, or the reason names one thing that is missing."""
    reason = backends.available()["cuda"]
    if reason is not None:
        with pytest.raises(RuntimeError, match=re.escape(f"backend 'cuda': {reason}")):
            dc.functional.deep_control(X, backend="cuda")


@pytest.mark.parametrize(
    ("place", "call"),
    [("weight", lambda x, y, v: dc.functional.deep_control_conv2d(x, y)),
     ("residual", lambda x, y, v: dc.functional.deep_control(x, residual=y)),
     ("gain", lambda x, y, v: dc.functional.deep_control(x, v)),
     ("mean_scale", lambda x, y, v: dc.functional.deep_control(x, None, v)),
     ("bias", lambda x, y, v: dc.functional.deep_control(x, bias=v))],
    ids=["weight", "residual", "gain", "mean_scale", "bias"],
)  # fmt: skip
def test_two_gpus_are_two_devices(machine, place, call):
    with pytest.raises(ValueError, match=f"{place}: is on cuda:1, wanted the device of input, cuda:0"):
        call(on_gpu(), on_gpu(index=1), on_gpu(index=1, shape=(8,)))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": 1, "proofs": []}', '{"format": 2, "proofs": 3}',
     '{"format": 2, "proofs": [{"op": "center"}]}', None],
    ids=["empty", "cut", "list", "no-format", "older", "number", "incomplete", "absent"],
)  # fmt: skip
def test_a_table_of_proofs_that_cannot_be_read_proves_nothing(machine, content):
    if content is None:
        proven.FILE.unlink()
    else:
        proven.FILE.write_text(content)
    with pytest.warns(UserWarning, match="takes no kernel for proven on any GPU.*proven.json") as caught:
        texts = [backends.explain(on_gpu()) for _ in range(2)]
    assert all(text.startswith("reference: cuda: not proven") for text in texts)
    assert len(caught) == 1
    assert backends.choose(on_gpu(), "cuda") == "cuda"


def test_a_table_of_proofs_reads_as_it_was_written(tmp_path):
    table = proofs(*OPS)
    proven.write(reversed(table), tmp_path / "table.json")
    assert list(proven.read(tmp_path / "table.json")) == sorted(table)


def test_the_table_of_the_package_is_sound():
    known = {*_ops.Ops._fields, "center_with_mean", "finish_weight_grad_", "window_mean"}
    assert {proof.op for proof in proven.read(proven.FILE)} <= known


def test_a_backend_of_the_tests_is_one_like_the_others(monkeypatch):
    for table in (backends._compiled, backends.ops):
        monkeypatch.setattr(backends, "_compiled" if table is backends._compiled else "ops", dict(table))
    backends._register("second", "cpu", "deepcontrol", unfit=lambda index: "not today")
    assert backends.available()["second"] is None
    with pytest.raises(RuntimeError, match="backend 'second': not today"):
        backends.choose(X, "second")
    backends._register("second", "cpu", "deepcontrol")
    assert backends.choose(X, "second") == "second"
    assert backends.choose(X) == "cpu"
    assert torch.equal(autograd.center(X, None, None, None, None, "relu", 0.0, "second"), torch.zeros_like(X))


@pytest.mark.parametrize(
    ("backend", "algorithm"),
    [
        ("cuda", "fastest"),
        ("cuda", ""),
        ("cuda", None),
        ("cuda", ["direct"]),
        ("cuda", "product"),
        ("cpu", "held sm90"),
    ],
)
def test_an_unknown_algorithm_is_not_preferred(backend, algorithm):
    first = "fused sm90" if backend == "cuda" else "product"
    with (
        pytest.raises(ValueError, match=rf"algorithm: got .*, wanted one of .*'{first}', "),
        backends.prefer(algorithm, backend),
    ):
        pass


@pytest.mark.parametrize("backend", ["reference", "triton", "bogus"])
def test_other_backends_have_no_algorithms_to_prefer(backend):
    with (
        pytest.raises(ValueError, match=r"backend: got .*, wanted 'cpu' or 'cuda'"),
        backends.prefer("direct", backend),
    ):
        pass


def test_an_algorithm_is_preferred_where_cuda_is():
    if (reason := backends.available()["cuda"]) is None:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=re.escape(f"backend 'cuda': {reason}")), backends.prefer("direct", "cuda"):
        pass


@pytest.mark.parametrize("algorithm", ["fastest", "", None, ["direct"]])
def test_an_algorithm_that_no_backend_has_is_not_preferred(algorithm):
    names = r"of cuda's 'fused sm90', .*, or cpu's 'product', 'direct', 'winograd', 'two passes'$"
    with pytest.raises(ValueError, match=rf"algorithm: got .*, wanted one {names}"), backends.prefer(algorithm):
        pass


def test_an_algorithm_whose_backends_cannot_run_is_refused_with_the_reasons(no_extension):
    reason = "the compiled extension is not built"
    for algorithm, words in (
        ("winograd", f"backend 'cpu': {reason}"),
        ("two passes", f"backend 'cuda': {reason}; backend 'cpu': {reason}"),
    ):
        with pytest.raises(RuntimeError, match=f"^{words}$"), backends.prefer(algorithm):
            pass


def test_an_algorithm_is_preferred_on_every_backend_that_has_it_and_can_run(monkeypatch, machine):
    told = []
    monkeypatch.setattr(backends, "_prefer", lambda algorithm, backend: told.append((backend, algorithm)))
    with backends.prefer("two passes"):
        assert told == [("cuda", "two passes"), ("cpu", "two passes")]
    assert told[2:] == [("cpu", None), ("cuda", None)]
    machine(built=False)
    for algorithm, found in (("direct", ["cpu"]), ("winograd", ["cpu"])):
        told.clear()
        with backends.prefer(algorithm):
            assert [backend for backend, _ in told] == found


POINTWISE = torch.ones(4, 2, 1, 1)


def plan_of(x, weight, padding=0):
    case = backends._case_cpu(x, weight, ((1, 1), (padding, padding), (1, 1), 1))
    return _ops.extension.plan_conv_cpu(case)


def test_the_extension_has_the_algorithms_that_are_named_here():
    assert plan_of(X, POINTWISE)["forward"]["obstacles"].keys() == backends.ALGORITHMS["cpu"].keys()


@pytest.fixture
def product():
    if reason := plan_of(torch.ones(1, 2, 1, 1), POINTWISE)["forward"]["obstacles"]["product"]:
        pytest.skip(reason)


def test_an_algorithm_is_preferred_on_a_cpu_until_the_preference_ends(product):
    x = torch.randn(8, 2, 9, 9).contiguous(memory_format=torch.channels_last)
    chosen = [plan_of(x, POINTWISE)[name]["chosen"] for name in ("forward", "backward")]
    with backends.prefer("two passes"):
        assert [plan_of(x, POINTWISE)[name]["chosen"] for name in ("forward", "backward")] == ["two passes"] * 2
        by_two_passes = dc.functional.deep_control_conv2d(x, POINTWISE)
        with backends.prefer("product", "cpu"):
            assert plan_of(x, POINTWISE)["forward"]["chosen"] == "product"
        assert plan_of(x, POINTWISE)["forward"]["chosen"] == "two passes"
    assert [plan_of(x, POINTWISE)[name]["chosen"] for name in ("forward", "backward")] == chosen
    assert torch.allclose(by_two_passes, dc.functional.deep_control_conv2d(x, POINTWISE), atol=1e-5)


def test_what_an_algorithm_does_not_take_is_refused_with_the_reason():
    with (
        backends.prefer("product", "cpu"),
        pytest.raises(RuntimeError, match="algorithm 'product': the kernel has more"),
    ):
        dc.functional.deep_control_conv2d(X, torch.ones(5, 2, 3, 3))


def test_a_backward_pass_that_an_algorithm_does_not_take_is_that_of_two_passes(product):
    """Here there are too few pixels for the threads."""
    x = torch.randn(1, 2, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    with backends.prefer("product", "cpu"):
        assert plan_of(x, POINTWISE)["backward"]["chosen"] == "two passes"
        dc.functional.deep_control_conv2d(x, POINTWISE, mean_scale=0.0).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))


def test_explain_has_every_algorithm_of_a_gpu(machine, monkeypatch):
    machine(table=proofs(*OPS))
    h100 = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    monkeypatch.setattr(backends, "_algorithm_on_gpu", lambda *_: "two passes")
    head, *lines = backends.explain(on_gpu(), weight=on_gpu(shape=(16, 8, 3, 3)), padding=1).splitlines()
    assert head.startswith(f"cuda, {backends.ALGORITHMS['cuda']['two passes']} (predicted fastest")
    found = {line[12:22].strip(): line[24:] for line in lines}
    assert found.keys() == backends.ALGORITHMS["cuda"].keys()
    assert re.fullmatch(r"[\d.]+ us, predicted; chosen", found["two passes"])
    assert found["held sm90"] == "does not take it: maps are too small to take their means"
