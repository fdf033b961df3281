"""Replicas of a network, each on its own share of every batch, with gradients averaged block by block."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from localgrad.distributed.agreement import agree, explained, facts_about, gather_rows
from localgrad.distributed.custody import named_tensors
from localgrad.errors import ConfigError, MethodError, TrainingError
from localgrad.network import LocalNetwork
from localgrad.partition import SeparateBlocks


def data_parallel(network: LocalNetwork, mesh: DeviceMesh, *, shard: bool = False) -> LocalNetwork:
    """Train ``network`` on every rank of ``mesh``, each with its own share of every batch.

    The loop stays as it is: `localgrad.local_losses` averages the gradients of a block over all ranks as soon as its
    last span has run, while the next block runs forward, and all of them are averaged when the loop over it ends.
    ``on_block_done`` is called after a block's average is there. Gradients then equal those of one process on the
    joined batch, wherever layers do not look across samples; shares may differ in size. Contrastive, similarity and
    critics' losses are computed on all samples. One message of the size of a block's trainable parameters goes out per
    block and step, however many spans or micro-batches there are.

    BatchNorm normalises by the samples of its own rank. For statistics over all ranks, pass the model through
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` before `localize` (torch has it for GPUs only).

    Rank 0's parameters and buffers replace those of the other ranks. Give each rank its own draws:
    ``localgrad.keyed_randomness(seed, replica=mesh.get_local_rank())``.

    Args:
        network: from `localize`, with equal arguments on every rank.
        mesh: of one dimension, or with one called ``data``.
        shard: keep only a part of parameters, gradients and optimizer state on a rank, by torch's FSDP2
            (``fully_shard`` for each auxiliary network and each of the model's modules between the cuts, the largest
            that hold no cut). Each of them is whole while it runs. Parameters in none of them, such as class tokens,
            stay whole. FSDP2 averages gradients after each backward pass through a module: with windows and
            micro-batches more often than once a step. Shares of a batch must be equal. Build optimizers afterwards:
            parameters are DTensors from then on, which `Checkpoints` put together again.

    Returns:
        the same network; ``network.replicas`` has `Replicas.average_buffers` and `Replicas.check_equal`.

    Raises:
        ConfigError: ranks differ in code, versions, model, method or cuts; a module is wrapped in DDP or DataParallel.
        MethodError: ``shard``, and the method needs whole weights where there are none.

    Example:
        >>> import localgrad, torch
        >>> from localgrad.distributed import data_parallel
        >>> def main():  # in each of the processes that torchrun starts
        ...     torch.distributed.init_process_group("gloo")
        ...     mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
        ...     network = data_parallel(localgrad.localize(model, method, 4, example=x), mesh)

    Source: the overlap of reduction and computation is that of PyTorch DDP (Li et al., VLDB 2020, arXiv:2006.15704).
    Differs: a block is reduced when its last span has run, not when a backward pass meets its parameters, since a block
    may take part in several backward passes; nothing has to be found unused, as every parameter has its place in the
    message whether it got a gradient or not.
    """
    if not isinstance(network, LocalNetwork):
        raise ConfigError(
            f"data_parallel takes what localize returns, not a {type(network).__name__}; it averages the gradients "
            "itself, so wrap the model in nothing"
        )
    wrapped = next(
        (m for m in network.modules() if isinstance(m, (nn.parallel.DistributedDataParallel, nn.DataParallel))), None
    )
    if wrapped is not None:
        raise ConfigError(
            f"the network contains a {type(wrapped).__name__}; give localize the plain model, data_parallel averages "
            "the gradients"
        )
    if shard and network.stage is not None and network.stage.follows:
        raise MethodError(
            f"{network.method.name} has twins of units on other ranks, whose weights would have to be put together to "
            "be sent; leave out shard=True, or place such blocks on one rank (place=...)"
        )
    if shard and any(rule.joins for rule in network.rules):
        raise MethodError(
            f"{network.method.name} differentiates a block twice, and FSDP2 frees its weights after the first time; "
            "leave out shard=True"
        )
    axis_mesh = axis(mesh, "data")
    replicas = Replicas(network, axis_mesh.get_group(), shard)
    replicas.spread()
    if shard:
        _shard(network, axis_mesh)
    network.replicas = replicas
    return network


def _shard(network: LocalNetwork, mesh: DeviceMesh) -> None:
    """Give each rank a part of what is trained here, in place."""
    from torch.distributed.fsdp import fully_shard  # a second of importing that others need not wait for

    trained = [network.running, *network.auxiliary.values()] if network.stage is None else network.stage.modules
    here = {id(parameter) for module in trained for parameter in module.parameters()}
    called = _called_by_separate_blocks(network)
    modules = [part for module in network.between_cuts() for part in _callable_parts(module, called)]
    modules += network.auxiliary.values()
    modules = [module for module in modules if here & {id(parameter) for parameter in module.parameters()}]
    users = Counter(parameter for module in modules for parameter in set(module.parameters()))
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 takes no other
        # FSDP2 takes no scalars, and no parameter twice.
        whole = {p for p in module.parameters() if p.dim() == 0 or users[p] > 1}
        if set(module.parameters()) - whole:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _called_by_separate_blocks(network: LocalNetwork) -> set[nn.Module] | None:
    """The modules that run where separate blocks do, instead of the model's own forward; None where it runs itself."""
    suspended = network.suspended if network.stage is None else network.stage.model
    if not isinstance(suspended, SeparateBlocks):
        return None
    found: set[nn.Module] = set()
    for graph in suspended.modules():
        if isinstance(graph, fx.GraphModule):
            calls = (node for node in graph.graph.nodes if node.op == "call_module")
            found |= {graph.get_submodule(str(node.target)) for node in calls}
    return found


def _callable_parts(module: nn.Module, called: set[nn.Module] | None) -> Iterator[nn.Module]:
    """``module`` if it is called as a whole, else its largest parts that are: separate blocks look inside for taps."""
    if called is None or module in called:
        yield module
        return
    for child in module.children():
        yield from _callable_parts(child, called)


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The dimension ``name`` of a mesh, or the only one it has.

    Raises:
        ConfigError: it has several and none is called so.
    """
    names = mesh.mesh_dim_names or ()
    if name in names:
        return mesh[name]
    if mesh.ndim == 1:
        return mesh
    raise ConfigError(
        f"the mesh has the dimensions {names or mesh.ndim}; one must be called {name!r}: "
        f"init_device_mesh('cpu', (2, 2), mesh_dim_names=('block', 'data'))"
    )


class _Gather(torch.autograd.Function):
    """The rows of every rank; the gradient of this rank's own comes back, all others stop here.

    It is multiplied by all rows / own rows because the average over ranks divides by that.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        parts = gather_rows(group, rows)
        before = sum(len(part) for part in parts[: group.rank()])
        ctx.own, ctx.total = slice(before, before + len(rows)), sum(map(len, parts))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient[ctx.own]
        return own * (ctx.total / len(own)), None


class Replicas:
    """The ranks that train copies of one network, as one of them sees it; ``network.replicas``.

    Args:
        network: whose gradients are averaged.
        group: the ranks.
        shard: see `data_parallel`.
    """

    def __init__(self, network: LocalNetwork, group: dist.ProcessGroup, shard: bool = False) -> None:
        self.network, self.group, self.shard = network, group, shard
        self.rank, self.size = group.rank(), group.size()
        self.samples, self._share = 1, 1.0

    def spread(self) -> None:
        """Give every rank the parameters and buffers of the first; raises `ConfigError` if networks differ."""
        with explained("comparing networks"):
            agree(self.group, facts_about(self.network))
            source = dist.get_global_rank(self.group, 0)
            for tensor in self._state().values():
                dist.broadcast(tensor.detach(), source, group=self.group)

    def _state(self) -> dict[str, Tensor]:
        """The parameters and buffers that this rank has, by name."""
        if self.network.stage is not None:
            return self.network.stage.tensors(followed=True)
        return named_tensors(self.network)

    def joined(self, rows: Tensor) -> Tensor:
        """See `localgrad.task.Batch`."""
        with explained("gathering the rows of a loss over all samples"):
            gathered: Tensor = _Gather.apply(rows, self.group)
        return gathered

    @contextlib.contextmanager
    def reducing(self, step: int, announce: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Around one step: what it gives is to be called with each block whose gradients are complete here.

        Args:
            step: see `count`, which is to be called first inside.
            announce: called with a block once its gradients are averaged.

        Raises:
            TrainingError: a rank does not answer.
        """
        waiting: deque[_Message] = deque()

        def finish(message: _Message) -> None:
            with explained(f"averaging the gradients of block {message.block} at step {step}"):
                message.finish()
            announce(message.block)

        def done(block: int) -> None:
            with explained(f"averaging the gradients of block {block} at step {step}"):
                parameters = [p for p in self.network.block_parameters(block) if not isinstance(p, DTensor)]
                waiting.append(_Message(block, parameters, self._share, self.group))
            while len(waiting) > 1:  # the one just sent travels while the next block runs
                finish(waiting.popleft())

        yield done
        while waiting:
            finish(waiting.popleft())

    def count(self, step: int, samples: int) -> None:
        """Learn what share of the joined batch this rank's ``samples`` are.

        Raises:
            TrainingError: ranks are at different steps, or one of them does not answer.
        """
        own = torch.tensor([step, samples], device=self.network.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with explained(f"beginning step {step}"):
            dist.all_gather(rows, own, group=self.group)
        steps = [int(row[0]) for row in rows]
        if len(set(steps)) > 1:
            raise TrainingError(
                f"the ranks of the data axis are at different steps, {steps}: they have different numbers of batches. "
                "Give each the same number, for instance with torch.utils.data.DistributedSampler(drop_last=True)"
            )
        shares = [int(row[1]) for row in rows]
        if self.shard and len(set(shares)) > 1:
            raise TrainingError(
                f"the ranks of the data axis have {shares} samples at step {step}, but shard=True averages over ranks "
                "and not over samples: give each equally many (drop_last=True)"
            )
        self.samples, self._share = sum(shares), samples / sum(shares)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Average floating-point buffers, such as BatchNorm statistics, and take the others of the first rank.

        Call it before evaluating or saving: in training each rank keeps its own.
        """
        with explained("averaging buffers"):
            for buffer in (t for t in self._state().values() if not isinstance(t, nn.Parameter)):
                if buffer.is_floating_point():
                    dist.all_reduce(buffer.div_(self.size), group=self.group)
                else:
                    dist.broadcast(buffer, dist.get_global_rank(self.group, 0), group=self.group)

    @torch.no_grad()
    def check_equal(self) -> None:
        """Raise `TrainingError` unless every rank has the same parameters, bit for bit; sharded ones are only one."""
        whole = (tensor for tensor in self._state().values() if not isinstance(tensor, DTensor))
        parameters = (tensor for tensor in whole if isinstance(tensor, nn.Parameter))
        digest = digest_of(parameters).to(self.network.device)
        with explained("comparing parameters"):
            rows = [torch.empty_like(digest) for _ in range(self.size)]
            dist.all_gather(rows, digest, group=self.group)
        differing = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
        if differing:
            raise TrainingError(
                f"replicas {differing} have other parameters than replica 0: something changed them on one rank only. "
                "Change parameters and optimizer settings on every rank alike, and step with averaged gradients"
            )


class _Message:
    """The gradients of one block on their way, those of each dtype in one tensor.

    Behind the gradients stands one number for each parameter, which is 0 if no rank has a gradient for it: such a
    parameter is left without one, as in a single process, and all ranks send equally many bytes whatever they have.
    """

    def __init__(self, block: int, parameters: list[nn.Parameter], share: float, group: dist.ProcessGroup) -> None:
        self.block = block
        kinds = dict.fromkeys((p.dtype, p.device) for p in parameters)
        self.parts = [[p for p in parameters if (p.dtype, p.device) == kind] for kind in kinds]
        self.flat = [self._packed(part, share) for part in self.parts]
        self.works = [dist.all_reduce(flat, group=group, async_op=True) for flat in self.flat]

    @staticmethod
    @torch.no_grad()
    def _packed(parameters: list[nn.Parameter], share: float) -> Tensor:
        present = parameters[0].new_tensor([p.grad is not None for p in parameters])
        rows = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        flat = torch.cat([*rows, present])
        flat[: -len(parameters)].mul_(share)
        return flat

    @torch.no_grad()
    def finish(self) -> None:
        """Wait, and put the averages in place."""
        for parameters, flat, work in zip(self.parts, self.flat, self.works, strict=True):
            work.wait()
            *gradients, present = flat.split([*(p.numel() for p in parameters), len(parameters)])
            for parameter, gradient, count in zip(parameters, gradients, present, strict=True):
                if parameter.grad is None and count > 0:  # looks at the number, and so waits for the device, only then
                    parameter.grad = torch.empty_like(parameter)
                if parameter.grad is not None:
                    parameter.grad.copy_(gradient.view(parameter.shape))


def digest_of(tensors: Iterable[Tensor]) -> Tensor:
    """Two 64-bit words, equal for equal bits in the same order."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)
