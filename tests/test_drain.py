"""A node that gives notice: what a stage is told, and what a training keeps of its steps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prism_ray import drain
from prism_ray.artifacts import StoredFile
from prism_ray.stages.training import Checkpoints, Course, fit


@dataclass
class Step:
    """A step's share: its number decides the numbers in it."""

    number: int
    num_images: int = 4
    order_hash: int = 1


def train(path: Path, *, dies_at: int | None = None) -> tuple[nn.Module, list[int]]:
    """Ten steps of a small network with a checkpoint every thousand; returns it and the steps that it took."""
    torch.manual_seed(0)
    network, taken = nn.Linear(3, 2), []

    def prepare(step: int) -> Step:
        if step == dies_at:
            raise KeyboardInterrupt
        taken.append(step)
        return Step(step)

    def loss_of(forward: Callable[..., Tensor], batch: Step) -> Tensor:
        images = torch.randn(4, 3, generator=torch.Generator().manual_seed(batch.number))
        return forward(images).square().mean()

    course = Course(
        name="small", num_steps=10, num_images=40, batch_size=4, lr_of_step=lambda step: 0.1, weight_decay=0.0, seed=0
    )
    trained, _ = fit(
        network,
        course,
        prepare=prepare,
        loss_of=loss_of,
        checkpoints=Checkpoints(file=StoredFile.at(path), every=1000, identity="small"),
    )
    return trained, taken


def test_nobody_is_told_to_stop_unless_the_process_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_is_leaving", None)
    assert not drain.should_stop()
    drain.watch(lambda: True)
    assert drain.should_stop()


def test_a_training_keeps_its_steps_when_its_node_gives_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, steps = train(tmp_path / "undisturbed.safetensors")
    assert steps == list(range(10))
    asked: list[int] = []

    def is_leaving() -> bool:
        asked.append(1)
        return len(asked) > 3  # from the fourth step on

    monkeypatch.setattr(drain, "_is_leaving", is_leaving)
    path = tmp_path / "disturbed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(path, dies_at=6)
    monkeypatch.setattr(drain, "_is_leaving", lambda: False)
    found, steps = train(path)
    assert steps == [4, 5, 6, 7, 8, 9], "only the steps after the notice are taken again"
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
