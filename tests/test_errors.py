"""Bad input is refused before anything is computed, by a message that names the argument, what came and what fits."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import on_every_backend

import deepcontrol_cuda as dc

deep_control = dc.functional.deep_control
conv1d, conv2d, conv3d = (
    dc.functional.deep_control_conv1d,
    dc.functional.deep_control_conv2d,
    dc.functional.deep_control_conv3d,
)
X = torch.ones(2, 4, 5, 5)
W = torch.ones(8, 4, 3, 3)
Y = torch.ones(2, 8, 3, 3)
NUMBERS = (TypeError, ValueError)

# Each row: what is wrong, the call, the exception, and what its message must hold in this order.
BAD_CALLS = [
    ("input-list", lambda **b: deep_control([1.0], **b), TypeError, ("input", "list", "tensor")),
    ("input-int", lambda **b: deep_control(X.int(), **b), TypeError, ("input", "int32", "float32")),
    ("input-complex", lambda **b: deep_control(X + 0j, **b), TypeError, ("input", "complex64", "float32")),
    ("input-2-dimensions", lambda **b: deep_control(X[0, 0], **b), ValueError, ("input", r"\(5, 5\)", "N, C")),
    ("input-6-dimensions", lambda **b: deep_control(X[..., None, None], **b), ValueError, ("input", "1 to 3 spatial")),
    ("conv1d-rank", lambda **b: conv1d(X, W, **b), ValueError, ("input", r"\(2, 4, 5, 5\)", r"\(N, C, L\)")),
    ("conv2d-rank", lambda **b: conv2d(X[0], W, **b), ValueError, ("input", r"\(4, 5, 5\)", r"\(N, C, H, W\)")),
    ("conv3d-rank", lambda **b: conv3d(X, W, **b), ValueError, ("input", r"\(2, 4, 5, 5\)", r"\(N, C, D, H, W\)")),
    ("empty-map", lambda **b: deep_control(X[:, :, :0], **b), ValueError, ("input", r"\(2, 4, 0, 5\)", "one pixel")),
    ("conv-empty-map", lambda **b: conv2d(X[:, :, :0], W, **b), ValueError, ("input", r"\(0, 5\)", "wanted")),
    (
        "conv-empty-map-padded",
        lambda **b: conv2d(X[:, :, :0], W[..., :1, :1], None, None, None, 1, 1, **b),
        ValueError,
        ("input", r"\(0, 5\)", "wanted"),
    ),
    ("kernel-too-large", lambda **b: conv2d(X[..., :2], W, **b), ValueError, ("input", r"\(5, 2\)", r"\(3, 3\)")),
    ("kernel-empty", lambda **b: conv2d(X, W[..., :0], **b), ValueError, ("weight", r"\(8, 4, 3, 0\)", "wanted")),
    ("weight-list", lambda **b: conv2d(X, [1.0], **b), TypeError, ("weight", "list", "tensor")),
    ("weight-rank", lambda **b: conv2d(X, W[0], **b), ValueError, ("weight", r"\(4, 3, 3\)", "4 dimensions")),
    ("weight-channels", lambda **b: conv2d(X, W[:, :3], **b), ValueError, ("weight", "3", "4", "channels of input")),
    ("weight-dtype", lambda **b: conv2d(X, W.double(), **b), TypeError, ("weight", "float64", "float32")),
    ("weight-int", lambda **b: conv2d(X, W.long(), **b), TypeError, ("weight", "int64", "float32")),
    ("weight-device", lambda **b: conv2d(X, W.to("meta"), **b), ValueError, ("weight", "meta", "cpu")),
    ("gain-float", lambda **b: deep_control(X, 2.0, **b), TypeError, ("gain", "float", "tensor or None")),
    ("gain-length", lambda **b: conv2d(X, W, torch.ones(4), **b), ValueError, ("gain", r"\(4,\)", r"\(8,\) or \(1,\)")),
    ("gain-scalar", lambda **b: deep_control(X, torch.ones(()), **b), ValueError, ("gain", r"\(\)", r"\(4,\)")),
    ("gain-dtype", lambda **b: deep_control(X, torch.ones(4).double(), **b), TypeError, ("gain", "float64", "float32")),
    ("gain-int", lambda **b: deep_control(X, torch.ones(4).int(), **b), TypeError, ("gain", "int32", "float32")),
    (
        "gain-half-beside-bfloat16",
        lambda **b: deep_control(X.bfloat16(), torch.ones(4).half(), **b),
        TypeError,
        ("gain", "float16", "float32 or torch.bfloat16"),
    ),
    (
        "gain-device",
        lambda **b: deep_control(X, torch.ones(4, device="meta"), **b),
        ValueError,
        ("gain", "meta", "cpu"),
    ),
    ("mean-scale-length", lambda **b: deep_control(X, None, torch.ones(5), **b), ValueError, ("mean_scale", r"\(5,\)")),
    (
        "mean-scale-str",
        lambda **b: deep_control(X, None, "1", **b),
        TypeError,
        ("mean_scale", "str", "a float or None"),
    ),
    (
        "bias-shape",
        lambda **b: deep_control(X, bias=torch.ones(4, 1), **b),
        ValueError,
        ("bias", r"\(4, 1\)", r"\(4,\)"),
    ),
    (
        "mean-scale-device",
        lambda **b: deep_control(X, None, torch.ones(4, device="meta"), **b),
        ValueError,
        ("mean_scale", "meta", "cpu"),
    ),
    (
        "conv-bias-device",
        lambda **b: conv2d(X, W, bias=torch.ones(8, device="meta"), **b),
        ValueError,
        ("bias", "meta", "cpu"),
    ),
    (
        "conv-residual-device",
        lambda **b: conv2d(X, W, residual=Y.to("meta"), **b),
        ValueError,
        ("residual", "meta", "cpu"),
    ),
    ("input-device", lambda **b: conv2d(X.to("meta"), W, **b), ValueError, ("weight: is on cpu", "input, meta")),
    (
        "center-input-device",
        lambda **b: deep_control(X.to("meta"), torch.ones(4), **b),
        ValueError,
        ("gain: is on cpu", "input, meta"),
    ),
    ("bias-list", lambda **b: conv2d(X, W, bias=[0.0] * 8, **b), TypeError, ("bias", "list", "tensor or None")),
    ("residual-float", lambda **b: deep_control(X, residual=1.0, **b), TypeError, ("residual", "float", "tensor")),
    (
        "residual-shape",
        lambda **b: conv2d(X, W, residual=X, **b),
        ValueError,
        ("residual", r"\(2, 4, 5, 5\)", r"\(2, 8, 3, 3\)"),
    ),
    ("residual-batch", lambda **b: deep_control(X, residual=X[:1], **b), ValueError, ("residual", r"\(1,", r"\(2,")),
    ("residual-dtype", lambda **b: conv2d(X, W, residual=Y.half(), **b), TypeError, ("residual", "float16", "float32")),
    (
        "residual-device",
        lambda **b: deep_control(X, residual=X.to("meta"), **b),
        ValueError,
        ("residual", "meta", "cpu"),
    ),
    ("groups-filters", lambda **b: conv2d(X, W, groups=3, **b), ValueError, ("groups", "3", "8 filters")),
    ("groups-zero", lambda **b: conv2d(X, W, groups=0, **b), ValueError, ("groups", "0", "positive")),
    ("groups-float", lambda **b: conv2d(X, W, groups=2.0, **b), ValueError, ("groups", "2.0", "positive")),
    (
        "groups-channels",
        lambda **b: conv2d(X, W, groups=2, **b),
        ValueError,
        ("weight", "2 groups", "channels of input"),
    ),
    ("stride-zero", lambda **b: conv2d(X, W, stride=0, **b), ValueError, ("stride", "0", "2 integers of at least 1")),
    ("stride-count", lambda **b: conv2d(X, W, stride=(1, 1, 1), **b), ValueError, ("stride", r"\(1, 1, 1\)", "2 int")),
    ("stride-float", lambda **b: conv2d(X, W, stride=1.5, **b), NUMBERS, ("stride", "1.5", "integers")),
    ("stride-floats", lambda **b: conv2d(X, W, stride=(1.0, 1.0), **b), NUMBERS, ("stride", r"\(1.0,", "integers")),
    ("stride-str", lambda **b: conv2d(X, W, stride="2", **b), NUMBERS, ("stride", "'2'", "integers")),
    (
        "dilation-zero",
        lambda **b: conv2d(X, W, dilation=(1, 0), **b),
        ValueError,
        ("dilation", r"\(1, 0\)", "at least 1"),
    ),
    ("padding-negative", lambda **b: conv2d(X, W, padding=-1, **b), ValueError, ("padding", "-1", "at least 0")),
    ("padding-none", lambda **b: conv2d(X, W, padding=None, **b), NUMBERS, ("padding", "None", "integers")),
    ("padding-str", lambda **b: conv2d(X, W, padding="full", **b), ValueError, ("padding", "'full'", "'same'")),
    (
        "same-strided",
        lambda **b: conv2d(X, W, stride=2, padding="same", **b),
        ValueError,
        ("padding", "'same'", "stride 1"),
    ),
    ("projection-large", lambda **b: conv2d(X, W, projection=1.5, **b), ValueError, ("projection", "1.5", "0 to 1")),
    (
        "projection-nan",
        lambda **b: conv2d(X, W, projection=float("nan"), **b),
        ValueError,
        ("projection", "nan", "0 to 1"),
    ),
    ("projection-str", lambda **b: conv2d(X, W, projection="all", **b), NUMBERS, ("projection", "'all'", "0 to 1")),
    (
        "activation",
        lambda **b: deep_control(X, activation="tanh", **b),
        ValueError,
        ("activation", "'tanh'", "hardswish"),
    ),
    ("conv-activation", lambda **b: conv2d(X, W, activation=None, **b), ValueError, ("activation", "None", "identity")),
]


@pytest.mark.parametrize("name", dc.backends.BACKENDS)
@pytest.mark.parametrize(("call", "exception", "words"), [row[1:] for row in BAD_CALLS], ids=[r[0] for r in BAD_CALLS])
def test_bad_call(monkeypatch, name, call, exception, words):
    computed = lambda *_, **__: pytest.fail("something was computed")  # noqa: E731
    for place, function in (
        (dc.functional.autograd, "center"),
        (dc.functional.autograd, "conv_center"),
        (dc.functional.reference, "deep_control"),
        (dc.functional.reference, "deep_control_conv"),
        (torch.nn.functional, "pad"),
    ):
        monkeypatch.setattr(place, function, computed)
    with pytest.raises(exception) as caught:
        call(backend=name)
    assert re.search(".*".join(words), str(caught.value)), str(caught.value)


def test_unknown_backend():
    for call in (deep_control, lambda x, backend: conv2d(x, W, backend=backend)):
        with pytest.raises(ValueError, match="backend: got 'cudnn', wanted one of reference, cpu, cuda"):
            call(X, backend="cudnn")


@pytest.mark.parametrize(
    ("build", "exception", "message"),
    [
        (lambda: dc.DeepControl2d(0), ValueError, "num_features: got 0"),
        (lambda: dc.DeepControl2d(4, activation="tanh"), ValueError, "activation: got 'tanh'"),
        (lambda: dc.DeepControlConv2d(4, 8, 3, activation="tanh"), ValueError, "activation: got 'tanh'"),
        (lambda: dc.DeepControlConv2d(4, 8, 3, projection=-0.1), ValueError, "projection: got -0.1"),
        (lambda: dc.DeepControl2d(4)(X[0]), ValueError, r"input: got shape \(4, 5, 5\), wanted \(N, 4, "),
        (lambda: dc.DeepControl1d(4)(X), ValueError, r"input: got shape \(2, 4, 5, 5\), wanted .* 1 spatial"),
        (lambda: dc.DeepControl2d(3)(X), ValueError, r"input: got shape \(2, 4, 5, 5\), wanted \(N, 3, "),
        (lambda: dc.DeepControlConv2d(3, 8, 3)(X), ValueError, "weight: got 3 input channels"),
        (lambda: dc.DeepControlConv2d(4, 8, 3, dtype=torch.float64)(X), TypeError, "weight: got dtype torch.float64"),
        (lambda: dc.project_kernel_gradients_([1.0]), TypeError, "parameters: got float, wanted tensors"),
        (lambda: dc.project_kernel_gradients_(W, 1.5), ValueError, "weight: got 1.5, wanted a number from 0 to 1"),
    ],
    ids=[
        "features", "activation", "conv-activation", "projection", "unbatched", "rank", "channels", "conv-channels",
        "dtype", "parameters", "weight",
    ],
)  # fmt: skip
def test_modules_refuse_too(build, exception, message):
    with pytest.raises(exception, match=message):
        build()


# The dispatcher ops have callers that the functions above do not protect: each bad call must be refused, since with
# wrong shapes a kernel reads outside of its tensors. They run in a process of their own, so that one that crashes is a
# failure with a name and not the end of the test run.
RAW_BACKENDS = {
    "cpu": "ops = torch.ops.deepcontrol",
    "host_cuda": "import conftest; conftest.harness(); ops = torch.ops.deepcontrol_host_cuda",
    "cuda": "torch.set_default_device('cuda'); ops = torch.ops.deepcontrol",
}
RAW_SETUP = """
import torch, deepcontrol_cuda
{backend}
x, w, g = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3), torch.randn(2, 8, 3, 3)
means, none, everything = torch.randn(2, 8), torch.empty(0), [True] * 6
byte = torch.zeros(1, dtype=torch.uint8)
# One tap in channels_last is the way through the fused kernels.
cl = torch.channels_last
x1, g1 = (torch.randn(2, 64, 5, 5).to(memory_format=cl) for _ in range(2))
w1 = torch.randn(64, 64, 1, 1)
means1, bits1 = torch.randn(2, 64), torch.zeros(2, 25, 8, dtype=torch.uint8)

