import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from prism_ray.methods.metrics import top1
from prism_ray.methods.set_metrics import (
    PrecisionRecall,
    auroc,
    bootstrap_interval,
    class_agreement,
    class_coverage,
    class_precision_recall,
    disagreement,
    effective_classes,
    fpr_at_tpr,
    histogram_overlap,
    nearer_share,
    nearest,
    precision_recall,
)

MEASURES = ("precision", "recall", "density", "coverage")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """400 real images, (400, 64) of 0 to 16, and their classes: many distances are equal."""
    images, class_ids = load_digits(return_X_y=True)
    return torch.tensor(images[:400], dtype=torch.float32), torch.tensor(class_ids[:400], dtype=torch.int64)


def numbers(measured: PrecisionRecall) -> tuple[float, ...]:
    return tuple(getattr(measured, name) for name in MEASURES)


# Precision, recall, density, coverage.


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_sets_have_precision_recall_and_coverage_one(digits: tuple[Tensor, Tensor], offset: float):
    for features in (digits[0], randn(50, 300).float(), digits[0][:20].repeat(3, 1), torch.zeros(9, 4)):
        measured = precision_recall(features + offset, features + offset)
        assert (measured.precision, measured.recall, measured.coverage) == (1, 1, 1)


def test_features_far_from_zero_and_near_to_each_other_are_told_apart():
    # Sums of powers of two, exact in double precision: by a product of matrices 1e-12 would be a difference of 1e9.
    real, fake = ((randn(60, 5, seed=seed) * 2**10).round() / 2**10 for seed in (0, 1))
    assert precision_recall(2**14 + real / 2**20, 2**14 + fake / 2**20) == precision_recall(real, fake)


def test_density_of_identical_sets_counts_each_image_in_its_own_ball():
    assert precision_recall(randn(40, 6), randn(40, 6), k_coverage=4).density == 5 / 4


def test_far_sets_have_nothing_in_common(digits: tuple[Tensor, Tensor]):
    assert numbers(precision_recall(digits[0][:200], digits[0][200:] + 1000)) == (0, 0, 0, 0)


def test_collapsed_fakes_are_precise_and_recall_little(digits: tuple[Tensor, Tensor]):
    real = digits[0]
    measured = precision_recall(real, real[:5].repeat(80, 1) + 0.01 * randn(400, 64))
    assert measured.precision == 1
    assert measured.recall < 0.02
    assert measured.coverage < 0.25


def test_real_images_with_outliers_recall_much_and_are_imprecise(digits: tuple[Tensor, Tensor]):
    real, others = digits[0][:200], digits[0][200:]
    measured = precision_recall(real, torch.cat([others, 1000 + randn(200, 64)]))
    alone = precision_recall(real, others)
    assert alone.recall > 0.7
    assert measured.precision == alone.precision / 2
    assert (measured.recall, measured.coverage) == (alone.recall, alone.coverage)


def test_fakes_far_out_raise_recall_and_not_coverage():
    measured = precision_recall(randn(50, 8), 1000 * randn(8, 8, seed=1))
    assert (measured.recall, measured.precision, measured.coverage) == (1, 0, 0)


def test_samples_of_one_distribution_have_density_one():
    assert precision_recall(randn(600, 5), randn(600, 5, seed=1)).density == pytest.approx(1, abs=0.05)


def test_fakes_that_move_away_lose_precision_density_and_coverage():
    real, fake = randn(200, 6), randn(200, 6, seed=1)
    steps = [numbers(precision_recall(real, fake + shift)) for shift in (0.0, 0.5, 1.0, 2.0, 10.0)]
    for before, after in pairwise(steps):
        assert all(a < b for a, b in zip(after, before, strict=True))
    assert steps[-1] == (0, 0, 0, 0)


def by_pairs(real: Tensor, fake: Tensor, k: int, k_coverage: int) -> tuple[float, ...]:
    """The definitions, pair by pair."""

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(float(np.linalg.norm(points[i] - points[j])) for j in range(len(points)) if j != i)[k - 1]

    def is_in(point: np.ndarray, center: np.ndarray, radius: float) -> bool:
        return bool(np.linalg.norm(point - center) <= radius)

    reals, fakes = real.double().numpy(), fake.double().numpy()
    small = [radius(reals, i, k) for i in range(len(reals))]
    large = [radius(reals, i, k_coverage) for i in range(len(reals))]
    own = [radius(fakes, j, k) for j in range(len(fakes))]
    balls = list(zip(reals, large, strict=True))
    return (
        float(np.mean([any(is_in(y, x, r) for x, r in zip(reals, small, strict=True)) for y in fakes])),
        float(np.mean([any(is_in(x, y, r) for y, r in zip(fakes, own, strict=True)) for x in reals])),
        float(np.mean([sum(is_in(y, x, r) for x, r in balls) / k_coverage for y in fakes])),
        float(np.mean([any(is_in(y, x, r) for y in fakes) for x, r in balls])),
    )


