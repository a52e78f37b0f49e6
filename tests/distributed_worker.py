"""One rank of the pair that tests/test_distributed.py starts: trains small nets, writes down what came out.

``python distributed_worker.py FOLDER`` with the environment of ``torchrun``; results go to FOLDER/rank<n>.pt. All is in
float64 but what the train command does, and each rank computes what a single process would give too.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deepcontrol_cuda as dc
from deepcontrol_cuda.training import distributed
from deepcontrol_cuda.training.methods import METHODS
from deepcontrol_cuda.training.networks import Architecture, BasicBlock

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

# One filter leaves the second rank without any, five are three and two.
NETWORK = Architecture(BasicBlock, (1, 5), (1, 2))
BATCH, STEPS = 8, 3
CASES = {
    "none": METHODS["none"],
    "deep_control": METHODS["deep_control"],
    "mean_shift_rejection": METHODS["mean_shift_rejection_noise_off"],
    "hooks": METHODS["none"],
    "noise": METHODS["mean_shift_rejection"],
    "batch_norm": METHODS["batch_norm"],
    "sync_batch_norm": METHODS["batch_norm"],
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


class Traffic(TorchDispatchMode):
    """Collectives that are called, by name: how often, and of how many bytes; ``calls`` as gloo itself counts them."""

    def __enter__(self):
        self.counts: dict[str, list[int]] = {}
        self.calls = -dist.group.WORLD._get_sequence_number_for_group()
        return super().__enter__()

    def __exit__(self, *exception):
        self.calls += dist.group.WORLD._get_sequence_number_for_group()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it is made of comes by afterwards
        if "c10d" in func.namespace and "wait" not in func._opname:
            count = self.counts.setdefault(func._opname, [0, 0])
            count[0] += 1
            count[1] += max(map(_nbytes, args))
        return func(*args, **(kwargs or {}))


def _nbytes(argument: object) -> int:
    if isinstance(argument, (list, tuple)):
        return sum(map(_nbytes, argument))
    return argument.nbytes if isinstance(argument, Tensor) else 0


class Training:
    """A net of ``CASES``, in this process alone (``parallel`` None) or shared, on one batch that stays the same."""

    def __init__(self, case: str, optimizer: str, parallel: str | None) -> None:
        self.parallel = parallel
        self.method = CASES[case]
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(BATCH, 3, 8, 8, generator=generator)
        # The second half is not like the first, as sorted data is not.
        self.images[BATCH // 2 :] *= 2
        self.labels = torch.randint(10, (BATCH,), generator=generator)
        self.net = self.method.build(NETWORK, 3, 10, seed=1).to(torch.float64, memory_format=torch.channels_last)
        if case == "hooks":
            for kernel in dc.mean_shift.spatial_kernels(self.net, input_convolution=True):
                dc.init.zero_mean_unit_(kernel, generator=generator)  # again: to the rounding of float64
        self.method.prepare(self.net, self.images)
        self.model = distributed.wrap(self.net, parallel)
        if case == "sync_batch_norm":  # not before: DDP refuses it on CPUs
            nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        self.optimizer = OPTIMIZERS[optimizer](self.method.parameter_groups(self.net, 0.05, 1e-3))
        if case == "hooks":
            dc.MeanShiftRejection(self.optimizer, recenter=True)

    def backward(self, scale: float = 1.0, part: slice = slice(None)) -> Tensor:
        images, labels = self.images, self.labels
        if self.parallel:
            images, labels = RANKS.share(images), RANKS.share(labels)
        loss = F.cross_entropy(self.model(images[part]), labels[part])
        penalty = self.method.penalty(self.net)
        ((loss if penalty is None else loss + penalty) * scale).backward()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(p.grad) for name, p in self.net.named_parameters()}

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.backward()
        self.optimizer.step()
        return (distributed.mean(loss) if self.parallel else loss).item()

    def state(self) -> tuple[dict, dict]:
        return distributed.model_state(self.model, self.optimizer)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def equality() -> dict:
    """Gradients of the first step, losses and the state after the last."""
    results = {}
    for case in ("deep_control", "mean_shift_rejection", "hooks", "batch_norm"):
        for optimizer in OPTIMIZERS:
            for parallel in (None, *distributed.KINDS):
                training = Training(case, optimizer, parallel)
                training.backward()
                gradients = training.gradients()
                losses = [training.step() for _ in range(STEPS)]
                results[case, optimizer, parallel] = (gradients, losses, *training.state())
    return results


def traffic() -> dict:
    """Collectives of forward, backward and step, once buckets and buffers have settled; and bytes of parameters."""
    results = {}
    for case in ("none", "deep_control", "mean_shift_rejection", "hooks", "batch_norm", "sync_batch_norm"):
        for parallel in distributed.KINDS:
            if (case, parallel) == ("sync_batch_norm", "fsdp2"):
                continue
            training = Training(case, "adamw", parallel)
            with sync_batch_norm_on_cpu() if case == "sync_batch_norm" else nullcontext():
                training.backward()
                training.step()
                images, labels = RANKS.share(training.images), RANKS.share(training.labels)
                training.optimizer.zero_grad()
                with Traffic() as forward:
                    loss = F.cross_entropy(training.model(images), labels)
                with Traffic() as backward:
                    loss.backward()
                with Traffic() as step:
                    training.optimizer.step()
            sizes = [(name, p.shape) for name, p in training.net.named_parameters()]
            results[case, parallel] = {
                "forward": (forward.counts, forward.calls),
                "backward": (backward.counts, backward.calls),
                "step": (step.counts, step.calls),
                "sizes": sizes,
            }
    with Traffic() as control:
        distributed.mean(torch.ones(3))
    results["control"] = (control.counts, control.calls)
    return results


def accumulation() -> dict:
    """Two micro-batches a step, the first of which is not to be sent."""
    results = {}
    for parallel in (None, *distributed.KINDS):
        training = Training("hooks", "sgd", parallel)
        for _ in range(3):
            training.optimizer.zero_grad()
            with Traffic() as quiet:
                if parallel == "ddp":
                    with training.model.no_sync():
                        training.backward(0.5, slice(0, None, 2))
                else:
                    if parallel:
                        training.model.set_requires_gradient_sync(False)
                    training.backward(0.5, slice(0, None, 2))
                    if parallel:
                        training.model.set_requires_gradient_sync(True)
            training.backward(0.5, slice(1, None, 2))
            training.optimizer.step()
        results[parallel] = (training.state()[0], quiet.counts)
    return results


def scaled_and_clipped() -> dict:
    """GradScaler and clipping; the second of three steps overflows in one filter of one rank."""
    results = {}
    for parallel in (None, *distributed.KINDS):
        training = Training("hooks", "sgd", parallel)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        norms = []
        for step in range(3):
            training.optimizer.zero_grad()
            training.backward(scaler.get_scale())
            scaler.scale(torch.zeros(()))  # makes the scale, which backward has already used
            if step == 1:
                bias = training.net.classifier.bias
                local = bias.grad.to_local() if isinstance(bias.grad, DTensor) else bias.grad
                if RANKS.rank == 0 or parallel != "fsdp2":
                    local[0] = float("inf")
            scaler.unscale_(training.optimizer)
            norm = nn.utils.clip_grad_norm_(training.net.parameters(), 0.1)
            scaler.step(training.optimizer)
            scaler.update()
            norms.append(whole(norm))
        results[parallel] = (training.state()[0], norms, scaler.get_scale())
    return results


def noise() -> dict:
    """Two runs of the same seeds and one of others; and what this rank draws."""
    results = {}
    for parallel in distributed.KINDS:
        states = []
        for seed in (0, 0, 1):
            training = Training("noise", "sgd", parallel)
            torch.manual_seed(10 * seed + RANKS.rank)
            for _ in range(2):
                training.step()
            states.append(training.state()[0])
        torch.manual_seed(RANKS.rank)
        results[parallel] = (states, dc.MapNoise()(torch.ones(2, 3, 4, 4)))
    return results


def resume(folder: Path) -> dict:
    """What two FSDP2 ranks wrote goes on in a single process and in DDP, and comes back."""
    results = {}
    for optimizer in OPTIMIZERS:
        first = Training("mean_shift_rejection", optimizer, "fsdp2")
        fresh = first.state()
        plain = Training("mean_shift_rejection", optimizer, None)
        results[optimizer, "fresh"] = (fresh, (plain.net.state_dict(), plain.optimizer.state_dict()))
        first.step()
        saved = first.state()
        if RANKS.rank == 0:
            torch.save(saved, folder / "checkpoint.pt")
        dist.barrier()
        seen = [saved]
        ends = []
        for parallel in (None, "ddp", "fsdp2"):
            again = Training("mean_shift_rejection", optimizer, parallel)
            again.step()
            distributed.load_state(again.model, again.optimizer, *torch.load(folder / "checkpoint.pt"))
            seen.append(again.state())
            for parameter, state in again.optimizer.state.items():
                for value in state.values():
                    # Optimizers are slow where strides differ.
                    assert value.shape != parameter.shape or value.stride() == parameter.stride()
            again.step()
            ends.append(again.state())
        first.step()
        results[optimizer, "seen"] = seen
        results[optimizer, "ends"] = [first.state(), *ends]
        dist.barrier()
    return results


def placements() -> dict:
    """Gradients of one kernel in each way that a mesh of two can hold them, projected."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    results = {}
    for filters, channels in ((5, 3), (1, 3), (2, 1)):
        gradient = torch.arange(filters * channels * 9.0).view(filters, channels, 3, 3).square()
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            kernel = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, [placement]))
            kernel.grad = distribute_tensor(gradient.clone(), mesh, [placement])
            try:
                with Traffic() as sent:
                    dc.project_kernel_gradients_(kernel, 0.9)
            except ValueError as error:
                result = str(error)
            else:
                result = whole(kernel.grad)
            results[filters, channels, str(placement)] = (gradient, result, sent.counts)
    return results


