"""LoRA by peft: only adapters and heads train.

 model = get_peft_model(model, LoraConfig(...))
+network = localgrad.localize(model, localgrad.methods.dgl(task), 2, example=example)
-    loss = model(**batch).loss
+    loss = localgrad.loss(network, inputs, targets, step)
     loss.backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plain_loop
import torch
from peft import LoraConfig, get_peft_model

import localgrad


def network() -> localgrad.LocalNetwork:
    model = get_peft_model(plain_loop.language_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    method = localgrad.methods.dgl(localgrad.tasks.language_model(17))
    return localgrad.localize(model, method, 2, example={"input_ids": plain_loop.counting(2)})


def train(network: localgrad.LocalNetwork, batches: Sequence[Any]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.5)
    values = []
    for step, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        loss = localgrad.loss(network, inputs, targets, step)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


if __name__ == "__main__":
    print(train(network(), plain_loop.text_batches()))
