"""Synthesize: one planned batch of images, optimized, sampled or taken from the real ones, as rows of a shard."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from prism_ray import __version__
from prism_ray.artifacts import artifact_facts
from prism_ray.errors import Drained, InputError
from prism_ray.identity import content_hash, images_hash
from prism_ray.ledger import Receipt
from prism_ray.methods.attributes import apply_attributes, draw_values
from prism_ray.methods.inversion.augment import crop_areas, draw_augmentations
from prism_ray.methods.inversion.budgets import entry_iterations
from prism_ray.methods.inversion.compiled import compiled_pass
from prism_ray.methods.inversion.engine import Descent, NotFinite, invert, to_uint8
from prism_ray.methods.inversion.objective import Guides, Network, Objective
from prism_ray.methods.inversion.subsets import accuracy_weights, reduction_weights
from prism_ray.models.classifier import Classifier
from prism_ray.models.memory import kept_bytes, shortage, step_bytes, weight_bytes
from prism_ray.options import Engine, Precision, Reduction
from prism_ray.plan import (
    Unit,
    asked,
    energy_teachers,
    guided,
    guiding_pool,
    guiding_teachers,
    needs_generator,
    statistics_pool,
)
from prism_ray.schema import IMAGE_COLUMNS, image_schema
from prism_ray.seeds import seed_for
from prism_ray.stages.device import (
    busy_teacher_of,
    compile_here,
    deterministic,
    device_memory,
    fingerprint,
    peak_memory,
    pick_device,
)
from prism_ray.stages.initial import Started, open_starts
from prism_ray.stages.statistics import targets_for
from prism_ray.stages.unfinished import Unfinished
from prism_ray.work import LOSS_HISTORY, LOST, SYNTHESIZE, RunSpec, image_receipt, without_lost

LOSS_POINTS = 32
"""Iterations of a unit whose loss terms its receipt has, beside the last one."""


@dataclass(frozen=True)
class Made:
    """Images of a unit as stored, and how they came about. Loss terms are None for real images."""

    pixels: np.ndarray  # (B, C, H, W) uint8
    sources: list[str | None]  # names of the real images each one is or started from
    loss_ce: float | None = None
    loss_bn: float | None = None
    prompts: list[str | None] | None = None
    seeds: list[int] | None = None  # of each image, where it is not the planned one
    energies: list[float] | None = None
    details: dict[str, Any] = field(default_factory=dict)  # of the unit, for its receipt


class Synthesizer:
    """Makes the units of one run; holds its plan, its teachers and what its images start from."""

    def __init__(self, spec: RunSpec) -> None:
        self.config, self._ledger = spec.config, spec.ledger()
        self._unfinished: Unfinished | None = None
        self.device = pick_device(spec.config.compute.gpus_per_actor)
        self.dataset = spec.dataset()
        self._teachers = {name: busy_teacher_of(spec, name, self.device) for name in guiding_pool(spec.config)}
        matched = statistics_pool(spec.config)
        self._networks = {
            name: Network(teacher, targets_for(spec, name, teacher, self.device) if name in matched else ())
            for name, teacher in self._teachers.items()
        }
        if self.config.method.compile:
            compile_here()
            self._networks = {
                name: replace(network, run=compiled_pass(network)) if network.targets else network
                for name, network in self._networks.items()
            }
        self._facts = {name: artifact_facts(spec.teacher_dirs[name]) for name in self._teachers}
        self._sampling = _Sampling(spec, self._teachers, self.device) if needs_generator(spec.config) else None
        self._start_of = None if self._sampling else open_starts(spec)
        self._is_memory_checked = False

    def compute(self, unit: Unit) -> tuple[pa.Table, Receipt]:
        """The unit's shard and its receipt, lacking what only publishing knows.

        Raises:
            Drained: the node is to leave; what was done of the unit is kept, and the next attempt goes on from it.
        """
        identity = content_hash([__version__, fingerprint(self.device), images_hash(self.config), unit.unit_id])
        every_s = self.config.compute.unit_checkpoint_s
        unfinished = Unfinished(self._ledger, SYNTHESIZE, unit.name, identity=identity, every_s=every_s)
        self._unfinished = unfinished
        try:
            with deterministic(self.config.compute.threads):
                made = self._make(unit, unfinished)
                table = self._table(without_lost(unit, made.details), made)
        except Drained:
            raise
        except Exception:
            unfinished.forget()  # it may be what is wrong
            raise
        receipt = replace(
            image_receipt(unit),
            seconds=unfinished.seconds,
            fingerprint=fingerprint(self.device),
            worker=peak_memory(self.device),
            details={
                "loss_ce": made.loss_ce,
                "loss_bn": made.loss_bn,
                "iterations": unit.iterations,
                "cpu_s": unfinished.cpu_s,
                **made.details,
            },
        )
        return table, receipt

    def forget(self) -> None:
        """Remove what was kept on the way of the last unit, which is published."""
        if self._unfinished is not None:
            self._unfinished.forget()

    def _make(self, unit: Unit, unfinished: Unfinished) -> Made:
        if self._sampling is not None:
            return self._sampling.make(unit, unfinished)
        assert self._start_of is not None
        started = self._start_of(unit)
        if self.config.method.engine is Engine.inversion:
            return self._invert(unit, started, unfinished)
        return Made(to_uint8(self._with_attributes(unit, started.pixels)).numpy(), started.sources)

    def _with_attributes(self, unit: Unit, pixels: Tensor) -> Tensor:
        share = self.config.method.attribute_share
        if not share:
            return pixels
        values = [draw_values(seed_for(image.seed, "attributes"), share=share) for image in unit.images]
        return apply_attributes(pixels, values, [seed_for(image.seed, "attribute strength") for image in unit.images])

    def _check_memory(self, unit: Unit) -> None:
        """Refuse a batch of which one step can't fit this worker's device; looked at once, as units are alike.

        Raises:
            InputError: before anything is computed; out of memory in the middle would cost every attempt.
        """
        self._is_memory_checked = True
        sizes = {"image_size": self.dataset.image_size, "in_chans": self.dataset.channels}
        weights = {name: weight_bytes(teacher) for name, teacher in self._teachers.items()}
        steps = {frozenset(asked(self.config, guiding)) for _, guiding in guided(self.config, unit)}
        kept = {name: kept_bytes(self._teachers[name], **sizes) for name in set().union(*steps)}
        batch_size = len(unit.images)
        needed = max((step_bytes(weights, kept, sorted(names), batch_size=batch_size) for names in steps), default=0)
        present, where = device_memory(self.device, self.config.compute.gpus_per_actor)
        short = shortage(needed, present, where=where, batch_size=batch_size)
        if short:
            raise InputError(short)

    def _invert(self, unit: Unit, started: Started, unfinished: Unfinished) -> Made:
        method, size = self.config.method, self.dataset.image_size
        if not self._is_memory_checked:
            self._check_memory(unit)
        areas = crop_areas(
            unit.iterations,
            curriculum=method.crop_curriculum.name,
            start=method.crop_area_start,
            end=method.crop_area_min,
            milestone=method.crop_milestone,
        )
        inverted = partial(
            invert,
            started.pixels.to(self.device),
            torch.tensor([image.class_id for image in unit.images], device=self.device),
            networks=self._networks,
            guides=lambda iteration: self._guides(unit, iteration),
            objective=Objective(
                ce_weight=method.ce_weight,
                bn_weight=method.bn_weight,
                first_bn_multiplier=method.first_bn_multiplier,
                conv_skip_probability=method.conv_skip_probability,
                class_share=method.class_share,
                statistics_ema=method.statistics_ema,
                tv_weight=method.tv_weight,
                l2_weight=method.l2_weight,
                eig_weight=method.eig_weight,
                eig_temperature=method.eig_temperature,
                bfloat16=method.precision is Precision.bf16,
            ),
            descent=Descent(
                num_iterations=unit.iterations,
                lr=method.lr,
                adam_betas=(method.adam_betas[0], method.adam_betas[1]),
                residual_every=None if method.residual_parts == 1 else -(-unit.iterations // method.residual_parts),
                residual_weight=method.residual_weight,
                residual_scale=method.residual_scale,
            ),
            mean=self.dataset.mean,
            std=self.dataset.std,
            augmentations=lambda side: draw_augmentations(
                unit.seed,
                unit.iterations,
                size=side,
                crop_area_min=areas,
                flip_probability=method.flip_probability,
                roll_max=round(method.roll_max * side / size),
            ),
            antialias=method.antialias,
            seed=seed_for(unit.seed, "layers"),
            rounds=self._entries(unit),
            log_every=max(1, -(-unit.iterations // LOSS_POINTS)),
            resume=unfinished.found(),
            after_iteration=unfinished.keep,
        )
        try:
            result = inverted()
        except NotFinite as error:
            named = ", ".join(unit.images[n].image_id for n in error.images[:8]) or "none of them, but the loss is not"
            more = f" and {len(error.images) - 8} more" if len(error.images) > 8 else ""
            raise NotFinite(f"{error} (images: {named}{more})", error.images) from error
        history = [[point.iteration, _short(point.ce), _short(point.bn)] for point in result.history]
        return Made(
            to_uint8(result.images).cpu().numpy(),
            started.sources,
            result.loss_ce,
            result.loss_bn,
            details={LOSS_HISTORY: history},
        )

    def _entries(self, unit: Unit) -> list[int] | None:
        """Iteration at which each image enters, None where all enter at once."""
        if self.config.method.rounds == 1:
            return None
        indices = [image.index_in_class for image in unit.images]
        first, count = (
            min(indices),
            len(set(indices)),
        )  # a class larger than a batch comes in parts, each with all rounds
        return entry_iterations(
            [k - first for k in indices],
            images_per_class=count,
            iterations=unit.iterations,
            rounds=min(self.config.method.rounds, count),
        )

    def _guides(self, unit: Unit, iteration: int) -> Guides:
        """Teachers of an iteration with their weights."""
        method, guiding = self.config.method, guiding_teachers(self.config, unit, iteration)
        accuracies = {name: facts.get("accuracy") or 0.0 for name, facts in self._facts.items()}
        weighted = method.statistics_reduction is Reduction.weighted
        if weighted:
            known = {name: accuracies[name] for name in guiding.logits}
            logits = accuracy_weights(known, temperature=method.accuracy_temperature)
        else:
            logits = dict.fromkeys(guiding.logits, 1 / len(guiding.logits))
        if not guiding.statistics:
            return Guides(logits, {})
        statistics = reduction_weights(
            guiding.statistics,
            reduction=method.statistics_reduction.name,
            matched={name: bool(network.targets) for name, network in self._networks.items()},
            count_unmatched=method.count_bn_free_teachers,
            accuracies=accuracies,
            scales=self._scales() if method.statistics_reduction is Reduction.normalized else {},
            temperature=method.accuracy_temperature,
        )
        return Guides(logits, statistics)

    def _scales(self) -> dict[str, float]:
        """Each statistics teacher's term on real images, the primary's first where it has one."""
        scales = {}
        for name, facts in self._facts.items():  # the primary comes first in the pool of guides
            if facts.get("bn_distance_first") is not None:
                first = self.config.method.first_bn_multiplier * facts["bn_distance_first"]
                scales[name] = first + facts["bn_distance_rest"]
        return scales

    def _table(self, unit: Unit, made: Made) -> pa.Table:
        side = self.dataset.image_size
        expected = (len(unit.images), self.dataset.channels, side, side)
        if made.pixels.shape != expected or made.pixels.dtype != np.uint8:
            raise ValueError(f"pixels are {made.pixels.dtype} {made.pixels.shape}, expected uint8 {expected}")
        class_ids = [image.class_id for image in unit.images]
        verdict, confidence = self._verify(made.pixels, class_ids)
        inverted = self.config.method.engine is Engine.inversion
        same = {
            "unit_id": unit.unit_id,
            "method": self.config.method.name,
            "primary_teacher": self.config.teachers.primary if inverted else None,
            "energy_teachers": energy_teachers(self.config) if made.energies else [],
            "statistics_teachers": self._statistics_teachers(unit) if inverted else [],
            "iterations": unit.iterations,
            "loss_ce": made.loss_ce,
            "loss_bn": made.loss_bn,
            "config_hash": images_hash(self.config),
        }
        rows = [
            {
                **same,
                "image": {"bytes": png_bytes(pixels), "path": f"{image.image_id}.png"},
                "label": image.class_id,
                "image_id": image.image_id,
                "class_name": self.dataset.class_names[image.class_id],
                "index_in_class": image.index_in_class,
                "seed": made.seeds[n] if made.seeds else image.seed,
                "prompt": made.prompts[n] if made.prompts else None,
                "energy": made.energies[n] if made.energies else None,
                "source_image_id": made.sources[n],
                "verifier_class": verdict[n],
                "verifier_confidence": confidence[n],
            }
            for n, (image, pixels) in enumerate(zip(unit.images, made.pixels, strict=True))
        ]
        return pa.Table.from_pylist(rows, schema=image_schema(IMAGE_COLUMNS, self.dataset.class_names))

    def _statistics_teachers(self, unit: Unit) -> list[str]:
        """Every teacher whose statistics were matched at some iteration, in the order of their settings."""
        drawn = {name for _, guiding in guided(self.config, unit) for name in guiding.statistics}
        return [name for name in self.config.teachers.models if name in drawn]

    @torch.no_grad()
    def _verify(self, pixels: np.ndarray, class_ids: Sequence[int]) -> tuple[list[int], list[float]]:
        """The primary's prediction on the stored pixels, and its probability of the intended class."""
        images = torch.from_numpy(pixels).to(self.device).float() / 255
        logits = self._teachers[self.config.teachers.primary](images)
        probabilities = logits.softmax(dim=1)[torch.arange(len(class_ids)), torch.tensor(class_ids)]
        return logits.argmax(dim=1).tolist(), probabilities.tolist()


