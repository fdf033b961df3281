"""Optimizer state of blocks that are not stepping, kept on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Offload:
    """Moves the state of each optimizer to its parameters' device for its step, and back to the host after it.

    On CUDA the host's memory is pinned and copies run on a stream of their own, the next optimizer's state while the
    current one's block computes; two of them are on the device at a time. On the CPU the copies are made all the same
    and only cost time. Numbers are copied, never changed.

    Args:
        optimizers: one per block, in the order they step.
        device: of the parameters.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
        self.optimizers, self.device = optimizers, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parked: list[dict[tuple[Tensor, str], Tensor]] = [{} for _ in optimizers]
        self.fetched: set[int] = set()

    @contextlib.contextmanager
    def at_hand(self, index: int) -> Iterator[None]:
        """Inside it, the state of optimizer ``index`` is on the device."""
        self._fetch(index)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for _, _, value in self._tensors(index):
                value.record_stream(current)
        yield
        following = (index + 1) % len(self.optimizers)
        for other in self.fetched - {following}:  # blocks of a wide span step from the last to the first
            self._park(other)
        self._fetch(following)

    def settle(self) -> None:
        """Bring everything to the host and wait until it is there, before the host reads it."""
        for index in sorted(self.fetched):
            self._park(index)
        if self.stream is not None:
            self.stream.synchronize()

    def _tensors(self, index: int) -> Iterator[tuple[dict[str, Any], tuple[Tensor, str], Tensor]]:
        for parameter, state in self.optimizers[index].state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.device == self.device:
                    yield state, (parameter, name), value

    def _fetch(self, index: int) -> None:
        if index in self.fetched:
            return
        self.fetched.add(index)
        with self._copying():
            for (parameter, name), host in self.parked[index].items():
                self.optimizers[index].state[parameter][name] = host.to(self.device, non_blocking=True, copy=True)

    def _park(self, index: int) -> None:
        self.fetched.discard(index)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._copying():
            for state, key, value in list(self._tensors(index)):
                host = self.parked[index].get(key)
                if host is None:
                    host = torch.empty_like(value, device="cpu", pin_memory=self.stream is not None)
                    self.parked[index][key] = host
                host.copy_(value, non_blocking=True)
                if self.stream is not None:
                    value.record_stream(self.stream)
                state[key[1]] = host

    def _copying(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
