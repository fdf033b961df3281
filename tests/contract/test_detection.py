"""Object detection on small detectors of torchvision: what every method keeps, and that losses, boxes and scores are
those that torchvision and the evaluator compute by themselves.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from localgrad import heads
from localgrad.measure.memory import measure
from localgrad.method import Method
from localgrad.methods import checkpointing, dgl, e2e, hpff, infopro, man_pp, pgl
from localgrad.models import Detector, freeze_batchnorm
from localgrad.task import Batch
from localgrad.tasks.detection import anchors_of
from localgrad.testing import assert_isolated, assert_transparent
from zoo import ResidualUnit, bases, composed, steps

CLASSES, PIXELS = 3, 64
TASK = localgrad.tasks.detection(CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3)
IDENTITY: dict[str, Any] = {
    "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": PIXELS, "max_size": PIXELS, "score_thresh": 0.0,
}  # fmt: skip


class Body(nn.Module):
    """Maps of strides 2 to 32, one residual unit each."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(ResidualUnit(8, 12, 2, dropout))
        self.layer2 = nn.Sequential(ResidualUnit(12, 16, 2, dropout))
        self.layer3 = nn.Sequential(ResidualUnit(16, 24, 2, dropout), ResidualUnit(24, 24, 1, dropout))
        self.layer4 = nn.Sequential(ResidualUnit(24, 32, 2, dropout))


