"""What tests compare bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the gradients of all parameters, by name; None where there is none."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_same(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    """The same names, and for each the same bits, or None in both."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not _same(found[name], expected[name])] == []


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
