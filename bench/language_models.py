"""Bits per byte of a Llama-type model that reads bytes: end to end and by local forms, at equal tokens.

    python bench/language_models.py run --text PATH --out results/language-models-2026-11-28 --seed 0 [--only NAME ...]
    python bench/language_models.py report --out results/language-models-2026-11-28

``run`` trains each way that has no row yet, one after the other, and adds its row to ``runs-SEED.jsonl``. It can be
stopped and started again. ``report`` prints the tables; scripts/figures.py draws the curves. PATH is a folder with
``train`` and ``test``, of plain text.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import localgrad
from localgrad.costs import cost
from localgrad.data.text import load
from localgrad.method import Method
from localgrad.models import ChunkedLM
from localgrad.study.rows import add_row, read_rows
from localgrad.task import Task

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 8, 128, 4, 128, 16
STEPS, WARMUP, RATE, DECAY = 1000, 100, 1e-3, 0.1
EVERY, WINDOWS = 100, 512
m = localgrad.methods


@dataclass(frozen=True)
class Way:
    """Blocks, what the heads read out with, and the method of a task."""

    blocks: int
    read_out: Any
    method: Callable[[Task], Method]


WAYS: dict[str, Way] = {
    "e2e": Way(1, "own", m.e2e),
    "dgl, K=4": Way(4, "own", m.dgl),
    "dgl shared, K=4": Way(4, "shared", m.dgl),
    "auglocal 1 layer, K=4": Way(4, "own", lambda task: m.auglocal(task, depth=1, tail=1)),
    "dgl, K=2": Way(2, "own", m.dgl),
    "dgl shared, K=2": Way(2, "shared", m.dgl),
    "auglocal 1 layer, K=2": Way(2, "own", lambda task: m.auglocal(task, depth=1, tail=1)),
    "pgl(dgl), K=4": Way(4, "own", lambda task: m.pgl(m.dgl(task), every=10, recompute=False)),
    "windows(dgl), K=4": Way(4, "own", lambda task: m.windows(m.dgl(task))),
    "lean 2 layers, K=4": Way(4, "own", lambda task: m.lean(task, factor=1)),
    "man_pp, K=4": Way(4, "own", lambda task: m.man_pp(m.dgl(task))),
    "lean 2 layers, K=2": Way(2, "own", lambda task: m.lean(task, factor=1)),
}


def network_of(way: Way, seed: int) -> localgrad.LocalNetwork:
    """The network of a way; the model's first weights depend on the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=352, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=256,
        max_position_embeddings=CONTEXT, use_cache=False,
    )  # fmt: skip
    model = ChunkedLM(LlamaForCausalLM(config)).train()
    task = localgrad.tasks.language_model(256, read_out=way.read_out)
    cuts: Any = [f"model.model.layers.{k * LAYERS // way.blocks}" for k in range(1, way.blocks)] or 1
    return localgrad.localize(model, way.method(task), cuts, example=torch.zeros(2, CONTEXT, dtype=torch.int64))


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))))


@torch.no_grad()
def bits(network: localgrad.LocalNetwork, batches: list[Tensor]) -> dict[str, float]:
    """Bits per byte of every head on the test text, by the boundary that it reads; ``model`` is the last one."""
    network.eval()
    task: Any = network.method.task
    metrics: dict[str, Any] = {}
    for tokens in batches:
        for span, term, output in localgrad.local_outputs(network, tokens):
            name = "model" if term is None else f"block {span.stop}"
            metrics.setdefault(name, task.metric()).update(output, tokens)
    network.train()
    return {name: metric.compute()["bits"] for name, metric in metrics.items()}


