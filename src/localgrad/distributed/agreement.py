"""What all processes of a job must have in common, compared before anything is trained."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.errors import ConfigError, TrainingError
from localgrad.network import LocalNetwork
from localgrad.version import __version__


@cache
def source_digest() -> str:
    """sha256 over localgrad's own source files: ranks that run different code are found by it."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def facts_about(network: LocalNetwork) -> dict[str, str]:
    """What two ranks compare about their networks, by name."""
    shapes = "; ".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in network.named_parameters())
    return {
        "version of torch": str(torch.__version__),
        "version of localgrad": __version__,
        "source code of localgrad": source_digest(),
        "method": network.method.name,
        "blocks": f"{network.num_blocks}, beginning at {', '.join(cut.name for cut in network.cuts) or 'the input'}",
        "settings of the method": hashlib.sha256(_settings(network).encode()).hexdigest()[:16],
        "parameters": hashlib.sha256(shapes.encode()).hexdigest()[:16],
    }


def _settings(network: LocalNetwork) -> str:
    """The spans of every pattern and the weights of all terms: what a method's options become."""
    patterns = network.method.spans.patterns(network.num_blocks)
    weights = {name: [weight for _, weight in aux.terms] for name, aux in network.auxiliary.items()}  # type: ignore[union-attr]
    return repr((patterns, weights, network.method.accumulate))


def agree(group: dist.ProcessGroup, facts: Mapping[str, str]) -> None:
    """Raise on every rank of ``group`` unless all of them pass equal ``facts``.

    Raises:
        ConfigError: names the first rank that differs from the group's first one, and in what.
    """
    rows = gather_text(group, json.dumps(dict(facts)))
    first = json.loads(rows[0])
    for rank, row in enumerate(map(json.loads, rows)):
        differing = [name for name in {**first, **row} if first.get(name) != row.get(name)]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"rank {dist.get_global_rank(group, rank)} does not run the same job as rank "
                f"{dist.get_global_rank(group, 0)}: {name} is {row.get(name)!r} there and {first.get(name)!r} here. "
                "Start all ranks with the same code, settings and data"
            )


def everyone() -> dist.ProcessGroup:
    """All processes of the job."""
    group = dist.group.WORLD
    assert group is not None
    return group


def gather_text(group: dist.ProcessGroup, text: str) -> list[str]:
    """The ``text`` of every rank, in order. Nothing is pickled."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with explained("telling each other how they stand"):
        return [bytes(row.numpy()).decode() for row in gather_rows(group, data)]


def gather_rows(group: dist.ProcessGroup, rows: Tensor) -> list[Tensor]:
    """``rows`` (B_r, ...) of every rank r, in order; numbers of rows may differ, (...) may not."""
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(counts, own, group=group)
    lengths = [int(count) for count in counts]
    padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded, group=group)
    return [part[:length] for part, length in zip(gathered, lengths, strict=True)]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the failure of a collective, which c10d reports in terms of sockets, into a `TrainingError`."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError and DistNetworkError are RuntimeErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainingError(
            f"rank {dist.get_rank()} lost its peers while {what}: {reason}. Another rank has died, hangs, has fewer "
            "batches, or was too slow for init_process_group(timeout=...). Look for the first error among all ranks; "
            "torchrun --max-restarts=3 continues from the last checkpoint"
        ) from error
