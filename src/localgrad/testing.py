"""The promises of the library as asserts, so that a method or a model of your own can be held to them."""

from __future__ import annotations

import contextlib
import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.batches import call_model
from localgrad.distributed import block_parallel
from localgrad.engine import backward, local_losses, local_outputs
from localgrad.localization import localize
from localgrad.measure.memory import measure
from localgrad.method import Method
from localgrad.models import CifarResNet
from localgrad.network import LocalNetwork, exchange
from localgrad.randomness import keyed_randomness
from localgrad.spans import Constant, Span
from localgrad.task import Task
from localgrad.tasks import classification

__all__ = [
    "assert_isolated",
    "assert_lean",
    "assert_method",
    "assert_nothing_idle",
    "assert_one_batchnorm_update",
    "assert_resumable",
    "assert_same_on_two_ranks",
    "assert_transparent",
]


@dataclass(frozen=True)
class _Only(Constant):
    """One span and no other."""

    span: Span

    def spans(self, num_blocks: int) -> tuple[Span, ...]:
        return (self.span,)


def assert_isolated(network: LocalNetwork, inputs: Any, targets: Any, step: int = 0) -> None:
    """Assert that each local loss trains the blocks of its span and its auxiliary network, all of it and nothing else.

    Two steps are run for each span of ``step``: one in which its loss is the only one, which must leave a gradient on
    every parameter of the span and on no other; and one in which the other losses are multiplied by 0, which must leave
    a gradient of exactly 0 everywhere else. Heads that a rule trains late (`localgrad.method.Rule`) are trained by the
    loss at the next boundary instead of by their own. The first step also walks the graphs, as any first step does.
    Every step begins with the same buffers and generators (torch's, ``random`` and NumPy's), which are put back in the
    end, as gradients are.

    Args:
        network: from `localgrad.localize`, in training mode.
        inputs: a batch, as for `localgrad.local_losses`; ``targets`` likewise.
        step: whose spans are checked.

    Raises:
        AssertionError: names the parameters.

    Example:
        >>> import torch, localgrad
        >>> from localgrad.testing import assert_isolated
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> assert_isolated(localgrad.localize(model, method, 2, example=x), x, y)
    """
    spans = network.spans(step)
    for span in spans:
        expected = _trained_by(network, span) - _late(network, [span])
        found = set(_gradients(_with_only(network, span), inputs, targets, step, span))
        _compare(f"the loss of span {span} alone", network, found, expected)
        gradients = _gradients(network, inputs, targets, step, span)
        before = [
            other for other in spans if other.stop == max((s.stop for s in spans if s.stop < span.stop), default=0)
        ]
        expected |= _late(network, before)
        nonzero = {name for name, gradient in gradients.items() if gradient.ne(0).any()}
        _compare(f"the loss of span {span} beside the others", network, nonzero, expected, all_of_them=False)


