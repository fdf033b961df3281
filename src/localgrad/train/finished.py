"""What a run left in its directory, for whoever reads it later."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

from torch import nn

from localgrad import models, sealed
from localgrad.config import Config, validate
from localgrad.distributed.checkpoint import COMPLETE
from localgrad.errors import CheckpointError
from localgrad.recipes import safe_yaml
from localgrad.task import Task

CONFIG, WEIGHTS, RESULT = "config.yaml", "model.safetensors", "result.json"


def read_config(path: Path) -> Config:
    """The configuration a run directory was started with: of ``config.yaml`` or, without it, of the newest checkpoint.

    Raises:
        CheckpointError: no run there, or one whose settings are damaged everywhere.
    """
    file = path / CONFIG
    try:
        return validate(safe_yaml(sealed.read_yaml(file)), str(file))
    except CheckpointError as error:
        for folder in sorted(path.glob(f"checkpoints/step{'[0-9]' * 8}"), reverse=True):
            with contextlib.suppress(CheckpointError, LookupError, TypeError, ValueError):
                beside = dict(sealed.read_json(folder / COMPLETE)["beside"]["dict"])
                config = validate(safe_yaml(beside["config"]), str(folder))
                warnings.warn(f"{error}; taking the settings that {folder.name} was written with", stacklevel=2)
                return config
        if not file.is_file():
            raise CheckpointError(
                f"{path} holds no run (no {CONFIG}); --resume takes a directory that `localgrad train` wrote"
            ) from error
        raise CheckpointError(
            f"{error}. To train with settings of your own, name the file as a recipe: localgrad train {file} "
            "--run-dir NEW"
        ) from error


def model_of(config: Config, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The model of a run for images (C, H, W) or tokens (T,), as it is before training."""
    if len(input_shape) == 1:
        return models.create(config.model.name, num_classes=num_classes, context=input_shape[0], **config.model.options)
    channels, height, _ = input_shape
    return models.create(
        config.model.name, num_classes=num_classes, in_channels=channels, image_size=height, **config.model.options
    )


def trained_model(path: Path, task: Task, input_shape: tuple[int, ...]) -> nn.Module:
    """The model that a finished run left in ``path``, for data of the same form.

    Raises:
        CheckpointError: no finished run there, or one for other data.
    """
    model = model_of(read_config(path), task.num_outputs, input_shape)
    try:
        model.load_state_dict(sealed.read_tensors(path / WEIGHTS))
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no finished run for these data ({' '.join(str(error).split())[:200]}); give the directory "
            "of a run that ended"
        ) from error
    return model
