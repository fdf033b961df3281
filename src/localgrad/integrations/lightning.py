"""A LightningModule that takes local steps."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from localgrad.engine import require_network
from localgrad.errors import ConfigError
from localgrad.network import LocalNetwork, exchange
from localgrad.single_loss import loss


class LocalModule(LightningModule):
    """Trains a network on batches (inputs, targets); derive from it and write ``configure_optimizers``.

    The step is `localgrad.loss` under automatic optimization: mixed precision, accumulation, clipping, checkpoints and
    resumption are the Trainer's. Its checkpoints hold model and heads. ``train_loss`` and ``val_loss`` are the model's
    own. Draws such as dropout are those of an uninterrupted run where ``fit`` is called inside
    `localgrad.keyed_randomness`.

    Args:
        network: what `localize` returned.

    Raises:
        ConfigError: the Trainer has several processes, whose wrappers (DDP, FSDP) would not see a local step.

    Example:
        >>> import torch
        >>> from localgrad.integrations.lightning import LocalModule
        >>> class Module(LocalModule):
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    def __init__(self, network: LocalNetwork) -> None:
        require_network(network, type(self).__name__)
        super().__init__()
        self.network = network

    def setup(self, stage: str) -> None:
        """Refuse what would pass the local step by."""
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"a Trainer with {self.trainer.world_size} processes wraps the module; write devices=1, or train in "
                "several processes with localgrad.distributed.data_parallel in a loop, accelerate or transformers"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own answer."""
        return self.network(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A local step."""
        inputs, targets = batch
        plugin = self.trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        scale = 1.0 if scaler is None else scaler.get_scale()
        value = loss(self.network, inputs, targets, self.global_step, scale=scale)
        self.log("train_loss", value, prog_bar=True)
        return value

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The model's own loss."""
        inputs, targets = batch
        self.log("val_loss", loss(self.network, inputs, targets, self.global_step), prog_bar=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """An optimizer step, after which twins move."""
        super().optimizer_step(*args, **kwargs)
        exchange(self.network)
