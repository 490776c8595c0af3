"""Figures: the numbers are in them, and nothing of the machine or the day is."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from report_samples import SummaryMaker, everything, students

from prism_ray.report.contents import Cosine, RunSummary, StudentResult, UnitLosses
from prism_ray.report.plots import (
    accuracy_plot,
    cosine_plot,
    cost_plot,
    difference_plot,
    loss_plot,
    shortened,
    storage_plot,
)
from prism_ray.report.ranking import score_rows
from prism_ray.report.set_plots import MOST_CURVES, curve_plot, plane_plot

PLOTS = (accuracy_plot, cosine_plot, loss_plot)
FULL_PLOTS = (plane_plot, curve_plot)


def texts(svg: str | None) -> list[str]:
    assert svg is not None
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def test_the_same_runs_give_the_same_bytes(make_summary: SummaryMaker) -> None:
    summaries = [make_summary("a"), make_summary("b")]
    for plot in PLOTS:
        assert plot(summaries) == plot(summaries)


def test_colors_and_font_come_from_the_page(make_summary: SummaryMaker) -> None:
    for plot in PLOTS:
        svg = plot([make_summary("a")])
        assert svg is not None
        assert not re.search(r"#[0-9a-f]{6}", svg)
        assert "DejaVu" not in svg
        assert "var(--ink)" in svg


def test_ids_are_unique_across_figures(make_summary: SummaryMaker) -> None:
    page = "".join(plot([make_summary("a")]) or "" for plot in PLOTS)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_accuracy_names_runs_and_means(make_summary: SummaryMaker) -> None:
    found = texts(accuracy_plot([make_summary("a"), make_summary("b")]))
    assert {"a", "b", "91.0", "71.0", "soft labels", "hard labels", "chance"} <= set(found)


def test_names_are_no_markup_and_no_formula(make_summary: SummaryMaker) -> None:
    label = "<b>$x_1$&"
    summary = replace(make_summary(), label=label)
    assert label in texts(accuracy_plot([summary]))
    assert label in texts(loss_plot([summary]))


def test_a_long_name_is_cut(make_summary: SummaryMaker) -> None:
    assert "prism_without_aux…" in texts(accuracy_plot([make_summary("prism_without_auxiliary_teachers")]))


@pytest.mark.filterwarnings("error")
def test_missing_values_are_left_out_without_a_warning(make_summary: SummaryMaker) -> None:
    student = StudentResult(seed=0, labels="soft", top1=None, seconds=None, steps=3, num_params=3)
    units = [UnitLosses(unit_id="0", ce=None, bn=2.0), UnitLosses(unit_id="1", ce=1.0, bn=float("nan"))]
    bare = make_summary("a", students=[student], cosine=Cosine(mean=float("nan")), loss_curve=units)
    full = make_summary("b")
    for plot in PLOTS:
        assert plot([bare, full]) is not None


def without_results(summary: RunSummary) -> bool:
    return all(plot([summary]) is None for plot in PLOTS)


def test_no_values_make_no_figure(make_summary: SummaryMaker) -> None:
    assert without_results(make_summary("a", students=[], cosine=Cosine(), loss_curve=[]))


def test_losses_over_a_wide_range_are_logarithmic_and_say_so(make_summary: SummaryMaker) -> None:
    units = [UnitLosses(unit_id=str(k), ce=10.0**-k, bn=3.0 + k) for k in range(4)]
    found = texts(loss_plot([make_summary("a", loss_curve=units)]))
    assert "cross-entropy (log)" in found
    assert "statistics term" in found


def test_accuracy_shows_the_label_kinds_there_are(make_summary: SummaryMaker) -> None:
    found = texts(accuracy_plot([make_summary("a", students=[*students("hard", 0.7), *students("plain", 0.5)])]))
    assert {"71.0", "51.0", "hard labels", "plain labels"} <= set(found)
    assert "soft labels" not in found


def test_runs_of_a_row_share_their_images_and_have_their_own_accuracy(make_summary: SummaryMaker) -> None:
    cells = [make_summary("prism", column=column) for column in ("vit", "vgg")]
    accuracies, cosines, losses = (texts(plot(cells)) for plot in PLOTS)
    assert (accuracies.count("prism"), accuracies.count("vit"), accuracies.count("vgg")) == (2, 1, 1)
    assert cosines.count("prism") == losses.count("prism") == 1


def test_accuracy_over_storage_names_rows_and_sizes(make_summary: SummaryMaker) -> None:
    rows = [make_summary(label, label_bytes=6 * size) for label, size in (("fp16", 100_000), ("top_3", 1_000))]
    found = texts(storage_plot(rows))
    assert {"fp16", "top_3", "1.00 kB", "100 kB", "stored labels of one image (log)"} <= set(found)


def test_accuracy_over_storage_needs_rows_of_different_size(make_summary: SummaryMaker) -> None:
    rows = [make_summary(label, label_bytes=size) for label, size in (("a", 1000), ("b", 1050), ("online", 0))]
    assert storage_plot(rows) is None
    assert storage_plot([make_summary("a", students=[]), make_summary("b", label_bytes=10)]) is None


def test_a_dozen_rows_over_storage_look_different(make_summary: SummaryMaker) -> None:
    svg = storage_plot([make_summary(f"row {n}", label_bytes=1000 * 2**n) for n in range(12)])
    assert svg is not None
    assert svg == storage_plot([make_summary(f"row {n}", label_bytes=1000 * 2**n) for n in range(12)])
    assert len(re.findall(r"row \d+", svg)) >= 12


def full_runs(make_summary: SummaryMaker, *labels: str) -> list[RunSummary]:
    return [make_summary(label, **everything(label, number)) for number, label in enumerate(labels)]


def test_figures_of_image_sets_take_colors_from_the_page_and_repeat(make_summary: SummaryMaker) -> None:
    runs = full_runs(make_summary, "a", "b", "<b>$x_1$&")
    for plot in FULL_PLOTS:
        svg = plot(runs)
        assert {"a", "b", "<b>$x_1$&"} <= set(texts(svg))
        assert svg == plot(runs)
        assert not re.search(r"#[0-9a-f]{6}", svg or "")
        assert plot([make_summary("bare")]) is None


def test_the_plane_names_its_axes_share_and_draws_both_sets(make_summary: SummaryMaker) -> None:
    svg = plane_plot(full_runs(make_summary, "a"))
    assert {"axis 1: 40 %", "axis 2: 20 %", "real", "these images"} <= set(texts(svg))
    assert (svg or "").count("<use ") >= 180


def test_of_many_units_some_curves_are_drawn(make_summary: SummaryMaker) -> None:
    (run,) = full_runs(make_summary, "a")
    svg = curve_plot([replace(run, loss_curve=run.loss_curve * 100)])
    assert svg is not None
    assert svg.count('id="curves-line2d') < 2 * MOST_CURVES + 60  # two terms, and the lines of axes


def test_cost_counts_images_and_labels_and_needs_two_runs(make_summary: SummaryMaker) -> None:
    runs = full_runs(make_summary, "a", "b")
    assert {shortened(run.name) for run in runs} | {"device time of images and labels (log)"} <= set(
        texts(cost_plot(runs))
    )
    assert any(text.endswith(" s") for text in texts(cost_plot(runs)))
    assert cost_plot(runs[:1]) is None
    assert cost_plot([replace(run, synthesis_s=None, label_s=None) for run in runs]) is None


def test_differences_are_shown_for_all_rows_but_the_baseline(make_summary: SummaryMaker) -> None:
    runs = [make_summary(label, students=students("soft", 0.5 + 0.1 * n)) for n, label in enumerate("abc")]
    found = texts(difference_plot(score_rows(runs, {"baseline": "b"}), "b"))
    assert {"a", "c", "difference to b, points"} <= set(found)
    assert "b" not in found
    assert difference_plot(score_rows(runs, {}), None) is None
