"""What the recipes for ImageNet-1K take on 8 and 64 devices, on paper: `benchmarks/results/scaling.md`.

    python benchmarks/scaling.py > benchmarks/results/scaling.md

Operations are those that `prism-ray plan` counts on the architectures' shapes, time and efficiency those of
`prism_ray.scaling`, warnings those of `plan`. Nothing is computed on a device, and no weights or images are needed: the
data set is a thousand folders of one small image, the generator a folder with the sizes of Stable Diffusion 1.5.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from prism_ray.cli import compose
from prism_ray.device_time import duration, fleet_warnings, size_warnings
from prism_ray.inspection import count_work, planned
from prism_ray.report.format import format_digits
from prism_ray.scaling import Actors, Forecast, Overheads, forecast

ROOT = Path(__file__).resolve().parents[1]
RUNS = (
    ("imagenet1k_prism", 10),
    ("imagenet1k_prism", 50),
    ("imagenet1k_sre2l", 10),
    ("imagenet1k_sre2l", 50),
    ("imagenet1k_eda", 140),
    ("imagenet1k_eda", 1000),
)
DEVICES = (8, 64)
TFLOPS = (10.0, 50.0)
LOSSES = (0.0, 0.05, 0.5)
"""Of every device in an hour: none, one in twenty hours, one in two."""

GENERATOR = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "tiny_decoder": {"_class_name": "AutoencoderTiny"},
}
"""Stable Diffusion 1.5 at 512 pixels, with a tiny decoder."""

ABOUT = """# ImageNet-1K on 8 and 64 devices, on paper

`python benchmarks/scaling.py`. **Nothing here was measured on a GPU.** What is assumed:

- A device sustains {tflops} TFLOP/s: an assumption, not a measurement, and the one that decides. Time goes with its
  inverse. The higher one is the guess of `compute=ray_gpu`; the lower one is there because small networks in single
  precision keep a GPU from its best. Operations are those that `prism-ray plan` counts on the networks' shapes, an
  auxiliary teacher's as a whole, guidance at every guided step; what waits for memory, for the host or for images to be
  encoded is not counted.
- One actor per device. All start at once and work after {start:g} s (assumed); a unit costs {gap:g} s beside its
  work (0.1 measured with actors that sleep, the rest assumed for an object store), {driver:.1f} ms of it in the driver
  (measured).
- A device is lost without notice so many times an hour, at random, and another works after {recovery:g} s (assumed).
  What was done since the unit last kept its state is lost: at most {checkpoint:g} s (`compute.unit_checkpoint_s`).
  Keeping it is free (not measured; a hundred images of 224 pixels with Adam's state are 180 MB).
- All devices are paid until the last unit is done. Efficiency is the share of the paid device-seconds that ends up in
  units.
- Images and stored labels alone. Teachers come trained; students, preparing and measuring come on top.
- `imagenet1k_eda` with Stable Diffusion 1.5 at 512 pixels and a tiny decoder; its labels are computed while the student
  trains. All other settings are the recipes'.

Time, device-hours and efficiency at {losses} losses of each device in an hour:

| recipe, images per class | TFLOP/s | units | a unit, median (range) | devices | no losses | {columns} |
|---|---|---|---|---|---|{rules}|"""


@dataclass(frozen=True)
class Result:
    """A run on paper: seconds of every unit, one forecast for each rate of losses, what `plan` warns of."""

    unit_s: list[float]
    forecasts: list[Forecast]
    warnings: list[str]


def overheads_of(settings: list[str]) -> Overheads:
    return Overheads(checkpoint_s=compose(settings).compute.unit_checkpoint_s)


def seconds(settings: list[str], tflops: float) -> list[float]:
    """Of every unit of a run, images and stored labels."""
    config = compose(settings)
    names, units = planned(config, None)
    work, _ = count_work(config, None, names, units)
    assert work.image_flops is not None, "the generator's sizes are known"
    return [sum(flops) / tflops / 1e12 for flops in zip(work.image_flops, work.label_flops, strict=True)]


def foresee(unit_s: list[float], devices: int, *, overheads: Overheads, timeout_s: float = 3600.0) -> Result:
    """The run on so many devices, an actor each, at every rate of losses."""
    found = [forecast(unit_s, [Actors(count=devices, preemptions_per_hour=rate)], overheads) for rate in LOSSES]
    warned = size_warnings(unit_s, overheads=overheads, timeout_s=timeout_s)
    return Result(unit_s, found, warned + fleet_warnings(unit_s, devices, found[0], overheads=overheads))


def make_inputs(folder: Path) -> None:
    """What the recipes look at before anything runs: classes' folders, and a generator's sizes."""
    small = Image.new("RGB", (8, 8))
    for split in ("train", "val"):
        for number in range(1000):
            own = folder / "imagenet" / split / f"n{number:08d}"
            own.mkdir(parents=True)
            small.save(own / "0.JPEG")
    for part, config in GENERATOR.items():
        (folder / "generator" / part).mkdir(parents=True)
        (folder / "generator" / part / "config.json").write_text(json.dumps(config))
    (folder / "generator/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def settings_of(recipe: str, images_per_class: int, folder: Path) -> list[str]:
    settings = [f"recipe={recipe}", f"images_per_class={images_per_class}", f"storage={folder}/outputs"]
    if recipe == "imagenet1k_eda":
        return [*settings, f"generator.source={folder}/generator", "stages=[prepare,teach,synthesize]"]
    return [*settings, f"dataset.path={folder}/imagenet"]


def unit_text(unit_s: list[float]) -> str:
    least, most = sorted(unit_s)[1], max(unit_s)  # the last unit of images without companions may be a small rest
    text = duration(median(unit_s))
    return f"{text} ({duration(least)} to {duration(most)})" if least < 0.99 * most else text


def cell_text(found: Forecast) -> str:
    hours = format_digits(sum(found.device_hours.values()))
    return f"{duration(found.makespan_s)}, {hours}, {found.efficiency:.0%}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, warned = [], []
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        folder = Path(temporary)
        make_inputs(folder)
        for recipe, images_per_class in RUNS:
            settings = settings_of(recipe, images_per_class, folder)
            at_one, overheads = seconds(settings, 1.0), overheads_of(settings)
            for tflops in TFLOPS:
                unit_s = [each / tflops for each in at_one]
                for devices in DEVICES:
                    result = foresee(unit_s, devices, overheads=overheads)
                    cells = [cell_text(each) for each in result.forecasts]
                    what = f"`{recipe}`, {images_per_class}"
                    facts = [what, f"{tflops:g}", str(len(unit_s)), unit_text(unit_s), str(devices)]
                    rows.append(f"| {' | '.join([*facts, *cells])} |")
                    warned += [f"- {what} at {tflops:g} TFLOP/s on {devices}: {text}" for text in result.warnings]
    print(
        ABOUT.format(
            tflops=" or ".join(f"{each:g}" for each in TFLOPS),
            start=overheads.start_s,
            gap=overheads.gap_s,
            driver=1e3 * overheads.driver_s,
            recovery=overheads.recovery_s,
            checkpoint=overheads.checkpoint_s,
            losses=", ".join(f"{each:g}" for each in LOSSES),
            columns=" | ".join(f"{each:g} an hour" for each in LOSSES[1:]),
            rules="---|" * (len(LOSSES) - 1) + "---",
        )
    )
    print("\n".join([*rows, "", "What `plan` warns of, with so many actors:", "", *warned]))


if __name__ == "__main__":
    main()
