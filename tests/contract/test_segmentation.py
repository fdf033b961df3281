"""What methods keep when every pixel has a class: on a U-Net with skips, a dilated network with a second head, and a
transformer whose tokens become maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import heads
from localgrad.measure.memory import measure
from localgrad.method import Method
from localgrad.methods import accumulation, checkpointing, dgl, e2e, last_head_distillation, man_pp
from localgrad.testing import assert_isolated, assert_transparent
from zoo import Layer, ResidualUnit, bases, composed, steps

CLASSES, IGNORED = 3, 255
TASK = localgrad.tasks.segmentation(CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3, head_width=8)


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.1))


class UNet(nn.Module):
    """Written flat, as most are: what a decoder stage reads is joined before it."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = layer(3, 6), layer(6, 8), layer(8, 10)
        self.middle = layer(10, 10)
        self.dec2, self.dec1 = layer(18, 8), layer(14, 6)
        self.out = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        c = self.middle(self.enc3(F.max_pool2d(b, 2)))
        d = self.dec2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        return self.out(self.dec1(torch.cat([F.interpolate(d, scale_factor=2.0), a], 1)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = layer(3, 8)
        self.stage1 = nn.Sequential(ResidualUnit(8, 16, 2, 0.1), ResidualUnit(16, 16, 1, 0.1))
        self.stage2 = nn.Sequential(ResidualUnit(16, 24, 1, 0.1), ResidualUnit(24, 24, 1, 0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.stage1(self.stem(x))
        return early, self.stage2(early)


class Dilated(nn.Module):
    """As torchvision's models: a mapping of two answers at the size of the image, the second read off earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Encoder()
        self.classifier = nn.Sequential(layer(24, 8), nn.Conv2d(8, CLASSES, 1))
        self.aux_classifier = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early, late = self.backbone(x)
        size = x.shape[-2:]
        return {
            "out": F.interpolate(self.classifier(late), size=size, mode="bilinear"),
            "aux": F.interpolate(self.aux_classifier(early), size=size, mode="bilinear"),
        }


class Tokens(nn.Module):
    """Patches of 4 pixels and a class token; the answer is on the grid of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, 12))
        self.layers = nn.Sequential(*(Layer(12, 0.1) for _ in range(4)))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patches(x)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), maps.flatten(2).transpose(1, 2)], 1)
        tokens = self.layers(tokens)
        return self.head(tokens[:, 1:] + tokens[:, :1]).transpose(1, 2).unflatten(2, maps.shape[2:])


MODELS: dict[str, Callable[[], nn.Module]] = {"unet": UNet, "dilated": Dilated, "tokens": Tokens}
ON_EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
BASES = bases(TASK)
COMPOSED = composed(BASES)[0]
METHODS = {name: method for name, method in COMPOSED.items() if name in BASES or name.endswith("(dgl)")}
METHODS |= {f"{name}(infopro)": COMPOSED[f"{name}(infopro)"] for name in ("man_pp", "mlaan", "hpff", "pgl")}
# Why a method cannot be trained so.
NEEDS_ONE_CLASS = {name for name in METHODS if "predsim" in name}
SUITED = [
    (name, model)
    for name in METHODS
    for model in MODELS
    if name not in NEEDS_ONE_CLASS and not ("trgl" in name and model == "unet")  # has no residual branches
]


def batch(size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 16, 16) whose channels tell the class of each pixel, and masks with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(CLASSES, (size, 4, 4), generator=generator)
    masks = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = F.one_hot(masks, CLASSES).permute(0, 3, 1, 2).float() + 0.1 * torch.randn(
        size, 3, 16, 16, generator=generator
    )
    masks[:, 0] = IGNORED
    return images, masks


def build(model: str, method: Method, num_blocks: int = 4, seed: int = 0) -> localgrad.LocalNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return localgrad.localize(MODELS[model](), method, num_blocks, example=batch(2)[0])


@pytest.mark.parametrize("name, model", SUITED)
def test_every_method_trains_every_model(name: str, model: str) -> None:
    network = build(model, METHODS[name])
    before = {path: value.clone() for path, value in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05)
    inputs, masks = batch()
    for step in range(2):
        for _, loss in localgrad.local_losses(network, inputs, masks, step):
            assert loss.isfinite()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
    moved = {path for path, value in network.named_parameters() if not torch.equal(value, before[path])}
    assert {path for path, p in network.named_parameters() if p.requires_grad and path.startswith("model.")} <= moved
    assert_transparent(network.model, network, inputs)


