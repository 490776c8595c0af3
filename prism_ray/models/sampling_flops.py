"""What sampling costs, counted on shapes alone from a pipeline folder's configs, without its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prism_ray.config import MethodConfig, WorldConfig
from prism_ray.documents import parse_json
from prism_ray.errors import InputError, shortened
from prism_ray.generator_files import TINY_DECODER
from prism_ray.methods.diffusion.guidance import guided_steps
from prism_ray.options import Decoder, Rule

CLIP_TOKENS, T5_TOKENS = 77, 256


@dataclass(frozen=True)
class Pass:
    """Operations of one sample's forward pass, and of the gradient to its input."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class PipelineCost:
    """Passes of a pipeline's networks; `tiny` is that of the full decoder where there is no tiny one."""

    network: Pass
    decoder: Pass
    tiny: Pass


def sampling_flops(method: MethodConfig, pipeline: PipelineCost, teachers: float) -> float:
    """Floating-point operations of one stored image under a method's sampling and guidance; a multiply-add is two.

    Guidance is counted at every guided step, also where a margin would make it needless. Text encoders are left out:
    each prompt is encoded once.

    Args:
        teachers: forward pass of all that steer or select, operations per image; their gradient costs as much again.
    """
    sampling, guidance = method.sampling, method.guidance
    steps = range(sampling.steps)
    has_cfg = sampling.cfg_scale > 1
    with_cfg = guided_steps(sampling.steps, sampling.cfg_start, sampling.cfg_end) if has_cfg else range(0)
    is_guided = guidance.scale != 0
    guided = guided_steps(sampling.steps, guidance.start, guidance.end, guidance.every) if is_guided else range(0)
    travelled = guided_steps(sampling.steps, guidance.travel_start, guidance.travel_end) if is_guided else range(0)
    seen = pipeline.decoder if guidance.decoder is Decoder.full else pipeline.tiny
    through = guidance.rule is not Rule.clean
    total = 0.0
    for step in steps:
        branches = 2 if step in with_cfg else 1
        cost = branches * (pipeline.network.both if through and step in guided else pipeline.network.forward)
        if step in guided:
            cost += seen.both + 2 * teachers
        total += cost * (guidance.travel if step in travelled else 1)
    finished = sampling.oversample * (pipeline.decoder.forward + teachers)
    if sampling.abort_at is None:
        return sampling.oversample * total + finished
    share = max(1, round(sampling.abort_at * sampling.steps)) / sampling.steps
    # All candidates are looked at half-way, those that stay once more at the end.
    return total * (sampling.oversample * share + 1 - share) + finished + pipeline.decoder.forward + teachers


def pipeline_cost(folder: Path, *, image_size: int | None) -> PipelineCost:
    """Passes of a pipeline's networks at a size, from `model_index.json` and the parts' `config.json`.

    Raises:
        InputError: a config is missing or unknown to diffusers.
    """
    kind = _read(folder / "model_index.json").get("_class_name")
    if kind not in _INPUTS:
        raise InputError(f"generator {folder}: is a {kind}; operations are counted of {', '.join(_INPUTS)}")
    part, inputs_of = _INPUTS[kind]
    network, vae = _built(folder / part), _built(folder / "vae")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = network.config.sample_size if image_size is None else image_size // factor
    tiny = _built(folder / TINY_DECODER) if (folder / TINY_DECODER / "config.json").is_file() else None
    return _cost(network, inputs_of(network), vae, tiny, side)


def world_cost(world: WorldConfig, *, image_size: int, channels: int) -> PipelineCost:
    """The same of a small world before it is trained."""
    from prism_ray.models.small_world import build_tokenizer, build_world

    pipe, tiny = build_world(
        world,
        build_tokenizer(["a"], max_length=world.text_length),
        image_size=image_size,
        channels=channels,
        seed=0,
    )
    side = image_size // 2 ** (len(world.vae_channels) - 1)
    text = torch.zeros(1, world.text_length, world.text_width, device="meta")
    return _cost(pipe.unet, lambda x: pipe.unet(x, _time(), encoder_hidden_states=text), pipe.vae, tiny, side)


def _cost(network: Any, call: Callable[[Tensor], Any], vae: Any, tiny: Any, side: int) -> PipelineCost:
    for part in (network, vae, *([tiny] if tiny is not None else [])):
        part.to("meta").eval().requires_grad_(False)
    latents = (1, vae.config.latent_channels, side, side)
    decoder = _counted(lambda z: vae.decode(z), latents)
    return PipelineCost(
        _counted(call, latents), decoder, decoder if tiny is None else _counted(lambda z: tiny.decode(z), latents)
    )


def _counted(call: Callable[[Tensor], Any], shape: tuple[int, ...]) -> Pass:
    """One sample forward, then back to its input."""
    x = torch.zeros(shape, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = call(x).sample
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    return Pass(forward, counter.get_total_flops())


def _built(folder: Path) -> Any:
    config = _read(folder / "config.json")
    try:
        kind: Any = getattr(diffusers, str(config.get("_class_name")))
        with torch.device("meta"):
            network: nn.Module = kind.from_config(config)
    except Exception as error:  # each class checks its config in its own way
        raise InputError(
            f"{folder}: its config builds no network ({shortened(error)}); copy the folder again"
        ) from error
    return network


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return dict(parse_json(path.read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: can't be read; expected a diffusers pipeline folder; check generator.source"
        ) from error


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


def _time() -> Tensor:
    return torch.ones(1, device="meta")


def _stable_diffusion(network: Any) -> Callable[[Tensor], Any]:
    text = _zeros(1, CLIP_TOKENS, network.config.cross_attention_dim)
    return lambda x: network(x, _time(), encoder_hidden_states=text)


def _stable_diffusion_xl(network: Any) -> Callable[[Tensor], Any]:
    config = network.config
    text = _zeros(1, CLIP_TOKENS, config.cross_attention_dim)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": _zeros(1, pooled), "time_ids": _zeros(1, 6)}
    return lambda x: network(x, _time(), encoder_hidden_states=text, added_cond_kwargs=added)


def _stable_diffusion_3(network: Any) -> Callable[[Tensor], Any]:
    config = network.config
    text = _zeros(1, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim)
    pooled = _zeros(1, config.pooled_projection_dim)
    return lambda x: network(x, timestep=_time(), encoder_hidden_states=text, pooled_projections=pooled)


def _dit(network: Any) -> Callable[[Tensor], Any]:
    ids = torch.zeros(1, dtype=torch.int64, device="meta")
    return lambda x: network(x, timestep=_time(), class_labels=ids)


_INPUTS: dict[str, tuple[str, Callable[[Any], Callable[[Tensor], Any]]]] = {
    "StableDiffusionPipeline": ("unet", _stable_diffusion),
    "StableDiffusionXLPipeline": ("unet", _stable_diffusion_xl),
    "StableDiffusion3Pipeline": ("transformer", _stable_diffusion_3),
    "DiTPipeline": ("transformer", _dit),
}
"""By the pipeline's class: folder of its denoising network, and how that is called on a sample."""
