"""``python -m deepcontrol_cuda convert`` writes a whole file that loads as it says, or nothing and the reason."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import deepcontrol_cuda as dc
from deepcontrol_cuda import cli, files
from deepcontrol_cuda.conversion import command, layers
from deepcontrol_cuda.training.threads import one_thread
from tests.torchvision_operators import define_missing

NETS = """
from collections import OrderedDict
from pathlib import Path
from torch import nn
import deepcontrol_cuda as dc

def net(channels=8):
    (Path(__file__).parent / "built").touch()
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )

def without_norm():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

def converted():
    return nn.Sequential(dc.DeepControlConv2d(3, 8, 3))

def broken():
    raise OSError("no such luck")

def text():
    return "net"

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image, factor):
        return self.norm(self.conv(image)) * factor

def dense():
    layers = {"norm1": nn.BatchNorm2d(3), "conv1": nn.Conv2d(3, 4, 1), "norm2": nn.BatchNorm2d(4)}
    return nn.Sequential(OrderedDict(denselayer1=nn.Sequential(OrderedDict(layers))))

def squeezed():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    )

number = 3
"""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    # A file's folder is put on the path, as it is for a script.
    monkeypatch.setattr(sys, "path", list(sys.path))
    with one_thread():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of the command, with a file of models in it."""
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("some_nets", None)


def convert(*words: object, model: str = "some_nets.py:net") -> int:
    return cli.main(["convert", "--model", model, *map(str, words)])


def trained(seed: int = 0) -> nn.Module:
    """``net`` with statistics and parameters far from their initial values."""
    spec = importlib.util.spec_from_file_location("trained_nets", "some_nets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Path("built").unlink(missing_ok=True)
    model = module.net()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1.0, generator=generator)
        model[1].weight[::2].neg_()
        model.get_parameter("0.weight").sub_(0.5)
    return model.eval()


def run_code(out: str, name: str) -> object:
    """Runs the Python that the command printed, and returns the variable ``name``."""
    lines = [line.strip() for line in out.split("to load it:")[1].splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    variables: dict[str, object] = {}
    exec("\n".join(lines), variables)
    return variables[name]


def refused(capsys, *messages: str, name: str = "out") -> None:
    """Asserts that the command printed and wrote nothing, no file ``name`` either, and that its error has the rest."""
    out, error = capsys.readouterr()
    assert out == ""
    for message in messages:
        assert message in error.partition("error: ")[2]
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith((".partial", f"{name}."))]


@pytest.mark.parametrize("method", layers.METHODS)
@pytest.mark.parametrize("initialization", ["folded", "calibrated", "fresh"])
def test_the_printed_lines_load_what_was_written(folder, capsys, method, initialization):
    model = trained()
    torch.save(model.state_dict(), "weights.pt")
    images = torch.rand(8, 3, 12, 12)
    torch.save(images, "images.pt")
    given = ["--weights", "weights.pt", "--method", method, "--initialization", initialization, "--out", "out.pt"]
    assert convert(*given, *(["--batch", "images.pt"] if initialization == "calibrated" else [])) == 0
    out = capsys.readouterr().out
    assert "BatchNorm2d" in out
    assert f"out.pt: written, {Path('out.pt').stat().st_size / 1e3:.1f} kB" in out
    content = torch.load("out.pt", weights_only=True)
    assert content["model"] == "some_nets.py:net"
    assert (content["method"], content["initialization"], content["select"]) == (method, initialization, None)
    assert content["version"] == dc.__version__
    assert len(content["report"]["replaced"]) == 2
    loaded = run_code(out, "model").eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    assert loaded.state_dict().keys() == content["state_dict"].keys()
    with torch.no_grad():
        got, wanted = loaded(images), model(images)
    if initialization == "folded":
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    else:
        # The trained kernels are kept, and no statistics.
        assert (got - wanted).abs().max() > 1e-2 * wanted.abs().max()
    if initialization == "calibrated":
        first = run_code(out, "model").get_submodule("0")
        first.activation = "identity"
        deviation = first(images).std((0, 2, 3), correction=0)
        assert torch.allclose(deviation, model[1].weight.abs(), rtol=1e-2)


def test_layers_that_depend_on_the_sizes_of_maps_load_too(folder, capsys):
    assert convert("--image-size", 6, "--out", "out.pt", model="some_nets.py:squeezed") == 0
    loaded = run_code(capsys.readouterr().out, "model")
    assert [loaded[i].fixed_mean_scale for i in (0, 3)] == [None, 0.0]


