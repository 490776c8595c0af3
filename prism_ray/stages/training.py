"""The one training loop: teachers, students and generators differ in the batch of a step and its loss."""

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from prism_ray.artifacts import StoredFile
from prism_ray.data.prepared import PreparedDataset
from prism_ray.drain import should_stop
from prism_ray.errors import PrismError
from prism_ray.methods.distillation import make_optimizer
from prism_ray.methods.metrics import confusion, top1
from prism_ray.models.checkpoint import load_checkpoint, read_extra, save_checkpoint
from prism_ray.models.classifier import Classifier
from prism_ray.seeds import seed_for
from prism_ray.stages.data_parallel import ALONE, Group
from prism_ray.stages.device import compile_here

WARM_UP = 0.2
"""Share of the steps over which the learning rate rises; assumed, as usual for one-cycle schedules."""

EVALUATION_BATCH = 512
MOST_CONFUSED = 100
"""Classes up to which it is written down what each is taken for."""
AHEAD = 2
"""Batches prepared before they are asked for, where a background thread prepares them."""


class Diverged(PrismError):
    """The loss of a training is no longer finite."""


class Batch(Protocol):
    """One worker's share of a step's images, ready to be shown."""

    @property
    def num_images(self) -> int: ...

    @property
    def order_hash(self) -> int:
        """Which images took which places: integers from 0 to 2^64 - 1 that are summed over steps and workers."""
        ...


B = TypeVar("B", bound=Batch)
N = TypeVar("N", bound=nn.Module)
Forward = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a network is trained: all that decides its bytes, next to its batches and their loss."""

    name: str  # what is trained and at which learning rate, for messages
    num_steps: int
    num_images: int  # of the training set, so that epochs can be told apart
    batch_size: int  # images per step, over all workers
    lr_of_step: Callable[[int], float]
    optimizer: str = "adamw"  # a name of `methods.distillation.OPTIMIZERS`
    weight_decay: float
    seed: int  # of what the network itself draws in a step (dropout), reseeded at every step
    ema_decay: float = 0.0  # of the averaged parameters that are kept; 0: the trained ones are
    bfloat16: bool = False  # where autocast allows it, in the forward pass
    compiled: bool = False  # the forward pass, by torch.compile

    def ends_epoch(self, step: int) -> int | None:
        """Number, from 0, of the epoch that a step ends, if any: the last one if it ends several.

        The last step ends the epoch under way, however short it is.
        """
        before, after = (step * self.batch_size // self.num_images, (step + 1) * self.batch_size // self.num_images)
        if after > before:
            return after - 1
        return after if step + 1 == self.num_steps else None


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often a training's state is kept."""

    file: StoredFile  # replaced as a whole, removed by the caller
    every: int  # steps
    identity: str  # of what is being trained; a checkpoint of anything else is ignored
    keep_last: bool = False  # also at the end, where other trainings follow before anything is published
    after: Callable[[list[dict[str, Any]]], None] = lambda history: None  # gets the epochs so far; may raise to stop


@dataclass
class Record:
    """What is known of a training so far; part of its checkpoint, so that no epoch is told twice or missing."""

    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per epoch
    order_hash: int = 0  # of all workers
    best_top1: float | None = None  # highest of the looks at the test images
    seconds: float = 0.0  # in steps, without looks and checkpoints
    wait_s: float = 0.0  # of those, until the batch was there
    images: int = 0
    epoch_loss: float = 0.0  # sums over the steps of the epoch under way
    epoch_steps: int = 0
    epoch_seconds: float = 0.0
    epoch_wait_s: float = 0.0
    epoch_top1: float | None = None

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait_share(self) -> float:
        return self.wait_s / max(self.seconds, 1e-9)

    def add_step(self, images: int, *, seconds: float, wait_s: float) -> None:
        self.images += images
        self.seconds += seconds
        self.wait_s += wait_s
        self.epoch_steps += 1
        self.epoch_seconds += seconds
        self.epoch_wait_s += wait_s

    def add_sums(self, loss: float, order_hash: int) -> None:
        """Sums over the steps since the last call, of all workers."""
        self.epoch_loss += loss
        self.order_hash = (self.order_hash + order_hash) % 2**64

    def add_look(self, top1: float) -> None:
        self.epoch_top1 = top1
        self.best_top1 = max(top1, self.best_top1 or 0.0)

    def end_epoch(self, epoch: int, *, step: int, lr: float, batch_size: int) -> None:
        """Write the epoch under way down and begin the next."""
        entry: dict[str, Any] = {"epoch": epoch, "step": step, "lr": lr, "loss": self.epoch_loss / self.epoch_steps}
        if self.epoch_top1 is not None:
            entry["top1"] = self.epoch_top1
        seconds = max(self.epoch_seconds, 1e-9)
        entry["images_per_s"] = round(self.epoch_steps * batch_size / seconds, 1)
        entry["data_wait_share"] = round(self.epoch_wait_s / seconds, 4)
        self.history.append(entry)
        self.epoch_loss, self.epoch_steps, self.epoch_top1 = 0.0, 0, None
        self.epoch_seconds, self.epoch_wait_s = 0.0, 0.0


