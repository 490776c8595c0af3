from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_ray.methods.inversion.objective import (
    bn_distance,
    bn_loss,
    inversion_loss,
    num_bn_layers,
    observed_bn_distances,
    statistics_loss,
)
from tests.methods.nets import (
    BnFreeNet,
    ConvBnNet,
    RepeatedNormNet,
    ResidualNet,
    counted_calls,
    images_and_classes,
    num_hooks,
    prepared,
)

R, FIRST = 0.01, 10.0


@pytest.fixture
def primary() -> nn.Module:
    return prepared(ConvBnNet(), 1)


@pytest.fixture
def auxiliary() -> nn.Module:
    return prepared(ResidualNet(), 2)


@pytest.fixture
def bn_free() -> nn.Module:
    return prepared(BnFreeNet(), 3)


def loss_of(images, class_ids, primary, teachers, *, bn_weight=R, first=FIRST, count_bn_free=True):
    return inversion_loss(
        images,
        class_ids,
        primary=primary,
        statistics_teachers=teachers,
        bn_weight=bn_weight,
        first_bn_multiplier=first,
        count_bn_free_teachers=count_bn_free,
    )


def gradient_of(images: Tensor, class_ids: Tensor, primary: nn.Module, teachers: list[nn.Module], **options):
    x = images.clone().requires_grad_()
    terms = loss_of(x, class_ids, primary, teachers, **options)
    return torch.autograd.grad(terms.total, x)[0]


def sre2l_loss(teacher: nn.Module, images: Tensor, class_ids: Tensor) -> Tensor:
    """SRe2L's objective of a single teacher, written down plainly: its own hooks, loops and order."""
    inputs: dict[nn.Module, Tensor] = {}
    layers = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [m.register_forward_hook(lambda m, args, _: inputs.__setitem__(m, args[0])) for m in layers]
    loss = F.cross_entropy(teacher(images), class_ids)
    for handle in handles:
        handle.remove()
    regularizer = torch.zeros((), dtype=images.dtype)
    for position, layer in enumerate(layers):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        var, mean = torch.var_mean(inputs[layer], dim=[0, 2, 3], unbiased=False)
        feature = torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2)
        regularizer = regularizer + (FIRST if position == 0 else 1.0) * feature
    return loss + R * regularizer


class KnownDistance(nn.Module):
    """A network whose only batch norm sees the image, with R = `distance` on constant images of 0.5."""

    def __init__(self, distance: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Linear(1, 5)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.fill_(0.5 - distance)
        self.norm.running_var.fill_(0)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(images[:, :1]).mean(dim=(2, 3)))


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
    var, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0)
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
    with observed_bn_distances(auxiliary) as distances:
        auxiliary(images)
    assert distances.keys() == {0, 1, 2}
    x = auxiliary.stem(images)
    for index, layer in enumerate([auxiliary.shortcut_norm, auxiliary.norm]):
        assert torch.equal(distances[index], bn_distance(x, layer.running_mean, layer.running_var))


def test_stopping_early_observes_the_same_distances_whatever_the_order_of_execution(primary, auxiliary):
    images, _ = images_and_classes(0)
    for network in (primary, auxiliary, prepared(RepeatedNormNet(), 0)):
        with observed_bn_distances(network) as whole:
            network(images)
        with observed_bn_distances(network, stops_when_complete=True) as stopped:
            network(images)
        assert whole.keys() == stopped.keys()
        assert all(torch.equal(whole[index], stopped[index]) for index in whole)


def test_batch_norms_fused_with_an_activation_are_found_too():
    from timm.layers.norm_act import BatchNormAct2d

    network = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), 0)
    assert num_bn_layers(network) == 1
    with observed_bn_distances(network) as distances:
        network(images_and_classes(0)[0])
    assert list(distances) == [0]


def test_num_bn_layers_counts_2d_batch_norms_only(primary, bn_free):
    assert num_bn_layers(primary) == 2
    assert num_bn_layers(bn_free) == 0
    assert num_bn_layers(nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3))) == 0


