"""What a trained network says about pictures: a class, a mask laid over each, or boxes drawn into it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad import data, named, sealed
from localgrad.config import Config
from localgrad.data import boxes, folders
from localgrad.data.augment import Normalise
from localgrad.data.pictures import read_picture
from localgrad.errors import CheckpointError, DataError
from localgrad.spec import complaints
from localgrad.tasks import detection, segmentation
from localgrad.tasks.segmentation import resized
from localgrad.train.experiment import build_task, device_of, task_name
from localgrad.train.finished import RESULT, WEIGHTS, model_of, read_config


@dataclass(frozen=True)
class Trained:
    """A model of a finished run, in eval mode, and what its inputs and answers mean.

    Args:
        kind: of its task, as `localgrad.tasks` calls it.
        input_shape: (C, H, W) of a training image.
        mean, std: what inputs are normalised by, in units of [0, 1].
        min_score: of boxes that are shown.
    """

    model: nn.Module
    config: Config
    kind: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_score: float = 0.3


@dataclass(frozen=True)
class Prediction:
    """One picture: a line about it, and what to write, by the end of the file's name."""

    image: Path
    summary: str
    pictures: dict[str, Any]


@dataclass(kw_only=True)
class TrainedOn:
    """What ``result.json`` says of the data that a run was trained on, under ``trained_on``."""

    kind: str
    classes: list[str]
    input_shape: tuple[int, ...]
    mean: list[float]
    std: list[float]

    def __post_init__(self) -> None:
        image = len(self.input_shape) == 3
        channels = self.input_shape[0] if image else 0  # text has none
        if not (image or len(self.input_shape) == 1) or not all(1 <= side <= 2**16 for side in self.input_shape):
            raise ValueError(f"input_shape={list(self.input_shape)} is neither (C, H, W) of an image nor (T,) of text")
        if not 1 <= len(self.classes) <= 2**20:
            raise ValueError(f"{len(self.classes)} classes; there is at least 1")
        if not (len(self.mean) == len(self.std) == channels):
            raise ValueError(f"mean={self.mean} and std={self.std} are not one each for {channels} channels")
        if not (all(map(math.isfinite, self.mean)) and all(0 < s < math.inf for s in self.std)):
            raise ValueError(f"mean={self.mean}, std={self.std}; they are finite, std is positive")


def _trained_on(file: Path) -> TrainedOn:
    """What a result says about the data.

    Raises:
        CheckpointError: it is not what training writes.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        told = sealed.read_json(file)["trained_on"]
        TrainedOn.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
        return TypeAdapter(TrainedOn).validate_json(json.dumps(told))
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged, trained_on: {'; '.join(complaints(error))}") from error
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} holds no finished run ({' '.join(str(error).split())[:200]}); give a directory in which "
            "`localgrad train` came to its end"
        ) from error


def load_trained(run_dir: Path, device: str = "auto") -> Trained:
    """The model that a finished run left in a directory.

    A model that was named ``module:function`` is imported by that name, which runs the code of that module.

    Raises:
        CheckpointError: no finished run there, or files that are not what training writes.
        DataError: a task whose answers nothing here can show.
    """
    config, told = read_config(run_dir), _trained_on(run_dir / RESULT)
    kind = task_name(config, told.kind)
    if kind not in SHOWN:
        raise DataError(f"a {kind} network answers no pictures, as those for {', '.join(SHOWN)} do; load its weights")
    if not named.is_named(config.data.name) and told.kind != data.kind_of(config.data.name):
        raise CheckpointError(
            f"{run_dir / RESULT} says {told.kind}, but {config.data.name} is for {data.kind_of(config.data.name)}"
        )
    file = run_dir / WEIGHTS
    weights = sealed.read_tensors(file)
    classes = tuple(told.classes)
    task = build_task(config, len(classes), tuple(told.mean), tuple(told.std), told.kind, classes)
    try:
        with torch.device("meta"):  # sizes first: a damaged result may ask for any amount of memory
            expected = model_of(config, task.num_outputs, told.input_shape).state_dict()
    except NotImplementedError:  # it computes something while it is built
        expected = weights
    sizes = ({name: tensor.shape for name, tensor in state.items()} for state in (expected, weights))
    differ = sorted({name for name, _ in set.symmetric_difference(*(set(found.items()) for found in sizes))})
    if differ:
        raise CheckpointError(
            f"{file} does not fit {config.model.name} with the {len(classes)} classes and images of "
            f"{told.input_shape} that {run_dir / RESULT} tells of: {', '.join(differ[:3])}"
        )
    model = model_of(config, task.num_outputs, told.input_shape)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit {config.model.name}: {error}") from error
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.isnan().any() or (tensor.requires_grad and not tensor.isfinite().all()):
            raise CheckpointError(f"{file} is damaged: {name} holds numbers that are not finite")
    return Trained(
        model.to(device_of(device)).eval(), config, kind, tuple(told.classes), told.input_shape, tuple(told.mean),
        tuple(told.std),
    )  # fmt: skip


@torch.no_grad()
def predict(trained: Trained, images: Sequence[Path]) -> Iterator[Prediction]:
    """What the model answers to each picture, one at a time.

    Raises:
        DataError: a file that is no picture, or two pictures of one name,
            whose answers would be written to one file.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    if trained.kind in ("segmentation", "detection"):
        named: dict[str, Path] = {}
        for path in images:
            if (other := named.setdefault(path.stem, path)) != path:
                raise DataError(
                    f"the answers to {other} and {path} would both be written as {path.stem}.*; predict them one after "
                    "the other, each with its own --out"
                )
    device = next(trained.model.parameters()).device
    for path in images:
        read = read_picture(path, "L" if trained.input_shape[0] == 1 else "RGB")
        picture = pil_to_tensor(read)
        if trained.kind == "detection":
            inputs = _padded(picture, trained).tensors
        else:
            inputs = Normalise(trained.mean, trained.std)(_sized(read, picture, trained)[None])
        output = trained.model(inputs.to(device))
        yield SHOWN[trained.kind](path, picture, output, trained)


