"""Tokens a second and peak memory of a Llama-type model with one block on the device, and whole where that fits.

python -m bench.one_block_speed --size 3b                    # on a GPU, AdamW, 2,048 tokens, 8 micro-batches
python -m bench.one_block_speed --size tiny --tokens 64      # on a CPU, to see that it runs

One step warms up, the median of the others counts. Random weights and tokens; bfloat16 autocast, float32 masters.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from bench.one_block_fits import Llama

import localgrad
from localgrad.measure.timing import now
from localgrad.measure.work import measure_link
from localgrad.train.experiment import device_of

SIZES = {
    "tiny": (32, 64, 4, 4, 128),
    "1b": (2048, 5632, 32, 20, 32000),
    "3b": (3072, 8192, 24, 24, 32000),
    "7b": (4096, 11008, 32, 32, 32000),
}  # width, inner width, heads, layers, vocabulary


def measured(asked: argparse.Namespace, device: torch.device, resident: bool, parts: int) -> dict[str, Any]:
    """Seconds of a step, tokens a second and the allocator's peak."""
    *_, depth, vocabulary = sizes = SIZES[asked.size]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (parts, asked.tokens), generator=generator)
    method = localgrad.methods.dgl(localgrad.tasks.language_model(vocabulary, read_out="shared"))
    if parts > 1:
        method = localgrad.methods.accumulation(method, parts=parts)
    torch.manual_seed(0)
    model = Llama(*sizes)
    cuts = tuple(f"layers.{k}" for k in range(1, depth))
    network = localgrad.localize(model, method, cuts, example=tokens[:1, :32].repeat(2, 1)).train()
    if resident:
        localgrad.resident(network, device)
    else:
        network.to(device)
    fused = True if device.type == "cuda" else None
    optimizers = [torch.optim.AdamW(network.block_parameters(k), 1e-5, fused=fused) for k in range(depth)]

    def step_block(block: int) -> None:
        optimizers[block].step()
        optimizers[block].zero_grad(set_to_none=True)

    tokens = tokens.to(device)
    seconds = []
    for step in range(asked.steps + 1):
        start = now(device)
        losses = localgrad.local_losses(
            network, tokens, tokens, step, autocast=torch.bfloat16, on_block_done=step_block
        )
        for _, loss in losses:
            loss.backward()
        seconds.append(now(device) - start)
        if step == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    taken = statistics.median(seconds[1:])
    found = {
        "resident": resident,
        "micro_batches": parts,
        "seconds": taken,
        "tokens_per_second": tokens.numel() / taken,
    }
    if device.type == "cuda":
        found["peak_GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    device = device_of("auto")
    print(json.dumps({"size": asked.size, "link_GB_per_second": measure_link(device) / 1e9}), flush=True)
    for parts in asked.parts:
        for resident in (True, False):
            try:
                print(json.dumps(measured(asked, device, resident, parts)), flush=True)
            except torch.OutOfMemoryError as error:
                print(json.dumps({"resident": resident, "micro_batches": parts, "failed": str(error)[:80]}), flush=True)


if __name__ == "__main__":
    main()
