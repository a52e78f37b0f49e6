"""Training on two ranks, by DDP and by FSDP2: what one process computes, and nothing sent but gradients and shards.

All that needs two ranks is computed by one pair of processes, tests/distributed_worker.py, once for all tests here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from deepcontrol_cuda import cli, reference
from deepcontrol_cuda.training import distributed

# All is computed in float64; Adam divides small gradients by their own size, and with them their rounding.
_BUDGET = 1e-12
_SECONDS = 90
KINDS = distributed.KINDS


def outputs(processes: list[subprocess.Popen], files: list[Path]) -> str:
    """What processes that work together wrote. If one fails, or time is up, all are ended and the test fails."""
    end = time.monotonic() + _SECONDS
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or any(process.poll() for process in processes):
                break
            time.sleep(0.05)
        statuses = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun then ends its own
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    text = "\n".join(f"--- {file.name}:\n{file.read_text()}" for file in files)
    assert statuses == [0] * len(processes), f"exit statuses {statuses} (None: killed after {_SECONDS} s)\n{text}"
    return text


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """The results of rank 0 and of rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    # As torchrun does it: it listens on a free port, and the ranks meet there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment = os.environ | meeting | {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    processes, files = [], []
    for rank in ("0", "1"):
        files.append(folder / f"output of rank {rank}")
        with open(files[-1], "w") as output:
            process = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "distributed_worker.py", folder],
                env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stdout=output, stderr=output,
            )  # fmt: skip
        processes.append(process)
    outputs(processes, files)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def difference(got: dict, wanted: dict) -> float:
    """The largest difference of any element, of tensors that are otherwise alike."""
    assert got.keys() == wanted.keys()
    largest = 0.0
    for name, tensor in got.items():
        if not isinstance(tensor, torch.Tensor):
            assert tensor == wanted[name], name
            continue
        assert (tensor.shape, tensor.dtype) == (wanted[name].shape, wanted[name].dtype), name
        assert tensor.isfinite().all(), name
        largest = max(largest, (tensor - wanted[name]).abs().max().item())
    return largest


def optimizer_difference(got: dict, wanted: dict) -> float:
    assert got["param_groups"] == wanted["param_groups"]
    assert got["state"].keys() == wanted["state"].keys()
    return max((difference(state, wanted["state"][i]) for i, state in got["state"].items()), default=0.0)


