from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_ray.methods.inversion.matching import Network, observed_distances
from prism_ray.methods.inversion.objective import Guides, LossTerms, Objective, inversion_loss, num_bn_layers
from prism_ray.methods.inversion.regularizers import image_norm, spectrum_divergence, total_variation
from prism_ray.methods.inversion.statistics import BatchState
from prism_ray.methods.inversion.subsets import reduction_weights
from tests.methods.nets import (
    BnFreeNet,
    ConvBnNet,
    ResidualNet,
    counted_calls,
    images_and_classes,
    network_of,
    num_hooks,
    prepared,
)

R, FIRST = 0.01, 10.0


@pytest.fixture
def bn_free() -> nn.Module:
    return prepared(BnFreeNet(), 3)


def loss_of(images, class_ids, primary, teachers, *, bn_weight=R, first=FIRST, count_bn_free=True) -> LossTerms:
    """PRISM's loss: the primary's cross-entropy and the mean over a set of teachers, of which some may be the same."""
    networks = {"primary": Network(primary)} | {str(n): network_of(teacher) for n, teacher in enumerate(teachers)}
    names = [str(n) for n in range(len(teachers))]
    weights = reduction_weights(
        names,
        reduction="mean",
        matched={name: bool(networks[name].targets) for name in names},
        count_unmatched=count_bn_free,
        accuracies={},
        scales={},
        temperature=1,
    )
    return inversion_loss(
        images,
        class_ids,
        networks=networks,
        guides=Guides({"primary": 1.0}, weights),
        objective=Objective(bn_weight=bn_weight, first_bn_multiplier=first),
    )


def term_of(images: Tensor, teacher: nn.Module) -> Tensor:
    """R of one teacher."""
    with observed_distances(network_of(teacher)) as distances:
        teacher(images)
    return sum((distances[index] for index in range(1, len(distances))), start=FIRST * distances[0])


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


def test_the_multiplier_weighs_exactly_the_first_layer_in_traversal_order(auxiliary):
    images, class_ids = images_and_classes(0)
    with observed_distances(network_of(auxiliary)) as distances:
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
        with observed_distances(network_of(teacher)) as distances:
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
    separate = separate + R / 2 * (term_of(x, statistics_copy) + term_of(x, auxiliary))
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
    assert terms.bn.item() == pytest.approx(share * term_of(images, auxiliary).item(), rel=1e-6)
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
    assert torch.equal(terms.bn, term_of(images, auxiliary))


# --- several guides ---


@pytest.fixture
def networks(primary, auxiliary, bn_free) -> dict[str, Network]:
    return {"a": network_of(primary), "b": network_of(auxiliary), "free": network_of(bn_free)}


def guided(networks, logits, statistics, *, seed=0, class_ids=None, **options) -> LossTerms:
    images, ids = images_and_classes(seed)
    return inversion_loss(
        images,
        ids if class_ids is None else class_ids,
        networks=networks,
        guides=Guides(logits, statistics),
        objective=Objective(**options),
    )


