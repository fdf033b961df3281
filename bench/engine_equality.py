"""Does a new engine compute the gradients of the one before it, bit for bit? Many networks, five methods, one machine.

PYTHONPATH=OLD/src python bench/engine_equality.py save DIR --old   # the traced engine of 4d59f19
python bench/engine_equality.py compare DIR                         # this one: a table, and exit status 1 if not
python bench/engine_equality.py compare DIR --only 'vit*' --only resnet20 --method dgl

``save`` cuts each network into blocks of equally many units and writes DIR/NETWORK-METHOD.safetensors for each method:
inputs, targets, ``state_dict()`` before the step (auxiliary networks included), and what one step of
``localgrad.backward`` leaves: every parameter's gradient, and every buffer. PGL makes two steps, the first guided, the
second not. DIR/NETWORK-METHOD.json holds the names of the cuts and the settings, or why the library refuses.
``compare`` builds the same model, cuts it there, loads that state, makes the same steps and compares with
`torch.equal`. Where the old library refused, it says only whether this one does too.

``--old`` is for the traced engine of 4d59f19, whose ``localize`` takes ``num_blocks=`` and ``cuts=`` where later ones
take one value. With it, ``compare`` says whether that engine equals itself.

Weights are random; vectors (biases, scales of norms and layers) and what is zero get noise, since at their usual 0, 1
or 1e-6 many gradients would be zero. Dropout and stochastic depth are on where a network has them. Large networks are
narrow ones of the same class, so that all files together take a few gigabytes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.layers import GroupNorm1
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convmixer import ConvMixer
from timm.models.metaformer import MetaFormer, Pooling
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.vgg import make_layers

import localgrad
from localgrad import LocalNetwork, MethodError, PartitionError, backward, keyed_randomness, localize, methods, models
from localgrad.tasks import classification

BATCH, CLASSES, SEED, NUM_BLOCKS = 4, 10, 0, 4
TASK = classification(CLASSES)
METHODS = {
    "dgl": methods.dgl(TASK),
    "man_pp": methods.man_pp(methods.dgl(TASK)),
    "mlaan": methods.mlaan(methods.dgl(TASK)),
    "pgl": methods.pgl(methods.dgl(TASK), every=2),
    "auglocal": methods.auglocal(TASK),
}
STEPS = {name: (0, 1) if name == "pgl" else (0,) for name in METHODS}
Where = int | tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """A network, the side of the images it is run on, and into how many blocks it is cut."""

    size: int
    build: Callable[[], nn.Module]
    num_blocks: int = NUM_BLOCKS


def of(library: str, name: str, size: int = 64, num_blocks: int = NUM_BLOCKS, **options: Any) -> Subject:
    """A network of a library, by its name there; none for one of ours."""
    full = f"{library}:{name}" if library else name
    return Subject(size, partial(models.create, full, num_classes=CLASSES, image_size=size, **options), num_blocks)


def vgg() -> nn.Module:
    """VGG-11 with batch normalisation, a quarter as wide, with the classifier's dropout."""
    widths: list[str | int] = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
    model = torchvision.models.VGG(make_layers(widths, batch_norm=True), num_classes=CLASSES, init_weights=False)
    hidden = [nn.Linear(512, 256), nn.ReLU(True), nn.Dropout(), nn.Linear(256, 256), nn.ReLU(True), nn.Dropout()]
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(*hidden, nn.Linear(256, CLASSES))
    return model


def convnext() -> nn.Module:
    """ConvNeXt with stochastic depth."""
    widths = (32, 64, 128, 192)
    stages = [CNBlockConfig(a, b, 2) for a, b in zip(widths, (*widths[1:], None), strict=True)]
    return torchvision.models.ConvNeXt(stages, stochastic_depth_prob=0.2, num_classes=CLASSES)


def efficientnet() -> nn.Module:
    """EfficientNet-B0, half as wide, with dropout and stochastic depth."""
    stages = (
        (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
    )  # fmt: skip
    settings = [MBConvConfig(*stage, width_mult=0.5, depth_mult=1.0) for stage in stages]
    return torchvision.models.EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.2, num_classes=CLASSES)


def swin() -> nn.Module:
    """Swin with stochastic depth."""
    return torchvision.models.SwinTransformer(
        [4, 4], 32, [2, 2, 2, 2], [2, 4, 8, 16], [4, 4], stochastic_depth_prob=0.2, num_classes=CLASSES
    )


def vit() -> nn.Module:
    """torchvision's vision transformer with dropout."""
    return torchvision.models.VisionTransformer(
        32, 8, 6, 4, 128, 256, dropout=0.1, attention_dropout=0.1, num_classes=CLASSES
    )


