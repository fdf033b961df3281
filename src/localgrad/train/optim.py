"""Optimizers, their schedule, clipping, and when a block steps."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from localgrad.config import OptimConfig
from localgrad.errors import ConfigError, nearest
from localgrad.named import imported, is_named
from localgrad.network import LocalNetwork
from localgrad.spans import groups

SMALL = 2**23  # parameters, 32 MiB
BUILT_IN = ("sgd", "adamw")
MOMENTUM = 0.9  # of sgd
MILESTONES = (2 / 3, 8 / 9)  # shares of a run at which the rate of ``step`` falls to a tenth
EIGHTBIT = ("bitsandbytes", "torchao")  # modules of the extra with optimizers of 8-bit and offloaded state


def learning_rate(config: OptimConfig, epoch: int, progress: float, epochs: int) -> float:
    """The learning rate of one step.

    Args:
        config: ``lr``, ``schedule``, ``warmup_epochs``.
        epoch: 0-based.
        progress: share of this epoch done, [0, 1).
        epochs: of the whole run.

    ``paper`` is, with e = epoch + 1 of E, ``lr/2 (1 + cos(pi e / E))``, and for e <= 10 that times (e - 1)/10 plus
    0.01 (11 - e)/10: constant within an epoch and 0 in the last one.

    Source: the training scripts of InfoPro, MAN, MAN++ and MLAAN.
    """
    if config.schedule == "paper":
        e = epoch + 1
        cosine = 0.5 * config.lr * (1 + math.cos(math.pi * e / epochs))
        return cosine * (e - 1) / 10 + 0.01 * (11 - e) / 10 if e <= 10 else cosine
    done = epoch + progress
    if done < config.warmup_epochs:
        return config.lr * (done + 1e-2) / config.warmup_epochs
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(done >= milestone * epochs for milestone in MILESTONES)
    share = (done - config.warmup_epochs) / max(1e-9, epochs - config.warmup_epochs)
    if config.schedule == "poly":
        return (config.lr - config.min_lr) * (1 - min(1.0, share)) ** 0.9 + config.min_lr
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(1.0, share)))


def build(
    config: OptimConfig,
    parameters: Sequence[nn.Parameter],
    rate: Tensor | None = None,
    place: torch.device | None = None,
) -> torch.optim.Optimizer:
    """SGD or AdamW over ``parameters``; for all of them at once in small networks, on CUDA in one kernel.

    Args:
        config: which, and its settings.
        parameters: on one device.
        rate: the learning rate as a scalar on that device, for steps that are captured; None for ``config.lr``.
        place: where they are when it steps; None for where they are now.

    Raises:
        ConfigError: no such optimizer, or options that it does not take.
    """
    if config.name not in BUILT_IN:
        return _named(config, parameters, rate)
    lr = config.lr if rate is None else rate
    device = (place or parameters[0].device).type
    # On the CPU fused kernels would round otherwise than one parameter after the other, and ``foreach`` needs as much
    # memory again as the gradients: for small networks, where starting operations is what costs.
    small = device == "cpu" and not config.per_block and sum(parameter.numel() for parameter in parameters) <= SMALL
    plain = rate is None and all(type(parameter) is nn.Parameter for parameter in parameters)
    at_once: dict[str, Any] = {
        "fused": device == "cuda" or rate is not None or None,
        "foreach": (small and plain) or None,
    }
    if config.name == "adamw":
        capturable = rate is not None and rate.device.type == "cuda"
        return _made(torch.optim.AdamW, config, parameters, lr=lr, capturable=capturable, **at_once)
    momentum = MOMENTUM if config.momentum is None else config.momentum
    optimizer = _made(torch.optim.SGD, config, parameters, lr=lr, momentum=momentum, nesterov=momentum > 0, **at_once)
    if at_once["fused"] and momentum:
        # Its kernel takes all buffers or none: those of heads that rest in the first step would come later.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _named(config: OptimConfig, parameters: Sequence[nn.Parameter], rate: Tensor | None) -> torch.optim.Optimizer:
    """An optimizer by its name in ``torch.optim``, or of another module."""
    what = f"optim.name={config.name!r}"
    if is_named(config.name):
        extra = config.name.partition(".")[0] in EIGHTBIT
        kind = imported(config.name, "optim.name", "It comes with: pip install localgrad[eightbit]" if extra else "")
    else:
        known = [name for name, kind in vars(torch.optim).items() if inspect.isclass(kind)]
        if config.name not in known:
            raise ConfigError(nearest(config.name, [*BUILT_IN, *known], "optim.name") + "; or write module:Class")
        kind = getattr(torch.optim, config.name)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        raise ConfigError(
            f"{what}: it is no optimizer; write a class derived from torch.optim.Optimizer, such as NAdam"
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"{what}: it runs the model again in each step; write one that steps without, such as NAdam")
    if rate is not None:
        raise ConfigError(f"{what} with train.capture; captured runs take {' and '.join(BUILT_IN)}, or drop capture")
    return _made(kind, config, parameters, lr=config.lr)


def _made(kind: Any, config: OptimConfig, parameters: Sequence[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """An optimizer of a class with ``settings``, of which ``optim.options`` may be others."""
    taken = inspect.signature(kind).parameters
    if "weight_decay" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        settings["weight_decay"] = config.weight_decay
    if repeated := sorted({"lr", "weight_decay"} & set(config.options)):
        raise ConfigError(f"optim.options: {repeated[0]} is a setting of its own; write optim.{repeated[0]}")
    try:
        made: torch.optim.Optimizer = kind(parameters, **{**settings, **config.options})
    except AssertionError as error:
        raise ConfigError(f"optim.name={config.name!r}: {error}; choose another optimizer here") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim.name={config.name!r}, optim.options={config.options}: {error}; its arguments are "
            f"{inspect.signature(kind)}"
        ) from error
    return made


def clip(groups: Sequence[Sequence[nn.Parameter]], limit: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` of each group, the factors of all groups at once."""
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    gradients = [group for group in gradients if group]
    if not gradients:
        return
    norms = torch.stack([torch.nn.utils.get_total_norm(group) for group in gradients])
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    for group, factor in zip(gradients, factors.unbind(), strict=True):
        torch._foreach_mul_(group, factor)