def test_hooks_are_removed_after_an_error_in_the_network(primary):
    with pytest.raises(RuntimeError), observed_bn_distances(primary):
        primary(torch.zeros(1, 2, 8, 8))  # the stem expects 3 channels
    assert num_hooks(primary) == 0


def test_hooks_are_removed_after_stopping_early(auxiliary):
    with observed_bn_distances(auxiliary, stops_when_complete=True):
        auxiliary(images_and_classes(0)[0])
        pytest.fail("the forward pass went on after its last batch norm")
    assert num_hooks(auxiliary) == 0


def test_a_bn_layer_without_running_statistics_is_refused_and_leaves_no_hooks():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="layer 1 of Sequential"), observed_bn_distances(network):
        pass
    assert num_hooks(network) == 0


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
    with observed_bn_distances(network) as distances:
        network(images)
    with pytest.raises(RuntimeError, match="inplace"):
        distances[0].backward()


def test_a_forward_pass_without_any_of_its_bn_layers_is_refused():
    with pytest.raises(ValueError, match="no batch-norm layer ran"):
        bn_loss({}, first_bn_multiplier=1)


def test_the_multiplier_weighs_exactly_the_first_layer_in_traversal_order(auxiliary):
    images, class_ids = images_and_classes(0)
    with observed_bn_distances(auxiliary) as distances:
        auxiliary(images)
    once = loss_of(images, class_ids, auxiliary, [auxiliary], first=10)
    twice = loss_of(images, class_ids, auxiliary, [auxiliary], first=20)
    assert (twice.bn - once.bn).item() == pytest.approx(10 * distances[0].item(), rel=1e-5)
    assert once.bn.item() == pytest.approx(
        10 * distances[0].item() + distances[1].item() + distances[2].item(), rel=1e-6
    )


