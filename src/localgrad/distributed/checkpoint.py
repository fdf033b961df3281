"""Checkpoints that every rank writes its part of, and that any other layout of ranks can load.

    step00000010/
        shard-00001-....safetensors   what rank 0 saved, and what lies beside
        shard-00002-....safetensors   what rank 1 saved
        complete.json                 written last: format, blocks, the sha256 of every file, and of itself

A folder gets its name once all of that is on disk. One whose files are not what `complete.json` says is passed over by
all ranks alike, for the one before it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from localgrad import sealed
from localgrad.distributed.agreement import explained, gather_text
from localgrad.distributed.custody import named_tensors
from localgrad.errors import CheckpointError
from localgrad.network import LocalNetwork

FORMAT = "localgrad-checkpoint/2"
COMPLETE, BESIDE = "complete.json", "beside."
_NUMBER = "#"  # after the name of state that is a number, no tensor


class Checkpoints:
    """Checkpoints of a network and its optimizers in one folder, ``step00000010`` and so on.

    Each is a folder of safetensors files (torch.distributed.checkpoint writes and reads them; no pickle) with one name
    for each tensor of the network and of the optimizers' state, whatever rank it was on. So what two ranks saved, one
    process can load, or four, or two that hold other blocks. Replicas save one copy. A checkpoint is the state after
    one step on every rank; batches that were on their way are trained again from the data.

    A folder gets its name once every rank has written its part: one that a crash left behind is never loaded. Every
    file carries a sha256; a damaged checkpoint is passed over for the one before it. Saving a step renames those of
    later steps, which a run that went back has left behind, to ``.superseded``.

    Args:
        folder: the same on every rank, on a disk that all of them see.
        network: as it is trained, in one process or after `data_parallel` and `block_parallel`.
        optimizers: for its parameters; only their state is saved, not their settings.
        keep: so many of the newest are kept, besides those that they need.
        timeout: how long a rank waits for another one to save; torch's 30 minutes if None.

    Raises:
        CheckpointError: from `save` if the disk is full or a rank is gone, from `load` if a checkpoint belongs to
            another network, or if all of them are damaged.

    Example:
        >>> import tempfile, torch, localgrad
        >>> from localgrad.distributed import Checkpoints
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> network = localgrad.localize(model, method, 2, example=torch.randn(2, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder, network, [torch.optim.SGD(network.parameters(), 0.1)])
        ...     checkpoints.save(10)
        ...     checkpoints.load()
        10
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        network: LocalNetwork,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        keep: int = 2,
        timeout: timedelta | None = None,
    ) -> None:
        self.folder, self.network, self.optimizers, self.keep = Path(folder), network, list(optimizers), keep
        self.group: dist.ProcessGroup | None = None
        self._checked: int | None = None
        self._writing: tuple[Future[Any], int, dict[str, Any]] | None = None
        if network.stage is not None or network.replicas is not None:
            # One of its own: in the background its collectives must not meet those of training.
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            self.group = group

    @property
    def _first(self) -> bool:
        return self.group is None or self.group.rank() == 0

    def steps(self) -> list[int]:
        """Of the checkpoints that were completed, damaged or not, in order."""
        found = (re.fullmatch(r"step(\d+)", path.name) for path in self.folder.glob("step*"))
        return sorted(int(match[1]) for match in found if match)

    def _place(self, step: int) -> Path:
        return self.folder / f"step{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f"step{step:08d}.partial"

    def save(self, step: int, *, wait: bool = True, beside: Any = None, needs: Collection[int] = ()) -> None:
        """Write the state after ``step`` optimizer steps, and what is to lie ``beside`` it.

        Every rank calls it; the first one's ``beside`` is kept, see `beside`: a tree that `localgrad.sealed.encode`
        takes. Checkpoints of the steps that it ``needs`` stay as long as it does.

        Without ``wait`` it returns as soon as the state is copied; `finish` waits for the rest, as the next `save`
        does. No rank then waits for one that has yet to reach this step, but for twins, which first take the weights
        they follow.
        """
        self.finish()
        partial = self._partial(step)
        if self.network.stage is not None:
            self.network.stage.settle()
        state = {name: _writable(tensor) for name, tensor in self._tensors().items()}
        facts = {"format": FORMAT, "step": step, "needs": sorted(needs), "blocks": self._blocks()}
        if self._first:
            lying: dict[str, Tensor] = {}
            facts["beside"] = sealed.encode(beside, lying, "beside")
            state |= {BESIDE + name: tensor for name, tensor in lying.items()}
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            if self._first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True, exist_ok=True)  # another rank may write in the background already
            if self.group is None:
                with _alone():
                    dcp.save(state, storage_writer=writer, no_dist=True)
                self._complete(step, facts)
            elif wait:
                dist.barrier(self.group)
                dcp.save(state, storage_writer=writer, process_group=self.group)
                self._complete(step, facts)
                dist.barrier(self.group)
            else:
                future = dcp.async_save(state, storage_writer=writer, process_group=self.group)
                assert isinstance(future, Future)
                self._writing = future, step, facts
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            raise self._failed(step, error) from error

    def finish(self) -> None:
        """Wait until a checkpoint that is being written is complete."""
        if self._writing is None:
            return
        (future, step, facts), self._writing = self._writing, None
        try:
            future.result()
            self._complete(step, facts)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        failures = error.failures if isinstance(error, dcp.CheckpointException) else {}
        reason = "; ".join(f"rank {rank}: {why}" for rank, (why, _) in failures.items()) or str(error)
        return CheckpointError(
            f"could not save the checkpoint {self._place(step)}: {' '.join(reason.split())[:300]}; the ones before it "
            "are as they were. Free space on the disk, or save elsewhere"
        )

    def beside(self, step: int) -> Any:
        """What `save` was given to keep beside the state after ``step``, tensors on the CPU."""
        place = self._place(step)
        reader = dcp.HuggingFaceStorageReader(str(place))
        saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
        state = {
            name: torch.empty(about.size, dtype=about.properties.dtype)
            for name, about in saved.items()
            if name.startswith(BESIDE)
        }
        with _alone():
            dcp.load(state, storage_reader=reader, no_dist=True)
        tensors = {name.removeprefix(BESIDE): tensor for name, tensor in state.items()}
        return sealed.decode(sealed.read_json(place / COMPLETE)["beside"], tensors)

    def weights(self, step: int) -> dict[str, Tensor]:
        """The whole network after ``step`` steps, whatever this rank trains, keyed like its ``state_dict``.

        One rank may call it alone.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
        """
        if damage := self._damage_seen(step):
            raise CheckpointError(damage)
        reader = dcp.HuggingFaceStorageReader(str(self._place(step)))
        saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
        names = {id(tensor): name for name, tensor in named_tensors(self.network).items()}
        keys = {key: f"network.{names[id(t)]}" for key, t in self.network.state_dict(keep_vars=True).items()}
        state = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in keys.values()}
        with _alone():
            dcp.load(state, storage_reader=reader, no_dist=True)
        return {key: state[name] for key, name in keys.items()}

    def _complete(self, step: int, facts: dict[str, Any]) -> None:
        if not self._first:
            return
        partial, place = self._partial(step), self._place(step)
        facts["files"] = {path.name: sealed.file_digest(path) for path in sorted(partial.iterdir())}
        sealed.write(partial / COMPLETE, sealed.json_text(facts))
        for known in (known for known in self.steps() if known >= step):
            aside = self._place(known).with_suffix(".superseded")
            shutil.rmtree(aside, ignore_errors=True)
            self._place(known).rename(aside)
        partial.rename(place)
        sealed.sync_folder(self.folder)
        shutil.rmtree(place.with_suffix(".superseded"), ignore_errors=True)
        steps = self.steps()
        needed = {step, *facts["needs"]}.union(*(self._needs(kept) for kept in steps[-self.keep :]))
        for old in steps[: -self.keep]:
            if old not in needed:
                shutil.rmtree(self._place(old), ignore_errors=True)

    def _needs(self, step: int) -> list[int]:
        with contextlib.suppress(CheckpointError):
            return list(sealed.read_json(self._place(step) / COMPLETE)["needs"])
        return []

    def _damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, if anything: the same answer on every rank."""
        if self.group is None:
            return self._damage_seen(step) or None
        # Each rank reads its share of the files.
        answers = gather_text(self.group, self._damage_seen(step, self.group.rank(), self.group.size()))
        return next((answer for answer in answers if answer), None)

    def _damage_seen(self, step: int, rank: int = 0, ranks: int = 1) -> str:
        """What is wrong with every ``ranks``-th file; empty if nothing is."""
        place = self._place(step)
        try:
            files = sealed.read_json(place / COMPLETE)["files"]
            there = {path.name for path in place.iterdir()} - {COMPLETE}
            lost = sorted(set(files) ^ there)
            altered = [name for name in sorted(files)[rank::ranks] if name not in lost]
            altered = [name for name in altered if sealed.file_digest(place / name) != files[name]]
        except (OSError, CheckpointError, LookupError, TypeError) as error:
            return str(error)
        return f"{place} is damaged: {', '.join(lost + altered)}" if lost or altered else ""

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole, None if there is none; a warning names damaged ones.

        Every rank calls it.

        Raises:
            CheckpointError: there are some, but none is whole.
        """
        reasons: list[str] = []
        for step in reversed(self.steps()):
            damage = self._damage(step)
            if damage is None:
                self._checked = step
                if reasons and self._first:
                    warnings.warn(f"{' '.join(reasons)}; continuing from step {step}", stacklevel=3)
                return step
            reasons.append(damage)
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(reasons)}. Restore one from a copy, or begin anew"
            )
        return None

    def _blocks(self) -> list[str]:
        return ["input", *(cut.name for cut in self.network.cuts)]

    def load(self, step: int | None = None) -> int:
        """Continue from the checkpoint after ``step`` steps, the newest if None; every rank calls it.

        Returns:
            the step; 0, and nothing is loaded, if there is none and ``step`` is None.
        """
        known = self.steps()
        if step is None:
            step = self.newest()
            if step is None:
                return 0
        elif step not in known:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {known or 'none'}")
        elif step != self._checked and (damage := self._damage(step)) is not None:
            raise CheckpointError(damage)
        self._checked = None  # files may change until they are read again
        place = self._place(step)
        try:
            facts = sealed.read_json(place / COMPLETE)
            if facts["format"] != FORMAT or facts["blocks"] != self._blocks():
                raise CheckpointError(
                    f"{place} was written for blocks that begin at {', '.join(facts['blocks'])} ({facts['format']}), "
                    f"but here they begin at {', '.join(self._blocks())} ({FORMAT}); cut the network as it was cut then"
                )
            reader = dcp.HuggingFaceStorageReader(str(place))
            saved = reader.read_metadata().state_dict_metadata
            self._prepare_optimizers(saved)
            targets = self._tensors(followed=True)
            own = {name for name in targets if name.startswith("network.")}
            lost = sorted(own - set(saved))
            if lost:
                raise CheckpointError(f"{place} lacks {lost[0]} and {len(lost) - 1} more; it is of another network")
            state = {name: _writable(tensor) for name, tensor in targets.items()}
            # Every rank reads what it needs; there is nothing to agree about.
            with _alone():
                dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(place)), no_dist=True)
            with torch.no_grad():
                for name, tensor in targets.items():
                    tensor.copy_(state[name].view(tensor.shape))
            for slots, name, slot in self._slots():
                if isinstance(slots[slot], (int, float)):
                    slots[slot] = targets[name].item()
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
            raise CheckpointError(f"{place} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        if self.group is not None:
            with explained("loading a checkpoint"):
                dist.barrier(self.group)
        return step

    def _tensors(self, followed: bool = False) -> dict[str, Tensor]:
        """What this rank saves, by name; with ``followed`` also what twins here follow."""
        stage = self.network.stage
        own = named_tensors(self.network) if stage is None else stage.tensors(followed)
        found = {f"network.{name}": tensor.detach() for name, tensor in own.items()}
        for slots, name, slot in self._slots():
            value = slots[slot]
            if isinstance(value, (int, float)):
                value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            if isinstance(value, Tensor):
                found[name] = value
        return found

    def _slots(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """For everything in the state of optimizers what holds it, its name in a checkpoint, and its own."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.network.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, slots in optimizer.state.items():
                for slot, value in slots.items():
                    mark = _NUMBER if isinstance(value, (int, float)) else ""
                    yield slots, f"optimizer.{names[parameter]}.{slot}{mark}", slot

    def _prepare_optimizers(self, saved: dict[str, Any]) -> None:
        """Give each parameter the state it had, still empty."""
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
                start = f"optimizer.{names[parameter]}."
                for name in (n for n in saved if n.startswith(start) and "." not in n[len(start) :]):
                    size, dtype = saved[name].size, saved[name].properties.dtype
                    if name.endswith(_NUMBER):
                        slot = name[len(start) :].removesuffix(_NUMBER)
                        optimizer.state[parameter][slot] = torch.zeros((), dtype=dtype).item()
                        continue
                    like = tuple(size) == tuple(parameter.shape)
                    empty = torch.empty_like(parameter, dtype=dtype) if like else torch.empty(size, dtype=dtype)
                    optimizer.state[parameter][name[len(start) :]] = empty.detach()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """torch warns of saving and loading without other ranks, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _writable(tensor: Tensor) -> Tensor:
    """A copy in one piece of memory on the CPU, which is what a safetensors file holds."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
