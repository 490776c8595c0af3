"""Parquet in the Hugging Face conventions, end to end, written by `datasets` and by hand."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.prepared import check_dataset, prepare_dataset
from prism_ray.errors import InputError
from prism_ray.options import Source

NAMES = ["cat", "dog"]
LABELS = [1, 0, 1, 1, 0, 0]


def config(path: Path | str, **settings: Any) -> DatasetConfig:
    defaults: dict[str, Any] = {"name": "hf", "source": Source.parquet, "image_size": 4, "channels": 3}
    return DatasetConfig(**(defaults | settings), path=str(path))


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value, 2 * value, 3 * value))


def png(value: int) -> bytes:
    sink = io.BytesIO()
    picture(value).save(sink, format="PNG")
    return sink.getvalue()


def table(
    labels: list[Any],
    *,
    names: list[str] | None = NAMES,
    first: int = 0,
    image_type: pa.DataType | None = None,
    label_type: pa.DataType | None = None,
    columns: tuple[str, str] = ("image", "label"),
) -> pa.Table:
    """A table as `datasets` writes it; image k is `picture(first + k)`."""
    data = [png(first + k) for k in range(len(labels))]
    is_binary = image_type is not None and not pa.types.is_struct(image_type)
    images = pa.array(
        data if is_binary else [{"bytes": d, "path": None} for d in data],
        type=image_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    result = pa.table({columns[0]: images, columns[1]: pa.array(labels, type=label_type)})
    if names is None:
        return result
    features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
    return result.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(folder: Path, **tables: pa.Table) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tables.items():
        pq.write_table(content, folder / f"{name}.parquet", row_group_size=2)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "source", train=table(LABELS), test=table([0, 1, 1], first=50))


def test_what_datasets_writes_is_read_in_order(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, labels in (("train", LABELS), ("validation", [0, 1])):
        rows = {"image": [picture(k) for k in range(len(labels))], "label": labels}
        (tmp_path / "source").mkdir(exist_ok=True)
        path = tmp_path / "source" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    check_dataset(config(tmp_path / "source"))
    prepared = prepare_dataset(config(tmp_path / "source"), tmp_path)
    assert prepared.class_names == NAMES
    assert prepared.labels("train").tolist() == LABELS
    assert prepared.images("train")[:, :, 0, 0].tolist() == [[k, 2 * k, 3 * k] for k in range(6)]
    assert prepared.split["test"] == ["validation-00000-of-00001.parquet"]


def test_files_are_read_in_name_order_with_ids_that_name_file_and_row(tmp_path: Path) -> None:
    files = {"train-1": table([1, 0], first=20), "train-0": table([0, 0, 1]), "test-0": table([1])}
    prepared = prepare_dataset(config(write(tmp_path / "s", **files)), tmp_path)
    assert prepared.labels("train").tolist() == [0, 0, 1, 1, 0]
    assert prepared.images("train")[:, 0, 0, 0].tolist() == [0, 1, 2, 20, 21]
    assert prepared.image_ids("train") == [
        "train-0:000000",
        "train-0:000001",
        "train-0:000002",
        "train-1:000000",
        "train-1:000001",
    ]


@pytest.mark.parametrize("image_type", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
@pytest.mark.parametrize("label_type", [pa.int64(), pa.uint8(), pa.int16()])
def test_other_storage_of_the_same_content_is_the_same(
    folder: Path, tmp_path: Path, image_type: pa.DataType, label_type: pa.DataType
) -> None:
    reference = prepare_dataset(config(folder), tmp_path / "a")
    write(folder, train=table(LABELS, image_type=image_type, label_type=label_type))
    assert prepare_dataset(config(folder), tmp_path / "b").content_hash == reference.content_hash


def test_other_column_names_can_be_chosen(tmp_path: Path) -> None:
    content = table(LABELS, columns=("img", "fine_label"))
    source = write(tmp_path / "s", train=content, test=content)
    prepared = prepare_dataset(config(source, image_column="img", label_column="fine_label"), tmp_path)
    assert prepared.labels("test").tolist() == LABELS
    with pytest.raises(
        InputError, match=r"dataset\.image_column='image': not one column .* it has img, fine_label; set"
    ):
        check_dataset(config(source))


@pytest.mark.parametrize("label_type", [pa.int64(), pa.uint8()])
def test_without_a_test_file_a_share_of_every_class_is_held_out(tmp_path: Path, label_type: pa.DataType) -> None:
    labels = [0, 1] * 10
    source = write(tmp_path / "s", train=table(labels, label_type=label_type))
    prepared = prepare_dataset(config(source, test_fraction=0.3), tmp_path)
    assert prepared.counts == {"train": [7, 7], "test": [3, 3]}
    values = np.concatenate([prepared.images(split)[:, 0, 0, 0] for split in ("train", "test")])
    assert sorted(values.tolist()) == list(range(20))


def test_test_labels_that_are_not_public_give_way_to_validation(tmp_path: Path) -> None:
    source = write(tmp_path / "s", train=table(LABELS), test=table([-1, -1]), validation=table([1, 0], first=9))
    prepared = prepare_dataset(config(source), tmp_path)
    assert prepared.labels("test").tolist() == [1, 0]


def test_a_data_folder_one_file_a_pattern_and_a_url_are_found(tmp_path: Path) -> None:
    nested = write(tmp_path / "hub" / "data", train=table(LABELS), test=table([0, 1])).parent
    assert prepare_dataset(config(nested), tmp_path).counts == {"train": [3, 3], "test": [1, 1]}
    shards = write(tmp_path / "shards", a=table([0, 1]), b=table([1, 0], first=9))
    assert prepare_dataset(config(shards / "*.parquet"), tmp_path).counts == {"train": [1, 1], "test": [1, 1]}
    fs = fsspec.filesystem("memory")
    for name in ("train", "test"):
        fs.pipe(f"/hub/{name}.parquet", (nested / "data" / f"{name}.parquet").read_bytes())
    try:
        remote = prepare_dataset(config("memory://hub"), tmp_path / "remote")
    finally:
        fs.rm("/hub", recursive=True)
    assert remote.content_hash == prepare_dataset(config(nested), tmp_path).content_hash


def test_its_own_prepared_files_are_a_source(folder: Path, tmp_path: Path) -> None:
    first = prepare_dataset(config(folder), tmp_path)
    second = prepare_dataset(config(first.folder, name="again"), tmp_path)
    np.testing.assert_array_equal(second.images("train"), first.images("train"))
    assert second.class_names_hash == first.class_names_hash


class ImageExtension(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.binary(), "prism.test.image")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "ImageExtension":
        return cls()


def test_an_extension_type_is_refused(folder: Path) -> None:
    pa.register_extension_type(ImageExtension())
    try:
        images = pa.ExtensionArray.from_storage(ImageExtension(), pa.array([png(1), png(2)]))
        write(folder, train=pa.table({"image": images, "label": [0, 1]}))
        with pytest.raises(
            InputError, match=r"dataset\.image_column='image': has the extension type .* cast the column"
        ):
            check_dataset(config(folder))
    finally:
        pa.unregister_extension_type("prism.test.image")


REFUSED_TABLES = {
    "no class names": (table(LABELS, names=None), "train.parquet carries no class names"),
    "no label": (table(LABELS).select(["image"]), "dataset.label_column='label': not one column of train.parquet"),
    "no image": (table(LABELS).select(["label"]), "dataset.image_column='image': not one column of train.parquet"),
    "text labels": (table(["cat", "dog"]), "has the type string in train.parquet; expected integers"),
    "paths": (
        pa.table({"image": ["a.png"], "label": [0]}, metadata=table([0]).schema.metadata),
        "has the type string in train.parquet; expected encoded images",
    ),
    "one class": (table([0, 0], names=["cat"]), "has the classes ['cat']; expected at least 2"),
    "same names": (table(LABELS, names=["cat", "cat"]), "class names ['cat'] occur more than once"),
    "empty name": (table(LABELS, names=["cat", ""]), "a class has an empty name"),
    "label out of range": (table([0, 1, 2]), "row train:000002 has the label 2; expected 0 to 1"),
    "no label in a row": (table([0, None]), "row train:000001 has the label None"),
    "negative": (table([0, -1]), "row train:000001 has the label -1"),
    "broken metadata": (table([0, 1]).replace_schema_metadata({"huggingface": "{"}), "carries no class names"),
}


@pytest.mark.parametrize("case", REFUSED_TABLES)
def test_a_table_that_cannot_be_used_is_refused_before_anything_starts(folder: Path, case: str) -> None:
    content, message = REFUSED_TABLES[case]
    write(folder, train=content)
    with pytest.raises(InputError) as caught:
        check_dataset(config(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_only_a_path_is_refused_by_row(folder: Path) -> None:
    content = table(LABELS)
    images = [{"bytes": None, "path": "cat.png"}] * len(LABELS)
    write(folder, train=content.set_column(0, "image", pa.array(images, type=content.schema.field(0).type)))
    with pytest.raises(InputError, match=r"row train:000000 has no image bytes"):
        check_dataset(config(folder))


def test_a_damaged_image_further_in_is_refused_by_row(folder: Path, tmp_path: Path) -> None:
    labels = [0, 1] * 10
    content = table(labels, image_type=pa.binary())
    cells = content.column("image").to_pylist()
    cells[17] = cells[17][:30]
    write(folder, train=content.set_column(0, "image", pa.array(cells)))
    check_dataset(config(folder))
    with pytest.raises(InputError, match=r"image 'train:000017' cannot be decoded"):
        prepare_dataset(config(folder), tmp_path)


def test_files_with_other_class_names_are_refused(folder: Path, tmp_path: Path) -> None:
    write(folder, test=table([0, 1], names=["dog", "cat"]))
    with pytest.raises(InputError, match=r"test\.parquet has other class names than train\.parquet"):
        check_dataset(config(folder))
    write(folder, test=table([0, 1]), **{"train_1": table([0], names=["dog", "cat"])})
    with pytest.raises(InputError, match=r"train_1\.parquet has other class names than train\.parquet"):
        prepare_dataset(config(folder), tmp_path)


def test_a_class_without_a_training_image_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    write(folder, train=table([0, 0], names=[*NAMES]))
    with pytest.raises(InputError, match=r"1 of 2 classes have no training image: dog;"):
        prepare_dataset(config(folder), tmp_path)


def test_a_file_that_is_no_parquet_is_refused_by_name(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as parquet"):
        check_dataset(config(folder))


def test_a_folder_without_usable_names_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    source = write(tmp_path / "s", shard0=table(LABELS))
    with pytest.raises(
        InputError, match=r"no train\*\.parquet among shard0\.parquet; rename the files, or give a pattern"
    ):
        check_dataset(config(source))
    (source / "shard0.parquet").unlink()
    with pytest.raises(InputError, match=r"no parquet files"):
        check_dataset(config(source))
    with pytest.raises(InputError, match=r"no parquet files"):
        check_dataset(config(source / "*.parquet"))
    with pytest.raises(InputError, match=r"is missing"):
        check_dataset(config(source / "train.parquet"))
