import hashlib
import json
import subprocess
import sys
import time
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from prism_ray.errors import InputError
from prism_ray.models.classifier import (
    Classifier,
    build_classifier,
    frozen,
    load_classifier,
    load_timm,
    read_extra,
    save_classifier,
)

CLASS_NAMES = [f"digit {i}" for i in range(10)]
TINY = {  # the small networks of the digits recipe, and one without batch norm
    "resnet18": {"layers": [1, 1, 0, 0], "channels": [24, 48, 48, 48], "stem_width": 12, "stem_type": "deep"},
    "test_efficientnet": {"channel_multiplier": 0.5},
    "prism_vgg": {"channels": [8, 8, 16]},
    "prism_convnet": {"channels": [8, 16]},
    "test_vit": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "test_convnext": {"patch_size": 2, "dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "output_stride": 8},
}


def tiny(arch="prism_vgg", *, seed=0, in_chans=1, image_size=16, model_args=None, **changes):
    settings = {"num_classes": 10, "mean": [0.3] * in_chans, "std": [0.37] * in_chans} | changes
    model_args = TINY.get(arch, {}) if model_args is None else model_args
    return build_classifier(
        arch, in_chans=in_chans, image_size=image_size, model_args=model_args, seed=seed, **settings
    )


def saved(classifier, folder):
    save_classifier(classifier, folder, class_names=CLASS_NAMES, extra={"accuracy": 0.5})
    return folder


def settled(classifier):
    """In eval mode, with batch-norm statistics that are not those of a fresh network."""
    classifier.train()
    with torch.no_grad():
        classifier(torch.rand(8, classifier.in_chans, 16, 16, generator=torch.Generator().manual_seed(1)))
    return classifier.eval()


def one_thread(classifier, images):
    """Logits with the one thread of the other program: another number may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return classifier(images)
    finally:
        torch.set_num_threads(threads)


def edit(path, **changes):
    config = json.loads(path.read_text())
    for key, value in changes.items():
        (config["pretrained_cfg"] if key in config["pretrained_cfg"] else config)[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("arch", TINY)
def test_a_tiny_network_gives_logits_features_and_gradients(arch):
    classifier = frozen(tiny(arch))
    images = torch.rand(3, 1, 16, 16, requires_grad=True)
    logits, features = classifier(images), classifier.features(images)
    assert logits.shape == (3, 10)
    assert features.ndim == 2
    head = cast(Any, classifier.network).get_classifier()
    torch.testing.assert_close(head(features), logits)  # the features are those the last layer sees
    logits.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert any(isinstance(m, nn.BatchNorm2d) for m in classifier.modules()) == (
        arch not in ("test_vit", "test_convnext")
    )


@pytest.mark.parametrize("arch", TINY)
def test_a_saved_classifier_loads_with_the_same_logits(arch, tmp_path):
    classifier = settled(tiny(arch))
    loaded = load_classifier(saved(classifier, tmp_path)).eval()
    images = torch.rand(4, 1, 16, 16)
    assert torch.equal(loaded(images), classifier(images))
    assert torch.equal(loaded.features(images), classifier.features(images))
    assert loaded.class_names == tuple(CLASS_NAMES)
    assert (loaded.input_size, loaded.in_chans, loaded.num_classes) == (16, 1, 10)
    again = saved(loaded, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()
    }


@pytest.mark.parametrize(
    ("archs", "imports"),
    [(["resnet18", "test_vit"], "timm"), (["prism_vgg", "prism_convnet"], "prism_ray.models, timm")],
)
def test_another_program_gets_the_same_logits_from_timm_and_its_transform(archs, imports, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    classifiers = {arch: settled(tiny(arch)) for arch in archs}
    for arch, classifier in classifiers.items():
        saved(classifier, tmp_path / arch)
    program = f"""
import json, sys
import torch, {imports}
from PIL import Image
torch.set_num_threads(1)
image = Image.open("image.png")
assert image.mode == "L"
answers = []
for arch in {archs}:
    model = timm.create_model("local-dir:" + arch, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(transform(image)[None])[0].tolist()
    answers.append([arch, logits, model.pretrained_cfg["label_names"][3]])
assert ("prism_ray" in sys.modules) == ("prism_ray" in "{imports}")
print(json.dumps(answers))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    images = torch.from_numpy(pixels)[None, None].float() / 255
    for arch, logits, name in json.loads(done.stdout):
        assert torch.equal(torch.tensor(logits), one_thread(classifiers[arch], images)[0])
        assert name == "digit 3"


def test_the_same_weights_give_the_same_files(tmp_path):
    digests = []
    for name in ("a", "b"):
        folder = saved(tiny(seed=4), tmp_path / name)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"config.json", "model.safetensors", "prism_ray.json"}
    other = saved(tiny(seed=5), tmp_path / "c") / "model.safetensors"
    assert hashlib.sha256(other.read_bytes()).hexdigest() != digests[0]["model.safetensors"]


def test_extra_comes_back_and_a_folder_made_elsewhere_has_none(tmp_path):
    assert read_extra(saved(tiny(), tmp_path)) == {"accuracy": 0.5}
    (tmp_path / "prism_ray.json").unlink()
    assert read_extra(tmp_path) == {}


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = tiny(seed=7).state_dict(), tiny(seed=8).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["network.stages.0.conv.weight"], other["network.stages.0.conv.weight"])


