"""What a run is: dataclasses, and one validation."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from localgrad.errors import ConfigError
from localgrad.spec import MethodSpec, complaints, method_name, refuse_booleans

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(kw_only=True)
class ModelConfig:
    """``name`` as `localgrad.models.create` takes it, ``options`` for the constructor.

    ``weights`` is a local file with pretrained weights, see `localgrad.models.load_pretrained`. BatchNorm is
    ``learned``, ``frozen``, or takes its statistics over all processes (``sync``).
    """

    name: str = "resnet32"
    weights: str | None = None
    batchnorm: Literal["learned", "frozen", "sync"] = "learned"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DataConfig:
    """As `localgrad.data.load` takes it, `localgrad.data.masks.load` for masks, `localgrad.data.boxes.load` for boxes,
    `localgrad.data.text.load` for text.

    ``validation`` is the share of training images that select the best epoch. ``image_size`` is the side of square
    images, [height, width] with masks, either that or the shorter side with boxes; ``crop_size`` and ``scale`` are for
    masks only, ``longest_side`` for boxes, ``on_damage`` for image files of every kind, ``context`` (tokens of a
    sequence) and ``tokenizer`` for text.
    """

    name: str = "cifar10"
    root: str | None = None
    image_size: int | tuple[int, int] | None = None
    crop_size: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    longest_side: int | None = None
    on_damage: Literal["raise", "skip"] = "raise"
    validation: float = 0.1
    limit: int | None = None
    augment: bool = True
    workers: int = 0
    context: int = 256
    tokenizer: str | int = "bytes"

    def __post_init__(self) -> None:
        _require(0 <= self.validation < 1, f"data.validation={self.validation}; it must be a fraction in [0, 1)")
        _whole("data.workers", self.workers, 0, _PROCESSES)
        _whole("data.limit", self.limit, 1, _MOST)
        _whole("data.context", self.context, 2, 2**16)
        for name in ("image_size", "crop_size", "longest_side"):
            sides = getattr(self, name)
            for side in sides if isinstance(sides, tuple) else (sides,):
                _whole(f"data.{name}", side, 1, 2**16)
        _require(
            0 < self.scale[0] <= self.scale[1] < math.inf,
            f"data.scale={list(self.scale)}; write [lowest, highest], both positive",
        )


@dataclass(kw_only=True)
class BlocksConfig:
    """Where to cut, see `localgrad.cuts`; exactly one of ``num_blocks`` and ``cuts``, names of modules.

    ``balance`` goes with ``num_blocks``, ``stem`` with ``num_blocks`` balanced by count.
    """

    num_blocks: int | None = None
    cuts: list[str] | None = None
    balance: Literal["count", "bytes"] = "count"
    stem: Literal["unit", "own", "merged"] = "unit"


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, clipping, and when it steps.

    ``name`` is ``sgd``, ``adamw``, a class of ``torch.optim`` such as ``NAdam``, or ``module:Class``; ``options`` are
    further arguments. Classes get ``lr``, and ``weight_decay`` if they take it. ``momentum`` is that of ``sgd``, 0.9 if
    None, in Nesterov's form unless ``options`` have ``nesterov: false``.
    ``schedule``: ``cosine`` falls to 0 step by step after ``warmup_epochs`` of linear warm-up; ``paper`` is the
    per-epoch cosine of the papers with their warm-up from 0.01; ``poly`` falls to ``min_lr`` as ``(1 - share) ** 0.9``,
    step by step; ``step`` is divided by 10 after 2/3 and 8/9 of the run; ``constant`` stays.
    ``clip_grad`` limits the gradient norm of each group of blocks that share a span: one block in local learning, all
    of them in end-to-end training. ``per_block`` steps a block as soon as its last span ran and frees its gradients;
    ``in_backward`` steps each parameter of end-to-end training as soon as its gradient is there, and frees that.
    """

    name: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.1
    momentum: float | None = None
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "paper", "poly", "step", "constant"] = "cosine"
    min_lr: float = 0.0
    warmup_epochs: int = 0
    clip_grad: float | None = None
    per_block: bool = False
    in_backward: bool = False

    def __post_init__(self) -> None:
        _require(self.lr > 0 and math.isfinite(self.lr), f"optim.lr={self.lr}; it must be a positive number")
        if self.momentum is not None:
            _require(0 <= self.momentum < 1, f"optim.momentum={self.momentum}; it must be at least 0 and below 1")
            _require(
                self.name == "sgd",
                f"optim.momentum={self.momentum} is that of sgd; write optim.options.momentum={self.momentum} if "
                f"{self.name} takes it",
            )
        _require(
            self.weight_decay >= 0 and math.isfinite(self.weight_decay),
            f"optim.weight_decay={self.weight_decay}; it must be a number of at least 0",
        )
        _require(
            self.min_lr == 0 or (0 < self.min_lr < self.lr and self.schedule == "poly"),
            f"optim.min_lr={self.min_lr}; a rate below optim.lr, with optim.schedule=poly only",
        )
        _whole("optim.warmup_epochs", self.warmup_epochs, 0, _MOST)
        _require(
            self.clip_grad is None or 0 < self.clip_grad < math.inf,
            f"optim.clip_grad={self.clip_grad}; a positive norm or null",
        )


