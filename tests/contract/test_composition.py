"""Every plug-in on every base, and deeper compositions: trained for a few steps, or refused with the reason.

The matrix of what works is printed at the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import localgrad
from localgrad.method import Method
from localgrad.methods import (
    auglocal,
    checkpointing,
    dgl,
    e2e,
    hpff,
    infopro,
    last_head_distillation,
    local_critic,
    logit_consistency,
    man,
    man_pp,
    mlaan,
    pgl,
    pooled,
    predsim,
    sgr,
    trgl,
    windows,
)
from zoo import BASES, COMPOSED, REFUSED, TASK, batch, build, is_base

PLUGINS = [name for name in localgrad.methods.__all__ if not is_base(name)]


def train(method: Method, num_blocks: int = 4, num_steps: int = 3) -> None:
    """Every loss is finite, every parameter of the model moves, and twins move."""
    network = build("residual", method, num_blocks)
    before = {name: value.clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05, momentum=0.9)
    for step in range(num_steps):
        for _, loss in localgrad.local_losses(network, *batch(), step):
            assert loss.isfinite()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        localgrad.exchange(network)
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("model.")} <= moved
    for twin in network.twins:
        weights = {id(p): name for name, p in network.named_parameters()}
        assert {weights[id(p)] for p in twin.copy.parameters() if p.dim() > 1} <= moved


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_plugin_on_every_base(plugin: str, base: str, record_property: Callable[[str, object], None]) -> None:
    reason = REFUSED.get((plugin, base))
    record_property("composition", (plugin, base, reason))
    if reason is None:
        train(COMPOSED[f"{plugin}({base})"])
    else:
        assert base in reason and plugin in reason  # says what was given ...
        assert any(hint in reason for hint in ("use ", "needs ", "already"))  # ... and what to do


DEEPER = {
    "guided, bridged, decoded": lambda: pgl(man_pp(infopro(TASK)), every=10),
    "guided by soft targets": lambda: last_head_distillation(man_pp(infopro(TASK)), every=2),
    "MAN behind leaps": lambda: man(mlaan(dgl(TASK))),
    "leaps behind MAN": lambda: mlaan(windows(man(dgl(TASK)), width=3), leap="both", twins="all"),
    "MAN++ on pooled patches": lambda: man_pp(hpff(pooled(predsim(TASK)))),
    "energy and gradients": lambda: sgr(trgl(man(dgl(TASK)))),
    "consistent critics": lambda: logit_consistency(local_critic(TASK)),
    "guided reconciliation": lambda: pgl(sgr(dgl(TASK)), every=2),
    "windows over a tail": lambda: pgl(windows(auglocal(TASK, depth=1, tail=2)), every=3),
    "everything recomputed": lambda: checkpointing(checkpointing(mlaan(man_pp(infopro(TASK)))), where="auxiliary"),
}


@pytest.mark.parametrize("name", DEEPER)
def test_deeper_compositions(name: str) -> None:
    train(DEEPER[name]())


@pytest.mark.parametrize(
    "compose, why",
    [
        (lambda: windows(mlaan(dgl(TASK))), "already decides its spans"),
        (lambda: sgr(windows(dgl(TASK))), "covers several"),
        (lambda: windows(sgr(dgl(TASK))), "covers several"),
        (lambda: sgr(auglocal(TASK)), "covers several"),
        (lambda: man(e2e(TASK)), "no auxiliary heads"),
        (lambda: last_head_distillation(infopro(TASK, loss="contrast")), "softmax instead of contrastive"),
        (lambda: logit_consistency(infopro(TASK, loss="contrast")), "softmax instead of contrastive"),
    ],
)
def test_refused_with_the_reason(compose: Callable[[], Method], why: str) -> None:
    with pytest.raises(localgrad.MethodError, match=why):
        compose()


def test_a_bridge_without_a_unit_that_fits_is_refused() -> None:
    """A copy of the next unit reads its width only: behind a bridge that changed it, nothing is left to copy."""

    def widening(site: localgrad.Site) -> torch.nn.Module:
        return torch.nn.Conv2d(site.channels, 5, 1)

    from dataclasses import replace

    with pytest.raises(localgrad.MethodError, match="reads 5 channels"):
        build("residual", man(replace(dgl(TASK), bridge=widening)), 4)
