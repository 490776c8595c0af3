import math
from collections.abc import Callable

import pytest
import torch

from prism_ray.methods.metrics import (
    confusion,
    effective_rank,
    intra_class_cosine,
    principal_axes,
    top1,
    top_k_hits,
    vendi_score,
)

CORNERS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def test_top1_is_the_share_of_hits():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    assert top1(logits, torch.tensor([0, 0, 0])) == pytest.approx(2 / 3)


def test_top1_refuses_ids_that_would_broadcast():
    with pytest.raises(ValueError, match=r"expected \(B, K\) and \(B,\)"):
        top1(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least one image"):
        top1(torch.zeros(0, 2), torch.zeros(0))


def test_cosine_of_three_corners_is_the_golden_value():
    mean, std = intra_class_cosine(CORNERS, torch.zeros(3, dtype=torch.int64))
    assert mean == pytest.approx(0.471405, abs=1e-6)
    assert std == 0


def test_cosine_agrees_with_a_loop_over_pairs():
    features, class_ids = torch.randn(12, 5, dtype=torch.float64), torch.tensor([0, 1, 1, 4] * 3)
    means = []
    for class_id in (0, 1, 4):
        rows = features[class_ids == class_id]
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        means.append(sum(torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i, j in pairs) / len(pairs))
    expected = torch.tensor(means, dtype=torch.float64)
    mean, std = intra_class_cosine(features, class_ids)
    assert mean == pytest.approx(expected.mean().item(), abs=1e-12)
    assert std == pytest.approx(expected.std(correction=0).item(), abs=1e-12)


def test_cosine_ignores_the_length_of_features_and_the_order_of_images():
    class_ids = torch.tensor([0, 0, 0, 1, 1, 1])
    features = torch.randn(6, 4, dtype=torch.float64)
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    expected = intra_class_cosine(features, class_ids)
    lengths = torch.tensor([[1e-12], [2.0], [3e8], [1.0], [0.5], [7.0]])
    assert intra_class_cosine(features * lengths, class_ids) == pytest.approx(expected, abs=1e-12)
    assert intra_class_cosine(features[order], class_ids[order]) == pytest.approx(expected, abs=1e-12)


def test_duplicates_have_similarity_one():
    mean, std = intra_class_cosine(torch.randn(1, 8).expand(5, 8), torch.zeros(5, dtype=torch.int64))
    assert mean == pytest.approx(1, abs=1e-12)
    assert std == 0


def test_one_image_per_class_has_no_similarity():
    mean, std = intra_class_cosine(CORNERS, torch.arange(3))
    assert math.isnan(mean)
    assert math.isnan(std)


def test_a_class_of_one_image_is_left_out():
    features = torch.cat([CORNERS, torch.tensor([[-1.0, 3.0]])])
    assert intra_class_cosine(features, torch.tensor([2, 2, 2, 5]))[0] == pytest.approx(0.471405, abs=1e-6)


def test_a_feature_of_length_zero_is_similar_to_nothing():
    mean, _ = intra_class_cosine(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.zeros(2, dtype=torch.int64))
    assert mean == 0


def test_top_k_counts_the_smaller_id_first_among_equals():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert [top_k_hits(logits, torch.tensor([2, 2]), k=k) for k in (1, 2, 3, 4)] == [0, 0, 2, 2]
    assert top_k_hits(logits, torch.tensor([3, 0]), k=9) == 2


def test_one_hit_of_the_first_answer_is_top1():
    logits, class_ids = torch.randn(50, 7), torch.randint(7, (50,))
    assert top_k_hits(logits, class_ids, k=1) == round(50 * top1(logits, class_ids))


@pytest.mark.parametrize("measure", [vendi_score, effective_rank])
def test_orthogonal_images_count_in_full_and_copies_as_one(measure: Callable[..., tuple[float, float]]):
    apart, alike = 3 * torch.eye(4, 9), torch.randn(1, 9).expand(4, 9)
    class_ids = torch.tensor([0] * 4 + [6] * 4)
    assert measure(apart, class_ids[:4]) == pytest.approx((4, 0), abs=1e-9)
    assert measure(alike, class_ids[:4]) == pytest.approx((1, 0), abs=1e-6)
    assert measure(torch.cat([apart, alike]), class_ids) == pytest.approx((2.5, 1.5), abs=1e-6)
    assert measure(torch.randn(2, 3), torch.arange(2)) == pytest.approx((1, 0), abs=1e-9), "one image of each class"


def test_vendi_and_rank_of_two_images_are_the_closed_form():
    """Two images of similarity s: the eigenvalues of their Gram matrix are 1 + s and 1 - s."""
    s = 0.6
    features, class_ids = torch.tensor([[1.0, 0.0], [s, 0.8]]), torch.zeros(2, dtype=torch.int64)
    values = torch.tensor([1 + s, 1 - s], dtype=torch.float64)
    for measure, weights in ((vendi_score, values), (effective_rank, values.sqrt())):
        shares = weights / weights.sum()
        assert measure(features, class_ids)[0] == pytest.approx(math.exp(-(shares * shares.log()).sum()), abs=1e-6)


@pytest.mark.parametrize("dim", [3, 40])
def test_vendi_and_rank_agree_with_a_decomposition_of_the_whole_matrix(dim: int):
    features = torch.randn(12, dim, dtype=torch.float64)
    units = features / features.norm(dim=1, keepdim=True)
    eigenvalues, singular = torch.linalg.eigvalsh(units @ units.T / 12), torch.linalg.svdvals(units)
    for measure, weights in ((vendi_score, eigenvalues), (effective_rank, singular)):
        shares = weights[weights > 1e-12] / weights[weights > 1e-12].sum()
        expected = math.exp(-(shares * shares.log()).sum())
        assert measure(features, torch.zeros(12, dtype=torch.int64))[0] == pytest.approx(expected, abs=1e-9)


def test_vendi_takes_an_image_of_zero_length_for_unlike_all():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert vendi_score(features, torch.zeros(3, dtype=torch.int64))[0] == pytest.approx(3)


def test_measures_take_pixels_as_they_are_stored():
    pixels = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8).flatten(1)
    class_ids = torch.tensor([0, 0, 0, 1, 1, 1])
    for measure in (intra_class_cosine, vendi_score, effective_rank):
        assert measure(pixels, class_ids) == pytest.approx(measure(pixels.float() / 255, class_ids), abs=1e-6)


