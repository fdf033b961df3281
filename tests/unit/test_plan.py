"""Predicting what fits: bytes are exact, seconds are never asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import localgrad
from localgrad import ConfigError, localize, methods, tasks
from localgrad.cli.plan import _rates as read_rates
from localgrad.costs import run_step
from localgrad.measure.memory import LiveBytes, measure
from localgrad.method import Method
from localgrad.partition import RecomputedBlock
from localgrad.planning import EXACT, LOCAL, MICRO, Plan, Planner, Rates, Work, read_memory
from localgrad.planning.streaming import traffic

RATES = Rates(flops=1e11, bytes=1e10, start=0.0)
TASK = tasks.classification(10)


@pytest.fixture(scope="module")
def resnet() -> Plan:
    return localgrad.plan("resnet20", batch_size=64, image_size=32, num_classes=10, memory="20MiB", rates=RATES)


def vit() -> nn.Module:
    return localgrad.models.create("timm:vit_tiny_patch16_224", num_classes=10, image_size=64, depth=4)


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        (methods.e2e(TASK), 1),
        (methods.checkpointing(methods.e2e(TASK)), 4),
        (methods.accumulation(methods.e2e(TASK), parts=2), 1),
        (methods.dgl(TASK), 3),
        (methods.accumulation(methods.dgl(TASK), parts=2), 3),
        (methods.accumulation(methods.checkpointing(methods.e2e(TASK)), parts=2), 4),
        (methods.checkpointing(methods.dgl(TASK), where="auxiliary"), 3),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else str(value),
)
def test_a_step_without_data_needs_the_same_bytes(name: str, method: Method, blocks: int) -> None:
    model, side = (localgrad.models.resnet20(), 32) if name == "resnet" else (vit(), 64)
    planner = Planner(model, (3, side, side), 8, "fp32", RATES)
    cuts = [cut.name for cut in planner.cuts(blocks, method)] if blocks > 1 else []
    predicted = planner.step(planner.network(method, cuts), method)
    x, y = torch.randn(8, 3, side, side), torch.randint(10, (8,))
    network = localize(model, method, cuts or 1, example=x[:2]).train()
    trained = list(network.parameters())
    assert predicted.tracked == measure(lambda: run_step(network, x, y), trained).peak_total
    assert predicted.trained == sum(p.numel() * p.element_size() for p in trained)
    assert predicted.weights == predicted.trained + sum(b.numel() * b.element_size() for b in network.buffers())


@pytest.mark.parametrize("parts", [2, 4])
def test_what_a_resident_network_needs(parts: int) -> None:
    """Against copies that were made: bytes over the link are exact, the peak is within 5 %."""
    method = methods.accumulation(methods.dgl(TASK, head="linear"), parts=parts)
    planner = Planner(vit(), (3, 64, 64), 8, "fp32", RATES)
    cuts = [cut.name for cut in planner.cuts(4, method)]
    predicted = planner.visits(planner.network(method, cuts), method, states=2)
    x, y = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    network = localize(vit(), method, cuts, example=x[:2]).train()
    residence = localgrad.resident(network, "cpu")
    optimizers = [torch.optim.AdamW(network.block_parameters(k)) for k in range(4)]

    def done(block: int) -> None:
        optimizers[block].step()
        optimizers[block].zero_grad()

    for _ in range(2):
        before = residence.fetched, residence.written
        with LiveBytes() as device:
            for _, loss in localgrad.local_losses(network, x, y, on_block_done=done):
                loss.backward()
            del loss
    assert (predicted.fetched, predicted.written) == (residence.fetched - before[0], residence.written - before[1])
    assert predicted.kept == 3 * sum(tensor.nbytes for tensor in residence.kept)  # with the state of AdamW
    found = device.peak + predicted.kept + x.nbytes + y.nbytes
    assert predicted.kept + sum(predicted.peak) == pytest.approx(found, rel=0.05)


def test_copies_that_computing_hides() -> None:
    """12 GB over a link of 6 GB/s, of which 2 GB are not hidden, beside 2 s of computing in 4 micro-batches."""
    rates = Rates(1.0, 1.0, link=6e9)
    found = traffic(12 * 10**9, 2 * 10**9, 2.0, 0.5, rates)
    assert (found.link, found.computing, found.alone) == pytest.approx((10 / 6 / 0.5, 4.0, 2 / 6 / 0.5))
    assert found.time == found.computing + found.alone
    assert found.hidden_from(4) == 4 and "computing binds" in found.told("so", 4, rates)
    slow = traffic(12 * 10**9, 0, 2.0, 0.5, Rates(1.0, 1.0, link=2e9))
    assert slow.time == slow.link == pytest.approx(12.0)
    assert slow.hidden_from(4) == 12 and "the link binds" in slow.told("so", 4, rates)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_per_block_step_frees_gradients(parts: int) -> None:
    model, method = localgrad.models.resnet20(), methods.accumulation(methods.dgl(TASK), parts=parts)
    planner = Planner(model, (3, 16, 16), 4, "fp32", RATES)
    predicted = planner.step(planner.network(method, ["layer2", "layer3"]), method)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    network = localize(model, method, ["layer2", "layer3"], example=x).train()

    def step_block(block: int) -> None:
        copies = [p.grad + 0 for p in network.block_parameters(block)]  # what an optimizer does at its fullest
        del copies
        for parameter in network.block_parameters(block):
            parameter.grad = None

    def step() -> None:
        for _, loss in localgrad.local_losses(network, x, y, on_block_done=step_block):
            loss.backward()

    given = x.numel() * 4 + y.numel() * 8
    measured = measure(step, list(network.parameters())).peak_total
    assert sum(predicted.per_block) - given == pytest.approx(measured, abs=64)  # a scalar loss may still be alive
    assert sum(predicted.per_block) < sum(predicted.peak)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_optimizer_in_the_backward_pass_frees_gradients(recompute: bool) -> None:
    model, method = localgrad.models.resnet20(), methods.e2e(TASK)
    method, cuts = (methods.checkpointing(method), ["layer2", "layer3"]) if recompute else (method, [])
    planner = Planner(model, (3, 16, 16), 4, "fp32", RATES)
    network = planner.network(method, cuts)
    predicted = planner.step(network, method, in_backward=True)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    network = localize(model, method, cuts or 1, example=x).train()

    def step_parameter(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        torch.add(parameter.grad, 0)  # what an optimizer does at its fullest
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(step_parameter)

    def step() -> None:
        for _, loss in localgrad.local_losses(network, x, y):
            loss.backward()

    given = x.numel() * 4 + y.numel() * 8
    measured = measure(step, list(network.parameters())).peak_total
    assert sum(predicted.peak) - given == pytest.approx(measured, abs=64)
    assert sum(predicted.peak) < sum(planner.step(planner.network(method, cuts), method).peak)


def test_more_micro_batches_are_predicted_from_two() -> None:
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    for method in (methods.dgl(TASK), methods.mlaan(methods.dgl(TASK))):
        model, cuts, several = localgrad.models.resnet20(), ("layer2", "layer3"), methods.accumulation(method, parts=8)
        planner = Planner(model, (3, 32, 32), 16, "fp32", RATES)
        predicted = planner.step(planner.network(several, cuts), several).tracked
        network = localize(model, several, cuts, example=x[:2]).train()
        measured = measure(lambda n=network: run_step(n, x, y), list(network.parameters())).peak_total
        assert measured <= predicted <= 1.06 * measured


def dense(outputs: int) -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(a, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for a in (3, 8, 8, 8)]
    return nn.Sequential(*layers, nn.Conv2d(8, outputs, 1))


def flat(outputs: int) -> nn.Module:
    return nn.Sequential(dense(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, outputs))


def weighed(output: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
    return ((output - targets["values"]).square() * targets["weights"][:, None]).mean()


PIXELS = torch.arange(8 * 16 * 16).reshape(8, 16, 16)
OTHERS: dict[str, tuple[Any, Any, Any]] = {  # task, model, targets of 8 images
    "segmentation": (tasks.segmentation(5, class_weights=(1.0, 2.0, 1.0, 1.0, 1.0)), lambda: dense(5), PIXELS % 5),
    "foreground": (tasks.segmentation(1), lambda: dense(1), PIXELS % 2),
    "regression": (tasks.regression(2), lambda: flat(2), torch.randn(8, 2)),
    "multilabel": (tasks.multilabel(6), lambda: flat(6), torch.randint(2, (8, 6)).float()),
    "custom": (tasks.custom(weighed, 3), lambda: flat(3), {"values": torch.randn(8, 3), "weights": torch.rand(8)}),
}


@pytest.mark.parametrize(
    ("plug", "parts"), [(methods.dgl, 1), (methods.e2e, 2), (lambda task: methods.man(methods.dgl(task)), 1)]
)
@pytest.mark.parametrize("name", OTHERS)
def test_a_step_of_other_tasks_needs_the_same_bytes(name: str, plug: Any, parts: int) -> None:
    task, build, targets = OTHERS[name]
    model = build()
    method = methods.accumulation(plug(task), parts=parts) if parts > 1 else plug(task)
    few = localgrad.batches.rows(targets, 0, 2) if name == "custom" else None
    planner = Planner(model, (3, 16, 16), 8, "fp32", RATES, task, few)
    cuts = [cut.name for cut in planner.partition.cuts[:2]] if plug is not methods.e2e else []
    predicted = planner.step(planner.network(method, cuts), method)
    x = torch.randn(8, 3, 16, 16)
    network = localize(model, method, cuts or 1, example=x[:2]).train()
    trained = list(network.parameters())
    run_step(network, x, targets)  # the constants of a loss are made once
    network.zero_grad(set_to_none=True)
    assert predicted.tracked == measure(lambda: run_step(network, x, targets), trained).peak_total
    given = sum(t.numel() * t.element_size() for t in localgrad.batches.tensors_in((x, targets)))
    assert sum(predicted.peak) == max(predicted.tracked, 2 * predicted.trained) + given


def test_a_plan_for_other_tasks() -> None:
    for name in ("foreground", "custom"):
        task, build, targets = OTHERS[name]
        model = build()
        few = localgrad.batches.rows(targets, 0, 2) if name == "custom" else None
        found = localgrad.plan(
            model, batch_size=8, image_size=16, task=task, targets=few, method="[{dgl: {head: linear}}]",
            memory="1GiB", rates=RATES,
        )  # fmt: skip
        assert {"plain", "accumulation", "local"} <= {option.kind for option in found.options}
        plain = found.options[0]
        assert plain.fits and ("task = " in found.code) == (name == "foreground")
        for option in (plain, next(o for o in found.options if o.kind == "local")):
            loader = [(torch.randn(8, 3, 16, 16), targets)]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            names = {"model": model, "loader": loader, "optimizer": optimizer, "task": task}
            before = torch.nn.utils.parameters_to_vector(model.parameters())
            exec(compile(found.code_of(option), option.name, "exec"), names)  # noqa: S102
            assert not torch.equal(before, torch.nn.utils.parameters_to_vector(model.parameters()))
    model, x = flat(2), torch.randn(2, 3, 16, 16)
    with pytest.raises(ConfigError, match="give one of them"):
        localgrad.plan(model, batch_size=8, image_size=16, task=tasks.regression(2), method=methods.dgl(TASK))
    with pytest.raises(ConfigError, match=r"Custom: it is not known what its targets look like.*targets=y"):
        localgrad.plan(model, batch_size=8, image_size=16, task=OTHERS["custom"][0], rates=RATES)
    with pytest.raises(ConfigError, match=r"no classifier.*task=localgrad.tasks.segmentation\(21\)"):
        localgrad.plan(dense(5), batch_size=8, image_size=16, rates=RATES)
    regression = methods.dgl(tasks.regression(2), head="linear")
    with pytest.warns(UserWarning, match="plain training fits"):
        localize(model, regression, localgrad.cuts.fits("1GiB", batch_size=8), example=x)


@pytest.mark.parametrize("name", ["segmentation", "multilabel", "custom"])
def test_localize_under_a_budget_for_other_tasks(name: str) -> None:
    task, build, targets = OTHERS[name]
    model = build()
    method = (
        methods.dgl(task, head=localgrad.heads.FCN(5, width=4))
        if name == "segmentation"
        else methods.dgl(task, head="linear")
    )
    few = localgrad.batches.rows(targets, 0, 2) if name == "custom" else None
    planner = Planner(model, (3, 16, 16), 64, "fp32", Rates(1.0, 1.0), task, few)
    step = planner.step(planner.network(method, [cut.name for cut in planner.cuts(3, method)]), method)
    budget = int((step.weights + 2 * step.trained + sum(step.peak)) / 0.9) + 64
    network = localize(
        model, method, localgrad.cuts.fits(budget, batch_size=64, targets=few), example=torch.randn(2, 3, 16, 16)
    )
    assert 2 <= network.num_blocks <= 3


def test_vectors_are_planned_too() -> None:
    layers = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4)]
    method, x = methods.dgl(tasks.regression(), head="linear"), torch.randn(2, 32)
    with pytest.warns(UserWarning, match="plain training fits"):
        localize(nn.Sequential(*layers, nn.Linear(32, 1)), method, localgrad.cuts.fits("1GiB"), example=x)


def test_a_detector_is_refused() -> None:
    """Which anchors lie on objects decides the shapes of its loss."""
    model = localgrad.models.retinanet(num_classes=2, backbone="resnet18", norm="group", width=32)
    with pytest.raises(ConfigError, match=r"planning a Detection: its loss, or the model, decides by values.*by_bytes"):
        localgrad.plan(model, batch_size=2, image_size=128, task=tasks.detection(2), rates=RATES)


class Undecided(nn.Sequential):
    """Decides by values, so that torch.fx cannot make separate blocks of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.shape[0] > 0 else -x)


