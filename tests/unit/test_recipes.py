"""The recipes that ship: published segments, true numbers of blocks, weights, costs, and how they are listed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import runpy
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.structure import structure

import localgrad
from localgrad.cli import main
from localgrad.config import Config, validate
from localgrad.partition import Partition, by_count
from localgrad.recipes import read_recipe, recipe_costs, recipes
from localgrad.spec import build_method, method_name
from localgrad.train.experiment import build_network, build_task
from localgrad.train.optim import learning_rate

NAMES = list(recipes())
PUBLISHED = [name for name in NAMES if "/" in name]
TASK = localgrad.tasks.classification(10)


@functools.cache
def recipe(name: str) -> Config:
    return validate(read_recipe(name), name)


@functools.cache
def partition(model: str, options: tuple[tuple[str, Any], ...]) -> Partition:
    """The cut points of a network, found on one that is as deep but as thin as its constructor allows."""
    thin: dict[str, Any] = {"embed_dim": 12, "num_heads": 3} if "timm:vit" in model else {}
    if model in ("torchvision:resnet101", "torchvision:resnet152"):
        thin = {"width_per_group": 1}
    if model.startswith("transformers:"):
        network = localgrad.models.create(model, num_classes=256, context=8, **dict(options))
        return Partition(network, torch.zeros(2, 8, dtype=torch.int64))
    size = 64 if ":" in model else 32  # a grid of at least 2x2 is left at the end
    network = localgrad.models.create(model, image_size=size, **thin, **dict(options))
    return Partition(network, torch.randn(2, 3, size, size))


@functools.cache
def starts(
    model: str, options: tuple[tuple[str, Any], ...], num_blocks: int | None, cuts: tuple[str, ...] | None, stem: Any
) -> list[str]:
    """What the blocks after the first begin with: names as short as they come."""
    found = partition(model, options)
    chosen = by_count(found, num_blocks, stem) if num_blocks else found.named(cuts or ())
    return [cut.name for cut in chosen]


def starts_of(one: Config) -> list[str]:
    blocks = one.blocks
    model = re.sub(r"vit_(small|base)", "vit_tiny", one.model.name.replace("resnext101_32x8d", "resnet101"))
    dense = one.task or one.data.crop_size or one.data.image_size
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in one.model.options.items()} if dense else {}
    cuts = tuple(blocks.cuts) if blocks.cuts else None
    return starts(model, tuple(options.items()), blocks.num_blocks, cuts, blocks.stem)


def weights_of(name: str) -> str:
    """How the weights of InfoPro run in a recipe: along a ``ramp``, or by ``stage``; nothing if it has none."""
    first = recipe(name).method[0]
    if isinstance(first, str) or "infopro" not in first:
        return ""
    options = first["infopro"]
    assert options is not None
    return "ramp" if len(options["image"]) == 2 and not name.startswith("hpff/cifar10") else "stage"


def blocks_in_name(name: str) -> int:
    found = re.search(r"_k(\d+)(_|$)", name)
    assert found, name
    return int(found[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_say_the_true_number_of_blocks(name: str) -> None:
    one = recipe(name)
    blocks = blocks_in_name(name)
    assert len(starts_of(one)) + 1 == blocks
    label = re.search(r"K=(\d+)", one.about.table)
    if label and int(label[1]) != blocks and not name.startswith("hpff/"):
        assert f"K={label[1]} has {blocks} isolated blocks" in one.about.notes
    assert name.partition("/")[0] in method_name(one.method).split("+")


def test_each_recipe_is_one_of_its_kind() -> None:
    seen: dict[str, str] = {}
    for name in NAMES:
        settings = asdict(recipe(name))
        del settings["about"]
        assert seen.setdefault(json.dumps(settings), name) == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_where_numbers_come_from(name: str) -> None:
    about = recipe(name).about
    assert about.paper and about.table and about.notes and about.published and about.form
    assert bool(about.evidence) == (about.published != "none found")


# --- the segments of the papers ------------------------------------------------------------------------------------

ONE_TO_FOUR = "1.1 1.2 1.4 1.5 1.7 1.9 1.11 1.13 1.14 1.16 1.17"
ENDS = {  # network, the paper's K: the last unit of each segment but the last, stages from 1 and units from 0
    ("resnet32", 2): "2.1",
    ("resnet32", 4): "1.2 2.1 3.0",
    ("resnet32", 8): "1.0 1.2 1.4 2.1 2.3 3.0 3.2",
    ("resnet32", 16): "1.0 1.1 1.2 1.3 1.4 2.0 2.1 2.2 2.3 2.4 3.0 3.1 3.2 3.3",
    ("resnet110", 2): "2.8",
    ("resnet110", 4): "1.11 2.7 3.3",
    ("resnet110", 8): "1.4 1.11 2.0 2.7 2.14 3.3 3.10",
    ("resnet110", 16): "1.1 1.4 1.7 1.10 1.13 1.16 2.1 2.4 2.7 2.11 2.15 3.1 3.5 3.9 3.13",
    ("resnet110", 32): f"{ONE_TO_FOUR} {re.sub('1[.]', '2.', ONE_TO_FOUR)} 3.1 3.3 3.4 3.6 3.7 3.9 3.11 3.13 3.15",
    ("resnet110", 55): " ".join(f"{s}.{i}" for s in (1, 2, 3) for i in range(18) if (s, i) != (3, 17)),
    ("torchvision:resnet101", 4): "2.2 3.8 3.16",
    ("torchvision:resnext101_32x8d", 4): "2.2 3.8 3.16",
    ("torchvision:resnet152", 4): "2.6 3.13 3.25",
    ("torchvision:resnet101", 2): "2.0",
    ("torchvision:resnet152", 2): "2.5",
    ("torchvision:resnext101_32x8d", 2): "2.0",
    ("torchvision:resnet34", 16): "1.0 1.1 1.2 2.0 2.1 2.2 2.3 3.0 3.1 3.2 3.3 3.4 3.5 4.0 4.1",
}
BALANCED = {
    ("cifar10", 2): "1.14", ("cifar10", 3): "1.9 2.2", ("cifar10", 4): "1.6 1.14 2.8",
    ("stl10", 2): "1.14", ("stl10", 3): "1.8 2.1", ("stl10", 4): "1.6 1.14 2.8",
}  # fmt: skip
UNITS = {
    "resnet32": (5, 5, 5), "resnet110": (18, 18, 18), "torchvision:resnet34": (3, 4, 6, 3),
    "torchvision:resnet101": (3, 4, 23, 3), "torchvision:resnext101_32x8d": (3, 4, 23, 3),
    "torchvision:resnet152": (3, 8, 36, 3),
}  # fmt: skip


def ends(one: Config) -> list[str]:
    """The unit before each boundary; ``stem`` before the first unit."""
    units = [f"{s}.{i}" for s, count in enumerate(UNITS[one.model.name], start=1) for i in range(count)]
    paths = [f"layer{unit}" if not unit.endswith(".0") else f"layer{unit[0]}" for unit in units]
    return [["stem", *units][paths.index(name)] for name in starts_of(one)]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if recipe(name).model.name in UNITS])
def test_segments_are_the_published_ones(name: str) -> None:
    one = recipe(name)
    label = re.search(r"K=(\d+)", one.about.table)
    if not label:
        assert name.startswith(("e2e/", "auglocal/imagenet"))
        return
    k, model = int(label[1]), one.model.name
    expected = BALANCED[one.data.name, k].split() if "balanced" in name else ENDS.get((model, k), "").split()
    if name == "infopro/imagenet_resnext101_k2":
        expected = ["2.2"]  # InfoPro's own; MAN and MAN++ cut at 2.0
    if name == "hpff/imagenet_resnet152_k4_infopro":
        expected = ENDS["torchvision:resnet101", 4].split()  # as released
    if name == "mlaan/imagenet_resnet101_k33_linear":
        expected = [f"{s}.{i}" for s, n in enumerate(UNITS[model], start=1) for i in range(n)][:-1]
    # The stem is a segment of its own in MAN++ on CIFAR, and where InfoPro and AugLocal count 16 or 55.
    alone = name.startswith("man_pp/") and "imagenet" not in name
    alone |= blocks_in_name(name) in (16, 55) and k in (16, 55) and (model, k) in (("resnet32", 16), ("resnet110", 55))
    assert ends(one) == (["stem"] if alone else []) + expected


def test_infopro_cuts_deeplab_after_13_of_23_units() -> None:
    one = recipe("infopro/cityscapes_deeplabv3_resnet101_k2")
    assert starts_of(one) == ["backbone.layer3.13"]
    ((_, options),) = one.method[0].items()
    assert options == {"head": "imagenet", "decoder": "imagenet", "image": [1.5, 1.5], "label": [1.0, 1.0]}


def test_sizes_of_imagenet_segments() -> None:
    """6, 10, 8, 9 and 10, 15, 12, 13 residual units."""
    for name, sizes in (("resnet101", [6, 10, 8, 9]), ("resnet152", [10, 15, 12, 13])):
        one = recipe(f"man_pp/imagenet_{name}_k4_infopro")
        units = [f"{s}.{i}" for s, n in enumerate(UNITS[one.model.name], start=1) for i in range(n)]
        edges = [0, *(units.index(end) + 1 for end in ends(one)), len(units)]
        assert [b - a for a, b in pairwise(edges)] == sizes


def test_vision_transformers_have_four_equal_groups() -> None:
    for size in ("tiny", "small", "base"):
        assert starts_of(recipe(f"man_pp/imagenet_vit_{size}_k4_linear")) == ["blocks.3", "blocks.6", "blocks.9"]


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "ramp" in weights_of(name)])
def test_infopro_leaves_no_block_without_a_loss(name: str) -> None:
    """Weights run linearly over the boundaries; with one boundary only the first value counts."""
    one = recipe(name)
    blocks = blocks_in_name(name)
    ((_, options),) = one.method[0].items()
    assert options is not None
    terms = build_method(one.method[:1], TASK).terms
    for k in range(blocks - 1):
        site: Any = SimpleNamespace(num_blocks=blocks, span=localgrad.spans.Span(k, k + 1))
        share = k / (blocks - 2) if blocks > 2 else 0.0
        expected = [a + (b - a) * share for a, b in (options["label"], options["image"])]
        assert [term.weight_at(site) for term in terms] == pytest.approx(expected) and max(expected) > 0
    if blocks == 2 and "imagenet" not in name and "cityscapes" not in name:
        assert options["label"][1] == options["image"][1] == 0


LABELS = {  # the K by which the released code divides
    "man/cifar10_resnet32_k8_infopro": 8, "man/cifar10_resnet32_k15_infopro": 16,
    "man/cifar10_resnet110_k54_infopro": 55,
    "man_pp/cifar10_resnet32_k9_infopro": 8, "man_pp/cifar10_resnet110_k33_infopro": 32,
    "mlaan/cifar10_resnet32_k8_infopro": 8, "mlaan/cifar10_resnet32_k15_infopro": 15,
    "mlaan/cifar10_resnet110_k54_infopro": 54,
    "hpff/cifar10_resnet32_k15_infopro": 16, "hpff/cifar10_resnet110_k54_infopro": 55,
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_weights_of_each_boundary_are_those_the_released_code_reaches(name: str) -> None:
    """From (5, 0.5) to (0, 0) over its K less 2: by the index of the block (HPFF), by the stage of the block's last
    unit (MLAAN), or by that of the unit behind it (MAN, MAN++ but for the stem).
    """
    family, model, deep = name.split("/")[0], recipe(name).model.name, structure(name)
    units = [f"{s}.{i}" for s, count in enumerate(UNITS[model], start=1) for i in range(count)]
    last_units = ["stem" if end == "stem" else end for end in ends(recipe(name))]
    assert deep.boundaries
    for boundary in deep.boundaries:
        end = last_units[boundary.span.stop - 1]
        if family == "hpff":
            share = (boundary.span.stop - 1) / (LABELS[name] - 2)
        elif end == "stem":
            share = 0.0
        else:
            read = end if family == "mlaan" else units[units.index(end) + 1]
            share = int(read[0]) / (LABELS[name] - 2)
        alone = boundary.span.stop - boundary.span.start == 1
        if family == "hpff" and alone:
            assert boundary.weights == (1.0,) and boundary.span.weight == 0.001
            continue
        patches = 4 if family == "hpff" else 1
        assert boundary.weights == pytest.approx([5 * patches * (1 - share), 0.5 * (1 - share)], abs=1e-5)
        assert boundary.span.weight == (1.0 if family.startswith("man") else 0.001 if alone else 0.999)


def test_structure_of_released_forms() -> None:
    """Heads, the last block and the deviations of weights that were found in the authors' own networks."""
    deep = structure("auglocal/cifar10_resnet110_k55")
    assert (len(deep.boundaries), deep.last_units) == (48, 7)
    shallow = localgrad.localize(
        localgrad.models.resnet32(10), localgrad.methods.auglocal(TASK), 16, example=torch.randn(2, 3, 32, 32)
    )
    assert (len(shallow.auxiliary), shallow.spans(0)[-1].start) == (13, 13)
    narrow, wide = structure("infopro/cifar10_resnet32_k16_softmax").heads or (0.0, 0.0)
    assert 0.055 < narrow < 0.06 and 0.25 < wide < 0.3  # 64 channels out; the decoder's 3
    for family, k in (("man", 15), ("man_pp", 16)):
        found = structure(f"{family}/cifar10_resnet32_k{k}_infopro")
        assert found.twins and found.companions and 0.11 < found.twins[1] < 0.125 and 0.11 < found.companions[1] < 0.125
    windows = structure("hpff/cifar10_resnet32_k15_infopro").boundaries
    last = min(boundary.span for boundary in windows if boundary.span.stop == 14)
    image, label = next(boundary.weights for boundary in windows if boundary.span == last)
    assert (image / 4, label) == pytest.approx((0.357, 0.036), abs=5e-4)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if recipe(name).about.form == "release"])
