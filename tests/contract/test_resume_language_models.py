"""Language models that are stopped, saved and restored end with the bits of a run that never was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import localgrad
from localgrad import methods
from localgrad.distributed import Checkpoints

WORDS, STEPS = 13, 6
TASK = localgrad.tasks.language_model(WORDS, chunk=8)
SHARED = localgrad.tasks.language_model(WORDS, chunk=8, read_out="shared")
METHODS: dict[str, Callable[[], localgrad.Method]] = {
    "dgl": lambda: methods.dgl(TASK),
    "dgl, shared read-out": lambda: methods.dgl(SHARED),
    "man_pp": lambda: methods.man_pp(methods.dgl(TASK)),
    "mlaan": lambda: methods.mlaan(methods.windows(methods.dgl(TASK))),
    "lean": lambda: methods.lean(TASK, factor=1),
    "pgl": lambda: methods.pgl(methods.dgl(TASK), every=2, recompute=False),
}


def made(name: str, folder: Path, seed: int = 0) -> tuple[localgrad.LocalNetwork, torch.optim.Optimizer, Checkpoints]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=WORDS, use_cache=False, attention_dropout=0.1, **sizes)
    model = localgrad.models.ChunkedLM(LlamaForCausalLM(config)).train()
    network = localgrad.localize(model, METHODS[name](), 3, example=tokens(0))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 0.01)
    return network, optimizer, Checkpoints(folder, network, [optimizer])


def tokens(step: int) -> Tensor:
    return torch.randint(WORDS, (4, 10), generator=torch.Generator().manual_seed(step))


def train(network: localgrad.LocalNetwork, optimizer: torch.optim.Optimizer, steps: range) -> None:
    with localgrad.keyed_randomness(seed=5):
        for step in steps:
            optimizer.zero_grad()
            for _, loss in localgrad.local_losses(network, tokens(step), tokens(step), step):
                loss.backward()
            optimizer.step()
            localgrad.exchange(network)


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    whole, its_optimizer, _ = made(name, tmp_path / "whole")
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    train(whole, its_optimizer, range(STEPS))

    stopped, optimizer, checkpoints = made(name, tmp_path / "run")
    train(stopped, optimizer, range(STEPS // 2))
    checkpoints.save(STEPS // 2)
    again, optimizer, checkpoints = made(name, tmp_path / "run", seed=1)
    torch.randn(7)  # what the process did before must not matter
    assert checkpoints.load() == STEPS // 2
    train(again, optimizer, range(STEPS // 2, STEPS))

    expected, found = whole.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    # Every parameter has moved, so that equality says something of it.
    assert all(not torch.equal(p, before[key]) for key, p in whole.named_parameters() if p.requires_grad)