def test_ways_that_need_separate_blocks_are_left_out() -> None:
    layers = [nn.Conv2d(a, 8, 3) for a in (3, 8, 8, 8)]
    model = Undecided(*layers, nn.Flatten(), nn.Linear(8 * 8 * 8, 256), nn.ReLU(), nn.Linear(256, 10))
    found = localgrad.plan(model, batch_size=8, image_size=16, memory="1MiB", rates=RATES)
    assert {option.kind for option in found.options} == {"plain", "accumulation", "local", "resident", "offloaded"}
    (reason,) = found.skipped
    assert reason.startswith("checkpointing, and units recomputed: ") and "Undecided.forward" in reason
    with pytest.raises(ConfigError, match=r"no way of cutting Undecided .* Blocks are not recomputed, since"):
        localize(model, methods.dgl(TASK), localgrad.cuts.fits("1MiB", batch_size=8), example=torch.randn(2, 3, 16, 16))


def test_a_linear_layer_by_hand() -> None:
    with Work(RATES) as work:
        torch.ones(4, 8) @ torch.ones(8, 2)
    assert work.flops == 2 * 4 * 8 * 2
    traffic = 4 * (32 + 16) + 4 * (32 + 16 + 8)  # what the two ones write, and the product reads and writes
    assert work.seconds == pytest.approx(traffic / RATES.bytes)


