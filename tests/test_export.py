"""Models leave by torch.export, AOTInductor, ONNX and torch.jit.trace, for batches and images of any size."""

from __future__ import annotations

import contextlib
import copy
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import assert_within_budget
from torch import nn
from torch.export import Dim

import deepcontrol_cuda as dc

DYNAMIC = ({0: Dim("batch"), 2: Dim("height", min=8), 3: Dim("width", min=8)},)
EXAMPLE = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
# A batch of one and odd sizes as well.
OTHERS = [torch.randn(size, generator=torch.Generator().manual_seed(2)) for size in ((1, 3, 9, 8), (3, 3, 17, 24))]


class Block(nn.Module):
    """The shortest residual block: what comes in is also the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = dc.MapNoise()
        self.first = dc.DeepControlConv2d(4, 4, 3, padding="same", groups=2, mean_scale=0.5, activation="silu")
        self.second = dc.MeanShiftConv2d(4, 4, (3, 1), padding=(1, 0), bias=True, activation="leaky_relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.noise(x)
        return self.second(self.first(x), residual=x)


@pytest.fixture
def net() -> nn.Sequential:
    net = nn.Sequential(
        dc.DeepControlConv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect", activation="relu"),
        Block(),
        nn.ConvTranspose2d(4, 4, 2, 2),
        dc.DeepControl2d(4, activation="gelu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 6),
        dc.DeepControl1d(6, mean_scale=0.0, activation="hardswish"),
    )
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net.eval().requires_grad_(False)


def use(backend: str | None):
    return contextlib.nullcontext() if backend is None else dc.backends.use(backend)


def export(net: nn.Module, backend: str | None = None, **options) -> torch.export.ExportedProgram:
    with use(backend):
        return torch.export.export(net, (EXAMPLE,), dynamic_shapes=DYNAMIC, **options)


def our_ops(program: torch.export.ExportedProgram) -> set[str]:
    return {name for node in program.graph.nodes if "deepcontrol" in (name := str(node.target))}


def assert_runs(run, net: nn.Module, inputs=(EXAMPLE, *OTHERS), what: str = "") -> None:
    """``run`` is as near to the net in float64 as the net is."""
    for x in inputs:
        with dc.backends.use("reference"):
            low = net(x)
            oracle = copy.deepcopy(net).double()(x.double())
        assert_within_budget(run(x), oracle, low, torch.float32, what=f"{what} {tuple(x.shape)}")


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_is_plain_and_takes_any_size(net, strict):
    program = export(net, strict=strict)
    assert not our_ops(program)
    assert_runs(program.module(), net)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_holds_the_ops_of_a_backend_asked_for(net, tmp_path, strict):
    program = export(net.requires_grad_(), "cpu", strict=strict)
    assert our_ops(program) == {"deepcontrol.center.default", "deepcontrol.conv_center.default"}
    assert our_ops(program.run_decompositions()) == our_ops(program)
    kept = [node.args[-1] for node in program.graph.nodes if "deepcontrol" in str(node.target)]
    assert not any(kept), "a program for inference keeps nothing for backward"
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert_runs(loaded, net)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_trains_but_does_not_project(strict):
    """All that the docs say of gradients: they are the layers' own, without projection."""
    net = nn.Sequential(dc.DeepControlConv2d(3, 4, 3, activation="silu"), dc.DeepControl2d(4)).double()
    program = torch.export.export(
        nn.Sequential(dc.DeepControlConv2d(3, 4, 3, activation="silu", projection=1.0), net[1]).double(),
        (EXAMPLE.double(),),
        strict=strict,
    )
    assert all(node.target.namespace == "aten" for node in program.graph.nodes if node.op == "call_function")
    exported = program.module()
    exported.load_state_dict(net.state_dict())
    for model in (net, exported):
        model(EXAMPLE.double()).square().sum().backward()
    for name, parameter in net.named_parameters():
        got = exported.get_parameter(name).grad
        assert_within_budget(got, parameter.grad, parameter.grad, torch.float64, magnitude=1e3, what=name)


