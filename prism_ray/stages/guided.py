"""Guided: images sampled from a generator, steered and selected by the energies of teachers.

Samples pass the generator in micro-batches of one size, padded if need be, so that neither their number nor their order
changes a byte; but where `method.bn_weight` matches statistics of a micro-batch, its samples depend on each
other. A sample that ends in no number is drawn again from other seeds, and left out with its reason if that does not
help; the others keep their bytes, unless they depend on it: then the unit fails.

Shapes: N or B samples, images (N, C, H, W), latents (B, c, h, w).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from prism_ray.config import Config
from prism_ray.errors import InputError
from prism_ray.methods.diffusion.energies import Guide, guidance_loss, teacher_energy
from prism_ray.methods.diffusion.guidance import Guidance
from prism_ray.methods.diffusion.sampling import Cfg, sample
from prism_ray.methods.inversion.engine import NotFinite, to_uint8
from prism_ray.methods.inversion.matching import Network, observed_distances, statistics_term
from prism_ray.methods.inversion.statistics import targets_of
from prism_ray.methods.resizing import resized
from prism_ray.models.classifier import Classifier, to_gray
from prism_ray.models.generators import Generator
from prism_ray.models.samplers import ONE_STEP, Sampler, check_sampler
from prism_ray.options import Decoder, Keep
from prism_ray.plan import Unit, energy_teachers
from prism_ray.seeds import seed_for

RESTARTS = 2
"""Times that a sample which is no number is drawn again, from other seeds, before it is left out."""

Margins = Mapping[str, tuple[float | None, float]]
"""By teacher: the energy that is low enough, None for none, and the size of its energies' differences."""


@dataclass(frozen=True)
class Candidate:
    """A sample to draw, for one of the images of its group."""

    class_id: int
    prompt: str
    seed: int
    group: int


@dataclass(frozen=True)
class Chosen:
    """Images of a unit in its order."""

    running: "Running"
    pixels: np.ndarray  # (N, C, H, W) uint8
    energies: list[float]  # of these pixels, mean over the steering teachers
    num_candidates: int
    num_restarted: int  # images that were no numbers at first
    lost: dict[int, str]  # by place in the unit, why an image is not among them