def test_what_is_planned(resnet: Plan) -> None:
    plain = resnet.options[0]
    assert (plain.name, plain.update, plain.time_ratio, plain.flops_ratio) == ("plain", EXACT, 1.0, 1.0)
    model = localgrad.models.resnet20()
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert plain.optimizer == weights
    assert plain.weights == weights + sum(b.numel() * b.element_size() for b in model.buffers())
    kinds = {option.kind: option.update for option in resnet.options}
    assert kinds == {
        "plain": EXACT, "accumulation": MICRO, "checkpointing": MICRO, "local": LOCAL, "offloaded": MICRO,
        "in_backward": EXACT, "resident": LOCAL,
    }  # fmt: skip
    assert {o.num_blocks for o in resnet.options if o.kind == "local"} == {2, 4, 8, 11}
    for option in resnet.options:
        assert option.peak == option.weights + option.optimizer + option.gradients + option.activations
        assert option.fits == (option.peak <= 0.9 * 20 * 2**20)
    assert resnet.recommended is not None
    assert resnet.recommended.fits
    assert "Local learning is not needed" in resnet.verdict


def test_recommendations(resnet: Plan) -> None:
    from dataclasses import replace

    def fitting(*names: str) -> Plan:
        return replace(resnet, options=tuple(replace(o, fits=o.name in names) for o in resnet.options))

    assert "you need none of this" in fitting("plain", "local K=4").verdict
    assert fitting("plain", "local K=2").recommended == replace(resnet.options[0], fits=True)
    best = fitting("accumulation x4", "local K=2").recommended
    assert best is not None and best.name == "accumulation x4"  # as fast within 5 %, and the gradients are better
    for ratio, chosen in ((1.19, "accumulation x4"), (1.21, "local K=2")):  # a local form must be worth its accuracy
        slower = fitting("accumulation x4", "local K=2")
        local = next(o for o in slower.options if o.name == "local K=2")
        slow = [
            replace(o, time_ratio=ratio * local.time_ratio) if o.name == "accumulation x4" else o
            for o in slower.options
        ]
        best = replace(slower, options=tuple(slow)).recommended
        assert best is not None and best.name == chosen
    only = fitting("local K=4")
    assert only.recommended is not None and only.recommended.kind == "local"
    assert "Nothing with end-to-end gradients fits" in only.verdict
    assert fitting().recommended is None and fitting().code == ""
    assert "Nothing fits" in fitting().verdict
    assert replace(resnet, memory=None, options=resnet.options[:1]).verdict.startswith("No memory was given")


