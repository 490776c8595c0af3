"""Distill: a student trained on the synthetic images of a run with one kind of labels, tested on real ones."""

import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_ray.config import Config, LabelKind, Schedule, SoftLoss, config_hash, content_hash
from prism_ray.errors import PrismError, within
from prism_ray.ledger import Ledger, Receipt, read_table
from prism_ray.lock import check_epoch
from prism_ray.methods.distillation import batch_of_step, hard_loss, kl_loss, mse_ce_loss
from prism_ray.methods.schedules import cosine_lr, half_cosine_factor
from prism_ray.methods.soft_labels import decode_fp16
from prism_ray.models.classifier import Classifier, build_classifier, save_classifier
from prism_ray.plan import Unit
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, pick_device
from prism_ray.stages.training import fit, num_parameters, test_accuracy
from prism_ray.stages.views import ImageSet, views_hash
from prism_ray.storage import TEMPORARY, publish_folder, sha256_of_file
from prism_ray.work import DISTILL, RunSpec, StudentItem, student_inputs


class Distiller:
    """Trains students one after another; keeps the training set of the last one, which the next usually shares."""

    def __init__(self) -> None:
        self._held: tuple[tuple[str, bool, dict[str, str]], tuple[ImageSet, Tensor | None]] | None = None

    def train(self, item: StudentItem) -> None:
        """Train, test and publish one student; nothing to do if its receipt fits today's inputs."""
        spec, config = item.spec, item.spec.config
        ledger = spec.ledger()
        if item.is_done:
            return
        inputs = student_inputs(ledger, item.labels)
        device = pick_device(config.compute.gpus_per_train_worker)
        checkpoint = ledger.store.path(f"checkpoints/student/{item.name}.safetensors")
        started = time.perf_counter()
        with deterministic(config.compute.threads):
            classifier = self._trained(item, inputs, checkpoint, device)
            seconds = time.perf_counter() - started
            accuracy = test_accuracy(classifier, spec.dataset(), device)
        facts = {
            "top1": accuracy,
            "steps": config.student.steps,
            "seed": item.seed,
            "labels": item.labels.name,
            "num_params": num_parameters(classifier),
            "architecture": classifier.architecture,
        }
        _publish(item, classifier, facts, inputs=inputs, seconds=seconds, fingerprint=fingerprint(device))
        checkpoint.unlink(missing_ok=True)

    def _trained(self, item: StudentItem, inputs: dict[str, str], checkpoint: Path, device: torch.device) -> Classifier:
        config, student = item.spec.config, item.spec.config.student
        dataset = item.spec.dataset()
        images, logits = self._training_set(item, inputs)
        with within("student"):
            classifier = build_classifier(
                student.arch,
                num_classes=dataset.num_classes,
                in_chans=dataset.channels,
                image_size=dataset.image_size,
                mean=dataset.mean,
                std=dataset.std,
                model_args=student.model_args,
                # Not of the method or the label kind: students of one seed start alike in every row of a table.
                seed=seed_for(config.seed, "student", item.seed),
            ).to(device)
        order_seed = seed_for(config.seed, "student order", item.seed)

        def loss_of_step(step: int) -> Tensor:
            indices, epochs = batch_of_step(order_seed, step, num_images=len(images), batch_size=student.batch_size)
            views = epochs % config.labels.views
            class_ids = images.class_ids[torch.from_numpy(indices)].to(device)
            answer = classifier(images.views(indices, views, mix=logits is not None).to(device))
            if logits is None:
                return hard_loss(answer, class_ids)
            target = logits[torch.from_numpy(indices), torch.from_numpy(views)].to(device).float()
            return soft_loss(config, answer, target, class_ids)

        fit(
            classifier,
            loss_of_step=loss_of_step,
            lr_of_step=lambda step: student_lr(config, step),
            num_steps=student.steps,
            weight_decay=student.weight_decay,
            seed=order_seed,
            checkpoint_path=checkpoint,
            checkpoint_every=student.checkpoint_every,
            identity=content_hash([config_hash(config), item.name, inputs]),
            after_checkpoint=lambda: check_epoch(item.spec.ledger().store, item.spec.epoch),
        )
        return classifier

    def _training_set(self, item: StudentItem, inputs: dict[str, str]) -> tuple[ImageSet, Tensor | None]:
        """Images of the run and their stored logits (N, V, K) float16, None for hard labels."""
        key = (item.spec.run_dir, item.labels is LabelKind.soft, inputs)
        if self._held is None or self._held[0] != key:
            self._held = (key, _read_training_set(item.spec, inputs, with_labels=item.labels is LabelKind.soft))
        return self._held[1]


