"""One block on the device: weights, gradients and optimizer state live there only while their block runs.

Nothing comes back to a block that is done, so with micro-batches that pass block by block (`localgrad.timetable`) each
block visits the device once a step::

    device   [block 0: forward, backward, step, of all parts][block 1: forward, backward, step     ][block 2 ...
    link               [fetch 1]                               [write back 0][fetch 2]                [write back 1] ...

Every tensor has a home on the host. A block that begins gets copies, and ``tensor.data`` points to them until it is
done; parameters stay the objects they are, so optimizers, hooks and ``state_dict`` need to know nothing. Outside a step
everything is at home: what is saved then is what would be saved without it.

What moves together is a block: its parameters and buffers, the auxiliary networks on its output, their gradients, and
what optimizers keep for them. What several blocks read stays on the device, and so does what a module holds itself that
has a cut inside (class tokens, position embeddings). A wide span keeps its blocks until the last of them has gone back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from localgrad.engine import require_network
from localgrad.errors import TrainingError
from localgrad.measure.sizes import size
from localgrad.network import LocalNetwork
from localgrad.suspension.doors import is_compiled

HOST = torch.device("cpu")
Place = tuple[dict[str, Tensor | None], str]  # the buffers of a module, and the name of one


def resident(network: LocalNetwork, device: torch.device | str, *, ahead: int = 1) -> Residence:
    """Let each block of ``network`` be on ``device`` only while it runs; the rest waits on the host.

    From now on `localgrad.local_losses`, `localgrad.local_outputs`, ``network(x)`` and ``network.model(x)`` fetch what
    they need. Inputs and targets belong on ``device``. Give ``local_losses`` an ``on_block_done`` that steps the
    block: gradients that it leaves go home with it, and an optimizer that steps at the end does so on the host.
    Results are those of a network that is whole on the device, to the bit.

    Optimizers are found when they step, and their state for a block travels with it. `localgrad.exchange` and moving
    averages work on the host. Weights that require no gradient are written back if their version counter has moved; a
    change through ``.data`` moves it not. On CUDA copies run on a stream of their own, from and into pinned memory.

    Args:
        network: from `localgrad.localize`, on any device; it need not fit on ``device``.
        device: CUDA; or ``cpu``, where the copies are made all the same, which shows what a device would hold.
        ahead: blocks fetched before they begin. With 0 nothing is fetched while a block runs.

    Returns:
        the `Residence`, which is also ``network.residence``; ``end()`` undoes it.

    Raises:
        TrainingError: some of the network is on another rank, sharded or compiled; two tensors share
            memory; a tensor is no plain one (quantised, say); a network is resident already.

    Example:
        >>> import torch, localgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> method = localgrad.methods.dgl(localgrad.tasks.classification(3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> network = localgrad.localize(model, method, 2, example=x)
        >>> residence = localgrad.resident(network, "cpu")
        >>> optimizers = [torch.optim.AdamW(network.block_parameters(k)) for k in range(2)]
        >>> def step_block(k):
        ...     optimizers[k].step()
        ...     optimizers[k].zero_grad()
        >>> for _, loss in localgrad.local_losses(network, x, y, on_block_done=step_block):
        ...     loss.backward()

    Source: layer-wise streaming is that of ZeRO-Infinity (Rajbhandari et al., SC 2021, arXiv:2104.07857).
    Differs: there every layer visits the device twice a micro-batch; here once a step.
    """
    require_network(network, "resident")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"resident: device={str(device)!r}; blocks are fetched to cuda, or to cpu to try it out")
    if ahead < 0:
        raise TrainingError(f"resident: ahead={ahead}; it is how many blocks are fetched early, at least 0")
    if network.residence is not None:
        raise TrainingError("resident: the network is resident already; call network.residence.end() first")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _check(network)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    residence = network.residence = Residence(network, device, ahead, stream)
    residence.settle()
    return residence


class _Away(NamedTuple):
    """A tensor that is on the device: where it is at home, and the version of a parameter when it left."""

    tensor: Tensor
    home: Tensor
    version: int | None


@dataclass
class _Visit:
    """A block that is on the device, or on its way there; to evaluate it needs neither gradients nor state."""

    training: bool
    away: dict[int, _Away] = field(default_factory=dict)
    coming: torch.cuda.Event | None = None


class _Unit(NamedTuple):
    """What moves with a block: parameters, and where buffers are found, which a forward may replace."""

    parameters: list[nn.Parameter]
    buffers: list[Place]


_ALL: weakref.WeakSet[Residence] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Be told of every optimizer that steps, for good: torch iterates over hooks, and none may go meanwhile."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for residence in list(_ALL):
        if optimizer not in residence._known:
            residence.follow(optimizer)


class Residence:
    """Which blocks of a network are on the device; see `resident`.

    It is told that a block begins, by a row of the timetable or by a module of it that is called, and that a block is
    done. A deep copy of the network has one of its own.

    Attributes:
        device: where blocks run.
        ahead: blocks fetched before they begin.
        fetched, written: bytes copied to the device so far, and back.
        here: bytes of copies that are on the device now.
    """

    def __init__(
        self, network: LocalNetwork, device: torch.device, ahead: int = 1, stream: torch.cuda.Stream | None = None
    ) -> None:
        self.network, self.device, self.ahead, self._stream = network, device, ahead, stream
        self.fetched = self.written = self.here = 0
        self._visits: dict[int, _Visit] = {}
        self._held: set[int] = set()  # blocks that have begun and are not done
        self._at: int | None = None
        self._stepping = False
        # The optimizer of a parameter, and whether it counts its steps on the device.
        self._steppers: dict[int, tuple[torch.optim.Optimizer, bool]] = {}
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hooks: list[Any] = []
        _listen()
        _ALL.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Residence:
        stream = None if self._stream is None else torch.cuda.Stream(self.device)
        other = memo[id(self)] = Residence(self.network, self.device, self.ahead, stream)
        other.network = copy.deepcopy(self.network, memo)
        other._hooks = copy.deepcopy(self._hooks, memo)
        return other

    def __str__(self) -> str:
        moved = max(_bytes(self.tensors_of(block)) for block in range(self.network.num_blocks))
        return (
            f"each block is on {self.device} only while it runs, and {self.ahead} fetched ahead: {size(moved)} of the "
            f"largest, {size(_bytes(self.kept))} that stay"
        )

    def settle(self) -> None:
        """Put everything where it waits, and listen to modules that are called."""
        for block in range(self.network.num_blocks):
            for tensor in self.tensors_of(block):
                _put(tensor, HOST, pinned=self._stream is not None)
        for tensor in self.kept:
            _put(tensor, self.device)
        for module in self.network.between_cuts():
            own = {id(parameter) for parameter in module.parameters()}
            blocks = [k for k, unit in enumerate(self._units) if any(id(p) in own for p in unit.parameters)]
            if len(blocks) == 1:
                called = functools.partial(self._called, blocks[0])
                self._hooks.append(module.register_forward_pre_hook(called))
        self._hooks.append(self.network.model.register_forward_hook(self._left, always_call=True))

    def end(self) -> None:
        """Undo it: everything stays on the host."""
        self._go_home()
        for hook in self._hooks:
            hook.remove()
        for tensor in self.kept:
            _put(tensor, HOST)
        self.network.residence = None

    @functools.cached_property
    def _units(self) -> list[_Unit]:
        users, places = _users(self.network)
        units = [_Unit([], []) for _ in range(self.network.num_blocks)]
        for parameter in self.network.parameters():
            if len(used := users.get(id(parameter), ())) == 1:
                units[min(used)].parameters.append(parameter)
        for buffers, name in places:
            if len(used := users[id(buffers[name])]) == 1:
                units[min(used)].buffers.append((buffers, name))
        return units

    @property
    def kept(self) -> list[Tensor]:
        """The parameters and buffers that stay on the device."""
        moved = {id(t) for block in range(self.network.num_blocks) for t in self.tensors_of(block, training=False)}
        return [t for t in (*self.network.parameters(), *self.network.buffers()) if id(t) not in moved]

    def tensors_of(self, block: int, training: bool = True) -> list[Tensor]:
        """What moves with a block: to train, gradients and optimizer state too."""
        unit = self._units[block]
        found: list[Tensor] = [*unit.parameters]
        found += [buffer for buffers, name in unit.buffers if (buffer := buffers.get(name)) is not None]
        for parameter in unit.parameters if training else ():
            if (gradient := parameter.grad) is not None:
                found.append(gradient)
            optimizer, counts_there = self._steppers.get(id(parameter), (None, False))
            for name, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
                if name != "step" or counts_there:  # as `torch.optim.Optimizer.load_state_dict` decides it
                    leaves = (value,) if type(value) is Tensor else tree_leaves(value)
                    found += [tensor for tensor in leaves if isinstance(tensor, Tensor)]
        return found

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the state of an optimizer move with its blocks; one that steps is found, whatever state it was given."""
        self._known.add(optimizer)
        ours = {id(p) for unit in self._units for p in unit.parameters}
        for group in optimizer.param_groups:
            there = bool(group.get("capturable") or group.get("fused"))
            self._steppers |= {id(p): (optimizer, there) for p in group["params"] if id(p) in ours}
        for block in self._visits:
            self._fetch(block, training=True)
            self._await(block)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Around a step, or an evaluation; everything is at home behind it."""
        _check_whole(self.network)
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            self._held.clear()
            self._go_home()

    def begins(self, block: int) -> None:
        """``block`` is about to run: fetch it if it is not there, then the next ones."""
        training = torch.is_grad_enabled()
        if training:
            self._held.add(block)
        self._at = block
        window = range(block, min(block + 1 + self.ahead, self.network.num_blocks))
        self._go_home(but=window)
        for near in window:
            visit = self._visits.get(near)
            if visit is None or (training and not visit.training):
                self._fetch(near, training)
            if near == block:
                self._await(block)

    def having(self, tensors: Iterable[Tensor]) -> None:
        """Have the blocks of ``tensors`` here until another block begins."""
        wanted = {id(tensor) for tensor in tensors}
        for block, unit in enumerate(self._units):
            if any(id(parameter) in wanted for parameter in unit.parameters):
                self._fetch(block, training=True)
                self._await(block)

    def ended(self, block: int) -> None:
        """``block`` is done with this step, the optimizer included."""
        self._held.discard(block)
        if block in self._visits:
            self._release(block)

    def _called(self, block: int, module: nn.Module, args: Any) -> None:
        """A module of ``block`` is called, in a step or not."""
        if block == self._at or block in self._held:
            return
        if torch.is_grad_enabled() and not self._stepping:
            raise TrainingError(
                "a resident network runs forward with gradients in localgrad.local_losses only, which knows when a "
                "block is done; write torch.no_grad() around this call, or call network.residence.end()"
            )
        self.begins(block)

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        """The model has answered."""
        self._go_home()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        on_its_own = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.inference_mode(False), torch.no_grad(), on_its_own:
            yield

    def _fetch(self, block: int, training: bool) -> None:
        """Bring to the device what of a block is not there."""
        visit = self._visits.setdefault(block, _Visit(training))
        visit.training = training
        with self._copying():
            for tensor in self.tensors_of(block, training):
                if id(tensor) not in visit.away:
                    home = tensor.data
                    if self._stream is not None and not home.is_pinned():  # it came from a checkpoint
                        home = home.pin_memory()
                    plain = type(tensor) is Tensor or not isinstance(tensor, nn.Parameter)  # the first is faster
                    version = None if plain else tensor._version
                    visit.away[id(tensor)] = _Away(tensor, home, version)
                    tensor.data = home.to(self.device, non_blocking=True, copy=True)
                    self.fetched += home.nbytes
                    self.here += home.nbytes
        if self._stream is not None:
            visit.coming = self._stream.record_event()

    def _await(self, block: int) -> None:
        """Let what is computed from now on wait for the copies."""
        visit = self._visits[block]
        if visit.coming is not None:
            torch.cuda.current_stream(self.device).wait_event(visit.coming)
            visit.coming = None

    def _release(self, block: int) -> None:
        """Write back what of a block may have changed, and let the device have its memory again."""
        visit = self._visits.pop(block)
        self.here -= sum(away.home.nbytes for away in visit.away.values())
        if self._stream is not None:  # which made the copies, so it may have their memory at once
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._copying():
            for tensor in self.tensors_of(block, visit.training):
                if id(tensor) not in visit.away and tensor.device == self.device:  # a gradient, state of a first step
                    home = torch.empty_like(tensor.data, device=HOST, pin_memory=self._stream is not None)
                    visit.away[id(tensor)] = _Away(tensor, home, None)
            for tensor, home, version in visit.away.values():
                trains = visit.training and tensor.requires_grad
                # Normalisation moves buffers without a word, and optimizers may write to ``.data``.
                if version is None or trains or tensor._version != version:
                    home.copy_(tensor.data, non_blocking=True)
                    self.written += home.nbytes
                    if self._stream is not None:
                        tensor.data.record_stream(self._stream)
                tensor.data = home
        if self._at == block:
            self._at = None

    def _go_home(self, but: range = range(0)) -> None:
        """Release every block that has not begun, ``but`` for some."""
        for block in [k for k in self._visits if k not in self._held and k not in but]:
            self._release(block)
        if not self._visits and self._stream is not None:
            self._stream.synchronize()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _users(network: LocalNetwork) -> tuple[dict[int, set[int]], list[Place]]:
    """The blocks that read each parameter and buffer, by its id, and where the buffers are.

    None for what a module holds itself that has a cut inside, since it is not known when the module reads it.
    """
    blocks = range(network.num_blocks)
    home = {id(p): k for k in blocks for p in network.parameters_of(k)}
    used = {id(p): set(network.home[name]) for name, p in network.running.named_parameters()}
    users: dict[int, set[int]] = {}
    modules: dict[nn.Module, int] = {}
    for top in network.between_cuts():
        inside = [id(parameter) for parameter in top.parameters()]
        users |= {key: used[key] or {home[key]} for key in inside}
        if len(own := {home[key] for key in inside}) == 1:
            modules |= dict.fromkeys(top.modules(), own.pop())
    for k in blocks:
        for _, auxiliary in network.auxiliaries_at(k + 1):
            modules |= dict.fromkeys(auxiliary.modules(), k)
            for parameter in auxiliary.parameters():
                users.setdefault(id(parameter), set()).add(k)
    places: list[Place] = []
    for module, k in modules.items():
        beside = [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
        for tensor in tree_leaves(beside):  # the output matrix that a head reads too, say
            if isinstance(tensor, nn.Parameter) and id(tensor) in users:
                users[id(tensor)].add(k)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                users.setdefault(id(buffer), set()).add(k)
                places.append((module._buffers, name))
    return users, places


def _check_whole(network: LocalNetwork) -> None:
    if network.stage is not None or (network.replicas is not None and network.replicas.shard):
        raise TrainingError(
            "a resident network has all of its blocks in this process: leave out block_parallel and shard=True, or "
            "call network.residence.end()"
        )


def _put(tensor: Tensor, device: torch.device, pinned: bool = False) -> None:
    value = tensor.data.to(device)
    tensor.data = value.pin_memory() if pinned and not value.is_pinned() else value
    if tensor.grad is not None and tensor.grad.device != device:
        _put(tensor.grad, device)


def _check(network: LocalNetwork) -> None:
    """Raise `TrainingError` if a network cannot be moved block by block."""
    _check_whole(network)
    if any(is_compiled(module) for module in network.modules()):
        raise TrainingError("resident: a compiled module keeps track of where its weights are; leave the compiler out")
    found: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if type(tensor.data) is not Tensor or tensor.layout != torch.strided:
            raise TrainingError(
                f"resident: {name!r} is a {type(tensor.data).__name__} ({tensor.layout}); only plain tensors are moved"
            )
        start = int(tensor.storage_offset())
        extent = 1 + sum(int(n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel():
            found.setdefault(tensor.untyped_storage()._cdata, []).append((start, start + extent, name))
    for places in found.values():
        for (_, stop, name), (start, _, other) in itertools.pairwise(sorted(places)):
            if start < stop:
                raise TrainingError(
                    f"resident: {name!r} and {other!r} are different tensors in the same memory and would be parted; "
                    "make them one parameter, or give each its own: tensor.data = tensor.data.clone()"
                )
