"""What will fit before anything is trained: every way to train a model, its peak memory and its step time.

The engine runs each way on fake tensors: every operation of a step is dispatched with shapes, strides and devices but
without data, so that a 20 GiB step is counted by the same tracker that counts a real one, on a laptop, in seconds.
Fake tensors rather than tensors on the meta device because they know which device they stand for: on meta, fused
attention falls back to the form that keeps the attention matrix, and autocast does nothing.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from localgrad import methods, models, tasks
from localgrad.bench.memory import LiveBytes
from localgrad.config import MethodSpec, build_method, parse_method
from localgrad.engine import local_losses
from localgrad.errors import ConfigError, MethodError, nearest
from localgrad.method import Method
from localgrad.network import LocalNetwork, _AuxiliaryBytes, localize
from localgrad.partition import Cut, Partition, by_bytes
from localgrad.partition.balance import unit_storages

aten = torch.ops.aten
# Memory is only allocated, or a result already there is handed on.
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten._reshape_alias}

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STATES = {"sgd": 1, "adamw": 2}  # copies of the trained parameters that the optimizer keeps; SGD with momentum
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
EXACT, MICRO, LOCAL = "exact", "exact, BatchNorm over micro-batches", "local"
TIE = 1.05  # predicted step times closer than this count as equal
MOST_PARTS = 64

_STYLES = {
    "plain": ("*", "#222222"),
    "accumulation": ("s", "#2980b9"),
    "checkpointing": ("o", "#16a085"),
    "checkpointing, micro-batches": ("P", "#16a085"),
    "local": ("o", "#d35400"),
    "local, per-block step": ("^", "#d35400"),
    "local, micro-batches": ("P", "#d35400"),
    "local, micro-batches, per-block step": ("X", "#d35400"),
}  # marker and color


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Args:
        flops: of convolutions and matrix products, 2 per multiply-add.
        bytes: read and written by everything else.
        start: seconds that starting an operation takes, whatever its size.
    """

    flops: float
    bytes: float
    start: float = 5e-6

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bytes > 0 and self.start >= 0):
            raise ConfigError(
                f"rates: {self.flops} FLOP/s, {self.bytes} bytes/s, {self.start} s; the first two must be above 0, the "
                "last at least 0. Write for instance Rates(flops=30e12, bytes=500e9)"
            )


@dataclass(frozen=True)
class Option:
    """One way to train.

    Args:
        name: for instance ``local K=8, per-block step``.
        kind: ``plain``, ``accumulation``, ``checkpointing`` or ``local``.
        method: the expression that makes the method, for instance ``localgrad.methods.dgl(task)``.
        cuts: paths of the modules that blocks begin with, as for `localgrad.localize`.
        micro_batches: parts a batch is run in.
        per_block: whether each block steps, and frees its gradients, as soon as its backward pass is done.
        weights: bytes of parameters and buffers, auxiliary networks included.
        optimizer: bytes of the optimizer's state.
        gradients: bytes of parameter gradients alive at the peak.
        activations: bytes of everything else alive at the peak: the batch, what is saved for backward, temporaries.
        flops_ratio: FLOPs of a step as a ratio to plain training; ``time_ratio`` the same for its predicted duration.
        update: what the gradients are: ``exact``, ``exact, BatchNorm over micro-batches`` or ``local``.
        fits: whether ``peak`` is within the memory; None without a budget.
    """

    name: str
    kind: str
    method: str
    cuts: tuple[str, ...]
    micro_batches: int
    per_block: bool
    weights: int
    optimizer: int
    gradients: int
    activations: int
    flops_ratio: float
    time_ratio: float
    update: str
    fits: bool | None = None

    @property
    def peak(self) -> int:
        """Bytes alive at the fullest moment of a training step."""
        return self.weights + self.optimizer + self.gradients + self.activations

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.cuts) + 1

    @property
    def call(self) -> str:
        """How the network is made; empty for plain training, which needs none."""
        if self.kind == "plain":
            return ""
        where = f"cuts={self.cuts!r}" if self.cuts else "num_blocks=1"
        return f"localgrad.localize(model, method, {where}, example=x[:2])"


