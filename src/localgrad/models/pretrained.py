"""Weights from a local file: a whole model's, or those of its backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.errors import CheckpointError

WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "ema_state_dict")


def load_pretrained(model: nn.Module, path: str | Path) -> str:
    """Copy weights into ``model``, or into the child whose names they have, such as ``backbone`` or ``encoder``.

    The file holds names as torchvision or timm write them: safetensors, or what ``torch.save`` made of a state dict,
    read with ``weights_only=True``. A classifier that does not fit is left out. Call it before `localgrad.localize`, so
    that twins and copies of units start from these weights.

    Returns:
        one sentence: what was loaded, what was not, and what of the model keeps its random weights.

    Raises:
        CheckpointError: no such file, not a state dict, or most of its tensors fit nowhere in the model.
    """
    weights = _read(Path(path))
    own = model.state_dict()
    places = ["", *(f"{name}." for name, child in model.named_modules() if name and len(list(child.children())) > 1)]

    def fitting(place: str) -> dict[str, Tensor]:
        found = {f"{place}{name}": tensor for name, tensor in weights.items()}
        return {name: t for name, t in found.items() if name in own and own[name].shape == t.shape}

    place, chosen = max(((place, fitting(place)) for place in places), key=lambda pair: len(pair[1]))
    left_out = [name for name in weights if f"{place}{name}" not in chosen]
    if 2 * len(chosen) < len(weights):
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {len(chosen)} of its {len(weights)} tensors do, "
            f"{left_out[0]!r} for instance does not; give the weights of this very architecture, with torchvision's or "
            "timm's names"
        )
    model.load_state_dict(chosen, strict=False)
    where = f" into {place.removesuffix('.')!r}" if place else ""
    rest = f"; left out: {', '.join(left_out[:4])}{', ...' if len(left_out) > 4 else ''}" if left_out else ""
    random = [name for name in own if name not in chosen and not name.endswith("num_batches_tracked")]
    said = f"{len(chosen)} of {len(weights)} tensors of {path} loaded{where}{rest}"
    if random:
        said += f"; {len(random)} of the model's own stay random: {', '.join(random[:4])}{', ...' * (len(random) > 4)}"
    return said


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a foreign file may fail in any way
        raise CheckpointError(
            f"cannot read weights from {path}: {' '.join(str(error).split())[:300]}. Give a .safetensors file, or one "
            "that torch.save made of a state dict"
        ) from error
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of tensors")
    weights = {str(name).removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path} holds no tensors, so no state dict")
    return weights
