"""Models that any version must be able to train: a small one of each kind, with a batch and a task.

``REACH`` holds a builder for each, by name. A builder returns a fresh model in training mode and draws from torch's
generator, which the caller seeds. Libraries that are not installed raise ImportError when their builder is called.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from localgrad import tasks
from localgrad.errors import TrainingError
from localgrad.layout import ToMaps
from localgrad.losses.precision import widened
from localgrad.site import HeadBuilder, Site
from localgrad.study.examination import Candidate
from localgrad.task import Batch, Metric, Task
from localgrad.tasks.normalisation import pixels_of

CLASSES, BATCH, PIXELS, LENGTH, WORDS = 5, 4, 32, 12, 40
IGNORED = -100  # targets that count neither in a loss nor in a score
PAD, EOS, FIRST_WORD = 0, 1, 3


REACH: dict[str, Callable[[], Candidate]] = {}


def _reach(build: Callable[[], Candidate]) -> Callable[[], Candidate]:
    """Register a builder under its name."""
    REACH[build.__name__] = build
    return build


# Tasks.


@dataclass(frozen=True)
class _OwnOutput:
    """A `localgrad.method.Task`: another one, of a model whose output ``read`` turns into the tensor that one expects.

    Heads answer with tensors, which are left as they are.
    """

    base: Task
    read: Callable[[Any], Any]

    @property
    def num_outputs(self) -> int:
        """The base's."""
        return self.base.num_outputs

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """The base's."""
        return self.base.head(proposed)

    def answer(self, output: Any) -> Any:
        """What the base reads."""
        return output if isinstance(output, Tensor) else self.read(output)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The base's."""
        return self.base.loss(self.answer(output), batch)

    def score(self, output: Any, targets: Any) -> Tensor:
        """The base's."""
        return self.base.score(self.answer(output), targets)

    def metric(self) -> Metric:
        """The base's."""
        return _OwnMetric(self.base.metric(), self)

    def pixels(self, inputs: Any) -> Tensor:
        """The base's, of the images among the inputs."""
        return self.base.pixels(inputs["pixel_values"] if isinstance(inputs, Mapping) else inputs)


class _OwnMetric:
    """A `localgrad.method.Metric`: that of the base."""

    def __init__(self, base: Metric, task: _OwnOutput) -> None:
        self.base, self.task = base, task

    def update(self, output: Any, targets: Any) -> None:
        """Count one batch."""
        self.base.update(self.task.answer(output), targets)

    def compute(self) -> dict[str, float]:
        """The base's figures."""
        return self.base.compute()


class _MeanScore:
    """A `localgrad.method.Metric`: the mean of a task's scores over all samples."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.total, self.samples = 0.0, 0

    def update(self, output: Any, targets: Any) -> None:
        """Count one batch."""
        scores = self.task.score(output, targets)
        self.total += float(scores.sum())
        self.samples += len(scores)

    def compute(self) -> dict[str, float]:
        """``{"score": ...}``."""
        return {"score": self.total / max(1, self.samples)}


def _logits(output: Any) -> Tensor:
    return cast(Tensor, output.logits)


def _sample(output: Any) -> Tensor:
    return cast(Tensor, output.sample)


@dataclass(frozen=True)
class _EachToken:
    """A `localgrad.method.Task`: one of ``num_outputs`` classes for each token.

    Outputs are logits (B, T, num_outputs). Targets (B, T) are indices; `IGNORED` ones do not count.
    """

    num_outputs: int

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """LayerNorm and a linear layer on each token, whatever classifier the method proposed."""
        return _TokenHead(self.num_outputs)

    def aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the targets they stand for, position by position."""
        return logits, targets

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, averaged over all tokens that count."""
        logits, targets = self.aligned(widened(output), batch.targets)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """The share of each sample's tokens that are right, (B,) float32."""
        logits, targets = self.aligned(output, targets)
        counted = targets != IGNORED
        right = (logits.argmax(2) == targets) & counted
        return right.sum(1).float() / counted.sum(1).clamp(min=1)

    def metric(self) -> Metric:
        """The mean score."""
        return _MeanScore(self)

    def pixels(self, inputs: Any) -> Tensor:
        """Raises `TrainingError`: tokens have no pixels."""
        raise TrainingError("tokens have no pixels; use a method without a reconstruction loss")


