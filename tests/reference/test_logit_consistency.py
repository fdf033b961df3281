"""Logit consistency again, literally: beliefs class by class, each drawn to the one of the block before."""

from __future__ import annotations

import copy

import pytest
import torch
from test_man import buffers_kept, train_both
from test_papers import CLASSES, TASK, ImageDecoder, OneConvTwoLinear, binary_cross_entropy, copied, data, segments
from test_pgl import trained
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import dgl, e2e, infopro, logit_consistency, predsim, windows

SHARE = 0.3
LINEAR = dgl(TASK, head=localgrad.heads.Linear(CLASSES))


def divergence(logits: Tensor, before: Tensor | None) -> Tensor:
    """``KL(p || q)``, q uniform at first, sample by sample and class by class."""
    total = logits.new_zeros(())
    for i, row in enumerate(logits):
        p = torch.exp(row) / torch.exp(row).sum()
        for c in range(CLASSES):
            q = 1 / CLASSES if before is None else (torch.exp(before[i]) / torch.exp(before[i]).sum())[c].item()
            total = total + p[c] * (torch.log(p[c]) - torch.log(torch.as_tensor(q, dtype=p.dtype)))
    return total / len(logits)


def belief_loss(logits: Tensor, targets: Tensor, before: Tensor | None) -> Tensor:
    return SHARE * F.cross_entropy(logits, targets) + (1 - SHARE) * divergence(logits, before)


def network_of(base: localgrad.Method) -> tuple[localgrad.LocalNetwork, nn.Module]:
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    method = logit_consistency(base, share=SHARE)
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=data(2)[1])
    return network, copy.deepcopy(model)


def test_three_steps() -> None:
    network, bare = network_of(LINEAR)
    library = list(network.auxiliary.values())
    own = [copied(nn.Linear(width, CLASSES), aux) for width, aux in zip((16, 32), library, strict=True)]
    _, images, targets = data()

    def step(_: int) -> None:
        x, before = images, None
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            logits = x if k == 2 else own[k](x.mean((2, 3)))
            belief_loss(logits, targets, before).backward()
            x, before = x.detach(), logits.detach()

    train_both(network, bare, own, library, step)


def test_reconstruction_stays_as_it_is() -> None:
    """Of InfoPro's two losses only the one of the labels is changed; its weight stays."""
    network, bare = network_of(infopro(TASK, image=(5.0, 0.2), label=(0.05, 0.5)))
    library = [head for aux in network.auxiliary.values() for head in aux.heads]
    own = []
    for width, pair in zip((16, 32), (library[:2], library[2:]), strict=True):
        own += [copied(OneConvTwoLinear(width, CLASSES), pair[0]), copied(ImageDecoder(width), pair[1])]
    pixels, images, targets = data()

    def step(_: int) -> None:
        x, before = images, None
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            logits = x if k == 2 else own[2 * k](x)
            loss = belief_loss(logits, targets, before)
            if k < 2:
                loss = (0.05, 0.5)[k] * loss + (5.0, 0.2)[k] * binary_cross_entropy(own[2 * k + 1](x), pixels)
            loss.backward()
            x, before = x.detach(), logits.detach()

    train_both(network, bare, own, library, step)


def test_windows_follow_the_narrowest_loss_before() -> None:
    network, bare = network_of(windows(LINEAR))
    spans = ((0, 1), (1, 2), (0, 2))
    library = [network.auxiliary[f"{start}-{stop}"] for start, stop in spans]
    own = {
        (start, stop): copied(nn.Linear(16 * stop, CLASSES), aux)
        for (start, stop), aux in zip(spans, library, strict=True)
    }
    _, images, targets = data()

    def step(_: int) -> None:
        blocks = segments(bare)
        features: list[Tensor] = [images]
        beliefs: list[Tensor | None] = [None]
        for k, block in enumerate(blocks):
            h = block(features[k])
            logits = h if k == 2 else own[k, k + 1](h.mean((2, 3)))
            belief_loss(logits, targets, beliefs[k]).backward()
            features.append(h.detach())
            beliefs.append(logits.detach())
        for start in (0, 1):
            with buffers_kept(bare):
                h = blocks[start + 1](blocks[start](features[start]))
                logits = h if start == 1 else own[0, 2](h.mean((2, 3)))
                belief_loss(logits, targets, beliefs[start + 1]).backward()

    train_both(network, bare, list(own.values()), library, step)


@pytest.mark.parametrize("base", [dgl(TASK), infopro(TASK), predsim(TASK), windows(dgl(TASK))], ids=lambda m: m.name)
def test_share_1_is_its_base_bit_for_bit(base: localgrad.Method) -> None:
    theirs = trained(base)
    assert all(torch.equal(a, b) for a, b in zip(trained(logit_consistency(base, share=1.0)), theirs, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained(logit_consistency(base, share=0.9)), theirs, strict=True))


def test_refusals() -> None:
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(localgrad.MethodError, match="share"):
            logit_consistency(dgl(TASK), share=share)
    with pytest.raises(localgrad.MethodError, match="no head of infopro answers"):
        logit_consistency(infopro(TASK, loss="contrast"))
    with pytest.raises(localgrad.MethodError, match="no auxiliary heads"):
        logit_consistency(e2e(TASK))
