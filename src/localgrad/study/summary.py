"""What each block of a network costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localgrad import data, methods
from localgrad.config import Config
from localgrad.costs import cost, random_targets
from localgrad.errors import PartitionError
from localgrad.forward import SuspendedForward
from localgrad.localization import localize
from localgrad.measure.memory import saved_storages
from localgrad.measure.work import Rates, Work
from localgrad.network import LocalNetwork, block_infos
from localgrad.partition.units import called_as
from localgrad.suspension.untouched import untouched
from localgrad.train.experiment import build_network, build_task, device_of, explained


def summarize(config: Config, image_shape: tuple[int, int, int], num_classes: int, batch_size: int) -> dict[str, Any]:
    """Per block: parameters, FLOPs of a forward pass, bytes saved for the backward pass, each also of its heads; and
    the measured cost of a whole step for the method, end-to-end training and checkpointing (None where the model does
    not allow it).

    Args:
        config: model, method and blocks; its data set is not read.
        image_shape: (C, H, W).
        num_classes: outputs.
        batch_size: of the measured step, random images.
    """
    device = device_of(config.train.device)
    channels = image_shape[0]
    kind = data.kind_of(config.data.name)
    task = build_task(config, num_classes, (0.5,) * channels, (0.25,) * channels, kind)
    network = build_network(config, task, image_shape, device)
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(batch_size, *image_shape, device=device, generator=generator)
    targets = random_targets(kind, num_classes, inputs, generator)
    with explained(inputs):
        total = cost(network, inputs, targets)
    blocks = _blocks(network, inputs)
    e2e = methods.e2e(task)
    names = tuple(cut.name for cut in network.cuts) or 1
    references: dict[str, Any] = {}
    for name, other in (("e2e", e2e), ("checkpointing", methods.checkpointing(e2e))):
        try:
            whole = localize(network.model, other, names, example=torch.randn(2, *image_shape, device=device))
        except PartitionError:  # its blocks cannot be called one by one
            references[name] = None
        else:
            references[name] = asdict(cost(whole, inputs, targets))
    return {
        "model": config.model.name,
        "method": network.method.name,
        "batch_size": batch_size,
        "image_shape": list(image_shape),
        "blocks": blocks,
        "total": asdict(total),
        **references,
    }


def _blocks(network: LocalNetwork, inputs: Tensor) -> list[dict[str, Any]]:
    """One row for each block; the model runs once in training mode, statistics put back."""
    rows = []
    with untouched(network, training=True), network.opened(()) as opened:
        keep = [*network.parameters(), *network.buffers(), inputs]
        forward = opened.call(inputs)
        for info in block_infos(network):
            output, flops, saved = _measured(lambda: _next(forward), keep)
            head_flops = head_saved = 0
            with called_as(forward.arguments):
                for _, auxiliary in network.auxiliaries_at(info.index + 1):
                    leaf = output.detach().requires_grad_()
                    _, more, bytes_ = _measured(partial(auxiliary, leaf), [*keep, leaf])
                    head_flops, head_saved = head_flops + more, head_saved + bytes_
            rows.append(
                {
                    "block": info.index + 1,
                    "begins_at": info.begins_at,
                    "features": list(output.shape[1:]) if isinstance(output, Tensor) else [],
                    "parameters": info.parameters,
                    "head_parameters": info.head_parameters,
                    "twin_parameters": info.twin_parameters,
                    "flops": flops,
                    "head_flops": head_flops,
                    "saved_bytes": saved,
                    "head_saved_bytes": head_saved,
                }
            )
    return rows


def _next(forward: SuspendedForward) -> Any:
    """Run the next block; what it makes."""
    forward.proceed()
    return forward.features


def _measured(function: Callable[[], Any], exclude: list[Tensor]) -> tuple[Any, int, int]:
    with Work(Rates(1.0, 1.0)) as work:
        result, storages = saved_storages(function, exclude)
    return result, work.flops, sum(storages.values())