def center(input=x, gain=None, mean_scale=None, bias=None, residual=None, activation="identity"):
    return ops.center(input, gain, mean_scale, 1.0, bias, residual, activation, 0.0, True)

def with_mean(input=x, bias=None, residual=None):
    return ops.center_with_mean(input, None, None, 1.0, bias, residual, "relu", 0.0, True)

def center_backward(grad=x, input=x, gain=None, map_mean=means[:, :4], saved=none, activation="identity"):
    return ops.center_backward(grad, input, gain, None, 1.0, map_mean, saved, activation, 0.0, everything[:5])

def conv(input=x, weight=w, gain=None, residual=None, stride=(1, 1), groups=1):
    geometry = (stride, (0, 0), (1, 1), groups)
    return ops.conv_center(input, weight, gain, None, 1.0, None, residual, *geometry, "relu", 0.0, True)

def conv_backward(grad=g, input=x, weight=w, gain=None, map_mean=means, saved=none, act="identity", mask=everything):
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    return ops.conv_center_backward(
        grad, input, weight, gain, None, 1.0, map_mean, saved, *geometry, act, 0.0, 0.0, mask
    )

def one_tap(input=x1, weight=w1):
    return conv(input, weight)

def one_tap_backward(grad=g1, input=x1, weight=w1, gain=torch.ones(64), map_mean=means1, saved=none, act="identity"):
    return conv_backward(grad, input, weight, gain, map_mean, saved, act)

