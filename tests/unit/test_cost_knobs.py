"""What makes an auxiliary network cheaper: pooling, narrower heads, fewer boundaries and steps, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import bridges, heads, methods
from localgrad.bridges.momentum import MomentumBridge
from localgrad.costs import Cost, cost
from localgrad.method import Method
from localgrad.recompute.parts import Recomputed
from localgrad.site import Site

TASK = localgrad.tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)


def network_of(
    method: Method, num_blocks: int = 7, model: Callable[[], nn.Module] | None = None
) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    built = localgrad.models.create("resnet20") if model is None else model()
    return localgrad.localize(built, method, num_blocks, example=images(2))


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def targets(count: int = 8) -> Tensor:
    return torch.arange(count) % 10


def cost_of(method: Method) -> Cost:
    return cost(network_of(method), images(), targets())


def infopro(**options: object) -> Method:
    return methods.infopro(TASK, **options)


CHEAPER = {
    "pooled": (lambda: methods.man(methods.dgl(TASK)), lambda: methods.man(methods.pooled(methods.dgl(TASK)))),
    "decoder_scale": (infopro, lambda: infopro(decoder=heads.Decoder(scale=0.5))),
    "patches": (lambda: methods.windows(methods.dgl(TASK)), lambda: methods.hpff(methods.dgl(TASK))),
    "width": (lambda: methods.dgl(TASK), lambda: methods.dgl(TASK, head={"mlp": {"width": 4, "hidden": 16}})),
    "layers": (lambda: methods.dgl(TASK, head="2c2f"), lambda: methods.dgl(TASK, head="1c1f")),
}


@pytest.mark.parametrize("knob", CHEAPER)
def test_a_knob_saves_what_it_should(knob: str) -> None:
    plain, lean = (cost_of(make()) for make in CHEAPER[knob])
    if knob == "patches":  # smaller hidden layers; convolutions see as many positions
        assert lean.auxiliary_parameters < plain.auxiliary_parameters
    elif knob == "width":
        assert lean.auxiliary_parameters < plain.auxiliary_parameters and lean.flops < plain.flops
    else:
        assert lean.flops < 0.95 * plain.flops
        assert lean.activation_bytes <= plain.activation_bytes


def test_lean_costs_little_more_than_its_blocks() -> None:
    """The bytes and FLOPs of ``docs/lean.md``, for ResNet-32 in 8 blocks by bytes, and its heads by hand."""

    def localized(method: Method, num_blocks: int) -> localgrad.LocalNetwork:
        model = localgrad.models.create("resnet32")
        return localgrad.localize(model, method, localgrad.cuts.by_bytes(num_blocks), example=images(2))

    whole, lean = (
        cost(localized(*way), images(), targets()) for way in ((methods.e2e(TASK), 1), (methods.lean(TASK), 8))
    )
    assert lean.activation_bytes <= 0.27 * whole.activation_bytes
    assert lean.flops <= 1.205 * whole.flops
    network = localized(methods.lean(TASK), 8)
    read = torch.zeros(2, 16, 32, 32)
    assert network.auxiliary["0-1"].bridge is None
    assert network.auxiliary["1-2"].bridge(read).shape == (2, 16, 16, 16)
    assert network.auxiliary["6-7"].bridge(torch.zeros(2, 32, 16, 16)).shape == (2, 32, 8, 8)
    shapes = []
    for unit in network.auxiliary["0-1"].heads[0][0]:
        read = unit(read)
        shapes.append(tuple(read.shape[1:]))
    assert shapes == [(32, 16, 16), (64, 8, 8)]


def resting(every: int, **options: object) -> Method:
    """InfoPro that reconstructs on every so many steps only."""
    method = infopro(**options)
    label, image = method.terms
    return replace(method, terms=(label, replace(image, every=every)))


def test_resting_terms_save_their_flops_and_get_no_gradient() -> None:
    network = network_of(resting(3))
    localgrad.backward(network, images(), targets(), step=3)
    assert all(p.grad is not None for aux in network.auxiliary.values() for p in aux.heads[1].parameters())
    network.zero_grad(set_to_none=True)
    localgrad.backward(network, images(), targets(), step=4)
    assert all(p.grad is None for aux in network.auxiliary.values() for p in aux.heads[1].parameters())
    assert all(p.grad is not None for aux in network.auxiliary.values() for p in aux.heads[0].parameters())
    with pytest.raises(localgrad.MethodError, match="every=0"):
        resting(0)
    with pytest.raises(localgrad.MethodError, match="on some steps every term rests"):
        network_of(resting(2, label=(0.0, 0.0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: methods.man_pp(methods.dgl(TASK), depth=2),
        lambda: methods.mlaan(methods.infopro(TASK), twins="all"),
        lambda: methods.auglocal(TASK),
        lambda: methods.local_critic(TASK),
    ],
)
def test_recomputed_parts_change_bytes_and_nothing_else(make: Callable[[], Method]) -> None:
    plain, lean = network_of(make()), network_of(methods.checkpointing(make(), where="auxiliary"))
    assert any(isinstance(module, Recomputed) for module in lean.auxiliary.modules())
    for network in (plain, lean):
        localgrad.backward(network, images(), targets())
    for ours, theirs in zip(plain.parameters(), lean.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(plain.buffers(), lean.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_recomputing_a_bridge_saves_bytes() -> None:
    plain, lean = (
        methods.man(methods.dgl(TASK)),
        methods.checkpointing(methods.man(methods.dgl(TASK)), where="auxiliary"),
    )
    assert cost_of(lean).activation_bytes < 0.9 * cost_of(plain).activation_bytes


def test_where_is_checked() -> None:
    with pytest.raises(localgrad.MethodError, match="where"):
        methods.checkpointing(methods.dgl(TASK), where="heads")
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        methods.checkpointing(methods.e2e(TASK), where="auxiliary")


class Tokens(nn.Module):
    """Patches of 4 pixels and a class token; three mixing layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.fc(self.layers(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))[:, 0])