@pytest.mark.parametrize("name, model", [(name, model) for name, model in SUITED if not name.endswith("(infopro)")])
def test_isolation_with_taps(name: str, model: str) -> None:
    network = build(model, METHODS[name])
    for step in steps(network):
        assert_isolated(network, *batch(), step)


@pytest.mark.parametrize("name", sorted(NEEDS_ONE_CLASS))
def test_methods_that_need_one_class_for_an_image_say_so(name: str) -> None:
    with pytest.raises(localgrad.LocalgradError, match="one class for each image"):
        localgrad.backward(build("dilated", METHODS[name]), *batch(), step=1)


def test_the_contrastive_loss_says_so_too() -> None:
    with pytest.raises(localgrad.TrainingError, match="masks and boxes have none"):
        localgrad.backward(build("dilated", localgrad.methods.infopro(TASK, loss="contrast")), *batch())


def test_skips_are_found_and_pass_boundaries_without_gradient() -> None:
    """The last loss of a U-Net trains the last block alone, though that reads what the first one made."""
    model = UNet()
    network = localgrad.localize(model, dgl(TASK), ("enc2", "enc3", "dec2", "dec1"), example=batch(2)[0])
    crossing = [len(block.inputs) for block in localgrad.separate_blocks(network)]
    assert crossing == [1, 1, 2, 2, 1]  # joined before ``dec2``, ``dec1`` begin
    network = localgrad.localize(model, dgl(TASK), ("enc2", "enc3", "middle"), example=batch(2)[0])
    assert len(localgrad.separate_blocks(network)[3].inputs) == 3  # features, and the two skips
    for span, loss in localgrad.local_losses(network, *batch()):
        if span.stop == 4:
            network.zero_grad(set_to_none=True)
        loss.backward()
    trained = {path.split(".")[0] for path, p in model.named_parameters() if p.grad is not None}
    assert trained == {"middle", "dec2", "dec1", "out"}


@ON_EVERY_MODEL
@pytest.mark.parametrize("wrapped", [False, True])
def test_end_to_end_is_plain_back_propagation(model: str, wrapped: bool) -> None:
    network = build(model, checkpointing(e2e(TASK)) if wrapped else e2e(TASK))
    plain = copy.deepcopy(network.model)
    inputs, masks = batch()
    torch.manual_seed(1)
    answer = plain(inputs)
    if model == "dilated":
        loss = F.cross_entropy(answer["out"], masks, ignore_index=IGNORED)
        loss = loss + 0.5 * F.cross_entropy(answer["aux"], masks, ignore_index=IGNORED)
    else:
        answer = F.interpolate(answer, size=(16, 16), mode="bilinear") if model == "tokens" else answer
        loss = F.cross_entropy(answer, masks, ignore_index=IGNORED)
    loss.backward()
    torch.manual_seed(1)
    (found,) = localgrad.backward(network, inputs, masks).values()
    assert torch.equal(found, loss.detach())
    # Where a value is read by several blocks, autograd adds the parts of its gradient in another order.
    exact = model == "tokens"
    for (path, p), expected in zip(network.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, msg=path, **({"rtol": 0, "atol": 0} if exact else {}))


def test_the_local_step_is_the_literal_one() -> None:
    """A U-Net cut before ``enc3``, written out: detach what crosses, an FCN head on the features, two losses."""
    torch.manual_seed(0)
    model = UNet().double()
    inputs, masks = batch()
    inputs = inputs.double()
    network = localgrad.localize(model, dgl(TASK), ("enc3",), example=inputs[:2])
    m, head = copy.deepcopy(model), copy.deepcopy(network.auxiliary_of(localgrad.spans.Span(0, 1)).heads[0])

    torch.manual_seed(2)
    a = m.enc1(inputs)
    b = m.enc2(F.max_pool2d(a, 2))
    _, conv, norm, relu, drop, out = head
    logits = out(drop(relu(norm(conv(F.max_pool2d(b, 2))))))
    logits = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
    picked = logits.log_softmax(1).gather(1, masks.where(masks != IGNORED, 0)[:, None])[:, 0]
    first = -picked[masks != IGNORED].mean()
    first.backward()
    a, b = a.detach(), b.detach()
    c = m.middle(m.enc3(F.max_pool2d(b, 2)))
    d = m.dec2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
    logits = m.out(m.dec1(torch.cat([F.interpolate(d, scale_factor=2.0), a], 1)))
    picked = logits.log_softmax(1).gather(1, masks.where(masks != IGNORED, 0)[:, None])[:, 0]
    second = -picked[masks != IGNORED].mean()
    second.backward()

    torch.manual_seed(2)
    found = localgrad.backward(network, inputs, masks)
    torch.testing.assert_close(list(found.values()), [first.detach(), second.detach()], rtol=1e-12, atol=0)
    for (path, p), expected in zip(model.named_parameters(), m.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-10, atol=1e-14, msg=path)
    ours = network.auxiliary_of(localgrad.spans.Span(0, 1)).heads[0]
    for p, expected in zip(ours.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-10, atol=1e-14)


