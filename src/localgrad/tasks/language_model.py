"""Language models: cross-entropy of each token, in chunks, so that logits of long sequences are never whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from localgrad.errors import ConfigError, TrainingError
from localgrad.heads.token_read_out import ReadOut, TokenReadOut
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder
from localgrad.task import Batch
from localgrad.tasks.classification import IGNORED
from localgrad.tasks.counting import balanced
from localgrad.tasks.targets import check_classes, logits_of, require, values_of


class Sums(NamedTuple):
    """Over the tokens that count: their number, those that are answered rightly, the cross-entropy in nats."""

    tokens: Tensor
    right: Tensor
    loss: Tensor


@dataclass(frozen=True)
class LanguageModel:
    """A `localgrad.task.Task`; see `language_model`."""

    vocabulary: int
    shift: bool = True
    chunk: int = 1024
    read_out: ReadOut = "own"
    read: set[torch.device] = field(default_factory=set, compare=False, repr=False)

    @property
    def num_outputs(self) -> int:
        """Logits of each token."""
        return self.vocabulary

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """A read-out of each token, whatever classifier a method proposed."""
        return TokenReadOut(self.vocabulary, self.read_out)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The mean cross-entropy of the tokens that count; 0 for a batch of nothing else."""
        shape = tuple(self._read_out(output)[0].shape[:2])
        batch.of_targets((self._check, shape), lambda targets: self._check(targets, shape))
        tokens, _, loss = self._sums(output, batch.targets, keep=True)
        return balanced(loss / tokens.clamp(min=1), batch, self.counted)

    def counted(self, targets: Tensor) -> Tensor:
        """What the loss divides by: tokens that are answered and not ignored."""
        return (self._answers(targets) != IGNORED).sum()

    def _answers(self, targets: Tensor) -> Tensor:
        return targets[:, 1:] if self.shift else targets

    def _sums(self, output: Any, targets: Any, keep: bool = False) -> Sums:
        """`Sums` of a batch, chunk by chunk; with ``keep`` for a gradient, for which a chunk is computed again."""
        features, weight = self._read_out(output)
        features = (features[:, :-1] if self.shift else features).flatten(0, 1)
        targets = self._answers(targets).flatten()
        total = Sums(*(torch.zeros((), device=features.device) for _ in Sums._fields))
        for rows, wanted in zip(features.split(self.chunk), targets.split(self.chunk), strict=True):
            if keep and weight is not None:  # logits that a model returns exist anyway
                found = checkpoint(_chunk, rows, weight, wanted, use_reentrant=False, preserve_rng_state=False)
            else:
                found = _chunk(rows, weight, wanted)
            total = Sums(*(a + b for a, b in zip(total, found, strict=True)))
        return total

    def _read_out(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, C) and the matrix (vocabulary, C) that makes logits of them, or logits (B, T, vocabulary)."""
        if isinstance(output, Mapping) and "weight" in output:
            return output["features"], output["weight"]
        return self._logits(output), None

    def _logits(self, output: Any) -> Tensor:
        logits = logits_of(output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[2] != self.vocabulary:
            form = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise TrainingError(
                f"the model returns {form}, but language_model({self.vocabulary}) needs logits "
                f"(B, T, {self.vocabulary}), or an output that has them as .logits; give the vocabulary of the model"
            )
        return logits

    def _check(self, targets: Any, shape: tuple[int, ...]) -> None:
        task = f"language_model({self.vocabulary})"
        require(
            isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.shape == shape,
            task, targets, f"int64 tokens of shape {shape}, {IGNORED} where nothing is to be answered",
            "the input ids where shift=True, the tokens to answer where shift=False",
        )  # fmt: skip
        check_classes(values_of(targets, self.read), self.vocabulary, IGNORED, task)

    def logits(self, output: Any) -> Tensor:
        """The logits (B, vocabulary, T) of an output, whole."""
        features, weight = self._read_out(output)
        return (features if weight is None else F.linear(features, weight)).transpose(1, 2)

    @torch.no_grad()
    def score(self, output: Any, targets: Tensor) -> Tensor:
        """The share of each sequence's tokens that are answered rightly, (B,) float32; 1 where none counts.

        Of a read-out in chunks it is that of the last ``chunk // B`` tokens alone, as the logits are computed for it.
        """
        features, weight = self._read_out(output)
        features, wanted = (features[:, :-1] if self.shift else features), self._answers(targets)
        if weight is not None:
            last = max(1, self.chunk // len(features))
            features, wanted = F.linear(features[:, -last:], weight), wanted[:, -last:]
        counts = wanted != IGNORED
        right = ((features.argmax(2) == wanted) & counts).sum(1)
        return torch.where(counts.any(1), right / counts.sum(1).clamp(min=1), 1.0).float()

    def metric(self) -> PerToken:
        """Accuracy, cross-entropy and perplexity of tokens."""
        return PerToken(self)

    def pixels(self, inputs: Any) -> Tensor:
        """Raises `TrainingError`."""
        raise TrainingError("tokens have no pixels; use a method without a reconstruction loss, such as dgl")

    def blank(self, samples: int, shape: tuple[int, ...]) -> Tensor:
        """Targets for sequences ``(samples, *shape)``, to plan with."""
        return torch.zeros(samples, *shape[:1], dtype=torch.int64)


def _chunk(rows: Tensor, weight: Tensor | None, targets: Tensor) -> Sums:
    """`Sums` of tokens (N,) from features (N, C) and ``weight`` (vocabulary, C), or from logits (N, vocabulary)."""
    logits = widened(rows if weight is None else F.linear(rows, weight))
    counts = targets != IGNORED
    with torch.no_grad():
        right = ((logits.argmax(1) == targets) & counts).sum()
    return Sums(counts.sum(), right, F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))


class PerToken:
    """A `localgrad.task.Metric`: over all tokens of a split that count."""

    def __init__(self, task: LanguageModel) -> None:
        self.task = task
        self.tokens, self.right, self.loss = 0.0, 0.0, 0.0

    @torch.no_grad()
    def update(self, output: Any, targets: Tensor) -> None:
        """Count one batch."""
        self.task._check(targets, tuple(self.task._read_out(output)[0].shape[:2]))
        found = self.task._sums(output, targets)
        self.tokens += float(found.tokens)
        self.right += float(found.right)
        self.loss += float(found.loss)

    def compute(self) -> dict[str, float]:
        """``accuracy``; ``bits`` per token, which are bits per byte where a byte is a token; ``perplexity``."""
        nats = self.loss / max(1.0, self.tokens)
        return {
            "accuracy": self.right / max(1.0, self.tokens),
            "bits": nats / math.log(2),
            "perplexity": math.exp(min(nats, 700.0)),
        }


def language_model(
    vocabulary: int, *, shift: bool = True, read_out: ReadOut = "own", chunk: int = 1024
) -> LanguageModel:
    """Answer each token of a sequence: the next one, or one that was masked.

    ``loss = -1/N sum_t log softmax(logits_t)[y_t]`` over the N tokens of the batch whose target is not -100.

    Inputs are what the model takes, token ids (B, T) among them. Targets are int64 (B, T). Sequences that are packed
    into one have -100 as the target of each one's first token. Outputs are logits (B, T, vocabulary), an output of
    transformers that has them as ``logits``, or ``{"features": (B, T, C), "weight": (vocabulary, C)}``. Of the latter
    logits are made ``chunk`` tokens at a time, again in the backward pass: heads answer so, and a model may
    (`localgrad.models.ChunkedLM`).

    Args:
        vocabulary: number of tokens, the width of the logits.
        shift: targets are aligned with the inputs, as the ``labels`` of transformers are: what is answered at position
            t is the target at t + 1. Without it targets are what is to be answered at their own position: masked
            language models, or targets that are shifted already.
        read_out: of auxiliary heads, see `localgrad.heads.TokenReadOut`: ``own``, or ``shared`` with the model.
        chunk: tokens whose logits exist at one time.

    Raises:
        ConfigError: a value outside its range.

    Example:
        >>> import localgrad
        >>> task = localgrad.tasks.language_model(256)
        >>> localgrad.methods.dgl(task).task.num_outputs
        256

    Differs: transformers computes the loss in the model where it is given ``labels``; here it is given none.
    """
    if vocabulary < 2:
        raise ConfigError(f"vocabulary={vocabulary}; a language model needs at least 2 tokens")
    if chunk < 1:
        raise ConfigError(f"chunk={chunk}; logits of at least 1 token exist at one time")
    if read_out not in ("own", "shared"):
        raise ConfigError(f"read_out={read_out!r}; write 'own' or 'shared'")
    return LanguageModel(vocabulary, shift, chunk, read_out)
