"""A model cut into blocks, with the auxiliary networks a method puts on the boundaries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from localgrad.cutting import Chosen
from localgrad.errors import MethodError, PartitionError, TrainingError
from localgrad.exits import Exits, Prefix, exits_of, prefix_of
from localgrad.method import Auxiliary, Method, Rule
from localgrad.opened import OpenModel
from localgrad.partition import Partition, SeparateBlocks
from localgrad.ranks import Replicas, Stage
from localgrad.spans import Span
from localgrad.suspension.points import Watch
from localgrad.suspension.wrapped import check_holder, check_network
from localgrad.twins import Twin


class Residence(Protocol):
    """Who brings blocks to the device only while they run; see `localgrad.resident`."""

    device: torch.device
    here: int

    @property
    def kept(self) -> list[Tensor]:
        """The parameters and buffers that stay on the device."""

    def stepping(self) -> contextlib.AbstractContextManager[None]:
        """Around a step, or an evaluation."""

    def begins(self, block: int) -> None:
        """``block`` is about to run."""

    def having(self, tensors: Iterable[Tensor]) -> None:
        """Have the blocks of ``tensors`` here until another block begins."""

    def ended(self, block: int) -> None:
        """``block`` is done with this step, the optimizer included."""

    def end(self) -> None:
        """Leave everything on the host."""


class LocalNetwork(nn.Module):
    """What `localize` returns. Throw it away after training and keep ``model``.

    Attributes:
        model: as it was given; its ``state_dict``, ``forward`` and ``eval()`` output are unchanged.
        cuts: the K - 1 cut points; block ``k`` begins at ``cuts[k - 1]``.
        method: what trains it; ``rules`` are its rules for this network.
        home: the blocks that use each parameter of ``running``, by name.
        replicas: the processes that train copies of it on other samples; set by `localgrad.distributed.data_parallel`.
        stage: the blocks that this process trains while others train the rest; set by
            `localgrad.distributed.block_parallel`.
        residence: who brings blocks to the device only while they run; set by `localgrad.resident`.
        trains: the names of the parameters of ``running`` that train in this step; ``known``: of those that did in a
            forward over the example, where what crosses was looked for.
        checked: the sets of spans whose isolation a step has shown, with what trained.
    """

    replicas: Replicas | None = None
    stage: Stage | None = None
    residence: Residence | None = None

    def __init__(self, model: nn.Module, method: Method, chosen: Chosen, blocks: SeparateBlocks | None) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = nn.ModuleDict()
        self.method, self.cuts = method, tuple(chosen.cuts)
        self.rules: tuple[Rule, ...] = ()
        self.home = chosen.partition.home(chosen.cuts)
        self.watch = Watch()
        self.checked: set[tuple[tuple[Span, ...], frozenset[str]]] = set()
        # Tuples, so that parameters are registered once, by the model.
        self._partition = (chosen.partition,)
        self._separate = (blocks,)
        self.trains = self.known = _trained(self.running.named_parameters())
        self._early_twins: dict[int, list[Twin]] = {}
        # Such a region trains only if what it takes carries a gradient.
        self.reentrant = "CheckpointFunctionBackward" in chosen.partition.graph.kinds

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.cuts) + 1

    @property
    def partition(self) -> Partition:
        """The model as it was analysed."""
        return self._partition[0]

    @property
    def running(self) -> nn.Module:
        """What was analysed: the model, or the list of modules given for it."""
        return self.partition.model

    @property
    def suspended(self) -> nn.Module:
        """What is suspended in training: the same, or separate blocks one after the other."""
        return self.running if self._separate[0] is None else self._separate[0]

    def __getattr__(self, name: str) -> Any:
        """What the network has not, such as ``config``, ``generate`` or ``save_pretrained``, is the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's own forward."""
        return self.model(*inputs, **named)

    @contextlib.contextmanager
    def opened(self, spans: Sequence[Span]) -> Iterator[OpenModel]:
        """Inside it, forwards can be begun that are suspended at the cuts; ``spans`` are those of the step."""
        self._check_whole()
        blocks = self._separate[0]
        device = self.device.type
        if blocks is not None:
            waits = [k for k in range(self.num_blocks) if any(s.covers(k) and s.stop > k + 1 for s in spans)]
            blocks.again = waits if self.method.recompute.blocks else ()
            blocks.selective = self.method.recompute.selective
            opened = OpenModel(blocks, blocks, blocks.points, self.watch, device)
        else:
            # Through the network, so that what a trainer wraps around its forward holds.
            runs = self if self.running is self.model else self.running
            opened = OpenModel(runs, self.running, [cut.point for cut in self.cuts], self.watch, device)
        with opened, _without_cache(self.model), _buffers_kept(spans, self.num_blocks):
            yield opened

    def check_ready(self) -> None:
        """Raise unless a step can begin: heads in the mode of the model, parameters as they were cut."""
        if len(self.auxiliary) and self.auxiliary.training != self.model.training:
            modes = ["training" if module.training else "eval" for module in (self.model, self.auxiliary)]
            raise TrainingError(
                f"the model is in {modes[0]} mode, its auxiliary networks are in {modes[1]} mode: call network.train() "
                "or network.eval() instead of the model's own"
            )
        named = dict(self.running.named_parameters())
        if list(named) != list(self.home):
            changed = sorted({*named} ^ {*self.home}) or list(named)
            raise PartitionError(
                f"{changed[0]!r} was added to the model or taken from it after it was cut: call localize again"
            )
        check_network(self)
        self._check_holders()
        if torch.is_grad_enabled() and not any(p.requires_grad for p in self.parameters()):
            raise TrainingError("all parameters are frozen (requires_grad=False): unfreeze what is to train")
        self.trains = _trained(named.items())

    def _check_holders(self) -> None:
        check_holder(self)
        paths = [cut.point.name.split(".") for cut in self.cuts]
        for name in dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(len(path))):
            check_holder(self.running.get_submodule(name))

    @property
    def device(self) -> torch.device:
        """Where the parameters are, or are brought as their block begins."""
        return next(self.model.parameters()).device if self.residence is None else self.residence.device

    def stepping(self) -> contextlib.AbstractContextManager[None]:
        """Around all of a step, or of an evaluation."""
        return contextlib.nullcontext() if self.residence is None else self.residence.stepping()

    def begins(self, block: int) -> None:
        """A forward is about to run ``block``."""
        if self.residence is not None:
            self.residence.begins(block)

    def ended(self, block: int) -> None:
        """The gradients of ``block`` are complete, and whoever waited for them has had them."""
        if self.residence is not None:
            self.residence.ended(block)

    def begins_at(self, block: int) -> str:
        """How a block's beginning is called in messages."""
        return repr(self.cuts[block - 1].name) if block else "the input"

    def spans(self, step: int) -> tuple[Span, ...]:
        """The spans of one step."""
        return self.method.spans(self.num_blocks, step)

    def auxiliary_of(self, span: Span) -> Auxiliary:
        """The auxiliary network whose loss trains ``span``."""
        module = self.auxiliary[span_key(span)]
        assert isinstance(module, Auxiliary)
        return module

    def auxiliaries_at(self, boundary: int) -> list[tuple[Span, Auxiliary]]:
        """Every auxiliary network on one boundary, with its span (weight 1)."""
        spans = [Span(*map(int, name.split("-"))) for name in self.auxiliary]
        return [(span, self.auxiliary_of(span)) for span in spans if span.stop == boundary]

    def parameters_of(self, block: int) -> list[nn.Parameter]:
        """The model's parameters that a block uses; a shared one belongs to the last block that does."""
        found, last = [], 0
        named = dict(self.running.named_parameters())
        for name, blocks in self.home.items():
            last = blocks[-1] if blocks else last  # one that the example did not use goes with its neighbour
            if last == block:
                found.append(named[name])
        return found

    def block_parameters(self, block: int) -> list[nn.Parameter]:
        """What is trained with one block: its parameters and those of the auxiliary networks on its output."""
        auxiliary = [p for _, aux in self.auxiliaries_at(block + 1) for p in aux.parameters()]
        unique = {id(p): p for p in (*self.parameters_of(block), *auxiliary) if p.requires_grad}
        return list(unique.values())

    def twins_at(self, boundary: int) -> list[Twin]:
        """The twins in the auxiliary networks on one boundary."""
        return _twins(auxiliary for _, auxiliary in self.auxiliaries_at(boundary))

    @property
    def twins(self) -> list[Twin]:
        """What `localgrad.exchange` moves: the ``twins`` of every bridge that has some."""
        return _twins(self.auxiliary.values())

    def exchange_before_step(self, boundary: int) -> None:
        """Move the twins on one boundary that move before the optimizer step."""
        for twin in self._early_twins.get(boundary, ()):
            if self.residence is not None:
                self.residence.having(twin.source.parameters())
            twin.update()

    def between_cuts(self) -> list[nn.Module]:
        """The largest modules of the model that have parameters and hold no cut; a cut may lie before them."""
        return list(_between(self.running, "", {cut.point.name for cut in self.cuts}))

    def compile_blocks(self, **options: Any) -> None:
        """``nn.Module.compile`` the model's modules between the cuts and the auxiliary networks, in place.

        The largest modules that hold no cut are compiled, each by itself: the whole model where there is one block.
        What the model's forward does between them runs as it is. ``options`` as for ``nn.Module.compile``.

        Raises:
            MethodError: the method recomputes pointwise operations one by one, which a compiler cannot see through.
        """
        if self.method.recompute.pointwise:
            raise MethodError(
                f"{self.method.name} recomputes pointwise operations one by one, and torch.compile does so by itself: "
                "leave out either checkpointing(where='pointwise') or the compiler"
            )
        if self.residence is not None:
            raise MethodError("compiled modules keep track of where weights are, and those of a resident network move")
        whole = self.num_blocks == 1
        modules = [*([self.running] if whole else self.between_cuts()), *self.auxiliary.values()]
        # Modules share code, and past this limit torch runs what is new as it is, with no more than a line in a log.
        compiler = torch._dynamo.config
        compiler.recompile_limit = max(compiler.recompile_limit, 8 * len(modules))
        for module in modules:
            module.compile(**options)

    def prefix(self, block: int) -> Prefix:
        """Blocks 1 to ``block`` and the head behind them as a module of their own: a smaller network, as trained.

        A copy in eval mode, which answers what that head answers in `localgrad.local_outputs`, to the bit. Where
        several heads answer there, it is that of the widest span.

        Raises:
            PartitionError: there is no such block, or the blocks cannot be called one by one.
            MethodError: no head behind it answers as the model does.
        """
        self._check_whole()
        return prefix_of(self, block)

    def exits(self, threshold: float = 0.9, *, average: bool = False) -> Exits:
        """A copy for inference that answers each sample at the first head that is sure enough of a class.

        Args:
            threshold: the probability from which a head is sure; `localgrad.exits.Exits.calibrate` chooses better ones.
            average: an exit answers with the mean of the probabilities of all heads up to its own. With a threshold
                above 1 all heads answer every sample together.

        Raises:
            PartitionError: the blocks cannot be called one by one, or samples depend on one another.
            MethodError: the method has no heads, or the task has no logits (B, C).

        Example:
            >>> import torch, localgrad
            >>> x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
            >>> method = localgrad.methods.dgl(localgrad.tasks.classification(10))
            >>> network = localgrad.localize(localgrad.models.resnet8(10), method, 3, example=x)
            >>> exits = network.exits(threshold=0.8)
            >>> logits, block = exits(x)
            >>> found = exits.calibrate([(x, y)], points=1.0)
        """
        self._check_whole()
        return exits_of(self, threshold, average)

    def _check_whole(self) -> None:
        if self.stage is not None:
            raise TrainingError("this rank has some of the network's blocks only; call network.stage.gather() first")

    def __str__(self) -> str:
        names = ["the input", *(cut.name for cut in self.cuts)]
        return f"{type(self.model).__name__} in {self.num_blocks} blocks, beginning at {', '.join(names)}"


