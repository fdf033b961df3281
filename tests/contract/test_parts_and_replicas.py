"""Parts and replicas add up to the loss of the whole batch, whatever it divides by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import gang
import localgrad
from localgrad import methods, models
from localgrad.distributed import block_parallel, data_parallel
from localgrad.tasks import classification, custom, detection, multilabel, regression, segmentation


def dense(outputs: int = 3) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(4, outputs, 1))


def flat() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def detector(kind: str) -> nn.Module:
    return getattr(models, kind)(num_classes=2, backbone="resnet18", norm="group", width=32)


def masks(ignored: bool = True, values: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(values, (5, 8, 8), generator=generator)
    if ignored:
        y[:2, :7], y[3] = 255, 255
    return x, y


def labels(*wanted: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(wanted), 6, generator=generator, dtype=torch.float64), torch.tensor(wanted)


def boxes() -> tuple[Tensor, list[dict[str, Tensor]]]:
    x = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor([[4.0, 4, 40, 40], [10, 10, 100, 100], [0, 0, 32, 32]])
    return x, [{"boxes": rows[:n], "labels": torch.zeros(n, dtype=torch.int64)} for n in (3, 0, 1, 0)]


def soft() -> tuple[Tensor, Tensor]:
    x, y = labels(0, 1, 2, 1, 0)
    return x, nn.functional.one_hot(y, 3).double() * 0.8 + 0.2 / 3


def several() -> tuple[Tensor, Tensor]:
    """Labels that are not known in some entries, and in all of one part."""
    x, _ = labels(*range(5))
    y = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round()
    y[0], y[1, :2], y[4, 0] = -1, -1, -1
    return x, y


def numbers() -> tuple[Tensor, Tensor]:
    x, _ = labels(*range(5))
    return x, x[:, :3] * 7 - 2


def above_zero(output: Tensor, targets: Tensor) -> Tensor:
    """The mean square over targets that are positive."""
    counts = targets > 0
    return ((output - targets).square() * counts).sum() / counts.sum().clamp(min=1)


IGNORED = labels(-100, -100, 0, 1, -100, 2, 1)
CASES: dict[str, tuple[Any, Any, Any]] = {  # task, model, batch; parts of unequal value, one of nothing
    "masks": (segmentation(3), dense, masks),
    "masks, all of them": (segmentation(3), dense, lambda: masks(ignored=False)),
    "masks, weighted and smoothed": (segmentation(3, class_weights=(1.0, 9.0, 0.1), label_smoothing=0.1), dense, masks),
    "labels": (classification(3), flat, lambda: IGNORED),
    "labels, weighted": (classification(3, class_weights=(1.0, 9.0, 0.0)), flat, lambda: labels(0, 0, 1, 2, 2, 1, 0)),
    "labels, weighted and smoothed": (
        classification(3, class_weights=(1.0, 9.0, 0.1), label_smoothing=0.2), flat, lambda: IGNORED,
    ),
    "soft labels": (classification(3), flat, soft),
    "foreground": (segmentation(1), lambda: dense(1), lambda: masks(values=2)),
    "foreground, weighted and smoothed": (
        segmentation(1, class_weights=(0.3, 4.0), label_smoothing=0.1), lambda: dense(1), lambda: masks(values=2),
    ),
    "several labels": (multilabel(3, pos_weight=(1.0, 5.0, 0.2)), flat, several),
    "numbers": (regression(3, loss="smooth_l1"), flat, numbers),
    "custom": (custom(above_zero, 3, counted=lambda targets: (targets > 0).sum()), flat, numbers),
    "retinanet": (detection(2), lambda: detector("retinanet"), boxes),
    "fcos": (detection(2), lambda: detector("fcos"), boxes),
}  # fmt: skip
METHODS: dict[str, Any] = {
    "e2e": methods.e2e,
    "dgl": lambda task: methods.dgl(task, head="linear"),
    "windows": lambda task: methods.windows(methods.dgl(task, head="linear"), local=0.3, cascade=0.7),
    "pgl": lambda task: methods.pgl(methods.dgl(task, head="linear"), every=2),
    "last_head_distillation": lambda task: methods.last_head_distillation(methods.dgl(task, head="linear"), every=1),
    "logit_consistency": lambda task: methods.logit_consistency(methods.dgl(task, head="linear")),
    "infopro": lambda task: methods.infopro(task),
    "sgr": lambda task: methods.sgr(methods.dgl(task, head="linear"), weight=0.1),
}
COMPARES = ("last_head_distillation", "logit_consistency")  # distributions over classes
WITHOUT = ("numbers", "custom", "retinanet", "fcos")  # any


def suits(case: str, method: str) -> bool:
    if method == "sgr":  # slow on detectors, whose losses dgl covers
        return case not in ("retinanet", "fcos")
    return case in ("masks", "foreground") if method == "infopro" else method not in COMPARES or case not in WITHOUT


def without_batch_statistics(module: nn.Module) -> None:
    """BatchNorm replaced in place by a normalisation of single samples, dropout by nothing: parts change neither."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        elif isinstance(child, nn.Dropout | nn.Dropout2d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_statistics(child)


