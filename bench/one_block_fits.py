"""What fits on a card where one block is on it at a time: predicted peaks, bytes over the link, and who binds.

python bench/one_block_fits.py                    # ViT-L, ViT-H, ViT-g, Llama-type 1B, 3B and 7B
python bench/one_block_fits.py vit_l --samples 4

Full training in bfloat16 autocast with float32 masters and AdamW, in as many blocks as layers, nothing computed: steps
run on fake tensors. The card of the times does 80 TFLOP/s, moves 1000 GB/s, and 25 GB/s over its link.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import models
from localgrad.measure.tables import markdown
from localgrad.planning import Planner, Rates
from localgrad.planning.streaming import traffic
from localgrad.task import Task

CARD = Rates(80e12, 1e12, link=25e9)
SIZES = (8, 24, 80)  # GB, of which a tenth is left free
PARTS = 8
TOKENS = 2048


class Layer(nn.Module):
    """Attention and gated MLP behind RMSNorm, rotations left out: they have no weights."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Tokens, given as numbers (B, T), in; features and the output matrix out."""

    def __init__(self, width: int, inner: int, heads: int, depth: int, vocabulary: int = 32000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.read_out = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """See `localgrad.models.ChunkedLM`."""
        x = self.embedding(tokens.long())
        for layer in self.layers:
            x = layer(x)
        return {"features": self.norm(x), "weight": self.read_out.weight.view_as(self.read_out.weight)}


class Case(NamedTuple):
    """A model, and how a micro-batch of it looks."""

    name: str
    make: Callable[[], nn.Module]
    layers: str
    samples: int


def vit(name: str) -> Callable[[], nn.Module]:
    """A vision transformer of timm."""
    return lambda: models.create(f"timm:{name}", num_classes=1000, in_channels=3, image_size=224)


CASES = {
    "vit_l": Case("ViT-L/16", vit("vit_large_patch16_224"), "blocks", 16),
    "vit_h": Case("ViT-H/14", vit("vit_huge_patch14_224"), "blocks", 16),
    "vit_g": Case("ViT-g/14", vit("vit_giant_patch14_224"), "blocks", 16),
    "llama_1b": Case("Llama-type 1B", lambda: Llama(2048, 5632, 32, 20), "layers", 1),
    "llama_3b": Case("Llama-type 3B", lambda: Llama(3072, 8192, 24, 24), "layers", 1),
    "llama_7b": Case("Llama-type 7B", lambda: Llama(4096, 11008, 32, 32), "layers", 1),
}


def row(case: Case, samples: int) -> list[str]:
    """A row of the table."""
    with torch.device("meta"):
        model = case.make().train()
    layers = list(model.get_submodule(case.layers).children())
    depth = len(layers)
    shape: tuple[int, ...]
    if case.layers == "blocks":
        task: Task = localgrad.tasks.classification(1000)
        shape, targets, method = (3, 224, 224), None, localgrad.methods.dgl(task, head="linear")
    else:
        task = localgrad.tasks.language_model(32000, read_out="shared")
        shape, targets = (TOKENS,), torch.zeros(1, TOKENS, dtype=torch.int64)
        method = localgrad.methods.dgl(task)
    batch = PARTS * samples
    planner = Planner(model, shape, batch, "bf16", CARD, task, targets)
    cuts = [f"{case.layers}.{k}" for k in range(1, depth)]
    several = localgrad.methods.accumulation(method, parts=PARTS)
    visits = planner.visits(planner.network(method, cuts), several, states=2)
    e2e = localgrad.methods.e2e(task)
    plain = planner.step(planner.network(e2e, ()), localgrad.methods.accumulation(e2e, parts=PARTS))
    whole = plain.weights + 2 * plain.trained + sum(plain.peak)
    peak = visits.kept + sum(visits.peak)
    moved = visits.fetched + visits.written
    copies = traffic(moved, visits.alone, visits.seconds, visits.seconds, CARD)
    host = moved // 2
    unit = max(_size(part) for part in (*layers, *model.children()) if part is not model.get_submodule(case.layers))
    # FSDP2 with weights on the host, and each layer checkpointed: the weights of two units, the gradients of one, the
    # features between the layers and what one layer holds.
    blocks = 3 * unit + planner.waiting(cuts) // PARTS + visits.peak[1] - visits.weights - visits.state
    streamed = PARTS * (2 * plain.weights + plain.trained)
    fits = ["yes" if peak <= 0.9 * size * 1e9 else "no" for size in SIZES]
    return [
        f"{case.name}, {depth} blocks",
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}",
        f"{samples}",
        f"{whole / 1e9:.1f}",
        f"{peak / 1e9:.1f}",
        f"{peak / whole:.2f}",
        *fits,
        f"{host / 1e9:.0f}",
        f"{moved / 1e9:.0f}",
        f"{moved / CARD.link:.1f}",
        f"{visits.seconds:.1f}",
        f"{copies.hidden_from(PARTS)}",
        f"{blocks / 1e9:.1f}",
        f"{streamed / 1e9:.0f}",
    ]


def _size(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=", ".join(CASES))
    parser.add_argument("--samples", type=int, help="of a micro-batch")
    asked = parser.parse_args()
    head = ["model", "10^9 parameters", "samples", "end to end, GB", "one block, GB", "ratio"]
    head += [f"{size} GB" for size in SIZES]
    head += ["host, GB", "moved, GB", "copies, s", "computing, s", "hidden from", "FSDP2, GB", "FSDP2 moves, GB"]
    rows = [head]
    for name in asked.models or CASES:
        rows.append(row(CASES[name], asked.samples or CASES[name].samples))
        print(" | ".join(rows[-1]), flush=True)
    print("\n".join(markdown(rows, text=(0, 6, 7, 8))))


if __name__ == "__main__":
    main()