@pytest.mark.parametrize(("k", "k_coverage"), [(3, 5), (2, 1)])
def test_measures_agree_with_their_definitions_where_distances_are_equal(k: int, k_coverage: int):
    # On whole numbers every square is exact, so that equal distances are equal in both.
    real, fake = (randn(30, 2) * 2).round(), (randn(20, 2, seed=1) * 2).round()
    measured = precision_recall(real, fake, k=k, k_coverage=k_coverage)
    assert numbers(measured) == pytest.approx(by_pairs(real, fake, k, k_coverage), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n_real", "n_fake"), [(60, 60), (70, 40)])
def test_measures_agree_with_prdc(k: int, n_real: int, n_fake: int):
    prdc = pytest.importorskip("prdc")
    real, fake = randn(n_real, 12), randn(n_fake, 12, seed=1) * 0.9 + 0.2
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    measured = precision_recall(real, fake, k=k, k_coverage=k)
    assert numbers(measured) == pytest.approx([expected[name] for name in MEASURES], abs=1e-12)


def test_chunks_change_nothing():
    real, fake = randn(50, 9), randn(33, 9, seed=1)
    whole, parts = precision_recall(real, fake, chunk=1000), precision_recall(real, fake, chunk=7)
    assert whole == parts
    for name in MEASURES:
        assert np.array_equal(whole.per_sample[name], parts.per_sample[name])
    ids = torch.arange(50) % 3
    assert class_coverage(real, ids, fake, ids[:33], chunk=7) == class_coverage(real, ids, fake, ids[:33])


def test_single_precision_is_measured_as_its_double():
    real, fake = randn(60, 9), randn(60, 9, seed=1)
    single = precision_recall(real.float(), fake.float())
    assert single == precision_recall(real.float().double(), fake.float().double())
    assert single == precision_recall(real, fake)


def test_order_of_images_does_not_matter_and_recall_is_the_precision_of_the_reverse():
    real, fake = randn(40, 5), randn(50, 5, seed=1)
    measured, reverse = precision_recall(real, fake), precision_recall(fake, real)
    assert precision_recall(real.flip(0), fake.flip(0)) == measured
    assert (reverse.precision, reverse.recall) == (measured.recall, measured.precision)


def test_each_measure_is_the_mean_of_its_samples():
    measured = precision_recall(randn(40, 5), randn(50, 5, seed=1), k=2, k_coverage=4)
    assert {name: len(values) for name, values in measured.per_sample.items()} == {
        "precision": 50,
        "recall": 40,
        "density": 50,
        "coverage": 40,
    }
    for name in MEASURES:
        assert measured.per_sample[name].mean() == pytest.approx(getattr(measured, name), abs=1e-15)
    assert (measured.n_real, measured.n_fake, measured.k, measured.k_coverage) == (40, 50, 2, 4)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="real: 5 images; a 5-th neighbor needs at least 6"):
        precision_recall(randn(5, 2), randn(9, 2))
    with pytest.raises(ValueError, match="fake: 3 images; a 3-th neighbor needs at least 4"):
        precision_recall(randn(9, 2), randn(3, 2))
    precision_recall(randn(6, 2), randn(4, 2))


def test_features_that_cannot_be_compared_are_refused():
    for real, fake in ((randn(9, 2), randn(9, 3)), (randn(9), randn(9, 1)), (randn(9, 2, 1), randn(9, 2))):
        with pytest.raises(ValueError, match="expected"):
            precision_recall(real, fake)
    with pytest.raises(ValueError, match="D at least 1"):
        precision_recall(torch.zeros(9, 0), torch.zeros(9, 0))
    for broken in (math.nan, math.inf):
        fake = randn(9, 2)
        fake[4, 1] = broken
        with pytest.raises(ValueError, match="fake: 1 of 18 numbers are not finite, the first of image 4"):
            precision_recall(randn(9, 2), fake)


@pytest.mark.parametrize("name", ["k", "k_coverage", "chunk"])
def test_sizes_below_one_are_refused_by_name(name: str):
    with pytest.raises(ValueError, match=f"{name}=0"):
        precision_recall(randn(9, 2), randn(9, 2), **{name: 0})


# Coverage by class.