def test_the_objective_is_the_sum_of_its_weighted_parts(networks, primary, auxiliary):
    images, class_ids = images_and_classes(0)
    terms = guided(
        networks,
        {"a": 0.25, "b": 0.75},
        {"a": 2.0, "b": 0.5},
        ce_weight=3.0,
        bn_weight=0.2,
        tv_weight=0.1,
        l2_weight=0.4,
        eig_weight=0.7,
        eig_temperature=2.0,
    )
    ce = 0.25 * F.cross_entropy(primary(images), class_ids) + 0.75 * F.cross_entropy(auxiliary(images), class_ids)
    bn = 2.0 * term_of(images, primary) + 0.5 * term_of(images, auxiliary)
    pair = [torch.tensor([0, 5])]  # the only class with two images
    prior = 0.1 * total_variation(images) + 0.4 * image_norm(images)
    prior = prior + 0.7 * spectrum_divergence(images, pair, temperature=2.0)
    for found, expected in zip(terms, (3 * ce + 0.2 * bn + prior, ce, bn, prior), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_priors_see_the_images_in_units_of_std(networks):
    images, class_ids = images_and_classes(0)
    options = {"networks": networks, "guides": Guides({"a": 1.0}, {}), "objective": Objective(l2_weight=1.0)}
    assert torch.equal(inversion_loss(images, class_ids, **options).prior, image_norm(images))
    terms = inversion_loss(images, class_ids, normalized=3 * images, **options)
    assert torch.equal(terms.prior, image_norm(3 * images))
    assert torch.equal(terms.total, terms.ce + terms.prior)


def test_in_the_coupled_form_every_classifier_matters(networks, auxiliary):
    logits, statistics = {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}
    before = guided(networks, logits, statistics)
    auxiliary.head.weight.neg_()
    after = guided(networks, logits, statistics)
    assert torch.equal(before.bn, after.bn)
    assert not torch.equal(before.ce, after.ce)


def test_a_guide_of_weight_zero_is_left_out_and_never_runs(networks, auxiliary):
    with counted_calls(auxiliary) as calls:
        terms = guided(networks, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert calls == []
    assert all(torch.equal(x, y) for x, y in zip(terms, guided(networks, {"a": 1.0}, {"a": 1.0}), strict=True))


def test_without_statistics_teachers_the_term_is_zero(networks):
    terms = guided(networks, {"a": 1.0}, {})
    assert terms.bn.item() == 0
    assert torch.equal(terms.total, terms.ce)


def test_a_draw_of_networks_with_nothing_to_match_adds_nothing(networks, bn_free):
    with counted_calls(bn_free) as calls:
        terms = guided(networks, {"a": 1.0}, {"free": 1.0})
    assert calls == []
    assert torch.equal(terms.total, guided(networks, {"a": 1.0}, {}).total)


def test_one_network_of_a_pool_can_give_both_signals(networks, primary):
    with counted_calls(primary) as primary_calls:
        terms = guided(networks, {"b": 1.0}, {"b": 1.0})
    assert primary_calls == []
    alone = guided({"b": networks["b"]}, {"b": 1.0}, {"b": 1.0})
    assert all(torch.equal(x, y) for x, y in zip(terms, alone, strict=True))


def test_weights_that_are_equal_are_a_division_as_in_the_released_mean(networks, primary, auxiliary):
    third = prepared(ConvBnNet(width=9), 5)
    for seed in range(10):
        images, _ = images_and_classes(seed)
        terms = guided({**networks, "c": network_of(third)}, {"a": 1.0}, dict.fromkeys("abc", 1 / 3), seed=seed)
        expected = (term_of(images, primary) + term_of(images, auxiliary) + term_of(images, third)) / 3
        assert torch.equal(terms.bn, expected)


# --- class-wise shares, averages and skipped layers ---


def test_without_a_class_share_class_wise_targets_change_nothing(primary):
    plain = guided({"a": network_of(primary)}, {"a": 1.0}, {"a": 1.0})
    network = network_of(primary)
    poisoned = [
        replace(
            t, class_mean=torch.full((5, len(t.mean)), torch.nan), class_var=torch.full((5, len(t.mean)), torch.nan)
        )
        for t in network.targets
    ]
    others = guided({"a": Network(primary, tuple(poisoned))}, {"a": 1.0}, {"a": 1.0})
    assert all(torch.equal(x, y) for x, y in zip(plain, others, strict=True))


def test_the_class_share_mixes_the_two_distances_linearly(primary):
    networks = {"a": network_of(primary, conv=True, patch_size=2)}
    whole, half, none = (guided(networks, {"a": 1.0}, {"a": 1.0}, class_share=share).bn for share in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, (whole + none) / 2, rtol=1e-6, atol=0)
    assert whole != none


def test_class_wise_statistics_depend_on_the_classes_of_the_images(primary):
    networks = {"a": network_of(primary, conv=True)}
    terms = guided(networks, {"a": 1.0}, {"a": 1.0}, class_share=1.0)
    others = guided(networks, {"a": 1.0}, {"a": 1.0}, class_share=1.0, class_ids=torch.tensor([4, 3, 2, 1, 0, 0]))
    assert not torch.equal(terms.bn, others.bn)


def test_class_wise_statistics_without_targets_are_refused(networks):
    with pytest.raises(ValueError, match=r"class_share=0\.5.*no class-wise moments"):
        guided(networks, {"a": 1.0}, {"a": 1.0}, class_share=0.5)


def test_averages_go_on_in_the_batchs_state_and_start_with_its_first_statistics(networks):
    images, class_ids = images_and_classes(0)
    other, _ = images_and_classes(1)

    def loss(x, state, decay):
        return inversion_loss(
            x,
            class_ids,
            networks=networks,
            guides=Guides({"a": 1.0}, {"a": 0.5, "b": 0.5}),
            objective=Objective(statistics_ema=decay),
            state=state,
        ).bn

    state = BatchState(class_ids)
    assert torch.equal(loss(images, state, 0.4), loss(images, BatchState(class_ids), 0.0))
    assert not torch.equal(loss(other, state, 0.4), loss(other, BatchState(class_ids), 0.4))


def test_skipped_convolutions_are_left_out_and_batch_norms_never(primary):
    images, class_ids = images_and_classes(0)
    network = network_of(primary, conv=True, patch_size=2)
    with observed_distances(network) as distances:
        primary(images)

    def term(iteration: int, probability: float) -> float:
        return inversion_loss(
            images,
            class_ids,
            networks={"a": network},
            guides=Guides({"a": 1.0}, {"a": 1.0}),
            objective=Objective(conv_skip_probability=probability, first_bn_multiplier=1.0),
            iteration=iteration,
            seed=3,
        ).bn.item()

    convs = (distances[0].item(), distances[2].item())  # the layers are conv, norm, conv, norm
    norms = (distances[1] + distances[3]).item()
    sums = [norms + sum(kept) for kept in ((), convs[:1], convs[1:], convs)]
    found = [min(range(4), key=lambda n: abs(sums[n] - term(t, 0.4))) for t in range(60)]
    assert all(term(t, 0.4) == pytest.approx(sums[found[t]], rel=1e-5) for t in range(60))
    assert set(found) == {0, 1, 2, 3}
    assert term(0, 0.0) == pytest.approx(sums[3], rel=1e-5)


def test_a_network_whose_matched_layers_are_all_skipped_adds_nothing(bn_free):
    network = network_of(bn_free, conv=True)
    images, class_ids = images_and_classes(0)
    terms = inversion_loss(
        images,
        class_ids,
        networks={"free": network},
        guides=Guides({"free": 1.0}, {"free": 1.0}),
        objective=Objective(conv_skip_probability=1 - 1e-12),
    )
    assert terms.bn.item() == 0
    assert torch.equal(terms.ce, F.cross_entropy(bn_free(images), class_ids))


def test_a_network_without_batch_norm_can_be_matched_by_its_convolutions(bn_free):
    terms = guided({"free": network_of(bn_free, conv=True, patch_size=4)}, {"free": 1.0}, {"free": 1.0})
    assert terms.bn.item() > 0


def test_finite_differences_match_autograd_of_every_term():
    images, class_ids = images_and_classes(0, num_images=6, size=4)
    class_ids = class_ids // 2  # two images of each class
    primary, auxiliary = prepared(ConvBnNet(), 1).double(), prepared(ResidualNet(), 2).double()
    networks = {"a": network_of(primary, conv=True, patch_size=3), "b": network_of(auxiliary, conv=True, patch_size=2)}

    def total(x: Tensor) -> Tensor:
        return inversion_loss(
            x,
            class_ids,
            networks=networks,
            guides=Guides({"a": 0.4, "b": 0.6}, {"a": 1.0, "b": 0.3}),
            objective=Objective(bn_weight=0.1, class_share=0.3, tv_weight=0.1, l2_weight=0.1),
        ).total

    assert torch.autograd.gradcheck(total, images.double().requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-5)


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


def test_num_bn_layers_counts_2d_batch_norms_only(primary, bn_free):
    assert num_bn_layers(primary) == 2
    assert num_bn_layers(bn_free) == 0
    assert num_bn_layers(nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3))) == 0