@dataclass(kw_only=True)
class TrainConfig:
    """The loop. ``checkpoint_every`` counts steps; a checkpoint is also written after each epoch.

    ``capture`` records whole steps as CUDA graphs and replays them: ``auto`` wherever that is possible on CUDA, true or
    else not at all, false never. ``compile`` compiles the modules between the cuts and the auxiliary networks.
    ``resident`` keeps weights, gradients and optimizer state on the device only while their block runs.
    ``profile`` is a step, from which on three steps are traced. ``loggers`` are told of each epoch, see
    `localgrad.train.loggers`: ``csv``, ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``, or ``module:Class``.
    """

    epochs: int = 10
    batch_size: int = 128
    eval_batch_size: int = 500
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: float | None = None
    compile: bool = False
    capture: Literal["auto"] | bool = "auto"
    channels_last: bool = False
    resident: bool = False
    seed: int = 0
    deterministic: bool = False
    device: str = "auto"
    threads: int | None = None
    checkpoint_every: int | None = None
    profile: int | None = None
    loggers: list[str] = field(default_factory=lambda: ["csv"])

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "checkpoint_every"):
            _whole(f"train.{name}", getattr(self, name), 1, _MOST)
        _whole("train.profile", self.profile, 1, _MOST)
        _whole("train.threads", self.threads, 1, _PROCESSES)
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"train.ema_decay={self.ema_decay}; it must lie between 0 and 1, or null",
        )


@dataclass(kw_only=True)
class About:
    """Where a recipe comes from; ``localgrad list recipes`` shows it.

    ``form`` says whether method, heads and losses are those of the authors' released code (``release``), of the paper
    where the code differs (``paper``), or put together from what is known (``reconstruction``); ``notes`` say what is
    not. ``published`` is the result in its table, or "none found"; ``evidence`` says who vouches for that number.
    """

    paper: str = ""
    table: str = ""
    form: Literal["", "release", "paper", "reconstruction"] = ""
    published: str = ""
    evidence: str = ""
    notes: str = ""


@dataclass(kw_only=True)
class Config:
    """One run. ``beside`` lists methods trained with the same settings for comparison.

    ``task`` are options of the task that the data are for, as its function in `localgrad.tasks` takes them; ``name``
    among them is ``regression``, which learns class indices as numbers, or ``module:function`` of a task of the user's.
    Models, methods and data may be named so too.
    """

    method: MethodSpec
    task: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    beside: list[MethodSpec] = field(default_factory=list)
    about: About = field(default_factory=About)


_MOST, _PROCESSES = 10**9, 1024  # that are counted; threads and processes of one run


def _whole(name: str, value: int | None, least: int, most: int) -> None:
    _require(value is None or least <= value <= most, f"{name}={value}; it must be at least {least}, at most {most}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def validate(settings: dict[str, Any], source: str) -> Config:
    """Turn settings into a `Config`.

    Args:
        settings: nested mapping.
        source: what to call it in messages.

    Raises:
        ConfigError: a key that does not exist, a wrong type, a value out of range.
    """
    from pydantic import ValidationError

    for section, kind in {f.name: f.default_factory for f in dataclasses.fields(Config)}.items():
        if dataclasses.is_dataclass(kind) and isinstance(values := settings.get(section), dict):
            for name, hint in typing.get_type_hints(kind).items():
                refuse_booleans(f"{source}: {section}.{name}", values.get(name), hint)
    try:
        return _adapter().validate_python(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(complaints(error, _keys))) from error


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    from pydantic import ConfigDict, TypeAdapter

    for kind in (ModelConfig, DataConfig, BlocksConfig, OptimConfig, TrainConfig, About, Config):
        kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[union-attr]
    return TypeAdapter(Config)


def _keys(place: Sequence[str]) -> list[str]:
    kind: Any = Config
    for part in place:
        found = {f.name: f.default_factory for f in dataclasses.fields(kind)}.get(part)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            return []
        kind = found
    return [f.name for f in dataclasses.fields(kind)]


def dump(config: Config) -> str:
    """The whole configuration as YAML that `validate` reads back."""
    import yaml

    settings = dataclasses.asdict(config)
    for section in ("optim", "data"):
        settings[section] = {k: list(v) if isinstance(v, tuple) else v for k, v in settings[section].items()}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def folder_name(name: str) -> str:
    """What the folder of a run by the method ``name`` is called."""
    return name.replace("+", "-").replace(":", "-")


def run_names(config: Config) -> list[str]:
    """What the configured method and those beside it are called, in that order; a name that repeats gets a number."""
    names: list[str] = []
    for spec in [config.method, *config.beside]:
        name = method_name(spec)
        repeats = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", known) is not None for known in names)
        names.append(f"{name}-{repeats + 1}" if repeats else name)
    return names
