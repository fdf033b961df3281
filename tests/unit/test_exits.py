"""Exits, prefixes, and what is exported of them."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import localgrad
from localgrad import cli, methods, tasks
from localgrad.calibration import TEMPERATURES, Answered, confidence, fitted_temperature
from localgrad.errors import LocalgradError, MethodError, PartitionError, TrainingError
from localgrad.exits import Exits
from localgrad.measure.work import Rates, Work
from localgrad.network import LocalNetwork
from localgrad.train.export import export

SAMPLES, CLASSES = 12, 5
TASK = tasks.classification(CLASSES)


class Skipping(nn.Module):
    """Features, a skip, a constant table and the images themselves cross its cuts; its batch statistics are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5))
        self.register_buffer("table", torch.randn(8, 1, 1))
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table.sigmoid()
        skip = self.first(x)
        features = self.third(self.second(skip)) + skip * table + x.mean(1, keepdim=True)
        return self.last(features.mean((2, 3)))


def trained(model: nn.Module, method: localgrad.Method, cutting: Any, inputs: Tensor, steps: int = 3) -> LocalNetwork:
    """A network whose statistics and heads have moved, in eval mode."""
    torch.manual_seed(1)
    network = localgrad.localize(model, method, cutting, example=inputs[:3])
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05)
    for step in range(steps):
        localgrad.backward(network, inputs, torch.arange(len(inputs)) % CLASSES, step)
        optimizer.step()
        optimizer.zero_grad()
        localgrad.exchange(network)
    return network.eval()


