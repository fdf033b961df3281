"""The engine on the device in ``LOCALGRAD_DEVICE`` (default: CUDA where there is one, else the CPU).

Without CUDA what compares devices is skipped, and the rest runs on the CPU, so that these tests are known to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import localgrad
from localgrad import methods
from localgrad.data import load
from localgrad.method import Method
from localgrad.study.contest import contest
from localgrad.study.ways import Way

DEVICE = torch.device(os.environ.get("LOCALGRAD_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
TASK = localgrad.tasks.classification(10)
cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA (LOCALGRAD_DEVICE=cuda)")

METHODS: dict[str, Callable[[], Method]] = {
    "e2e": lambda: methods.e2e(TASK),
    "checkpointing": lambda: methods.checkpointing(methods.e2e(TASK)),
    "dgl": lambda: methods.dgl(TASK),
    "infopro": lambda: methods.infopro(TASK),
    "predsim": lambda: methods.predsim(TASK),
    "auglocal": lambda: methods.auglocal(TASK),
    "man_pp": lambda: methods.man_pp(methods.dgl(TASK)),
    "mlaan": lambda: methods.mlaan(methods.dgl(TASK)),
    "hpff": lambda: methods.hpff(methods.dgl(TASK)),
    "trgl": lambda: methods.trgl(methods.dgl(TASK)),
    "sgr": lambda: methods.sgr(methods.dgl(TASK)),
    "accumulation": lambda: methods.accumulation(methods.dgl(TASK), parts=2),
}


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Any:
    """No TF32 and no algorithm that adds in an order of its own."""
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = flags


def images(count: int = 8, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator), torch.randint(10, (count,), generator=generator)


def network_on(device: torch.device, method: Method, dtype: torch.dtype = torch.float64) -> localgrad.LocalNetwork:
    """The same weights on any device: modules draw theirs on the CPU."""
    torch.manual_seed(0)
    model, example = localgrad.models.resnet8().to(device, dtype), images(2)[0].to(device, dtype)
    return localgrad.localize(model, method, 4, example=example).train()


def trained(network: localgrad.LocalNetwork, dtype: torch.dtype = torch.float64, steps: int = 2) -> list[Tensor]:
    """Every parameter and buffer after some steps, on the CPU."""
    x, y = images()
    x, y = x.to(network.device, dtype), y.to(network.device)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    with localgrad.keyed_randomness(0):
        for step in range(steps):
            for _, loss in localgrad.local_losses(network, x, y, step):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            localgrad.exchange(network)
    return [tensor.detach().cpu() for tensor in network.state_dict().values()]


class Reads(TorchDispatchMode):
    """Refuses what reads a number back, for which a CUDA device would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (localgrad.tasks.classification(10), lambda y: y),
        (localgrad.tasks.multilabel(10), lambda y: torch.nn.functional.one_hot(y, 10).float()),
        (localgrad.tasks.regression(10), lambda y: torch.nn.functional.one_hot(y, 10).float()),
    ],
    ids=["classification", "multilabel", "regression"],
)
def test_values_of_targets_are_looked_at_once(task: Any, targets: Callable[[Tensor], Tensor]) -> None:
    """The first loss waits for the device, which later ones do not."""
    x, y = torch.randn(8, 10, device=DEVICE, requires_grad=True), targets(images()[1]).to(DEVICE)
    with pytest.raises(localgrad.TrainingError):
        task.loss(x, localgrad.Batch(None, y + float("nan") if y.is_floating_point() else y + 10, 0))
    with pytest.raises(AssertionError), Reads():  # or nothing would be tested
        float(x.sum())
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Reads():
            task.loss(x, localgrad.Batch(None, y, 0)).backward()
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("name", METHODS)
def test_two_steps_end_where_they_do_on_a_cpu(name: str) -> None:
    expected = trained(network_on(torch.device("cpu"), METHODS[name]()))
    found = trained(network_on(DEVICE, METHODS[name]()))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_equal_runs_end_alike(name: str) -> None:
    first, second = (trained(network_on(DEVICE, METHODS[name](), torch.float32), torch.float32) for _ in range(2))
    assert all(torch.isfinite(t.float()).all() for t in first)
    for a, b in zip(first, second, strict=True):
        if DEVICE.type == "cpu" or name in ("e2e", "checkpointing"):
            assert torch.equal(a, b)
        else:  # backward passes of pooling and resizing in heads add in any order on CUDA
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_span_is_plain_back_propagation(checkpointed: bool) -> None:
    method = METHODS["checkpointing" if checkpointed else "e2e"]()
    network = network_on(DEVICE, method, torch.float32)
    x, y = (t.to(DEVICE) for t in images())
    localgrad.backward(network, x, y)
    found = [p.grad.clone() for p in network.model.parameters() if p.grad is not None]
    network.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(network.model(x), y).backward()
    expected = [p.grad for p in network.model.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_blocks_that_step_one_by_one_end_where_all_at_once_do() -> None:
    x, y = (t.to(DEVICE) for t in images())
    ends = []
    for per_block in (False, True):
        network = network_on(DEVICE, METHODS["dgl"](), torch.float32)
        blocks = [network.block_parameters(k) for k in range(network.num_blocks)]
        optimizers = [torch.optim.SGD(parameters, lr=0.1, momentum=0.9) for parameters in blocks]

        def update(k: int, optimizers: list[torch.optim.SGD] = optimizers) -> None:
            optimizers[k].step()
            optimizers[k].zero_grad(set_to_none=True)

        for step in range(3):
            losses = localgrad.local_losses(network, x, y, step, on_block_done=update if per_block else None)
            for _, loss in losses:
                loss.backward()
            for k in range(0 if per_block else len(blocks)):
                update(k)
        ends.append([p.detach().clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["dgl", "mlaan", "accumulation"])
def test_blocks_that_visit_the_device_end_where_those_do_that_stay(name: str) -> None:
    x, y = images()
    x, y = x.to(DEVICE, torch.float64), y.to(DEVICE)
    ends = []
    for visiting in (False, True):
        network = network_on(torch.device("cpu"), METHODS[name]())
        if visiting:
            localgrad.resident(network, DEVICE)
        else:
            network.to(DEVICE)
        blocks = [network.block_parameters(k) for k in range(network.num_blocks)]
        optimizers = [torch.optim.AdamW(parameters, 1e-2) for parameters in blocks]

        def update(k: int, optimizers: list[torch.optim.AdamW] = optimizers) -> None:
            optimizers[k].step()
            optimizers[k].zero_grad(set_to_none=True)

        for step in range(3):
            for _, loss in localgrad.local_losses(network, x, y, step, on_block_done=update):
                loss.backward()
            localgrad.exchange(network)
        with torch.no_grad():
            output = network.eval()(x).cpu()
        if visiting:
            assert all(t.device.type == "cpu" for block in blocks for t in block)
        ends.append([output, *(t.detach().cpu() for t in network.state_dict().values())])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_autocast_runs_in_bfloat16() -> None:
    network = network_on(DEVICE, METHODS["dgl"](), torch.float32)
    x, y = (t.to(DEVICE) for t in images())
    seen = set()
    for _, loss in localgrad.local_losses(
        network, x, y, autocast=torch.bfloat16, on_output=lambda span, term, output: seen.add(output.dtype)
    ):
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert seen == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters() if p.requires_grad)


def test_dropout_is_drawn_again_by_step() -> None:
    x, y = images()
    x, y = x.to(DEVICE), y.to(DEVICE)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Dropout(0.5), nn.Linear(64, 32), nn.Linear(32, 10))
    network = localgrad.localize(model.to(DEVICE), METHODS["dgl"](), 2, example=x).train()

    def losses(step: int) -> list[float]:
        with localgrad.keyed_randomness(3):
            return [loss.item() for _, loss in localgrad.local_losses(network, x, y, step) if loss.backward() is None]

    assert losses(0) == losses(0) != losses(1)