def test_export_under_autocast(net):
    with torch.autocast("cpu", torch.bfloat16):
        program = export(net)
        assert not our_ops(program)
        got, expected = program.module()(EXAMPLE), net(EXAMPLE)
    assert got.dtype == expected.dtype
    assert_within_budget(got, net.double()(EXAMPLE.double()), expected, got.dtype)


# Loads files of programs where the package cannot be imported, runs them on the inputs and saves what comes out.
ELSEWHERE = """
import sys

sys.modules["deepcontrol_cuda"] = None
import torch

torch.set_num_threads(2)
inputs, outputs = torch.load("inputs.pt"), {}
for name, load in (("exported", lambda f: torch.export.load(f).module()), ("traced", torch.jit.load)):
    run = load(name + ".pt2")
    outputs[name] = [run(x) for x in inputs]
try:
    torch.export.load("ops.pt2")
except RuntimeError:
    outputs["ops"] = "refused"
torch.save(outputs, "outputs.pt")
"""


def test_plain_programs_run_without_the_package(net, tmp_path):
    torch.export.save(export(net), tmp_path / "exported.pt2")
    torch.export.save(export(net, "cpu"), tmp_path / "ops.pt2")
    torch.jit.save(torch.jit.trace(net, EXAMPLE), tmp_path / "traced.pt2")
    torch.save([EXAMPLE, *OTHERS], tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    outputs = torch.load(tmp_path / "outputs.pt")
    for name in ("exported", "traced"):
        results = iter(outputs[name])
        assert_runs(lambda x, results=results: next(results), net, what=name)
    assert outputs["ops"] == "refused"


def test_traced_program_is_plain_and_takes_any_size(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net.requires_grad_(), EXAMPLE)
    graph = str(traced.inlined_graph)
    assert "aten::_convolution" in graph
    assert "deepcontrol::" not in graph
    assert "PythonOp" not in graph
    with torch.no_grad():
        assert_runs(traced, net)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_compiles_plain_layers_and_calls_our_ops(tmp_path):
    net = nn.Sequential(dc.DeepControlConv2d(3, 4, 3, padding=1, activation="relu"), dc.DeepControl2d(4, backend="cpu"))
    net.requires_grad_(False)
    program = export(net)
    assert our_ops(program) == {"deepcontrol.center.default"}
    # Fewer compilations: of headers, of optimized glue and of trials which vector instructions there are.
    quick = {
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.vec_isa_ok": True,
    }
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "net.pt2"), inductor_configs=quick
    )
    run = torch._inductor.aoti_load_package(package)
    for x in (EXAMPLE, *OTHERS):
        got = run(x)
        net[1].backend = "reference"
        with dc.backends.use("reference"):
            low, oracle = net(x), copy.deepcopy(net).double()(x.double())
        assert_within_budget(got, oracle, low, torch.float32, what=str(tuple(x.shape)))


def test_onnx_has_standard_operators_and_takes_any_size(net, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "net.onnx"
    program = torch.onnx.export(net, (EXAMPLE,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    program.save(path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    assert argument.shape == ["batch", 3, "height", "width"]
    assert_runs(lambda x: torch.from_numpy(session.run(None, {argument.name: x.numpy()})[0]), net)


def test_recorders_that_cannot_hold_our_ops_refuse_a_backend_asked_for(net):
    with dc.backends.use("cpu"):
        with pytest.raises(RuntimeError, match=r"backend 'cpu': torch\.jit\.trace cannot record its ops; ask for no"):
            torch.jit.trace(net, EXAMPLE)
        with pytest.raises(Exception, match=r"backend 'cpu': torch\.onnx\.export cannot record its ops; ask for no"):
            torch.onnx.export(net, (EXAMPLE,), dynamo=True, verbose=False)
    with dc.backends.use("reference"):
        torch.jit.trace(net, EXAMPLE)