# --- refusals ---


def test_statistics_are_refused_where_no_network_has_any(bn_free):
    images, class_ids = images_and_classes(0)
    with pytest.raises(ValueError, match=r"BnFreeNet.*no batch norm"):
        loss_of(images, class_ids, bn_free, [bn_free])


def test_unknown_guides_are_refused_with_the_known_names(primary):
    images, class_ids = images_and_classes(0)
    for guides in (Guides({"other": 1}, {}), Guides({"primary": 1}, {"other": 1})):
        with pytest.raises(ValueError, match="'other' is unknown; known: primary"):
            inversion_loss(
                images, class_ids, networks={"primary": network_of(primary)}, guides=guides, objective=Objective()
            )


def test_an_error_in_a_teacher_leaves_no_hooks(primary, auxiliary):
    with pytest.raises(RuntimeError):
        loss_of(torch.zeros(1, 2, 8, 8), torch.tensor([0]), primary, [primary, auxiliary])
    assert num_hooks(primary) == num_hooks(auxiliary) == 0


def test_half_precision_passes_keep_the_loss_to_a_percent_and_single_precision_outside() -> None:
    images, class_ids = images_and_classes(0)
    networks = {"a": network_of(prepared(ResidualNet(), 1)), "b": network_of(prepared(ConvBnNet(), 2))}
    guides = Guides({"a": 1.0}, {"a": 0.5, "b": 0.5})

    def terms(**options) -> LossTerms:
        return inversion_loss(images, class_ids, networks=networks, guides=guides, objective=Objective(**options))

    single, half = terms(), terms(bfloat16=True)
    assert all(term.dtype == torch.float32 for term in half)
    assert half.bn != single.bn
    torch.testing.assert_close(half.total, single.total, rtol=1e-2, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert terms() == single


def test_half_precision_gives_gradients_in_single_precision_that_point_the_same_way() -> None:
    images, class_ids = images_and_classes(0)
    networks = {"a": network_of(prepared(ResidualNet(), 1))}
    gradients = []
    for bfloat16 in (False, True):
        x = images.clone().requires_grad_()
        objective = Objective(bfloat16=bfloat16)
        loss = inversion_loss(
            x, class_ids, networks=networks, guides=Guides({"a": 1.0}, {"a": 1.0}), objective=objective
        )
        gradients.append(torch.autograd.grad(loss.total, x)[0])
    assert gradients[1].dtype == torch.float32
    assert F.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.99
