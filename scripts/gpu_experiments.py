"""What `gpu_queue.py` runs, most urgent first. Only Python's own library: the machine may have nothing else yet."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = (
    "e2e", "dgl", "infopro", "predsim", "auglocal", "lean", "dgl+man", "dgl+man_pp", "dgl+mlaan", "dgl+hpff", "dgl+pgl",
    "dgl+sgr", "dgl+trgl",
)  # fmt: skip
# ResNet-32 on all 50,000 images; steps are recorded as CUDA graphs wherever `train.capture` says so by itself.
CIFAR = (
    "cifar10_resnet32", "train.batch_size=1024", "data.validation=0", "optim.lr=0.4", "optim.warmup_epochs=1",
    "train.precision=bf16", "train.channels_last=true", "train.device=cuda",
)  # fmt: skip
DIGITS = ("digits", "beside=[]", "data.limit=200", "train.device=cpu")
# Network of bench/ladder.py: images in a step, seconds with steps as they are, seconds more for the compiled rows.
LADDERS = {"resnet50": 256, "resnet101": 128, "vit_s": 256, "vit_b": 128, "swin_t": 128}
LINEAR = "{dgl: {head: linear}}"
TWO_BLOCKS = "[{lean: {depth: 3}}, {accumulation: {parts: 2}}]"  # what bench/push.py chose


@dataclass(frozen=True)
class Experiment:
    """One entry of the queue.

    Args:
        name: of its folder of results.
        priority: smaller ones first, equal ones in the order of the list.
        seconds: on an H200, start included; one that is larger than what is left of a call waits for the next call,
            unless it trains.
        decides: what is known afterwards.
        command: arguments of Python. ``{out}`` is a folder for its results; one with ``{run}`` in it trains, so it can
            be stopped at any step and goes on in the next call.
        alone: times are measured, so nothing runs beside it.
    """

    name: str
    priority: int
    seconds: int
    decides: str
    command: tuple[str, ...]
    alone: bool = False

    @property
    def trains(self) -> bool:
        """Whether it is a training run, which stops and goes on."""
        return any("{run}" in word for word in self.command)


def tested(*files: str) -> tuple[str, ...]:
    """Pytest without the settings of the project, which name plug-ins that the machine may lack."""
    return ("-m", "pytest", "-q", "-ra", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "default", *files)


def trained(method: str, common: tuple[str, ...], epochs: int, *options: str) -> tuple[str, ...]:
    """A training run."""
    words = ("-m", "localgrad", "train", *common, *options, "--method", method, "--epochs", str(epochs))
    return (*words, "--run-dir", "{run}")


def benched(model: str, batch_size: int, side: int, blocks: int, *options: str) -> tuple[str, ...]:
    """`localgrad bench` with linear heads, cut by bytes."""
    words = ("-m", "localgrad", "bench", model, "--batch-size", str(batch_size), "--image-size", str(side))
    return (*words, "-k", str(blocks), "--balance", "bytes", *options, "--out", "{out}")


def _accuracy(method: str, blocks: int, priority: int, epochs: int = 46) -> Experiment:
    end_to_end = method == "e2e"
    name = ("accuracy" if epochs == 46 else f"accuracy-{epochs}") + f"-{method}"
    return Experiment(
        name=name if end_to_end else f"{name}-k{blocks}",
        priority=priority,
        seconds=150 * epochs // 46,
        decides=f"test accuracy of {method} after {epochs} epochs" + ("" if end_to_end else f", {blocks} blocks"),
        command=trained(method, CIFAR, epochs, "--num-blocks", str(blocks)),
    )


def _on_a_gpu() -> list[Experiment]:
    tests = [
        Experiment(
            "tests-cuda", 0, 200, "whether the library is right on CUDA",
            tested(
                "tests/cuda", "tests/unit/test_capture.py", "tests/contract/test_captured_steps.py",
                "tests/unit/test_sealed.py::test_cuda",
            ),
        ),
        Experiment(
            "tests-versions", 0, 150, "whether engine and references hold with this machine's versions, on its CPU",
            tested(
                "tests/contract/test_wide_spans.py", "tests/contract/test_end_to_end.py", "tests/reference",
                "tests/unit/test_engine.py",
            ),
        ),
    ]  # fmt: skip
    never = [
        Experiment("never-fp16", 1, 40, "whether the loss scaler works block by block on CUDA",
                   trained("dgl", CIFAR, 3, "train.precision=fp16")),
        Experiment("never-average", 1, 40, "whether averaged weights train on CUDA",
                   trained("dgl", CIFAR, 3, "train.ema_decay=0.99")),
        Experiment("never-per-block", 1, 40, "whether a step per block trains on CUDA",
                   trained("dgl", CIFAR, 3, "optim.per_block=true")),
        Experiment("never-compile", 1, 150, "whether compiled blocks train on CUDA",
                   trained("dgl", CIFAR, 3, "train.compile=true", "--num-blocks", "4")),
        Experiment("never-pointwise", 1, 40, "whether pointwise recomputation trains on CUDA",
                   trained("[dgl, {checkpointing: {where: pointwise}}]", CIFAR, 3)),
        Experiment("never-host", 1, 60, "what waiting on the host costs with micro-batches",
                   benched("resnet32", 1024, 32, 4, "--no-combinations", "--variant", "bf16+channels_last",
                           "-m", f"[{LINEAR}]", "-m", f"[{LINEAR}, {{accumulation: {{parts: 4, wait: host}}}}]",
                           "-m", f"[{LINEAR}, {{accumulation: {{parts: 4, wait: bf16}}}}]"), alone=True),
        Experiment("never-combinations", 1, 120, "what steps by block, units recomputed and micro-batches save on CUDA",
                   benched("resnet32", 1024, 32, 4, "--variant", "bf16+channels_last", "-m", f"[{LINEAR}]"),
                   alone=True),
        Experiment("never-floors", 1, 90, "how far this card's rates are from its specification",
                   ("bench/floors.py", "resnet32", "--measure-rates", "--out", "{out}"), alone=True),
    ]  # fmt: skip
    ladders = [
        Experiment(
            f"ladder-{network}" + ("-compiled" if compiled else ""), 3 if compiled else 2, 420 if compiled else 100,
            f"whether something exact needs less memory and time than ours on {network}"
            + (", all compiled" if compiled else ""),
            ("bench/ladder.py", network, "--batch-size", str(batch), *(() if compiled else ("--no-compile",)),
             "--out", "{out}"),
            alone=True,
        )
        for compiled in (False, True) for network, batch in LADDERS.items()
    ]  # fmt: skip
    speeds = [
        Experiment(
            f"speed-{method}-{'captured' if captured else 'eager'}", 5, 60 if captured else 90,
            f"seconds of an epoch of {method}" + (", captured" if captured else ""),
            trained(method, CIFAR, 4, f"train.capture={'auto' if captured else 'false'}"), alone=True,
        )
        for captured in (True, False) for method in METHODS
    ]  # fmt: skip
    pushed = [
        Experiment(
            f"push-{name}-seed{seed}", 5, 160, "whether the form of bench/push.py is within a point of end to end",
            trained(method, CIFAR, 46, "--num-blocks", str(blocks), "blocks.balance=bytes", f"train.seed={seed}"),
        )
        for seed in (0, 1, 2) for name, method, blocks in (("e2e", "e2e", 1), ("lean", TWO_BLOCKS, 2))
    ]  # fmt: skip
    first = [_accuracy(method, 16, 4) for method in METHODS]
    fewer = [_accuracy(method, blocks, 6) for blocks in (8, 4, 2) for method in METHODS if method != "e2e"]
    published = [_accuracy(method, 16, 8, epochs=400) for method in METHODS]
    return [*tests, *never, *ladders, *first, *speeds, *pushed, *fewer, *published]


def _on_a_cpu() -> list[Experiment]:
    """The same kinds at tiny sizes."""
    tiny = ("--no-compile", "--batch-size", "4", "--image-size", "16", "--num-blocks", "3", "--rounds", "1")
    return [
        Experiment("tests", 0, 1, "a dry run", tested("tests/unit/test_spans.py")),
        Experiment("ladder", 2, 1, "a dry run", ("bench/ladder.py", "resnet8", *tiny, "--out", "{out}"), alone=True),
        Experiment("accuracy-dgl", 4, 1, "a dry run", trained("dgl", DIGITS, 2)),
        Experiment("accuracy-e2e", 4, 1, "a dry run", trained("e2e", DIGITS, 2)),
    ]


def experiments(device: str) -> list[Experiment]:
    """The queue for ``cuda``, or its dry run for ``cpu``, in the order of priority."""
    return sorted(_on_a_cpu() if device == "cpu" else _on_a_gpu(), key=lambda one: one.priority)
