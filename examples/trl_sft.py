"""The SFTTrainer of TRL.

+class LocalSFTTrainer(LocalTrainerMixin, SFTTrainer):
+    pass
-trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
+network = localgrad.localize(model, localgrad.methods.dgl(task), 2, example=example)
+trainer = LocalSFTTrainer(network, args, train_dataset=data, processing_class=tokenizer)
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plain_loop
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import localgrad
from localgrad.integrations.transformers import LocalTrainerMixin


class LocalSFTTrainer(LocalTrainerMixin, SFTTrainer):  # type: ignore[misc]
    pass


def tokenizer(words: int = 17) -> Any:
    own = Tokenizer(models.WordLevel({str(word): word for word in range(words)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="0", eos_token="0")


def train(network: localgrad.LocalNetwork, folder: Path) -> Any:
    data = Dataset.from_list([{"input_ids": tokens.tolist()} for tokens in plain_loop.counting()])
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = LocalSFTTrainer(network, args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return trainer


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(train(plain_loop.network(), Path(folder)).state.log_history[-1])
