"""Two replicas equal one process on the joined batch, for every method."""

from __future__ import annotations

import gang
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from zoo import METHODS, MODELS, TASK, batch, steps

import localgrad
from localgrad import methods
from localgrad.distributed import data_parallel

SHARES = {"equal": (4, 4), "unequal": (5, 3)}
EVERY = METHODS | {
    "infopro, contrastive": methods.infopro(TASK, loss="contrast"),
    "accumulation(windows(dgl))": methods.accumulation(METHODS["windows(dgl)"], parts=2),
    "pgl(man(mlaan(dgl)))": methods.pgl(methods.man(METHODS["mlaan(dgl)"]), every=2),
}


def without_batch_statistics(module: nn.Module) -> nn.Module:
    """BatchNorm replaced in place by a normalisation of single samples, which needs no other rank."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            without_batch_statistics(child)
    return module


def network_of(name: str, seed: int = 0) -> localgrad.LocalNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = without_batch_statistics(MODELS["residual"](dropout=0.0))
        network = localgrad.localize(model, EVERY[name], num_blocks=4, example=batch(2)[0])
    without_batch_statistics(network.auxiliary)
    return network.double()


def train(network: localgrad.LocalNetwork, shares: slice, per_block: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of each step and the state after three steps of SGD, one of each kind of step among them."""
    found: dict[str, torch.Tensor] = {}
    sgd = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [torch.optim.SGD(network.block_parameters(k), **sgd) for k in range(len(network.blocks))]
    for index, step in enumerate([*steps(network), 3, 4][:3]):
        images, targets = batch(seed=index)
        x, y = images.double()[shares], targets[shares]

        def stepped(block: int, index: int = index) -> None:
            for n, p in enumerate(network.block_parameters(block)):
                if p.grad is not None:
                    found[f"step {index}: gradient {n} of block {block}"] = p.grad.clone()
            optimizers[block].step()
            optimizers[block].zero_grad(set_to_none=True)

        for _, loss in localgrad.local_losses(network, x, y, step, on_block_done=stepped if per_block else None):
            loss.backward()
        if not per_block:
            for block in range(len(network.blocks)):
                stepped(block)
        localgrad.exchange(network)
    return found | dict(network.state_dict())


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors, as a share of the largest value in each."""
    assert a.keys() == b.keys(), f"other tensors: {sorted(a.keys() ^ b.keys())}"
    return max(
        float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-3)) for n in a if a[n].is_floating_point()
    )


def compare_every_method() -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    rank = dist.get_rank()
    found: dict[str, float] = {}
    kinds: list[str] = []
    for name in EVERY:
        for kind, sizes in SHARES.items():
            if kind == "unequal" and not ("critic" in name or "predsim" in name or "," in name or "(" not in name):
                continue
            mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
            # The second rank begins with other weights: those of the first are to replace them.
            network = data_parallel(network_of(name, seed=rank), mesh)
            ours = train(network, mine, per_block=kind == "equal")
            if len(kinds) % 2 == rank:  # both ranks have the same weights, so one of them needs to compare
                found[f"{name}, {kind}"] = apart(ours, train(network_of(name), slice(None)))
            kinds.append(kind)
            network.replicas.check_equal()
    return found


def test_gradients_and_weights_equal_one_process_on_the_joined_batch() -> None:
    first, second = gang.run(compare_every_method, 2, timeout=240)
    found = first | second
    assert {name.partition(", equal")[0] for name in found} >= set(EVERY)
    assert not {name: value for name, value in found.items() if not value < 1e-12}


def order_and_bytes() -> dict[str, object]:
    """What goes over the wire, and when, in one step of a method whose heads rest on guided steps."""
    mesh = init_device_mesh("cpu", (2,))
    network = data_parallel(network_of("pgl(dgl)"), mesh)
    sent: list[tuple[str, int]] = []
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sent.append(("reduce", tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    for index, block in enumerate(network.blocks):
        block.train_graph.register_forward_hook(lambda *_, index=index: sent.append(("forward", index)))
    images, targets = batch()
    for step in (0, 1):  # a guided one, then a local one
        sent.append(("step", step))
        for _, loss in localgrad.local_losses(
            network, images.double(), targets, step, on_block_done=lambda block: sent.append(("average", block))
        ):
            loss.backward()
        resting = [p.grad is None for aux in network.auxiliary.values() for p in aux.parameters()]
        sent.append(("heads without gradient", sum(resting)))
        network.zero_grad(set_to_none=True)
    dist.all_reduce = all_reduce
    sizes = [network.block_parameters(k) for k in range(4)]
    heads = sum(p.requires_grad for aux in network.auxiliary.values() for p in aux.parameters())
    return {
        "events": [list(event) for event in sent],
        "expected": [sum(p.numel() + 1 for p in parameters) for parameters in sizes],
        "heads": heads,
    }


def test_one_message_a_block_of_the_size_of_its_parameters_while_the_next_block_runs() -> None:
    for found in gang.run(order_and_bytes, 2):
        events = [tuple(event) for event in found["events"]]
        guided, local = events[: events.index(("step", 1))], events[events.index(("step", 1)) :]
        sizes = found["expected"]
        for part in (guided, local):
            assert sorted(n for kind, n in part if kind == "reduce") == sorted(sizes)
        assert guided[-1] == ("heads without gradient", found["heads"]) and local[-1] == ("heads without gradient", 0)
        assert local[1:-1] == [
            ("forward", 0), ("reduce", sizes[0]),
            ("forward", 1), ("reduce", sizes[1]), ("average", 0),
            ("forward", 2), ("reduce", sizes[2]), ("average", 1),
            ("forward", 3), ("reduce", sizes[3]), ("average", 2), ("average", 3),
        ]  # fmt: skip


def misuse() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    rank = dist.get_rank()
    x, y = (t.double() if t.is_floating_point() else t for t in batch())
    network = data_parallel(network_of("dgl"), mesh)
    lonely = network_of("dgl")
    torch.nn.init.zeros_(lonely.model.fc.weight)

    def step_of_its_own() -> None:
        localgrad.backward(network, x, y, step=3 + rank)

    def drift() -> None:
        network.replicas.check_equal()
        if rank == 1:
            with torch.no_grad():
                network.model.fc.bias[0] += 1e-12
        network.replicas.check_equal()

    found = {}
    for name, act in {
        "method": lambda: data_parallel(network_of("dgl" if rank else "windows(dgl)"), mesh),
        "cut": lambda: data_parallel(
            localgrad.localize(MODELS["cnn"](), METHODS["dgl"], num_blocks=2 + rank, example=x.float()), mesh
        ),
        "axis": lambda: data_parallel(lonely, init_device_mesh("cpu", (1, 2), mesh_dim_names=("block", "copies"))),
        "wrapped": lambda: data_parallel(torch.nn.DataParallel(lonely), mesh),
        "steps": step_of_its_own,
        "drift": drift,
    }.items():
        try:
            act()
        except localgrad.LocalgradError as error:
            found[name] = str(error)
    with torch.no_grad():
        normed = data_parallel(
            localgrad.localize(MODELS["cnn"](), METHODS["dgl"], num_blocks=2, example=x.float()), mesh
        )
        normed.model.units[0][1].running_mean.fill_(rank)
        normed.replicas.average_buffers()
    found["average"] = str(normed.model.units[0][1].running_mean[0].item())
    return found


def test_misuse_is_named_on_every_rank() -> None:
    for found in gang.run(misuse, 2):
        assert "rank 1 does not run the same job as rank 0: method is 'dgl' there and 'windows(dgl)'" in found["method"]
        assert "blocks is '3, beginning" in found["cut"]
        assert "one must be called 'data'" in found["axis"]
        assert "DataParallel" in found["wrapped"]
        assert "at different steps, [3, 4]" in found["steps"]
        assert "replicas [1] have other parameters than replica 0" in found["drift"]
        assert found["average"] == "0.5"


def lose_a_peer() -> str:
    network = data_parallel(network_of("dgl"), init_device_mesh("cpu", (2,)))
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        return ""
    x, y = batch()
    try:
        localgrad.backward(network, x.double(), y)
    except localgrad.TrainingError as error:
        message = str(error)
    dist.destroy_process_group()
    return message


def test_a_lost_peer_is_an_error_that_says_what_to_do() -> None:
    message = gang.run(lose_a_peer, 2, group_timeout=20.0)[0]
    assert "rank 0 lost its peers while beginning step 0" in message and "--max-restarts" in message
