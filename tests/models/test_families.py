from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from prism_ray.models import families
from prism_ray.models.classifier import build_classifier, save_classifier

WIDTHS: dict[str, dict[str, Any]] = {
    "prism_vgg": {"channels": [8, 12, 16]},
    "prism_convnet": {"channels": [8, 12, 16]},
    "prism_resnet": {"channels": [8, 12, 16], "depths": [1, 2, 1]},
}


def create(name: str, **arguments: Any) -> Any:
    return timm.create_model(name, **arguments)


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_behaves_like_any_timm_model(name):
    network = create(name, num_classes=7, in_chans=1, **WIDTHS[name]).eval()
    x = torch.rand(2, 1, 16, 16)
    feature_map = network.forward_features(x)
    pooled = network.forward_head(feature_map, pre_logits=True)
    assert pooled.shape == (2, 16) == (2, network.num_features)
    torch.testing.assert_close(pooled, feature_map.mean(dim=(2, 3)))
    assert torch.equal(network(x), network.get_classifier()(pooled))
    assert network(x).shape == (2, 7)
    network.reset_classifier(3)
    assert network(x).shape == (2, 3)
    assert network.num_classes == 3
    network.reset_classifier(0)
    assert torch.equal(network(x), pooled)


@pytest.mark.parametrize("name", families.NAMES)
def test_the_names_in_the_default_configuration_exist(name):
    network = create(name, **WIDTHS[name])
    cfg = cast(dict[str, Any], network.pretrained_cfg)
    assert isinstance(network.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert network.get_submodule(cfg["classifier"]) is network.get_classifier()
    assert count(network, nn.BatchNorm2d) == count(network, nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        *WIDTHS.items(),
        ("prism_convnet", {"channels": [8, 12], "norm": "instance"}),
        ("prism_convnet", {"channels": [8, 12], "img_size": 16}),
        ("prism_vgg", {"channels": [8, 8, 12], "norm": "instance", "img_size": 16}),
        ("prism_resnet", {"channels": [8], "depths": [2]}),
        ("prism_resnet", {"channels": [8, 8, 12, 12], "depths": [1, 1, 1, 1]}),
    ],
    ids=str,
)
def test_a_saved_family_is_an_ordinary_timm_model_with_the_same_logits(tmp_path, name, model_args):
    classifier = build_classifier(
        name, num_classes=3, in_chans=1, image_size=16, mean=[0.3], std=[0.4], model_args=model_args, seed=1
    )
    classifier(torch.rand(4, 1, 16, 16))  # other batch-norm statistics than a fresh network's
    save_classifier(classifier.eval(), tmp_path, class_names=["a", "b", "c"], extra={})
    network = create(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(network((x - 0.3) / 0.4), classifier(x))


# VGG


def test_vgg_pools_after_every_second_convolution_but_the_last():
    for depth, side in ((1, 16), (2, 16), (3, 8), (4, 8), (5, 4)):
        network = create("prism_vgg", in_chans=1, channels=[4] * depth).eval()
        assert network.forward_features(torch.rand(1, 1, 16, 16)).shape[2:] == (side, side)


@pytest.mark.parametrize("channels", [[], [4, 0]])
def test_impossible_widths_are_refused(channels):
    with pytest.raises(ValueError, match="channels="):
        create("prism_vgg", channels=channels)


# ConvNet


def test_convnet_pools_after_every_convolution():
    network = create("prism_convnet", in_chans=1).eval()
    assert network.forward_features(torch.rand(1, 1, 16, 16)).shape == (1, 64, 2, 2)


def test_the_literatures_convnet_3_has_its_parameters_but_the_biases_of_convolutions():
    network = create("prism_convnet", channels=[128, 128, 128], norm="instance", img_size=32, num_classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 320_010 - 3 * 128
    assert network.num_features == network.head_hidden_size == 128 * 4 * 4


def test_instance_norm_normalizes_each_image_by_itself_in_training_too():
    network = create("prism_convnet", in_chans=1, channels=[8, 12], norm="instance").train()
    assert count(network, nn.BatchNorm2d) == 0
    x = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(network.forward_features(x)[1:2], network.forward_features(x[1:2]))
    features = network.stages[0].conv(x)
    torch.testing.assert_close(network.stages[0].bn(features), F.instance_norm(features))


@pytest.mark.parametrize(("size", "side"), [(8, 1), (16, 2), (28, 3), (32, 4)])
def test_a_network_that_flattens_sees_every_position_of_images_of_its_size(size, side):
    network = create("prism_convnet", in_chans=1, channels=[4, 4, 6], img_size=size, num_classes=5).eval()
    x = torch.rand(2, 1, size, size)
    pooled = network.forward_head(network.forward_features(x), pre_logits=True)
    assert torch.equal(pooled, network.stages(x).flatten(1))
    assert pooled.shape == (2, 6 * side**2) == (2, network.num_features)
    assert network(x).shape == (2, 5)
    assert not torch.allclose(network(x.roll(size // 2, dims=3)), network(x)), "where things are matters"


@pytest.mark.parametrize(
    ("arguments", "message"), [({"img_size": 7}, "img_size=7"), ({"norm": "layer"}, "norm='layer'")]
)
def test_too_small_an_image_and_an_unknown_norm_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create("prism_convnet", channels=[4, 4, 6], **arguments)


# ResNet


def test_resnet_begins_with_the_full_resolution_and_halves_it_at_each_further_stage():
    network = create("prism_resnet", in_chans=1, channels=[4, 6, 8], depths=[1, 2, 1]).eval()
    assert network.conv1.stride == (1, 1)
    assert network.forward_features(torch.rand(1, 1, 28, 28)).shape == (1, 8, 7, 7)
    assert [stage["reduction"] for stage in network.feature_info][1:4] == [1, 2, 4]


def test_four_stages_of_two_blocks_are_the_literatures_resnet_18_for_small_images():
    network = create("prism_resnet", channels=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962
    assert count(network, nn.BatchNorm2d) == 20


@pytest.mark.parametrize(
    ("channels", "depths"), [([4, 8], [1]), ([4], [1, 1]), ([], []), ([4] * 5, [1] * 5), ([4, 8], [1, 0]), ([1], [1])]
)
def test_wrong_depths_and_widths_are_refused(channels, depths):
    with pytest.raises(ValueError, match="depths="):
        create("prism_resnet", channels=channels, depths=depths)
