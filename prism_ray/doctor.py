"""The verb `doctor`: what this machine and this installation can do, each finding with what to do about it."""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

from prism_ray import __version__
from prism_ray.config import Config
from prism_ray.errors import PrismError, one_line
from prism_ray.options import Executor
from prism_ray.report.format import format_bytes
from prism_ray.runs import PACKAGES, versions
from prism_ray.runtime.session import check_ray, cluster_address, local_resources, preflight
from prism_ray.storage import LocalStore, open_store

PYTHONS = ((3, 11), (3, 14))
"""First supported version, and the first that is not."""
LEAST_MEMORY = 4 << 30
"""Bytes; `make demo` takes 3.6 GiB at its peak."""
LEAST_SHM = 1 << 30
LEAST_DISK = 2 << 30
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container finds how much memory it may use."""
SHM = Path("/dev/shm")
REINSTALL = "run `pip install -e .` again in the environment of prism-ray"


class Level(Enum):
    """How a finding stands: fine, something to know, or no run can start."""

    ok = "ok"
    note = "--"
    bad = "BAD"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is there unless all is well."""

    name: str
    text: str
    level: Level = Level.ok
    remedy: str | None = None


def doctor_text(config: Config) -> tuple[str, bool]:
    """The findings line by line, and whether a run of these settings can start here."""
    findings = examine(config)
    lines = [f"prism-ray {__version__}"]
    for finding in findings:
        lines.append(f"  {finding.level.value:3} {finding.name:9} {finding.text}")
        if finding.remedy:
            lines.append(f"      {'':9} → {finding.remedy}")
    return "\n".join(lines), all(finding.level is not Level.bad for finding in findings)


def examine(config: Config) -> list[Finding]:
    """Everything that is looked at, in the order in which a run needs it."""
    probes: dict[str, tuple[Callable[[], Finding], str]] = {
        "python": (lambda: python_finding(sys.version_info[:2]), REINSTALL),
        "packages": (lambda: packages_finding(versions()), REINSTALL),
        "devices": (_devices, REINSTALL),
        "xformers": (_xformers, "nothing: PyTorch's own attention is used"),
        "ray": (lambda: _ray(config), "set compute=inline, which needs no Ray"),
        "cpus": (lambda: _cpus(config), "set compute.cpus"),
        "memory": (lambda: memory_finding(*_memory()), "set compute=inline"),
        "/dev/shm": (lambda: shm_finding(shutil.disk_usage(SHM).total if SHM.is_dir() else None), "set compute=inline"),
        "temporary": (lambda: _disk("temporary", tempfile.gettempdir(), "TMPDIR"), "set TMPDIR to a folder"),
        "storage": (lambda: _storage(config), "choose another storage=..."),
    }
    return [_examined(name, probe, remedy) for name, (probe, remedy) in probes.items()]


