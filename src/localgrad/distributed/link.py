"""Ordered messages of tensors from one rank to another, several of them in flight."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.distributed.agreement import explained
from localgrad.errors import TrainingError

# A header is 8 int64: number of the message (END if there is none), step, micro-batch, number of its layout, bytes of
# that layout's text if it is new, bytes of the tensors, bytes promised for every later message, the sender's clock.
END = -1
VALUES, GRADIENTS, WEIGHTS = range(3)  # channels between two ranks
# Tensors begin where torch's own allocator would let them begin: kernels may sum in another order elsewhere.
ALIGNMENT = 64
HEADER, LAYOUT, PAYLOAD, OVERSIZE = range(4)  # gloo matches messages of one pair of ranks by these tags, in order
TAGS = 4


@dataclass(frozen=True)
class Message:
    """What one rank sent: ``tensors`` as they were, strides included, and what it ``said`` about them."""

    step: int
    part: int
    said: Any
    tensors: list[Tensor]
    stamp: float


class Outlet:
    """The sending end of a link.

    The first message tells how large the tensors of one message are. From then on the other end has memory ready for
    the next ``depth`` messages, so they travel while it computes. A larger message is allowed, but waits to be asked
    for.

    Args:
        group: to which both ends belong; must carry CPU tensors. Tensors of other devices go through host memory.
        peer: the other end's rank in ``group``.
        channel: a number of its own for each link between two ranks.
        depth: messages that may be on their way before `send` waits.
        waits: whether it does.

    Attributes:
        messages: sent so far, each with a header of 64 bytes; shapes are described once.
        bytes: of tensors sent so far, each tensor beginning at a multiple of 64.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, channel: int, depth: int, waits: bool = True) -> None:
        self.group, self.peer, self.depth, self.waits = group, peer, depth, waits
        self._tag = channel * TAGS
        self._layouts: dict[str, int] = {}
        self._promised: int | None = None
        self._sending: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self.messages = self.bytes = 0

    def send(self, step: int, part: int, said: Any, tensors: Sequence[Tensor], stamp: float = 0.0) -> None:
        """Send copies of ``tensors``, taken now, and ``said`` (anything JSON holds); waits only if the link is full."""
        entries, size = _layout(tensors)
        text = json.dumps([said, entries])
        new = text not in self._layouts
        layout = self._layouts.setdefault(text, len(self._layouts))
        encoded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        room = self._promised
        if self._promised is None:
            self._promised = size
        fields = [self.messages, step, part, layout, len(encoded) if new else 0, size, self._promised]
        header = torch.cat([torch.tensor(fields), torch.tensor([stamp], dtype=torch.float64).view(torch.int64)])
        self.messages += 1
        with explained(f"sending to rank {self._global(self.peer)}"):
            while self.waits and len(self._sending) >= self.depth:
                self._settle()
            works = [self._post(header, HEADER)]
            if new:
                works.append(self._post(encoded, LAYOUT))
            fits = room is not None and size <= room
            if room is not None:
                works.append(self._post(_packed(tensors if fits else (), entries if fits else (), room), PAYLOAD))
            if not fits:
                works.append(self._post(_packed(tensors, entries, size), OVERSIZE))
        self._sending.append(works)

    def _post(self, tensor: Tensor, tag: int) -> tuple[dist.Work, Tensor]:
        self.bytes += tensor.numel() if tag in (PAYLOAD, OVERSIZE) else 0
        work = dist.isend(tensor, group=self.group, group_dst=self.peer, tag=self._tag + tag)
        assert work is not None
        return work, tensor

    def _settle(self) -> None:
        for work, _ in self._sending.popleft():
            work.wait()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def close(self) -> None:
        """Say that nothing more comes; `finish` waits until the other end has heard it."""
        works = []
        with explained(f"closing the link to rank {self._global(self.peer)}"):
            for _ in range(self.depth):
                works.append(self._post(torch.tensor([END] + [0] * 7), HEADER))
                if self._promised is not None:
                    works.append(self._post(torch.zeros(self._promised, dtype=torch.uint8), PAYLOAD))
        self._sending.append(works)

    def finish(self) -> None:
        """Wait for what is on its way."""
        with explained(f"closing the link to rank {self._global(self.peer)}"):
            while self._sending:
                self._settle()


