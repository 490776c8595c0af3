import math

import numpy as np
import pytest
import torch
from torch import nn

from prism_ray.methods.distillation import (
    batch_of_step,
    epoch_order,
    hard_loss,
    kl_loss,
    mse_ce_loss,
    parameter_groups,
)


def test_kl_loss_is_the_divergence_written_out_times_the_temperature_squared():
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = torch.softmax(teacher / 3, dim=1), torch.softmax(student / 3, dim=1)
    expected = 9 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(kl_loss(student, teacher, temperature=3), expected)


def test_kl_loss_by_hand():
    # Teacher (1/4, 3/4), student (1/2, 1/2): 1/4 ln(1/2) + 3/4 ln(3/2).
    teacher = torch.tensor([[0.0, math.log(3)]])
    loss = kl_loss(torch.zeros(1, 2), teacher, temperature=1)
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)


def test_kl_loss_is_zero_for_equal_logits_and_ignores_a_shift():
    logits = torch.randn(3, 7, dtype=torch.float64)
    assert kl_loss(logits, logits, temperature=4).item() == pytest.approx(0, abs=1e-12)
    assert kl_loss(logits + 5, logits - 2, temperature=4).item() == pytest.approx(0, abs=1e-12)


def test_kl_loss_stays_finite_for_confident_teachers():
    student = torch.tensor([[0.0, 500.0]], requires_grad=True)
    loss = kl_loss(student, torch.tensor([[500.0, 0.0]]), temperature=1)
    loss.backward()
    assert loss.item() == pytest.approx(500)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_kl_loss_gradient_matches_finite_differences():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: kl_loss(s, teacher, temperature=2.5), student)


def test_mse_ce_loss_adds_the_weighted_cross_entropy():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    loss = mse_ce_loss(student, teacher, torch.tensor([1]), ce_weight=0.1)
    assert loss.item() == pytest.approx((1 + 4) / 2 + 0.1 * math.log(1 + math.e), rel=1e-6)


def test_hard_loss_is_cross_entropy():
    assert hard_loss(torch.zeros(2, 10), torch.tensor([3, 7])).item() == pytest.approx(math.log(10), rel=1e-6)


def test_logits_of_different_shape_are_refused_instead_of_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        kl_loss(torch.zeros(4, 10), torch.zeros(1, 10), temperature=1)
    with pytest.raises(ValueError, match="differ in shape"):
        mse_ce_loss(torch.zeros(4, 10), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), ce_weight=0)


def test_biases_and_one_dimensional_parameters_do_not_decay():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    decayed, kept = parameter_groups(module, weight_decay=0.01)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert len(kept["params"]) == 4


def test_frozen_parameters_are_in_no_group_and_the_others_in_one():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    grouped = [id(p) for group in parameter_groups(module, weight_decay=0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module[1].parameters())


@pytest.mark.parametrize("num_images", [1, 2, 97])
def test_an_epoch_visits_every_image_once(num_images):
    assert sorted(epoch_order(5, 3, num_images).tolist()) == list(range(num_images))


def test_epochs_and_seeds_have_their_own_order():
    orders = {tuple(epoch_order(seed, epoch, 20).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert epoch_order(2**63 - 1, 0, 5).tolist() == epoch_order(2**63 - 1, 0, 5).tolist()


def test_the_shared_order_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 4)[0] = 1


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 25])
def test_steps_walk_through_the_epochs_without_a_gap(batch_size):
    steps = [batch_of_step(9, step, num_images=10, batch_size=batch_size) for step in range(30)]
    visited = np.concatenate([indices for indices, _ in steps])
    epochs = np.concatenate([epochs for _, epochs in steps])
    assert epochs.tolist() == [place // 10 for place in range(30 * batch_size)]
    for epoch in range(30 * batch_size // 10):
        assert visited[epochs == epoch].tolist() == epoch_order(9, epoch, 10).tolist()


def test_a_step_is_found_without_the_steps_before_it():
    late, _ = batch_of_step(1, 10**6, num_images=100, batch_size=32)
    epoch, place = divmod(32 * 10**6, 100)
    assert late.tolist() == epoch_order(1, epoch, 100)[place : place + 32].tolist()


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="from 0 images"):
        batch_of_step(0, 0, num_images=0, batch_size=4)
