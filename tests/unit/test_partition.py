"""Finding cut points and making blocks, on models written to be hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import localgrad
from localgrad import PartitionError, localize, separate_blocks
from localgrad.partition import INPUTS, OUTPUT, Partition

TASK = localgrad.tasks.classification(3)
E2E, DGL = localgrad.methods.e2e(TASK), localgrad.methods.dgl(TASK)
WINDOWS = localgrad.methods.windows(DGL)
X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def run(blocks: Sequence[Any], inputs: Any) -> Any:
    values: dict[str, Any] = {INPUTS: inputs}
    for block in blocks:
        values |= zip(block.outputs, block(*[values[name] for name in block.inputs]), strict=True)
    return values[OUTPUT]


def cut_names(model: nn.Module, example: Any = X) -> list[str]:
    return [cut.name for cut in Partition(model, example).cuts]


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *between, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Branch(nn.Module):
    """Control flow that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 100:
            x = -x
        return self.second(self.first(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(F.relu(self.a(x))))


class Direct(nn.Module):
    """Reads mode, buffers and parameters in a forward that has to be traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), weight_norm(nn.Linear(8, 8))
        self.c = nn.Linear(8, 3)
        self.position = nn.Parameter(torch.randn(1, 8))
        self.register_buffer("index", torch.randperm(8))
        self.register_buffer("table", torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, self.training) + self.position[:, self.index.flip(0)]
        x = self.b(x) + self.table.mean(0) + torch.linspace(0, 1, 8).to(x.dtype)
        return self.c(x)


class Pair(nn.Module):
    """Returns features and their size, and takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, size: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        return self.inner(x).view(size), (x.shape[0], 8)


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Pair() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[0], 8)
        for stage in self.stages:
            x, size = stage(x, size)
        return self.head(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + torch.rand(8))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.a(x) * y)))


def test_a_cut_lies_before_layers_with_weights_and_outside_residual_branches() -> None:
    assert cut_names(mlp(nn.BatchNorm1d(8), nn.ReLU())) == ["3", "5"]
    assert cut_names(Residual()) == ["a", "head"]  # and not "b"
    preact = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)), nn.Linear(8, 3))
    assert cut_names(preact) == ["1", "2"]  # not also before "1.1": only a norm would lie between


def test_a_module_that_cannot_be_traced_is_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Branch(), nn.Linear(8, 3))
    network = localize(model, DGL, 3, example=X)
    assert [cut.name for cut in network.cuts] == ["1", "2"]
    blocks = separate_blocks(network)
    for sign in (1, -1):
        assert torch.equal(run(blocks, sign * X), model(sign * X))


def test_a_model_that_cannot_be_traced_names_the_line_and_offers_a_list() -> None:
    model = Untraceable()
    network = localize(model, DGL, 2, example=X)
    with pytest.raises(PartitionError, match=r"test_partition\.py:\d+ `if x\.sum\(\) > 100:`.*\[model\.first"):
        separate_blocks(network)
    network = localize(model, DGL, [model.first, model.second], example=X)
    assert torch.equal(run(separate_blocks(network), X), model(X))
    localgrad.backward(network, X, Y)
    assert all(p.grad is not None for p in model.parameters())


def test_mode_buffers_and_parameters_read_in_a_traced_forward_stay_alive() -> None:
    model = Direct()
    network = localize(model, E2E, ("b", "c"), example=X)
    blocks = separate_blocks(network)
    assert not torch.equal(run(blocks, X), run(blocks, X))
    model.eval()
    assert torch.equal(run(blocks, X), model(X))
    with torch.no_grad():
        model.index.copy_(torch.arange(8))
        model.position.add_(1)
    model.table = torch.ones(2, 8)
    assert torch.equal(run(blocks, X), model(X))
    for inputs in (X.double(), X.double()[:1]):
        network.to(torch.float64)
        assert torch.equal(run(blocks, inputs), model(inputs))
    model.to(torch.float32)
    assert torch.equal(run(blocks, X), model(X))
    localgrad.backward(network, X, Y)
    assert all(p.grad is not None for p in model.parameters())


def test_modules_that_return_several_values_are_traced_through() -> None:
    model = Sizes()
    network = localize(model, DGL, 3, example=X)
    assert torch.equal(run(separate_blocks(network), X[:1]), model(X[:1]))
    localgrad.backward(network, X, Y)
    assert all(p.grad is not None for p in model.parameters())