@dataclass(frozen=True)
class _NextToken(_EachToken):
    """A `localgrad.method.Task` of language models: targets are the tokens themselves, each answered one before."""

    def aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the tokens that come next."""
        return logits[:, :-1], targets[:, 1:]


@dataclass(frozen=True)
class _TokenHead:
    """LayerNorm and a linear layer over the channels of tokens (B, T, C)."""

    outputs: int

    def __call__(self, site: Site) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(site.layout.channels), nn.Linear(site.layout.channels, self.outputs))


@dataclass(frozen=True)
class _MapHead:
    """A 1x1 convolution on maps or volumes of any layout."""

    outputs: int

    def __call__(self, site: Site) -> nn.Module:
        return nn.Sequential(ToMaps(site.layout), site.layout.layers.conv(site.layout.channels, self.outputs, 1))


@dataclass(frozen=True)
class _Noise:
    """A `localgrad.method.Task` of diffusion models: the noise (B, C, H, W) in images of ``num_outputs`` channels."""

    num_outputs: int

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """A 1x1 convolution at the features' own grid, whatever classifier the method proposed."""
        return _MapHead(self.num_outputs)

    def errors(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of each sample, (B,), from the noise resized to the grid of the output."""
        if output.shape[2:] != targets.shape[2:]:
            targets = F.interpolate(targets, size=output.shape[2:], mode="bilinear", align_corners=False)
        return (widened(output) - targets).square().mean((1, 2, 3))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean squared error."""
        return self.errors(output, batch.targets).mean()

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """``1 / (1 + error)`` of each sample, (B,)."""
        return 1.0 / (1.0 + self.errors(output, targets))

    def metric(self) -> Metric:
        """The mean score."""
        return _MeanScore(self)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Images in [0, 1] of inputs in [-1, 1]."""
        return pixels_of(inputs, (0.5,), (0.5,))


@dataclass(frozen=True)
class _Volumes:
    """A `localgrad.method.Task`: one of ``num_outputs`` classes for each voxel.

    Outputs are logits (B, num_outputs, d, h, w) at any grid, targets (B, D, H, W) are indices.
    """

    num_outputs: int

    def head(self, proposed: HeadBuilder) -> HeadBuilder:
        """A 1x1x1 convolution at the features' own grid, whatever classifier the method proposed."""
        return _MapHead(self.num_outputs)

    def resized(self, output: Tensor, targets: Tensor) -> Tensor:
        """Logits at the grid of the targets."""
        return F.interpolate(widened(output), size=targets.shape[1:], mode="trilinear", align_corners=False)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, averaged over all voxels."""
        return F.cross_entropy(self.resized(output, batch.targets), batch.targets)

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """The share of each sample's voxels that are right, (B,) float32."""
        return (self.resized(output, targets).argmax(1) == targets).float().mean((1, 2, 3))

    def metric(self) -> Metric:
        """The mean score."""
        return _MeanScore(self)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Raises `TrainingError`: voxels are no pixels."""
        raise TrainingError("volumes have no pixels; use a method without a reconstruction loss")


# Batches.


def _images(pixels: int = PIXELS, channels: int = 3) -> Tensor:
    return torch.randn(BATCH, channels, pixels, pixels)


def _labels() -> Tensor:
    return torch.randint(CLASSES, (BATCH,))


def _masks(pixels: int) -> Tensor:
    return torch.randint(CLASSES, (BATCH, pixels, pixels))


def _lengths() -> Tensor:
    """Lengths of a batch of texts, unsorted."""
    return torch.tensor([LENGTH - 3, LENGTH, LENGTH - 6, LENGTH - 1])


def _words() -> Tensor:
    """Indices (B, T), padded behind their `_lengths`."""
    words = torch.randint(FIRST_WORD, WORDS, (BATCH, LENGTH))
    return words.masked_fill(torch.arange(LENGTH) >= _lengths()[:, None], PAD)


def _text() -> dict[str, Tensor]:
    """Padded words and their mask, as keyword arguments of a model of transformers."""
    words = _words()
    return {"input_ids": words, "attention_mask": (words != PAD).long()}


def _next_words(text: Mapping[str, Tensor]) -> Tensor:
    """The words themselves as targets; padding does not count."""
    return text["input_ids"].masked_fill(text["attention_mask"] == 0, IGNORED)


def _boxes() -> list[dict[str, Tensor]]:
    """Two boxes for each image of 64 pixels, none for the second."""
    targets = []
    for index in range(BATCH):
        count = 0 if index == 1 else 2
        corners = 36 * torch.rand(count, 2)
        boxes = torch.cat([corners, corners + 8 + 20 * torch.rand(count, 2)], 1)
        targets.append({"boxes": boxes, "labels": torch.randint(CLASSES, (count,))})
    return targets


def _classifier(model: nn.Module, inputs: Any, num_blocks: int = 4, shared: bool = False) -> Candidate:
    """A model that answers with class logits."""
    return Candidate(model.train(), inputs, _labels(), tasks.classification(CLASSES), num_blocks, shared)


def _hf_classifier(model: nn.Module, inputs: Any, num_blocks: int = 4, shared: bool = False) -> Candidate:
    """A model of transformers that answers with class logits among other things."""
    task = _OwnOutput(tasks.classification(CLASSES), _logits)
    return Candidate(model.train(), inputs, _labels(), task, num_blocks, shared)


# Sequences, in plain PyTorch.


class _Encoder(nn.Module):
    """`nn.TransformerEncoder` on padded words, averaged."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
        self.words = nn.Embedding(WORDS, width, padding_idx=PAD)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        # Nested tensors, which eval mode would make of padding, are a prototype of PyTorch's and warn.
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        padding = words == PAD
        x = self.words(words) + self.positions[: words.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(2).to(x.dtype)
        return self.fc((x * kept).sum(1) / kept.sum(1))


@_reach
def transformer_encoder() -> Candidate:
    """`nn.TransformerEncoder` with a padding mask."""
    return _classifier(_Encoder(), _words())


class _PackedLayer(nn.Module):
    """An LSTM that packs padded features (B, T, C) and pads them again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class _Tagger(nn.Module):
    """Bidirectional LSTMs, each of which packs what it reads."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=PAD)
        self.layers = nn.ModuleList(_PackedLayer(width) for _ in range(depth))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.words(words)
        for layer in self.layers:
            x = layer(x, lengths)
        return self.fc(x.sum(1) / lengths.unsqueeze(1).to(x))


@_reach
def packed_lstm() -> Candidate:
    """Packed LSTMs with padded features between them."""
    return _classifier(_Tagger(), (_words(), _lengths()))


class _PackedTagger(nn.Module):
    """LSTMs that hand a `PackedSequence` on; the last state of the last one decides."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=PAD)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(depth))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x: PackedSequence = pack_padded_sequence(
            self.words(words), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        state = x.data
        for layer in self.layers:
            x, (state, _) = layer(x)
        return self.fc(state[-1])


@_reach
def packed_lstm_chain() -> Candidate:
    """LSTMs with packed sequences between them."""
    return _classifier(_PackedTagger(), (_words(), _lengths()))


class _Recurrent(nn.Module):
    """Convolutions, an `nn.GRU` of three layers, an MLP."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(_conv1d(a, b) for a, b in pairwise((6, width, width))))
        self.gru = nn.GRU(width, width, num_layers=3, batch_first=True, dropout=0.1)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, signals: Tensor) -> Tensor:
        x, _ = self.gru(self.stem(signals).transpose(1, 2))
        return self.fc(self.mlp(x[:, -1]))


@_reach
def gru() -> Candidate:
    """One GRU of three layers between convolutions and an MLP."""
    return _classifier(_Recurrent(), torch.randn(BATCH, 6, 20), 3)


class _RecurrentStack(nn.Module):
    """Several `nn.GRU` of three layers, with residual connections and LayerNorm; time comes first."""

    def __init__(self, width: int = 24, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.grus = nn.ModuleList(nn.GRU(width, width, num_layers=3) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, series: Tensor) -> Tensor:
        x = self.stem(series).transpose(0, 1)
        for recurrent, norm in zip(self.grus, self.norms, strict=True):
            y, _ = recurrent(norm(x))
            x = x + y
        return self.fc(x[-1])


@_reach
def gru_stack() -> Candidate:
    """Four GRUs of three layers, on features (T, B, C)."""
    return _classifier(_RecurrentStack(), torch.randn(BATCH, 10, 6))


def _conv1d(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)
    )


class _Signals(nn.Module):
    """A 1-D residual network."""

    def __init__(self, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.stem = _conv1d(3, width, 2)
        self.units = nn.ModuleList(
            nn.Sequential(_conv1d(width, width), nn.Conv1d(width, width, 3, padding=1)) for _ in range(depth)
        )
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, signals: Tensor) -> Tensor:
        x = self.stem(signals)
        for unit in self.units:
            x = F.relu(x + unit(x))
        return self.fc(x.mean(2))


@_reach
def conv1d() -> Candidate:
    """A 1-D convolutional network on signals (B, C, L)."""
    return _classifier(_Signals(), torch.randn(BATCH, 3, 64))


# Forward passes that cannot be traced, on images.


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Convolutions(nn.Module):
    """Six convolutional units, which subclasses run each in a way of its own."""

    def __init__(self, widths: tuple[int, ...] = (8, 8, 16, 16, 32, 32)) -> None:
        super().__init__()
        self.units = nn.ModuleList(_conv(a, b, 2 if b > a > 3 else 1) for a, b in pairwise((3, *widths)))
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for unit in self.units:
            x = unit(x)
        return self.fc(x.mean((2, 3)))


class _Asserting(_Convolutions):
    def forward(self, images: Tensor) -> Tensor:
        assert images.dim() == 4 and images.shape[1] == 3, f"images of shape {tuple(images.shape)}"
        x = images
        for unit in self.units:
            x = unit(x)
            assert len(x) == len(images) and x.shape[2] == x.shape[3], f"features of shape {tuple(x.shape)}"
        assert x.shape[2] > 1
        return self.fc(x.mean((2, 3)))


@_reach
def asserting() -> Candidate:
    """Asserts on shapes."""
    return _classifier(_Asserting(), _images())


class _Branching(_Convolutions):
    def forward(self, images: Tensor) -> Tensor:
        x = images
        for index, unit in enumerate(self.units):
            x = unit(x)
            if self.training and index % 2:
                x = x + 0.1 * torch.randn_like(x)
            elif not self.training:
                x = x.clamp(max=6.0)
        return self.fc(x.mean((2, 3)))


@_reach
def training_branch() -> Candidate:
    """Noise between units in training mode only."""
    return _classifier(_Branching(), _images())


class _Counting(_Convolutions):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        self.steps += 1
        x = images
        for unit in self.units:
            x = unit(x)
        return self.fc(x.mean((2, 3)))


@_reach
def counting() -> Candidate:
    """A buffer that counts calls."""
    return _classifier(_Counting(), _images())


class _Dropping(nn.Module):
    """Residual layers, each left out with probability ``rate`` in training mode: by `random`, then by NumPy."""

    def __init__(self, width: int = 16, depth: int = 8, rate: float = 0.25) -> None:
        super().__init__()
        self.rate = rate
        self.stem = _conv(3, width, 2)
        self.layers = nn.ModuleList(
            nn.Sequential(_conv(width, width), nn.Conv2d(width, width, 3, padding=1)) for _ in range(depth)
        )
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for index, layer in enumerate(self.layers):
            draw = np.random.rand() if index % 2 else random.random()
            if not self.training or draw >= self.rate:
                x = x + layer(x)
        return self.fc(x.mean((2, 3)))


@_reach
def layer_drop() -> Candidate:
    """Layers left out at random, by generators that are not torch's."""
    return _classifier(_Dropping(), _images())


class _WithMetadata(_Convolutions):
    """Images, and a vector for each that scales the features half-way and is read again by the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata = nn.Sequential(nn.Linear(7, 16), nn.ReLU(inplace=True))
        self.scale = nn.Linear(16, 16)
        self.fc = nn.Linear(32 + 16, CLASSES)

    def forward(self, images: Tensor, metadata: Tensor) -> Tensor:  # type: ignore[override]
        known = self.metadata(metadata)
        x = images
        for index, unit in enumerate(self.units):
            x = unit(x)
            if index == 3:
                x = x * (1.0 + self.scale(known))[:, :, None, None]
        return self.fc(torch.cat([x.mean((2, 3)), known], 1))


@_reach
def image_and_metadata() -> Candidate:
    """Two inputs."""
    return _classifier(_WithMetadata(), (_images(), torch.randn(BATCH, 7)))


# Transformers, text.


def _hf(name: str, **config: Any) -> Any:
    """A model of transformers, by the name of its class, with random weights."""
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**config))


_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 2, 2, 1], "num_labels": CLASSES}


@_reach
def bert() -> Candidate:
    """BERT for sequence classification."""
    options = {"vocab_size": WORDS, "max_position_embeddings": 32, "num_labels": CLASSES}
    return _hf_classifier(_hf("BertForSequenceClassification", **_SIZES, **options), _text())


@_reach
def distilbert() -> Candidate:
    """DistilBERT for sequence classification."""
    sizes = {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64}
    options = {"vocab_size": WORDS, "max_position_embeddings": 32, "num_labels": CLASSES}
    return _hf_classifier(_hf("DistilBertForSequenceClassification", **sizes, **options), _text())


def _language_model(model: nn.Module, shared: bool = False) -> Candidate:
    text = _text()
    return Candidate(model.train(), text, _next_words(text), _OwnOutput(_NextToken(WORDS), _logits), 4, shared)


@_reach
def gpt2() -> Candidate:
    """GPT-2, whose embedding is also its last layer; without a cache of keys and values."""
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 32, "vocab_size": WORDS}
    model = _hf("GPT2LMHeadModel", **sizes, use_cache=False, bos_token_id=EOS, eos_token_id=EOS)
    return _language_model(model, shared=True)


@_reach
def llama() -> Candidate:
    """Llama with grouped queries; it fills and returns a cache of keys and values, as it does by default."""
    sizes = {**_SIZES, "num_key_value_heads": 1, "vocab_size": WORDS, "max_position_embeddings": 32}
    return _language_model(_hf("LlamaForCausalLM", **sizes))


_T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2, "vocab_size": WORDS, "num_labels": CLASSES,
}  # fmt: skip


@_reach
def t5_encoder() -> Candidate:
    """The encoder of T5 for token classification; the first layer's position bias is read by all."""
    text = _text()
    targets = torch.randint(CLASSES, (BATCH, LENGTH)).masked_fill(text["attention_mask"] == 0, IGNORED)
    task = _OwnOutput(_EachToken(CLASSES), _logits)
    return Candidate(_hf("T5ForTokenClassification", **_T5).train(), text, targets, task, 4)


@_reach
def t5_encoder_decoder() -> Candidate:
    """T5 for sequence classification: encoder and decoder share their embedding, the decoder reads the encoder."""
    text = _text()
    text["input_ids"][torch.arange(BATCH), _lengths() - 1] = EOS  # the last word of each is what the classifier reads
    model = _hf("T5ForSequenceClassification", **_T5, num_decoder_layers=2, decoder_start_token_id=PAD)
    return _hf_classifier(model, text, shared=True)


@_reach
def wav2vec2() -> Candidate:
    """wav2vec 2.0 for sequence classification; it masks spans of time that NumPy draws. Layers are not dropped."""
    convolutions = {"conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    options = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "layerdrop": 0.0}
    outputs = {"classifier_proj_size": 16, "num_labels": CLASSES}
    model = _hf("Wav2Vec2ForSequenceClassification", **_SIZES, **convolutions, **positions, **options, **outputs)
    mask = (torch.arange(1600) < torch.tensor([1600, 1200, 1400, 1600])[:, None]).long()
    return _hf_classifier(model, {"input_values": torch.randn(BATCH, 1600) * mask, "attention_mask": mask})


# Transformers, images.


def _vit() -> Any:
    return _hf("ViTForImageClassification", **_SIZES, image_size=PIXELS, patch_size=8, num_labels=CLASSES)


@_reach
def vit() -> Candidate:
    """ViT."""
    return _hf_classifier(_vit(), {"pixel_values": _images()})


@_reach
def swin() -> Candidate:
    """Swin."""
    sizes = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 2, "patch_size": 2}
    model = _hf("SwinForImageClassification", **sizes, image_size=PIXELS, num_labels=CLASSES)
    return _hf_classifier(model, {"pixel_values": _images()})


@_reach
def convnext() -> Candidate:
    """ConvNeXt."""
    return _hf_classifier(_hf("ConvNextForImageClassification", **_STAGES), {"pixel_values": _images(64)})


@_reach
def segformer() -> Candidate:
    """SegFormer for semantic segmentation, logits at a quarter of the sides."""
    sizes = {**_STAGES, "num_attention_heads": [1, 1, 2, 4], "decoder_hidden_size": 32}
    task = _OwnOutput(tasks.segmentation(CLASSES), _logits)
    model = _hf("SegformerForSemanticSegmentation", **sizes).train()
    return Candidate(model, {"pixel_values": _images(64)}, _masks(64), task, 4)


# Adapters (peft).


@_reach
def lora_transformers() -> Candidate:
    """LoRA on a ViT of transformers; only adapters and the classifier train."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers about checkpointing by an old name
        model = get_peft_model(_vit(), config)
    return _hf_classifier(model, {"pixel_values": _images()})


@_reach
def lora_timm() -> Candidate:
    """LoRA on a ViT of timm; only adapters and the head train, adapters starting at random instead of at 0."""
    from peft import LoraConfig, get_peft_model
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(PIXELS, 8, num_classes=CLASSES, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2)
    config = LoraConfig(r=4, target_modules=["qkv", "attn.proj"], modules_to_save=["head"], init_lora_weights=False)
    return _classifier(get_peft_model(cast(Any, model), config), _images())


# Video and volumes.


@_reach
def r3d_18() -> Candidate:
    """torchvision's 3-D ResNet-18, on four frames."""
    from torchvision.models.video import r3d_18

    return _classifier(r3d_18(weights=None, num_classes=CLASSES), torch.randn(BATCH, 3, 4, PIXELS, PIXELS))


@_reach
def swin3d() -> Candidate:
    """torchvision's Video Swin with the depth of ``swin3d_t`` but for its third stage, and few channels."""
    from torchvision.models.video import SwinTransformer3d

    model = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=[2, 2, 2],
        stochastic_depth_prob=0.1, num_classes=CLASSES,
    )  # fmt: skip
    return _classifier(model, torch.randn(BATCH, 3, 8, 64, 64))