class Stepper:
    """Clips and steps, for the whole network at once, block by block, or parameter by parameter.

    Pass ``block_done`` as ``on_block_done`` to `localgrad.local_losses` and call ``finish`` after the loop. With
    ``config.in_backward`` a hook on each parameter steps it; one stepper a network then.

    Args:
        network: whose parameters are trained; those without ``requires_grad`` (twins) are left alone.
        config: see `localgrad.config.OptimConfig`.
        scaler: scales fp16 losses; disabled for other precisions.
        capture: keep the learning rate on the device, where a captured step finds it.
    """

    def __init__(
        self, network: LocalNetwork, config: OptimConfig, scaler: torch.amp.GradScaler, capture: bool = False
    ) -> None:
        self.network, self.config, self.scaler = network, config, scaler
        self.blocks = range(network.num_blocks) if network.stage is None else network.stage.blocks
        self.of_block = {k: network.block_parameters(k) for k in self.blocks}
        trained = [p for p in network.parameters() if p.requires_grad]
        if config.in_backward and (reason := self._not_in_backward()):
            raise ConfigError(f"optim.in_backward: {reason}")
        if config.in_backward:
            self.parameters = [[parameter] for parameter in trained]
        else:
            self.parameters = list(self.of_block.values()) if config.per_block else [trained]
        if not all(self.parameters):
            idle = ", ".join(
                str(k) for k, parameters in zip(self.blocks, self.parameters, strict=False) if not parameters
            )
            raise ConfigError(
                f"optim.per_block: block {idle} has nothing to train; unfreeze it or switch per_block off"
            )
        self.rate = torch.tensor(config.lr, device=network.device) if capture else None
        self.optimizers = [build(config, parameters, self.rate, network.device) for parameters in self.parameters]
        for index, parameter in enumerate(trained if config.in_backward else ()):
            parameter.register_post_accumulate_grad_hook(partial(self._step_parameter, index))
        patterns = network.method.spans.patterns(network.num_blocks)
        if config.per_block and config.clip_grad and any(s.stop - s.start > 1 for p in patterns for s in p):
            raise ConfigError(
                f"optim.per_block with optim.clip_grad={config.clip_grad}: {network.method.name} has spans over "
                "several blocks, whose common gradient norm is known only after the first has stepped; drop one of both"
            )
        shared = set.intersection(*({g.start for g in groups(p, network.num_blocks)} for p in patterns))
        if network.stage is not None and config.clip_grad and not {run.start for run in network.stage.runs} <= shared:
            raise ConfigError(
                f"optim.clip_grad={config.clip_grad}: {network.method.name} has spans over blocks on several ranks, "
                "whose common gradient norm no rank knows; drop it, or place such blocks on one rank"
            )

    def _not_in_backward(self) -> str:
        """Why parameters cannot step one by one as their gradients come; nothing if they can."""
        network, config = self.network, self.config
        patterns = network.method.spans.patterns(network.num_blocks)
        if any([(span.start, span.stop) for span in pattern] != [(0, network.num_blocks)] for pattern in patterns):
            return f"{network.method.name} has several losses a step; write optim.per_block=true instead"
        if network.method.micro_batches > 1:
            return f"each of {network.method.micro_batches} micro-batches would step by itself; drop one of both"
        if config.per_block:
            return "optim.per_block steps later; drop one of both"
        if config.clip_grad is not None:
            return f"optim.clip_grad={config.clip_grad} needs all gradients at once; drop one of both"
        if self.scaler.is_enabled():
            return "train.precision=fp16 looks at all gradients before a step; write bf16"
        if network.stage is not None or network.replicas is not None:
            return "processes share gradients after the backward pass; train in one process, or drop it"
        return ""

    @property
    def block_done(self) -> Callable[[int], None] | None:
        """What to pass as ``on_block_done``."""
        return self._step_block if self.config.per_block else None

    def set_learning_rate(self, value: float) -> None:
        """Set it for every parameter."""
        if self.rate is not None:
            self.rate.fill_(value)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if self.rate is None and isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)  # some optimizers compile their step, which then reads the rate anew
                else:
                    group["lr"] = value if self.rate is None else self.rate

    def _step_block(self, block: int) -> None:
        index = block - self.blocks.start
        self._step(self.optimizers[index], [self.parameters[index]])

    def _step_parameter(self, index: int, _: Tensor) -> None:
        self._step(self.optimizers[index], [])

    def _step(self, optimizer: torch.optim.Optimizer, clipped_together: list[list[nn.Parameter]]) -> None:
        if self.config.clip_grad is not None:
            self.scaler.unscale_(optimizer)
            clip(clipped_together, self.config.clip_grad)
        # Some optimizers of other libraries compile their step, which torch refuses while operations are counted.
        with _disable_current_modes() if is_named(self.config.name) else contextlib.nullcontext():
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def finish(self, step: int) -> None:
        """Step what has not stepped yet, and adapt the loss scale."""
        if not (self.config.per_block or self.config.in_backward):
            runs = groups(self.network.spans(step), self.network.num_blocks)
            self._step(self.optimizers[0], [[p for k in run for p in self.of_block.get(k, ())] for run in runs])
        self.scaler.update()
