"""Small real runs to report: shards of 8x8 gray PNGs written through the project's own schema."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from prism_ray import schema
from prism_ray.report.contents import (
    Confusion,
    Cosine,
    DatasetFacts,
    Diversity,
    Energies,
    FileFacts,
    LabelName,
    Measured,
    Neighbors,
    Plane,
    RunSummary,
    SearchResult,
    StudentFacts,
    StudentResult,
    TeacherFacts,
    UnitLosses,
)

CLASS_NAMES = ("circle", "square", "triangle")
SummaryMaker = Callable[..., RunSummary]


def png(pixels: np.ndarray) -> bytes:
    """A uint8 image (H, W) or (H, W, 3) as PNG."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def gray(value: int, *, side: int = 8) -> bytes:
    """A shape on a flat background, told apart by its gray value."""
    pixels = np.full((side, side), value, dtype=np.uint8)
    pixels[2:-2, 2:-2] = 255 - value
    return png(pixels)


def write_images(
    path: Path, rows: Sequence[tuple[int, int, bytes]], *, method: str, class_names: Sequence[str] = CLASS_NAMES
) -> str:
    """An image shard of (class id, index in class, PNG)."""
    columns = dict(schema.IMAGE_COLUMNS)
    content = [
        dict.fromkeys(columns)
        | {
            "image": {"bytes": data, "path": None},
            "label": class_id,
            "image_id": f"{class_id}-{index}",
            "unit_id": path.stem,
            "class_name": class_names[class_id],
            "index_in_class": index,
            "seed": 0,
            "method": method,
        }
        for class_id, index, data in rows
    ]
    return _write(path, pa.Table.from_pylist(content, schema=schema.image_schema(schema.IMAGE_COLUMNS, class_names)))


def write_real(path: Path, rows: Sequence[tuple[int, bytes]], *, class_names: Sequence[str] = CLASS_NAMES) -> str:
    """A shard of real images of (class id, PNG)."""
    content = [
        {"image": {"bytes": data, "path": None}, "label": class_id, "image_id": str(row)}
        for row, (class_id, data) in enumerate(rows)
    ]
    return _write(path, pa.Table.from_pylist(content, schema=schema.image_schema(schema.REAL_COLUMNS, class_names)))


def _write(path: Path, table: pa.Table) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(schema.table_bytes(table))
    return str(path)


def students(labels: LabelName, top1: float, **changes: object) -> list[StudentResult]:
    """Three students a point apart, the first at `top1`; keywords replace fields of each."""
    # A dict of fields of several types: which value goes with which name is not known to the type checker.
    content: dict[str, object] = {"seconds": 3.25, "steps": 300, "num_params": 12_345, "lr": 0.005} | changes
    return [
        StudentResult(seed=seed, labels=labels, top1=top1 + 0.01 * seed, **content)  # pyright: ignore[reportArgumentType]
        for seed in range(3)
    ]


def search(
    best: float, *, labels: LabelName = "soft", rates: Sequence[float] = (0.001, 0.005, 0.02)
) -> list[SearchResult]:
    """A search whose second learning rate is the best."""
    return [
        SearchResult(
            labels=labels,
            lr=lr,
            top1=best - 0.05 * abs(n - 1),
            chosen=n == 1,
            validation="training",
            num_images=300,
        )
        for n, lr in enumerate(rates)
    ]


def summary_with_shards(folder: Path, label: str, class_names: Sequence[str], changes: dict[str, object]) -> RunSummary:
    """A run with real shards on disk: two units, one image of each class in both."""
    shards = [
        write_images(
            folder / "images" / f"{index:05d}.parquet",
            [(class_id, index, gray((40 * class_id + 10 * index) % 256)) for class_id in range(len(class_names))],
            method=label,
            class_names=class_names,
        )
        for index in range(2)
    ]
    real = write_real(
        folder.parent / "real.parquet",
        [(class_id, gray((200 + class_id) % 256)) for _ in range(12) for class_id in range(len(class_names))],
        class_names=class_names,
    )
    content: dict[str, object] = {
        "run_id": f"shapes-{label}-0123456789ab",
        "label": label,
        "method": label,
        "recipe": "shapes",
        "dataset": DatasetFacts(
            name="shapes", class_names=list(class_names), image_size=8, channels=1, num_train=1437, num_test=360
        ),
        "images_per_class": 2,
        "num_images": 2 * len(class_names),
        "num_units": 2,
        "image_bytes": 12_345,
        "label_bytes": 4_560_000,
        "synthesis_s": 34.5,
        "images_per_s": 0.1739,
        "teachers": [
            TeacherFacts(
                name="resnet",
                arch="resnet18",
                accuracy=0.9806,
                num_params=43_210,
                num_bn_layers=9,
                roles=["primary", "statistics"],
                sha256="ab" * 32,
            )
        ],
        "students": [
            *students("soft", 0.9),
            *students("hard", 0.7),
        ],
        "student": StudentFacts(arch="prism_convnet", recipe="custom"),
        "student_s": 19.5,
        "label_codec": "fp16",
        "label_views": 60,
        "label_s": 7.5,
        "cosine": Cosine(mean=0.8123, std=0.05, real_mean=0.7456, real_std=0.04, feature_model="vit"),
        "budget": [400, 350],
        "config": {
            "recipe_name": "shapes",
            "seed": 0,
            "images_per_class": 2,
            "storage": "outputs",
            "method": {"name": label, "lr": 0.05, "adam_betas": [0.5, 0.9]},
            "student": {"arch": "prism_convnet", "steps": 300},
        },
        "config_hash": "0123456789abcdef",
        "versions": {"prism_ray": "0.1.0", "torch": "2.10.0"},
        "shards": shards,
        "real_images": [real],
        "loss_curve": [UnitLosses(unit_id="00000", ce=0.01, bn=3.5), UnitLosses(unit_id="00001", ce=0.02, bn=3.1)],
    }
    return RunSummary(**(content | changes))  # pyright: ignore[reportArgumentType]