def test_released_forms_say_so_in_their_method(name: str) -> None:
    """The last part that has the switch uses it, which counts for the parts before it too."""
    parts = [(part, {}) if isinstance(part, str) else next(iter(part.items())) for part in recipe(name).method]
    switched = [
        bool((options or {}).get("released"))
        for part, options in parts
        if "released" in inspect.signature(getattr(localgrad.methods, part)).parameters
    ]
    assert switched[-1:] in ([], [True])


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_is_the_published_one(name: str) -> None:
    one = recipe(name)
    assert one.optim.momentum is None and one.data.validation == 0 and one.data.augment
    if one.data.name == "cityscapes":
        assert (one.optim.lr, one.optim.min_lr, one.optim.weight_decay) == (0.01, 1e-4, 5e-4)
        assert (
            one.optim.schedule == "poly"
            and one.optim.options == {"nesterov": False}
            and one.data.crop_size == (512, 1024)
        )
        assert abs(one.train.epochs * 2975 / one.train.batch_size - 40_000) < 200
        return
    if one.data.name == "coco":
        assert (one.optim.weight_decay, one.optim.clip_grad, one.optim.options) == (1e-4, 1.0, {"nesterov": False})
        assert (one.data.image_size, one.data.longest_side, one.train.batch_size) == (600, 1000, 16)
        iterations = one.train.epochs * 118_287 / 16
        assert abs(iterations - 90_000) < 2000
        rates = {
            k: learning_rate(one.optim, int(k / 90 * 12), k / 90 * 12 % 1, 12) for k in (0, 59.9, 60.1, 79.9, 80.1)
        }
        assert rates == pytest.approx({0: 0.01, 59.9: 0.01, 60.1: 0.001, 79.9: 0.001, 80.1: 0.0001})
        return
    assert not one.optim.options  # momentum of 0.9 in Nesterov's form
    if one.data.name != "imagefolder":
        small = one.data.name == "stl10"
        assert (one.optim.lr, one.train.batch_size) == ((0.1, 128) if small else (0.8, 1024))
        assert one.optim.schedule == "paper" and one.optim.weight_decay == 1e-4
        assert one.train.epochs == (400 if not one.about.paper.startswith("InfoPro") else 160)
    elif "vit" in one.model.name:
        assert (one.optim.name, one.optim.lr, one.optim.weight_decay) == ("adamw", 1e-3, 0.05)
        assert (one.train.batch_size, one.train.epochs) == (1024, 90)
    else:
        assert one.optim.lr / one.train.batch_size == pytest.approx(0.05 / 128)
        epochs = {"AugLocal": 200, "MLAAN": 150}.get(one.about.paper.partition(",")[0], 90)
        assert (one.train.epochs, one.optim.schedule, one.optim.warmup_epochs) == (epochs, "cosine", 0)


