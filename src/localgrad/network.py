"""A model cut into blocks, with the auxiliary networks a method puts on the boundaries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from localgrad.batches import tensors_in
from localgrad.cuts import Chosen, as_cutting
from localgrad.errors import MethodError, PartitionError, TrainingError
from localgrad.method import Auxiliary, Method, Site
from localgrad.opened import OpenModel
from localgrad.partition import (
    AuxiliaryBytes,
    Block,
    Cut,
    Partition,
    RecomputedBlock,
    SeparateBlocks,
    separate,
)
from localgrad.partition.choose import features_at, module_bytes
from localgrad.partition.units import Called
from localgrad.points import Watch
from localgrad.rehearsal import rehearse
from localgrad.rules import Rule
from localgrad.spans import Span, check
from localgrad.twins import Twin
from localgrad.untouched import untouched
from localgrad.wrapped import check_holder, check_network, check_wrapped

if TYPE_CHECKING:
    from localgrad.distributed.block_parallel import Stage
    from localgrad.distributed.data_parallel import Replicas


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
        checked: the sets of spans whose isolation a step has shown.
    """

    replicas: Replicas | None = None
    stage: Stage | None = None

    def __init__(self, model: nn.Module, method: Method, chosen: Chosen, blocks: SeparateBlocks | None) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = nn.ModuleDict()
        self.method, self.cuts = method, tuple(chosen.cuts)
        self.rules: tuple[Rule, ...] = ()
        self.home = chosen.partition.home(chosen.cuts)
        self.watch = Watch()
        self.checked: set[tuple[Span, ...]] = set()
        # Tuples, so that parameters are registered once, by the model.
        self._partition = (chosen.partition,)
        self._separate = (blocks,)
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

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's own forward."""
        return self.model(*inputs, **named)

    @contextlib.contextmanager
    def opened(self, spans: Sequence[Span]) -> Iterator[OpenModel]:
        """Inside it, forwards can be begun that are suspended at the cuts; ``spans`` are those of the step."""
        if self.stage is not None:
            raise TrainingError("this rank has some of the network's blocks only; call network.stage.gather() first")
        blocks = self._separate[0]
        device = self.device.type
        if blocks is not None:
            waits = [k for k in range(self.num_blocks) if any(s.covers(k) and s.stop > k + 1 for s in spans)]
            blocks.again = waits if self.method.recompute.blocks else ()
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
        names = [name for name, _ in self.running.named_parameters()]
        if names != list(self.home):
            changed = sorted(set(names) ^ set(self.home)) or names
            raise PartitionError(
                f"{changed[0]!r} was added to the model or taken from it after it was cut: call localize again"
            )
        check_network(self)
        self._check_holders()

    def _check_holders(self) -> None:
        check_holder(self)
        paths = [cut.point.name.split(".") for cut in self.cuts]
        for name in dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(len(path))):
            check_holder(self.running.get_submodule(name))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def begins_at(self, block: int) -> str:
        """How a block's beginning is called in messages."""
        return repr(self.cuts[block - 1].name) if block else "the input"

    def spans(self, step: int) -> tuple[Span, ...]:
        """The spans of one step."""
        return self.method.spans(self.num_blocks, step)

    def auxiliary_of(self, span: Span) -> Auxiliary:
        """The auxiliary network whose loss trains ``span``."""
        module = self.auxiliary[_key(span)]
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
        return [twin for _, auxiliary in self.auxiliaries_at(boundary) for twin in _twins(auxiliary)]

    @property
    def twins(self) -> list[Twin]:
        """What `localgrad.exchange` moves: the ``twins`` of every bridge that has some."""
        return _twins(self.auxiliary)

    def exchange_before_step(self, boundary: int) -> None:
        """Move the twins on one boundary that move before the optimizer step."""
        for twin in self._early_twins.get(boundary, ()):
            twin.update()

    def between_cuts(self) -> list[nn.Module]:
        """The largest modules of the model that have parameters and hold no cut; a cut may lie before them."""
        return list(_between(self.running, "", {cut.point.name for cut in self.cuts}))

    def compile_blocks(self, **options: Any) -> None:
        """``nn.Module.compile`` the model's modules between the cuts and the auxiliary networks, in place.

        The largest modules that hold no cut are compiled, each by itself; what the model's forward does between them
        runs as it is. ``options`` as for ``nn.Module.compile``.

        Raises:
            MethodError: the method recomputes pointwise operations one by one, which a compiler cannot see through.
        """
        if self.method.recompute.pointwise:
            raise MethodError(
                f"{self.method.name} recomputes pointwise operations one by one, and torch.compile does so by itself: "
                "leave out either checkpointing(where='pointwise') or the compiler"
            )
        for module in self.between_cuts():
            module.compile(**options)
        for auxiliary in self.auxiliary.values():
            auxiliary.compile(**options)

    def __str__(self) -> str:
        names = ["the input", *(cut.name for cut in self.cuts)]
        return f"{type(self.model).__name__} in {self.num_blocks} blocks, beginning at {', '.join(names)}"


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
    known: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
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


