"""The Trainer of transformers.

-trainer = Trainer(model, args, train_dataset=data)
+network = localgrad.localize(model, localgrad.methods.dgl(task), 2, example=example)
+trainer = LocalTrainer(network, args, train_dataset=data)
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plain_loop
from transformers import TrainingArguments

import localgrad
from localgrad.integrations.transformers import LocalTrainer


def train(network: localgrad.LocalNetwork, folder: Path) -> Any:
    data = [{"input_ids": tokens, "labels": tokens} for tokens in plain_loop.counting()]
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = LocalTrainer(network, args, train_dataset=data)
    trainer.train()
    return trainer


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(train(plain_loop.network(), Path(folder)).state.log_history[-1])
