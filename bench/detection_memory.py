"""Peak activation bytes and FLOPs of one training step of RetinaNet-R50 in 4 blocks, against end-to-end training.

    python bench/detection_memory.py --out results/detection-2026-11-21/memory.json
    python bench/detection_memory.py --out results/detection-2026-11-21/memory.json --cuts layer1.2 layer2.2 layer4.1 \\
        --methods dgl dgl+man_pp

Without --cuts blocks are balanced by bytes, which knows nothing of the loss of the model's own head. What heads need is
what autograd saves in the auxiliary network of the boundary where that is most, and their parameters beside the
model's. Bytes are exact (`localgrad.costs`), so one step is enough.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import localgrad
from localgrad.costs import cost
from localgrad.partition.choose import module_bytes
from localgrad.spec import build_method, parse_method

METHODS = ("e2e", "e2e+checkpointing", "dgl", "dgl+man_pp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--cuts", nargs="+", help="below backbone.body; default balanced by bytes")
    parser.add_argument("--head-width", type=int, help="of auxiliary heads; default as localgrad.tasks.detection")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    inputs = torch.randn(asked.batch_size, 3, asked.pixels, asked.pixels)
    box = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.8]]) * asked.pixels
    targets = [{"boxes": box, "labels": torch.tensor([3, 17])} for _ in inputs]
    rows = json.loads(asked.out.read_text()) if asked.out.exists() else []
    for name in asked.methods:
        torch.manual_seed(0)
        model = localgrad.models.retinanet(80)
        spec = parse_method(name)
        method = build_method(spec, localgrad.tasks.detection(80, head_width=asked.head_width))
        cutting: Any = localgrad.cuts.by_bytes(asked.num_blocks)
        if asked.cuts:
            cutting = [f"backbone.body.{name}" for name in asked.cuts]
        network = localgrad.localize(model, method, cutting, example=inputs).train()
        measured = cost(network, inputs, targets)
        heads = [
            module_bytes(auxiliary, torch.zeros(cut.shape))
            for boundary, cut in enumerate(network.cuts, start=1)
            for _, auxiliary in network.auxiliaries_at(boundary)
        ]
        rows.append(
            {
                "method": name,
                "pixels": asked.pixels,
                "batch_size": asked.batch_size,
                "head_width": asked.head_width,
                "cuts": [cut.name for cut in network.cuts],
                "activation_bytes": measured.activation_bytes,
                "flops": measured.flops,
                "parameters": measured.parameters,
                "auxiliary_parameters": measured.auxiliary_parameters,
                "largest_head_bytes": max(heads, default=0),
            }
        )
        first = rows[0]
        print(
            f"| `{name}` | {measured.activation_bytes / 2**20:.0f} MiB | "
            f"{measured.activation_bytes / first['activation_bytes']:.2f} | {max(heads, default=0) / 2**20:.0f} MiB | "
            f"{measured.flops / first['flops']:.2f} | {measured.auxiliary_parameters / measured.parameters:.2f} |",
            flush=True,
        )
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