def test_resident_batches_equal_those_of_a_cpu() -> None:
    here, there = (
        load("digits", batch_size=64, seed=1, device=device).train.epoch(3) for device in (DEVICE, torch.device("cpu"))
    )
    for (x, y), (a, b) in zip(here, there, strict=True):
        assert x.device.type == DEVICE.type and torch.equal(y.cpu(), b)
        torch.testing.assert_close(x.cpu(), a, rtol=0, atol=1e-6)


class Workspaces(TorchDispatchMode):
    """The most that an operation takes from CUDA's allocator and has given back when it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = func(*args, **(kwargs or {}))
        kept = max(before, torch.cuda.memory_allocated())
        self.largest = max(self.largest, torch.cuda.max_memory_allocated() - kept)
        return result


def largest_workspace(method: Method, blocks: int, batch: int) -> int:
    """Bytes that the kernels of one step of ResNet-20 need beside its tensors; 0 on a CPU."""
    if DEVICE.type != "cuda":
        return 0
    x, y = (t.to(DEVICE) for t in images(batch, 32))
    network = localgrad.localize(localgrad.models.resnet20().to(DEVICE), method, blocks, example=x[:2]).train()
    localgrad.backward(network, x, y)
    network.zero_grad(set_to_none=True)
    with Workspaces() as seen:
        localgrad.backward(network, x, y)
    return seen.largest


def test_memory_of_a_step_falls_with_the_number_of_blocks() -> None:
    """Tensors do; the allocator's peak is at most these and the largest workspace, which does not depend on blocks."""
    local = methods.dgl(TASK, head="linear")
    ways = [
        Way("end-to-end", "end-to-end", METHODS["e2e"]()),
        Way("checkpointing", "checkpointing", METHODS["checkpointing"](), None),
    ]
    ways += [Way(f"K={k}", "local", local, k, per_block=True) for k in (2, 8)]
    batch = 256 if DEVICE.type == "cuda" else 16
    found = contest("resnet20", ways, batch_size=batch, image_size=32, num_classes=10, device=DEVICE, rounds=1)
    whole, checkpointing, two, eight = (row.total_bytes or 0 for row in found.rows)
    assert eight < 0.5 * whole and eight < two < whole and checkpointing < whole
    if DEVICE.type == "cuda":
        for row, (method, blocks) in ((found.rows[0], (METHODS["e2e"](), 1)), (found.rows[3], (local, 8))):
            workspace = largest_workspace(method, blocks, batch)
            assert row.peak_bytes is not None and row.total_bytes is not None
            said = (
                f"{row.name}: {row.peak_bytes:,} of the allocator, {row.total_bytes:,} in tensors, {workspace:,} beside"
            )
            assert 0.95 * row.total_bytes <= row.peak_bytes <= 1.05 * (row.total_bytes + workspace), said
