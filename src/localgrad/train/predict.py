"""What a trained network says about pictures: a class, a mask laid over each, or boxes drawn into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad import data, sealed
from localgrad.config import Config
from localgrad.data import boxes, folders
from localgrad.data.augment import Normalise
from localgrad.data.pictures import read_picture
from localgrad.errors import CheckpointError, DataError
from localgrad.tasks import detection, segmentation
from localgrad.tasks.segmentation import resized
from localgrad.train.experiment import build_task, device_of
from localgrad.train.finished import RESULT, WEIGHTS, model_of, read_config


@dataclass(frozen=True)
class Trained:
    """A model of a finished run, in eval mode, and what its inputs and answers mean.

    Args:
        kind: of its task, as `localgrad.tasks` calls it.
        image_shape: (C, H, W) of a training image.
        mean, std: what inputs are normalised by, in units of [0, 1].
        min_score: of boxes that are shown.
    """

    model: nn.Module
    config: Config
    kind: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_score: float = 0.3


@dataclass(frozen=True)
class Prediction:
    """One picture: a line about it, and what to write, by the end of the file's name."""

    image: Path
    summary: str
    pictures: dict[str, Any]


def load_trained(run_dir: Path, device: str = "auto") -> Trained:
    """The model that a finished run left in a directory.

    Raises:
        CheckpointError: no finished run there.
    """
    config = read_config(run_dir)
    try:
        told = sealed.read_json(run_dir / RESULT)["trained_on"]
        known: dict[str, Any] = {name: tuple(told[name]) for name in ("classes", "image_shape", "mean", "std")}
        kind, weights = told["kind"], sealed.read_tensors(run_dir / WEIGHTS)
    except (CheckpointError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run_dir} holds no finished run ({' '.join(str(error).split())[:200]}); give a directory in which "
            "`localgrad train` came to its end"
        ) from error
    task = build_task(config, len(known["classes"]), known["mean"], known["std"], kind, known["classes"])
    kind = config.task.get("name", kind)
    model = model_of(config, task.num_outputs, known["image_shape"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{run_dir / WEIGHTS} does not fit {config.model.name}: {error}") from error
    return Trained(model.to(device_of(device)).eval(), config, kind, **known)


@torch.no_grad()
def predict(trained: Trained, images: Sequence[Path]) -> Iterator[Prediction]:
    """What the model answers to each picture, one at a time.

    Raises:
        DataError: a file that is no picture, a task whose answers nothing here can show, or two pictures of one name,
            whose answers would be written to one file.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    if trained.kind not in SHOWN:
        raise DataError(f"no way to show the answers of a {trained.kind} network; known: {', '.join(SHOWN)}")
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
        read = read_picture(path, "L" if trained.image_shape[0] == 1 else "RGB")
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
            return folders.transforms(trained.image_shape[1])[1](read, 0)[0].as_subclass(Tensor)
        size = trained.image_shape[1:]
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
        DataError: they cannot be written.
    """
    from torchvision.transforms.v2.functional import to_pil_image

    written = []
    for ending, pixels in prediction.pictures.items():
        path = folder / f"{prediction.image.stem}{ending}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(pixels).save(path)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; choose another --out") from error
        written.append(path)
    return written
