"""Students: every setting of their training does what it says; no kill, worker or place of the pixels shows in them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import spec_of_copy
from safetensors.torch import load_file

from prism_ray import cli
from prism_ray.data.prepared import PreparedDataset
from prism_ray.errors import InputError
from prism_ray.ledger import Receipt
from prism_ray.options import LabelKind, Optimizer, Precision, Schedule, SoftLoss, Validation
from prism_ray.stages import distill
from prism_ray.stages.data_parallel import ALONE
from prism_ray.stages.distill import Distiller, student_lr, validation_split
from prism_ray.stages.pixels import DecodedPixels, mapped_pixels, open_pixels
from prism_ray.stages.student_batches import StudentBatches, TrainingSet, labels_of, order_hash, read_training_set
from prism_ray.stages.training import Course, Diverged
from prism_ray.storage import open_store
from prism_ray.work import DISTILL, RunSpec, SearchItem, StudentItem, chosen_lr, student_inputs

CPU = torch.device("cpu")


SMOKE = ["recipe=digits_smoke", "compute=inline", "labels.mix=cutmix", "labels.bits=16", "labels.top_k=null"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with the smoke recipe's run up to its labels, which lose nothing and are of mixed views."""
    storage = tmp_path_factory.mktemp("students")
    stages = "stages=[prepare,teach,synthesize,relabel]"
    assert cli.main(["run", *SMOKE, stages, f"storage={storage}"]) == 0
    return storage


@pytest.fixture
def spec(finished: Path, tmp_path: Path) -> RunSpec:
    """That run in a copy of its own, as its workers see it; its students are yet to be trained."""
    return spec_of_copy(finished, tmp_path / "outputs", SMOKE)


def varied(
    spec: RunSpec,
    *,
    student: dict[str, Any] | None = None,
    labels: dict[str, Any] | None = None,
    compute: dict[str, Any] | None = None,
) -> RunSpec:
    """The same run with other settings."""
    config = spec.config
    config = replace(
        config,
        student=replace(config.student, **(student or {})),
        labels=replace(config.labels, **(labels or {})),
        compute=replace(config.compute, **(compute or {})),
    )
    return replace(spec, config=config)


def trained(spec: RunSpec, kind: LabelKind = LabelKind.soft) -> Receipt:
    """The receipt of a student, trained now."""
    item = StudentItem(spec, 0, kind)
    spec.ledger().store.remove(f"receipts/{DISTILL}")
    Distiller().train(item)
    receipt = spec.ledger().receipt(DISTILL, item.name)
    assert receipt is not None
    return receipt


