"""The report: complete in itself, safe to open, the same for the same runs, shown by a browser without complaint."""

import io
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_samples import CLASS_NAMES, SummaryMaker, everything, png, search, students, write_images
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from prism_ray.methods.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from prism_ray.report.contents import (
    Cosine,
    Diversity,
    Judged,
    Measured,
    Quarantined,
    RunSummary,
    StudentFacts,
    StudentResult,
)
from prism_ray.report.html import render_report
from prism_ray.report.plots import accuracy_plot

ATTACK = "<script>alert(1)</script>"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the texts of table cells by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


def render(*summaries: RunSummary, references: dict[str, str] | None = None) -> str:
    return render_report(summaries, title="shapes", command="prism-ray report", references=references or {})


def tables(page: str, heading: str) -> list[list[str]]:
    """Rows of the first table after a heading's id; empty if the page has no such heading."""
    _, found, rest = page.partition(f'<h2 id="{heading}">')
    return Elements(rest[: rest.index("</table>")]).rows if found else []


def results(page: str, label: str) -> list[str]:
    """A run's row in the table of results."""
    return next(row for row in tables(page, "results") if row[0] == label)


def test_the_table_shows_the_values_as_they_are(make_summary: SummaryMaker) -> None:
    assert results(render(make_summary("prism")), "prism") == [
        "prism",
        "2",
        "6",
        "91.00 ± 1.00n = 3",
        "71.00 ± 1.00n = 3",
        "0.812 ± 0.050",
        "0.746 ± 0.040",
        "12.3 kB",
        "4.56 MB",
        "fp1660 views",
        "34.5",
        "7.5",
        "3.25",
        "0.174",
    ]


def test_a_single_seed_has_no_deviation_and_missing_values_are_dashes(make_summary: SummaryMaker) -> None:
    summary = make_summary(
        "real",
        images_per_class=None,
        students=[StudentResult(seed=0, labels="hard", top1=0.5, seconds=None, steps=3, num_params=3)],
        cosine=Cosine(mean=float("nan"), real_mean=0.5),
        synthesis_s=None,
        images_per_s=None,
        label_bytes=0,
        label_codec=None,
        label_s=None,
        student_s=None,
    )
    page = render(summary)
    assert results(page, "real") == [
        *("real", "all", "6", "50.00n = 1", "–", "0.500", "12.3 kB", "0 B", "–", "–", "–", "–")
    ]
    assert "nan" not in page.lower()


def test_diversity_has_a_table_for_each_feature_space(make_summary: SummaryMaker) -> None:
    measured = Measured(mean=0.5, std=0.25, real_mean=0.75, real_std=0.125)
    diversity = [
        Diversity(space="held-out", model="vit", cosine=measured, vendi=Measured(mean=1.5), effective_rank=measured),
        Diversity(space="raw", cosine=Measured()),
    ]
    page = render(make_summary("prism", diversity=diversity), make_summary("other"))
    own = ["0.500 ± 0.250", "0.750 ± 0.125"]
    assert tables(page, "diversity")[-1] == ["prism", *own, "1.500", "–", *own]
    assert "features of vit (held-out)" in page
    assert "pixels as they are" in page
    assert not tables(render(make_summary("prism")), "diversity")


def test_judges_answers_come_with_their_interval(make_summary: SummaryMaker) -> None:
    judged = Judged(judge="lite2", num_images=32, top1_hits=16, top5_hits=32)
    page = render(make_summary("prism", judges=[judged]))
    assert tables(page, "judges")[-1] == ["prism", "lite2", "32", "50.00", "33.6 to 66.4", "100.00", "89.3 to 100.0"]
    assert not tables(render(make_summary("prism")), "judges")


