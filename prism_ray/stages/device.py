"""What every stage needs of its process: a device, frozen teachers, deterministic kernels, a fingerprint."""

import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import torch

from prism_ray.artifacts import local_folder
from prism_ray.data.prepared import PreparedDataset
from prism_ray.errors import InputError
from prism_ray.models.classifier import Classifier, build_classifier, frozen, load_classifier
from prism_ray.models.folding import folded
from prism_ray.work import RunSpec


def teacher_of(spec: RunSpec, name: str, device: torch.device) -> Classifier:
    """A teacher of a run, frozen, loaded once per process."""
    return load_frozen(spec.teacher_dirs[name], str(device))


def busy_teacher_of(spec: RunSpec, name: str, device: torch.device) -> Classifier:
    """The same for those that run thousands of times, laid out as is quickest; equal up to rounding."""
    return _load_busy(spec.teacher_dirs[name], str(device))


@lru_cache(maxsize=32)
def _load_busy(folder: str, device: str) -> Classifier:
    if torch.device(device).type != "cpu":
        return load_frozen(folder, device)
    # With the channels of a pixel side by side the kernels of a CPU take 10 to 40 % less time, backwards too.
    return frozen(load_classifier(local_folder(folder))).to(memory_format=torch.channels_last)


def folded_teacher_of(spec: RunSpec, name: str, device: torch.device) -> Classifier:
    """The same for those of which only the logits in eval mode count: batch norm is part of the convolutions."""
    return _load_folded(spec.teacher_dirs[name], str(device))


@lru_cache(maxsize=32)
def _load_folded(folder: str, device: str) -> Classifier:
    return frozen(folded(_load_busy(folder, device)))


@lru_cache(maxsize=32)
def load_frozen(folder: str, device: str) -> Classifier:
    """A classifier from a local-dir folder, in eval mode, without gradients of its own."""
    return frozen(load_classifier(local_folder(folder))).to(device)


def untrained(dataset: PreparedDataset, arch: str, model_args: Mapping[str, Any], *, seed: int) -> Classifier:
    """A new classifier of a data set's classes that takes its images as they are; see `build_classifier`."""
    return build_classifier(
        arch,
        num_classes=dataset.num_classes,
        in_chans=dataset.channels,
        image_size=dataset.image_size,
        mean=dataset.mean,
        std=dataset.std,
        model_args=model_args,
        seed=seed,
    )


def pick_device(gpus: float) -> torch.device:
    """CUDA if this worker was given a share of a GPU, else the CPU.

    Raises:
        InputError: it was given one, and torch finds none.
    """
    if gpus > 0 and not torch.cuda.is_available():
        raise InputError(
            f"compute: this worker was given {gpus:g} GPUs of its node, and torch finds none there; install a CUDA "
            "build of torch and a driver that it supports on the nodes, or set the GPUs of actors and workers to 0"
        )
    return torch.device("cuda" if gpus > 0 else "cpu")


def compile_here() -> None:
    """Have torch.compile work in this process, and not in others that a killed worker would leave behind."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Fixed thread count and deterministic kernels inside; part of what makes the bytes repeat.

    On CUDA a kernel without a deterministic form warns instead of failing: the bytes are then promised by nobody, and a
    unit computed twice with other bytes is reported.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    # Deterministic mode fills every new tensor in case a kernel reads what it did not write. It costs small networks a
    # quarter of their time and more; the bytes are the same without (2026-11-30).
    filling: Any = torch.utils.deterministic  # a module that makes this attribute in a way checkers don't see
    filled, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, False
    # The released programs compute in fp32; TF32 convolutions would be the default on recent GPUs.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        filling.fill_uninitialized_memory = filled


def fingerprint(device: torch.device) -> str:
    """The environment within which the same unit must give the same bytes: device kind, CPU kind, builds."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_kind()
    return f"{device.type}:{kind}|torch {torch.__version__}|pyarrow {pyarrow.__version__}"


@lru_cache(maxsize=1)
def cpu_kind() -> str:
    """Model name of the CPU and the instruction set torch uses on it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def device_memory(device: torch.device, gpus: float) -> tuple[int, str]:
    """Bytes that a worker may use, and what has them: its share of a GPU, or the node."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = "" if gpus >= 1 else f"{gpus:g} of "
        return int(total * min(gpus, 1.0)), f"{share}{torch.cuda.get_device_name(device)}"
    return psutil.virtual_memory().total, "its node"


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this process so far, as receipts name it: resident, and on its GPU."""
    found = {"peak_memory_bytes": peak_memory_bytes()}
    return found | ({"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
