"""A RetinaNet trained by local learning on drawn scenes, and the boxes it finds in new ones.

    python bench/detection_scenes.py results/scenes-2026-11-28/detection.npz

Scenes hold discs and squares of any colour on noise, made here, so a picture of them is free to show.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import localgrad

PIXELS, STEPS, SHOWN = 96, 200, 4
CLASSES = ("disc", "square")


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pictures (B, 3, 96, 96) in [0, 1] and their boxes."""
    images = 0.5 + 0.08 * torch.randn(count, 3, PIXELS, PIXELS, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(PIXELS), torch.arange(PIXELS), indexing="ij")
    targets = []
    for image in images:
        boxes, labels = [], []
        for _ in range(int(torch.randint(2, 4, (1,), generator=generator))):
            side = int(torch.randint(18, 36, (1,), generator=generator))
            x, y = torch.randint(0, PIXELS - side, (2,), generator=generator).tolist()
            label = int(torch.randint(2, (1,), generator=generator))
            inside = (rows >= y) & (rows < y + side) & (columns >= x) & (columns < x + side)
            if label == 0:
                middle = (side - 1) / 2
                inside &= (rows - y - middle) ** 2 + (columns - x - middle) ** 2 <= (side / 2) ** 2
            image[:, inside] = torch.rand(3, 1, generator=generator)
            boxes.append([x, y, x + side, y + side])
            labels.append(label)
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return images.clamp(0, 1), targets


def main(path: Path) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    task = localgrad.tasks.detection(len(CLASSES), mean=(0.5,) * 3, std=(0.25,) * 3)
    model = localgrad.models.retinanet(
        len(CLASSES), backbone="resnet18", version=2, norm="group", width=64, anchor_sizes=(16, 24, 40, 64, 96)
    )
    method = localgrad.methods.man_pp(localgrad.methods.dgl(task))
    cuts = ("backbone.body.layer2", "backbone.body.layer3", "backbone.body.layer4")
    network = localgrad.localize(model, method, cuts, example=torch.randn(2, 3, PIXELS, PIXELS))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    for step in range(STEPS):
        images, targets = scenes(4, generator)
        for _, loss in localgrad.local_losses(network, (images - 0.5) / 0.25, targets, step):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        localgrad.exchange(network)
    model.eval()
    metric = task.metric()
    images, targets = scenes(60, generator)
    with torch.no_grad():
        output = model((images - 0.5) / 0.25)
    metric.update(output, targets)
    print({name: round(value, 3) for name, value in metric.compute().items() if name.startswith("map")})
    kept: dict[str, list[np.ndarray]] = {"scene": [], "boxes": [], "labels": [], "scores": []}
    for index, found in enumerate(task.detections(output, targets)[:SHOWN]):
        sure = found["scores"] >= 0.4
        kept["scene"] += [np.full(int(sure.sum()), index, np.uint8)]
        for name in ("boxes", "labels", "scores"):
            kept[name] += [found[name][sure].numpy()]
    pixels = (31 * images[:SHOWN]).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    columns = {name: np.concatenate(parts) for name, parts in kept.items()}
    np.savez_compressed(path, images=pixels, classes=np.array(CLASSES), **columns)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
