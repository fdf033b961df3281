"""MAN and MAN++ again, literally: a companion and a momentum copy of the next residual unit in front of each head."""

from __future__ import annotations

import copy

import pytest
import torch
from test_papers import CLASSES, TASK, data, segments
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.bridges.momentum import MomentumBridge

DECAY = 0.9


def head(width: int) -> nn.Sequential:
    """A plain read-out, so that what is tested is the bridge."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def network_of(method: localgrad.Method) -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    return localgrad.localize(model, method, cuts=("layer2", "layer3"), example=data(2)[1])


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
        else localgrad.methods.man(base(), decay=DECAY, mix=mix)  # type: ignore[arg-type]
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
    fresh = network_of(localgrad.methods.man(base(), twin_init="fresh"))
    assert not torch.equal(bridges_of(fresh)[0].twin[0].conv1.weight, fresh.model.layer2[0].conv1.weight)


@pytest.mark.parametrize("name", ["man", "man_pp"])
def test_without_heads_there_is_nothing_to_bridge(name: str) -> None:
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        getattr(localgrad.methods, name)(localgrad.methods.e2e(TASK))
