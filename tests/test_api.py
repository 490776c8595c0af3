"""The Python API: five names, cheap to import, whose documentation runs, and which need neither Ray nor files."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prism_ray
from prism_ray import api
from prism_ray.errors import InputError
from prism_ray.models.classifier import Classifier, build_classifier, frozen, save_classifier

NAMES = {"load_config", "run", "load_teacher", "synthesize_batch", "load_images"}
HEAVY = ("torch", "ray", "hydra", "numpy", "pyarrow", "timm", "prism_ray.api")


def teacher(seed: int = 0, arch: str = "prism_vgg", **sizes: Any) -> Classifier:
    given = {"num_classes": 10, "in_chans": 1, "image_size": 16, "mean": [0.5], "std": [0.25], "model_args": {}} | sizes
    return frozen(build_classifier(arch, seed=seed, **given))


def imported_by(program: str) -> set[str]:
    code = f"import json, sys; {program}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return set(json.loads(asked.stdout))


def test_its_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(api)
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted >= 12


def test_the_five_names_are_documented_and_no_others_are_offered() -> None:
    assert set(prism_ray.__all__) == NAMES
    assert set(dir(prism_ray)) >= NAMES
    for name in NAMES:
        found = getattr(prism_ray, name)
        assert found is getattr(api, name)
        assert "Raises:" in found.__doc__, name
    with pytest.raises(AttributeError, match="'synthesise_batch'"):
        _ = prism_ray.synthesise_batch  # pyright: ignore[reportAttributeAccessIssue]


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert imported_by("import prism_ray") == set()


def test_a_batch_is_synthesized_without_ray_and_hydra() -> None:
    program = (
        "import torch, prism_ray; from prism_ray.models.classifier import build_classifier, frozen;"
        "t = build_classifier('prism_vgg', num_classes=2, in_chans=1, image_size=8, mean=[0.5], std=[0.3],"
        " model_args={'channels': [4]}, seed=0);"
        "prism_ray.synthesize_batch([frozen(t)], torch.tensor([0, 1]), iterations=2)"
    )
    assert imported_by(program).isdisjoint({"ray", "hydra"})


def test_a_batch_is_taken_for_its_classes_by_every_teacher(pristine_storage: Path) -> None:
    folders = sorted((pristine_storage / "artifacts/teachers").iterdir())
    teachers, class_ids = [prism_ray.load_teacher(str(folder)) for folder in folders], torch.arange(4)
    assert len(teachers) == 2
    before, after = (
        prism_ray.synthesize_batch(teachers, class_ids, iterations=n, crop_area_min=1, roll_max=0, bn_weight=0.0)
        for n in (1, 60)
    )
    for one in teachers:
        losses = [torch.nn.functional.cross_entropy(one(images), class_ids) for images in (before, after)]
        assert losses[1] < 0.5 * losses[0]


def test_an_image_from_noise_starts_alike_in_any_batch() -> None:
    one, two = (
        prism_ray.synthesize_batch([teacher()], torch.zeros(n, dtype=torch.int64), iterations=1, lr=1e-9)
        for n in (1, 2)
    )
    torch.testing.assert_close(one[0], two[0])
    assert not torch.equal(two[0], two[1])


def test_images_may_start_from_given_ones_of_another_size() -> None:
    initial = torch.rand(2, 1, 12, 12)
    made = prism_ray.synthesize_batch([teacher()], torch.tensor([1, 2]), initial=initial, iterations=2, lr=0.001)
    assert made.shape == initial.shape
    assert 0 < (made - initial).abs().max() < 0.01


def test_a_batch_without_teachers_or_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        prism_ray.synthesize_batch([], torch.tensor([0]))
    with pytest.raises(ValueError, match="class_ids"):
        prism_ray.synthesize_batch([teacher()], torch.tensor([0.5]), iterations=1)


def test_a_teacher_is_loaded_frozen_from_its_folder(tmp_path: Path) -> None:
    saved = teacher(3)
    save_classifier(saved, tmp_path / "teacher", class_names=list("0123456789"), extra={})
    loaded = prism_ray.load_teacher(str(tmp_path / "teacher"))
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(loaded(images), saved(images))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("source", ["train", "/nowhere/at/all", "timm:resnet81"])
def test_what_is_no_teacher_is_refused_by_its_name(source: str) -> None:
    with pytest.raises(InputError, match=source.removeprefix("timm:")):
        prism_ray.load_teacher(source)


def test_images_of_a_run_come_class_by_class(run_dir: Path) -> None:
    images = prism_ray.load_images(str(run_dir))
    assert images.pixels.shape == (20, 1, 16, 16)
    assert images.class_ids.tolist() == [class_id for class_id in range(10) for _ in range(2)]
    assert images.class_names == [str(digit) for digit in range(10)]
    assert images.pixels.dtype == np.uint8
    assert len({image.tobytes() for image in images.pixels}) == 20


def test_a_folder_without_a_run_has_no_images_to_load(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"load_images.*no run with images"):
        prism_ray.load_images(str(tmp_path))


def test_a_refused_setting_is_an_error_of_one_line() -> None:
    with pytest.raises(InputError, match=r"did you mean method.iterations\?"):
        prism_ray.load_config("method.iteratoins=3")
