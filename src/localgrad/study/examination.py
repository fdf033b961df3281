"""Does all that the library promises hold for one model? Cut, compared with the model itself, and trained."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localgrad import methods, tasks
from localgrad.batches import call_model, tensors_in
from localgrad.engine import backward, local_losses, local_outputs
from localgrad.errors import ConfigError, LocalgradError, MethodError, TrainingError
from localgrad.localization import localize
from localgrad.method import Method
from localgrad.network import LocalNetwork, exchange
from localgrad.randomness import keyed_randomness, seeded, seeded_everywhere
from localgrad.suspension.untouched import untouched
from localgrad.task import Batch, Task
from localgrad.testing import assert_isolated

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A model and all that is needed to train it.

    Args:
        model: fresh, in training mode.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments, 4 samples.
        targets: what the task's loss reads.
        task: reads the model's own output.
        num_blocks: into which it is to be cut.
        shared: whether modules far apart in the model have a parameter in common.
        image_size: pixels a side, noted in the row of a classifier of images.
    """

    model: nn.Module
    inputs: Any
    targets: Any
    task: Task
    num_blocks: int = 4
    shared: bool = False
    image_size: int | None = None


NUM_BLOCKS, NUM_CLASSES, STEPS = 4, 10, 5
SIZES = (64, 96, 112, 128)
BATCH_SIZE, LARGE_BATCH_SIZE = 4, 2  # images, and those of more pixels a side than the last of SIZES
LEARNING_RATES = (0.05, 0.005, 0.0005, 0.000005)

CHECKS = {
    "cut": f"cut into {NUM_BLOCKS} blocks, or as many as a `Candidate` asks for",
    "eval": "the suspended forward returns what the model does in eval mode, bit for bit",
    "gradients": "gradients of e2e on the blocks, and buffers after it, equal those of loss.backward(), bit for bit",
    "isolated": "each local loss of dgl trains its own block and head only, and all of them",
    "dgl": f"{STEPS} training steps with dgl",
    "loss": "the sum of dgl's losses falls over these steps on one batch",
    "man_pp": f"{STEPS} training steps with man_pp(dgl), each with an exchange",
}

Build = Callable[[int | None], nn.Module]
Check = Callable[[str], contextlib.AbstractContextManager[None]]


