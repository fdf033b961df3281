"""Tasks: what a network is trained to do, see `localgrad.task.Task`."""

from localgrad.tasks.classification import Classification, classification
from localgrad.tasks.detection import Detection, detection
from localgrad.tasks.segmentation import Segmentation, segmentation

__all__ = ["Classification", "Detection", "Segmentation", "classification", "detection", "segmentation"]
