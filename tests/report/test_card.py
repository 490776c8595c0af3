"""The data-set card: what the hub reads parses, and what it tells people to type works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from report_samples import CLASS_NAMES, SummaryMaker

from prism_ray import schema
from prism_ray.report.card import COLUMNS, markdown_text, render_card, size_category, write_card, yaml_string
from prism_ray.report.contents import Paths, Quarantined

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
    write_card(summary, folder / "README.md")
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
