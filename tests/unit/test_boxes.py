"""Images with boxes: what is read, what is left out, what is refused, and how batches are made."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import localgrad
from localgrad.cli import main
from localgrad.data import boxes

WIDTH, HEIGHT = 80, 40


def picture(path: Path, shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (WIDTH, HEIGHT), (shade, 0, 255 - shade))
    image.paste((255, 255, 255), (0, 0, WIDTH // 2, HEIGHT))  # the left half is white
    image.save(path)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three training images, one of them empty and one with a crowd, and one to evaluate; categories 7 and 3."""
    images = [{"id": k, "file_name": f"{k}.png", "width": WIDTH, "height": HEIGHT} for k in (12, 5, 9)]
    annotations = [
        {"id": 1, "image_id": 12, "category_id": 7, "bbox": [10, 5, 20, 30], "area": 333.0, "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 80, 40], "area": 10.0, "iscrowd": 1},
        {"id": 3, "image_id": 5, "category_id": 3, "bbox": [40.5, 10, 39.5, 29.75]},
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    write(tmp_path, "train2030", {"images": images, "annotations": annotations, "categories": categories})
    held = {"images": images[:1], "annotations": annotations[:1], "categories": categories}
    write(tmp_path, "val2030", held)
    for split in ("train2030", "val2030"):
        for image in images:
            picture(tmp_path / split / image["file_name"], 20 * image["id"])
    return tmp_path


def write(root: Path, split: str, content: dict[str, Any]) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def change(root: Path, **changes: Any) -> None:
    path = root / "annotations" / "instances_train2030.json"
    content = json.loads(path.read_text())
    content["annotations"][0] |= changes
    path.write_text(json.dumps(content))


def load(root: Path, **options: Any) -> localgrad.data.Data:
    settings = {"batch_size": 3, "image_size": (64, 64), "validation": 0.0, "augment": False} | options
    return boxes.load(f"coco:{root}", **settings)


def test_coco_by_hand(coco: Path) -> None:
    data = load(coco)
    assert (data.classes, data.num_classes, data.kind) == (("cat", "dog"), 2, "detection")
    assert (data.train.num_samples, data.validation, data.test.num_samples) == (3, None, 1)
    order = [Path(data.train.items[k].path).stem for k in data.train.order.batches(0)[0]]
    inputs, targets = next(data.train.epoch(0))
    assert inputs.shape == (3, 3, 64, 64) and data.input_shape == (3, 64, 64)
    by_name = dict(zip(order, targets, strict=True))
    assert by_name["9"]["boxes"].shape == (0, 4)
    dog = by_name["12"]
    torch.testing.assert_close(dog["boxes"], torch.tensor([[8.0, 8.0, 24.0, 56.0]]))  # 64 / 80 across, 64 / 40 down
    assert dog["labels"].tolist() == [1] and dog["area"].tolist() == [333.0] and dog["iscrowd"].tolist() == [0]
    assert dog["size"].tolist() == [64, 64] and dog["original_size"].tolist() == [HEIGHT, WIDTH]
    cat = by_name["5"]
    assert cat["iscrowd"].tolist() == [1, 0] and cat["area"].tolist() == [10.0, 39.5 * 29.75]
    white = (1 - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(inputs[0, :, 5, 5], white)


def test_shorter_side_and_padding(coco: Path) -> None:
    data = load(coco, image_size=32, longest_side=50)  # 40 x 80 would become 32 x 64, so 25 x 50
    inputs, targets = next(data.train.epoch(0))
    assert inputs.shape == (3, 3, 32, 64) and targets[0]["size"].tolist() == [25, 50]
    assert (inputs[:, :, 25:] == 0).all() and (inputs[:, :, :, 50:] == 0).all() and (inputs[:, :, :25, :50] != 0).any()


def test_mirrored_boxes_lie_where_the_mirrored_picture_has_them(coco: Path) -> None:
    data = load(coco, augment=True, batch_size=1)
    seen = set()
    for epoch in range(6):
        for inputs, targets in data.train.epoch(epoch):
            mirrored = bool(inputs[0, 1, 5, 60] > 2)  # the white half is on the right
            for box, label in zip(targets[0]["boxes"].tolist(), targets[0]["labels"].tolist(), strict=True):
                if label == 1:
                    assert box == pytest.approx([40.0, 8.0, 56.0, 56.0] if mirrored else [8.0, 8.0, 24.0, 56.0])
                    seen.add(mirrored)
    assert seen == {True, False}


def test_an_epoch_can_be_entered_at_any_batch(coco: Path) -> None:
    data, again = load(coco, augment=True, batch_size=1), load(coco, augment=True, batch_size=1, workers=0)
    whole = list(data.train.epoch(4))
    torch.rand(3)
    (inputs, targets), *_ = again.train.epoch(4, start=2)
    assert torch.equal(inputs, whole[2][0])
    assert all(torch.equal(value, whole[2][1][0][name]) for name, value in targets[0].items())


def test_held_out_images(coco: Path) -> None:
    data = load(coco, validation=0.34, batch_size=2)
    assert (data.train.num_samples, data.validation.num_samples) == (2, 1)
    assert not set(data.train.order.indices.tolist()) & set(data.validation.order.indices.tolist())
    assert load(coco, limit=2).train.num_samples == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"category_id": 4}, r"instances_train2030.json: 1 boxes are .* annotation 1 has category_id 4"),
        ({"image_id": 77}, r"annotation 1 has category_id 7, image_id 77"),
        ({"bbox": [1, 2, 3]}, r"cannot read .*instances_train2030.json: ValueError"),
    ],
)
def test_damaged_annotations_are_named(coco: Path, changes: dict[str, Any], message: str) -> None:
    change(coco, **changes)
    with pytest.raises(localgrad.DataError, match=message):
        load(coco)


