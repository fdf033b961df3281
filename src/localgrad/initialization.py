"""How the weights of auxiliary networks start: drawn on the CPU, so that a seed means the same on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from localgrad.site import HeadBuilder, Site

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fresh(module: nn.Module) -> nn.Module:
    """``module`` with the weights that its layers draw when they are built, on the CPU."""
    if any(p.device.type not in ("cpu", "meta") for p in module.parameters()):
        module.cpu()
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
    return module


@torch.no_grad()
def kaiming(module: nn.Module) -> nn.Module:
    """``module``, the weights of its convolutions drawn from N(0, 2 / (k^2 C_out)) on the CPU; biases stay.

    ``k^2`` are the positions of the kernel, ``C_out`` its output channels. Weights of half precision are rounded from
    float32.

    Source: He et al., ICCV 2015, arXiv:1502.01852, eq. 14 (``fan_out``).
    """
    for layer in module.modules():
        if isinstance(layer, _CONVOLUTIONS):
            weight = layer.weight
            drawn = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device="cpu")
            weight.copy_(nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu"))
    return module


@dataclass(frozen=True)
class Kaiming:
    """The head that ``head`` builds, its convolutions drawn by `kaiming`."""

    head: HeadBuilder

    def __call__(self, site: Site) -> nn.Module:
        return kaiming(self.head(site))
