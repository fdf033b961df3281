"""Ways to train, as values: end-to-end, recomputed, accumulated and local, and what each is combined with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from localgrad import methods
from localgrad.config import OptimConfig
from localgrad.errors import ConfigError, nearest
from localgrad.method import Method
from localgrad.planning.planner import PRECISIONS
from localgrad.spec import MethodSpec, build_method, described, method_name

OPTIONS = ("channels_last", "compile")
REFERENCE = "end-to-end"
UNITS = "checkpointing every unit"
BUDGETS = (0.1, 0.3, 0.5, 0.7)
SGD, ADAMW = "SGD", "AdamW"
EIGHT_BIT, OFFLOADED = "bitsandbytes.optim:AdamW8bit", "torchao.optim:CPUOffloadOptimizer"  # both are AdamW


@dataclass(frozen=True)
class Way:
    """One way to train, yet without a model.

    Args:
        name: in tables.
        kind: ``end-to-end``, ``checkpointing``, ``accumulation`` or ``local``; pictures draw each in its own color.
        method: what trains the blocks.
        num_blocks: K; None for as many as the model has units. ``cuts``, paths of modules, say where instead.
        per_block: whether each block steps, and frees its gradients, as soon as its backward pass is done.
        inside: recompute the units inside a block in its backward pass, all but the last.
        in_backward: each parameter steps, and frees its gradient, as soon as the gradient is there.
        resident: each block is on the device only while it runs (`localgrad.resident`).
        offload: what waits for the backward pass waits on the host (``torch.autograd.graph.save_on_cpu``).
        budgets: values of ``torch._functorch.config.activation_memory_budget`` to compile with; the leanest counts.
        variant: ``fp32`` or ``bf16`` (autocast), then any of ``channels_last`` and ``compile``, joined by ``+``.
        optimizer: a class of ``torch.optim`` or ``module:Class``; ``SGD`` has momentum.
    """

    name: str
    kind: str
    method: Method
    num_blocks: int | None = 1
    per_block: bool = False
    inside: bool = False
    in_backward: bool = False
    resident: bool = False
    offload: bool = False
    budgets: tuple[float, ...] = ()
    variant: str = "fp32"
    cuts: tuple[str, ...] = ()
    optimizer: str = SGD

    def __post_init__(self) -> None:
        precision, *options = self.variant.split("+")
        if precision not in PRECISIONS:
            raise ConfigError(nearest(precision, PRECISIONS, "precision") + f" (in variant {self.variant!r})")
        for option in options:
            if option not in OPTIONS:
                raise ConfigError(nearest(option, OPTIONS, "option") + f" (in variant {self.variant!r})")
        if self.budgets and not self.has("compile"):
            raise ConfigError(f"budgets={self.budgets} with variant {self.variant!r}: they are the compiler's; write "
                              f"variant='{self.variant}+compile'")  # fmt: skip

    @property
    def label(self) -> str:
        """What tables call it."""
        return labelled(self.name, self.optimizer, self.variant)

    @property
    def optim(self) -> OptimConfig:
        """How it steps."""
        return OptimConfig(
            name=self.optimizer, options={"momentum": 0.9} if self.optimizer == SGD else {}, lr=1e-3, weight_decay=0.0,
            per_block=self.per_block, in_backward=self.in_backward,
        )  # fmt: skip

    @property
    def separate(self) -> bool:
        """Whether it needs blocks that can be called one by one, which some models do not allow."""
        return self.inside or self.method.recompute.blocks

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of forward passes, None for that of the weights."""
        return PRECISIONS[self.variant.partition("+")[0]]

    def has(self, option: str) -> bool:
        """Whether the variant names ``option``."""
        return option in self.variant.split("+")


def labelled(name: str, optimizer: str, variant: str) -> str:
    """The name, the optimizer unless it is SGD, and the variant unless it is plain float32."""
    usual = (SGD, "fp32")
    return ", ".join([name, *(text for text in (optimizer.rpartition(":")[2], variant) if text not in usual)])


def standard_ways(
    task: Any,
    specs: Sequence[MethodSpec],
    num_blocks: Sequence[int],
    *,
    variants: Sequence[str] = ("fp32",),
    parts: int = 4,
    combinations: bool = True,
) -> list[Way]:
    """End-to-end training, checkpointing and accumulation, then each method with and without them.

    Args:
        task: from `localgrad.tasks`.
        specs: methods as recipes write them, ``["dgl", "man"]``.
        num_blocks: every K to cut the model into.
        variants: each way is run in each of them; see `Way`.
        parts: micro-batches of accumulation.
        combinations: also run methods with per-block steps, with the units inside a block recomputed, accumulated, and
            with all of these; end-to-end training, and methods with per-block steps, by AdamW with 32-bit, 8-bit and
            offloaded state; and end-to-end training compiled, plainly and with the best of `BUDGETS`.
    """
    e2e = methods.e2e(task)
    recomputing = methods.checkpointing(e2e)
    selective = methods.checkpointing(e2e, where="selective")
    plain = Way(REFERENCE, REFERENCE, e2e)
    early = replace(plain, name=f"{REFERENCE}, optimizer in backward", in_backward=True)
    in_units = Way(UNITS, "checkpointing", recomputing, None)
    ways = [
        plain,
        early,
        in_units,
        replace(in_units, name=f"{UNITS}, optimizer in backward", in_backward=True),
        Way(f"{UNITS}, selective", "checkpointing", selective, None),
        Way(f"{UNITS}, offloaded", "checkpointing", recomputing, None, offload=True),
        *(Way(f"checkpointing K={k}", "checkpointing", recomputing, k) for k in num_blocks if k > 1),
        Way(f"accumulation x{parts}", "accumulation", methods.accumulation(e2e, parts=parts)),
        Way(f"{UNITS}, x{parts}", "checkpointing", methods.accumulation(recomputing, parts=parts), None),
    ]
    for spec in specs:
        method = build_method(spec, task)
        if not method.terms:
            raise ConfigError(
                f"method {method_name(spec)!r} has no auxiliary heads, so it is no local learning; end-to-end "
                "training, checkpointing and accumulation are measured anyway. Write a local base such as dgl"
            )
        for k in num_blocks:
            way = Way(f"{described(spec)} K={k}", "local", method, k)
            stepping = replace(way, name=f"{way.name}, per-block step", per_block=True)
            ways += [way, stepping] if combinations else [way]
            if combinations:
                ways.append(replace(stepping, name=f"{stepping.name}, checkpointing inside", inside=True))
                # All micro-batches pass a block before the next one begins, so that each block steps here too.
                several = methods.accumulation(method, parts=parts)
                ways.append(replace(way, name=f"{way.name}, x{parts}", method=several))
                accumulated = replace(stepping, name=f"{stepping.name}, x{parts}", method=several)
                inside = f"{stepping.name}, checkpointing inside, x{parts}"
                ways += [accumulated, replace(accumulated, name=inside, inside=True)]
    if combinations:
        by_block = [way for way in ways if way.per_block and not way.inside and way.method.micro_batches == 1]
        ways += [replace(way, optimizer=name) for name in (ADAMW, EIGHT_BIT, OFFLOADED) for way in (plain, *by_block)]
        ways += [replace(way, optimizer=EIGHT_BIT) for way in (early, in_units)]
    found = [replace(way, variant=variant) for variant in variants for way in ways]
    for variant in variants if combinations else ():
        if "compile" not in variant.split("+"):
            compiled = replace(plain, variant=f"{variant}+compile")
            found += [compiled] * (compiled not in found)
            found.append(replace(compiled, name=f"{REFERENCE}, memory budget", budgets=BUDGETS))
    return found
