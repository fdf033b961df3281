"""Object detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from localgrad import heads
from localgrad.errors import ConfigError, TrainingError
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder
from localgrad.task import Batch
from localgrad.tasks.counting import balanced
from localgrad.tasks.normalisation import check_normalisation, pixels_of
from localgrad.tasks.targets import check_classes, check_finite, require, values_of

CANDIDATES = 100
FOUND = 0.5
Target = Mapping[str, Tensor]


@dataclass(frozen=True)
class Detection:
    """A `localgrad.task.Task`; see `detection`."""

    num_classes: int
    head_width: int | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    read: set[torch.device] = field(default_factory=set, compare=False, repr=False)

    @property
    def num_outputs(self) -> int:
        """Classes of an anchor."""
        return self.num_classes

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """`localgrad.heads.Detection`, whatever classifier the method proposed."""
        return heads.Detection(self.head_width)

    def answer(self, output: Any) -> dict[str, Any]:
        """An output with its tensors in full precision.

        Raises:
            TrainingError: it is none of a `localgrad.models.Detector`, or has other classes.
        """
        if not isinstance(output, Mapping) or "detector" not in output:
            raise TrainingError(
                f"the model answers with a {type(output).__name__}; detection needs localgrad.models.retinanet(...), "
                "fcos(...), or Detector(your torchvision RetinaNet or FCOS)"
            )
        found = output["cls_logits"].shape[-1]
        if found != self.num_classes:
            raise TrainingError(
                f"the model answers for {found} classes, but this is detection({self.num_classes}); build the model "
                f"with num_classes={self.num_classes}"
            )
        return {name: widened(v) if isinstance(v, Tensor) else v for name, v in output.items()}

    def losses(self, output: Any, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses that torchvision's detector computes of an output, by its names for them.

        Boxes of crowds, and boxes without an area, are left out. RetinaNet's are sums over images: each is computed
        again in the backward pass, so that the focal loss, which saves ten tensors of all classes and anchors, does so
        for one image at a time.
        """
        answer = self.answer(output)
        self.check(targets, len(answer["cls_logits"]))
        levels = anchors_of(answer)
        anchors = torch.cat(levels)
        kept = [trained_boxes(target) for target in targets]
        compute = answer["detector"].compute_loss
        if "bbox_ctrness" in answer:  # FCOS counts the anchors on objects over the whole batch
            return compute(kept, answer, [anchors] * len(kept), [len(level) for level in levels])

        names = ("cls_logits", "bbox_regression")

        def of_one(target: Target, *parts: Tensor) -> dict[str, Tensor]:
            return compute([target], dict(zip(names, parts, strict=True)), [anchors])

        images = zip(kept, *(answer[name].split(1) for name in names), strict=True)
        found = [checkpoint(of_one, *image, use_reentrant=False, preserve_rng_state=False) for image in images]
        first, *others = found
        return {name: sum((losses[name] for losses in others), first[name]) / len(found) for name in first}

    def check(self, targets: Any, samples: int) -> None:
        """Raise `TrainingError` unless there are boxes and classes for each image."""
        task = f"detection({self.num_classes})"
        fits = isinstance(targets, Sequence) and len(targets) == samples
        fits = fits and all(isinstance(one, Mapping) and {"boxes", "labels"} <= set(one) for one in targets)
        allowed = f"a list of {samples} mappings, one an image, of boxes (N, 4) float and labels (N,) int64"
        require(fits, task, targets, allowed, "see localgrad.tasks.detection")
        for one in targets:
            boxes, labels = one["boxes"], one["labels"]
            require(boxes.dim() == 2 and boxes.shape[1] == 4 and boxes.is_floating_point(), task, boxes, allowed,
                    "write boxes.float(), boxes.reshape(-1, 4) for an image without any")  # fmt: skip
            require(labels.shape == boxes.shape[:1] and labels.dtype == torch.int64, task, labels, allowed,
                    "write labels.long(), one for each box")  # fmt: skip
        labels = torch.cat([one["labels"] for one in targets])
        values = values_of(labels, self.read)
        check_classes(values, self.num_classes, None, task)
        if values is not None:
            check_finite(torch.cat([one["boxes"] for one in targets]).cpu().numpy(), task)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The sum of `losses`. RetinaNet's are means over images; FCOS divides by the anchors that lie on objects."""
        loss = torch.stack(list(self.losses(output, batch.targets).values())).sum()
        if "bbox_ctrness" not in output:
            return loss
        answer = self.answer(output)
        return balanced(loss, batch, lambda targets: on_objects(answer, targets), batch.boundary, least=1.0)

    @torch.no_grad()
    def score(self, output: Any, targets: Sequence[Target]) -> Tensor:
        """The share of each image's boxes that are found, (B,) float32; 1 where there are none.

        Found is a box that one of the 100 surest anchors gives its class and overlaps by an IoU of at least 0.5. This
        needs no suppression of duplicates, which would cost more than a step.
        """
        from torchvision.ops import box_iou

        answer = self.answer(output)
        anchors = torch.cat(anchors_of(answer))
        coder = answer["detector"].box_coder
        decode = getattr(coder, "decode_single", coder.decode)
        shares = []
        for index, target in enumerate(map(trained_boxes, targets)):
            sureness, labels = answer["cls_logits"][index].max(1)
            if "bbox_ctrness" in answer:
                sureness = sureness.sigmoid() * answer["bbox_ctrness"][index, :, 0].sigmoid()
            best = sureness.topk(min(CANDIDATES, len(sureness))).indices
            boxes = decode(answer["bbox_regression"][index, best], anchors[best])
            right = labels[best, None] == target["labels"]
            found = ((box_iou(boxes, target["boxes"].to(boxes)) >= FOUND) & right).any(0)
            shares.append(found.float().mean() if len(found) else found.new_ones((), dtype=torch.float32))
        return torch.stack(shares)

    @torch.no_grad()
    def detections(self, output: Any, targets: Sequence[Target]) -> list[dict[str, Tensor]]:
        """Boxes (N, 4), scores (N,) and labels (N,) of each image, in pixels of the image as it was before resizing.

        As torchvision's detector does in eval mode: scores above its threshold, duplicates suppressed.
        """
        answer = self.answer(output)
        detector, levels = answer["detector"], anchors_of(answer)
        sizes = [len(level) for level in levels]
        split = {name: list(v.split(sizes, 1)) for name, v in answer.items() if isinstance(v, Tensor)}
        shapes = [image_sizes(answer, target) for target in targets]
        seen, before = ([pair[k] for pair in shapes] for k in (0, 1))
        found = detector.postprocess_detections(split, [levels] * len(targets), seen)
        # The transform of a detector in training mode would leave boxes where they are.
        return detector.transform.eval().postprocess(found, seen, before)

    def metric(self) -> AveragePrecision:
        """COCO's mAP."""
        return AveragePrecision(self)

    def pixels(self, inputs: Tensor) -> Tensor:
        """See `localgrad.tasks.normalisation.pixels_of`."""
        return pixels_of(inputs, self.mean, self.std)

    def blank(self, samples: int, shape: tuple[int, ...]) -> list[Target]:
        """Targets for inputs ``(samples, *shape)``, with one box each."""
        return [{"boxes": torch.ones(1, 4), "labels": torch.zeros(1, dtype=torch.int64)} for _ in range(samples)]


