"""What travels between ranks, how much of it, and when."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_block_parallel import train
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gang
import localgrad
from bridged import bridged
from localgrad import methods
from localgrad.config import OptimConfig
from localgrad.distributed import block_parallel, device_mesh
from localgrad.distributed.link import VALUES, Inlet, Outlet
from localgrad.distributed.placement import balanced, clocked
from localgrad.measure.memory import LiveBytes
from localgrad.train.meters import evaluate
from localgrad.train.optim import Stepper
from zoo import METHODS, batch, build

DGL = METHODS["dgl"]


def messages() -> dict[str, object]:
    """Strides, sizes and values that a link has to keep."""
    group, rank = dist.group.WORLD, dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(4, 3, 5, 5, generator=generator)
    sent = [
        [maps.to(memory_format=torch.channels_last), torch.arange(4), torch.tensor(True), maps[:0]],
        [torch.randn(4, 3, 1, 1, generator=generator).expand(4, 3, 5, 5), maps.transpose(0, 2).double()],
        [torch.cat([maps] * 8)],  # larger than the first
        [maps[:, :, ::2]],  # gaps between its elements
        [maps[:1].clone()],
    ]
    if rank == 0:
        outlet = Outlet(group, 1, VALUES, depth=2)
        for step, tensors in enumerate(sent):
            outlet.send(step, 0, {"step": step}, tensors, stamp=0.25 * step)
            for tensor in tensors[:1]:
                tensor.fill_(-1.0) if 0 not in tensor.stride() else None  # a copy is on its way
        outlet.close()
        outlet.finish()
        return {}
    inlet = Inlet(group, 0, VALUES, depth=2)
    wrong = []
    for step, tensors in enumerate(sent):
        message = inlet.take(step, 0)
        if message.said != {"step": step} or message.stamp != 0.25 * step:
            wrong.append(f"{step}: {message.said}")
        for ours, theirs in zip(message.tensors, tensors, strict=True):
            strides = theirs.stride() if step != 3 else theirs.contiguous().stride()
            if not torch.equal(ours, theirs) or ours.dtype != theirs.dtype or ours.stride() != strides:
                wrong.append(f"{step}: {ours.stride()}, {strides}")
    try:
        inlet.take(len(sent))
    except localgrad.TrainingError as error:
        wrong_end = str(error)
    return {"wrong": wrong, "end": wrong_end}


def bytes_and_order() -> dict[str, object]:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    network = block_parallel(build("cnn", methods.man(methods.windows(DGL)), 4), mesh, place=[0, 0, 1, 1])
    stage = network.stage
    stage.timeline.record()
    train(network, rank == 0, 3)
    stage.close()
    source = network.twins_at(2)[0].source
    return {
        "bytes": stage.bytes_sent,
        "unit": sum(-(-p.numel() * 4 // 64) * 64 for p in source.parameters()),
        "last": list(source.parameters())[-1].numel() * 4,
        "events": [[e.kind, e.step, e.block] for e in stage.timeline.events if e.step == 1],
    }


def evaluation() -> dict[str, dict[str, float]]:
    """Scores of every head after training: of two ranks, of one process, and of a network that was gathered."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    batches = [batch(seed=5), batch(6, seed=6)]
    network = block_parallel(build("cnn", METHODS["man(dgl)"], 4), mesh)
    train(network, rank == 0, 3)
    found = evaluate(network, batches)["score"]
    network.stage.gather()
    reference = build("cnn", METHODS["man(dgl)"], 4)
    train(reference, True, 3)
    return {
        "found": found,
        "expected": evaluate(reference, batches)["score"],
        "after": evaluate(network, batches)["score"],
    }


def refusals() -> dict[str, str]:
    """The message of each misuse; in a group of its own, since what was on its way stays there."""
    rank = dist.get_rank()
    x, y = batch()

    def placed(method: object = DGL, blocks: int = 3, seed: int = 0, **options: object) -> localgrad.LocalNetwork:
        mesh = DeviceMesh.from_group(dist.new_group(), "cpu", mesh_dim_names=("block",))
        return block_parallel(build("cnn", method, blocks, seed=seed), mesh, **options)

    def forgetful() -> None:
        network = placed()
        for step in range(2):
            localgrad.backward(network, x, y, step)

    def uneven() -> None:
        network = placed()
        train(network, rank == 0, 2 + rank)
        network.stage.close()

    def blind() -> None:
        network = placed()
        if rank == 0:
            localgrad.backward(network, None, None)

    def unclosed() -> None:
        network = placed()
        network.stage.close()
        localgrad.backward(network, x, y)

    def clipped() -> None:
        Stepper(placed(METHODS["windows(dgl)"]), OptimConfig(clip_grad=1.0), torch.amp.GradScaler(enabled=False))

    early = bridged(METHODS["windows(dgl)"], exchange="before", buffers="copy")
    found = {}
    for name, act in {
        "ranks": lambda: placed(METHODS["e2e"], blocks=1),
        "place": lambda: placed(place=[0, 1, 0]),
        "depth": lambda: placed(depth=0),
        "weights": lambda: placed(seed=rank),
        "placement": lambda: placed(place=[0, rank, 1]),
        "buffers": lambda: placed(methods.accumulation(early, parts=2)),
        "exchange": forgetful,
        "data": uneven,
        "blind": blind,
        "closed": unclosed,
        "clipped": clipped,
        "mesh": lambda: device_mesh("cpu", block=3),
    }.items():
        try:
            act()
        except localgrad.LocalgradError as error:
            found[name] = str(error)
    return found


