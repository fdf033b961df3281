"""What users put around a model or into it: refused with the line to write instead, or trained as in plain training."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import localgrad
from gradients import assert_same
from localgrad import PartitionError, TrainingError, localize, methods
from localgrad.network import LocalNetwork
from localgrad.testing import assert_isolated

CLASSES, WIDTH, DEPTH = 4, 16, 6
TASK = localgrad.tasks.classification(CLASSES)
DGL, E2E = methods.dgl(TASK, head="linear"), methods.e2e(TASK)
METHODS = {"dgl": DGL, "windows": methods.windows(DGL), "e2e": E2E}
CUTS = ("layers.2", "layers.4")
BY_METHOD = pytest.mark.parametrize("name", METHODS)


class Net(nn.Module):
    """Six layers and a classifier; pairs of layers may be run again in the backward pass."""

    def __init__(self, dropout: float = 0.0, reentrant: bool | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(dropout), nn.Tanh())
                for _ in range(DEPTH)
            )
            self.fc = nn.Linear(WIDTH, CLASSES)
        self.reentrant = reentrant
        self.runs = 0

    def pair(self, index: int, x: Tensor) -> Tensor:
        self.runs += 1
        return self.layers[index + 1](self.layers[index](x))

    def forward(self, x: Tensor) -> Tensor:
        for k in range(0, DEPTH, 2):
            again = self.reentrant is not None
            x = checkpoint(self.pair, k, x, use_reentrant=self.reentrant) if again else self.pair(k, x)
        return self.fc(x)


class Around(nn.Module):
    """A model that holds another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def data(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, WIDTH, generator=generator), torch.arange(size) % CLASSES


X, Y = data()


def network_of(model: nn.Module, method: localgrad.Method = DGL, cuts: Any = CUTS, x: Tensor = X) -> LocalNetwork:
    torch.manual_seed(1)  # heads
    return localize(model, method, cuts, example=x[:2])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def trained(network: LocalNetwork, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    """The gradients of one step, with the same draws each time."""
    network.zero_grad()
    torch.manual_seed(2)
    random.seed(2)
    localgrad.backward(network, x, y)
    return gradients(network)


# Around the model, around the network: refused


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrappers() -> dict[str, tuple[Callable[[nn.Module], nn.Module], str]]:
    """How a module is wrapped, and the lines that are to be written instead."""

    def fsdp(module: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        alone = ShardingStrategy.NO_SHARD  # all that one process can do
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), sharding_strategy=alone)

    module = r"localize\(model\.module, .*"
    return {
        "DistributedDataParallel": (DistributedDataParallel, module + r"data_parallel\(network, mesh\)"),
        "DataParallel": (nn.DataParallel, module + r"data_parallel\(network, mesh\)"),
        "FullyShardedDataParallel": (fsdp, r"localize the plain model.*data_parallel\(network, mesh, shard=True\)"),
        "OptimizedModule": (
            lambda m: torch.compile(m, backend="aot_eager"),
            r"localize\(model\._orig_mod, .*network\.compile_blocks\(\)",
        ),
    }


@pytest.mark.parametrize("kind", wrappers())
def test_a_wrapped_model_is_refused_with_the_line_to_write(kind: str, one_process: None) -> None:
    wrap, line = wrappers()[kind]
    with pytest.raises(PartitionError, match=f"wrapped in {kind}; write {line}"):
        network_of(wrap(Net()))


def test_a_wrapper_inside_the_model_that_holds_a_cut_is_refused(one_process: None) -> None:
    with pytest.raises(PartitionError, match="DistributedDataParallel"):
        network_of(Around(DistributedDataParallel(Net())), cuts=("inner.module.layers.2", "inner.module.layers.4"))


def traced(module: nn.Module, x: Tensor = X) -> nn.Module:
    return torch.jit.trace(module, x, check_trace=False)


SCRIPTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": torch.jit.script,
    "frozen": lambda module: torch.jit.freeze(torch.jit.script(module.eval())),
    "traced": traced,
}
DEPRECATED = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")


@DEPRECATED
@pytest.mark.parametrize("how", SCRIPTED)
def test_a_model_compiled_by_torch_jit_is_refused_with_what_to_pass(how: str) -> None:
    model = nn.Sequential(*Net().layers, Net().fc)
    with pytest.raises(PartitionError, match=r"model is a Sequential that torch\.jit compiled.*localize with the Seq"):
        network_of(SCRIPTED[how](model), cuts=("2", "4"))
    assert trained(network_of(model, cuts=("2", "4")))  # what the message says to pass