def window_mean(input=x, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
    return ops.window_mean(input, kernel, stride, padding, dilation)
"""
BAD_OP_CALLS = {
    "center-1-dimension": "center(torch.randn(3))",
    "center-int": "center(x.int())",
    "center-vector-length": "center(bias=torch.ones(3))",
    "center-residual-shape": "center(residual=x[:1])",
    "center-residual-dtype": "center(residual=x.double())",
    "center-activation": "center(activation='tanh')",
    "center_with_mean-1-dimension": "with_mean(torch.randn(3))",
    "center_with_mean-vector-length": "with_mean(bias=torch.ones(3))",
    "center_with_mean-residual-shape": "with_mean(residual=x[:1])",
    "center_backward-1-dimension": "center_backward(torch.randn(3))",
    "center_backward-bits-shape": "center_backward(saved=byte, activation='relu')",
    "center_backward-pre_activation-shape": "center_backward(saved=x[:1], activation='silu')",
    "center_backward-pre_activation-dtype": "center_backward(saved=x.bfloat16(), activation='silu')",
    "center_backward-input-missing": "center_backward(input=None)",
    "center_backward-input-shape": "center_backward(input=x[:1, :1])",
    "center_backward-input-dtype": "center_backward(input=x.bfloat16())",
    "center_backward-map_mean-shape": "center_backward(map_mean=torch.randn(1, 1))",
    "center_backward-gain-length": "center_backward(gain=torch.ones(3))",
    "conv-weight-channels": "conv(weight=w[:, :3])",
    "conv-weight-rank": "conv(weight=w[..., 0])",
    "conv-weight-dtype": "conv(weight=w.double())",
    "conv-gain-length": "conv(gain=torch.ones(3))",
    "conv-residual-shape": "conv(residual=x)",
    "conv-stride-zero": "conv(stride=(0, 0))",
    "conv-stride-count": "conv(stride=(1, 1, 1))",
    "conv-groups-zero": "conv(groups=0)",
    "conv-unbatched": "conv(x[0])",
    "conv_backward-grad-channels": "conv_backward(torch.randn(2, 4096, 3, 3), gain=torch.ones(8))",
    "conv_backward-grad-channels-vectors-only":
        "conv_backward(torch.randn(2, 4_000_000, 1, 1), gain=torch.ones(8), mask=[False] * 3 + [True] * 3)",
    "conv_backward-grad-maps": "conv_backward(torch.randn(2, 8, 5, 5))",
    "conv_backward-grad-batch": "conv_backward(torch.randn(3, 8, 3, 3))",
    "conv_backward-grad-dtype": "conv_backward(g.double())",
    "conv_backward-grad-rank": "conv_backward(g[..., 0])",
    "conv_backward-input-batch": "conv_backward(input=x[:1])",
    "conv_backward-weight-filters": "conv_backward(weight=w[:5])",
    "conv_backward-weight-kernel": "conv_backward(weight=w[..., :2, :2])",
    "conv_backward-bits": "conv_backward(act='relu')",
    "conv_backward-pre_activation-dtype": "conv_backward(saved=g.half(), act='silu')",
    "conv_backward-map_mean-shape": "conv_backward(map_mean=torch.randn(1, 1))",
    "one_tap-weight-dtype": "one_tap(weight=w1.bfloat16())",
    "one_tap-weight-rank": "one_tap(weight=w1[..., 0])",
    "one_tap_backward-grad-batch": "one_tap_backward(g1[:1])",
    "one_tap_backward-grad-maps": "one_tap_backward(g1[..., :1, :1])",
    "one_tap_backward-grad-channels": "one_tap_backward(g1[:, :2])",
    "one_tap_backward-grad-dtype": "one_tap_backward(g1.bfloat16())",
    "one_tap_backward-input-batch": "one_tap_backward(input=x1[:1])",
    "one_tap_backward-weight-filters": "one_tap_backward(weight=w1[:32], gain=None)",
    "one_tap_backward-weight-dtype": "one_tap_backward(weight=w1.bfloat16())",
    "one_tap_backward-bits": "one_tap_backward(saved=bits1[:1], act='relu')",
    "window_mean-stride-zero": "window_mean(stride=(0, 0))",
    "window_mean-stride-negative": "window_mean(stride=(-1, -1))",
    "window_mean-kernel-zero": "window_mean(kernel=(0, 3))",
    "window_mean-dilation-negative": "window_mean(dilation=(-5, -5))",
    "window_mean-padding-negative": "window_mean(kernel=(1, 1), padding=(-2, -2))",
    "window_mean-kernel-too-large": "window_mean(kernel=(9, 9))",
    "window_mean-kernel-count": "window_mean(kernel=(3,))",
    "window_mean-int": "window_mean(x.int())",
    "finish_weight_grad-shape": "ops.finish_weight_grad_(w.clone(), w[:3], None, None, 0.9)",
    "finish_weight_grad-dtype": "ops.finish_weight_grad_(w.clone(), w.double(), None, None, 0.9)",
    "finish_weight_grad-gain-length": "ops.finish_weight_grad_(w.clone(), w, torch.ones(3), None, 0.9)",
    "project-int": "ops.project_kernel_gradients_([w.int()], 0.9)",
}  # fmt: skip
RAW_LOOP = """
import sys
cases = {cases!r}
for name in list(cases)[int(sys.argv[1]):]:
    print(name, end=": ", flush=True)
    try:
        eval(cases[name])
        print("accepted", flush=True)
    except Exception as error:
        print("refused", type(error).__name__, str(error).splitlines()[0], flush=True)
"""


@functools.cache
def verdicts(backend: str) -> dict[str, str]:
    """What each of BAD_OP_CALLS came to: "refused ...", "accepted" or "crashed ..."."""
    script = RAW_SETUP.format(backend=RAW_BACKENDS[backend]) + RAW_LOOP.format(cases=BAD_OP_CALLS)
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    found = {}
    while len(found) < len(BAD_OP_CALLS):
        command = [sys.executable, "-c", script, str(len(found))]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = run.stdout.splitlines()
        assert lines, run.stderr
        if run.returncode:
            lines[-1] += f"crashed with {run.returncode}"
        found.update(line.split(": ", 1) for line in lines)
    return found


@on_every_backend
@pytest.mark.parametrize("name", BAD_OP_CALLS)
def test_bad_op_call(backend, name):
    verdict = verdicts(backend)[name]
    assert verdict.startswith("refused"), f"{BAD_OP_CALLS[name]}: {verdict}"
