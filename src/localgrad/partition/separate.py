"""Blocks that can be called one by one, for what needs them: ranks of block parallel, and blocks that run again.

They come from torch.fx (`localgrad.partition.trace`) and must compute in either mode what the model's own forward
computes. Chained they are a module like any other, which the engine suspends at its cuts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.batches import call_model, map_tensors
from localgrad.errors import PartitionError
from localgrad.partition.blocks import Block, RecomputedBlock, check_shared_parameters, join, split
from localgrad.partition.cut import Cut
from localgrad.partition.moments import Partition
from localgrad.partition.trace import INPUTS, OUTPUT
from localgrad.recompute.parts import recomputed
from localgrad.suspension.points import Point
from localgrad.suspension.untouched import untouched


class _Step(nn.Module):
    """One module of a list, under a name of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Chain(nn.Module):
    """Modules that run one after the other, each on what the one before returned, and together are a model."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_Step(module) for module in modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *rest = self.steps
        value = first(*args, **kwargs)
        for step in rest:
            value = step(value)
        return value

    def check_equals(self, model: nn.Module, example: Any) -> None:
        """Raise `PartitionError` unless the modules compute what ``model`` does."""
        check_shared_parameters(model, list(self.steps), [f"modules[{k}]" for k in range(1, len(self.steps))])
        _compare(self, model, example, "the listed modules, one after the other,")


class _Door(nn.Module):
    """Stands where a block begins, outside what may run again."""

    def forward(self, *values: Any) -> None:
        pass


class SeparateBlocks(nn.Module):
    """Blocks that run one behind the other, as one forward.

    Args:
        blocks: in the order they run; a part of them where others run elsewhere.
        elsewhere: those that others run afterwards, on what is kept for them.
        several: whether a batch is a tuple of inputs.

    Attributes:
        again: indices of blocks to run again in the backward pass; set for each step.
        selective: whether they keep what convolutions, products and attention return.
    """

    def __init__(
        self,
        blocks: Sequence[Block | RecomputedBlock],
        elsewhere: Sequence[Block | RecomputedBlock] = (),
        several: bool = False,
    ) -> None:
        super().__init__()
        self.several = several
        self.elsewhere = tuple(elsewhere)  # no children
        self.parts = list(blocks)
        self.blocks = nn.ModuleList(blocks)
        self.doors = nn.ModuleList(_Door() for _ in blocks)
        self.again: Collection[int] = ()
        self.selective = False

    @property
    def points(self) -> tuple[Point, ...]:
        """Where blocks after the first begin, and where they take the features."""
        return tuple(Point(f"doors.{k}") for k in range(1, len(self.blocks)))

    def forward(self, *inputs: Any) -> Any:
        return self.run({INPUTS: inputs if self.several else inputs[0]})[OUTPUT]

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run the blocks on ``values``; what none of them reads any more is let go of."""
        for index, block in enumerate(self.parts):
            if index:
                self.doors[index](values[self.parts[index - 1].outputs[0]])
            arguments = [values[name] for name in block.inputs]
            later = (*self.parts[index + 1 :], *self.elsewhere)
            for name in dict.fromkeys(block.inputs):
                if not any(name in other.inputs for other in later):
                    del values[name]
            again = index in self.again and torch.is_grad_enabled()
            if again:
                outputs = recomputed(block, *arguments, owner=block.owner, selective=self.selective)
            else:
                outputs = block(*arguments)
            del arguments
            values |= zip(block.outputs, outputs, strict=True)
            del outputs
        return values


