"""Stored labels: what the label teachers say of views that anyone can derive again, at the price of their bytes."""

import copy
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Command

from prism_ray import cli
from prism_ray.errors import PrismError
from prism_ray.inspection import open_existing
from prism_ray.ledger import read_table
from prism_ray.lock import newest_epoch
from prism_ray.methods.soft_labels import Codec
from prism_ray.options import LabelRule, Mix
from prism_ray.plan import Unit
from prism_ray.report.format import format_bytes
from prism_ray.schema import label_schema, table_bytes, text_metadata
from prism_ray.stages import views as views_module
from prism_ray.stages.device import deterministic, teacher_of
from prism_ray.stages.labels import LabelTeachers, label_table, read_labels
from prism_ray.stages.relabel import Relabeler
from prism_ray.stages.views import ImageSet, views_hash
from prism_ray.stages.worker import Worker
from prism_ray.storage import sha256_of_file
from prism_ray.work import RELABEL, SYNTHESIZE, RunSpec, UnitRef, label_receipt

NUM_CLASSES, NUM_VIEWS = 10, 4
CPU = torch.device("cpu")

Labelled = Callable[..., RunSpec]


@pytest.fixture(scope="module")
def images_only(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A run whose images are made and not yet labelled, with two label teachers of different families."""
    storage = tmp_path_factory.mktemp("labels")
    labels = [
        "teachers=[vgg,convnet]",
        f"views={NUM_VIEWS}",
        "mix=cutmix",
        "crop_area_min=0.25",
        "top_k=null",
        "bits=16",
    ]
    settings = ["recipe=digits_smoke", "compute=inline", *(f"labels.{one}" for one in labels), f"storage={storage}"]
    assert cli.main(["run", *settings, "stages=[prepare,teach,synthesize]"]) == 0
    return open_existing(cli.compose(settings)).spec()


@pytest.fixture
def labelled(images_only: RunSpec, tmp_path: Path) -> Labelled:
    """Labels a copy of that run by other settings of `labels`."""

    def label(**settings: Any) -> RunSpec:
        spec = with_labels(images_only, **settings)
        run_dir = shutil.copytree(images_only.run_dir, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        spec = replace(spec, run_dir=str(run_dir))
        spec = replace(spec, epoch=newest_epoch(spec.ledger().store))
        worker = Worker([spec], node="here", live_nodes=lambda: {"here"})
        for index in range(len(spec.units())):
            ((_, outcome),) = worker.process([UnitRef(0, RELABEL, index)])
            assert outcome.status == "done", outcome.reason
        return spec

    return label


def with_labels(spec: RunSpec, **settings: Any) -> RunSpec:
    return replace(spec, config=replace(spec.config, labels=replace(spec.config.labels, **settings)))


def image_set(spec: RunSpec, units: list[Unit]) -> ImageSet:
    tables = [read_table(spec.ledger().store, f"images/{unit.name}.parquet") for unit in units]
    return ImageSet.from_tables(units, tables, spec.config.labels, spec.config.seed)


def backwards(spec: RunSpec) -> list[Unit]:
    """The units in another order than they were labelled in."""
    return spec.units()[::-1]


def assert_as_stored(answer: torch.Tensor, stored: torch.Tensor) -> None:
    # fp16 keeps 11 bits; the rest is what convolutions round in another batch size or order.
    assert ((answer - stored).abs() <= 2**-11 * stored.abs() + 1e-4).all(), (answer - stored).abs().max()


# Replay


@pytest.mark.parametrize("mix", list(Mix))
@pytest.mark.parametrize("batch_size", [1, 7, 80])
def test_label_teachers_on_rederived_views_repeat_the_stored_logits_in_any_batch(
    labelled: Labelled, mix: Mix, batch_size: int
) -> None:
    spec = labelled(mix=mix)
    units = backwards(spec)
    images, stored = image_set(spec, units), read_labels(spec.ledger(), spec.config, units, NUM_CLASSES)
    teachers = [teacher_of(spec, name, CPU) for name in ("vgg", "convnet")]
    assert len(stored) == len(images) == 20
    assert stored.num_views == NUM_VIEWS
    pairs = np.random.default_rng(0).permutation([(i, v) for i in range(len(images)) for v in range(NUM_VIEWS)])
    for start in range(0, len(pairs), batch_size):
        indices, views = pairs[start : start + batch_size].T
        with torch.no_grad():
            shown = images.views(indices, views, mix=True)
            answer = torch.stack([teacher(shown) for teacher in teachers]).mean(dim=0)
        assert_as_stored(answer, stored.logits(indices, views))


COUPLED = [
    {"rule": LabelRule.frobenius},
    {"rule": LabelRule.sample_norm, "weights": [0.75, 0.25]},
    {"batch_statistics": True},
    {"rule": LabelRule.frobenius, "batch_statistics": True, "mix": Mix.mixup},
]


@pytest.mark.parametrize("settings", COUPLED)
def test_a_coupled_label_is_repeated_by_its_group_and_by_no_other(labelled: Labelled, settings: dict[str, Any]) -> None:
    spec = labelled(**settings)
    units = backwards(spec)
    images, stored = image_set(spec, units), read_labels(spec.ledger(), spec.config, units, NUM_CLASSES)
    teachers = LabelTeachers(spec, CPU)
    assert teachers.couples
    rng, start, others = np.random.default_rng(0), 0, []
    for unit in units:
        group = start + rng.permutation(len(unit.images))
        start += len(unit.images)
        for view in range(NUM_VIEWS):
            views = np.full(len(group), view)
            wanted = stored.logits(group, views)
            assert_as_stored(teachers.logits(images.views(group, views, mix=True)), wanted)
            part = teachers.logits(images.views(group[:2], views[:2], mix=True))
            others.append((part - wanted[:2]).abs().max().item())
    assert np.median(others) > 0.02  # a part of a group may by chance have its norms


@pytest.mark.parametrize("settings", [{"rule": LabelRule.mean, "weights": [3.0, 1.0]}, *COUPLED])
def test_a_stored_label_is_the_rules_formula_of_what_the_teachers_say(
    labelled: Labelled, settings: dict[str, Any]
) -> None:
    spec = labelled(**settings)
    unit, labels = spec.units()[2], spec.config.labels
    images, stored = image_set(spec, [unit]), read_labels(spec.ledger(), spec.config, [unit], NUM_CLASSES)
    first, second = (copy.deepcopy(teacher_of(spec, name, CPU)) for name in ("vgg", "convnet"))
    if labels.batch_statistics:
        for layer in (*first.modules(), *second.modules()):
            layer.train(isinstance(layer, torch.nn.BatchNorm2d))
    group = np.arange(len(images))
    share = labels.weights[0] / sum(labels.weights) if labels.weights else 0.5
    for view in range(NUM_VIEWS):
        views = np.full(len(group), view)
        with torch.no_grad():
            shown = images.views(group, views, mix=True)
            a, b = first(shown), second(shown)
        if labels.rule is LabelRule.frobenius:
            size = (a.norm() + b.norm()) / 2
            a, b = a / a.norm() * size, b / b.norm() * size
        label = share * a + (1 - share) * b
        if labels.rule is LabelRule.sample_norm:
            norms = torch.stack([row.norm() for row in label])
            label = torch.stack([row / row.norm() * norms.mean() for row in label])
        assert_as_stored(label, stored.logits(group, views))


def test_the_batch_size_of_relabel_changes_no_coupled_label(labelled: Labelled) -> None:
    first, second = (labelled(rule=LabelRule.frobenius, batch_size=size) for size in (1, 512))
    for unit in first.units():
        paths = [Path(spec.run_dir, f"labels/{unit.name}.parquet") for spec in (first, second)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_batch_statistics_leave_the_shared_teachers_as_they_were(labelled: Labelled, images_only: RunSpec) -> None:
    teacher = teacher_of(images_only, "vgg", CPU)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    files = [path for folder in images_only.teacher_dirs.values() for path in Path(folder).rglob("*") if path.is_file()]
    digests = {path: sha256_of_file(path) for path in files}
    labelled(batch_statistics=True)
    assert {path: sha256_of_file(path) for path in files} == digests
    assert teacher_of(images_only, "vgg", CPU) is teacher
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


# Bytes


@pytest.mark.parametrize(
    ("settings", "codec"),
    [
        ({}, Codec(NUM_CLASSES, NUM_VIEWS)),
        ({"bits": 4}, Codec(NUM_CLASSES, NUM_VIEWS, bits=4)),
        ({"top_k": 3}, Codec(NUM_CLASSES, NUM_VIEWS, top_k=3)),
        ({"top_k": 3, "bits": 8}, Codec(NUM_CLASSES, NUM_VIEWS, top_k=3, bits=8)),
    ],
)
def test_a_receipt_counts_the_bytes_of_its_labels_and_says_how_they_are_stored(
    labelled: Labelled, settings: dict[str, Any], codec: Codec
) -> None:
    spec = labelled(**settings)
    receipts = spec.ledger().receipts(RELABEL)
    assert len(receipts) == len(spec.units()) == 4
    for receipt in receipts.values():
        path = Path(spec.run_dir, receipt.key)
        assert receipt.bytes == path.stat().st_size
        assert receipt.rows == pq.read_metadata(path).num_rows == 5
        assert receipt.details == {"codec": codec.name, "num_views": NUM_VIEWS}
        table = pq.read_table(path)
        assert table.schema.names == ["image_id", "logits"]
        assert {len(blob) for blob in table["logits"].to_pylist()} == {codec.blob_bytes}


def test_a_label_shard_names_its_images_in_their_order_and_how_to_read_it(labelled: Labelled) -> None:
    spec = labelled(mix=Mix.mixup, bits=4, top_k=3)
    for unit in spec.units():
        table = read_table(spec.ledger().store, f"labels/{unit.name}.parquet")
        images = read_table(spec.ledger().store, f"images/{unit.name}.parquet")
        assert table["image_id"].to_pylist() == images["image_id"].to_pylist()
        assert set(images["unit_id"].to_pylist()) == {unit.unit_id}
        expected = label_schema(
            codec="top_3+quantized_4",
            blob_bytes=4 + NUM_VIEWS * 3 + NUM_VIEWS * 4 // 2,
            num_classes=NUM_CLASSES,
            num_views=NUM_VIEWS,
            views_hash=views_hash(spec.config.labels, spec.config.seed),
            group=unit.unit_id,
        )
        assert table.schema.equals(expected)
        assert text_metadata(table.schema) == text_metadata(expected)


def test_the_size_shown_is_that_of_the_label_files(prism: Command, run_dir: Path) -> None:
    paths = list((run_dir / "labels").iterdir())
    shown = format_bytes(sum(path.stat().st_size for path in paths))
    assert len(paths) == 4
    result = prism("run")
    assert result.code == 0, result
    (row,) = (line for line in result.out.splitlines() if line.split()[:1] == ["prism"])
    assert f" {shown} " in row
    page = next((run_dir / "report").rglob("*.html")).read_text()
    assert f'title="{sum(path.stat().st_size for path in paths):,} bytes"' in page


def test_smaller_codecs_store_the_same_labels_within_their_bounds(labelled: Labelled) -> None:
    everything = np.repeat(np.arange(20), NUM_VIEWS), np.tile(np.arange(NUM_VIEWS), 20)

    def labels_of(**settings: Any) -> torch.Tensor:
        spec = labelled(**settings)
        stored = read_labels(spec.ledger(), spec.config, spec.units(), NUM_CLASSES).logits(*everything)
        return stored.view(20, NUM_VIEWS, NUM_CLASSES)

    exact, coarse, kept = labels_of(), labels_of(bits=6), labels_of(top_k=2)
    steps = (exact.amax(dim=(1, 2)) - exact.amin(dim=(1, 2))) / 63
    assert ((coarse - exact).abs().amax(dim=(1, 2)) <= steps / 2 * 1.01 + 0.01).all()
    largest, classes = exact.topk(2, dim=2)
    torch.testing.assert_close(kept.gather(2, classes), largest)
    torch.testing.assert_close(kept.logsumexp(2), exact.logsumexp(2), atol=0.01, rtol=2**-10)


def random_labels(codec: Codec, num_images: int, *, peak: float = 0.0, noise: float = 3.0) -> pa.Table:
    """Logits that are noise in every view, or of a teacher sure of one class of each image."""
    generator = torch.Generator().manual_seed(0)
    logits = noise * torch.randn(num_images, codec.num_views, codec.num_classes, generator=generator)
    logits[torch.arange(num_images), :, torch.arange(num_images) % codec.num_classes] += peak
    ids = [f"{n % 10:06d}-{n // 10:06d}" for n in range(num_images)]
    return label_table(codec, logits, ids, views_hash="0" * 16, group="f" * 16)


@pytest.mark.parametrize("codec", [Codec(10, 24, bits=4), Codec(10, 36, bits=3), Codec(10, 40, top_k=3, bits=4)])
def test_whole_files_of_small_codecs_are_forty_times_smaller_than_300_views_in_half_precision(codec: Codec) -> None:
    # Of random logits, which compress worse than a teacher's.
    assert 40 * len(table_bytes(random_labels(codec, 100))) <= 100 * 300 * 10 * 2


@pytest.mark.parametrize(
    ("codec", "num_images"), [(Codec(10, 32, bits=4), 100), (Codec(1000, 300, top_k=10, bits=8), 20)]
)
def test_whole_files_of_a_teachers_labels_are_forty_times_smaller_with_more_views_too(
    codec: Codec, num_images: int
) -> None:
    size_bytes = len(table_bytes(random_labels(codec, num_images, peak=8.0, noise=1.0)))
    assert 40 * size_bytes <= num_images * 300 * codec.num_classes * 2


def test_a_label_file_costs_little_beside_its_labels() -> None:
    assert len(table_bytes(random_labels(Codec(10, 1, bits=1), 100))) < 100 * 6 + 1000


@pytest.mark.parametrize("codec", [Codec(10, 3), Codec(10, 3, top_k=3, bits=4)])
def test_a_label_table_comes_back_as_it_was(codec: Codec) -> None:
    table = random_labels(codec, 7)
    data = table_bytes(table)
    back = pq.read_table(io.BytesIO(data))
    assert back.equals(table)
    assert back.schema.metadata == table.schema.metadata
    assert table_bytes(table) == data


# Refusals


def test_labels_of_other_settings_are_refused(labelled: Labelled) -> None:
    spec = labelled()
    for settings, problem in (
        ({"crop_area_min": 0.5}, "its views were drawn by other settings"),
        ({"mix": Mix.none}, "its views were drawn by other settings"),
        ({"views": 3}, "it has another number of views"),
        ({"bits": 4}, "its labels are stored by other settings"),
        ({"top_k": 3}, "its labels are stored by other settings"),
    ):
        with pytest.raises(PrismError, match=f"^labels/train-00000-of-00004.parquet: {problem}.*; run relabel again"):
            read_labels(spec.ledger(), with_labels(spec, **settings).config, spec.units(), NUM_CLASSES)
    with pytest.raises(PrismError, match="another number of classes"):
        read_labels(spec.ledger(), spec.config, spec.units(), 9)


def test_labels_of_other_images_are_refused(labelled: Labelled) -> None:
    spec = labelled()
    first, second, *_ = spec.units()
    folder = Path(spec.run_dir, "labels")
    shutil.copy(folder / f"{first.name}.parquet", folder / f"{second.name}.parquet")
    with pytest.raises(PrismError, match=f"{second.name}.parquet: does not belong to its images; run verify"):
        read_labels(spec.ledger(), spec.config, [first, second], NUM_CLASSES)


def test_labels_of_another_length_than_their_settings_say_are_refused(labelled: Labelled) -> None:
    spec = labelled()
    unit, store = spec.units()[1], spec.ledger().store
    key = f"labels/{unit.name}.parquet"
    table = read_table(store, key)
    shorter = pa.array([blob[:-1] for blob in table["logits"].to_pylist()], pa.binary(79))
    schema = table.schema.set(1, pa.field("logits", pa.binary(79)))
    store.put(key, table_bytes(pa.table([table["image_id"].combine_chunks(), shorter], schema=schema)))
    with pytest.raises(PrismError, match=f"^{key}: has 395 bytes of labels; expected 80 for each of 5 images"):
        read_labels(spec.ledger(), spec.config, spec.units(), NUM_CLASSES)


def test_the_settings_that_draw_views_and_no_others_decide_the_hash_of_views(images_only: RunSpec) -> None:
    labels, seed = images_only.config.labels, images_only.config.seed
    known = views_hash(labels, seed)
    for same in ({"views": 9}, {"bits": 3}, {"top_k": 2}, {"rule": LabelRule.frobenius}, {"batch_size": 1}):
        assert views_hash(replace(labels, **same), seed) == known
    for same in ({"teachers": ["vgg"]}, {"weights": [1.0, 2.0]}, {"batch_statistics": True}):
        assert views_hash(replace(labels, **same), seed) == known
    for other in ({"crop_area_min": 0.9}, {"flip_probability": 0.9}, {"mix": Mix.mixup}, {"mix": Mix.none}):
        assert views_hash(replace(labels, **other), seed) != known
    assert views_hash(labels, seed + 1) != known


# Views


def test_images_without_augmentation_are_the_stored_ones(images_only: RunSpec) -> None:
    images = image_set(images_only, images_only.units())
    whole = with_labels(images_only, crop_area_min=1.0, flip_probability=0.0)
    uncropped = image_set(whole, whole.units()).views(np.arange(20), np.zeros(20, np.int64), mix=False)
    clean = images.clean(np.arange(20))
    assert clean.dtype == torch.float32
    torch.testing.assert_close(uncropped, clean, atol=1e-6, rtol=0)
    assert torch.equal(clean * 255, (clean * 255).round())


@pytest.mark.parametrize("mix", list(Mix))
def test_views_that_are_drawn_ahead_are_the_same(
    images_only: RunSpec, mix: Mix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views_module, "DRAWN_AHEAD", 61)
    spec = with_labels(images_only, mix=mix)
    plain, ahead = (image_set(spec, spec.units()) for _ in range(2))
    ahead.draw_ahead()
    rng = np.random.default_rng(0)
    for first in (0, 2, 5, 1000):
        indices, views = rng.permutation(len(plain))[:13], first + rng.integers(0, 5, size=13)
        assert torch.equal(ahead.views(indices, views, mix=True), plain.views(indices, views, mix=True))


def test_a_mixup_view_is_the_blend_of_two_images_of_its_shard(images_only: RunSpec) -> None:
    spec = with_labels(images_only, mix=Mix.mixup)
    unit = spec.units()[0]
    images = image_set(spec, [unit])
    indices, views = np.arange(len(images)), np.full(len(images), 2)
    plain, mixed = images.views(indices, views, mix=False), images.views(indices, views, mix=True)
    torch.testing.assert_close(mixed.mean(dim=0), plain.mean(dim=0))  # partners are a bijection, one share for all
    # Every mixed image lies on the line between two plain ones.
    for image, base in zip(mixed, plain, strict=True):
        directions = (plain - base).flatten(1)
        shares = (directions @ (image - base).flatten()) / directions.square().sum(dim=1).clamp(min=1e-9)
        residuals = (base + shares[:, None, None, None] * (plain - base) - image).flatten(1).norm(dim=1)
        assert residuals.min() < 1e-4


def test_a_set_that_is_not_its_units_is_refused(images_only: RunSpec) -> None:
    first, second, *_ = images_only.units()
    table = read_table(images_only.ledger().store, f"images/{first.name}.parquet")
    with pytest.raises(ValueError, match="5 images for 10 planned ones"):
        ImageSet.from_tables([first, second], [table], images_only.config.labels, images_only.config.seed)


def test_labels_repeat_bit_for_bit(labelled: Labelled) -> None:
    spec = labelled(bits=4)
    unit = spec.units()[1]
    images = spec.ledger().receipt(SYNTHESIZE, unit.name)
    assert images is not None
    with deterministic(1):
        table, _ = Relabeler(spec).compute(unit, label_receipt(unit, images))
    assert table_bytes(table) == Path(spec.run_dir, f"labels/{unit.name}.parquet").read_bytes()