def test_a_new_classifier_is_ready_to_train():
    classifier = tiny()
    assert classifier.training
    assert all(p.requires_grad for p in classifier.parameters())
    bn = next(m for m in classifier.modules() if isinstance(m, nn.BatchNorm2d))
    assert bn.num_batches_tracked == 0
    assert bn.running_mean is not None
    assert bn.running_mean.abs().max() == 0


def test_a_frozen_classifier_keeps_its_statistics_and_weights():
    classifier = frozen(tiny())
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    images = torch.rand(4, 1, 16, 16, requires_grad=True)
    classifier(images).sum().backward()
    assert not classifier.training
    assert all(p.grad is None and not p.requires_grad for p in classifier.parameters())
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_pixels_are_normalized_per_channel():
    classifier = tiny(in_chans=3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    images = torch.rand(2, 3, 16, 16)
    expected = torch.stack([(images[:, 0] - 0.1) / 0.5, (images[:, 1] - 0.2) / 0.25, (images[:, 2] - 0.3) / 2], dim=1)
    torch.testing.assert_close(classifier.prepare(images), expected)


def test_gray_images_reach_an_rgb_network_as_three_equal_channels():
    classifier = tiny(in_chans=3).eval()
    gray = torch.rand(2, 1, 16, 16)
    assert torch.equal(classifier(gray), classifier(gray.repeat(1, 3, 1, 1)))


def test_rgb_images_reach_a_gray_network_as_pil_converts_them():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    gray = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))).float() / 255
    classifier = tiny(mean=[0.0], std=[1.0])
    prepared = classifier.prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    torch.testing.assert_close(prepared[0, 0], gray, atol=1 / 255, rtol=0)  # PIL rounds to whole levels


def test_images_of_another_size_are_resized_as_pil_does():
    classifier = tiny(mean=[0.0], std=[1.0])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)) / 255
    prepared = classifier.prepare(torch.from_numpy(np.array(image))[None, None].float() / 255)
    torch.testing.assert_close(prepared[0, 0].double(), torch.from_numpy(expected), atol=1.5 / 255, rtol=0)


def test_bicubic_resizing_stays_within_the_pixels_range(tmp_path):
    folder = saved(tiny(mean=[0.0], std=[1.0]), tmp_path)
    edit(folder / "config.json", interpolation="bicubic")
    prepared = load_classifier(folder).prepare(torch.eye(8)[None, None])
    assert prepared.min() >= 0
    assert prepared.max() <= 1


def test_images_of_the_right_size_are_not_touched():
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(tiny(mean=[0.0], std=[1.0]).prepare(images), images)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 2, 16, 16), (2, 4, 16, 16)])
def test_images_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\) or \(B, 3, H, W\)"):
        tiny()(torch.rand(shape))


