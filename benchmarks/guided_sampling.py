"""What guidance costs and what it keeps: seconds beside unguided samples, energies beside eda_faithful's.

    python benchmarks/guided_sampling.py --storage DIR [--recipe fashion_mnist_dfkd] [--pairs 7] [--images 100]
        [--scales 0.1] [overrides ...]

Prints one JSON line. `ratio`: median seconds of a unit with `method=eda` over those with `method=unguided`, same
sampler, steps, classifier-free guidance and images, in turn in one process, the first pair not counted; the
calibration, made once per run, is beside it. `energies`: mean of max(0, joint energy - margin) over the same seeds'
images as they are stored, by the full decoder, with eda's margin for all; `kept`: the share of the fall under
`eda_faithful` that eda reaches, by `eda_faithful`'s guidance scale.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from prism_ray import cli, pipeline
from prism_ray.artifacts import artifact_facts
from prism_ray.config import Config, Row
from prism_ray.generation import calibration_item
from prism_ray.plan import Unit, energy_teachers
from prism_ray.progress import Progress
from prism_ray.runs import open_run
from prism_ray.stages.calibration import make_calibration, margins_of
from prism_ray.stages.device import deterministic, fingerprint, pick_device, teacher_of
from prism_ray.stages.guided import GuidedSampler, Margins
from prism_ray.stages.sampling_parts import prompts_by_class, prompts_of, sampler_for
from prism_ray.work import RunSpec


def prepared(config: Config) -> tuple[RunSpec, list[Unit], float]:
    """A run's spec with all artifacts that sampling needs, its units, and the seconds that calibration took."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        run = open_run(Row("benchmark", config), stack)
        runtime = stack.enter_context(pipeline.make_runtime(config))
        command = pipeline.Command([run], runtime, stack.enter_context(Progress(nowhere)), [])
        for stage in (pipeline.prepare, pipeline.teach, pipeline.generate, pipeline.prompt):
            stage(command)
        item = calibration_item(run.spec(), run.artifacts_dir)
        assert item is not None, "the method needs no calibration"
        make_calibration(item)
        run.calibration_dir = item.folder
        return run.spec(), run.units, artifact_facts(item.folder)["seconds"]


class Bench:
    """Samplers of several methods over one run's generator, teachers and prompts."""

    def __init__(self, spec: RunSpec, configs: Mapping[str, Config]) -> None:
        self.device = pick_device(spec.config.compute.gpus_per_train_worker)
        self.teachers = {name: teacher_of(spec, name, self.device) for name in energy_teachers(spec.config)}
        self.margins: Margins = margins_of(spec)
        self.prompts = prompts_by_class(spec)
        self.samplers = {
            name: sampler_for(replace(spec, config=config), self.teachers, self.device, margins=self.margins)
            for name, config in configs.items()
        }

    def seconds(self, name: str, unit: Unit) -> float:
        started = time.perf_counter()
        self.samplers[name].choose(unit, prompts_of(unit, self.prompts))
        return time.perf_counter() - started

    def energy(self, name: str, units: list[Unit], judge: GuidedSampler) -> float:
        """Mean energy above the margin of a method's images of units."""
        found: list[Tensor] = []
        for unit in units:
            chosen = self.samplers[name].choose(unit, prompts_of(unit, self.prompts))
            margin = next(iter(self.margins.values()))[0] or 0.0
            energies = judge.energies(torch.from_numpy(chosen.pixels), chosen.running)
            found.append((energies - margin).clamp(min=0))
        return torch.cat(found).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--recipe", default="fashion_mnist_dfkd")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--images", type=int, default=100, help="whose energies are compared")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()

    def config_of(method: str, *more: str) -> Config:
        same = [f"recipe={options.recipe}", f"storage={options.storage}", "compute=inline", *options.overrides]
        return cli.compose([*same, f"method={method}", *more])

    configs = {"unguided": config_of("unguided"), "eda": config_of("eda")}
    faithful = {f"{scale:g}": config_of("eda_faithful", f"method.guidance.scale={scale}") for scale in options.scales}
    spec, units, calibration_s = prepared(configs["eda"])
    bench = Bench(spec, {**configs, **faithful})
    with deterministic(spec.config.compute.threads):
        for name in configs:
            bench.seconds(name, units[0])  # not counted
        load = os.getloadavg()[0]
        timed = [{name: bench.seconds(name, units[0]) for name in configs} for _ in range(options.pairs)]
        some = units[: max(1, options.images // len(units[0].images))]
        energies = {name: bench.energy(name, some, bench.samplers["eda"]) for name in bench.samplers}
    ratios = sorted(pair["eda"] / pair["unguided"] for pair in timed)
    gain = energies["unguided"] - energies["eda"]
    result = {
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "unguided_ms_per_image": round(1000 * median(p["unguided"] for p in timed) / len(units[0].images), 2),
        "calibration_s": round(calibration_s, 1),
        "images": sum(len(unit.images) for unit in some),
        "energies": {name: round(energy, 4) for name, energy in energies.items()},
        "kept": {scale: round(gain / (energies["unguided"] - energies[scale]), 3) for scale in faithful},
        "threads": spec.config.compute.threads,
        "load_before": round(load, 2),
        "machine": fingerprint(bench.device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
