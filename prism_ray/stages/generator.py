"""Generator: a small text-to-image pipeline, trained on captioned real images, as a content-addressed artifact.

    <artifacts>/generators/world-<hash>/
        model_index.json, vae/, unet/, text_encoder/, tokenizer/, scheduler/     a StableDiffusionPipeline of diffusers
        tiny_decoder/                                                          its small decoder
        prism_ray.json                                                         what is known of it

Three trainings, one after another, each continued from its checkpoint: autoencoder, tiny decoder, and text encoder with
U-Net on the autoencoder's latents. Shapes: images (B, C, H, W) in [-1, 1], latents (B, 4, h, w).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from prism_ray.artifacts import MARKER, StoredFile, join, publish_built, split
from prism_ray.data.prepared import PreparedDataset
from prism_ray.generator_files import TINY_DECODER
from prism_ray.methods.attributes import apply_attributes, draw_values
from prism_ray.methods.distillation import batch_of_step
from prism_ray.models.small_world import build_tokenizer, build_world
from prism_ray.prompts.captions import PHRASES, caption
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, pick_device
from prism_ray.stages.training import Checkpoints, Course, fit, one_cycle_lr
from prism_ray.storage import to_json
from prism_ray.work import GeneratorItem

ENCODE_BATCH = 256


def make_generator(item: GeneratorItem) -> None:
    """Train one generator; nothing to do if its folder is there."""
    if item.is_done:
        return
    dataset, world = PreparedDataset.open(item.dataset_dir), item.world
    device, started = pick_device(item.gpus), time.perf_counter()
    with deterministic(world.threads):
        pipe, tiny = build_world(
            world,
            build_tokenizer(_all_captions(item.phrases), max_length=world.text_length),
            image_size=dataset.image_size,
            channels=dataset.channels,
            seed=seed_for(world.seed, "world"),
        )
        course = _Courses(item, dataset, device)
        facts = _train_world(pipe, tiny, course)
    facts |= {
        "dataset": dataset.content_hash,
        "phrases": list(item.phrases),
        "fingerprint": fingerprint(device),
        "seconds": time.perf_counter() - started,
    }

    def build(folder: Path) -> None:
        pipe.save_pretrained(folder, safe_serialization=True)
        tiny.save_pretrained(folder / TINY_DECODER, safe_serialization=True)
        (folder / MARKER).write_bytes(to_json(facts))

    publish_built(item.folder, build)
    for name in PARTS:
        course.checkpoint(name).remove()


PARTS = ("vae", "decoder", "unet")


@dataclass(frozen=True)
class _Batch:
    """What the network of a training is shown in a step: its first input is (B, …)."""

    inputs: tuple[Tensor, ...]
    order_hash: int = 0

    @property
    def num_images(self) -> int:
        return len(self.inputs[0])


class _Courses:
    """What the three trainings share: the data in steps, learning rates, checkpoints."""

    def __init__(self, item: GeneratorItem, dataset: PreparedDataset, device: torch.device) -> None:
        self.item, self.world, self.device = item, item.world, device
        self.pixels = torch.from_numpy(dataset.images("train"))
        self.class_ids = dataset.labels("train")
        self.values = [
            draw_values(seed_for(self.world.seed, "attributes", n), share=self.world.attribute_share)
            for n in range(len(self.pixels))
        ]
        self.seeds = [seed_for(self.world.seed, "attribute strength", n) for n in range(len(self.pixels))]

    def images(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Real images with their attributes, (B, C, H, W) in [-1, 1]; the same whenever a row is asked for."""
        pixels = self.pixels[torch.as_tensor(rows)].float() / 255
        shown = apply_attributes(pixels, [self.values[n] for n in rows], [self.seeds[n] for n in rows])
        return shown.to(self.device) * 2 - 1

    def captions(self) -> list[str]:
        """Of every training image."""
        phrases = self.item.phrases
        return [caption(phrases[c], values) for c, values in zip(self.class_ids, self.values, strict=True)]

    def rows(self, name: str, step: int) -> np.ndarray:
        order = seed_for(self.world.seed, "order", name)
        rows, _ = batch_of_step(order, step, num_images=len(self.pixels), batch_size=self.world.batch_size)
        return rows

    def run(
        self,
        name: str,
        network: nn.Module,
        inputs_of: Callable[[int], tuple[Tensor, ...]],
        *,
        steps: int,
        lr: float,
        ema_decay: float = 0.0,
    ) -> tuple[nn.Module, float]:
        """One training of a network that returns its loss: the network to keep and its mean loss in the last epoch.

        Args:
            inputs_of: step → what the network is called with.
        """
        course = Course(
            name=f"generator's {name} (lr {lr:g})",
            num_steps=steps,
            num_images=len(self.pixels),
            batch_size=self.world.batch_size,
            lr_of_step=lambda step: one_cycle_lr(lr, step=step, total=steps),
            weight_decay=0.01,
            seed=seed_for(self.world.seed, "noise", name),
            ema_decay=ema_decay,
        )
        identity = f"{split(self.item.folder)[1]} {name}"
        checkpoints = Checkpoints(
            file=self.checkpoint(name), every=self.world.checkpoint_every, identity=identity, keep_last=True
        )
        kept, record = fit(
            network,
            course,
            prepare=lambda step: _Batch(inputs_of(step)),
            loss_of=lambda forward, batch: forward(*batch.inputs),
            checkpoints=checkpoints,
        )
        return kept, record.history[-1]["loss"]

    def checkpoint(self, name: str) -> StoredFile:
        """File of an unfinished training."""
        parent, artifact = split(self.item.folder)
        return StoredFile.at(join(parent, f".{artifact}.{name}.checkpoint.safetensors"))


