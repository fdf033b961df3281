"""Local critic training again, literally: a block learns from its critic, the critic from the next critic's loss."""

from __future__ import annotations

import copy

import torch
from test_man import train_both
from test_papers import CLASSES, TASK, copied, data, segments
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import local_critic


class OwnCritic(nn.Module):
    """One convolutional layer, and what it takes to answer with logits."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, channels, 3, padding=1), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def add(parameters: list[nn.Parameter], gradients: tuple[Tensor, ...]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient if p.grad is None else p.grad + gradient


def test_three_steps() -> None:
    """``block i: CE(c_i(h_i))``, ``c_i: |CE(c_i(sg h_i)) - sg(L_{i+1})|``, ``L_K`` the true loss."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    _, images, targets = data()
    network = localgrad.localize(model, local_critic(TASK), ("layer2", "layer3"), example=images)
    bare = copy.deepcopy(model)
    library = list(network.auxiliary.values())
    critics = [copied(OwnCritic(width), aux) for width, aux in zip((16, 32), library, strict=True)]
    parts = [
        [*bare.conv1.parameters(), *bare.bn1.parameters(), *bare.layer1.parameters()],
        [*bare.layer2.parameters()],
        [*bare.layer3.parameters(), *bare.fc.parameters()],
    ]

    signs = []

    def step(_: int) -> None:
        x, features, losses = images, [], []
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            loss = F.cross_entropy(x if k == 2 else critics[k](x), targets)
            add(parts[k], torch.autograd.grad(loss, parts[k]))
            x = x.detach()
            features.append(x)
            losses.append(loss.item())
        for k, critic in enumerate(critics):
            estimate = F.cross_entropy(critic(features[k]), targets)
            sign = 1.0 if estimate.item() > losses[k + 1] else -1.0
            signs.append(sign)
            weights = list(critic.parameters())
            add(weights, tuple(sign * g for g in torch.autograd.grad(estimate, weights)))

    train_both(network, bare, critics, library, step)
    assert len(signs) == 6 and set(signs) == {1.0, -1.0}  # both signs of the distance occur


def test_critics_learn_nothing_else() -> None:
    """The loss of a block leaves its critic alone, and a critic's own leaves the block alone."""
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    _, images, targets = data()
    network = localgrad.localize(model, local_critic(TASK), ("layer2", "layer3"), example=images)
    for span, loss in localgrad.local_losses(network, images, targets):
        before = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        loss.backward()
        now = {name for name, p in network.named_parameters() if p.grad is not None}
        assert not any(f"auxiliary.{span.start}-{span.stop}." in name for name in now)
        assert all(torch.equal(network.get_parameter(name).grad, old) for name, old in before.items())


def test_frozen_critics_guide_their_blocks_as_any() -> None:
    """The block's loss is the one it was; there is none of a critic that does not train."""
    torch.manual_seed(0)
    _, images, targets = data()
    network = localgrad.localize(
        localgrad.models.resnet8(CLASSES).double(), local_critic(TASK), ("layer2", "layer3"), example=images
    )
    other = copy.deepcopy(network)
    other.auxiliary.requires_grad_(False)
    before = localgrad.backward(network, images, targets)
    losses = localgrad.backward(other, images, targets)
    for one, same in zip(network.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one.grad, same.grad)
    assert all(p.grad is None for p in other.auxiliary.parameters())
    (whole,) = [loss for span, loss in losses.items() if span.stop == network.num_blocks]
    assert torch.equal(whole, F.cross_entropy(other.model(images), targets))
    assert before.keys() == losses.keys()
