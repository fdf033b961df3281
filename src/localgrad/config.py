"""What a run is: dataclasses, recipes that extend one another, dotted overrides, one validation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localgrad.errors import ConfigError, MethodError, nearest

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from torch import nn

    from localgrad.method import Method
    from localgrad.task import Task

# What a YAML file may hold for one method: a name, or {name: {option: value}}; from the base to the outermost plug-in.
MethodSpec = list[str | dict[str, dict[str, Any] | None]]


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
    """As `localgrad.data.load` takes it, `localgrad.data.masks.load` for masks, `localgrad.data.boxes.load` for boxes.

    ``validation`` is the share of training images that select the best epoch. ``image_size`` is the side of square
    images, [height, width] with masks, either that or the shorter side with boxes; ``crop_size`` and ``scale`` are for
    masks only, ``longest_side`` for boxes, ``on_damage`` for both.
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

    ``schedule``: ``cosine`` falls to 0 step by step after ``warmup_epochs`` of linear warm-up; ``paper`` is the
    per-epoch cosine of the papers with their warm-up from 0.01; ``poly`` falls to ``min_lr`` as ``(1 - share) ** 0.9``,
    step by step; ``step`` is divided by 10 at each of the ``milestones``, shares of the run; ``constant`` stays.
    ``clip_grad`` limits the gradient norm of each group of blocks that share a span: one block in local learning, all
    of them in end-to-end training. ``per_block`` steps a block as soon as its last span ran and frees its gradients;
    ``offload`` then keeps the optimizer's state of all but two blocks on the host.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "paper", "poly", "step", "constant"] = "cosine"
    min_lr: float = 0.0
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    warmup_epochs: int = 0
    clip_grad: float | None = None
    per_block: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        _require(self.lr > 0 and math.isfinite(self.lr), f"optim.lr={self.lr}; it must be a positive number")
        _require(0 <= self.momentum < 1, f"optim.momentum={self.momentum}; it must be at least 0 and below 1")
        _require(
            self.weight_decay >= 0 and math.isfinite(self.weight_decay),
            f"optim.weight_decay={self.weight_decay}; it must be a number of at least 0",
        )
        _require(
            all(0 <= b < 1 for b in self.betas), f"optim.betas={list(self.betas)}; both must be at least 0 and below 1"
        )
        _require(
            self.min_lr == 0 or (0 < self.min_lr < self.lr and self.schedule == "poly"),
            f"optim.min_lr={self.min_lr}; a rate below optim.lr, with optim.schedule=poly only",
        )
        _require(
            all(0 < a < b <= 1 for a, b in itertools.pairwise((*self.milestones, 1))),
            f"optim.milestones={list(self.milestones)}; write rising shares of the run, between 0 and 1",
        )
        _require(self.warmup_epochs >= 0, f"optim.warmup_epochs={self.warmup_epochs}; it must be at least 0")
        _require(
            self.clip_grad is None or self.clip_grad > 0, f"optim.clip_grad={self.clip_grad}; a positive norm or null"
        )


@dataclass(kw_only=True)
class TrainConfig:
    """The loop. ``checkpoint_every`` counts steps; a checkpoint is also written after each epoch.

    ``capture`` records a step as a CUDA graph and replays it; dropout then draws from torch's own generators.
    """

    epochs: int = 10
    batch_size: int = 128
    eval_batch_size: int = 500
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    compile: bool = False
    capture: bool = False
    channels_last: bool = False
    seed: int = 0
    deterministic: bool = False
    device: str = "auto"
    threads: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "accumulate"):
            _require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}; it must be at least 1")
        for name in ("threads", "checkpoint_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name}={value}; it must be at least 1, or null")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), f"train.{name}={value}; it must be at least 0 (0 is off)")
        _require(
            0 <= self.label_smoothing < 1,
            f"train.label_smoothing={self.label_smoothing}; it must be at least 0 and below 1",
        )
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"train.ema_decay={self.ema_decay}; it must lie between 0 and 1, or null",
        )


@dataclass(kw_only=True)
class About:
    """Where a recipe comes from; ``localgrad list recipes`` shows it.

    ``published`` is the result in its table, or "none found"; ``evidence`` says who vouches for that number.
    """

    paper: str = ""
    table: str = ""
    published: str = ""
    evidence: str = ""
    notes: str = ""