class _Sampling:
    """Samples units of one run from its generator."""

    def __init__(self, spec: RunSpec, teachers: Mapping[str, Classifier], device: torch.device) -> None:
        from prism_ray.stages.calibration import (  # imports diffusers, which few workers need
            margins_of,
            strengths_of,
            wide_shares_of,
        )
        from prism_ray.stages.sampling_parts import prompts_by_class, prompts_of, sampler_for

        self._prompts_of = partial(prompts_of, by_class=prompts_by_class(spec), wide_shares=wide_shares_of(spec))
        self._sampler = sampler_for(spec, teachers, device, margins=margins_of(spec), strengths=strengths_of(spec))

    def make(self, unit: Unit, unfinished: Unfinished) -> Made:
        chosen = self._sampler.choose(
            unit, self._prompts_of(unit), resume=unfinished.found(), after_part=unfinished.keep
        )
        running = chosen.running
        guided = max(int(running.guided.sum()), 1)
        lost = [{"image_id": unit.images[n].image_id, "reason": reason} for n, reason in chosen.lost.items()]
        return Made(
            chosen.pixels,
            [None] * len(chosen.pixels),
            prompts=[candidate.prompt for candidate in running.candidates],
            seeds=[candidate.seed for candidate in running.candidates],
            energies=chosen.energies,
            details={
                "candidates": chosen.num_candidates,
                "restarted_images": chosen.num_restarted,
                **({LOST: lost} if lost else {}),
                "guided_steps": int(running.guided.sum()),
                "satisfied_share": int(running.satisfied.sum()) / guided,
                "skipped_steps": int(running.skipped.sum()),
                "mean_energy": sum(chosen.energies) / len(chosen.energies),
            },
        )


def _short(value: float) -> float | None:
    """Four digits, which is what a plot shows; None for what is no number, which JSON has no word for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def png_bytes(pixels: np.ndarray) -> bytes:
    """One image (C, H, W) uint8, gray or RGB, as PNG; deterministic for one Pillow build."""
    image = Image.fromarray(pixels[0], "L") if len(pixels) == 1 else Image.fromarray(np.moveaxis(pixels, 0, -1), "RGB")
    sink = io.BytesIO()
    image.save(sink, format="PNG", compress_level=1)
    return sink.getvalue()