def assert_transparent(model: nn.Module, network: LocalNetwork, inputs: Any) -> None:
    """Assert that ``model`` is still itself: what `localgrad.localize` was given, at any time before or after training.

    ``network`` holds that very model; every parameter belongs to one block, unless blocks may share some; no auxiliary
    tensor is in the model's ``state_dict``; its ``forward`` is that of its class, and neither hooks nor doors of a step
    are left in it; and in eval mode the model, the network and the suspended forward return the same, bit for bit.
    Modes and buffers are put back.

    Args:
        model: the model that was given to `localgrad.localize`.
        network: what it returned.
        inputs: a batch, as for `localgrad.local_losses`.

    Raises:
        AssertionError: says what differs.

    Example:
        >>> import torch, localgrad
        >>> from localgrad.testing import assert_transparent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x = torch.randn(16, 4)
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> assert_transparent(model, localgrad.localize(model, method, 2, example=x), x)
    """
    assert network.model is model, "the network holds another model than the one given"
    assert "forward" not in vars(model), "the model's forward was replaced"
    for name, module in model.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        left = [hook for hook in hooks if type(hook).__module__.startswith("localgrad.")]
        door = getattr(vars(module).get("_compiled_call_impl"), "__module__", "")
        assert not left and not door.startswith("localgrad."), f"a step left a hook or a door in {name or 'the model'}"
    own = {id(p) for p in model.parameters()}
    for name, parameter in network.running.named_parameters():
        assert id(parameter) in own, f"parameter {name!r} of a block is not the model's"
        blocks = network.home.get(name, ())
        assert len(blocks) <= 1 or network.partition.shared, f"parameter {name!r} is in blocks {blocks}"
    auxiliary = {id(t) for t in (*network.auxiliary.parameters(), *network.auxiliary.buffers())}
    added = [name for name, value in model.state_dict(keep_vars=True).items() if id(value) in auxiliary]
    assert not added, f"the model's state_dict contains auxiliary tensors: {', '.join(added)}"
    with _untouched(network), torch.no_grad():
        network.eval()
        expected = call_model(model, inputs)
        suspended = next(output for _, term, output in local_outputs(network, inputs) if term is None)
        for found in (call_model(network, inputs), suspended):
            for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
                if isinstance(b, Tensor):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                else:
                    assert a is b or a == b, f"the network returns {a!r} where the model returns {b!r}"


def assert_one_batchnorm_update(network: LocalNetwork, inputs: Any, targets: Any, step: int = 0) -> None:
    """Assert that each BatchNorm of the model counts every micro-batch of a step once, whatever runs again.

    Everything is put back.

    Args:
        network: from `localgrad.localize`, in training mode.
        inputs: a batch, as for `localgrad.local_losses`; ``targets`` likewise.
        step: which is trained.

    Raises:
        AssertionError: names the layer and how often it moved.

    Example:
        >>> import torch, localgrad
        >>> from localgrad.testing import assert_one_batchnorm_update
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> assert_one_batchnorm_update(localgrad.localize(model, method, 2, example=x), x, y)
    """
    counters = {
        name: module.num_batches_tracked
        for name, module in network.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None
    }
    with _untouched(network):
        before = {name: int(counter) for name, counter in counters.items()}
        backward(network, inputs, targets, step)
        for name, counter in counters.items():
            moved, parts = int(counter) - before[name], network.method.micro_batches
            assert moved == parts, f"{name} moved {moved} times in a step of {parts} micro-batches"


def assert_nothing_idle(network: LocalNetwork, inputs: Any, targets: Any, steps: int = 50) -> None:
    """Assert that everything that requires a gradient gets one, and that what requires none follows something.

    One step of each kind that occurs among the first ``steps`` is trained; gradients are put back.

    Args:
        network: from `localgrad.localize`, in training mode.
        inputs: a batch, as for `localgrad.local_losses`; ``targets`` likewise.
        steps: how many are looked at.

    Raises:
        AssertionError: names the parameters.

    Example:
        >>> import torch, localgrad
        >>> from localgrad.testing import assert_nothing_idle
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.man(localgrad.methods.dgl(localgrad.tasks.classification(3)))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> assert_nothing_idle(localgrad.localize(model, method, 2, example=x), x, y)
    """
    kinds: dict[object, int] = {}
    for step in range(steps):
        kinds.setdefault(network.method.work(network.num_blocks, step), step)
    followed = {id(p) for twin in network.twins for p in twin.copy.parameters()}
    with _untouched(network):
        network.zero_grad(set_to_none=True)
        for step in kinds.values():
            backward(network, inputs, targets, step)
        named = dict(network.named_parameters())
        idle = [name for name, p in named.items() if p.requires_grad and p.grad is None]
        frozen = [name for name in set(named) - {n for n, _ in network.model.named_parameters(prefix="model")}
                  if not named[name].requires_grad and id(named[name]) not in followed]  # fmt: skip
    assert not idle, f"no loss of {network.method.name} gives a gradient to {', '.join(idle)}"
    assert not frozen, f"neither a loss nor an exchange of {network.method.name} moves {', '.join(sorted(frozen))}"