def history(spec: RunSpec, kind: LabelKind = LabelKind.soft) -> list[dict[str, Any]]:
    """Lines of a student's metrics, without what a clock says."""
    lines = Path(spec.run_dir, f"metrics/students/{kind.name}-seed0.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in e.items() if k not in ("images_per_s", "data_wait_share")} for e in entries]


def training_set(spec: RunSpec, kind: LabelKind = LabelKind.soft) -> TrainingSet:
    read = read_training_set(spec, student_inputs(spec.ledger(), LabelKind.hard))
    return replace(read, labels=labels_of(spec, read, CPU)) if kind is LabelKind.soft else read


def batches(spec: RunSpec, kind: LabelKind, read: TrainingSet, num_steps: int = 10) -> StudentBatches:
    rows = np.arange(len(read))
    return StudentBatches(spec, kind, read, rows=rows, order_seed=5, num_steps=num_steps, group=ALONE, is_pinned=False)


SETTINGS: dict[str, tuple[LabelKind, dict[str, Any]]] = {
    "plain": (LabelKind.plain, {}),
    "hard": (LabelKind.hard, {}),
    "smoothed": (LabelKind.hard, {"label_smoothing": 0.1}),
    "soft": (LabelKind.soft, {}),
    "unsquared": (LabelKind.soft, {"temperature": 20.0, "temperature_squared": False}),
    "mse_ce": (LabelKind.soft, {"soft_loss": SoftLoss.mse_ce}),
    "cosine": (LabelKind.soft, {"soft_loss": SoftLoss.cosine, "hard_share": 0.1}),
    "blocks": (LabelKind.soft, {"blocks": [LabelKind.soft, LabelKind.hard]}),
    "remix": (LabelKind.soft, {"remix": 0.7}),
    "remix hard": (LabelKind.hard, {"remix": 0.7}),
    "remix mse_ce": (LabelKind.soft, {"remix": 0.7, "soft_loss": SoftLoss.mse_ce}),
    "clean_forward": (LabelKind.soft, {"clean_forward": True}),
    "ema": (LabelKind.soft, {"ema_decay": 0.9}),
    "sgd": (LabelKind.soft, {"optimizer": Optimizer.sgd, "lr": 0.05}),
    "cos2": (LabelKind.soft, {"schedule": Schedule.cos2}),
    "warmup": (LabelKind.soft, {"schedule": Schedule.step, "warmup": 0.3}),
    "epochs": (LabelKind.soft, {"steps": None, "epochs": 5}),
    "bf16": (LabelKind.soft, {"precision": Precision.bf16}),
    "batch of one": (LabelKind.plain, {"batch_size": 1}),
    "batch beyond the set": (LabelKind.soft, {"batch_size": 50}),
}


def test_every_setting_trains_a_student_of_its_own(spec: RunSpec) -> None:
    hashes = {}
    for name, (kind, settings) in SETTINGS.items():
        receipt = trained(varied(spec, student=settings), kind)
        hashes[name] = receipt.sha256
        entries = history(spec, kind)
        assert all(math.isfinite(entry["loss"]) for entry in entries), name
        assert [entry["step"] for entry in entries] == sorted({entry["step"] for entry in entries}), name
        assert entries[-1]["step"] == receipt.details["steps"], name
    assert not [(a, b) for a in hashes for b in hashes if a < b and hashes[a] == hashes[b]]


def test_training_again_gives_the_same_bytes_and_the_same_order(spec: RunSpec) -> None:
    varied_spec = varied(spec, student={"remix": 0.5, "ema_decay": 0.9, "clean_forward": True})
    first, second = trained(varied_spec), trained(varied_spec)
    assert first.sha256 == second.sha256
    assert first.details["files"] == second.details["files"]


def test_the_receipt_says_how_the_student_was_trained(spec: RunSpec) -> None:
    details = trained(varied(spec, student={"steps": None, "epochs": 3, "evaluate_every": 2})).details
    assert (details["steps"], details["epochs"], details["workers"]) == (4, 3.2, 1)  # 60 images in batches of 16
    assert details["best_on_test"] >= details["top1"] > 0
    assert 0 <= details["data_wait_share"] <= 1
    assert details["images_per_s"] > 0
    assert len(details["order_hash"]) == 16
    looked = [entry.get("top1") for entry in history(spec)]
    assert [value is not None for value in looked] == [True, False, True]
    assert trained(spec).details["best_on_test"] is None


def test_looking_at_the_test_images_changes_nothing(spec: RunSpec) -> None:
    looking = varied(spec, student={"evaluate_every": 1, "ema_decay": 0.5})
    assert trained(looking).sha256 == trained(varied(looking, student={"evaluate_every": None})).sha256


def test_the_published_student_is_the_average_of_the_parameters_after_each_step(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def spied(self: torch.optim.AdamW, *args: Any) -> Any:
        if not seen:
            seen.append(parameters(self))
        result = step(self, *args)
        seen.append(parameters(self))
        return result

    def parameters(optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
        flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {str(n): parameter.detach().clone() for n, parameter in enumerate(flat)}

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    trained(varied(spec, student={"steps": 2, "ema_decay": 0.75}))
    start, first, second = seen
    expected = [0.75 * (0.75 * start[n] + 0.25 * first[n]) + 0.25 * second[n] for n in start]
    published = load_file(Path(spec.run_dir, "student/soft-seed0/model.safetensors"))
    for wanted in expected:
        assert any(
            wanted.shape == found.shape and torch.allclose(wanted, found, atol=1e-6) for found in published.values()
        )
    plain = load_published(trained(varied(spec, student={"steps": 2})), spec)
    # Statistics of batch norm are copied, not averaged.
    for name in published:
        if "running" in name or "num_batches" in name:
            assert torch.equal(published[name], plain[name]), name


def load_published(receipt: Receipt, spec: RunSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(spec.run_dir, receipt.key))


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", ["blocks", "remix", "ema", "sgd", "plain"])
def test_a_training_killed_in_the_middle_of_epochs_continues_to_the_same_bytes(
    name: str, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, settings = SETTINGS[name]
    spec = varied(spec, student={**settings, "steps": 12, "batch_size": 7, "evaluate_every": 5})  # 20 images
    whole = trained(spec, kind)
    entries = history(spec, kind)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3]

    spec = varied(spec, student={"checkpoint_every": 4})
    saved: list[int] = []
    save = distill.Checkpoints

    def mortal(after: Callable[..., None], **others: Any) -> Any:
        def killed(entries: list[dict[str, Any]]) -> None:
            after(entries)
            saved.append(len(entries))
            raise Killed

        return save(after=killed, **others)

    monkeypatch.setattr(distill, "Checkpoints", mortal)
    for expected in (1, 2):  # epochs written down with the checkpoints after steps 4 and 8
        with pytest.raises(Killed):
            trained(spec, kind)
        assert saved[-1] == expected
        assert history(spec, kind) == entries[:expected]
    again = trained(spec, kind)
    assert again.sha256 == whole.sha256
    assert again.details["order_hash"] == whole.details["order_hash"]
    assert again.details["best_on_test"] == whole.details["best_on_test"]
    assert history(spec, kind) == entries
    assert not Path(spec.run_dir, f"checkpoints/student/{kind.name}-seed0.safetensors").exists()


def test_a_checkpoint_of_other_settings_is_not_continued(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = trained(varied(spec, student={"lr": 0.01}))
    save = distill.Checkpoints

    def mortal(**settings: Any) -> Any:
        def killed(entries: list[dict[str, Any]]) -> None:
            raise Killed

        return save(**{**settings, "after": killed})

    monkeypatch.setattr(distill, "Checkpoints", mortal)
    with pytest.raises(Killed):
        trained(varied(spec, student={"checkpoint_every": 4}))
    monkeypatch.undo()
    assert trained(varied(spec, student={"lr": 0.01})).sha256 == wanted.sha256


def test_a_student_that_diverges_is_an_error_that_names_its_learning_rate(spec: RunSpec) -> None:
    hopeless = varied(spec, student={"lr": 1e30, "optimizer": Optimizer.sgd, "soft_loss": SoftLoss.mse_ce})
    with pytest.raises(Diverged, match=r"student soft-seed0 \(student\.lr=1e\+30\): the loss is (nan|inf) by step"):
        trained(hopeless)


def test_a_compiled_student_is_published_under_the_plain_names(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compiling(module: Any) -> Any:
        compiled.append(module)
        return torch._dynamo.optimize("eager")(module)  # the compiler itself is torch's business, and slow

    plain = load_published(trained(spec), spec)
    monkeypatch.setattr(torch, "compile", compiling)
    eager = load_published(trained(varied(spec, student={"compile": True})), spec)
    assert len(compiled) == 1
    assert eager.keys() == plain.keys()
    assert all(torch.allclose(eager[name].float(), plain[name].float(), atol=1e-5) for name in plain)


# What is shown


def test_blocks_alternate_between_soft_and_hard_labels(spec: RunSpec) -> None:
    student = {"blocks": [LabelKind.soft, LabelKind.hard, LabelKind.soft]}
    make = batches(varied(spec, student=student), LabelKind.soft, training_set(spec), num_steps=9)
    assert [make(step).soft is not None for step in range(9)] == [True] * 3 + [False] * 3 + [True] * 3


def test_only_stored_labels_come_to_an_end(spec: RunSpec) -> None:
    read, an_epoch_a_step = training_set(spec), varied(spec, student={"batch_size": 20})

    def views(kind: LabelKind) -> int:
        make = batches(an_epoch_a_step, kind, read)
        return len({image.numpy().tobytes() for step in range(10) for image in make(step).shown})

    assert views(LabelKind.soft) <= 20 * spec.config.labels.views == 80
    assert views(LabelKind.hard) == 200, "the class is known in any view"


def test_plain_students_see_the_stored_pixels_and_hard_ones_unmixed_views(spec: RunSpec) -> None:
    read = training_set(spec)
    plain = batches(spec, LabelKind.plain, read)(0)
    stored = read.images.clean(np.arange(20))
    assert all(any(torch.equal(image, one) for one in stored) for image in plain.shown)
    hard = batches(spec, LabelKind.hard, read)(0)
    soft = batches(spec, LabelKind.soft, read)(0)
    assert hard.soft is None
    assert not torch.equal(hard.shown, soft.shown)  # of which some are mixed
    clean = batches(varied(spec, student={"clean_forward": True}), LabelKind.soft, read)(0)
    assert clean.unmixed is not None
    assert torch.equal(clean.unmixed, hard.shown)


def test_remix_pastes_and_mixes_within_the_step_at_its_own_rate(spec: RunSpec) -> None:
    read = training_set(spec)
    before = batches(spec, LabelKind.soft, read)
    after = batches(varied(spec, student={"remix": 0.5}), LabelKind.soft, read)
    mixed = [not torch.equal(before(step).shown, after(step).shown) for step in range(60)]
    assert 15 < sum(mixed) < 45
    step = mixed.index(True)
    first, second = before(step), after(step)
    assert second.classes.shape == (16, 10)
    torch.testing.assert_close(second.classes.sum(dim=1), torch.ones(16))
    own = second.classes.gather(1, first.classes[:, None]).squeeze(1)
    share = own.min().item()
    same = (second.shown == first.shown).float().mean(dim=(1, 2, 3))
    assert (same >= share - 1e-6).all(), "outside of the box every image is its own"
    assert second.soft is not None
    assert first.soft is not None
    assert not torch.equal(second.soft, first.soft)
    always = batches(varied(spec, student={"remix": 1.0}), LabelKind.plain, read)(step)
    assert always.classes.ndim == 1, "plain images stay plain"


def test_labels_made_in_the_step_are_the_stored_ones(spec: RunSpec) -> None:
    stored, online = training_set(spec), training_set(varied(spec, labels={"online": True}))
    kept = batches(spec, LabelKind.soft, stored)
    made = batches(varied(spec, labels={"online": True}), LabelKind.soft, online)
    for step in range(4):  # 20 images in batches of 16: before the views repeat
        first, second = kept(step), made(step)
        assert torch.equal(first.shown, second.shown)
        assert first.soft is not None
        assert second.soft is not None
        # fp16 keeps 11 bits: a relative 2^-11 of the largest logit, plus the rounding of another batch size.
        assert (first.soft - second.soft).abs().max() <= 2**-11 * first.soft.abs().max() + 1e-4
        assert first.order_hash == second.order_hash
    assert not torch.equal(kept(8).shown, made(8).shown), "a stored view comes again, the others go on"


def test_the_shares_of_workers_are_the_batch_of_one(spec: RunSpec) -> None:
    read = training_set(spec)
    spec = varied(spec, student={"remix": 1.0, "batch_size": 7, "clean_forward": True})
    rows = np.arange(len(read))

    def share(rank: int, size: int) -> Any:
        group = replace(ALONE, rank=rank, size=size)
        settings: Any = {"rows": rows, "order_seed": 5, "num_steps": 10, "group": group, "is_pinned": False}
        return StudentBatches(spec, LabelKind.soft, read, **settings)(3)

    whole, parts = share(0, 1), [share(rank, 3) for rank in range(3)]
    assert [part.num_images for part in parts] == [3, 2, 2]
    for rank, part in enumerate(parts):
        for name in ("shown", "unmixed", "soft", "classes"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rank::3]), name
    assert sum(part.order_hash for part in parts) % 2**64 == whole.order_hash


def test_the_order_hash_tells_step_place_image_and_view_apart() -> None:
    places, images, views = np.arange(2), np.array([7, 9], dtype=np.uint64), np.array([0, 1])
    hashes = {
        order_hash(0, places, images, views),
        order_hash(1, places, images, views),
        order_hash(0, places + 1, images, views),
        order_hash(0, places, images[::-1], views),
        order_hash(0, places, images, views[::-1]),
    }
    assert len(hashes) == 5
    split = [order_hash(0, places[n : n + 1], images[n : n + 1], views[n : n + 1]) for n in (1, 0)]
    assert sum(split) % 2**64 == order_hash(0, places, images, views)


def test_mapped_pixels_are_the_decoded_ones_and_leave_nothing(spec: RunSpec, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    store, shards = open_store(spec.run_dir), student_inputs(spec.ledger(), LabelKind.hard)
    settings: Any = {"num_images": 20, "image_bytes": 256}
    decoded = open_pixels(store, shards, in_memory_gb=1.0, **settings)
    first, second = (mapped_pixels(store, shards, folder=folder) for _ in range(2))
    (file,) = folder.glob("*.arrow")
    written = file.stat().st_mtime_ns
    indices = np.random.default_rng(0).integers(20, size=50)
    for mapped in (first, second):
        assert (len(mapped), mapped.image_size) == (20, 16)
        assert torch.equal(mapped.rows(indices), decoded.rows(indices))
    with pytest.raises(IndexError, match="expected 0"):
        first.rows(np.array([20]))
    del first, mapped
    assert file.stat().st_mtime_ns == written, "the other user still has it, and it was written once"
    del second
    assert not list(folder.iterdir())
    assert isinstance(decoded, DecodedPixels)
    assert not isinstance(open_pixels(store, shards, in_memory_gb=1e-9, **settings), DecodedPixels)


def test_a_student_on_mapped_images_is_the_same_one(spec: RunSpec) -> None:
    expected = trained(spec)
    mapped = trained(varied(spec, compute={"in_memory_gb": 0.0}))
    assert mapped.sha256 == expected.sha256
    assert mapped.details["order_hash"] == expected.details["order_hash"]


# Schedules and epochs


def test_a_batch_that_spans_epochs_ends_the_last_of_them() -> None:
    course = Course(
        name="", num_steps=4, num_images=20, batch_size=50, lr_of_step=lambda step: 0.1, weight_decay=0.0, seed=0
    )
    assert [course.ends_epoch(step) for step in range(4)] == [1, 4, 6, 9]
    assert [replace(course, batch_size=16).ends_epoch(step) for step in range(4)] == [None, 0, 1, 2]
    assert [replace(course, batch_size=8, num_steps=3).ends_epoch(step) for step in range(3)] == [None, None, 0]


def test_the_learning_rate_rises_then_follows_its_schedule(spec: RunSpec) -> None:
    config = varied(spec, student={"warmup": 0.2, "schedule": Schedule.cosine}).config
    rates = [student_lr(config, 2.0, step=step, total=10) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)


# Search for a learning rate


@pytest.mark.parametrize("validation", list(Validation))
def test_a_search_judges_each_rate_on_images_of_its_split_and_never_on_test_images(
    validation: Validation, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = varied(spec, student={"lr_grid": [0.005, 1e30], "optimizer": Optimizer.sgd, "validation": validation})
    images = PreparedDataset.images

    def guarded(self: PreparedDataset, split: Any, *args: Any) -> np.ndarray:
        assert split != "test", "a search looked at the test images"
        return images(self, split, *args)

    monkeypatch.setattr(PreparedDataset, "images", guarded)
    monkeypatch.setattr(distill, "measured_accuracy", lambda *_: pytest.fail("a search was tested"))
    worker = Distiller()
    items = [SearchItem(spec, LabelKind.soft, lr) for lr in (0.005, 1e30)]
    for item in items:
        assert not item.is_done
        worker.search(item)
        assert item.is_done
    results = [json.loads(Path(spec.run_dir, item.key).read_text()) for item in items]
    assert [result["diverged"] for result in results] == [False, True]
    assert results[1]["top1"] == 0.0
    expected = (
        10 if validation is Validation.synthetic else sum(min(100, n - 2) for n in spec.dataset().counts["train"])
    )
    assert {result["num_images"] for result in results} == {expected}
    assert {result["validation"] for result in results} == {validation.name}
    assert chosen_lr(spec, LabelKind.soft) == 0.005
    assert not Path(spec.run_dir, "checkpoints/search").exists()


def test_a_real_validation_split_holds_the_last_images_that_nothing_started_from(spec: RunSpec) -> None:
    split = validation_split(varied(spec, student={"validation_images": 3}), training_set(spec, LabelKind.hard))
    assert np.bincount(split.class_ids).tolist() == [3] * 10
    last = np.concatenate([rows[-3:] for rows in spec.dataset().rows_by_class("train")])
    assert np.array_equal(split.pixels(np.arange(30)).numpy(), spec.dataset().images("train", last))
    assert split.rows.tolist() == list(range(20))


def test_a_synthetic_validation_split_is_not_trained_on(spec: RunSpec) -> None:
    read = training_set(spec, LabelKind.hard)
    split = validation_split(varied(spec, student={"validation": Validation.synthetic}), read)
    held_out = np.setdiff1d(np.arange(20), split.rows)
    assert np.bincount(split.class_ids).tolist() == [1] * 10
    assert all(read.images.image_ids[row].endswith("000001") for row in held_out)  # the last of each class


def test_too_few_images_for_a_split_are_refused_by_class(spec: RunSpec) -> None:
    read = training_set(spec, LabelKind.hard)
    halved = replace(read, units=read.units[:2])
    with pytest.raises(InputError, match=r"student\.validation=synthetic: class '0' has 1 synthetic"):
        validation_split(varied(spec, student={"validation": Validation.synthetic}), halved)
    (image, *_) = read.units[0].images
    every = [replace(image, source_row=row) for row in range(spec.dataset().num_images("train"))]
    all_used = replace(read, units=[replace(read.units[0], images=tuple(every))])
    with pytest.raises(InputError, match=r"student\.validation=training: class '0' has no real training image"):
        validation_split(spec, all_used)
