"""What a whole training step dispatches: what the engine adds to heads and blocks is a few operations a block."""

from __future__ import annotations

import pytest
from bench.step_operations import Operations, counted, experiment, stepping, stepping_by_hand

SIDE, BLOCKS = 8, 16


@pytest.fixture(scope="module")
def whole() -> Operations:
    """End-to-end training."""
    return counted(stepping(experiment("e2e", 1, SIDE), SIDE))


def test_the_engine_adds_few_operations_to_a_loop_by_hand(whole: Operations) -> None:
    run = experiment("dgl", BLOCKS, SIDE)
    local, hand = counted(stepping(run, SIDE)), counted(stepping_by_hand(run, SIDE))
    found = local.purposes
    # A block: the way into its graph, its features for the loss and for the next block, and an answer for the meters.
    assert found["cuts"] == 4 * BLOCKS - 1
    # The loss of each head; then scores and sums of all heads together.
    assert found["meters"] <= BLOCKS + 12
    # Clipping, three operations a block to find its norm and one to scale it; then one optimizer.
    assert found["optimizer"] <= 4 * BLOCKS + 11
    assert found["rest"] == 0
    assert hand.purposes.total() < found.total() <= hand.purposes.total() + 12 * BLOCKS
    # Three quarters of all are in the heads, which have 105 layers with weights where the model has 34.
    assert 0.7 * found.total() < found["heads"] + found["heads, losses, back"]
    assert found.total() <= 5.2 * whole.purposes.total()


@pytest.mark.parametrize(("method", "blocks", "limit"), [("dgl", 4, 1.9), ("[{dgl: {head: linear}}]", BLOCKS, 2.1)])
def test_few_or_small_heads_cost_at_most_twice_the_operations(
    whole: Operations, method: str, blocks: int, limit: float
) -> None:
    local = counted(stepping(experiment(method, blocks, SIDE), SIDE))
    assert whole.purposes.total() < local.purposes.total() <= limit * whole.purposes.total()
    assert whole.launches < local.launches <= limit * whole.launches
