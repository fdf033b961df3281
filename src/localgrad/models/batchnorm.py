"""BatchNorm that does not learn."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_batchnorm(model: nn.Module) -> None:
    """Keep statistics, weights and biases of every BatchNorm of ``model`` as they are, also in training.

    As usual with pretrained backbones and small batches. ``model.train()`` undoes the first of them: call it again.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.requires_grad_(False)
