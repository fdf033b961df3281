"""What exact training has against memory besides checkpointing and accumulation, each by torch's own means."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from localgrad.errors import MethodError
from localgrad.partition import Partition

BUDGETS = (0.1, 0.3, 0.5, 0.7)  # shares of what the compiler would keep; it recomputes the rest
_aten = torch.ops.aten
KEPT = [
    getattr(_aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    )
]  # fmt: skip


def selective(model: nn.Module, example: Tensor) -> None:
    """Checkpoint every unit, but keep what matrix products, convolutions and attention return.

    Source: `torch.utils.checkpoint.create_selective_checkpoint_contexts`; the policy is that of torchtitan, with every
    product kept.
    """
    options: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT)}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:  # later versions of torch ask
        options["respect_saved_tensors_hooks"] = False
    _wrap_units(model, example, partial(checkpoint_wrapper, **options))


def offloaded(model: nn.Module, example: Tensor) -> None:
    """Checkpoint every unit, and let what is kept for the backward pass wait on the host.

    Raises:
        MethodError: there is no other memory than the host's.
    """
    if not example.is_cuda:
        raise MethodError("on a CPU there is no other memory in which tensors could wait")
    _wrap_units(model, example, lambda unit: offload_wrapper(checkpoint_wrapper(unit)))


def _wrap_units(model: nn.Module, example: Tensor, wrap: Any) -> None:
    partition = Partition(model, example)
    units = [unit.module for unit in partition.units_after(partition.cuts[0])] if partition.cuts else []
    inside = [unit for unit in units if any(unit is module for module in model.modules())]
    if not inside:
        raise MethodError("the model has no units that are modules of their own, which could be checkpointed")
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: any(module is unit for unit in inside)
    )


def step_in_backward(parameters: list[nn.Parameter]) -> None:
    """Step each parameter, and let go of its gradient, as soon as it has one: SGD with momentum as in a contest.

    Source: torch's tutorial "How to save memory by fusing the optimizer step into the backward pass".
    """
    for parameter in parameters:
        optimizer = torch.optim.SGD([parameter], lr=1e-3, momentum=0.9)

        def step(_: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        parameter.register_post_accumulate_grad_hook(step)


def compiler(budget: float | None) -> Any:
    """A backend of torch.compile of its own, which keeps a share of the activations that inductor would keep.

    Torch would hand what it compiled for one contestant, with that one's budget, to the next one with modules alike. It
    tells them apart by their backends.
    """

    def compiled(graph: Any, inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=1.0 if budget is None else budget):
            return compile_fx(graph, inputs)

    return compiled