def fit(
    network: N,
    course: Course,
    *,
    prepare: Callable[[int], B],
    loss_of: Callable[[Forward, B], Tensor],
    checkpoints: Checkpoints,
    evaluate: Callable[[N], float] | None = None,
    evaluate_every: int | None = None,
    in_background: bool = False,
    group: Group = ALONE,
) -> tuple[N, Record]:
    """Train in place; a killed training continues from its checkpoint, bit for bit.

    Args:
        prepare: step → this worker's share of its batch; draws nothing but what the step's number decides.
        loss_of: (forward pass, batch) → mean loss over the share.
        evaluate: network → top-1 on test images, 0 to 1; called every `evaluate_every` steps, changes nothing.
        in_background: prepare batches ahead, in a thread of their own.
        group: workers that train this network together; one alone also keeps a checkpoint when its node gives notice.

    Returns:
        The network to keep, in eval mode: the trained one, or that of the averaged parameters; and the record.

    Raises:
        Diverged: the loss is not finite. Looked at when an epoch ends, when a checkpoint is due, and at the end: to ask
            the device in every step would have it wait for us.
    """
    device = next(network.parameters()).device
    optimizer = make_optimizer(course.optimizer, network, lr=course.lr_of_step(0), weight_decay=course.weight_decay)
    # Parameters are averaged, buffers (batch-norm statistics) copied.
    average = ModelEmaV3(network, decay=course.ema_decay, exclude_buffers=True) if course.ema_decay else None
    kept = network if average is None else cast(N, average.module)
    state = {"module": network, "optimizer": optimizer, "average": None if average is None else kept}
    first, record = _resumed(checkpoints, state)
    is_leaving = False  # seen once is enough: from here on only the steps until the node leaves are done again
    group.check_same(first, device)
    with (
        group.joint_batch_norm(network),
        closing(_prepared(prepare, first, course.num_steps, ahead=AHEAD if in_background else 0)) as batches,
    ):
        forward = _forward(network, course, group, device)
        network.train()
        losses, order_hash = torch.zeros((), dtype=torch.float64, device=device), 0
        for step in range(first, course.num_steps):
            began = time.perf_counter()
            batch = next(batches)
            wait_s = time.perf_counter() - began
            for parameters in optimizer.param_groups:
                parameters["lr"] = course.lr_of_step(step)
            with torch.random.fork_rng():
                torch.manual_seed(seed_for(course.seed, "step", step, *([group.rank] if group.rank else [])))
                loss = loss_of(forward, batch)
            if group.size > 1:
                loss = loss * group.loss_scale(batch.num_images, of=course.batch_size)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if average is not None:
                average.update(network)
            losses += loss.detach().double() / group.size
            order_hash += batch.order_hash

            epoch = course.ends_epoch(step)
            is_last = step + 1 == course.num_steps
            is_due = checkpoints.keep_last if is_last else (step + 1) % checkpoints.every == 0
            if group.size == 1 and not is_leaving and not is_last and should_stop():
                is_leaving = is_due = True
            if is_due or epoch is not None:
                record.add_sums(group.summed(losses).item(), group.summed_hash(order_hash % 2**64, device))
                losses, order_hash = torch.zeros_like(losses), 0
                _check_finite(record.epoch_loss, course, step)
            record.add_step(course.batch_size, seconds=time.perf_counter() - began, wait_s=wait_s)
            if evaluate is not None and evaluate_every and (step + 1) % evaluate_every == 0 and group.is_first:
                record.add_look(evaluate(kept.eval()))
                network.train()
            if epoch is not None:
                record.end_epoch(epoch, step=step + 1, lr=course.lr_of_step(step), batch_size=course.batch_size)
            if is_due and group.is_first:
                extra = {"identity": checkpoints.identity, "record": asdict(record)}
                with checkpoints.file.writing() as path:
                    save_checkpoint(path, **state, step=step + 1, extra=extra)
                checkpoints.after(record.history)
    network.eval()
    return kept.eval(), record


