"""The loop of timm's own train.py: its optimizer, schedule and loss scaler.

-    loss = loss_fn(model(images), labels)
+    loss = localgrad.loss(network, images, labels, step, scale=scaler._scaler.get_scale())
     scaler(loss, optimizer, parameters=network.parameters())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler

import localgrad


def network() -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    method = localgrad.methods.dgl(localgrad.tasks.classification(3))
    return localgrad.localize(model, method, 2, example=image_batches()[0][0][:2])


def image_batches() -> list[Any]:
    """Pictures whose class is the channel that is brighter."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    images = torch.randn(48, 3, 16, 16, generator=draw)
    images[torch.arange(48), labels] += 1
    return list(zip(images.split(8), labels.split(8), strict=True))


def train(network: localgrad.LocalNetwork, batches: Sequence[Any]) -> list[float]:
    optimizer = create_optimizer_v2(network, opt="momentum", lr=0.5, momentum=0.0, filter_bias_and_bn=False)
    scheduler, _ = create_scheduler_v2(optimizer, sched="step", decay_epochs=100, num_epochs=100)
    scaler, values = NativeScaler(device="cpu"), []
    for step, (images, labels) in enumerate(batches):
        loss = localgrad.loss(network, images, labels, step, scale=scaler._scaler.get_scale())
        scaler(loss, optimizer, parameters=network.parameters())
        optimizer.zero_grad()
        scheduler.step_update(step)
        values.append(loss.item())
    return values


if __name__ == "__main__":
    print(train(network(), image_batches()))