@DEPRECATED
@pytest.mark.parametrize("how", ["scripted", "frozen"])
@pytest.mark.parametrize("path", ["layers.1", "layers.3.0"], ids=["between cuts", "inside a layer"])
def test_a_module_of_torch_jit_inside_the_model_is_refused_by_name(how: str, path: str) -> None:
    model = Net()
    kind = type(model.get_submodule(path)).__name__
    model.set_submodule(path, SCRIPTED[how](model.get_submodule(path)))
    with pytest.raises(
        PartitionError, match=f"'{path}' of the model is a {kind} that torch.jit compiled.*with the {kind}"
    ):
        network_of(model)


@DEPRECATED
@BY_METHOD
def test_traced_modules_inside_the_model_train_as_what_they_were_made_of(name: str) -> None:
    x = X.double()  # torch.jit has backward formulas of its own, which round otherwise
    expected = trained(network_of(Net().double(), METHODS[name], x=x), x)
    model = Net().double()
    for k in (1, 3):
        model.layers[k] = traced(model.layers[k], x)
    torch.testing.assert_close(trained(network_of(model, METHODS[name], x=x), x), expected)


def calls() -> dict[str, Callable[[Any], Any]]:
    """What runs a network."""
    return {
        "local_losses": lambda network: list(localgrad.local_losses(network, X, Y)),
        "backward": lambda network: localgrad.backward(network, X, Y),
        "local_outputs": lambda network: list(localgrad.local_outputs(network, X)),
        "features": lambda network: list(localgrad.features(network, X)),
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "DataParallel", "OptimizedModule"])
def test_a_wrapped_network_is_refused_with_the_line_to_write(name: str, kind: str, one_process: None) -> None:
    wrapped = wrappers()[kind][0](network_of(Net()))
    with pytest.raises(TrainingError) as caught:
        calls()[name](wrapped)
    assert kind in str(caught.value)
    assert "localgrad.distributed.data_parallel(network, mesh)" in str(caught.value)
    assert "network.compile_blocks()" in str(caught.value)


# FSDP2


def sharded(module: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def test_a_network_that_is_sharded_as_a_whole_is_refused(one_process: None) -> None:
    network = network_of(Net())
    sharded(network)
    with pytest.raises(PartitionError, match=r"fully_shard was applied to the network as a whole.*shard=True"):
        localgrad.backward(network, X, Y)


@pytest.mark.parametrize("whole", ["", "inner"])
def test_a_sharded_module_with_parameters_of_its_own_on_both_sides_of_a_cut_is_refused(
    whole: str, one_process: None
) -> None:
    """It gathers them when it begins, and lets go of them after the first backward pass: in the middle of the model."""
    model = Around(Net())
    network = network_of(model, cuts=("inner.layers.2", "inner.layers.4"))
    for layer in model.inner.layers[1:]:
        sharded(layer)
    sharded(model.get_submodule(whole))
    with pytest.raises(PartitionError, match="fully_shard"):
        for _ in range(2):
            localgrad.backward(network, X, Y)
            torch.optim.SGD(network.parameters(), 0.1).step()


def test_modules_sharded_before_localize_are_refused(one_process: None) -> None:
    """Their parameters exist only while they run: nothing that a forward leaves behind tells which layer used which."""
    model = Net()
    for layer in model.layers:
        sharded(layer)
    with pytest.raises(PartitionError, match=r"localize the plain model first.*shard=True"):
        network_of(model)


def on_ranks() -> dict[str, float]:
    """The largest difference to one process, by method: layers and heads sharded, each rank with its own samples."""
    rows = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    found = {}
    for name, method in METHODS.items():
        reference, network = network_of(Net(), method), network_of(Net(), method)
        for module in (*network.auxiliary.values(), *network.model.layers, network.model.fc):
            sharded(module)
        optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (network, reference)]
        for step in range(3):
            localgrad.backward(network, X[rows], Y[rows], step)
            localgrad.backward(reference, X, Y, step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        pairs = zip(network.parameters(), reference.parameters(), strict=True)
        found[name] = max(float((p.full_tensor() - q).detach().abs().max()) for p, q in pairs)
    return found


def test_modules_sharded_by_fsdp2_equal_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "distributed")
    import gang

    for found in gang.run(on_ranks, 2):
        assert found.keys() == METHODS.keys()
        assert not {name: value for name, value in found.items() if not value < 1e-6}


