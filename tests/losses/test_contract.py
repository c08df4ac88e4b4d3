"""What every preference loss of the package must be. A new file in `lit_dpo.losses` is tested without a line here."""

from __future__ import annotations

import dataclasses
import functools
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
from lit_dpo.losses import (
    AlphaPOLoss,
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    CDPOLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    NCALoss,
    NormalizedDPOLoss,
    PreferenceLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOLoss,
)

# (value, slope in the chosen log-prob) at margin 0, lengths 1, chosen log-prob −3, by each docstring's arithmetic.
# Every loss must be here.
AT_ZERO = {
    DPOLoss: lambda loss: (math.log(2), -loss.beta / 2),
    CDPOLoss: lambda loss: (math.log(2), -loss.beta * (1 - 2 * loss.label_smoothing) / 2),
    IPOLoss: lambda loss: (1 / (4 * loss.beta**2), -1 / loss.beta),
    HingeLoss: lambda loss: (1, -loss.beta),
    RobustDPOLoss: lambda loss: (math.log(2), -loss.beta / (2 * (1 - 2 * loss.label_smoothing))),
    EXOLoss: lambda loss: (
        -math.log(2) - math.log(loss.label_smoothing * (1 - loss.label_smoothing)) / 2,
        -loss.beta / 4 * math.log((1 - loss.label_smoothing) / loss.label_smoothing),
    ),
    NCALoss: lambda loss: (2 * math.log(2), -loss.beta / 4),
    SPPOLoss: lambda loss: (1 / (2 * loss.beta**2), -1 / loss.beta),
    AOTLoss: lambda loss: (math.log(2), -loss.beta * (1 - 2 * loss.label_smoothing) / 2),
    AOTUnpairedLoss: lambda loss: (math.log(2), -loss.beta * (1 - 2 * loss.label_smoothing) / 2),
    APOZeroLoss: lambda loss: (1, -loss.beta / 4),
    APODownLoss: lambda loss: (1, 0),
    DiscoPOPLoss: lambda loss: (
        (1 + math.log(2)) / 2,
        loss.beta * ((1 - math.log(2)) / (4 * loss.tau) - 3 / 4),
    ),
    NormalizedDPOLoss: lambda loss: (math.log(2), -loss.beta / 2),
    FDPOLoss: lambda loss: (math.log(2), -loss.beta / (4 if loss.divergence == "js" else 2)),
    SimPOLoss: lambda loss: (
        math.log1p(math.exp(loss.gamma)) - loss.label_smoothing * loss.gamma,
        -loss.beta * (1 / (1 + math.exp(-loss.gamma)) - loss.label_smoothing),
    ),
    CPOLoss: lambda loss: (math.log(2) + 3 * loss.nll_weight, -loss.beta / 2 - loss.nll_weight),
    AlphaPOLoss: lambda loss: (
        math.log1p(math.exp(loss.gamma)),
        -loss.beta / (1 + math.exp(-loss.gamma)) * math.exp(3 * loss.alpha),
    ),
}

