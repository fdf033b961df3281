"""A model cut into blocks, with the auxiliary networks a method puts on the boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.errors import MethodError, PartitionError, nearest
from localgrad.method import Auxiliary, Method, Probe, Site
from localgrad.partition import (
    INPUTS,
    OUTPUT,
    AuxiliaryBytes,
    Block,
    Chain,
    Cut,
    Partition,
    RecomputedBlock,
    by_bytes,
    by_count,
)
from localgrad.partition.balance import Stem, module_bytes
from localgrad.partition.trace import Taps, check_runs, untouched
from localgrad.spans import Span, check
from localgrad.twins import Twin

if TYPE_CHECKING:
    from localgrad.distributed.block_parallel import Stage
    from localgrad.distributed.data_parallel import Replicas

Balance = Literal["count", "bytes"]


class LocalNetwork(nn.Module):
    """What `localize` returns. Throw it away after training and keep ``model``.

    Attributes:
        model: as it was given; its ``state_dict``, ``forward`` and ``eval()`` output are unchanged.
        blocks: K modules that share the model's parameters.
        cuts: the K - 1 cut points; block ``k`` begins at ``cuts[k - 1]``.
        method: what trains it.
        replicas: the processes that train copies of it on other samples; set by `localgrad.distributed.data_parallel`.
        stage: the blocks that this process trains while others train the rest; set by
            `localgrad.distributed.block_parallel`.
    """

    replicas: Replicas | None = None
    stage: Stage | None = None

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        blocks: Sequence[Block | RecomputedBlock],
        cuts: Sequence[Cut],
        auxiliary: nn.ModuleDict,
        probes: Sequence[Probe | None] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = auxiliary
        self.method = method
        self.cuts = tuple(cuts)
        self.blocks = tuple(blocks)  # a tuple, so that their parameters are registered once, by the model
        self.probes = tuple(probes)
        boundaries = range(1, len(self.blocks))
        self._early_twins = {b: [t for t in self.twins_at(b) if t.exchange == "before"] for b in boundaries}
        self._last_reader = {mode: _last_readers(self.blocks, mode) for mode in (True, False)}

    def forward(self, *inputs: Any) -> Any:
        """The model's own forward."""
        return self.model(*inputs)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def spans(self, step: int) -> tuple[Span, ...]:
        """The spans of one step."""
        return self.method.spans(len(self.blocks), step)

    def auxiliary_of(self, span: Span) -> Auxiliary:
        """The auxiliary network whose loss trains ``span``."""
        module = self.auxiliary[_key(span)]
        assert isinstance(module, Auxiliary)
        return module

    def auxiliaries_at(self, boundary: int) -> list[tuple[Span, Auxiliary]]:
        """Every auxiliary network on one boundary, with its span (weight 1)."""
        spans = [Span(*map(int, name.split("-"))) for name in self.auxiliary]
        return [(span, self.auxiliary_of(span)) for span in spans if span.stop == boundary]

    def block_parameters(self, block: int) -> list[nn.Parameter]:
        """What is trained with one block: its parameters and those of the auxiliary networks on its output."""
        modules: list[nn.Module] = [self.blocks[block], *(aux for _, aux in self.auxiliaries_at(block + 1))]
        unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
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

    def probed(self, block: int) -> nn.Module:
        """What runs a block: itself, or with a scalar behind its outputs if the method measures something inside."""
        probe = self.probes[block] if self.probes else None
        return self.blocks[block] if probe is None else Probed(self.blocks[block], probe)

    def last_reader(self, name: str) -> int:
        """The last block that reads a value; -1 if none does."""
        return self._last_reader[self.model.training].get(name, -1)

    def compile_blocks(self, **options: Any) -> None:
        """``torch.compile`` each block and auxiliary network, in place; ``options`` as for ``nn.Module.compile``.

        Raises:
            MethodError: the method recomputes pointwise operations one by one, which a compiler cannot see through.
        """
        if self.method.checkpoint_pointwise:
            raise MethodError(
                f"{self.method.name} recomputes pointwise operations one by one, and torch.compile does so by itself: "
                "leave out either checkpointing(where='pointwise') or the compiler"
            )
        for block in self.blocks:
            block.compile_graphs(**options)
        for auxiliary in self.auxiliary.values():
            auxiliary.compile(**options)

    def __str__(self) -> str:
        names = ["the input", *(cut.name for cut in self.cuts)]
        return f"{type(self.model).__name__} in {len(self.blocks)} blocks, beginning at {', '.join(names)}"


