"""A step without data, run by the engine on fake tensors: every operation with shapes, strides and devices.

Fake tensors rather than tensors on the meta device because they know which device they stand for: on meta, fused
attention falls back to the form that keeps the attention matrix, and autocast does nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from localgrad.bench.memory import LiveBytes
from localgrad.engine import local_losses
from localgrad.errors import ConfigError
from localgrad.method import Method
from localgrad.network import LocalNetwork, auxiliary_bytes, localize
from localgrad.partition import AuxiliaryBytes, Cut, Partition, by_bytes
from localgrad.partition.choose import Held, unit_storages
from localgrad.planning.work import Rates, Work

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


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
        self._heads: tuple[Method | None, dict[Cut, AuxiliaryBytes]] = (None, {})

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

    def cuts(self, num_blocks: int, method: Method, gradients: Held = "earlier") -> tuple[Cut, ...]:
        """Where to cut so that the largest block needs least, its auxiliary network included.

        ``gradients`` as for `localgrad.partition.by_bytes`; without auxiliary networks only activations count.
        """
        if not method.terms:
            return by_bytes(self.partition, num_blocks, None, self.saved)
        known, heads = self._heads
        if known is not method:
            with _Shapes(), torch.device("meta"):
                measured = auxiliary_bytes(method, self.partition, num_blocks)
                heads = {cut: measured(cut) for cut in self.partition.cuts}
            self._heads = method, heads
        share = len(self.example) / self.batch
        return by_bytes(self.partition, num_blocks, heads.__getitem__, self.saved, gradients=gradients, share=share)

    def several_units(self, cuts: Sequence[str]) -> tuple[int, ...]:
        """Indices of the blocks that consist of several units, and so can be recomputed unit by unit."""
        names = [cut.name for cut in self.partition.cuts]
        edges = [0, *(names.index(name) + 1 for name in cuts), len(names) + 1]
        return tuple(k for k in range(len(edges) - 1) if edges[k + 1] - edges[k] > 1)

    def network(self, method: Method, cuts: Sequence[str], recompute: Sequence[int] = ()) -> LocalNetwork:
        """The model cut up, without data."""
        with _Shapes(), torch.device("meta"):
            if not cuts:
                return localize(self.model, method, num_blocks=1, example=self.example, recompute=recompute)
            return localize(self.model, method, cuts=cuts, example=self.example, recompute=recompute)

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