def torchvision_detector(kind: str, dropout: float = 0.1) -> nn.Module:
    """``retinanet``, ``retinanet_v2`` or ``fcos`` with few channels, random weights from a fixed seed."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    with torch.random.fork_rng():
        torch.manual_seed(0)
        extra = LastLevelP6P7(32, 32)
        stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
        backbone = BackboneWithFPN(Body(dropout), stages, [16, 24, 32], 32, extra)
        if kind == "fcos":
            return FCOS(backbone, CLASSES, **IDENTITY)
        anchors = AnchorGenerator(((8, 12), (16, 24), (24, 32), (32, 48), (64, 72)), ((0.5, 1.0, 2.0),) * 5)
        detector = RetinaNet(backbone, CLASSES, anchor_generator=anchors, **IDENTITY)
        if kind == "retinanet_v2":
            detector.head.regression_head._loss_type = "giou"
        return detector


def build(kind: str, method: Method, num_blocks: int = 4, **options: Any) -> localgrad.LocalNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Detector(torchvision_detector(kind, **options))
        return localgrad.localize(model, method, num_blocks, example=batch(2)[0])


def batch(size: int = 4, seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (B, 3, 64, 64), bright where there are boxes; the second has none."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(size, 3, PIXELS, PIXELS, generator=generator)
    targets = []
    for index in range(size):
        count = 0 if index == 1 else 2 + index % 2
        corners = torch.randint(0, 36, (count, 2), generator=generator)
        boxes = torch.cat([corners, corners + torch.randint(8, 28, (count, 2), generator=generator)], 1).float()
        labels = torch.randint(CLASSES, (count,), generator=generator)
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            images[index, label, y1:y2, x1:x2] += 2.0
        targets.append({"boxes": boxes, "labels": labels})
    return images, targets


KINDS = ("retinanet", "retinanet_v2", "fcos")
ON_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BASES = bases(TASK)
METHODS = {
    name: method
    for name, method in composed(BASES)[0].items()
    if name in BASES or name.endswith("(dgl)") or name == "man_pp(infopro)"
}
NEEDS_ONE_CLASS = {"predsim"}  # compares what heads say with one class for each image
ON_EVERY_METHOD = pytest.mark.parametrize("name", [name for name in METHODS if name not in NEEDS_ONE_CLASS])


@ON_EVERY_METHOD
def test_every_method_trains_a_detector(name: str) -> None:
    network = build("retinanet", METHODS[name])
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.01)
    inputs, targets = batch()
    for step in range(2):
        for _, loss in localgrad.local_losses(network, inputs, targets, step):
            assert loss.isfinite()
            loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
    assert_transparent(network.model, network, inputs)


@pytest.mark.parametrize("name", sorted(NEEDS_ONE_CLASS))
def test_methods_that_need_one_class_per_image_say_so(name: str) -> None:
    with pytest.raises(localgrad.TrainingError, match="one class for each image"):
        localgrad.backward(build("retinanet", METHODS[name]), *batch())


@ON_EVERY_METHOD
def test_gradients_stay_on_their_span_and_taps_carry_none(name: str) -> None:
    network = build("retinanet", METHODS[name], dropout=0.0)
    *_, before, last = localgrad.separate_blocks(network)
    crossing = set(last.inputs) - {before.outputs[0]}
    # Two levels of the pyramid are taps of the last block, besides the image's size.
    assert len(crossing) >= 2, crossing
    for step in steps(network, 12)[:2]:
        assert_isolated(network, *batch(), step)


@ON_EVERY_KIND
@pytest.mark.parametrize("method", [dgl(TASK), man_pp(dgl(TASK)), hpff(dgl(TASK))], ids=lambda m: m.name)
def test_each_kind_of_detector(kind: str, method: Method) -> None:
    network = build(kind, method)
    inputs, targets = batch()
    assert all(loss.isfinite() for loss in localgrad.backward(network, inputs, targets).values())
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    network.eval()
    for span, term, output in localgrad.local_outputs(network, inputs):
        assert type(output["detector"]) is type(network.model.detector)
        assert [len(level) for level in anchors_of(output)] == [
            h * w * (1 if kind == "fcos" else 6) for h, w in output["grids"]
        ], (span, term)
        score = TASK.score(output, targets)
        assert score.shape == (4,) and score[1] == 1.0
        assert len(TASK.detections(output, targets)) == 4


@ON_EVERY_KIND
@pytest.mark.parametrize("training", [True, False])
def test_the_losses_are_torchvisions_own(kind: str, training: bool) -> None:
    """The same tensors through torchvision's whole detector: transform, forward, anchors, matching, losses."""
    detector = torchvision_detector(kind, dropout=0.0)
    inputs, targets = batch()
    state = copy.deepcopy(detector.state_dict())
    detector.train()
    if not training:
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    expected = detector(list(inputs), targets)
    gradient = torch.autograd.grad(sum(expected.values()), list(detector.parameters()))
    detector.load_state_dict(state)
    model = Detector(detector)
    assert {**model.state_dict()}.keys() == state.keys()
    found = TASK.losses(model(inputs), targets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0 and torch.equal(found[name], value), name
    total = TASK.loss(model(inputs), Batch(inputs, targets, 0))
    torch.testing.assert_close(total, sum(expected.values()))
    names = [name for name, _ in detector.named_parameters()]
    detector.load_state_dict(state)
    ours = torch.autograd.grad(TASK.loss(model(inputs), Batch(inputs, targets, 0)), list(detector.parameters()))
    for name, a, b in zip(names, ours, gradient, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@ON_EVERY_KIND
def test_end_to_end_is_torchvisions_own_training(kind: str) -> None:
    """Gradients of K = 1 equal those of the whole detector bit for bit."""
    network = build(kind, e2e(TASK), 1, dropout=0.0)
    detector = torchvision_detector(kind, dropout=0.0).train()
    inputs, targets = batch()
    losses = detector(list(inputs), targets)
    torch.stack(list(losses.values())).sum().backward()
    localgrad.backward(network, inputs, targets)
    for name, parameter in detector.named_parameters():
        assert torch.equal(network.model.get_parameter(name).grad, parameter.grad), name


def test_a_local_step_equals_a_literal_loop() -> None:
    """MAN++'s step with stage ends as boundaries, written out: C3 and C4 enter the pyramid detached."""
    torch.manual_seed(2)
    task = localgrad.tasks.detection(CLASSES)
    model = Detector(torchvision_detector("retinanet", dropout=0.0))
    cuts = tuple(f"backbone.body.layer{k}" for k in (2, 3, 4))
    inputs, targets = batch()
    network = localgrad.localize(model, dgl(task), cuts, example=inputs)
    literal = copy.deepcopy(network)
    localgrad.backward(network, inputs, targets)

    body, auxiliary = literal.model.backbone.body, list(literal.auxiliary.values())
    detector = literal.model.detector
    features, levels = body.layer1(body.stem(inputs)), {}
    for k, stage in enumerate((body.layer2, body.layer3, body.layer4)):
        answer = auxiliary[k].heads[0](features)
        anchors = torch.cat(anchors_of(answer))
        losses = answer["detector"].compute_loss(targets, answer, [anchors] * len(inputs))
        sum(losses.values()).backward()
        features = stage(features.detach())
        levels[str(k)] = features
    pyramid = literal.model.backbone.fpn({name: v.detach() if name != "2" else v for name, v in levels.items()})
    answer = detector.head(list(pyramid.values()))
    from torchvision.models.detection.image_list import ImageList

    sizes = [(PIXELS, PIXELS)] * len(inputs)
    anchors = detector.anchor_generator(ImageList(inputs, sizes), list(pyramid.values()))
    sum(detector.compute_loss(targets, answer, anchors).values()).backward()
    for name, parameter in literal.named_parameters():
        torch.testing.assert_close(network.get_parameter(name).grad, parameter.grad, msg=name)


@ON_EVERY_KIND
def test_boxes_are_those_torchvision_finds(kind: str) -> None:
    """On images of another size than the network's, so that boxes are scaled back."""
    detector = torchvision_detector(kind).eval()
    detector.transform.min_size, detector.transform.max_size = (PIXELS,), 2 * PIXELS
    images = [torch.rand(3, 90, 130), torch.rand(3, 50, 40)]
    with torch.no_grad():
        expected = detector(images)
        given, _ = detector.transform(images)
        targets = [
            {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "size": torch.tensor(size),
             "original_size": torch.tensor(image.shape[-2:])}
            for image, size in zip(images, given.image_sizes, strict=True)
        ]  # fmt: skip
        found = TASK.detections(Detector(detector)(given.tensors), targets)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs["boxes"]) > 0
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_crowds_and_boxes_without_an_area_are_not_trained_on() -> None:
    model = Detector(torchvision_detector("retinanet")).eval()
    inputs, targets = batch()
    expected = TASK.loss(model(inputs), Batch(inputs, targets, 0))
    crowd, empty = torch.tensor([[4.0, 4.0, 50.0, 50.0]]), torch.tensor([[9.0, 9.0, 9.0, 30.0]])
    spoiled = []
    for target in targets:
        boxes = torch.cat([crowd, target["boxes"], empty])
        labels = torch.cat([torch.tensor([0]), target["labels"], torch.tensor([1])])
        spoiled.append({"boxes": boxes, "labels": labels, "iscrowd": torch.arange(len(boxes)) == 0})
    assert torch.equal(TASK.loss(model(inputs), Batch(inputs, spoiled, 0)), expected)
    spoiled[0]["iscrowd"][0] = False
    assert not torch.equal(TASK.loss(model(inputs), Batch(inputs, spoiled, 0)), expected)


def answered(boxes: Tensor, labels: Tensor, sureness: Tensor) -> dict[str, Any]:
    """What a model would answer to find these boxes, one for each anchor from the first on, all others unsure."""
    model = Detector(torchvision_detector("retinanet")).eval()
    output = model(torch.zeros(1, 3, PIXELS, PIXELS))
    anchors = torch.cat(anchors_of(output))
    output["cls_logits"] = torch.full_like(output["cls_logits"], -20.0)
    output["cls_logits"][0, torch.arange(len(labels)), labels] = sureness
    output["bbox_regression"] = torch.zeros_like(output["bbox_regression"])
    coder = model.detector.box_coder
    output["bbox_regression"][0, : len(boxes)] = coder.encode_single(boxes, anchors[: len(boxes)])
    return output


def test_score_counts_boxes_that_a_sure_anchor_finds() -> None:
    there = torch.tensor([[0.0, 0.0, 20.0, 20.0], [30.0, 30.0, 60.0, 60.0], [40.0, 0.0, 60.0, 10.0]])
    labels = torch.tensor([0, 1, 2])
    target = [{"boxes": there, "labels": labels}]
    exact = answered(there, labels, torch.ones(3))
    assert TASK.score(exact, target).tolist() == [1.0]
    found = TASK.detections(exact, target)[0]["boxes"][:3]
    torch.testing.assert_close(found.sort(0).values, there.sort(0).values)
    assert TASK.score(answered(there, torch.tensor([0, 1, 1]), torch.ones(3)), target).item() == pytest.approx(2 / 3)
    moved = there + torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 29.0], [0.0, 0.0, 0.0, 21.0]])  # IoU 0.51, 0.32
    assert TASK.score(answered(moved, labels, torch.ones(3)), target).item() == pytest.approx(2 / 3)


