"""Plain text as data: streams, splits, windows, tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import localgrad
from localgrad.config import validate
from localgrad.data.text import load
from localgrad.errors import ConfigError, DataError, LocalgradError
from localgrad.train.experiment import load_data

QUESTION, WINTER = "to be or not to be, that is the question. ", "now is the winter of our discontent. "
PLAYS = {"b.txt": QUESTION * 9, "a.txt": WINTER * 9}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def plays(tmp_path: Path) -> str:
    for split in ("train", "test"):
        (tmp_path / "plays" / split / "deeper").mkdir(parents=True)
    for name, text in PLAYS.items():
        (tmp_path / "plays" / "train" / "deeper" / name).write_text(text)
    (tmp_path / "plays" / "test" / "c.txt").write_text("some are born great. " * 9)
    (tmp_path / "plays" / "test" / "picture.png").write_bytes(b"\x89PNG")
    return f"text:{tmp_path / 'plays'}"


def given_settings(**changes: Any) -> dict[str, Any]:
    return {"context": 16, "tokenizer": "bytes", "batch_size": 4, "validation": 0.0, "augment": False, **changes}


def joined(loader: Any, epoch: int = 0) -> bytes:
    return bytes(torch.cat([tokens for tokens, _ in loader.epoch(epoch)]).flatten().tolist())


def test_documents_follow_one_another_with_a_separator(plays: str) -> None:
    data = load(plays, **given_settings())
    stream = (PLAYS["a.txt"] + "\0" + PLAYS["b.txt"] + "\0").encode()
    windows = {stream[k : k + 16] for k in range(0, len(stream) - 15, 16)}
    found = joined(data.train)
    assert {found[k : k + 16] for k in range(0, len(found), 16)} == windows
    assert data.train.num_samples == len(stream) // 16
    test = ("some are born great. " * 9 + "\0").encode()
    assert joined(data.test) == test[: len(test) // 16 * 16]
    assert (data.num_classes, data.input_shape, data.kind) == (256, (16,), "language_model")


def test_where_a_document_ends_is_remembered(tmp_path: Path) -> None:
    """Two folders of the same bytes in other documents are not one in the cache."""
    for name, sizes in {"first": (500, 500), "second": (400, 600)}.items():
        (tmp_path / name).mkdir()
        text = "ab" * 500
        (tmp_path / name / "1.txt").write_text(text[: sizes[0]])
        (tmp_path / name / "2.txt").write_text(text[sizes[0] :])
        data = load(f"text:{tmp_path / name}", **given_settings())
        assert bytes(data.train.stream).index(b"\0") == sizes[0]


def test_epochs_of_training_begin_at_places_of_their_own(plays: str) -> None:
    data = load(plays, **given_settings(augment=True))
    stream = (PLAYS["a.txt"] + "\0" + PLAYS["b.txt"] + "\0").encode()
    places = set()
    for epoch in range(8):
        found = joined(data.train, epoch)
        windows = {found[k : k + 16] for k in range(0, len(found), 16)}
        first = [s for s in range(16) if windows == {stream[k : k + 16] for k in range(s, s + len(found), 16)}]
        assert len(first) >= 1
        places.add(first[0])
    assert len(places) > 2
    again = load(plays, **given_settings(augment=True))
    whole = [tokens for tokens, _ in data.train.epoch(3)]
    assert all(map(torch.equal, [tokens for tokens, _ in again.train.epoch(3, start=2)], whole[2:]))


@given(length=st.integers(40, 400), context=st.integers(2, 20), share=st.sampled_from([0.0, 0.1, 0.3]))
def test_splits_share_no_token(
    tmp_path_factory: pytest.TempPathFactory, length: int, context: int, share: float
) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    content = bytes(1 + k % 255 for k in range(length))
    file.write_bytes(content)
    stream, name = content + b"\0", f"text:{file}"
    try:
        data = load(name, **given_settings(context=context, validation=share))
    except ConfigError as error:
        assert "too few" in str(error)
        return
    keep = len(stream) - len(stream) // 10
    held = round(keep * share)
    parts = [data.train, data.validation, data.test]
    for loader, (start, stop) in zip(parts, [(0, keep - held), (keep - held, keep), (keep, len(stream))], strict=True):
        if loader is None:
            assert share == 0
            continue
        expected = stream[start:stop][: (stop - start) // context * context]
        found = b"".join(sorted(bytes(t.tolist()) for tokens, _ in loader.epoch(0) for t in tokens))
        assert found == b"".join(sorted(expected[k : k + context] for k in range(0, len(expected), context)))


def test_replicas_share_a_batch(plays: str) -> None:
    whole = load(plays, **given_settings(drop_last=True))
    halves = [load(plays, **given_settings(drop_last=True, replica=r, num_replicas=2)) for r in (0, 1)]
    for batch, *shares in zip(whole.train.epoch(0), *(half.train.epoch(0) for half in halves), strict=True):
        assert torch.equal(batch[0], torch.cat([tokens for tokens, _ in shares]))


def test_a_tokenizer_is_trained_on_the_training_text_and_kept(plays: str, tmp_path: Path) -> None:
    data = load(plays, **given_settings(tokenizer=300))
    assert data.num_classes <= 300 and "<|endoftext|>" in data.classes
    kept = list((tmp_path / "cache" / "localgrad").glob("text-bpe300-*.json"))
    assert len(kept) == 1
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(kept[0]))
    ids = torch.cat([tokens for tokens, _ in data.test.epoch(0)]).flatten().tolist()
    assert ("some are born great. " * 9).startswith(tokenizer.decode(ids))
    assert data.train.num_samples < load(plays, **given_settings()).train.num_samples / 1.3
    named = load(plays, **given_settings(tokenizer=str(kept[0])))
    assert torch.equal(next(named.test.epoch(0))[0], next(data.test.epoch(0))[0])


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"context": 1}, "context=1"), ({"tokenizer": 256}, "257 tokens"), ({"tokenizer": "utf8"}, "tokenizer.json"),
        ({"context": 10_000}, "too few"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(plays: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(LocalgradError, match=word):
        load(plays, **given_settings(**changes))


def test_text_that_is_not_there_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load("text:nowhere", **given_settings())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text file"):
        load(f"text:{tmp_path / 'empty'}", **given_settings())
    (tmp_path / "empty" / "play.txt").write_text(QUESTION)
    (tmp_path / "empty" / "test").mkdir()
    (tmp_path / "empty" / "test" / "secret.txt").write_text(WINTER)
    with pytest.raises(DataError, match="text in test and none in train; move what trains to"):
        load(f"text:{tmp_path / 'empty'}", **given_settings())
    (tmp_path / "latin.txt").write_bytes("für ".encode("latin-1") * 99)
    assert load(f"text:{tmp_path / 'latin.txt'}", **given_settings()).train.num_samples > 0
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8"):
        load(f"text:{tmp_path / 'latin.txt'}", **given_settings(tokenizer=300))


@pytest.mark.parametrize(
    "name, section, word",
    [
        ("digits", {"context": 64}, "data.context is for text"),
        ("TEXT", {"image_size": 64}, "data.image_size is for images"),
        ("TEXT", {"workers": 2}, "data.workers is for images"),
    ],
)
def test_settings_of_the_other_kind_are_refused(plays: str, name: str, section: dict[str, Any], word: str) -> None:
    config = validate({"method": ["dgl"], "data": {"name": name.replace("TEXT", plays), **section}}, "test")
    with pytest.raises(ConfigError, match=word):
        load_data(config, torch.device("cpu"))


def test_models_and_data_of_different_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="reads images, and the data are text"):
        localgrad.models.create("resnet20", num_classes=256, context=16)
    with pytest.raises(ConfigError, match="reads tokens"):
        localgrad.models.create("transformers:llama", num_classes=10, image_size=32)
