"""Trying a model out without a trace: modes, buffers and random generators are put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def random_state() -> tuple[bytes, object, str]:
    """What the generators of torch (on the CPU), ``random`` and numpy will draw next, to be compared."""
    numbers = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), f"{numbers['key'].tobytes()!r}{numbers['pos']}"


@contextmanager
def untouched(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in one mode; on exit modes, buffers and random generators are as they were before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, b, b.clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    model.train(training)
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        model.train(modes[model])  # a module's own train() may do more than set the mode: drop what it cached, say
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # a forward may replace it: self.steps = self.steps + 1
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
