"""MAN and MAN++ again, literally: a companion and a momentum copy of the next residual unit in front of each head."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from test_papers import (
    CLASSES,
    TASK,
    ImageDecoder,
    OneConvTwoLinear,
    PoolAndRead,
    binary_cross_entropy,
    copied,
    data,
    segments,
    similarity_matching,
)
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from bridged import bridged
from localgrad.bridges.momentum import MomentumBridge

DECAY = 0.9


def agree(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Assert that tensors are equal to 1e-12 of their magnitude."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max().item() <= 1e-12 * max(1.0, mine.abs().max().item())


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Run part of a network again, forward and backward, without moving its BatchNorm statistics again."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, old in zip(module.buffers(), before, strict=True):
            buffer.copy_(old)


def follow(twin: nn.Module, source: nn.Module, decay: float = DECAY) -> None:
    """The moving average of the paper, parameter by parameter."""
    with torch.no_grad():
        for p, q in zip(twin.parameters(), source.parameters(), strict=True):
            p.copy_(decay * p + (1 - decay) * q)


def train_both(
    network: localgrad.LocalNetwork,
    bare: nn.Module,
    own: Sequence[nn.Module],
    library: Sequence[nn.Module],
    step: Callable[[int], None],
    after: Callable[[], None] = lambda: None,
    steps: int = 3,
) -> None:
    """Steps of SGD with momentum by hand and by the library: gradients at each, weights and buffers after all agree.

    ``own`` are our auxiliary modules and ``library`` those of the network, frozen ones too; ``step`` leaves gradients
    on ours; ``after`` is what happens to ours after the optimizer step, `localgrad.exchange` to the library's.
    """
    ours, theirs = nn.ModuleList([bare, *own]), nn.ModuleList([network.model, *library])
    assert {id(p) for p in theirs.parameters()} == {id(p) for p in network.parameters()}
    trained = [[p for p in both.parameters() if p.requires_grad] for both in (ours, theirs)]
    optimizers = [torch.optim.SGD(parameters, 0.02, momentum=0.9) for parameters in trained]
    _, images, targets = data()
    for index in range(steps):
        step(index)
        for _, loss in localgrad.local_losses(network, images, targets, index):
            loss.backward()
        for mine, other in zip(*trained, strict=True):
            assert mine.grad is not None and other.grad is not None
            assert mine.dim() == 1 or mine.grad.any()
        agree(*([p.grad for p in parameters] for parameters in trained))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after()
        localgrad.exchange(network)
    agree(ours.parameters(), theirs.parameters())
    agree(ours.buffers(), theirs.buffers())
    counts = [b for name, b in bare.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(count == steps for count in counts)


def head(width: int) -> nn.Sequential:
    """A plain read-out, so that what is tested is the bridge."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def network_of(method: localgrad.Method) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    return localgrad.localize(model, method, ("layer2", "layer3"), example=data(2)[1])


def base() -> localgrad.Method:
    return localgrad.methods.dgl(TASK, head=localgrad.heads.Linear(CLASSES))


def bridges_of(network: localgrad.LocalNetwork) -> list[MomentumBridge]:
    found = [module for module in network.auxiliary.modules() if isinstance(module, MomentumBridge)]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("mix", ["sum", "scaled", "ema", "learnable"])