def _forward(network: nn.Module, course: Course, group: Group, device: torch.device) -> Forward:
    """The forward pass of a training; what is saved stays the plain module."""
    wrapped: Any = group.wrapped(network)
    if course.compiled:
        compile_here()
        wrapped = torch.compile(wrapped)

    def forward(*inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=course.bfloat16):
            output = wrapped(*inputs)
        return output.float()  # losses are computed in single precision

    return forward


def _prepared(prepare: Callable[[int], B], first: int, num_steps: int, *, ahead: int) -> Generator[B, None, None]:
    """Batches of the steps in order, some ahead in a background thread, none for `ahead` 0; the same either way."""
    if not ahead:
        yield from map(prepare, range(first, num_steps))
        return
    # A thread begins with as many compute threads as the machine has, which could change the bytes.
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, "prepare", initializer=torch.set_num_threads, initargs=(threads,))
    try:
        steps = iter(range(first, num_steps))
        pending = deque(pool.submit(prepare, step) for step in islice(steps, ahead))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(prepare, step) for step in islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _resumed(checkpoints: Checkpoints, state: dict[str, Any]) -> tuple[int, Record]:
    """Steps already taken and their record: restored from a checkpoint of this training, else none."""
    step, record = 0, Record()
    with checkpoints.file.reading() as path:
        extra = read_extra(path)
        if extra is not None and extra.get("identity") == checkpoints.identity:
            step, extra = load_checkpoint(path, **state)
            record = Record(**extra["record"])
    return step, record


def _check_finite(loss: float, course: Course, step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"{course.name}: the loss is {loss} by step {step + 1}; lower the learning rate")


def one_cycle_lr(lr: float, *, step: int, total: int) -> float:
    """Linear rise from 0.04 lr over the warm-up, then a cosine to 0."""
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return lr * (0.04 + 0.96 * step / rise)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def test_accuracy(classifier: Classifier, dataset: PreparedDataset, device: torch.device) -> float:
    """Top-1 on the real held-out images, 0 to 1."""
    labels = dataset.labels("test")
    return accuracy(classifier, lambda rows: torch.from_numpy(dataset.images("test", rows)), labels, device)


@torch.no_grad()
def accuracy(
    classifier: Callable[[Tensor], Tensor],
    pixels: Callable[[np.ndarray], Tensor],
    class_ids: np.ndarray,
    device: torch.device,
) -> float:
    """Top-1, 0 to 1, on images given as rows → uint8 (B, C, H, W)."""
    return top1(in_batches(classifier, pixels, len(class_ids), device), torch.tensor(class_ids))


def confusion_of(
    classifier: Callable[[Tensor], Tensor],
    pixels: Callable[[np.ndarray], np.ndarray],
    class_ids: np.ndarray,
    device: torch.device,
) -> list[list[int]] | None:
    """What images, given as rows → uint8 (B, C, H, W), are taken for: for each class, how many for which.

    None of more than `MOST_CONFUSED` classes, of which a table shows nothing.
    """
    if len(np.unique(class_ids)) > MOST_CONFUSED:
        return None
    logits = in_batches(classifier, lambda rows: torch.from_numpy(pixels(rows)), len(class_ids), device)
    return confusion(logits, torch.tensor(class_ids)).tolist() if logits.shape[1] <= MOST_CONFUSED else None


@torch.no_grad()
def in_batches(
    network: Callable[[Tensor], Tensor], pixels: Callable[[np.ndarray], Tensor], num_images: int, device: torch.device
) -> Tensor:
    """What a network makes of so many images, given as rows → uint8 (B, C, H, W): (N, …) on the CPU, N at least 1."""
    parts = []
    for start in range(0, num_images, EVALUATION_BATCH):
        rows = np.arange(start, min(start + EVALUATION_BATCH, num_images))
        parts.append(network(pixels(rows).to(device).float() / 255).cpu())
    return torch.cat(parts)


def num_parameters(classifier: Classifier) -> int:
    """Trainable parameters of the network."""
    return sum(parameter.numel() for parameter in classifier.network.parameters())
