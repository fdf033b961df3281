"""Causal language models of transformers whose logits are never whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.errors import ConfigError


class ChunkedLM(nn.Module):
    """A causal language model that answers with what logits are made of.

    It returns ``{"features": (B, T, C), "weight": (vocabulary, C)}``, the last hidden states and the output matrix,
    with ``logits = features @ weight.T``. `localgrad.tasks.language_model` makes logits of them a chunk at a time, so
    that no step holds (B, T, vocabulary) values.

    Args:
        model: of transformers, a ``...ForCausalLM``: its ``base_model`` and ``get_output_embeddings()`` are used. It
            stays as it is, to be saved by ``save_pretrained``.

    Raises:
        ConfigError: its logits are not that product: a bias, a scale or a soft cap follows.

    Example:
        >>> import torch, localgrad
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
        >>> model = localgrad.models.ChunkedLM(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> {name: tuple(value.shape) for name, value in model(torch.zeros(1, 4, dtype=torch.int64)).items()}
        {'features': (1, 4, 8), 'weight': (32, 8)}
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._check()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Called as the model is, without ``labels``."""
        model: Any = self.model
        hidden: Tensor = model.base_model(*args, **kwargs)[0]
        weight: Tensor = model.get_output_embeddings().weight
        return {"features": hidden, "weight": weight.view_as(weight)}  # which the last block makes, and so trains

    @torch.no_grad()
    def _check(self) -> None:
        model: Any = self.model
        training, ids = model.training, torch.arange(4, device=model.device)[None]
        model.eval()
        try:
            found, expected = self(ids), model(ids).logits
        finally:
            model.train(training)
        if not torch.allclose(F.linear(found["features"], found["weight"]), expected, atol=1e-5, rtol=1e-4):
            raise ConfigError(
                f"the logits of {type(model).__name__} are not its last hidden states times its output matrix: a bias, "
                "a scale or a soft cap follows; train the model itself, without ChunkedLM"
            )