def everything(label: str, number: int, class_names: Sequence[str] = CLASS_NAMES) -> dict[str, object]:
    """Fields that give a run something in every part of a report; runs of other numbers differ in them."""
    rng = np.random.default_rng(number)
    places = rng.normal(size=(90, 2)).round(3)
    ids = [n % len(class_names) for n in range(90)]
    shares = {str(c): round(float(share), 3) for c, share in enumerate(rng.uniform(0.2, 1, len(class_names)))}
    matrix = (np.eye(len(class_names), dtype=int) * 30 + rng.integers(0, 4, (len(class_names),) * 2)).tolist()
    histogram = rng.dirichlet(np.ones(8), 2).round(4).tolist()
    losses = [[n, round(3 * 0.8**n, 4), round(5 + 0.3 * n, 4)] for n in range(9)]
    measured = Measured(mean=0.5 + 0.05 * number, std=0.1, real_mean=0.9)
    energies = Energies(
        teacher="resnet",
        temperature=1.0,
        num_images=60,
        mean=-4.0,
        real_mean=-5.0,
        overlap=0.7,
        auroc=0.6,
        fpr95=0.8,
        agreement=0.9,
        effective_classes=2.9,
        class_agreement=shares,
        edges=np.linspace(-8, 0, 9).tolist(),
        shares=histogram[0],
        real_shares=histogram[1],
    )
    return {
        "column": "resnet18" if number % 2 else "prism_convnet",
        "students": [
            *(replace(s, confusion=matrix, shifts={"blur": 0.5}) for s in students("soft", 0.7 + 0.05 * number)),
            *students("hard", 0.6 - 0.04 * number, best_on_test=0.9),
            *students("plain", 0.5),
        ],
        "search": search(0.9),
        "synthesis_s": 10.0 * 3**number,
        "label_bytes": 6_000 * 10**number,
        "diversity": [
            Diversity(
                space="held-out",
                model="vit",
                **dict.fromkeys(("cosine", "vendi", "effective_rank", "precision", "recall", "fid"), measured),
                num_set=60,
                k=3,
                k_coverage=5,
                class_coverage=shares,
                class_precision=shares,
                class_recall=dict(zip(shares, reversed(shares.values()), strict=True)),
            )
        ],
        "energies": [energies],
        "plane": Plane(
            shares=[0.4, 0.2],
            class_ids=ids,
            points=(places + 0.3 * number).round(3).tolist(),
            real_points=rng.normal(size=(90, 2)).round(3).tolist(),
        ),
        "neighbors": Neighbors(
            model="vit",
            num_training=36,
            num_images=6,
            nearer_share=0.05 * number,
            images=[[f"{c}-{k}", 3 * k + c, 0.25] for c in range(len(class_names)) for k in range(2)],
        ),
        "confusions": [Confusion(name="resnet", matrix=matrix)],
        "loss_curve": [UnitLosses(unit_id=f"{n:05d}", ce=0.5, bn=7.4, history=losses) for n in range(3)],
        "environment": {"python": "3.13.1", "machine": "x86_64"},
        "devices": ["cuda:NVIDIA H200"],
        "files": [FileFacts(key=f"images/{n:05d}.parquet", bytes=1234, sha256=f"{n:064x}") for n in range(120)],
        "config": {"seed": 0, "method": {"name": label, "engine": "diffusion"}, "student": {"steps": 300}},
    }
