"""Generators: diffusers pipelines with one contract. Conditions in, images out; the sampling loop is ours.

Stable Diffusion 1.5/2.1, SDXL, SD3 (flow matching) and DiT (class-conditional) differ in how a condition is encoded and
how their network takes it; the rest is shared. Shapes: B samples, latents (B, c, h, w), images (B, C, H, W) in [0, 1].
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from prism_ray.errors import InputError, shortened
from prism_ray.generator_files import TINY_DECODER, check_generator
from prism_ray.methods.diffusion.energies import in_single
from prism_ray.methods.diffusion.sampling import Denoise
from prism_ray.models.attention import set_attention
from prism_ray.models.samplers import sampler_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Condition = Mapping[str, Tensor]
"""What the network is told of one sample, by argument: tensors without a batch dimension."""


@dataclass(frozen=True)
class Placement:
    """Where and how a generator computes.

    Attributes:
        device: of the networks.
        dtype: of the networks; a VAE that overflows in half precision decodes in single.
        attention: see `models.attention`.
        channels_last: memory format of convolutions.
        compiled: torch.compile the network's repeated blocks.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    channels_last: bool = False
    compiled: bool = False


class Generator(ABC):
    """A diffusers pipeline as generator.

    Attributes:
        takes_text: whether conditions are prompts; class ids otherwise.
        latent_shape: (c, h, w) of one sample.
        scheduler_config: how the model was trained, see `models.samplers`.
        sampler: name of the sampler that it comes with, None if that is none of ours.
    """

    takes_text: ClassVar[bool] = True
    condition_first: ClassVar[bool] = False  # in a batch with and without condition

    def __init__(self, pipe: Any, *, image_size: int | None, tiny_decoder: Any | None, placement: Placement) -> None:
        self._pipe, self._tiny, self._device = pipe, tiny_decoder, placement.device
        self.scheduler_config = dict(pipe.scheduler.config)
        self.scheduler_config["_class_name"] = type(pipe.scheduler).__name__
        self.sampler = sampler_of(pipe.scheduler)
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        native = self.network.config.sample_size * factor
        self.image_size = native if image_size is None else image_size
        if self.image_size % factor:
            raise InputError(
                f"generator.image_size={image_size}: is no multiple of {factor}, the factor between this model's "
                f"images and latents; its own size is {native}"
            )
        side = self.image_size // factor
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)
        self._encoded: dict[str, tuple[Condition, Condition]] = {}
        for part in (*_modules(pipe), *([tiny_decoder] if tiny_decoder is not None else [])):
            part.to(placement.device).eval().requires_grad_(False)
        if placement.channels_last:
            self.network.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        set_attention(self.network, placement.attention, placement.device)
        if placement.compiled:
            self.network.compile_repeated_blocks(fullgraph=True)

    @property
    def network(self) -> Any:
        """The denoising network."""
        return self._pipe.unet

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and networks."""
        return self.network.dtype

    @property
    def has_tiny_decoder(self) -> bool:
        return self._tiny is not None

    @property
    def shift(self) -> float | None:
        """Shift of the time steps at this size, for models with dynamic shifting."""
        return None

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str]) -> tuple[list[Condition], list[Condition]]:
        """Each prompt's condition, and what stands for none. A prompt is encoded once, alone, and remembered."""
        for prompt in prompts:
            if prompt not in self._encoded:
                self._encoded[prompt] = self._encode(prompt)
        return [self._encoded[prompt][0] for prompt in prompts], [self._encoded[prompt][1] for prompt in prompts]

    def denoiser(
        self, conditions: tuple[Sequence[Condition], Sequence[Condition]], timesteps: Sequence[Tensor]
    ) -> Denoise:
        """The network of a batch, for `methods.diffusion.sampling`."""
        positive, negative = map(_stacked, conditions)
        pair = (positive, negative) if self.condition_first else (negative, positive)
        doubled = {key: torch.cat([part[key] for part in pair]) for key in positive}

        def denoise(step: int, x: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
            t = timesteps[step]
            if not both:
                return self._predict(x, t, positive), None
            first, second = self._predict(torch.cat([x, x]), t, doubled).chunk(2)
            return (first, second) if self.condition_first else (second, first)

        return denoise

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1], by the full decoder."""
        return _unit(self._decode(latents)).clamp(0, 1).float()

    def decode_for_guidance(self, latents: Tensor, *, full: bool = False) -> Tensor:
        """Images, differentiable; a little beyond [0, 1] where saturated, since clamping would end the gradient there.

        By the tiny decoder, if there is one and `full` is not asked for.
        """
        if self._tiny is None or full:
            return in_single(_unit(self._decode(latents)))
        scaled = latents / self._tiny.config.scaling_factor
        return in_single(_unit(self._tiny.decode(scaled, return_dict=False)[0]))

    def _decode(self, latents: Tensor) -> Tensor:
        """Decoded latents, in about [-1, 1]."""
        vae = self._pipe.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]

    @abstractmethod
    def _encode(self, prompt: str) -> tuple[Condition, Condition]:
        """The condition of a prompt, and what stands for none."""

    @abstractmethod
    def _predict(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The network's output for a batch, of the shape of x."""


