"""A masked language model: labels are the hidden tokens, and -100 elsewhere.

+task = localgrad.tasks.language_model(18, shift=False)
+network = localgrad.localize(model, localgrad.methods.dgl(task), 2, example=example)
-    loss = model(**inputs, labels=labels).loss
+    loss = localgrad.loss(network, inputs, labels, step)
     loss.backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plain_loop
import torch
from transformers import BertConfig, BertForMaskedLM

import localgrad

MASK = 17  # after the words


def network() -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=18, tie_word_embeddings=False, **sizes, **still))
    method = localgrad.methods.dgl(localgrad.tasks.language_model(18, shift=False))
    return localgrad.localize(model, method, 2, example=text_batches()[0][0])


def text_batches() -> list[Any]:
    """Texts with every fourth token hidden."""
    texts = plain_loop.counting()
    hidden = torch.rand(texts.shape, generator=torch.Generator().manual_seed(1)) < 0.25
    inputs, labels = texts.masked_fill(hidden, MASK), texts.masked_fill(~hidden, -100)
    return [({"input_ids": ids}, wanted) for ids, wanted in zip(inputs.split(8), labels.split(8), strict=True)]


def train(network: localgrad.LocalNetwork, batches: Sequence[Any]) -> list[float]:
    optimizer, values = torch.optim.SGD(network.parameters(), lr=0.5), []
    for step, (inputs, labels) in enumerate(batches):
        optimizer.zero_grad()
        loss = localgrad.loss(network, inputs, labels, step)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


if __name__ == "__main__":
    print(train(network(), text_batches()))
