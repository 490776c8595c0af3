"""A complete text-to-image pipeline small enough for two CPU cores, with the classes and the files of Stable Diffusion.

KL autoencoder and tiny decoder, CLIP text encoder with a tokenizer made from the captions, conditional U-Net, v
prediction. Shapes: images (B, C, H, W) in [-1, 1] inside the autoencoder, latents (B, 4, h, w).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prism_ray.config import WorldConfig

LATENT_CHANNELS = 4
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer(texts: Iterable[str], *, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the texts is one token; any other text is spelled in bytes.

    The same texts give the same tokenizer, which the trainer of `tokenizers` does not promise.
    """
    plain: Any = CLIPTokenizer().backend_tokenizer  # its normalizer and splitting into words
    split, normalize = plain.pre_tokenizer.pre_tokenize_str, plain.normalizer.normalize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(words)
    symbols = [START, END, *alphabet, *(f"{letter}{WORD_END}" for letter in alphabet), *map("".join, merges)]
    vocabulary = {symbol: n for n, symbol in enumerate(dict.fromkeys(symbols))}
    typed: Any = merges
    return CLIPTokenizer(vocab=vocabulary, merges=typed, model_max_length=max_length)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of neighbours to join, in order, until every word is one symbol: the most frequent, then by the alphabet.

    Source: byte-pair encoding, Sennrich et al. 2016 (arXiv:1508.07909), algorithm 1; each word counts once.
    """
    spelled = [[*word[:-1], f"{word[-1]}{WORD_END}"] for word in sorted(words)]
    merges = []
    while pairs := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_joined(symbols, best) for symbols in spelled]
    return merges


def _joined(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for symbol in symbols:
        # A symbol just joined is no half of the next pair.
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def build_world(world: WorldConfig, tokenizer: Any, *, image_size: int, channels: int, seed: int) -> tuple[Any, Any]:
    """An untrained `StableDiffusionPipeline` and its tiny decoder; the weights depend on `seed` alone.

    Args:
        world: sizes of the parts.
        tokenizer: of `build_tokenizer`.
        image_size: side of the images, pixels; a multiple of the factor to the latents.
        channels: of the images, 1 gray, 3 RGB.
    """
    levels, depth = len(world.vae_channels), len(world.unet_channels)
    both = {"in_channels": channels, "out_channels": channels, "latent_channels": LATENT_CHANNELS}
    vae: dict[str, Any] = {
        **both,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(world.vae_channels),
        "norm_num_groups": 8,
        "sample_size": image_size,
        "mid_block_add_attention": False,
    }
    tiny: dict[str, Any] = {
        **both,
        "encoder_block_out_channels": (world.tiny_channels,) * levels,
        "decoder_block_out_channels": (world.tiny_channels,) * levels,
        "num_encoder_blocks": (1,) * levels,
        "num_decoder_blocks": (1,) * levels,
    }
    unet: dict[str, Any] = {
        "sample_size": image_size // 2 ** (levels - 1),
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": tuple(world.unet_channels),
        "down_block_types": ("CrossAttnDownBlock2D",) * depth,
        "up_block_types": ("CrossAttnUpBlock2D",) * depth,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": world.text_width,
        "attention_head_dim": 4,
    }
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": world.text_width,
        "intermediate_size": 2 * world.text_width,
        "projection_dim": world.text_width,
        "num_hidden_layers": world.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": world.text_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    scheduler: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
            "unet": UNet2DConditionModel(**unet),
            "tokenizer": tokenizer,
            "scheduler": DDIMScheduler(**scheduler),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        decoder = AutoencoderTiny(**tiny)
    return StableDiffusionPipeline(**parts), decoder
