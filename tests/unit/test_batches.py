"""How a batch is cut into parts: `localgrad.accumulation` against a plain loop over literal parts, in float64."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.batches import num_samples, rows
from localgrad.methods import accumulation, dgl

TASK = localgrad.tasks.classification(3)
BASE = dgl(TASK, head="linear")


class Attention(nn.Module):
    """Of x (B, T, C), with one mask (T, T) and one row of position ids (1, T) for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        x = x + self.places(places)
        for layer in self.layers:
            x = x + F.scaled_dot_product_attention(x, x, layer(x), attn_mask=mask)
        return self.head(x.mean(1))


def cut(model: Callable[[], nn.Module], example: Any, parts: int = 1) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    method = accumulation(BASE, parts=parts) if parts > 1 else BASE
    return localgrad.localize(model().double(), method, 2, example=example).double()


def assert_sums_up(
    model: Callable[[], nn.Module], example: Any, inputs: Any, of_part: Callable[[slice], Any], samples: int, parts: int
) -> None:
    """The gradients of ``parts`` are those of a loop over what ``of_part`` says is in each."""
    network, looped = cut(model, example, parts), cut(model, example)
    targets = torch.arange(samples) % 3
    localgrad.backward(network, inputs, targets)
    for part in range(parts):
        some = slice(samples * part // parts, samples * (part + 1) // parts)
        share = len(targets[some]) / samples
        for _, loss in localgrad.local_losses(looped, of_part(some), targets[some]):
            (loss * share).backward()
    for (name, p), q in zip(network.named_parameters(), looped.parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad), name


def attended(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 6, 8, generator=generator, dtype=torch.float64)
    return x, torch.ones(6, 6).tril().bool(), torch.arange(6)[None]


@pytest.mark.parametrize("samples, parts", [(4, 4), (4, 2), (5, 2), (6, 3), (6, 6)])  # of 6 samples the mask has rows
@pytest.mark.parametrize("form", ["tuple", "list", "mapping"])
def test_what_all_samples_share_goes_to_every_part(form: str, samples: int, parts: int) -> None:
    x, mask, places = attended(samples)

    def given(x: Tensor, *, turned: bool = False) -> Any:
        named = {"x": x, "places": places, "mask": mask} if turned else {"x": x, "mask": mask, "places": places}
        return {"tuple": (x, mask, places), "list": [x, mask, places], "mapping": named}[form]

    assert_sums_up(Attention, given(attended(2)[0]), given(x, turned=True), lambda some: given(x[some]), samples, parts)


def test_an_input_that_the_example_had_not_is_cut_by_its_rows() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.layers(x if scale is None else x * scale)

    x, scale = torch.randn(4, 8, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    assert_sums_up(Masked, (x[:2], None), (x, scale), lambda some: (x[some], scale[some]), 4, 2)


def test_several_inputs_in_a_list_count_for_what_losses_divide_by() -> None:
    """Of which a part has more than the other: labels of -100 do not count."""
    x, mask, places = attended(4)
    targets = torch.tensor([0, 1, 2, -100])
    network, whole = cut(Attention, attended(2), 2), cut(Attention, attended(2))
    localgrad.backward(network, [x, mask, places], targets)
    localgrad.backward(whole, (x, mask, places), targets)
    for p, q in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


def test_targets_of_another_length_are_refused() -> None:
    network = cut(Attention, attended(2), 2)
    with pytest.raises(localgrad.TrainingError, match="4 samples in inputs and 6 in targets"):
        localgrad.backward(network, attended(4), torch.arange(6) % 3)


Named = collections.namedtuple("Named", "x scale")


class Derived(Named):
    """A named tuple with a member of its own."""

    @property
    def scaled(self) -> Tensor:
        return self.x * self.scale


class Keyed(collections.UserDict):
    """A mapping that is no dict, with attributes, as those of tokenizers are."""

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        super().__init__(x=x, scale=scale)

    def __getattr__(self, name: str) -> Tensor:
        if name in ("x", "scale"):
            return self[name]
        raise AttributeError(name)


@dataclasses.dataclass(frozen=True)
class Data:
    """A dataclass that cannot be written to."""

    x: Tensor
    scale: Tensor
    kind: str = "any"


@dataclasses.dataclass
class Holder:
    """Nests: a named tuple in a list in a mapping."""

    inner: dict[str, list[Named]]

    @property
    def x(self) -> Tensor:
        return self.inner["a"][0].x

    @property
    def scale(self) -> Tensor:
        return self.inner["a"][0].scale


def held(x: Tensor, scale: Tensor) -> Holder:
    return Holder({"a": [Named(x, scale)]})


class Opaque:
    """What is not opened."""

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        self.x, self.scale = x, scale


class Scaled(nn.Module):
    """Reads a batch by attributes; ``kinds`` are the types that it got."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))

    def forward(self, batch: Any) -> Tensor:
        return self.layers(batch.x * batch.scale)


@pytest.mark.parametrize("make", [Named, Derived, Keyed, Data])
def test_kinds_of_inputs_are_kept(make: Callable[[Tensor, Tensor], Any]) -> None:
    x, scale = torch.randn(6, 8, dtype=torch.float64), torch.rand(6, 1, dtype=torch.float64)
    given = make(x, scale)
    assert num_samples(given) == 6
    assert_sums_up(Scaled, (make(x[:2], scale[:2]),), (given,), lambda some: (make(x[some], scale[some]),), 6, 2)
    assert given.x is x  # the batch itself stays whole
    part = rows(given, 1, 3)
    assert type(part) is make and torch.equal(part.scale, scale[1:3])


def test_shared_tensors_and_nests_in_such_inputs() -> None:
    """The mapping's list has one entry, no number of samples: it is opened."""
    x, scale = torch.randn(6, 8, dtype=torch.float64), torch.rand(1, 1, dtype=torch.float64)
    part = rows(Data(x, scale), 2, 5)
    assert torch.equal(part.x, x[2:5]) and part.scale is scale and part.kind == "any"
    nested = rows((x, held(x * 2, scale)), 2, 5)[1]
    assert type(nested) is Holder and torch.equal(nested.x, x[2:5] * 2) and nested.scale is scale
    frozen = rows((x, types.MappingProxyType({"scale": x})), 0, 1)[1]
    assert torch.equal(frozen["scale"], x[:1])


def test_an_example_without_a_number_of_samples_is_refused_by_that_name() -> None:
    x, scale = torch.randn(6, 8), torch.rand(6, 1)
    torch.manual_seed(0)
    for cutting in (2, ("layers.2",)):
        with pytest.raises(localgrad.PartitionError, match="no number of samples in the example, a tuple"):
            localgrad.localize(Scaled(), BASE, cutting, example=(Opaque(x, scale),))
