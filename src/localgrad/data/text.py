"""Plain text as sequences of tokens, packed without padding and mapped from disk.

::

    documents   |first play|second play|third ...          files, in the order of their paths
    stream      first play\\0second play\\0third ...\\0       one separator after each
    windows       [context ][context ][context ]           an epoch of training begins at a place of its own

Windows of an epoch do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localgrad import randomness
from localgrad.data import cache
from localgrad.data.dataset import Data, root_of
from localgrad.data.loaders import Order
from localgrad.errors import ConfigError, DataError

PREFIX = "text:"
BYTES = "bytes"
SEPARATOR = "<|endoftext|>"
_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_KINDS = {f".{kind}" for kind in ("txt", "md", "rst", "tex", "py", "json", "jsonl", "csv", "html", "xml", "c", "h")}


def knows(name: str) -> bool:
    """Whether a data set is plain text."""
    return name.startswith(PREFIX)


@dataclass(frozen=True, eq=False)
class Windows:
    """A `localgrad.data.Loader`: windows of ``context`` tokens from a stream.

    Inputs and targets are the same int64 tokens (B, context), as `localgrad.tasks.language_model` takes them. An epoch
    of training begins with one of the first ``context`` tokens, keyed by (seed, epoch), so that no two epochs cut the
    text at the same places.
    """

    order: Order
    stream: np.ndarray = field(repr=False)
    context: int
    shifts: bool
    device: torch.device

    @property
    def num_samples(self) -> int:
        """Windows in the split, over all replicas."""
        return len(self.order.indices)

    @property
    def how(self) -> str:
        """See `Loader.how`."""
        return f"tokens are mapped from {cache.folder()}"

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.epoch`."""
        first = 0
        if self.shifts:
            draw = randomness.generator(self.order.seed or 0, "augment", epoch)
            first = int(torch.randint(self.context, (), generator=draw))
        within = np.arange(self.context)
        for batch in self.order.batches(epoch, start):
            found = self.stream[first + batch.numpy()[:, None] * self.context + within]
            tokens = torch.from_numpy(found.astype(np.int64)).to(self.device)
            yield tokens, tokens


def load(
    name: str,
    *,
    context: int,
    tokenizer: str | int,
    root: str | Path | None = None,
    batch_size: int,
    eval_batch_size: int | None = None,
    validation: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
    augment: bool = True,
    drop_last: bool = False,
    device: torch.device | str = "cpu",
    replica: int = 0,
    num_replicas: int = 1,
) -> Data:
    """The loaders of plain text.

    The documents of a split are joined to one stream, a separator after each, and the stream is cut into windows;
    attention sees what stands before in the window, also of another document. What is left at the end of a stream
    and fills no window is left out.

    Args:
        name: ``text:PATH`` of a file, or of a folder whose text files are documents, below ``train``, ``test`` and
            ``validation`` if it has such folders. Without ``test`` it is the last tenth of the stream.
        context: tokens of a window.
        tokenizer: ``bytes``; a number, of tokens of a byte-level BPE that is trained on the training documents and
            kept in the cache folder; or the path of a ``tokenizer.json`` of Hugging Face.
        root: what PATH is relative to; see `localgrad.data.root_of`.
        validation: the share of the training stream, at its end, that is held out, unless there is such a folder.
        limit: windows of training, the first ones of the stream, validation included.
        augment: whether each epoch of training begins at a place of its own.
        batch_size, eval_batch_size, seed, drop_last, device, replica, num_replicas: as `localgrad.data.load` has them.

    Raises:
        DataError: no such text, or text that cannot be read.
        ConfigError: an argument makes no sense, or a split has no window.

    Example:
        >>> import tempfile, pathlib, localgrad
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = pathlib.Path(folder.name, "a.txt")
        >>> _ = file.write_text("to be or not to be, " * 20)
        >>> data = localgrad.data.text.load(f"text:{file}", context=16, tokenizer="bytes", batch_size=4)
        >>> inputs, targets = next(data.train.epoch(0))
        >>> inputs.shape, data.num_classes
        (torch.Size([4, 16]), 256)
        >>> folder.cleanup()
    """
    if isinstance(context, bool) or not 2 <= context <= 2**16:
        raise ConfigError(f"context={context}; a window has 2 to {2**16} tokens")
    device, path = torch.device(device), _path(name, root)
    documents = _documents(path)
    words, streams = _streams(documents, tokenizer)
    train, test = streams["train"], streams.get("test")
    if test is None:
        keep = len(train) - len(train) // 10
        train, test = train[:keep], train[keep:]
    if limit is not None:
        train = train[: limit * context + context * augment]
    held = streams.get("validation") if validation > 0 else None
    if held is None and validation > 0:
        keep = len(train) - round(len(train) * validation)
        train, held = train[:keep], train[keep:]
    eval_batch_size = eval_batch_size or batch_size

    def split(stream: np.ndarray, what: str, training: bool) -> Windows:
        shifts = training and augment
        count = len(stream) // context - shifts
        if count < 1:
            raise ConfigError(f"{name}: {what} has {len(stream)} tokens, too few for a window of context={context}")
        indices = torch.arange(count)
        order = Order(indices, batch_size, seed, drop_last, replica, num_replicas) if training else None
        return Windows(order or Order(indices, eval_batch_size), stream, context, shifts, device)

    return Data(
        name=name,
        title=f"text in {path}",
        num_classes=len(words),
        classes=words,
        input_shape=(context,),
        mean=(),
        std=(),
        train=split(train, "training text", training=True),
        validation=None if held is None else split(held, "validation text", training=False),
        test=split(test, "test text", training=False),
        kind="language_model",
    )


