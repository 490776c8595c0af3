import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prism_ray.methods.inversion.matching import (
    Network,
    layer_distance,
    observed_distances,
    skipped_layers,
    statistics_term,
)
from prism_ray.methods.inversion.statistics import BatchState, LayerTarget, moments
from tests.methods.nets import (
    RepeatedNormNet,
    images_and_classes,
    network_of,
    num_hooks,
    prepared,
)


def bn_distance(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return layer_distance(x, LayerTarget(mean, var))


def feature_map(*, channels: int = 3, size: int = 5, num_images: int = 6) -> Tensor:
    return torch.randn(num_images, channels, size, size, generator=torch.Generator().manual_seed(0)).double()


# --- one layer ---


def test_bn_distance_of_one_channel_has_its_golden_value():
    x = torch.tensor([[1.0, 3], [5, 7]]).view(2, 1, 1, 2)  # mean 4, biased variance 5
    assert bn_distance(x, torch.tensor([1.0]), torch.tensor([2.0])).item() == 6.0


def test_bn_distance_of_two_channels_has_its_golden_value():
    x = torch.tensor([[0.0, 2, 4, 6], [1, 1, 3, 3]]).view(1, 2, 2, 2)  # means 3, 2 and variances 5, 1
    assert bn_distance(x, torch.zeros(2), torch.ones(2)).item() == pytest.approx(7.605551, abs=5e-7)


def test_bn_distance_matches_what_batch_norm_itself_tracks():
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(3, momentum=1).train()
    norm(x)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    num_values = 4 * 5 * 6
    biased_var = norm.running_var * (num_values - 1) / num_values  # what it tracks is unbiased
    assert bn_distance(x, norm.running_mean, biased_var).item() == pytest.approx(0, abs=1e-6)


def test_bn_distance_is_zero_on_own_statistics_with_a_finite_gradient_and_positive_elsewhere():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean, var = moments(x.detach(), (0, 2, 3))
    distance = bn_distance(x, mean, var)
    assert distance.item() == 0
    (gradient,) = torch.autograd.grad(distance, x)
    assert gradient.isfinite().all()
    assert bn_distance(x, mean + 1e-3, var) > 0
    assert bn_distance(x, mean, var + 1e-3) > 0


@pytest.mark.parametrize(("num_means", "num_vars"), [(1, 3), (3, 1), (4, 4), (1, 1)])
def test_statistics_of_another_width_are_refused(num_means, num_vars):
    with pytest.raises(ValueError, match="expected 3"):
        bn_distance(torch.zeros(2, 3, 4, 4), torch.zeros(num_means), torch.zeros(num_vars))


# --- one network ---


def test_every_bn_layer_is_observed_with_its_index_in_traversal_order(auxiliary):
    images, _ = images_and_classes(0)
    with observed_distances(network_of(auxiliary)) as distances:
        auxiliary(images)
    assert distances.keys() == {0, 1, 2}
    x = auxiliary.stem(images)
    for index, layer in enumerate([auxiliary.shortcut_norm, auxiliary.norm]):
        assert torch.equal(distances[index], bn_distance(x, layer.running_mean, layer.running_var))


def test_stopping_early_observes_the_same_distances_whatever_the_order_of_execution(primary, auxiliary):
    images, _ = images_and_classes(0)
    for network in (primary, auxiliary, prepared(RepeatedNormNet(), 0)):
        with observed_distances(network_of(network)) as whole:
            network(images)
        with observed_distances(network_of(network), stops_when_complete=True) as stopped:
            network(images)
        assert whole.keys() == stopped.keys()
        assert all(torch.equal(whole[index], stopped[index]) for index in whole)


def test_batch_norms_fused_with_an_activation_are_found_too():
    from timm.layers.norm_act import BatchNormAct2d

    network = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), 0)
    assert len(network_of(network).targets) == 1
    with observed_distances(network_of(network)) as distances:
        network(images_and_classes(0)[0])
    assert list(distances) == [0]


def test_hooks_are_removed_after_an_error_in_the_network(primary):
    with pytest.raises(RuntimeError), observed_distances(network_of(primary)):
        primary(torch.zeros(1, 2, 8, 8))  # the stem expects 3 channels
    assert num_hooks(primary) == 0


def test_hooks_are_removed_after_stopping_early(auxiliary):
    with observed_distances(network_of(auxiliary), stops_when_complete=True):
        auxiliary(images_and_classes(0)[0])
        pytest.fail("the forward pass went on after its last batch norm")
    assert num_hooks(auxiliary) == 0


def test_changing_an_observed_input_in_place_is_an_error_and_not_a_wrong_statistic():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            x = images * 1
            y = self.norm(x)
            x += 1
            return y.mean(dim=(2, 3))

    images = images_and_classes(0)[0].requires_grad_()
    network = prepared(Overwriting(), 0)
    with observed_distances(network_of(network)) as distances:
        network(images)
    with pytest.raises(RuntimeError, match="inplace"):
        distances[0].backward()


def test_a_forward_pass_without_any_of_its_matched_layers_is_refused():
    with pytest.raises(ValueError, match="no matched layer ran"):
        statistics_term({}, first_bn_multiplier=1)


# --- patches ---


def test_patch_distances_of_single_pixels_have_their_golden_value():
    x = torch.tensor([[1.0, 2], [3, 4]]).view(1, 1, 2, 2)  # channel: mean 2.5, variance 1.25; four patches of a pixel
    target = LayerTarget(torch.zeros(1), torch.zeros(1), patch_mean=torch.zeros(4), patch_var=torch.zeros(4))
    assert layer_distance(x, target).item() == pytest.approx(2.5 + 1.25 + math.sqrt(30), rel=1e-6)