@dataclass(frozen=True)
class Plan:
    """What `plan` returns; ``print`` it for the table.

    Args:
        model: its name. ``parameters`` are counted.
        batch_size: images in a step, of shape ``image_shape`` (C, H, W), in ``num_classes`` classes.
        memory: the budget in bytes, None if none was given; ``headroom`` is the share of it that is left free.
        largest_unit: bytes that the unit of the model with the most saves for its backward pass: no cut, without
            recomputation inside it, goes below. Its path is ``largest_name``.
        options: every way that was tried; plain training first.
        recommended: the fastest that fits; None if nothing does or there is no budget.
    """

    model: str
    parameters: int
    batch_size: int
    image_shape: tuple[int, int, int]
    num_classes: int
    optimizer: str
    precision: str
    memory: int | None
    headroom: float
    rates: Rates
    largest_unit: int
    largest_name: str
    options: tuple[Option, ...]
    skipped: tuple[str, ...] = field(default=())

    @property
    def recommended(self) -> Option | None:
        """The fastest option that fits; among those within 5 % of it exact gradients first, then the fewest parts."""
        fitting = [option for option in self.options if option.fits]
        if not fitting:
            return None
        if fitting[0].kind == "plain":
            return fitting[0]
        limit = TIE * min(option.time_ratio for option in fitting)
        order = (EXACT, MICRO)
        return min(
            (option for option in fitting if option.time_ratio <= limit),
            key=lambda o: (order.index(o.update) if o.update in order else 2, o.micro_batches, o.num_blocks),
        )

    @property
    def verdict(self) -> str:
        """The recommendation in words, and whether local learning is needed at all."""
        if self.memory is None:
            return "No memory was given, so nothing is recommended: say how much there is (memory='8GiB')."
        best, smallest = self.recommended, min(self.options, key=lambda option: option.peak)
        if best is None:
            return (
                f"Nothing fits in {size(self.memory)}. The smallest is {smallest.name}, {size(smallest.peak)}; its "
                f"weights and optimizer state alone take {size(smallest.weights + smallest.optimizer)}. Use smaller "
                "batches or images, bf16, or a smaller model."
            )
        if best.kind == "plain":
            return f"Plain training fits ({size(best.peak)}): you need none of this library to train this model."
        exact = [o for o in self.options if o.fits and o.kind != "local"]
        text = f"Plain training does not fit ({size(self.options[0].peak)}). Use {best.name}: {size(best.peak)}, "
        text += f"{best.time_ratio:.2f} of the time of a plain step, gradients {best.update}."
        if best.kind != "local":
            return text + " Local learning is not needed."
        if exact:
            other = min(exact, key=lambda option: option.time_ratio)
            text += (
                f" Local learning is not the only way: {other.name} fits too, {size(other.peak)} and "
                f"{other.time_ratio:.2f} of the time, gradients {other.update}."
            )
        else:
            text += " Neither accumulation nor checkpointing fits."
        return text

    @property
    def code(self) -> str:
        """Python that trains as recommended, for a ``model``, an ``optimizer`` and a ``loader`` that exist."""
        return "" if self.recommended is None else self.code_of(self.recommended)

    def code_of(self, option: Option) -> str:
        """The same for any of the options."""
        bf16 = self.precision == "bf16"
        if option.kind == "plain":
            forward = "torch.nn.functional.cross_entropy(model(x), y)"
            lines = ["for x, y in loader:", f"    loss = {forward}", "    loss.backward()"]
            if bf16:
                lines[1:2] = ["    with torch.autocast(x.device.type, torch.bfloat16):", f"        loss = {forward}"]
            return "\n".join(["import torch", "", *lines, "    optimizer.step()", "    optimizer.zero_grad()"])
        make = {
            "sgd": "torch.optim.SGD({}, lr=0.1, momentum=0.9)",
            "adamw": "torch.optim.AdamW({}, lr=1e-3)",
        }[self.optimizer]
        lines = [
            "import torch",
            "import localgrad",
            "",
            f"task = localgrad.tasks.classification({self.num_classes})",
            f"method = {option.method}",
            "x, y = next(iter(loader))",
            f"network = {option.call}",
        ]
        arguments = "network, x, y, step" + ", autocast=torch.bfloat16" * bf16
        if option.per_block:
            lines += [
                "blocks = [network.block_parameters(k) for k in range(len(network.blocks))]",
                f"optimizers = [{make.format('parameters')} for parameters in blocks]",
                "",
                "def step_block(k):",
                "    optimizers[k].step()",
                "    optimizers[k].zero_grad()",
                "",
            ]
            arguments += ", on_block_done=step_block"
        else:
            lines += [f"optimizer = {make.format('network.parameters()')}", ""]
        lines += [
            "for step, (x, y) in enumerate(loader):",
            f"    for span, loss in localgrad.local_losses({arguments}):",
            "        loss.backward()",
        ]
        if not option.per_block:
            lines += ["    optimizer.step()", "    optimizer.zero_grad()"]
        if option.kind == "local":
            lines.append("    localgrad.exchange(network)")
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Draw peak memory against step time, one point for each option and a line for each kind."""
        from matplotlib.ticker import FixedLocator, NullLocator

        from localgrad.bench.plots import _figure, _save

        figure, (axis,) = _figure(1, 4.6)
        figure.set_size_inches(8.4, 4.6)
        groups: dict[str, list[Option]] = {}
        for option in self.options:
            group = option.kind + ", micro-batches" * (option.micro_batches > 1 and option.kind != "accumulation")
            group += ", per-block step" * option.per_block
            groups.setdefault(group, []).append(option)
        for group, members in groups.items():
            marker, color = _STYLES.get(group, ("o", "#7f8c8d"))
            x, y = [o.peak / 2**30 for o in members], [o.time_ratio for o in members]
            axis.plot(x, y, marker=marker, color=color, linewidth=1, alpha=0.85, label=group, markersize=7)
            for option, a, b in zip(members, x, y, strict=True):
                note = f"x{option.micro_batches}" if option.micro_batches > 1 else f"K={option.num_blocks}"
                if option.kind != "plain":
                    axis.annotate(note, (a, b), (3, 4), textcoords="offset points", fontsize=7, color=color)
        if self.memory is not None:
            for limit, style in ((self.memory, "-"), (self.memory * (1 - self.headroom), ":")):
                axis.axvline(limit / 2**30, color="#222222", linewidth=1, linestyle=style)
            axis.annotate(
                f" {size(self.memory)}", (self.memory / 2**30, 0.98), xycoords=("data", "axes fraction"),
                fontsize=8, va="top",
            )  # fmt: skip
        if (best := self.recommended) is not None:
            ring = {"s": 230, "facecolors": "none", "edgecolors": "#c0392b", "linewidths": 1.8, "zorder": 5}
            axis.scatter([best.peak / 2**30], [best.time_ratio], label="recommended", **ring)
        axis.set_xscale("log")
        peaks = [o.peak / 2**30 for o in self.options]
        ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 3, 5, 7)]
        axis.xaxis.set_major_locator(FixedLocator([t for t in ticks if min(peaks) * 0.7 < t < max(peaks) * 1.5]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("predicted peak, GiB")
        axis.set_ylabel("predicted step time, plain training = 1")
        axis.set_title(f"{self.model}, {self.batch_size} images, {self.optimizer}, {self.precision}", fontsize=10)
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _save(figure, Path(path))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        best = self.recommended
        rows = [{**asdict(o), "peak": o.peak, "num_blocks": o.num_blocks, "call": o.call} for o in self.options]
        return {
            **asdict(self),
            "options": rows,
            "recommended": best.name if best else None,
            "verdict": self.verdict,
            "code": self.code,
        }

    def __str__(self) -> str:
        headings = "way to train|peak|weights|optim.|grads|activ.|FLOPs|time|gradients|fits".split("|")  # noqa: SIM905
        rows = [headings]
        for o in self.options:
            sizes = [f"{b / 2**30:.2f}" for b in (o.peak, o.weights, o.optimizer, o.gradients, o.activations)]
            fits = {None: "", True: "yes", False: "no"}[o.fits]
            rows.append([o.name, *sizes, f"{o.flops_ratio:.2f}", f"{o.time_ratio:.2f}", o.update, fits])
        widths = [max(len(row[k]) for row in rows) for k in range(len(headings))]
        texts = (0, len(headings) - 2, len(headings) - 1)
        lines = [
            "  ".join(c.ljust(w) if k in texts else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        shape = "x".join(map(str, self.image_shape))
        title = f"{self.model}, {self.parameters / 1e6:.1f} M parameters, {self.batch_size} images of {shape}, "
        title += f"{self.optimizer}, {self.precision}"
        if self.memory is not None:
            title += f"; {size(self.memory)}, of which {self.headroom:.0%} are left free"
        notes = "GiB at the fullest moment of a step; FLOPs and time as ratios to plain training. Floor of any cut: "
        notes += f"{size(self.largest_unit)} saved by the largest unit, {self.largest_name}."
        skipped = [f"Left out: {reason}" for reason in self.skipped]
        return "\n".join([title, *(line.rstrip() for line in lines), notes, *skipped, "", self.verdict])


def size(count: float) -> str:
    """Bytes as people read them: ``7.51 GiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def read_memory(text: str | int) -> int:
    """``8GiB``, ``7500 MB`` or a number of bytes, in bytes.

    Raises:
        ConfigError: for anything else, or nothing.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    unit = (match[2].upper() or "B") if match else ""
    if match is None or unit not in UNITS or not (count := int(float(match[1]) * UNITS[unit])) > 0:
        raise ConfigError(f"memory={text!r}; write a size above 0 with its unit, for instance 8GiB, 7500MB or 512MiB")
    return count


def measure_rates(device: torch.device | None = None, dtype: torch.dtype = torch.float32, rounds: int = 5) -> Rates:
    """What this device does: a 3x3 convolution, and additions that make new tensors. Takes about a second."""
    device = device or torch.device("cpu")
    large = device.type == "cuda"
    images, side = (128, 56) if large else (4, 56)
    x = torch.randn(images, 64, side, side, device=device, dtype=dtype)
    weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    values = torch.randn(2**28 if large else 2**22, device=device, dtype=dtype)
    flops = 2 * 9 * 64 * x.numel()

    one = torch.ones(1, device=device, requires_grad=True)

    def seconds(work: Callable[[], object]) -> float:
        taken = []
        for turn in range(rounds + 2):
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            if turn > 1:
                taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    with torch.no_grad():
        convolution = seconds(lambda: nn.functional.conv2d(x, weight, padding=1))
        addition = seconds(lambda: values + 1)
    start = seconds(lambda: [one + 1 for _ in range(1000)]) / 1000
    return Rates(flops / convolution, 2 * values.numel() * values.element_size() / addition, start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Work(TorchDispatchMode):
    """Counts what a step does: FLOPs, and the seconds they and the bytes read and written would take.

    An operation takes as long as the slower of its arithmetic and its traffic, and what starting one takes. Views and
    memory that is only allocated take nothing.

    Args:
        rates: of the device.

    Attributes:
        flops: of convolutions, matrix products and attention, 2 per multiply-add.
        seconds: predicted.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.flops = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func._overloadpacket not in _FREE:
            flops = _flops(func, args, kwargs, result)
            traffic = sum(_bytes(value) for value in tree_leaves((args, kwargs, result)))
            self.flops += flops
            self.seconds += self.rates.start + max(flops / self.rates.flops, traffic / self.rates.bytes)
        return result


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = func._overloadpacket
    if name is aten._scaled_dot_product_flash_attention_for_cpu:  # torch has formulas for the others
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if name is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    formula = flop_registry.get(name)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())  # expanded ones are small


