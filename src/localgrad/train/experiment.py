"""Everything a run consists of, built from its configuration, saved and restored as one."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map_only

from localgrad import cuts, data, named, tasks
from localgrad.config import BlocksConfig, Config, DataConfig, dump, validate
from localgrad.cutting import Cutting
from localgrad.errors import CheckpointError, ConfigError, TrainingError, nearest
from localgrad.localization import localize
from localgrad.models import freeze_batchnorm, load_pretrained
from localgrad.network import LocalNetwork
from localgrad.randomness import random_states, seeded, set_random_states
from localgrad.recipes import safe_yaml
from localgrad.residence import resident
from localgrad.spec import MethodSpec, build_method
from localgrad.task import Task
from localgrad.train import loggers
from localgrad.train.capture import Captured, unfit
from localgrad.train.finished import model_of, trained_model
from localgrad.train.meters import Meter, merged
from localgrad.train.optim import BUILT_IN, Stepper

# Settings that may change in mid-run, since they do not decide what it comes to.
FREE = (
    "beside", "about", "data.root", "data.workers",
    "train.checkpoint_every", "train.device", "train.threads", "train.profile", "train.loggers", "train.resident",
)  # fmt: skip
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: an unknown device, or one this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device={name!r} is no device; use auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device={name!r}; localgrad trains on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device={name!r}, but this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


@dataclass
class Experiment:
    """A run in memory.

    Attributes:
        epoch, batch, step: where it stands: batches of this epoch done, optimizer steps done.
        history: one row for each finished epoch.
        best: epoch and validation score of the best one so far; None without a validation split.
        captured: its steps as CUDA graphs, or ``capture_remark``, why ``train.capture=auto`` records none.
    """

    config: Config
    data: data.Data
    network: LocalNetwork
    stepper: Stepper
    average: nn.Module | None
    meter: Meter
    epoch: int = 0
    batch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    captured: Captured | None = None
    capture_remark: str = ""

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of forward passes."""
        return DTYPES[self.config.train.precision]

    @property
    def steps_as(self) -> str:
        """How its steps ran, if not as they are and without a word."""
        if self.network.residence is not None:
            return str(self.network.residence)
        if self.captured is not None:
            return str(self.captured)
        return f"no CUDA graphs: a step {self.capture_remark}" if self.capture_remark else ""

    @property
    def evaluated(self) -> LocalNetwork:
        """What is evaluated and exported: the averaged network if weights are averaged."""
        return self.network if self.average is None else self.average.module  # type: ignore[return-value]

    def placed(self, inputs: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """A batch on the device of the network, in its memory format."""
        inputs, targets = tree_map_only(Tensor, lambda t: t.to(self.network.device), (inputs, targets))
        if self.config.train.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the network and the state of its optimizers; every rank calls it."""
        return {
            "config": dump(self.config),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "meter": merged(self.network, self.meter).state_dict(),
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "history": self.history,
            "best": self.best,
            "random": random_states(),
        }

    def restore(self, state: dict[str, Any], path: Path, load: Callable[[], object]) -> None:
        """Continue from ``state``.

        Args:
            state: from `state`.
            path: it came from, for a message.
            load: called once the settings are found to be the same; puts back network and optimizers.

        Raises:
            CheckpointError: it belongs to a run with another model, method, data set or schedule.
        """
        try:
            saved = validate(safe_yaml(state["config"]), str(path))
            differ = list(_differences(dataclasses.asdict(saved), dataclasses.asdict(self.config)))
            if differ:
                raise CheckpointError(
                    f"{path} was written by a run with other settings ({'; '.join(differ)[:300]}); resume with the "
                    "run's own config.yaml, or start anew in another --run-dir"
                )
            load()
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.stepper.scaler.load_state_dict(state["scaler"])
            if not dist.is_initialized() or dist.get_rank() == 0:  # the sums of all ranks; the others begin with none
                self.meter.load_state_dict(state["meter"])
            self.epoch, self.batch, self.step = (state["position"][k] for k in ("epoch", "batch", "step"))
            self.history, self.best = state["history"], state["best"]
            set_random_states(state["random"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} does not fit this run ({' '.join(str(error).split())[:300]}); it was written by another "
                "model, method or version"
            ) from error


def _differences(saved: dict[str, Any], own: dict[str, Any], place: str = "") -> Iterator[str]:
    """``optim.lr: 0.2 there, 0.1 here`` for each setting that differs, but for those in `FREE`."""
    for name in (n for n in {**own, **saved} if place + n not in FREE):
        a, b = saved.get(name), own.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{place}{name}.")
        elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            yield f"{place}{name}: {a!r} there, {b!r} here"


class Average(AveragedModel):
    """The moving average of a network; an update waits for nothing, and can be recorded as part of a step.

    Its first update is the mean of the weights so far, that is, these weights.
    """

    def __init__(self, network: LocalNetwork, decay: float) -> None:
        move = get_ema_multi_avg_fn(decay)
        device = network.device if network.residence is None else None  # where the weights wait
        super().__init__(network, device=device, multi_avg_fn=move, use_buffers=True)
        self.move: Callable[..., None] = move
        self.begun = False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards ``model`` once."""
        if not self.begun:  # it asks the device how often it has moved
            super().update_parameters(model)
            self.begun = True
            return
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        for real in (True, False):
            chosen = [pair for pair in pairs if (pair[0].is_floating_point() or pair[0].is_complex()) == real]
            if chosen:
                self.move([ours for ours, _ in chosen], [theirs for _, theirs in chosen], self.n_averaged)
        self.n_averaged += 1


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def explained(inputs: Tensor) -> Iterator[None]:
    """Turns what torch says about a batch that is too large or too small into a `TrainingError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"a batch of {tuple(inputs.shape)} does not fit in the memory of {inputs.device}; lower train.batch_size, "
            "train in micro-batches (method: [..., {accumulation: {parts: 2}}]), or cut the network into more blocks"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            f"BatchNorm needs more than one sample, but this batch has {len(inputs)} images in all its micro-batches; "
            "choose the batch size and the parts of accumulation so that none is left with one, the last of an epoch "
            "included"
        ) from error


def set_up_torch(config: Config) -> torch.device:
    """Threads, deterministic mode and the device of a run."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    if torch.are_deterministic_algorithms_enabled() != config.train.deterministic:  # the call imports for seconds
        torch.use_deterministic_algorithms(config.train.deterministic)
    return device_of(config.train.device)


def load_data(config: Config, device: torch.device, replica: int = 0, num_replicas: int = 1) -> data.Data:
    """The data of a run, or one replica's share of them.

    Raises:
        ConfigError: settings that these data have no use for.
    """
    settings = config.data
    shared: dict[str, Any] = {
        "root": settings.root,
        "batch_size": config.train.batch_size,
        "eval_batch_size": config.train.eval_batch_size,
        "validation": settings.validation,
        "limit": settings.limit,
        "seed": config.train.seed,
        "augment": settings.augment,
        "workers": settings.workers,
        "on_damage": settings.on_damage,
        "device": device,
        "replica": replica,
        "num_replicas": num_replicas,
    }
    size = settings.image_size
    _check_text(config)
    if data.text.knows(settings.name):
        left_out = ("workers", "on_damage")
        kept = {name: value for name, value in shared.items() if name not in left_out}
        return data.text.load(settings.name, context=settings.context, tokenizer=settings.tokenizer, **kept)
    if data.boxes.knows(settings.name):
        if settings.crop_size is not None or settings.scale != (1.0, 1.0):
            raise ConfigError(f"data.crop_size and data.scale need masks, not {settings.name!r}")
        return data.boxes.load(settings.name, image_size=size, longest_side=settings.longest_side, **shared)
    if data.masks.knows(settings.name):
        if isinstance(size, int):
            raise ConfigError(
                f"data.image_size={size}; with masks write [height, width], for instance [{size}, {size}]"
            )
        return data.masks.load(
            settings.name, image_size=size, crop_size=settings.crop_size, scale=settings.scale,
            **shared,
        )  # fmt: skip
    if isinstance(size, tuple) or settings.crop_size is not None or settings.scale != (1.0, 1.0):
        raise ConfigError(
            f"data.crop_size, data.scale and a data.image_size of two sides need masks, not {settings.name!r}"
        )
    return data.load(settings.name, image_size=size, **shared)


def _check_text(config: Config) -> None:
    """Raise `ConfigError` for settings of text where there is none, or of images where there is."""
    text, plain = data.text.knows(config.data.name), DataConfig()
    of_images = ("image_size", "crop_size", "scale", "longest_side", "on_damage", "workers")
    for name in of_images if text else ("context", "tokenizer"):
        if getattr(config.data, name) != getattr(plain, name):
            kind = "images" if text else "text, written text:PATH"
            raise ConfigError(f"data.{name} is for {kind}, not {config.data.name!r}; leave it out")
    if text and config.train.channels_last:
        raise ConfigError("train.channels_last=true is for images; leave it out")


def build_task(
    config: Config,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    kind: str = "classification",
    classes: tuple[str, ...] = (),
) -> Task:
    """The task of a run: the function of `localgrad.tasks` that ``kind`` names, with the options ``config.task``.

    An option ``name`` is ``regression``, which takes classes for numbers, or ``module:function`` of the user's, used
    instead: it takes ``num_classes``, those of ``mean``, ``std`` and ``classes`` that it names, and the other options.

    Raises:
        ConfigError: an option that the task does not have, a task that the data are not for, or a function that returns
            no task.
    """
    kind, options = task_name(config, kind), {k: v for k, v in config.task.items() if k != "name"}
    known: dict[str, Any] = {"mean": mean, "std": std, "classes": classes}
    if kind == "regression":
        num_classes = 1
    make = named.function(kind, "task") if named.is_named(kind) else getattr(tasks, kind)
    allowed = list(inspect.signature(make).parameters)[1:]
    known = {name: value for name, value in known.items() if name in allowed}
    for name in options:
        if name not in allowed or name in known:
            free = [option for option in allowed if option not in known]
            raise ConfigError(f"task.{name}: " + (nearest(name, free, f"option of {kind}") if free else "no options"))
    try:
        task = make(num_classes, **known, **options)
    except TypeError as error:
        raise ConfigError(f"task: {options} does not suit {kind}: {error}") from error
    if not isinstance(task, Task):
        raise ConfigError(f"task {kind!r} returned a {type(task).__name__}; it must return a localgrad.task.Task")
    return task


def task_name(config: Config, kind: str) -> str:
    """The function that makes the task of a run: that of the data, ``regression`` for classes, or the user's own.

    Raises:
        ConfigError: any other name.
    """
    name = config.task.get("name", kind)
    own = isinstance(name, str) and named.is_named(name)
    if name != kind and (name, kind) != ("regression", "classification") and not own:
        raise ConfigError(
            f"task.name={name}, but {config.data.name!r} is for {kind}; leave it out, write regression to learn class "
            "indices as numbers, or module:function of a task of your own"
        )
    return str(name)


def cutting_of(blocks: BlocksConfig) -> Cutting | tuple[str, ...]:
    """Where to cut, as `localgrad.localize` takes it.

    Raises:
        ConfigError: not one of ``num_blocks`` and ``cuts``, or a setting that does not go with it.
    """
    if (blocks.num_blocks is None) == (blocks.cuts is None):
        raise ConfigError(
            f"blocks.num_blocks={blocks.num_blocks} and blocks.cuts={blocks.cuts}: give exactly one of them; "
            "--num-blocks 4 sets the first"
        )
    if blocks.stem != "unit" and (blocks.cuts is not None or blocks.balance == "bytes"):
        raise ConfigError(
            f"blocks.stem={blocks.stem} goes with blocks.num_blocks and blocks.balance=count; leave it out"
        )
    if blocks.cuts is not None:
        if blocks.balance != "count":
            raise ConfigError(
                f"blocks.balance={blocks.balance} goes with blocks.num_blocks, not with cuts; leave it out"
            )
        if not blocks.cuts:
            raise ConfigError("blocks.cuts=[] names no module; write [layer2, layer3], or blocks.num_blocks=1")
        return tuple(blocks.cuts)
    assert blocks.num_blocks is not None
    if blocks.balance == "bytes":
        return cuts.by_bytes(blocks.num_blocks)
    return cuts.by_count(blocks.num_blocks, blocks.stem)


def build_network(
    config: Config,
    task: Task,
    input_shape: tuple[int, ...],
    device: torch.device,
) -> LocalNetwork:
    """Model, method and cuts of a run, with the weights that its seed gives."""
    cutting = cutting_of(config.blocks)
    taken = sorted({"name", "num_classes", "in_channels", "image_size"} & set(config.model.options))
    if taken:
        raise ConfigError(f"model.options.{taken[0]}: that follows from model.name and the data; leave it out")
    method = build_method(
        config.method,
        task,
        load_model=lambda path: trained_model(Path(path), task, input_shape),
    )
    with seeded(config.train.seed, "weights"):
        model = model_of(config, task.num_outputs, input_shape)
        if config.model.weights is not None:
            said = load_pretrained(model, config.model.weights)
            if "stay random" in said:
                warnings.warn(f"model.weights: {said}", stacklevel=2)
        if config.model.batchnorm == "sync":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif config.model.batchnorm == "frozen":
            freeze_batchnorm(model)
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        if len(input_shape) == 1:  # tokens
            example = torch.zeros(2, *input_shape, dtype=torch.int64, device=device)
        else:
            example = torch.randn(2, *input_shape).to(device)  # a draw of the device would leave others to the CPU
        network = localize(model, method, cutting, example=example)
    if config.train.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.train()


def build(config: Config, replica: int = 0, num_replicas: int = 1) -> Experiment:
    """Build a run from its configuration; replicas differ only in the samples they train on.

    Raises:
        ConfigError, DataError, PartitionError, MethodError: what is wrong, in one paragraph.
    """
    loggers.known(config.train.loggers)
    check_resident(config)
    device = set_up_torch(config)
    loaded = load_data(config, device, replica, num_replicas)
    network = build_network(
        config,
        build_task(config, loaded.num_classes, loaded.mean, loaded.std, loaded.kind, loaded.classes),
        loaded.input_shape,
        torch.device("cpu") if config.train.resident else device,
    )
    if config.train.resident:
        resident(network, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    capture, remark = captures(config, network)
    stepper = Stepper(network, config.optim, scaler, capture)
    if not all(isinstance(vars(optimizer).get("state"), dict) for optimizer in stepper.optimizers):
        raise ConfigError(
            f"optim.name={config.optim.name!r}: its state is not in its attribute state, where checkpoints look; "
            "write an optimizer that keeps it there"
        )
    average = None if config.train.ema_decay is None else Average(network, config.train.ema_decay)
    if config.train.compile:
        network.compile_blocks()
    return Experiment(config, loaded, network, stepper, average, Meter(network), capture_remark=remark)


def check_resident(config: Config) -> None:
    """Raise `ConfigError` for settings that keep more than one block on the device."""
    if not config.train.resident:
        return
    if not config.optim.per_block:
        raise ConfigError(
            "train.resident=true with optim.per_block=false: a step at the end would need the gradients of all blocks; "
            "add optim.per_block=true"
        )
    for name in ("compile", "capture"):
        if getattr(config.train, name) is True:
            raise ConfigError(
                f"train.resident=true with train.{name}=true, which keeps track of where weights are; leave one out"
            )


def captures(config: Config, network: LocalNetwork) -> tuple[bool, str]:
    """Whether steps are to be recorded as CUDA graphs, and why not where ``train.capture=auto`` would have them so.

    Raises:
        ConfigError: ``train.capture=true``, and steps cannot be recorded.
    """
    reason = unfit(network.method) if network.residence is None else "fetches blocks as it goes"
    if config.train.precision == "fp16":
        reason = "scales fp16 losses, which reads gradients back; bf16 does not"
    if config.optim.name not in BUILT_IN:
        reason = f"is taken by {config.optim.name}, not by {' or '.join(BUILT_IN)}, whose rate can lie on the device"
    if config.optim.in_backward:
        reason = "is taken parameter by parameter within the backward pass (optim.in_backward)"
    if config.train.capture is True and reason:
        raise ConfigError(f"train.capture=true, but a step {reason}; or set train.capture=auto or false")
    auto = config.train.capture == "auto" and network.device.type == "cuda"
    return config.train.capture is True or (auto and not reason), reason if auto else ""


def with_method(config: Config, method: MethodSpec) -> Config:
    """The same run by another method."""
    return dataclasses.replace(config, method=method, beside=[])
