"""What guided sampling costs and what it keeps: CPU time, operations and energies of every data-free preset.

    python benchmarks/guided_sampling.py --storage DIR [--recipe digits_dfkd] [--pairs 7] [--images 50]
        [--rows unguided eda ...] [overrides ...]

The same generator, teacher, prompts, seeds, precision (fp32) and thread for all rows: the presets as they are, and eda
with one setting changed. Whatever the storage lacks (data, teachers, generator, each row's calibration) is made first
and not counted. A row's time is that of its images, decoded and measured; a calibration is paid once per run.

Prints a JSON line per row. `ms_per_image` of CPU time, and its ratios within a round `over_unguided` and
`over_eda_faithful`: median, least and largest over interleaved rounds. `gflop_per_image` as `plan` counts it; before
anything is timed it must agree to 5 % with what torch counts while two images are sampled, which are the same numbers
but for fused attention, whose gradient computes more than is needed. `calibration_gflop_per_image`: that of the row's
calibration, spread over the images of the run. `energy`: mean of max(0, joint energy - margin) over the images as they
are stored, with eda's margin for all rows; `kept`: the share of the fall from `unguided` to `eda_faithful` that the row
reaches. Ends with 1 if operations differ.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported: what follows comes after it

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

from benchmarks.measuring import circumstances, interleaved, print_cells, spread  # noqa: E402
from prism_ray import pipeline  # noqa: E402
from prism_ray.artifacts import artifact_facts  # noqa: E402
from prism_ray.cli.compose import compose  # noqa: E402
from prism_ray.config import Config, MethodConfig, Row  # noqa: E402
from prism_ray.generation import calibration_item  # noqa: E402
from prism_ray.methods.diffusion.guidance import guided_steps  # noqa: E402
from prism_ray.models.sampling_flops import PipelineCost, sampling_flops, world_cost  # noqa: E402
from prism_ray.plan import Unit, energy_teachers  # noqa: E402
from prism_ray.progress import Progress  # noqa: E402
from prism_ray.runs import open_run  # noqa: E402
from prism_ray.stages.calibration import make_calibration, margins_of, strengths_of, wide_shares_of  # noqa: E402
from prism_ray.stages.device import deterministic, pick_device, teacher_of  # noqa: E402
from prism_ray.stages.guided import Chosen, GuidedSampler  # noqa: E402
from prism_ray.stages.sampling_parts import prompts_by_class, prompts_of, sampler_for  # noqa: E402
from prism_ray.work import RunSpec  # noqa: E402

ROWS = {
    "unguided": ["method=unguided"],
    "eda": ["method=eda"],
    "prism_adaptive": ["method=prism_adaptive"],
    "eda_faithful": ["method=eda_faithful"],
    "mpgd": ["method=mpgd"],
    "freedom": ["method=freedom"],
    "dm_kd": ["method=dm_kd"],
    "eda_full_decoder": ["method=eda", "method.guidance.decoder=full"],
    "eda_every_step": ["method=eda", "method.guidance.every=1"],
    "eda_from_start": ["method=eda", "method.guidance.start=0.0"],
    "eda_cfg": ["method=eda", "method.sampling.cfg_scale=2.0"],
    "eda_cfg_half": ["method=eda", "method.sampling={cfg_scale: 2.0, cfg_start: 0.25, cfg_end: 0.75}"],
    "eda_micro_batch_1": ["method=eda", "method.sampling.micro_batch=1"],
    "eda_micro_batch_10": ["method=eda", "method.sampling.micro_batch=10"],
}
COMPARED = ("unguided", "eda_faithful")
JUDGE = "eda"
TOLERANCE = 0.05


@dataclass(frozen=True)
class Scene:
    """What the rows share."""

    spec: RunSpec
    artifacts_dir: str
    unit: Unit
    num_images: int  # of the whole run
    flops: PipelineCost
    teacher_flops: float  # of an image's forward pass through all that steer


def prepared(config: Config) -> Scene:
    """A run's artifacts but its calibration, made where they are missing, and its first unit."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        run = open_run(Row("benchmark", config), stack)
        runtime = stack.enter_context(pipeline.make_runtime(config))
        command = pipeline.Command([run], runtime, stack.enter_context(Progress(nowhere)), [])
        for stage in (pipeline.prepare, pipeline.teach, pipeline.generate, pipeline.prompt):
            stage(command)
        spec, dataset = run.spec(), run.spec().dataset()
        teachers = sum(float(artifact_facts(spec.teacher_dirs[n])["forward_flops"]) for n in energy_teachers(config))
        num_images = sum(len(unit.images) for unit in run.units)
        world = world_cost(config.generator.world, image_size=dataset.image_size, channels=dataset.channels)
        return Scene(spec, run.artifacts_dir, run.units[0], num_images, world, teachers)


class NoModules:
    """In the place of FlopCounterMode's own: that one can't be under a gradient to an input of a network."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def attention_gradient(gradient: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


def counter() -> FlopCounterMode:
    """Of operations on a CPU, whose fused attention torch's own formulas leave out."""
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_gradient,
    }
    found: Any = FlopCounterMode(display=False, custom_mapping=more)
    found.mod_tracker = NoModules()
    return found