@pytest.mark.parametrize("parallel", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", ["deep_control", "mean_shift_rejection", "hooks"])
def test_two_ranks_train_as_one_process_does(ranks, case, optimizer, parallel):
    single_gradients, single_losses, single_model, single_optimizer = ranks[0]["equality"][case, optimizer, None]
    assert all(gradient.any() for gradient in single_gradients.values())
    for rank in ranks:
        gradients, losses, model, state = rank["equality"][case, optimizer, parallel]
        assert difference(gradients, single_gradients) < _BUDGET
        assert losses == pytest.approx(single_losses, rel=_BUDGET)
        assert difference(model, single_model) < _BUDGET
        assert optimizer_difference(state, single_optimizer) < _BUDGET
    assert single_losses[-1] < single_losses[0] - 1e-3


def test_hooks_keep_kernels_zero_mean_in_shards(ranks):
    for parallel in (None, *KINDS):
        model = ranks[0]["equality"]["hooks", "adamw", parallel][2]
        kernels = [tensor for tensor in model.values() if tensor.dim() == 4 and tensor.shape[-1] > 1]
        assert len(kernels) == 7
        for kernel in kernels:
            assert kernel.mean(reference.spatial(kernel)).abs().max() < 1e-15


@pytest.mark.parametrize("parallel", KINDS)
def test_batch_norm_trains_otherwise_on_two_ranks(ranks, parallel):
    single, *_ = ranks[0]["equality"]["batch_norm", "sgd", None]
    shared, *_ = ranks[0]["equality"]["batch_norm", "sgd", parallel]
    largest = max(gradient.abs().max().item() for gradient in single.values())
    assert difference(shared, single) > 0.01 * largest


def test_batch_norm_differs_by_what_its_statistics_say(ranks):
    """With the loss mean(sign * y), sign telling the halves apart, the gain's gradient is half the distance of their
    means in deviations of the whole batch; a rank that knows its own half alone finds its mean at 0."""
    results = ranks[0]["batch_norm_by_hand"]
    first, second = results["images"].chunk(2)
    wanted = (first.mean() - second.mean()) / 2 / results["images"].std(correction=0)
    assert wanted > 0.5
    assert results[None] == pytest.approx(wanted.item(), rel=1e-9)
    assert results["ddp"] == pytest.approx(0, abs=1e-12)


def padded_bytes(sizes: list) -> int:
    """Of parameters sharded over two ranks: shards are equal, and the last ones may hold less than they have room."""
    return sum(8 * 2 * math.ceil(shape[0] / 2) * math.prod(shape[1:]) for _, shape in sizes)


CASES_WITHOUT_STATISTICS = ("none", "deep_control", "mean_shift_rejection", "hooks")


@pytest.mark.parametrize("case", CASES_WITHOUT_STATISTICS)
def test_ddp_sends_gradients_and_nothing_else(ranks, case):
    for rank in ranks:
        traffic = rank["traffic"][case, "ddp"]
        gradients = sum(8 * math.prod(shape) for _, shape in traffic["sizes"])
        assert traffic["forward"] == ({}, 0)
        assert traffic["backward"] == ({"allreduce_": [1, gradients]}, 1)
        assert traffic["step"] == ({}, 0)


@pytest.mark.parametrize("case", CASES_WITHOUT_STATISTICS)
def test_fsdp2_sends_shards_and_nothing_else(ranks, case):
    """Four groups, the network and three blocks: gathered ahead of forward, the blocks again ahead of backward."""
    for rank in ranks:
        traffic = rank["traffic"][case, "fsdp2"]
        everything = padded_bytes(traffic["sizes"])
        blocks = padded_bytes([(name, shape) for name, shape in traffic["sizes"] if name.startswith("blocks.")])
        assert traffic["forward"] == ({"_allgather_base_": [4, everything]}, 4)
        gathered, reduced = [3, blocks], [4, everything]
        assert traffic["backward"] == ({"_allgather_base_": gathered, "_reduce_scatter_base_": reduced}, 7)
        assert traffic["step"] == ({}, 0)


def test_traffic_is_counted(ranks):
    """The counts of the tests above see what is there to see; gloo's own count agrees."""
    assert ranks[0]["traffic"]["control"] == ({"allreduce_": [1, 24]}, 1)
    counts, calls = ranks[0]["traffic"]["batch_norm", "ddp"]["forward"]
    assert counts.keys() == {"broadcast_"}  # of running statistics
    assert calls == counts["broadcast_"][0] > 0


def test_synchronized_batch_norm_sends_in_every_layer(ranks):
    """It gives the gradients of one process, so what was counted is what that takes."""
    results = ranks[0]["sync_batch_norm"]
    assert difference(results["shared"], results["single"]) < _BUDGET
    traffic = ranks[0]["traffic"]["sync_batch_norm", "ddp"]
    layers = sum(name.endswith("norm.weight") for name, _ in traffic["sizes"])
    assert layers == 8
    assert traffic["forward"][0]["allgather_"][0] == layers
    assert traffic["backward"][0]["allreduce_"][0] == 1 + layers


@pytest.mark.parametrize("parallel", KINDS)
def test_gradients_accumulate_and_are_sent_once(ranks, parallel):
    results = ranks[0]["accumulation"]
    state, counts = results[parallel]
    assert difference(state, results[None][0]) < _BUDGET
    assert counts.keys() == (set() if parallel == "ddp" else {"_allgather_base_"})


@pytest.mark.parametrize("parallel", KINDS)
def test_scaled_and_clipped_gradients(ranks, parallel):
    """The norm is of all shards, and no rank takes a step in which another has met an infinity."""
    single, single_norms, single_scale = ranks[0]["scaled_and_clipped"][None]
    for rank in ranks:
        state, norms, scale = rank["scaled_and_clipped"][parallel]
        assert difference(state, single) < _BUDGET
        assert torch.stack(norms).tolist() == pytest.approx(torch.stack(single_norms).tolist(), rel=_BUDGET)
        assert scale == single_scale == 2.0**9
    assert [norm.isfinite().item() for norm in single_norms] == [True, False, True]


@pytest.mark.parametrize("parallel", KINDS)
def test_each_rank_draws_its_own_noise(ranks, parallel):
    first, again, other = ranks[0]["noise"][parallel][0]
    assert difference(first, again) == 0
    assert difference(first, other) > 1e-6
    assert difference(first, ranks[1]["noise"][parallel][0][0]) == 0
    assert not torch.equal(*(rank["noise"][parallel][1] for rank in ranks))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_state_goes_from_kind_to_kind_and_back(ranks, optimizer):
    """What two FSDP2 ranks saved, in one process, in DDP and in FSDP2 again: the same bits; then one more step."""
    for rank in ranks:
        (model, state), *others = rank["resume"][optimizer, "seen"]
        assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for tensor in model.values())
        for other_model, other_state in others:
            assert difference(other_model, model) == 0
            assert optimizer_difference(other_state, state) == 0
        (model, state), *others = rank["resume"][optimizer, "ends"]
        for other_model, other_state in others:
            assert difference(other_model, model) < _BUDGET
            assert optimizer_difference(other_state, state) < _BUDGET
        assert difference(others[-1][0], model) == 0


