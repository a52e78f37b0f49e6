"""Python of README.md that converts and ships a model runs as it is pasted, each snippet in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.torchvision_operators import define_missing

define_missing()
torchvision = pytest.importorskip("torchvision")

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def snippets(heading: str) -> list[str]:
    section = README.partition(f"\n{heading}\n")[2]
    found = re.findall(r"```python\n(.*?)```", re.split(r"\n##", section)[0], re.DOTALL)
    assert found, heading
    return found


@pytest.fixture
def paste(monkeypatch, tmp_path):
    """Runs a snippet with names of its own, in an empty folder, with a smaller network and smaller images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "resnet50", lambda weights=None: torchvision.models.resnet18())

    def run(snippet: str) -> dict:
        names = {}
        exec(re.sub(r"\d, 3, 224, 224", "2, 3, 64, 64", snippet), names)
        return names

    return run


def test_convert(paste, capsys):
    first, second = snippets("## Convert a model")
    assert len(paste(first)["report"].replaced) == 20
    assert "BatchNorm" in capsys.readouterr().out
    paste(second)


@pytest.mark.slow
def test_ship(paste, tmp_path):
    pytest.importorskip("onnxscript")
    (snippet,) = snippets("### Ship it")
    paste(snippet)
    assert {path.name for path in tmp_path.iterdir()} >= {"small.pt", "model.onnx", "model.ts"}