# Compiled parts

COMPILED = {
    "modules between the cuts": lambda network: [m.compile(backend="aot_eager") for m in network.model.layers],
    "the module at a cut": lambda network: network.model.layers[2].compile(backend="aot_eager"),
    "compile_blocks": lambda network: network.compile_blocks(backend="aot_eager"),
}


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


# Dynamo hides this warning of its own unless warnings are errors.
COMPILING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


@COMPILING
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_modules_train_without_a_graph_break(how: str, dynamo: Any) -> None:
    for name in ("dgl", "windows"):
        expected = trained(network_of(Net(), METHODS[name]))
        network = network_of(Net(), METHODS[name])
        COMPILED[how](network)
        for _ in range(2):
            found = trained(network)
        assert dynamo["stats"]["unique_graphs"] > 0
        assert not dynamo["graph_break"]
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, msg=key)


@COMPILING
def test_modules_compiled_before_localize_train_without_a_graph_break(dynamo: Any) -> None:
    model = Net()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    network = network_of(model)
    assert not dynamo["stats"]  # cut points are looked for in the plain modules
    found = trained(network)
    assert dynamo["stats"]["unique_graphs"] > 0 and not dynamo["graph_break"]
    expected = trained(network_of(Net()))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


class Skipping(Net):
    """The last layers read what the first one made, across both cuts."""

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.layers[0](x)]
        x = self.layers[1](skips[0])
        x = self.layers[3](self.layers[2](x))
        return self.fc(self.layers[5](self.layers[4](x) + skips.pop()))


@COMPILING
@BY_METHOD
def test_skips_between_compiled_modules(name: str, dynamo: Any) -> None:
    expected = trained(network_of(Skipping(), METHODS[name]))
    network = network_of(Skipping(), METHODS[name])
    COMPILED["modules between the cuts"](network)
    found = trained(network)
    assert dynamo["stats"]["unique_graphs"] > 0 and not dynamo["graph_break"]
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)
    assert_isolated(network, X, Y)


@COMPILING
@pytest.mark.parametrize("where", ["the model", "a module that holds the cuts"])
def test_a_compiled_module_that_holds_a_cut_cannot_be_localized(where: str, dynamo: Any) -> None:
    model = Around(Net())
    (model if where == "the model" else model.inner).compile(backend="aot_eager")
    with pytest.raises(PartitionError, match="compile_blocks"):
        network_of(model, cuts=("inner.layers.2", "inner.layers.4"))


@COMPILING
@pytest.mark.parametrize("where", ["the network", "the model", "a module that holds the cuts"])
def test_a_compiled_module_that_holds_a_cut_cannot_be_trained(where: str, dynamo: Any) -> None:
    network = network_of(Around(Net()), cuts=("inner.layers.2", "inner.layers.4"))
    modules = {"the network": network, "the model": network.model, "a module that holds the cuts": network.model.inner}
    modules[where].compile(backend="aot_eager")
    with pytest.raises(PartitionError, match="compile_blocks"):
        localgrad.backward(network, X, Y)


# Activation checkpointing inside the model


@BY_METHOD
@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_of_timm_runs_every_layer_twice(name: str, before: bool) -> None:
    timm = pytest.importorskip("timm")
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    found, runs = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, num_classes=CLASSES, depth=4, proj_drop_rate=0.1, drop_path_rate=0.1
        )
        if again and before:
            model.set_grad_checkpointing()
        network = network_of(model.train(), METHODS[name], ("blocks.1", "blocks.3"), images)
        if again and not before:
            model.set_grad_checkpointing()
        counts = [0] * 4
        for k, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, k=k, counts=counts: counts.__setitem__(k, counts[k] + 1))
        found.append(trained(network, images, labels))
        runs.append(counts)
    assert_same(found[1], found[0])
    # A span over several blocks shares the backward passes of those that begin where it does.
    assert runs == [[1] * 4, [2, 3, 3, 3] if name == "windows" else [2] * 4]


AROUND_AND_INSIDE = [CUTS, ("layers.1", "layers.4"), ("layers.1", "layers.3"), ("layers.1", "layers.3", "layers.5")]