def assert_lean(network: LocalNetwork, inputs: Any, targets: Any, step: int = 0) -> None:
    """Assert that no graph outlives its span: what is alive at the peak of a step is what its spans need by themselves.

    ``peak(step) <= max over spans s of the sum of peak(t alone) over the spans t that share a block with s``, in bytes
    of live tensors, counted op by op. Everything is put back. It does not hold where a rule joins blocks and
    differentiates them twice (`localgrad.methods.sgr`): what one span needs then depends on the one before.

    Args:
        network: from `localgrad.localize`, in training mode.
        inputs: a batch, as for `localgrad.local_losses`; ``targets`` likewise.
        step: which is trained.

    Raises:
        AssertionError: says both numbers.

    Example:
        >>> import torch, localgrad
        >>> from localgrad.testing import assert_lean
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> assert_lean(localgrad.localize(model, method, 2, example=x), x, y)
    """

    def peak(one: LocalNetwork) -> int:
        with _untouched(network):
            network.zero_grad(set_to_none=True)
            return measure(lambda: backward(one, inputs, targets, step), list(network.parameters())).peak_activations

    spans = network.spans(step)
    alone = {span: peak(_with_only(network, span)) for span in spans}
    bound = max(sum(alone[t] for t in spans if t.start < s.stop and s.start < t.stop) for s in spans)
    found = peak(network)
    assert found <= bound, f"{found} bytes are alive at the peak of step {step}; its spans need {bound} by themselves"


