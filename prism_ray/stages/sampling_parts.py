"""What sampling needs of its process: a generator, loaded once, and the prompts of each class."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from prism_ray.artifacts import local_folder
from prism_ray.errors import InputError
from prism_ray.methods.diffusion.adaptation import dealt
from prism_ray.models.classifier import Classifier
from prism_ray.models.generators import DTYPES, Generator, Placement, load_generator
from prism_ray.plan import Unit
from prism_ray.prompts.table import PromptRow, from_jsonl
from prism_ray.stages.guided import GuidedSampler, Margins
from prism_ray.work import PROMPTS_FILE, RunSpec


def generator_for(spec: RunSpec, device: torch.device) -> Generator:
    """A run's generator, loaded once per process."""
    assert spec.generator_dir is not None, "the generator comes first"
    settings = spec.config.generator
    placement = Placement(
        device, DTYPES[settings.dtype.name], settings.attention, settings.channels_last, settings.compile
    )
    return _load(spec.generator_dir, placement, settings.image_size, settings.tiny_decoder)


@lru_cache(maxsize=2)
def _load(folder: str, placement: Placement, image_size: int | None, tiny_decoder: str | None) -> Generator:
    tiny = None if tiny_decoder is None else Path(tiny_decoder)
    return load_generator(local_folder(folder), placement=placement, image_size=image_size, tiny_decoder=tiny)


def sampler_for(
    spec: RunSpec,
    teachers: Mapping[str, Classifier],
    device: torch.device,
    *,
    margins: Margins,
    strengths: Mapping[int, float] | None = None,
) -> GuidedSampler:
    """A sampler of a run's generator, in the pixels of its data set; see `GuidedSampler`."""
    dataset = spec.dataset()
    return GuidedSampler(
        spec.config,
        generator_for(spec, device),
        teachers,
        margins=margins,
        strengths=strengths,
        image_size=dataset.image_size,
        channels=dataset.channels,
        device=device,
    )


def prompts_by_class(spec: RunSpec) -> dict[int, list[PromptRow]]:
    """The prompts of each class in the order of use."""
    assert spec.prompts_dir is not None, "prompts come first"
    found: dict[int, list[PromptRow]] = {}
    for row in from_jsonl((local_folder(spec.prompts_dir) / PROMPTS_FILE).read_bytes()):
        found.setdefault(row.class_id, []).append(row)
    missing = [class_id for class_id in spec.class_ids() if class_id not in found]
    if missing:
        raise InputError(f"{spec.prompts_dir}: has no prompt of class {missing[0]}; delete the folder and run again")
    return found


def prompts_of(
    unit: Unit, by_class: Mapping[int, Sequence[PromptRow]], *, wide_shares: Mapping[int, float] | None = None
) -> list[str]:
    """The prompt of each image of a unit.

    Args:
        by_class: prompts of each class in the order of use; they are used in turn.
        wide_shares: by class, the share of its images with wide prompts; None where the table decides.
    """
    places = [(image.class_id, image.index_in_class) for image in unit.images]
    if wide_shares is None:
        return [by_class[c][k % len(by_class[c])].prompt for c, k in places]
    class_ids = {c for c, _ in places}
    plain = {c: [row for row in by_class[c] if row.is_plain] for c in class_ids}
    wide = {c: [row for row in by_class[c] if not row.is_plain] for c in class_ids}
    return [dealt(plain[c], wide[c], k, share=wide_shares[c]).prompt for c, k in places]