def _trained(named: Iterable[tuple[str, nn.Parameter]]) -> frozenset[str]:
    return frozenset(name for name, parameter in named if parameter.requires_grad)


def _between(module: nn.Module, path: str, cut: set[str]) -> Iterator[nn.Module]:
    """The largest modules that hold no cut inside; a cut may lie before them."""
    if path and not any(name.startswith(path + ".") for name in cut):
        if any(True for _ in module.parameters()):
            yield module
        return
    for name, child in module.named_children():
        yield from _between(child, f"{path}.{name}" if path else name, cut)


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Inside it, a transformers model fills no key-value cache while it trains: that would keep every layer's alive."""
    known: dict[int, Any] = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    filling = [c for c in known.values() if torch.is_grad_enabled() and getattr(c, "use_cache", False) is True]
    for config in filling:
        config.use_cache = False
    try:
        yield
    finally:
        for config in filling:
            config.use_cache = True


def _buffers_kept(spans: Sequence[Span], num_blocks: int) -> contextlib.AbstractContextManager[Any]:
    """Inside it, what gets compiled may go back more than once, if a block does: else torch gives its buffers away."""
    if all(len({span.start for span in spans if span.covers(block)}) < 2 for block in range(num_blocks)):
        return contextlib.nullcontext()
    from torch._functorch import config

    return config.patch(donated_buffer=False)