def double() -> tuple[LocalNetwork, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(SAMPLES, 3, 8, 8, dtype=torch.float64)
    return trained(Skipping().double(), methods.dgl(TASK), ("second", "third"), inputs), inputs


NETWORK, INPUTS = double()


def heads_of(network: LocalNetwork, inputs: Tensor) -> list[Tensor]:
    return [output for _, _, output in localgrad.local_outputs(network, inputs, scored_only=True)]


# What every head answers to each sample alone, by the model's own forward.
ALONE = [heads_of(NETWORK, sample[None]) for sample in INPUTS]
EXITS = {average: NETWORK.exits(average=average) for average in (False, True)}


@given(
    st.permutations(range(SAMPLES)),
    st.integers(1, SAMPLES),
    st.lists(st.integers(0, SAMPLES - 1), min_size=2, max_size=2),
    st.lists(st.floats(0.3, 3.0), min_size=2, max_size=2),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_each_sample_is_answered_by_the_first_head_that_is_sure(
    order: list[int], size: int, ranks: list[int], temperatures: list[float], average: bool
) -> None:
    exits, order = copy.deepcopy(EXITS[average]), order[:size]
    likely = [[shares(heads[e], t) for heads in ALONE] for e, t in enumerate([*temperatures, 1.0])]
    if average:
        likely = [[[sum(c) / (e + 1) for c in zip(*one, strict=True)] for one in zip(*likely[: e + 1], strict=True)]
                  for e in range(3)]  # fmt: skip
    sure = [[max(values) for values in each] for each in likely]
    for place, temperature in enumerate(temperatures):
        exits.temperature[place], exits.threshold[place] = temperature, sorted(sure[place])[ranks[place]] - 1e-6
    wanted = [next((e for e in range(2) if sure[e][sample] >= exits.threshold[e]), 2) for sample in order]
    found = exits(INPUTS[order])
    assert found.block.tolist() == [exits.boundaries[place] for place in wanted]
    for answer, sample, place in zip(found.logits, order, wanted, strict=True):
        if average:
            torch.testing.assert_close(answer.exp().tolist(), likely[place][sample], rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(answer, ALONE[sample][place][0])


def shares(logits: Tensor, temperature: float) -> list[float]:
    """softmax(z / T) of one sample, literally."""
    exponents = [math.exp(z / temperature) for z in logits[0].tolist()]
    return [value / sum(exponents) for value in exponents]


@pytest.mark.parametrize("name", ["dgl", "man", "lean", "infopro", "mlaan", "deep_supervision", "local_critic"])
def test_prefixes_and_the_ends_of_the_threshold_equal_the_networks_own_heads(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 3, 16, 16)
    base = methods.dgl(TASK)
    method = {"man": methods.man, "mlaan": methods.mlaan}[name](base) if name in ("man", "mlaan") else None
    network = trained(localgrad.models.resnet8(CLASSES), method or getattr(methods, name)(TASK), 3, inputs, steps=1)
    answers = {}
    for span, _, output in localgrad.local_outputs(network, inputs, scored_only=True):
        if span.stop not in answers or span.start < answers[span.stop][0]:
            answers[span.stop] = span.start, output
    for block in (1, 2):
        prefix = network.prefix(block)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                assert torch.equal(prefix(inputs), answers[block][1])
        assert not any(p.requires_grad or any(p is q for q in network.parameters()) for p in prefix.parameters())
        assert not any(vars(part).get("twins") for part in prefix.modules())  # no way back to what trains
    first, last = network.exits(0.0)(inputs), network.exits(1.01)(inputs)
    for threshold, one in ((0.0, first), (1.01, last)):
        with torch.no_grad():
            assert torch.equal(network.exits(threshold)(inputs).logits, one.logits)
    assert torch.equal(first.logits, answers[1][1]) and first.block.tolist() == [1] * 6
    assert torch.equal(last.logits, network.model(inputs)) and last.block.tolist() == [3] * 6


def test_copies_stay_as_they_are_and_keep_what_was_chosen() -> None:
    network = copy.deepcopy(NETWORK)
    exits, prefix = network.exits(0.5), network.prefix(1)
    before = exits(INPUTS), prefix(INPUTS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    exits.threshold.fill_(0.3)
    other = NETWORK.exits()
    other.load_state_dict(exits.state_dict())
    assert torch.equal(other(INPUTS).logits, exits(INPUTS).logits)
    exits.threshold.fill_(0.5)
    assert torch.equal(exits(INPUTS).logits, before[0].logits) and torch.equal(prefix(INPUTS), before[1])
    for module in (exits, prefix):
        assert not module.eval().training
        with pytest.raises(TrainingError, match="stays in eval mode"):
            module.train()
    assert exits(INPUTS[:0]).logits.shape == (0, CLASSES)


def to_bfloat16(exits: Exits) -> Exits:
    return nn.ModuleList([exits]).to(torch.bfloat16)[0]  # as a part of another module


def after_default_bfloat16(exits: Exits) -> Exits:
    """A copy that was made where bfloat16 is the default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = NETWORK.exits(average=exits.average)
    finally:
        torch.set_default_dtype(torch.float32)
    made.load_state_dict(exits.state_dict())
    return made


CASTS: dict[str, Callable[[Exits], Exits]] = {
    "to(bfloat16)": to_bfloat16,
    "half": lambda exits: exits.half(),
    "bfloat16": lambda exits: exits.bfloat16(),
    "double": lambda exits: exits.double(),
    "type": lambda exits: exits.type(torch.float16),
    "made in bfloat16": after_default_bfloat16,
}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("cast", CASTS)
def test_temperatures_and_thresholds_are_float32_whatever_the_weights_are(cast: str, average: bool) -> None:
    """A head is as sure as its own logits say in float32, by thresholds and temperatures no cast has rounded."""

    def sureness(exits: Exits, inputs: Tensor) -> Tensor:
        """Of the second exit, (B,)."""
        with torch.no_grad():
            (_, first), (_, second), _ = exits._every((inputs,))
        each = [(z.double() / t).softmax(1) for z, t in ((first, temperatures[0]), (second, temperatures[1]))]
        return (torch.stack(each).mean(0) if average else each[1]).amax(1)

    exits, temperatures = copy.deepcopy(EXITS[average]), torch.tensor([0.0010009, 0.30007])  # no numbers of bfloat16
    inputs = INPUTS.bfloat16().double()
    thresholds = torch.tensor([1.001, float(sureness(exits, inputs).sort().values[5:7].mean())])
    exits.temperature.copy_(temperatures)
    exits.threshold.copy_(thresholds)
    exits = CASTS[cast](exits)
    for name, wanted in (("temperature", temperatures), ("threshold", thresholds)):
        found = exits.state_dict()[name]
        assert torch.equal(found, wanted) and found.dtype == torch.float32 and torch.equal(getattr(exits, name), found)
    inputs = inputs.to(next(exits.parameters()).dtype)
    sure = sureness(exits, inputs) >= thresholds[1].double()
    assert exits(inputs).block.tolist() == [2 if one else 3 for one in sure.tolist()]


def test_temperatures_and_thresholds_go_where_the_weights_go() -> None:
    exits = copy.deepcopy(EXITS[False])
    assert exits.to("meta", torch.bfloat16).threshold.is_meta and exits.temperature.is_meta
    exits.to_empty(device="cpu").load_state_dict(EXITS[False].state_dict())
    assert torch.equal(exits.threshold, EXITS[False].threshold) and exits.threshold.dtype == torch.float32


def test_compute_is_what_runs() -> None:
    """FLOPs of an exit are those of a batch that leaves there."""
    exits = NETWORK.exits(0.0)
    heads = [sum(exits.head_flops[: place + 1]) for place in range(3)]
    for place in range(3):
        exits.threshold.copy_(torch.tensor([0.0 if exit >= place else 2.0 for exit in range(2)]))
        with Work(Rates(1.0, 1.0)) as work:
            exits(INPUTS)
        assert work.flops == SAMPLES * (exits.block_flops[place] + heads[place]) > 0
    with Work(Rates(1.0, 1.0)) as work:
        NETWORK.model(INPUTS)
    assert work.flops == SAMPLES * exits.block_flops[-1] and exits.head_flops[-1] == 0


def test_a_temperature_has_the_least_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, CLASSES, generator=generator, dtype=torch.float64)
    targets = torch.where(torch.rand(500, generator=generator) < 0.6, logits.argmax(1), 0)
    found = fitted_temperature(logits, targets)
    losses = {t: float(F.cross_entropy(logits / t, targets)) for t in torch.logspace(-1.3, 1.3, 2001).tolist()}
    assert found == pytest.approx(min(losses, key=losses.__getitem__), rel=2e-3)
    assert fitted_temperature(logits, logits.argmax(1)) == pytest.approx(TEMPERATURES[0])
    assert fitted_temperature(logits, logits.argmin(1)) == pytest.approx(TEMPERATURES[1])


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 5.0, 100.0]))
@settings(max_examples=10, deadline=None)
def test_thresholds_keep_the_accuracy_that_was_asked_for(seed: int, points: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sure = torch.rand(2, 60, generator=generator)
    right = torch.cat([torch.rand(2, 60, generator=generator) < sure, torch.rand(1, 60, generator=generator) < 0.8])
    answered = Answered(right, sure, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    thresholds = answered.cheapest(points)
    found = answered.outcome(thresholds)
    correct, flops = 0, 0.0
    for sample in range(60):
        place = next((e for e in range(2) if sure[e, sample] >= thresholds[e]), 2)
        correct, flops = correct + bool(right[place, sample]), flops + (1.0, 2.0, 4.0)[place]
    assert found.accuracy == pytest.approx(correct / 60) and found.flops == pytest.approx(flops / 60)
    assert found.accuracy >= float(right[-1].double().mean()) - points / 100 - 1e-6
    if points == 100.0:
        assert found.flops == 1.0  # nothing holds the first exit back
    for one in sure.flatten().tolist():  # none of these is better
        other = answered.outcome(torch.full((2,), one))
        assert other.flops >= found.flops or other.accuracy < float(right[-1].double().mean()) - points / 100


@pytest.mark.parametrize("average", [False, True])
def test_calibration_and_what_is_measured_agree_with_the_answers(average: bool) -> None:
    exits, targets = NETWORK.exits(average=average), torch.arange(SAMPLES) % CLASSES
    batches = [(INPUTS[:7], targets[:7]), (INPUTS[7:], targets[7:])]
    chosen = exits.calibrate(batches, points=10.0)
    found = exits.measure(batches)
    assert found == chosen
    answers = exits(INPUTS)
    assert found.accuracy == pytest.approx(float((answers.logits.argmax(1) == targets).double().mean()))
    assert found.shares == pytest.approx([float((answers.block == k).double().mean()) for k in (1, 2, 3)])
    everyone = NETWORK.exits(1.01, average=average)
    everyone.temperature.copy_(exits.temperature)
    own = float((everyone(INPUTS).logits.argmax(1) == targets).double().mean())
    assert found.accuracy >= own - 0.1 - 1e-6
    before = copy.deepcopy(exits.state_dict())
    curve = exits.curve(batches, iter(batches), points=(10.0, 100.0))
    assert curve.outcomes[0] == chosen and curve.outcomes[1].shares == (1.0, 0.0, 0.0)
    assert curve.heads[-1] == pytest.approx(own) and curve.flops[-1] == exits.block_flops[-1]
    assert all(torch.equal(before[name], value) for name, value in exits.state_dict().items())
    assert curve.table().count("\n") == 3


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    exits, targets = NETWORK.exits(), torch.arange(SAMPLES) % CLASSES
    exits.curve([(INPUTS, targets)], [(INPUTS, targets)]).picture(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


class Together(nn.Module):
    """Compares the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x) - x.mean(0)))


class Drawing(nn.Module):
    """Draws in eval mode; tracing would freeze one draw."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.changed(self.first(x)))

    def changed(self, features: Tensor) -> Tensor:
        return features if self.training else features * random.random()


class Branching(Drawing):
    """Goes another way in eval mode where it is traced."""

    def changed(self, features: Tensor) -> Tensor:
        return features if self.training or not isinstance(features, Tensor) else 2 * features


def test_what_makes_no_sense_is_refused() -> None:
    rows = torch.randn(6, 4)
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def cut(method: localgrad.Method, model: nn.Module = layers, inputs: Any = rows) -> LocalNetwork:
        return localgrad.localize(copy.deepcopy(model), method, 2, example=inputs)

    with pytest.raises(MethodError, match=r"exits\(e2e\): e2e has no auxiliary heads"):
        cut(methods.e2e(TASK)).exits()
    with pytest.raises(MethodError, match="no head behind block 1"):
        cut(methods.e2e(TASK)).prefix(1)
    with pytest.raises(MethodError, match="sure of one class for each sample"):
        cut(methods.dgl(tasks.multilabel(CLASSES))).exits()
    with pytest.raises(MethodError, match="Regression are not"):
        cut(methods.dgl(tasks.regression(CLASSES))).exits()
    with pytest.raises(PartitionError, match="sample by sample"):
        cut(methods.dgl(TASK), Together()).exits()
    drawing, branching = cut(methods.dgl(TASK), Drawing()), cut(methods.dgl(TASK), Branching())
    for refused in (drawing.exits, lambda: drawing.prefix(1)):
        with pytest.raises(PartitionError, match="draws random numbers"):
            refused()
    for refused in (branching.exits, lambda: branching.prefix(1)):
        with pytest.raises(PartitionError, match=r"not compute what Branching\.forward does in eval mode"):
            refused()
    network = cut(methods.dgl(TASK))
    for wrong in (0, 2, -1, 1.0, True):
        with pytest.raises(PartitionError, match=r"write 1 to 1, or take network\.model"):
            network.prefix(wrong)
    for threshold in (-0.1, math.nan):
        with pytest.raises(MethodError, match="the probability from which a head is sure"):
            network.exits(threshold)
    exits = network.exits()
    with pytest.raises(TrainingError, match="how much accuracy may be lost"):
        exits.calibrate([(rows, torch.zeros(6, dtype=torch.int64))], points=-1.0)
    for targets in (torch.zeros(6), torch.full((6,), CLASSES), torch.full((6,), -100), torch.zeros(5).long()):
        with pytest.raises(TrainingError, match="class indices"):
            exits.calibrate([(rows, targets)])
    with pytest.raises(TrainingError, match="no batch"):
        exits.measure([])


def leaves(answers: Any) -> tuple[Tensor, ...]:
    return tuple(tree_leaves(answers))


@pytest.mark.parametrize("which", ["model", "prefix", "exits", "averaged exits"])
def test_torch_and_onnx_export_the_same_answers(which: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 8, 8)
    network = trained(Skipping(), methods.dgl(TASK, head="linear"), ("second", "third"), inputs)
    exits = network.exits(average=which == "averaged exits")
    for place, head in enumerate(heads_of(network, inputs)[:2]):
        exits.threshold[place] = confidence(head, exits.temperature[place]).sort().values[4:6].mean()
    assert len(exits(inputs).block.unique()) > 1
    module = {"model": network.model, "prefix": network.prefix(2)}.get(which, exits)
    sizes = torch.export.ShapesCollection()
    sizes[inputs] = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(module, (inputs,), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"])
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    for some in (inputs, inputs[:1]):
        wanted = leaves(module(some))
        torch.testing.assert_close(leaves(loaded(some)), wanted)
        found = tuple(torch.from_numpy(one) for one in session.run(None, {"images": some.numpy()}))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def run(*words: str) -> int:
    try:
        cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    words = "train digits beside=[] --epochs 1 train.threads=1 data.limit=100 train.batch_size=48 train.ema_decay=0.5"
    assert run(*words.split(), "--run-dir", str(folder)) == 0
    return folder


def test_a_run_is_exported_from_the_command_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from localgrad.train.export import network_of
    from localgrad.train.predict import load_trained

    trained = load_trained(run_dir, "cpu")
    inputs = torch.randn(3, *trained.input_shape)
    wanted = trained.model(inputs)
    assert run("export", str(run_dir), "--to", str(tmp_path / "new" / "model.onnx")) == 0
    session = onnxruntime.InferenceSession(tmp_path / "new" / "model.onnx")
    (found,) = session.run(None, {"images": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)
    told = json.loads(session.get_modelmeta().custom_metadata_map["trained_on"])
    assert told["classes"] == list(map(str, range(10))) and len(told["mean"]) == 1
    file = tmp_path / "prefix.pt2"
    assert run("export", str(run_dir), "--format", "torch", "--to", str(file), "--block", "2") == 0
    assert "blocks 1 to 2 of resnet8" in capsys.readouterr().out
    extra = {"trained_on": ""}
    program = torch.export.load(file, extra_files=extra).module()
    wanted = network_of(run_dir, trained).prefix(2)(inputs)
    torch.testing.assert_close(program(inputs), wanted)
    assert json.loads(extra["trained_on"])["block"] == 2
    before = file.read_bytes()
    assert run("export", str(run_dir), "--format", "torch", "--to", str(file)) == 2
    assert "would be replaced" in " ".join(capsys.readouterr().err.split()) and file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "prefix.pt2"]  # nothing half-written


def test_what_cannot_be_exported_is_refused(run_dir: Path, tmp_path: Path) -> None:
    for words, place, block in (("holds no run", tmp_path, None), ("write 1 to 3", run_dir, 7)):
        with pytest.raises(LocalgradError, match=words):
            export(place, tmp_path / "file", "torch", block)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for there in (tmp_path, tmp_path / "link"):
        with pytest.raises(LocalgradError, match="is there already"):
            export(run_dir, there, "torch")
    (tmp_path / "plain").write_text("")
    with pytest.raises(LocalgradError, match="cannot write"):
        export(run_dir, tmp_path / "plain" / "file", "torch")