class Probed(nn.Module):
    """A block and what is measured inside it, as one module: the scalar follows the block's outputs."""

    def __init__(self, block: nn.Module, probe: Probe) -> None:
        super().__init__()
        self.block, self.probe = block, probe

    def forward(self, *values: Any) -> tuple[Any, ...]:
        outputs, measured = self.probe(self.block, *values)
        return (*outputs, measured)


def _twins(module: nn.Module) -> list[Twin]:
    return [twin for part in module.modules() for twin in getattr(part, "twins", ())]


def _key(span: Span) -> str:
    return f"{span.start}-{span.stop}"


def _last_readers(blocks: Sequence[Block | RecomputedBlock], training: bool) -> dict[str, int]:
    return {name: index for index, block in enumerate(blocks) for name in block.names(training)[0]}


def localize(
    model: nn.Module,
    method: Method,
    *,
    example: Any,
    num_blocks: int | None = None,
    cuts: Sequence[str] | None = None,
    modules: Sequence[nn.Module] | None = None,
    balance: Balance = "count",
    stem: Stem = "unit",
    taps: Taps = (),
    memory: str | int | None = None,
    batch_size: int | None = None,
    recompute: Sequence[int] = (),
) -> LocalNetwork:
    """Cut ``model`` into blocks and put the auxiliary networks of ``method`` on the boundaries.

    The model is neither copied nor edited. Say where to cut in one of four ways: ``num_blocks``, ``cuts``, ``modules``
    or ``memory``.

    Args:
        model: any module torch.fx can trace as far down as the cuts; traced once in each mode.
        method: from `localgrad.methods`.
        example: a small batch shaped as in training, on the model's device, (B, C, H, W); a tuple for several inputs.
        num_blocks: K; the cut points are chosen by ``balance``.
        cuts: paths of the modules that blocks 1 .. K-1 begin with, ``("layer2", "layer3")``.
        modules: K modules that run one after the other and together are the model, for what cannot be traced.
        balance: ``count`` for equally many units per block, ``bytes`` for the smallest memory of the fullest one:
            activations, head and bridge, and with ``batch_size`` gradients too, which do not grow with the batch.
        stem: what runs before the first cut point: a ``unit``, its ``own`` block, or ``merged`` with the first unit.
        taps: paths of modules whose outputs later heads read; they cross boundaries detached. ``auto`` lets whatever
            the features at a boundary are computed from cross, as ``num_blocks`` does where it finds no other way.
        memory: what there is for a training step, ``"8GiB"`` or bytes. The fewest blocks that fit are made, by
            ``localgrad.planning.fit``, which says what is counted; a warning says if plain training fits.
        batch_size: images in a training step, for ``memory`` and ``balance="bytes"``; None for those of ``example``
            under ``memory``.
        recompute: indices of blocks, from 0, to run unit by unit, each unit but the last run again in the backward
            pass, so that what one of them saves is alive at a time.

    Raises:
        PartitionError: the model cannot be cut so; the message says where it can.
        MethodError: the method trains nothing on some block.
        ConfigError: nothing fits in ``memory``.

    Example:
        >>> import torch, localgrad
        >>> model = localgrad.models.resnet32(num_classes=10)
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(10))
        >>> network = localgrad.localize(model, method, num_blocks=4, example=torch.randn(2, 3, 32, 32))
        >>> [cut.name for cut in network.cuts]
        ['layer1.3', 'layer2.2', 'layer3.1']
    """
    _check_request(model, num_blocks, cuts, modules, balance, stem, memory, batch_size, recompute)
    if not isinstance(method, Method):
        raise MethodError(f"method is {method!r}; pass a value such as localgrad.methods.dgl(task)")
    if memory is not None:
        from localgrad.planning import fit

        cuts, recompute = fit(model, method, memory, example, batch_size or len(tree_leaves(example)[0]))
        num_blocks = None if cuts else 1
    partition: Partition | Chain
    blocks: Sequence[Block | RecomputedBlock]
    if modules is not None:
        check_runs(model, example)
        partition = Chain(model, modules, example)
        blocks = partition.units
        features = _features(blocks, model, example)
        chosen = partition.measured([tuple(f.shape) for f in features])
    else:
        partition = Partition(model, example, taps)
        if not taps and num_blocks is not None and num_blocks > len(partition.cuts) + 1:
            partition = Partition(model, example, "auto")
        if cuts:
            patterns = method.spans.patterns(len(cuts) + 1)
            chosen = partition.named(cuts, spans_wider_than_one=any(s.stop - s.start > 1 for p in patterns for s in p))
        elif balance == "bytes":
            assert num_blocks is not None
            chosen = by_bytes(
                partition,
                num_blocks,
                auxiliary_bytes(method, partition, num_blocks),
                gradients="earlier" if method.terms and batch_size is not None else "none",
                share=len(tree_leaves(example)[0]) / (batch_size or len(tree_leaves(example)[0])),
            )
        else:
            assert num_blocks is not None
            chosen = by_count(partition, num_blocks, stem)
        blocks = partition.recomputed_blocks(chosen, recompute)
        features = _features(blocks, model, example)
    count = len(blocks)
    patterns = method.spans.patterns(count)
    for pattern in patterns:
        check(pattern, count)
    method.check_reconcilable(count)
    inner = sorted({(s.stop, s.start) for pattern in patterns for s in pattern if s.stop < count})
    inputs = tree_leaves(example)[0]
    auxiliary = nn.ModuleDict()
    for stop, start in inner:
        site = Site(Span(start, stop), count, features[stop - 1], inputs, chosen[stop - 1], partition)
        auxiliary[_key(site.span)] = Auxiliary(method, site).train(model.training)
    probes = [] if method.probe is None else [method.probe(partition, chosen, k) for k in range(count)]
    network = LocalNetwork(model, method, blocks, chosen, auxiliary, probes)
    if method.reconcile is not None:
        _check_twice_differentiable(network, features)
    return network