def exchange(network: LocalNetwork) -> None:
    """Move every twin of ``network`` once; call it after the optimizer step.

    Does nothing for methods without twins, and for twins that move before the step.
    """
    if network.stage is not None:
        network.stage.exchange()
        return
    for twin in network.twins:
        if twin.exchange == "after":
            twin.update()


def _twins(auxiliaries: Iterable[Any]) -> list[Twin]:
    bridges = [auxiliary.bridge for auxiliary in auxiliaries if auxiliary.bridge is not None]
    return [twin for bridge in bridges for part in bridge.modules() for twin in getattr(part, "twins", ())]


def span_key(span: Span) -> str:
    """What the auxiliary network of a span is called in ``state_dict``."""
    return f"{span.start}-{span.stop}"


@dataclass(frozen=True)
class BlockInfo:
    """One block in numbers; parameters are counted, not bytes."""

    index: int
    begins_at: str
    parameters: int
    head_parameters: int
    twin_parameters: int


def block_infos(network: LocalNetwork) -> Iterator[BlockInfo]:
    """Parameters of each block, of the heads on its output, and of what never gets a gradient (twins)."""
    for index in range(network.num_blocks):
        auxiliary = [p for _, aux in network.auxiliaries_at(index + 1) for p in aux.parameters()]
        yield BlockInfo(
            index,
            network.cuts[index - 1].name if index else "input",
            sum(p.numel() for p in network.parameters_of(index)),
            sum(p.numel() for p in auxiliary if p.requires_grad),
            sum(p.numel() for p in auxiliary if not p.requires_grad),
        )