def test_the_code_runs(resnet: Plan) -> None:
    loader = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))] * 2
    for kind in ("plain", "accumulation", "checkpointing", "in_backward", "local", "resident"):
        for option in [o for o in resnet.options if o.kind == kind][-1:]:
            model = localgrad.models.resnet20()
            before = model.fc.weight.detach().clone()
            names = {"model": model, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
            exec(compile(resnet.code_of(option), option.name, "exec"), names)  # noqa: S102
            assert not torch.equal(before, model.fc.weight)


def test_the_model_is_left_as_it_was_and_the_picture_drawn(tmp_path: Path) -> None:
    model = localgrad.models.resnet8().eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = localgrad.plan(model, batch_size=8, image_size=16, method=methods.dgl(TASK), precision="bf16", rates=RATES)
    assert not model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert found.task == "localgrad.tasks.classification(10)" and found.recommended is None
    assert "accumulation(method" in next(o.method for o in found.options if o.kind == "local" and o.micro_batches > 1)
    found.picture(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(("text", "count"), [("8GiB", 2**33), ("7.5 GB", 7_500_000_000), ("1024", 1024), (7, 7)])
def test_memory_is_read(text: str | int, count: int) -> None:
    assert read_memory(text) == count


@pytest.mark.parametrize("text", ["", "8 apples", "-1GiB", "0", "GiB"])
def test_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="for instance 8GiB"):
        read_memory(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, "batch_size=1; it must be at least 2"),
        ({"headroom": 1.0}, "below 1"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"precision": "fp16"}, "did you mean 'bf16' or 'fp32'|did you mean 'fp32'"),
        ({"method": "e2e"}, "no auxiliary heads"),
    ],
)
def test_settings_are_refused(settings: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"batch_size": 4, "image_size": 32, "num_classes": 10, "rates": RATES, **settings}
    with pytest.raises(ConfigError, match=message):
        localgrad.plan("resnet8", **given)