def test_infopro_k16_trains_every_block() -> None:
    one = recipe("infopro/cifar10_resnet110_k16")
    network = build_network(one, build_task(one, 10, (0.5,) * 3, (0.25,) * 3), (3, 32, 32), torch.device("cpu"))
    assert network.num_blocks == 16 and len(network.auxiliary) == 15
    localgrad.backward(network, torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 1]))
    for k in range(16):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters_of(k))


def test_man_pp_heads_have_the_published_size() -> None:
    one = recipe("man_pp/cifar10_resnet32_k9_dgl")
    network = build_network(one, build_task(one, 10, (0.5,) * 3, (0.25,) * 3), (3, 32, 32), torch.device("cpu"))
    found = {sum(p.numel() for p in aux.heads.parameters()) for aux in network.auxiliary.values()}
    assert min(found) == 635_146  # on 16 channels


def test_vision_transformers_are_those_of_man_pp() -> None:
    """LayerNorm after the patch embedding, eps 1e-6 in all of them, heads included; two units and a twin."""
    one = recipe("man_pp/imagenet_vit_tiny_k4_linear")
    one = dataclasses.replace(one, model=dataclasses.replace(one.model, options={**one.model.options, "img_size": 32}))
    network = build_network(one, build_task(one, 10, (0.5,) * 3, (0.25,) * 3), (3, 32, 32), torch.device("cpu"))
    assert isinstance(network.model.patch_embed.norm, torch.nn.LayerNorm)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6} and len(norms) == 1 + 24 + 1 + 3 * (1 + 2 * 3)
    assert all(isinstance(auxiliary.heads[0][1], torch.nn.LayerNorm) for auxiliary in network.auxiliary.values())


