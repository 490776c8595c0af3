"""The data-set card: what the hub reads parses, and what it tells people to type works."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from report_samples import CLASS_NAMES, SummaryMaker

from prism_ray import schema
from prism_ray.cli import compose
from prism_ray.report.card import (
    COLUMNS,
    LABEL_COLUMNS,
    LabelTable,
    markdown_text,
    render_card,
    size_category,
    yaml_string,
)
from prism_ray.report.contents import Paths, Quarantined
from prism_ray.report.model_card import render_model_card
from prism_ray.report.origins import HUB_LICENCES, licence_header, licences_of

AWKWARD = [
    'say "no": #1',
    "back\\slash",
    "- [x] {y}",
    "café 😀",
    "tab\tnul\x00del\x7f",
    "line\nbreak\u2028",
    "null",
    "1",
]


def header(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_the_header_describes_the_files(make_summary: SummaryMaker) -> None:
    content = header(render_card(make_summary()))
    assert content["license"] == "other"
    assert content["size_categories"] == ["n<1K"]
    assert content["configs"][0]["data_files"] == [{"split": "train", "path": "images/*.parquet"}]
    features = {feature["name"]: feature for feature in content["dataset_info"]["features"]}
    assert list(features) == [name for name, _ in schema.IMAGE_COLUMNS]
    assert features["image"]["dtype"] == "image"
    assert features["label"]["dtype"]["class_label"]["names"] == {str(k): name for k, name in enumerate(CLASS_NAMES)}
    assert features["statistics_teachers"]["list"] == "string"
    assert features["loss_ce"]["dtype"] == "float64"


def test_any_class_name_survives_the_header(make_summary: SummaryMaker) -> None:
    content = header(render_card(make_summary(class_names=AWKWARD)))
    label = next(f for f in content["dataset_info"]["features"] if f["name"] == "label")
    assert list(label["dtype"]["class_label"]["names"].values()) == AWKWARD


@pytest.mark.parametrize("text", AWKWARD)
def test_yaml_strings_read_back(text: str) -> None:
    assert yaml.safe_load(yaml_string(text)) == text


def test_every_column_is_explained() -> None:
    assert list(COLUMNS) == [name for name, _ in schema.IMAGE_COLUMNS]
    assert list(LABEL_COLUMNS) == [name for name, _ in schema.LABEL_COLUMNS]


# Licences


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", {"license": "mit"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        (" cc0-1.0 ", {"license": "cc0-1.0"}),
        ("GPL-3.0-only", {"license": "gpl-3.0"}),
        ("LGPL-2.1-or-later", {"license": "lgpl-2.1"}),
        ("ODbL-1.0", {"license": "odbl"}),
        ("ImageNet: terms of access", {"license": "other", "license_name": "imagenet-terms-of-access"}),
        ("x\nlicense: mit", {"license": "other", "license_name": "x-license-mit"}),
        ("other", {"license": "other", "license_name": "other"}),
        (None, {"license": "other", "license_name": "not-stated"}),
        ("", {"license": "other", "license_name": "not-stated"}),
    ],
)
def test_a_licence_is_the_hubs_identifier_or_other_with_a_name(licence: str | None, expected: dict[str, str]) -> None:
    assert licence_header(licence) == expected


def test_the_header_states_the_licence_of_the_data(make_summary: SummaryMaker) -> None:
    content = header(render_card(make_summary(), licences={"dataset": "Apache-2.0"}))
    assert content["license"] == "apache-2.0"
    assert "license_name" not in content
    assert "apache-2.0" in HUB_LICENCES


def test_all_that_images_are_made_from_is_listed_with_its_licence(make_summary: SummaryMaker) -> None:
    models = {"resnet": {"source": "timm:resnet18.a1_in1k"}}
    config = {"teachers": {"models": models}, "method": {"init": "real"}, "student": {"arch": "resnet18"}}
    licences = {"dataset": "MIT", "teachers.models.resnet": "a | b", "teachers.models.unused": "GPL-3.0"}
    card = render_card(make_summary(config=config), licences=licences)
    assert "| data set shapes | 1,437 training images | MIT |" in card
    assert r"| teacher resnet \(resnet18\) | timm:resnet18.a1_in1k | a \| b |" in card
    assert "GPL" not in card
    assert "those of the teachers apply as well" in card
    unstated = render_card(make_summary(config=config))
    assert "| data set shapes | 1,437 training images | not stated |" in unstated
    assert "set `dataset.licence`, before you share this" in unstated


def test_a_folder_of_this_machine_is_not_named(make_summary: SummaryMaker) -> None:
    config = {"teachers": {"models": {"resnet": {"source": "/home/somebody/weights"}}}}
    card = render_card(make_summary(config=config))
    assert "/home/somebody" not in card
    assert "weights made elsewhere" in card


def test_images_that_were_real_ones_say_so(make_summary: SummaryMaker) -> None:
    started = "Every image started from a real image of shapes"
    assert started in render_card(make_summary(config={"method": {"init": "real"}}))
    noise = render_card(make_summary(config={"method": {"init": "noise"}}))
    assert started not in noise
    assert "Every image started from noise" in noise
    assert "The images are real images of shapes" in render_card(make_summary(budget=[]))


def test_licences_are_those_of_the_settings() -> None:
    config = compose(["recipe=digits_smoke", "dataset.licence=CC-BY-4.0", "teachers.models.vgg.licence=MIT"])
    assert licences_of(config) == {
        "dataset": "CC-BY-4.0",
        "generator": None,
        "teachers.models.vgg": "MIT",
        "teachers.models.convnet": None,
    }


# Repositories


def test_soft_labels_are_described_where_they_are(make_summary: SummaryMaker) -> None:
    table = LabelTable({"image_id": "string", "logits": "binary"}, {"prism_ray.codec": "top_3+quantized_4"})
    card = render_card(make_summary(), is_repository=True, label_table=table)
    assert f"| `logits` | binary | {LABEL_COLUMNS['logits']} |" in card
    assert r"| `prism_ray.codec` | top_3\+quantized_4 |" in card
    assert "## Soft labels" not in render_card(make_summary())


def test_a_model_card_is_of_one_student(make_summary: SummaryMaker) -> None:
    card = render_model_card(make_summary(), labels="hard", seed=2, licences={"dataset": "MIT"})
    content = header(card)
    assert (content["license"], content["library_name"], content["datasets"]) == ("mit", "timm", ["shapes"])
    assert content["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(0.72)
    assert "| 72.00 | hard | 300 | 2 |" in card
    with pytest.raises(ValueError, match="no student with soft labels and seed 9"):
        render_model_card(make_summary(), labels="soft", seed=9)


def test_a_student_that_was_not_measured_has_no_result(make_summary: SummaryMaker) -> None:
    summary = make_summary()
    unmeasured = [replace(student, top1=None) for student in summary.students]
    content = header(render_model_card(replace(summary, students=unmeasured), labels="soft", seed=0))
    assert "model-index" not in content


def test_texts_cannot_break_a_table_or_bring_html() -> None:
    assert markdown_text("a|b\n<img onerror=x>") == r"a\|b \<img onerror=x\>"
    assert markdown_text("_one_ random_real") == r"\_one\_ random_real"


def test_quarantined_units_are_named(make_summary: SummaryMaker) -> None:
    card = render_card(make_summary(quarantined=[Quarantined(unit_id="00001", reason="out of memory")]))
    assert "1 of 2 units are quarantined" in card
    assert "> - 00001: out of memory" in card


def test_real_images_are_not_called_synthetic(make_summary: SummaryMaker) -> None:
    card = render_card(make_summary(budget=[]))
    assert "synthetic" not in header(card)["tags"]
    assert "was optimized" not in card


def test_the_student_line_imports_what_its_architecture_needs(make_summary: SummaryMaker) -> None:
    paths = Paths(student="student/soft-seed0")
    ours = render_card(make_summary(paths=paths))
    assert 'timm.create_model("local-dir:student/soft-seed0", pretrained=True)' in ours
    assert "import prism_ray.models" in ours
    theirs = render_card(make_summary(paths=paths, config={"student": {"arch": "resnet18"}}))
    assert "import prism_ray.models" not in theirs
    assert "timm" not in render_card(make_summary()).split("## How it was made")[0]


@pytest.mark.parametrize(
    ("num_images", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (50_000, "10K<n<100K"), (2 * 10**7, "n>10M")]
)
def test_size_categories_are_those_of_the_hub(num_images: int, category: str) -> None:
    assert size_category(num_images) == category


def test_the_lines_that_load_the_images_work(make_summary: SummaryMaker, tmp_path: Path) -> None:
    summary = make_summary("prism")
    folder = tmp_path / "runs" / "prism"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(render_card(summary), encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    # The same through the header, whose features and split must fit the files.
    code += f"\nby_header = load_dataset({str(folder)!r}, split='train')\nassert by_header.features['label'].names == "
    code += f"{list(CLASS_NAMES)!r}\nassert by_header['seed'] == images['seed']\nprint(len(images), len(by_header))\n"
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "PngImageFile" in done.stdout
    assert "circle" in done.stdout
    assert done.stdout.splitlines()[-1] == "6 6"


@pytest.mark.parametrize(
    ("init", "budget", "expected"),
    [
        ("real", [3], "Every image started from a real image of shapes"),
        ("real", [0], "The images are real images of shapes"),
        ("noise", [3], "Every image started from noise"),
        ("mosaic", [3], "Every image started from tiles of crops of real images of shapes"),
        ("mosaic", [0], "Every image is tiles of crops of real images of shapes"),
        ("generated", [3], "Every image started from an image of another run"),
    ],
)
def test_the_card_says_what_images_started_from(
    init: str, budget: list[int], expected: str, make_summary: SummaryMaker
) -> None:
    card = render_card(make_summary("a", budget=budget, config={"method": {"name": "a", "init": init}}))
    assert expected in card
    assert ("Each image was optimized" in card) == any(budget)


def test_the_card_says_which_split_students_were_measured_on(make_summary: SummaryMaker) -> None:
    assert "top-1 on 360 real test images" in render_card(make_summary("a"))
    card = render_card(make_summary("a", split="validation", num_measured=30))
    assert "top-1 on 30 real training images kept for validation" in card
    assert "test images, %" not in card.partition("## How good it is")[2].partition("##")[0]
