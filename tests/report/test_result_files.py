"""Results to keep: the same numbers in Markdown and in CSV, a line per cell."""

import csv
import io

import pytest
from report_samples import SummaryMaker, students

from prism_ray.report.contents import Diversity, Judged, Measured, Space
from prism_ray.report.format import wilson_interval
from prism_ray.report.results import results_csv, results_markdown

REFERENCES = {"random_real": "random"}
SPACES: tuple[tuple[Space, str | None, float], ...] = (
    ("held-out", "vit", 0.75),
    ("primary", "vgg", 0.625),
    ("raw", None, 0.25),
)
DIVERSITY = [
    Diversity(space=space, model=model, cosine=Measured(mean=mean, real_mean=0.5), vendi=Measured(mean=1.5))
    for space, model, mean in SPACES
]


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_line_holds_accuracy_difference_diversity_and_costs(make_summary: SummaryMaker) -> None:
    rows = [
        make_summary("random", students=students("soft", 0.5)),
        make_summary("prism", students=students("soft", 0.6), diversity=DIVERSITY, student_s=9.0, synthesis_cpu_s=30.0),
    ]
    random, prism = parsed(results_csv(rows, REFERENCES))
    assert (random["top1_soft"], random["top1_soft_n"], random["difference_soft"]) == ("0.51", "3", "")
    assert (prism["difference_soft"], prism["difference_soft_n"]) == ("0.1", "3")
    assert [prism[f"cosine_{space}"] for space in ("held_out", "primary", "raw")] == ["0.75", "0.625", "0.25"]
    assert (prism["cosine_held_out_real"], prism["vendi_held_out"], random["cosine_raw"]) == ("0.5", "1.5", "")
    assert (prism["synthesis_s"], prism["synthesis_cpu_s"], prism["student_s"]) == ("34.5", "30", "3")
    assert (prism["label_bytes"], prism["split"]) == ("4560000", "test")


def test_markdown_shows_them_to_people(make_summary: SummaryMaker) -> None:
    rows = [
        make_summary("random", students=students("soft", 0.5)),
        make_summary("prism_a|b", students=students("soft", 0.6), diversity=DIVERSITY),
    ]
    text = results_markdown(rows, title="suite mine", command="prism-ray bench suite=mine", references=REFERENCES)
    lines = text.splitlines()
    header = next(n for n, line in enumerate(lines) if line.startswith("| row"))
    widths = {line.replace("\\|", "").count("|") for line in lines[header : header + 4]}
    assert len(widths) == 1
    assert "61.00 ± 1.00 (n = 3) | +10.00 ± 0.00 | 0.750 (0.500)" in lines[header + 3]
    assert "prism-ray bench suite=mine" in text
    assert "column" not in lines[header]


def test_judges_come_with_their_interval(make_summary: SummaryMaker) -> None:
    judged = Judged(judge="lite2", num_images=32, top1_hits=8, top5_hits=16)
    rows = [make_summary("prism", students=[], judges=[judged]), make_summary("other", students=[])]
    prism, other = parsed(results_csv(rows))
    low, high = wilson_interval(8, 32)
    assert (prism["judge_lite2_top1"], prism["judge_lite2_top5"], prism["judge_lite2_n"]) == ("0.25", "0.5", "32")
    assert float(prism["judge_lite2_low"]) == pytest.approx(low, rel=1e-5)
    assert (other["judge_lite2_top1"], other["judge_lite2_n"]) == ("", "0")
    assert f"25.0 [{100 * low:.1f}, {100 * high:.1f}]" in results_markdown(rows, title="t", command="c")


def test_an_accuracy_for_choosing_settings_says_so(make_summary: SummaryMaker) -> None:
    row = make_summary("prism", split="validation")
    assert parsed(results_csv([row]))[0]["split"] == "validation"
    assert "training images held back for validation" in results_markdown([row], title="t", command="c")