def test_a_network_of_fixed_size_is_built_for_the_images_unless_told_otherwise():
    assert tiny("test_vit").input_size == 16
    other = tiny("test_vit", model_args=TINY["test_vit"] | {"img_size": 8}).eval()
    assert other.input_size == 8
    assert other(torch.rand(1, 1, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arch", "model_args", "match"),
    [
        ("resnet81", {}, "did you mean resnet18"),
        ("prism_vgg", {"chanels": [4]}, "chanels"),
        ("prism_vgg", {"channels": []}, "at least one width"),
        ("prism_convnet", {"channels": [4] * 6}, "cannot take images of 16 pixels"),
        ("prism_vgg", {"channels": {4}}, "not JSON-ready"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(arch, model_args, match):
    with pytest.raises(InputError, match=match) as caught:
        tiny(arch, model_args=model_args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mean": [0.1, 0.2]}, "mean has 2 entries"),
        ({"std": [0.0]}, "not positive"),
        ({"num_classes": 0}, "no classification layer"),
    ],
)
def test_impossible_preprocessing_is_refused(changes, match):
    with pytest.raises(InputError, match=match):
        tiny(**changes)


def test_a_folder_made_by_timm_keeps_its_own_preprocessing(tmp_path):
    network = timm.create_model("prism_vgg", num_classes=10, in_chans=3, channels=[4, 4]).eval()
    config = {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.9, 0.8, 0.7),
        "input_size": (3, 24, 24),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    timm.models.save_for_hf(network, str(tmp_path), model_config={"pretrained_cfg": config}, safe_serialization=True)
    loaded = load_classifier(tmp_path).eval()
    assert (loaded.input_size, loaded.in_chans, loaded.interpolation) == (24, 3, "bicubic")
    assert loaded.class_names is None
    images = torch.rand(2, 3, 24, 24)
    transformed = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.9, 0.8, 0.7])[:, None, None]
    torch.testing.assert_close(loaded(images), network(transformed))


def test_a_pickled_folder_needs_permission(tmp_path):
    classifier = settled(tiny())
    folder = saved(classifier, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(classifier.network.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="allow_pickle=true"):
        load_classifier(folder)
    images = torch.rand(1, 1, 16, 16)
    assert torch.equal(load_classifier(folder, allow_pickle=True).eval()(images), classifier(images))


def test_a_pickle_that_runs_code_is_refused_even_with_permission(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    folder = saved(tiny(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    # As long as weights would be, so that it is not refused for its size.
    torch.save({"a": Attack(), "b": torch.zeros(4096)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="do not load as prism_vgg") as caught:
        load_classifier(folder, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "resnet81"}, r"config\.json: 'resnet81' is no architecture"),
        ({"model_args": {"channels": [8, 8, 24]}}, "do not load as prism_vgg"),
        ({"model_args": {"channels": [8, 8, 16], "num_classes": 9}}, "num_classes is 9"),
        ({"input_size": [1, 16, 24]}, "16 x 24 pixels"),
        ({"interpolation": "lanczos"}, "'lanczos' is unknown"),
        ({"mean": [0.1, 0.1, 0.1]}, "mean has 3 entries"),
        ({"label_names": ["a"]}, "has 1 class names; expected 10"),
    ],
)
def test_a_folder_at_odds_with_itself_is_refused_in_one_line(changes, match, tmp_path):
    folder = saved(tiny(), tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=match) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json"])
def test_an_unreadable_configuration_is_refused(text, tmp_path):
    folder = saved(tiny(), tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="is no model configuration"):
        load_classifier(folder)


def test_saving_needs_a_name_for_every_class(tmp_path):
    with pytest.raises(ValueError, match="9 class names for 10 classes"):
        save_classifier(tiny(), tmp_path, class_names=CLASS_NAMES[:9], extra={})


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("timm:resnet81", "timm:resnet81: 'resnet81' is no architecture"),
        ("timm:resnet18.nonsense", "nonsense"),
        ("prism_vgg", "has no pretrained weights"),
    ],
)
def test_a_pretrained_model_that_does_not_exist_is_refused(name, match):
    with pytest.raises(InputError, match=match):
        load_timm(name)


def test_offline_weights_that_are_not_cached_are_refused_at_once_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"^timm:resnet18\.tv_in1k: its weights cannot be fetched .* local-dir form$"):
        load_timm("timm:resnet18.tv_in1k")
    assert time.perf_counter() - start < 5  # the hub client alone retries for 23 s


def test_a_wrapper_of_a_foreign_network_is_refused_if_it_takes_neither_gray_nor_rgb():
    network = timm.create_model("prism_vgg", in_chans=4, num_classes=2, channels=[4])
    with pytest.raises(InputError, match="takes 4 channels"):
        Classifier(network, architecture="prism_vgg", model_args={}, input_size=8, mean=[0.5], std=[0.5])
