"""Every exported head on every layout of features, and how layouts are read off an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import heads
from localgrad.errors import MethodError, PartitionError
from localgrad.layout import Layout, Pool, ToMaps, layout_of
from localgrad.method import Auxiliary, Method, Term
from localgrad.site import Site
from localgrad.spans import Local, Span

OUTPUTS = 5


class ChannelsLast(nn.Module):
    """Linear layers and LayerNorm over the last of four dimensions, like Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.one = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        self.two = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.fc = nn.Linear(8, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return self.fc(self.two(self.one(x)).mean((1, 2)))


class Tokens(nn.Module):
    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 8)) if prefix else None
        self.one, self.two = nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.fc = nn.Linear(8, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        return self.fc(self.two(self.one(x)).mean(1))


def maps() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, OUTPUTS)),
    )


def vector() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 96, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        nn.Linear(8, OUTPUTS),
    )


# Images of 12 x 8: every grid is 6 x 4, so that a mistaken height shows.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str], Layout]] = {
    "maps": (maps, ("1", "2.2"), Layout("maps", 8, (6, 4))),
    "channels_last": (ChannelsLast, ("two", "fc"), Layout("channels_last", 8, (6, 4))),
    "tokens": (lambda: Tokens(0), ("two", "fc"), Layout("tokens", 8, (6, 4), 0)),
    "tokens with class token": (lambda: Tokens(1), ("two", "fc"), Layout("tokens", 8, (6, 4), 1)),
    "tokens with registers": (lambda: Tokens(5), ("two", "fc"), Layout("tokens", 8, (6, 4), 5)),
    "vector": (vector, ("1", "2"), Layout("vector", 8, (1, 1))),
}
# A detector's head needs a detector, that of language models tokens in a line: they have tests of their own.
ELSEWHERE = ("Detection", "TokenReadOut")
HEADS = {
    name: (lambda name=name: getattr(heads, name)(OUTPUTS))
    if name not in ("AttentionMap", "Decoder", "Patches", "Projection", "Remaining")
    else getattr(heads, name)
    for name in heads.__all__
    if name not in ("Spec", "named", *ELSEWHERE)
}
HEADS["Patches"] = lambda: heads.Patches(heads.MLP(OUTPUTS))
HEADS["Remaining"] = lambda: heads.Remaining(heads.Linear(OUTPUTS), tail=1)
ON_EVERY_LAYOUT = pytest.mark.parametrize("kind", MODELS)


def build(kind: str, head: Callable[[Site], nn.Module]) -> tuple[localgrad.LocalNetwork, list[Site]]:
    sites: list[Site] = []

    def noting(site: Site) -> nn.Module:
        sites.append(site)
        return head(site)

    torch.manual_seed(0)
    model, cuts, _ = MODELS[kind]
    task = localgrad.tasks.classification(OUTPUTS)
    method = Method("one", task, (Term(noting, lambda out, _: out.square().mean()),), Local())
    return localgrad.localize(model(), method, cuts[:1], example=torch.randn(2, 3, 12, 8)), sites


def test_heads_that_are_tested_are_those_exported() -> None:
    assert set(HEADS) == set(heads.__all__) - {"Spec", "named", *ELSEWHERE}


