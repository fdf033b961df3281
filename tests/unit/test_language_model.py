"""Language models: the loss in chunks against logits that are whole, what counts, and who reads the output matrix."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad
from localgrad import localize, methods
from localgrad.costs import cost
from localgrad.engine import backward
from localgrad.errors import ConfigError, MethodError, PartitionError, TrainingError
from localgrad.models import ChunkedLM
from localgrad.task import Batch
from localgrad.tasks import language_model

WORDS, LENGTH, WIDTH = 11, 7, 5


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(seed))


def literal(logits: Tensor, targets: Tensor, shift: bool) -> Tensor:
    """Token by token: the mean of -log softmax over those that count."""
    total, count = logits.new_zeros(()), 0
    for row, wanted in zip(logits, targets, strict=True):
        for t in range(len(wanted)):
            at = t - 1 if shift else t
            if at >= 0 and wanted[t] != -100:
                total = total - row[at].log_softmax(0)[wanted[t]]
                count += 1
    return total / max(1, count)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 14, 1000])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_chunks_are_the_whole_loss(shift: bool, chunk: int, ignored: str) -> None:
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=draw, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, dtype=torch.float64, generator=draw, requires_grad=True)
    targets = ids(2, LENGTH)
    if ignored != "none":
        targets[:, : LENGTH if ignored == "all" else 3] = -100
    task = language_model(WORDS, shift=shift, chunk=chunk)
    expected = literal(features @ weight.T, targets, shift)
    gradients = torch.autograd.grad(expected + 0 * features.sum() + 0 * weight.sum(), [features, weight])
    for output in ({"features": features, "weight": weight}, features @ weight.T):
        loss = task.loss(output, Batch(None, targets, 0))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for found, wanted in zip(torch.autograd.grad(loss, [features, weight]), gradients, strict=True):
            torch.testing.assert_close(found, wanted)


def test_scores_and_figures() -> None:
    targets = torch.tensor([[3, 1, 4, 1], [5, -100, -100, -100]])
    logits = torch.zeros(2, 4, WORDS)
    logits[0, 0, 1] = logits[0, 1, 9] = logits[0, 2, 1] = 5.0  # right, wrong, right; the last position answers nothing
    task = language_model(WORDS)
    assert task.score(logits, targets).tolist() == pytest.approx([2 / 3, 1.0])
    metric = task.metric()
    metric.update(logits, targets)
    metric.update(logits, targets)
    figures = metric.compute()
    nats = float(literal(logits, targets, True))
    assert figures == pytest.approx({"accuracy": 2 / 3, "bits": nats / math.log(2), "perplexity": math.exp(nats)})


def llama(**sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    given = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**given, "vocab_size": WORDS, "use_cache": False, **sizes})).train()


def test_the_loss_is_that_of_transformers() -> None:
    model, x = llama(), ids(3, LENGTH)
    labels = x.masked_fill(ids(3, LENGTH, seed=1) < 3, -100)
    task = language_model(WORDS, chunk=4)
    network = localize(model, methods.e2e(task), 1, example={"input_ids": x})
    backward(network, {"input_ids": x}, labels)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(input_ids=x, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("read_out", ["own", "shared"])
def test_gradients_of_blocks_are_those_of_a_loop(read_out: Any) -> None:
    """Two blocks of a model in chunks: each by its own loss, nothing crosses, the matrix belongs to the last block."""
    model, x = llama().double(), ids(3, LENGTH)
    task = language_model(WORDS, chunk=4, read_out=read_out)
    network = localize(ChunkedLM(model), methods.dgl(task), ["model.model.layers.2"], example=x)
    backward(network, x, x)
    found = {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
    }
    network.zero_grad()
    (auxiliary,) = network.auxiliary.values()
    (head,) = auxiliary.heads

    class Stop(Exception):
        pass

    kept: list[Any] = []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept.append((args, kwargs))
        raise Stop

    hook = model.model.layers[2].register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Stop):
        model(x)
    hook.remove()
    ((features,), kwargs) = kept[0]
    out = head(features)
    literal(out["features"] @ out["weight"].T, x, True).backward()
    hidden = features.detach()
    for layer in model.model.layers[2:]:
        hidden = layer(hidden, **kwargs)
    literal(model.lm_head(model.model.norm(hidden)), x, True).backward()
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    own = sum(p.numel() for p in head.parameters())
    assert own == 16 * (read_out == "shared") + (16 + 16 * WORDS) * (read_out == "own")


METHODS = {
    "dgl": lambda task: methods.dgl(task),
    "man": lambda task: methods.man(methods.dgl(task)),
    "man_pp": lambda task: methods.man_pp(methods.dgl(task)),
    "mlaan": lambda task: methods.mlaan(methods.dgl(task)),
    "auglocal": lambda task: methods.auglocal(task, depth=1, tail=1),
    "lean": lambda task: methods.lean(task, factor=1),
    "pgl": lambda task: methods.pgl(methods.dgl(task), every=2, recompute=False),
    "windows": lambda task: methods.windows(methods.dgl(task)),
    "parts": lambda task: methods.accumulation(methods.dgl(task), parts=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_learn_a_rule(name: str) -> None:
    """The next token is the last one plus 1: every head answers it after a few steps."""
    task = language_model(WORDS, chunk=8)
    starts = ids(8, 1)
    x = (starts + torch.arange(LENGTH)) % WORDS
    network = localize(llama(), METHODS[name](task), 2, example=x)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    first: dict[Any, float] = {}
    for step in range(40):
        losses = backward(network, x, x, step)
        for span, loss in losses.items():
            first.setdefault(span, float(loss))
        optimizer.step()
        optimizer.zero_grad()
    assert all(float(loss) < 0.3 * first[span] for span, loss in losses.items()), (first, losses)


def test_logits_are_never_whole() -> None:
    """Activation bytes of a step do not grow with the vocabulary by more than a chunk of logits and its gradient."""
    x = ids(4, 64)

    def held(words: int, chunk: int) -> int:
        task = language_model(words, chunk=chunk)
        model = ChunkedLM(llama(vocab_size=words))
        return cost(localize(model, methods.dgl(task), 2, example=x), x, x).activation_bytes

    grown = held(4096, 16) - held(16, 16)
    assert grown < 4 * 4 * 16 * 4096 < 4 * 4 * 63 * 4096 / 3 < held(4096, 10**6) - held(16, 10**6)


def test_refusals() -> None:
    x = ids(2, LENGTH)
    task = language_model(WORDS)
    for options, message in (
        ({"vocabulary": 1}, "at least 2"),
        ({"vocabulary": 9, "chunk": 0}, "chunk=0"),
        ({"vocabulary": 9, "read_out": "mine"}, "'own' or 'shared'"),
    ):
        with pytest.raises(ConfigError, match=message):
            language_model(**options)
    for output, targets, message in (
        (torch.zeros(2, LENGTH, 3), x, "needs logits"),
        (torch.zeros(2, LENGTH, WORDS), x[:, 1:], "int64 tokens of shape"),
        (torch.zeros(2, LENGTH, WORDS), x.float(), "int64 tokens of shape"),
        (torch.zeros(2, LENGTH, WORDS), x + WORDS, "it takes 0 to 10"),
    ):
        with pytest.raises(TrainingError, match=message):
            task.loss(output, Batch(None, targets, 0))
    with pytest.raises(MethodError, match="pooled positions know of tokens that they are to answer"):
        localize(llama(), methods.pooled(methods.dgl(task)), 2, example=x)
    with pytest.raises(TrainingError, match="tokens have no pixels"):
        task.pixels(x)


def test_a_model_whose_logits_are_more_than_a_product_is_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=WORDS, final_logit_softcapping=30.0)
    capped = Gemma2ForCausalLM(config)  # as it is published; no logit of the first weights is near the cap
    weights = {name: value.clone() for name, value in capped.state_dict().items()}
    with pytest.raises(ConfigError, match="a soft cap follows"):
        ChunkedLM(capped)
    assert all(torch.equal(value, weights[name]) for name, value in capped.state_dict().items())
    unbiased = ChunkedLM(llama())
    out = unbiased(ids(1, 3))
    torch.testing.assert_close(F.linear(out["features"], out["weight"]), unbiased.model(ids(1, 3)).logits)


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_models_of_transformers_by_name_and_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = localgrad.models.create("transformers:llama", num_classes=WORDS, context=LENGTH, **SIZES)
    assert isinstance(model, ChunkedLM)
    assert (model.model.config.vocab_size, model.model.config.max_position_embeddings) == (WORDS, LENGTH)
    model.model.save_pretrained(tmp_path)
    again = localgrad.models.create(f"transformers:{tmp_path}", num_classes=WORDS, context=LENGTH)
    assert not torch.equal(again(ids(2, LENGTH))["features"], model(ids(2, LENGTH))["features"])
    said = localgrad.models.load_pretrained(again, tmp_path / "model.safetensors")
    assert "stay random" not in said
    assert torch.equal(again(ids(2, LENGTH))["features"], model(ids(2, LENGTH))["features"])
    assert "transformers:gpt2" in localgrad.models.available("transformers")


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("lama", {}, "did you mean 'llama'"),
        ("llama", {"num_layers": 2}, "num_hidden_layers"),
        ("llama", {"hidden_size": 15, "num_attention_heads": 2}, "hidden size"),
        ("bert", SIZES, "a bias"),
    ],
)
def test_models_that_cannot_be_trained_so_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        localgrad.models.create(f"transformers:{name}", num_classes=WORDS, context=LENGTH, **options)


def test_a_model_that_sees_what_it_is_to_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="sees the tokens after it"):
        ChunkedLM(Seeing(llama()))


class Seeing(nn.Module):
    """Each position gets the mean of all."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.lm_head, self.device = Mixed(model.base_model), model.lm_head, model.device

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.base_model(ids)[0]))


class Mixed(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        hidden = self.base(ids)[0]
        return (hidden + hidden.mean(1, keepdim=True),)


def test_a_parameter_among_the_outputs_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.weight = nn.Parameter(torch.randn(WORDS, 8))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": self.layers(x), "weight": self.weight}

    x = ids(2, LENGTH)
    network = localize(Scaled(), methods.dgl(language_model(WORDS)), ["layers.3"], example=x)
    with pytest.raises(PartitionError, match=r"return parameter.view_as\(parameter\)"):
        backward(network, x, x)


def test_classifiers_of_transformers_need_no_wrapper() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=WORDS, num_labels=3)).train()  # type: ignore[call-arg]
    x, y = {"input_ids": ids(4, LENGTH)}, torch.tensor([0, 1, 2, 0])
    network = localize(model, methods.dgl(localgrad.tasks.classification(3)), 2, example=x)
    backward(network, x, y)
    assert all(p.grad is not None for p in model.parameters())