def test_weights_mean_folded_and_their_agreement_is_told(folder, capsys):
    torch.save(trained().state_dict(), "weights.pt")
    assert convert("--weights", "weights.pt", "--image-size", 12, "--out", "out.pt", "--report", "report.json") == 0
    out, error = capsys.readouterr()
    difference = float(out.split("Batch Norm in evaluation: ")[1].split()[0])
    assert 0 <= difference <= 1e-5
    assert torch.load("out.pt", weights_only=True)["initialization"] == "folded"
    assert [line.split()[0] for line in error.splitlines()] == [
        "building",
        "reading",
        "converting",
        "writing",
        "writing",
    ]
    rows = json.loads(Path("report.json").read_text())["replaced"]
    assert [row["initialization"] for row in rows] == ["folded", "folded"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
        lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
    ],
    ids=["state_dict", "model-module", "module-compiled", "old-pytorch", "half"],
)
def test_checkpoints_as_people_have_them(folder, capsys, wrap):
    model = trained()
    torch.save(wrap(model.state_dict()), "weights.pth")
    assert convert("--weights", "weights.pth", "--out", "out.pth") == 0
    got = run_code(capsys.readouterr().out, "model")
    assert torch.allclose(got.get_parameter("8.weight"), model.get_parameter("8.weight"), atol=1e-3)


