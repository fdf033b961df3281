"""The numbers of `localgrad summary` add up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import localgrad
from localgrad.config import validate
from localgrad.study.summary import summarize


def summary_of(model: str, method: Any, num_blocks: int) -> dict[str, Any]:
    config = validate({"method": method, "model": {"name": model}, "blocks": {"num_blocks": num_blocks}}, "test")
    return summarize(config, (3, 32, 32), 10, 2)


@pytest.mark.parametrize("method", [["dgl"], ["e2e"], [{"infopro": {}}], ["dgl", "windows"]], ids=str)
def test_parameters_add_up(method: Any) -> None:
    found = summary_of("resnet32", method, 4)
    rows, total = found["blocks"], found["total"]
    assert [row["block"] for row in rows] == [1, 2, 3, 4] and rows[0]["begins_at"] == "input"
    assert sum(row["parameters"] for row in rows) == total["parameters"] == 466_906
    assert sum(row["head_parameters"] for row in rows) == total["auxiliary_parameters"]
    assert rows[-1]["head_parameters"] == 0 and rows[-1]["features"] == [10]
    assert found["e2e"]["auxiliary_parameters"] == 0 == found["checkpointing"]["auxiliary_parameters"]
    if method == ["e2e"]:
        assert {k: total[k] for k in ("activation_bytes", "flops")} == {
            k: found["e2e"][k] for k in ("activation_bytes", "flops")
        }
    else:
        assert total["activation_bytes"] < found["e2e"]["activation_bytes"]


def test_flops_and_bytes_add_up_to_the_models_own() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from localgrad.measure.memory import saved_storages

    found = summary_of("resnet32", ["dgl"], 4)
    model = localgrad.models.create("resnet32").train()
    x = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        _, saved = saved_storages(lambda: model(x), [*model.parameters(), *model.buffers(), x])
    assert sum(row["flops"] for row in found["blocks"]) == counter.get_total_flops()
    # The features at a boundary are saved on both sides of it: by the ReLU before, and by the convolution after.
    twice = sum(4 * 2 * math.prod(row["features"]) for row in found["blocks"][:-1])
    assert sum(row["saved_bytes"] for row in found["blocks"]) == sum(saved.values()) + twice


def test_a_vision_transformer_and_its_tokens() -> None:
    pytest.importorskip("timm")
    config = validate(
        {"method": ["dgl"], "model": {"name": "timm:vit_tiny_patch16_224"}, "blocks": {"num_blocks": 3}}, "test"
    )
    found = summarize(config, (3, 32, 32), 10, 2)
    model = localgrad.models.create("timm:vit_tiny_patch16_224", image_size=32)
    assert sum(row["parameters"] for row in found["blocks"]) == sum(p.numel() for p in model.parameters())
