"""What a user's own forward does, it does in training too: because it is the user's own forward that runs."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import localgrad
from gradients import gradients
from localgrad import PartitionError, TrainingError, methods
from localgrad.partition import Partition
from zoo import MODELS, TASK, batch

E2E, DGL = methods.e2e(TASK), methods.dgl(TASK)
X, Y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])


class Net(nn.Module):
    """Four units that are called by ``between``."""

    def __init__(self, between: Callable[[Net, int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.2))
            for _ in range(4)
        )
        self.head = nn.Linear(6, 4)
        self.between = between or (lambda net, k, x: net.units[k](x))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        for k in range(4):
            x = self.between(self, k, x)
        return self.head(x.mean((2, 3)))


def assert_is_plain_training(model: nn.Module, inputs: Any = X, cutting: Any = 3, targets: Tensor = Y) -> None:
    """Training through the suspended forward is ``loss.backward()`` bit for bit, buffers and draws included."""
    plain = copy.deepcopy(model)
    network = localgrad.localize(model, E2E, cutting, example=inputs)
    for step in range(2):
        for one, run in (
            (plain, lambda: TASK.loss(plain(inputs), localgrad.Batch(inputs, targets, 0)).backward()),
            (model, lambda: localgrad.backward(network, inputs, targets)),
        ):
            torch.manual_seed(step)
            random.seed(step)
            np.random.seed(step)
            one.zero_grad(set_to_none=True)
            run()
    expected, found = gradients(plain), gradients(model)
    assert all(
        (a is None) == (found[n] is None) and (a is None or torch.equal(a, found[n])) for n, a in expected.items()
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_end_to_end_is_loss_backward_bit_for_bit_on_every_model_of_the_zoo(name: str) -> None:
    torch.manual_seed(0)
    inputs, targets = batch()
    assert_is_plain_training(MODELS[name]().train(), inputs, 3, targets)


def drop_by(draw: Callable[[], float]) -> Callable[[Net, int, Tensor], Tensor]:
    return lambda net, k, x: net.units[k](x) if not net.training or draw() > 0.5 else x


BETWEEN: dict[str, Callable[[Net, int, Tensor], Tensor]] = {
    "activation checkpointing": lambda net, k, x: checkpoint(net.units[k], x, use_reentrant=False),
    "autocast": lambda net, k, x: _under_autocast(net, k, x),
    "layer drop by random": drop_by(random.random),
    "layer drop by numpy": drop_by(np.random.rand),
    "layer drop by torch": drop_by(lambda: torch.rand([]).item()),
    "a branch on training and type": lambda net, k, x: (
        net.units[k](x) * (2.0 if net.training and isinstance(x, Tensor) else 1.0)
    ),
    "an assert on the shape": lambda net, k, x: _asserting(net, k, x),
    "a draw of its own": lambda net, k, x: net.units[k](x) + 0.1 * torch.randn(1, 6, 1, 1),
    "a module called twice": lambda net, k, x: net.units[k](net.units[k](x)),
    "a keyword argument": lambda net, k, x: net.units[k](input=x),
}


def _under_autocast(net: Net, k: int, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.units[k](x).float()


def _asserting(net: Net, k: int, x: Tensor) -> Tensor:
    assert x.shape[1] == 6 and len(x) <= 6
    return net.units[k](x)


@pytest.mark.filterwarnings("ignore:block 0, from the input on, keeps")
@pytest.mark.parametrize("name", sorted(BETWEEN))
def test_what_a_forward_does_between_modules(name: str) -> None:
    torch.manual_seed(0)
    cuts = ("head",) if "layer drop" in name or "twice" in name else ("units.1", "units.3")
    assert_is_plain_training(Net(BETWEEN[name]).train(), cutting=cuts)


def test_checkpointed_layers_run_twice_a_step() -> None:
    model = Net(BETWEEN["activation checkpointing"]).train()
    network = localgrad.localize(model, DGL, ("units.2",), example=X)
    runs = []
    model.units[0][0].register_forward_hook(lambda *_: runs.append(0))
    localgrad.backward(network, X, Y)
    assert len(runs) == 2


@pytest.mark.filterwarnings("ignore:block 0, from the input on, keeps")
def test_every_draw_of_random_and_numpy_is_a_new_one() -> None:
    for draw in (random.random, np.random.rand):
        random.seed(3)
        np.random.seed(3)
        model, calls = Net(drop_by(draw)).train(), [0] * 4
        for k, unit in enumerate(model.units):
            unit.register_forward_hook(lambda *_, k=k, calls=calls: calls.__setitem__(k, calls[k] + 1))
        network = localgrad.localize(model, E2E, ("head",), example=X)
        calls[:] = [0] * 4
        for step in range(40):
            localgrad.backward(network, X, Y, step)
        assert all(5 < count < 35 for count in calls), calls


def test_hooks_and_attributes_that_change_are_those_of_the_model() -> None:
    model = Net(lambda net, k, x: net.units[k](x) * net.alpha).train()
    model.alpha, calls = 1.0, []
    network = localgrad.localize(model, E2E, ("units.2",), example=X)
    model.alpha = 0.0
    model.units.register_forward_hook(lambda *_: calls.append(0))  # a container: never called, as in plain training
    model.units[2].register_forward_pre_hook(lambda *_: calls.append(1))
    (loss,) = localgrad.backward(network, X, Y).values()
    assert torch.equal(loss, TASK.loss(model(X), localgrad.Batch(X, Y, 0)).detach())
    assert calls == [1, 1]


def test_a_changed_forward_is_the_forward() -> None:
    """What accelerate and the Hugging Face Trainer do: ``model.forward`` becomes one under autocast."""
    model, dtypes = Net().train(), []
    own = model.forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return own(x).float()

    model.forward = forward
    network = localgrad.localize(model, DGL, ("units.1", "units.3"), example=X)
    model.units[1][0].register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    for _, loss in localgrad.local_losses(network, X, Y):
        assert not torch.is_autocast_enabled("cpu")
        loss.backward()
    assert dtypes == [torch.bfloat16]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


def test_a_buffer_that_the_forward_replaces_counts_the_steps() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return super().forward(x)

    model = Counting().train()
    network = localgrad.localize(model, DGL, 3, example=X)
    assert model.steps == 0 and type(model.steps) is Tensor
    for _ in range(3):
        localgrad.backward(network, X, Y)
    assert model.steps == 3


# Forms of inputs and outputs -----------------------------------------------------------------------------------------


class Output(OrderedDict):
    """Like the outputs of transformers: a mapping with attributes."""


@pytest.mark.parametrize("wrap", [lambda t: {"logits": t, "extra": None}, lambda t: Output(logits=t), lambda t: (t, 1)])
def test_outputs_of_any_form(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    class First(type(TASK)):
        def loss(self, output: Any, batch: localgrad.Batch) -> Tensor:
            logits = (
                output
                if isinstance(output, Tensor)
                else next(iter(output.values() if isinstance(output, dict) else output))
            )
            return super().loss(logits, batch)

    model = Wrapped().train()
    network = localgrad.localize(model, methods.dgl(First(4)), 3, example=X)
    localgrad.backward(network, X, Y)
    assert all(p.grad is not None for p in model.parameters())
    (*_, (_, term, own)) = localgrad.local_outputs(network.eval(), X)
    assert term is None and type(own) is type(wrap(X))


class Masked(nn.Module):
    """Layers that take a mask by keyword, and one that is not there at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, *, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.embed(ids) * scale
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask)
        return self.head(x[:, 0])


