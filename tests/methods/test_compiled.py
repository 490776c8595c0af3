"""The compiled pass against the observed one; compiling itself takes seconds per network, so one test does it."""

from dataclasses import replace

import pytest
import torch

from prism_ray.methods.inversion.compiled import compiled_pass
from prism_ray.methods.inversion.matching import Network
from prism_ray.methods.inversion.objective import Guides, LossTerms, Objective, inversion_loss
from prism_ray.methods.inversion.statistics import LayerTarget
from tests.methods.nets import ConvBnNet, ResidualNet, images_and_classes, network_of, num_hooks, prepared

GUIDES = Guides({"a": 1.0}, {"a": 0.5, "b": 0.5})


@pytest.fixture
def networks() -> dict[str, Network]:
    return {"a": network_of(prepared(ResidualNet(), 1)), "b": network_of(prepared(ConvBnNet(), 2))}


def with_passes(networks: dict[str, Network]) -> dict[str, Network]:
    return {name: replace(network, run=compiled_pass(network)) for name, network in networks.items()}


def loss_and_gradient(networks: dict[str, Network], **options) -> tuple[LossTerms, torch.Tensor]:
    images, class_ids = images_and_classes(0)
    x = images.clone().requires_grad_()
    terms = inversion_loss(x, class_ids, networks=networks, guides=GUIDES, objective=Objective(**options))
    return terms, torch.autograd.grad(terms.total, x)[0]


def check_equal(networks: dict[str, Network]) -> None:
    (plain, gradient), (found, found_gradient) = (loss_and_gradient(each) for each in (networks, with_passes(networks)))
    torch.testing.assert_close(torch.stack(found), torch.stack(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_a_pass_as_one_graph_gives_the_loss_and_the_gradient_of_the_observed_one(
    networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    check_equal(networks)


def test_a_pass_shares_the_weights_of_its_network_and_leaves_it_without_hooks(
    networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    run = compiled_pass(networks["a"])
    own = {tensor.data_ptr() for tensor in networks["a"].module.parameters()}
    assert {tensor.data_ptr() for tensor in run.network.parameters()} == own  # pyright: ignore  # the module itself here
    assert num_hooks(networks["a"].module) == 0


@pytest.mark.parametrize("options", [{"class_share": 0.5}, {"statistics_ema": 0.9}])
def test_what_the_graph_does_not_hold_is_refused(
    networks: dict[str, Network], options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    with pytest.raises(ValueError, match="compiled passes hold plain moments"):
        loss_and_gradient(with_passes(networks), **options)


def test_patch_moments_are_refused(networks: dict[str, Network]) -> None:
    one = torch.ones(1)
    target = LayerTarget(one, one, patch_mean=one, patch_var=one)
    with pytest.raises(ValueError, match="patch moments"):
        compiled_pass(Network(networks["b"].module, (target,)))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_compiled_graph_gives_the_same_too(networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    check_equal(networks)