def on_objects(answer: Mapping[str, Any], targets: Sequence[Target]) -> Tensor:
    """How many anchors FCOS matches with the boxes of ``targets``: what its losses divide by, if it is not 0.

    torchvision matches inside ``compute_loss`` and hands the matches to the head; here something else takes them.
    """
    from torchvision.models.detection.fcos import FCOS

    levels = anchors_of(answer)
    anchors = [torch.cat(levels)] * len(targets)

    class Matching:
        """In place of a detector: its settings, and a head that returns what it is matched with."""

        head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matched: matched)

        def __getattr__(self, name: str) -> Any:
            return getattr(answer["detector"], name)

    kept = [trained_boxes(target) for target in targets]
    matched = FCOS.compute_loss(Matching(), kept, dict(answer), anchors, [len(level) for level in levels])
    return torch.stack([(found >= 0).sum() for found in matched]).sum()


def anchors_of(answer: Mapping[str, Any]) -> list[Tensor]:
    """The anchors (n, 4) of each level, x and y of two corners, in pixels."""
    from torchvision.models.detection.image_list import ImageList

    empty = answer["cls_logits"].new_empty(())
    levels = [empty.expand(1, 1, h, w) for h, w in answer["grids"]]
    images = ImageList(empty.expand(1, 1, *answer["image_size"]), [answer["image_size"]])
    generator = answer["detector"].anchor_generator
    (anchors,) = generator(images, levels)
    counts = generator.num_anchors_per_location()
    sizes = [h * w * count for (h, w), count in zip(answer["grids"], counts, strict=True)]
    return list(anchors.split(sizes))


