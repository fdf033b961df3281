"""What each block of a network costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from localgrad import data, methods
from localgrad.bench.cost import cost, random_targets
from localgrad.bench.memory import saved_storages
from localgrad.config import Config
from localgrad.network import LocalNetwork, block_infos
from localgrad.train.experiment import build_network, build_task, device_of, explained


def summarize(config: Config, image_shape: tuple[int, int, int], num_classes: int, batch_size: int) -> dict[str, Any]:
    """Per block: parameters, FLOPs of a forward pass, bytes saved for the backward pass, each also of its heads; and
    the measured cost of a whole step for the method, end-to-end training and checkpointing.

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
    method = network.method
    references = {}
    for name, other in (("e2e", methods.e2e(task)), ("checkpointing", methods.checkpointing(methods.e2e(task)))):
        network.method = other
        references[name] = asdict(cost(network, inputs, targets))
        references[name]["auxiliary_parameters"] = 0
    network.method = method
    return {
        "model": config.model.name,
        "method": method.name,
        "batch_size": batch_size,
        "image_shape": list(image_shape),
        "blocks": blocks,
        "total": asdict(total),
        **references,
    }


def _blocks(network: LocalNetwork, inputs: Tensor) -> list[dict[str, Any]]:
    """One row for each block; runs it once in training mode, statistics put back."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    keep = [*network.parameters(), *network.buffers(), inputs]
    values: dict[str, Any] = {"inputs": inputs}
    rows = []
    for info, block in zip(block_infos(network), network.blocks, strict=True):
        arguments = [values[name] for name in block.inputs]
        outputs, flops, saved = _measured(partial(block, *arguments), keep)
        detached = [o.detach() if isinstance(o, Tensor) else o for o in outputs]
        values |= zip(block.outputs, detached, strict=True)
        head_flops = head_saved = 0
        for _, auxiliary in network.auxiliaries_at(info.index + 1):
            leaf = detached[0].requires_grad_()
            _, more, bytes_ = _measured(partial(auxiliary, leaf), [*keep, leaf])
            head_flops, head_saved = head_flops + more, head_saved + bytes_
            leaf.requires_grad_(False)
        rows.append(
            {
                "block": info.index + 1,
                "begins_at": info.begins_at,
                "features": list(outputs[0].shape[1:]) if isinstance(outputs[0], Tensor) else [],
                "parameters": info.parameters,
                "head_parameters": info.head_parameters,
                "twin_parameters": info.twin_parameters,
                "flops": flops,
                "head_flops": head_flops,
                "saved_bytes": saved,
                "head_saved_bytes": head_saved,
            }
        )
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    return rows


def _measured(function: Callable[[], Any], exclude: list[Tensor]) -> tuple[Any, int, int]:
    with FlopCounterMode(display=False) as counter:
        result, storages = saved_storages(function, exclude)
    return result, counter.get_total_flops(), sum(storages.values())