def test_running_statistics_in_shards_are_tested_as_they_are_saved(ranks):
    """Batch Norm under FSDP2: what the log says is true of the checkpoint, and a resumed run has the same bits."""
    runs = ranks[0]["statistics_of_a_run"]
    if runs is None:
        pytest.skip("a package of the extra train is missing")
    for _, epochs, loss in runs.values():
        assert epochs[-1]["test_loss"] == pytest.approx(loss, rel=3e-6)
    (model, epochs, _), (resumed_model, resumed_epochs, _) = runs["whole"], runs["cut"]
    assert difference(resumed_model, model) == 0
    for name in ("train_loss", "test_loss"):
        assert [epoch[name] for epoch in resumed_epochs] == [epoch[name] for epoch in epochs]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_state_ahead_of_the_first_step_is_that_of_one_process(ranks, optimizer):
    (model, state), (single_model, single_state) = ranks[1]["resume"][optimizer, "fresh"]
    assert difference(model, single_model) == 0
    assert state == single_state
    assert not state["state"]


@pytest.mark.parametrize("placement", ["S(0)", "S(1)", "R"])
@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (2, 1)], ids=str)
def test_sharded_gradients_are_projected_where_they_are(ranks, shape, placement):
    """Filters that the ranks share unevenly; and one filter or channel, so that a rank has none."""
    for rank in ranks:
        gradient, got, sent = rank["placements"][(*shape, placement)]
        wanted = reference.project(gradient, 0.9)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-15 * gradient.max().item())
        assert not sent


def test_gradients_sharded_along_their_taps_are_refused(ranks):
    for rank in ranks:
        assert "sharded along filters or channels" in rank["placements"][5, 3, "S(2)"][1]


def test_unity_decay_of_sharded_filters(ranks):
    for rank, filters in zip(ranks, (3, 2)):
        penalty, error = rank["unity_decay"]
        assert penalty == pytest.approx(filters)
        assert "wanted it whole or sharded along filters" in error


@pytest.mark.parametrize("parallel", KINDS)
def test_every_rank_starts_as_rank_0(ranks, parallel):
    wanted = ranks[0]["start_of_rank_0"][parallel][0]
    assert difference(ranks[1]["start_of_rank_0"][parallel][0], wanted) > 0.1
    for rank in ranks:
        assert difference(rank["start_of_rank_0"][parallel][1], wanted) == 0