class Inlet:
    """The receiving end of a link; arguments as for `Outlet`, and ``device``, where tensors are wanted."""

    def __init__(
        self, group: dist.ProcessGroup, peer: int, channel: int, depth: int, device: torch.device | None = None
    ) -> None:
        self.group, self.peer, self.depth, self.device = group, peer, depth, device
        self._tag = channel * TAGS
        self._layouts: dict[int, Any] = {}
        self._number = 0
        self._headers: deque[tuple[dist.Work, Tensor]] = deque()
        self._payloads: deque[tuple[dist.Work, Tensor]] = deque()
        for _ in range(depth):
            self._headers.append(self._post(torch.empty(8, dtype=torch.int64), HEADER))

    def _post(self, buffer: Tensor, tag: int) -> tuple[dist.Work, Tensor]:
        work = dist.irecv(buffer, group=self.group, group_src=self.peer, tag=self._tag + tag)
        assert work is not None
        return work, buffer

    def take(self, step: int, part: int | None = None) -> Message:
        """The next message; waits for it.

        Raises:
            TrainingError: the peer is gone or does not answer, has ended, or is at another step.
        """
        source = dist.get_global_rank(self.group, self.peer)
        with explained(f"waiting for rank {source} at step {step}"):
            header = _received(self._headers.popleft())
            number, their_step, their_part, layout, text, size, promised, _ = header.tolist()
            if number == END:
                self.finish()  # all the other end sent has to be taken, or it would wait
                raise TrainingError(
                    f"rank {source} has ended, but rank {dist.get_rank()} expects step {step} from it: the ranks were "
                    "given different numbers of batches"
                )
            if number != self._number or their_step != step or part not in (None, their_part):
                raise TrainingError(
                    f"rank {source} sent message {number} of step {their_step}, part {their_part}, but rank "
                    f"{dist.get_rank()} expects message {self._number} of step {step}, part {part}: the ranks do not "
                    "run the same steps"
                )
            self._number += 1
            self._headers.append(self._post(torch.empty(8, dtype=torch.int64), HEADER))
            if text:
                encoded = _received(self._post(torch.empty(text, dtype=torch.uint8), LAYOUT))
                self._layouts[layout] = json.loads(bytes(encoded.numpy()))
            said, entries = self._layouts[layout]
            if number == 0:
                buffer = _received(self._post(torch.empty(size, dtype=torch.uint8), OVERSIZE))
                missing = self.depth
            else:
                buffer = _received(self._payloads.popleft())
                if size > promised:
                    buffer = _received(self._post(torch.empty(size, dtype=torch.uint8), OVERSIZE))
                missing = 1
            for _ in range(missing):
                self._payloads.append(self._post(torch.empty(promised, dtype=torch.uint8), PAYLOAD))
        stamp = float(header[-1:].view(torch.float64))
        return Message(their_step, their_part, said, _unpacked(buffer, entries, self.device), stamp)

    def finish(self) -> None:
        """Wait for the other end to close.

        Raises:
            TrainingError: it sent something nobody has taken.
        """
        source = dist.get_global_rank(self.group, self.peer)
        with explained(f"closing the link from rank {source}"):
            for waiting in (*self._headers, *self._payloads):
                buffer = _received(waiting)
                if buffer.dtype == torch.int64 and buffer[0] != END:
                    raise TrainingError(
                        f"rank {source} sent step {int(buffer[1])}, which rank {dist.get_rank()} did not train: the "
                        "ranks were given different numbers of batches"
                    )
        self._headers.clear()
        self._payloads.clear()


def _received(posted: tuple[dist.Work, Tensor]) -> Tensor:
    work, buffer = posted
    work.wait()
    return buffer


def _extent(tensor: Tensor) -> int:
    """Elements of memory from the first to the last one that a tensor has."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0


def _layout(tensors: Sequence[Tensor]) -> tuple[list[list[Any]], int]:
    """[dtype, shape, strides, first byte, elements of memory] of each tensor, and the bytes of all.

    Strides are kept, those of expanded tensors too, since kernels sum along them. Only a tensor with gaps between its
    elements becomes contiguous.
    """
    entries: list[list[Any]] = []
    size = 0
    for tensor in tensors:
        extent, strides = _extent(tensor), list(tensor.stride())
        if extent > tensor.numel():
            extent, strides = tensor.numel(), list(torch.empty(tensor.shape, device="meta").stride())
        start = -(-size // ALIGNMENT) * ALIGNMENT
        entries.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), strides, start, extent])
        size = start + extent * tensor.element_size()
    return entries, size


def _packed(tensors: Sequence[Tensor], entries: Sequence[Sequence[Any]], room: int) -> Tensor:
    buffer = torch.zeros(room, dtype=torch.uint8)
    for tensor, (_, _, strides, start, extent) in zip(tensors, entries, strict=True):
        tensor = tensor.detach()
        if list(tensor.stride()) != strides:
            tensor = tensor.contiguous()
        memory = tensor.as_strided((extent,), (1,))
        end = start + extent * tensor.element_size()
        buffer[start:end].view(tensor.dtype).copy_(memory)
    return buffer


def _unpacked(buffer: Tensor, entries: Sequence[Sequence[Any]], device: torch.device | None) -> list[Tensor]:
    tensors = []
    for name, shape, strides, start, extent in entries:
        dtype = getattr(torch, name)
        end = start + extent * torch.empty((), dtype=dtype).element_size()
        memory = buffer[start:end].view(dtype)
        # `.data` counts versions for itself: a block that overwrites its features in place leaves the targets alone.
        tensor = memory.as_strided(shape, strides).data
        tensors.append(tensor if device is None or device.type == "cpu" else tensor.to(device))
    return tensors
