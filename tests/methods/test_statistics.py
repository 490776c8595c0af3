import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_ray.methods.inversion.statistics import BatchState, Moments, matched_layers, moments, targets_of
from tests.methods.nets import (
    NUM_CLASSES,
    BnFreeNet,
    ConvBnNet,
    RepeatedNormNet,
    ResidualNet,
    images_and_classes,
    num_hooks,
    prepared,
)

NUM_IMAGES, PATCH = 23, 3


def measured(network: nn.Module, splits: list[int], *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All moments of 23 images, given in batches of these sizes."""
    images, class_ids = images_and_classes(0, num_images=NUM_IMAGES)
    moments = Moments(network, conv=True, patch_size=PATCH, num_classes=NUM_CLASSES + 1)
    for x, y in zip(images.to(dtype).split(splits), class_ids.split(splits), strict=True):
        moments.observe(x, y)
    return moments.tensors()


def inputs_of(network: nn.Module, images: Tensor) -> list[Tensor]:
    """What every matched layer sees."""
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)]
    seen: dict[nn.Module, Tensor] = {}
    handles = [layer.register_forward_hook(lambda m, args, _: seen.__setitem__(m, args[0])) for layer in layers]
    network(images)
    for handle in handles:
        handle.remove()
    return [seen[layer] for layer in layers]


# --- layers ---


def test_layers_come_in_traversal_order_and_convolutions_only_where_wanted():
    network = ResidualNet()
    norms = [network.shortcut_norm, network.norm, network.branch_norm]
    assert matched_layers(network, conv=False) == norms
    assert matched_layers(network, conv=True) == [norms[0], network.stem, norms[1], network.conv, norms[2]]
    assert matched_layers(BnFreeNet(), conv=False) == []


# --- moments of a data set ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-7)])
@pytest.mark.parametrize("network", [ConvBnNet, ResidualNet])
def test_moments_are_those_of_all_images_together(network, dtype, tolerance):
    model = prepared(network(), 1).to(dtype)
    tensors = measured(model, [9, 9, 5], dtype=dtype)
    images, class_ids = images_and_classes(0, num_images=NUM_IMAGES)
    for index, x in enumerate(inputs_of(model, images.to(dtype))):
        x = x.double()
        expected = {"mean": x.mean((0, 2, 3)), "var": x.var((0, 2, 3), correction=0)}
        of_class = [x[class_ids == c] for c in range(NUM_CLASSES)]
        expected["class_mean"] = torch.stack([y.mean((0, 2, 3)) for y in of_class])
        expected["class_var"] = torch.stack([y.var((0, 2, 3), correction=0) for y in of_class])
        if isinstance(matched_layers(model, conv=True)[index], nn.Conv2d):
            side = -(-x.shape[-1] // PATCH)  # pixels of a patch, of the map enlarged to a multiple
            tiles = F.interpolate(x, size=(side * PATCH,) * 2, mode="bilinear").unfold(2, side, side)
            tiles = tiles.unfold(3, side, side).permute(2, 3, 0, 1, 4, 5).reshape(PATCH**2, -1)
            expected |= {"patch_mean": tiles.mean(1), "patch_var": tiles.var(1, correction=0)}
        found = {name.split(".")[1]: t for name, t in tensors.items() if name.startswith(f"{index}.")}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name][: len(value)].double(), value, rtol=tolerance, atol=tolerance)


def test_moments_do_not_depend_on_how_the_images_are_batched():
    network = prepared(ResidualNet(), 1)
    whole = measured(network, [NUM_IMAGES])
    for splits in ([1] * NUM_IMAGES, [20, 3], [2, 9, 12]):
        for name, value in measured(network, splits).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_class_without_images_has_no_moments():
    tensors = measured(prepared(ConvBnNet(), 1), [NUM_IMAGES])
    for name in ("0.class_mean", "1.class_var"):
        assert tensors[name].shape[0] == NUM_CLASSES + 1
        assert tensors[name][NUM_CLASSES].isnan().all()
        assert tensors[name][:NUM_CLASSES].isfinite().all()


def test_moments_of_a_layer_that_runs_twice_are_those_of_its_first_input():
    network = prepared(RepeatedNormNet(), 1)
    images, class_ids = images_and_classes(0, num_images=NUM_IMAGES)
    moments = Moments(network, conv=False, patch_size=None, num_classes=None)
    moments.observe(images, class_ids)
    tensors = moments.tensors()
    assert tensors.keys() == {"0.mean", "0.var"}
    torch.testing.assert_close(tensors["0.mean"], images.mean((0, 2, 3)))


def test_measuring_leaves_the_network_as_it_is_and_stops_before_its_classifier():
    network = ConvBnNet()
    prepared(network, 1)
    network.head.register_forward_hook(lambda *_: pytest.fail("the classifier ran"))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    hooks = num_hooks(network)
    measured(network, [NUM_IMAGES])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert num_hooks(network) == hooks


# --- targets ---


def test_targets_of_batch_norms_are_their_running_statistics_whatever_was_measured():
    network = prepared(ConvBnNet(), 1)
    norms = matched_layers(network, conv=False)
    moments = Moments(network, conv=False, patch_size=None, num_classes=NUM_CLASSES)
    moments.observe(*images_and_classes(0, num_images=NUM_IMAGES))
    for tensors in (None, moments.tensors()):
        for norm, target in zip(norms, targets_of(network, tensors, conv=False), strict=True):
            assert target.mean is norm.running_mean
            assert target.var is norm.running_var
            assert (target.class_mean is None) == (tensors is None)
            assert target.patch_mean is None


def test_targets_of_convolutions_are_the_measured_ones_in_the_networks_precision():
    network = prepared(ConvBnNet(), 1).double()
    tensors = measured(network, [NUM_IMAGES], dtype=torch.float64)
    stem, *_ = targets_of(network, tensors, conv=True)
    names = ("mean", "var", "class_mean", "class_var", "patch_mean", "patch_var")
    for name in names:
        value = getattr(stem, name)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value.float(), tensors[f"0.{name}"], rtol=0, atol=0, equal_nan=True)


def test_convolutions_without_measured_moments_are_refused():
    with pytest.raises(ValueError, match="Conv2d layer 0 of ConvBnNet has no moments"):
        targets_of(prepared(ConvBnNet(), 1), None, conv=True)


def test_a_batch_norm_without_running_statistics_is_refused():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="layer 1 of Sequential"):
        targets_of(network, None, conv=False)


def test_a_network_without_batch_norm_has_no_targets():
    assert targets_of(prepared(BnFreeNet(), 1), None, conv=False) == ()


# --- the state of a batch ---


def test_an_average_has_the_value_of_the_average_and_the_gradient_of_the_statistic():
    state, target = BatchState(torch.tensor([0])), torch.tensor([1.0, -2])
    values = [torch.tensor(v, requires_grad=True) for v in ([3.0, 4], [5.0, 0], [-1.0, 2])]
    expected = values[0].detach()
    for n, statistic in enumerate(values):
        expected = expected if n == 0 else 0.4 * expected + 0.6 * statistic.detach()
        distance = torch.linalg.vector_norm(state.averaged(("a", 0, "mean"), statistic, decay=0.4) - target)
        torch.testing.assert_close(distance, (expected - target).norm())
        (gradient,) = torch.autograd.grad(distance, statistic)
        torch.testing.assert_close(gradient, (expected - target) / (expected - target).norm())


def test_averages_are_kept_apart_by_name_and_by_batch():
    state, other = BatchState(torch.tensor([0])), BatchState(torch.tensor([0]))
    one, two = torch.ones(2), torch.full((2,), 2.0)
    state.averaged(("a", 0, "mean"), one, decay=0.5)
    assert torch.equal(state.averaged(("a", 0, "mean"), two, decay=0.5), torch.full((2,), 1.5))
    for key in (("b", 0, "mean"), ("a", 1, "mean"), ("a", 0, "var")):
        assert torch.equal(state.averaged(key, two, decay=0.5), two)
    assert torch.equal(other.averaged(("a", 0, "mean"), two, decay=0.5), two)


def test_without_a_decay_a_statistic_is_returned_itself():
    statistic = torch.ones(2)
    assert BatchState(torch.tensor([0])).averaged(("a", 0, "mean"), statistic, decay=0.0) is statistic


def test_groups_are_the_positions_of_each_class_present():
    state = BatchState(torch.tensor([7, 2, 7, 7, 5]))
    assert [(c, rows.tolist()) for c, rows in state.groups] == [(2, [1]), (5, [4]), (7, [0, 2, 3])]
    assert state.classes.tolist() == [2, 5, 7]


# Moments of a batch


@pytest.mark.parametrize("dims", [(0, 2, 3), (2, 3)])
def test_moments_and_their_gradients_are_those_of_torch(dims):
    x = torch.randn(5, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean, var = moments(x, dims)
    expected_var, expected_mean = torch.var_mean(x, dim=dims, correction=0)
    torch.testing.assert_close((mean, var), (expected_mean, expected_var))
    weights = torch.rand(2, *mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((weights[0] * mean + weights[1] * var.sqrt()).sum(), x)
    (expected,) = torch.autograd.grad((weights[0] * expected_mean + weights[1] * expected_var.sqrt()).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(lambda x: moments(x, dims), [x])
    assert torch.autograd.gradgradcheck(lambda x: moments(x, dims), [x])


def test_moments_of_values_far_from_zero_lose_no_digits():
    x = 1000 + torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, var = moments(x, (0, 2, 3))
    expected_var, expected_mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-4, atol=0)
