"""Operations of sampling, against counts of Stable Diffusion 1.5's networks that are known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipelines import save_twin

from prism_ray import cli
from prism_ray.config import MethodConfig
from prism_ray.errors import InputError
from prism_ray.models.sampling_flops import PipelineCost, pipeline_cost, sampling_flops
from prism_ray.options import Decoder, Rule

SD15: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "tiny_decoder": {"_class_name": "AutoencoderTiny"},
}
RESNET_50 = 0.0082e12


def configs(folder: Path, parts: dict[str, dict[str, Any]], pipeline: str) -> Path:
    """A pipeline folder without any weights."""
    for name, config in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> PipelineCost:
    return pipeline_cost(
        configs(tmp_path_factory.mktemp("sd15") / "g", SD15, "StableDiffusionPipeline"), image_size=None
    )


def method(name: str, *overrides: str) -> MethodConfig:
    return cli.compose(["recipe=digits_dfkd_smoke", f"method={name}", *overrides]).method


def test_passes_of_stable_diffusion_are_counted_without_its_weights(sd15: PipelineCost) -> None:
    passes = (sd15.network, sd15.decoder, sd15.tiny)
    assert [round(p.forward / 1e12, 3) for p in passes] == [0.803, 2.515, 0.141]
    assert [round(p.backward / 1e12, 3) for p in passes] == [0.923, 2.549, 0.141]


COSTS = [
    (["method.sampling.steps=50"], "unguided", 82.8),
    (["method.sampling.steps=50", "method.guidance.start=0.0", "method.guidance.end=1.0"], "eda_faithful", 429),
    (["method.sampling.steps=50", "method.guidance.start=0.3", "method.guidance.end=0.7"], "eda", 88.8),
    (["method.sampling.steps=20", "method.sampling.oversample=4.0"], "unguided", 139),
]


@pytest.mark.parametrize(("overrides", "preset", "tflop"), COSTS, ids=[" ".join(o) for o, _, _ in COSTS])
def test_an_image_costs_what_the_arithmetic_says(
    sd15: PipelineCost, overrides: list[str], preset: str, tflop: float
) -> None:
    settings = method(preset, *overrides, "method.sampling.cfg_scale=2.0", "method.guidance.every=1")
    assert sampling_flops(settings, sd15, RESNET_50) / 1e12 == pytest.approx(tflop, rel=0.01)


def test_the_recommended_preset_takes_a_tenth_of_the_faithful_ones_operations(sd15: PipelineCost) -> None:
    eda, faithful = (sampling_flops(preset(name), sd15, RESNET_50) for name in ("eda", "eda_faithful"))
    assert eda <= 0.1 * faithful


def preset(name: str) -> MethodConfig:
    """As the preset is, without the smoke recipe's few steps."""
    return cli.compose(["recipe=fashion_mnist_dfkd", f"method={name}"]).method


def test_aborted_candidates_cost_the_steps_they_took(sd15: PipelineCost) -> None:
    whole = method("unguided", "method.sampling.steps=20", "method.sampling.oversample=2.0")
    aborted = replace(whole, sampling=replace(whole.sampling, abort_at=0.5))
    saved = sampling_flops(whole, sd15, 0.0) - sampling_flops(aborted, sd15, 0.0)
    assert saved == pytest.approx(0.5 * 20 * sd15.network.forward - sd15.decoder.forward, rel=0.02)


def test_a_gradient_through_the_network_is_counted(sd15: PipelineCost) -> None:
    clean = method("eda", "method.sampling={steps: 10, cfg_scale: 2.0}", "method.guidance={start: 0.0, every: 1}")
    through = replace(clean, guidance=replace(clean.guidance, rule=Rule.noise))
    difference = sampling_flops(through, sd15, 0.0) - sampling_flops(clean, sd15, 0.0)
    assert difference == pytest.approx(10 * 2 * sd15.network.backward)
    full = replace(clean, guidance=replace(clean.guidance, decoder=Decoder.full))
    assert sampling_flops(full, sd15, 0.0) > sampling_flops(clean, sd15, 0.0)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "dit"])
def test_every_kind_of_pipeline_is_counted(kind: str, tmp_path: Path) -> None:
    cost = pipeline_cost(save_twin(kind, tmp_path / kind), image_size=None)
    assert 0 < cost.network.forward < cost.network.both
    assert 0 < cost.tiny.forward < cost.decoder.forward


def test_a_folder_without_configs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a diffusers pipeline"):
        pipeline_cost(tmp_path, image_size=None)
