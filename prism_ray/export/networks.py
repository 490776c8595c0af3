"""A student for timm: its folder as it is, and as a model repository of the Hugging Face hub."""

from pathlib import Path

from prism_ray.artifacts import write_durably
from prism_ray.export.parts import student_files, summary_for_card
from prism_ray.report.model_card import render_model_card
from prism_ray.report.origins import licences_of
from prism_ray.runs import Run
from prism_ray.weights import OWN_ARCHITECTURES
from prism_ray.work import StudentItem

HUB_FILES = ("config.json", "model.safetensors")
"""What timm looks for in a repository of the hub."""


def write_timm(run: Run, student: StudentItem, path: Path) -> None:
    """The student's folder, byte for byte."""
    path.mkdir()
    for name, data in student_files(run, student.name).items():
        write_durably(path / name, data)


def write_hub(run: Run, student: StudentItem, path: Path) -> None:
    """Weights, configuration and card; nothing is uploaded."""
    files = student_files(run, student.name)
    card = render_model_card(
        summary_for_card(run), labels=student.labels.name, seed=student.seed, licences=licences_of(run.config)
    )
    path.mkdir()
    for name in HUB_FILES:
        write_durably(path / name, files[name])
    write_durably(path / "README.md", card.encode())


def timm_line(run: Run, path: Path) -> str:
    """Code that loads either."""
    own = "prism_ray.models, " if run.config.student.arch in OWN_ARCHITECTURES else ""
    return f"import {own}timm; timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"
