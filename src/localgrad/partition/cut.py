"""A place where a block may begin."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localgrad.partition.hints import Hint
from localgrad.suspension.points import Point


@dataclass(frozen=True)
class Cut:
    """A place where a block may begin.

    Args:
        name: path of the module it begins with; ``aliases`` are other modules that begin at the same place.
        position: of the moment on autograd's clock.
        shape: of the example's features there.
        channels_hint: where the neighbouring layers look for channels.
        tail: whether only the model's own head follows: a classifier, that is, no layer with weight matrices whose
            output has positions; or, where the model's answers have positions, the modules that make them.
        point: the call of the module, and where it takes the features.
        overwritten: whether the features are overwritten in place later.
        taps: what else crosses, by the modules that return or take it, or the variables that hold it.
        shared: parameters that are read on both sides.
    """

    name: str
    aliases: tuple[str, ...]
    position: int
    shape: tuple[int, ...]
    channels_hint: Hint
    tail: bool
    point: Point
    overwritten: bool = False
    taps: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def with_alias(self, name: str) -> Cut:
        """The same place, known by one more module; the highest of its modules gives it its name."""
        if name == self.name or name in self.aliases:
            return self
        names = sorted((self.name, *self.aliases, name), key=lambda one: (one.count("."), len(one)))
        return replace(self, name=names[0], aliases=tuple(names[1:]))