def _twins(module: nn.Module) -> list[Twin]:
    return [twin for part in module.modules() for twin in getattr(part, "twins", ())]


def _key(span: Span) -> str:
    return f"{span.start}-{span.stop}"


def localize(model: nn.Module, method: Method, cutting: Any, *, example: Any, shared: bool = False) -> LocalNetwork:
    """Cut ``model`` into blocks and put the auxiliary networks of ``method`` on the boundaries.

    The model is neither copied nor edited: its own forward runs, suspended at the cuts.

    Args:
        model: any module whose outputs carry a gradient; run a few times in training mode, and left as it was.
        method: from `localgrad.methods`.
        cutting: where to cut: a number of blocks; names of the modules that blocks 1 .. K-1 begin with,
            ``("layer2", "layer3")``; a list of modules that run one after the other and together are the model; or a
            value of `localgrad.cuts`.
        example: a small batch shaped as in training, on the model's device, of at least 2 samples: a tensor,
            (B, C, H, W) for images; a tuple for several inputs; a mapping of keyword arguments.
        shared: let blocks share parameters (tied embeddings): each loss trains them, and they step with the last block
            that uses them. By default a cut between two uses is refused.

    Raises:
        PartitionError: the model cannot be cut so; the message says where it can.
        MethodError: the method trains nothing on some block.
        ConfigError: nothing fits in the memory of ``cuts.fits``.

    Example:
        >>> import torch, localgrad
        >>> model = localgrad.models.resnet32(num_classes=10)
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(10))
        >>> network = localgrad.localize(model, method, 4, example=torch.randn(2, 3, 32, 32))
        >>> [cut.name for cut in network.cuts]
        ['layer1.3', 'layer2.2', 'layer3.1']
    """
    _check_model(model)
    if not isinstance(method, Method):
        raise MethodError(f"method is {method!r}; pass a value such as localgrad.methods.dgl(task)")
    chosen = as_cutting(cutting).choose(model, method, example, shared)
    partition, cuts = chosen.partition, chosen.cuts
    count = len(cuts) + 1
    patterns = method.spans.patterns(count)
    for pattern in patterns:
        check(pattern, count)
    method.check_rules(count)
    _check_overwritten(method, cuts, patterns)
    blocks = None
    if chosen.recompute or method.recompute.blocks:
        why = (
            f"{method.name} runs blocks again in the backward pass" if method.recompute.blocks else "recomputed blocks"
        )
        several = isinstance(example, (tuple, list))
        blocks = SeparateBlocks(separate.separate_blocks(partition, cuts, chosen.recompute, why), several=several)
    network = LocalNetwork(model, method, chosen, blocks)
    network._check_holders()
    features, network.watch = rehearse(network, example)
    inputs = tensors_in(example)[0]
    for stop, start in sorted({(s.stop, s.start) for pattern in patterns for s in pattern if s.stop < count}):
        site = Site(Span(start, stop), count, features[stop - 1], inputs, cuts[stop - 1], partition)
        network.auxiliary[_key(site.span)] = Auxiliary(method, site).train(model.training)
    copies = [module for module in network.auxiliary.modules() if isinstance(module, Called) and module.sources]
    if blocks is not None and copies:
        raise MethodError(
            f"{method.name} copies {type(copies[0].module).__name__}, which takes more tensors than the features (a "
            "mask, say), and runs blocks one by one, which does not have them at hand; leave out the bridge or the "
            "recomputation"
        )
    network._early_twins = {
        b: [twin for twin in network.twins_at(b) if twin.exchange == "before"] for b in range(1, count)
    }
    network.training = network.auxiliary.training = model.training
    network.rules = tuple(rule.bound(partition, cuts) for rule in method.rules)
    with untouched(network, training=True), torch.enable_grad():
        for rule in network.rules:
            rule.tried(network, example)
    return network


