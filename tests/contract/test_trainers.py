"""Local steps in the trainers of others: mixed precision reaches the blocks, checkpoints go on where they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from gradients import assert_same
from localgrad import local_losses, localize, methods

CLASSES, BF16 = 4, torch.bfloat16
TASK = localgrad.tasks.classification(CLASSES)
DGL = methods.dgl(TASK)
CUTS = (("2", "4"), ("0", "2", "4"))  # names, and where blocks begin


def mlp(dropout: float = 0.2) -> nn.Sequential:
    """Layers called 0 to 5; in bfloat16 other results than in float32."""
    torch.manual_seed(0)
    widths = [8, *[16] * 5]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Dropout(dropout), nn.Tanh()) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(16, CLASSES))


def data(size: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 8, generator=generator), torch.arange(size) % CLASSES


def network_of(model: nn.Module) -> localgrad.LocalNetwork:
    torch.manual_seed(1)  # heads
    return localize(model, DGL, CUTS[0], example=data(2)[0])


def dtypes_of(module: nn.Module) -> list[torch.dtype]:
    """The precision of what a module returns, call by call from now on."""
    found: list[torch.dtype] = []
    module.register_forward_hook(lambda _, args, output: found.append(output.dtype))
    return found


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def blocks_by_hand(network: localgrad.LocalNetwork, x: Tensor, y: Tensor, autocast: bool = True) -> dict[str, Tensor]:
    """DGL in bfloat16 as one would write it: blocks, heads and losses under autocast, backward passes outside."""
    layers = list(network.model)
    for k, (start, stop) in enumerate([(0, 2), (2, 4), (4, 6)]):
        with torch.autocast("cpu", BF16, enabled=autocast):
            for layer in layers[start:stop]:
                x = layer(x)
            answer = x if stop == 6 else network.auxiliary[f"{k}-{k + 1}"](x)[0]
            loss = F.cross_entropy(answer.float(), y)
        loss.backward()
        x = x.detach()
    return gradients(network)


# accelerate


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> Iterator[Any]:
    """In bfloat16, or in what a test is parametrized with; accelerate keeps its settings for the whole process."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision=getattr(request, "param", "bf16"), cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("prepared", ["the model before localize", "the network"])
def test_accelerate_mixed_precision_reaches_the_blocks(accelerator: Any, prepared: str) -> None:
    x, y = data()
    expected = blocks_by_hand(network_of(mlp(dropout=0.0)), x, y)
    model = mlp(dropout=0.0)
    if prepared == "the network":
        network = accelerator.prepare(network_of(model))
    else:
        network = network_of(accelerator.prepare(model))
    assert isinstance(network, localgrad.LocalNetwork)
    inside = dtypes_of(model[3])
    for _, loss in local_losses(network, x, y):
        assert not torch.is_autocast_enabled("cpu")  # the forward is suspended inside autocast, its caller is not
        assert loss.dtype == torch.float32
        accelerator.backward(loss)
    assert inside == [BF16]
    assert_same(gradients(network), expected)
    # What is trained in bfloat16 is evaluated in bfloat16, by the model and by the heads.
    network.eval()
    with torch.no_grad():
        output = network(x)
    answers = [answer for _, _, answer in localgrad.local_outputs(network, x)]
    assert inside == [BF16] * 3 and torch.equal(answers[-1], output)
    assert [answer.dtype for answer in answers] == [BF16, BF16, torch.float32]  # accelerate widens the model's own


@pytest.mark.parametrize("accelerator", ["no"], indirect=True)
def test_accelerate_without_mixed_precision_changes_nothing(accelerator: Any) -> None:
    x, y = data()
    plain, network = network_of(mlp()), accelerator.prepare(network_of(mlp()))
    found = []
    for one in (plain, network):
        torch.manual_seed(2)
        localgrad.backward(one, x, y)
        found.append(gradients(one))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("prepared", ["the model before localize", "the network"])
