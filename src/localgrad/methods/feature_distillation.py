"""Feature distillation from a teacher, block by block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from localgrad import heads
from localgrad.errors import MethodError, nearest
from localgrad.heads.attention_map import Energy
from localgrad.layout import ToMaps, layout_of
from localgrad.losses import AttentionTransfer
from localgrad.method import Context, Method, Network, Term
from localgrad.methods.composition import base
from localgrad.partition import Partition, by_count
from localgrad.partition.hints import Hint
from localgrad.spans import Local
from localgrad.task import Batch, Task


@base
def feature_distillation(task: Task, *, teacher: nn.Module, layers: Sequence[str] | None = None) -> Method:
    """Every block learns where a trained teacher's features are active; only the last block sees the labels.

    ``L_k = attention_transfer(h_k, t_k)`` for ``k < K``, the model's own loss for the last block, where ``t_k`` are the
    teacher's features at its k-th boundary. The teacher runs once a batch, in eval mode and without gradient.

    Args:
        task: from `localgrad.tasks`.
        teacher: a trained model for the same inputs, of any architecture.
        layers: modules of the teacher, the inputs of which are ``t_1 .. t_{K-1}``; None cuts it into K blocks of
            equally many units.

    Raises:
        MethodError: unknown layers, and when the first batch comes, a wrong number of layers.

    Example:
        >>> import localgrad
        >>> teacher = localgrad.models.resnet32(10)
        >>> localgrad.methods.feature_distillation(localgrad.tasks.classification(10), teacher=teacher).name
        'feature_distillation'

    Source: what LAKD (arXiv:2408.11478) does in our terms: isolated blocks, each distilled from the teacher's
    activation maps (Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928).
    Differs: LAKD's own map and its coupling of modules are not public in detail; this is plain attention transfer.
    """
    for name in layers or ():
        if name not in dict(teacher.named_modules()):
            raise MethodError(f"layers: {nearest(name, dict(teacher.named_modules()), 'module of the teacher')}")
    maps = Teacher(teacher, None if layers is None else tuple(layers))
    terms = (Term(heads.AttentionMap(), AttentionTransfer(maps), scored=False),)
    return Method("feature_distillation", task, terms=terms, spans=Local(), contexts=(maps,))


@dataclass(frozen=True, eq=False)
class Teacher(Context):
    """The attention maps of the teacher at each boundary, (B, 1, H, W).

    ``chosen`` are its layers by the number of boundaries, and where each looks for channels.
    """

    model: nn.Module = field(repr=False)
    layers: tuple[str, ...] | None
    chosen: dict[int, dict[str, Hint]] = field(default_factory=dict, repr=False)

    def __call__(self, network: Network, batch: Batch) -> list[Tensor]:
        boundaries = network.num_blocks - 1
        model = self.model.to(network.device)
        model.eval()
        inputs = batch.inputs.to(next(model.parameters()).dtype)
        if self.layers is not None and len(self.layers) != boundaries:
            raise MethodError(
                f"feature_distillation: {len(self.layers)} layers of the teacher for {boundaries} boundaries; name one "
                "each"
            )
        if boundaries not in self.chosen:
            partition = Partition(copy.deepcopy(model).requires_grad_(True), inputs[:2])
            names = self.layers or tuple(cut.name for cut in by_count(partition, boundaries + 1, "unit"))
            self.chosen[boundaries] = {name: partition.looked_for(name) for name in names}
        layers = self.chosen[boundaries]
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                maps = ToMaps(layout_of(arguments[0], inputs, layers[name]))(arguments[0])
                found[name] = Energy()(maps)

            return hook

        modules = dict(model.named_modules())
        hooks = [modules[name].register_forward_pre_hook(keep(name)) for name in layers]
        try:
            with torch.no_grad():
                model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in self.layers or layers]
