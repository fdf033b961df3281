"""What the networks of recipes are made of: heads, the last block, the weights of each boundary, how weights start.

python bench/structure.py cifar10          a table of every recipe whose name contains one of the words
python bench/structure.py --boundaries man/cifar10_resnet32_k15_infopro

"heads" counts auxiliary networks, "last" the units behind the last boundary at which a gradient ends, the stem counted
as one. Weights are those of the image and of the label at the first and the last boundary, of the longest span there;
HPFF's four patches count together. Deviations are those of 3x3 convolutions at the start, narrowest and widest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from localgrad import LocalNetwork
from localgrad.bridges.momentum import MomentumBridge
from localgrad.config import validate
from localgrad.losses import Reconstruction
from localgrad.measure.tables import markdown
from localgrad.recipes import read_recipe, recipes
from localgrad.spans import Span
from localgrad.train.experiment import build_network, build_task


@dataclass(frozen=True)
class Boundary:
    """One auxiliary network: its span with its weight, and the weights of its terms, that of the image first."""

    span: Span
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Structure:
    """What one recipe builds; deviations are (narrowest, widest), None where there is no such convolution."""

    blocks: int
    boundaries: tuple[Boundary, ...]
    last_units: int
    heads: tuple[float, float] | None
    companions: tuple[float, float] | None
    twins: tuple[float, float] | None


def structure(name: str) -> Structure:
    """The structure of a recipe for images of 32 pixels in 10 classes."""
    config = validate(read_recipe(name), name)
    torch.manual_seed(0)
    network = build_network(config, build_task(config, 10, (0.5,) * 3, (0.25,) * 3), (3, 32, 32), torch.device("cpu"))
    boundaries = []
    for span in network.spans(0):
        if span.stop < network.num_blocks:
            terms = network.auxiliary[f"{span.start}-{span.stop}"].terms
            image = [weight for term, weight in terms if isinstance(term.loss, Reconstruction)]
            label = [weight for term, weight in terms if not isinstance(term.loss, Reconstruction)]
            boundaries.append(Boundary(span, (*image, *label)))
    bridges = [module for module in network.auxiliary.modules() if isinstance(module, MomentumBridge)]
    return Structure(
        network.num_blocks,
        tuple(boundaries),
        _last_units(network),
        _deviations([head for auxiliary in network.auxiliary.values() for head in auxiliary.heads]),
        _deviations([part for bridge in bridges for part in (bridge.companion, bridge.later) if part is not None]),
        _deviations([bridge.twin for bridge in bridges if bridge.twin is not None]),
    )


def _last_units(network: LocalNetwork) -> int:
    """Units, the stem counted as one, behind the last boundary at which a gradient ends."""
    start = max(span.start for span in network.spans(0))
    partition = network.partition
    return partition.num_units if start == 0 else len(partition.units_after(network.cuts[start - 1]))


def _deviations(modules: list[nn.Module]) -> tuple[float, float] | None:
    found = [layer.weight.std().item() for layer in _convolutions(modules)]
    return (min(found), max(found)) if found else None


def _convolutions(modules: list[nn.Module]) -> Iterator[nn.Conv2d]:
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                yield layer


def _cells(name: str, found: Structure) -> list[str]:
    def span(pair: tuple[float, float] | None) -> str:
        return "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"

    def weights(boundary: Boundary) -> str:
        return " / ".join(f"{weight:.4g}" for weight in boundary.weights)

    stops = [boundary.span.stop for boundary in found.boundaries]
    edges = (
        [min(b.span for b in found.boundaries if b.span.stop == stop) for stop in (stops[0], stops[-1])]
        if stops
        else []
    )
    shown = [weights(next(b for b in found.boundaries if b.span == edge)) for edge in edges]
    counts = [str(found.blocks), str(len(found.boundaries)), str(found.last_units)]
    return [name, *counts, *(shown or ["-", "-"]), span(found.heads), span(found.companions), span(found.twins)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--boundaries", action="store_true", help="the weights of every auxiliary network")
    arguments = parser.parse_args()
    names = [name for name in recipes() if "/" in name and any(word in name for word in arguments.words)]
    found = {name: structure(name) for name in names}
    if arguments.boundaries:
        for name, one in found.items():
            print(name)
            for boundary in one.boundaries:
                weights = "  ".join(f"{weight:.6g}" for weight in boundary.weights)
                print(f"  {boundary.span} {boundary.span.weight:g}  {weights}")
    else:
        titles = ["recipe", "blocks", "heads", "last", "first weights", "last weights", "of heads", "of companions"]
        rows = [[*titles, "of twins"], *(_cells(name, one) for name, one in found.items())]
        print("\n".join(markdown(rows, text={0})))