@dataclass(kw_only=True)
class Config:
    """One run. ``beside`` lists methods trained with the same settings for comparison.

    ``task`` are options of the task that the data are for, as its function in `localgrad.tasks` takes them.
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


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


RECIPES = Path(str(resources.files("localgrad") / "recipes"))
COSTS = RECIPES / "_costs.json"


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe that ships with localgrad."""
    return {
        path.relative_to(RECIPES).with_suffix("").as_posix(): path
        for path in sorted(RECIPES.rglob("*.yaml"))
        if not path.name.startswith("_")
    }


def recipe_costs() -> dict[str, dict[str, Any]]:
    """Name -> what a recipe costs, as ``bench/recipe_costs.py`` of the repository measured it."""
    costs: dict[str, dict[str, Any]] = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}
    return costs


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, by name or as the path of a YAML file, with everything it extends merged in.

    Raises:
        ConfigError: no such recipe or file, not YAML, not a mapping, or recipes that extend each other in a circle.
    """
    return _read(_locate(name.removeprefix("recipe:"), None), ())


def _locate(name: str, beside: Path | None) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name) if beside is None or Path(name).is_absolute() else beside.parent / name
        if not path.is_file():
            raise ConfigError(f"no file {str(path)!r}; give the path of a YAML file or one of `localgrad list recipes`")
        return path
    path = RECIPES / f"{name}.yaml"
    private = path.name.startswith("_")  # only for other recipes
    if re.fullmatch(r"\w[\w/.-]*", name) and ".." not in name and path.is_file() and (beside or not private):
        return path
    raise ConfigError(nearest(name, recipes(), "recipe") + ". A file of your own ends in .yaml")


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    import yaml

    if path in chain:
        raise ConfigError(f"recipes extend each other in a circle: {' -> '.join(p.name for p in (*chain, path))}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: expected a mapping such as 'train: {{epochs: 10}}', found {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    return merge(_read(_locate(str(parent), path), (*chain, path)), content)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(settings: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Lay ``a.b=value`` over the settings; values are read as YAML.

    Raises:
        ConfigError: not of that form.
    """
    import yaml

    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(f"{assignment!r} is no setting; write section.name=value, for instance optim.lr=0.05")
        try:
            change: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{assignment!r}: {text!r} is not a YAML value") from error
        for part in reversed(key.split(".")):
            change = {part: change}
        settings = merge(settings, change)
    return settings


def validate(settings: dict[str, Any], source: str) -> Config:
    """Turn settings into a `Config`.

    Args:
        settings: nested mapping.
        source: what to call it in messages.

    Without pydantic, which machines with GPUs may lack, types are neither checked nor converted.

    Raises:
        ConfigError: a key that does not exist, a wrong type, a value out of range.
    """
    try:
        from pydantic import ValidationError
    except ImportError:
        return _unconverted(Config, settings, source)
    try:
        return _adapter().validate_python(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_complaints(error))) from error


