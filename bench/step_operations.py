"""Operations of one training step as ``localgrad train`` runs it, by what they are for, and the host's time for them.

python bench/step_operations.py                      # methods in 16 blocks of ResNet-32, and dgl in 4 and 8
python bench/step_operations.py dgl:4 '[dgl, man]'   # some, as on the command line or as YAML, with a number of blocks

The recipe cifar10_resnet32 on 3x32x32 images: forward, backward, clipping, SGD with momentum, meters. Operations are
those that torch dispatches below autograd, views included: each costs the host a few microseconds, whatever its size.
"launches" are those among them that compute something, so that a GPU runs a kernel at least. "host" is time of one
thread for a step on two images of 8 pixels, where nothing else costs, all ways in turn. The rows "by hand" are
``dgl`` in a loop over its blocks that keeps no books (`by_hand`): less than that is another method.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from localgrad import LocalNetwork, keyed_randomness, separate_blocks, tasks
from localgrad.config import validate
from localgrad.measure.tables import markdown
from localgrad.measure.timing import clock_of, in_turns
from localgrad.measure.work import is_free
from localgrad.recipes import merge, read_recipe
from localgrad.spec import parse_method
from localgrad.train import loop
from localgrad.train.experiment import Experiment, build_network
from localgrad.train.meters import Meter
from localgrad.train.optim import MOMENTUM, Stepper

WAYS = (
    "e2e:1", "dgl:4", "dgl:8", "dgl:16", "[{dgl: {head: linear}}]:16", "infopro:16", "predsim:16", "auglocal:16",
    "lean:16", "dgl+man:16", "dgl+man_pp:16", "dgl+mlaan:16", "dgl+hpff:16", "dgl+pgl:16",
)  # fmt: skip
STEPS = 3  # before the one that is counted: the first ones check isolation and make the state of the optimizer
# What an operation is for, by the first of these (file, function) that is on the stack.
PURPOSES = (
    ("train/optim.py", None, "optimizer"),
    ("train/meters.py", None, "meters"),
    ("localgrad/boundary.py", "backward", "blocks, back"),
    ("torch/_tensor.py", "backward", "heads, losses, back"),
    ("localgrad/boundary.py", None, "cuts"),
    ("localgrad/method.py", None, "heads"),
    ("suspension/frames.py", "outermost", "blocks"),
    ("localgrad/passes.py", "loss", "losses"),
    ("", None, "rest"),
)


class Operations(TorchDispatchMode):
    """Counts what torch dispatches, by purpose; ``launches`` are those that compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.purposes: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.purposes[_purpose(sys._getframe(1))] += 1
            self.launches += not is_free(func)
        return func(*args, **(kwargs or {}))


def _purpose(frame: Any) -> str:
    stack = []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return next(
        purpose
        for file, function, purpose in PURPOSES
        if any(path.endswith(file) and function in (None, name) for path, name in stack)
    )


def experiment(method: str, num_blocks: int, side: int) -> Experiment:
    """The recipe by another method, without data."""
    changes = {"method": parse_method(method), "blocks": {"num_blocks": num_blocks}}
    config = validate(merge(read_recipe("cifar10_resnet32"), changes), "bench")
    torch.manual_seed(0)
    task = tasks.classification(10, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = build_network(config, task, (3, side, side), torch.device("cpu"))
    stepper = Stepper(network, config.optim, torch.amp.GradScaler("cpu", enabled=False))
    return Experiment(config, None, network, stepper, None, Meter(network))


def stepping(run: Experiment, side: int) -> Callable[[], None]:
    """One step of the training loop on two random images."""
    inputs, targets = torch.randn(2, 3, side, side), torch.tensor([1, 2])

    def step() -> None:
        run.stepper.set_learning_rate(0.1)
        with keyed_randomness(0):
            loop.step(run, inputs, targets)
        run.step += 1
        run.meter.end_batch()

    return step


def by_hand(network: LocalNetwork, blocks: Sequence[nn.Module], inputs: Tensor, targets: Tensor) -> None:
    """A DGL step over the same blocks and heads, as short as it can be written."""
    features = inputs
    for index, block in enumerate(blocks, start=1):
        (output,) = block(features)
        for _, auxiliary in network.auxiliaries_at(index):
            F.cross_entropy(auxiliary.heads[0](output), targets).backward()
        if index == len(blocks):
            F.cross_entropy(output, targets).backward()
        features = output.detach()


def stepping_by_hand(run: Experiment, side: int) -> Callable[[], None]:
    """The same without engine, meters and clipping, and one call of the optimizer."""
    inputs, targets = torch.randn(2, 3, side, side), torch.tensor([1, 2])
    blocks, parameters = separate_blocks(run.network), list(run.network.parameters())
    config = run.config.optim
    optimizer = torch.optim.SGD(
        parameters, 0.1, MOMENTUM, weight_decay=config.weight_decay, nesterov=True, foreach=True
    )

    def step() -> None:
        by_hand(run.network, blocks, inputs, targets)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def counted(step: Callable[[], None]) -> Operations:
    """The operations of a step, after some that are not counted."""
    for _ in range(STEPS):
        step()
    with Operations() as operations:
        step()
    return operations


def steps_of(ways: Sequence[str], side: int) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Name, number of blocks and step of each way, and behind each of ``dgl`` the loop by hand."""
    for way in ways:
        method, _, num_blocks = way.rpartition(":")
        run = experiment(method, int(num_blocks), side)
        yield method, num_blocks, stepping(run, side)
        if method == "dgl":
            yield "dgl by hand", num_blocks, stepping_by_hand(run, side)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="METHOD:BLOCKS", default=WAYS)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = ["e2e:1", *(way for way in arguments.ways if way != "e2e:1")]
    found = [(name, blocks, counted(step)) for name, blocks, step in steps_of(ways, 32)]
    small = [step for _, _, step in steps_of(ways, 8)]
    cpu = torch.device("cpu")
    taken = in_turns(small, arguments.rounds, cpu, warm=STEPS, clock=clock_of(cpu)[0])
    purposes = [purpose for _, _, purpose in PURPOSES]
    rows = [["method", "blocks", "operations", "ratio", "launches", "ratio", *purposes, "host, ms", "ratio"]]
    whole, seconds = found[0][2], [statistics.median(each) for each in taken]
    for (name, blocks, operations), each in zip(found, seconds, strict=True):
        total = operations.purposes.total()
        rows.append(
            [
                f"`{name}`", blocks, str(total), f"{total / whole.purposes.total():.2f}",
                str(operations.launches), f"{operations.launches / whole.launches:.2f}",
                *(str(operations.purposes[purpose]) for purpose in purposes),
                f"{1000 * each:.1f}", f"{each / seconds[0]:.2f}",
            ]
        )  # fmt: skip
    print("\n".join(markdown(rows, {0})))


if __name__ == "__main__":
    main()