def test_the_train_command_under_torchrun(tmp_path):
    """An epoch of two DDP ranks gives the bits of a single process, which can go on from its checkpoint.

    The single process takes each batch in the same two parts: in float32 rounding decides on which side of its kink a
    ReLU is, so after some steps the whole batch at once gives other losses. In float64 it does not, see above.
    """
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    command = [
        "train", "--dataset", "digits", "--batch-size", "128", "--learning-rate", "0.02", "--schedule", "constant",
        "--device", "cpu", "--epochs", "1",
    ]  # fmt: skip
    single, shared = tmp_path / "single", tmp_path / "shared"
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    with open(tmp_path / "output of torchrun", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *torchrun, "-m", "deepcontrol_cuda", *command, "--parallel", "ddp",
             "--output", shared],
            env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stdout=output, stderr=output,
        )  # fmt: skip
    assert cli.main([*command, "--accumulate", "2", "--output", str(single)]) == 0
    outputs([process], [Path(output.name)])
    for name in ("train_loss", "test_loss"):
        assert epochs(shared)[0][name] == pytest.approx(epochs(single)[0][name], rel=1e-6)
    got, wanted = (torch.load(folder / "checkpoint.pt") for folder in (shared, single))
    assert difference(got["model"], wanted["model"]) == 0
    assert optimizer_difference(got["optimizer"], wanted["optimizer"]) == 0
    for folder in (shared, single):
        assert cli.main(["train", "--epochs", "2", "--output", str(folder), "--resume"]) == 0
    (first, second), (_, single_second) = epochs(shared), epochs(single)
    assert second["train_loss"] == pytest.approx(single_second["train_loss"], rel=1e-2)
    assert second["train_loss"] < 0.95 * first["train_loss"]


def epochs(folder: Path) -> list[dict]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "epoch"]


# One process, or none to speak of.


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment as ``torchrun`` does; without arguments as it is without."""

    def launch(rank: int | None = None, world_size: int | None = None) -> None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    launch()
    return launch


def test_alone_nothing_is_initialised(launched):
    ranks = distributed.start(None, "cpu", 7)
    assert ranks == distributed.Ranks(0, 1, 0, torch.device("cpu"))
    assert not dist.is_initialized()
    model = torch.nn.Conv2d(3, 5, 3)
    assert distributed.wrap(model, None) is model
    batch = torch.arange(7)
    assert torch.equal(ranks.share(batch), batch)
    assert distributed.mean(batch) is batch
    distributed.share_buffers(model)
    distributed.finish()


def test_a_state_is_a_copy(launched):
    model = torch.nn.Conv2d(3, 5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.sum().backward()
    optimizer.step()
    weights, state = distributed.model_state(model, optimizer)
    before = model.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert torch.equal(weights["weight"], before)
    assert state["state"][0]["step"] == 1
    assert state["param_groups"][0]["lr"] == 1e-3
    distributed.load_state(model, optimizer, weights, state)
    assert torch.equal(model.weight, before)
    with pytest.raises(RuntimeError, match="weight"):
        distributed.load_state(torch.nn.Conv2d(3, 4, 3), optimizer, weights, state)
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        distributed.load_state(model, optimizer, {"weight": weights["weight"]}, state)
    with pytest.raises(ValueError, match="parameter group"):
        distributed.load_state(model, torch.optim.SGD([model.weight]), weights, state)


@pytest.mark.parametrize("samples", [8, 7, 1])
def test_ranks_share_a_batch(samples):
    batch = torch.arange(samples)
    shares = [distributed.Ranks(rank, 2, rank, torch.device("cpu")).share(batch) for rank in range(2)]
    assert torch.equal(torch.cat(shares), batch)
    assert [len(share) for share in shares] == [-(-samples // 2), samples // 2]


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ((), ("ddp",), "parallel: got 'ddp' .* torchrun --nproc-per-node 2 .* --parallel ddp"),
        ((), ("fsdp",), "parallel: got 'fsdp', wanted one of ddp, fsdp2"),
        ((0, 2), (None,), "parallel: torchrun started 2 processes.* --parallel ddp .* or start without torchrun"),
        ((0, 4), ("ddp", "cpu", 3), "batch_size: 4 ranks share a batch of 3 images, some .* at least 4"),
        ((0, 4), ("ddp", "cpu", 6), "batch_size: 4 ranks share a batch of 6 images, not evenly; .* multiple of 4"),
        ((5, 8), ("fsdp2", "cuda", 8), "device: rank 5 of this machine has no GPU, PyTorch sees 1; start at most 1"),
    ],
)
def test_start_says_what_is_wrong(launched, monkeypatch, environment, arguments, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launched(*environment)
    with pytest.raises(ValueError, match=message):
        distributed.start(*arguments)
    assert not dist.is_initialized()