def test_old_files_of_densenets(folder, capsys):
    state = {
        f"denselayer1.{name}.{key}": torch.full((channels,), 2.0)
        for name, channels in (("norm.1", 3), ("norm.2", 4))
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    torch.save(state | {"denselayer1.conv.1.weight": torch.ones(4, 3, 1, 1)}, "weights.pt")
    assert convert("--weights", "weights.pt", "--out", "out.pt", model="some_nets.py:dense") == 1
    assert "1 missing: denselayer1.conv1.bias" in capsys.readouterr().err
    state |= {"denselayer1.conv.1.weight": torch.ones(4, 3, 1, 1), "denselayer1.conv.1.bias": torch.zeros(4)}
    torch.save(state, "weights.pt")
    assert convert("--weights", "weights.pt", "--out", "out.pt", model="some_nets.py:dense") == 0
    loaded = run_code(capsys.readouterr().out, "model")
    assert torch.allclose(loaded[0].norm1.gain, torch.full((3,), 2 / 2.00001**0.5))


def test_safetensors(folder, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    model = trained()
    safetensors.save_file(model.state_dict(), "weights.safetensors")
    assert convert("--weights", "weights.safetensors", "--out", "out.pt") == 0
    loaded = run_code(capsys.readouterr().out, "model").eval()
    assert torch.allclose(loaded(torch.ones(1, 3, 9, 9)), model(torch.ones(1, 3, 9, 9)), rtol=1e-5)


def test_a_checkpoint_of_another_architecture_is_described(folder, capsys):
    state = trained().state_dict()
    state["head.weight"] = state.pop("8.weight")
    torch.save(state, "weights.pt")
    Path("old.pt").write_bytes(b"old")
    assert convert("--weights", "weights.pt", "--out", "old.pt", model="some_nets.py:net(channels=16)") == 1
    refused(
        capsys,
        "another architecture",
        "1 missing: 8.weight",
        "1 unexpected: head.weight",
        "7 of another shape: 0.weight (8, 3, 3, 3) for (16, 3, 3, 3), 0.bias (8,) for (16,), 1.weight (8,) for",
    )
    assert Path("old.pt").read_bytes() == b"old"


class Opaque:
    """Not a tensor, so that a file that holds one asks for its code to be run."""


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (None, ["cannot read weights.pt", "No such file"]),
        (b"not a checkpoint", ["weights.pt cannot be read", "torch.save(model.state_dict(), file)"]),
        ({"state_dict": Opaque()}, ["weights.pt cannot be read", "wanted tensors alone"]),
        ({"epoch": 3, "loss": 0.5}, ["a dict with the keys epoch, loss", "wanted a state dict"]),
        ([1, 2], ["holds a list", "wanted a state dict"]),
        ({"state_dict": {}, "method": "deep_control", "initialization": "fresh"}, ["already converted (deep_control)"]),
    ],
    ids=["missing", "bytes", "code", "no-tensors", "list", "converted"],
)
def test_files_that_hold_no_weights(folder, capsys, content, messages):
    if isinstance(content, bytes):
        Path("weights.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, "weights.pt")
    assert convert("--weights", "weights.pt", "--out", "out.pt") == 1
    refused(capsys, "--weights", *messages)


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        ("net", ["wanted torchvision:NAME, timm:NAME, package.module:FUNCTION"]),
        ("some_nets.py:net(16)", ["options follow it as (num_classes=10), with plain values"]),
        ("some_nets.py:net(channels=net)", ["with plain values"]),
        ("some_nets.py:net(width=16)", ["TypeError", "width"]),
        ("torchvision:resnet18(weights='DEFAULT')", ["nothing is downloaded, give --weights FILE"]),
        ("absent.py:net", ["there is no file absent.py"]),
        ("some_nets.py:nets", ["has no 'nets'", "near it are net"]),
        ("some_nets.py:number", ["number of some_nets.py is a int", "wanted a function or class"]),
        ("some_nets.py:text", ["returned str, wanted a torch.nn.Module"]),
        ("some_nets.py:broken", ["OSError: no such luck", "some_nets.py, line "]),
        ("no_such_package.models:net", ["no_such_package is not installed"]),
        ("folder/file:net", ["is not installed, or not seen from here", "path/file.py:FUNCTION"]),
        ("some_nets.py:without_norm", ["no Batch Norm", "nothing was written"]),
        ("some_nets.py:converted", ["converted already", "nothing was written"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_had_or_converted(folder, capsys, model, messages):
    assert convert("--out", "out.pt", model=model) == 1
    refused(capsys, *messages)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ([], ["--out", "--dry-run"]),
        (["--out", "out.h5"], ["got out.h5", ".pt, .pth, .pt2, .onnx"]),
        (["--out", "out.pt2"], ["--out: .pt2 is made by running the model", "--image-size"]),
        (["--out", "absent/out.pt"], ["--out: cannot write into", "No such file or directory"]),
        (["--out", "taken.pt"], ["taken.pt is no file but a folder"]),
        (["--out", "out.pt", "--report", "absent/r.json"], ["--report: cannot write into"]),
        (["--out", "out.pt", "--report", "out.pt"], ["--report: got out.pt, which is --out"]),
        (["--out", "out.pt", "--initialization", "calibrated"], ["real images", "--images DIR or --batch FILE"]),
        (["--out", "out.pt", "--image-size", "8", "--example", "1,3,8,8"], ["--example and --image-size: wanted one"]),
    ],
    ids=" ".join,
)
def test_arguments_are_refused_ahead_of_the_work(folder, capsys, words, messages):
    Path("taken.pt").mkdir()
    assert convert(*words) == 1
    refused(capsys, *messages)
    assert not Path("built").exists()


def test_what_may_not_be_written_is_told_ahead_of_the_work(folder, capsys, monkeypatch):
    Path("old.pt").write_bytes(b"old")
    access = os.access
    # The superuser, as whom tests may run, may write everything.
    monkeypatch.setattr(os, "access", lambda path, mode, **options: mode != os.W_OK and access(path, mode, **options))
    assert convert("--out", "old.pt") == 1
    refused(capsys, "cannot write", "old.pt: no permission")
    assert not Path("built").exists()
    assert Path("old.pt").read_bytes() == b"old"


@pytest.mark.parametrize("place", [(command, "replace_conv_bn"), (files.os, "fsync"), (files.os, "replace")])
def test_an_interruption_leaves_no_half_of_a_file(folder, capsys, monkeypatch, place):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    Path("old.pt").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        assert convert("--out", "old.pt") == 1
    refused(capsys, "interrupted")
    assert Path("old.pt").read_bytes() == b"old"


def test_a_full_disk_is_told(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert convert("--out", "out.pt") == 1
    refused(capsys, "cannot write", "No space left on device")


def test_of_two_files_the_written_one_is_named(folder, capsys, monkeypatch):
    replace = files.replace

    def first_only(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        replace(path, content)

    monkeypatch.setattr(files, "replace", first_only)
    assert convert("--out", "out.pt", "--report", "report.json") == 1
    assert capsys.readouterr().err.endswith("error: interrupted; report.json was not written, but out.pt was\n")
    assert torch.load("out.pt", weights_only=True)["method"] == "deep_control"
    assert not Path("report.json").exists()


def test_a_link_stays_one(folder):
    Path("there").mkdir()
    Path("link.pt").symlink_to(Path("there/out.pt"))
    assert convert("--out", "link.pt") == 0
    assert Path("link.pt").is_symlink()
    assert torch.load("there/out.pt", weights_only=True)["method"] == "deep_control"


def test_a_dry_run_writes_only_the_report(folder, capsys):
    assert convert("--dry-run", "--out", "out.pt", "--report", "report.json", "--image-size", 12) == 0
    out = capsys.readouterr().out
    assert "2 replaced" in out
    assert not Path("out.pt").exists()
    rows = json.loads(Path("report.json").read_text())["replaced"]
    assert len(rows) == 2
    assert all(row["activation_bytes_before"] > row["activation_bytes_after"] for row in rows)


def test_norms_are_selected_by_name(folder, capsys):
    assert convert("--select", "4", "[5-9]", "--out", "out.pt") == 1
    refused(capsys, "got '[5-9]', which no norm or its convolution matches")
    assert convert("--select", "4", "--out", "out.pt") == 0
    loaded = run_code(capsys.readouterr().out, "model")
    assert [type(loaded[i]).__name__ for i in (1, 3)] == ["BatchNorm2d", "DeepControlConv2d"]


def test_calibration_on_a_folder_of_images(folder, capsys):
    image = pytest.importorskip("PIL.Image")
    Path("images/cats").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        image.fromarray(pixels.numpy()).save(f"images/cats/{i}.png")
    given = ["--initialization", "calibrated", "--images", "images", "--image-size", 16]
    assert convert(*given, "--out", "out.pt") == 0
    gain = torch.load("out.pt", weights_only=True)["state_dict"]["0.gain"]
    assert gain.std() > 0
    Path("images/cats/broken.png").write_bytes(b"no image")
    capsys.readouterr()
    assert convert(*given, "--out", "other.pt") == 1
    refused(capsys, "broken.png cannot be read as an image", name="other")
    Path("empty").mkdir()
    assert convert("--initialization", "calibrated", "--images", "empty", "--out", "other.pt") == 1
    refused(capsys, "--images: empty holds no images", name="other")


def test_several_arguments(folder, capsys):
    torch.save((torch.rand(2, 3, 8, 8), torch.tensor(2.0)), "batch.pt")
    assert (
        convert("--batch", "batch.pt", "--out", "out.pt", "--initialization", "folded", model="some_nets.py:Two") == 0
    )
    assert "Largest difference" in capsys.readouterr().out
    torch.save({"image": [1.0]}, "batch.pt")
    assert convert("--batch", "batch.pt", "--out", "other.pt", model="some_nets.py:Two") == 1
    refused(capsys, "--batch: batch.pt holds a dict with the keys image", "wanted the model's argument", name="other")


def test_export(folder, capsys):
    model = trained()
    torch.save(model.state_dict(), "weights.pt")
    assert convert("--weights", "weights.pt", "--image-size", 12, "--out", "out.pt2") == 0
    program = run_code(capsys.readouterr().out, "model")
    images = torch.rand(5, 3, 10, 14)
    assert torch.allclose(program(images), model(images), rtol=1e-5)


def test_files_that_are_read_are_not_written_over(folder, capsys):
    torch.save(trained().state_dict(), "weights.pt")
    before = Path("weights.pt").read_bytes()
    for option in ("--out", "--report"):
        others = () if option == "--out" else ("--out", "out.pt")
        assert convert("--weights", "weights.pt", option, "./weights.pt", *others) == 1
        refused(capsys, f"{option}: got weights.pt, which is --weights; wanted another file")
    assert Path("weights.pt").read_bytes() == before


def test_onnx(folder, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = trained()
    torch.save(model.state_dict(), "weights.pt")
    assert convert("--weights", "weights.pt", "--image-size", 12, "--out", "out.onnx") == 0
    run_code(capsys.readouterr().out, "outputs")
    session = runtime.InferenceSession("out.onnx")
    # No layer takes a mean that it multiplies by zero.
    assert "Sub" not in {node.op_type for node in importlib.import_module("onnx").load("out.onnx").graph.node}
    images = torch.rand(5, 3, 10, 14)
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(got), model(images), rtol=1e-5)


def test_what_cannot_be_exported_is_told(folder, capsys, monkeypatch):
    def unable(*_, **__):
        raise RuntimeError("data-dependent\nmuch more")

    monkeypatch.setattr(torch.export, "export", unable)
    assert convert("--image-size", 12, "--out", "out.pt2") == 1
    refused(capsys, "cannot be made into .pt2: RuntimeError: data-dependent; nothing was written")


def test_a_model_of_torchvision(folder, capsys):
    define_missing()
    pytest.importorskip("torchvision")
    given = ("--out", "out.pt", "--initialization", "folded")
    assert convert(*given, model="torchvision:shufflenet_v2_x0_5(num_classes=7)") == 0
    out = capsys.readouterr().out
    assert "56 replaced, 0 left" in out
    assert "torchvision.models.get_model('shufflenet_v2_x0_5', weights=None, num_classes=7)" in out
    assert run_code(out, "model").fc.out_features == 7
    assert convert("--out", "other.pt", model="torchvision:resnet5") == 1
    assert "torchvision has no 'resnet5'; near it are resnet" in capsys.readouterr().err


def test_a_model_of_timm(folder, capsys):
    define_missing()
    pytest.importorskip("timm")
    assert convert("--dry-run", model="timm:resnet10t") == 0
    assert "BatchNormAct2d" not in capsys.readouterr().out
    # Names of other forms would be fetched from a network.
    assert convert("--dry-run", model="timm:hf-hub:timm/resnet10t.c3_in1k") == 1
    assert "timm has no 'hf-hub:timm/resnet10t.c3_in1k'" in capsys.readouterr().err
