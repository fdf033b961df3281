"""SGR again, literally: the gradient of each loss by its block's input is differentiated a second time."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from test_man import train_both
from test_papers import CLASSES, TASK, MlpSR, copied, data, segments
from test_pgl import trained
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import auglocal, dgl, e2e, hpff, infopro, mlaan, sgr, windows

WEIGHT = 0.7


def l2(q: Tensor, d: Tensor) -> Tensor:
    """Of the gradients of each sample's own loss: those of a mean over B samples are B times smaller."""
    size = len(q)
    total = q.new_zeros(())
    for one, other in zip(q, d, strict=True):
        total = total + ((size * one - size * other) ** 2).sum()
    return total / size


def test_three_steps() -> None:
    """Block k and its head get the gradient of ``L_k + weight * |q - d| ** 2``, no earlier block does."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    _, images, targets = data()
    method = sgr(dgl(TASK), weight=WEIGHT)
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=images)
    bare = copy.deepcopy(model)
    library = list(network.auxiliary.values())
    own = [copied(MlpSR(c, s), aux) for c, s, aux in zip((16, 32), (16, 8), library, strict=True)]

    def step(_: int) -> None:
        x, before = images, None
        for k, segment in enumerate(segments(bare)):
            x = x.detach().requires_grad_()
            h = segment(x)
            loss = F.cross_entropy(h if k == 2 else own[k](h), targets)
            (after,) = torch.autograd.grad(loss, h, retain_graph=True)
            if before is not None:
                (q,) = torch.autograd.grad(loss, x, create_graph=True)
                assert (q - before).abs().max() > 1e-9
                loss = loss + WEIGHT * l2(q, before)
            trainable = [p for m in (bare, *own) for p in m.parameters()]
            for p, gradient in zip(trainable, torch.autograd.grad(loss, trainable, allow_unused=True), strict=True):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad + gradient
            x, before = h, after.detach()

    train_both(network, bare, own, library, step)


def test_weight_0_is_its_base_and_any_other_is_not() -> None:
    base = trained(dgl(TASK))
    assert all(torch.equal(a, b) for a, b in zip(trained(sgr(dgl(TASK), weight=0.0)), base, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained(sgr(dgl(TASK), weight=0.1)), base, strict=True))


class Attention(nn.Module):
    """torch.nn.MultiheadAttention without weights to return, which takes the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)


class ReadOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(1))


def test_fused_attention_of_torch_is_refused_with_the_switch() -> None:
    images, targets = data()[1].float(), data()[2]
    method = sgr(dgl(TASK, head="linear"))
    model = nn.Sequential(Patches(), Attention(), Attention(), ReadOut())
    with pytest.raises(localgrad.MethodError, match=r"sdpa_kernel\(.*SDPBackend\.MATH\)") as refusal:
        localgrad.localize(model, method, list(model), example=images)
    assert "twice" in str(refusal.value) and "set_fused_attn(False)" in str(refusal.value)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the way the message names
        network = localgrad.localize(model, method, list(model), example=images)
        localgrad.backward(network, images, targets)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_fused_attention_of_timm_is_refused_with_the_switch() -> None:
    images, targets = data()[1].float(), data()[2]
    method = sgr(dgl(TASK, head="linear"))
    before = timm.layers.use_fused_attn()

    def vit() -> nn.Module:
        return timm.models.VisionTransformer(16, 4, num_classes=CLASSES, embed_dim=8, depth=3, num_heads=2)

    try:
        timm.layers.set_fused_attn(True)
        with pytest.raises(localgrad.MethodError, match=r"timm\.layers\.set_fused_attn\(False\)"):
            localgrad.localize(vit(), method, 3, example=images)
        timm.layers.set_fused_attn(False)
        network = localgrad.localize(vit(), method, 3, example=images)
        localgrad.backward(network, images, targets)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    finally:
        timm.layers.set_fused_attn(bool(before))


def test_wider_spans_are_refused_in_either_order() -> None:
    for base in (windows(dgl(TASK)), hpff(dgl(TASK)), mlaan(dgl(TASK)), auglocal(TASK, depth=2)):
        with pytest.raises(localgrad.MethodError, match="covers several"):
            sgr(base)
    for plugin in (windows, hpff, mlaan):
        with pytest.raises(localgrad.MethodError, match="covers several"):
            plugin(sgr(dgl(TASK)))
    for base in (auglocal(TASK, depth=6), auglocal(TASK, depth=9), windows(dgl(TASK), width=8, local=0.0)):
        with pytest.raises(localgrad.MethodError, match="covers several"):  # by localize at the latest
            model = localgrad.models.CifarResNet(26, CLASSES)
            localgrad.localize(model, sgr(base), 12, example=data(2)[1].float())
    assert sgr(auglocal(TASK, depth=2, tail=1)).name == "sgr(auglocal)"
    assert sgr(infopro(TASK)).name == "sgr(infopro)"
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        sgr(e2e(TASK))
    with pytest.raises(localgrad.MethodError, match="weight"):
        sgr(dgl(TASK), weight=-1.0)
