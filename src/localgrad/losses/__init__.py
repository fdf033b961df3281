"""Losses besides the task's own. A loss is called with the output of its head and a `localgrad.task.Batch`."""

from localgrad.losses.attention_transfer import AttentionTransfer
from localgrad.losses.contrastive import Contrastive
from localgrad.losses.distillation import Distilled
from localgrad.losses.reconciliation import Reconciliation
from localgrad.losses.reconstruction import Reconstruction
from localgrad.losses.similarity import Similarity

__all__ = [
    "AttentionTransfer",
    "Contrastive",
    "Distilled",
    "Reconciliation",
    "Reconstruction",
    "Similarity",
]