def _sized(read: Any, picture: Tensor, trained: Trained) -> Tensor:
    """The picture as evaluation sees it: cropped where class folders are, else whole, masks being resized back."""
    from torchvision.transforms.v2.functional import resize

    size = trained.config.data.image_size
    if trained.kind not in ("segmentation", "detection"):
        if data.reads_files(trained.config.data.name):
            return folders.transforms(trained.input_shape[1])[1](read, 0)[0].as_subclass(Tensor)
        _, height, width = trained.input_shape
        size = height, width
    return picture if size is None else resize(picture, list(size), antialias=True)  # type: ignore[arg-type]


def _padded(picture: Tensor, trained: Trained) -> Any:
    """The picture as a detector reads it, with its size before padding: an ``ImageList``."""
    settings = trained.config.data
    images, _ = boxes.resizing(settings.image_size, settings.longest_side)([picture / 255])
    return images


def _labelled(path: Path, picture: Tensor, output: Any, trained: Trained) -> Prediction:
    share, index = output[0].float().softmax(0).max(0)
    return Prediction(path, f"{trained.classes[int(index)]} ({share:.1%})", {})


def _measured(path: Path, picture: Tensor, output: Any, trained: Trained) -> Prediction:
    return Prediction(path, ", ".join(f"{value:.4g}" for value in output[0].float().reshape(-1).tolist()), {})


def _segmented(path: Path, picture: Tensor, output: Any, trained: Trained) -> Prediction:
    task = segmentation(len(trained.classes))
    mask = resized(task.logits(output).float(), picture.shape[1:]).argmax(1)[0].cpu()
    first = task.values - task.num_classes  # 1 where there is a background that has no name
    names = ("background", *trained.classes)[1 - first :]
    shares = torch.bincount(mask.flatten(), minlength=task.values) / mask.numel()
    largest = [f"{names[k]} {shares[k]:.0%}" for k in shares.argsort(descending=True)[:4] if shares[k] > 0]
    drawn = overlay(picture, mask - first, task.num_classes)
    pictures = {".overlay.png": drawn, ".mask.png": mask.to(torch.uint8)[None]}
    return Prediction(path, ", ".join(largest), pictures)


def _detected(path: Path, picture: Tensor, output: Any, trained: Trained) -> Prediction:
    from torchvision.utils import draw_bounding_boxes

    (size,) = _padded(picture, trained).image_sizes
    sizes = {"size": torch.tensor(size), "original_size": torch.tensor(picture.shape[1:])}
    (found,) = detection(len(trained.classes)).detections(output, [sizes])
    shown = {name: value[found["scores"] >= trained.min_score].cpu() for name, value in found.items()}
    names = [trained.classes[label] for label in shown["labels"].tolist()]
    colours = palette(len(trained.classes))
    drawn = draw_bounding_boxes(
        picture.expand(3, -1, -1),
        shown["boxes"],
        [f"{name} {score:.0%}" for name, score in zip(names, shown["scores"].tolist(), strict=True)],
        [colours[label] for label in shown["labels"].tolist()],
        width=2,
    )
    counted = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return Prediction(path, counted or f"nothing with a score of {trained.min_score:g}", {".boxes.png": drawn})


SHOWN: dict[str, Callable[[Path, Tensor, Any, Trained], Prediction]] = {
    "classification": _labelled,
    "regression": _measured,
    "segmentation": _segmented,
    "detection": _detected,
}


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """A colour, 0 .. 255 each, for every class; they repeat after 20."""
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    return [tuple(round(255 * part) for part in colours[k % 20]) for k in range(num_classes)]


def overlay(picture: Tensor, mask: Tensor, num_classes: int, alpha: float = 0.55) -> Tensor:
    """``picture`` uint8 (C, H, W) with the classes of ``mask`` (H, W) laid over it; uint8 (3, H, W).

    Pixels of other values, such as 255, show the picture alone.
    """
    from torchvision.utils import draw_segmentation_masks

    layers = mask[None] == torch.arange(num_classes)[:, None, None]
    return draw_segmentation_masks(picture.expand(3, -1, -1), layers, alpha=alpha, colors=palette(num_classes))


def write(prediction: Prediction, folder: Path) -> list[Path]:
    """Write the pictures of a prediction as ``<image name><ending>``; returns their paths.

    Raises:
        DataError: they cannot be written, or such a file is there already.
    """
    from torchvision.transforms.v2.functional import to_pil_image

    written = []
    for ending, pixels in prediction.pictures.items():
        path = folder / f"{prediction.image.stem}{ending}"
        if path.exists():
            raise DataError(f"{path} is there already, and would be replaced; remove it or choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(pixels).save(path)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; choose another --out") from error
        written.append(path)
    return written
