"""Features that travel in fewer bytes: what is lost, how many bytes are left, and where it is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_block_parallel import train
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gang
import localgrad
from localgrad import methods
from localgrad.distributed import block_parallel
from localgrad.distributed.compression import compressed, restored
from zoo import METHODS, build

DGL = METHODS["dgl"]
NAMES = ("dgl", "man(dgl)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_off_by_half_a_step_of_its_own_scale(dtype: torch.dtype) -> None:
    features = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[1] *= 1000  # scales are each sample's own
    features[2, 1] = 0
    values, scales = compressed(features, "int8")
    assert values.dtype == torch.int8 and scales.shape == (4, 3, 1, 1) and scales.dtype == dtype
    back = restored((values, scales), dtype)
    assert back.dtype == dtype
    for sample in range(4):
        for channel in range(3):
            exact, found = features[sample, channel].double(), back[sample, channel].double()
            step = exact.abs().max() / 127
            rounding = 2 * torch.finfo(dtype).eps * exact.abs().max()
            assert (found - exact).abs().max() <= 0.5 * step + 64 * rounding
    assert torch.equal(back[2, 1], features[2, 1])
    again = compressed(back.double(), "int8")[0] if dtype is torch.float64 else values
    assert torch.equal(again, values)


def test_scales_follow_the_shape_and_what_is_not_finite_stays_so() -> None:
    assert compressed(torch.randn(6, 7), "int8")[1].shape == (6, 1)
    assert compressed(torch.randn(6, 17, 12), "int8")[1].shape == (6, 17, 1)
    for value in (torch.inf, -torch.inf, torch.nan):
        features = torch.ones(2, 3, 4)
        features[0, 1, 2] = value
        back = restored(compressed(features, "int8"), features.dtype)
        assert back.isnan()[0, 1].all() and torch.equal(back[1], features[1]) and back[0, [0, 2]].isfinite().all()
    tiny = torch.full((1, 1, 3), 1e-42)
    assert (restored(compressed(tiny, "int8"), tiny.dtype) - tiny).abs().max() <= torch.finfo(torch.float32).tiny
    for kept in (torch.arange(6), torch.randn(0, 3), torch.tensor(1.5)):
        assert compressed(kept, "int8") == (kept,)
    half = torch.randn(2, 3, dtype=torch.float16)
    assert compressed(half, "bf16") == (half,) and compressed(half.double(), "bf16")[0].dtype == torch.bfloat16


def rounded(wire: str) -> object:
    """A hook that gives the module a block begins with the features another rank would have received."""

    def hook(_: torch.nn.Module, features: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(restored(compressed(f, wire), f.dtype) for f in features)

    return hook


def two_ranks() -> dict[str, object]:
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=("block",)), dist.get_rank()
    found: dict[str, object] = {}
    for wire in ("bf16", "int8"):
        for name in NAMES:
            network = block_parallel(build("cnn", METHODS[name], 4), mesh, place=[0, 0, 1, 1], wire=wire)
            train(network, rank == 0, 4)
            network.stage.close()
            found[f"bytes, {wire}, {name}"] = network.stage.bytes_sent["values"]
            network.stage.gather()
            states = []
            for simulated in (wire, "same"):
                reference = build("cnn", METHODS[name], 4)
                begin = reference.model.get_submodule(reference.cuts[1].name)
                begin.register_forward_pre_hook(rounded(simulated))
                train(reference, True, 4)
                states.append(reference.state_dict())
            ours = network.state_dict()
            wrong = [key for key, value in states[0].items() if not torch.equal(ours[key], value)]
            found[f"wrong, {wire}, {name}"] = wrong
            found[f"exact, {wire}, {name}"] = all(torch.equal(ours[k], v) for k, v in states[1].items())

    def refusal(method: object, **options: object) -> str:
        own = DeviceMesh.from_group(dist.new_group(), "cpu", mesh_dim_names=("block",))
        try:
            block_parallel(build("cnn", method, 4), own, **options)
        except localgrad.LocalgradError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found["windows"] = refusal(methods.windows(DGL), wire="int8")
    found["guided"] = refusal(methods.pgl(DGL, every=3), wire="bf16")
    found["inside"] = refusal(methods.windows(DGL, width=2, stride=2), place=[0, 0, 1, 1], wire="int8")
    found["unknown"] = refusal(DGL, wire="int4")
    found["differing"] = refusal(DGL, wire=("same", "int8")[rank])
    return found


def test_two_ranks_equal_one_process_that_rounds_and_bytes_are_counted() -> None:
    """Batches of 14, 14, 14, 12 images, features (14, 8, 8, 8) and targets (14,) int64; two messages close the link."""
    first, second = gang.run(two_ranks, 2)
    rows, channels, pixels, messages = 14, 8, 64, 4 + 2
    targets = rows * 8
    size = {
        "bf16": rows * channels * pixels * 2 + targets,
        "int8": rows * channels * pixels + rows * channels * 4 + targets,
    }
    assert (rows * channels * pixels) % 64 == 0 and (rows * channels * 4) % 64 == 0  # where the next tensor begins
    for wire in size:
        for name in NAMES:
            assert first[f"bytes, {wire}, {name}"] == messages * size[wire]
            for found in (first, second):
                assert found[f"wrong, {wire}, {name}"] == [] and not found[f"exact, {wire}, {name}"]
    for found in (first, second):
        assert "MethodError: wire='int8' rounds the features that block" in found["windows"]
        assert "trains blocks 0 to 3 together" in found["guided"]
        assert found["inside"] == ""
        assert "ConfigError" in found["unknown"] and "int8" in found["unknown"]
        assert "rank 1 does not run the same job as rank 0: wire is 'int8' there and 'same' here" in found["differing"]
