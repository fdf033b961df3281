"""Named asserts about a network: what its losses train, and that the model is still the model that was given."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad.batches import call_model
from localgrad.engine import local_losses, local_outputs
from localgrad.network import LocalNetwork
from localgrad.spans import Constant, Span

__all__ = ["assert_isolated", "assert_transparent"]


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