def poolformer() -> nn.Module:
    """PoolFormer with stochastic depth."""
    return MetaFormer(
        depths=(2, 2, 2, 2), dims=(32, 64, 128, 192), token_mixers=Pooling, norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5, res_scale_init_values=None, use_mlp_head=False, drop_path_rate=0.1,
        num_classes=CLASSES,
    )  # fmt: skip


def repvgg() -> nn.Module:
    """RepVGG with its parallel branches."""
    stages = [ByoBlockCfg("rep", depth, width, s=2, gs=0) for depth, width in ((2, 24), (4, 48), (6, 96), (1, 192))]
    return ByobNet(ByoModelCfg(tuple(stages), stem_type="rep", stem_chs=24), num_classes=CLASSES)


class Logits(nn.Module):
    """A classifier of transformers that returns its logits."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """The logits of a batch of images."""
        return self.classifier(pixel_values=images).logits


def transformers_swin() -> nn.Module:
    """Swin of transformers, with its dropout and stochastic depth."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=64,
        embed_dim=24,
        depths=[2, 2, 4, 2],
        window_size=2,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1,  # type: ignore[call-arg]
    )
    return Logits(SwinForImageClassification(config))


MIXER = partial(MlpMixer, CLASSES, 64, patch_size=16, num_blocks=6, embed_dim=192, drop_path_rate=0.1)
NETWORKS = {
    "resnet20": of("", "resnet20", 32),
    "resnet32": of("", "resnet32", 32),
    "resnet18": of("torchvision", "resnet18", 64, 3),
    "resnet50": of("timm", "resnet50", channels=(16, 32, 64, 128), drop_path_rate=0.1),
    "vgg11_bn": Subject(64, vgg),
    "densenet121": Subject(64, partial(torchvision.models.DenseNet, 12, (6, 12, 24, 16), 24, num_classes=CLASSES)),
    "mobilenet_v3_small": of("torchvision", "mobilenet_v3_small"),
    "efficientnet_b0": Subject(64, efficientnet),
    "convnext": Subject(64, convnext),
    "swin": Subject(64, swin),
    "vit": Subject(32, vit),
    "regnet_y_400mf": of("torchvision", "regnet_y_400mf"),
    "shufflenet_v2_x1_0": of("torchvision", "shufflenet_v2_x1_0"),
    "googlenet": of("torchvision", "googlenet", 64, 3),
    "squeezenet1_1": of("torchvision", "squeezenet1_1"),
    "mnasnet0_5": of("torchvision", "mnasnet0_5"),
    "vit_tiny": of("timm", "vit_tiny_patch16_224", embed_dim=96, depth=8, drop_rate=0.1, drop_path_rate=0.1),
    "deit3_small": of("timm", "deit3_small_patch16_224", embed_dim=96, depth=8, num_heads=3, drop_path_rate=0.1),
    "mixer": Subject(64, MIXER),
    "resmlp": Subject(64, partial(MIXER, block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4)),
    "convmixer": Subject(32, partial(ConvMixer, dim=96, depth=8, kernel_size=7, patch_size=4, num_classes=CLASSES)),
    "poolformer": Subject(64, poolformer),
    "resnetv2_50": of("timm", "resnetv2_50", layers=(2, 2, 2, 2), channels=(64, 128, 256, 512)),
    "regnetx_002": of("timm", "regnetx_002"),
    "coat_lite_tiny": of("timm", "coat_lite_tiny", drop_path_rate=0.1),
    "levit_128s": of("timm", "levit_128s", 128, embed_dim=(64, 96, 128), num_heads=(2, 3, 4)),
    "cait_xxs24": of("timm", "cait_xxs24_224", embed_dim=96, depth=8, num_heads=3, drop_path_rate=0.1),
    "xcit_nano_12": of("timm", "xcit_nano_12_p16_224", drop_path_rate=0.1),
    "swinv2_tiny": of(
        "timm", "swinv2_tiny_window8_256", embed_dim=24, depths=(2, 2, 2, 2), window_size=4, patch_size=2,
        drop_path_rate=0.1,
    ),
    "edgenext_xx_small": of("timm", "edgenext_xx_small", drop_path_rate=0.1),
    "mobilevit_xxs": of("timm", "mobilevit_xxs"),
    "ghostnet_050": of("timm", "ghostnet_050", drop_rate=0.2),
    "repvgg": Subject(64, repvgg),
    "dla46_c": of("timm", "dla46_c"),
    "nfnet": of("timm", "test_nfnet", drop_path_rate=0.1),
    "pvt_v2_b0": of("timm", "pvt_v2_b0", drop_path_rate=0.1),
    "efficientvit_b0": of("timm", "efficientvit_b0"),
    "fastvit_t8": of("timm", "fastvit_t8", drop_path_rate=0.1),
    "maxvit": of("timm", "test_maxvit", drop_path_rate=0.1),
    "transformers_swin": Subject(64, transformers_swin),
}  # fmt: skip