def examine(name: str, prepare: Callable[[], Callable[[], Candidate]]) -> Row:
    """The row of one model.

    Args:
        name: of the model.
        prepare: returns what makes the candidate, the same at each call given torch's generator in the same state;
            `classifier` for a model of images.

    Returns:
        A dictionary for JSON: ``checks`` says for each of `CHECKS` whether it holds (None: not reached, or refused),
        ``reasons`` why not, ``refused`` which methods the library refuses for the model and why, ``cut_points`` how
        many places a block may begin at, ``image_size`` the pixels a side of images, ``block_losses`` the loss of each
        block at each step, ``seconds`` how long it all took. ``ok``: every check holds but for what is refused.
    """
    started = time.monotonic()
    row = new_row(name)
    checks = row["checks"]

    @contextlib.contextmanager
    def check(what: str) -> Iterator[None]:
        row["reasons"].pop(what, None)
        try:
            yield
        except Exception as error:  # models may fail in any way
            row["reasons"][what] = _one_line(error)
        if what not in row["refused"]:
            checks[what] = what not in row["reasons"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _examine(row, check, prepare())
        except Exception as error:
            row["reasons"]["built"] = _one_line(error)
    row["ok"] = all(holds or what in row["refused"] for what, holds in checks.items())
    return row | {"seconds": round(time.monotonic() - started, 1)}


def classifier(build: Build, sizes: Sequence[int | None] = (*SIZES, None)) -> Callable[[], Candidate]:
    """What makes the candidate of a classifier of images.

    Args:
        build: makes the model for images of a size in pixels, or of its own size for None.
        sizes: tried in turn; the first one the model runs on counts.
    """
    size, inputs = _smallest(build, sizes)
    targets, task = torch.arange(len(inputs)) % NUM_CLASSES, tasks.classification(NUM_CLASSES)
    return lambda: Candidate(build(size).train(), inputs, targets, task, image_size=inputs.shape[-1])


def new_row(name: str) -> Row:
    return {"model": name, "ok": False, "checks": dict.fromkeys(CHECKS), "reasons": {}, "refused": {}}


def _examine(row: Row, check: Check, build: Callable[[], Candidate]) -> None:
    def fresh() -> Candidate:
        with seeded_everywhere("survey"):
            return build()

    candidate = fresh()
    model, inputs, targets, task = candidate.model, candidate.inputs, candidate.targets, candidate.task
    if candidate.image_size is not None:
        row["image_size"] = candidate.image_size
    row["parameters"] = sum(p.numel() for p in model.parameters())
    dgl = methods.dgl(task)

    def cut(method: Method, one: Candidate = candidate) -> LocalNetwork:
        return localize(one.model, method, one.num_blocks, example=one.inputs, shared=one.shared)

    with check("cut"):
        network = cut(methods.e2e(task))
        row |= {"cut_points": len(network.partition.cuts), "cuts": [cut.name for cut in network.cuts]}
    if not row["checks"]["cut"]:
        return
    with check("eval"):
        runs = partial(call_model, model), partial(_suspended, network)
        _compare("eval", *(partial(_outputs, network, run, inputs) for run in runs))

    def plain() -> None:
        torch.autograd.backward(task.loss(call_model(model, inputs), Batch(inputs, targets, 0)))

    with check("gradients"):
        alone = _step(model, plain)
        for name, parameter in model.named_parameters():
            if f"gradient of {name}" not in alone:
                parameter.requires_grad_(False)  # what loss.backward() does not train, no local loss has to
        row["without_gradient"] = [name for name, p in model.named_parameters() if not p.requires_grad]
        del alone
        _compare(
            "gradients", *(partial(_step, model, run) for run in (plain, partial(backward, network, inputs, targets)))
        )
    del network
    with check("isolated"), seeded_everywhere("survey"):
        assert_isolated(cut(dgl), inputs, targets)
    for rate in LEARNING_RATES:
        with check("dgl"), seeded("survey"):
            losses = _train(cut(dgl, fresh()), inputs, targets, rate)
            row |= {"learning_rate": rate, "block_losses": [[round(loss, 4) for loss in step] for step in losses]}
        if row["checks"]["dgl"]:
            with check("loss"):
                _require_falling(losses, rate)
        if row["checks"]["loss"]:
            break
    with check("man_pp"), seeded("survey"):
        try:
            network = cut(methods.man_pp(dgl), fresh())
        except MethodError as error:
            row["refused"]["man_pp"] = _one_line(error)
        else:
            _train(network, inputs, targets, rate)


def _smallest(build: Build, sizes: Sequence[int | None]) -> tuple[int | None, Tensor]:
    """The first of ``sizes`` that the model runs on in both modes, and a batch of such images."""
    errors = []
    for size in sizes:
        try:
            with seeded("survey"):
                model = build(size).train()
                side = size or _own_size(model)
                inputs = torch.randn(BATCH_SIZE if side <= SIZES[-1] else LARGE_BATCH_SIZE, 3, side, side)
                with untouched(model, training=True), torch.no_grad():
                    for training in (True, False):
                        _require_logits(model.train(training)(inputs), len(inputs), training)
                return size, inputs
        except Exception as error:  # models may fail in any way on a size that they are not made for
            errors.append(f"{size or 'its own size'}: {_one_line(error)}")
    raise ConfigError(f"it runs on none of the image sizes tried: {'; '.join(dict.fromkeys(errors))}")


def _own_size(model: nn.Module) -> int:
    """Side of the images a model is made for, in pixels; 224 where it does not say."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return int(settings.get("input_size", (3, 224, 224))[-1])


def _require_logits(output: Any, batch: int, training: bool) -> None:
    if not isinstance(output, Tensor) or output.shape != (batch, NUM_CLASSES):
        what = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ConfigError(
            f"in {'training' if training else 'eval'} mode it returns {what}, no logits (B, num_classes); wrap it in a "
            "module that returns them, or write a task for what it returns"
        )


def _suspended(network: LocalNetwork, inputs: Any) -> Any:
    """What the model's own forward returns while it is suspended at the cuts."""
    return next(output for _, term, output in local_outputs(network, inputs) if term is None)


def _outputs(network: LocalNetwork, run: Callable[[Any], Any], inputs: Any) -> dict[str, Tensor]:
    """Outputs and buffers after one forward in eval mode; the model stays as it was."""
    with untouched(network, training=False), torch.no_grad(), seeded_everywhere("survey"):
        found = {f"output {index}": value for index, value in enumerate(tensors_in(run(inputs)))}
        return found | {name: buffer.clone() for name, buffer in network.model.named_buffers()}


def _step(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Gradients and buffers after one forward and backward in training mode; the model stays as it was."""
    with untouched(model, training=True), seeded_everywhere("survey"):
        run()
        found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _compare(what: str, original: Callable[[], dict[str, Tensor]], ours: Callable[[], dict[str, Tensor]]) -> None:
    """Raise `AssertionError` unless both are the same, bit for bit."""
    expected = original()
    found = ours()
    if wrong := _different(expected, found):
        if _different(expected, original()):
            raise AssertionError("two runs of the model itself with the same seed differ; turn its random part off")
        names = ", ".join(wrong[:6])
        raise AssertionError(f"{what}: {names} differ from the model's; {_REPORT}")


def _different(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    names = dict.fromkeys((*expected, *found))
    return [
        name for name in names if name not in expected or name not in found or not _equal(expected[name], found[name])
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))


def _train(network: LocalNetwork, inputs: Any, targets: Any, rate: float) -> list[list[float]]:
    """The loss of each span at each of `STEPS` steps of SGD, whose gradients are clipped to norm 1 block by block.

    Every step has the same batch and draws the same random numbers, so that losses of different steps compare.
    """
    parameters = [network.block_parameters(k) for k in range(network.num_blocks)]
    optimizers = [torch.optim.SGD(of_block, rate) if of_block else None for of_block in parameters]

    def move(block: int) -> None:
        optimizer = optimizers[block]
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters[block], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    history = []
    for index in range(STEPS):
        losses = []
        with keyed_randomness(0), seeded_everywhere("survey"):
            for span, loss in local_losses(network, inputs, targets, on_block_done=move):
                losses.append(loss.item())
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"the loss of span {span} is {loss.item()} at step {index + 1}, learning rate {rate}; "
                        "lower it, or warm it up"
                    )
                torch.autograd.backward(loss)
            exchange(network)
        history.append(losses)
    return history


def _require_falling(losses: list[list[float]], rate: float) -> None:
    first, last = sum(losses[0]), sum(losses[-1])
    if not last < first:
        raise TrainingError(
            f"the losses add up to {first:.4f} at the first step and to {last:.4f} at step {len(losses)}, learning "
            f"rate {rate}; lower it, or warm it up"
        )


_REPORT = "please report it, and keep the parts that differ in one block meanwhile"


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    message = message if len(message) <= 600 else message[:597] + "..."
    if isinstance(error, (LocalgradError, AssertionError)) and message:
        return message
    return f"{type(error).__name__}: {message}"