def assert_resumable(make: Callable[[], LocalNetwork], inputs: Any, targets: Any, steps: int = 4) -> None:
    """Assert that a network saved after half of the steps and loaded into a fresh one ends with the same bits.

    Saved are the ``state_dict`` of the network and of an optimizer, SGD with momentum.

    Args:
        make: a fresh network in training mode, with the same weights at each call.
        inputs: a batch, as for `localgrad.local_losses`; ``targets`` likewise.
        steps: of each of the two runs.

    Raises:
        AssertionError: names the tensors that differ.

    Example:
        >>> import torch, localgrad
        >>> from localgrad.testing import assert_resumable
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> def make():
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        ...     method = localgrad.methods.man(localgrad.methods.dgl(localgrad.tasks.classification(3)))
        ...     return localgrad.localize(model, method, 2, example=x)
        >>> assert_resumable(make, x, y)
    """
    whole, first, second = make(), make(), make()
    _train(whole, _optimizer(whole), inputs, targets, range(steps))
    optimizer = _optimizer(first)
    _train(first, optimizer, inputs, targets, range(steps // 2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = _optimizer(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(second, resumed, inputs, targets, range(steps // 2, steps))
    _assert_equal(second.state_dict(), whole.state_dict(), "a resumed run")


def assert_same_on_two_ranks(make: Callable[[], LocalNetwork], inputs: Any, targets: Any, steps: int = 3) -> None:
    """Assert that block parallel on two processes ends with the weights of one, bit for bit.

    Args:
        make: a fresh network in training mode, with the same weights at each call; a function of a module, since two
            new processes call it.
        inputs: a batch, as for `localgrad.local_losses`; ``targets`` likewise.
        steps: that are trained.

    Raises:
        AssertionError: names the tensors that differ.
        Exception: a rank failed; so does a method that does not travel.
    """
    whole = make()
    _train(whole, _optimizer(whole), inputs, targets, range(steps))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (make, inputs, targets, steps, folder), nprocs=2)
        found = torch.load(Path(folder) / "weights", weights_only=True)
    _assert_equal(found, whole.state_dict(), "two ranks")


def _rank(rank: int, make: Callable[[], LocalNetwork], inputs: Any, targets: Any, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = block_parallel(make(), dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("block",)))
    _train(network, _optimizer(network), inputs, targets, range(steps))
    assert network.stage is not None
    network.stage.gather()
    if rank == 0:
        torch.save(network.state_dict(), Path(folder) / "weights")
    dist.barrier()
    dist.destroy_process_group()


def _optimizer(network: LocalNetwork) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def _train(network: LocalNetwork, optimizer: torch.optim.Optimizer, inputs: Any, targets: Any, steps: range) -> None:
    with keyed_randomness(0):
        for step in steps:
            for _, loss in local_losses(network, inputs, targets, step):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            exchange(network)


def _assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    assert not wrong, f"{what} ended with another {', '.join(wrong[:5])} ({len(wrong)} of {len(expected)} differ)"


def assert_method(make: Callable[[Task], Method], num_blocks: int = 3) -> None:
    """Assert all of the above, but for two ranks, of a method on a small convolutional network.

    Args:
        make: the method for a task; the task is classification of 3 classes.
        num_blocks: into which the network is cut; it has up to 4.

    Raises:
        AssertionError: the first promise that is broken.

    Example:
        >>> import localgrad
        >>> from localgrad.testing import assert_method
        >>> assert_method(lambda task: localgrad.methods.man_pp(localgrad.methods.dgl(task)))
    """
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 3
    task = classification(3, mean=(0.5,) * 3, std=(0.25,) * 3)

    def network() -> LocalNetwork:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = CifarResNet(8, 3)
            return localize(model, make(task), num_blocks, example=inputs).train()

    one = network()
    assert_isolated(one, inputs, targets)
    assert_transparent(one.model, one, inputs)
    assert_nothing_idle(one, inputs, targets)
    assert_one_batchnorm_update(one, inputs, targets)
    if not any(rule.joins for rule in one.rules):
        assert_lean(one, inputs, targets)
    assert_resumable(network, inputs, targets)


def _trained_by(network: LocalNetwork, span: Span) -> set[str]:
    named = dict(network.running.named_parameters())
    used = [named[name] for name, blocks in network.home.items() if any(span.covers(block) for block in blocks)]
    if span.stop < network.num_blocks:
        used += network.auxiliary_of(span).parameters()
    trained = {id(p) for p in used if p.requires_grad}
    return {name for name, p in network.named_parameters() if id(p) in trained}


def _late(network: LocalNetwork, spans: Sequence[Span]) -> set[str]:
    """Parameters of the auxiliary networks of these spans that the losses at the next boundary train."""
    inner = [network.auxiliary_of(span) for span in spans if span.stop < network.num_blocks]
    late = {id(p) for auxiliary in inner for rule in network.rules for p in rule.late_parameters(auxiliary)}
    return {name for name, p in network.named_parameters() if id(p) in late}


def _with_only(network: LocalNetwork, span: Span) -> LocalNetwork:
    """The same modules, under a schedule of one span."""
    other = copy.copy(network)
    other.method = replace(network.method, spans=_Only(span))
    return other


def _gradients(network: LocalNetwork, inputs: Any, targets: Any, step: int, counted: Span) -> dict[str, Tensor]:
    with _untouched(network):
        network.zero_grad(set_to_none=True)
        for span, loss in local_losses(network, inputs, targets, step):
            (loss if span == counted else loss * 0.0).backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def _compare(what: str, network: LocalNetwork, found: set[str], expected: set[str], all_of_them: bool = True) -> None:
    order = [name for name, _ in network.named_parameters()]
    wrong = [name for name in order if name in found - expected]
    missing = [name for name in order if name in expected - found and all_of_them]
    assert not wrong, f"{what} gave a gradient to {', '.join(wrong)}, which it must not train"
    assert not missing, f"{what} gave no gradient to {', '.join(missing)}"


@contextlib.contextmanager
def _untouched(network: nn.Module) -> Iterator[None]:
    """Put back gradients, buffers, modes and random state on exit."""
    gradients = [(p, p.grad) for p in network.parameters()]
    owned = [(m._buffers, name, b) for m in network.modules() for name, b in m._buffers.items() if b is not None]
    copies = [buffer.clone() for _, _, buffer in owned]
    modes = [(module, module.training) for module in network.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for (buffers, name, buffer), before in zip(owned, copies, strict=True):
                buffers[name] = buffer  # a forward may replace it
                buffer.copy_(before)
        for module, mode in modes:
            module.training = mode