def _check_request(
    model: nn.Module,
    num_blocks: int | None,
    cuts: Sequence[str] | None,
    modules: Sequence[nn.Module] | None,
    balance: Balance,
    stem: Stem,
    memory: str | int | None,
    batch_size: int | None,
    recompute: Sequence[int],
) -> None:
    """Raise `PartitionError` unless the arguments of `localize` say where to cut, in one way."""
    if not isinstance(model, nn.Module):
        raise PartitionError(f"model is a {type(model).__name__}; localize(model, ...) takes a torch.nn.Module")
    if not any(True for _ in model.parameters()):
        raise PartitionError(f"{type(model).__name__} has no parameters, so no block of it can be trained")
    ways = {"num_blocks": num_blocks, "cuts": cuts, "modules": modules, "memory": memory}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise PartitionError(
            f"{' and '.join(given) or 'nothing'} given; say where to cut by exactly one of num_blocks=, cuts=, "
            "modules= or memory="
        )
    if num_blocks is not None and type(num_blocks) is not int:
        raise PartitionError(
            f"num_blocks={num_blocks!r} is a {type(num_blocks).__name__}; write a whole number, num_blocks=4"
        )
    if isinstance(cuts, str):
        raise PartitionError(f"cuts={cuts!r} is one string; write a tuple of module names, cuts=({cuts!r},)")
    if cuts is not None and (not cuts or not all(isinstance(name, str) for name in cuts)):
        raise PartitionError(
            f"cuts={cuts!r}; name the modules that blocks begin with, cuts=('layer2', 'layer3'), or write num_blocks=1 "
            "for a single block"
        )
    for name, value, known in (("balance", balance, get_args(Balance)), ("stem", stem, get_args(Stem))):
        if value not in known:
            raise PartitionError(nearest(str(value), known, name))
    unused = [f"balance={balance!r}"] if balance != "count" and num_blocks is None else []
    unused += [f"stem={stem!r}"] if stem != "unit" and (num_blocks is None or balance != "count") else []
    if unused:
        raise PartitionError(
            f"{unused[0]} has no effect here: it chooses among cut points with num_blocks= (and, for stem, "
            "balance='count'); leave it out"
        )
    if batch_size is not None and (batch_size < 1 or (memory is None and balance != "bytes")):
        raise PartitionError(
            f"batch_size={batch_size}: it says for how many images, at least 1, memory= or balance='bytes' chooses"
        )
    if recompute and (modules is not None or memory is not None):
        raise PartitionError(
            f"recompute={tuple(recompute)} has no effect here: a list of modules has no units to recompute, and "
            "memory= chooses by itself; leave it out, or name the cut points (cuts=...)"
        )


