"""Spans of any shape against brute force: for each start, run its blocks again and call backward once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad.methods import accumulation, checkpointing, deep_supervision, dgl, infopro, predsim, windows
from localgrad.randomness import draws_of
from localgrad.spans import Constant, Span, check
from zoo import BASES, CLASSES, MODELS, TASK, batch, build

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fixed(Constant):
    """Any spans."""

    triples: tuple[tuple[int, int, float], ...]

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        return tuple(Span(*triple) for triple in self.triples)


def brute_force(network: localgrad.LocalNetwork, inputs: Tensor, targets: Tensor, step: int) -> dict[Span, Tensor]:
    """The gradients of ``spans``, start by start: features at the start, detached; its blocks again; one backward.

    Two choices of order make it the same computation as the engine's to the last bit, where floating-point sums would
    otherwise be associated differently. Starts are taken in the order in which their widest spans end, since that is
    the order in which a parameter's gradients are added up. And every reader of a feature reads it through a view of
    its own, so that the parts of one reader's gradient (a convolution and a shortcut, several heads) are added among
    themselves before those of another reader.
    """
    spans = network.spans(step)
    blocks = localgrad.separate_blocks(network)
    given = localgrad.Batch(inputs, targets, step)
    boundaries = [inputs]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            with draws_of("block", step, 0, index, CPU):
                boundaries += block(boundaries[-1])
    ends = {span.start: max(s.stop for s in spans if s.start == span.start) for span in spans}
    losses = {}
    for start in sorted(ends, key=lambda s: (ends[s], -s)):
        value, total = boundaries[start].detach(), None
        for index in range(start, ends[start]):
            with draws_of("block", step, 0, index, CPU):
                (value,) = blocks[index](value.view_as(value))
            for span in (s for s in spans if (s.start, s.stop) == (start, index + 1)):
                with draws_of("auxiliary", step, 0, str(span), CPU):
                    if span.stop == len(blocks):
                        loss = F.cross_entropy(value, targets)
                    else:
                        auxiliary = network.auxiliary_of(span)
                        outputs = auxiliary(value.view_as(value))
                        loss = sum(
                            w * term.loss(out, given) for (term, w), out in zip(auxiliary.terms, outputs, strict=True)
                        )
                losses[span] = (span.weight * loss).detach()
                total = span.weight * loss if total is None else total + span.weight * loss
        total.backward()
    return losses


def assert_equals_brute_force(model: str, method: localgrad.Method, num_blocks: int) -> None:
    network = build(model, method, num_blocks).double()
    reference = build(model, method, num_blocks).double()
    for parameter in network.auxiliary.parameters():  # PredSim's read-out starts at 0 and would hide its gradient
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    reference.load_state_dict(network.state_dict())
    inputs, targets = batch()
    inputs = inputs.double()
    with localgrad.keyed_randomness(11):
        for step in range(2):  # the second step adds to the first one's gradients
            found = localgrad.backward(network, inputs, targets, step)
            expected = brute_force(reference, inputs, targets, step)
            assert found.keys() == expected.keys()
            for span, loss in expected.items():
                assert torch.equal(found[span], loss), span
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        # Heads that read maps leave the class token out, so the first block may have nothing to tell it.
        assert ours.grad.any() or name == "model.token", name
        difference = (ours.grad - theirs.grad).abs().max().item()
        assert difference == 0.0, f"{name} differs by {difference}"


SCHEDULES = {
    "ladder": ((0, 1, 1.0), (0, 3, 0.5), (1, 3, 2.0), (2, 5, 1.0), (1, 5, 0.3)),
    "all pairs": tuple((a, b, 1.0 + 0.1 * a + 0.01 * b) for a in range(5) for b in range(a + 1, 6) if b <= 5),
    "late starts": ((0, 5, 0.7), (3, 4, 1.3), (4, 5, 0.9), (2, 4, 0.11)),
    "only the middle overlaps": ((0, 2, 1.0), (1, 4, 0.25), (3, 5, 3.0)),
    "nested": ((0, 5, 1.0), (1, 4, 0.5), (2, 3, 0.25)),
    "from the input": ((0, 1, 0.3), (0, 2, 0.3), (0, 3, 0.3), (0, 4, 0.3), (0, 5, 1.0)),
    "to the output": ((0, 5, 0.2), (1, 5, 0.3), (2, 5, 0.4), (3, 5, 0.5), (4, 5, 0.6)),
    "two groups": ((0, 2, 1.0), (1, 2, 0.5), (2, 5, 1.0), (3, 5, 0.5)),
}
METHODS = {
    "local": dgl(TASK),
    "width 2": windows(dgl(TASK), width=2),
    "width 3": windows(dgl(TASK), width=3, local=0.2, cascade=0.8),
    "width 3, no local": windows(dgl(TASK), width=3, local=0.0, cascade=0.5),
    "wider than the network": windows(dgl(TASK), width=9),
    "infopro, width 2": windows(infopro(TASK), width=2, local=0.001, cascade=0.999),
    "infopro contrast, width 3": windows(infopro(TASK, loss="contrast"), width=3),
    "predsim, width 2": windows(predsim(TASK, beta=0.5), width=2),
    "deep supervision": deep_supervision(TASK),
    "checkpointed width 3": checkpointing(windows(infopro(TASK), width=3)),
    "checkpointed ladder": checkpointing(replace(dgl(TASK), spans=Fixed(SCHEDULES["ladder"]))),
    **{f"dgl, {name}": replace(dgl(TASK), spans=Fixed(spans)) for name, spans in SCHEDULES.items()},
    "infopro, ladder": replace(infopro(TASK), spans=Fixed(SCHEDULES["ladder"])),
    "predsim, all pairs": replace(predsim(TASK), spans=Fixed(SCHEDULES["all pairs"])),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_equals_brute_force_exactly(name: str, model: str) -> None:
    assert_equals_brute_force(model, METHODS[name], 5)


@pytest.mark.parametrize("seed", range(5))
def test_random_spans_equal_brute_force_exactly(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    pairs = {(k, k + 1) for k in range(5) if draw(0, 2)} | {(0, 5)}
    for _ in range(6):
        start = draw(0, 5)
        pairs.add((start, draw(start + 1, 6)))
    spans = Fixed(tuple((a, b, draw(1, 20) / 8) for a, b in sorted(pairs, key=lambda _: draw(0, 100))))
    check(spans.spans(5), 5)
    assert_equals_brute_force("residual", replace(dgl(TASK), spans=spans), 5)


def test_every_block_runs_forward_once_whatever_the_spans() -> None:
    network = build("cnn", METHODS["dgl, all pairs"], 5)
    calls = [0] * 5
    for index, unit in enumerate(network.model.units):
        unit[1].register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    localgrad.backward(network, *batch())
    assert calls == [1] * 5
    assert all(unit[1].num_batches_tracked == 1 for unit in network.model.units)


def test_gradients_are_accumulated_not_overwritten() -> None:
    method = accumulation(METHODS["width 3"], parts=2)
    network = build("cnn", method, 4, dropout=0.0).double()
    inputs, targets = batch()
    localgrad.backward(network, inputs.double(), targets)
    once = [p.grad.clone() for p in network.parameters()]
    localgrad.backward(network, inputs.double(), targets)
    for parameter, gradient in zip(network.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-10, atol=1e-13)


# --- taps --------------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """A U-Net in small: ``up2`` also reads what ``down2`` made, ``up1`` what ``down1`` made, each joined before."""

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, 6, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.1))

        self.down1, self.down2, self.middle = layer(3), layer(6, 2), layer(6, 2)
        self.skip1, self.skip2 = nn.Identity(), nn.Identity()
        self.up2, self.up1 = layer(12), layer(12)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        skip1 = self.skip1(a)
        b = self.down2(a)
        skip2 = self.skip2(b)
        c = self.middle(b)
        d = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), skip2], 1))
        e = self.up1(torch.cat([F.interpolate(d, scale_factor=2.0), skip1], 1))
        return self.fc(e.mean((2, 3)))


CUTS = ("down2", "middle", "up2", "up1")


def skips(method: localgrad.Method) -> localgrad.LocalNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Skips().double()
        return localgrad.localize(model, method, CUTS, example=batch(2)[0].double())


def with_gradient(network: localgrad.LocalNetwork) -> set[str]:
    return {name.split(".")[0] for name, p in network.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", [BASES["e2e"], checkpointing(BASES["e2e"])], ids=lambda m: m.name)
def test_taps_carry_gradient_within_a_span(method: localgrad.Method) -> None:
    network = skips(method)
    plain = Skips().double()
    plain.load_state_dict(network.model.state_dict())
    inputs, targets = batch()
    torch.manual_seed(1)
    F.cross_entropy(plain(inputs.double()), targets).backward()
    torch.manual_seed(1)
    localgrad.backward(network, inputs.double(), targets)
    for (name, p), expected in zip(network.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, expected.grad), name


def tapped(network: localgrad.LocalNetwork, inputs: Tensor, targets: Tensor, step: int) -> None:
    """Brute force with taps, written for `Skips`: what a span's blocks read from before its start is detached."""
    m = network.model
    spans = network.spans(step)
    ends = {span.start: max(s.stop for s in spans if s.start == span.start) for span in spans}

    def run(start: int, stop: int, made: list[Tensor]) -> list[Tensor]:
        made = [value.detach() for value in made[: start + 1]]
        for k in range(start, stop):
            last = made[-1]
            with draws_of("block", step, 0, k, CPU):
                if k < 2:
                    made.append((m.down1, m.down2)[k](last))
                elif k == 2:
                    made.append(torch.cat([F.interpolate(m.middle(last), scale_factor=2.0), made[2]], 1))
                elif k == 3:
                    made.append(torch.cat([F.interpolate(m.up2(last), scale_factor=2.0), made[1]], 1))
                else:
                    made.append(m.fc(m.up1(last).mean((2, 3))))
        return made

    with torch.no_grad():
        everything = run(0, 5, [inputs])
    for start in sorted(ends, key=lambda s: (ends[s], -s)):
        made = run(start, ends[start], everything)
        total = None
        for span in sorted(s for s in spans if s.start == start):
            if span.stop == 5:
                loss = F.cross_entropy(made[5], targets)
            else:
                (output,) = network.auxiliary_of(span)(made[span.stop])
                loss = F.cross_entropy(output, targets)
            total = span.weight * loss if total is None else total + span.weight * loss
        total.backward()