def trained_boxes(target: Target) -> dict[str, Tensor]:
    """Boxes and labels of a target that are trained on: no crowds, and none without an area."""
    boxes, labels = target["boxes"], target["labels"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if "iscrowd" in target:
        keep &= target["iscrowd"] == 0
    return {"boxes": boxes[keep], "labels": labels[keep]}


def image_sizes(answer: Mapping[str, Any], target: Target) -> tuple[tuple[int, int], tuple[int, int]]:
    """(H, W) of an image as the model saw it, without padding, and as it was before resizing."""
    size = tuple(target["size"].tolist()) if "size" in target else tuple(answer["image_size"])
    return size, tuple(target["original_size"].tolist()) if "original_size" in target else size


class AveragePrecision:
    """A `localgrad.task.Metric`: COCO's mAP over IoU 0.50 to 0.95, in pixels of the original images.

    Detections that fall on a crowd count neither way. Sizes (small, medium, large) go by ``area`` where there is one.

    Source: Lin et al., Microsoft COCO, ECCV 2014; computed by torchmetrics with faster-coco-eval.
    """

    def __init__(self, task: Detection) -> None:
        try:
            from torchmetrics.detection import MeanAveragePrecision

            self.evaluator = MeanAveragePrecision(class_metrics=bool(task.classes), backend="faster_coco_eval")
        except ImportError as error:
            raise ConfigError(
                "the mAP needs torchmetrics and faster-coco-eval: pip install localgrad[detection]"
            ) from error
        self.evaluator.warn_on_many_detections = False
        self.task = task

    def update(self, output: Any, targets: Sequence[Target]) -> None:
        """Count one batch: what the head answered, and the targets as `Detection.loss` takes them."""
        found = self.task.detections(output, targets)
        there = [original(self.task.answer(output), target) for target in targets]
        self.evaluator.update(*([{k: v.cpu() for k, v in each.items()} for each in side] for side in (found, there)))

    def compute(self) -> dict[str, float]:
        """``map``, ``map_50``, ``map_75`` and COCO's others; ``ap/<class>`` of every class that occurs."""
        if not self.evaluator.groundtruth_labels:
            return {"map": 0.0}
        figures = self.evaluator.compute()
        present = figures.pop("classes").reshape(-1).tolist()
        per_class = figures.pop("map_per_class").reshape(-1).tolist()
        figures.pop("mar_100_per_class")
        found = {name: max(0.0, float(value)) for name, value in figures.items() if name == "map" or value >= 0}
        if not self.task.classes:
            return found
        named = zip(present, per_class, strict=True)
        return {**found, **{f"ap/{self.task.classes[label]}": value for label, value in named if value >= 0}}


def original(answer: Mapping[str, Any], target: Target) -> dict[str, Tensor]:
    """What an evaluator needs of a target, boxes in pixels of the image as it was before resizing."""
    from torchvision.models.detection.transform import resize_boxes

    kept = {name: target[name] for name in ("labels", "iscrowd", "area") if name in target}
    return {"boxes": resize_boxes(target["boxes"], *map(list, image_sizes(answer, target))), **kept}


def detection(
    num_classes: int,
    *,
    head_width: int | None = None,
    classes: tuple[str, ...] = (),
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Detection:
    """Find the objects of ``num_classes`` classes in an image, and the box around each.

    The model is a `localgrad.models.Detector`. Targets are a list with one mapping for each image: ``boxes`` (N, 4)
    float, x and y of two corners in pixels of the network's input, and ``labels`` (N,) int64 from 0 on; N may be 0. If
    they have them, these count too: ``iscrowd`` (N,), ``area`` (N,) in pixels of the original image, ``size`` (2,),
    height and width before padding, and ``original_size`` (2,), those before resizing.

    Args:
        num_classes: at least 1.
        head_width: of auxiliary heads, see `localgrad.heads.Detection`.
        classes: their names, for reports.
        mean, std: what the inputs were normalised by, per channel in [0, 1] units; reconstruction losses undo it.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> import localgrad
        >>> task = localgrad.tasks.detection(80)
        >>> method = localgrad.methods.man_pp(localgrad.methods.dgl(task))

    Source: losses, anchors, matching and post-processing are calls of torchvision's detectors.
    Differs: nothing known.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes}; detection needs at least 1 class")
    if classes and len(classes) != num_classes:
        raise ConfigError(f"classes has {len(classes)} entries; give one for each of the {num_classes} classes")
    check_normalisation(mean, std)
    return Detection(num_classes, head_width, tuple(classes), tuple(mean), tuple(std))