def separate_blocks(
    partition: Partition, cuts: Sequence[Cut], which: Sequence[int] = (), why: str = "separate blocks"
) -> list[Block | RecomputedBlock]:
    """The blocks between ``cuts`` as modules that share the model's parameters.

    Args:
        partition: of the model.
        cuts: in the order they run.
        which: indices of blocks that run unit by unit, each unit but the last again in the backward pass.
        why: who needs them, for messages.

    Raises:
        PartitionError: the model does not allow it, or they would not compute what its own forward does.
    """
    model, example = partition.model, as_by_now(partition.model, partition.example)
    listed = isinstance(model, Chain)
    if which and listed:
        raise PartitionError(
            f"recomputed blocks {tuple(which)}: a list of modules has no units to run again; name cut points instead"
        )
    positions = [0, *(cut.position for cut in cuts), 1 << 62]
    points, sizes = list(cuts), [1] * (len(cuts) + 1)
    for index in which:
        if not 0 <= index <= len(cuts):
            raise PartitionError(f"recomputed blocks {tuple(which)}: there are {len(cuts) + 1} blocks, counted from 0")
        inner = [cut for cut in partition.cuts if positions[index] < cut.position < positions[index + 1]]
        if not inner:
            begins = repr(cuts[index - 1].name) if index else "the input"
            raise PartitionError(
                f"recomputed blocks {tuple(which)}: block {index}, from {begins} on, is a single unit, with no cut "
                "point inside to recompute from; leave it out"
            )
        points += inner
        sizes[index] += len(inner)
    points.sort(key=lambda cut: cut.position)
    if not isinstance(example, (Tensor, tuple, list)):
        raise PartitionError(f"{why}: torch.fx takes a tensor or a tuple as example, not a {type(example).__name__}")
    if repeated := [cut.name for cut in points if cut.point.call]:
        raise PartitionError(f"{why}: {repeated[0]!r} is called several times; name a cut point that is called once")

    names = [cut.point.name for cut in points]
    # A module of a list takes one value: the features, or a nest whose first tensor they are.
    places = [Point(name) for name in names] if listed else [cut.point for cut in points]

    def made(inside: Collection[str]) -> list[Block | RecomputedBlock]:
        through = {"", *inside, *(name[:end] for name in names for end, mark in enumerate(name) if mark == ".")}
        _check_hooks(model, through, why)
        blocks = join(model, split(model, example, places, through), sizes)
        chained = SeparateBlocks(blocks, several=isinstance(example, (tuple, list)))
        shapes: list[Any] = []
        for door in chained.doors:
            door.register_forward_pre_hook(lambda _, args: shapes.append(getattr(tree_leaves(args)[0], "shape", None)))
        what = f"{why}: the blocks that torch.fx makes"
        _compare(chained, model, example, what, training=False)
        shapes.clear()
        _compare(chained, model, example, what)
        if shapes != [cut.shape for cut in cuts]:
            raise PartitionError(f"{why}: a module takes a nest of tensors, the first of which are not the features")
        return blocks

    try:
        return made(())
    except PartitionError:  # somebody opens the list that a module returns: torch.fx has to see it being made
        if listed or not (several := partition.returning_several()):
            raise
        return made(several)


def as_by_now(model: nn.Module, example: Any) -> Any:
    """The example on the device and in the precision to which the model has been moved since it was analysed."""
    first, known = next(model.parameters()), {parameter.dtype for parameter in model.parameters()}

    def moved(tensor: Tensor) -> Tensor:
        other = tensor.is_floating_point() and tensor.dtype not in known
        return tensor.to(first.device, first.dtype if other else tensor.dtype)

    return map_tensors(moved, example)


def _check_hooks(model: nn.Module, through: Collection[str], why: str) -> None:
    for path in sorted(through):
        module = model.get_submodule(path)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise PartitionError(
                f"{why} call the parts of {path or type(model).__name__!r} one by one, which would pass by the hooks "
                "or the changed forward that it has; remove them, or use a method that needs no separate blocks"
            )


def _compare(ours: nn.Module, model: nn.Module, example: Any, what: str, training: bool = True) -> None:
    """Raise `PartitionError` unless two modules return the same and move buffers the same way, in one mode."""
    seen = []
    for module in (model, ours):
        with untouched(model, training), torch.no_grad():
            torch.manual_seed(0)
            try:
                outputs = tree_leaves(call_model(module, example))
            except Exception as error:  # a module may fail in any way on what another one returned
                raise PartitionError(f"{what} do not run: {error}") from error
            seen.append([*outputs, *(buffer.clone() for buffer in model.buffers())])
    if len(seen[0]) != len(seen[1]) or not all(_equal(a, b) for a, b in zip(*seen, strict=True)):
        mode = "training" if training else "eval"
        raise PartitionError(
            f"{what} do not compute what {type(model).__name__}.forward does in {mode} mode on the example: list "
            "every module that runs, in order, functions such as flatten wrapped as modules"
        )


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
