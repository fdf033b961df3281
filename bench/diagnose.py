"""Probe accuracy, gradient cosine with end-to-end training and similarity to another run, block by block.

localgrad compare cifar10_resnet32 -m dgl -k 16 --keep --out runs/mine
python bench/diagnose.py --reference runs/mine/runs/KEY_OF_E2E runs/mine/runs/KEY_OF_DGL ...

The key of a run is ``run`` in its row of rows.jsonl. Training images are augmented as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from localgrad import methods
from localgrad.engine import backward, features
from localgrad.layout import ToMaps, layout_of
from localgrad.localization import localize
from localgrad.network import LocalNetwork
from localgrad.spec import method_name
from localgrad.train.experiment import Experiment, build
from localgrad.train.finished import read_config
from localgrad.train.folder import RunFolder


@torch.no_grad()
def features_of(network: LocalNetwork, inputs: Tensor, grid: int = 4) -> Iterator[Tensor]:
    """Pooled features behind each block in eval mode, (B, C * grid ** 2): positions averaged to ``grid x grid``.

    Args:
        network: left in eval mode.
        inputs: (B, C, H, W).
    """
    network.eval()
    hints = [*(cut.channels_hint for cut in network.cuts), None]
    for behind, hint in zip(features(network, inputs), hints, strict=True):
        if behind.ndim > 2:
            maps = ToMaps(layout_of(behind, inputs, hint))(behind)
            behind = F.adaptive_avg_pool2d(maps, (min(grid, maps.shape[2]), min(grid, maps.shape[3])))
        yield behind.flatten(1)


def linear_probe(train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, ridge: float = 1.0) -> float:
    """Share of the test samples that a linear classifier on ``train`` (N, D) gets right.

    The classifier is ridge regression on one-hot targets, each feature standardised by ``train``; its penalty is
    ``ridge * N / 100``. It is fitted exactly, so that probes differ by their features only.
    """
    mean, spread = train.double().mean(0), train.double().std(0).clamp_min(1e-8)
    x, z = ((part.double() - mean) / spread for part in (train, test))
    onehot = F.one_hot(train_targets, int(train_targets.max()) + 1).double()
    centre = onehot.mean(0)
    penalty = ridge * len(x) / 100 * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (onehot - centre))
    return (((z @ weight) + centre).argmax(1) == test_targets).double().mean().item()


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Similarity in [0, 1] of two sets of features (N, D) and (N, E) of the same samples; rotations do not count.

    ``|| a' b ||^2 / (|| a' a || * || b' b ||)`` in Frobenius norms, columns centred.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv:1905.00414.
    """
    a, b = (part.double() - part.double().mean(0) for part in (a, b))
    # By the samples' products: there are fewer samples than pairs of features.
    inner_a, inner_b = a @ a.T, b @ b.T
    return ((inner_a * inner_b).sum() / (inner_a.norm() * inner_b.norm())).item()


def gradient_cosines(network: LocalNetwork, inputs: Tensor, targets: Any) -> list[float]:
    """For each block, the cosine between the gradient its method gives and the one of end-to-end training.

    Both at the same weights, on the same batch, in training mode; auxiliary networks are left out. NaN for a block
    without parameters. BatchNorm statistics and gradients are left as they were.
    """
    network.train()
    buffers = [buffer.clone() for buffer in network.buffers()]
    names = tuple(cut.name for cut in network.cuts)
    whole = localize(network.model, methods.e2e(network.method.task), names or 1, example=inputs[:2])
    found = []
    for one in (network, whole):
        one.zero_grad(set_to_none=True)
        backward(one, inputs, targets)
        found.append([_flat(p.grad for p in one.parameters_of(k)) for k in range(one.num_blocks)])
        one.zero_grad(set_to_none=True)
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return [F.cosine_similarity(a, b, 0).item() if a.numel() else float("nan") for a, b in zip(*found, strict=True)]


def _flat(gradients: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([torch.zeros(0), *(g.detach().flatten().cpu() for g in gradients if g is not None)])


def finished(folder: Path) -> Experiment:
    """The run that ``localgrad compare --keep`` or ``localgrad train`` left in ``folder``, as it ended.

    Raises:
        CheckpointError: no finished run there.
    """
    experiment = build(read_config(folder))
    RunFolder(folder).restore(experiment)
    return experiment


def diagnose(folder: Path, reference: Path | None, samples: int) -> dict[str, list[float]]:
    """Linear probe, gradient cosine and, beside a ``reference`` run of the same model, CKA behind each block.

    Args:
        folder: of a finished run of a classifier.
        reference: of another one, such as end-to-end training.
        samples: training images to fit probes on, and test images to score them.
    """
    run = finished(folder)
    x, y = _samples(run.data.train, samples)
    u, v = _samples(run.data.test, samples)
    behind = [list(features_of(run.network, part)) for part in (x, u)]
    found = {"probe": [linear_probe(a, y, b, v) for a, b in zip(*behind, strict=True)]}
    found["gradient cosine"] = gradient_cosines(run.network, x[:256], y[:256])
    if reference is not None:
        other = finished(reference).network.model.state_dict()
        run.network.model.load_state_dict(other)
        found["CKA"] = [linear_cka(a, b) for a, b in zip(behind[1], features_of(run.network, u), strict=True)]
    return found


def _samples(loader: Any, count: int) -> tuple[Tensor, Tensor]:
    inputs, targets = [], []
    for x, y in loader.epoch(0):
        inputs.append(x)
        targets.append(y)
        if sum(map(len, inputs)) >= count:
            break
    return torch.cat(inputs)[:count], torch.cat(targets)[:count]


def main() -> None:
    """One table for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, help="a run of the same model, end-to-end training say")
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    for folder in arguments.runs:
        config = read_config(folder)
        found = diagnose(folder, arguments.reference, arguments.samples)
        print(f"\n{method_name(config.method)}, {config.blocks.num_blocks} blocks, seed {config.train.seed}\n")
        print("| after block | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
        for block, values in enumerate(zip(*found.values(), strict=True), start=1):
            print(f"| {block} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
