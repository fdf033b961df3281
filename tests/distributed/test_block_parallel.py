"""Blocks on several ranks give the weights of one process, bit for bit."""

from __future__ import annotations

import gang
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from zoo import METHODS, batch, build

import localgrad
from localgrad import methods
from localgrad.distributed import block_parallel

DGL = METHODS["dgl"]
EVERY = METHODS | {
    "man, before": methods.man(DGL, exchange="before", buffers="ema"),
    "man, copies": methods.man(DGL, buffers="copy"),
    "mlaan, 3 blocks, all twins": methods.mlaan(DGL, width=3, twins="all", leap="both"),
    "4 parts, windows": methods.accumulation(METHODS["windows(dgl)"], parts=4),
    "6 parts, windows of 3": methods.accumulation(methods.windows(DGL, width=3), parts=6),
    "2 parts, pgl(man(mlaan))": methods.accumulation(methods.pgl(methods.man(METHODS["mlaan(dgl)"]), every=3), parts=2),
    "2 parts, pgl(man(windows))": methods.accumulation(
        methods.pgl(methods.man(METHODS["windows(dgl)"]), every=3), parts=2
    ),
    "3 parts, e2e": methods.accumulation(METHODS["e2e"], parts=3),
    "2 parts, deep supervision": methods.accumulation(METHODS["deep_supervision"], parts=2),
}
# Bar D1: ten batches by these, and a few by all others.
LONG = ("dgl", "man(dgl)", "man_pp(dgl)", "mlaan(dgl)", "pgl(dgl)", "2 parts, pgl(man(mlaan))")


def optimizer_of(network: localgrad.LocalNetwork) -> torch.optim.Optimizer:
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)


def train(network: localgrad.LocalNetwork, reads: bool, steps: int) -> None:
    """The loop of the README; batches of 14 images, the last one of 12."""
    optimizer = optimizer_of(network)
    with localgrad.keyed_randomness(seed=3):
        for step in range(steps):
            x, y = batch(14 if step < steps - 1 else 12, seed=step) if reads else (None, None)
            for _, loss in localgrad.local_losses(network, x, y, step):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            localgrad.exchange(network)


def every_method(model: str, num_blocks: int, names: list[str]) -> dict[str, str]:
    """``equal``, why a method is refused, or which tensors differ; compared on the first rank, that gathers all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("block",))
    first = dist.get_rank() == 0
    found: dict[str, str] = {}
    for name in names:
        steps = 10 if name in LONG else 4
        network = build(model, EVERY[name], num_blocks)
        try:
            block_parallel(network, mesh)
        except localgrad.MethodError as error:
            found[name] = str(error)
            continue
        train(network, first, steps)
        network.stage.gather()
        if first:
            reference = build(model, EVERY[name], num_blocks)
            train(reference, True, steps)
            ours, theirs = network.state_dict(), reference.state_dict()
            wrong = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
            found[name] = f"{len(wrong)} of {len(theirs)} differ: {wrong[:3]}" if wrong else "equal"
    return found


REFUSED = {
    "local_critic": "lets heads follow",
    "feature_distillation": "over the whole model",
    "sgr(dgl)": "compares the gradients",
    "logit_consistency(dgl)": "compares the answers",
}


def check(found: dict[str, str]) -> None:
    wrong = {
        name: what
        for name, what in found.items()
        if what != "equal" and not (name in REFUSED and REFUSED[name] in what)
    }
    assert not wrong, wrong


def test_two_ranks_equal_one_process() -> None:
    found, _ = gang.run(every_method, 2, "residual", 4, list(EVERY), timeout=240)
    assert set(found) == set(EVERY)
    check(found)


def test_three_ranks_equal_one_process() -> None:
    names = ["dgl", "windows(dgl)", "man(dgl)", "6 parts, windows of 3", "2 parts, pgl(man(mlaan))", "3 parts, e2e"]
    found, *_ = gang.run(every_method, 3, "transformer", 4, names, timeout=240)
    assert set(found) == set(names)
    check(found)
