"""A LightningModule with automatic optimization.

-        return model(**inputs, labels=targets).loss
+        return localgrad.loss(self.network, inputs, targets, self.global_step)
"""

from __future__ import annotations

from typing import Any

import lightning
import plain_loop
import torch
from torch import Tensor

import localgrad


class Module(lightning.LightningModule):
    def __init__(self, network: localgrad.LocalNetwork) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, index: int) -> Tensor:
        inputs, targets = batch
        loss = localgrad.loss(self.network, inputs, targets, self.global_step)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), lr=0.5)


def train(network: localgrad.LocalNetwork, batches: list[Any]) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(Module(network), torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer.callback_metrics


if __name__ == "__main__":
    print(train(plain_loop.network(), plain_loop.text_batches()))