def test_class_coverage_is_the_coverage_within_each_class(digits: tuple[Tensor, Tensor]):
    features, class_ids = digits
    real, real_ids, fake, fake_ids = features[:200], class_ids[:200], features[200:], class_ids[200:]
    coverages = class_coverage(real, real_ids, fake, fake_ids, k=3)
    assert list(coverages) == list(range(10))
    for class_id, coverage in coverages.items():
        own = precision_recall(real[real_ids == class_id], fake[fake_ids == class_id], k_coverage=3)
        assert coverage == own.coverage


def test_a_class_without_a_fake_is_not_covered_and_one_without_a_ball_is_left_out():
    real, real_ids = randn(17, 4), torch.tensor([7] * 6 + [8] * 6 + [3] * 5)
    fake, fake_ids = torch.cat([real[:6], randn(2, 4)]), torch.tensor([7] * 6 + [3, 5])
    assert class_coverage(real, real_ids, fake, fake_ids) == {7: 1, 8: 0}
    assert class_coverage(real, real_ids, fake, fake_ids, k=4).keys() == {3, 7, 8}
    assert class_coverage(real[:6], real_ids[:6], randn(0, 4), fake_ids[:0]) == {7: 0}


def test_fakes_of_another_class_cover_nothing():
    real, ids = randn(12, 4), torch.tensor([0] * 6 + [1] * 6)
    assert class_coverage(real, ids, real, ids) == {0: 1, 1: 1}
    far = real + torch.tensor([0.0] * 6 + [100.0] * 6)[:, None]
    assert class_coverage(far, ids, far, 1 - ids) == {0: 0, 1: 0}


def test_class_ids_of_another_number_than_features_are_refused():
    ids = torch.zeros(9, dtype=torch.int64)
    for args in ((randn(9, 2), ids[:8], randn(9, 2), ids), (randn(9, 2), ids, randn(9, 2), ids[:, None])):
        with pytest.raises(ValueError, match=r"expected \(N, D\), \(N,\), \(M, D\), \(M,\)"):
            class_coverage(*args)


# Bootstrap.


def test_bootstrap_interval_is_that_of_a_share():
    hits = np.repeat([1.0, 0.0], [300, 700])
    low, high = bootstrap_interval(hits, seed=0, draws=4000)
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    # The ends are quantiles of 4,000 draws: standard error 0.0006.
    assert (low, high) == pytest.approx((0.3 - half_width, 0.3 + half_width), abs=0.003)


def test_bootstrap_interval_depends_on_its_seed_alone_and_narrows_with_its_level():
    values = randn(50).numpy()
    low, high = bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) == (low, high)
    assert bootstrap_interval(values, seed=4) != (low, high)
    inner_low, inner_high = bootstrap_interval(values, seed=3, level=0.5)
    assert low < inner_low < values.mean() < inner_high < high


def test_bootstrap_interval_of_equal_values_is_a_point():
    measured = precision_recall(randn(20, 3), randn(20, 3))
    assert bootstrap_interval(measured.per_sample["precision"], seed=0) == (1, 1)


def test_bootstrap_of_nothing_is_refused():
    for values, level in ((np.zeros(0), 0.95), (np.zeros((2, 2)), 0.95), (np.zeros(3), 1.0), (np.zeros(3), 0.0)):
        with pytest.raises(ValueError, match="expected"):
            bootstrap_interval(values, seed=0, level=level)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval(np.array([0.0, math.nan]), seed=0)
    with pytest.raises(ValueError, match="draws=0"):
        bootstrap_interval(np.zeros(3), seed=0, draws=0)


# Energies.


@pytest.mark.parametrize("bins", [1, 7, 50])
def test_identical_energies_overlap_exactly_and_disjoint_ones_not_at_all(bins: int):
    for num in (1, 3, 7, 1000):
        energies = randn(num) * 5 - 20
        assert histogram_overlap(energies, energies, bins=bins) == 1
        assert histogram_overlap(energies, energies.flip(0).repeat(3), bins=bins) == 1
        assert histogram_overlap(energies, energies + 1000, bins=bins + 1) == 0


def test_overlap_of_equal_values_is_one():
    assert histogram_overlap(torch.full((3,), -4.0), torch.full((5,), -4.0)) == 1


def test_overlap_of_two_bins_is_the_golden_value():
    # Bins of 1 from 0: shares 1/2, 1/2, 0, 0 and 0, 1/4, 1/2, 1/4; the largest value belongs to the last bin.
    assert histogram_overlap(torch.tensor([0.0, 1.0]), torch.tensor([1.5, 2.0, 2.5, 4.0]), bins=4) == 0.25


