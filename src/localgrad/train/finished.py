"""What a run left in its directory, for whoever reads it later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from localgrad import models
from localgrad.config import Config, validate
from localgrad.errors import CheckpointError
from localgrad.recipes import safe_yaml
from localgrad.task import Task

WEIGHTS = "model.safetensors"


def read_config(path: Path) -> Config:
    """The configuration a run directory was started with.

    Raises:
        CheckpointError: no run there.
    """
    import yaml

    file = path / "config.yaml"
    if not file.is_file():
        raise CheckpointError(
            f"{path} holds no run (no config.yaml); --resume takes a directory that `localgrad train` wrote"
        )
    try:
        settings = safe_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}; check its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is damaged: expected settings, found {type(settings).__name__}")
    return validate(settings, str(file))


def digest(trained_on: dict[str, Any]) -> str:
    """Sha256 of what a result says of the data, beside which it stands as ``sha256``: a change would change answers."""
    return hashlib.sha256(json.dumps(trained_on, sort_keys=True).encode()).hexdigest()


def model_of(config: Config, num_classes: int, image_shape: tuple[int, ...]) -> nn.Module:
    """The model of a run for images (C, H, W), as it is before training."""
    channels, height, _ = image_shape
    return models.create(
        config.model.name, num_classes=num_classes, in_channels=channels, image_size=height, **config.model.options
    )


def trained_model(path: Path, task: Task, image_shape: tuple[int, int, int]) -> nn.Module:
    """The model that a finished run left in ``path``, for data of the same form.

    Raises:
        CheckpointError: no finished run there, or one for other data.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = model_of(read_config(path), task.num_outputs, image_shape)
    try:
        model.load_state_dict(load_file(path / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no finished run for these data ({' '.join(str(error).split())[:200]}); give the directory "
            "of a run that ended"
        ) from error
    return model