def test_keyword_inputs_with_masks() -> None:
    ids, mask = torch.randint(9, (6, 5)), torch.zeros(6, 5, dtype=torch.bool)
    mask[3, 3:] = True
    inputs = {"ids": ids, "mask": mask, "scale": 0.5}
    torch.manual_seed(0)
    plain, network = Masked().train(), None
    model = copy.deepcopy(plain)
    network = localgrad.localize(model, E2E, ("layers.1", "layers.3"), example=inputs)
    for one, run in ((plain, None), (model, network)):
        torch.manual_seed(1)
        if run is None:
            F.cross_entropy(one(**inputs), Y).backward()
        else:
            localgrad.backward(run, inputs, Y)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    local = localgrad.localize(model, methods.accumulation(methods.man(DGL), parts=2), 3, example=inputs)
    localgrad.testing.assert_isolated(local, inputs, Y)


def test_copies_of_later_units_get_the_masks_of_this_forward() -> None:
    inputs = {"ids": torch.randint(9, (6, 5)), "mask": torch.zeros(6, 5, dtype=torch.bool)}
    model = Masked().eval()
    network = localgrad.localize(model, methods.man(DGL, mix="ema"), ("layers.2",), example=inputs).eval()
    other = {"ids": torch.randint(9, (6, 5)), "mask": torch.tensor([[False] * 3 + [True] * 2] * 6)}
    seen: dict[str, Tensor] = {}
    model.layers[2].register_forward_hook(lambda _, __, output: seen.__setitem__("original", output))
    twin = network.auxiliary["0-1"].bridge.twin.module
    twin.register_forward_hook(lambda _, __, output: seen.__setitem__("twin", output))
    list(localgrad.local_outputs(network, other))
    assert torch.equal(seen["twin"], seen["original"])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DGL, E2E, methods.accumulation(DGL, parts=2)], ids=lambda m: m.name)
