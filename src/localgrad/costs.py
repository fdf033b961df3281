"""What a training step costs: bytes, FLOPs, parameters, time."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localgrad.engine import local_losses
from localgrad.measure.memory import Memory, measure
from localgrad.measure.timing import in_turns
from localgrad.measure.work import Rates, Work
from localgrad.network import LocalNetwork


@dataclass(frozen=True)
class Cost:
    """One training step.

    Args:
        activation_bytes: largest bytes alive above weights, optimizer state and parameter gradients.
        total_bytes: the same with gradients.
        flops: of forward and backward, 2 per multiply-add.
        parameters: of the model; ``auxiliary_parameters`` those trained besides, ``twin_parameters`` moving averages.
    """

    activation_bytes: int
    total_bytes: int
    flops: float
    parameters: int
    auxiliary_parameters: int
    twin_parameters: int


def run_step(network: LocalNetwork, inputs: Any, targets: Any, autocast: torch.dtype | None = None) -> None:
    """Forward and backward of step 0, gradients left in ``.grad``."""
    for _, loss in local_losses(network, inputs, targets, autocast=autocast):
        loss.backward()


def cost(network: LocalNetwork, inputs: Tensor, targets: Any, autocast: torch.dtype | None = None) -> Cost:
    """Measure one step on a copy of ``network``, which is left as it is."""
    network = copy.deepcopy(network).train()
    network.zero_grad(set_to_none=True)

    def step() -> None:
        run_step(network, inputs, targets, autocast)
        network.zero_grad(set_to_none=True)

    if network.device.type == "cuda":
        step()  # libraries take their workspaces at the first step
    return cost_of(network, step)[0]


def cost_of(network: LocalNetwork, step: Callable[[], object], timeline: bool = False) -> tuple[Cost, Memory]:
    """What ``step`` costs, which trains ``network`` and leaves no gradients; and the bytes that were alive meanwhile.

    Bytes are exact: the live tensors, counted op by op, on any device.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    with Work(Rates(1.0, 1.0)) as work:
        memory = measure(step, trained, timeline)
    auxiliary = list(network.auxiliary.parameters())
    found = Cost(
        activation_bytes=memory.peak_activations,
        total_bytes=memory.peak_total,
        flops=work.flops,
        parameters=sum(p.numel() for p in network.model.parameters()),
        auxiliary_parameters=sum(p.numel() for p in auxiliary if p.requires_grad),
        twin_parameters=sum(p.numel() for p in auxiliary if not p.requires_grad),
    )
    return found, memory


def random_targets(kind: str, num_classes: int, inputs: Tensor, generator: torch.Generator) -> Any:
    """Targets for ``inputs`` (B, C, H, W) of a task, by its name in `localgrad.tasks`; four boxes for each image."""
    batch, device = len(inputs), inputs.device
    size = (batch, *inputs.shape[-2:]) if kind == "segmentation" else (batch, 4) if kind == "detection" else (batch,)
    classes = torch.randint(num_classes, size, device=device, generator=generator)
    if kind != "detection":
        return classes
    sides = torch.tensor([*inputs.shape[:-3:-1]], device=device)  # width, height
    corners = 0.6 * torch.rand(batch, 4, 2, device=device, generator=generator)
    boxes = torch.cat([corners, corners + 0.1 + 0.3 * torch.rand(batch, 4, 2, device=device, generator=generator)], 2)
    return [{"boxes": b * sides.repeat(2), "labels": c} for b, c in zip(boxes, classes, strict=True)]


def step_seconds(
    networks: Sequence[LocalNetwork],
    inputs: Tensor,
    targets: Any,
    autocast: torch.dtype | None = None,
    rounds: int = 7,
    compiled: bool = False,
) -> list[float]:
    """Median seconds of forward and backward of each network, one step each in turn, after one round not counted.

    A machine that slows down slows all of them: compare within one call. With ``compiled`` those of all networks once
    more follow, `localgrad.network.LocalNetwork.compile_blocks` called; a network that is given is never timed so.
    """
    copies = [copy.deepcopy(network).train() for network in (*networks, *(networks if compiled else ()))]
    for network in copies[len(networks) :]:
        network.compile_blocks()

    def step(network: LocalNetwork) -> None:
        network.zero_grad(set_to_none=True)
        run_step(network, inputs, targets, autocast)

    taken = in_turns([partial(step, network) for network in copies], rounds, copies[0].device, warm=1)
    return [statistics.median(seconds) for seconds in taken]
