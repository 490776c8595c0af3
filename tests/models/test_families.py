from typing import Any, cast

import pytest
import timm
import torch
from torch import nn

from prism_ray.models import families
from prism_ray.models.families import PlainConvNet


def create(name, **arguments):
    network = timm.create_model(name, **arguments)
    assert isinstance(network, PlainConvNet)
    return network


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_behaves_like_any_timm_model(name):
    network = create(name, num_classes=7, in_chans=1, channels=[8, 12, 16]).eval()
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
    network = create(name, channels=[4, 4])
    cfg = cast(dict[str, Any], network.pretrained_cfg)
    assert isinstance(network.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert network.get_submodule(cfg["classifier"]) is network.get_classifier()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 2


def test_vgg_pools_after_every_second_convolution_but_the_last():
    for depth, side in ((1, 16), (2, 16), (3, 8), (4, 8), (5, 4)):
        network = create("prism_vgg", in_chans=1, channels=[4] * depth).eval()
        assert network.forward_features(torch.rand(1, 1, 16, 16)).shape[2:] == (side, side)


def test_convnet_pools_after_every_convolution():
    network = create("prism_convnet", in_chans=1).eval()
    assert network.forward_features(torch.rand(1, 1, 16, 16)).shape == (1, 64, 2, 2)


@pytest.mark.parametrize("channels", [[], [4, 0]])
def test_impossible_widths_are_refused(channels):
    with pytest.raises(ValueError, match="channels="):
        create("prism_vgg", channels=channels)
