"""Calibration: the energies of unguided samples, from which guided ones get their margins. No real image is looked at.

<artifacts>/calibrations/<hash>/
    prism_ray.json      settings; by teacher its margin, spread and the share of samples that it names as prompted
"""

import time
from pathlib import Path

from prism_ray.data.publish import publish_files
from prism_ray.identity import plain
from prism_ray.methods.diffusion.energies import margin_of, teacher_energy
from prism_ray.methods.diffusion.guidance import Guidance
from prism_ray.methods.metrics import top1
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, pick_device, teacher_of
from prism_ray.stages.guided import Candidate, GuidedSampler, Margins, begun
from prism_ray.stages.sampling_parts import generator_for, prompts_by_class
from prism_ray.storage import to_json
from prism_ray.work import MARKER, CalibrationItem, RunSpec, artifact_facts


def make_calibration(item: CalibrationItem) -> None:
    """Draw unguided samples and measure them; nothing to do if the folder is there."""
    if item.is_done:
        return
    spec, settings = item.spec, item.settings
    config, dataset = spec.config, spec.dataset()
    device, started = pick_device(config.compute.gpus_per_train_worker), time.perf_counter()
    with deterministic(settings.threads):
        teachers = {name: teacher_of(spec, name, device) for name in settings.teachers}
        sampler = GuidedSampler(
            config,
            generator_for(spec, device),
            teachers,
            margins={},
            image_size=dataset.image_size,
            channels=dataset.channels,
            device=device,
        )
        prompts = prompts_by_class(spec)
        candidates = []
        for n in range(settings.num_images):
            class_id = settings.class_ids[n % len(settings.class_ids)]
            own = prompts[class_id]
            prompt = own[n // len(settings.class_ids) % len(own)]
            candidates.append(Candidate(class_id, prompt, seed_for(settings.seed, "calibration", n), 0))
        running = sampler.advance(begun(candidates), guidance=Guidance())
        pixels = sampler.pixels(running.latents)
        facts = {}
        for name, teacher in teachers.items():
            logits = sampler.logits(teacher, pixels)
            class_ids = running.class_ids
            energies = teacher_energy(
                logits, class_ids, temperature=settings.temperature, class_weight=settings.class_weight
            )
            margin, spread = margin_of(energies, logits.argmax(dim=1), class_ids, quantile=settings.quantile)
            facts[name] = {"margin": margin, "spread": spread, "agreement": top1(logits, class_ids)}
    found = {
        "settings": plain(settings),
        "teachers": facts,
        "fingerprint": fingerprint(device),
        "seconds": time.perf_counter() - started,
    }
    publish_files(Path(item.folder), {MARKER: to_json(found)}, marker=MARKER)


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