# Arguments beside the defaults under which a loss is tested too: what only they turn on.
SETTINGS = {
    IPOLoss: [{"average": "sum"}],
    AOTLoss: [{"label_smoothing": 0.1}],
    AOTUnpairedLoss: [{"label_smoothing": 0.1}],
    FDPOLoss: [{"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.3}],
    SimPOLoss: [{"label_smoothing": 0.1}],
    CPOLoss: [{"nll_weight": 0.0}],
    AlphaPOLoss: [{"alpha": -0.5}],
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


@pytest.fixture(
    params=[functools.partial(kind, **given) for kind in LOSSES for given in [{}, *SETTINGS.get(kind, [])]],
    ids=lambda make: "-".join([make.func.__name__, *map(str, make.keywords.values())]),
)
def make(request):
    """Every loss, with its defaults and with each of its `SETTINGS`."""
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


def _changes(loss: PreferenceLoss, name: str) -> list[dict]:
    """Allowed changes of the arguments that give this one another value; none where it does not apply."""
    value = getattr(loss, name)
    if value is None:
        return []
    if isinstance(loss, FDPOLoss) and name == "divergence":
        every = [("js", None), ("forward_kl", None), ("alpha", 0.5)]
        return [{"divergence": one, "alpha": alpha} for one, alpha in every if one != value]
    if isinstance(value, str):
        return [{name: choice} for choice in get_args(get_type_hints(type(loss))[name]) if choice != value]
    assert isinstance(value, float), f"tell this test about {type(loss).__name__}.{name}"
    return [{name: 0.5 * value}, {name: 1.5 * value}] if value else [{name: 0.1}, {name: 0.3}]


def _needs_only_the_margin(loss: PreferenceLoss) -> bool:
    """Whether the loss looks at nothing but one margin, be it of log-ratios or log-probs."""
    if isinstance(loss, CPOLoss):
        return loss.nll_weight == 0
    return not isinstance(loss, NCALoss | SPPOLoss | APOZeroLoss | APODownLoss | FDPOLoss | AlphaPOLoss)


def test_the_walk_finds_every_exported_loss():
    exported = {getattr(lit_dpo.losses, name) for name in lit_dpo.losses.__all__} - {PreferenceLoss}
    assert set(LOSSES) == exported == AT_ZERO.keys()


def test_losses_are_not_reduced_and_of_the_pairs_dtype(make):
    for dtype in (torch.float32, torch.float64):
        losses = make()(_random(6, dtype))
        assert losses.shape == (6,)
        assert losses.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moved", ["chosen", "rejected", "both"])
def test_losses_and_gradients_are_finite_at_margins_of_ten_thousand_nats(make, moved, dtype):
    far = [-1e4, -100.0, 0.0, 100.0, 1e4]
    back = [-margin for margin in far]
    chosen, rejected = {"chosen": (far, [0.0] * 5), "rejected": ([0.0] * 5, back), "both": (far, back)}[moved]
    pairs = tiny.logps(
        *([-5e4 + ratio for ratio in side] for side in (chosen, rejected, [0] * 5, [0] * 5)), dtype=dtype
    )
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    losses = make()(pairs)
    gradients = torch.autograd.grad(losses.sum(), sides)
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_those_of_the_values(make):
    pairs = _random(4)

    def score(chosen, rejected):
        return make()(
            pairs._replace(
                policy_chosen=pairs.policy_chosen._replace(total=chosen),
                policy_rejected=pairs.policy_rejected._replace(total=rejected),
            )
        )

    totals = [pairs.policy_chosen.total.clone().requires_grad_(), pairs.policy_rejected.total.clone().requires_grad_()]
    assert torch.autograd.gradcheck(score, totals)


def test_losses_follow_the_order_of_pairs(make):
    pairs, order = _random(5), [3, 0, 4, 1, 2]
    torch.testing.assert_close(make()(_pick(pairs, order)), make()(pairs)[order], rtol=0, atol=1e-12)


def test_a_pairs_loss_does_not_depend_on_its_batch_mates_unless_it_says_so(make):
    pairs = _random(5, seed=1)
    alone = torch.cat([make()(_pick(pairs, [number])) for number in range(5)])
    if make.func.couples_pairs:
        assert not torch.allclose(make()(pairs), alone)
    else:
        torch.testing.assert_close(make()(pairs), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_value_and_slope_at_margin_0_are_the_closed_form(make, beta):
    loss, rejected = make(beta=beta), [-5.0] if make.func.needs_reference else [-3.0]
    pairs = tiny.logps([-3.0], rejected, [-3.0], rejected)
    total = pairs.policy_chosen.total.requires_grad_()
    losses = loss(pairs)
    losses.sum().backward()
    value, slope = AT_ZERO[make.func](loss)
    assert losses.item() == pytest.approx(value, rel=1e-12)
    assert total.grad.item() == pytest.approx(slope, rel=1e-12)


def test_chosen_and_rejected_pull_with_the_same_force_where_only_the_margin_counts(make):
    loss, pairs = make(), tiny.logps([-3.0], [-5.0], [-3.5], [-4.0], lengths=([4], [4]))
    sides = [pairs.policy_chosen.total.requires_grad_(), pairs.policy_rejected.total.requires_grad_()]
    up, down = torch.autograd.grad(loss(pairs).sum(), sides)
    assert (up.item() == pytest.approx(-down.item(), rel=1e-12)) == _needs_only_the_margin(loss)


def test_every_argument_changes_the_value(make):
    pairs, loss = _random(), make()
    for field in dataclasses.fields(loss):
        for change in _changes(loss, field.name):
            other = dataclasses.replace(loss, **change)
            assert not torch.allclose(other(pairs), loss(pairs)), f"{change} changes nothing"


def test_every_argument_has_been_changed_by_then(kind):
    settings = [{}, *SETTINGS.get(kind, [])]
    for field in dataclasses.fields(kind):
        assert any(_changes(kind(**given), field.name) for given in settings), f"{kind.__name__}.{field.name}"


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


def test_rewards_are_beta_times_the_log_ratios_or_log_probs(kind):
    pairs, loss = _random(), kind(beta=0.3)
    chosen, rejected = loss.rewards(pairs)
    if kind.needs_reference:
        assert torch.equal(chosen, 0.3 * pairs.chosen_logratio)
        assert torch.equal(rejected, 0.3 * pairs.rejected_logratio)
    else:
        assert torch.equal(chosen, 0.3 * pairs.policy_chosen.total)
        assert torch.equal(rejected, 0.3 * pairs.policy_rejected.total)


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
