"""What the command ``convert`` starts from: a model by its name, weights, images and arguments out of files."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

FORMS = "torchvision:NAME, timm:NAME, package.module:FUNCTION or path/file.py:FUNCTION"
_OPTIONS = "options follow it as (num_classes=10)"
# Those that would fetch weights from a network.
_FETCHING = ("weights", "weights_backbone", "pretrained", "pretrained_cfg")
# Where training scripts keep the state dict inside a checkpoint, and what wrappers put in front of its keys.
_NESTED = ("state_dict", "model", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# The files of torchvision's DenseNets are older than its names.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_SHOWN = 3


class InputError(Exception):
    """A model, a file or an argument is not what it must be; the message says what came, what is wanted, what helps."""


@dataclass(frozen=True)
class Source:
    """A model's name: ``place`` is "torchvision", "timm", a module's name or a file's path."""

    place: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Source:
        """Raises ``InputError`` for a text of another form."""
        found = re.fullmatch(r"(timm|torchvision|.+):([^()]+?)(?:\((.*)\))?", text)
        if found is None:
            raise InputError(f"--model: got {text!r}, wanted {FORMS}; {_OPTIONS}")
        place, name, options = found.groups()
        return cls(place, name, _options(options or "", text))

    def build(self) -> nn.Module:
        """The model in training mode as its author starts it; nothing is downloaded.

        Raises:
            InputError: the package or file cannot be imported, has no such name, or what it makes is no module.
        """
        if self.place == "torchvision":
            builder = _torchvision(self.name)
            function = partial(builder, **dict.fromkeys(_weight_options(builder)))
        elif self.place == "timm":
            function = partial(_timm().create_model, _timm_name(self.name), pretrained=False)
        else:
            function = self._function()
        model = _call(lambda: function(**self.options), f"{self.place}:{self.name}")
        if not isinstance(model, nn.Module):
            raise InputError(
                f"--model: {self.name} of {self.place} returned {type(model).__name__}, wanted a torch.nn.Module"
            )
        return model

    def code(self) -> tuple[str, str]:
        """Python: a module to import, and an expression that makes the model again."""
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        if self.place == "torchvision":
            weights = [f"{option}=None" for option in _weight_options(_torchvision(self.name))]
            return "torchvision", f"torchvision.models.get_model({', '.join([repr(self.name), *weights, *options])})"
        if self.place == "timm":
            return "timm", f"timm.create_model({', '.join([repr(self.name), *options])})"
        if self._is_file:
            return "runpy", f"runpy.run_path({self.place!r})[{self.name!r}]({', '.join(options)})"
        return self.place, f"{self.place}.{self.name}({', '.join(options)})"

    @property
    def _is_file(self) -> bool:
        return self.place.endswith(".py")

    def _function(self) -> Callable[..., object]:
        if self._is_file:
            if not Path(self.place).is_file():
                raise InputError(f"--model: there is no file {self.place}")
            module = _run(Path(self.place))
        else:
            module = _import(self.place)
        names = [name for name in dir(module) if not name.startswith("_")]
        if not hasattr(module, self.name):
            raise InputError(f"--model: {self.place} has no {self.name!r}{_nearest(self.name, names)}")
        found = getattr(module, self.name)
        if not callable(found):
            raise InputError(
                f"--model: {self.name} of {self.place} is a {type(found).__name__}, wanted a function or class that "
                "makes the model"
            )
        return found