def test_the_size_of_a_teachers_statistics_term_is_shown_where_it_is_known(make_summary: SummaryMaker) -> None:
    summary = make_summary("prism")
    (teacher,) = summary.teachers
    known = replace(teacher, bn_distance_first=1.25, bn_distance_rest=345.6)
    bare = replace(teacher, name="alexnet")
    rows = tables(render(replace(summary, teachers=[known, bare])), "teachers")
    assert [row[5:7] for row in rows[1:]] == [["1.25", "346"], ["–", "–"]]
    assert "statistics term" not in "".join(tables(render(summary), "teachers")[0])


def test_results_on_a_validation_split_are_not_called_test_results(make_summary: SummaryMaker) -> None:
    page = render(make_summary("prism", split="validation", num_measured=30))
    assert "30 real training images kept for validation" in page
    assert "student top-1 (validation), %" in page
    assert "top-1 on the real validation images" in page
    assert "judged on the same 360 real test images" in render(make_summary("prism"))


def test_class_names_without_images_can_be_reported(make_summary: SummaryMaker) -> None:
    summary = make_summary("prism", students=[], student_s=None, real_images=[], cosine=Cosine(mean=0.5, std=0.1))
    some = replace(summary.dataset, num_train=0, num_test=0, class_ids=[1])
    page = render(replace(summary, dataset=some, num_measured=0))
    assert "1 of 3" in page
    assert "judged on" not in page
    assert results(page, "prism")[3:7] == ["–", "–", "0.500 ± 0.100", "–"]


def test_names_are_shown_and_never_run(make_summary: SummaryMaker) -> None:
    summary = make_summary(
        class_names=(ATTACK, '" onerror="alert(1)', "triangle"),
        quarantined=[Quarantined(unit_id="0", reason=ATTACK)],
        config={"x": f"</code>{ATTACK}"},
        versions={ATTACK: ATTACK},
    )
    label = f"a{ATTACK}{{{{ 7 * 7 }}}}"
    page = render_report([replace(summary, label=label)], title=ATTACK, command=f"prism-ray '{ATTACK}'")
    elements = Elements(page)
    assert ATTACK not in page
    assert "{{ 7 * 7 }}" in page, "a name is no template"
    assert [tag for tag, _ in elements.tags].count("script") == 1  # the filter's
    assert not [attributes for _, attributes in elements.tags if any(name.startswith("on") for name in attributes)]
    assert ATTACK in {attributes.get("data-class") for tag, attributes in elements.tags if tag == "img"}


