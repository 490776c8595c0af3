"""What a long unit keeps of its work on the way: tensors in the run folder, from which it goes on to the same bytes.

    unfinished/synthesize/<unit>.safetensors

One object a unit, replaced as a whole, removed when the unit is published or has failed. A preempted unit so loses
what it did since it last kept something, and a node that is told to leave keeps what it has.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prism_ray.drain import should_stop
from prism_ray.errors import Drained
from prism_ray.ledger import UNFINISHED, Ledger

log = logging.getLogger(__name__)

_METADATA = "prism_ray.unfinished"  # a single entry: safetensors writes several in any order
_HEADER_BYTES = 8


@dataclass(frozen=True)
class Kept:
    """What was found of a unit, and the time that it took so far."""

    tensors: dict[str, Tensor]
    seconds: float
    cpu_s: float


class Unfinished:
    """The work on one unit in one attempt.

    Args:
        ledger: of the run.
        stage, name: of the unit.
        identity: of all that decides the unit's bytes, its environment too; what was kept under another is not used.
        every_s: seconds between two times that something is kept; None: never, and a node that leaves is not heard.
    """

    def __init__(self, ledger: Ledger, stage: str, name: str, *, identity: str, every_s: float | None) -> None:
        self._ledger, self._key = ledger, f"{UNFINISHED}/{stage}/{name}.safetensors"
        self._identity, self._every_s = identity, every_s
        self._started, self._cpu_started = time.monotonic(), time.process_time()
        self._last, self._before, self._is_there = self._started, Kept({}, 0.0, 0.0), False

    @property
    def is_on(self) -> bool:
        return self._every_s is not None

    @property
    def seconds(self) -> float:
        """Spent on the unit, also by those that did not finish it."""
        return self._before.seconds + time.monotonic() - self._started

    @property
    def cpu_s(self) -> float:
        return self._before.cpu_s + time.process_time() - self._cpu_started

    def found(self) -> dict[str, Tensor] | None:
        """What an earlier attempt kept, None if that is nothing, damaged, or of another unit or environment."""
        if not self.is_on:
            return None
        try:
            data = self._ledger.store.read(self._key)
        except FileNotFoundError:
            return None
        self._is_there = True
        kept = unpacked(data, identity=self._identity)
        if kept is None:
            log.warning("%s: of another unit or environment, or damaged; the unit is made from its start", self._key)
            return None
        self._before = kept
        return kept.tensors

    def keep(self, state_of: Callable[[], Mapping[str, Tensor]]) -> None:
        """Called wherever the work could go on from: keeps what there is, if it is time to.

        Raises:
            Drained: this node is to leave, and all is kept.
        """
        if self._every_s is None:
            return
        leaves = should_stop()
        if leaves or time.monotonic() - self._last >= self._every_s:
            data = packed(state_of(), identity=self._identity, seconds=self.seconds, cpu_s=self.cpu_s)
            self._ledger.store.put(self._key, data)
            self._is_there, self._last = True, time.monotonic()
        if leaves:
            raise Drained("the node is about to leave; the unit goes on where it was elsewhere")

    def forget(self) -> None:
        """The unit is published, or must begin again."""
        if self._is_there:
            self._ledger.store.remove(self._key)
            self._is_there = False


def packed(tensors: Mapping[str, Tensor], *, identity: str, seconds: float, cpu_s: float) -> bytes:
    """Tensors on the CPU as one safetensors file, with a digest: the format itself has none."""
    entry = {"identity": identity, "seconds": seconds, "cpu_s": cpu_s, "sha256": _digest(tensors)}
    return save(dict(tensors), metadata={_METADATA: json.dumps(entry, sort_keys=True)})


def unpacked(data: bytes, *, identity: str) -> Kept | None:
    """The tensors of such a file, None if it is none, damaged, or kept under another identity."""
    try:
        size = int.from_bytes(data[:_HEADER_BYTES], "little")
        header = json.loads(data[_HEADER_BYTES : _HEADER_BYTES + size])
        entry = json.loads(header["__metadata__"][_METADATA])
        tensors = load(data)
        if entry["identity"] != identity or entry["sha256"] != _digest(tensors):
            return None
        # Copies, because tensors inside of a file's bytes are not aligned, which random generators crash at.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return Kept(tensors, float(entry["seconds"]), float(entry["cpu_s"]))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