class _Shapes(TorchFunctionMode):
    """Tensors without data are equal if their shapes are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


def _without_data(value: Any, tensors: Sequence[Tensor], empty: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy in which every one of ``tensors`` is what ``empty`` makes of it; no data is copied."""
    memo: dict[int, Any] = {}
    for tensor in tensors:
        if id(tensor) not in memo:
            made = empty(tensor)
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(value, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


@dataclass
class Predicted:
    """What one step was found to need, bytes and seconds.

    Args:
        weights: of parameters and buffers; ``trained`` of those that get a gradient.
        tracked: the most that was alive at once in forward and backward, above weights and batch.
        peak: gradients and everything else at the fullest moment, batch and optimizer step included; ``per_block``
            the same where every block steps as soon as it is done.
        flops: 2 per multiply-add; ``seconds`` predicted from them and the traffic.
        batchnorm: whether some layer normalises over the batch.
    """

    weights: int
    trained: int
    tracked: int
    peak: tuple[int, int]
    per_block: tuple[int, int]
    flops: int
    seconds: float
    batchnorm: bool


class Planner:
    """A model without data, its cut points, and what steps of it cost."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], batch: int, precision: str, rates: Rates) -> None:
        self.device = next(model.parameters()).device
        if self.device.type == "meta":
            self.device = torch.device("cpu")
        self.batch, self.shape, self.rates = batch, shape, rates
        self.autocast = PRECISIONS[precision]
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = _without_data(model, _tensors(model), _on_meta)
        self.dtype = next(model.parameters()).dtype
        self.example = torch.empty(2, *shape, device="meta", dtype=self.dtype)
        with _Shapes(), torch.device("meta"):
            self.partition = Partition(self.model, self.example)
            self.classes = self._classes()
        with _Shapes():
            self.saved = self._saved()
        self.heads: dict[Cut, int] = {}

    def _classes(self) -> int:
        with torch.no_grad():
            output = self.model(self.example)
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise ConfigError(
                f"plan: {type(self.model).__name__} returns {_described(output)}; it plans classifiers, which return "
                "(B, num_classes)"
            )
        return int(output.shape[1])

    def _fake(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def _saved(self) -> list[dict[int, int]]:
        """What each unit saves for backward, on fake tensors: the meta device would save attention matrices."""
        with self.mode:
            fake = copy.copy(self.partition)
            everything = (self.model, self.partition.units)
            fake.model, fake._units = _without_data(everything, _tensors(self.model, *self.partition.units), self._fake)
            fake.example = torch.empty(2, *self.shape, device=self.device, dtype=self.dtype)
            return unit_storages(fake)

    def largest_unit(self) -> tuple[int, str]:
        """Bytes at the batch size, and the path of the unit that saves them."""
        totals = [sum(unit.values()) for unit in self.saved]
        index = totals.index(max(totals))
        name = self.partition.cuts[index - 1].name if index else "the stem"
        return totals[index] * self.batch // 2, name

    def cuts(self, num_blocks: int, method: Method) -> tuple[Cut, ...]:
        """Where to cut so that the largest block saves least, its auxiliary network included."""
        if method.terms and not self.heads:
            with _Shapes(), torch.device("meta"):
                measured = _AuxiliaryBytes(method, self.partition, num_blocks)
                self.heads = {cut: measured(cut) for cut in self.partition.cuts}
        return by_bytes(self.partition, num_blocks, self.heads.__getitem__ if method.terms else None, self.saved)

    def network(self, method: Method, cuts: Sequence[str]) -> LocalNetwork:
        """The model cut up, without data."""
        with _Shapes(), torch.device("meta"):
            if not cuts:
                return localize(self.model, method, num_blocks=1, example=self.example)
            return localize(self.model, method, cuts=cuts, example=self.example)

    def step(self, network: LocalNetwork, method: Method, images: int) -> Predicted:
        """Run a step of ``images`` images by ``method``, which puts the same heads on ``network`` as its own does."""
        with self.mode:
            network = _without_data(network, _tensors(network, *network.blocks), self._fake)
            network.method = method
            network.train()
            x = torch.empty(images, *self.shape, device=self.device, dtype=self.dtype)
            y = torch.zeros(images, dtype=torch.long, device=self.device)
            trained = [p for p in network.parameters() if p.requires_grad]
            blocks = [_size(network.block_parameters(k)) for k in range(len(network.blocks))]
            done: list[tuple[int, int]] = []  # op, bytes of gradients that a per-block step would free there
            work, tracker = Work(self.rates), LiveBytes(trained)
            with tracker, work:
                losses = local_losses(
                    network,
                    x,
                    y,
                    autocast=self.autocast,
                    on_block_done=lambda block: done.append((len(tracker.timeline), blocks[block])),
                )
                for _, loss in losses:
                    loss.backward()
                del loss
        given = _size([x, y]) * self.batch // images  # the whole batch waits on the device
        # The optimizer makes one copy of what it steps (torch's multi-tensor SGD with weight decay, and AdamW).
        whole = max([*tracker.timeline, (2 * _size(trained), _size(trained))])
        alone, freed, start = [(0, 0)], 0, 0
        for stop, gradients in [*done, (len(tracker.timeline), 0)]:
            alone += [(live - freed, grads - freed) for live, grads in tracker.timeline[start:stop]]
            live, grads = alone[-1]
            alone.append((live + gradients, grads))
            freed, start = freed + gradients, stop
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
        together, one_by_one = ((grads, live - grads + given) for live, grads in (whole, max(alone)))
        weights = _size(_tensors(network))
        return Predicted(weights, _size(trained), tracker.peak, together, one_by_one, work.flops, work.seconds, norms)


def _size(tensors: Sequence[Tensor]) -> int:
    unique = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def written(spec: MethodSpec) -> str:
    """The Python that builds a method from its specification: ``["e2e", "checkpointing"]`` and the like."""
    text = "task"
    for part in spec:
        name, options = (part, {}) if isinstance(part, str) else next(iter(part.items()))
        given = "".join(f", {key}={value!r}" for key, value in (options or {}).items())
        text = f"localgrad.methods.{name}({text}{given})"
    return text


def plan(
    model: nn.Module | str,
    *,
    batch_size: int,
    memory: str | int | None = None,
    image_size: int = 224,
    channels: int = 3,
    num_classes: int = 1000,
    method: str | MethodSpec | Method = "dgl",
    optimizer: Literal["sgd", "adamw"] = "sgd",
    precision: Literal["fp32", "bf16"] = "fp32",
    headroom: float = 0.1,
    rates: Rates | None = None,
) -> Plan:
    """Predict peak memory and step time of every way to train ``model``, without training it or needing the memory.

    ``peak = weights + optimizer state + max over the step (gradients + activations)``. A step is forward, backward and
    the optimizer. Times are promised as ratios only: forward and backward, from the FLOPs and bytes of each operation.

    Args:
        model: a module, on any device, or a name that `localgrad.models.create` knows; left as it is.
        batch_size: images in a step.
        memory: what there is, ``"8GiB"`` or bytes; None to compare only.
        image_size, channels: of the square images.
        num_classes: with a name only; a module tells by itself.
        method: for local learning, a base with its plug-ins: ``"dgl"``, ``"infopro+man"``, a specification as in a
            recipe, or a `Method`.
        optimizer: ``sgd`` (with momentum: one copy of the parameters) or ``adamw`` (two).
        precision: ``bf16`` is autocast; weights stay as they are.
        headroom: share of ``memory`` left free for what is not counted: the CUDA context, workspaces of kernels, and
            what an allocator loses by rounding.
        rates: what the device that will train does; None measures the one the model is on.

    Raises:
        ConfigError: a value outside its range, or a model that is no classifier.
        PartitionError: the model cannot be cut.

    Example:
        >>> import localgrad
        >>> ways = localgrad.plan("resnet20", batch_size=128, image_size=32, memory="40MiB", num_classes=10)
        >>> ways.options[0].fits, ways.recommended.kind
        (False, 'accumulation')
    """
    budget = None if memory is None else read_memory(memory)
    _check(batch_size, image_size, channels, headroom, optimizer, precision)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = _created(model, num_classes, channels, image_size)
    dtype = PRECISIONS[precision] or torch.float32
    if rates is None:
        device = next(model.parameters()).device
        rates = measure_rates(None if device.type == "meta" else device, dtype)
    planner = Planner(model, (channels, image_size, image_size), batch_size, precision, rates)
    if isinstance(method, Method):
        local, text, task = method, "method", method.task
    else:
        spec = parse_method(method) if isinstance(method, str) else method
        task = tasks.classification(planner.classes)
        local, text = build_method(spec, task), written(spec)
    if not local.terms:
        raise ConfigError(
            f"method={local.name}: it has no auxiliary heads, so it is no local learning; end-to-end training, "
            "accumulation and checkpointing are planned anyway. Write a local base such as dgl"
        )
    options, skipped = _Ways(planner, task, local, text, optimizer, budget, headroom).all()
    largest, largest_name = planner.largest_unit()
    return Plan(
        name,
        sum(p.numel() for p in model.parameters()),
        batch_size,
        planner.shape,
        planner.classes,
        optimizer,
        precision,
        budget,
        headroom,
        rates,
        largest,
        largest_name,
        tuple(options),
        tuple(skipped),
    )


def _check(batch_size: int, image_size: int, channels: int, headroom: float, optimizer: str, precision: str) -> None:
    for name, value, least in (("batch_size", batch_size, 2), ("image_size", image_size, 1), ("channels", channels, 1)):
        if value < least:
            raise ConfigError(f"{name}={value}; it must be at least {least}")
    if not 0 <= headroom < 1:
        raise ConfigError(f"headroom={headroom}; write a share of the memory, at least 0 and below 1, such as 0.1")
    for name, choice, known in (("optimizer", optimizer, STATES), ("precision", precision, PRECISIONS)):
        if choice not in known:
            raise ConfigError(nearest(choice, known, name))


def _created(name: str, num_classes: int, channels: int, image_size: int) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": num_classes, "in_channels": channels, "image_size": image_size}
    try:
        with torch.device("meta"):
            return models.create(name, **settings)
    except (ConfigError, NotImplementedError):  # it computes something while it is built; or there is none by this name
        return models.create(name, **settings)


class _Ways:
    """Tries one way to train after the other."""

    def __init__(
        self,
        planner: Planner,
        task: Any,
        local: Method,
        text: str,
        optimizer: str,
        budget: int | None,
        headroom: float,
    ) -> None:
        self.planner, self.local, self.text = planner, local, text
        self.e2e = methods.e2e(task)
        self.states = STATES[optimizer]
        self.limit = None if budget is None else budget * (1 - headroom)
        self.plain: Predicted | None = None
        self.options: list[Option] = []
        self.skipped: list[str] = []

    def all(self) -> tuple[list[Option], list[str]]:
        """Every way, plain training first, and what was left out with the reason."""
        base = "localgrad.methods.e2e(task)"
        whole = self.planner.network(self.e2e, ())
        self.add("plain", "plain", whole, self.e2e, base)
        self.accumulated("accumulation", "accumulation", whole, self.e2e, base, least=3)
        checkpointing = methods.checkpointing(self.e2e)
        recomputing = f"localgrad.methods.checkpointing({base})"
        by_blocks: dict[int, LocalNetwork] = {}
        for k in self.counts():
            names = [cut.name for cut in self.planner.cuts(k, self.e2e)]
            by_blocks[k] = self.planner.network(self.e2e, names)
            self.add(f"checkpointing K={k}", "checkpointing", by_blocks[k], checkpointing, recomputing)
        k = self.leanest("checkpointing").num_blocks
        label = f"checkpointing K={k}, accumulation"
        self.accumulated(label, "checkpointing", by_blocks[k], checkpointing, recomputing, least=0)
        for k in self.counts():
            self.try_local(k)
        if any(option.kind == "local" for option in self.options):
            k = self.leanest("local").num_blocks
            self.try_local(k, recompute=True)
            network = self.planner.network(self.local, self.leanest("local").cuts)
            label = f"local K={k}, accumulation"
            self.accumulated(label, "local", network, self.local, self.text, least=1)
        return self.options, self.skipped

    def counts(self) -> list[int]:
        """Numbers of blocks: powers of two, and as many as the model has units."""
        most = len(self.planner.partition.cuts) + 1
        return [*(2**n for n in range(1, 12) if 2**n < most), *([most] if most > 1 else [])]

    def leanest(self, kind: str) -> Option:
        """The option of one kind with the lowest peak."""
        return min((option for option in self.options if option.kind == kind), key=lambda option: option.peak)

    def try_local(self, k: int, recompute: bool = False) -> None:
        """Local learning in ``k`` blocks, as far as the method can be built there."""
        method, text, label = self.local, self.text, f"local K={k}"
        if recompute:
            if method.checkpoint_auxiliary:
                return
            method = methods.checkpointing(method, where="auxiliary")
            text = f"localgrad.methods.checkpointing({text}, where='auxiliary')"
            label += ", heads recomputed"
        try:
            names = [cut.name for cut in self.planner.cuts(k, self.local)]
            network = self.planner.network(method, names)
            self.add(label, "local", network, method, text)
        except MethodError as error:
            self.skipped.append(f"{label}: {error}")

    def accumulated(self, label: str, kind: str, network: LocalNetwork, method: Method, text: str, least: int) -> None:
        """Accumulation over 2, 4, 8, ... micro-batches: at least so many of them, then until one fits."""
        parts, tried = 2, 0
        while parts <= min(MOST_PARTS, self.planner.batch // 2):
            if tried >= least and (self.limit is None or any(o.fits for o in self.options if o.kind == kind)):
                return
            wrapped = f"localgrad.methods.accumulation({text}, parts={parts})"
            self.add(f"{label} x{parts}", kind, network, method, wrapped, parts)
            parts, tried = 2 * parts, tried + 1

    def add(self, name: str, kind: str, network: LocalNetwork, method: Method, text: str, parts: int = 1) -> None:
        """Predict one way; with the per-block step too where that lowers the peak."""
        planner, images, method_run = self.planner, self.planner.batch, method
        if parts > 1:  # the fullest moment comes in the second micro-batch already, when there are gradients to add to
            images = 2 * -(-planner.batch // parts)
            method_run = methods.accumulation(method, parts=2)
        step = planner.step(network, method_run, images)
        self.plain = self.plain or step
        update = LOCAL if kind == "local" else MICRO if parts > 1 and step.batchnorm else EXACT
        cuts = tuple(cut.name for cut in network.cuts)
        share = planner.batch / images
        for per_block, (gradients, rest) in ((False, step.peak), (True, step.per_block)):
            option = Option(
                name + ", per-block step" * per_block,
                kind,
                text,
                cuts,
                parts,
                per_block,
                step.weights,
                self.states * step.trained,
                gradients,
                rest,
                step.flops * share / self.plain.flops,
                step.seconds * share / self.plain.seconds,
                update,
            )
            if per_block and (kind != "local" or option.peak >= 0.98 * self.options[-1].peak):
                continue
            self.options.append(replace(option, fits=None if self.limit is None else option.peak <= self.limit))
