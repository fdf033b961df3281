"""Drawn street scenes, a U-Net trained on them by local learning, what it says of new ones.

python bench/segmentation_scenes.py results/scenes-2026-11-28/segmentation.npz

The scenes are drawn here because the pictures of CamVid may not be passed on under this repository's licence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import localgrad

CLASSES = ("sky", "building", "road", "car")
COLOURS = torch.tensor([[0.55, 0.75, 0.95], [0.6, 0.45, 0.4], [0.4, 0.4, 0.42], [0.8, 0.15, 0.15]])
HEIGHT, WIDTH, SHOWN = 64, 96, 3


def scene(seed: int) -> tuple[Tensor, Tensor]:
    """A street in colours (3, H, W) that say little by themselves, and its classes (H, W)."""
    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    horizon = whole(34, 44)
    left = 0
    while left < WIDTH:
        right = left + whole(10, 26)
        mask[whole(8, 30) : horizon, left:right] = 1
        left = right + whole(0, 6)
    mask[horizon:] = 2
    for _ in range(whole(1, 4)):
        top, side = whole(horizon - 4, HEIGHT - 14), whole(0, WIDTH - 20)
        mask[top : top + whole(7, 12), side : side + whole(12, 20)] = 3
    light = 0.7 + 0.5 * torch.rand(3, 1, 1, generator=draw)
    coarse = 0.25 * torch.randn(1, 3, 8, 12, generator=draw)
    texture = F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bilinear")[0]
    noise = 0.1 * torch.randn(3, HEIGHT, WIDTH, generator=draw)
    return (COLOURS[mask].permute(2, 0, 1) * light + texture + noise).clamp(0, 1), mask


def batch(seeds: range) -> tuple[Tensor, Tensor]:
    images, masks = zip(*map(scene, seeds), strict=True)
    return torch.stack(images), torch.stack(masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": (32, 16, 16)}
    model = localgrad.models.create("smp:Unet", num_classes=len(CLASSES), **options)
    task = localgrad.tasks.segmentation(len(CLASSES), classes=CLASSES)
    example, _ = batch(range(2))
    method = localgrad.methods.man_pp(localgrad.methods.dgl(task))
    network = localgrad.localize(model, method, ("encoder.layer1", "encoder.layer2"), example=example)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 2e-3)
    for step in range(asked.steps):
        for _, loss in localgrad.local_losses(network, *batch(range(4 * step, 4 * step + 4)), step):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
    network.eval()
    images, masks = batch(range(10**6, 10**6 + 16))
    metric = task.metric()
    with torch.no_grad():
        answers = network(images)
    metric.update(answers, masks)
    print({name: round(value, 3) for name, value in metric.compute().items()})
    pixels = (31 * images[:SHOWN]).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    said = answers[:SHOWN].argmax(1).to(torch.uint8).numpy()
    truth = masks[:SHOWN].to(torch.uint8).numpy()
    np.savez_compressed(asked.answers, images=pixels, masks=truth, answers=said, classes=np.array(CLASSES))


if __name__ == "__main__":
    main()