def test_three_steps_of_the_paper(mix: str) -> None:
    method = (
        localgrad.methods.man_pp(base(), decay=DECAY)
        if mix == "scaled"
        else localgrad.methods.man(base(), decay=DECAY, mix=mix)
    )
    network = network_of(method)
    theirs = bridges_of(network)
    bare = copy.deepcopy(network.model)
    companions = [copy.deepcopy(bridge.companion) for bridge in theirs]
    twins = [copy.deepcopy(bare.layer2[0]), copy.deepcopy(bare.layer3[0])]
    scales = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in theirs]
    heads = [head(width).double() for width in (32, 64)]
    for mine, aux in zip(heads, network.auxiliary.values(), strict=True):
        mine[2].load_state_dict(aux.heads[0][1].state_dict())
    for twin in twins:
        twin.requires_grad_(False)

    ours = [*bare.parameters(), *(p for h in heads for p in h.parameters())]
    if mix != "ema":
        ours += [p for companion in companions for p in companion.parameters()]
    if mix == "scaled":
        ours += scales
    optimizers = [
        torch.optim.SGD(ours, 0.05, momentum=0.9),
        torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05, momentum=0.9),
    ]
    _, images, targets = data()

    def bridged(k: int, x: Tensor) -> Tensor:
        if mix == "ema":
            return twins[k](x)
        if mix == "learnable":
            return companions[k](x)
        if mix == "sum":
            return companions[k](x) + twins[k](x)
        return scales[k] * companions[k](x) + (2.0 - scales[k]) * twins[k](x)

    for step in range(3):
        x = images
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            F.cross_entropy(x if k == 2 else heads[k](bridged(k, x)), targets).backward()
            x = x.detach()
        for _, loss in localgrad.local_losses(network, images, targets, step):
            loss.backward()
        for mine, other in zip(bare.parameters(), network.model.parameters(), strict=True):
            assert mine.grad.any()
            assert (mine.grad - other.grad).abs().max().item() <= 1e-12 * max(1.0, mine.grad.abs().max().item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for twin, source in zip(twins, (bare.layer2[0], bare.layer3[0]), strict=True):
                for p, q in zip(twin.parameters(), source.parameters(), strict=True):
                    p.copy_(DECAY * p + (1 - DECAY) * q)
        localgrad.exchange(network)

    for k, bridge in enumerate(theirs):
        pairs = [] if mix == "learnable" else list(zip(twins[k].parameters(), bridge.twin.parameters(), strict=True))
        if mix != "ema":
            pairs += list(zip(companions[k].parameters(), bridge.companion.parameters(), strict=True))
        if mix == "scaled":
            pairs.append((scales[k], bridge.scale))
            assert bridge.scale.item() != 1.0
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_man_pp_with_its_scale_frozen_is_man() -> None:
    plus, plain = (network_of(method) for method in (localgrad.methods.man_pp(base()), localgrad.methods.man(base())))
    for bridge in bridges_of(plus):
        bridge.scale.requires_grad_(False)
    _, images, targets = data()
    for network in (plus, plain):
        localgrad.backward(network, images, targets)
    for mine, other in zip(plus.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_twins_start_at_their_source_and_carry_no_gradient() -> None:
    network = network_of(localgrad.methods.man(base()))
    for bridge, source in zip(bridges_of(network), (network.model.layer2[0], network.model.layer3[0]), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(bridge.twin.parameters(), source.parameters(), strict=True))
        assert not any(p.requires_grad for p in bridge.twin.parameters())
        assert not any(
            torch.equal(p, q)
            for p, q in zip(bridge.companion.parameters(), source.parameters(), strict=True)
            if p.dim() > 1
        )
    fresh = network_of(localgrad.methods.man(base(), released=True))
    assert not torch.equal(bridges_of(fresh)[0].twin[0].conv1.weight, fresh.model.layer2[0].conv1.weight)


@pytest.mark.parametrize("name", ["man", "man_pp"])
def test_without_heads_there_is_nothing_to_bridge(name: str) -> None:
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        getattr(localgrad.methods, name)(localgrad.methods.e2e(TASK))


# --- variants ----------------------------------------------------------------------------------------------------


class OwnBridge(nn.Module):
    """Copies of the units after a boundary: a frozen twin and a companion of the first, companions of the others."""

    def __init__(self, units: list[nn.Module], mix: str) -> None:
        super().__init__()
        self.mix = mix
        self.twin = copy.deepcopy(units[0]).requires_grad_(mix == "pair")
        self.companion = copy.deepcopy(units[0])
        self.later = nn.ModuleList(copy.deepcopy(unit) for unit in units[1:])
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64)) if mix == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        learned, averaged = self.companion(x), self.twin(x)
        x = self.scale * learned + (2.0 - self.scale) * averaged if self.scale is not None else learned + averaged
        for unit in self.later:
            x = unit(x)
        return x

    def load(self, bridge: MomentumBridge) -> OwnBridge:
        """Take over the drawn weights of the library's learnable units; the twin is the source's copy already."""
        drawn = [(self.companion, bridge.companion), *zip(self.later, bridge.later, strict=True)]
        if self.mix == "pair":
            drawn.append((self.twin, bridge.twin))
        for ours, theirs in drawn:
            ours.load_state_dict(theirs.state_dict())
        return self


def in_our_order(bridge: MomentumBridge) -> nn.Module:
    scale = [bridge.scale] if bridge.mix == "scaled" else []
    return nn.ModuleList([nn.ParameterList(scale), bridge.twin, bridge.companion, bridge.later])


UNITS = {1: ("layer2.0", "layer2.1"), 2: ("layer3.0", "layer3.1")}  # after each boundary of a ResNet-14


