import pytest
import torch
from torch import nn

from prism_ray.models.flops import Architecture, architecture_memory
from prism_ray.models.memory import kept_bytes, shortage, step_bytes, weight_bytes


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)


def test_what_a_block_keeps_is_what_its_gradient_needs() -> None:
    # Single precision, 8x8 pixels: the image, which the convolution keeps, batch norm's input and ReLU's output.
    image, features = 64 * 4, 4 * 64 * 4
    statistics = 2 * 4 * 4  # of batch norm, which may keep them beside its input
    found = kept_bytes(block(), image_size=8, in_chans=1)
    assert image + 2 * features <= found <= image + 2 * features + 4 * statistics
    assert weight_bytes(block()) == 4 * (4 * 9 + 4 + 4 * 4) + 8  # and the counter of batches, 8 bytes


def test_counting_on_shapes_gives_what_computing_gives() -> None:
    computed = kept_bytes(block(), image_size=8, in_chans=1)
    assert kept_bytes(block().to("meta"), image_size=8, in_chans=1) == pytest.approx(computed, rel=0.02)


def test_what_is_kept_grows_with_the_image_and_weights_do_not() -> None:
    small, large = (architecture_memory(Architecture("resnet18", {}, size, 3, 1000)) for size in (112, 224))
    assert small[0] == large[0] == pytest.approx(46.8e6, rel=0.01)  # 11.69 M parameters and the statistics
    assert large[1] == pytest.approx(4 * small[1], rel=0.02)


def test_counting_leaves_a_network_and_the_random_state_as_they_were() -> None:
    network, state = block(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kept_bytes(network, image_size=8, in_chans=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_keeps_every_weight_and_the_batch_of_those_asked() -> None:
    weights, kept = {"a": 10, "b": 100}, {"a": 1, "b": 7}
    assert step_bytes(weights, kept, ["a"], batch_size=5) == 115
    assert step_bytes(weights, kept, ["a", "b"], batch_size=5) == 150


def test_a_step_that_can_not_fit_is_one_line_with_the_way_out() -> None:
    assert shortage(10**9, 10**9, where="its node", batch_size=8) is None
    line = shortage(30 * 10**9, 16 * 10**9, where="0.5 of T4", batch_size=100)
    assert line is not None
    assert line.startswith("method.batch_size=100: a step keeps at least 30.0 GB")
    assert "0.5 of T4 has 16.0 GB" in line
    assert "\n" not in line