TAPPED = {
    "local": ((0, 1, 1.0), (1, 2, 1.0), (2, 3, 1.0), (3, 4, 1.0), (4, 5, 1.0)),
    "tap within one span, outside another": ((0, 2, 0.5), (1, 4, 2.0), (2, 4, 1.0), (2, 5, 0.25)),
    "both taps": ((0, 5, 1.0), (1, 2, 0.5), (1, 4, 0.5), (3, 5, 2.0)),
    "from the input": ((0, 1, 0.3), (0, 2, 0.3), (0, 3, 0.3), (0, 4, 0.3), (0, 5, 1.0)),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", TAPPED)
def test_taps_equal_brute_force(name: str, checkpointed: bool) -> None:
    """Up to rounding: autograd adds the parts of a tap's gradient (head, next block, later block) in another order."""
    method = replace(dgl(TASK), spans=Fixed(TAPPED[name]))
    network = skips(checkpointing(method) if checkpointed else method)
    reference = skips(method)
    reference.load_state_dict(network.state_dict())
    inputs, targets = batch()
    with localgrad.keyed_randomness(2):
        localgrad.backward(network, inputs.double(), targets, 3)
        tapped(reference, inputs.double(), targets, 3)
    for (path, p), expected in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-11, atol=1e-14, msg=path)


