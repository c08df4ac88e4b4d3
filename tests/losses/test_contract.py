"""What every preference loss of the package must be. A new file in `lit_dpo.losses` is tested without a line here."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pickle
import pkgutil
from typing import get_args, get_type_hints

import pytest
import torch

import lit_dpo.losses
import tiny
from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.losses import CDPOLoss, DPOLoss, IPOLoss, PreferenceLoss

# (value, slope in Δ) at margin 0, lengths 1, by each docstring's arithmetic. Every loss must be here.
AT_ZERO = {
    DPOLoss: lambda loss: (math.log(2), -loss.beta / 2),
    CDPOLoss: lambda loss: (math.log(2), -loss.beta * (1 - 2 * loss.label_smoothing) / 2),
    IPOLoss: lambda loss: (1 / (4 * loss.beta**2), -1 / loss.beta),
}


def _losses() -> list[type[PreferenceLoss]]:
    found = set()
    for module in pkgutil.walk_packages(lit_dpo.losses.__path__, "lit_dpo.losses."):
        for given in vars(importlib.import_module(module.name)).values():
            if isinstance(given, type) and issubclass(given, PreferenceLoss) and given is not PreferenceLoss:
                found.add(given)
    return sorted(found, key=lambda one: one.__name__)


LOSSES = _losses()


@pytest.fixture(params=LOSSES, ids=lambda one: one.__name__)
def kind(request) -> type[PreferenceLoss]:
    return request.param


def _random(size=6, dtype=torch.float64, seed=0) -> PairLogps:
    random = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 9, (size,), generator=random).to(dtype) for _ in range(2)]
    sides = []
    for length in (*lengths, *lengths):
        tokens = [-torch.rand(int(n), generator=random, dtype=torch.float64).to(dtype) for n in length]
        sides.append(SequenceLogps(torch.stack([part.sum() for part in tokens]), length, torch.cat(tokens)))
    return PairLogps(*sides)


def _pick(pairs: PairLogps, order: list[int]) -> PairLogps:
    def side(given: SequenceLogps) -> SequenceLogps:
        parts = given.tokens.split([int(length) for length in given.length])
        return SequenceLogps(given.total[order], given.length[order], torch.cat([parts[number] for number in order]))

    return PairLogps(*(side(given) for given in pairs))


def _other_values(kind: type[PreferenceLoss], name: str) -> list:
    """Values of an argument that are allowed and not its default."""
    default = getattr(kind(), name)
    if choices := get_args(get_type_hints(kind)[name]):
        return [choice for choice in choices if choice != default]
    assert isinstance(default, float), f"tell this test about {kind.__name__}.{name}"
    return [0.5 * default, 1.5 * default]


def test_the_walk_finds_every_exported_loss():
    exported = {getattr(lit_dpo.losses, name) for name in lit_dpo.losses.__all__} - {PreferenceLoss}
    assert set(LOSSES) == exported == AT_ZERO.keys()


def test_losses_are_not_reduced_and_of_the_pairs_dtype(kind):
    for dtype in (torch.float32, torch.float64):
        losses = kind()(_random(6, dtype))
        assert losses.shape == (6,)
        assert losses.dtype == dtype


def test_losses_and_gradients_are_finite_at_margins_of_ten_thousand_nats(kind):
    pairs = tiny.at_margin(-1e4, -100.0, 0.0, 100.0, 1e4, dtype=torch.float32)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = kind()(pairs)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert total.grad.isfinite().all()


def test_gradients_are_those_of_the_values(kind):
    pairs = _random(4)

    def score(chosen, rejected):
        return kind()(
            pairs._replace(
                policy_chosen=pairs.policy_chosen._replace(total=chosen),
                policy_rejected=pairs.policy_rejected._replace(total=rejected),
            )
        )

    totals = [pairs.policy_chosen.total.clone().requires_grad_(), pairs.policy_rejected.total.clone().requires_grad_()]
    assert torch.autograd.gradcheck(score, totals)


def test_losses_follow_the_order_of_pairs(kind):
    pairs, order = _random(5), [3, 0, 4, 1, 2]
    torch.testing.assert_close(kind()(_pick(pairs, order)), kind()(pairs)[order], rtol=0, atol=1e-12)


def test_a_pairs_loss_does_not_depend_on_its_batch_mates(kind):
    pairs = _random(5)
    alone = torch.cat([kind()(_pick(pairs, [number])) for number in range(5)])
    torch.testing.assert_close(kind()(pairs), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_value_and_slope_at_margin_0_are_the_closed_form(kind, beta):
    loss, pairs = kind(beta=beta), tiny.logps([-3.0], [-5.0], [-3.0], [-5.0])
    total = pairs.policy_chosen.total.requires_grad_()
    losses = loss(pairs)
    losses.sum().backward()
    value, slope = AT_ZERO[kind](loss)
    assert losses.item() == pytest.approx(value, rel=1e-12)
    assert total.grad.item() == pytest.approx(slope, rel=1e-12)


def test_chosen_and_rejected_pull_with_the_same_force_at_equal_lengths(kind):
    pairs = tiny.logps([-3.0], [-5.0], [-3.5], [-4.0], lengths=([4], [4]))
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(kind()(pairs).sum(), sides)
    assert up.item() == pytest.approx(-down.item(), rel=1e-12)


def test_every_argument_changes_the_value(kind):
    pairs = _random()
    default = kind()
    for field in dataclasses.fields(kind):
        values = _other_values(kind, field.name)
        assert values, f"{kind.__name__}.{field.name} has one value only"
        for value in values:
            other = dataclasses.replace(default, **{field.name: value})
            assert not torch.allclose(other(pairs), default(pairs)), f"{field.name}={value} changes nothing"


def test_it_is_frozen(kind):
    loss = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 1.0


def test_it_pickles_compares_and_hashes_by_value(kind):
    loss = kind(beta=0.3)
    assert pickle.loads(pickle.dumps(loss)) == loss == kind(beta=0.3)
    assert hash(loss) == hash(kind(beta=0.3))
    assert loss != kind(beta=0.4)


def test_different_losses_with_the_same_arguments_are_different():
    assert len({one(beta=0.3) for one in LOSSES}) == len(LOSSES)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_bad_beta_is_refused_by_name(kind, beta):
    with pytest.raises(ValueError, match="`beta`"):
        kind(beta=beta)


def test_an_argument_that_it_does_not_have_is_a_type_error(kind):
    with pytest.raises(TypeError, match="no_such_argument"):
        kind(no_such_argument=1)


def test_without_a_reference_it_says_so_or_does_without(kind):
    pairs = _random()._replace(reference_chosen=None, reference_rejected=None)
    if kind.needs_reference:
        with pytest.raises(ValueError, match="NoReference"):
            kind()(pairs)
    else:
        assert kind()(pairs).isfinite().all()


def test_rewards_are_beta_times_the_log_ratios(kind):
    pairs, loss = _random(), kind(beta=0.3)
    chosen, rejected = loss.rewards(pairs)
    assert torch.equal(chosen, 0.3 * pairs.chosen_logratio)
    assert torch.equal(rejected, 0.3 * pairs.rejected_logratio)


def test_the_interface_itself_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        PreferenceLoss()


def test_a_loss_without_a_reference_rewards_beta_times_log_probs():
    @dataclasses.dataclass(frozen=True)
    class Plain(PreferenceLoss):
        needs_reference = False

        def __call__(self, pairs):
            return -pairs.policy_chosen.total

    pairs = _random()._replace(reference_chosen=None, reference_rejected=None)
    chosen, _ = Plain(beta=0.3).rewards(pairs)
    assert torch.equal(chosen, 0.3 * pairs.policy_chosen.total)