def auxiliary_bytes(method: Method, partition: Partition, num_blocks: int) -> Callable[[Cut], AuxiliaryBytes]:
    """What the auxiliary network that ``method`` would put on a cut point saves, and its gradients."""
    features = dict(zip(partition.cuts, _features(partition.units, partition.model, partition.example), strict=True))
    inputs = tree_leaves(partition.example)[0]

    def measured(cut: Cut) -> AuxiliaryBytes:
        if all(span.stop == num_blocks for span in method.spans(num_blocks, 0)):
            return AuxiliaryBytes(0, 0)
        # As behind the first block, where auxiliary networks are largest. Where the others are much smaller, counting
        # them as they are would leave the first block next to nothing to train (docs/lean.md, "Few blocks").
        site = Site(Span(0, 1), 3, features[cut], inputs, cut, partition)
        with torch.random.fork_rng():
            auxiliary = Auxiliary(method, site)
        trained = sum(p.numel() * p.element_size() for p in auxiliary.parameters() if p.requires_grad)
        return AuxiliaryBytes(module_bytes(auxiliary, features[cut]), trained)

    return measured


@torch.no_grad()
def _features(blocks: Sequence[Block | RecomputedBlock], model: nn.Module, example: Any) -> list[Tensor]:
    """The features at each boundary, in eval mode; checks that the blocks together are the model.

    Raises:
        PartitionError: a module list computes something else, or does not run.
    """
    values: dict[str, Any] = {INPUTS: example}
    features = []
    with untouched(model, training=False):
        for index, block in enumerate(blocks):
            try:
                outputs = block(*[values[name] for name in block.inputs])
            except Exception as error:  # a module may fail in any way on what another one returned
                raise PartitionError(
                    f"block {index} does not run on what the blocks before it return: {error}. Blocks take one tensor "
                    "and return one; list modules that run one after the other."
                ) from error
            if index < len(blocks) - 1 and not isinstance(outputs[0], Tensor):
                raise PartitionError(
                    f"block {index} returns a {type(outputs[0]).__name__}; all but the last must return one tensor. "
                    "Wrap the modules that belong together into one, nn.Sequential(a, b) for instance."
                )
            values |= zip(block.outputs, outputs, strict=True)
            features.append(outputs[0])
        arguments = example if isinstance(example, (tuple, list)) else (example,)
        expected = tree_leaves(model(*arguments))
        found = tree_leaves(values[OUTPUT])
        if len(expected) != len(found) or not all(_equal(a, b) for a, b in zip(expected, found, strict=True)):
            raise PartitionError(
                f"the blocks do not compute what {type(model).__name__}.forward does on the example: list every module "
                "that runs, in order, functions such as flatten wrapped as modules"
            )
    return features[:-1]


def _check_twice_differentiable(network: LocalNetwork, features: Sequence[Tensor]) -> None:
    """Raise `MethodError` unless the gradient of each block but the first by its input can be differentiated again."""
    model = network.model
    with untouched(model, training=True), torch.enable_grad():
        for index, block in enumerate(network.blocks[1:], start=1):
            if len(block.inputs) > 1:
                continue  # what else it reads is not at hand; the backward pass will tell
            entry = features[index - 1].detach().requires_grad_()
            (output, *_) = block(entry)
            ends = [aux.bridged(output) for _, aux in network.auxiliaries_at(index + 1)] or [tree_leaves(output)[0]]
            try:
                (gradient,) = torch.autograd.grad(ends[0].float().square().sum(), entry, create_graph=True)
                torch.autograd.grad(gradient.sum(), entry, allow_unused=True)
            except RuntimeError as error:
                raise MethodError(
                    f"{network.method.name} differentiates block {index} twice, but it holds a layer without a second "
                    f"derivative ({next(iter(str(error).splitlines()), '')}). Fused attention is the usual one: call "
                    "timm.layers.set_fused_attn(False) before timm builds the model, or build and train it under "
                    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
                ) from error


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b


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
    for index, block in enumerate(network.blocks):
        auxiliary = [p for _, aux in network.auxiliaries_at(index + 1) for p in aux.parameters()]
        yield BlockInfo(
            index,
            network.cuts[index - 1].name if index else "input",
            sum(p.numel() for p in block.parameters()),
            sum(p.numel() for p in auxiliary if p.requires_grad),
            sum(p.numel() for p in auxiliary if not p.requires_grad),
        )
