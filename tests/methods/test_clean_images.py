"""Clean images and their displacements, for every parameterization, against the definitions."""

import math

import pytest
import torch
from torch import Tensor

from prism_ray.methods.diffusion.clean_images import FORMS, Level

VP = [(math.sqrt(0.9), math.sqrt(0.1)), (0.6, 0.8), (0.01, math.sqrt(1 - 1e-4))]
LEVELS = [
    *[Level(kind, *level) for kind in ("epsilon", "v_prediction", "sample") for level in VP],
    *[Level(kind, 1.0, sigma) for kind in ("epsilon", "v_prediction", "sample") for sigma in (0.1, 3.0, 14.6)],
    *[Level("flow_prediction", 1 - sigma, sigma) for sigma in (0.05, 0.5, 0.98)],
]


def draw(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_of(level: Level, clean: Tensor, noise: Tensor) -> Tensor:
    """What a perfect network would say, by definition."""
    length = math.hypot(level.signal, level.noise)
    return {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": (level.signal * noise - level.noise * clean) / length,
        "flow_prediction": noise - clean,
    }[level.prediction]


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_a_perfect_network_gives_the_clean_image(level: Level) -> None:
    clean, noise = draw(0), draw(1)
    x = level.signal * clean + level.noise * noise
    torch.testing.assert_close(level.clean(x, output_of(level, clean, noise)), clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_both_forms_move_the_clean_image_by_the_displacement(level: Level, form: str) -> None:
    x, output, shift = draw(0), draw(1), draw(2)
    moved = level.clean(*FORMS[form](level, x, output, shift))
    torch.testing.assert_close(moved, level.clean(x, output) + shift, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_keeping_the_noise_keeps_it(level: Level) -> None:
    x, output, shift = draw(0), draw(1), draw(2)
    before = x - level.signal * level.clean(x, output)
    x, output = level.keep_noise(x, output, shift)
    torch.testing.assert_close(x - level.signal * level.clean(x, output), before, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_rederiving_the_noise_keeps_the_sample(level: Level) -> None:
    x = draw(0)
    assert level.rederive_noise(x, draw(1), draw(2))[0] is x


@pytest.mark.parametrize(
    ("level", "form", "moved_x", "moved_output"),
    [
        (Level("epsilon", 0.6, 0.8), "rederive_noise", 0.0, -0.6 / 0.8),
        (Level("epsilon", 0.6, 0.8), "keep_noise", 0.6, 0.0),
        (Level("v_prediction", 0.6, 0.8), "rederive_noise", 0.0, -1 / 0.8),
        (Level("v_prediction", 0.6, 0.8), "keep_noise", 0.6, -0.8),
        (Level("sample", 0.6, 0.8), "rederive_noise", 0.0, 1.0),
        (Level("sample", 0.6, 0.8), "keep_noise", 0.6, 1.0),
        (Level("epsilon", 1.0, 3.0), "rederive_noise", 0.0, -1 / 3.0),
        (Level("epsilon", 1.0, 3.0), "keep_noise", 1.0, 0.0),
        (Level("v_prediction", 1.0, 3.0), "rederive_noise", 0.0, -math.sqrt(10.0) / 3.0),
        (Level("flow_prediction", 0.3, 0.7), "rederive_noise", 0.0, -1 / 0.7),
        (Level("flow_prediction", 0.3, 0.7), "keep_noise", 0.3, -1.0),
    ],
)
def test_forms_have_the_coefficients_of_the_table(level: Level, form: str, moved_x: float, moved_output: float) -> None:
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x, output = FORMS[form](level, zero, zero, one)
    assert x.item() == pytest.approx(moved_x, abs=1e-12)
    assert output.item() == pytest.approx(moved_output, abs=1e-12)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        Level("score", 0.6, 0.8)