def built(subject: Subject) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in training mode, a batch, and its classes."""
    torch.manual_seed(SEED)
    model = subject.build().train()
    return model, torch.randn(BATCH, 3, subject.size, subject.size), torch.randint(CLASSES, (BATCH,))


def cut(subject: Subject, method: str, where: Where, old: bool) -> tuple[LocalNetwork, Tensor, Tensor]:
    """The model in blocks, a number of them or those that begin at given modules, with the batch and its classes."""
    model, inputs, targets = built(subject)
    if old:
        chosen: dict[str, Any] = {"num_blocks" if isinstance(where, int) else "cuts": where}
        return localize(model, METHODS[method], example=inputs, **chosen), inputs, targets
    return localize(model, METHODS[method], where, example=inputs), inputs, targets


@torch.no_grad()
def roughen(network: LocalNetwork) -> None:
    """Add noise to vectors and to what is zero."""
    for parameter in network.parameters():
        if parameter.numel() == max(parameter.shape, default=1) or not parameter.any():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def stepped(network: LocalNetwork, inputs: Tensor, targets: Tensor, steps: Sequence[int]) -> dict[str, Tensor]:
    """Every gradient after each of some steps, and every buffer after the last."""
    found: dict[str, Tensor] = {}
    with keyed_randomness(seed=SEED):
        for step in steps:
            network.zero_grad(set_to_none=True)
            backward(network, inputs, targets, step=step)
            gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            found |= {f"gradient {step} {name}": gradient.clone() for name, gradient in gradients.items()}
    return found | {f"buffer {name}": buffer.clone() for name, buffer in network.named_buffers()}


def first_line(error: Exception) -> str:
    """What an error says, in one line that a cell of a table can hold."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".replace("|", "/")