@pytest.mark.parametrize(
    "name, options",
    [
        ("man", {"exchange": "before"}),
        ("man", {"buffers": "copy"}),
        ("man", {"buffers": "ema"}),
        ("man", {"buffers": "ema", "exchange": "before"}),
        ("man", {"mix": "pair"}),
        ("man", {"depth": 2}),
        ("man_pp", {"depth": 2, "exchange": "before"}),
        ("man_pp", {"buffers": "copy"}),
    ],
    ids=str,
)
def test_variants(name: str, options: dict[str, object]) -> None:
    """Two units in each stage, so that there is a second one to look through."""
    torch.manual_seed(0)
    model = localgrad.models.CifarResNet(14, CLASSES).double()
    _, images, targets = data()
    mix = "scaled" if name == "man_pp" else str(options.get("mix", "sum"))
    method = bridged(base(), decay=DECAY, **{**options, "mix": mix})
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=images)
    bare = copy.deepcopy(model)
    bridges: dict[int, OwnBridge] = {}
    library: list[nn.Module] = []
    for boundary in (1, 2):
        theirs = network.auxiliary[f"{boundary - 1}-{boundary}"].bridge
        units = [bare.get_submodule(unit) for unit in UNITS[boundary][: options.get("depth", 1)]]
        bridges[boundary] = OwnBridge(units, mix).load(theirs)
        library.append(in_our_order(theirs))
    if mix == "pair":  # two copies drawn apart, neither of them the source, none frozen
        for boundary, one in bridges.items():
            weights = [unit.conv1.weight for unit in (one.twin, one.companion, bare.get_submodule(UNITS[boundary][0]))]
            assert not any(torch.equal(weights[a], weights[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
            assert all(p.requires_grad for p in one.parameters())
    heads = {}
    for boundary in (1, 2):
        aux = network.auxiliary[f"{boundary - 1}-{boundary}"]
        width = 16 * 2**boundary
        heads[boundary] = copied(head(width), aux.heads[0])
        library.append(aux.heads[0])
    moved = []

    def move(boundary: int) -> None:
        if mix == "pair":
            return
        twin, source = bridges[boundary].twin, bare.get_submodule(UNITS[boundary][0])
        follow(twin, source)
        moved.append(boundary)
        for ours, theirs in zip(twin.buffers(), source.buffers(), strict=True):
            if options.get("buffers") == "copy" or (options.get("buffers") == "ema" and ours.dtype == torch.long):
                ours.copy_(theirs)
            elif options.get("buffers") == "ema":
                ours.copy_(DECAY * ours + (1 - DECAY) * theirs)

    def step(_: int) -> None:
        x = images
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            if k == 2:
                F.cross_entropy(x, targets).backward()
                continue
            y = bridges[k + 1](x) if k + 1 in bridges else x
            F.cross_entropy(heads[k + 1](y), targets).backward()
            x = x.detach()
            if options.get("exchange") == "before" and k + 1 in bridges:
                move(k + 1)  # right after the block's backward pass, so that it reads last step's weights

    def after() -> None:
        for boundary in bridges if options.get("exchange") != "before" else ():
            move(boundary)

    train_both(network, bare, [*bridges.values(), *heads.values()], library, step, after)
    assert moved == ([] if mix == "pair" else [1, 2] * 3)


# --- MAN++ over other bases: core.md 1.3, heads have the width of what the bridge returns ---------------------------


def man_pp_over(
    method: localgrad.Method, model: nn.Module
) -> tuple[localgrad.LocalNetwork, nn.Module, list[OwnBridge], list[nn.Module]]:
    network = localgrad.localize(
        model, localgrad.methods.man_pp(method, decay=DECAY), ("layer2", "layer3"), example=data(2)[1]
    )
    for parameter in network.auxiliary.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # PredSim's read-out starts at 0
    bare = copy.deepcopy(model)
    theirs = bridges_of(network)
    bridges = [
        OwnBridge([bare.get_submodule(UNITS[k][0])], "scaled").load(bridge) for k, bridge in enumerate(theirs, start=1)
    ]
    return network, bare, bridges, [in_our_order(bridge) for bridge in theirs]


def compare_over(
    network: localgrad.LocalNetwork,
    bare: nn.Module,
    bridges: list[OwnBridge],
    library: list[nn.Module],
    heads: list[nn.Module],
    objective: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> None:
    pixels, images, targets = data()

    def step(_: int) -> None:
        x = images
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            (F.cross_entropy(x, targets) if k == 2 else objective(k, bridges[k](x), pixels, targets)).backward()
            x = x.detach()

    def after() -> None:
        for k, bridge in enumerate(bridges, start=1):
            follow(bridge.twin, bare.get_submodule(UNITS[k][0]))

    library = library + [one for aux in network.auxiliary.values() for one in aux.heads]
    train_both(network, bare, [*bridges, *heads], library, step, after)
    assert all(bridge.scale is not None and bridge.scale.item() != 1.0 for bridge in bridges)


class LastStageHead(nn.Module):
    """``1c2f`` for 64 channels: the convolution keeps size and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


def test_man_pp_over_infopro() -> None:
    torch.manual_seed(0)
    method = localgrad.methods.infopro(TASK, image=(5.0, 0.2), label=(0.05, 0.5))
    network, bare, bridges, library = man_pp_over(method, localgrad.models.CifarResNet(14, CLASSES).double())
    theirs = [one for aux in network.auxiliary.values() for one in aux.heads]
    made = [OneConvTwoLinear(32, CLASSES), ImageDecoder(32), LastStageHead(), ImageDecoder(64)]
    heads = [copied(mine, other) for mine, other in zip(made, theirs, strict=True)]

    def objective(k: int, y: Tensor, pixels: Tensor, targets: Tensor) -> Tensor:
        about_label = F.cross_entropy(heads[2 * k](y), targets)
        return (5.0, 0.2)[k] * binary_cross_entropy(heads[2 * k + 1](y), pixels) + (0.05, 0.5)[k] * about_label

    compare_over(network, bare, bridges, library, heads, objective)


def test_man_pp_over_predsim() -> None:
    torch.manual_seed(0)
    method = localgrad.methods.predsim(TASK, beta=0.9, size=256)
    network, bare, bridges, library = man_pp_over(method, localgrad.models.CifarResNet(14, CLASSES).double())
    theirs = [one for aux in network.auxiliary.values() for one in aux.heads]
    made: list[nn.Module] = []
    for width, size in ((32, 8), (64, 4)):
        made += [PoolAndRead(width, size), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    heads = [copied(mine, other) for mine, other in zip(made, theirs, strict=True)]

    def objective(k: int, y: Tensor, _: Tensor, targets: Tensor) -> Tensor:
        predicted = F.cross_entropy(heads[2 * k](y), targets)
        return 0.1 * predicted + 0.9 * similarity_matching(heads[2 * k + 1](y), targets)

    compare_over(network, bare, bridges, library, heads, objective)


class UnitAndRead(nn.Module):
    """AugLocal's head of one unit: it, pooling, BatchNorm, linear."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.unit = copy.deepcopy(like)
        self.norm, self.fc = nn.BatchNorm1d(64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.unit(x).mean((2, 3))))


def test_man_pp_over_auglocal() -> None:
    """The bridge reads the first unit that follows; the head's one unit ends at the last: a first or a second of 64."""
    torch.manual_seed(0)
    method = localgrad.methods.auglocal(TASK, depth=1, tail=1)
    model = localgrad.models.CifarResNet(14, CLASSES).double()
    network, bare, bridges, library = man_pp_over(method, model)
    theirs = [one for aux in network.auxiliary.values() for one in aux.heads]
    made = [UnitAndRead(bare.layer3[0]), UnitAndRead(bare.layer3[1])]
    heads = [copied(mine, other) for mine, other in zip(made, theirs, strict=True)]
    compare_over(network, bare, bridges, library, heads, lambda k, y, _, targets: F.cross_entropy(heads[k](y), targets))


@pytest.mark.parametrize("name", ["dgl", "infopro", "predsim", "auglocal"])
def test_decay_1_never_moves_a_twin_and_decay_0_copies(name: str) -> None:
    images, targets = data()[1].float(), data()[2]
    method = getattr(localgrad.methods, name)(TASK)
    for decay in (1.0, 0.0):
        torch.manual_seed(0)
        model = localgrad.models.CifarResNet(14, CLASSES)
        network = localgrad.localize(model, localgrad.methods.man(method, decay=decay), 4, example=images)
        assert network.twins
        start = [copy.deepcopy(twin.copy) for twin in network.twins]
        for p in model.parameters():
            p.data.add_(0.01)
        localgrad.backward(network, images, targets)
        localgrad.exchange(network)
        for twin, before in zip(network.twins, start, strict=True):
            like = before if decay == 1.0 else twin.source
            pairs = zip(twin.copy.parameters(), like.parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)