@pytest.mark.parametrize("count", [4, 9])
def test_targets_that_are_not_one_for_each_sample(method: localgrad.Method, count: int) -> None:
    network = localgrad.localize(Net(), method, 3, example=X)
    with pytest.raises(TrainingError, match=f"6 samples in inputs and {count} in targets"):
        localgrad.backward(network, X, torch.zeros(count, dtype=torch.long))


def test_heads_in_another_mode_than_the_model() -> None:
    network = localgrad.localize(Net().train(), DGL, 3, example=X)
    network.eval()
    network.model.train()
    with pytest.raises(
        TrainingError, match=r"training mode, its auxiliary networks are in eval mode: call network.train"
    ):
        localgrad.backward(network, X, Y)
    network.train()
    localgrad.backward(network, X, Y)


def test_a_module_replaced_after_localize_is_trained_or_refused() -> None:
    model = Net().train()
    network = localgrad.localize(model, DGL, 3, example=X)
    model.head = nn.Linear(6, 4)  # under the same name: the own forward runs it, and its parameters are found by name
    localgrad.backward(network, X, Y)
    assert model.head.weight.grad is not None
    assert any(p is model.head.weight for p in network.block_parameters(network.num_blocks - 1))
    model.head = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with pytest.raises(PartitionError, match="was added to the model or taken from it after it was cut"):
        localgrad.backward(network, X, Y)


def test_models_without_gradient() -> None:
    with pytest.raises(PartitionError, match="carries a gradient"):
        localgrad.localize(Net().requires_grad_(False), DGL, 2, example=X)
    model = Net()
    model.forward = torch.no_grad()(model.forward)
    with pytest.raises(PartitionError, match="carries a gradient"):
        localgrad.localize(model, DGL, 2, example=X)


def test_an_example_that_does_not_run_leaves_the_model_as_it_was() -> None:
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    for example in (torch.randn(2, 4, 8, 8), {"y": X}, (X, X)):
        with pytest.raises(PartitionError, match="does not run in training mode on example="):
            localgrad.localize(model, DGL, 2, example=example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks and m.training for m in model.modules())