def test_accelerate_saves_and_resumes(accelerator: Any, prepared: str, tmp_path: Path) -> None:
    def made() -> tuple[localgrad.LocalNetwork, Any]:
        if prepared == "the network":
            network = network_of(mlp())
            return accelerator.prepare(network, torch.optim.AdamW(network.parameters(), 0.01))
        network = network_of(accelerator.prepare(mlp()))
        accelerator.register_for_checkpointing(network.auxiliary)
        return network, accelerator.prepare(torch.optim.AdamW(network.parameters(), 0.01))

    def train(network: localgrad.LocalNetwork, optimizer: Any, steps: range) -> dict[str, Tensor]:
        for step in steps:
            for _, loss in local_losses(network, *data(seed=step), step):
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in network.state_dict().items()}

    first = made()
    train(*first, range(3))
    accelerator.save_state(str(tmp_path))
    expected = train(*first, range(3, 6))
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    again = made()
    again[0].train()
    torch.manual_seed(99)  # the saved generator decides what dropout draws
    accelerator.load_state(str(tmp_path))
    assert_same(train(*again, range(3, 6)), expected)


# The Trainer of transformers


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **sizes))


def texts() -> list[dict[str, Tensor]]:
    """The first word tells the class."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for label in range(2):
        for _ in range(16):
            words = torch.randint(8, 64, (12,), generator=generator)
            words[0] = label
            samples.append({"input_ids": words, "attention_mask": torch.ones(12).long(), "labels": torch.tensor(label)})
    return samples


def trainer_of(model: Any, folder: Path, **options: Any) -> Any:
    """A Trainer whose step is local, and that keeps its losses."""
    from transformers import TrainingArguments

    from localgrad.integrations.transformers import LocalTrainer

    class Recorded(LocalTrainer):
        last: list[float] = []  # noqa: RUF012

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            value: Tensor = super().training_step(*args, **kwargs)
            self.last = [*self.last, float(value)]
            return value

    given = {"max_steps": 16, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "save_steps": 8, **options}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    samples = texts()
    example = {name: torch.stack([s[name] for s in samples[:2]]) for name in ("input_ids", "attention_mask")}
    torch.manual_seed(1)
    names = ("bert.encoder.layer.1", "bert.encoder.layer.3")
    network = localize(model, methods.dgl(localgrad.tasks.classification(2)), names, example=example)
    return Recorded(network, TrainingArguments(str(folder), **given, **quiet), train_dataset=samples)


# transformers has renamed its option; the old name is the one that all of its version 5 know.
OLD_NAME = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")


@OLD_NAME
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_a_transformers_trainer_takes_local_steps(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(bert(), tmp_path, **options, save_strategy="no")
    layers = trainer.model.model.bert.encoder.layer
    inside = [dtypes_of(layer.attention.self.query) for layer in layers]
    trainer.train()
    runs = trainer.state.max_steps * (2 if "gradient_checkpointing" in options else 1)
    assert inside == [[BF16 if "bf16" in options else torch.float32] * runs] * len(layers)
    first, last = trainer.last[:4], trainer.last[-4:]
    assert sum(last) < 0.9 * sum(first)
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


@OLD_NAME
def test_a_transformers_trainer_gives_the_gradients_of_no_trainer(tmp_path: Path) -> None:
    inputs = texts()[8:24]
    batch = {name: torch.stack([sample[name] for sample in inputs]) for name in inputs[0]}
    found = []
    for options in ({}, {"gradient_checkpointing": True}):
        trainer = trainer_of(bert(), tmp_path, **options, max_steps=1, save_strategy="no", learning_rate=0.0)
        trainer.train()
        torch.manual_seed(2)
        trainer.training_step(trainer.model_wrapped, dict(batch))
        found.append(gradients(trainer.model))
    network = trainer_of(bert(), tmp_path).model
    torch.manual_seed(2)
    labels = batch.pop("labels")
    localgrad.backward(network.train(), batch, labels)
    for one in found:
        assert_same(one, gradients(network))


def test_losses_of_a_transformers_trainer_that_a_local_step_would_pass_by_are_refused(tmp_path: Path) -> None:
    with pytest.raises(localgrad.ConfigError, match=r"label_smoothing=0\.1"):
        trainer_of(bert(), tmp_path, label_smoothing_factor=0.1)
    trainer = trainer_of(bert(), tmp_path)
    with pytest.raises(localgrad.ConfigError, match="compute_loss_func do not reach a local step"):
        type(trainer)(trainer.model, trainer.args, compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum())


def test_an_encoder_decoder_makes_its_inputs_of_the_labels(tmp_path: Path) -> None:
    """As it does in a plain Trainer, which hands the labels on to the model."""
    transformers = pytest.importorskip("transformers")
    from localgrad.integrations.transformers import LocalTrainer

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    ids = torch.randint(1, 20, (8, 6))

    def made() -> localgrad.LocalNetwork:
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=20, dropout_rate=0, **sizes))
        method = methods.dgl(localgrad.tasks.language_model(20, shift=False))
        return localize(model, method, 2, example={"input_ids": ids[:2], "decoder_input_ids": ids[:2]}, shared=True)

    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, learning_rate=0.0, **quiet)
    trainer = LocalTrainer(made(), arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    trainer.training_step(trainer.model_wrapped, {"input_ids": ids, "labels": ids})
    network = made()
    begun = torch.cat([torch.zeros(8, 1, dtype=torch.int64), ids[:, :-1]], dim=1)
    localgrad.backward(network.train(), {"input_ids": ids, "decoder_input_ids": begun}, ids)
    assert_same(gradients(trainer.model), gradients(network))


@OLD_NAME
def test_a_reentrant_checkpoint_in_a_trainer_loses_no_gradient_in_silence(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(bert(), tmp_path, **options, save_strategy="no", max_steps=1)
    before = copy.deepcopy(trainer.model.state_dict())
    try:
        trainer.train()
    except localgrad.PartitionError as error:
        assert "use_reentrant=False" in str(error)
    else:
        after = trainer.model.state_dict()
        assert [k for k in before if torch.equal(before[k], after[k])] == ["model.bert.embeddings.position_ids"]


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpoints_of_a_transformers_trainer(bf16: bool, tmp_path: Path) -> None:
    whole = trainer_of(bert(), tmp_path, bf16=bf16)
    whole.train()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}

    loaded = type(whole.model.model).from_pretrained(tmp_path / "checkpoint-16")
    assert_same(loaded.state_dict(), whole.model.model.state_dict())

    other = bert()
    nn.init.normal_(other.classifier.weight)
    again = trainer_of(other, tmp_path, bf16=bf16)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.state.global_step == 16 and len(again.last) == 8
    assert again.last == whole.last[8:]
    assert_same(again.model.state_dict(), expected)


# Lightning


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning")

    class Local(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.network = network_of(mlp(dropout=0.0))
            self.losses: list[float] = []
            self.first: dict[str, Tensor] = {}

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for _, loss in local_losses(self.network, *batch, self.global_step):
                self.manual_backward(loss)
            self.losses.append(loss.item())
            self.first = self.first or gradients(self.network)
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.network.parameters(), 0.01)

    return Local()


def fit(module: Any, folder: Path, epochs: int, precision: Any, checkpoint: Path | None = None) -> Any:
    import lightning

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "precision": precision, "enable_checkpointing": False, **quiet}
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **options)
    trainer.fit(module, torch.utils.data.DataLoader(list(zip(*data(16), strict=True)), 8), ckpt_path=checkpoint)
    return trainer


# Its own code calls what torch has deprecated.
LIGHTNING = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
)


@LIGHTNING
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lightning_module_takes_local_steps_by_hand(precision: str, tmp_path: Path) -> None:
    low = precision == "bf16-mixed"
    whole = lightning_module()
    inside = dtypes_of(whole.network.model[3])
    fit(whole, tmp_path, 4, precision)
    assert inside == [BF16 if low else torch.float32] * 8
    x, y = data(16)
    assert_same(whole.first, blocks_by_hand(network_of(mlp(dropout=0.0)), x[:8], y[:8], low))
    assert sum(whole.losses[-2:]) < sum(whole.losses[:2])

    begun = lightning_module()
    fit(begun, tmp_path, 2, precision).save_checkpoint(tmp_path / "half.ckpt")
    again = lightning_module()
    nn.init.zeros_(again.network.model[5].weight)
    fit(again, tmp_path, 4, precision, tmp_path / "half.ckpt")
    assert begun.losses + again.losses == whole.losses
    assert_same(again.state_dict(), whole.state_dict())


def local_module(batch: int = 4) -> Any:
    """Twins move, and dropout is drawn."""
    pytest.importorskip("lightning")
    from localgrad.integrations.lightning import LocalModule

    class Module(LocalModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(list(zip(*data(16), strict=True)), batch)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(list(zip(*data(8, seed=3), strict=True)), 8)

    torch.manual_seed(1)
    return Module(localize(mlp(), methods.man(DGL), CUTS[0], example=data(2)[0]))


def fitted(module: Any, folder: Path, epochs: int, precision: Any, checkpoint: Path | None = None, **more: Any) -> Any:
    """Two batches of four for each optimizer step; gradients are clipped."""
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", precision=precision, accumulate_grad_batches=2,
        gradient_clip_val=0.5, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **more,
    )  # fmt: skip
    with localgrad.keyed_randomness(seed=3):
        trainer.fit(module, ckpt_path=checkpoint)
    return trainer


@LIGHTNING
@pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_local_module_trains_as_a_loop_does_and_resumes(precision: str, tmp_path: Path) -> None:
    low = precision == "bf16-mixed"
    whole, alone = local_module(), local_module().network
    told = fitted(whole, tmp_path, 3, precision).callback_metrics
    optimizer, step = torch.optim.AdamW(alone.parameters(), 0.01), 0
    (x, y), autocast = data(16), BF16 if low else None
    with localgrad.keyed_randomness(seed=3):
        for _ in range(3):
            for parts in ((slice(0, 4), slice(4, 8)), (slice(8, 12), slice(12, 16))):
                optimizer.zero_grad()
                for part in parts:
                    for _, loss in local_losses(alone, x[part], y[part], step, autocast=autocast):
                        (loss / 2).backward()
                nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
                optimizer.step()
                localgrad.exchange(alone)
                step += 1
    assert_same(whole.network.state_dict(), alone.state_dict())
    x, y = data(8, seed=3)
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=low):
        answer = alone.eval()(x)
    assert float(told["val_loss"]) == pytest.approx(float(F.cross_entropy(answer.float(), y)), rel=1e-6)

    fitted(local_module(), tmp_path, 1, precision).save_checkpoint(tmp_path / "one.ckpt")
    again = local_module()
    nn.init.zeros_(again.network.model[5].weight)
    fitted(again, tmp_path, 3, precision, tmp_path / "one.ckpt")
    found, expected = again.state_dict(), whole.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@LIGHTNING
@pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers")
def test_a_local_module_scales_losses_in_half_precision(tmp_path: Path) -> None:
    """Whatever the factor, gradients are those of the loss itself."""
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    few, many, exact = local_module(), local_module(), local_module()
    for module, factor in ((few, 2.0**4), (many, 2.0**10)):
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        fitted(module, tmp_path, 1, None, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert scaler.get_scale() == factor  # no step was left out
    fitted(exact, tmp_path, 1, "32-true")
    for key, value in exact.network.state_dict().items():
        torch.testing.assert_close(few.network.state_dict()[key], many.network.state_dict()[key])
        torch.testing.assert_close(few.network.state_dict()[key], value, atol=0.05, rtol=0.0)


def test_a_local_module_refuses_several_processes() -> None:
    module = local_module()
    module._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(localgrad.ConfigError, match="devices=1"):
        module.setup("fit")