class Sampled:
    """One row: its calibration and its sampler."""

    def __init__(self, scene: Scene, config: Config) -> None:
        spec = replace(scene.spec, config=config)
        item = calibration_item(spec, scene.artifacts_dir)
        if item is not None:
            make_calibration(item)
            spec = replace(spec, calibration_dir=item.folder)
        self.num_calibrated = item.settings.num_images if item is not None else 0
        device = pick_device(config.compute.gpus_per_train_worker)
        teachers = {name: teacher_of(spec, name, device) for name in energy_teachers(config)}
        self.method, self.margins, self._unit = config.method, margins_of(spec), scene.unit
        self._prompts, self._wide = prompts_by_class(spec), wide_shares_of(spec)
        make = partial(
            sampler_for, teachers=teachers, device=device, margins=self.margins, strengths=strengths_of(spec)
        )
        self.sampler = make(spec)
        self._of_two = make(replace(spec, config=changed(config, micro_batch=2)))
        self.images: Chosen | None = None

    def sample(self) -> None:
        """The images, kept for their energies."""
        self.images = self._chosen(self.sampler, self._unit)

    def _chosen(self, sampler: GuidedSampler, unit: Unit) -> Chosen:
        return sampler.choose(unit, prompts_of(unit, self._prompts, wide_shares=self._wide))

    def counted(self) -> float:
        """Operations of an image, as torch counts them while two are sampled."""
        two = replace(self._unit, images=self._unit.images[:2])
        self._chosen(self._of_two, two)  # prompts are encoded once, and not counted
        with counter() as counting:
            self._chosen(self._of_two, two)
        return counting.get_total_flops() / 2

    def energy(self, judge: "Sampled") -> float:
        """Mean energy of the images above the judge's margin."""
        assert self.images is not None, "sampled first"
        margin = next(iter(judge.margins.values()))[0]
        assert margin is not None, "the judge has a margin"
        energies = judge.sampler.energies(torch.from_numpy(self.images.pixels), self.images.running)
        return (energies - margin).clamp(min=0).mean().item()


def changed(config: Config, **sampling: Any) -> Config:
    """With other settings of sampling."""
    return replace(config, method=replace(config.method, sampling=replace(config.method.sampling, **sampling)))


def unguided(method: MethodConfig) -> MethodConfig:
    return replace(method, guidance=replace(method.guidance, scale=0.0))


def settings_of(method: MethodConfig) -> dict[str, Any]:
    """What decides the cost of sampling."""
    sampling, guidance = method.sampling, method.guidance
    steps = guided_steps(sampling.steps, guidance.start, guidance.end, guidance.every) if guidance.scale else range(0)
    return {
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "cfg": [sampling.cfg_scale, sampling.cfg_start, sampling.cfg_end],
        "guided_steps": len(steps),
        "travel": guidance.travel,
        "rule": guidance.rule.name,
        "decoder": guidance.decoder.name,
        "micro_batch": sampling.micro_batch,
    }


def measure(
    recipe: str, storage: Path, *, rows: Sequence[str], pairs: int, images: int, overrides: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Every row's figures, by name."""
    same = [f"recipe={recipe}", f"storage={storage}", "compute=inline", "compute.threads=1", *overrides]
    same.append(f"method.batch_size={images}")
    names = [name for name in ROWS if name in {*rows, *COMPARED, JUDGE}]
    configs = {name: compose([*same, *ROWS[name]]) for name in names}
    scene = prepared(configs[JUDGE])
    with deterministic(1):
        sampled = {name: Sampled(scene, config) for name, config in configs.items()}
        flops = {name: row.counted() for name, row in sampled.items()}
        seconds = interleaved({name: row.sample for name, row in sampled.items()}, pairs=pairs)
        energies = {name: row.energy(sampled[JUDGE]) for name, row in sampled.items()}
    own = {name: sampling_flops(row.method, scene.flops, scene.teacher_flops) for name, row in sampled.items()}
    fall = energies[COMPARED[0]] - energies[COMPARED[1]]
    found = {}
    for name, row in sampled.items():
        calibrated = row.num_calibrated * sampling_flops(unguided(row.method), scene.flops, scene.teacher_flops)
        result = {
            "row": name,
            **settings_of(row.method),
            "gflop_per_image": round(own[name] / 1e9, 4),
            "calibration_gflop_per_image": round(calibrated / scene.num_images / 1e9, 4),
            "ms_per_image": spread([1e3 * total / images for total in seconds[name]]),
        }
        for other in COMPARED:
            result[f"over_{other}"] = spread([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])
            result[f"flops_over_{other}"] = round(own[name] / own[other], 3)
        result |= {
            "energy": round(energies[name], 4),
            "kept": round((energies[COMPARED[0]] - energies[name]) / fall, 3) if fall else None,
            "flop_difference": abs(flops[name] / own[name] - 1),
            "recipe": recipe,
            "images": images,
            **circumstances(pairs),
        }
        found[name] = result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--recipe", default="digits_dfkd")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--images", type=int, default=50, help="of a round")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    found = measure(**vars(options))
    print_cells(found, found.__getitem__, difference="flop_difference", tolerance=TOLERANCE)


if __name__ == "__main__":
    main()
