"""Peak activation bytes of one training step of DeepLabV3-ResNet-50 in 4 blocks, against end-to-end training.

python bench/segmentation_memory.py

Exact bytes of live tensors on any machine; the share of the auxiliary networks is the peak less that of the same step
whose heads keep nothing (blocks alone, the gradient of each output a constant).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import localgrad
from localgrad.measure.memory import measure
from localgrad.method import Method, Term
from localgrad.methods import checkpointing, dgl, e2e, infopro, man_pp, mlaan, pooled
from localgrad.site import Site

STAGES = ("backbone.layer2", "backbone.layer3", "backbone.layer4")
CLASSES = 11


class Nothing(nn.Module):
    """A head that keeps nothing: the mean of the features."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean()


def alone(task: Any) -> Method:
    """The blocks without heads."""

    def build(_: Site) -> nn.Module:
        return Nothing()

    return Method("alone", task, (Term(build, lambda output, _: output, scored=False),), localgrad.spans.Local())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128))
    parser.add_argument("--batch-size", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = localgrad.tasks.segmentation(CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = localgrad.models.create("torchvision:deeplabv3_resnet50", num_classes=CLASSES)
    inputs = torch.randn(asked.batch_size, 3, *asked.size)
    masks = torch.randint(CLASSES, (asked.batch_size, *asked.size))
    large = infopro(task, head="imagenet", decoder="imagenet")
    ways: dict[str, Callable[[], localgrad.LocalNetwork]] = {}
    for method in (e2e(task), checkpointing(e2e(task)), alone(task), dgl(task), large,
                   man_pp(dgl(task)), checkpointing(man_pp(dgl(task)), where="auxiliary"), mlaan(dgl(task)),
                   checkpointing(mlaan(dgl(task))), mlaan(pooled(dgl(task), factor=2)),
                   checkpointing(mlaan(pooled(dgl(task), factor=2)))):  # fmt: skip
        for cut, cutting in (("stages", STAGES), ("bytes", localgrad.cuts.by_bytes(4))):
            if cut == "stages" or not any(name in method.name for name in ("mlaan", "infopro")):
                ways[f"{method.name}, {cut}"] = partial(localgrad.localize, model, method, cutting, example=inputs)
    reference = 0
    print("| way | peak MiB | of end-to-end | blocks begin at |\n|---|---|---|---|")
    for name, build in ways.items():
        network = build()
        network.zero_grad(set_to_none=True)
        step = measure(partial(localgrad.backward, network, inputs, masks), list(network.parameters()))
        network.zero_grad(set_to_none=True)
        reference = reference or step.peak_activations
        begins = ", ".join(cut.name.removeprefix("backbone.") for cut in network.cuts)
        peak = step.peak_activations
        print(f"| {name} | {peak / 2**20:.1f} | {peak / reference:.2f} | {begins} |", flush=True)


if __name__ == "__main__":
    main()
