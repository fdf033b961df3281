"""Tasks: what a network is trained to do, see `localgrad.task.Task`."""

from localgrad.tasks.classification import Classification, classification
from localgrad.tasks.custom import Custom, custom
from localgrad.tasks.detection import Detection, detection
from localgrad.tasks.language_model import LanguageModel, language_model
from localgrad.tasks.multilabel import Multilabel, multilabel
from localgrad.tasks.regression import Regression, regression
from localgrad.tasks.segmentation import Segmentation, segmentation

__all__ = [
    "Classification", "Custom", "Detection", "LanguageModel", "Multilabel", "Regression", "Segmentation",
    "classification", "custom", "detection", "language_model", "multilabel", "regression", "segmentation",
]  # fmt: skip