class Opaque(nn.Module):
    """Returns and takes pairs, and cannot be traced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(8, width)

    def forward(self, pair: tuple[Tensor, Tensor], shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        x, y = pair if isinstance(pair, tuple) else (pair, pair)
        x = self.inner(-x if x.sum() > 100 else x + y + shift)
        return x, x.detach()


class Opaques(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Opaque(8), Opaque(8), Opaque(3)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.c(self.b(self.a(x, shift)))


def test_modules_of_a_list_hand_on_what_they_return_as_it_is() -> None:
    model = Opaques()
    network = localize(model, E2E, [model.a, model.b, model.c], example=(X, X))
    assert torch.equal(run(separate_blocks(network), (X, 2 * X))[0], model(X, 2 * X)[0])


class Stages(nn.Module):
    """Returns what each stage made, as encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for stage in self.stages:
            found.append(stage(found[-1]).relu())
        return found[1:]


class Joined(nn.Module):
    """Takes the features behind something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 8)

    def forward(self, skip: Tensor, *, features: Tensor) -> Tensor:
        return self.inner(torch.cat([skip, features], 1)).relu()


class Skips(nn.Module):
    """A decoder that opens the list of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Stages(), nn.Linear(8, 3)
        self.decoder = nn.ModuleList(Joined() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = self.encoder(x)
        for step, skip in zip(self.decoder, reversed(skips), strict=True):
            x = step(skip, features=x)
        return self.head(x)


@pytest.mark.parametrize(
    ("cuts", "made"),
    [(["decoder.0"], [3, 1]), (["head"], [1, 1]), (["encoder.stages.1", "decoder.0", "decoder.1"], [1, 2, 1, 1])],
)
def test_features_are_the_argument_that_a_cut_names_and_what_else_crosses_goes_by_name(
    cuts: list[str], made: list[int]
) -> None:
    model = Skips()
    blocks = separate_blocks(localize(model, DGL, cuts, example=X))
    assert [len(block.outputs) for block in blocks] == made
    assert torch.equal(run(blocks, X), model(X))
    if cuts == ["decoder.0"]:
        assert torch.equal(blocks[0](X)[0], model.encoder(X)[-1])


def test_shared_parameters() -> None:
    model = Tied()
    assert cut_names(model) == ["b", "head"]
    with pytest.raises(PartitionError, match=r"parameter 'b\.weight' is used before and after 'c'.*shared=True"):
        localize(model, DGL, ("c",), example=X)


def test_draws_of_a_fixed_size_are_not_frozen() -> None:
    network = localize(Noisy(), DGL, 2, example=X)
    with pytest.raises(PartitionError, match="Noisy draws random numbers of a fixed size"):
        separate_blocks(network)


def test_several_inputs() -> None:
    model = TwoInputs()
    network = localize(model, DGL, 2, example=(X, X))
    assert torch.equal(run(separate_blocks(network), (X, 2 * X)), model(X, 2 * X))
    localgrad.backward(network, (X, X), Y)
    with pytest.raises(
        PartitionError, match=r"TwoInputs does not run in training mode on example=\(6, 8\) float32 on cpu: .*'y'"
    ):
        localize(model, DGL, 2, example=X)


@pytest.mark.filterwarnings("ignore:block 1, from .1. on, keeps")
def test_in_place_layers_at_a_boundary() -> None:
    model = mlp(nn.ReLU(inplace=True))
    assert cut_names(model) == ["2", "4"]
    for method in (E2E, WINDOWS):
        with pytest.raises(PartitionError, match=r"'1' overwrites the features.*inplace=False"):
            localize(model, method, ("1",), example=X)
    network = localize(model, DGL, ("1",), example=X)
    localgrad.backward(network, X, Y)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = mlp(nn.ReLU()).to(dtype)
    network = localize(model, E2E, 3, example=X.to(dtype))
    assert torch.equal(run(separate_blocks(network), X.to(dtype)), model(X.to(dtype)))
    localgrad.backward(network, X.to(dtype), Y)
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    TASK.loss(model(X.to(dtype)), localgrad.Batch(X, Y, 0)).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (("5",), r"unknown module '5'; known"),
        (("steem",), r"unknown module 'steem'; did you mean 'stem'"),
        (("stem",), r"'stem' takes nothing that was computed from parameters before it"),
        (("head", "head"), r"'head' begins where 'head' does; name it once"),
    ],
)
def test_cuts_that_cannot_be(cuts: tuple[str, ...], message: str) -> None:
    with pytest.raises(PartitionError, match=message) as caught:
        localize(Residual(), DGL, cuts, example=X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(2, 9), r"example=\(2, 9\) float32 on cpu: .*mat1"),
        (X.double(), r"example=\(6, 8\) float64 on cpu"),
        (torch.empty(2, 8, device="meta"), r"example=\(2, 8\) float32 on meta"),
        ("x", r"example=a str"),
        ((X, X), r"takes 2 positional arguments but 3 were given"),
    ],
)
def test_examples_that_do_not_fit(example: Any, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        localize(Residual(), DGL, 2, example=example)


def test_the_last_layout_is_that_of_the_last_maps() -> None:
    x = torch.randn(2, 3, 32, 32)
    layout = Partition(localgrad.models.resnet8(), x).final_layout
    assert (layout.kind, layout.channels, layout.grid) == ("maps", 64, (8, 8))
    vit = localgrad.models.create("timm:vit_tiny_patch16_224", num_classes=3, image_size=32, depth=2)
    layout = Partition(vit, x).final_layout
    assert (layout.kind, layout.channels, layout.grid, layout.prefix) == ("tokens", 192, (2, 2), 1)
    assert cut_names(vit, x) == ["blocks", "blocks.1", "head"]


class Sized(nn.Module):
    """Needs the grid its tokens form besides the tokens, and returns both."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.project, self.factor = nn.Linear(8, 8 * factor), factor

    def forward(self, x: Tensor, size: tuple[int, int], *, scale: float) -> tuple[Tensor, tuple[int, int]]:
        assert x.shape[1] == size[0] * size[1]
        x = self.project(x).unflatten(2, (8, self.factor)).mean(3)
        return x + scale * F.relu(x), size


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(Sized(k) for k in (1, 2, 3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x, size = block(x, size, scale=0.5)
        return self.head(x.mean(1))


def test_copies_of_units_get_the_sizes_that_the_units_are_called_with() -> None:
    model, images = Grid(), torch.randn(6, 3, 16, 16)
    network = localize(model, localgrad.methods.man_pp(DGL), 4, example=images[:2])
    losses = localgrad.backward(network, images, Y)
    assert len(losses) == 4 and all(p.grad is not None for p in model.parameters())
    unit = network.twins[0].source
    features = torch.randn(6, 16, 8)
    assert unit.module is model.blocks[0]
    assert torch.equal(unit(features), model.blocks[0](features, (4, 4), scale=0.5)[0])


class TwoBack(nn.Module):
    """Each cell reads what the two before it returned, as NASNet's do: two tensors cross everywhere."""

    def __init__(self, mixed: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.cells = nn.ModuleList(nn.Linear(16 if mixed else 8, 8) for _ in range(4))
        self.head, self.mixed = nn.Linear(16, 3), mixed

    def forward(self, x: Tensor) -> Tensor:
        before, now = x @ self.stem.weight.T, self.stem(x).relu()
        for cell in self.cells:
            before, now = now, cell(torch.cat([before, now], 1) if self.mixed else before).relu()
        return self.head(torch.cat([before, now], 1))


def test_where_two_tensors_cross_the_one_computed_from_the_other_is_the_features() -> None:
    model, inputs = TwoBack(), torch.randn(6, 4)
    assert [cut.name for cut in Partition(model, inputs).cuts] == ["head"]
    network = localize(model, DGL, 5, example=inputs)
    assert [cut.name for cut in network.cuts] == ["cells.1", "cells.2", "cells.3", "head"]
    localgrad.testing.assert_isolated(network, inputs, Y)
    assert [cut.name for cut in localize(model, DGL, ["cells.2"], example=inputs).cuts] == ["cells.2"]
    F.cross_entropy(model(inputs), Y).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    localgrad.backward(localize(model, E2E, 5, example=inputs), inputs, Y)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6)


def test_streams_that_never_meet_are_not_cut() -> None:
    with pytest.raises(PartitionError, match="this TwoBack has 1 cut points"):
        localize(TwoBack(mixed=False), DGL, 3, example=torch.randn(6, 4))


class Caching(nn.Module):
    """Keeps something in eval mode and forgets it in training mode, by a ``train`` of its own that returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.cache: Tensor | None = None

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        if mode:
            self.cache = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.layer(x) + self.shift
        self.cache = self.shift.detach().clone() if self.cache is None else self.cache
        return self.layer(x) + self.cache


def test_nothing_that_a_module_keeps_in_eval_mode_survives() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 8), Caching(), Caching(), nn.Linear(8, 3)), torch.randn(6, 4)
    nn.Module.train(model)
    network = localize(model, localgrad.methods.man_pp(DGL), 3, example=inputs)
    assert model[1].cache is None and model[2].cache is None
    localgrad.backward(network, inputs, Y)