class _Autoencoding(nn.Module):
    """The autoencoder's loss: squared error of a sampled latent's picture, and its divergence from a normal."""

    def __init__(self, vae: nn.Module, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, images: Tensor) -> Tensor:
        vae: Any = self.vae
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / images[0].numel()
        return functional.mse_loss(decoded, images) + self.kl_weight * divergence


class _Decoding(nn.Module):
    """The tiny decoder's loss: squared error against the pictures, and against what the full decoder makes of them."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor, images: Tensor, decoded: Tensor) -> Tensor:
        made = self.decoder(latents)
        return functional.mse_loss(made, images) + functional.mse_loss(made, decoded)


class _Denoising(nn.Module):
    """The U-Net's loss: squared error of the velocity at uniform time steps; some captions are left empty."""

    _empty: Tensor

    def __init__(self, pipe: Any, empty: Tensor, drop: float) -> None:
        super().__init__()
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        self._scheduler, self._drop = pipe.scheduler, drop
        self.register_buffer("_empty", empty, persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        num, device = len(latents), latents.device
        # Drawn on the CPU, so that every device trains on the same noise.
        noise = torch.randn(latents.shape).to(device)
        levels = torch.randint(self._scheduler.config.num_train_timesteps, (num,)).to(device)
        dropped = (torch.rand(num, 1) < self._drop).to(device)
        text = self.text_encoder(torch.where(dropped, self._empty, tokens))[0]
        noisy = self._scheduler.add_noise(latents, noise, levels)
        velocity = self._scheduler.get_velocity(latents, noise, levels)
        return functional.mse_loss(self.unet(noisy, levels, text, return_dict=False)[0], velocity)


def _train_world(pipe: Any, tiny: Any, course: _Courses) -> dict[str, Any]:
    """Train all parts in place; what was found out on the way."""
    world, vae = course.world, pipe.vae
    for part in (vae, tiny, pipe.unet, pipe.text_encoder):
        part.to(course.device)

    _, vae_loss = course.run(
        "vae",
        _Autoencoding(vae, world.kl_weight),
        lambda step: (course.images(course.rows("vae", step)),),
        steps=world.vae_steps,
        lr=world.vae_lr,
    )
    vae.eval().requires_grad_(False)
    latents = _encoded(vae, course)
    scale = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    latents *= scale

    @torch.no_grad()
    def decoder_inputs(step: int) -> tuple[Tensor, ...]:
        images = course.images(course.rows("decoder", step))
        own = vae.encode(images).latent_dist.mean
        return own * scale, images, vae.decode(own).sample

    _, decoder_loss = course.run(
        "decoder", _Decoding(tiny.decoder), decoder_inputs, steps=world.decoder_steps, lr=world.vae_lr
    )
    tokens = _tokens(pipe, course.captions())

    def unet_inputs(step: int) -> tuple[Tensor, ...]:
        rows = torch.from_numpy(course.rows("unet", step))
        return latents[rows].to(course.device), tokens[rows].to(course.device)

    denoising = _Denoising(pipe, _tokens(pipe, [""]).to(course.device), world.caption_drop)
    kept, unet_loss = course.run(
        "unet", denoising, unet_inputs, steps=world.unet_steps, lr=world.lr, ema_decay=world.ema_decay
    )
    denoising.load_state_dict(kept.state_dict())
    return {"vae_loss": vae_loss, "decoder_loss": decoder_loss, "unet_loss": unet_loss, "latent_scale": scale}


@torch.no_grad()
def _encoded(vae: Any, course: _Courses) -> Tensor:
    """Mean latents of every training image, on the CPU: (N, 4, h, w)."""
    parts = []
    for start in range(0, len(course.pixels), ENCODE_BATCH):
        rows = range(start, min(start + ENCODE_BATCH, len(course.pixels)))
        parts.append(vae.encode(course.images(rows)).latent_dist.mean.cpu())
    return torch.cat(parts)


def _tokens(pipe: Any, texts: Sequence[str]) -> Tensor:
    """(N, L) as the pipeline itself makes them."""
    tokenizer: Any = pipe.tokenizer
    distinct = sorted(set(texts))
    made = tokenizer(
        distinct, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    place = {text: n for n, text in enumerate(distinct)}
    return made[[place[text] for text in texts]]


def _all_captions(phrases: Sequence[str]) -> list[str]:
    """Texts that hold every word of the world."""
    return [caption(phrase, {axis: value}) for phrase in phrases for axis in PHRASES for value in PHRASES[axis]]
