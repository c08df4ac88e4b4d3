"""f-DPO (arXiv 2309.16240, table 1)."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from lit_dpo.losses import DPOLoss, FDPOLoss


def _at(chosen, rejected):
    """Pairs with these log-ratios."""
    return tiny.logps(chosen, rejected, [0.0] * len(chosen), [0.0] * len(chosen))


PAIRS = _at([2.0, -1.0, 0.0, 0.5], [-3.0, 1.5, 0.0, 0.7])
U = [torch.exp(side) for side in (PAIRS.chosen_logratio, PAIRS.rejected_logratio)]


def _by_table(slope):
    z = 0.3 * (slope(U[0]) - slope(U[1]))
    return torch.log1p(torch.exp(-z))


def test_forward_kl_by_the_table():
    torch.testing.assert_close(FDPOLoss(0.3, "forward_kl")(PAIRS), _by_table(lambda u: -1 / u))


def test_js_by_the_table():
    torch.testing.assert_close(FDPOLoss(0.3, "js")(PAIRS), _by_table(lambda u: torch.log(2 * u / (1 + u))))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_alpha_by_the_table(alpha):
    torch.testing.assert_close(FDPOLoss(0.3, "alpha", alpha)(PAIRS), _by_table(lambda u: (1 - u**-alpha) / alpha))


def test_alpha_lies_between_dpo_and_the_forward_kl():
    torch.testing.assert_close(FDPOLoss(0.3, "alpha", 1e-9)(PAIRS), DPOLoss(0.3)(PAIRS))
    torch.testing.assert_close(FDPOLoss(0.3, "alpha", 1 - 1e-9)(PAIRS), FDPOLoss(0.3, "forward_kl")(PAIRS))


def test_near_the_reference_all_of_them_are_dpo():
    """f″(1) = 1; of JS 1/2, so that its β counts half."""
    near = _at([1e-4], [-2e-4])
    for loss in (FDPOLoss(0.3, "forward_kl"), FDPOLoss(0.3, "alpha", 0.5), FDPOLoss(0.6, "js")):
        assert (loss(near) - math.log(2)).item() == pytest.approx((DPOLoss(0.3)(near) - math.log(2)).item(), rel=1e-3)


def test_js_is_dpo_far_below_the_reference_and_saturated_above_it():
    below, above = _at([-100.0], [-150.0]), _at([150.0], [100.0])
    torch.testing.assert_close(FDPOLoss(0.1, "js")(below), DPOLoss(0.1)(below))
    assert FDPOLoss(0.1, "js")(above).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, 80.0), (torch.float64, 701.0)])
@pytest.mark.parametrize("loss", [FDPOLoss(0.1, "forward_kl"), FDPOLoss(0.1, "alpha", 0.5)])
def test_it_is_exact_as_far_as_the_type_holds_it_and_finite_beyond(loss, dtype, last):
    power = loss.alpha or 1.0
    last = (last + math.log(power)) / power
    ratios = torch.tensor([-last, -last - 2 / power, -20 * last], dtype=dtype, requires_grad=True)
    pairs = _at([0.0] * 3, [0.0] * 3)
    pairs = type(pairs)(*(side._replace(total=side.total.to(dtype)) for side in pairs[:4]))
    losses = loss(pairs._replace(policy_chosen=pairs.policy_chosen._replace(total=ratios)))
    losses.sum().backward()
    exact = 0.1 * (math.exp(power * last) - 1) / power
    assert losses[0].item() == pytest.approx(exact, rel=1e-4)
    assert losses.isfinite().all()
    assert ratios.grad[0].item() == pytest.approx(-0.1 * math.exp(power * last), rel=1e-4)
    assert ratios.grad[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys", "", None])
def test_a_bad_divergence_is_refused_by_name(divergence):
    with pytest.raises(ValueError, match="`divergence`"):
        FDPOLoss(divergence=divergence)


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, -0.5, 2.0, math.nan])
def test_a_bad_alpha_is_refused_by_name(alpha):
    with pytest.raises(ValueError, match="`alpha`"):
        FDPOLoss(divergence="alpha", alpha=alpha)


@pytest.mark.parametrize("divergence", ["js", "forward_kl"])
def test_an_alpha_that_does_not_apply_is_refused(divergence):
    with pytest.raises(ValueError, match="`alpha` only with"):
        FDPOLoss(divergence=divergence, alpha=0.5)
