"""The one training loop: teachers and students differ in the batch of a step and its loss."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prism_ray.data.prepared import PreparedDataset
from prism_ray.errors import PrismError
from prism_ray.methods.distillation import parameter_groups
from prism_ray.methods.metrics import top1
from prism_ray.models.checkpoint import load_checkpoint, save_checkpoint
from prism_ray.models.classifier import Classifier
from prism_ray.seeds import seed_for

EVALUATION_BATCH = 512


def fit(
    classifier: Classifier,
    *,
    loss_of_step: Callable[[int], Tensor],
    lr_of_step: Callable[[int], float],
    num_steps: int,
    weight_decay: float,
    seed: int,
    checkpoint_path: Path,
    checkpoint_every: int,
    identity: str,
    after_checkpoint: Callable[[], None] = lambda: None,
) -> float:
    """Train in place with AdamW; a killed training continues from its checkpoint, bit for bit.

    Args:
        loss_of_step: step → scalar loss; draws nothing but what the step's number decides.
        lr_of_step: step → learning rate.
        seed: of what the network itself draws in a step (dropout), reseeded at every step.
        checkpoint_path: file of the state, replaced as a whole, removed by the caller.
        identity: what is being trained; a checkpoint of anything else is ignored.
        after_checkpoint: called after each checkpoint; may raise to stop.

    Returns:
        Loss of the last step.

    Raises:
        PrismError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameter_groups(classifier, weight_decay=weight_decay), lr=lr_of_step(0))
    first = _resume(checkpoint_path, classifier, optimizer, identity)
    classifier.train()
    loss = torch.tensor(float("nan"))
    for step in range(first, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_of_step(step)
        with torch.random.fork_rng():
            torch.manual_seed(seed_for(seed, "step", step))
            loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % checkpoint_every == 0 and step + 1 < num_steps:
            save_checkpoint(
                checkpoint_path, module=classifier, optimizer=optimizer, step=step + 1, extra={"identity": identity}
            )
            after_checkpoint()
    classifier.eval()
    if not torch.isfinite(loss) and first < num_steps:
        raise PrismError(f"{identity}: training diverged (loss {loss.item()}); lower the learning rate")
    return loss.item()


def _resume(path: Path, classifier: Classifier, optimizer: torch.optim.Optimizer, identity: str) -> int:
    """Steps already taken: restored from a checkpoint of the same training, else 0 and nothing changed."""
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    try:
        step, extra = load_checkpoint(path, module=classifier, optimizer=optimizer)
    except FileNotFoundError:
        return 0
    if extra.get("identity") == identity:
        return step
    classifier.load_state_dict(before)
    optimizer.state.clear()
    return 0


@torch.no_grad()
def test_accuracy(classifier: Classifier, dataset: PreparedDataset, device: torch.device) -> float:
    """Top-1 on the real held-out images, 0 to 1."""
    labels = torch.tensor(dataset.labels("test"))
    logits = []
    for start in range(0, len(labels), EVALUATION_BATCH):
        rows = np.arange(start, min(start + EVALUATION_BATCH, len(labels)))
        images = torch.from_numpy(dataset.images("test", rows)).to(device).float() / 255
        logits.append(classifier(images).cpu())
    return top1(torch.cat(logits), labels)


def num_parameters(classifier: Classifier) -> int:
    """Trainable parameters of the network."""
    return sum(parameter.numel() for parameter in classifier.network.parameters())