def test_overlap_agrees_with_histograms_of_numpy_and_is_symmetric():
    a, b = randn(300), randn(200, seed=1) + 0.7
    both = torch.cat([a, b])
    ends = (both.min().item(), both.max().item())
    shares = [np.histogram(x.numpy(), bins=20, range=ends)[0] / len(x) for x in (a, b)]
    assert histogram_overlap(a, b, bins=20) == pytest.approx(np.minimum(*shares).sum(), abs=1e-12)
    assert histogram_overlap(a, b, bins=20) == histogram_overlap(b, a, bins=20)


def test_overlap_falls_and_auroc_rises_as_energies_move_apart():
    real, fake = randn(500), randn(500, seed=1)
    overlaps = [histogram_overlap(real, fake - shift) for shift in (0, 1, 2, 4, 20)]
    aurocs = [auroc(real, fake - shift) for shift in (0, 1, 2, 4, 20)]
    assert overlaps == sorted(overlaps, reverse=True)
    assert aurocs == sorted(aurocs)
    assert (overlaps[-1], aurocs[-1]) == (0, 1)
    assert aurocs[0] == pytest.approx(0.5, abs=0.05)


def test_auroc_counts_equal_scores_half():
    # Pairs: 2 > 1, 2 = 2, 3 > 1, 3 > 2.
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == 3.5 / 4
    assert auroc(torch.zeros(3), torch.zeros(5)) == 0.5


def with_labels(positives: Tensor, negatives: Tensor) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat([1, 0], [len(positives), len(negatives)])
    return labels, torch.cat([positives, negatives]).double().numpy()


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_rates_agree_with_scikit_learn_where_scores_are_equal(decimals: int):
    for num_positives, num_negatives in ((20, 100), (133, 57), (1, 4)):
        positives = (randn(num_positives) + 0.8).round(decimals=decimals)
        negatives = randn(num_negatives, seed=1).round(decimals=decimals)
        labels, scores = with_labels(positives, negatives)
        assert auroc(positives, negatives) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        for share in (0.3, 0.95, 1.0):
            expected = fpr[tpr >= share].min()
            assert fpr_at_tpr(positives, negatives, tpr=share) == pytest.approx(expected, abs=1e-12)


def test_rates_depend_on_the_order_of_scores_alone():
    positives, negatives = randn(40) + 1, randn(30, seed=1)
    for measure in (auroc, fpr_at_tpr):
        assert measure(positives.exp(), negatives.exp()) == measure(positives, negatives)
        assert measure(positives.flip(0), negatives.flip(0)) == measure(positives, negatives)
    assert auroc(negatives, positives) == pytest.approx(1 - auroc(positives, negatives), abs=1e-15)


def test_threshold_keeps_nineteen_positives_of_twenty():
    positives = torch.arange(1.0, 21.0)  # the 19th from above is 2
    assert fpr_at_tpr(positives, torch.tensor([0.0, 1.0, 1.9, 2.0])) == 0.25
    assert fpr_at_tpr(positives + 100, positives) == 0
    assert fpr_at_tpr(torch.zeros(5), torch.zeros(7)) == 1
    # 0.55 * 100 is above 55 in floating point; the 55th of 1 to 100 from above is 46.
    assert fpr_at_tpr(torch.arange(1.0, 101.0), torch.tensor([45.5, 46.0]), tpr=0.55) == 0.5


@pytest.mark.parametrize("measure", [histogram_overlap, auroc, fpr_at_tpr])
def test_scores_that_cannot_be_ranked_are_refused(measure: Callable[[Tensor, Tensor], float]):
    for broken in (torch.zeros(0), torch.zeros(3, 1), torch.tensor([0.0, math.nan])):
        for args in ((broken, torch.zeros(3)), (torch.zeros(3), broken)):
            with pytest.raises(ValueError, match="expected"):
                measure(*args)


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.1, math.nan])
def test_a_share_of_positives_outside_its_range_is_refused(tpr: float):
    with pytest.raises(ValueError, match="tpr="):
        fpr_at_tpr(torch.zeros(3), torch.zeros(3), tpr=tpr)


def test_overlap_of_no_bins_is_refused():
    with pytest.raises(ValueError, match="bins=0"):
        histogram_overlap(torch.zeros(3), torch.zeros(3), bins=0)


# Without real images.


