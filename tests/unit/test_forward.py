"""The model's own forward, suspended: contexts inside it, abandoned steps, and whatever else a model does."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import greenlet
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import localgrad
from gradients import assert_same, gradients
from localgrad.errors import PartitionError, TrainingError
from localgrad.forward import SuspendedForward
from localgrad.methods import accumulation, dgl, e2e, windows
from localgrad.spans import Span
from localgrad.suspension import thread_state
from localgrad.suspension.frames import held_by_frames

TASK = localgrad.tasks.classification(3)
DGL = dgl(TASK, head="linear")
METHODS = {
    "dgl": DGL,
    "windows": windows(DGL),
    "e2e": e2e(TASK),
    "accumulation": accumulation(DGL, parts=2),
}
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def data(size: int = 12, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, width, generator=generator), torch.arange(size) % 3


def state() -> tuple[object, ...]:
    return thread_state.values(), thread_state.heights(), torch.is_inference_mode_enabled()


def left_on(model: nn.Module) -> list[str]:
    """Modules on which a step has left something."""
    return [
        name
        for name, module in model.named_modules()
        if "_compiled_call_impl" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    ]


def step(network: localgrad.LocalNetwork, seed: int = 5, inputs: Any = None) -> dict[str, Tensor | None]:
    """The gradients of one step."""
    x, y = data()
    network.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    for _, loss in localgrad.local_losses(network, x if inputs is None else inputs, y):
        loss.backward()
    return gradients(network)


def localized(model: nn.Module, method: localgrad.Method = DGL, cuts: Any = ("b", "c"), **options: Any) -> Any:
    torch.manual_seed(1)
    return localgrad.localize(model, method, cuts, example=data(4)[0], **options)


class Net(nn.Module):
    """Three blocks that begin at ``a``, ``b`` and ``c``; the last two in a context; dropout, a skip, a ``finally``."""

    def __init__(self, context: Context = contextlib.nullcontext) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.3)
        self.context, self.begun, self.left = context, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.begun += 1
        try:
            x = torch.tanh(self.a(x)).float()
            with self.context():
                x = self.drop(torch.tanh(self.b(x)))
                x = self.c(x)
            return x.float()
        finally:
            self.left += 1


class Skips(Net):
    """The same with what the first module made read again in the last block."""

    def forward(self, x: Tensor) -> Tensor:
        self.begun += 1
        try:
            early = self.a(x)
            x = torch.tanh(self.b(torch.tanh(early)))
            return self.c(x + early)
        finally:
            self.left += 1


# --- contexts inside the forward ---------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def several() -> Iterator[None]:
    with CONTEXTS["autocast"](), Dispatched(), CONTEXTS["device"](), CONTEXTS["hooks"](), float64_by_default():
        yield


def autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


CONTEXTS: dict[str, Context] = {
    "nothing": contextlib.nullcontext,
    "autocast": autocast,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast without cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "device": lambda: torch.device("meta"),
    "dispatch mode": Dispatched,
    "function mode": Functions,
    "counter": lambda: FlopCounterMode(display=False),
    "save on cpu": torch.autograd.graph.save_on_cpu,
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "dtype": float64_by_default,
    "enable_grad": torch.enable_grad,
    "record_function": lambda: torch.profiler.record_function("blocks"),
    "several": several,
}
CALLERS: dict[str, Context] = {
    "plain": contextlib.nullcontext,
    "autocast": autocast,
    "counter": lambda: FlopCounterMode(display=False),
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


def by_hand(network: localgrad.LocalNetwork, x: Tensor, y: Tensor, share: float, caller: Context) -> None:
    """Blocks one after the other; a head runs under the autocast in which its features were made, like the model."""
    model = network.model

    def go_back(features: Tensor, span: tuple[int, int], autocast: torch.dtype | None) -> None:
        with torch.autocast("cpu", autocast) if autocast is not None else contextlib.nullcontext():
            (output,) = network.auxiliary_of(Span(*span))(features)
            loss = F.cross_entropy(output, y)
        (loss * share).backward()

    with caller():
        made = torch.tanh(model.a(x)).float()
        with model.context():
            under = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        go_back(made, (0, 1), under)
    with caller():
        with model.context():
            made = model.drop(torch.tanh(model.b(made.detach())))
        go_back(made, (1, 2), under)
    with caller():
        with model.context():
            made = model.c(made.detach())
        (F.cross_entropy(made.float(), y) * share).backward()


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("parts", [1, 2])
def test_contexts_inside_the_forward_stay_there(name: str, caller: str, parts: int) -> None:
    """Both micro-batches are suspended inside the context at once, and leave it in the order in which they entered."""
    net = Net(CONTEXTS[name])
    net.drop.p = 0.0
    network = localized(net, accumulation(DGL, parts=parts))
    reference = copy.deepcopy(network)
    x, y = data()
    with CALLERS[caller]():
        before, seen = state(), 0
        for _, loss in localgrad.local_losses(network, x, y):
            assert state() == before
            loss.backward()
            assert state() == before
            seen += 1
        assert state() == before and seen == 3 * parts
    for part, (xs, ys) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        assert net.left == net.begun, part
        by_hand(reference, xs, ys, 1 / parts, CALLERS[caller])
    assert_same(gradients(network), gradients(reference))


@pytest.mark.parametrize("name", ["no_grad", "inference_mode", "reentrant checkpointing"])
def test_a_cut_without_gradients_is_refused(name: str) -> None:
    """They are entered after the model was cut, or the cut would not have been offered."""
    net = Net()
    network = localized(net)
    if name == "reentrant checkpointing":
        net.forward = lambda x: net.c(checkpoint(lambda t: net.b(t), torch.tanh(net.a(x)), use_reentrant=True))
    else:
        net.context = getattr(torch, name)
    before = state()
    with pytest.raises(PartitionError, match=r"with which a block begins, under torch.no_grad"):
        step(network)
    assert state() == before and not left_on(net)
    assert name == "reentrant checkpointing" or net.left == net.begun


def test_inference_mode_inside_an_evaluated_forward_stays_there_or_is_refused() -> None:
    net = Net()
    network = localized(net).eval()
    net.context = torch.inference_mode
    before, seen = state(), []
    with contextlib.suppress(PartitionError):
        for _ in localgrad.local_outputs(network, data()[0]):
            seen.append(state()[2])
    assert state() == before and not any(seen)


def test_floating_point_operations_are_counted_once() -> None:
    network = localized(Net())
    reference = copy.deepcopy(network)
    x, y = data()
    with FlopCounterMode(display=False) as found:
        step(network)
    with FlopCounterMode(display=False) as expected:
        by_hand(reference, x, y, 1.0, contextlib.nullcontext)
    assert found.get_total_flops() == expected.get_total_flops() > 0


def test_a_shared_weight_is_cast_anew_after_its_step() -> None:
    """Autocast keeps cast weights; a block that steps before the next one runs must not leave its old weights there."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.tied, self.b = (nn.Linear(6, 6) for _ in range(3))
            self.c = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.b(torch.tanh(self.tied(torch.tanh(self.stem(x)))))
                return self.c(torch.tanh(self.tied(torch.tanh(x))))

    network = localized(Tied(), cuts=("b", "c"), shared=True)
    tied = network.model.tied
    calls: list[tuple[Tensor, Tensor]] = []
    tied.register_forward_hook(lambda module, args, output: calls.append((args[0].detach(), output.detach())))
    for span, loss in localgrad.local_losses(network, *data()):
        loss.backward()
        if span.start == 0:
            with torch.no_grad():
                tied.weight.add_(1.0)
    (_, _), (features, output) = calls
    assert torch.equal(output, F.linear(features, tied.weight.bfloat16(), tied.bias.bfloat16()))


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_context_variables_of_caller_and_forward_do_not_mix() -> None:
    seen: list[str] = []

    class Setting(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(VARIABLE.get())
            token = VARIABLE.set("forward")
            x = self.b(torch.tanh(self.a(x)))
            seen.append(VARIABLE.get())
            VARIABLE.reset(token)
            return self.c(torch.tanh(x))

    network = localized(Setting())
    seen.clear()
    token = VARIABLE.set("caller")
    for _, loss in localgrad.local_losses(network, *data()):
        assert VARIABLE.get() == "caller"
        loss.backward()
    VARIABLE.reset(token)
    assert seen == ["caller", "forward"]


# --- abandoned steps ---------------------------------------------------------------------------------------------


class Failed(Exception):
    pass


HELD: list[Any] = []


def stop(network: localgrad.LocalNetwork) -> None:
    for _, loss in localgrad.local_losses(network, *data()):
        loss.backward()
        break


def fail(network: localgrad.LocalNetwork, error: type[BaseException] = Failed) -> None:
    with pytest.raises(error):
        for span, loss in localgrad.local_losses(network, *data()):
            loss.backward()
            if span.stop == network.spans(0)[-1].stop or len(network.spans(0)) > 1:
                raise error


def interrupt(network: localgrad.LocalNetwork) -> None:
    fail(network, KeyboardInterrupt)


def forget(network: localgrad.LocalNetwork) -> None:
    with pytest.raises(TrainingError, match="was not back-propagated"):
        for _ in localgrad.local_losses(network, *data()):
            pass


def drop(network: localgrad.LocalNetwork) -> None:
    next(localgrad.local_losses(network, *data()))[1].backward()


def hold(network: localgrad.LocalNetwork) -> None:
    steps = localgrad.local_losses(network, *data())
    next(steps)[1].backward()
    HELD[:] = [steps]  # the one from before is closed by this


def fail_in_the_loss(network: localgrad.LocalNetwork) -> None:
    x, y = data()
    with pytest.raises(localgrad.TrainingError, match="was given the class"):
        for _, loss in localgrad.local_losses(network, x, y + 7):
            loss.backward()


def fail_in_the_forward(network: localgrad.LocalNetwork) -> None:
    def refuse(module: nn.Module, args: Any) -> None:
        raise Failed

    handle = network.model.b.register_forward_pre_hook(refuse)
    with pytest.raises(Failed):
        for _, loss in localgrad.local_losses(network, *data()):
            loss.backward()
    handle.remove()


def fail_in_the_backward_pass(network: localgrad.LocalNetwork) -> None:
    def refuse(gradient: Tensor) -> None:
        raise Failed

    handle = network.model.a.weight.register_hook(refuse)
    with pytest.raises(Failed):
        for _, loss in localgrad.local_losses(network, *data()):
            loss.backward()
    handle.remove()


def fail_when_a_block_is_done(network: localgrad.LocalNetwork) -> None:
    def refuse(block: int) -> None:
        raise Failed

    with pytest.raises(Failed):
        for _, loss in localgrad.local_losses(network, *data(), on_block_done=refuse):
            loss.backward()


WAYS: dict[str, Callable[[localgrad.LocalNetwork], None]] = {
    way.__name__: way
    for way in (stop, fail, interrupt, forget, drop, hold, fail_in_the_loss, fail_in_the_forward,
                fail_in_the_backward_pass, fail_when_a_block_is_done)
}  # fmt: skip


@pytest.mark.parametrize("context", ["nothing", "several"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_an_abandoned_step_leaves_nothing_behind(way: str, method: str, context: str) -> None:
    net = Net(CONTEXTS[context])
    network = localized(net, METHODS[method])
    expected = step(copy.deepcopy(network))
    before = state()
    with autocast():
        inside = state()
        WAYS[way](network)
        assert state() == inside
        HELD.clear()  # what was held is closed here
    assert state() == before
    assert net.left == net.begun and not left_on(net)
    assert_same(step(network), expected)


def test_a_step_that_somebody_holds_may_be_closed_at_any_time() -> None:
    net = Net(CONTEXTS["several"])
    network = localized(net)
    expected = step(copy.deepcopy(network))
    steps = localgrad.local_losses(network, *data())
    next(steps)[1].backward()
    with torch.no_grad(), autocast():
        before = state()
        steps.close()
        assert state() == before
    assert net.left == net.begun and not left_on(net)
    steps.close()
    assert next(steps, None) is None
    assert_same(step(network), expected)


def test_a_whole_step_may_run_while_somebody_holds_another() -> None:
    network = localized(Skips())
    expected = step(copy.deepcopy(network))
    steps = localgrad.local_losses(network, *data())
    next(steps)[1].backward()
    assert_same(step(network), expected)
    steps.close()
    assert not left_on(network.model) and network.model.left == network.model.begun


def test_a_step_goes_on_when_an_older_one_of_the_same_network_is_closed() -> None:
    network = localized(Net())
    expected = step(copy.deepcopy(network))
    older = localgrad.local_losses(network, *data())
    next(older)[1].backward()
    network.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    newer = localgrad.local_losses(network, *data())
    next(newer)[1].backward()
    older.close()
    for _, loss in newer:
        loss.backward()
    found, left = gradients(network), left_on(network.model)
    for module in network.model.modules():
        vars(module).pop("_compiled_call_impl", None)
    assert not left
    assert_same(found, expected)


class Abandoned(Exception):
    pass


@pytest.mark.parametrize("error", [Abandoned, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_may_be_abandoned_at_every_row_of_its_timetable(
    method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Skips()
    network = localized(net, METHODS[method])
    expected = step(copy.deepcopy(network))
    real = localgrad.engine.timetable
    number = len(real(network.spans(0), 3, METHODS[method].micro_batches))
    assert number >= 8
    for last in range(number + 1):

        def cut_short(*args: Any, last: int = last, **kwargs: Any) -> Iterator[Any]:
            for index, row in enumerate(real(*args, **kwargs)):
                if index == last:
                    raise error
                yield row

        with monkeypatch.context() as patch, contextlib.suppress(error):
            patch.setattr("localgrad.engine.timetable", cut_short)
            step(network)
        assert net.left == net.begun and not left_on(net), last
        assert_same(step(network), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_may_be_left_at_every_loss_before_and_after_its_backward_pass(method: str) -> None:
    net = Skips()
    network = localized(net, METHODS[method])
    expected = step(copy.deepcopy(network))
    count = METHODS[method].micro_batches * len(network.spans(0))
    for last in range(count):
        for backward in (False, True):
            for index, (_, loss) in enumerate(localgrad.local_losses(network, *data())):
                if index < last or backward:
                    loss.backward()
                if index == last:
                    break
            del loss
            assert net.left == net.begun and not left_on(net), last
            assert_same(step(network), expected)


def test_an_abandoned_step_of_evaluation_leaves_nothing_behind() -> None:
    net = Net(CONTEXTS["several"])
    network = localized(net).eval()
    before = state()
    for _ in localgrad.local_outputs(network, data()[0]):
        break
    for _ in localgrad.features(network, data()[0]):
        break
    assert state() == before and net.left == net.begun and not left_on(net)


class Stubborn(Net):
    """Goes on, whatever is thrown at it."""

    def forward(self, x: Tensor) -> Tensor:
        self.begun += 1
        x = torch.tanh(self.a(x))
        for module in (self.b, self.b, self.c):
            try:
                x = module(x)
            except:  # noqa: E722
                self.left += 1
                x = torch.zeros(x.shape[0], module.out_features)
        return x


def test_a_model_that_catches_everything_ends_all_the_same() -> None:
    net = Stubborn()
    network = localized(net)
    stop(network)
    assert net.left == 2  # at b, and again at c; the second call of b is no cut
    assert not left_on(net)
    expected = step(copy.deepcopy(network))
    assert_same(step(network), expected)


class Renaming(Net):
    """Turns whatever is thrown at it into an error of its own."""

    def forward(self, x: Tensor) -> Tensor:
        self.begun += 1
        try:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        except BaseException as error:
            raise Failed("renamed") from error
        finally:
            self.left += 1


def test_all_forwards_are_closed_even_if_one_fails_in_it() -> None:
    net = Renaming()
    network = localized(net, accumulation(DGL, parts=3))
    steps = localgrad.local_losses(network, *data())
    for _ in range(3):
        next(steps)[1].backward()
    with contextlib.suppress(Failed):
        steps.close()
    assert (net.begun - net.left, left_on(net)) == (0, [])


# --- what stays constant -----------------------------------------------------------------------------------------


def alive() -> tuple[int, int]:
    """Tensors and suspended forwards."""
    gc.collect()
    objects = gc.get_objects()
    return (
        sum(issubclass(type(one), Tensor) for one in objects),
        sum(issubclass(type(one), SuspendedForward) for one in objects),
    )


@pytest.mark.parametrize("way", ["finish", *WAYS])
def test_five_hundred_steps_leave_nothing(way: str) -> None:
    net = Skips()
    network = localized(net, METHODS["accumulation"])

    def finish(network: localgrad.LocalNetwork) -> None:
        localgrad.backward(network, *data())

    run = WAYS.get(way, finish)
    for _ in range(2):
        run(network)
    HELD.clear()
    before = alive()
    for _ in range(500):
        run(network)
    assert len(HELD) <= 1
    HELD.clear()
    assert all(now <= then for now, then in zip(alive(), before, strict=True))
    assert net.left == net.begun


# --- in the middle of a step -------------------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DURING: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "save": saved,
    "state_dict": lambda model: model.state_dict(),
    "plain call": lambda model: model(data()[0]),
    "plain training step": lambda model: copy.deepcopy(model)(data()[0]).sum().backward(),
}


@pytest.mark.parametrize("kind", [Net, Skips])
@pytest.mark.parametrize("what", DURING)
def test_in_the_middle_of_a_step(what: str, kind: type[Net]) -> None:
    """At each loss; the step then goes on as if nothing had happened."""
    net = kind()
    net.drop.p = 0.0
    network = localized(net, METHODS["accumulation"])
    expected, x = step(copy.deepcopy(network)), data()[0]
    plain = net(x).detach()
    network.zero_grad(set_to_none=True)
    for _, loss in localgrad.local_losses(network, x, data()[1]):
        result = DURING[what](net)
        if what == "plain call":
            assert torch.equal(result, plain)
        elif isinstance(result, nn.Module):
            assert all("_compiled_call_impl" not in vars(module) for module in result.modules())
            assert torch.equal(result(x), plain)
        loss.backward()
    assert_same(gradients(network), expected)


@pytest.mark.parametrize("what", ["deepcopy", "pickle", "save"])
def test_copies_made_in_a_step_have_nothing_of_it(what: str) -> None:
    network = localized(Skips())
    for _, loss in localgrad.local_losses(network, *data()):
        assert not left_on(DURING[what](network.model))
        loss.backward()


def test_whole_networks_may_be_copied_in_a_step() -> None:
    network = localized(Net())
    expected = step(network)
    network.zero_grad(set_to_none=True)
    for _, loss in localgrad.local_losses(network, *data()):
        other = copy.deepcopy(network)
        loss.backward()
    assert_same(step(other), expected)


# --- threads, coroutines, processes, debuggers -------------------------------------------------------------------


def test_two_steps_take_turns_in_coroutines() -> None:
    networks = [localized(Net(CONTEXTS["several"])), localized(Skips())]
    expected = [step(copy.deepcopy(network)) for network in networks]
    networks[0].model.drop.p = networks[1].model.drop.p = 0.0
    expected = [step(copy.deepcopy(network)) for network in networks]

    async def train(network: localgrad.LocalNetwork) -> None:
        network.zero_grad(set_to_none=True)
        for _, loss in localgrad.local_losses(network, *data()):
            await asyncio.sleep(0)
            loss.backward()
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(*map(train, networks))

    before = state()
    asyncio.run(both())
    assert state() == before
    for network, gradient in zip(networks, expected, strict=True):
        assert_same(gradients(network), gradient)


def test_a_step_may_be_advanced_from_other_greenlets() -> None:
    """As under gevent."""
    network = localized(Net(CONTEXTS["several"]))
    expected = step(copy.deepcopy(network))
    torch.manual_seed(5)
    steps = localgrad.local_losses(network, *data())
    for _ in range(3):
        greenlet.greenlet(lambda: next(steps)[1].backward()).switch()
    assert next(steps, None) is None
    assert_same(gradients(network), expected)


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns, or raises, in another thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_a_step_that_is_advanced_from_another_thread_is_refused() -> None:
    net = Net()
    network = localized(net)
    expected = step(copy.deepcopy(network))
    steps = localgrad.local_losses(network, *data())
    next(steps)[1].backward()
    before = state()
    refused = in_thread(steps.__next__)
    assert isinstance(refused, localgrad.TrainingError) and "in one thread" in str(refused)
    assert next(steps, None) is None
    del steps
    assert not left_on(net) and state() == before
    assert_same(step(network), expected)
    assert state() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", ["advanced", "collected"])
def test_a_forward_that_another_thread_could_not_close_ends_by_the_next_step(way: str) -> None:
    """A step that is advanced in another thread, or collected there, as part of a reference cycle."""
    network = localized(Net())
    steps = localgrad.local_losses(network, *data())
    next(steps)[1].backward()
    if way == "advanced":
        in_thread(steps.__next__)
    else:
        gc.disable()
        cycle: list[Any] = [steps]
        cycle.append(cycle)
        del steps, cycle
        in_thread(gc.collect)
        gc.enable()
    step(network)
    assert network.model.left == network.model.begun


def test_a_step_whose_thread_has_ended_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward died with the thread; a later thread, which may have the same identity, is not disturbed."""
    monkeypatch.setattr("localgrad.opened._LEFT", {})  # what is left there is this test's own
    network = localized(Net())
    expected = step(copy.deepcopy(network))

    def begin() -> Any:
        steps = localgrad.local_losses(network, *data())
        next(steps)[1].backward()
        return steps

    for _ in range(3):
        in_thread(begin).close()
        assert not left_on(network.model)
        found = in_thread(lambda: step(network))
        assert not isinstance(found, BaseException), found
        assert_same(found, expected)


def test_steps_in_threads_of_their_own() -> None:
    networks = [localized(Net(autocast)), localized(Skips())]  # default dtypes and attention kernels are global
    for network in networks:
        network.model.drop.p = 0.0
    expected = [step(copy.deepcopy(network)) for network in networks]

    def train(network: localgrad.LocalNetwork) -> dict[str, Tensor | None]:
        for _ in range(20):
            network.zero_grad(set_to_none=True)
            localgrad.backward(network, *data())
        return gradients(network)

    found: list[Any] = [None, None]
    threads = [
        threading.Thread(target=lambda k=k: found.__setitem__(k, train(networks[k]))) for k in range(len(networks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, gradient in zip(found, expected, strict=True):
        assert_same(one, gradient)


def test_a_module_that_runs_in_another_thread_meanwhile_is_not_suspended() -> None:
    """Autograd recomputes checkpointed regions in threads of its own on some devices."""
    network = localized(Net())
    network.model.drop.p = 0.0
    expected, plain = step(copy.deepcopy(network)), network.model(data()[0]).detach()
    network.zero_grad(set_to_none=True)
    for _, loss in localgrad.local_losses(network, *data()):
        assert torch.equal(in_thread(lambda: network.model(data()[0])), plain)
        loss.backward()
    assert_same(gradients(network), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_may_be_forked_in_a_step() -> None:
    network = localized(Net())
    expected = step(copy.deepcopy(network))
    network.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    steps = localgrad.local_losses(network, *data())
    next(steps)[1].backward()
    with torch.random.fork_rng():
        loader = torch.utils.data.DataLoader(torch.randn(8, 4), num_workers=1, multiprocessing_context="fork")
        assert sum(len(batch) for batch in loader) == 8
    for _, loss in steps:
        loss.backward()
    assert_same(gradients(network), expected)


def test_debuggers_and_profilers_see_the_forward_and_change_nothing() -> None:
    network = localized(Skips())
    expected = step(copy.deepcopy(network))
    seen: set[str] = set()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        seen.add(frame.f_code.co_qualname)
        return trace

    def profile(frame: Any, event: str, arg: Any) -> None:
        seen.add("profiled " + frame.f_code.co_qualname)

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        found = step(network)
    finally:
        sys.settrace(tracing)
    assert_same(found, expected)
    sys.setprofile(profile)
    try:
        found = step(network)
    finally:
        sys.setprofile(None)
    assert_same(found, expected)
    assert {"Skips.forward", "step", "profiled Skips.forward", "profiled step"} <= seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found = step(network)
    assert_same(found, expected)
    linear = [event.count for event in profiler.key_averages() if event.key == "aten::linear"]
    assert linear == [5]  # three of the model's and two heads


# --- local variables ---------------------------------------------------------------------------------------------


def test_tensors_are_found_in_variables_lists_tuples_and_mappings_of_all_frames() -> None:
    w = torch.ones(2, requires_grad=True)

    def inner(given: Tensor, leaf: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
        listed, named, nested = [given * 2, leaf], {"x": given * 3}, ({"y": [given * 4]},)
        number = 5
        del number
        found = list(held_by_frames(sys._getframe()))
        assert len(listed) + len(named) + len(nested) == 4
        return found

    def outer() -> list[tuple[tuple[str, ...], Tensor]]:
        mine = w * 1
        return inner(mine, w)

    found = [(tag[2], tensor.detach()[0].item()) for tag, tensor in outer() if "<locals>" in tag[1]]
    assert found == [("given", 1), ("listed", 2), ("named", 3), ("nested", 4), ("mine", 1)]


def test_looking_into_frames_keeps_nothing_alive() -> None:
    """Before Python 3.13 a frame that was looked into keeps a copy of its variables."""
    w = torch.ones(2, requires_grad=True)

    def function() -> None:
        tensor = w * 2
        listed = [w * 3]
        refs = [weakref.ref(tensor), weakref.ref(listed[0])]
        assert {tag[2] for tag, _ in held_by_frames(sys._getframe())} >= {"tensor", "listed"}
        del tensor
        listed.clear()
        assert [ref() for ref in refs] == [None, None]

    function()


class Containers(Net):
    """What crosses lies in a list and a mapping, local variables both, and is read behind the second cut."""

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        named: dict[str, Tensor] = {}
        x = torch.tanh(self.a(x))
        skips.append(torch.sin(x))
        named["x"] = torch.cos(x)
        x = torch.tanh(self.b(x * 2))
        skips.append(x * 3)
        return self.c(x + skips.pop(0) + named["x"] + skips[0])


def test_what_crosses_in_lists_and_mappings_is_cut_from_its_graph() -> None:
    network = localized(Containers())
    reference = copy.deepcopy(network)
    for _ in range(2):  # the first step is checked, the second is not
        found = step(network)
    model, (x, y) = reference.model, data()
    made = torch.tanh(model.a(x))
    F.cross_entropy(reference.auxiliary_of(Span(0, 1))(made * 2)[0], y).backward()
    made = made.detach()
    sine, cosine = torch.sin(made), torch.cos(made)
    made = torch.tanh(model.b(made * 2))
    read = made + sine + cosine + made * 3
    F.cross_entropy(reference.auxiliary_of(Span(1, 2))(read)[0], y).backward()
    F.cross_entropy(model.c(read.detach()), y).backward()
    assert_same(found, gradients(reference))


def test_what_frames_hold_is_freed_after_its_last_reader() -> None:
    """The variable ``x``, and the arguments of the container, stay until the forward ends; their data does not."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Linear(6, 8), nn.Tanh()
            self.rest = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.a(x))
            y = self.rest(x)
            assert x.shape == (12, 8) or not seen
            return y

    seen: list[weakref.ref[torch.UntypedStorage]] = []
    network = localized(Outer(), cuts=("rest.0", "rest.2", "rest.4"))
    step(network)
    network.model.act.register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(output.untyped_storage()))
    )
    found = []
    gc.disable()
    try:
        for _, loss in localgrad.local_losses(network, *data()):
            found.append(seen[0]() is not None)
            loss.backward()
    finally:
        gc.enable()
    assert found == [True, True, False, False]


def test_a_caller_that_keeps_its_locals_may_localize() -> None:
    """``config = locals()`` is how many scripts begin."""

    def script(lr: float = 0.1) -> None:
        config = locals()
        localized(Net())
        assert config["lr"] == 0.1

    script()


def test_a_forward_may_keep_its_locals() -> None:
    class Keeping(Net):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            given = locals()
            x = self.b(torch.tanh(self.a(x)))
            return self.c(torch.tanh(x)) * given["scale"]

    step(localized(Keeping()))


def test_localize_looks_into_no_frame_outside_the_model() -> None:
    """What only the caller holds is not found in training either; and it may hold lists of millions."""
    outside: list[Tensor] = []

    class Outside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.outside = outside

        def forward(self, x: Tensor) -> Tensor:
            self.outside[:] = [torch.sin(self.a(x))]
            x = self.b(torch.tanh(self.outside[0] * 2))
            return self.c(torch.tanh(x)) + self.outside[0].mean()

    with pytest.raises(PartitionError, match=r"cuts: 'b' is no cut point: a tensor made by SinBackward0 crosses"):
        localized(Outside())


# --- how modules are called --------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Layers that are skipped as ``skipped`` says (layer drop); a block begins with each."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.Linear(8, 3)
        self.skipped: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, layer in enumerate(self.layers):
            if index not in self.skipped:
                x = x + torch.tanh(layer(x))
        return self.head(x)


DROPPED = ("layers.0", "layers.1", "layers.2", "layers.3", "head")


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("skipped", [set(), {0}, {1}, {3}, {0, 1}, {1, 3}, {0, 1, 2}, {0, 1, 2, 3}], ids=str)
def test_layer_drop_joins_blocks(skipped: set[int], parts: int) -> None:
    """A layer that is skipped begins no block: what follows belongs to the block before, and the loss between rests."""
    network = localized(Dropping(), accumulation(DGL, parts=parts), DROPPED)
    reference = copy.deepcopy(network)
    network.model.skipped = skipped
    x, y = data()
    for _ in range(2):
        network.zero_grad(set_to_none=True)
        ends = []
        for span, loss in localgrad.local_losses(network, x, y):
            ends.append(span.stop)
            loss.backward()
    reached = [boundary for boundary in range(1, 6) if boundary - 1 not in skipped]
    assert sorted(ends) == sorted([*reached, 6] * parts)

    model = reference.model
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        made = model.stem(xs)
        for boundary in range(1, 6):
            if boundary in reached:
                (output,) = reference.auxiliary_of(Span(boundary - 1, boundary))(made)
                (F.cross_entropy(output, ys) / parts).backward()
                made = made.detach()
            if boundary < 5 and boundary in reached:
                made = made + torch.tanh(model.layers[boundary - 1](made))
        (F.cross_entropy(model.head(made), ys) / parts).backward()
    assert_same(gradients(network), gradients(reference))


@pytest.mark.parametrize("skipped", [{0}, {1, 3}, {0, 1, 2, 3}], ids=str)
def test_joined_blocks_step_when_their_graph_has_gone_back(skipped: set[int]) -> None:
    """A step per block ends at the weights that one step at the end of the loop gives."""
    network = localized(Dropping(), DGL, DROPPED)
    reference = copy.deepcopy(network)
    network.model.skipped = reference.model.skipped = skipped
    optimizers = [torch.optim.SGD(network.block_parameters(k), 0.1) for k in range(network.num_blocks)]
    done: list[int] = []

    def move(block: int) -> None:
        done.append(block)
        optimizers[block].step()
        optimizers[block].zero_grad(set_to_none=True)

    for _, loss in localgrad.local_losses(network, *data(), on_block_done=move):
        loss.backward()
    assert sorted(done) == list(range(network.num_blocks))
    step(reference)
    torch.optim.SGD(reference.parameters(), 0.1).step()
    for found, expected in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_layer_drop_at_random_under_windows() -> None:
    """Joined blocks share a span's way back; the gradient is that of plain spans over the joined blocks."""
    network = localized(Dropping(), windows(DGL), DROPPED)
    x, y = data()
    for pattern in ({1}, {0, 2}, {3}, set(), {0, 1, 2, 3}):
        network.model.skipped = pattern
        network.zero_grad(set_to_none=True)
        seen = []
        for span, loss in localgrad.local_losses(network, x, y):
            seen.append((span.start, span.stop))
            loss.backward()
        assert all(stop == 6 or stop - 1 not in pattern for _, stop in seen)
        for index, layer in enumerate(network.model.layers):
            assert (layer.weight.grad is None) == (index in pattern)
        assert network.model.stem.weight.grad is not None and network.model.head.weight.grad is not None


def test_layer_drop_frees_nothing_that_is_read_later() -> None:
    """One activation serves everywhere: what it made first is read last, what it made second is not."""

    class Shared(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            early = self.act(self.stem(x))
            x = early * 2
            if 0 not in self.skipped:
                x = self.layers[0](x)
            x = self.act(x)
            x = self.layers[1](x) + x
            x = self.layers[2](x * 1)
            return self.head(x + early)

    model = Shared()
    model.act = nn.Tanh()
    network = localized(model, DGL, ("layers.0", "layers.1", "layers.2", "head"))
    step(network)
    model.skipped = {0}
    step(network)


class Named(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(input=x))
        x = torch.tanh(self.b(input=x))
        return self.c(input=x)


def test_features_may_be_given_by_keyword() -> None:
    network, reference = localized(Named()), localized(Net())
    reference.model.drop.p = 0.0
    assert_same(step(network), step(reference))


class Mixed(Net):
    """A module that takes features by keyword, in a list, behind something else."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, scale: float, *, given: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, str]:
            return self.linear(given[0] * scale) + (0.0 if mask is None else mask), "and more"

    def __init__(self) -> None:
        super().__init__()
        self.b = self.Joined()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x, _ = self.b(2.0, given=[x], mask=torch.ones(8))
        return self.c(torch.tanh(x))


def test_features_may_lie_in_a_nest_behind_other_arguments() -> None:
    network = localized(Mixed())
    reference = copy.deepcopy(network)
    found = step(network)
    model, (x, y) = reference.model, data()
    made = torch.tanh(model.a(x))
    F.cross_entropy(reference.auxiliary_of(Span(0, 1))(made)[0], y).backward()
    made = torch.tanh(model.b.linear(made.detach() * 2.0) + torch.ones(8))
    F.cross_entropy(reference.auxiliary_of(Span(1, 2))(made)[0], y).backward()
    F.cross_entropy(model.c(made.detach()), y).backward()
    assert_same(found, gradients(reference))


class Twice(nn.Module):
    """One layer is called three times; blocks begin at its second and third call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        x = torch.tanh(self.b(x))
        return self.c(torch.tanh(self.b(x)))


def second_calls(method: localgrad.Method = DGL) -> Any:
    """A network of `Twice` in four blocks, of which two begin at later calls of ``b``."""
    from localgrad.partition.moments import Partition

    torch.manual_seed(1)
    model = Twice()
    partition = Partition(model, data(4)[0], shared=True)
    cuts = [cut for cut, _ in partition.all]
    assert [(cut.point.name, cut.point.call) for cut in cuts] == [("b", 0), ("b", 1), ("b", 2), ("c", 0)]
    chosen = localgrad.cuts.Chosen(partition, tuple(cuts[1:]), ())
    network = localgrad.localize(model, method, 4, example=data(4)[0], shared=True)
    assert [cut.point.call for cut in network.cuts] == [cut.point.call for cut in chosen.cuts]
    return network


def test_a_block_may_begin_at_a_later_call_of_a_module() -> None:
    network = second_calls()
    reference = copy.deepcopy(network)
    for _ in range(2):
        found = step(network)
    model, (x, y) = reference.model, data()
    made = torch.tanh(model.b(torch.tanh(model.a(x))))
    for block in range(2):
        F.cross_entropy(reference.auxiliary_of(Span(block, block + 1))(made)[0], y).backward()
        made = torch.tanh(model.b(made.detach()))
    F.cross_entropy(reference.auxiliary_of(Span(2, 3))(made)[0], y).backward()
    F.cross_entropy(model.c(made.detach()), y).backward()
    assert_same(found, gradients(reference))


def test_calls_are_counted_once_while_somebody_holds_another_step() -> None:
    network = second_calls()
    expected = step(copy.deepcopy(network))
    steps = localgrad.local_losses(network, *data())
    next(steps)[1].backward()
    try:
        found = step(network)
    finally:
        steps.close()
    assert_same(found, expected)


# --- what the model returns --------------------------------------------------------------------------------------


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None
    steps: int = 0


class Pair(NamedTuple):
    logits: Tensor
    name: str


class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda out: out),
    "dict": (lambda t: {"logits": t, "name": "x"}, lambda out: out["logits"]),
    "list": (lambda t: [t, None], lambda out: out[0]),
    "nest": (lambda t: {"x": [(t, 3)]}, lambda out: out["x"][0][0]),
    "dataclass": (lambda t: Answer(t), lambda out: out.logits),
    "namedtuple": (lambda t: Pair(t, "x"), lambda out: out.logits),
    "mapping": (lambda t: ModelOutput(logits=t, name="x"), lambda out: out.logits),
}


class Returning(Net):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


@dataclass(frozen=True)
class Reading:
    """Cross-entropy of what `unwrap` finds in the model's answer; heads answer with logits."""

    unwrap: Callable[[Any], Tensor]
    num_outputs: int = 3

    def head(self, proposed: localgrad.site.HeadBuilder) -> localgrad.site.HeadBuilder:
        return proposed

    def loss(self, output: Any, batch: localgrad.Batch) -> Tensor:
        return F.cross_entropy(output if isinstance(output, Tensor) else self.unwrap(output), batch.targets)


@pytest.mark.parametrize("method", ["dgl", "windows", "accumulation"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_kind(kind: str, method: str) -> None:
    wrap, unwrap = OUTPUTS[kind]
    make = {"dgl": lambda b: b, "windows": windows, "accumulation": lambda b: accumulation(b, parts=2)}[method]
    network = localized(Returning(wrap), make(dgl(Reading(unwrap), head="linear")))
    reference = localized(Returning(lambda t: t), make(DGL))
    assert_same(step(network), step(reference))
    observed: list[Any] = []
    for _, loss in localgrad.local_losses(
        network, *data(), on_output=lambda span, term, output: observed.append(output) if term is None else None
    ):
        loss.backward()
    assert all(type(output) is type(wrap(torch.ones(1))) for output in observed)
    assert not any(unwrap(output).requires_grad for output in observed)
    network.eval()
    (answer,) = (output for _, term, output in localgrad.local_outputs(network, data()[0]) if term is None)
    assert type(answer) is type(observed[0]) and torch.equal(unwrap(answer), unwrap(network(data()[0])))


def test_a_loss_may_read_what_the_model_returns_from_early_blocks() -> None:
    """Hidden states, attention maps, gates of experts."""

    class Early(Net):
        def forward(self, x: Tensor) -> Any:
            early = torch.tanh(self.a(x))
            return {"logits": self.c(torch.tanh(self.b(early))), "early": early}

    @dataclass(frozen=True)
    class Regularised(Reading):
        def loss(self, output: Any, batch: localgrad.Batch) -> Tensor:
            penalty = output["early"].square().mean() if isinstance(output, dict) else 0.0
            return super().loss(output, batch) + penalty

    network = localized(Early(), dgl(Regularised(lambda out: out["logits"]), head="linear"))
    reference = localized(Returning(lambda t: t))
    assert_same(step(network), step(reference))  # what block 0 made carries no gradient into the last loss