def save(folder: Path, names: Sequence[str], chosen: Sequence[str], old: bool) -> int:
    """Write the files of each combination; the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    refused = 0
    for name in names:
        started = time.monotonic()
        subject = NETWORKS[name]
        where = tuple(point.name for point in cut(subject, "dgl", subject.num_blocks, old)[0].cuts)
        for method in chosen:
            row = recorded(folder / f"{name}-{method}", subject, method, where, old)
            row |= {"network": name, "method": method, "cuts": where, "image_size": subject.size, "batch": BATCH}
            row |= {"steps": STEPS[method], "seed": SEED, "versions": versions(), "localgrad": localgrad.__file__}
            (folder / f"{name}-{method}.json").write_text(json.dumps(row, indent=2) + "\n")
            refused += row["refused"] is not None
            counts = row["refused"] or f"{row['gradients']} gradients, {row['zero']} of them zero"
            print(f"{name} {method}: {counts}", file=sys.stderr)
        print(f"{name}: {time.monotonic() - started:.1f} s, cut at {', '.join(where)}", file=sys.stderr)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    total = len(names) * len(chosen)
    print(f"{len(names)} networks, {len(chosen)} methods: {total - refused} saved, {refused} refused; {size:.2f} GB")
    return 0


def recorded(stem: Path, subject: Subject, method: str, where: Where, old: bool) -> dict[str, Any]:
    """Write the tensors of one combination; how many gradients there are, or why it is refused."""
    for suffix in (".json", ".safetensors"):
        Path(f"{stem}{suffix}").unlink(missing_ok=True)
    try:
        network, inputs, targets = cut(subject, method, where, old)
        roughen(network)
        tensors = {"inputs": inputs, "targets": targets}
        tensors |= {f"state {name}": value.clone() for name, value in network.state_dict().items()}
        tensors |= stepped(network, inputs, targets, STEPS[method])
    except (MethodError, PartitionError) as error:
        return {"refused": first_line(error)}
    gradients = [value for name, value in tensors.items() if name.startswith("gradient ")]
    if not all(value.isfinite().all() for value in gradients):
        raise ArithmeticError(f"{stem.name}: a gradient is not finite, so that it equals nothing; take other weights")
    save_file({name: value.contiguous() for name, value in tensors.items()}, f"{stem}.safetensors")
    return {"refused": None, "gradients": len(gradients), "zero": sum(not value.any() for value in gradients)}


def versions() -> dict[str, str]:
    """Of the libraries that compute, beside localgrad itself."""
    return {module.__name__: module.__version__ for module in (torch, torchvision, timm)}


@dataclass(frozen=True)
class Verdict:
    """A cell of the table, and what it counts as."""

    kind: Literal["equal", "refused", "different"]
    text: str


def compare(folder: Path, names: Sequence[str], chosen: Sequence[str], old: bool) -> int:
    """Print the table; the exit status."""
    print(f"localgrad at {localgrad.__file__}, tensors in {folder}\n")
    print(f"| network | {' | '.join(chosen)} |\n|---|{'---|' * len(chosen)}")
    verdicts = []
    for name in names:
        row = [verdict(folder / f"{name}-{method}", NETWORKS[name], method, old) for method in chosen]
        print(f"| {name} | {' | '.join(shorten(cell.text, 300, placeholder=' ...') for cell in row)} |", flush=True)
        verdicts += [cell.kind for cell in row]
    counts = {kind: verdicts.count(kind) for kind in ("equal", "refused", "different")}
    print(f"\n{', '.join(f'{count} {kind}' for kind, count in counts.items())}")
    return 1 if counts["different"] or not counts["equal"] else 0


def verdict(stem: Path, subject: Subject, method: str, old: bool) -> Verdict:
    """Whether one combination computes what was saved."""
    sidecar = Path(f"{stem}.json")
    if not sidecar.exists():
        return Verdict("different", "not saved")
    settings = json.loads(sidecar.read_text())
    before = settings["refused"]
    try:
        network, inputs, targets = cut(subject, method, tuple(settings["cuts"]), old)
        if before is not None:
            stepped(network, inputs, targets, settings["steps"])
            return Verdict("refused", f"works, was refused ({before})")
        saved = load_file(f"{stem}.safetensors")
        state = {name.removeprefix("state "): value for name, value in saved.items() if name.startswith("state ")}
        if mismatch := mismatched(network, state):
            return Verdict("different", f"another state: {mismatch}")
        with torch.no_grad():  # some models' load_state_dict asks for metadata, which the file does not hold
            for key, value in network.state_dict().items():
                value.copy_(state[key])
        found = stepped(network, saved["inputs"], saved["targets"], settings["steps"])
    except (MethodError, PartitionError) as error:
        kind: Literal["refused", "different"] = "different" if before is None else "refused"
        return Verdict(kind, f"refused{' now' if before is None else ''} ({first_line(error)})")
    except Exception as error:  # an engine in the making may fail in any way; the other cells still count
        return Verdict("different", f"fails ({first_line(error)})")
    text = difference(
        found, {name: value for name, value in saved.items() if name.startswith(("gradient ", "buffer "))}
    )
    if text and settings["versions"] != versions():
        text += f"; saved with {settings['versions']}".replace("'", "")
    return Verdict("different" if text else "equal", text or "equal")


def mismatched(network: LocalNetwork, state: dict[str, Tensor]) -> str:
    """How the names and shapes of a network's state differ from those saved; empty if they do not."""
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if not wrong:
        return ""
    shapes = " now, ".join(str(shapes.get(wrong[0], "missing")) for shapes in (own, saved))
    return f"{len(wrong)} of {len(saved)} tensors, `{wrong[0]}` {shapes} saved"


def difference(found: dict[str, Tensor], saved: dict[str, Tensor]) -> str:
    """How many tensors are not equal, and by how much at most, relative to the largest entry; empty if all are."""
    wrong: dict[str, float] = {}
    for name in sorted(found.keys() & saved.keys()):
        if found[name].shape != saved[name].shape:
            wrong[name] = math.inf
        elif not torch.equal(found[name], saved[name]):
            ours, theirs = found[name].double(), saved[name].double()
            wrong[name] = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300))
    parts = []
    if wrong:
        worst = max(wrong, key=wrong.__getitem__)
        parts.append(f"{len(wrong)} of {len(saved)} tensors differ, at most by {wrong[worst]:.1e} (`{worst}`)")
    for when, only in (("before", saved.keys() - found.keys()), ("now", found.keys() - saved.keys())):
        if only:
            parts.append(f"{len(only)} only {when} (`{min(only)}`)")
    return "; ".join(parts)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("do", choices=("save", "compare"))
parser.add_argument("folder", type=Path)
parser.add_argument("--old", action="store_true", help="the package at hand is the traced engine of 4d59f19")
parser.add_argument("--only", action="append", metavar="PATTERN", help="networks called like this; may be repeated")
parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated; none for all")
arguments = parser.parse_args()
names = [name for name in NETWORKS if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only or ["*"])]
if not names:
    parser.error(f"no network is called like {arguments.only}; there are {', '.join(NETWORKS)}")
torch.set_num_threads(1)
warnings.simplefilter("ignore")
run = {"save": save, "compare": compare}[arguments.do]
sys.exit(run(arguments.folder, names, arguments.method or list(METHODS), arguments.old))
