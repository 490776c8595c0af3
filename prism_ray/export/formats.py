"""Which formats there are, what each needs, and the one loop that writes them."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_ray.config import Config
from prism_ray.errors import InputError
from prism_ray.export.folders import ExportFolder
from prism_ray.export.images import write_hf, write_imagefolder
from prism_ray.export.networks import timm_line, write_hub, write_timm
from prism_ray.export.onnx_file import write_onnx
from prism_ray.export.parts import check_images, find_student, missing_images
from prism_ray.inspection import open_existing
from prism_ray.runs import Run
from prism_ray.storage import is_remote


@dataclass(frozen=True)
class Format:
    """One form of a run's parts.

    Attributes:
        key: where it lies in the export folder; `{student}` marks what is made of a student.
        write: (run, student, path) → None, makes the file or folder `path`.
        line: (run, path) → the code that loads it.
        packages: what it needs of the extra `export`.
    """

    key: str
    write: Callable[[Run, Any, Path], None]
    line: Callable[[Run, Path], str]
    packages: tuple[str, ...] = ()

    @property
    def of_student(self) -> bool:
        return "{student}" in self.key


@dataclass(frozen=True)
class Product:
    """Something exported: its format, where it lies, and the line of code that loads it."""

    format: str
    path: Path
    line: str


def export(config: Config) -> tuple[list[Product], str | None]:
    """Write the wanted formats of an existing run; nothing is written before all of them were checked.

    Returns:
        The products, and a line on images that are missing from them.

    Raises:
        InputError: unknown format or student, a package or a part of the run is missing, or something else lies where
            a product belongs.
    """
    formats = _wanted(config)
    run = open_existing(config)
    of_student = any(chosen.of_student for chosen in formats.values())
    of_images = not all(chosen.of_student for chosen in formats.values())
    if of_images:
        check_images(run)
    student = find_student(run, config.export.student) if of_student or config.export.student else None
    folder = ExportFolder(_root(run), run=run.name)
    keys = {name: chosen.key.format(student=student.name if student else "") for name, chosen in formats.items()}
    for key in keys.values():
        folder.check(key)
    products = []
    for name, chosen in formats.items():
        with folder.replaced(keys[name]) as path:
            chosen.write(run, student, path)
        final = folder.path(keys[name])
        products.append(Product(name, final, chosen.line(run, final)))
    return products, missing_images(run) if of_images else None


def _wanted(config: Config) -> dict[str, Format]:
    for name in config.export.formats:
        if name not in FORMATS:
            raise InputError(f"export.formats: {name!r} is unknown; known: {', '.join(FORMATS)}")
        for package in FORMATS[name].packages:
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f"export.formats={name}: needs the package {package}; run `pip install prism-ray[export]`"
                )
    return {name: FORMATS[name] for name in config.export.formats}


def _root(run: Run) -> Path:
    folder = run.config.export.folder
    if folder is not None:
        return Path(folder).expanduser().absolute()
    if is_remote(run.store.url):
        raise InputError(f"export.folder=null: would be in {run.store.url}; give a local folder, export.folder=DIR")
    return Path(run.store.url_of("export"))


FORMATS: dict[str, Format] = {
    "timm": Format("timm/{student}", write_timm, timm_line),
    "hub": Format("hub/{student}", write_hub, timm_line),
    "onnx": Format(
        "onnx/{student}.onnx",
        write_onnx,
        lambda _, path: f"onnxruntime.InferenceSession({str(path)!r}).run(None, {{'images': pixels}})",
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
    "hf": Format("hf", write_hf, lambda _, path: f"datasets.load_dataset({str(path)!r}, split='train')"),
    "imagefolder": Format(
        "imagefolder", write_imagefolder, lambda _, path: f"torchvision.datasets.ImageFolder({str(path / 'train')!r})"
    ),
}
