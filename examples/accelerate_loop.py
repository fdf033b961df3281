"""A loop under accelerate, in one process or, started by ``torchrun --nproc-per-node=2``, in two.

    -    loss = model(**batch).loss
    -    accelerator.backward(loss)
    +    accelerator.backward(localgrad.loss(network, inputs, targets, step))

In several processes ``data_parallel`` averages the gradients of a local step, so the network itself is not prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plain_loop
import torch
from accelerate import Accelerator

import localgrad
from localgrad.distributed import data_parallel, device_mesh


def train(network: localgrad.LocalNetwork, batches: Sequence[Any]) -> list[float]:
    accelerator = Accelerator(cpu=True)
    network.to(accelerator.device)
    if accelerator.num_processes > 1:
        data_parallel(network, device_mesh("cpu", data=accelerator.num_processes))
    optimizer = accelerator.prepare(torch.optim.SGD(network.parameters(), lr=0.5))
    values = []
    for step, (inputs, targets) in enumerate(batches):
        with accelerator.split_between_processes({**inputs, "targets": targets}) as mine:
            share = mine.pop("targets")
            loss = localgrad.loss(network, mine, share, step)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


if __name__ == "__main__":
    print(train(plain_loop.network(), plain_loop.text_batches()))
