"""ODPO (arXiv 2402.10571)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, ODPOLoss


def _pairs(*scores: float):
    return tiny.at_margin(*[5.0] * len(scores))._replace(columns={"score_margin": torch.tensor(scores)})


@pytest.mark.parametrize(("scale", "offsets"), [("log", [math.log(2.0), math.log(0.5)]), ("linear", [2.0, 0.5])])
def test_value_and_slope_by_hand(scale, offsets):
    """z = β·5 − α·f(s): log(1 + e^{−z}) and −β·σ(−z)."""
    pairs = _pairs(2.0, 0.5)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = ODPOLoss(0.1, offset_weight=0.8, scale=scale)(pairs)
    losses.sum().backward()
    z = [0.5 - 0.8 * offset for offset in offsets]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-one)) for one in z])
    assert total.grad.tolist() == pytest.approx([-0.1 / (1 + math.exp(one)) for one in z])


def test_a_score_margin_of_1_is_dpo():
    assert torch.equal(ODPOLoss(0.1)(_pairs(1.0, 1.0)), DPOLoss(0.1)(_pairs(1.0, 1.0)))


def test_equal_or_reversed_scores_have_no_loss():
    losses = ODPOLoss(0.1)(_pairs(1e-30, 0.0, -3.0))
    assert losses.isfinite().all()
    assert losses.tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_larger_score_margins_ask_for_larger_margins():
    losses = ODPOLoss(0.1)(_pairs(0.1, 0.5, 1.0, 4.0))
    assert losses.diff().gt(0).all()


def test_bad_arguments_are_refused_by_name():
    for offset_weight in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`offset_weight`"):
            ODPOLoss(offset_weight=offset_weight)
    with pytest.raises(ValueError, match="`scale`"):
        ODPOLoss(scale="exp")