def _named(network: localgrad.LocalNetwork) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the first block, by their names in the model."""
    own = {id(p) for p in network.parameters_of(0)}
    return [(name, p) for name, p in network.model.named_parameters() if id(p) in own]


@ON_EVERY_LAYOUT
@pytest.mark.parametrize("name", HEADS)
def test_every_head_reads_every_layout(name: str, kind: str) -> None:
    network, sites = build(kind, HEADS[name]())
    layout = MODELS[kind][2]
    assert sites[0].layout == layout and sites[0].channels == 8
    (features,) = localgrad.separate_blocks(network)[0](torch.randn(7, 3, 12, 8))
    head = network.auxiliary["0-1"].heads[0]
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    output = head(features)
    expected = {
        "AttentionMap": (7, 1, *layout.grid),
        "Decoder": (7, 3, 12, 8),
        "FCN": (7, OUTPUTS, *layout.grid),
        "Projection": (7, 8) if kind == "vector" else (7, 8, 6, 4),
    }
    assert tuple(output.shape) == expected.get(name, (7, OUTPUTS))
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    for path, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), path
    for path, parameter in _named(network):
        # Where there is a class token read-outs see that and nothing else; the other heads read the grid.
        class_token = name in ("Linear", "Remaining") and layout.prefix > 0
        reads = class_token if path == "prefix" else not class_token if path.startswith("stem") else True
        assert parameter.grad is not None and bool(parameter.grad.any()) == reads, path


@ON_EVERY_LAYOUT
def test_to_maps_puts_each_position_where_it_was(kind: str) -> None:
    network, sites = build(kind, heads.Linear(OUTPUTS))
    features, *_ = localgrad.features(network, torch.randn(3, 3, 12, 8))
    layout = sites[0].layout
    found = ToMaps(layout)(features)
    height, width = layout.grid
    assert found.shape == (3, 8, height, width)
    for row in range(height):
        for column in range(width):
            at = {
                "maps": lambda r=row, c=column: features[:, :, r, c],
                "channels_last": lambda r=row, c=column: features[:, r, c],
                "tokens": lambda r=row, c=column: features[:, layout.prefix + r * width + c],
                "vector": lambda: features,
            }[layout.kind]()
            assert torch.equal(found[:, :, row, column], at)
    pooled = Pool(layout)(features)
    expected = features[:, 0] if layout.prefix else found.mean((2, 3))
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(
    "tokens, image, grid, prefix",
    [
        (196, (224, 224), (14, 14), 0),
        (197, (224, 224), (14, 14), 1),
        (198, (224, 224), (14, 14), 2),
        (201, (224, 224), (14, 14), 5),
        (64, (32, 32), (8, 8), 0),
        (65, (32, 32), (8, 8), 1),
        (17, (8, 8), (4, 4), 1),
        (1, (32, 32), (1, 1), 0),
        (33, (32, 64), (4, 8), 1),
        (32, (64, 32), (8, 4), 0),
        (24 * 10 + 4, (96, 40), (24, 10), 4),
        (45, (32, 32), (45,), 0),
    ],
)
def test_layout_of_tokens(tokens: int, image: tuple[int, int], grid: tuple[int, ...], prefix: int) -> None:
    found = layout_of(torch.zeros(2, tokens, 6), torch.zeros(2, 3, *image))
    assert found == Layout("tokens", 6, grid, prefix)


def test_layout_of_the_rest() -> None:
    images = torch.zeros(2, 3, 20, 30)
    assert layout_of(torch.zeros(2, 6), images) == Layout("vector", 6, (1, 1))
    assert layout_of(torch.zeros(2, 6, 10, 15), images) == Layout("maps", 6, (10, 15))
    assert layout_of(torch.zeros(2, 6, 10, 15), images, "first") == Layout("maps", 6, (10, 15))
    assert layout_of(torch.zeros(2, 10, 15, 6), images, "last") == Layout("channels_last", 6, (10, 15))
    for length in (9, 10):  # words form no square and have no class token that anybody could know of
        assert layout_of(torch.zeros(2, length, 6), torch.zeros(2, length)) == Layout("tokens", 6, (length,))
    for shape in ((2,), (2, 3, 4, 5, 6, 7)):
        with pytest.raises(PartitionError, match="at a boundary"):
            layout_of(torch.zeros(shape), images)


@pytest.mark.parametrize("layers", ["", "1c", "c1f", "1c0f", "12c2f", "1c2f ", "2f1c"])
def test_conv_refuses_what_it_cannot_read(layers: str) -> None:
    with pytest.raises(MethodError, match="1c2f"):
        heads.Conv(10, layers)


@pytest.mark.parametrize(
    "size, sides",
    [(1024, (6, 4)), (192, (6, 4)), (191, (3, 4)), (64, (3, 2)), (47, (2, 2)), (31, (2, 1)), (8, (1, 1)), (1, (1, 1))],
)
def test_pooled_linear_keeps_to_its_size(size: int, sides: tuple[int, int]) -> None:
    network, _ = build("maps", heads.PooledLinear(OUTPUTS, size))
    *_, linear = network.auxiliary["0-1"].heads[0]
    assert linear.in_features == 8 * sides[0] * sides[1]
    assert not linear.weight.any()


def test_decoder_works_at_a_share_of_the_image() -> None:
    network, _ = build("maps", heads.Decoder(scale=0.5))
    features, *_ = localgrad.features(network, torch.randn(2, 3, 12, 8))
    assert network.auxiliary["0-1"].heads[0](features).shape == (2, 3, 6, 4)


def test_patches_keep_the_memory_format() -> None:
    """Else each convolution behind them, forward and backward, begins by copying what it reads."""
    network, _ = build("maps", heads.Patches(heads.Decoder(scale=0.5)))
    head = network.auxiliary["0-1"].heads[0].double()
    maps, *_ = localgrad.features(network, torch.randn(2, 3, 12, 8))
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = maps.double().contiguous(memory_format=memory_format).requires_grad_()
        answers = head.to(memory_format=memory_format)(features)
        (gradient,) = torch.autograd.grad(answers.square().sum(), features)
        found.append((answers, gradient))
        assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in found[-1])
    for plain, last in zip(*found, strict=True):
        torch.testing.assert_close(plain, last, rtol=1e-12, atol=1e-12)


# --- the auxiliary network and its weights ---------------------------------------------------------------------------


def method(weight: float | Callable[[Site], float]) -> Method:
    task = localgrad.tasks.classification(OUTPUTS)
    return Method("m", task, (Term(heads.Linear(OUTPUTS), task.loss, weight),), Local())


def test_a_term_of_weight_0_is_not_built() -> None:
    _, sites = build("maps", heads.Linear(OUTPUTS))
    task = localgrad.tasks.classification(OUTPUTS)
    two = Method("m", task, (Term(heads.Linear(3), task.loss, 0.0), Term(heads.Linear(4), task.loss, 0.5)))
    auxiliary = Auxiliary(two, sites[0])
    assert [(term.weight, weight) for term, weight in auxiliary.terms] == [(0.5, 0.5)]
    assert [head[-1].out_features for head in auxiliary.heads] == [4]
    for bad, message in ((method(0.0), "every term has weight 0"), (replace(two, terms=()), "no terms")):
        with pytest.raises(MethodError, match=message):
            Auxiliary(bad, sites[0])
    for weight in (-1.0, float("nan"), lambda site: -0.5):
        with pytest.raises(MethodError, match="at least 0"):
            Auxiliary(method(weight), sites[0])


def test_ramp_runs_over_the_boundaries() -> None:
    _, sites = build("maps", heads.Linear(OUTPUTS))
    ramp = localgrad.Ramp(5.0, 1.0)

    def along(num_blocks: int) -> list[float]:
        return [ramp(replace(sites[0], span=Span(k, k + 1), num_blocks=num_blocks)) for k in range(num_blocks - 1)]

    assert along(2) == [5.0]
    assert along(3) == [5.0, 1.0]
    assert along(5) == pytest.approx([5.0, 5 - 4 / 3, 5 - 8 / 3, 1.0])
    assert ramp(replace(sites[0], span=Span(0, 4), num_blocks=5)) == 1.0  # the boundary counts, not the start


def test_auxiliary_networks_take_on_the_precision_of_the_model() -> None:
    task = localgrad.tasks.classification(OUTPUTS)
    for dtype in (torch.float64, torch.bfloat16):
        network = localgrad.localize(
            maps().to(dtype), localgrad.methods.dgl(task), 2, example=torch.randn(2, 3, 12, 8).to(dtype)
        )
        assert {p.dtype for p in network.parameters()} == {dtype}
        localgrad.backward(network, torch.randn(4, 3, 12, 8).to(dtype), torch.tensor([0, 1, 2, 3]))