def separate_blocks(network: LocalNetwork) -> list[Block | RecomputedBlock]:
    """The blocks of a network as modules that can be called one by one and share its parameters.

    Raises:
        PartitionError: the model does not allow it, or they would not compute what its own forward does.
    """
    blocks = network._separate[0]
    return separate.separate_blocks(network.partition, network.cuts) if blocks is None else blocks.parts


def _check_model(model: nn.Module) -> None:
    """Raise `PartitionError` unless ``model`` is one that can be cut, and no wrapper that would be passed by."""
    if not isinstance(model, nn.Module):
        raise PartitionError(f"model is a {type(model).__name__}; localize(model, ...) takes a torch.nn.Module")
    kind = type(model).__name__
    check_wrapped(model)
    if not any(True for _ in model.parameters()):
        raise PartitionError(f"{kind} has no parameters, so no block of it can be trained")


def _check_overwritten(method: Method, cuts: Sequence[Cut], patterns: Sequence[Sequence[Span]]) -> None:
    """Raise `PartitionError` if features that are read twice are overwritten in place by the next block."""
    for boundary, cut in enumerate(cuts, start=1):
        if not cut.overwritten:
            continue
        crossed = any(span.start < boundary < span.stop for pattern in patterns for span in pattern)
        if crossed or method.bridge is not None or method.rules:
            raise PartitionError(
                f"cuts: {cut.name!r} overwrites the features at this boundary in place, but {method.name} reads them a "
                "second time; cut after it, or build that layer with inplace=False"
            )


def auxiliary_bytes(method: Method, partition: Partition, num_blocks: int) -> Callable[[Cut], AuxiliaryBytes]:
    """What the auxiliary network that ``method`` would put on a cut point saves, and its gradients."""
    features: dict[Cut, Tensor] = {}
    inputs = tensors_in(partition.example)[0]

    def measured(cut: Cut) -> AuxiliaryBytes:
        if all(span.stop == num_blocks for span in method.spans(num_blocks, 0)):
            return AuxiliaryBytes(0, 0)
        if cut not in features:
            cuts = partition.cuts if cut in partition.cuts else partition.finest
            features.update(zip(cuts, features_at(partition, cuts), strict=True))
        # As behind the first block, where auxiliary networks are largest. Where the others are much smaller, counting
        # them as they are would leave the first block next to nothing to train (docs/lean.md, "Few blocks").
        site = Site(Span(0, 1), 3, features[cut], inputs, cut, partition)
        with torch.random.fork_rng():
            auxiliary = Auxiliary(method, site)
        trained = sum(p.numel() * p.element_size() for p in auxiliary.parameters() if p.requires_grad)
        return AuxiliaryBytes(module_bytes(auxiliary, features[cut]), trained)

    return measured


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
