"""Choosing among cut points."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

import localgrad
from localgrad import PartitionError, localize
from localgrad.partition import AuxiliaryBytes, Cut, Partition, by_bytes, by_count
from localgrad.partition.choose import Held, unit_storages
from localgrad.planning import Planner, Rates

TASK = localgrad.tasks.classification(10)


@pytest.fixture(scope="module")
def resnet32() -> Partition:
    torch.manual_seed(0)
    return Partition(localgrad.models.resnet32(), torch.randn(2, 3, 32, 32))


def names(cuts: tuple[Cut, ...]) -> list[str]:
    return [cut.name for cut in cuts]


def test_by_count_reproduces_the_published_cuts(resnet32: Partition) -> None:
    units = ["layer1", *(f"layer{s}.{u}" if u else f"layer{s}" for s in (1, 2, 3) for u in range(5))][1:]
    assert names(by_count(resnet32, 16)) == units
    assert names(by_count(resnet32, 17)) == [*units, "fc"]
    eight = ["layer1.1", "layer1.3", "layer2", "layer2.2", "layer2.4", "layer3.1", "layer3.3"]
    assert names(by_count(resnet32, 8)) == eight
    assert names(by_count(resnet32, 2)) == ["layer2.2"]
    assert names(by_count(resnet32, 3)) == ["layer2", "layer3"]
    assert by_count(resnet32, 1) == ()


def test_the_stem(resnet32: Partition) -> None:
    assert names(by_count(resnet32, 15, "merged")) == names(by_count(resnet32, 16))[1:]
    assert names(by_count(resnet32, 16, "own")) == names(by_count(resnet32, 16))
    assert names(by_count(resnet32, 4, "own")) == ["layer1", "layer2", "layer3"]
    assert names(by_count(resnet32, 3, "merged")) == ["layer2", "layer3"]
    with pytest.raises(PartitionError, match=r"write by_count\(2, stem='own'\)"):
        by_count(resnet32, 1, "own")
    with pytest.raises(PartitionError, match=r"17 blocks with stem='merged': .* use at most 16 blocks"):
        by_count(resnet32, 17, "merged")


def test_too_many_blocks(resnet32: Partition) -> None:
    expected = (
        "40 blocks, but this CifarResNet has 16 cut points; use 1 to 17 blocks or name modules that blocks begin "
    )
    expected += "with, ('layer1', 'layer1.1')"
    for choose in (by_count, by_bytes):
        with pytest.raises(PartitionError) as caught:
            choose(resnet32, 40)
        assert str(caught.value) == expected


def small_models() -> dict[str, nn.Module]:
    vit = localgrad.models.create("timm:vit_tiny_patch16_224", num_classes=10, image_size=32, depth=5)
    vgg = nn.Sequential(
        *(
            layer
            for a, b in ((3, 4), (4, 16), (16, 8), (8, 2))
            for layer in (nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU())
        ),
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    vgg(torch.randn(2, 3, 32, 32))
    return {"resnet": localgrad.models.resnet20(), "vit": vit, "vgg": vgg}


@pytest.mark.parametrize("name", ["resnet", "vit", "vgg"])
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
@pytest.mark.parametrize("gradients", ["none", "own", "earlier"])
def test_bytes_equal_exhaustive_search(name: str, num_blocks: int, gradients: Held) -> None:
    torch.manual_seed(0)
    partition, share = Partition(small_models()[name], torch.randn(2, 3, 32, 32)), 0.5
    saved = unit_storages(partition)
    home, trained = partition.home(partition.cuts), [0.0] * len(saved)
    for path, parameter in partition.model.named_parameters():
        trained[home[path][-1]] += 4 * parameter.numel() * share * (gradients != "none")
    head = {cut: AuxiliaryBytes(1000 * (index + 1), 300) for index, cut in enumerate(partition.cuts)}

    def union(units: list[int]) -> int:
        return sum({key: size for unit in units for key, size in saved[unit].items()}.values())

    def fullest(cuts: tuple[Cut, ...]) -> float:
        """Block by block, moment by moment of its backward pass."""
        edges = [0, *(partition.cuts.index(cut) + 1 for cut in cuts), len(saved)]
        moments = []
        for block, (start, stop) in enumerate(pairwise(edges)):
            end = head[cuts[block]] if block < len(cuts) else AuxiliaryBytes(0, 0)
            units = list(range(start, stop))
            earlier = sum(trained[:start]) if gradients == "earlier" else 0
            moments.append(earlier + union(units) + end.saved)
            done = end.gradients * share if gradients != "none" else 0
            while units:
                done += trained[units[-1]]
                moments.append(earlier + union(units) + done)
                units.pop()
            if gradients == "own":
                moments.append(2 * done)
        return max(moments)

    best = min(map(fullest, combinations(partition.cuts, num_blocks - 1)))
    chosen = by_bytes(partition, num_blocks, head.__getitem__, gradients=gradients, share=share)
    assert len(chosen) == num_blocks - 1
    assert fullest(chosen) == best <= fullest(by_count(partition, num_blocks))


@pytest.mark.parametrize(("name", "num_blocks"), [("resnet", 2), ("vit", 3)])
def test_the_step_of_byte_balanced_cuts_is_nearly_the_smallest(name: str, num_blocks: int) -> None:
    """The tracker's peak of whole steps, for every choice of cut points; ``bench/balance_check.py`` does it at 224."""
    method = localgrad.methods.dgl(TASK, head="linear")
    planner = Planner(small_models()[name], (3, 32, 32), 16, "fp32", Rates(1.0, 1.0))
    peaks = {}
    for cuts in combinations([cut.name for cut in planner.partition.cuts], num_blocks - 1):
        step = planner.step(planner.network(method, cuts), method)
        peaks[cuts] = sum(step.peak), sum(step.per_block)
    for index, gradients in enumerate(("earlier", "own")):
        chosen = names(planner.cuts(num_blocks, method, gradients))
        assert peaks[tuple(chosen)][index] <= 1.10 * min(peak[index] for peak in peaks.values())


def test_measuring_leaves_no_trace_and_hardly_depends_on_the_batch() -> None:
    model = localgrad.models.resnet20()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    chosen = {}
    for size in (2, 16):
        images = torch.zeros(size, 3, 32, 32)
        network = localize(model, localgrad.methods.e2e(TASK), localgrad.cuts.by_bytes(4), example=images)
        chosen[size] = names(network.cuts)
    assert chosen[2] == chosen[16]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_one_sample_is_too_few_where_batchnorm_needs_two() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(PartitionError, match="at least 2 samples"):
        by_bytes(Partition(model, torch.randn(1, 4)), 2)