# --- costs, and the list ---------------------------------------------------------------------------------------------


def test_every_recipe_has_measured_costs() -> None:
    costs = recipe_costs()
    assert list(costs) == sorted(NAMES)
    for name, cost in costs.items():
        one = recipe(name)
        assert cost["blocks"] == len(starts_of(one)) + 1
        flops = cost["flops"] * cost["images"] * one.train.epochs
        assert cost["pflops"] == pytest.approx(flops / 1e15, rel=1e-3)
        if one.method == ["e2e"]:
            assert cost["flops"] == cost["e2e_flops"] and cost["activation_bytes"] == cost["e2e_activation_bytes"]
            assert cost["auxiliary_parameters"] == cost["twin_parameters"] == 0
        else:
            assert cost["activation_bytes"] < 2.5 * cost["e2e_activation_bytes"]  # MLAAN on unpooled features


@pytest.mark.parametrize("name", ["digits", "man/cifar10_resnet32_k8_dgl", "hpff/cifar10_resnet32_k15_infopro"])
def test_costs_are_what_is_measured_now(name: str) -> None:
    bench = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "recipe_costs.py"))
    found, kept = bench["entry"](recipe(name)), recipe_costs()[name]
    assert found.pop("activation_bytes") == pytest.approx(kept.pop("activation_bytes"), rel=0.05)
    assert found.pop("e2e_activation_bytes") == pytest.approx(kept.pop("e2e_activation_bytes"), rel=0.05)
    assert found == kept


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["list", "recipes", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_list_fits_and_can_be_narrowed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = listed(capsys)
    assert all(name in said for name in NAMES) and max(map(len, said.splitlines())) <= 120
    said = listed(capsys, "man")
    assert "MAN, ECCV 2024, arXiv:2407.05623" in said and "test error 9.77 %" in said and "man_pp/" not in said
    (row,) = (line for line in said.splitlines() if "man/cifar10_resnet32_k8_dgl" in line)
    assert row.split()[1:6] == ["DGL", "+", "MAN,", "K=8", "rebuilt"]
    assert row.split()[-4:] == ["1.71", "0.50", "1.78", "14.2"]
    assert "release" in next(line for line in said.splitlines() if "man/cifar10_resnet32_k8_infopro" in line)
    rows = json.loads(listed(capsys, "vit_tiny", "--json"))
    assert [row["name"] for row in rows] == ["e2e/imagenet_vit_tiny_k1", "man_pp/imagenet_vit_tiny_k4_linear"]
    assert rows[1]["options"] == [{"dgl": {"head": "linear"}}, {"man_pp": {"depth": 2, "released": True}}]
    assert rows[1]["form"] == "reconstruction"
    assert rows[1]["cost"] == recipe_costs()["man_pp/imagenet_vit_tiny_k4_linear"]


@pytest.mark.parametrize(
    ("arguments", "words"), [(["recipes", "xyzzy"], "folders: auglocal"), (["data", "man"], "'man'")]
)
def test_what_cannot_be_listed(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["list", *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err