def test_taps_are_detached_across_spans() -> None:
    """Only the loss of the last block counts: nothing reaches the blocks whose features it reads through taps."""
    network = skips(replace(dgl(TASK), spans=Fixed(TAPPED["local"])))
    inputs, targets = batch()
    for span, loss in localgrad.local_losses(network, inputs.double(), targets):
        if span.stop == 5:
            network.zero_grad(set_to_none=True)
        loss.backward()
    assert with_gradient(network) == {"up1", "fc"}

    network = skips(replace(dgl(TASK), spans=Fixed(((0, 1, 1.0), (1, 3, 1.0), (3, 5, 1.0)))))
    for span, loss in localgrad.local_losses(network, inputs.double(), targets):
        if span.stop == 5:
            network.zero_grad(set_to_none=True)
        loss.backward()
    assert with_gradient(network) == {"up2", "up1", "fc"}


class Plain(Skips):
    """The same with no module of its own for a skip: the tap is what the next block reads, too."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        d = self.up2(torch.cat([F.interpolate(self.middle(b), scale_factor=2.0), b], 1))
        e = self.up1(torch.cat([F.interpolate(d, scale_factor=2.0), a], 1))
        return self.fc(e.mean((2, 3)))


def test_a_tap_may_be_the_features_of_a_boundary() -> None:
    inputs, targets = batch()
    model = Plain()
    network = localgrad.localize(model, BASES["dgl"], CUTS, example=inputs)
    for span, loss in localgrad.local_losses(network, inputs, targets):
        network.zero_grad(set_to_none=True)
        loss.backward()
        if span.stop == 5:
            break
    assert with_gradient(network) <= {"up1", "fc"}
    network = localgrad.localize(model, BASES["e2e"], CUTS, example=inputs)
    network.zero_grad(set_to_none=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        localgrad.backward(network, inputs, targets)
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        F.cross_entropy(model(inputs), targets).backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
