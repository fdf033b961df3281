"""A trained network as a file that runs without localgrad: ONNX, or what `torch.export` saves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localgrad import sealed
from localgrad.distributed.checkpoint import Checkpoints
from localgrad.errors import CheckpointError, ConfigError, LocalgradError, PartitionError
from localgrad.network import LocalNetwork
from localgrad.train.experiment import build_network, build_task
from localgrad.train.folder import CHECKPOINTS, weights_at
from localgrad.train.predict import Trained, load_trained

Format = Literal["onnx", "torch"]
TOLERANCE = 1e-4  # of what the file answers, to the largest answer


def export(run_dir: Path, to: Path, form: Format, block: int | None = None) -> str:
    """Write the model of a finished run, or a prefix of it, for images (B, C, H, W) of any B, normalised.

    What the data were is written beside the graph, as JSON under ``trained_on``: classes, ``input_shape``, and the
    ``mean`` and ``std`` that inputs are normalised by. The file is run once before it gets its name.

    Args:
        run_dir: that `localgrad train` wrote.
        to: the file, which is not there yet.
        form: ``onnx``, or ``torch`` for `torch.export.load`.
        block: the last one of a prefix, see `LocalNetwork.prefix`; None for the whole model.

    Returns:
        what was written, in a line.

    Raises:
        ConfigError: the file is there already, or what writes ONNX is not installed.
        CheckpointError: no finished run, or files that are not what training writes.
        PartitionError: a block that there is not, or a model that cannot be exported.
    """
    if os.path.lexists(to):
        raise ConfigError(f"{to} is there already, and would be replaced; remove it or choose another --to")
    write = {"onnx": _onnx, "torch": _torch}[form]
    trained = load_trained(run_dir, "cpu")
    module: nn.Module = trained.model if block is None else network_of(run_dir, trained).prefix(block)
    channels, height, width = trained.input_shape
    # Drawn on its own: nobody else's draws move. Of four, so that no size is taken for a constant.
    example = torch.randn(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    told = {
        "kind": trained.kind,
        "classes": list(trained.classes),
        "input_shape": list(trained.input_shape),
        "mean": list(trained.mean),
        "std": list(trained.std),
        "block": block,
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about their own parts
            content, run = write(module, example, json.dumps(told))
            for inputs in (example, example[:1]):
                _check_equal(run(inputs), module(inputs))
    except LocalgradError:
        raise
    except Exception as error:  # a forward may fail in any way while it is exported
        reason = " ".join(str(error).split())[:300]
        raise PartitionError(f"{type(module).__name__} cannot be exported to {form}: {reason}") from error
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {to}: {error.strerror}; choose another --to") from error
    sealed.write(to, content)
    what = trained.config.model.name if block is None else f"blocks 1 to {block} of {trained.config.model.name}"
    return f"{what}, for normalised images (B, {channels}, {height}, {width}), {len(content):,} bytes"


def network_of(run_dir: Path, trained: Trained) -> LocalNetwork:
    """The network whose model a finished run left, with its heads, as the newest checkpoint has them.

    Raises:
        CheckpointError: there is none, or it is another one's than ``model.safetensors``.
    """
    config = dataclasses.replace(trained.config, model=dataclasses.replace(trained.config.model, weights=None))
    task = build_task(config, len(trained.classes), trained.mean, trained.std, trained.kind, trained.classes)
    network = build_network(config, task, trained.input_shape, torch.device("cpu"))
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, network, [])
    step = checkpoints.newest()
    if step is None:
        raise CheckpointError(
            f"{run_dir} holds no checkpoint, which alone has the heads; export the model without --block"
        )
    network.load_state_dict(weights_at(checkpoints, step, averaged=config.train.ema_decay is not None))
    wanted = trained.model.state_dict()
    if not all(torch.equal(tensor, wanted[name]) for name, tensor in network.model.state_dict().items()):
        raise CheckpointError(
            f"the newest checkpoint in {run_dir} is not of the weights in model.safetensors; continue the run to its "
            "end with --resume"
        )
    return network.eval()


Written = tuple[bytes, Callable[[Tensor], list[Any]]]


def _exported(module: nn.Module, example: Tensor) -> Any:
    sizes = torch.export.ShapesCollection()
    sizes[example] = {0: torch.export.Dim("batch", min=1)}
    return torch.export.export(module, (example,), dynamic_shapes=sizes)


def _torch(module: nn.Module, example: Tensor, told: str) -> Written:
    file = io.BytesIO()
    torch.export.save(_exported(module, example), file, extra_files={"trained_on": told})
    file.seek(0)
    loaded = torch.export.load(file).module()
    return file.getvalue(), lambda inputs: tree_leaves(loaded(inputs))


def _onnx(module: nn.Module, example: Tensor, told: str) -> Written:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX files need {error.name}: pip install 'localgrad[onnx]'") from error
    program = torch.onnx.export(_exported(module, example), dynamo=True, verbose=False, input_names=["images"])
    assert program is not None
    program.model.metadata_props["trained_on"] = told
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda inputs: [torch.from_numpy(out) for out in session.run(None, {"images": inputs.numpy()})]


def _check_equal(found: list[Any], wanted: Any) -> None:
    """Raise `PartitionError` unless a file answers what the module does."""
    tensors = [leaf for leaf in tree_leaves(wanted) if isinstance(leaf, Tensor)]
    same = len(found) == len(tensors)
    for one, other in zip(found, tensors, strict=False):
        same &= one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * (1 + other.abs().max()))
    if not same:
        raise PartitionError(
            "the exported file answers something else than the model; its forward depends on its input"
        )
