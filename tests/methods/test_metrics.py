import math

import pytest
import torch

from prism_ray.methods.metrics import intra_class_cosine, top1

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