def _options(text: str, model: str) -> dict[str, Any]:
    """The keyword arguments in ``text``, numbers, strings and the like alone."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise InputError(f"--model: got {model!r}; {_OPTIONS}, with plain values") from error
    if fetching := [name for name in options if name in _FETCHING]:
        raise InputError(f"--model: got the option {fetching[0]}; nothing is downloaded, give --weights FILE")
    return options


def _torchvision(name: str) -> Callable[..., nn.Module]:
    models = _import("torchvision.models")
    if name not in models.list_models():
        raise InputError(f"--model: torchvision has no {name!r}{_nearest(name, models.list_models())}")
    return models.get_model_builder(name)


def _weight_options(builder: Callable) -> list[str]:
    """Those that would download something; detection and segmentation have a second one, and it is not None."""
    return [name for name in inspect.signature(builder).parameters if name in _FETCHING]


def _timm() -> ModuleType:
    return _import("timm")


def _timm_name(name: str) -> str:
    timm = _timm()
    # Names of other forms are those of files and of a hub.
    if not timm.is_model(name):
        raise InputError(f"--model: timm has no {name!r}{_nearest(name, timm.list_models())}")
    return name


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not (name == missing or name.startswith(f"{missing}.")):
            raise InputError(f"--model: importing {name} failed: {error}") from error
        raise InputError(f"--model: {missing} is not installed, or not seen from here; wanted {FORMS}") from error
    except Exception as error:  # a module may do anything when it is imported
        raise InputError(f"--model: importing {name} failed: {_reason(error)}") from error


def _run(path: Path) -> ModuleType:
    """The file as a module, which is found under its name where no other has that."""
    # As a script has it: what lies beside the file can be imported.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    _call(lambda: spec.loader.exec_module(module), str(path))
    return module


def _call(function: Callable[[], Any], what: str) -> Any:
    try:
        return function()
    except Exception as error:  # the user's own code
        raise InputError(f"--model: {what} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), 3, 0.5)
    return f"; near it are {', '.join(near)}" if near else ""


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the state dict in ``path`` into ``model``.

    The file is one of ``torch.save`` (a state dict, or a dict that holds one under "state_dict", "model" or
    "model_state_dict") or of safetensors; "module." and the like in front of all keys is dropped. No code in it is run.

    Raises:
        InputError: the file cannot be read, or does not fit the model, which is then as it was.
    """
    wanted = set(model.state_dict())
    state = _without_prefix(_state_dict(_read(path, "--weights"), path), wanted)
    state = {key if key in wanted else _OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    _check_fit(model, state, path)
    model.load_state_dict(state, strict=False)


def _read(path: Path, argument: str) -> object:
    """What a file of ``torch.save`` or safetensors holds, on the CPU."""
    try:
        if path.suffix.lower() == ".safetensors":
            if importlib.util.find_spec("safetensors") is None:
                raise InputError(f"{argument}: {path} needs safetensors: pip install safetensors")
            return importlib.import_module("safetensors.torch").load_file(path)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"{argument}: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # what bytes that mean nothing make of the readers is anything
        raise InputError(
            f"{argument}: {path} cannot be read: {str(error).partition(chr(10))[0] or type(error).__name__}; wanted "
            "tensors alone, as torch.save(model.state_dict(), file) writes them"
        ) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and {"state_dict", "method", "initialization"} <= content.keys():
        raise InputError(
            f"--weights: {path} holds a model that is already converted ({content['method']}); wanted the weights of "
            "the model with Batch Norm"
        )
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = isinstance(content, Mapping) and {
        key: value for key, value in content.items() if isinstance(value, Tensor)
    }
    if not tensors:
        raise InputError(
            f"--weights: {path} holds {_kind(content)}, wanted a state dict, alone or under {', '.join(_NESTED)}"
        )
    return tensors


def _kind(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [str(key) for key in content]
    return f"a dict with the keys {_some(keys)}" if keys else "an empty dict"


def _without_prefix(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Strips what wrappers add, but nothing that the model's own keys begin with."""
    for prefix in (prefix for _ in _PREFIXES for prefix in _PREFIXES):
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in wanted):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    # Files older than PyTorch 0.4 lack this counter, which nothing here uses.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(value.shape)} for {wanted[key]}"
        for key, value in state.items()
        if key in wanted and tuple(value.shape) != wanted[key]
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if not any(wrong.values()):
        return
    lines = [f"  {len(keys)} {what}: {_some(keys)}" for what, keys in wrong.items() if keys]
    fitting = len(wanted) - len(missing) - len(shapes)
    raise InputError(
        f"--weights: {path} is of another architecture than --model: {fitting} of the model's {len(wanted)} tensors "
        "are in it\n"
        + "\n".join(lines)
        + "\n  a model of another size is named with its options, as torchvision:resnet50(num_classes=10)"
    )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def read_batch(path: Path) -> Tensor | tuple | list | dict:
    """The model's argument, or a tuple, list or mapping of its arguments, from a file of ``torch.save``.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    content = _read(path, "--batch")
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (tuple, list)) else None
    values = [content] if parts is None else list(parts)
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise InputError(
            f"--batch: {path} holds {_kind(content)}, wanted the model's argument, a tensor, or a tuple, list or dict "
            "of its arguments"
        )
    return content