class SideBranch(nn.Module):
    """Metadata is embedded first; the image network is all the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8))
        self.units = nn.ModuleList(nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        e = self.metadata(m)
        for k, unit in enumerate(self.units):
            x = unit(x).relu()
            if k == 1:
                x = x + e[:, :, None, None]
        return self.head(x.mean((2, 3)))


def test_a_side_branch_that_runs_first_is_no_block() -> None:
    inputs = (X, torch.randn(6, 5))
    assert [cut.name for cut in Partition(SideBranch(), inputs).cuts] == ["units.2", "units.3", "head"]
    with pytest.raises(PartitionError, match=r"'units.1' is no cut point: .*does not depend on 'metadata.0.weight'"):
        localgrad.localize(SideBranch(), DGL, ("units.1",), example=inputs)
    with pytest.raises(PartitionError, match="'metadata' takes nothing that was computed from parameters"):
        localgrad.localize(SideBranch(), DGL, ("metadata",), example=inputs)
    model = SideBranch()
    network = localgrad.localize(model, DGL, 3, example=inputs)
    localgrad.testing.assert_isolated(network, inputs, Y)


class Tied(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x.mean(1))


def test_shared_parameters_are_refused_or_trained_from_both_blocks() -> None:
    torch.manual_seed(0)
    ids, targets = torch.randint(4, (6, 5)), Y
    with pytest.raises(PartitionError, match=r"'embed.weight' is used at both ends; localize\(..., shared=True\)"):
        localgrad.localize(Tied(), DGL, 2, example=ids)
    with pytest.raises(PartitionError, match=r"'embed.weight' is used before and after 'layers.1'.*shared=True"):
        localgrad.localize(Tied(), DGL, ("layers.1",), example=ids)
    model = Tied()
    network = localgrad.localize(model, DGL, ("layers.1", "layers.2"), example=ids, shared=True)
    assert any(p is model.embed.weight for p in network.block_parameters(2))
    assert not any(p is model.embed.weight for p in network.block_parameters(0))
    contributions = []
    for _, loss in localgrad.local_losses(network, ids, targets):
        loss.backward()
        contributions.append(None if model.embed.weight.grad is None else model.embed.weight.grad.clone())
    # The first block's share is there when the second block's loss comes, the last one's is added at the end.
    assert contributions[0] is None and torch.equal(contributions[1], contributions[1])
    first = contributions[1]
    assert first is not None and first.any() and not torch.equal(first, model.embed.weight.grad)
    plain = copy.deepcopy(model)
    model.zero_grad()
    localgrad.backward(localgrad.localize(model, E2E, ("layers.1",), example=ids, shared=True), ids, targets)
    plain.zero_grad()
    F.cross_entropy(plain(ids), targets).backward()
    torch.testing.assert_close(model.embed.weight.grad, plain.embed.weight.grad, rtol=1e-6, atol=1e-7)


class Twins(nn.Module):
    """One encoder for both inputs: called twice, with a copy for the second, or once on both side by side."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
        self.head = nn.Linear(16, 4)
        self.second = copy.deepcopy(self.encoder) if how == "copies" else self.encoder
        self.how = how

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.how == "side by side":
            return self.head(self.encoder(torch.stack([a, b], 1)).flatten(1))
        return self.head(torch.cat([self.encoder(a), self.second(b)], 1))


@pytest.mark.parametrize("shared", [False, True])
def test_a_cut_before_which_every_parameter_is_used_again_is_refused_with_what_to_do(shared: bool) -> None:
    inputs = torch.randn(6, 8), torch.randn(6, 8)
    for place in range(1, 4):
        names = [f"encoder.{k}.0.{kind}" for k in range(place) for kind in ("weight", "bias")]
        named = ", ".join(map(repr, names[:3])) + ", ..." * (len(names) > 3)
        with pytest.raises(PartitionError) as caught:
            localgrad.localize(Twins("twice"), DGL, (f"encoder.{place}",), example=inputs, shared=shared)
        for words in (f"({named}) is used again", "no block would step", "deepcopy", "torch.stack", "'head'"):
            assert words in str(caught.value)
    for how, cut in (("twice", "head"), ("copies", "encoder.2"), ("side by side", "encoder.2")):  # each remedy
        network = localgrad.localize(Twins(how), DGL, (cut,), example=inputs, shared=shared)
        localgrad.testing.assert_isolated(network, inputs, Y)


def test_one_block_that_holds_nearly_everything_is_a_warning() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 1, 3, stride=4), *(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)), nn.Flatten()
    )
    wide = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.Tanh(), *(nn.Conv2d(2 if k == 0 else 32, 32, 3, padding=1) for k in range(6)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    assert model is not None
    with pytest.warns(UserWarning, match=r"block 1, from '2' on, keeps \d\d% of what all blocks keep.*'3'"):
        localgrad.localize(wide, DGL, ("2",), example=X)


def test_containers_of_torch_are_cut_inside() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4, enable_nested_tensor=False
    )
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(40, 4))
    x = torch.randn(6, 5, 8)
    network = localgrad.localize(model, DGL, ("0.layers.1", "0.layers.2", "0.layers.3"), example=x)
    localgrad.testing.assert_isolated(network, x, Y)
    assert len(localgrad.localize(model, DGL, 4, example=x).cuts) == 3
