"""Replicas that die and come back equal a literal simulation of those that were there."""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from pathlib import Path
from threading import Barrier

import pytest
import torch
from test_averaging import made, update

import gang
import localgrad
from localgrad.distributed.elastic import ElasticAverager

PERIOD = 3
DIES, BACK, END = 2, 4, 7  # averages: the first without replica 1, the first it may return at, the last
PATIENCE = 120  # of processes that start beside other jobs


def state_of(network: localgrad.LocalNetwork, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights, buffers and momentum."""
    momenta = enumerate(slot["momentum_buffer"] for slot in optimizer.state.values())
    return dict(network.state_dict()) | {f"momentum {index}": momentum for index, momentum in momenta}


def train(replica: int, seed: int, lighthouse: str, place: str, dies: int, gates: dict[int, list[Barrier]]) -> None:
    """Train to the end, or until killed before average ``dies``; wait at ``gates`` before averages, 0 is joining."""
    torch.set_num_threads(1)
    network, optimizer = made(seed)
    averager = ElasticAverager(
        network, [optimizer], period=PERIOD, lighthouse=lighthouse, host="localhost", timeout=PATIENCE
    )

    def meet(average: int) -> None:
        for gate in gates.get(average, []):
            gate.wait(PATIENCE)
            time.sleep(0.5)  # the lighthouse waits for those it has heard of; heartbeats come every 0.1 s

    meet(0)
    seen = []
    with averager:
        began = averager.step
        while averager.step < END * PERIOD:
            update(network, optimizer, replica, averager.step)
            localgrad.exchange(network)
            average, rest = divmod(averager.step + 1, PERIOD)
            if rest == 0:
                meet(average)
                if average == dies:
                    os.kill(os.getpid(), signal.SIGKILL)
            averager.average_parameters()
            if rest == 0:
                seen.append(averager.replicas)
        torch.save({"seen": seen, "began": began, "state": state_of(network, optimizer)}, place)


def simulated(seed: int, back: int) -> list[dict[str, torch.Tensor]]:
    """The same in one process: both begin with equal weights; at average ``back`` the first's are copied."""
    pairs = [made(seed), made(seed)]
    for step in range(END * PERIOD):
        for replica, pair in enumerate(pairs):  # what replica 1 does while it is dead is overwritten
            update(*pair, replica, step)
            localgrad.exchange(pair[0])
        average, rest = divmod(step + 1, PERIOD)
        if rest == 0 and average == back:
            for ours, survivor in zip(pairs[1], pairs[0], strict=True):
                ours.load_state_dict(copy.deepcopy(survivor.state_dict()))
        elif rest == 0 and not DIES <= average < back:
            with torch.no_grad():
                for a, b in zip(*(network.parameters() for network, _ in pairs), strict=True):
                    a.copy_((a + b) / 2)
                    b.copy_(a)
    return [state_of(*pair) for pair in pairs]


@pytest.mark.slow_distributed
def test_a_replica_dies_another_goes_on_alone_and_heals_the_one_that_comes_back(tmp_path: Path) -> None:
    coordination = pytest.importorskip("torchft.coordination", reason="pip install localgrad[elastic]")
    lighthouse = coordination.LighthouseServer("[::]:0", min_replicas=1, heartbeat_timeout_ms=4000)
    start, apart, alone, back = (gang.CONTEXT.Barrier(2) for _ in range(4))

    def process(name: str, replica: int, seed: int, dies: int, gates: dict[int, list[Barrier]]) -> None:
        args = (replica, seed, lighthouse.address(), str(tmp_path / name), dies, gates)
        processes[name] = gang.CONTEXT.Process(target=train, args=args, daemon=True)
        processes[name].start()

    processes: dict[str, object] = {}
    try:
        process("survivor", 0, 0, 0, {0: [start], DIES: [apart], BACK: [alone, back]})
        process("killed", 1, 1, DIES, {0: [start], DIES: [apart]})
        alone.wait(PATIENCE)
        process("returned", 1, 2, 0, {0: [back]})
        for each in processes.values():
            each.join(PATIENCE)
        codes = {name: each.exitcode for name, each in processes.items()}
    finally:
        for each in processes.values():
            each.kill()
            each.join()
        lighthouse.shutdown()
    assert codes == {"survivor": 0, "killed": -signal.SIGKILL, "returned": 0}
    survivor, returned = (torch.load(tmp_path / name) for name in ("survivor", "returned"))
    back, rest = divmod(returned["began"], PERIOD)  # it may have asked just after an average
    assert rest == 0 and BACK <= back < END
    assert survivor["seen"] == [2] + [1] * (back - 2) + [2] * (END - back + 1) and survivor["began"] == 0
    assert returned["seen"] == [2] * (END - back)
    wrong = {}
    for seed in (0, 1):  # the weights of either are those that both begin with
        for found, expected in zip((survivor, returned), simulated(seed, back), strict=True):
            state = found["state"]
            assert state.keys() == expected.keys()
            wrong.setdefault(seed, []).extend(k for k in state if not torch.equal(state[k], expected[k]))
    assert [] in wrong.values(), {seed: names[:3] for seed, names in wrong.items()}


def test_misuse_and_a_missing_torchft_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimizer = made()

    def refusal(period: int) -> str:
        with pytest.raises(localgrad.ConfigError) as error:
            ElasticAverager(network, [optimizer], period=period, lighthouse="http://localhost:1")
        return str(error.value)

    monkeypatch.setitem(sys.modules, "torchft", None)
    assert "pip install localgrad[elastic]" in refusal(period=3)
    assert "period=0" in refusal(period=0)
    network.replicas = object()
    assert "one process with the whole network" in refusal(period=3)
