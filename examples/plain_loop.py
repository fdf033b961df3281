"""A loop of one's own.

-    loss = model(inputs).loss
-    loss.backward()
+    for _, loss in localgrad.local_losses(network, inputs, targets, step):
+        loss.backward()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import localgrad


def counting(samples: int = 48, length: int = 12, words: int = 17) -> torch.Tensor:
    """Sequences (samples, length) in which each token is the one before plus 1."""
    starts = torch.randint(words, (samples, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(length)) % words


def language_model(words: int = 17) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, use_cache=False, **sizes))


def network() -> localgrad.LocalNetwork:
    method = localgrad.methods.dgl(localgrad.tasks.language_model(17))
    return localgrad.localize(language_model(), method, 2, example={"input_ids": counting(2)})


def train(network: localgrad.LocalNetwork, batches: Iterable[Any]) -> list[float]:
    optimizer, values = torch.optim.SGD(network.parameters(), lr=0.5), []
    for step, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        for _, loss in localgrad.local_losses(network, inputs, targets, step):
            loss.backward()
        optimizer.step()
        values.append(loss.item())  # of the last block: the model's own
    return values


def text_batches() -> list[Any]:
    return [({"input_ids": tokens}, tokens) for tokens in counting().split(8)]


if __name__ == "__main__":
    print(train(network(), text_batches()))