def mechanics() -> dict[str, object]:
    return {
        "messages": messages(), "bytes": bytes_and_order(), "evaluation": evaluation(), "refusals": refusals(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def both() -> list[dict[str, object]]:
    return gang.run(mechanics, 2)


def test_a_link_keeps_values_strides_and_order(both: list[dict[str, object]]) -> None:
    found = both[1]["messages"]
    assert found["wrong"] == [] and "rank 0 has ended, but rank 1 expects step 5" in found["end"]


def test_bytes_are_those_of_features_targets_gradients_and_units(both: list[dict[str, object]]) -> None:
    """Batches of 14, 14, 12 images; features (14, 8, 8, 8), targets (14,) int64; the link keeps to its first size."""
    first, second = (found["bytes"] for found in both)
    features, targets = 14 * 8 * 8 * 8 * 4, 14 * 8
    ends = 2  # messages that fill the other end's memory when the link is closed
    assert features % 64 == 0
    assert first["bytes"] == {"values": (3 + ends) * (features + targets), "gradients": 0, "weights": 0}
    unit = second["unit"] - -(-second["last"] // 64) * 64 + second["last"]
    gradients = 14 * 8 * 8 * 8 * 4
    assert second["bytes"] == {"values": 0, "gradients": (3 + ends) * gradients, "weights": (3 + ends) * unit}


def test_features_leave_before_the_backward_pass(both: list[dict[str, object]]) -> None:
    first = [(kind, block) for kind, step, block in both[0]["bytes"]["events"]]
    assert first == [("forward", 0), ("loss", 0), ("forward", 1), ("sent", -1), ("loss", 1), ("loss", 1), ("back", 1)]
    second = [(kind, block) for kind, step, block in both[1]["bytes"]["events"]]
    assert second[:3] == [("received", -1), ("forward", 2), ("loss", 2)]


def test_evaluation_scores_every_head_once(both: list[dict[str, object]]) -> None:
    first, second = (found["evaluation"] for found in both)
    assert first["found"] == second["found"] == first["expected"] == first["after"] == second["after"]
    assert set(first["found"]) == {"block 1", "block 2", "block 3", "model"}


def test_refusals_say_what_to_write(both: list[dict[str, object]]) -> None:
    for rank, found in enumerate(both):
        messages = found["refusals"]
        assert "2 ranks for 1 blocks" in messages["ranks"] and "Start 1 processes" in messages["ranks"]
        assert "place=[0, 1, 0]" in messages["place"] and "place=[0, 0, 1]" in messages["place"]
        assert "depth=0" in messages["depth"]
        assert "weights is" in messages["weights"] and "rank 1 does not run the same job" in messages["weights"]
        assert "placement is '[range(0, 1), range(1, 3)]' there" in messages["placement"]
        assert "moves buffers of twins between micro-batches" in messages["buffers"]
        assert "localgrad.exchange(network) was not called before step 1" in messages["exchange"]
        assert ("different numbers of batches" in messages.get("data", "")) == (rank == 1)
        assert ("was given None" in messages.get("blind", "")) == (rank == 0)
        assert "links are closed" in messages["closed"]
        assert "has spans over blocks on several ranks" in messages["clipped"]
        assert "block=3, data=1 needs 3 processes, but this job has 2" in messages["mesh"]


def test_placement_balances_costs() -> None:
    costs = [5.0, 1.0, 1.0, 1.0, 4.0, 2.0]

    def every_way(first: int, ranks: int) -> list[list[int]]:
        if ranks == 1:
            return [[0] * (len(costs) - first)]
        return [
            [0] * (stop - first) + [1 + r for r in rest]
            for stop in range(first + 1, len(costs) - ranks + 2)
            for rest in every_way(stop, ranks - 1)
        ]

    for ranks in range(1, 7):
        place = balanced(costs, ranks)
        worst = [max(sum(c for c, r in zip(costs, way, strict=True) if r == k) for k in range(ranks))
                 for way in (place, *every_way(0, ranks))]  # fmt: skip
        assert worst[0] == min(worst) and sorted(set(place)) == list(range(ranks))
    network = build("cnn", METHODS["windows(dgl)"], 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seconds = clocked(network, *batch())
    assert {block for _, block in seconds} == {0, 1, 2} and min(seconds.values()) >= 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_nothing_private_of_torch_distributed_is_used() -> None:
    sources = Path(localgrad.__file__).parent.rglob("*.py")
    private = re.compile(r"(torch\.distributed|\bdist|\bdcp)(\.\w+)*\._|from torch\.distributed[\w.]* import .*\b_")
    assert [f"{p.name}: {line}" for p in sources for line in p.read_text().splitlines() if private.search(line)] == []


def memory() -> dict[str, int]:
    """Bytes at the peak of training here, beside those of the same blocks in one process."""
    x, y = batch(32, pixels=16)
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    found = {}
    for name in ("alone", "stage"):
        network = build("cnn", DGL, 4)
        if name == "stage":
            block_parallel(network, mesh, place=[0, 0, 1, 1])
        peaks: list[int] = []
        with LiveBytes() as live:
            for step in range(4):
                for span, loss in localgrad.local_losses(network, x, y, step):
                    loss.backward()
                    if name == "stage" or (span.stop <= 2) == (rank == 0):
                        peaks.append(live.peak)
                network.zero_grad(set_to_none=True)
                localgrad.exchange(network)
                live.peak = live.current
            if name == "stage":
                network.stage.close()
        found[name] = max(peaks)
    return found


def test_a_rank_takes_the_memory_of_its_blocks_and_of_what_is_on_its_way() -> None:
    """At most twice ``depth`` messages of features and targets more than the blocks themselves."""
    message = 32 * 8 * 16 * 16 * 4 + 32 * 8
    for found in gang.run(memory, 2):
        assert found["stage"] <= 1.05 * (found["alone"] + 2 * 2 * message), found
