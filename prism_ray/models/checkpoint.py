"""A training loop's state as one safetensors file, so that a resumed run continues bit for bit.

Random state is not part of it: order, crops and seeds of a step are derived from the step's number.
"""

import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from prism_ray.documents import parse_json, record
from prism_ray.errors import InputError, one_line
from prism_ray.storage import abandoned, sync_path

VERSION = 2
_METADATA = "prism_ray.checkpoint"  # a single entry: safetensors writes several in any order


@dataclass(frozen=True)
class _Metadata:
    """What a file says beside its tensors."""

    version: int
    step: int
    extra: dict[str, Any]
    scalars: dict[str, dict[str, Any]]  # of the optimizer: parameter index -> name -> plain value
    param_groups: list[dict[str, Any]]


def save_checkpoint(
    path: Path,
    *,
    module: nn.Module,
    optimizer: Optimizer,
    step: int,
    extra: dict[str, Any],
    average: nn.Module | None = None,
) -> None:
    """Replace `path` by the state after `step` steps; a crash at any moment leaves the old file or the new one.

    Two runs may write the same path at once, both with the same content: each through a temporary file of its own.

    Args:
        extra: JSON-ready data, returned by `load_checkpoint` and `read_extra`.
        average: a module of averaged parameters that is kept beside the trained one.
    """
    state = optimizer.state_dict()
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}  # of the optimizer: parameter index -> name -> plain value
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    metadata = {
        "version": VERSION,
        "step": step,
        "extra": extra,
        "scalars": scalars,
        "param_groups": state["param_groups"],
    }
    # Copies, because safetensors refuses tensors that share memory, such as tied weights.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Written here and not by safetensors, so that a full disk is the OSError that it is everywhere else.
        temporary.write_bytes(save(copies, metadata={_METADATA: json.dumps(metadata)}))
        sync_path(temporary)
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        # Another run may be writing the same checkpoint right now.
        for leftover in abandoned(path.parent, f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def read_extra(path: Path) -> dict[str, Any] | None:
    """`extra` of a checkpoint, None where there is none; tensors are not read.

    Raises:
        InputError: the file is damaged or of a newer version.
    """
    try:
        return _read(path, with_tensors=False)[0]["extra"]
    except FileNotFoundError:
        return None


def load_checkpoint(
    path: Path, *, module: nn.Module, optimizer: Optimizer, average: nn.Module | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore `module`, `optimizer` and `average` in place; returns (step, extra) as they were saved.

    Raises:
        FileNotFoundError: there is none.
        InputError: the file is damaged, of a newer version, or of another network or optimizer.
    """
    metadata, tensors = _read(path)
    module_states: dict[str, dict[str, Tensor]] = {"module": {}, "average": {}}
    try:
        optimizer_state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in metadata["scalars"].items()}
        for key, value in tensors.items():
            owner, _, name = key.partition(".")
            if owner in module_states:
                module_states[owner][name] = value
            else:
                index, _, name = name.partition(".")
                optimizer_state.setdefault(int(index), {})[name] = value
        groups = _with_tuples(metadata["param_groups"], optimizer.state_dict()["param_groups"])
        module.load_state_dict(module_states["module"])
        if average is not None:
            average.load_state_dict(module_states["average"])
        optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: belongs to another network or optimizer ({one_line(error)[:200]}); "
            "delete it to start this training again"
        ) from error
    return metadata["step"], metadata["extra"]


def _read(path: Path, *, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = parse_json((file.metadata() or {})[_METADATA])
            if not isinstance(metadata, dict) or type(metadata.get("version")) is not int:
                raise ValueError("it has no version")
            if metadata["version"] <= VERSION:
                metadata = asdict(record(_Metadata, metadata))
            # Cloned out of the memory map, which must not outlive a file that the next save replaces.
            names = file.keys() if with_tensors else []
            tensors = {name: torch.clone(file.get_tensor(name)) for name in names}
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: is no readable checkpoint ({one_line(error)}); delete it to start this training again"
        ) from error
    if metadata["version"] > VERSION:
        raise InputError(
            f"{path}: has version {metadata['version']}, this program reads up to {VERSION}; "
            "update prism_ray, or delete it to start this training again"
        )
    return metadata, tensors


def _with_tuples(groups: list[dict[str, Any]], current: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no tuples: give a setting back the type it has in the live optimizer."""
    if len(groups) != len(current):
        return groups  # refused by load_state_dict
    return [
        {k: tuple(v) if isinstance(now.get(k), tuple) else v for k, v in group.items()}
        for group, now in zip(groups, current, strict=True)
    ]
