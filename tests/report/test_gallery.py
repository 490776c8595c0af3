"""The gallery: the right pictures, as stored, within its limits."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_samples import CLASS_NAMES, SummaryMaker, everything, gray, png, write_images, write_real

from prism_ray.errors import InputError
from prism_ray.report.gallery import MARKUP_BYTES, MAX_CLASSES, MAX_SIDE, Picture, build_gallery, first_images


def stored(picture: Picture) -> bytes:
    return base64.b64decode(picture.uri.removeprefix("data:image/png;base64,"))


def in_order(paths: list[str], wanted: range, *, per_class: int) -> list[tuple[int, int, bytes]]:
    found = first_images(paths, wanted, per_class=per_class)
    return [(image.class_id, image.index, image.png) for image in found]


def test_images_come_by_index_in_class_whatever_shard_they_are_in(tmp_path: Path) -> None:
    late = write_images(tmp_path / "0.parquet", [(1, 3, gray(3)), (0, 2, gray(2))], method="m")
    early = write_images(tmp_path / "1.parquet", [(0, 0, gray(0)), (1, 1, gray(1)), (0, 1, gray(9))], method="m")
    found = in_order([late, early], range(3), per_class=2)
    assert found == [(0, 0, gray(0)), (0, 1, gray(9)), (1, 1, gray(1)), (1, 3, gray(3))]


def test_real_images_come_in_source_order(tmp_path: Path) -> None:
    rows = [(class_id, gray(10 * number)) for number, class_id in enumerate([2, 0, 2, 1, 0, 2])]
    paths = [write_real(tmp_path / "0.parquet", rows[:3]), write_real(tmp_path / "1.parquet", rows[3:])]
    found = in_order(paths, range(3), per_class=2)
    assert found == [(0, 0, gray(10)), (0, 1, gray(40)), (1, 0, gray(30)), (2, 0, gray(0)), (2, 1, gray(20))]


def test_images_are_found_across_row_groups(tmp_path: Path) -> None:
    rows = [(row // 1500, gray(row % 256)) for row in range(3000)]  # row groups of 1,000; class 1 starts in the second
    path = write_real(tmp_path / "0.parquet", rows)
    found = in_order([path], range(2), per_class=2)
    assert found == [(0, 0, gray(0)), (0, 1, gray(1)), (1, 0, gray(1500 % 256)), (1, 1, gray(1501 % 256))]


def test_every_class_has_a_row_of_real_images_and_one_per_run(make_summary: SummaryMaker) -> None:
    gallery = build_gallery([make_summary("a"), make_summary("b")])
    assert [entry.name for entry in gallery.classes] == list(CLASS_NAMES)
    for entry in gallery.classes:
        assert [(row.label, len(row.pictures)) for row in entry.rows] == [("real", 10), ("a", 2), ("b", 2)]


def test_small_images_are_shown_as_stored(make_summary: SummaryMaker) -> None:
    gallery = build_gallery([make_summary("a")])
    assert stored(gallery.classes[2].rows[1].pictures[1]) == gray(90)  # class 2, index 1 of the sample run
    assert not gallery.is_reduced


def test_large_images_are_reduced(make_summary: SummaryMaker, tmp_path: Path) -> None:
    pixels = np.zeros((200, 300, 3), dtype=np.uint8)
    shard = write_images(tmp_path / "large.parquet", [(0, 0, png(pixels))], method="m")
    gallery = build_gallery([make_summary("a", shards=[shard])])
    with Image.open(io.BytesIO(stored(gallery.classes[0].rows[1].pictures[0]))) as image:
        assert image.size == (MAX_SIDE, MAX_SIDE * 2 // 3)


def test_a_class_whose_unit_is_quarantined_keeps_its_empty_row(make_summary: SummaryMaker, tmp_path: Path) -> None:
    shard = write_images(tmp_path / "one.parquet", [(0, 0, gray(0))], method="a")
    gallery = build_gallery([make_summary("a", shards=[shard])])
    assert [len(entry.rows[1].pictures) for entry in gallery.classes] == [1, 0, 0]


def test_a_run_without_shards_has_no_row(make_summary: SummaryMaker) -> None:
    gallery = build_gallery([make_summary("a", shards=[], real_images=[])])
    assert [entry.rows for entry in gallery.classes] == [[], [], []]


def test_the_limit_takes_images_of_each_row_before_classes(make_summary: SummaryMaker) -> None:
    summary = make_summary("a")
    full = build_gallery([summary])
    cost = sum(
        len(p.uri) + len(p.origin) + MARKUP_BYTES
        for entry in full.classes
        for row in entry.rows
        for p in row.pictures[:1]
    )
    tight = build_gallery([summary], max_bytes=cost)
    assert (len(tight.classes), tight.images_per_row) == (3, 1)
    tighter = build_gallery([summary], max_bytes=cost - 1)
    assert (len(tighter.classes), tighter.images_per_row) == (2, 1)
    assert tighter.num_classes == 3


def test_of_chosen_classes_only_those_have_rows(make_summary: SummaryMaker) -> None:
    summary = make_summary("a", real_images=[])
    some = replace(summary, dataset=replace(summary.dataset, class_ids=[2, 0], num_train=0))
    gallery = build_gallery([some])
    assert [(entry.name, [row.label for row in entry.rows]) for entry in gallery.classes] == [
        ("triangle", ["a"]),
        ("circle", ["a"]),
    ]
    assert stored(gallery.classes[0].rows[0].pictures[1]) == gray(90)
    assert gallery.num_classes == 2


def test_many_classes_are_cut(make_summary: SummaryMaker) -> None:
    gallery = build_gallery([make_summary("a", class_names=[f"class {k}" for k in range(MAX_CLASSES + 20)])])
    assert len(gallery.classes) == MAX_CLASSES
    assert gallery.num_classes == MAX_CLASSES + 20


def test_a_missing_shard_is_named(make_summary: SummaryMaker, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.parquet: the shard is missing; run `prism-ray verify"):
        build_gallery([make_summary("a", shards=[str(tmp_path / "gone.parquet")])])


def test_a_damaged_shard_is_named(make_summary: SummaryMaker, tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"damaged\.parquet: the shard is damaged"):
        build_gallery([make_summary("a", shards=[str(path)])])


def test_an_image_that_is_no_png_is_refused(make_summary: SummaryMaker, tmp_path: Path) -> None:
    shard = write_images(tmp_path / "text.parquet", [(0, 0, b"<svg onload=alert(1)>")], method="m")
    with pytest.raises(InputError, match="not a PNG"):
        build_gallery([make_summary("a", shards=[shard])])


def test_below_synthetic_images_are_the_real_ones_nearest_to_them(make_summary: SummaryMaker) -> None:
    gallery = build_gallery([make_summary("a", **everything("a", 1))])
    real, own, nearest = gallery.classes[1].rows
    assert [(row.label, row.kind) for row in (real, own, nearest)] == [
        ("real", "real"),
        ("a", "run"),
        ("nearest real", "nearest"),
    ]
    # Image k of class c has row 3 k + c, which is the k-th real image of that class.
    assert [stored(picture) for picture in nearest.pictures] == [stored(picture) for picture in real.pictures[:2]]
    assert [picture.caption for picture in nearest.pictures] == ["0.25", "0.25"]
    assert "nearest to: 1-0" in nearest.pictures[0].origin
    assert "class: square" in nearest.pictures[0].origin


def test_real_images_have_no_row_of_nearest_ones(make_summary: SummaryMaker) -> None:
    content = everything("a", 1) | {"config": {"method": {"name": "random_real", "engine": "real"}}}
    assert [row.kind for row in build_gallery([make_summary("a", **content)]).classes[0].rows] == ["real", "run"]


def test_an_image_says_where_it_comes_from(make_summary: SummaryMaker) -> None:
    (_, own) = build_gallery([make_summary("a")]).classes[2].rows
    assert own.pictures[1].origin.splitlines() == ["image: 2-1", "seed: 0"]


def test_real_images_that_were_not_those_measured_are_refused(make_summary: SummaryMaker) -> None:
    content = everything("a", 1)
    content["neighbors"] = replace(content["neighbors"], images=[["0-0", 999, 1.0]])  # pyright: ignore
    with pytest.raises(InputError, match="not those that were measured"):
        build_gallery([make_summary("a", **content)])