def _unconverted(kind: Any, settings: dict[str, Any], place: str) -> Any:
    """A dataclass of nested settings, each as it was given."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in fields:
            raise ConfigError(f"{place}: {nearest(key, fields, 'setting')}")
        inner = fields[key].default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            value = _unconverted(inner, value, f"{place}: {key}")
        elif isinstance(value, list) and "tuple[" in str(fields[key].type):
            value = tuple(value)
        values[key] = value
    missing = [name for name, f in fields.items() if name not in values and _is_required(f)]
    if missing:
        raise ConfigError(f"{place}: {missing[0]} is missing")
    return kind(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    from pydantic import ConfigDict, TypeAdapter

    for kind in (ModelConfig, DataConfig, BlocksConfig, OptimConfig, TrainConfig, About, Config):
        kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[union-attr]
    return TypeAdapter(Config)


def _complaints(error: Any) -> Iterator[str]:
    for problem in error.errors()[:5]:
        place = [str(part) for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
        path = ".".join(place)
        if problem["type"] == "unexpected_keyword_argument":
            known = _keys(place[:-1])
            yield f"{path}: " + nearest(place[-1], known, "setting") if known else f"{path}: unknown setting"
        elif "ctx" in problem and isinstance(problem["ctx"].get("error"), ConfigError):
            yield str(problem["ctx"]["error"])
        elif problem["type"] == "missing_keyword_only_argument":
            yield f"{path} is missing; write its value, as in {{{path}: ...}}"
        elif problem["type"] == "missing":
            yield f"{path}: missing; for instance {path}: [dgl]" if path == "method" else f"{path}: missing"
        else:
            yield f"{path}: {problem['msg']} (got {textwrap.shorten(repr(problem['input']), 100)})"


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


def parse_method(text: str) -> MethodSpec:
    """``infopro+checkpointing`` -> ``["infopro", "checkpointing"]``."""
    parts = [part.strip() for part in text.split("+")]
    if not all(parts):
        raise ConfigError(f"method {text!r} has an empty part; write base+plugin, for instance dgl+windows")
    return list(parts)


def method_name(spec: MethodSpec) -> str:
    """``dgl+windows``: the names without their options."""
    return "+".join(part if isinstance(part, str) else next(iter(part), "?") for part in spec)


def run_names(config: Config) -> list[str]:
    """What the configured method and those beside it are called, in that order; a name that repeats gets a number."""
    names: list[str] = []
    for spec in [config.method, *config.beside]:
        name = method_name(spec)
        repeats = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", known) is not None for known in names)
        names.append(f"{name}-{repeats + 1}" if repeats else name)
    return names


def known_methods() -> dict[str, bool]:
    """Name -> whether it is a base (takes a task) or a plug-in (takes a method)."""
    from localgrad import methods

    return {
        name: next(iter(inspect.signature(getattr(methods, name)).parameters)) == "task" for name in methods.__all__
    }


def build_method(
    spec: MethodSpec,
    task: Task,
    *,
    load_model: Callable[[str], nn.Module] | None = None,
) -> Method:
    """The method a specification names, base first.

    Args:
        spec: names with their options.
        task: what the base takes.
        load_model: makes a model of an option ``teacher`` that is a path.

    Raises:
        ConfigError: an unknown name, a plug-in where a base must stand or the reverse, an unknown or wrong option.
        MethodError: parts that cannot be combined.
    """
    from localgrad import methods

    known = known_methods()
    value: Any = task
    if not spec:
        raise ConfigError("method: []; name a base, for instance method: [dgl]")
    for position, part in enumerate(spec):
        entries = {part: None} if isinstance(part, str) else part
        if len(entries) != 1:
            raise ConfigError(f"method: {part!r} must hold one name, as in {{pgl: {{every: 10}}}}")
        ((name, options),) = entries.items()
        if name not in known:
            raise ConfigError(nearest(name, known, "method"))
        if known[name] != (position == 0):
            bases = ", ".join(n for n, base in known.items() if base)
            raise ConfigError(
                f"method {method_name(spec)!r}: {name!r} is a "
                + (
                    "base and must come first; plug-ins follow it"
                    if known[name]
                    else f"plug-in; begin with one of {bases}"
                )
            )
        function = getattr(methods, name)
        allowed = list(inspect.signature(function).parameters)[1:]
        for option in options or {}:
            if option not in allowed:
                raise ConfigError(
                    f"method.{name}: {nearest(option, allowed, 'option')}"
                    if allowed
                    else f"method.{name} has no options"
                )
        given = dict(options or {})
        if isinstance(given.get("teacher"), str) and load_model is not None:
            given["teacher"] = load_model(given["teacher"])
        value = _called(function, value, given)
    if not hasattr(value, "spans"):
        raise MethodError(f"{method_name(spec)} is not a method")
    return value


def _called(function: Any, argument: Any, options: dict[str, Any]) -> Any:
    """``function(argument, **options)``, the options converted to the types it declares if pydantic is installed."""
    try:
        from pydantic import ConfigDict, ValidationError, validate_call
    except ImportError:
        return function(argument, **options)
    try:
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(_checked(function))(argument, **options)
    except ValidationError as error:
        raise ConfigError(f"method.{function.__name__}: " + "; ".join(_complaints(error))) from error


def _checked(function: Any) -> Any:
    """``function`` with its first argument, a task or a method, left to itself: pydantic checks the options only."""
    import typing

    signature = inspect.signature(function)
    hints = typing.get_type_hints(function)
    first, *rest = signature.parameters.values()
    parameters = [first.replace(annotation=Any), *(p.replace(annotation=hints.get(p.name, Any)) for p in rest)]

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = signature.replace(parameters=parameters, return_annotation=Any)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__name__ = function.__name__
    return call
