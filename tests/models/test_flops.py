import pytest

from prism_ray.config import TeacherConfig
from prism_ray.errors import InputError
from prism_ray.models.classifier import build_classifier, save_classifier
from prism_ray.models.flops import architecture_flops, forward_flops, teacher_flops

TINY = {"channels": [8, 8, 16]}
DIGITS = {"image_size": 16, "channels": 1, "num_classes": 10}


def test_a_network_that_was_never_built_costs_what_a_built_one_does() -> None:
    built = build_classifier(
        "prism_vgg", num_classes=10, in_chans=1, image_size=16, mean=[0.3], std=[0.4], model_args=TINY, seed=0
    )
    expected = forward_flops(built, image_size=16, in_chans=1)
    assert architecture_flops("prism_vgg", TINY, image_size=16, in_chans=1, num_classes=10) == expected
    # By hand: a 3x3 convolution is 18 * in * out per pixel, here at 16, 16 and 8 pixels; then the linear layer.
    assert expected == 18 * (1 * 8 * 16**2 + 8 * 8 * 16**2 + 8 * 16 * 8**2) + 2 * 16 * 10


def test_published_operations_are_met() -> None:
    flops = architecture_flops("resnet18", {}, image_size=224, in_chans=3, num_classes=1000)
    assert flops / 2e9 == pytest.approx(1.814, abs=1e-3)  # GMACs, as the literature counts


def test_an_architecture_of_fixed_size_is_built_for_the_size_asked_for() -> None:
    small, large = (
        architecture_flops("vit_tiny_patch16_224", {}, image_size=size, in_chans=3, num_classes=10)
        for size in (64, 224)
    )
    assert small < large / 10


def test_a_teacher_costs_what_its_own_input_size_does(tmp_path) -> None:
    trained = TeacherConfig(arch="prism_vgg", model_args=TINY)
    assert teacher_flops(trained, **DIGITS) == architecture_flops(
        "prism_vgg", TINY, image_size=16, in_chans=1, num_classes=10
    )
    pretrained = TeacherConfig(source="timm:resnet18.tv_in1k")
    assert teacher_flops(pretrained, image_size=64, channels=3, num_classes=1000) / 2e9 == pytest.approx(
        1.814, abs=1e-3
    )
    lite = TeacherConfig(source="imagenet_lite:0")
    quarter, whole = (teacher_flops(lite, image_size=size, channels=3, num_classes=1000) for size in (128, 256))
    assert quarter == pytest.approx(whole / 4, rel=0.02)
    adopted = build_classifier(
        "prism_vgg", num_classes=10, in_chans=1, image_size=32, mean=[0.3], std=[0.4], model_args=TINY, seed=0
    )
    save_classifier(adopted, tmp_path, class_names=[str(n) for n in range(10)], extra={})
    assert teacher_flops(TeacherConfig(source=str(tmp_path)), **DIGITS) == forward_flops(
        adopted, image_size=32, in_chans=1
    )


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (TeacherConfig(arch="prism_vg"), "did you mean prism_vgg"),
        (TeacherConfig(arch="prism_vgg", model_args={"layers": 3}), "model_args: prism_vgg cannot be built"),
        (TeacherConfig(source="timm:resnet18.nobody"), "timm:resnet18.nobody"),
        (TeacherConfig(source="/none"), "is no folder"),
        (TeacherConfig(source="imagenet_lite:x"), "known: imagenet_lite:0"),
    ],
)
def test_a_teacher_that_cannot_be_built_is_refused(teacher: TeacherConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        teacher_flops(teacher, **DIGITS)
