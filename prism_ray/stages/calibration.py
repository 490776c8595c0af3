"""Calibration: the energies of unguided samples, from which guided ones get their margins. No real image is looked at.

<artifacts>/calibrations/<hash>/
    prism_ray.json      settings; by teacher its margin, spread and the share of samples that it names as prompted;
                        by class that share and how far apart its samples are
"""

import math
import time
from statistics import fmean

import torch
from torch import Tensor

from prism_ray.artifacts import artifact_facts, publish_files
from prism_ray.identity import plain
from prism_ray.methods.diffusion.adaptation import strengths, wide_shares
from prism_ray.methods.diffusion.energies import margin_of, teacher_energy
from prism_ray.methods.diffusion.guidance import Guidance
from prism_ray.methods.metrics import intra_class_cosine, top1
from prism_ray.methods.set_metrics import class_agreement
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, pick_device, teacher_of
from prism_ray.stages.guided import Candidate, Margins, begun
from prism_ray.stages.sampling_parts import prompts_by_class, sampler_for
from prism_ray.work import CalibrationItem, RunSpec


def make_calibration(item: CalibrationItem) -> None:
    """Draw unguided samples and measure them; nothing to do if the folder is there."""
    if item.is_done:
        return
    spec, settings = item.spec, item.settings
    device, started = pick_device(spec.config.compute.gpus_per_train_worker), time.perf_counter()
    with deterministic(settings.threads):
        teachers = {name: teacher_of(spec, name, device) for name in settings.teachers}
        sampler = sampler_for(spec, teachers, device, margins={})
        prompts = prompts_by_class(spec)
        candidates = []
        for n in range(settings.num_images):
            class_id = settings.class_ids[n % len(settings.class_ids)]
            own = prompts[class_id]
            prompt = own[n // len(settings.class_ids) % len(own)].prompt
            candidates.append(Candidate(class_id, prompt, seed_for(settings.seed, "calibration", n), 0))
        running = sampler.advance(begun(candidates), guidance=Guidance())
        pixels = sampler.pixels(running.latents)
        facts, named = {}, []
        for name, teacher in teachers.items():
            logits = sampler.answers(teacher, pixels)
            class_ids = running.class_ids
            energies = teacher_energy(
                logits, class_ids, temperature=settings.temperature, class_weight=settings.class_weight
            )
            margin, spread = margin_of(energies, logits.argmax(dim=1), class_ids, quantile=settings.quantile)
            facts[name] = {"margin": margin, "spread": spread, "agreement": top1(logits, class_ids)}
            named.append(class_agreement(logits, class_ids))
        # In the first teacher's features, as `evaluate` has it in the primary's.
        features = sampler.answers(next(iter(teachers.values())).features, pixels)
    found = {
        "settings": plain(settings),
        "teachers": facts,
        "classes": {
            str(c): {
                "agreement": fmean(shares[c] for shares in named),
                "diversity": _apart(features[running.class_ids == c]),
            }
            for c in sorted(set(running.class_ids.tolist()))
        },
        "fingerprint": fingerprint(device),
        "seconds": time.perf_counter() - started,
    }
    publish_files(item.folder, {}, facts=found)


def _apart(features: Tensor) -> float:
    """1 minus the mean cosine of two images (N, D) of a class; 0 of a single one."""
    cosine, _ = intra_class_cosine(features, torch.zeros(len(features), dtype=torch.int64))
    return 0.0 if math.isnan(cosine) else 1 - cosine


def strengths_of(spec: RunSpec) -> dict[int, float]:
    """By class, factors of a run's guidance scale; nothing where all classes are guided alike."""
    gain = spec.config.method.guidance.adapt
    if not gain or spec.calibration_dir is None:
        return {}
    return strengths({c: found["agreement"] for c, found in _pilot(spec).items()}, gain=gain)


def wide_shares_of(spec: RunSpec) -> dict[int, float] | None:
    """By class, the share of its images with wide prompts; None where the table decides."""
    most = spec.config.method.sampling.widen
    if most is None or spec.calibration_dir is None:
        return None
    return wide_shares({c: found["diversity"] for c, found in _pilot(spec).items()}, most=most)


def _pilot(spec: RunSpec) -> dict[int, dict[str, float]]:
    assert spec.calibration_dir is not None
    return {int(c): found for c, found in artifact_facts(spec.calibration_dir)["classes"].items()}


def margins_of(spec: RunSpec) -> Margins:
    """What guided samples of a run are measured by; nothing where no calibration is needed."""
    if spec.calibration_dir is None:
        return {}
    facts = artifact_facts(spec.calibration_dir)["teachers"]
    has_margin = spec.config.method.guidance.margin_quantile is not None
    several = len(facts) > 1
    return {
        name: (entry["margin"] if has_margin else None, entry["spread"] if several else 1.0)
        for name, entry in facts.items()
    }
