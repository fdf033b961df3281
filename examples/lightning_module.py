"""A LightningModule.

-class Module(lightning.LightningModule):
-    def training_step(self, batch, index):
-        return model(**inputs, labels=targets).loss
+class Module(LocalModule):
     def configure_optimizers(self):
"""

from __future__ import annotations

from typing import Any

import lightning
import plain_loop
import torch

import localgrad
from localgrad.integrations.lightning import LocalModule


class Module(LocalModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(network: localgrad.LocalNetwork, batches: list[Any]) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(Module(network), torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer.callback_metrics


if __name__ == "__main__":
    print(train(plain_loop.network(), plain_loop.text_batches()))