@pytest.mark.parametrize("measure", [intra_class_cosine, vendi_score, effective_rank])
def test_features_without_their_classes_are_refused(measure: Callable[..., tuple[float, float]]):
    with pytest.raises(ValueError, match=r"expected \(B, D\), \(B,\)"):
        measure(torch.zeros(3, 2), torch.zeros(2))


def test_a_confusion_counts_each_image_once_by_class_and_by_answer():
    logits = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 2, 1], [5, 5, 0]])
    found = confusion(logits, torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert found.trace() / found.sum() == top1(logits, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"expected \(B, K\)"):
        confusion(logits, torch.tensor([0]))


def test_principal_axes_are_those_of_the_singular_values_with_one_direction():
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 4, 1, 1, 1]) + 3
    mean, axes, shares = principal_axes(features, num_axes=2)
    assert torch.allclose(mean, features.double().mean(dim=0))
    _, values, directions = torch.linalg.svd(features.double() - mean, full_matrices=False)
    assert torch.allclose(shares, (values**2 / (values**2).sum())[:2])
    assert torch.allclose((axes.T @ directions[:2].T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(axes, principal_axes(features.flip(0), num_axes=2)[1])  # whatever the order of the images
    assert (axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_principal_axes_of_features_without_variance_and_of_few():
    _, axes, shares = principal_axes(torch.ones(4, 3), num_axes=2)
    assert shares.tolist() == [0, 0]
    assert axes.shape == (3, 2)
    assert principal_axes(torch.ones(4, 1), num_axes=2)[1].shape == (1, 1)
    with pytest.raises(ValueError, match="num_axes=0"):
        principal_axes(torch.ones(4, 3), num_axes=0)
