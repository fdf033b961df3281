"""The local step as one loss, for trainers that want one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localgrad.boundary import stopped
from localgrad.engine import local_losses, require_network
from localgrad.errors import TrainingError
from localgrad.network import LocalNetwork
from localgrad.spans import Span


def loss(
    network: LocalNetwork,
    inputs: Any,
    targets: Any,
    step: int = 0,
    *,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Run a local step, and return a scalar whose ``backward()`` hands over the gradients that it has computed.

    All blocks have gone back when it returns, so the memory of a step is that of the loop over `local_losses`: there
    is no graph of the network. ``backward()`` adds ``dL * gradient`` to each ``.grad``, where ``dL`` is the gradient
    that arrives at the scalar: dividing it for accumulation, scaling it and clipping what is in ``.grad`` mean what
    they mean for any other loss. Gradients that are waiting there already are kept beside the new ones until then.

    Args:
        network: from `localize`.
        inputs, targets, step, autocast: see `local_losses`.
        scale: factor of the losses inside the step, ``scaler.get_scale()`` under float16, where small gradients would
            become 0; it is divided out again.

    Returns:
        the model's own loss, which is comparable with that of end-to-end training, or in a step in which that rests the
        sum of the others. Without gradients (``torch.no_grad()``) it is only this value.

    Raises:
        TrainingError: under float16 without ``scale``; a parameter has a hook, which would run twice; ``backward()`` is
            called twice, or differentiated.

    Example:
        >>> import torch, localgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> task = localgrad.tasks.classification(3)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> network = localgrad.localize(model, localgrad.methods.dgl(task), 2, example=x)
        >>> localgrad.loss(network, x, y).backward()
    """
    require_network(network, "loss")
    if network.stage is not None:
        raise TrainingError("localgrad.loss runs a whole network; with block_parallel loop over local_losses")
    if network.residence is not None:
        raise TrainingError(
            "localgrad.loss hands over the gradients of all blocks, and a resident network has those of one at a time: "
            "loop over local_losses with on_block_done"
        )
    losses = local_losses(network, inputs, targets, step, autocast=autocast)
    if not torch.is_grad_enabled():
        return _value(network, list(losses))
    device = network.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else autocast
    if half == torch.float16 and scale == 1.0:
        raise TrainingError(
            "under float16 gradients inside a local step need the scaler's factor, or small ones become 0; write "
            "localgrad.loss(..., scale=scaler.get_scale()), or use bfloat16"
        )
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    _refuse_hooks(network)
    waiting = [parameter.grad for parameter in parameters]
    values: list[tuple[Span, Tensor]] = []
    try:
        for parameter in parameters:
            parameter.grad = None
        for span, value in losses:
            (value if scale == 1.0 else value * scale).backward()
            values.append((span, stopped(value)))
        found = [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, waiting, strict=True):
            parameter.grad = gradient
    handed_over: Tensor = _HandOver.apply([found], 1.0 / scale, _value(network, values), *parameters)
    return handed_over


def _value(network: LocalNetwork, values: list[tuple[Span, Tensor]]) -> Tensor:
    own = [value for span, value in values if span.stop == network.num_blocks]
    chosen = own or [value for _, value in values]
    return sum(chosen[1:], chosen[0])


def _refuse_hooks(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise TrainingError(
                f"{name!r} has a hook on its gradient, which would run in the local step and again in backward(); "
                "loop over localgrad.local_losses, where it runs once, or remove it"
            )


class _HandOver(torch.autograd.Function):
    """The value as it is; its backward pass hands over gradients that were computed before."""

    @staticmethod
    def forward(context: Any, found: list[Any], factor: float, value: Tensor, *parameters: Tensor) -> Tensor:
        context.found, context.factor = found, factor
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(context: Any, arrived: Tensor) -> Any:
        if not context.found:
            raise TrainingError(
                "backward() of localgrad.loss hands its gradients over once; call localgrad.loss again, without "
                "retain_graph"
            )
        found, factor = context.found.pop(), arrived * context.factor
        return (None, None, None, *(None if gradient is None else gradient.mul_(factor) for gradient in found))
