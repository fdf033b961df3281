"""Trainers of transformers, and of what builds on them such as TRL, that take local steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils.generic import find_labels

from localgrad import sealed
from localgrad.distributed.data_parallel import data_parallel
from localgrad.distributed.mesh import device_mesh
from localgrad.engine import require_network
from localgrad.errors import ConfigError
from localgrad.network import LocalNetwork, exchange
from localgrad.single_loss import loss

HEADS = "localgrad_heads.safetensors"


class LocalTrainerMixin:
    """Stands before a trainer of transformers, which is then given a network instead of a model.

    The step is `localgrad.loss`. Optimizer, clipping, accumulation, mixed precision, logging, evaluation, saving and
    resumption are the trainer's. Checkpoints hold the model as ``save_pretrained`` writes it, for any
    ``from_pretrained``, and beside it the heads. In several processes gradients are averaged by
    `localgrad.distributed.data_parallel`.

    Args:
        model: what `localize` returned; its task reads the targets that the data set has as ``labels``.

    Raises:
        ConfigError: the data set has no ``labels``; FSDP, DeepSpeed or several GPUs in one process, which would pass
            the local step by; ``label_smoothing_factor`` or ``compute_loss_func``, which would not reach it.

    Example:
        >>> from transformers import Trainer
        >>> from localgrad.integrations.transformers import LocalTrainerMixin
        >>> class LocalTrainer(LocalTrainerMixin, Trainer):
        ...     pass

    Differs: with accumulation each micro-batch counts alike, as transformers did before it counted tokens.
    """

    loss_is_scaled_for_ga = False  # of the Trainer: it divides the loss by the number of micro-batches
    model: Any
    args: Any
    accelerator: Any
    state: Any
    _signature_columns: Any

    def __init__(self, model: LocalNetwork, *args: Any, **kwargs: Any) -> None:
        require_network(model, type(self).__name__)
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            raise ConfigError(
                "a local step runs in one process per device, without FSDP and DeepSpeed: start one process per device "
                "with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
            )
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:  # type: ignore[attr-defined]
            raise ConfigError(
                "label_smoothing_factor and compute_loss_func do not reach a local step, whose loss is the task's. "
                "Leave them out; write localgrad.tasks.classification(n, label_smoothing=0.1), or a loss of yours in "
                "localgrad.tasks.custom(...)"
            )
        self.model_accepts_loss_kwargs = False
        if self.args.label_names is None:
            self.label_names = find_labels(type(model.model))
        self.add_callback(_Exchange(model))  # type: ignore[attr-defined]
        if dist.is_initialized() and dist.get_world_size() > 1:
            data_parallel(model, device_mesh(self.args.device.type, data=dist.get_world_size()))

    @contextlib.contextmanager
    def _plain(self) -> Iterator[LocalNetwork]:
        """Inside it the trainer sees the model alone."""
        network = self.model
        self.model = network.model
        try:
            yield network
        finally:
            self.model = network

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A local step in training; in evaluation what the trainer does."""
        if return_outputs or not model.training:
            computed: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
            return computed
        given = dict(inputs)
        if "labels" not in given:
            raise ConfigError(f"a batch has {', '.join(given)} and no labels; name the targets of the data set so")
        targets, scaler = given.pop("labels"), self.accelerator.scaler
        shifted = getattr(self.model.model, "prepare_decoder_input_ids_from_labels", None)
        if shifted is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & given.keys():
            given["decoder_input_ids"] = shifted(labels=targets)  # as the model does where it sees the labels
        scale = 1.0 if scaler is None else scaler.get_scale()
        return loss(self.model, given, targets, self.state.global_step, scale=scale)

    def _set_signature_columns_if_needed(self) -> None:
        with self._plain():
            super()._set_signature_columns_if_needed()  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self._plain() as network:
            super()._save(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            heads = sealed.tensors_data(network.auxiliary.state_dict())
            sealed.write(Path(output_dir or self.args.output_dir) / HEADS, heads)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._plain() as network:
            super()._load_from_checkpoint(resume_from_checkpoint)  # type: ignore[misc]
        network.auxiliary.load_state_dict(sealed.read_tensors(Path(resume_from_checkpoint) / HEADS))

    def _load_best_model(self) -> None:
        with self._plain() as network:
            super()._load_best_model()  # type: ignore[misc]
        network.auxiliary.load_state_dict(sealed.read_tensors(Path(self.state.best_model_checkpoint) / HEADS))


class LocalTrainer(LocalTrainerMixin, Trainer):  # type: ignore[misc]
    """The ``Trainer`` of transformers with local steps; see `LocalTrainerMixin`."""


class _Exchange(TrainerCallback):
    """Moves twins after each optimizer step."""

    def __init__(self, network: LocalNetwork) -> None:
        self.network = network

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        exchange(self.network)