@BY_METHOD
@pytest.mark.parametrize("cuts", AROUND_AND_INSIDE, ids=["around", "both", "inside", "inside each"])
@pytest.mark.parametrize("before", [True, False])
def test_checkpointed_regions_around_and_across_cuts(name: str, cuts: tuple[str, ...], before: bool) -> None:
    expected = trained(network_of(Net(dropout=0.1), METHODS[name], cuts))
    model = Net(dropout=0.1, reentrant=False if before else None)
    network = network_of(model, METHODS[name], cuts)
    model.reentrant = False
    assert_isolated(network, X, Y)
    model.runs = 0
    assert_same(trained(network), expected)
    regions = DEPTH // 2
    if cuts == CUTS and name != "windows":
        assert model.runs == 2 * regions
    else:
        assert model.runs > regions


def test_each_region_between_cuts_runs_twice() -> None:
    model = Net(reentrant=False)
    layers = [0] * DEPTH
    for k, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, k=k: layers.__setitem__(k, layers[k] + 1))
    network = network_of(model, cuts=("layers.1", "layers.4"))
    layers[:] = [0] * DEPTH
    trained(network)
    # The region of layers 0 and 1 holds a cut: each of its halves is run again for its own backward pass.
    assert layers == [3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("before", [True, False])
def test_a_cut_inside_a_reentrant_region_is_refused(before: bool) -> None:
    model = Net(reentrant=True if before else None)
    x = X.clone().requires_grad_()  # without it torch itself trains nothing in the first region
    with pytest.raises(PartitionError, match="use_reentrant=False"):
        network = network_of(model, cuts=("layers.1",), x=x)
        model.reentrant = True
        localgrad.backward(network, x, Y)


class Stage(nn.Module):
    """A layer that runs again in the backward pass by itself, so that cuts lie around it."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.body = Net().layers[index]
        self.reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=True) if self.reentrant else self.body(x)


class Staged(nn.Module):
    def __init__(self, plain: int = 0) -> None:
        super().__init__()
        self.stem = Net().layers[0]
        self.layers = nn.Sequential(*(Stage(k) if k != plain else Net().layers[k] for k in range(1, DEPTH)))
        self.fc = Net().fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)))


@BY_METHOD
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("plain", [0, 2], ids=["alone", "beside plain layers"])
def test_reentrant_regions_between_cuts_lose_no_gradient_in_silence(name: str, before: bool, plain: int) -> None:
    """Each is trained as without checkpointing, or the step is refused: torch only warns of gradients that are None."""
    cuts = ("layers.0", "layers.2")

    def switched(model: Staged) -> Staged:
        for stage in model.modules():
            if isinstance(stage, Stage):
                stage.reentrant = True
        return model

    expected = trained(network_of(Staged(plain), METHODS[name], cuts))
    try:
        if before:
            found = trained(network_of(switched(Staged(plain)), METHODS[name], cuts))
        else:
            network = network_of(Staged(plain), METHODS[name], cuts)
            switched(network.model)
            found = trained(network)
    except PartitionError as error:
        assert "use_reentrant=False" in str(error)
    else:
        assert_same(found, expected)


# Low-rank adapters


@BY_METHOD
def test_low_rank_adapters_are_all_that_learns(name: str) -> None:
    timm, peft = pytest.importorskip("timm"), pytest.importorskip("peft")
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    bare = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=CLASSES, depth=4)
    lora = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"], lora_dropout=0.1)
    model = peft.get_peft_model(bare, lora).train()
    names = tuple(f"base_model.model.blocks.{k}" for k in (1, 3))
    network = network_of(model, METHODS[name], names, images)
    adapters = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "head.modules_to_save" in n for n in adapters) and len(adapters) == 2 * 4 + 2

    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 0.01)
    for step in range(2):  # the first moves the half that begins at 0, without which the other gets a gradient of 0
        localgrad.backward(network, images, labels, step)
        assert [n for n, p in model.named_parameters() if p.grad is not None] == adapters
        optimizer.step()
        optimizer.zero_grad()
    assert_same({n: p for n, p in model.named_parameters() if n in frozen}, frozen)
    assert_isolated(network, images, labels)
    localgrad.backward(network, images, labels)
    assert all(p.grad.any() for n, p in model.named_parameters() if n in adapters)

    # The merged model answers as the trained one.
    model.eval()
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(model.merge_and_unload()(images), expected, rtol=1e-4, atol=1e-5)


# Hooks, attributes, pruning, parametrizations


class Convs(nn.Module):
    """Maps, with an attribute that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [3, 8, 8, 8, 8]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)
        )
        self.fc = nn.Linear(8, CLASSES)
        self.scale, self.doubled = 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale
            if self.doubled:
                x = x + x.flip(3)
        return self.fc(x.mean((2, 3)))


