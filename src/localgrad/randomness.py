"""Randomness as a function of where it is used, never of what a process happened to do before.

A draw is keyed by ``(seed, purpose, step, block, replica, ...)``. Resuming in mid-epoch, skipping a block or placing
blocks on different ranks therefore changes no draw.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from localgrad.errors import CheckpointError, TrainingError

Part = int | str


def key(*parts: Part) -> int:
    """A 63-bit seed that depends on every part and on their order; equal on every platform and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: Part) -> torch.Generator:
    """A CPU generator seeded with ``key(*parts)``."""
    return torch.Generator().manual_seed(key(*parts))


@contextlib.contextmanager
def seeded(*parts: Part, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch (CPU, and ``device`` if it is a CUDA device) with ``key(*parts)``; put the old state back on exit."""
    generators, devices = [torch.default_generator], []
    if device is not None and device.type == "cuda":
        index = _index(device)
        generators.append(torch.cuda.default_generators[index])
        devices.append(index)
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: that would also reseed devices whose state is not put back.
        for one in generators:
            one.manual_seed(key(*parts))
        yield


@contextlib.contextmanager
def seeded_everywhere(*parts: Part) -> Iterator[None]:
    """As `seeded`, for code that may also draw from ``random`` or ``numpy.random`` (image transforms)."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    value = key(*parts)
    random.seed(value)
    np.random.seed(value % 2**32)
    try:
        with seeded(*parts):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@dataclass(frozen=True)
class Keys:
    """What keys the draws of the engine besides block and step."""

    seed: int
    replica: int
    thread: threading.Thread


_active: ContextVar[Keys | None] = ContextVar("localgrad_keys", default=None)
_inside: list[threading.Thread] = []  # the thread that is inside `keyed_randomness`, as often as it has entered
_entering = threading.Lock()


@contextlib.contextmanager
def keyed_randomness(seed: int, replica: int = 0) -> Iterator[None]:
    """Inside it, `local_losses` keys dropout and stochastic depth by ``(seed, block, step, micro-batch, replica)``.

    Outside it, blocks draw from torch's global generators like any module does. Those belong to the process, and are
    seeded for the time that a block runs: only one thread at a time may be inside, and no other one may draw meanwhile.

    Raises:
        TrainingError: if another thread is inside, or takes a step in a copy of this context.

    Example:
        >>> import torch, localgrad
        >>> with localgrad.keyed_randomness(seed=0):
        ...     pass  # the training loop
    """
    thread = threading.current_thread()
    with _entering:
        if any(other is not thread and other.is_alive() for other in _inside):
            raise _two_threads()
        _inside.append(thread)
    token = _active.set(Keys(seed, replica, thread))
    try:
        yield
    finally:
        _active.reset(token)
        with _entering:
            _inside.remove(thread)


def _two_threads() -> TrainingError:
    return TrainingError(
        "two threads train under keyed_randomness, but torch's generators belong to the process: each would draw from "
        "the other's. Train in one thread, or in a process each"
    )


@contextlib.contextmanager
def draws_of(purpose: str, step: int, part: int, index: Part, device: torch.device) -> Iterator[None]:
    """The draws of one block or auxiliary network at one step; a no-op unless `keyed_randomness` is active."""
    keys = _active.get()
    if keys is None:
        yield
    elif keys.thread is not threading.current_thread():
        raise _two_threads()
    else:
        place, draws = (purpose, part, index), _draws.get()
        if draws is not None and draws.recording:
            with draws.recorded(place):
                yield
            return
        noted = contextlib.nullcontext() if draws is None else draws.noted(place)
        with seeded(keys.seed, purpose, step, part, index, keys.replica, device=device), noted:
            yield


class Draws:
    """The keyed draws of a step that is to be recorded as a CUDA graph, inside which no generator can be seeded.

    A step that runs as it is shows at which places it draws. Each of these gets a generator of its own, which stands
    for the device's while that place is recorded, and which `seed` sets before each replay. So a replayed step draws
    the same numbers as one that runs as it is.

    Attributes:
        generators: one for each place; the graph must know them before it is recorded.
        on_host: whether the step drew from a generator of the host, which no graph repeats.
        recording: whether the step is being recorded, and ``quiet`` whether at a place that draws nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generators: dict[tuple[str, int, Part], torch.Generator] = {}
        self.on_host = self.recording = self.quiet = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside it a step runs as it is, and shows where it draws."""
        token, before = _draws.set(self), host_state()
        try:
            yield
        finally:
            _draws.reset(token)
            self.on_host |= before != host_state()

    @contextlib.contextmanager
    def recorded_step(self) -> Iterator[None]:
        """Inside it a step is recorded."""
        token, self.recording = _draws.set(self), True
        try:
            yield
        finally:
            _draws.reset(token)
            self.recording = False

    @contextlib.contextmanager
    def recorded(self, place: tuple[str, int, Part]) -> Iterator[None]:
        """Inside it the device draws from the generator of ``place``, if that draws."""
        own = self.generators.get(place)
        kept, self.quiet = self.quiet, own is None
        try:
            with contextlib.nullcontext() if own is None else drawing_from(own):
                yield
        finally:
            self.quiet = kept

    @contextlib.contextmanager
    def noted(self, place: tuple[str, int, Part]) -> Iterator[None]:
        """Inside it a step draws at ``place``: from the device's generator, or from those of the host beside it."""
        on_cuda = self.device.type == "cuda"
        own = torch.cuda.default_generators[_index(self.device)].get_offset if on_cuda else torch.get_rng_state
        before, host = torch.as_tensor(own()), host_state()
        yield
        if not torch.equal(before, torch.as_tensor(own())):
            self.generators.setdefault(place, torch.Generator(self.device))
        self.on_host |= on_cuda and host != host_state()

    def seed(self, step: int) -> None:
        """Before a replay: the numbers of ``step``."""
        keys = _active.get()
        if keys is not None:
            for (purpose, part, index), own in self.generators.items():
                own.manual_seed(key(keys.seed, purpose, step, part, index, keys.replica))


_draws: ContextVar[Draws | None] = ContextVar("localgrad_draws", default=None)


def repeats_draws() -> bool:
    """Whether what runs again in the backward pass has to find generators as they were: not in a recorded step.

    Raises:
        TrainingError: a step is being recorded, and draws here.
    """
    draws = _draws.get()
    if draws is None or not draws.recording:
        return True
    if not draws.quiet:
        raise TrainingError("repeats draws in what runs again in the backward pass, which a CUDA graph cannot")
    return False


@contextlib.contextmanager
def drawing_from(own: torch.Generator) -> Iterator[None]:
    """Inside it ``own`` stands for the generator of its CUDA device, also while a graph is recorded."""
    default = torch.cuda.default_generators[_index(own.device)]
    kept = default.graphsafe_get_state()
    default.graphsafe_set_state(own)
    try:
        yield
    finally:
        default.graphsafe_set_state(kept)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def host_state() -> tuple[bytes, object, str]:
    """What the generators of torch (on the CPU), ``random`` and numpy will draw next, to be compared."""
    numbers = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), f"{numbers['key'].tobytes()!r}{numbers['pos']}"


def random_states() -> dict[str, Any]:
    """States of the global generators of torch (CPU, every CUDA device), numpy and ``random``: a tree to save.

    Tensors are uint8 (torch) and int64 of shape (624,) (numpy), on the CPU.
    """
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(words, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "python": random.getstate(),
    }


def set_random_states(state: dict[str, Any]) -> None:
    """Put back what `random_states` returned. States of CUDA devices that this machine lacks are left out.

    Raises:
        CheckpointError: ``state`` is not such a state.
    """
    try:
        name, words, position, has_gauss, gauss = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((name, words.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(state["torch"].cpu())
        for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), index)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"these are not the random states of a checkpoint ({type(error).__name__}: {error}); "
            "pass what random_states() returned."
        ) from error