def _path(name: str, root: str | Path | None) -> Path:
    written = Path(name.removeprefix(PREFIX)).expanduser()
    places = [written] if written.is_absolute() else [root_of(root) / written, written]
    for path in places:
        if path.exists():
            return path
    looked = " and ".join(str(path.resolve()) for path in places)
    raise DataError(f"data {name!r}: no such file or folder. Looked for {looked}. Write text:PATH of yours.")


def _documents(path: Path) -> dict[str, list[Path]]:
    """The files of each split, in the order of their paths."""
    if path.is_file():
        return {"train": [path]}
    found = {
        split: files
        for split, names in _SPLITS.items()
        if (files := [file for name in names for file in _files(path / name)])
    }
    if not found:
        found = {"train": _files(path)}
    if "train" not in found:
        raise DataError(f"{path} has text in {' and '.join(found)} and none in train; move what trains to {path}/train")
    if not found["train"]:
        raise DataError(f"{path} has no text file; known by their ends are {', '.join(sorted(_KINDS))}")
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _KINDS and p.is_file())


def _streams(documents: dict[str, list[Path]], tokenizer: str | int) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """What each token stands for, and the tokens of each split."""
    key = {split: cache.sha256(*files) for split, files in documents.items()}
    if tokenizer == BYTES:
        words, kind, encode = tuple(map(chr, range(256))), BYTES, _bytes  # as latin-1 has them
    else:
        model, kind = _tokenizer(tokenizer, documents["train"], key["train"])
        known = model.get_vocab()
        words = tuple(sorted(known, key=known.__getitem__))
        separator = model.token_to_id(SEPARATOR)
        if separator is None or len(words) != model.get_vocab_size():
            raise DataError(f"tokenizer {tokenizer!r} has no token {SEPARATOR}, which ends a document; add it to it")

        def encode(file: Path) -> list[int]:
            return [*model.encode(_text(file), add_special_tokens=False).ids, separator]

    dtype = np.dtype(np.uint8 if len(words) <= 2**8 else np.uint16 if len(words) <= 2**16 else np.uint32)

    def encoded(files: Sequence[Path]) -> Iterator[np.ndarray]:
        return (np.asarray(encode(file)) for file in files)

    return words, {
        split: cache.tokens(f"text-{key[split][:32]}-{kind}.bin", dtype, partial(encoded, files))
        for split, files in documents.items()
    }


def _bytes(file: Path) -> Any:
    return np.frombuffer(_content(file) + b"\0", np.uint8)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _text(file: Path) -> str:
    try:
        return _content(file).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error}); convert it, or set data.tokenizer=bytes") from error


def _tokenizer(tokenizer: str | int, files: Sequence[Path], key: str) -> tuple[Any, str]:
    """A tokenizer of Hugging Face, and what tells it from others."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ConfigError("tokens other than bytes need the library tokenizers: pip install localgrad[text]") from error
    if isinstance(tokenizer, str):
        content = _content(Path(tokenizer)) if Path(tokenizer).is_file() else b""
        try:
            return Tokenizer.from_buffer(content), cache.sha256(Path(tokenizer))[:16]
        except Exception as error:  # of its own kinds, all of them derived from Exception alone
            raise ConfigError(
                f"data.tokenizer={tokenizer!r} is no tokenizer.json ({error}); write bytes, a number of tokens such as "
                "4096, or the path of such a file"
            ) from error
    if isinstance(tokenizer, bool) or not 257 <= tokenizer <= 2**20:
        raise ConfigError(f"data.tokenizer={tokenizer!r}; a BPE has 257 tokens or more, of which 256 are bytes")

    def trained() -> str:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            map(_text, files),
            trainers.BpeTrainer(
                vocab_size=tokenizer, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
            ),
        )
        return str(made.to_str())

    kind = f"bpe{tokenizer}-{key[:32]}"
    return Tokenizer.from_str(cache.text(f"text-{kind}.json", trained)), kind
