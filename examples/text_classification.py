"""A classifier of text: the encoder is cut, each block has a classifier of its own.

+task = localgrad.tasks.classification(2)
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
from transformers import BertConfig, BertForSequenceClassification

import localgrad


def network() -> localgrad.LocalNetwork:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=17, num_labels=2, **sizes, **still))
    method = localgrad.methods.dgl(localgrad.tasks.classification(2))
    return localgrad.localize(model, method, 2, example=text_batches()[0][0])


def text_batches() -> list[Any]:
    """Texts of small and of large numbers, and which of them they are."""
    labels = torch.arange(48) % 2
    texts = plain_loop.counting() // 2 + 8 * labels[:, None]
    mask = torch.ones_like(texts)
    return [
        ({"input_ids": ids, "attention_mask": seen}, wanted)
        for ids, seen, wanted in zip(texts.split(8), mask.split(8), labels.split(8), strict=True)
    ]


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
