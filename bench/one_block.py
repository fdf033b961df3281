"""One block on the device: peak bytes of ViT-L trained in 24 blocks, against the bar, end to end and the planner.

python bench/one_block.py                         # minutes of one core; 8 GB
python bench/one_block.py --model timm:vit_tiny_patch16_224 --blocks 12

A second place on the CPU stands for the device: every tensor of a block is copied there and back, and what is counted
is what is made in a step (the copies, gradients, activations, what the optimizer makes), with what stays and the batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import localgrad
from localgrad import models
from localgrad.measure.memory import LiveBytes
from localgrad.planning import Planner, Rates
from localgrad.residence import Residence

BAR, AGAINST, HOST_TIME = 2.2, 0.12, 0.03


def stepper(network: localgrad.LocalNetwork) -> Callable[[int], None]:
    """AdamW, block by block."""
    optimizers = [torch.optim.AdamW(network.block_parameters(k), 1e-4) for k in range(network.num_blocks)]

    def step(block: int) -> None:
        optimizers[block].step()
        optimizers[block].zero_grad(set_to_none=True)

    return step


def run(network: localgrad.LocalNetwork, x: Tensor, y: Tensor, done: Callable[[int], None]) -> list[float]:
    """One step; its losses."""
    losses = []
    for _, loss in localgrad.local_losses(network, x, y, on_block_done=done):
        loss.backward()
        losses.append(loss.item())
    return losses


def block_bytes(residence: Residence) -> int:
    """Weights, gradients and two of state of the largest block."""
    network = residence.network
    sizes = []
    for block in range(network.num_blocks):
        here = {id(t): t for t in residence.tensors_of(block)}  # weights, buffers and state
        gradients = sum(t.nbytes for t in here.values() if isinstance(t, nn.Parameter) and t.requires_grad)
        sizes.append(sum(t.nbytes for t in here.values()) + gradients)
    return max(sizes)


def activations(network: localgrad.LocalNetwork, x: Tensor, y: Tensor) -> int:
    """The most that one micro-batch needs in any block, gradients left out."""
    with LiveBytes(network.parameters()) as live:
        run(network, x, y, lambda block: network.zero_grad(set_to_none=True))
    return live.peak_activations


@contextmanager
def timed() -> Iterator[list[float]]:
    """Processor time inside the calls that tell a residence what begins and ends."""
    spent = [0.0]
    names = ("begins", "ended", "having", "_called", "_left", "follow", "_go_home")
    originals = {name: getattr(Residence, name) for name in names}
    depth = 0

    def outer(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            start = time.process_time()
            try:
                return original(self, *args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    spent[0] += time.process_time() - start

        return call

    try:
        for name, original in originals.items():
            setattr(Residence, name, outer(original))
        yield spent
    finally:
        for name, original in originals.items():
            setattr(Residence, name, original)


def copy_time(residence: Residence) -> float:
    """Processor time of the copies of a step alone."""
    start = time.process_time()
    for block in range(residence.network.num_blocks):
        homes = [tensor.data for tensor in residence.tensors_of(block)]
        there = [home.to(residence.device, copy=True) for home in homes]
        for home, copied in zip(homes, there, strict=True):
            home.copy_(copied)
    return time.process_time() - start


def host_time(rounds: int = 9) -> float:
    """The share of a step that the machinery takes beside the copies: a small network, where it weighs most."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    method = localgrad.methods.dgl(localgrad.tasks.classification(10), head="linear")
    network = localgrad.localize(models.resnet32(10), method, 16, example=x[:2]).train()
    done = stepper(network)
    residence = localgrad.resident(network, "cpu")
    run(network, x, y, done)
    shares = []
    for _ in range(rounds):
        with timed() as spent:
            start = time.process_time()
            run(network, x, y, done)
            whole = time.process_time() - start
        copies = copy_time(residence)
        shares.append((spent[0] - copies) / (whole - copies))
    return statistics.median(shares)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm:vit_large_patch16_224")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--parts", type=int, default=8, help="micro-batches, of one image")
    asked = parser.parse_args()
    found: dict[str, Any] = {"model": asked.model, "blocks": asked.blocks, "micro_batches": asked.parts}
    found["host_time"] = host_time()
    print(f"host time of the machinery: {found['host_time']:.2%} of a step (bar {HOST_TIME:.0%})", flush=True)
    side, classes = models.made_for(asked.model)
    torch.manual_seed(0)
    x, y = torch.randn(asked.parts, 3, side, side), torch.randint(classes, (asked.parts,))
    task = localgrad.tasks.classification(classes)
    local = localgrad.methods.dgl(task, head="linear")
    method = localgrad.methods.accumulation(local, parts=asked.parts) if asked.parts > 1 else local

    def model() -> nn.Module:
        torch.manual_seed(0)
        return models.create(asked.model, num_classes=classes, in_channels=3, image_size=side)

    # End to end with as many micro-batches, without data: weights, gradients, state, activations.
    planner = Planner(model(), (3, side, side), asked.parts, "fp32", Rates(1.0, 1.0), task)
    e2e = localgrad.methods.e2e(task)
    whole = localgrad.methods.accumulation(e2e, parts=asked.parts) if asked.parts > 1 else e2e
    plain = planner.step(planner.network(e2e, ()), whole)
    found["end_to_end"] = plain.weights + 2 * plain.trained + sum(plain.peak)
    cuts = [cut.name for cut in planner.cuts(asked.blocks, local, "own")]
    visits = planner.visits(planner.network(local, cuts), method, states=2)
    found["predicted"] = visits.kept + sum(visits.peak)
    print(f"end to end {found['end_to_end'] / 2**20:.1f} MiB, predicted {found['predicted'] / 2**20:.1f}", flush=True)

    network = localgrad.localize(model(), local, cuts, example=x[:2]).train()
    one = activations(network, x[:1], y[:1])
    print(f"one micro-batch: {one / 2**20:.1f} MiB", flush=True)
    residence = localgrad.resident(network, "cpu")
    done = stepper(network)
    run(network, x[:1], y[:1], done)  # in which the optimizers make their state
    network.method, before = method, residence.fetched + residence.written
    gc.collect()
    with LiveBytes() as device:
        losses = run(network, x, y, done)
    staying = sum((1 + 2 * t.requires_grad) * t.nbytes for t in residence.kept)  # with state
    peak = device.peak + staying + x.nbytes + y.nbytes
    block = block_bytes(residence)
    found |= {
        "peak": peak,
        "stays": staying,
        "block": block,
        "activations_of_one": one,
        "in_blocks": (device.peak - one) / block,
        "against_end_to_end": peak / found["end_to_end"],
        "predicted_off": found["predicted"] / peak - 1,
        "moved_a_step": residence.fetched + residence.written - before,
        "loss": sum(losses),
    }
    print(json.dumps(found, indent=1))
    print(f"{found['in_blocks']:.2f} blocks (bar {BAR})")
    print(f"{found['against_end_to_end']:.3f} of end to end (bar {AGAINST})")


if __name__ == "__main__":
    main()
