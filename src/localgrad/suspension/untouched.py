"""Trying a model out without a trace: modes, buffers, attributes and random generators are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from localgrad.state import StateKept


@contextmanager
def untouched(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in one mode; on exit modes, `localgrad.state.State` and generators are as they were before."""
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with StateKept(model), torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        model.train(training)
        try:
            yield
        finally:
            model.train(modes[model])  # a module's own train() may do more than set the mode: drop what it cached, say
            for module, mode in modes.items():
                module.training = mode