class GuidedSampler:
    """Samples of one run.

    Args:
        config: its settings.
        generator: what is sampled from.
        teachers: by name; those that steer are among them.
        margins: see `Margins`; teachers that are not in it have none.
        strengths: by class, factors of the guidance scale; classes that are not in it have 1.
        image_size, channels: of stored images.

    Raises:
        InputError: the sampler can't do what is asked of it.
    """

    def __init__(
        self,
        config: Config,
        generator: Generator,
        teachers: Mapping[str, Classifier],
        *,
        margins: Margins,
        strengths: Mapping[int, float] | None = None,
        image_size: int,
        channels: int,
        device: torch.device,
    ) -> None:
        self._method, self._generator, self._device = config.method, generator, device
        self._image_size, self._channels = image_size, channels
        self._strengths = strengths or {}
        self._config, self._teachers = config, teachers
        self._guides = [Guide(teachers[name], *margins.get(name, (None, 1.0))) for name in energy_teachers(config)]
        self._matched = self._networks() if config.method.bn_weight else []
        sampling = config.method.sampling
        self._guidance = guidance_of(config)
        named = sampling.sampler or generator.sampler
        self._sampler = check_sampler(named, generator.scheduler_config, self._guidance)
        if sampling.abort_at is not None and self._sampler not in ONE_STEP:
            raise InputError(
                f"method.sampling.abort_at={sampling.abort_at}: samples leave their batch half-way, and sampler "
                f"{self._sampler} keeps a history of it; use one of {', '.join(ONE_STEP)}, or null"
            )

    def _networks(self) -> list[Network]:
        """Steering teachers whose batch-norm statistics samples are to match, as images of dataset distillation do."""
        modules = [self._teachers[name] for name in energy_teachers(self._config)]
        networks = [Network(module, targets_of(module, None, conv=False)) for module in modules]
        matched = [network for network in networks if network.targets]
        if not matched:
            raise InputError(
                f"method.bn_weight={self._method.bn_weight}: no steering teacher has batch norm, so there are no "
                "statistics to match; set it to 0, or choose others with method.guidance.teachers"
            )
        return matched

    def choose(
        self,
        unit: Unit,
        prompts: Sequence[str],
        *,
        resume: Mapping[str, Tensor] | None = None,
        after_part: Callable[[Callable[[], dict[str, Tensor]]], None] | None = None,
    ) -> Chosen:
        """The images of a unit: of its candidates those of least energy, so many of each class as it has.

        Args:
            prompts: of each image of the unit.
            resume: what `after_part` was given in an earlier call with the same arguments; None: from the start.
            after_part: called after every micro-batch with a function that returns all that are done, on the CPU. What
                it raises ends the call.
        """
        done = Done(dict(resume or {}), after_part)
        sampling = self._method.sampling
        candidates = candidates_of(unit, prompts, oversample=sampling.oversample, keep=sampling.keep)
        places = _places(unit, sampling.keep)
        running = begun(candidates)
        if sampling.abort_at is not None and len(candidates) > len(unit.images):
            until = max(1, round(sampling.abort_at * sampling.steps))
            running = self.advance(running, until=until, done=done)
            running = running.only(_kept(self.energies(self.pixels(running.clean), running), running, places))
        drawn = self._drawn(self.advance(running, done=done))
        if self._matched and not drawn.finite.all():
            raise NotFinite(
                f"{int((~drawn.finite).sum())} of {len(candidates)} samples are not finite, and method.bn_weight="
                f"{self._method.bn_weight} makes those of a micro-batch depend on each other; lower it or "
                "method.guidance.scale",
                [],
            )
        chosen = drawn.only(_kept(drawn.energies, drawn.running, places))
        final = self._restarted(chosen, done)
        whole = final.finite.nonzero()[:, 0].tolist()
        if not whole:
            raise NotFinite(
                f"none of {len(unit.images)} samples is finite, and neither are those of {RESTARTS} other seeds each; "
                "lower method.guidance.scale, or set generator.dtype=fp32",
                range(len(unit.images)),
            )
        reason = f"not finite, and neither from {RESTARTS} other seeds"
        final = final.only(whole)
        return Chosen(
            final.running,
            final.pixels.numpy(),
            final.energies.tolist(),
            len(candidates),
            num_restarted=int((~chosen.finite).sum()),
            lost={place: reason for place in range(len(unit.images)) if place not in whole},
        )

    def _restarted(self, chosen: "_Drawn", done: "Done") -> "_Drawn":
        """Those that are no numbers drawn again, alone and each from a seed of its own; the others as they are."""
        first = [candidate.seed for candidate in chosen.running.candidates]
        for restart in range(1, RESTARTS + 1):
            broken = (~chosen.finite).nonzero()[:, 0].tolist()
            if not broken:
                break
            candidates = chosen.running.candidates
            again = begun([replace(candidates[n], seed=seed_for(first[n], "restart", restart)) for n in broken])
            drawn = self._drawn(self.advance(again, done=done, name=f"restart{restart}"))
            chosen = chosen.with_parts(broken, drawn)
        return chosen

    def _drawn(self, running: "Running") -> "_Drawn":
        """Samples at their end, decoded and measured."""
        images = self._images(running.latents)
        finite = images.flatten(1).isfinite().all(dim=1) & running.latents.flatten(1).isfinite().all(dim=1)
        pixels = to_uint8(images)
        # A sample that is no number is chosen after all others of its group.
        energies = self.energies(pixels, running).masked_fill(~finite, math.nan)
        return _Drawn(running, pixels, energies, finite)

    def advance(
        self,
        running: "Running",
        *,
        until: int | None = None,
        guidance: Guidance | None = None,
        done: "Done | None" = None,
        name: str = "",
    ) -> "Running":
        """Samples some steps further, None: to the end.

        Args:
            guidance: None: the run's.
            done: micro-batches in it are taken as they are; others are put there, as `name` and their place.
        """
        size = self._method.sampling.micro_batch
        parts = []
        for start in range(0, len(running.candidates), size):
            part = running.only(list(range(start, min(start + size, len(running.candidates)))))
            key = f"{name}.{running.step}.{start}"
            moved = None if done is None else done.taken(key, part)
            if moved is None:
                moved = self._advance(part.padded(size), until, self._guidance if guidance is None else guidance)
                moved = moved.only(list(range(len(part.candidates))))
                if done is not None:
                    done.add(key, moved)
            parts.append(moved)
        return joined(parts)

    def _advance(self, running: "Running", until: int | None, guidance: Guidance) -> "Running":
        """One micro-batch."""
        sampling, generator = self._method.sampling, self._generator
        sampler = Sampler(
            self._sampler,
            generator.scheduler_config,
            sampling.steps,
            generators=running.generators,
            travel_generators=running.travel_generators,
            device=self._device,
            eta=sampling.eta,
            mu=generator.shift,
            first=running.step,
        )
        x = sampler.initial(generator.latent_shape, generator.dtype) if running.step == 0 else running.latents
        class_ids = running.class_ids.to(self._device)
        x, record = sample(
            x.to(self._device),
            denoise=generator.denoiser(
                generator.conditions([candidate.prompt for candidate in running.candidates]), sampler.timesteps
            ),
            steps=sampler,
            cfg=Cfg(sampling.cfg_scale, sampling.cfg_start, sampling.cfg_end),
            guidance=guidance,
            energy=lambda clean: self._loss(clean, class_ids),
            strengths=self._strengths_of(running),
            first=running.step,
            until=until,
        )
        return replace(
            running,
            latents=x.cpu(),
            clean=record.clean.cpu(),
            guided=running.guided + record.guided.cpu(),
            satisfied=running.satisfied + record.satisfied.cpu(),
            skipped=running.skipped + record.skipped.cpu(),
            step=sampler.num_steps if until is None else until,
        )

    def _strengths_of(self, running: "Running") -> Tensor | None:
        if not self._strengths:
            return None
        found = [self._strengths.get(candidate.class_id, 1.0) for candidate in running.candidates]
        return torch.tensor(found, device=self._device)

    def _loss(self, clean: Tensor, class_ids: Tensor) -> Tensor:
        guidance, method = self._method.guidance, self._method
        images = self._generator.decode_for_guidance(clean, full=guidance.decoder is Decoder.full)
        with ExitStack() as stack:
            observed = [stack.enter_context(observed_distances(network)) for network in self._matched]
            loss = guidance_loss(
                self._as_stored(images),
                class_ids,
                self._guides,
                temperature=guidance.temperature,
                class_weight=guidance.class_weight,
            )
        if not observed:
            return loss
        # A term of the batch as a whole, of which every sample carries its part.
        terms = [statistics_term(found, first_bn_multiplier=method.first_bn_multiplier) for found in observed]
        return loss + method.bn_weight * torch.stack(terms).mean() / len(loss)

    def pixels(self, latents: Tensor) -> Tensor:
        """Images as they are stored, by the full decoder: uint8 (N, C, H, W), on the CPU."""
        return to_uint8(self._images(latents))

    @torch.no_grad()
    def _images(self, latents: Tensor) -> Tensor:
        return self._in_micro_batches(latents, lambda part: self._as_stored(self._generator.decode(part)))

    @torch.no_grad()
    def energies(self, pixels: Tensor, running: "Running") -> Tensor:
        """Mean energy of stored pixels over the steering teachers, without margins: (N,)."""
        guidance = self._method.guidance
        found = []
        for guide in self._guides:
            logits = self.answers(guide.teacher, pixels)
            energies = teacher_energy(
                logits, running.class_ids, temperature=guidance.temperature, class_weight=guidance.class_weight
            )
            found.append(energies)
        return torch.stack(found).mean(dim=0)

    @torch.no_grad()
    def answers(self, network: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """What a network makes of stored pixels, say a teacher's logits (N, K), on the CPU."""
        return self._in_micro_batches(pixels, lambda part: network(part.float() / 255).float())

    def _in_micro_batches(self, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of every sample, computed in batches of one size."""
        size, parts = self._method.sampling.micro_batch, []
        for part in values.split(size):
            padded = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
            parts.append(function(padded.to(self._device))[: len(part)].cpu())
        return torch.cat(parts)

    def _as_stored(self, images: Tensor) -> Tensor:
        """In the channels and the size of stored images."""
        if images.shape[1] == 3 and self._channels == 1:
            images = to_gray(images)
        return resized(images.expand(-1, self._channels, -1, -1), self._image_size)


@dataclass(frozen=True)
class Running:
    """Samples on their way, all with the same number of steps behind them."""

    candidates: list[Candidate]
    generators: list[torch.Generator]
    travel_generators: list[torch.Generator]
    guided: Tensor  # (N,) times their energy was looked at
    satisfied: Tensor  # (N,) of those, times it was low enough
    skipped: Tensor  # (N,) times its gradient could not be followed
    step: int = 0
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    clean: Tensor = field(default_factory=lambda: torch.empty(0))  # x0 as the last step estimated it

    @property
    def class_ids(self) -> Tensor:
        """(N,)"""
        return torch.tensor([candidate.class_id for candidate in self.candidates])

    def only(self, kept: Sequence[int]) -> "Running":
        """Some of them, in that order."""
        chosen = {}
        for name, values in vars(self).items():
            if isinstance(values, list):
                chosen[name] = [values[n] for n in kept]
            elif isinstance(values, Tensor) and len(values):
                chosen[name] = values[list(kept)]
        return replace(self, **chosen)

    def padded(self, size: int) -> "Running":
        """The last one again until there are `size`, with random streams of their own."""
        missing = size - len(self.candidates)
        longer = self.only([*range(len(self.candidates)), *[len(self.candidates) - 1] * missing])
        for streams in (longer.generators, longer.travel_generators):
            for n in range(len(self.candidates), size):
                streams[n] = torch.Generator().set_state(streams[n].get_state())
        return longer


@dataclass(frozen=True)
class _Drawn:
    """Samples at their end."""

    running: Running
    pixels: Tensor  # (N, C, H, W) uint8
    energies: Tensor  # (N,)
    finite: Tensor  # (N,) bool

    def only(self, kept: Sequence[int]) -> "_Drawn":
        return _Drawn(self.running.only(kept), self.pixels[kept], self.energies[kept], self.finite[kept])

    def with_parts(self, places: Sequence[int], other: "_Drawn") -> "_Drawn":
        """With others at some places, in their order."""
        count = len(self.finite)
        order = list(range(count))
        for n, place in enumerate(places):
            order[place] = count + n
        both = [torch.cat([getattr(self, key), getattr(other, key)]) for key in ("pixels", "energies", "finite")]
        return _Drawn(joined([self.running, other.running]), *both).only(order)


class Done:
    """Micro-batches of a unit that are done, by name, as tensors on the CPU.

    Args:
        tensors: of an earlier call, "<name>.<what>".
        after: called after every further one with a function that returns all of them.
    """

    def __init__(
        self, tensors: dict[str, Tensor], after: Callable[[Callable[[], dict[str, Tensor]]], None] | None
    ) -> None:
        self._tensors, self._after = tensors, after

    def add(self, name: str, part: Running) -> None:
        if self._after is None:
            return
        found = {key: value for key, value in vars(part).items() if isinstance(value, Tensor)}
        found["step"] = torch.tensor(part.step)
        for key in STREAMS:
            found[key] = torch.stack([stream.get_state() for stream in getattr(part, key)])
        self._tensors |= {f"{name}.{key}": v.detach().to("cpu", copy=True).contiguous() for key, v in found.items()}
        self._after(lambda: self._tensors)

    def taken(self, name: str, part: Running) -> Running | None:
        """A part as it was when it was done, None if it is not."""
        prefix = f"{name}."
        found = {k.removeprefix(prefix): v for k, v in self._tensors.items() if k.startswith(prefix)}
        if not found:
            return None
        streams = {key: [torch.Generator().set_state(state.clone()) for state in found.pop(key)] for key in STREAMS}
        return replace(part, **found | {"step": int(found["step"])}, **streams)


STREAMS = ("generators", "travel_generators")


def begun(candidates: Sequence[Candidate]) -> Running:
    """Samples before their first step."""
    zeros = torch.zeros(len(candidates), dtype=torch.int64)
    return Running(
        list(candidates),
        [torch.Generator().manual_seed(candidate.seed) for candidate in candidates],
        [torch.Generator().manual_seed(seed_for(candidate.seed, "travel")) for candidate in candidates],
        zeros,
        zeros.clone(),
        zeros.clone(),
    )


def joined(parts: Sequence[Running]) -> Running:
    """Samples of several micro-batches as one list."""
    together = {}
    for name, values in vars(parts[0]).items():
        if isinstance(values, list):
            together[name] = [entry for part in parts for entry in getattr(part, name)]
        elif isinstance(values, Tensor):
            together[name] = torch.cat([getattr(part, name) for part in parts])
    return replace(parts[0], **together)


def candidates_of(unit: Unit, prompts: Sequence[str], *, oversample: float, keep: Keep) -> list[Candidate]:
    """What is drawn for a unit: its own images, then for each group so many more that all are `oversample` times them.

    The more have seeds of their own and the prompts of their group's images in turn.
    """
    own = [
        Candidate(image.class_id, prompt, image.seed, _group(unit, n, keep))
        for n, (image, prompt) in enumerate(zip(unit.images, prompts, strict=True))
    ]
    more = []
    for group, places in _places(unit, keep).items():
        for j in range(math.ceil(len(places) * oversample - 1e-9) - len(places)):
            like = own[places[j % len(places)]]
            more.append(replace(like, seed=seed_for(unit.seed, "candidate", group, j)))
    return own + more


def _group(unit: Unit, place: int, keep: Keep) -> int:
    return unit.images[place].class_id if keep is Keep.of_class else place


def _places(unit: Unit, keep: Keep) -> dict[int, list[int]]:
    """Places of a unit's images by the group whose candidates they are chosen from."""
    found: dict[int, list[int]] = {}
    for place in range(len(unit.images)):
        found.setdefault(_group(unit, place, keep), []).append(place)
    return found


def _kept(energies: Tensor, running: Running, places: Mapping[int, Sequence[int]]) -> list[int]:
    """Which candidate becomes the image of each place: of each group those of least energy, in the order drawn."""
    winners: dict[int, int] = {}
    for group, own in places.items():
        members = [n for n, candidate in enumerate(running.candidates) if candidate.group == group]
        # A sample whose energy is not a number loses to all others.
        ranked = sorted(members, key=lambda n: (math.isnan(energies[n]), float(energies[n]), n))
        winners |= dict(zip(own, sorted(ranked[: len(own)]), strict=True))
    return [winners[place] for place in sorted(winners)]


def guidance_of(config: Config) -> Guidance:
    """A run's guidance as the method takes it."""
    settings = config.method.guidance
    return Guidance(
        scale=settings.scale,
        rule=settings.rule.name,
        form=settings.form.name,
        sizing=settings.sizing.name,
        reference=settings.reference.name,
        start=settings.start,
        end=settings.end,
        every=settings.every,
        travel=settings.travel,
        travel_start=settings.travel_start,
        travel_end=settings.travel_end,
    )