def train(way: Way, seed: int, steps: int, text: str) -> dict[str, Any]:
    """A row: the curve of bits per byte, processor seconds of training, and what a step costs."""
    data = load(text, context=CONTEXT, tokenizer="bytes", batch_size=BATCH, eval_batch_size=64, validation=0, seed=seed)
    test = [tokens for tokens, _ in islice(data.test.epoch(0), WINDOWS // 64)]
    network = network_of(way, seed)
    found = cost(network, test[0][:BATCH], test[0][:BATCH])
    whole = nn.ModuleList([network.model, network.auxiliary])
    decayed = [p for p in whole.parameters() if p.dim() > 1]
    others = [p for p in whole.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    stream = (tokens for epoch in count() for tokens, _ in data.train.epoch(epoch))
    curve, seconds = [], 0.0
    for step, tokens in enumerate(islice(stream, steps)):
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        for _, loss in localgrad.local_losses(network, tokens, tokens, step=step):
            loss.backward()
        optimizer.step()
        localgrad.exchange(network)
        optimizer.zero_grad()
        seconds += time.process_time() - start
        if (step + 1) % EVERY == 0:
            curve.append({"step": step + 1, "seconds": round(seconds, 1), **bits(network, test)})
            print(json.dumps(curve[-1]), flush=True)
    return {"curve": curve, "activation_bytes": found.activation_bytes, "flops": found.flops}


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    path = Path(arguments.out) / f"runs-{arguments.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, way in WAYS.items():
        key = name if arguments.steps == STEPS else f"{name}, {arguments.steps} steps"
        if (arguments.only and name not in arguments.only) or key in read_rows(path, "way"):
            continue
        print(key, flush=True)
        row = train(way, arguments.seed, arguments.steps, arguments.text)
        add_row(path, {"way": key, "seed": arguments.seed, "steps": arguments.steps, **row})


def bits_at(curve: list[dict[str, float]], seconds: float) -> float:
    """The model's bits after so many processor seconds, on a straight line between two points of a curve."""
    points = [(point["seconds"], point["model"]) for point in curve]
    for (before, high), (after, low) in pairwise(points):
        if before <= seconds <= after:
            return high + (low - high) * (seconds - before) / (after - before)
    return points[-1][1]


def report(arguments: argparse.Namespace) -> None:
    """Tables at equal tokens and at equal processor time, and the gap over training."""
    out = Path(arguments.out)
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("runs-*.jsonl")):
        for name, row in read_rows(path, "way").items():
            rows.setdefault(name, []).append(row)
    whole = {row["seed"]: row for row in rows["e2e"]}
    limit = {seed: row["curve"][-1]["seconds"] for seed, row in whole.items()}

    def mean(name: str, of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(map(of, rows[name]))

    print("| way | bits per byte (seeds) | to end to end | at its processor time | best head | activations | FLOPs |")
    print("|---|---|---:|---:|---|---:|---:|")
    for name in (name for name in WAYS if name in rows):
        last = [row["curve"][-1] for row in rows[name]]
        heads = [key for key in last[0] if key not in ("step", "seconds")]
        best = min(heads, key=lambda head: statistics.mean(point[head] for point in last))
        gap = mean(name, lambda row: row["curve"][-1]["model"] / whole[row["seed"]]["curve"][-1]["model"] - 1)
        timed = mean(
            name, lambda row: bits_at(row["curve"], limit[row["seed"]]) / whole[row["seed"]]["curve"][-1]["model"] - 1
        )
        each = ", ".join(f"{point['model']:.3f}" for point in last)
        memory = mean(name, lambda row: row["activation_bytes"] / whole[row["seed"]]["activation_bytes"])
        flops = mean(name, lambda row: row["flops"] / whole[row["seed"]]["flops"])
        figures = f"{statistics.mean(point['model'] for point in last):.3f} ({each})"
        print(
            f"| {name} | {figures} | {gap:+.1%} | {timed:+.1%} | {best} {statistics.mean(p[best] for p in last):.3f} "
            f"| {memory:.3f} | {flops:.2f} |"
        )
    steps = [point["step"] for point in rows["e2e"][0]["curve"]][1::2]
    print("\n| gap at step | " + " | ".join(map(str, steps)) + " |\n|---|" + "---:|" * len(steps))
    for name in (name for name in WAYS if name in rows and name != "e2e"):
        cells = []
        for index in (step // EVERY - 1 for step in steps):
            gaps = [
                row["curve"][index]["model"] / whole[row["seed"]]["curve"][index]["model"] - 1 for row in rows[name]
            ]
            cells.append(f"{statistics.mean(gaps):+.1%}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--text", required=True)
    runs.add_argument("--out", required=True)
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--steps", type=int, default=STEPS)
    runs.add_argument("--only", action="append")
    runs.set_defaults(do=run)
    reports = commands.add_parser("report")
    reports.add_argument("--out", required=True)
    reports.set_defaults(do=report)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
