"""What the engine itself costs: time against the number of blocks, and its Python against a loop written by hand.

python bench/engine_costs.py            # both, about ten minutes on a busy core
python bench/engine_costs.py --only overhead
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from localgrad import localize, methods, models, separate_blocks, tasks
from localgrad.costs import run_step
from localgrad.study.contest import contest
from localgrad.study.ways import Way
from step_operations import by_hand

TASK = tasks.classification(10)


def alternate(runs: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """CPU seconds of each, in turn, after two rounds that are not counted."""
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 2):
        for index in range(len(runs)):
            index = (index + turn) % len(runs)
            started = time.process_time()
            runs[index]()
            if turn > 1:
                taken[index].append(time.process_time() - started)
    return taken


def overhead(rounds: int) -> None:
    """The engine against the loop by hand, on images so small that Python is what counts, and at batch 64."""
    print("| images | by hand, ms | engine, ms | engine - by hand, ms (median of rounds) |")
    print("|---|---|---|---|")
    extra = 0.0
    for batch, side, turns in ((2, 8, 10 * rounds), (64, 32, rounds)):
        torch.manual_seed(0)
        x, y = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
        network = localize(models.resnet32(), methods.dgl(TASK), 16, example=x[:2]).train()
        blocks = separate_blocks(network)
        run_step(network, x, y)  # makes every .grad, so that both add to them
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        network.zero_grad(set_to_none=True)
        by_hand(network, blocks, x, y)
        same = [torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True)]
        assert all(same), "both must compute the same gradients"
        hand, engine = alternate([lambda: by_hand(network, blocks, x, y), lambda: run_step(network, x, y)], turns)  # noqa: B023
        difference = statistics.median(b - a for a, b in zip(hand, engine, strict=True))
        extra = extra or difference
        step = statistics.median(hand)
        print(
            f"| {batch} of 3x{side}x{side} | {1e3 * step:.2f} | {1e3 * statistics.median(engine):.2f} "
            f"| {1e3 * difference:.2f} |"
        )
    print(f"\nPython of the engine: {1e3 * extra:.2f} ms a step of 16 blocks, {100 * extra / step:.2f} % at batch 64.")


def growth(rounds: int) -> None:
    """ResNet-110 in 1 to 54 blocks: the step time, and the straight line through it."""
    counts = (1, 2, 4, 8, 16, 27, 54)
    ways = [Way(f"K={k}", "local", methods.dgl(TASK), k) for k in counts]
    found = contest("resnet110", ways, batch_size=32, image_size=32, num_classes=10, rounds=rounds)
    ratios = [row.time_ratio for row in found.rows]
    slope, start = statistics.linear_regression(counts[1:], ratios[1:])
    flop_slope, flop_start = statistics.linear_regression(counts[1:], [row.flops or 0 for row in found.rows[1:]])
    print("\n| K | time | line | off | FLOPs | line, off | activations |")
    print("|---|---|---|---|---|---|---|")
    for k, row in zip(counts, found.rows, strict=True):
        line = start + slope * k
        flops = (row.flops or 0) / (found.rows[0].flops or 1)
        flop_line = (flop_start + flop_slope * k) / (found.rows[0].flops or 1)
        memory = (row.activation_bytes or 0) / (found.rows[0].activation_bytes or 1)
        print(
            f"| {k} | {row.time_ratio:.3f} | {line:.3f} | {row.time_ratio / line - 1:+.1%} | {flops:.3f} "
            f"| {flops / flop_line - 1:+.1%} | {memory:.3f} |"
        )
    print(
        f"\nResNet-110, DGL, batch 32, end-to-end = 1 ({1e3 * found.rows[0].seconds:.0f} ms): "
        f"time = {start:.3f} + {slope:.4f} K; a block costs {1e3 * slope * found.rows[0].seconds:.2f} ms."
    )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", choices=("overhead", "growth"))
parser.add_argument("--rounds", type=int, default=9)
arguments = parser.parse_args()
torch.set_num_threads(1)
print(f"torch {torch.__version__}, 1 thread, CPU time, {arguments.rounds} rounds\n")
if arguments.only != "growth":
    overhead(arguments.rounds)
if arguments.only != "overhead":
    growth(arguments.rounds)
