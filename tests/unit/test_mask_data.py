"""Loss and metric of segmentation, its data, pretrained weights, and the commands that train and predict."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from bridged import bridged
from localgrad import Batch, ConfigError, DataError, TrainingError, models
from localgrad.cli import main
from localgrad.data import masks
from localgrad.partition import Partition
from localgrad.tasks import segmentation
from localgrad.train.optim import Stepper, learning_rate
from localgrad.train.predict import overlay, palette


def given(targets: Tensor) -> Batch:
    return Batch(None, targets, 0)


def drawn(*size: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size[0], classes, *size[1:], generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, size, generator=generator)
    targets[:, 0] = 255
    return logits, targets


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_torch(weights: tuple[float, ...] | None, smoothing: float) -> None:
    logits, targets = drawn(2, 5, 4)
    task = segmentation(3, class_weights=weights, label_smoothing=smoothing)
    expected = F.cross_entropy(
        logits,
        targets,
        None if weights is None else torch.tensor(weights, dtype=torch.float64),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    assert torch.equal(task.loss(logits, given(targets)), expected)
    assert torch.equal(task.loss({"out": logits}, given(targets)), expected)
    both = task.loss({"out": logits, "aux": logits.flip(0)}, given(targets))
    assert torch.equal(both, expected + 0.5 * task._cross_entropy(logits.flip(0), given(targets)))
    coarse = F.interpolate(logits, size=(10, 8), mode="bilinear", align_corners=False)
    large = targets.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(task.loss(logits, given(large)), task.loss(coarse, given(large)))


def test_the_loss_by_hand() -> None:
    logits, targets = drawn(1, 2, 2)
    (a, b) = (logits[0, :, 1, k].softmax(0)[targets[0, 1, k]].log() for k in (0, 1))
    torch.testing.assert_close(segmentation(3).loss(logits, given(targets)), -(a + b) / 2)


def test_a_batch_without_a_counted_pixel_trains_nothing() -> None:
    logits, targets = drawn(2, 4, 4)
    logits.requires_grad_()
    loss = segmentation(3).loss(logits, given(torch.full_like(targets, 255)))
    loss.backward()
    assert loss == 0 and logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))
    assert segmentation(3).score(logits, torch.full_like(targets, 255)).tolist() == [1.0, 1.0]


def test_iou_by_hand_and_by_torchmetrics() -> None:
    jaccard = pytest.importorskip("torchmetrics").classification.MulticlassJaccardIndex
    task = segmentation(4, classes=("sky", "road", "car", "never"))
    metric, reference = task.metric(), jaccard(4, average=None, ignore_index=255)
    counts = np.zeros((3, 3))  # classes: hits, union, ...
    right = total = 0
    for seed in (0, 1):
        logits, targets = drawn(2, 6, 5, seed=seed)
        logits = torch.cat([logits, torch.full_like(logits[:, :1], -9.0)], 1)
        metric.update({"out": logits} if seed else logits, targets)
        reference.update(logits.argmax(1), targets)
        for predicted, true in zip(logits.argmax(1).flatten().tolist(), targets.flatten().tolist(), strict=True):
            if true != 255:
                counts[true, 0] += predicted == true
                counts[true, 1] += 1
                counts[predicted, 2] += 1
                right, total = right + (predicted == true), total + 1
    found = metric.compute()
    ious = [hits / (there + said - hits) for hits, there, said in counts]
    assert list(found) == ["miou", "pixel_accuracy", "iou/sky", "iou/road", "iou/car"]  # a class that never occurs
    assert [found[f"iou/{name}"] for name in ("sky", "road", "car")] == pytest.approx(ious)
    assert found["miou"] == pytest.approx(sum(ious) / 3) and found["pixel_accuracy"] == pytest.approx(right / total)
    assert reference.compute()[:3].tolist() == pytest.approx(ious, abs=1e-6)


def test_the_score_of_each_image() -> None:
    targets = torch.tensor([[[0, 0], [1, 255]], [[2, 2], [2, 2]]])
    logits = F.one_hot(torch.tensor([[[0, 1], [1, 1]], [[2, 2], [2, 0]]]), 3).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(segmentation(3).score(logits, targets), torch.tensor([2 / 3, 3 / 4]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, "at least 1"),
        ({"num_classes": 300}, "is one of the 300 classes"),
        ({"num_classes": 3, "class_weights": (1.0, 2.0)}, "class_weights has 2 entries"),
        ({"num_classes": 3, "class_weights": (0.0, 0.0, 0.0)}, "one is positive"),
        ({"num_classes": 3, "classes": ("a",)}, "classes has 1 entries"),
        ({"num_classes": 3, "auxiliary": -1.0}, "auxiliary=-1.0"),
        ({"num_classes": 3, "label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"num_classes": 3, "mean": (0.5,), "std": (0.0,)}, "one positive std"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        segmentation(**options)


@pytest.mark.parametrize(
    "output", [torch.zeros(2, 4), torch.zeros(2, 4, 3, 3), {"logits": torch.zeros(2, 3, 3, 3)}, []]
)
def test_an_answer_without_logits_is_refused(output: Any) -> None:
    with pytest.raises(TrainingError, match=r"segmentation\(3\) needs \(B, 3, h, w\)"):
        segmentation(3).loss(output, given(torch.zeros(2, 3, 3, dtype=torch.long)))


# --- cut points ------------------------------------------------------------------------------------------------------


def test_skips_of_a_library_model_are_taps_and_its_head_is_not_cut() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    model = models.create("smp:Unet", num_classes=3, encoder_name="resnet18", decoder_channels=(16, 16, 16, 8, 8))
    cuts = Partition(model, torch.randn(2, 3, 32, 32)).cuts
    stages = [f"encoder.layer{k}" for k in (1, 2, 3, 4)]
    names = [cut.name for cut in cuts]
    assert [name for name in names if name in stages] == stages
    assert {"decoder", "decoder.blocks.2", "decoder.blocks.4"} <= set(names)
    assert not any("layer2.0.conv" in name for name in names)  # a shortcut of a residual unit is no tap
    assert [cut.name for cut in cuts if cut.tail] == ["segmentation_head"]


def test_the_second_head_of_torchvision_reads_a_tap() -> None:
    for aux in (False, True):
        model = models.create("torchvision:fcn_resnet50", num_classes=3, aux_loss=aux)
        found = Partition(model, torch.randn(2, 3, 32, 32))
        names = [cut.name for cut in found.cuts if not cut.tail]
        assert names[0] == "backbone.layer1" and names[-1] == "backbone.layer4.2" and len(names) == 16
        assert found.final_layout.channels == 2048


# --- data ------------------------------------------------------------------------------------------------------------


def picture(path: Path, mask: np.ndarray) -> None:
    """A picture in which the colour of each pixel tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([mask * 40] * 3, -1).astype(np.uint8)).save(path)


