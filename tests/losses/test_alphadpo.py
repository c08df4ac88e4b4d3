"""α-DPO (arXiv 2410.10148)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import AlphaDPOLoss, SimPOLoss

# Lengths 2 and 4, 1 and 2. Means −1 and −2 of the chosen, −3 and −2 of the rejected; log-ratios per token are 2 and 1,
# 0 and 1, so M is 2 and 0.
PAIRS = tiny.logps([-2.0, -8.0], [-3.0, -4.0], [-6.0, -12.0], [-3.0, -6.0], lengths=([2, 4], [1, 2]))


def _after(loss, *batches):
    state = loss.initial_state()
    for batch in batches:
        state = loss.next_state(state, loss.sums(batch))
    return PAIRS._replace(state=state)


@pytest.mark.parametrize("z_momentum", [0.0, 0.9])
def test_value_by_hand(z_momentum):
    """M has mean 1 and deviation 1, so z is 1 and −1: 2·(−1 + 3 − 0.3) − 0.5 and 2·(−2 + 2 + 0.3) − 0.5."""
    loss = AlphaDPOLoss(2.0, gamma=0.5, z_weight=0.3, z_momentum=z_momentum)
    expected = [math.log1p(math.exp(-2.9)), math.log1p(math.exp(-0.1))]
    assert loss(_after(loss, PAIRS)).tolist() == pytest.approx(expected)


def test_running_means_by_hand():
    """Batches of M 2 and 0, then 5 alone, at momentum 0.8: weights 0.16 and 0.2 of 0.36 in all."""
    other = tiny.logps([-1.0], [-6.0], [-1.0], [-1.0])
    loss = AlphaDPOLoss(2.0, gamma=0.5, z_weight=0.3, z_momentum=0.8)
    mean, square = (0.16 * 1 + 0.2 * 5) / 0.36, (0.16 * 2 + 0.2 * 25) / 0.36
    deviation = math.sqrt(square - mean**2)
    expected = [0.5 + 0.6 * (gap - mean) / deviation for gap in (2, 0)]
    assert loss.target(_after(loss, PAIRS, other)).tolist() == pytest.approx(expected)


def test_it_is_the_authors_code_once_the_running_means_have_warmed_up():
    """Theirs: −log σ(β·(ℓ̄_w − ℓ̄_l − (α·(M − mean)/std + γ/β))); mean and std of momentum 0.9, from 0 on.

    Their std is of n − 1, so at 200 pairs z differs by a quarter of a percent.
    """
    beta, ratio, alpha, mean, std = 2.5, 0.6, 0.2, 0.0, 0.0
    draw = torch.Generator().manual_seed(0)
    chosen, rejected, *references = (-torch.rand(200, generator=draw, dtype=torch.float64) for _ in range(4))
    gaps = (chosen - rejected) - (references[0] - references[1])
    for _ in range(300):
        mean, std = 0.9 * mean + 0.1 * gaps.mean(), 0.9 * std + 0.1 * torch.std(gaps)
    logits = (chosen - rejected) - ((gaps - mean) / std * alpha + ratio)
    pairs = tiny.logps(*(one.tolist() for one in (chosen, rejected, *references)))
    loss = AlphaDPOLoss(beta, gamma=beta * ratio, z_weight=alpha)
    pairs = pairs._replace(state=_after(loss, *[pairs] * 300).state)
    torch.testing.assert_close(loss(pairs), -torch.nn.functional.logsigmoid(beta * logits), rtol=3e-3, atol=0)


def test_the_target_has_no_gradient():
    """−β·σ(−z)/n_w at the values above."""
    loss = AlphaDPOLoss(2.0, gamma=0.5, z_weight=0.3)
    pairs = _after(loss, PAIRS).detach()
    total = pairs.policy_chosen.total.requires_grad_()
    loss(pairs).sum().backward()
    assert total.grad.tolist() == pytest.approx([-2 / (1 + math.exp(2.9)) / 2, -2 / (1 + math.exp(0.1)) / 4])


def test_without_any_spread_it_is_simpo():
    """Before the first batch; at the reference; a batch of one pair, at momentum 0."""
    loss, simpo = AlphaDPOLoss(2.0, gamma=0.5), SimPOLoss(2.0, gamma=0.5)
    torch.testing.assert_close(loss(_after(loss)), simpo(PAIRS))
    start = PAIRS._replace(reference_chosen=PAIRS.policy_chosen, reference_rejected=PAIRS.policy_rejected)
    torch.testing.assert_close(loss(start._replace(state=_after(loss, start).state)), simpo(PAIRS))
    alone, loss = tiny.logps([-0.7], [-1.9], [-0.1], [-0.3]), AlphaDPOLoss(2.0, gamma=0.5, z_momentum=0.0)
    pairs = alone._replace(state=_after(loss, alone).state)
    torch.testing.assert_close(loss(pairs), simpo(alone), rtol=1e-6, atol=0)


def test_batches_of_one_pair_have_a_spread_over_time():
    loss = AlphaDPOLoss()
    ones = [tiny.logps([-1.0], [-1.0 - gap], [-1.0], [-1.0]) for gap in (1.0, 3.0, 1.0, 3.0)]
    low, high = (loss.target(one._replace(state=_after(loss, *ones).state)).item() for one in ones[:2])
    assert low < loss.gamma < high


def test_bad_arguments_are_refused_by_name():
    for name, values in {"gamma": [-0.1], "z_weight": [0.0, -0.1, math.inf], "z_momentum": [-0.1, 1.0]}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}`"):
                AlphaDPOLoss(**{name: value})
