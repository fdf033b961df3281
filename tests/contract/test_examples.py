"""Each example trains to the weights of a plain loop over the same batches."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = ("hf_trainer", "trl_sft", "accelerate_loop", "lightning_module")


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def check(name: str, network: Any, other: Any, batches: list[Any], *folder: Path) -> None:
    example, plain = importlib.import_module(name), importlib.import_module("plain_loop")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    example.train(network, *(folder or (batches,)))
    plain.train(other, batches)
    found, expected = network.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    frozen = {key for key, parameter in network.named_parameters() if not parameter.requires_grad}
    assert all(torch.equal(before[key], found[key]) for key in frozen)
    assert any(not torch.equal(before[key], found[key]) for key in before)


# What the trainers' own code says of what torch and transformers have renamed.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TEXT)
def test_trainers_of_text(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"hf_trainer": "transformers", "trl_sft": "trl"}.get(name, name.partition("_")[0]))
    plain = importlib.import_module("plain_loop")
    folder = (tmp_path,) if name in ("hf_trainer", "trl_sft") else ()
    check(name, plain.network(), plain.network(), plain.text_batches(), *folder)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "package", "batches"),
    [
        ("timm_loop", "timm", "timm_loop.image_batches"),
        ("peft_lora", "peft", "plain_loop.text_batches"),
        ("text_classification", "transformers", "text_classification.text_batches"),
        ("masked_lm", "transformers", "masked_lm.text_batches"),
    ],
)
def test_models_of_others(name: str, package: str, batches: str) -> None:
    pytest.importorskip(package)
    example = importlib.import_module(name)
    drawn = pkgutil.resolve_name(batches)()
    check(name, example.network(), example.network(), drawn)


def test_accelerate_in_two_processes() -> None:
    pytest.importorskip("accelerate")
    plain = importlib.import_module("plain_loop")
    whole = plain.train(plain.network(), plain.text_batches())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "accelerate_loop.py")], capture_output=True, text=True, timeout=200, check=True
    )
    ranks = [ast.literal_eval(found) for found in re.findall(r"\[[^\[\]]+\]", done.stdout)]
    assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(whole, rel=1e-4)


# Of two ranks, the first takes the first half of what one process takes at once.
TWO_RANKS = """
import sys
from pathlib import Path
import hf_trainer, plain_loop, torch
network = plain_loop.network()
trainer = hf_trainer.train(network, Path(sys.argv[1]))
assert trainer.args.world_size == 2 and trainer.state.global_step == 3
torch.save(network.state_dict(), Path(sys.argv[1]) / f"rank{trainer.args.process_index}.pt")
"""


def test_a_trainer_of_transformers_in_two_processes(tmp_path: Path) -> None:
    """Replicas have the same bits, and the weights of one process on the joined batches."""
    pytest.importorskip("transformers")
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    seen = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    subprocess.run([*command, "script.py", str(tmp_path)], cwd=tmp_path, check=True, timeout=200, env=seen)
    plain = importlib.import_module("plain_loop")
    whole = plain.network()
    plain.train(whole, [({"input_ids": tokens}, tokens) for tokens in plain.counting().split(16)])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], value) for key, value in second.items())
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_change_is_small(path: Path) -> None:
    """It is shown as a difference of at most seven lines, in a script of at most sixty lines of code."""
    text = path.read_text()
    code = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    shown = [line for line in (ast.get_docstring(ast.parse(text)) or "").splitlines() if re.match(r" *[-+]", line)]
    assert 2 <= len(shown) <= 7 and len(code) <= 60