def _volumes(model: nn.Module, side: int) -> Candidate:
    inputs = torch.randn(BATCH, 1, side, side, side)
    return Candidate(model.train(), inputs, torch.randint(3, (BATCH, side, side, side)), _Volumes(3), 4)


@_reach
def monai_unet() -> Candidate:
    """MONAI's UNet with residual units; each level holds the one below it."""
    from monai.networks.nets import UNet

    return _volumes(UNet(3, 1, 3, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=2, dropout=0.1), 16)


@_reach
def monai_basic_unet() -> Candidate:
    """MONAI's BasicUNet."""
    from monai.networks.nets import BasicUNet

    return _volumes(BasicUNet(3, 1, 3, features=(4, 4, 8, 16, 32, 4)), 32)


# Segmentation, detection.


def _smp(name: str, **options: Any) -> Candidate:
    import segmentation_models_pytorch as smp

    model = getattr(smp, name)("resnet18", encoder_weights=None, classes=CLASSES, **options)
    return Candidate(model.train(), _images(64), _masks(64), tasks.segmentation(CLASSES), 4)


@_reach
def smp_unet() -> Candidate:
    """U-Net on a ResNet-18."""
    return _smp("Unet", decoder_channels=(64, 32, 16, 16, 8))


@_reach
def smp_unetplusplus() -> Candidate:
    """U-Net++ on a ResNet-18."""
    return _smp("UnetPlusPlus", decoder_channels=(64, 32, 16, 16, 8))


