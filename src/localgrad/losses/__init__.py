"""Local losses besides the task's own: each maps a head's output and the batch to a scalar."""

from localgrad.losses.contrastive import Contrastive
from localgrad.losses.reconstruction import Reconstruction
from localgrad.losses.similarity import Similarity

__all__ = ["Contrastive", "Reconstruction", "Similarity"]