def mask_file(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/ and masks/, 6 + 3 + 3 pictures of 24x32 with two classes in large areas, and ignored pixels."""
    root = tmp_path / "set"
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for k in range(count):
            mask = np.zeros((24, 32), int)
            mask[:, generator.integers(8, 24) :] = 1
            picture(root / "images" / split / f"{k}.png", mask)
            mask[0] = 255
            mask_file(root / "masks" / split / f"{k}.png", mask)
    (root / "classes.txt").write_text("ground\nsky\n")
    return root


def load(folder: Path, **options: Any) -> localgrad.data.Data:
    return masks.load(f"masks:{folder}", **{"batch_size": 2, **options})


def test_a_folder_of_masks(folder: Path) -> None:
    data = load(folder)
    assert (data.kind, data.num_classes, data.classes, data.input_shape) == (
        "segmentation", 2, ("ground", "sky"), (3, 24, 32),
    )  # fmt: skip
    assert data.validation is not None
    assert [split.num_samples for split in (data.train, data.validation, data.test)] == [6, 3, 3]
    inputs, targets = next(data.test.epoch(0))
    assert inputs.shape == (2, 3, 24, 32) and targets.shape == (2, 24, 32) and targets.dtype == torch.int64
    pixels = segmentation(2, mean=data.mean, std=data.std).pixels(inputs)
    counted = targets != 255
    assert torch.equal((pixels[:, 0] * 255 / 40).round().long()[counted], targets[counted])
    assert (~counted).sum() == 2 * 32
    assert load(folder, validation=0.0).validation is None


def test_images_and_masks_are_transformed_together(folder: Path) -> None:
    data = load(folder, image_size=(48, 64), crop_size=(40, 40), scale=(0.5, 1.5), batch_size=6)
    seen = set()
    for epoch in range(3):
        ((inputs, targets),) = data.train.epoch(epoch)
        assert inputs.shape[2:] == targets.shape[1:] == (40, 40) and set(targets.unique().tolist()) <= {0, 1, 255}
        pixels = segmentation(2, mean=data.mean, std=data.std).pixels(inputs)
        # Bilinear images and nearest masks differ within a pixel or two of an edge only.
        level = pixels[:, 0] * 255
        agree = torch.where(targets == 1, level > 20, level < 21) | (targets == 255)
        assert agree.float().mean() > 0.97
        seen.add(tuple(targets.flatten(1).sum(1).tolist()))
    assert len(seen) == 3  # every epoch draws anew
    options: dict[str, Any] = {"image_size": (48, 64), "crop_size": (40, 40), "scale": (0.5, 1.5)}
    again, whole = list(load(folder, **options).train.epoch(1, start=1)), list(load(folder, **options).train.epoch(1))
    assert all(torch.equal(a, b) for x, y in zip(again, whole[1:], strict=True) for a, b in zip(x, y, strict=True))


def test_a_crop_beyond_the_picture_is_ignored(folder: Path) -> None:
    _, targets = next(load(folder, crop_size=(30, 32)).train.epoch(0))
    assert ((targets == 255).sum((1, 2)) == 7 * 32).all()  # one row of the file, six of padding


def damage(folder: Path, what: str) -> str:
    """Spoils the training picture 3 or its mask; returns what the message must say."""
    image, mask = folder / "images/train/3.png", folder / "masks/train/3.png"
    if what == "corrupt image":
        image.write_bytes(image.read_bytes()[:60])
        return "cannot read picture .*images/train/3.png"
    if what == "corrupt mask":
        mask.write_bytes(b"no picture")
        return "cannot read picture .*masks/train/3.png"
    if what == "size":
        mask_file(mask, np.zeros((24, 30), int))
        return "masks/train/3.png is 30x24 pixels, its image .* 32x24"
    if what == "colour":
        Image.new("RGB", (32, 24)).save(mask)
        return "masks/train/3.png is a picture of mode RGB"
    mask_file(mask, np.full((24, 32), 7))
    return "masks/train/3.png holds ids that no class has: 7"


DAMAGE = ["corrupt image", "corrupt mask", "size", "colour", "unknown id"]


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_named(folder: Path, what: str, workers: int) -> None:
    if workers and what != "size":
        return
    words = damage(folder, what)
    with pytest.raises(DataError, match=words):
        list(load(folder, workers=workers).train.epoch(0))


@pytest.mark.parametrize("what", DAMAGE)
def test_bad_files_are_skipped_and_counted_when_asked(folder: Path, what: str) -> None:
    words = damage(folder, what)
    train = load(folder, on_damage="skip").train
    for _ in range(2):
        assert sum(len(inputs) for inputs, _ in train.epoch(0)) == 5
    ((path, why),) = train.skipped.items()
    assert path.endswith("images/train/3.png")
    with pytest.raises(DataError, match=words):
        raise DataError(why)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "masks/train/2.png").unlink(), "images/train/2.png has no mask"),
        (lambda root: (root / "classes.txt").unlink(), "cannot read .*classes.txt"),
        (lambda root: (root / "classes.txt").write_text("\n"), "names 0 classes"),
        (lambda root: [p.unlink() for p in (root / "images/test").iterdir()], "holds no image"),
        (lambda root: (root / "masks/test").rename(root / "masks/x"), "masks/test is no folder"),
    ],
)
def test_a_folder_that_is_not_complete(folder: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": (4, 4)}, r"data.image_size=\(4, 4\)"),
        ({"scale": (0.5, 2.0)}, "needs data.image_size and data.crop_size"),
        ({"scale": (2.0, 0.5)}, "lowest, highest"),
        ({"validation": 1.0}, "validation=1.0"),
    ],
)
def test_settings_that_make_no_sense(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(folder, **options)


def test_pictures_of_several_sizes_cannot_share_a_batch(folder: Path) -> None:
    mask = np.zeros((20, 20), int)
    picture(folder / "images/test/1.png", mask)
    mask_file(folder / "masks/test/1.png", mask)
    with pytest.raises(ConfigError, match=r"eval_batch_size=1"):
        list(load(folder).test.epoch(0))
    sizes = [tuple(targets.shape) for _, targets in load(folder, eval_batch_size=1).test.epoch(0)]
    assert sizes == [(1, 24, 32), (1, 20, 20), (1, 24, 32)]


def test_cityscapes_label_ids_become_train_ids(tmp_path: Path) -> None:
    ids = np.zeros((8, 16), int)
    ids[:, 1], ids[:, 2], ids[:, 3], ids[:, 4] = 7, 8, 33, 9  # road, sidewalk, bicycle, parking (not evaluated)
    for split in ("train", "val"):
        place = f"{split}/aachen/aachen_000000_000019"
        picture(tmp_path / f"leftImg8bit/{place}_leftImg8bit.png", np.zeros((8, 16), int))
        mask_file(tmp_path / f"gtFine/{place}_gtFine_labelIds.png", ids)
    data = masks.load("cityscapes", root=tmp_path, batch_size=1, validation=0.0)
    assert data.num_classes == 19 and data.classes[:2] == ("road", "sidewalk") and data.classes[-1] == "bicycle"
    with pytest.warns(UserWarning, match="no pixel of the val masks is of class building, wall"):
        ((_, targets),) = data.test.epoch(0)
    assert targets[0, 0, :6].tolist() == [255, 0, 1, 18, 255, 255]
    with pytest.raises(DataError, match=r"leftImg8bit_trainvaltest\.zip"):
        masks.load("cityscapes", root=tmp_path / "elsewhere", batch_size=1)


def test_a_named_class_that_no_pixel_has_is_said_once(tmp_path: Path) -> None:
    """Masks of 0 and 255, as many tools write two classes: all of the object would count as ignored."""
    (tmp_path / "classes.txt").write_text("\ufeffbackground\nobject\n", encoding="utf-8")
    mask = np.zeros((8, 8), int)
    mask[2:6] = 255
    for split in ("train", "test"):
        picture(tmp_path / f"images/{split}/a.png", mask)
        mask_file(tmp_path / f"masks/{split}/a.png", mask)
    data = masks.load(f"masks:{tmp_path}", batch_size=1, validation=0.0)
    assert data.classes == ("background", "object")
    with pytest.warns(UserWarning, match="training masks is of class object. Pixels of 255 are ignored"):
        list(data.train.epoch(0))
    list(data.train.epoch(1))  # warnings are errors here: it says so once


def of_one_class(folder: Path, value: int) -> None:
    """The same folder with one class that is written so, and nothing ignored where that is 255."""
    (folder / "classes.txt").write_text("sky\n")
    for path in (folder / "masks").rglob("*.png"):
        mask = np.array(Image.open(path))
        mask_file(path, np.where(mask == 1, value, 0 if value == 255 else mask))


@pytest.mark.parametrize("value", [1, 255])
def test_one_class_is_written_as_1_or_as_255(folder: Path, value: int) -> None:
    of_one_class(folder, value)
    mask_file(folder / "masks/train/0.png", np.zeros((24, 32), int))  # which tells nothing
    data = load(folder)
    assert (data.num_classes, data.classes) == (1, ("sky",))
    targets = torch.cat([targets for _, targets in data.train.epoch(0)])
    assert set(targets.unique().tolist()) == ({0, 1} if value == 255 else {0, 1, 255})
    assert (targets == 1).float().mean() > 0.2
    mask_file(folder / "masks/train/5.png", np.ones((24, 32), int) if value == 255 else np.full((24, 32), 2))
    with pytest.raises(DataError, match=rf"train/5.png holds ids that no class has: {2 - value // 255}"):
        list(load(folder).train.epoch(0))


def test_camvid_as_segnet_lays_it_out(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        mask = np.arange(12).reshape(3, 4).repeat(4, 0).repeat(4, 1)
        picture(tmp_path / f"CamVid/{split}/a.png", mask)
        mask_file(tmp_path / f"CamVid/{split}annot/a.png", mask)
    data = masks.load("camvid", root=tmp_path, batch_size=1)
    ((_, targets),) = data.test.epoch(0)
    assert targets[0, ::4, ::4].flatten().tolist() == [*range(11), 255] and data.classes[8] == "Car"


@pytest.mark.data
def test_camvid_is_what_its_readme_says(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (real_data / "camvid").is_dir():
        pytest.skip(f"needs CamVid in {real_data}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = masks.load("camvid", root=real_data, batch_size=4, image_size=(90, 120))
    assert data.validation is not None
    assert [split.num_samples for split in (data.train, data.validation, data.test)] == [367, 101, 233]
    inputs, targets = next(data.test.epoch(0))
    assert inputs.shape == (4, 3, 90, 120) and 0.2 < (targets == 3).float().mean() < 0.6  # road
    assert {found.name: found.found for found in localgrad.data.available(real_data)}["camvid"]


# --- pretrained weights ----------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.bn1(self.conv1(x))))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone(3)
        self.backbone.fc = None
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@pytest.mark.parametrize("form", ["safetensors", "wrapped pt", "timm"])
def test_weights_go_into_the_backbone(tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source, model = Backbone(), Dense()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(source.state_dict(), str(path))
    else:
        state = {f"module.{k}" if form == "timm" else k: v for k, v in source.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, path)
    said = models.load_pretrained(model, path)
    assert said.startswith("21 of 23 tensors") and "into 'backbone'; left out: fc." in said
    own = set(model.state_dict()) - {f"backbone.{name}" for name in source.state_dict()}
    assert f"; {len(own)} of the model's own stay random: " in said and all(name in said for name in sorted(own)[:1])
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_twins_and_companions_start_from_pretrained_neighbours(tmp_path: Path) -> None:
    source, model = Backbone(), Dense()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    models.load_pretrained(model, tmp_path / "w.pth")
    task = segmentation(3)
    for init in ("source", "fresh"):
        method = bridged(localgrad.methods.dgl(task), mix="scaled", companion_init=init)
        network = localgrad.localize(model, method, ("backbone.layer2",), example=torch.randn(2, 3, 8, 8))
        bridge: Any = network.auxiliary_of(localgrad.spans.Span(0, 1)).bridge
        expected = source.layer2[0].weight
        assert torch.equal(bridge.twin[0].weight, expected)
        assert torch.equal(bridge.companion[0].weight, expected) == (init == "source")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def saved(content: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
        torch.save(content, path)
        return path

    (tmp_path / "torn.safetensors").write_bytes(b"123")
    for path, words in (
        (tmp_path / "nix.pth", "cannot read weights"),
        (tmp_path / "torn.safetensors", "cannot read weights"),
        (saved([1, 2]), "not a state dict"),
        (saved({"a": 1}), "holds no tensors"),
        (saved({"a": torch.zeros(3), "conv1.bias": torch.zeros(4), "b": torch.zeros(1)}), "1 of its 3 tensors do, 'a'"),
    ):
        with pytest.raises(localgrad.CheckpointError, match=words):
            models.load_pretrained(Dense(), path)
    # A pickle that would run code is refused, not run.
    with pytest.raises(localgrad.CheckpointError, match="cannot read weights"):
        models.load_pretrained(Dense(), saved(Dense()))


def test_frozen_batchnorm_neither_moves_nor_learns() -> None:
    model = Dense().train()
    models.freeze_batchnorm(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if "bn1" in name or ".1." in name}
    network = localgrad.localize(model, localgrad.methods.dgl(segmentation(3)), 3, example=torch.randn(2, 3, 8, 8))
    localgrad.backward(network, 9 * torch.randn(2, 3, 8, 8), torch.randint(3, (2, 8, 8)))
    assert model.backbone.conv1.weight.grad is not None and model.backbone.bn1.weight.grad is None
    assert before and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


# --- the commands ----------------------------------------------------------------------------------------------------


def test_poly_schedule() -> None:
    optim = localgrad.config.OptimConfig(lr=0.01, schedule="poly", min_lr=1e-4)
    assert learning_rate(optim, 0, 0.0, 4) == pytest.approx(0.01)
    assert learning_rate(optim, 2, 0.0, 4) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)
    assert learning_rate(optim, 3, 0.5, 4) == pytest.approx(0.0099 * 0.125**0.9 + 1e-4)
    with pytest.raises(ConfigError, match="min_lr"):
        localgrad.config.OptimConfig(min_lr=1e-4)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_one_class_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    of_one_class(folder, 255)
    options = "options: {encoder_name: resnet18, encoder_depth: 3, decoder_channels: [16, 8, 8]}"
    (tmp_path / "small.yaml").write_text(
        f"model: {{name: 'smp:Unet', {options}}}\n"
        f"data: {{name: 'masks:{folder}', image_size: [24, 32]}}\n"
        "task: {class_weights: [1.0, 2.0], head_width: 8}\n"
        "method: [dgl]\nblocks: {cuts: [encoder.layer1]}\noptim: {name: adamw, lr: 0.003}\n"
        "train: {epochs: 2, batch_size: 2, eval_batch_size: 2, threads: 1}\n"
    )
    assert run("train", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run"), "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert list(result["last"]["metrics"]) == ["miou", "pixel_accuracy", "iou/sky"]
    shown = folder / "images/test/0.png"
    assert run("predict", str(tmp_path / "run"), str(shown), "--out", str(tmp_path / "out"), "--json") == 0
    ((row,), mask) = json.loads(capsys.readouterr().out), np.array(Image.open(tmp_path / "out/0.mask.png"))
    assert set(np.unique(mask)) <= {0, 1} and row["answer"].split()[0] in ("background", "sky")


def test_train_evaluate_resume_and_predict(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    place = tmp_path / "run"
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "model: {name: 'smp:Unet', batchnorm: frozen, options: {encoder_name: resnet18, encoder_depth: 3, "
        "decoder_channels: [16, 8, 8]}}\n"
        f"data: {{name: 'masks:{folder}', image_size: [24, 32], on_damage: skip}}\n"
        "task: {class_weights: [1.0, 2.0], head_width: 8}\n"
        "method: [dgl, man_pp]\nblocks: {cuts: [encoder.layer1, encoder.layer2]}\n"
        "optim: {name: adamw, lr: 0.003, schedule: poly}\n"
        "train: {epochs: 2, batch_size: 2, eval_batch_size: 2, threads: 1}\n"
    )
    assert run("train", str(recipe), "--run-dir", str(place), "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert list(result["last"]["metrics"])[:2] == ["miou", "pixel_accuracy"]
    assert result["last"]["score"]["model"] == result["last"]["metrics"]["miou"]
    assert set(result["last"]["score"]) == {"block 1", "block 2", "model"}
    assert run("eval", str(place), "--json") == 0
    assert json.loads(capsys.readouterr().out)["score"] == result["last"]["score"]
    assert run("eval", str(place)) == 0
    assert "miou" in capsys.readouterr().out

    stopped, finish = tmp_path / "stopped", Stepper.finish

    def finish_and_stop(stepper: Stepper, step: int) -> Any:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return finish(stepper, step)

    monkeypatch.setattr(Stepper, "finish", finish_and_stop)
    assert run("train", str(recipe), "--run-dir", str(stopped)) == 130
    monkeypatch.undo()
    assert not (stopped / "model.safetensors").exists()
    assert run("train", "--resume", str(stopped)) == 0
    assert (stopped / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()
    capsys.readouterr()

    out = tmp_path / "shown"
    assert run("predict", str(place), str(folder / "images/test"), "--out", str(out), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 and len(list(out.iterdir())) == 6
    mask = np.array(Image.open(out / "0.mask.png"))
    assert mask.shape == (24, 32) and set(np.unique(mask)) <= {0, 1}
    shown = np.array(Image.open(out / "0.overlay.png"))
    original = np.array(Image.open(folder / "images/test/0.png"))
    pixels = torch.from_numpy(original).permute(2, 0, 1)
    expected = overlay(pixels, torch.from_numpy(mask).long(), 2)
    assert np.array_equal(shown, expected.permute(1, 2, 0).numpy())
    assert run("predict", str(place), str(tmp_path / "nix.png")) == 2
    assert "cannot read picture" in capsys.readouterr().err
    assert run("predict", str(tmp_path), str(folder / "images/test")) == 2


def test_overlay_mixes_the_colour_of_the_class() -> None:
    pixels, mask = torch.full((1, 2, 2), 100, dtype=torch.uint8), torch.tensor([[0, 1], [255, 0]])
    shown = overlay(pixels, mask, 2, alpha=0.5)
    for where, colour in (((0, 0), palette(2)[0]), ((0, 1), palette(2)[1]), ((1, 0), (100, 100, 100))):
        expected = [(100 + part) // 2 for part in colour]
        assert (shown[(slice(None), *where)] - torch.tensor(expected)).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("task.class_weigths=[1, 2]", "class_weights"),
        ("task.mean=[1]", "task.mean"),
        ("data.image_size=32", r"write \[height, width\]"),
        ("model.weights=nix.pth", "cannot read weights"),
    ],
)
def test_settings_that_do_not_suit_masks(
    folder: Path, settings: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "torchvision:lraspp_mobilenet_v3_large", "--data", f"masks:{folder}", "--num-blocks", "2"]
    assert run("train", *arguments, "--run-dir", str(folder / "run"), settings) == 2
    assert words.replace("\\", "") in " ".join(capsys.readouterr().err.split())