class StableDiffusion(Generator):
    """Stable Diffusion 1.5 and 2.1, and whatever else is a StableDiffusionPipeline."""

    def _encode(self, prompt: str) -> tuple[Condition, Condition]:
        positive, negative = self._pipe.encode_prompt(prompt, self._device, 1, True)
        return {"encoder_hidden_states": positive[0]}, {"encoder_hidden_states": negative[0]}

    def _predict(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.network(x, timestep, **condition, return_dict=False)[0]


class StableDiffusionXL(Generator):
    """SDXL: two text encoders, pooled text and size as further conditions."""

    def _encode(self, prompt: str) -> tuple[Condition, Condition]:
        pipe = self._pipe
        text, no_text, pooled, no_pooled = pipe.encode_prompt(
            prompt, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        second = pipe.text_encoder_2
        dimension = pooled.shape[-1] if second is None else second.config.projection_dim
        size = (self.image_size, self.image_size)
        time_ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=text.dtype, text_encoder_projection_dim=dimension)
        time_ids = time_ids[0].to(self._device)
        return (
            {"encoder_hidden_states": text[0], "text_embeds": pooled[0], "time_ids": time_ids},
            {"encoder_hidden_states": no_text[0], "text_embeds": no_pooled[0], "time_ids": time_ids},
        )

    def _predict(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        added = {key: condition[key] for key in ("text_embeds", "time_ids")}
        text = condition["encoder_hidden_states"]
        return self.network(x, timestep, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._pipe.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # it overflows in half precision; once up, it stays so
        latents = latents.to(vae.dtype)
        mean, std = (getattr(vae.config, key, None) for key in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            as_map = {"device": latents.device, "dtype": latents.dtype}
            mean, std = (torch.tensor(values, **as_map).view(1, -1, 1, 1) for values in (mean, std))
            latents = latents * std / vae.config.scaling_factor + mean
        else:
            latents = latents / vae.config.scaling_factor
        return vae.decode(latents, return_dict=False)[0]


class StableDiffusion3(Generator):
    """SD3 and 3.5: a transformer trained by flow matching."""

    @property
    def network(self) -> Any:
        return self._pipe.transformer

    @property
    def shift(self) -> float | None:
        config = self.scheduler_config
        if not config.get("use_dynamic_shifting"):
            return None
        tokens = (self.latent_shape[1] // self.network.config.patch_size) ** 2
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
        return low + (high - low) * (tokens - least) / (most - least)  # a line through the two sizes of training

    def _encode(self, prompt: str) -> tuple[Condition, Condition]:
        length = min(256, self._pipe.tokenizer_max_length) if self._pipe.text_encoder_3 is None else 256
        text, no_text, pooled, no_pooled = self._pipe.encode_prompt(
            prompt, None, None, device=self._device, max_sequence_length=length
        )
        return (
            {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]},
            {"encoder_hidden_states": no_text[0], "pooled_projections": no_pooled[0]},
        )

    def _predict(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.network(hidden_states=x, timestep=timestep.expand(len(x)), **condition, return_dict=False)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._pipe.vae
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]


class DiT(Generator):
    """DiT: conditions are class ids, of which one more than there are classes stands for none.

    Deviations from diffusers' pipeline, which is written for 1000 classes and hands its scheduler no generator: any
    number of classes, and samplers that add noise repeat.
    """

    takes_text = False
    condition_first = True

    @property
    def network(self) -> Any:
        return self._pipe.transformer

    @property
    def num_classes(self) -> int:
        return self.network.config.num_embeds_ada_norm

    def _encode(self, prompt: str) -> tuple[Condition, Condition]:
        class_id = int(prompt)
        if not 0 <= class_id < self.num_classes:
            raise InputError(f"generator: class {class_id}; expected 0 to {self.num_classes - 1}, the model's classes")
        ids = torch.tensor([class_id, self.num_classes], device=self._device)
        return {"class_labels": ids[0]}, {"class_labels": ids[1]}

    def _predict(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        output = self.network(x, timestep=timestep.expand(len(x)), **condition, return_dict=False)[0]
        return output[:, : self.latent_shape[0]]  # without the learned variance, if there is one

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._pipe.vae
        return vae.decode(1 / vae.config.scaling_factor * latents, return_dict=False)[0]


KINDS: dict[str, type[Generator]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "DiTPipeline": DiT,
}
"""By the class that a folder's model_index.json names."""


def load_generator(
    folder: Path, *, placement: Placement, image_size: int | None = None, tiny_decoder: Path | None = None
) -> Generator:
    """A generator from a pipeline folder; no file outside of it is read and no socket opened.

    Args:
        folder: a diffusers pipeline with safetensors weights.
        placement: where and how it computes.
        image_size: side of its images, pixels; None: what it was trained for.
        tiny_decoder: folder of an AutoencoderTiny for the same latents; None: `tiny_decoder/` in the folder, if any.

    Raises:
        InputError: see `generator_files.check_generator`; a size that the model can't make; an attention back end that
            doesn't work here.
    """
    check_generator(folder, tiny_decoder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = KINDS[index["_class_name"]]
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and None in entry}
    if kind is StableDiffusion:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    offline = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    inside = folder / TINY_DECODER
    tiny = None
    with _quiet():
        try:
            pipe = DiffusionPipeline.from_pretrained(str(folder), dtype=placement.dtype, **offline, **absent)
            if tiny_decoder is not None or inside.is_dir():
                tiny = AutoencoderTiny.from_pretrained(str(tiny_decoder or inside), dtype=placement.dtype, **offline)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise InputError(
                f"generator {folder}: can't be loaded ({shortened(error)}); save or copy it again"
            ) from error
    return kind(pipe, image_size=image_size, tiny_decoder=tiny, placement=placement)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' notices and progress bars out of ours."""
    levels = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(levels[0])
        transformers.utils.logging.set_verbosity(levels[1])


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _stacked(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    return {key: torch.stack([condition[key] for condition in conditions]) for key in conditions[0]}


def _unit(decoded: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], as diffusers' image processor does."""
    return decoded * 0.5 + 0.5