def test_unknown_categories_are_left_out_when_asked(coco: Path) -> None:
    change(coco, category_id=4)
    with pytest.warns(UserWarning, match="category_id 4, .* left out"):
        data = load(coco, on_damage="skip")
    assert sum(len(image.boxes) for image in data.train.items) == 2


@pytest.mark.parametrize("what, named", [("images", "first.png"), ("categories", "cat")])
def test_an_id_that_stands_twice_is_refused(what: str, named: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "images": [{"id": 0, "file_name": "first.png"}], "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4]}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    (found,), classes = boxes.read_coco(tmp_path / "a.json", tmp_path)
    assert classes == ("cat",) and found.boxes.tolist() == [[1, 2, 4, 6]]
    content[what].append({"id": 0, "file_name": "b.png"} if what == "images" else {"id": "3", "name": "dog"})
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(localgrad.DataError, match=f"two {what} have the id .*{named}"):
        boxes.read_coco(tmp_path / "a.json", tmp_path)


def test_ids_may_be_written_as_text(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "images": [{"id": "7", "file_name": "a.png"}], "categories": [{"id": "3", "name": " cat "}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": "3", "bbox": [1, 2, 3, 4]}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    (found,), classes = boxes.read_coco(tmp_path / "a.json", tmp_path)
    assert classes == ("cat",) and len(found.boxes) == 1


@pytest.mark.parametrize(
    "changes, message",
    [({"bbox": [float("nan"), 1, 5, 5]}, "or no numbers"), ({"bbox": [1, 1, float("inf"), 5]}, "or no numbers")],
)
def test_boxes_that_are_no_numbers(coco: Path, changes: dict[str, Any], message: str) -> None:
    change(coco, **changes)
    with pytest.raises(localgrad.DataError, match=message):
        load(coco)


def test_a_picture_of_another_size_than_its_annotations_is_refused(coco: Path) -> None:
    file = coco / "annotations" / "instances_train2030.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image.update(height=17, width=33)
    file.write_text(json.dumps(content))
    with pytest.raises(localgrad.DataError, match=r"its annotations are for 33x17"):
        list(load(coco).train.epoch(0))


def test_a_set_without_any_box_is_refused(coco: Path) -> None:
    file = coco / "annotations" / "instances_train2030.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    with pytest.raises(localgrad.DataError, match="no training image has a box"):
        load(coco)


def test_boxes_without_an_area_are_left_out_with_a_warning(coco: Path) -> None:
    change(coco, bbox=[10, 5, 0, 30])
    with pytest.warns(UserWarning, match=r"1 of 3 boxes have no area and were left out, the first in .*12.png"):
        data = load(coco)
    assert sum(len(image.boxes) for image in data.train.items) == 2


def test_boxes_outside_their_image_and_damaged_files(coco: Path) -> None:
    change(coco, bbox=[70, 5, 20, 30])
    with pytest.raises(localgrad.DataError, match=r"box \[70.0, 5.0, 90.0, 35.0\] leaves its image .*12.png, 80x40"):
        list(load(coco).train.epoch(0))
    (coco / "train2030" / "9.png").write_bytes(b"no picture")
    (coco / "train2030" / "5.png").unlink()
    data = load(coco, on_damage="skip", batch_size=1)
    assert list(data.train.epoch(0)) == []
    reasons = {Path(path).name: why for path, why in data.train.skipped.items()}
    assert "leaves its image" in reasons["12.png"] and len(reasons) == 3
    assert all("cannot read picture" in reasons[name] for name in ("5.png", "9.png"))
    change(coco, bbox=[60, 5, 20.5, 30])  # half a pixel too far is rounding
    data = load(coco, on_damage="skip")
    ((_, targets),) = data.train.epoch(0)
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([[48.0, 8.0, 64.0, 56.0]]))


def test_voc_by_hand(tmp_path: Path) -> None:
    entry = "<object><name> {}\n</name><difficult>{}</difficult><bndbox><xmin>8</xmin><ymin>4</ymin><xmax>{}</xmax>"
    entry += "<ymax>20</ymax></bndbox></object>"
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    for name, objects in {"a": [("red", 0, 40), ("blue", 1, 16)], "b": [], "c": [("red", 0, 7)]}.items():
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        body = "".join(entry.format(*one) for one in objects)
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation>{body}</annotation>")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("c 1\n")
    with pytest.warns(UserWarning, match=r"1 of 1 boxes have no area.*c.jpg"):
        data = boxes.load(f"voc:{tmp_path}", batch_size=2, image_size=(40, 80), validation=0.0, augment=False)
    assert data.classes == ("blue", "red") and data.test.num_samples == 1
    _, targets = next(data.train.epoch(0))
    full = max(targets, key=lambda target: len(target["boxes"]))
    assert full["boxes"].tolist() == [[7, 3, 40, 20], [7, 3, 16, 20]] and full["labels"].tolist() == [1, 0]
    assert full["iscrowd"].tolist() == [0, 1] and full["area"].tolist() == [33 * 17.0, 9 * 17.0]
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation>")
    with pytest.raises(localgrad.DataError, match=r"cannot read .*a.xml"):
        boxes.load(f"voc:{tmp_path}", batch_size=2)
    (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
    with pytest.raises(localgrad.DataError, match=r"no VOC data in .* its splits are val"):
        boxes.load(f"voc:{tmp_path}", batch_size=2)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(localgrad.DataError, match=r"no COCO data in .* found nothing"):
        boxes.load(f"coco:{tmp_path}", batch_size=2)
    for name in ("coco128", "bccd"):
        with pytest.raises(localgrad.DataError, match=f"data set '{name}' not found"):
            boxes.load(name, root=tmp_path, batch_size=2)
    assert [found.found for found in boxes.available(tmp_path)] == [False] * 3
    assert boxes.knows("coco:/x") and boxes.knows("bccd") and not boxes.knows("camvid") and not boxes.knows("voc")


def test_sizes_out_of_range(coco: Path) -> None:
    for options in ({"image_size": (8, 64)}, {"image_size": 64, "longest_side": 50}, {"validation": 1.0}):
        with pytest.raises(localgrad.ConfigError):
            load(coco, **options)


@pytest.mark.data
def test_the_sets_at_hand(real_data: Path) -> None:
    data = boxes.load("coco128", root=real_data, batch_size=4, image_size=(64, 64), validation=0.0)
    assert (data.train.num_samples, data.test.num_samples, data.num_classes) == (128, 128, 80)
    assert [sum(len(i.boxes) for i in split.items) for split in (data.train, data.test)] == [929, 898]
    assert sum(not len(image.boxes) for image in data.train.items) == 2
    cells = boxes.load("bccd", root=real_data, batch_size=4, image_size=(64, 64))
    assert cells.classes == ("Platelets", "RBC", "WBC")
    assert [s.num_samples for s in (cells.train, cells.validation, cells.test)] == [205, 87, 72]
    assert sum(len(i.boxes) for s in (cells.train, cells.validation, cells.test) for i in s.items) == 4888


def test_train_evaluate_and_predict(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands, on three pictures, with a detector that is thin where it can be."""
    place, out, recipe = tmp_path / "run", tmp_path / "shown", tmp_path / "small.yaml"
    recipe.write_text(
        "model: {name: retinanet, batchnorm: frozen, options: {backbone: resnet18, width: 32, score_thresh: 0.0}}\n"
        f"data: {{name: 'coco:{coco}', image_size: 32, longest_side: 64, validation: 0.0}}\n"
        "method: [dgl, man_pp]\nblocks: {cuts: [backbone.body.layer2, backbone.body.layer3]}\n"
        "optim: {lr: 0.01, schedule: step, clip_grad: 1.0}\n"
        "train: {epochs: 1, batch_size: 2, eval_batch_size: 2, threads: 1}\n"
    )

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert not ended.value.code
        return capsys.readouterr().out

    (result,) = json.loads(run("train", str(recipe), "--run-dir", str(place), "--json"))
    assert list(result["last"]["metrics"])[:3] == ["map", "map_50", "map_75"]
    assert set(result["last"]["score"]) == {"block 1", "block 2", "model"}
    told = json.loads(run("eval", str(place), "--json"))
    assert told["score"] == result["last"]["score"] and told["split"] == result["split"] == "val"
    picture_of = str(coco / "val2030" / "12.png")
    (row,) = json.loads(run("predict", str(place), picture_of, "--out", str(out), "--min-score", "0.001", "--json"))
    with Image.open(out / "12.boxes.png") as drawn, Image.open(picture_of) as before:
        assert drawn.size == before.size == (WIDTH, HEIGHT)
        assert (drawn.tobytes() != before.tobytes()) == (not row["answer"].startswith("nothing"))
    assert any(name in row["answer"] for name in ("dog", "cat"))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("annotations", "area", {}), ("annotations", "area", -1.0), ("annotations", "area", float("inf")),
        ("annotations", "area", "wide"), ("annotations", "iscrowd", {"a": 1}), ("annotations", "iscrowd", "no"),
        ("annotations", "category_id", float("inf")), ("images", "id", float("inf")), ("images", "height", [1]),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_the_name_of_the_file(
    coco: Path, kind: str, name: str, value: object
) -> None:
    path = coco / "annotations" / "instances_train2030.json"
    content = json.loads(path.read_text())
    content[kind][0][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(localgrad.DataError, match=str(path)):
        load(coco)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 100), st.floats(-200, 200), st.just({}),
    st.sampled_from([float("nan"), float("inf"), 10**30, "x", ""]),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=5),
)  # fmt: skip


@given(data=st.data())
@hypothesis.settings(max_examples=30, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_one_odd_value_is_refused_or_changes_its_own_picture_only(coco: Path, data: st.DataObject) -> None:
    """Whatever stands somewhere in the annotations: boxes are finite and inside, other pictures' are what they were."""
    path = coco / "annotations" / "instances_train2030.json"
    whole = path.read_text()
    before = by_picture(coco)
    content = json.loads(whole)
    kind = data.draw(st.sampled_from(["images", "annotations", "categories"]))
    row = data.draw(st.sampled_from(content[kind]))
    name = data.draw(st.sampled_from(sorted(row)))
    told = {image["id"]: image["file_name"] for image in content["images"]}
    touched = {told.get(row.get("image_id")), row.get("file_name")}
    if data.draw(st.booleans()):
        del row[name]
    else:
        row[name] = data.draw(ODD)
    touched |= {told.get(row.get("image_id")) if isinstance(row.get("image_id"), int) else None}
    path.write_text(json.dumps(content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = by_picture(coco)
    except (localgrad.DataError, localgrad.ConfigError) as error:
        assert str(coco) in str(error)
        return
    finally:
        path.write_text(whole)
    for picture_name, targets in found.items():
        corners = targets["boxes"]
        assert torch.isfinite(corners).all() and (corners >= 0).all() and (corners <= 64).all()
        assert ((corners[:, 2:] - corners[:, :2]) > 0).all() and set(targets["labels"].tolist()) <= {0, 1}
        if picture_name not in touched and kind != "categories":
            assert all(torch.equal(targets[key], value) for key, value in before[picture_name].items())


def by_picture(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What each training picture is learnt to hold."""
    data = load(root)
    order = [Path(data.train.items[k].path).name for k in data.train.order.batches(0)[0]]
    return dict(zip(order, next(data.train.epoch(0))[1], strict=True))