def test_pooling_of_maps_and_tokens() -> None:
    found: list[Tensor] = []

    def noting(site: Site) -> nn.Module:
        found.append(site.features)
        return heads.Linear(10)(site)

    for model, shapes in ((None, (16, 16, 16)), (Tokens, (17, 8))):
        found.clear()
        method = methods.pooled(methods.dgl(TASK, head=noting))
        network = network_of(method, 3, model)
        assert found[0].shape[1:] == shapes
        features, *_ = localgrad.features(network, images())
        pooled = network.auxiliary["0-1"].bridge(features)
        if model is None:
            assert torch.equal(pooled, nn.functional.avg_pool2d(features, 2))
        else:
            assert torch.equal(pooled[:, 0], features[:, 0])
            grid = features[:, 1:].reshape(8, 4, 2, 4, 2, 8).mean((2, 4)).reshape(8, 16, 8)
            torch.testing.assert_close(pooled[:, 1:], grid)
    for value in ({"factor": 0}, {"least": 0}, {"start": -1}):
        with pytest.raises(localgrad.MethodError, match="=".join(map(str, *value.items()))):
            bridges.Pool(**value)


def test_bridges_behind_the_pooling_read_pooled_features() -> None:
    network = network_of(methods.man(methods.pooled(methods.dgl(TASK))))
    features, *_ = localgrad.features(network, images())
    bridge = network.auxiliary["0-1"].bridge
    momentum = next(module for module in bridge.modules() if isinstance(module, MomentumBridge))
    assert momentum.twins[0].source is network.model.get_submodule(network.cuts[0].name)
    assert bridge(features).shape == (8, 16, 16, 16)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mpl", "did you mean 'mlp'"),
        ({"mlp": {"hiden": 3}}, "did you mean 'hidden'"),
        ({"linear": {"hidden": 3}}, "it has no options"),
        ({"mlp": {}, "linear": {}}, "write one head"),
        ({"mlp": {"width": 0}}, "width=0"),
        ("1c0f", "unknown head"),
    ],
)
def test_a_head_that_is_not_known(spec: object, message: str) -> None:
    with pytest.raises(localgrad.MethodError, match=message):
        methods.dgl(TASK, head=spec)


def test_heads_by_name() -> None:
    task = localgrad.tasks.classification(7)
    assert heads.named("mlp", task) == heads.MLP(7)
    assert heads.named("linear", task) == heads.Linear(7)
    assert heads.named("2c2f", task) == heads.Conv(7, "2c2f")
    assert heads.named({"mlp": {"hidden": 16}}, task) == heads.MLP(7, hidden=16)
    assert heads.named(heads.Critic(3), task) == heads.Critic(3)


def test_the_head_of_man_pp_has_the_released_size() -> None:
    """635,146 parameters, core specification 2.3."""
    method = methods.dgl(TASK, head={"mlp": {"grid": 8, "width": 128, "pooled": 1, "hidden": 512}})
    torch.manual_seed(0)
    network = localgrad.localize(localgrad.models.create("resnet32"), method, 16, example=images(2))
    sizes = {sum(p.numel() for p in aux.parameters()) for aux in network.auxiliary.values()}
    # The first convolution reads 16, 32 or 64 channels; the published figure is that of 16.
    assert min(sizes) == 635_146


@pytest.mark.parametrize(
    "option, value", [("exchange", "later"), ("buffers", "sum"), ("twin_init", "zero"), ("mix", "product")]
)
def test_unknown_options_of_a_bridge(option: str, value: str) -> None:
    with pytest.raises(localgrad.MethodError, match=option):
        bridges.Momentum(**{option: value})


def test_windows_side_by_side_need_one_backward_pass_per_block() -> None:
    """So they cost less than end-to-end training, which carries gradients across every boundary."""

    def flops(method: Method) -> int:
        return cost(network_of(method, num_blocks=8), images(), targets()).flops

    linear = methods.dgl(TASK, head="linear")
    overlapping, beside = flops(methods.windows(linear)), flops(methods.windows(linear, stride=2))
    once = flops(methods.windows(linear, stride=2, ends="cascade"))
    assert flops(linear) < once < flops(methods.e2e(TASK)) < beside < overlapping


LEAN = {
    "man_pp": lambda: methods.man_pp(methods.pooled(methods.dgl(TASK, head="linear"), factor=4)),
    "mlaan": lambda: methods.checkpointing(
        methods.mlaan(
            methods.windows(methods.pooled(methods.dgl(TASK, head="linear"), factor=4), stride=2, ends="cascade")
        ),
        where="pointwise",
    ),
}


@pytest.mark.parametrize("name", LEAN)
def test_lean_forms_keep_at_most_0_30_of_end_to_end(name: str) -> None:
    """ResNet-32 in 16 blocks, against 0.30 for a checkpoint at each unit; and less than a third more FLOPs."""
    x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10  # small results are not worth recomputing

    def measured(method: Method, num_blocks: int) -> Cost:
        torch.manual_seed(0)
        model = localgrad.models.create("resnet32")
        return cost(localgrad.localize(model, method, num_blocks, example=x[:2]), x, y)

    whole, lean = measured(methods.e2e(TASK), 1), measured(LEAN[name](), 16)
    assert lean.activation_bytes <= 0.30 * whole.activation_bytes
    assert lean.flops <= 1.10 * whole.flops
