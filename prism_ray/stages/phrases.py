"""Phrases: of the words that an ambiguous class may be called, those whose samples a teacher recognizes most often.

<artifacts>/phrases/<hash>/
    prism_ray.json      settings; the phrase of each class, and the share of its samples that was recognized

No real image is looked at. Source: that class names are disambiguated is PRISM's (arXiv 2509.16897), that the teacher
decides is this project's.
"""

import time

from prism_ray.artifacts import publish_files
from prism_ray.identity import plain
from prism_ray.methods.diffusion.guidance import Guidance
from prism_ray.methods.set_metrics import class_agreement
from prism_ray.prompts.captions import with_article
from prism_ray.prompts.names import choose_phrases, class_phrases
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, pick_device, teacher_of
from prism_ray.stages.guided import Candidate, begun
from prism_ray.stages.sampling_parts import sampler_for
from prism_ray.work import PhrasesItem


def make_phrases(item: PhrasesItem) -> None:
    """Draw unguided samples of every phrase and ask the teacher; nothing to do if the folder is there."""
    if item.is_done:
        return
    spec, settings = item.spec, item.settings
    config, dataset = spec.config, spec.dataset()
    device, started = pick_device(config.compute.gpus_per_train_worker), time.perf_counter()
    possible = class_phrases(dataset.class_names, config.prompts.phrases)
    asked = [(c, phrase) for c in settings.class_ids for phrase in possible[c]]
    shares: dict[tuple[int, str], float] = {}
    with deterministic(settings.threads):
        teacher = teacher_of(spec, settings.teacher, device)
        sampler = sampler_for(spec, {settings.teacher: teacher}, device, margins={})
        for class_id, phrase in asked:
            candidates = [
                Candidate(
                    class_id, f"a photo of {with_article(phrase)}", seed_for(config.seed, "phrase", class_id, n), 0
                )
                for n in range(settings.num_images)
            ]
            running = sampler.advance(begun(candidates), guidance=Guidance())
            logits = sampler.answers(teacher, sampler.pixels(running.latents))
            shares[class_id, phrase] = class_agreement(logits, running.class_ids)[class_id]
    found = {
        "settings": plain(settings),
        "phrases": choose_phrases(possible, shares),
        "agreement": [[class_id, phrase, share] for (class_id, phrase), share in shares.items()],
        "fingerprint": fingerprint(device),
        "seconds": time.perf_counter() - started,
    }
    publish_files(item.folder, {}, facts=found)
