"""Trains one network with one method, from the first step or from a checkpoint, in one process or in many.

Everything random in an epoch follows from (seed, epoch), and for what layers draw (seed, epoch, rank), so a checkpoint
between epochs needs no state of a generator: an epoch that is done again after a kill has the same bits, on a GPU with
``deterministic`` set.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import files
from . import checkpoint, distributed
from . import data as datasets
from . import settings as options
from .conditions import conditions
from .errors import TrainingError
from .log import Log
from .methods import CALIBRATION_IMAGES, METHODS
from .settings import Settings
from .threads import one_thread

CHECKPOINT = "checkpoint.pt"
_SMALLEST_TEST_BATCH = 32
# Steps between looks at the loss where a look costs a wait, for a GPU or for other ranks.
_STEPS_PER_LOOK = 20


@dataclass(frozen=True)
class Machine:
    """Where a run is done, which may change when it is resumed."""

    data: Path | None = None
    device: str | None = None
    parallel: str | None = None
    workers: int | None = None


def train(given: dict[str, Any], machine: Machine, output: Path, resume: bool) -> None:
    """Train, and say how it went.

    Args:
        given: the options of ``settings.add_arguments`` that the user gave.
        output: folder for checkpoint, log and pictures; it must be new or empty, unless ``resume``.
        resume: go on from the checkpoint there.

    Raises:
        TrainingError: the user has to mend or to decide something; what was written before is whole.
    """
    saved = checkpoint.read(output / CHECKPOINT) if resume else None
    settings = options.new(given) if saved is None else options.resumed(saved["settings"], given)
    ranks = _start(settings, machine)
    with ExitStack() as stack:
        stack.callback(distributed.finish)
        if settings.dataset == "digits":
            stack.enter_context(one_thread())
        if ranks.rank == 0:
            stack.enter_context(_claim(output, resume))
        path = machine.data or (Path(saved["data"]) if saved and saved["data"] else None)
        data = datasets.load(settings.dataset, path, settings.image_size, _workers(machine))
        try:
            trainer = _Trainer(settings, machine, ranks, data, path, output, saved)
            stack.callback(trainer.close)
            trainer.fit(saved)
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"{error}\nTry --accumulate 2, or more, or a smaller --batch-size") from error


def default_output(given: dict[str, Any]) -> Path:
    """The folder of a run for which the user named none."""
    settings = options.new(given)
    return Path("runs") / f"{settings.dataset}-{settings.network}-{settings.method}-seed{settings.seed}"


def _start(settings: Settings, machine: Machine) -> distributed.Ranks:
    try:
        return distributed.start(machine.parallel, _device(machine), settings.batch_size // settings.accumulate)
    except ValueError as error:
        name, _, problem = str(error).partition(":")
        raise TrainingError(f"{options.option(name)}:{problem}") from error
    except RuntimeError as error:
        raise TrainingError(f"--parallel: the processes did not find each other: {error}") from error


def _device(machine: Machine) -> str:
    cuda = torch.cuda.is_available()
    name = machine.device or ("cuda" if cuda else "cpu")
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise TrainingError(f"--device: got {name}, wanted cpu, cuda or cuda and a number as in cuda:1")
    if kind == "cuda" and not (cuda and (torch.device(name).index or 0) < torch.cuda.device_count()):
        raise TrainingError(f"--device: got {name}, but PyTorch sees {torch.cuda.device_count()} GPUs")
    return name


def _workers(machine: Machine) -> int:
    if machine.workers is not None:
        if machine.workers < 0:
            raise TrainingError(f"--workers: got {machine.workers}, wanted 0 (none but this process) or more")
        return machine.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def _claim(output: Path, resume: bool) -> Iterator[None]:
    """Hold ``output``, once it is known that a run can be written into it."""
    with ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.hold(output))
            if not resume:
                if any(output.iterdir()):
                    raise TrainingError(
                        f"--output: {output} is not empty; add --resume to go on with the run in it, or name another "
                        "folder"
                    )
                files.replace(output / CHECKPOINT, b"")
                (output / CHECKPOINT).unlink()
        except BlockingIOError as error:
            raise TrainingError(
                f"--output: another run is writing into {output}; wait for its end or stop it, or name another folder"
            ) from error
        except OSError as error:
            raise TrainingError(f"--output: cannot write into {output}: {error.strerror or error}") from error
        yield


class _Trainer:
    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        ranks: distributed.Ranks,
        data: datasets.DataSet,
        path: Path | None,
        output: Path,
        saved: dict[str, Any] | None,
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        self.parallel = machine.parallel
        self.data = data
        self.path = path
        self.output = output
        self.epoch = 0 if saved is None else saved["epoch"]
        self.part_size = settings.batch_size // settings.accumulate // ranks.world_size
        self.steps_per_epoch = len(data.train) // settings.batch_size
        self.method = METHODS[settings.method]
        self._check_data(saved)
        _choose_kernels(settings, ranks.device)
        self._build(saved)
        title = f"{settings.network}, {self.method.label}, {settings.dataset}, seed {settings.seed}"
        self.log = Log(
            output if ranks.rank == 0 else None, title, [] if saved is None else saved["records"], settings.epochs,
            self.steps_per_epoch * settings.batch_size,
        )  # fmt: skip

    def _check_data(self, saved: dict[str, Any] | None) -> None:
        if not self.steps_per_epoch:
            raise TrainingError(
                f"--batch-size: got {self.settings.batch_size}, but the training images are only {len(self.data.train)}"
            )
        if saved is not None and saved["fingerprint"] != self.data.fingerprint:
            raise TrainingError(f"--data: the images or labels are not those of the run in {self.output}")

    def _build(self, saved: dict[str, Any] | None) -> None:
        settings, device = self.settings, self.ranks.device
        model = self.method.build(settings.network, self.data.channels, self.data.classes, settings.seed).to(device)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if saved is None and self.method.calibrated:
            self.method.prepare(model, self._to_device(self.data.sample(CALIBRATION_IMAGES, settings.seed)))
        self.module = distributed.wrap(model, self.parallel)
        # Behind wrap: FSDP2 replaces the parameters.
        groups = self.method.parameter_groups(model, settings.learning_rate, settings.weight_decay)
        for group in groups:
            group["initial_lr"] = group["lr"]
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, settings.learning_rate, settings.momentum)
        else:
            self.optimizer = torch.optim.AdamW(groups, settings.learning_rate)
        self.method.attach(model, self.optimizer)
        self.model = model
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        if saved is not None:
            try:
                distributed.load_state(self.module, self.optimizer, saved["model"], saved["optimizer"])
                self.scaler.load_state_dict(saved["scaler"])
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise TrainingError(
                    f"{self.output / CHECKPOINT} does not fit {settings.network} with {settings.method}; it was left "
                    f"as it is: {error}"
                ) from error
        self.forward = self.module
        if settings.compile:
            if settings.compile not in torch._dynamo.list_backends(None):
                known = ", ".join(torch._dynamo.list_backends())
                raise TrainingError(f"--compile: got {settings.compile}, this PyTorch has {known}")
            self.forward = torch.compile(self.module, backend=settings.compile)

    def _open_log(self, saved: dict[str, Any] | None) -> None:
        now = conditions(self.ranks.device)
        # Every rank draws noise of its own.
        shared = {"parallel": self.parallel, "processes": self.ranks.world_size}
        self.log.say(f"{self.log.title}: {self.data}; {self.steps_per_epoch} steps an epoch; into {self.output}")
        if saved is not None:
            last = [record for record in self.log.records if "conditions" in record][-1]
            before, after = last["conditions"] | {name: last[name] for name in shared}, now | shared
            for name in before.keys() | after.keys():
                if before.get(name) != after.get(name):
                    self.log.say(
                        f"note: {name} was {before.get(name)}, is {after.get(name)}: bits may come out otherwise"
                    )
            self.log.say(f"resumed after epoch {self.epoch}")
        self.log.add(
            "start" if saved is None else "resume", epoch=self.epoch, settings=asdict(self.settings), conditions=now,
            data=str(self.data), **shared, time=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )  # fmt: skip
        with self._writing():
            if saved is None:
                # So that a run killed in its first epoch can be resumed too, and a full disk shows before the work.
                self._save()
            self.log.write()

    def close(self) -> None:
        """Let go of the terminal and of the other processes."""
        self.log.close()
        if self.ranks.world_size > 1:
            # As ``distributed.finish`` wants it.
            self.module = self.forward = self.model = self.optimizer = None

    def fit(self, saved: dict[str, Any] | None) -> None:
        """Train to the end."""
        try:
            self._open_log(saved)
            self._fit()
        except KeyboardInterrupt:
            raise TrainingError(f"interrupted; {self._way_on}") from None
        except files.WriteError as error:
            raise TrainingError(f"{error}. When there is room, {self._way_on}") from error

    def _fit(self) -> None:
        for epoch in range(self.epoch + 1, self.settings.epochs + 1):
            started = time.perf_counter()
            train_loss, train_accuracy = self._train(epoch)
            seconds = time.perf_counter() - started
            test_loss, test_accuracy = self._test()
            step = epoch * self.steps_per_epoch
            if not math.isfinite(test_loss):
                self._diverged(epoch, step, "test", test_loss)
            speed = self.log.images / seconds
            self.log.add(
                "epoch", epoch=epoch, step=step, learning_rate=self._learning_rate(), train_loss=train_loss,
                train_accuracy=train_accuracy, test_loss=test_loss, test_accuracy=test_accuracy, seconds=seconds,
                images_per_second=speed,
            )  # fmt: skip
            with self._writing():
                self._save(epoch)
                self.log.write()
            self.log.say(
                f"epoch {epoch}/{self.settings.epochs}: loss {train_loss:.4f}, accuracy {train_accuracy:.4f}; "
                f"test loss {test_loss:.4f}, accuracy {test_accuracy:.4f}; {speed:.0f} images/s"
            )
        accuracy = self.log.epochs[-1]["test_accuracy"]
        self.log.say(f"test accuracy {accuracy:.4f} after {self.epoch} epochs; everything is in {self.output}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what only rank 0 writes: when it cannot, all ranks end here, since the others would wait for it."""
        problem = None
        try:
            yield
        except files.WriteError as error:
            problem = error
        if distributed.mean(torch.tensor(float(problem is not None), device=self.ranks.device)).item():
            raise problem or TrainingError("stopped, since rank 0 could not write; its message says why")

    @property
    def _way_on(self) -> str:
        """How to go on from what is on the disk."""
        if not (self.output / CHECKPOINT).exists():
            return f"start it again: nothing is in {self.output} yet"
        return f"{self.epoch} whole epochs are in {self.output}, the same command with --resume goes on from there"

    def _save(self, epoch: int = 0) -> None:
        model, optimizer = distributed.model_state(self.module, self.optimizer)
        if self.ranks.rank == 0:
            state = {
                "settings": asdict(self.settings),
                "data": "" if self.path is None else str(self.path.resolve()),
                "fingerprint": self.data.fingerprint,
                "epoch": epoch,
                "records": self.log.records,
                "model": model,
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
            }
            checkpoint.write(self.output / CHECKPOINT, state)
        self.epoch = epoch

    def _train(self, epoch: int) -> tuple[float, float]:
        """One epoch; mean loss, ahead of any penalty, and accuracy over its images."""
        settings = self.settings
        torch.manual_seed(datasets.derive(settings.seed, epoch, self.ranks.rank, "layers"))
        self.module.train()
        order = self.data.order(settings.seed, epoch, settings.batch_size)
        chunks = [part for batch in order for part in self.ranks.share(batch).split(self.part_size)]
        parts = self.data.train.batches(chunks, datasets.derive(settings.seed, epoch, "images"))
        wait_free = self.ranks.device.type == "cpu" and self.ranks.world_size == 1
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        steps: list[Tensor] = []
        for step in range(len(order)):
            self._set_learning_rate((epoch - 1) * self.steps_per_epoch + step)
            steps.append(self._step(list(islice(parts, settings.accumulate))))
            if wait_free or step % _STEPS_PER_LOOK == 0 or step == len(order) - 1:
                looked = distributed.mean(torch.stack(steps))
                for i, loss in enumerate(looked[:, 0].tolist()):
                    if not math.isfinite(loss):
                        self._diverged(
                            epoch, (epoch - 1) * self.steps_per_epoch + step - len(steps) + 2 + i, "training", loss
                        )
                total += looked.sum(0)
                steps.clear()
                self.log.progress(epoch, (step + 1) * settings.batch_size, total[0].item() / (step + 1))
        loss, accuracy = (total / len(order)).tolist()
        return loss, accuracy

    def _step(self, parts: list[datasets.Batch]) -> Tensor:
        """One step of the optimizer over the ``parts`` of a batch; returns loss and accuracy, (2,) float64."""
        self.optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for i, (images, labels) in enumerate(parts):
            last = i == len(parts) - 1
            # Under DDP the gradients of a batch are reduced once.
            with nullcontext() if last else getattr(self.module, "no_sync", nullcontext)():
                logits, labels = self._logits(images, labels)
                loss = F.cross_entropy(logits, labels)
                sums += torch.stack((loss.detach(), (logits.argmax(1) == labels).float().mean()))
                loss = loss / len(parts)
                penalty = self.method.penalty(self.model) if last else None
                if penalty is not None:
                    loss = loss + penalty
                self.scaler.scale(loss).backward()
        if self.settings.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return sums / len(parts)

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Mean loss and accuracy over the test images, of the model as it is saved."""
        distributed.share_buffers(self.model)
        self.module.eval()
        count, ranks = len(self.data.test), self.ranks.world_size
        # Every rank takes as many batches, since a forward may wait for the others; what is too many is not counted.
        indices = self.ranks.share(torch.arange(-(-count // ranks) * ranks))
        chunks = indices.split(max(self.part_size, _SMALLEST_TEST_BATCH))
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for chunk, (images, labels) in zip(chunks, self.data.test.batches([c % count for c in chunks], None)):
            logits, labels = self._logits(images, labels)
            counted = (chunk < count).to(self.ranks.device)
            losses = F.cross_entropy(logits, labels, reduction="none")
            total += torch.stack((losses[counted].sum(), (logits.argmax(1) == labels)[counted].sum()))
        loss, accuracy = (distributed.mean(total) * ranks / count).tolist()
        return loss, accuracy

    def _logits(self, images: Tensor, labels: Tensor) -> datasets.Batch:
        """Logits (N, classes) float32, and labels on the device."""
        device = self.ranks.device
        images, labels = self._to_device(self.data.normalise(images.to(device, non_blocking=True))), labels.to(device)
        amp = self.settings.amp
        with torch.autocast(device.type, getattr(torch, amp)) if amp else nullcontext():
            logits = self.forward(images)
        return logits.float(), labels

    def _to_device(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        return images.to(self.ranks.device, memory_format=layout)

    def _learning_rate(self) -> float:
        """Of the last step, in the group where it is highest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _set_learning_rate(self, step: int) -> None:
        factor = self.settings.factor(step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _diverged(self, epoch: int, step: int, part: str, loss: float) -> None:
        """Keep in the log that the run ended, and raise."""
        self.log.add("stop", epoch=epoch, step=step, reason=f"{part} loss is {loss}")
        self.log.write()
        other = " or --amp bfloat16" if self.settings.amp == "float16" else ""
        raise TrainingError(
            f"the {part} loss is {loss} at step {step}, in epoch {epoch}, with learning rate "
            f"{self._learning_rate():g}; the log and the checkpoint of {self.epoch} whole epochs are in "
            f"{self.output}. In a new --output try a lower --learning-rate, --warmup 1, --clip-grad-norm 1{other}"
        )


def _choose_kernels(settings: Settings, device: torch.device) -> None:
    if device.type == "cuda":
        # cuBLAS reads it when it starts.
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(settings.deterministic)
        torch.backends.cudnn.benchmark = not settings.deterministic
