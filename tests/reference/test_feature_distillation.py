"""Feature distillation again, literally: attention maps of student and teacher compared sample by sample."""

from __future__ import annotations

import copy

import pytest
import torch
from test_man import train_both
from test_papers import CLASSES, TASK, data, segments
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import feature_distillation


def teacher_of() -> nn.Module:
    """A ResNet-20 whose BatchNorm statistics are far from those of any batch; left in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        teacher = localgrad.models.resnet20(CLASSES).double()
        for name, buffer in teacher.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(0.0, 0.3)
    return teacher.train()


def teacher_features(teacher: nn.Module, images: Tensor, ends: tuple[str, str]) -> list[Tensor]:
    """What two residual units return in eval mode, layer by layer."""
    teacher = copy.deepcopy(teacher).eval()
    found = []
    with torch.no_grad():
        x = torch.relu(teacher.bn1(teacher.conv1(images)))
        for stage in (1, 2, 3):
            for index, unit in enumerate(teacher.get_submodule(f"layer{stage}")):
                x = unit(x)
                if f"{stage}.{index}" in ends:
                    found.append(x.clone())
    return found


def attention(maps: Tensor) -> Tensor:
    """Sum of squares over channels, (B, H, W); the mean differs by a factor that the norm takes out."""
    return (maps**2).sum(1)


def transfer(ours: Tensor, theirs: Tensor) -> Tensor:
    """``||q / |q| - t / |t| ||**2`` for each sample, the finer grid averaged down to the coarser one."""
    q, t = attention(ours), attention(theirs)
    side = min(q.shape[1], t.shape[1])
    total = q.new_zeros(())
    for one, other in zip(q, t, strict=True):
        flat = []
        for grid in (one, other):
            cell = len(grid) // side
            cells = [
                grid[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean()
                for i in range(side)
                for j in range(side)
            ]
            values = torch.stack(cells)
            flat.append(values / (values**2).sum().sqrt())
        total = total + ((flat[0] - flat[1]) ** 2).sum()
    return total / len(q)


@pytest.mark.parametrize(
    "layers, ends",
    [
        (None, ("1.2", "2.2")),  # ten units in three blocks: 4, 3 and 3, the stem being one
        (("layer2.1", "layer3.1"), ("2.0", "3.0")),  # coarser than the student
        (("layer1.1", "layer1.2"), ("1.0", "1.1")),  # finer than the student at the second boundary
    ],
)
def test_three_steps(layers: tuple[str, str] | None, ends: tuple[str, str]) -> None:
    teacher = teacher_of()
    weights = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double()
    _, images, targets = data()
    method = feature_distillation(TASK, teacher=teacher, layers=layers)
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=images)
    bare = copy.deepcopy(model)
    targets_of_blocks = teacher_features(teacher, images, ends)
    assert len(targets_of_blocks) == 2

    def step(_: int) -> None:
        x = images
        for k, segment in enumerate(segments(bare)):
            x = segment(x)
            loss = F.cross_entropy(x, targets) if k == 2 else transfer(x, targets_of_blocks[k])
            loss.backward()
            x = x.detach()

    train_both(network, bare, [], [], step)
    after = teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert all(p.grad is None for p in teacher.parameters())
    ours = {id(p) for p in network.parameters()}
    assert not any(id(p) in ours for p in teacher.parameters())


def test_the_teacher_answers_in_eval_mode_although_it_is_left_in_training_mode() -> None:
    """BatchNorm of the teacher reads its own statistics: the loss of an image does not depend on the others."""
    _, images, targets = data()
    torch.manual_seed(0)
    model = localgrad.models.resnet8(CLASSES).double().eval()
    method = feature_distillation(TASK, teacher=teacher_of())
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=images)

    def first_loss(rows: slice) -> float:
        with torch.no_grad():
            return next(loss.item() for _, loss in localgrad.local_losses(network, images[rows], targets[rows]))

    alone = [first_loss(slice(k, k + 1)) for k in range(4)]
    assert first_loss(slice(0, 4)) == pytest.approx(sum(alone) / 4, rel=1e-12)


def test_one_method_serves_networks_of_different_size() -> None:
    """A method is a value: what the teacher is cut into is decided for each network anew."""
    _, images, targets = data()
    method = feature_distillation(TASK, teacher=teacher_of())
    for num_blocks in (3, 2, 4):
        torch.manual_seed(0)
        model = localgrad.models.resnet8(CLASSES).double()
        losses = []
        for one in (method, feature_distillation(TASK, teacher=teacher_of())):
            network = localgrad.localize(copy.deepcopy(model), one, num_blocks, example=images)
            losses.append([loss.item() for loss in localgrad.backward(network, images, targets).values()])
        assert len(losses[0]) == num_blocks and losses[0] == losses[1]


def test_refusals() -> None:
    teacher = teacher_of()
    with pytest.raises(localgrad.MethodError, match="layer9"):
        feature_distillation(TASK, teacher=teacher, layers=("layer9",))
    _, images, targets = data()
    method = feature_distillation(TASK, teacher=teacher, layers=("layer2",))
    model = localgrad.models.resnet8(CLASSES).double()
    network = localgrad.localize(model, method, ("layer2", "layer3"), example=images)
    with pytest.raises(localgrad.MethodError, match="1 layers of the teacher for 2 boundaries"):
        localgrad.backward(network, images, targets)