def _scaling(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.5


def _shifting(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 0.25,)


def _noisy(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 0.1 * torch.randn_like(output)


def _halved(module: nn.Module, given: Any, made: Any) -> Any:
    return tuple(None if g is None else 0.5 * g for g in given)


def _own_forward(model: Convs) -> None:
    layer, inner = model.layers[2], model.layers[2].forward
    layer.forward = lambda x: inner(x).clamp(max=2.0)


def _replaced(model: Convs) -> None:
    torch.manual_seed(5)
    model.layers[2] = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())


def _tensor_hook(model: Convs) -> None:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4))

    model.layers[1].register_forward_hook(hook)


# Done to a model after it was cut before layers 1 and 2; a shape of parameters must not change.
CHANGES: dict[str, Callable[[Convs], object]] = {
    "an attribute": lambda m: setattr(m, "scale", 0.75),
    "a flag": lambda m: setattr(m, "doubled", True),
    "a hook that changes what leaves a block": lambda m: m.layers[1].register_forward_hook(_scaling),
    "a hook that changes what the module at a cut returns": lambda m: m.layers[2].register_forward_hook(_scaling),
    "a hook inside the module at a cut": lambda m: m.layers[2][0].register_forward_hook(_scaling),
    "a hook that draws": lambda m: m.layers[1].register_forward_hook(_noisy),
    "a hook that changes what the module at a cut takes": lambda m: m.layers[2].register_forward_pre_hook(_shifting),
    "a backward hook at a cut": lambda m: m.layers[2].register_full_backward_hook(_halved),
    "a backward hook before a cut": lambda m: m.layers[1].register_full_backward_hook(_halved),
    "a backward pre-hook at a cut": lambda m: m.layers[2].register_full_backward_pre_hook(lambda _, g: (g[0] * 2,)),
    "a hook on a tensor": _tensor_hook,
    "a hook on a parameter": lambda m: m.layers[2][0].weight.register_hook(lambda gradient: 3 * gradient),
    "a forward of its own": _own_forward,
    "another module in its place": _replaced,
    "a frozen layer": lambda m: m.layers[2].requires_grad_(False),
    "an evaluated norm": lambda m: m.layers[2][1].eval(),
}

# Done to a model before it is cut: they add parameters and buffers.
DRESSINGS: dict[str, Callable[[Convs], object]] = {
    "pruned": lambda m: [prune.l1_unstructured(m.layers[k][0], "weight", 0.5) for k in (1, 2)],
    "pruned in channels": lambda m: prune.ln_structured(m.layers[2][0], "weight", 0.5, n=2, dim=0),
    "weight norm": lambda m: [parametrizations.weight_norm(m.layers[k][0]) for k in (1, 2)],
    "spectral norm": lambda m: [parametrizations.spectral_norm(m.layers[k][0]) for k in (1, 2)],
    "spectral norm by hooks": lambda m: nn.utils.spectral_norm(m.layers[2][0]),
    "orthogonal": lambda m: parametrizations.orthogonal(m.fc),
}


