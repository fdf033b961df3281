"""Causal language models of transformers, by name, and with logits that are never whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localgrad.errors import ConfigError, nearest


class ChunkedLM(nn.Module):
    """A causal language model that answers with what logits are made of.

    It returns ``{"features": (B, T, C), "weight": (vocabulary, C)}``, the last hidden states and the output matrix,
    with ``logits = features @ weight.T``. `localgrad.tasks.language_model` makes logits of them a chunk at a time, so
    that no step holds (B, T, vocabulary) values.

    Args:
        model: of transformers, a ``...ForCausalLM``: its ``base_model`` and ``get_output_embeddings()`` are used. It
            stays as it is, to be saved by ``save_pretrained``.

    Raises:
        ConfigError: its logits are not that product: a bias, a scale or a soft cap follows; or a position sees the
            tokens after it.

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
        weight = model.get_output_embeddings().weight
        kept = weight.clone()
        model.eval()
        try:
            weight.mul_(100 / model(ids).logits.abs().max().clamp(1e-6, 100))  # a cap shows in large logits alone
            found, expected = F.linear(*self(ids).values()), model(ids).logits
            other = model(ids.masked_fill(ids == 3, 0)).logits  # with another last token
        finally:
            weight.copy_(kept)
            model.train(training)
        bias = getattr(model.get_output_embeddings(), "bias", None) is not None  # which may be 0 as yet
        tolerance = 1e-3 * expected.abs().max()
        if bias or (found - expected).abs().max() > tolerance:
            raise ConfigError(
                f"the logits of {type(model).__name__} are not its last hidden states times its output matrix: a bias, "
                "a scale or a soft cap follows; train the model itself, without ChunkedLM"
            )
        if (other - expected)[:, :3].abs().max() > tolerance:
            raise ConfigError(
                f"a position of {type(model).__name__} sees the tokens after it, which it is to answer: it is no "
                "causal language model; some are with is_decoder=True, others train by language_model(shift=False)"
            )


def causal_types() -> list[str]:
    """The model types that transformers has a causal language model of.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise ConfigError("models of transformers need it installed: pip install localgrad[text]") from error
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal_lm(name: str, vocabulary: int, context: int | None, options: dict[str, Any]) -> ChunkedLM:
    """A causal language model with random weights, as `localgrad.models.create` makes it of ``transformers:NAME``.

    Args:
        name: a model type of transformers, such as ``llama``, or a folder with a ``config.json``; its code is that of
            transformers, never of the folder.
        vocabulary, context: tokens, and how many a sequence has.
        options: of the configuration. ``tie_word_embeddings`` is off unless they say otherwise: blocks at both ends
            would train one matrix.

    Raises:
        ConfigError: transformers is not installed, has no such model, or refuses an option.
    """
    known = causal_types()
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": vocabulary, "use_cache": False, "tie_word_embeddings": False, **options}
    if context is not None:
        settings.setdefault("max_position_embeddings", context)
    folder = Path(name).expanduser()
    if name not in known and not (folder / "config.json").is_file():
        raise ConfigError(f"{nearest(name, known, 'model type of transformers')} Or name a folder with a config.json.")
    try:
        if name in known:
            config = AutoConfig.for_model(name, **settings)
            plain = AutoConfig.for_model(name)
        else:
            plain = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
        for option in options:
            if not hasattr(plain, option):
                raise ConfigError(
                    f"model.options: {nearest(option, plain.to_dict(), f'setting of {type(plain).__name__}')}"
                )
        return ChunkedLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False))
    except ConfigError:
        raise
    except Exception as error:  # a configuration may fail in any way
        raise ConfigError(
            f"model 'transformers:{name}' cannot be built with {settings}: {' '.join(str(error).split())}"
        ) from error
