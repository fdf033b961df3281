"""What a training step costs: bytes, FLOPs, parameters, time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from localgrad.engine import local_losses
from localgrad.measure.memory import measure
from localgrad.measure.process_memory import allocated_growth
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
    flops: int
    parameters: int
    auxiliary_parameters: int
    twin_parameters: int


def run_step(network: LocalNetwork, inputs: Any, targets: Any, autocast: torch.dtype | None = None) -> None:
    """Forward and backward of step 0, gradients left in ``.grad``."""
    for _, loss in local_losses(network, inputs, targets, autocast=autocast):
        loss.backward()


def cost(network: LocalNetwork, inputs: Tensor, targets: Any, autocast: torch.dtype | None = None) -> Cost:
    """Measure one step on a copy of ``network``, which is left as it is.

    Bytes are exact: the live tensors of the CPU, or the peak of the CUDA allocator above what was there before (total;
    there the activations are total less gradients).
    """
    network = copy.deepcopy(network).train()
    network.zero_grad(set_to_none=True)
    parameters = [p for p in network.parameters() if p.requires_grad]
    if network.device.type == "cuda":
        run_step(network, inputs, targets, autocast)  # libraries take their workspaces at the first step
        network.zero_grad(set_to_none=True)
        total = allocated_growth(lambda: run_step(network, inputs, targets, autocast))
        activations = total - sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
    else:
        memory = measure(lambda: run_step(network, inputs, targets, autocast), parameters)
        activations, total = memory.peak_activations, memory.peak_total
    network.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as counter:
        run_step(network, inputs, targets, autocast)
    model = sum(p.numel() for p in network.model.parameters())
    auxiliary = list(network.auxiliary.parameters())
    return Cost(
        activations,
        total,
        counter.get_total_flops(),
        model,
        sum(p.numel() for p in auxiliary if p.requires_grad),
        sum(p.numel() for p in auxiliary if not p.requires_grad),
    )


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
) -> list[float]:
    """Median seconds of forward and backward of each network, one step each in turn, after one round not counted.

    A machine that slows down slows all of them: compare within one call.
    """
    networks = [copy.deepcopy(network).train() for network in networks]
    times: list[list[float]] = [[] for _ in networks]
    for turn in range(rounds + 1):
        for network, taken in zip(networks, times, strict=True):
            network.zero_grad(set_to_none=True)
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run_step(network, inputs, targets, autocast)
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 0:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]