def test_class_agreement_is_the_top1_of_each_class():
    logits, class_ids = randn(60, 4), torch.tensor([0, 2, 2, 9] * 15)
    found = class_agreement(logits, class_ids)
    assert list(found) == [0, 2, 9]
    for class_id, agreement in found.items():
        is_own = class_ids == class_id
        assert agreement == pytest.approx(top1(logits[is_own], class_ids[is_own]), abs=1e-15)
    assert found[9] == 0, "the logits have no such class"


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_effective_classes_are_those_predicted_equally_often(scale: float):
    certain = 100 * scale * torch.eye(4)
    assert effective_classes(certain[:1].expand(9, 4)) == pytest.approx(1, abs=1e-12)
    assert effective_classes(certain) == pytest.approx(4, abs=1e-12)
    assert effective_classes(certain[:2]) == pytest.approx(2, abs=1e-12)
    assert effective_classes(torch.full((3, 5), scale)) == pytest.approx(5, abs=1e-12)


def test_effective_classes_are_of_the_mean_distribution_and_no_mean_over_images():
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64))
    expected = math.exp(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    assert effective_classes(logits) == pytest.approx(expected, abs=1e-12)


def test_disagreement_is_the_share_of_other_classes():
    logits = randn(8, 3)
    assert disagreement(logits, 5 * logits + 1) == 0
    changed = logits.clone()
    changed[:2] = logits[:2].roll(1, dims=1)
    assert disagreement(logits, changed) == 0.25


def test_logits_without_images_or_of_other_shapes_are_refused():
    broken = torch.zeros(2, 3)
    broken[1, 2] = math.nan
    for logits in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 0), broken):
        with pytest.raises(ValueError, match="expected"):
            effective_classes(logits)
        with pytest.raises(ValueError, match="expected"):
            disagreement(torch.zeros(2, 3), logits)
        with pytest.raises(ValueError, match="expected"):
            class_agreement(logits, torch.zeros(len(logits), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \(B, K\) of both"):
        disagreement(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"expected \(B, K\) and \(B,\)"):
        class_agreement(torch.zeros(2, 3), torch.zeros(2, 1))


# Of classes, and of the nearest.


def test_precision_and_recall_of_a_class_are_those_of_its_images_alone(digits: tuple[Tensor, Tensor]):
    features, ids = digits
    real, real_ids, fake, fake_ids = features[:200], ids[:200], features[200:], ids[200:]
    found = class_precision_recall(real, real_ids, fake, fake_ids, k=3)
    assert set(found) == set(range(10))
    for class_id, (precision, recall) in found.items():
        alone = precision_recall(real[real_ids == class_id], fake[fake_ids == class_id], k=3, k_coverage=3)
        assert (precision, recall) == (alone.precision, alone.recall)


def test_a_class_drawn_as_another_has_no_precision_though_the_whole_set_has():
    real = torch.cat([randn(20, 4), randn(20, 4, seed=1) + 50])
    ids = torch.arange(2).repeat_interleave(20)
    swapped = class_precision_recall(real, ids, real.roll(20, dims=0), ids, k=3)
    assert swapped == {0: (0.0, 0.0), 1: (0.0, 0.0)}
    assert precision_recall(real, real.roll(20, dims=0), k_coverage=3).precision == 1


def test_classes_of_too_few_images_are_left_out():
    ids = torch.tensor([0] * 8 + [1] * 3)
    found = class_precision_recall(randn(11, 3), ids, randn(11, 3, seed=1), ids, k=3)
    assert set(found) == {0}
    with pytest.raises(ValueError, match="expected \\(N, D\\)"):
        class_precision_recall(randn(11, 3), ids[:5], randn(11, 3), ids, k=3)


def test_the_nearest_is_that_of_all_distances_whatever_the_chunk():
    points, pool = randn(40, 6), randn(70, 6, seed=1)
    distances, places = nearest(points, pool, chunk=7)
    every = (points[:, None] - pool[None]).norm(dim=2)
    assert torch.allclose(distances, every.min(dim=1).values)
    assert places.equal(every.argmin(dim=1))
    assert nearest(pool[3:5], pool)[0].tolist() == [0, 0]
    with pytest.raises(ValueError, match="pool=0"):
        nearest(points, pool[:0])


def test_copies_are_nearer_than_new_images_and_new_images_are_as_usual():
    pool = randn(500, 4)
    usual = nearest(randn(400, 4, seed=1), pool)[0]
    assert nearer_share(nearest(pool[:100], pool)[0], usual) == 1
    assert nearer_share(nearest(randn(400, 4, seed=2), pool)[0], usual) == pytest.approx(0.05, abs=0.04)
    assert nearer_share(nearest(randn(100, 4, seed=3) + 9, pool)[0], usual) == 0
    with pytest.raises(ValueError, match="quantile=1"):
        nearer_share(usual, usual, quantile=1)