def test_doubling_the_multiplier_of_a_pair_changes_the_loss_by_its_share(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    images = images.double()
    pair = [primary.double(), auxiliary.double()]
    first_terms = torch.zeros(())
    for teacher in pair:
        with observed_bn_distances(teacher) as distances:
            teacher(images)
        first_terms = first_terms + distances[0]
    change = loss_of(images, class_ids, primary, pair, first=20).total - loss_of(images, class_ids, primary, pair).total
    assert change.item() == pytest.approx(R / 2 * 10 * first_terms.item(), rel=1e-9)


# --- the whole objective ---


@pytest.mark.parametrize("network", [ConvBnNet, ResidualNet])
def test_a_set_of_the_primary_alone_is_exactly_sre2l(network):
    primary = prepared(network(), 1)
    images, class_ids = images_and_classes(0)
    x = images.clone().requires_grad_()
    expected = sre2l_loss(primary, x, class_ids)
    assert torch.equal(loss_of(images, class_ids, primary, [primary]).total, expected)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    gradient = gradient_of(images, class_ids, primary, [primary])
    # Where branches meet, their gradients may be added in another order.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)


def test_running_the_primary_once_equals_separate_copies(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    x = images.clone().requires_grad_()
    logits_copy, statistics_copy = deepcopy(primary), deepcopy(primary)
    separate = F.cross_entropy(logits_copy(x), class_ids)
    for teacher in (statistics_copy, auxiliary):
        with observed_bn_distances(teacher) as distances:
            teacher(x)
        separate = separate + R / 2 * (
            FIRST * distances[0] + sum(distances[index] for index in range(1, len(distances)))
        )
    (expected_gradient,) = torch.autograd.grad(separate, x)
    shared = loss_of(images, class_ids, primary, [primary, auxiliary]).total
    # Only the order of additions differs.
    torch.testing.assert_close(shared, separate, rtol=1e-6, atol=0)
    shared_gradient = gradient_of(images, class_ids, primary, [primary, auxiliary])
    torch.testing.assert_close(shared_gradient, expected_gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("distances", "num_bn_free", "weighted"),
    [((200,), 0, 2.0), ((200, 900), 0, 5.5), ((200,), 1, 1.0), ((200, 900), 1, 11 / 3)],
)
def test_the_statistics_term_has_the_golden_values_of_the_released_program(distances, num_bn_free, weighted, bn_free):
    networks = [KnownDistance(distance).double().eval().requires_grad_(False) for distance in distances]
    teachers = [*networks, *[deepcopy(bn_free) for _ in range(num_bn_free)]]
    images = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    terms = loss_of(images, torch.tensor([0, 1]), networks[0], teachers, first=1)
    assert R * terms.bn.item() == pytest.approx(weighted, rel=1e-12)
    assert (terms.total - terms.ce).item() == pytest.approx(weighted, rel=1e-9)


def test_a_counted_bn_free_teacher_only_scales_the_statistics_term(primary, auxiliary, bn_free):
    images, class_ids = images_and_classes(0)
    without = loss_of(images, class_ids, primary, [primary, auxiliary])
    counted = loss_of(images, class_ids, primary, [primary, auxiliary, bn_free])
    assert torch.equal(counted.ce, without.ce)
    assert counted.bn.item() == pytest.approx(without.bn.item() * 2 / 3, rel=1e-6)


def test_a_skipped_bn_free_teacher_changes_nothing(primary, auxiliary, bn_free):
    images, class_ids = images_and_classes(0)
    sets = [[primary, auxiliary], [primary, auxiliary, bn_free]]
    without, skipped = (loss_of(images, class_ids, primary, teachers, count_bn_free=False) for teachers in sets)
    assert all(torch.equal(a, b) for a, b in zip(without, skipped, strict=True))
    gradients = [gradient_of(images, class_ids, primary, teachers, count_bn_free=False) for teachers in sets]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("count_bn_free", "share"), [(True, 0.5), (False, 1.0)])
def test_a_primary_without_bn_is_counted_by_the_flag_like_any_teacher(auxiliary, bn_free, count_bn_free, share):
    images, class_ids = images_and_classes(0)
    terms = loss_of(images, class_ids, bn_free, [bn_free, auxiliary], count_bn_free=count_bn_free)
    alone = statistics_loss(images, [auxiliary], first_bn_multiplier=FIRST, count_bn_free_teachers=True)
    assert terms.bn.item() == pytest.approx(share * alone.item(), rel=1e-6)
    assert torch.equal(terms.ce, F.cross_entropy(bn_free(images), class_ids))


def test_the_order_of_the_set_does_not_matter(primary, auxiliary, bn_free):
    images, class_ids = images_and_classes(0)
    loss = loss_of(images, class_ids, primary, [primary, auxiliary, bn_free]).total
    for teachers in ([bn_free, auxiliary, primary], [auxiliary, primary, bn_free]):
        torch.testing.assert_close(loss_of(images, class_ids, primary, teachers).total, loss, rtol=1e-6, atol=0)


def test_the_order_of_images_with_their_classes_does_not_matter(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    teachers = [primary, auxiliary]
    terms = loss_of(images, class_ids, primary, teachers)
    permuted = loss_of(images[order], class_ids[order], primary, teachers)
    for a, b in zip(terms, permuted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_the_statistics_term_does_not_depend_on_classes(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    terms = loss_of(images, class_ids, primary, [primary, auxiliary])
    others = loss_of(images, class_ids.flip(0), primary, [primary, auxiliary])
    assert torch.equal(terms.bn, others.bn)
    assert not torch.equal(terms.ce, others.ce)


def test_cross_entropy_is_the_mean_over_the_batch_in_nats(primary):
    images, class_ids = images_and_classes(0)
    probabilities = primary(images).double().softmax(dim=1)
    by_hand = -sum(probabilities[i, class_id].log().item() for i, class_id in enumerate(class_ids.tolist())) / 6
    assert loss_of(images, class_ids, primary, [primary]).ce.item() == pytest.approx(by_hand, rel=1e-5)


def test_finite_differences_match_autograd(primary, auxiliary, bn_free):
    images, class_ids = images_and_classes(0, num_images=2, size=4)
    networks = [network.double() for network in (primary, auxiliary, bn_free)]

    def total(x: Tensor) -> Tensor:
        return loss_of(x, class_ids, networks[0], networks, bn_weight=0.3).total

    assert torch.autograd.gradcheck(total, images.double().requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_the_gradient_reaches_the_images_only(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    x = images.clone().requires_grad_()
    loss_of(x, class_ids, primary, [primary, auxiliary]).total.backward()
    assert x.grad is not None
    assert x.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    for network in (primary, auxiliary):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_an_auxiliarys_classifier_has_no_influence(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    loss = loss_of(images, class_ids, primary, [primary, auxiliary])
    gradient = gradient_of(images, class_ids, primary, [primary, auxiliary])
    auxiliary.head.weight.fill_(torch.nan)
    assert torch.equal(loss_of(images, class_ids, primary, [primary, auxiliary]).total, loss.total)
    assert torch.equal(gradient_of(images, class_ids, primary, [primary, auxiliary]), gradient)


def test_the_primarys_classifier_influences_cross_entropy_only(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    before = loss_of(images, class_ids, primary, [primary, auxiliary])
    primary.head.weight.neg_()
    after = loss_of(images, class_ids, primary, [primary, auxiliary])
    assert torch.equal(before.bn, after.bn)
    assert not torch.equal(before.ce, after.ce)


def test_a_primary_outside_the_set_gives_logits_only(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    terms = loss_of(images, class_ids, primary, [auxiliary])
    assert torch.equal(terms.ce, F.cross_entropy(primary(images), class_ids))
    alone = statistics_loss(images, [auxiliary], first_bn_multiplier=FIRST, count_bn_free_teachers=True)
    assert torch.equal(terms.bn, alone)


# --- work ---


def test_each_network_runs_once_whatever_its_roles(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    with counted_calls(primary) as primary_calls, counted_calls(auxiliary) as auxiliary_calls:
        terms = loss_of(images, class_ids, primary, [primary, auxiliary, auxiliary, primary])
    assert len(primary_calls) == len(auxiliary_calls) == 1
    # A network under two names still counts twice in the mean.
    once = loss_of(images, class_ids, primary, [primary, auxiliary])
    assert terms.bn.item() == pytest.approx(once.bn.item(), rel=1e-6)


def test_a_bn_free_auxiliary_never_runs(primary, bn_free):
    images, class_ids = images_and_classes(0)
    with counted_calls(bn_free) as calls:
        loss_of(images, class_ids, primary, [primary, bn_free])
    assert calls == []


def test_an_auxiliary_stops_before_its_last_batch_norm_runs(primary, auxiliary):
    images, class_ids = images_and_classes(0)
    outputs = []
    auxiliary.shortcut_norm.register_forward_hook(lambda *_: outputs.append("last norm"))
    auxiliary.head.register_forward_hook(lambda *_: outputs.append("head"))
    loss_of(images, class_ids, primary, [primary, auxiliary])
    assert outputs == []


# --- refusals ---


@pytest.mark.parametrize("count_bn_free", [True, False])
def test_a_set_without_any_batch_norm_is_refused(primary, bn_free, count_bn_free):
    images, class_ids = images_and_classes(0)
    with pytest.raises(ValueError, match=r"BnFreeNet.*no batch norm"):
        loss_of(images, class_ids, bn_free, [bn_free], count_bn_free=count_bn_free)
    with pytest.raises(ValueError, match=r"none.*no batch norm"):
        loss_of(images, class_ids, primary, [], count_bn_free=count_bn_free)


def test_an_error_in_a_teacher_leaves_no_hooks(primary, auxiliary):
    with pytest.raises(RuntimeError):
        loss_of(torch.zeros(1, 2, 8, 8), torch.tensor([0]), primary, [primary, auxiliary])
    assert num_hooks(primary) == num_hooks(auxiliary) == 0