def test_map_is_the_evaluators() -> None:
    """faster-coco-eval called directly, on what torchvision's detector finds; two crowds and three sizes."""
    import numpy as np
    from faster_coco_eval import COCO, COCOeval_faster

    task = localgrad.tasks.detection(CLASSES, classes=("a", "b", "c"))
    metric = task.metric()
    generator = torch.Generator().manual_seed(0)
    truths, results, images = [], [], []
    for image in range(6):
        count = 4
        corners = 60 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corners, corners + 3 + 60 * torch.rand(count, 2, generator=generator)], 1)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        crowd = torch.tensor([image == 2, False, False, image == 4]).long()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * 0.7
        found = (boxes + 4 * torch.randn(count, 4, generator=generator)).clamp(min=0)
        found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 1)
        output = answered(found / 2, labels.roll(int(image == 5)), torch.randn(count, generator=generator))
        sizes = {"size": torch.tensor([64, 64]), "original_size": torch.tensor([128, 128])}
        target = {"boxes": boxes / 2, "labels": labels, "iscrowd": crowd, "area": area, **sizes}
        metric.update(output, [target])
        images.append({"id": image, "height": 128, "width": 128})
        for k in range(count):
            x1, y1, x2, y2 = boxes[k].tolist()
            truths.append(
                {"id": len(truths) + 1, "image_id": image, "category_id": int(labels[k]), "iscrowd": int(crowd[k]),
                 "area": float(area[k]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )  # fmt: skip
        for box, score, label in zip(*task.detections(output, [target])[0].values(), strict=True):
            x1, y1, x2, y2 = box.tolist()
            results.append(
                {
                    "image_id": image,
                    "category_id": int(label),
                    "score": float(score),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    truth = COCO({"images": images, "annotations": truths, "categories": [{"id": k, "name": str(k)} for k in range(3)]})
    evaluator = COCOeval_faster(truth, truth.loadRes(results), "bbox")
    evaluator.run()
    expected = np.asarray(evaluator.stats[:3])
    found = metric.compute()
    assert next(iter(found)) == "map" and 0.1 < found["map"] < 0.9
    np.testing.assert_allclose([found["map"], found["map_50"], found["map_75"]], expected, atol=1e-6)
    assert {name for name in found if name.startswith("ap/")} == {"ap/a", "ap/b", "ap/c"}


def test_map_of_images_without_boxes_is_zero() -> None:
    metric = TASK.metric()
    assert metric.compute() == {"map": 0.0}
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    metric.update(answered(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)), nothing)
    assert metric.compute()["map"] == 0.0


def test_patches_together_are_the_whole() -> None:
    """A head that looks at single positions answers the same for four patches as for the whole map."""
    model = Detector(torchvision_detector("retinanet")).eval()
    method = hpff(dgl(TASK), patches=2)
    network = localgrad.localize(model, method, ("backbone.body.layer3",), example=batch(2)[0]).eval()
    patched = network.auxiliary["0-1"].heads[0][-1]
    head = copy.deepcopy(patched.head)
    with torch.no_grad():
        for convolution in head.modules():
            if isinstance(convolution, nn.Conv2d) and convolution.kernel_size == (3, 3):
                convolution.weight.zero_()
                convolution.weight[:, :, 1, 1].normal_(std=0.2)
    for module in list(head.modules()):  # normalisation looks at all positions
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    head.backbone.levels = 1
    detector = head.head.detector
    detector.anchor_generator.sizes = detector.anchor_generator.sizes[:1]
    patched.head = head
    features = torch.randn(3, 16, 8, 8)
    with torch.no_grad():
        whole, parts = head(features), patched(features)
    assert parts["grids"] == whole["grids"] == [(8, 8)] and parts["image_size"] == whole["image_size"]
    for name in ("cls_logits", "bbox_regression"):
        assert whole[name].std() > 0
        torch.testing.assert_close(parts[name], whole[name])


def test_heads_answer_for_the_levels_of_their_stride_and_coarser_ones() -> None:
    model = Detector(torchvision_detector("retinanet"))
    assert model.strides == (8, 16, 32, 64, 128)
    names = [f"backbone.body.{name}" for name in ("layer1", "layer2", "layer3.1", "layer4")]
    network = localgrad.localize(model, dgl(TASK), names, example=batch(2)[0]).eval()
    found = [output["grids"] for _, term, output in localgrad.local_outputs(network, batch()[0]) if term is not None]
    whole = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
    assert found == [whole, whole, whole[1:], whole[1:]]
    wide = localgrad.localize(model, dgl(localgrad.tasks.detection(3, head_width=70)), 2, example=batch(2)[0])
    assert wide.auxiliary["0-1"].heads[0].backbone.conv.out_channels == 96  # the next multiple of 32


def test_peak_activations_fall_with_local_losses() -> None:
    inputs, targets = batch(16)

    def peak(method: Method, num_blocks: int) -> int:
        torch.manual_seed(0)
        model = localgrad.models.retinanet(CLASSES, backbone="resnet18", width=64)
        network = localgrad.localize(model, method, localgrad.cuts.by_bytes(num_blocks), example=inputs)
        return measure(lambda: localgrad.backward(network, inputs, targets), network.parameters()).peak_activations

    assert peak(dgl(TASK), 4) < 0.7 * peak(e2e(TASK), 1)


def test_checkpointing_changes_no_gradient() -> None:
    plain, checkpointed = (build("retinanet", m, 4, dropout=0.0) for m in (e2e(TASK), checkpointing(e2e(TASK))))
    for network in (plain, checkpointed):
        localgrad.backward(network, *batch())
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_frozen_batchnorm_stays() -> None:
    network = build("retinanet", man_pp(dgl(TASK)))
    network.train()
    freeze_batchnorm(network.model)
    frozen = {n: v.clone() for n, v in network.model.named_buffers() if "running" in n}
    assert all(loss.isfinite() for loss in localgrad.backward(network, *batch()).values())
    assert frozen and all(torch.equal(network.model.get_buffer(n), v) for n, v in frozen.items())
    norms = [m for m in network.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(p.grad is None for m in norms for p in m.parameters())


def test_micro_batches_cut_lists_of_targets() -> None:
    method = localgrad.methods.accumulation(dgl(TASK), parts=2)
    network = build("retinanet", method, dropout=0.0).eval()
    inputs, targets = batch()
    found = localgrad.backward(network, inputs, targets)
    halves = [build("retinanet", dgl(TASK), dropout=0.0).eval() for _ in range(2)]
    expected = [
        localgrad.backward(n, inputs[s], targets[s]) for n, s in zip(halves, (slice(0, 2), slice(2, 4)), strict=True)
    ]
    for span, loss in found.items():
        torch.testing.assert_close(loss, (expected[0][span] + expected[1][span]) / 2)


def test_guided_steps_train_the_detector_end_to_end() -> None:
    network = build("retinanet", pgl(dgl(TASK), every=2), dropout=0.0)
    whole = build("retinanet", e2e(TASK), 1, dropout=0.0)
    for each in (network, whole):
        localgrad.backward(each, *batch(), 0)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(network.model.get_parameter(name).grad, parameter.grad), name


def test_reconstruction_reads_the_pixels() -> None:
    network = build("retinanet", infopro(TASK))
    spans = localgrad.backward(network, *batch())
    assert len(spans) == 4 and all(loss.isfinite() for loss in spans.values())


@pytest.mark.filterwarnings("ignore:block 1, from .1. on, keeps")
def test_what_is_no_detector_is_refused() -> None:
    with pytest.raises(localgrad.ConfigError, match="takes torchvision's RetinaNet and FCOS"):
        Detector(nn.Linear(1, 1))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(localgrad.MethodError, match=r"write localgrad\.models\.retinanet"):
        localgrad.localize(plain, dgl(TASK), 2, example=batch(2)[0])
    with pytest.raises(localgrad.TrainingError, match=r"detection needs localgrad.models"):
        TASK.loss(torch.zeros(2, 3), Batch(None, [], 0))
    output = Detector(torchvision_detector("fcos")).eval()(batch(2)[0])
    with pytest.raises(localgrad.TrainingError, match=r"answers for 3 classes, but this is detection\(7\)"):
        localgrad.tasks.detection(7).loss(output, Batch(None, batch(2)[1], 0))
    for wrong in ({"num_classes": 0}, {"num_classes": 2, "classes": ("a",)}, {"num_classes": 2, "std": (0.0,)}):
        with pytest.raises(localgrad.ConfigError):
            localgrad.tasks.detection(**wrong)
    with pytest.raises(localgrad.MethodError, match="at least 1 channel"):
        heads.Detection(0)


@pytest.mark.parametrize("backbone", ["timm:test_resnet", "timm:test_convnext"])
def test_backbones_from_timm(backbone: str) -> None:
    model = localgrad.models.create("retinanet", num_classes=CLASSES, backbone=backbone, width=32, version=2)
    network = localgrad.localize(model, dgl(TASK), 3, example=batch(2)[0])
    assert all(loss.isfinite() for loss in localgrad.backward(network, *batch()).values())
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert_transparent(model, network, batch(2)[0])


def test_builders_are_torchvisions() -> None:
    from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2

    with torch.device("meta"):
        for ours, theirs in (
            (localgrad.models.retinanet(91), retinanet_resnet50_fpn),
            (localgrad.models.retinanet(91, version=2), retinanet_resnet50_fpn_v2),
            (localgrad.models.fcos(91), fcos_resnet50_fpn),
        ):
            reference = theirs(weights=None, weights_backbone=None, num_classes=91)
            expected = {name: value.shape for name, value in reference.state_dict().items()}
            assert {name: value.shape for name, value in ours.state_dict().items()} == expected
            assert ours.detector.anchor_generator.sizes == reference.anchor_generator.sizes
            loss_types = [getattr(d.head.regression_head, "_loss_type", None) for d in (ours.detector, reference)]
            assert loss_types[0] == loss_types[1]
    for wrong in (
        {"backbone": "resnet7"},
        {"version": 3},
        {"norm": "none"},
        {"anchor_sizes": (1, 2)},
        {"in_channels": 1},
    ):
        with pytest.raises(localgrad.ConfigError):
            localgrad.models.retinanet(3, **wrong)