def test_localize_under_a_budget() -> None:
    model, x = localgrad.models.resnet20(), torch.randn(2, 3, 32, 32)
    method = methods.dgl(TASK, head="linear")
    planner = Planner(model, (3, 32, 32), 64, "fp32", Rates(1.0, 1.0))

    def needed(num_blocks: int) -> int:
        names = [cut.name for cut in planner.cuts(num_blocks, method)]
        step = planner.step(planner.network(method, names), method)
        return step.weights + 2 * step.trained + sum(step.peak)

    budget = int(needed(3) / 0.9) + 64
    network = localize(model, method, localgrad.cuts.fits(budget, batch_size=64), example=x)
    assert needed(2) > 0.9 * budget
    assert [cut.name for cut in network.cuts] == [cut.name for cut in planner.cuts(3, method)]
    with pytest.warns(UserWarning, match=r"plain training fits \(.* MiB\), so nothing is cut"):
        assert localize(model, method, localgrad.cuts.fits("8GiB", batch_size=64), example=x).num_blocks == 1
    with pytest.raises(ConfigError, match="no way of cutting CifarResNet for dgl fits 64 images; the smallest needs"):
        localize(model, method, localgrad.cuts.fits("3MiB", batch_size=64), example=x)


def test_units_are_recomputed_where_no_number_of_blocks_fits() -> None:
    model, x = vit(), torch.randn(2, 3, 64, 64)
    method = methods.dgl(TASK)
    planner = Planner(model, (3, 64, 64), 64, "fp32", Rates(1.0, 1.0))
    peaks = {}
    for num_blocks in range(2, len(planner.partition.cuts) + 2):
        names = tuple(cut.name for cut in planner.cuts(num_blocks, method))
        for recompute in {(), planner.several_units(names)}:
            step = planner.step(planner.network(method, names, recompute), method)
            peaks[names, recompute] = step.weights + 2 * step.trained + sum(step.peak)
    without = min(peak for (_, recompute), peak in peaks.items() if not recompute)
    (_, recompute), least = min(peaks.items(), key=lambda item: item[1])
    assert least < 0.98 * without and recompute
    network = localize(model, method, localgrad.cuts.fits(int(least / 0.9) + 64, batch_size=64), example=x)
    assert network.cuts and any(isinstance(block, RecomputedBlock) for block in network.suspended.modules())


def test_the_link_is_the_third_rate() -> None:
    assert read_rates("1,10") == Rates(1e12, 1e10)
    assert read_rates("1,10,2") == Rates(1e12, 1e10, link=2e9)
    for text in ("1", "1,2,3,4", "a,b"):
        with pytest.raises(ConfigError, match="two or three numbers"):
            read_rates(text)
    with pytest.raises(ConfigError, match="above 0"):
        read_rates("1,10,0")
