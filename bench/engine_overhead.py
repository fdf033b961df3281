"""What the engine adds to a step: `localgrad.backward` against a loop written by hand, on the same modules.

python bench/engine_overhead.py        # ResNet-32 in 16 blocks, dgl

Measured with 2 images, where little else takes time, as the least of many rounds, and given as a share of a step with
64. Processor time of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from localgrad import LocalNetwork, backward, localize, methods, models, tasks
from localgrad.method import Batch

torch.set_num_threads(1)
torch.manual_seed(0)
task = tasks.classification(10)
example = torch.randn(64, 3, 32, 32)
network = localize(models.resnet32(), methods.dgl(task), num_blocks=16, example=example[:2]).train()


def by_hand(network: LocalNetwork, features: torch.Tensor, targets: torch.Tensor) -> None:
    """Block, head, loss, backward, detach."""
    heads = [network.auxiliary_of(span).heads[0] for span in network.spans(0)[:-1]]
    for block, head in zip(network.blocks, [*heads, None], strict=True):
        (output,) = block(features)
        answer = output if head is None else head(output)
        task.loss(answer, Batch(features, targets, 0)).backward()
        features = output.detach()


def seconds(work: Callable[..., object], images: int, rounds: int) -> float:
    """The least of several rounds."""
    inputs, targets = example[:images], torch.arange(images) % 10
    taken = []
    for _ in range(rounds):
        network.zero_grad(set_to_none=True)
        started = time.process_time()
        work(network, inputs, targets)
        taken.append(time.process_time() - started)
    return min(taken)


ours, theirs = float("inf"), float("inf")
for _ in range(5):  # in turn
    ours, theirs = min(ours, seconds(backward, 2, 5)), min(theirs, seconds(by_hand, 2, 5))
step = seconds(backward, 64, 3)
print(
    f"by hand {theirs * 1e3:.1f} ms, localgrad {ours * 1e3:.1f} ms with 2 images; a step with 64: {step * 1e3:.0f} ms"
)
print(f"the engine adds {(ours - theirs) * 1e3:.1f} ms, {100 * (ours - theirs) / step:.1f} % of it")