def step_of(model: nn.Module, network: LocalNetwork | None) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers of a step: by the library, or by ``loss.backward()``."""
    images, labels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(6) % CLASSES
    torch.manual_seed(4)
    if network is None:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
    else:
        (loss,) = localgrad.backward(network, images, labels).values()
    return loss.detach(), gradients(model), {name: b.clone() for name, b in model.named_buffers()}


def assert_plain(change: Callable[[Convs], object], before: bool) -> None:
    plain, model = Convs(), Convs()
    example = torch.rand(2, 3, 8, 8)
    torch.manual_seed(6)
    change(plain)
    torch.manual_seed(6)
    if before:
        change(model)
    networks = [localize(model, method, ("layers.1", "layers.2"), example=example) for method in (E2E, DGL)]
    if not before:
        change(model)
    expected, found = step_of(plain, None), step_of(model, networks[0])
    assert torch.equal(found[0], expected[0])
    assert_same(found[1], expected[1])
    assert_same(found[2], expected[2])
    model.zero_grad()
    for _ in range(2):  # the next step too: doors and eyes are put on again
        localgrad.backward(networks[1], *(torch.rand(6, 3, 8, 8), torch.arange(6) % CLASSES))
    assert gradients(model).keys() == expected[1].keys()


# Torch's word on the first module of any model, and so on the first of a block.
NO_GRADIENT_OF_INPUTS = pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")


@NO_GRADIENT_OF_INPUTS
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [False, True], ids=["after localize", "before localize"])
def test_what_is_changed_in_a_model_counts(change: str, before: bool) -> None:
    assert_plain(CHANGES[change], before)


@pytest.mark.parametrize("dressing", DRESSINGS)
def test_pruned_and_parametrized_layers_at_a_cut(dressing: str) -> None:
    assert_plain(DRESSINGS[dressing], before=True)


@pytest.mark.parametrize("dressing", [name for name in DRESSINGS if name != "orthogonal"])
def test_parameters_that_come_after_the_cut_ask_for_another(dressing: str) -> None:
    model = Convs()
    network = localize(model, DGL, ("layers.1", "layers.2"), example=torch.rand(2, 3, 8, 8))
    DRESSINGS[dressing](model)
    with pytest.raises(PartitionError, match=r"layers\.[12]\.0.*localize again"):
        localgrad.backward(network, torch.rand(6, 3, 8, 8), torch.arange(6) % CLASSES)


@NO_GRADIENT_OF_INPUTS
def test_hooks_are_called_once_a_step_and_see_what_the_model_computes() -> None:
    plain, model = Convs(), Convs()
    network = localize(model, E2E, ("layers.1", "layers.2"), example=torch.rand(2, 3, 8, 8))
    seen: dict[str, list[tuple[str, Any]]] = {"plain": [], "local": []}
    for key, one in (("plain", plain), ("local", model)):
        log = seen[key]
        for name, module in one.named_modules():
            if not name:
                continue
            module.register_forward_pre_hook(lambda m, a, name=name, log=log: log.append((f"in {name}", a[0].detach())))
            module.register_forward_hook(lambda m, a, o, name=name, log=log: log.append((f"out {name}", o.detach())))
            module.register_full_backward_hook(lambda m, i, o, name=name, log=log: log.append((f"back {name}", o[0])))
    step_of(plain, None)
    step_of(model, network)
    assert [name for name, _ in seen["local"]] == [name for name, _ in seen["plain"]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen["local"], seen["plain"], strict=True))


def test_hooks_on_all_modules_are_called_once_a_step() -> None:
    model = Convs()
    network = localize(model, DGL, ("layers.1", "layers.2"), example=torch.rand(2, 3, 8, 8))
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        step_of(model, None)
        plain = list(called)
        called.clear()
        localgrad.backward(network, torch.rand(6, 3, 8, 8), torch.arange(6) % CLASSES)
    finally:
        handle.remove()
    own = set(model.modules())
    assert [module for module in called if module in own] == plain


@pytest.mark.parametrize("name", ["dgl", "e2e"])
def test_optimizers_that_step_in_the_backward_pass(name: str) -> None:
    """Parameters that move as soon as their gradient is there, as in LOMO: one backward pass brings all of it."""
    expected, network = network_of(Net(), METHODS[name]), network_of(Net(), METHODS[name])
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)

    def move(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(move)
    for step in range(2):
        localgrad.backward(expected, X, Y, step)
        optimizer.step()
        optimizer.zero_grad()
        localgrad.backward(network, X, Y, step)
    for one, other in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Saving(Net):
    """Keeps what its layers save on the host."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


@BY_METHOD
@pytest.mark.parametrize("where", ["in the forward", "around the step"])
def test_saved_tensors_on_the_host(name: str, where: str) -> None:
    expected = trained(network_of(Net(dropout=0.1), METHODS[name]))
    network = network_of(Saving(dropout=0.1) if where == "in the forward" else Net(dropout=0.1), METHODS[name])
    if where == "in the forward":
        assert_same(trained(network), expected)
    else:
        with torch.autograd.graph.save_on_cpu():
            assert_same(trained(network), expected)


@BY_METHOD
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomalies_can_be_looked_for(name: str) -> None:
    expected = trained(network_of(Net(), METHODS[name]))
    network = network_of(Net(), METHODS[name])
    with torch.autograd.detect_anomaly():
        assert_same(trained(network), expected)
    network.model.layers[3].register_forward_hook(lambda module, args, output: output * float("nan"))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values"):
        trained(network)


def test_copies_of_a_network_in_training_are_independent() -> None:
    network = network_of(Net())
    expected = trained(network)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert_same(trained(network), expected)