def network_of(case: str, method: str, parts: int) -> localgrad.LocalNetwork:
    task, build, batch = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build().double()
        made = METHODS[method](task)
        made = methods.accumulation(made, parts=parts) if parts > 1 else made
        network = localgrad.localize(model, made, 2, example=batch()[0][:2])
    without_batch_statistics(network.auxiliary)
    return network.double()


def trained(network: localgrad.LocalNetwork, x: Any, y: Any, step: int = 1) -> dict[str, Tensor]:
    losses = localgrad.backward(network, x, y, step)
    found = {str(span): loss.detach() for span, loss in losses.items()}
    return found | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def agree(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert ours.keys() == whole.keys() and len(whole) > 3
    for name, expected in whole.items():
        assert expected.isfinite().all()
        assert (ours[name] - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize(("case", "method"), [(c, m) for c in CASES for m in METHODS if suits(c, m)])
def test_parts_of_unequal_value(case: str, method: str) -> None:
    batch = CASES[case][2]
    parts = 2 if case in ("retinanet", "fcos") else 3  # their GroupNorm needs two values at the coarsest level
    agree(trained(network_of(case, method, parts), *batch()), trained(network_of(case, method, 1), *batch()))


@pytest.mark.parametrize("case", WITHOUT)
@pytest.mark.parametrize("method", COMPARES)
def test_what_compares_distributions_is_refused_where_there_are_none(method: str, case: str) -> None:
    with pytest.raises(localgrad.MethodError, match="compares distributions over classes, which the answers of a"):
        METHODS[method](CASES[case][0])


NOTHING = {"masks": 255, "labels": -100, "foreground": 255, "several labels": -1, "custom": 0}


@pytest.mark.parametrize("case", NOTHING)
def test_a_batch_of_nothing_has_a_loss_of_zero_and_no_gradient(case: str) -> None:
    x, y = CASES[case][2]()
    y = torch.full_like(y, NOTHING[case])
    for parts in (1, 2):
        found = trained(network_of(case, "dgl", parts), x, y)
        assert all(not value.any() for value in found.values())


def part_of(case: str, rank: int) -> tuple[Any, Any]:
    x, y = CASES[case][2]()
    cut = (len(x) + 1) // 2
    rows = slice(0, cut) if rank == 0 else slice(cut, None)
    return x[rows], y[rows]


Pair = tuple[str, str]


def on_replicas(parts: int, pairs: list[Pair]) -> dict[Pair, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    found = {}
    for case, method in pairs:
        network = data_parallel(network_of(case, method, parts), mesh["data"])
        found[case, method] = trained(network, *part_of(case, dist.get_rank()))
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_replicas_of_unequal_value(parts: int) -> None:
    """Gradients are those of the joined batch on both ranks, with micro-batches too."""
    cases = [case for case in CASES if case != "retinanet" and (case, parts) != ("fcos", 2)]
    pairs = [(case, "dgl") for case in cases]
    pairs += [(case, m) for case in ("masks", "labels", "foreground", "several labels") for m in (*COMPARES, "sgr")]
    for rank in gang.run(on_replicas, 2, parts, pairs):
        for (case, method), found in rank.items():
            whole = trained(network_of(case, method, 1), *CASES[case][2]())
            gradients = {name: value for name, value in whole.items() if not name.startswith("(")}
            agree({name: found[name] for name in gradients}, gradients)


def on_blocks(cases: list[str]) -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("block",))
    found = {}
    for case in cases:
        network = block_parallel(network_of(case, "dgl", 3), mesh["block"])
        x, y = CASES[case][2]()
        first = dist.get_rank() == 0
        for _, loss in localgrad.local_losses(network, x if first else None, y if first else None, 1):
            loss.backward()
        found[case] = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        localgrad.exchange(network)
        assert network.stage is not None
        network.stage.close()
    return found


def test_blocks_on_two_ranks() -> None:
    """Later ranks see the targets of one part at a time; the first one tells them what the part is worth."""
    cases = [case for case in CASES if case not in ("retinanet", "fcos")]
    ranks = gang.run(on_blocks, 2, cases)
    for case in cases:
        whole = trained(network_of(case, "dgl", 1), *CASES[case][2]())
        gradients = {name: value for name, value in whole.items() if not name.startswith("(")}
        agree(ranks[0][case] | ranks[1][case], gradients)