def unity_decay() -> list:
    """Of filters of norm 2: the penalty here where filters are shared out, and the error where filters are torn."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    kernel = dc.init.zero_mean_unit_(torch.empty(5, 4, 3, 3), magnitude=2.0)
    results = [dc.unity_decay(distribute_tensor(kernel, mesh, [Shard(0)]), 1.0).item()]
    try:
        dc.unity_decay(distribute_tensor(kernel, mesh, [Shard(1)]), 1.0)
    except ValueError as error:
        results.append(str(error))
    return results


def start_of_rank_0() -> dict:
    """Ranks that built different nets."""
    results = {}
    for parallel in distributed.KINDS:
        torch.manual_seed(RANKS.rank)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
        net[1].running_mean.normal_()
        mine = {name: value.clone() for name, value in net.state_dict().items()}
        model = distributed.wrap(net, parallel)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        results[parallel] = (mine, distributed.model_state(model, optimizer)[0])
    return results


def batch_norm_by_hand() -> dict:
    """The gradient of one Batch Norm's gain where the halves of a batch differ in their mean."""
    images = torch.randn(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    sign = torch.ones(BATCH, 1, 1, 1)
    sign[BATCH // 2 :] = -1
    images = images + sign
    results = {"images": images}
    for parallel in (None, "ddp"):
        layer = nn.BatchNorm2d(1, eps=1e-15)
        model = distributed.wrap(layer, parallel)
        x, s = (RANKS.share(images), RANKS.share(sign)) if parallel else (images, sign)
        (model(x) * s).mean().backward()
        results[parallel] = layer.weight.grad.item()
    return results


def sync_batch_norm() -> dict:
    """Gradients of SyncBatchNorm on two ranks and of Batch Norm in one process."""
    single = Training("batch_norm", "sgd", None)
    single.backward()
    with sync_batch_norm_on_cpu():
        shared = Training("sync_batch_norm", "sgd", "ddp")
        shared.backward()
    return {"single": single.gradients(), "shared": shared.gradients()}


def statistics_of_a_run(folder: Path) -> dict | None:
    """Two epochs of the train command with Batch Norm in shards, in one go and resumed behind the first.

    For each of both the records and the checkpoint, and the test loss of its model in this process alone.
    """
    if not all(map(find_spec, ("matplotlib", "tqdm"))):
        return None
    from deepcontrol_cuda.training import checkpoint, data, log, pictures, trainer

    def part(count: int) -> data.InMemory:
        generator = data.generator(count)
        return data.InMemory(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10)

    few = data.DataSet("few", 10, part(128), part(32), torch.zeros(1), torch.ones(1), "")
    given = {"method": "batch_norm", "schedule": "constant", "batch_size": 64}
    machine = trainer.Machine(device="cpu", parallel="fsdp2")
    results = {}
    with (
        mock.patch.multiple(distributed, start=lambda *_: RANKS, finish=lambda: None),
        mock.patch.multiple(pictures, curves=lambda *_: b"a picture"),
        mock.patch.multiple(data, digits=lambda: few),
        mock.patch.multiple(log.Log, _open_board=lambda _: None),
        mock.patch("gc.collect"),  # for DDP, and slow here
    ):
        trainer.train(given | {"epochs": 2}, machine, folder / "whole", False)
        trainer.train(given | {"epochs": 1}, machine, folder / "cut", False)
        dist.barrier()
        trainer.train({"epochs": 2}, machine, folder / "cut", True)
        dist.barrier()
    for name in ("whole", "cut"):
        state = checkpoint.read(folder / name / trainer.CHECKPOINT)
        model = METHODS["batch_norm"].build("resnet10", 1, 10, 0).eval()
        model.load_state_dict(state["model"])
        with torch.no_grad():
            loss = F.cross_entropy(model(few.normalise(few.test.images)), few.test.labels).item()
        results[name] = (state["model"], [r for r in state["records"] if r["kind"] == "epoch"], loss)
    return results


def sync_batch_norm_on_cpu():
    """SyncBatchNorm is PyTorch's own but for the test of the device, and the kernels that CPUs lack."""
    return mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu")


_AXES = (0, 2, 3)


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def batch_norm_stats(x, eps):
    return x.mean(_AXES), (x.var(_AXES, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    share = (counts / counts.sum()).unsqueeze(1)
    mean = (share * means).sum(0)
    return mean, ((share * (invstds**-2 - eps + (means - mean) ** 2)).sum(0) + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    return (x - _column(mean)) * _column(invstd * weight) + _column(bias)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, *wanted):
    total, total_x = grad.sum(_AXES), (grad * (x - _column(mean))).sum(_AXES)
    return total, total_x, total_x * invstd, total.clone()


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, total_x, counts):
    slope = _column(invstd**2 * total_x / counts.sum())
    return (grad - _column(total / counts.sum()) - (x - _column(mean)) * slope) * _column(invstd * weight)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    library = torch.library.Library("aten", "IMPL")
    for kernel in (
        batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt, batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):  # fmt: skip
        library.impl(kernel.__name__, kernel, "CPU")
    RANKS = distributed.start("ddp", "cpu", BATCH)
    checks = (
        equality, traffic, accumulation, scaled_and_clipped, noise, placements, unity_decay, start_of_rank_0,
        batch_norm_by_hand, sync_batch_norm,
    )  # fmt: skip
    results = {check.__name__: check() for check in checks} | {"resume": resume(folder)}
    torch.set_default_dtype(torch.float32)
    results["statistics_of_a_run"] = statistics_of_a_run(folder)
    torch.save(results, folder / f"rank{RANKS.rank}.pt")
    distributed.finish()
