"""Local losses against values worked out by hand; the papers' loops are in tests/reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from localgrad import Batch, TrainingError
from localgrad.losses import Contrastive, Reconstruction, Similarity
from localgrad.losses.similarity import similarity_matrix
from localgrad.tasks import classification


def given(targets: torch.Tensor, inputs: torch.Tensor | None = None) -> Batch:
    return Batch(inputs, targets, 0)


def test_contrastive_of_two_orthogonal_pairs() -> None:
    """Positives at cosine 1, others at 0: each anchor loses log(1 + 2 exp(-1 / t))."""
    z = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 3.0], [0.0, 1.0]], requires_grad=True)
    loss = Contrastive(temperature=0.5)(z, given(torch.tensor([0, 0, 1, 1])))
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_contrastive_does_not_see_lengths_and_its_gradient_is_orthogonal_to_them() -> None:
    torch.manual_seed(0)
    z, labels = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 0, 1, 2, 0])
    loss = Contrastive()(z, given(labels))
    torch.testing.assert_close(Contrastive()(z * torch.arange(1, 7)[:, None], given(labels)), loss)
    loss.backward()
    torch.testing.assert_close((z.grad * z).sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2, 3], [0, 0]])
def test_contrastive_without_positives_or_negatives_is_finite(labels: list[int]) -> None:
    z = torch.randn(len(labels), 4, requires_grad=True)
    loss = Contrastive()(z, given(torch.tensor(labels)))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()
    assert abs(loss.item()) < 1e-6  # no positives: 0; one pair and nobody else: probability 1


def test_contrastive_refuses_mixed_targets() -> None:
    with pytest.raises(TrainingError, match="mixup"):
        Contrastive()(torch.randn(4, 3), given(torch.rand(4, 3)))


def test_reconstruction_by_hand() -> None:
    image = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    logits = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    p = 1 / (1 + torch.exp(-logits))
    expected = -(image * p.log() + (1 - image) * (1 - p).log()).mean()
    task = classification(2, mean=(0.3,), std=(0.7,))
    found = Reconstruction(task)(logits, given(torch.zeros(2), (image - 0.3) / 0.7))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_reconstruction_is_least_at_the_image_and_stable_far_from_it() -> None:
    image = torch.rand(2, 3, 4, 4) * 0.8 + 0.1
    loss, batch = Reconstruction(classification(2)), given(torch.zeros(2), image)
    logits = torch.logit(image).requires_grad_()
    loss(logits, batch).backward()
    assert logits.grad.abs().max() < 1e-7
    far = torch.full((2, 3, 4, 4), 1e4, requires_grad=True)
    loss(far, batch).backward()
    assert far.grad.isfinite().all() and (far.grad > 0).all()


def test_a_smaller_decoder_is_compared_with_the_averaged_image() -> None:
    image = torch.rand(2, 3, 8, 8)
    logits = torch.randn(2, 3, 4, 4)
    means = image.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    found = Reconstruction(classification(2))(logits, given(torch.zeros(2), image))
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, means))


def test_similarity_matrix() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    expected = torch.tensor([[1.0, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(similarity_matrix(rows), expected)
    assert similarity_matrix(torch.randn(5, 7) * 1e3).abs().max() <= 1


def test_similarity_of_maps_compares_spread_over_positions() -> None:
    maps = torch.randn(4, 6, 5, 3)
    torch.testing.assert_close(similarity_matrix(maps), similarity_matrix(maps.flatten(2).std(2)))
    torch.testing.assert_close(similarity_matrix(maps + torch.randn(4, 6, 1, 1)), similarity_matrix(maps))
    single = torch.randn(4, 6, 1, 1)
    torch.testing.assert_close(similarity_matrix(single), similarity_matrix(single.flatten(1)))


def test_similarity_is_0_for_the_labels_themselves_and_4_at_most() -> None:
    targets = torch.tensor([0, 1, 2, 0])
    loss = Similarity(classification(3))
    assert loss(F.one_hot(targets, 3).float() * 5 + 2, given(targets)).item() == pytest.approx(0, abs=1e-12)
    assert 0 < loss(torch.randn(4, 3), given(targets)) <= 4
    torch.testing.assert_close(
        loss(torch.ones(4, 3).tril(), given(F.one_hot(targets, 3).float())),
        loss(torch.ones(4, 3).tril(), given(targets)),
    )


def test_similarity_of_constant_features_has_a_finite_gradient() -> None:
    maps = torch.zeros(3, 4, 2, 2, requires_grad=True)
    Similarity(classification(3))(maps + torch.ones(3, 4, 1, 1), given(torch.tensor([0, 1, 2]))).backward()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_keep_or_raise_the_precision(dtype: torch.dtype) -> None:
    images, targets = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 0, 1])
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    batch = given(targets, images)
    assert Contrastive()(torch.randn(4, 3).to(dtype), batch).dtype == expected
    assert Similarity(classification(2))(torch.randn(4, 3).to(dtype), batch).dtype == expected
    assert Reconstruction(classification(2))(torch.randn(4, 3, 4, 4).to(dtype), batch).dtype == expected
