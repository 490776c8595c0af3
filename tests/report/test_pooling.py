"""Runs of one cell as one row: what is pooled, averaged, and left alone."""

from dataclasses import replace
from statistics import stdev

import pytest
from report_samples import SummaryMaker, search

from prism_ray.report.contents import Cosine, Diversity, Judged, Measured, Quarantined, RunSummary, StudentResult
from prism_ray.report.html import render_report
from prism_ray.report.pooling import pooled
from prism_ray.report.ranking import score_rows


def run(make: SummaryMaker, seed: int, top1: float, *, label: str = "prism", **changes: object) -> RunSummary:
    """One run of a suite with seeds."""
    cosine = Measured(mean=top1 / 2, std=0.3, real_mean=0.25, real_std=0.1)
    content: dict[str, object] = {
        "run_id": f"{label}-{seed}",
        "students": [StudentResult(seed=seed, labels="soft", top1=top1, seconds=2.0, steps=3, num_params=4)],
        "student_s": 2.0,
        "synthesis_s": 10.0 + seed,
        "label_bytes": 100 + 2 * seed,
        "cosine": Cosine(feature_model="vit", **vars(cosine)),
        "diversity": [Diversity(space="held-out", model="vit", cosine=cosine, vendi=Measured(mean=1.5 + seed))],
        "judges": [Judged(judge="vit", num_images=6, top1_hits=seed, top5_hits=2 * seed)],
        "config": {"seed": seed, "student": {"seeds": [seed], "steps": 3}, "method": {"name": label}},
        **changes,
    }
    return replace(make(f"{label}-{seed}"), label=label, **content)


def test_runs_that_differ_in_their_seeds_alone_are_one(make_summary: SummaryMaker) -> None:
    runs = [run(make_summary, seed, 0.5 + 0.1 * seed) for seed in range(3)]
    (cell,) = pooled(runs)
    assert (cell.run_ids, cell.num_runs) == (["prism-0", "prism-1", "prism-2"], 3)
    assert cell.accuracies("soft") == {0: 0.5, 1: 0.6, 2: 0.7}
    assert (cell.num_images, cell.label_bytes, cell.synthesis_s) == (6, 102, 11)
    assert (cell.student_s, cell.num_units) == (6.0, 6)
    assert cell.cosine.mean == pytest.approx(0.3)
    assert cell.cosine.std == pytest.approx(stdev([0.25, 0.3, 0.35])), "over runs, not over classes"
    assert (cell.cosine.real_mean, cell.cosine.real_std, cell.cosine.feature_model) == (0.25, None, "vit")
    assert cell.diversity[0].vendi.mean == 2.5
    assert cell.judges == [Judged(judge="vit", num_images=18, top1_hits=3, top5_hits=6)]


def test_single_runs_and_other_settings_are_left_alone(make_summary: SummaryMaker) -> None:
    first, other = run(make_summary, 0, 0.5), run(make_summary, 1, 0.6)
    slower = replace(other, config={**other.config, "method": {"name": "prism", "lr": 0.1}})
    assert pooled([first]) == [first]
    assert pooled([first, slower]) == [first, slower]
    assert pooled([first, replace(other, column="vit")])[1].column == "vit"


def test_a_seed_that_occurs_twice_is_not_counted_as_another(make_summary: SummaryMaker) -> None:
    runs = [run(make_summary, 0, 0.5), run(make_summary, 0, 0.6)]
    assert pooled(runs) == runs


def test_what_only_one_run_measured_is_its_own(make_summary: SummaryMaker) -> None:
    bad = Quarantined(unit_id="00001", reason="no")
    runs = [run(make_summary, 0, 0.5), run(make_summary, 1, 0.5, students=[], student_s=None, quarantined=[bad])]
    (cell,) = pooled([runs[0], replace(runs[1], cosine=Cosine(), synthesis_s=None)])
    assert (len(cell.students), cell.student_s, cell.synthesis_s) == (1, 2.0, 10.0)
    assert (cell.cosine.mean, cell.cosine.std, cell.quarantined) == (0.25, None, [bad])


def test_differences_stay_paired_by_seed(make_summary: SummaryMaker) -> None:
    runs = [
        run(make_summary, seed, top1, label=label)
        for seed, gap in ((0, 0.1), (1, 0.2))
        for label, top1 in (("random", 0.2 + 0.3 * seed), ("prism", 0.2 + 0.3 * seed + gap))
    ]
    scores = score_rows(pooled(runs), {"random_real": "random"})
    assert [row.name for row in scores] == ["random", "prism"]
    found = scores[1].differences["soft"]
    assert (found.mean, found.num) == (pytest.approx(0.15), 2)
    assert found.std == pytest.approx(stdev([0.1, 0.2]))


def test_a_learning_rate_is_shown_once_with_its_mean(make_summary: SummaryMaker) -> None:
    runs = [run(make_summary, seed, 0.5, search=search(0.8 + 0.1 * seed)) for seed in range(2)]
    (cell,) = pooled(runs)
    assert [(r.lr, r.chosen) for r in cell.search] == [(0.001, False), (0.005, True), (0.02, False)]
    assert cell.search[1].top1 == pytest.approx(0.85)


def test_the_report_shows_one_row_and_names_every_run(make_summary: SummaryMaker) -> None:
    (cell,) = pooled([run(make_summary, seed, 0.5 + 0.1 * seed) for seed in range(2)])
    page = render_report([cell], title="t", command="c")
    assert "prism-0, prism-1" in page
    assert "± over runs" in page
    assert "n = 2" in page
