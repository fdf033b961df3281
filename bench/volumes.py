"""Trains a 3-D network in blocks, and says what its heads weigh.

python bench/volumes.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torchvision.models.video import r3d_18

import localgrad
from localgrad import methods, tasks

TASK = tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)
METHODS: dict[str, Callable[[], localgrad.Method]] = {
    "dgl": lambda: methods.dgl(TASK),
    "infopro": lambda: methods.infopro(TASK),
    "man_pp(dgl)": lambda: methods.man_pp(methods.dgl(TASK)),
    "lean": lambda: methods.lean(TASK),
    "lean(depth=1)": lambda: methods.lean(TASK, depth=1),
}

torch.set_num_threads(1)
warnings.simplefilter("ignore")
torch.manual_seed(0)
videos, targets = torch.rand(4, 3, 8, 32, 32), torch.randint(10, (4,))
print("| method | loss, first and fourth step | parameters of heads | largest head |\n|---|---|---|---|")
for name, make in METHODS.items():
    torch.manual_seed(0)
    model = r3d_18(num_classes=10)
    network = localgrad.localize(model, make(), 4, example=videos[:2])
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.01, momentum=0.9)
    sums = []
    for step in range(4):
        losses = localgrad.backward(network, videos, targets, step)
        sums.append(sum(float(loss) for loss in losses.values()))
        optimizer.step()
        optimizer.zero_grad()
        localgrad.exchange(network)
    whole = sum(p.numel() for p in model.parameters())
    heads = [sum(p.numel() for p in head.parameters() if p.requires_grad) for head in network.auxiliary.values()]
    print(
        f"| `{name}` | {sums[0]:.1f}, {sums[3]:.1f} | {sum(heads) / whole:.2f} | {max(heads) / whole:.2f} |", flush=True
    )