def _read_training_set(spec: RunSpec, inputs: dict[str, str], *, with_labels: bool) -> tuple[ImageSet, Tensor | None]:
    ledger, config = spec.ledger(), spec.config
    units = [unit for unit in spec.units() if f"images/{unit.name}.parquet" in inputs]
    if not units:
        raise PrismError(
            f"{spec.run_dir}: no image shard to learn from; run the stages before, or see prism-ray status for what "
            "was quarantined"
        )
    tables = [read_table(ledger.store, f"images/{unit.name}.parquet") for unit in units]
    images = ImageSet(units, tables, config.labels, config.seed)
    return images, _logits(ledger, config, units, images) if with_labels else None


def _publish(
    item: StudentItem,
    classifier: Classifier,
    facts: dict[str, Any],
    *,
    inputs: dict[str, str],
    seconds: float,
    fingerprint: str,
) -> None:
    """The student's folder in timm's local-dir form, then its receipt."""
    ledger = item.spec.ledger()
    key = f"student/{item.name}"
    built = ledger.store.path(f"{TEMPORARY}/{uuid.uuid4().hex}")
    try:
        save_classifier(classifier, built, class_names=item.spec.dataset().class_names, extra=facts)
        weights = built / "model.safetensors"
        receipt = Receipt(
            stage=DISTILL,
            name=item.name,
            unit_id=content_hash([config_hash(item.spec.config), item.name]),
            key=f"{key}/model.safetensors",
            rows=1,
            bytes=weights.stat().st_size,
            sha256=sha256_of_file(weights),
            seconds=seconds,
            inputs=inputs,
            fingerprint=fingerprint,
            details={**facts, "files": {path.name: sha256_of_file(path) for path in sorted(built.iterdir())}},
        )
        check_epoch(ledger.store, item.spec.epoch)
        ledger.store.remove(key)  # trained from other inputs, or left without a receipt
        ledger.store.path(key).parent.mkdir(parents=True, exist_ok=True)
        publish_folder(built, ledger.store.path(key))
        ledger.write_receipt(receipt)
    finally:
        shutil.rmtree(built, ignore_errors=True)


def student_lr(config: Config, step: int) -> float:
    """Learning rate of a step under the student's schedule."""
    student = config.student
    if student.schedule is Schedule.cosine:
        return cosine_lr(student.lr, step=step, total=student.steps)
    return student.lr * half_cosine_factor(step, student.steps)


def soft_loss(config: Config, answer: Tensor, target: Tensor, class_ids: Tensor) -> Tensor:
    """Loss of a student's logits (B, K) against the label teachers'."""
    student = config.student
    if student.soft_loss is SoftLoss.kl:
        return kl_loss(answer, target, temperature=student.temperature)
    return mse_ce_loss(answer, target, class_ids, ce_weight=student.ce_weight)


def _logits(ledger: Ledger, config: Config, units: Sequence[Unit], images: ImageSet) -> Tensor:
    expected = views_hash(config.labels, config.seed)
    parts = []
    for unit in units:
        table = read_table(ledger.store, f"labels/{unit.name}.parquet")
        metadata = table.schema.metadata or {}
        if metadata.get(b"prism_ray.views_hash", b"").decode() != expected:
            raise PrismError(f"labels/{unit.name}.parquet: its views were drawn by other settings; run relabel again")
        num_classes = int(metadata[b"prism_ray.num_classes"])
        logits = decode_fp16(table["logits"].to_pylist(), num_classes).half()
        parts.append(logits.view(len(unit.images), config.labels.views, num_classes))
        wanted = np.repeat([image.image_id for image in unit.images], config.labels.views).tolist()
        if table["image_id"].to_pylist() != wanted:
            raise PrismError(f"labels/{unit.name}.parquet: does not belong to its images; run verify, then run again")
    assert sum(len(part) for part in parts) == len(images)
    return torch.cat(parts)
