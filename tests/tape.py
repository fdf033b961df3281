"""What stands for CUDA graphs on a CPU: operations of a step, played again on the same tensors without Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from localgrad import randomness


class Listening(TorchDispatchMode):
    def __init__(self, rows: list[Callable[[], None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Aliases: the engine swaps what tensors hold, and lets go of it.
        given, options = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        fresh = [value.alias_info is None for value in func._schema.returns]
        kept = [t.detach() for t in tree_leaves(result) if isinstance(t, Tensor)]

        def play() -> None:
            again = [t for t in tree_leaves(func(*given, **options)) if isinstance(t, Tensor)]
            for old, new in zip(kept, again, strict=True) if all(fresh) else ():
                old.copy_(new)

        self.rows.append(play)
        return result


class Tape:
    """Records steps for `localgrad.train.capture.Captured`.

    Numbers that Python computed stay what they were, as in a CUDA graph. While recording it runs the step, which a
    graph does not: so the first replay does nothing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.replayed = 0
        self.rows: list[Callable[[], None]] = []
        monkeypatch.setattr(randomness, "drawing_from", self.drawing_from)

    def __call__(
        self, work: Callable[[], Any], generators: Sequence[torch.Generator]
    ) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        rows: list[Callable[[], None]] = []
        self.rows = rows
        with Listening(rows):
            result = work()
        first = [True]

        def replay() -> None:
            self.replayed += 1
            if first:
                first.clear()
                return
            with torch.no_grad():
                for play in rows:
                    play()

        return replay, result

    @contextlib.contextmanager
    def drawing_from(self, own: torch.Generator) -> Iterator[None]:
        """As `localgrad.randomness.drawing_from`, for the generator of the CPU, and when the rows are played again."""
        kept: list[Tensor] = []

        def enter() -> None:
            kept.append(torch.get_rng_state())
            torch.set_rng_state(own.get_state())

        def leave() -> None:
            own.set_state(torch.get_rng_state())
            torch.set_rng_state(kept.pop())

        enter()
        self.rows.append(enter)
        yield
        leave()
        self.rows.append(leave)