def test_nothing_is_loaded_from_elsewhere(make_summary: SummaryMaker) -> None:
    page = render(make_summary("a"), make_summary("b"))
    elements = Elements(page)
    addresses = [
        value
        for tag, attributes in elements.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action") and value
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", page)


def test_images_say_what_they_are(make_summary: SummaryMaker) -> None:
    images = [attributes for tag, attributes in Elements(render(make_summary("prism"))).tags if tag == "img"]
    assert all(image["class"] == "gallery-image" for image in images)
    assert {"real circle 9", "prism circle 0", "prism triangle 1"} <= {image["alt"] for image in images}
    assert {image["data-class"] for image in images} == set(CLASS_NAMES)


def test_the_same_runs_give_the_same_bytes(make_summary: SummaryMaker) -> None:
    assert render(make_summary("a"), make_summary("b")) == render(make_summary("a"), make_summary("b"))


def test_quarantined_units_are_named(make_summary: SummaryMaker) -> None:
    page = render(
        make_summary("a", quarantined=[Quarantined(unit_id="00001", reason="out of memory")]), make_summary("b")
    )
    assert "Quarantined units: 1 of 4." in page
    assert "<code>00001</code>: out of memory" in page


def test_no_quarantined_unit_is_said_too(make_summary: SummaryMaker) -> None:
    assert "Quarantined units: none" in render(make_summary())


def test_rows_under_different_protocols_are_marked(make_summary: SummaryMaker) -> None:
    first = make_summary("a")
    method = make_summary("b", config=first.config | {"method": {"lr": 0.1}})
    student = make_summary("c", config=first.config | {"student": {"arch": "prism_convnet", "steps": 900}})
    weights = make_summary("d", teachers=[replace(first.teachers[0], sha256="cd" * 32)])
    marked = 'id="protocol"'
    assert marked not in render(first, replace(first, label="again"))
    assert marked not in render(first, method)
    assert "Rows differ in student settings:</strong> steps." in render(first, student)
    assert "Teachers with other weights in some runs:</strong> resnet." in render(first, weights)


def test_only_what_no_suite_compares_is_marked_as_a_warning(make_summary: SummaryMaker) -> None:
    first = make_summary("a")
    compared = make_summary("b", config=first.config | {"student": {"steps": 900}, "labels": {"bits": 4}})
    teachers = make_summary("c", config=first.config | {"teach": {"lr": 0.1}})
    warning = 'class="status warn" id="protocol"'
    assert warning not in render(first, compared)
    assert warning in render(first, compared, teachers)


# Scores, columns, searches


def four_rows(make_summary: SummaryMaker) -> list[RunSummary]:
    return [
        make_summary("random", students=[*students("soft", 0.7), *students("hard", 0.6), *students("plain", 0.5)]),
        make_summary("sre2l", students=[*students("soft", 0.5), *students("hard", 0.2)]),
        make_summary("prism", students=[*students("soft", 0.8), *students("hard", 0.4), *students("plain", 0.3)]),
        make_summary("full", students=students("hard", 0.9), label_bytes=0, label_codec=None),
    ]


REFERENCES = {"random_real": "random", "full_data": "full"}


def test_differences_to_the_baseline_are_in_points_with_their_sign(make_summary: SummaryMaker) -> None:
    page = render(*four_rows(make_summary), references=REFERENCES)
    assert "difference to random, points" in page
    # Soft, hard, plain; then the differences, paired: all seeds differ by the same.
    assert results(page, "prism")[3:9] == [
        *("81.00 ± 1.00n = 3", "41.00 ± 1.00n = 3", "31.00 ± 1.00n = 3"),
        *("+10.00 ± 0.00n = 3", "-20.00 ± 0.00n = 3", "-20.00 ± 0.00n = 3"),
    ]
    assert results(page, "random")[6:9] == ["–", "–", "–"]
    assert results(page, "full")[6:9] == ["–", "+30.00 ± 0.00n = 3", "–"]


def test_dd_ranking_is_shown_in_points_with_what_is_missing(make_summary: SummaryMaker) -> None:
    page = render(*four_rows(make_summary), references=REFERENCES)
    hlr, ior = hard_label_recovery(0.91, 0.41), improvement_over_random(0.81, 0.71)
    lrs, ars = label_robust_score(ior, hlr), augmentation_robust_score(0.41, 0.61, 0.31, 0.51)
    header, _, sre2l, prism = tables(page, "ranking")
    assert header == ["run", "HLR", "IOR", "LRS", "ARS"]
    assert prism == ["prism", f"{100 * hlr:.2f}", f"+{100 * ior:.2f}", f"{100 * lrs:.2f}", f"{100 * ars:.2f}"]
    assert sre2l[-1] == "–"
    assert "ARS needs plain-label students: missing in sre2l." in page
    assert "arXiv 2505.13300" in page


def test_best_on_test_is_marked_and_never_the_headline(make_summary: SummaryMaker) -> None:
    looked = make_summary("looked", students=students("soft", 0.5, best_on_test=0.99))
    page = render(looked, make_summary("only_the_end", students=students("soft", 0.6)))
    assert "best on test (not comparable)" in page
    assert results(page, "looked")[3:5] == ["51.00 ± 1.00n = 3", "99.00 ± 0.00n = 3"]
    assert results(page, "only_the_end")[3:5] == ["61.00 ± 1.00n = 3", "–"]
    assert "99.0" not in (accuracy_plot([looked]) or "")
    assert "best on test" not in render(make_summary("a")).lower()


def test_students_of_a_teachers_architecture_are_marked_in_text(make_summary: SummaryMaker) -> None:
    resnet = StudentFacts(arch="resnet18", recipe="custom", in_pool=["resnet"])
    page = render(
        make_summary("prism", column="resnet", student=resnet),
        make_summary("prism", column="vgg"),
        make_summary("random", column="vgg", students=students("soft", 0.2)),
    )
    assert tables(page, "crossed") == [
        ["row", "resnet", "vgg"],
        ["prism", "* 91.00 ± 1.00n = 3", "91.00 ± 1.00n = 3"],
        ["random", "–", "21.00 ± 1.00n = 3"],
    ]
    assert page.count('alt="prism circle 0"') == 1, "the columns of a row share its images"


def test_the_search_shows_the_grid_and_the_split_it_was_judged_on(make_summary: SummaryMaker) -> None:
    page = render(
        make_summary("a", search=search(0.9)), make_summary("b", search=search(0.8, labels="hard", rates=[0.005, 0.1]))
    )
    assert tables(page, "search") == [
        ["run", "labels", "0.001", "0.005", "0.02", "0.1"],
        ["a", "soft", "85.00", "90.00chosen", "85.00", "–"],
        ["b", "hard", "–", "75.00", "–", "80.00chosen"],
    ]
    assert "real training images (300 images). The test images were not used." in page


def test_sections_without_data_are_left_out(make_summary: SummaryMaker) -> None:
    page = render(make_summary("a"), make_summary("b"))
    for heading in ("crossed", "ranking", "search"):
        assert tables(page, heading) == []
    assert "difference to" not in page


def test_the_config_can_be_copied_to_a_command_line(make_summary: SummaryMaker) -> None:
    assert "method.adam_betas=[0.5, 0.9]" in render(make_summary()).replace("&#34;", '"')


def test_a_thousand_noisy_images_and_their_neighbours_stay_below_eight_megabytes_and_take_seconds(
    make_summary: SummaryMaker, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    rows = [
        (class_id, index, png(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)))
        for class_id in range(3)
        for index in range(340)
    ]
    shard = write_images(tmp_path / "many.parquet", rows, method="m")
    content = everything("a", 1) | {"column": None}
    content["neighbors"] = replace(
        make_summary("x", **content).neighbors,  # pyright: ignore[reportArgumentType]
        images=[[f"{class_id}-{index}", index % 36, 0.5] for class_id in range(3) for index in range(340)],
    )
    summaries = [make_summary(label, **content, shards=[shard]) for label in "abcdefghij"]
    started_s = time.process_time()
    page = render(*summaries)
    assert time.process_time() - started_s < 10
    assert len(page.encode()) < 8_000_000


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    """Headless Chromium with its console log."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = Options()
    options.binary_location = chromium
    for name in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(executable_path=driver))
    yield chrome
    chrome.quit()


def full_report(make_summary: SummaryMaker) -> tuple[list[str], str]:
    """Class names, and a report with something in every part of it."""
    classes = [ATTACK, "café ☕", "triangle"]
    summaries = [
        make_summary(
            label,
            class_names=classes,
            **everything(label, number, classes),
            student=StudentFacts(arch="resnet18", recipe="custom", in_pool=["resnet"] if number % 2 else []),
        )
        for number, label in enumerate(("random_real", "sre2l", "prism", "prism_without_auxiliary_teachers"))
    ]
    references = {"random_real": "random_real", "baseline": "random_real"}
    return classes, render_report(summaries, title="shapes", command="prism-ray report", references=references)


def test_every_part_of_the_report_is_there(make_summary: SummaryMaker) -> None:
    _, page = full_report(make_summary)
    headings = re.findall(r'<h2 id="([a-z]+)">', page)
    assert headings == [
        *("results", "figures", "diversity", "likeness", "classes", "energies", "shifts", "crossed", "ranking"),
        *("search", "confusions", "teachers", "gallery", "runs"),
    ]
    for figure in ("accuracy", "cost", "storage", "cosine", "energies", "plane", "curves", "losses"):
        assert f'id="{figure}-' in page, figure
    assert 'class="heat" style="--share:0.75">' in page.replace("0.76", "0.75")
    for fact in ("cuda:NVIDIA H200", "python 3.13.1", "images/00099.parquet", f"{99:064x}", "The first 100 of 120"):
        assert fact in page
    assert "images/00100.parquet" not in page
    assert tables(page, "gallery")[-1][2] == "15.0", "share of images nearer to training images than real ones"


def test_differences_have_a_figure_where_there_is_a_baseline(make_summary: SummaryMaker) -> None:
    assert 'id="differences-' in render(*four_rows(make_summary), references=REFERENCES)
    assert 'id="differences-' not in render(*four_rows(make_summary))


def test_hovering_tells_where_images_come_from(make_summary: SummaryMaker) -> None:
    images = [attributes for tag, attributes in Elements(full_report(make_summary)[1]).tags if tag == "img"]
    assert all(image["title"] for image in images)
    assert {"real training image", "image: 0-1\nseed: 0"} <= {image["title"] for image in images}


LOOKS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


OUTSIDE_FIGURES = """
return [...document.querySelectorAll("figure svg text")].filter(text => {
  const own = text.getBoundingClientRect(), figure = text.ownerSVGElement.getBoundingClientRect();
  return own.left < figure.left - 1 || own.right > figure.right + 1
    || own.top < figure.top - 1 || own.bottom > figure.bottom + 1;
}).map(text => text.textContent)
"""


def look(browser: Chrome, *, width: int, scheme: str) -> np.ndarray:
    """The page as a window of that width shows it, pixels (H, W, 3) from its top."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    with Image.open(io.BytesIO(browser.get_screenshot_as_png())) as image:
        return np.asarray(image.convert("RGB"))


def test_a_browser_shows_the_report_on_phones_and_wide_screens_in_light_and_dark_without_complaint(
    browser: Chrome, make_summary: SummaryMaker, tmp_path: Path
) -> None:
    classes, page = full_report(make_summary)
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    browser.get(path.as_uri())

    images = browser.find_elements(By.CSS_SELECTOR, ".gallery-image")
    widths = browser.execute_script("return [...document.querySelectorAll('.gallery-image')].map(i => i.naturalWidth)")
    assert len(images) == len(classes) * (10 + 4 * 2 * 2)  # real ones, and of each run two beside their nearest
    assert set(widths) == {8}
    assert {image.get_attribute("data-class") for image in images} == set(classes)

    for width, scheme in LOOKS:
        pixels = look(browser, width=width, scheme=scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert pixels.shape[1] == width
        assert (pixels.mean() > 200) == (scheme == "light"), (scheme, pixels.mean())
        cut = browser.execute_script(OUTSIDE_FIGURES)
        assert cut == [], f"texts that leave their figures at {width} pixels"

    links = browser.find_elements(By.CSS_SELECTOR, "#contents a")
    assert [link.text for link in links][:2] == ["Results", "Figures"]

    Select(browser.find_element(By.CSS_SELECTOR, "#class-filter select")).select_by_visible_text("triangle")
    shown = [
        s.find_element(By.TAG_NAME, "h3").text
        for s in browser.find_elements(By.CLASS_NAME, "gallery-class")
        if s.is_displayed()
    ]
    assert shown == ["triangle"]

    origin = browser.find_element(By.ID, "origin")
    assert not origin.is_displayed()
    browser.execute_script("arguments[0].click()", images[-1])
    assert "nearest to: 2-1" in origin.text
    origin.find_element(By.TAG_NAME, "button").click()
    assert not origin.is_displayed()

    complaints = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert complaints == []