def test_soft_targets_are_averaged_over_pixels() -> None:
    """PGL by distillation: the head's answer against the model's own, resized to the head's grid, by hand."""
    network = build("tokens", last_head_distillation(dgl(TASK), every=1, weight=1.0, temperature=2.0), 2).double()
    inputs, masks = batch()
    network.eval()
    inputs = inputs.double()
    outputs = [output for _, _, output in localgrad.local_outputs(network, inputs)]
    head, own = (output / 2.0 for output in outputs)
    expected = 0.0
    for sample in range(len(inputs)):
        for i in range(4):
            for j in range(4):
                p, q = own[sample, :, i, j].softmax(0), head[sample, :, i, j].softmax(0)
                expected += float((p * (p.log() - q.log())).sum()) / (len(inputs) * 16)
    with torch.no_grad():
        found = [loss for _, loss in localgrad.local_losses(network, inputs, masks)]
    torch.testing.assert_close(found[0], torch.tensor(4.0 * expected, dtype=torch.float64))


def test_plug_ins_wrap_the_head_of_the_task() -> None:
    assert dgl(TASK).terms[0].head == heads.FCN(CLASSES, 8)
    assert dgl(TASK, head=heads.FCN(CLASSES, 5)).terms[0].head == heads.FCN(CLASSES, 5)
    network = build("dilated", localgrad.methods.hpff(dgl(TASK)))
    answers = [output for _, _, output in localgrad.local_outputs(network.eval(), batch()[0])]
    assert [tuple(answer.shape) for answer in answers[:-1]] == [(4, CLASSES, 8, 8)] * 5


class Up(nn.Module):
    """A decoder stage that joins what it reads itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = layer(inputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.layer(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))


class Joining(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.dec2, self.dec1 = Up(18, 8), Up(14, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        c = self.middle(self.enc3(F.max_pool2d(b, 2)))
        return self.out(self.dec1(self.dec2(c, b), a))


def test_bridges_are_left_out_where_the_next_unit_reads_a_skip() -> None:
    flat, joining = UNet(), Joining()
    for model, copied in ((flat, [flat.middle, flat.dec2, flat.dec1]), (joining, [joining.middle])):
        network = localgrad.localize(model, man_pp(dgl(TASK)), ("middle", "dec2", "dec1"), example=batch(2)[0])
        assert [twin.source for twin in network.twins] == copied
        assert_isolated(network, *batch())
        assert_transparent(model, network, batch()[0])


def test_micro_batches_cut_masks_and_nests_of_targets() -> None:
    inputs, masks = batch()
    whole, parts = build("tokens", dgl(TASK)).double(), build("tokens", accumulation(dgl(TASK), parts=2)).double()
    for module in (*whole.modules(), *parts.modules()):  # draws come in another order: a block for all parts first
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for x, y in zip(inputs.double().chunk(2), masks.chunk(2), strict=True):
        for _, loss in localgrad.local_losses(whole, x, y):
            (0.5 * loss).backward()
    localgrad.backward(parts, inputs.double(), masks)
    for p, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=0, atol=0)


def test_local_learning_keeps_less() -> None:
    torch.manual_seed(0)
    model = localgrad.models.create("torchvision:deeplabv3_resnet50", num_classes=CLASSES)
    inputs, masks = torch.randn(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))
    task, cuts = localgrad.tasks.segmentation(CLASSES), ("backbone.layer2", "backbone.layer3", "backbone.layer4")
    peaks = {}
    for method in (e2e(task), dgl(task)):
        network = localgrad.localize(model, method, cuts, example=inputs)
        network.zero_grad(set_to_none=True)
        step = measure(lambda network=network: localgrad.backward(network, inputs, masks), network.parameters())
        peaks[method.name] = step.peak_activations
    assert peaks["dgl"] <= 0.5 * peaks["e2e"], peaks
