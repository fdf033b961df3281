"""What a network is trained to do."""

from localgrad.tasks.classification import Classification, classification

__all__ = ["Classification", "classification"]