def test_patch_moments_are_taken_over_images_channels_and_the_patchs_pixels():
    first = torch.tensor([[1.0, 3, 5, 7], [2, 2, 6, 6]])
    x = torch.stack([first, torch.zeros(2, 4)])[None]  # 2 x 2 patches of 1 x 2 pixels in two channels
    patch_mean, patch_var = torch.tensor([1.0, 3, 1, 3]), torch.tensor([1.5, 9.5, 1, 9])  # by hand
    mean, var = torch.tensor([4.0, 0]), torch.tensor([4.5, 0])
    target = LayerTarget(mean, var, patch_mean=patch_mean, patch_var=patch_var)
    assert layer_distance(x, target).item() == pytest.approx(0, abs=1e-6)
    elsewhere = LayerTarget(mean, var, patch_mean=patch_mean + 1, patch_var=patch_var)
    assert layer_distance(x, elsewhere).item() == pytest.approx(2, rel=1e-6)


def test_patch_distances_do_not_need_sides_that_divide():
    x = feature_map(size=5)
    resized = nn.functional.interpolate(x, size=(6, 6), mode="bilinear")
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    corners = [resized[..., i : i + 3, j : j + 3] for i in (0, 3) for j in (0, 3)]
    patch_mean = torch.stack([corner.mean() for corner in corners])
    patch_var = torch.stack([corner.var(correction=0) for corner in corners])
    target = LayerTarget(mean, var, patch_mean=patch_mean, patch_var=patch_var)
    assert layer_distance(x, target).item() == pytest.approx(0, abs=1e-12)


# --- classes ---


def class_wise(x: Tensor, class_ids: Tensor, class_mean: Tensor, class_var: Tensor, share: float = 1.0) -> Tensor:
    var, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0)
    target = LayerTarget(mean + 1, var, class_mean=class_mean, class_var=class_var)
    return layer_distance(x, target, class_share=share, state=BatchState(class_ids))


def test_the_class_wise_distance_of_a_single_class_is_the_batchs():
    x = feature_map()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    class_mean, class_var = torch.full((4, 3), torch.nan).double(), torch.full((4, 3), torch.nan).double()
    class_mean[2], class_var[2] = mean, var
    found = class_wise(x, torch.full((6,), 2), class_mean, class_var)
    assert found.item() == pytest.approx(bn_distance(x, mean, var).item(), rel=1e-12)


def test_the_class_wise_distance_is_the_mean_over_classes_present_of_their_own():
    x, class_ids = feature_map(), torch.tensor([1, 3, 1, 1, 0, 3])
    class_mean, class_var = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).double()
    by_hand = [bn_distance(x[class_ids == c], class_mean[c], class_var[c]).item() for c in (0, 1, 3)]
    assert class_wise(x, class_ids, class_mean, class_var).item() == pytest.approx(np.mean(by_hand), rel=1e-12)
    half = class_wise(x, class_ids, class_mean, class_var, share=0.5).item()
    assert half == pytest.approx(np.mean(by_hand) / 2 + math.sqrt(3) / 2, rel=1e-12)  # its global mean is 1 off


def test_the_class_wise_distance_to_own_statistics_is_zero_with_a_finite_gradient():
    x, class_ids = feature_map().requires_grad_(), torch.tensor([0, 0, 1, 1, 1, 0])
    state = BatchState(class_ids)
    mean, var = state.class_moments(x.detach())
    distance = class_wise(x, class_ids, mean, var)
    assert distance.item() == 0
    (gradient,) = torch.autograd.grad(distance, x)
    assert gradient.isfinite().all()


# --- skipped layers ---


def test_skips_are_the_same_for_the_same_seed_and_differ_between_iterations_seeds_and_networks(primary):
    network = network_of(primary, conv=True)

    def skips(seed: int, name: str) -> list[frozenset[int]]:
        return [skipped_layers(network, probability=0.5, seed=seed, iteration=t, name=name) for t in range(200)]

    assert skips(1, "a") == skips(1, "a")
    for other in (skips(2, "a"), skips(1, "b"), [*skips(1, "a")[1:], frozenset()]):
        assert sum(x == y for x, y in zip(skips(1, "a"), other, strict=True)) < 90


def test_every_convolution_is_skipped_with_its_probability_and_independently(primary):
    network = network_of(primary, conv=True)
    drawn = [skipped_layers(network, probability=0.4, seed=0, iteration=t, name="a") for t in range(4000)]
    skipped = np.array([[0 in layers, 2 in layers] for layers in drawn])
    assert np.abs(skipped.mean(axis=0) - 0.4).max() < 0.031  # four standard deviations
    assert abs(np.corrcoef(skipped.T)[0, 1]) < 0.064
    assert all(layers <= {0, 2} for layers in drawn)


def test_nothing_is_skipped_at_probability_zero(primary):
    network = network_of(primary, conv=True)
    assert skipped_layers(network, probability=0, seed=0, iteration=0, name="a") == frozenset()


def test_targets_of_another_network_are_refused(primary, auxiliary):
    network = Network(primary, network_of(auxiliary).targets)
    with pytest.raises(ValueError, match="3 targets for ConvBnNet"), observed_distances(network):
        pass
    assert num_hooks(primary) == 0