def _examined(name: str, probe: Callable[[], Finding], remedy: str) -> Finding:
    """A finding, also where looking itself fails; the message of a refusal says what to do."""
    try:
        return probe()
    except (PrismError, ImportError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return Finding(name, one_line(error), Level.bad, remedy)


def python_finding(version: tuple[int, ...]) -> Finding:
    """Whether this Python is a supported one."""
    text = f"{platform.python_version()} on {platform.machine()}"
    first, end = PYTHONS
    if first <= version < end:
        return Finding("python", text)
    return Finding("python", text, Level.bad, "make a new environment with Python 3.11, 3.12 or 3.13")


def packages_finding(found: dict[str, str]) -> Finding:
    """Versions of the packages that decide the output."""
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        return Finding("packages", f"{text}; missing: {', '.join(missing)}", Level.bad, REINSTALL)
    return Finding("packages", text)


def _devices() -> Finding:
    import torch

    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            gpus.append(f"{torch.cuda.get_device_name(number)}, {format_bytes(free)} of {format_bytes(total)} free")
    kernels = torch.backends.cpu.get_cpu_capability()
    has_driver = Path("/proc/driver/nvidia/version").exists()
    return devices_finding(gpus, kernels=kernels, has_driver=has_driver, cuda=torch.version.cuda)


def devices_finding(gpus: list[str], *, kernels: str, has_driver: bool, cuda: str | None) -> Finding:
    """GPUs as torch sees them; a driver without a torch that uses it is worth a word."""
    if gpus:
        return Finding("devices", "; ".join(gpus))
    text = f"no GPU, {kernels} kernels on the CPU"
    if not has_driver:
        return Finding("devices", text)
    build = "is built for CPUs alone" if cuda is None else f"is built for CUDA {cuda} and finds none it can use"
    remedy = "install the torch and torchvision of https://pytorch.org/get-started for this driver (`nvidia-smi`)"
    return Finding("devices", f"{text}; a GPU's driver is here, but torch {build}", Level.note, remedy)


def _xformers() -> Finding:
    """Present, absent and present-but-broken are all fine: attention falls back to PyTorch's own."""
    if importlib.util.find_spec("xformers") is None:
        return Finding("xformers", "not installed, and not needed: PyTorch's own attention is used")
    import torch

    from prism_ray.models.attention import xformers_problem

    problem = xformers_problem(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if problem is None:
        return Finding("xformers", "installed; used with generator.attention=xformers")
    remedy = "leave generator.attention as it is, or install the xformers built for this torch"
    return Finding("xformers", f"{problem}; PyTorch's own attention is used", Level.note, remedy)


def _ray(config: Config) -> Finding:
    version = importlib.metadata.version("ray")
    if config.compute.executor is Executor.inline:
        return Finding("ray", f"{version}, not used (compute=inline)")
    check_ray()
    preflight(config.compute)
    address = cluster_address(config.compute)
    return Finding(
        "ray", f"{version}, " + (f"the cluster at {address}" if address else "a local cluster for each command")
    )


def _cpus(config: Config) -> Finding:
    cpus, gpus = local_resources(config.compute)
    return Finding("cpus", f"{cpus:g} logical CPUs and {gpus:g} GPUs for a local cluster")


def _memory() -> tuple[int, int]:
    """Bytes of memory in all and free, within the limit of a container."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for path in MEMORY_LIMITS:
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):  # no container, or one without a limit
            continue
        total = min(total, limit)
    return total, min(total, free)


def memory_finding(total: int, free: int) -> Finding:
    """Memory in bytes, and whether the smallest shipped suite fits."""
    text = f"{format_bytes(free)} of {format_bytes(total)} free"
    if free >= LEAST_MEMORY:
        return Finding("memory", text)
    remedy = "end other programs, or set compute=inline, which holds one process's models instead of several"
    return Finding("memory", f"{text}, less than {format_bytes(LEAST_MEMORY)}", Level.note, remedy)


def shm_finding(total: int | None) -> Finding:
    """Shared memory in bytes, where Ray keeps its objects; None where the system has none there."""
    if total is None:
        return Finding("/dev/shm", "not here; Ray keeps its objects in a temporary folder")
    if total >= LEAST_SHM:
        return Finding("/dev/shm", format_bytes(total))
    remedy = (
        "start the container with --shm-size=2g, or mount an emptyDir with medium Memory there; until then Ray is "
        "slower, or set compute=inline"
    )
    return Finding("/dev/shm", f"{format_bytes(total)}, less than {format_bytes(LEAST_SHM)}", Level.note, remedy)


def _disk(name: str, folder: str | Path, setting: str, *, what: str = "") -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{folder} {what}{format_bytes(free)} free"
    if free >= LEAST_DISK:
        return Finding(name, text)
    remedy = f"make room there, or point {setting} at another disk"
    return Finding(name, f"{text}, less than {format_bytes(LEAST_DISK)}", Level.note, remedy)


def _storage(config: Config) -> Finding:
    """An object store is asked to keep, give back and forget an object; a folder to take a file."""
    store = open_store(config.storage)
    if not isinstance(store, LocalStore):
        store.check_writable()
        return Finding("storage", f"{store.url} is writable")
    existed = store.root.exists()
    store.check_writable()
    finding = _disk("storage", store.root, "storage=...", what="is writable, ")
    if not existed:
        store.root.rmdir()
    return finding
