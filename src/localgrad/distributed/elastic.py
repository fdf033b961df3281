"""Replicas that may come and go, and that average their weights every few steps, by torchft.

Experimental: it was tried with processes of one machine, never on machines that fail.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from localgrad.distributed.agreement import facts_about
from localgrad.errors import ConfigError, TrainingError
from localgrad.network import LocalNetwork

ATTEMPTS = 3  # to join: one that joins at the same time may die


class ElasticAverager:
    """Experimental: averages the weights of replicas that train apart, every ``period`` steps over those there.

    Each replica is a process of its own, started by itself, with no process group around it. They find each other by a
    lighthouse, one small server for all of them::

        torchft_lighthouse --min_replicas 1 --bind [::]:29510 --join_timeout_ms 60000

    A replica that dies is missing from the next average, and the others go on; the last one goes on alone. One that
    starts late, or again, takes parameters, buffers, optimizer state and `step` of one that is there when those average
    next, and counts as a second one of its kind in that average. If an average fails, because a replica died in the
    middle of it, weights stay as they were until the next one.

    Buffers, such as BatchNorm statistics, and the state of optimizers stay each replica's own.

    Args:
        network: from `localize`, with equal arguments on every replica.
        optimizers: of its parameters, all of them.
        period: steps between averages.
        lighthouse: address of the lighthouse, ``http://host:29510``.
        host: under which the other replicas reach this one; the name of this machine if None.
        timeout: seconds to wait for the other replicas; more than ``period`` steps take.

    Attributes:
        step: steps taken by this replica or the one whose state it took.
        replicas: how many took part in the last average; 0 if it failed.

    Raises:
        ConfigError: torchft is missing, the network is spread over several ranks, or replicas differ in code, versions,
            model, method, cuts or period.
        TrainingError: the lighthouse or the other replicas do not answer.

    Example:
        >>> from localgrad.distributed.elastic import ElasticAverager
        >>> def main():  # in each replica
        ...     with ElasticAverager(network, [optimizer], period=50, lighthouse="http://host:29510") as averager:
        ...         while averager.step < 1000:
        ...             localgrad.backward(network, *batch(averager.step), averager.step)
        ...             optimizer.step()
        ...             optimizer.zero_grad(set_to_none=True)
        ...             localgrad.exchange(network)
        ...             averager.average_parameters()

    Source: local SGD, Stich, ICLR 2019 (arXiv:1805.09767), by ``torchft.local_sgd.LocalSGD``. Differs: state goes to a
    replica that joins through the process group and is read with ``weights_only=True``; torchft serves it to anybody by
    HTTP and unpickles what it gets.
    """

    def __init__(
        self,
        network: LocalNetwork,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        period: int,
        lighthouse: str,
        host: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        if period < 1:
            raise ConfigError(f"period={period}: weights are averaged every period steps; write 1 or more")
        if network.stage is not None or network.replicas is not None:
            raise ConfigError(
                "each replica of ElasticAverager is one process with the whole network; leave out block_parallel and "
                "data_parallel"
            )
        try:
            from torchft import Manager, ProcessGroupGloo
            from torchft.local_sgd import LocalSGD
        except ImportError as error:
            raise ConfigError(
                "replicas that come and go need torchft: pip install localgrad[elastic] (Linux, x86-64)"
            ) from error
        self.network, self.optimizers, self.period = network, list(optimizers), period
        self.step, self.replicas = 0, 0
        host = host or socket.gethostname()
        patience = timedelta(seconds=timeout)
        self._group = ProcessGroupGloo(patience)
        try:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            self.manager = Manager(
                self._group, self._load, self._state, min_replica_size=1, use_async_quorum=False, timeout=patience,
                quorum_timeout=patience, connect_timeout=patience, rank=0, world_size=1, store_addr=host,
                store_port=self._store.port, lighthouse_addr=lighthouse, hostname=host,
                checkpoint_transport=_OverGroup(self._group),
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"a replica at {host} found no lighthouse at {lighthouse}: {error}. Start torchft_lighthouse and write "
                "its address as http://host:29510, and as host= a name of this machine that all of them know"
            ) from error
        self._local_sgd = LocalSGD(self.manager, network, self.optimizers[0], period)

    def __enter__(self) -> ElasticAverager:
        for _ in range(ATTEMPTS):
            self._average()
            if self.replicas:
                return self
        raise TrainingError(
            f"joining the other replicas failed {ATTEMPTS} times: {self.manager.errored()}. Start this replica again"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.manager.shutdown()
        self._group.shutdown()

    def average_parameters(self) -> None:
        """Count a step, and average all parameters if it is one of every ``period``.

        Call it after each step and after `localgrad.exchange`: twins are averaged too.
        """
        self.step += 1
        if self.step % self.period == 0:
            self._average()

    def _average(self) -> None:
        try:
            self._local_sgd.sync()
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"at step {self.step} the lighthouse or a replica did not answer: {error}") from error
        self.replicas = 0 if self.manager.errored() else self.manager.num_participants()

    def _facts(self) -> dict[str, str]:
        return {"period": str(self.period), **facts_about(self.network)}

    def _state(self) -> dict[str, Any]:
        return {
            "facts": self._facts(),
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def _load(self, state: dict[str, Any]) -> None:
        for name, own in self._facts().items():
            if state["facts"][name] != own:
                raise ConfigError(
                    f"this replica does not run the same job as the others: {name} is {own!r} here and "
                    f"{state['facts'][name]!r} there. Start all replicas with the same code and settings"
                )
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class _OverGroup:
    """torchft's ``CheckpointTransport`` by messages of the process group; nothing but tensors and plain containers."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def metadata(self) -> str:
        return "process group"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        file = io.BytesIO()
        torch.save(state_dict, file)
        content = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        for rank in dst_ranks:
            for message in (torch.tensor([len(content)]), content):
                self.group.send([message], rank, 1).wait(timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        length = torch.empty(1, dtype=torch.int64)
        self.group.recv([length], src_rank, 1).wait(timeout)
        content = torch.empty(int(length), dtype=torch.uint8)
        self.group.recv([content], src_rank, 1).wait(timeout)
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)

    def disallow_checkpoint(self) -> None:
        """Nothing is left to send once `send_checkpoint` has returned."""

    def shutdown(self, wait: bool = True) -> None:
        """It keeps nothing open."""
