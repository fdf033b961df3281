"""Keys, generators and the state they leave behind."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from localgrad.randomness import draws_of, generator, key, keyed_randomness, seeded, seeded_everywhere

CPU = torch.device("cpu")


def test_keys_depend_on_every_part_and_its_place() -> None:
    parts = [(), (0,), (1,), ("0",), (0, 0), (0, 1), (1, 0), ("a", "b"), ("ab",), ("a", 1), (1, "a"), (11,), (1, 1)]
    values = [key(*p) for p in parts]
    assert len(set(values)) == len(parts)
    assert all(0 <= value < 2**63 for value in values)
    assert values == [key(*p) for p in parts]


def test_keys_are_the_same_in_every_process() -> None:
    code = "from localgrad.randomness import key; print(key(7, 'block', 3))"
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == key(7, "block", 3)


def test_generator_is_its_key() -> None:
    assert generator(1, "a").initial_seed() == key(1, "a")
    assert torch.equal(torch.rand(3, generator=generator(1)), torch.rand(3, generator=generator(1)))


def test_seeded_puts_the_state_back_also_after_an_error() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with seeded(1, "x"):
        first = torch.rand(3)
    with pytest.raises(RuntimeError), seeded(1, "x"):
        second = torch.rand(3)
        raise RuntimeError
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_everywhere_seeds_python_and_numpy_and_puts_them_back() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with seeded_everywhere(3):
        first = draw()
    with seeded_everywhere(3):
        assert draw() == first
    with seeded_everywhere(4):
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def draw(purpose: str = "block", step: int = 0, part: int = 0, index: int | str = 0) -> float:
    with draws_of(purpose, step, part, index, CPU):
        return float(torch.rand(()))


def test_draws_depend_on_each_key() -> None:
    with keyed_randomness(0):
        base = draw()
        assert base == draw()
        others = [draw("auxiliary"), draw(step=1), draw(part=1), draw(index=1), draw(index="0")]
    with keyed_randomness(1):
        others.append(draw())
    with keyed_randomness(0, replica=1):
        others.append(draw())
    assert len({base, *others}) == 8


def test_without_keys_nothing_is_seeded() -> None:
    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert first != second and [first, second] == torch.rand(2).tolist()


def test_contexts_nest_and_end() -> None:
    with keyed_randomness(0):
        outer = draw()
        with keyed_randomness(1):
            assert draw() != outer
        assert draw() == outer
        with pytest.raises(RuntimeError), keyed_randomness(2):
            raise RuntimeError
        assert draw() == outer
    torch.manual_seed(0)
    a = draw()
    torch.manual_seed(0)
    assert a == draw() and a != outer