@_reach
def smp_fpn() -> Candidate:
    """FPN on a ResNet-18."""
    return _smp("FPN", decoder_pyramid_channels=64, decoder_segmentation_channels=32)


def _detector(model: nn.Module) -> Candidate:
    return Candidate(model.train(), _images(64), _boxes(), tasks.detection(CLASSES), 4)


@_reach
def retinanet() -> Candidate:
    """torchvision's RetinaNet on a ResNet-18."""
    from localgrad.models.detection import retinanet

    return _detector(retinanet(CLASSES, backbone="resnet18", width=64))


@_reach
def fcos() -> Candidate:
    """torchvision's FCOS on a ResNet-18."""
    from localgrad.models.detection import fcos

    return _detector(fcos(CLASSES, backbone="resnet18", width=64))


# Diffusion.


@_reach
def diffusers_unet() -> Candidate:
    """The U-Net of diffusers, with attention at its lower levels."""
    from diffusers import UNet2DModel

    model: Any = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32, 32), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, dropout=0.1,
    )  # fmt: skip
    images, times, noise = _noised(16)
    return Candidate(model.train(), {"sample": images, "timestep": times}, noise, _OwnOutput(_Noise(3), _sample), 4)


def _noised(pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise, the times (B,) that say how much, and the noise."""
    times, noise = torch.randint(1000, (BATCH,)), _images(pixels)
    share = (times / 1000.0)[:, None, None, None]
    return (1 - share).sqrt() * _images(pixels).tanh() + share.sqrt() * noise, times, noise


class _Timed(nn.Module):
    """A residual unit that reads the embedding of the time."""

    def __init__(self, inputs: int, outputs: int, embedded: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedded, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class _Denoiser(nn.Module):
    """A U-Net of three levels that keeps its skips in a list."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32), embedded: int = 32) -> None:
        super().__init__()
        self.embedded = embedded
        self.time = nn.Sequential(nn.Linear(embedded, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        levels = list(pairwise((widths[0], *widths)))
        self.down = nn.ModuleList(_Timed(a, b, embedded) for a, b in levels)
        self.middle = _Timed(widths[-1], widths[-1], embedded)
        self.up = nn.ModuleList(_Timed(2 * b, a, embedded) for a, b in reversed(levels))
        self.norm = nn.GroupNorm(4, widths[0])
        self.out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        half = self.embedded // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=times.device) / half)
        angles = times[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.stem(images)
        skips = []
        for unit in self.down:
            x = unit(x, time)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, time)
        for unit in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = unit(torch.cat([x, skips.pop()], 1), time)
        return self.out(F.silu(self.norm(x)))


@_reach
def denoiser() -> Candidate:
    """A hand-written diffusion U-Net."""
    images, times, noise = _noised(PIXELS)
    return Candidate(_Denoiser().train(), (images, times), noise, _Noise(3), 4)
