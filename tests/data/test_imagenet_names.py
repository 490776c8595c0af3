from pathlib import Path

import pytest
from timm.data.imagenet_info import ImageNetInfo

from prism_ray.config import DatasetConfig
from prism_ray.data.imagenet_names import class_names, class_names_like, synsets
from prism_ray.data.prepared import PreparedDataset, check_dataset, find_prepared, prepare_dataset
from prism_ray.data.records import class_ids_of
from prism_ray.errors import InputError
from prism_ray.options import Source

CONFIG = DatasetConfig(name="imagenet_names", source=Source.imagenet_names, image_size=128)


def test_names_are_timms_in_its_order_and_distinct() -> None:
    info = ImageNetInfo()
    assert synsets() == info.label_names()
    assert synsets() == sorted(synsets()), "the order of the original data set's folders"
    assert len(set(class_names())) == 1000
    for class_id, name in enumerate(class_names()):
        assert name.partition(" (")[0] == info.index_to_description(class_id).split(",")[0]
    assert [class_names()[n] for n in (134, 517)] == ["crane (n02012849)", "crane (n03126707)"]


def test_the_data_set_is_called_as_its_folders_are() -> None:
    assert class_names_like(synsets()) == synsets()
    assert class_names_like(["ant", "bee"]) == class_names()


def test_it_is_prepared_without_an_image_and_found_again(tmp_path: Path) -> None:
    assert check_dataset(CONFIG) == class_names()
    prepared = prepare_dataset(CONFIG, tmp_path)
    assert prepared.class_names == class_names()
    assert [path.name for path in prepared.folder.iterdir()] == ["dataset.json"]
    assert find_prepared(CONFIG, tmp_path) == PreparedDataset.open(prepared.folder)
    assert prepared.verify() == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_about_its_images_has_an_empty_answer(tmp_path: Path, split) -> None:
    prepared = prepare_dataset(CONFIG, tmp_path)
    assert prepared.num_images(split) == 0
    assert prepared.counts[split] == [0] * 1000
    assert prepared.labels(split).shape == (0,)
    assert prepared.image_ids(split) == []
    assert [len(rows) for rows in prepared.rows_by_class(split)] == [0] * 1000
    assert prepared.images(split).shape == (0, 3, 128, 128)
    with pytest.raises(IndexError):
        prepared.images(split, [0])


def test_noise_gets_the_moments_of_imagenets_pixels(tmp_path: Path) -> None:
    prepared = prepare_dataset(CONFIG, tmp_path)
    assert prepared.mean == pytest.approx([0.485, 0.456, 0.406])
    assert prepared.std == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("changes", "words"), [({"path": "/data"}, r"dataset\.path='/data'"), ({"channels": 1}, r"dataset\.channels=1")]
)
def test_a_path_and_gray_images_are_refused(changes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_dataset(DatasetConfig(name="n", source=Source.imagenet_names, image_size=128, **changes))


def test_classes_are_chosen_by_name() -> None:
    assert class_ids_of(["zebra", "daisy", "golden retriever"], class_names()) == [207, 340, 985]
    assert class_ids_of([], ["ant", "bee"]) == [0, 1]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["Zebra"], "'Zebra' is no class of the data set; did you mean zebra"),
        (["retriever"], "golden retriever"),
        (["xqz"], "known: tench, goldfish"),
        (["zebra", "zebra"], "'zebra' is given twice"),
    ],
)
def test_classes_that_do_not_exist_are_refused_with_the_nearest(classes: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        class_ids_of(classes, class_names())
