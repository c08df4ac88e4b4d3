"""What every preference loss of the package must be. A new file in `lit_dpo.losses` is tested without a line here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import pickle
import pkgutil
import re
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import lists
import lit_dpo.losses
import tiny
from lit_dpo.checkpoint import to_builtins
from lit_dpo.logps import Field, PairLogps, SequenceLogps
from lit_dpo.losses import (
    AlphaDPOLoss,
    AlphaPOLoss,
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    BCOLoss,
    BetaDPOLoss,
    CalDPOLoss,
    CDPOLoss,
    ChiPOLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    DPOPLoss,
    DPOShiftLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    HumanlineLoss,
    IPOLoss,
    LDDPOLoss,
    LiPOLoss,
    MixtureLoss,
    NCALoss,
    NormalizedDPOLoss,
    ODPOLoss,
    ORPOLoss,
    PlackettLuceLoss,
    PreferenceLoss,
    RDPOLoss,
    RobustDPOLoss,
    RPOLoss,
    SFTLoss,
    SimPERLoss,
    SimPOLoss,
    SLiCLoss,
    SoftDPOLoss,
    SPPOLoss,
    TDPOLoss,
    WPOLoss,
)


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# What a record holds besides log-probs where a test does not draw it at random: log-probs of tokens lie this much below
# log Σ_v π(v)², divergences are these, and the score margin and probability of each pair.
BELOW = {"chosen": 0.5, "rejected": 0.25}
KL = {"chosen": 0.5, "rejected": 0.25}
SCORE_MARGIN, PROBABILITY = 2.0, 0.8

# (value, slope in the chosen log-prob) at margin 0, lengths 1, chosen log-prob −3, no memory, and the above, by each
# docstring's arithmetic; the rejected log-prob is −5 with a reference and −3 without. Every loss must be here.
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
        (1 + loss.gamma, -loss.beta)
        if loss.link == "hinge"
        else (
            math.log1p(math.exp(loss.gamma)) - loss.label_smoothing * loss.gamma,
            -loss.beta * (_sigmoid(loss.gamma) - loss.label_smoothing),
        )
    ),
    CPOLoss: lambda loss: (math.log(2) + 3 * loss.nll_weight, -loss.beta / 2 - loss.nll_weight),
    AlphaPOLoss: lambda loss: (
        math.log1p(math.exp(loss.gamma)),
        -loss.beta / (1 + math.exp(-loss.gamma)) * math.exp(3 * loss.alpha),
    ),
    BCOLoss: lambda loss: (2 * math.log(2), -loss.beta / 2),
    ORPOLoss: lambda loss: (3 + loss.beta * math.log(2), -1 - loss.beta / (2 * (1 - math.exp(-3)))),
    SLiCLoss: lambda loss: (1 + 3 * loss.nll_weight, -loss.beta - loss.nll_weight),
    SFTLoss: lambda loss: (3, -1),
    DPOPLoss: lambda loss: (math.log(2), -loss.beta / 2),
    RDPOLoss: lambda loss: (math.log(2), -loss.beta / 2),
    ODPOLoss: lambda loss: _at_offset(
        loss.offset_weight * (math.log(SCORE_MARGIN) if loss.scale == "log" else SCORE_MARGIN), loss.beta
    ),
    TDPOLoss: lambda loss: _at_offset(
        loss.beta * (KL["rejected"] - KL["chosen"]) * (1 if loss.version == "tdpo1" else loss.kl_weight or 0.5),
        loss.beta,
    ),
    CalDPOLoss: lambda loss: (
        math.log(2) + loss.calibration_weight / (2 * loss.beta**2),
        -1 / 2 - loss.calibration_weight / loss.beta,
    ),
    BetaDPOLoss: lambda loss: (math.log(2), -loss.beta / 2),
    ChiPOLoss: lambda loss: (math.log(2), -loss.beta),
    SoftDPOLoss: lambda loss: (math.log(2), -loss.beta * (2 * PROBABILITY - 1) / 2),
    SimPERLoss: lambda loss: (0, -math.exp(-3)),
    DPOShiftLoss: lambda loss: (math.log(2), -loss.beta / 2),
    AlphaDPOLoss: lambda loss: _at_offset(loss.gamma - 2 * loss.beta, loss.beta),
    RPOLoss: lambda loss: _at_target(loss.distance, loss.reward_scale * SCORE_MARGIN, loss.beta),
    PlackettLuceLoss: lambda loss: (math.log(2), -loss.beta / 2),
    LiPOLoss: lambda loss: _scaled(
        (2**0.75 - 2**0.25)
        * (1 / math.log(2) - 1 / math.log(3) if loss.weighting == "paper" else 2 * (1 - 1 / math.log2(3))),
        math.log(2),
        -loss.beta / 2,
    ),
    HumanlineLoss: lambda loss: AT_ZERO[type(loss.loss)](loss.loss),
    LDDPOLoss: lambda loss: AT_ZERO[type(loss.loss)](loss.loss),
    WPOLoss: lambda loss: _scaled(
        math.exp(-sum(BELOW.values()) if loss.alignment == "sampled" else -8), *AT_ZERO[type(loss.loss)](loss.loss)
    ),
    MixtureLoss: lambda loss: tuple(
        sum(weight * number for weight, number in zip(loss.weights or [1] * len(loss.losses), numbers, strict=True))
        for numbers in zip(*(AT_ZERO[type(one)](one) for one in loss.losses), strict=True)
    ),
}


def _at_offset(offset: float, beta: float) -> tuple[float, float]:
    """−log σ(β·Δ − offset) at Δ = 0."""
    return math.log1p(math.exp(offset)), -beta * _sigmoid(offset)


def _at_target(distance: str, target: float, beta: float) -> tuple[float, float]:
    """What the docstring of RPO says of each distance at Δ = 0."""
    p = _sigmoid(target)
    return {
        "bwd_kl": (math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p), -beta * (p - 0.5)),
        "fwd_kl": (-math.log(2) - math.log(p * (1 - p)) / 2, -beta * target / 4),
        "sq": (target**2, -2 * beta * target),
    }[distance]


def _scaled(weight: float, value: float, slope: float) -> tuple[float, float]:
    return weight * value, weight * slope


# Arguments besides the defaults under which a loss is tested too: what only they turn on.
SETTINGS = {
    IPOLoss: [{"average": "sum"}],
    AOTLoss: [{"label_smoothing": 0.1}],
    AOTUnpairedLoss: [{"label_smoothing": 0.1}],
    FDPOLoss: [{"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.3}],
    SimPOLoss: [{"label_smoothing": 0.1}, {"link": "hinge"}],
    CPOLoss: [{"nll_weight": 0.0}],
    AlphaPOLoss: [{"alpha": -0.5}],
    BCOLoss: [{"baseline": "zero"}],
    SLiCLoss: [{"nll_weight": 0.0}],
    SFTLoss: [{"average_over": "token"}, {"of": "best"}, {"average_over": "token", "of": "best"}],
    ODPOLoss: [{"scale": "linear"}],
    TDPOLoss: [{"version": "tdpo1"}, {"kl_weight": 0.3}],
    CalDPOLoss: [{"beta": 0.5}],
    AlphaDPOLoss: [{"z_momentum": 0.0}],
    RPOLoss: [{"distance": "fwd_kl"}, {"distance": "sq", "reward_scale": 0.1}],
    PlackettLuceLoss: [{"top": 1}, {"top": 2}],
    LiPOLoss: [{"weighting": "rax"}],
    HumanlineLoss: [
        {"lower": -0.4, "upper": 0.3},
        {"loss": LDDPOLoss(BCOLoss()), "upper": 0.3},
        {"loss": MixtureLoss((PlackettLuceLoss(), SFTLoss(of="best"))), "upper": 0.3},
    ],
    LDDPOLoss: [{"reference": "plain"}, {"loss": SimPOLoss()}, {"loss": BCOLoss(), "surplus_weight": 0.0}],
    WPOLoss: [{"clamp": False}, {"alignment": "none"}, {"loss": LDDPOLoss(SimPOLoss())}],
    MixtureLoss: [
        {"losses": (DPOLoss(), BCOLoss(), SFTLoss()), "weights": (0.8, 0.2, 1.0)},
        {"losses": (BetaDPOLoss(), SFTLoss("token"), BCOLoss(0.2))},
        {"losses": (CPOLoss(), SLiCLoss()), "weights": (0.5, 2.0)},
        {"losses": (AlphaDPOLoss(), HumanlineLoss(BetaDPOLoss()))},
        {"losses": (TDPOLoss(), WPOLoss(ODPOLoss()), SoftDPOLoss())},
        {"losses": (LiPOLoss(), PlackettLuceLoss(top=1))},
        {"losses": (BCOLoss(), PlackettLuceLoss(), SFTLoss(of="best"))},
    ],
}


def _losses() -> list[type[PreferenceLoss]]:
    found = set()
    for module in pkgutil.walk_packages(lit_dpo.losses.__path__, "lit_dpo.losses."):
        for given in vars(importlib.import_module(module.name)).values():
            if isinstance(given, type) and issubclass(given, PreferenceLoss) and not inspect.isabstract(given):
                found.add(given)
    return sorted(found, key=lambda one: one.__name__)


LOSSES = _losses()


@pytest.fixture(params=LOSSES, ids=lambda one: one.__name__)
def kind(request) -> type[PreferenceLoss]:
    return request.param


EVERY = [functools.partial(kind, **given) for kind in LOSSES for given in [{}, *SETTINGS.get(kind, [])]]


def named(make: functools.partial) -> str:
    """Of a test of one of them."""
    return "-".join([make.func.__name__, *map(str, make.keywords.values())])


@pytest.fixture(params=EVERY, ids=named)
def make(request):
    """Every loss, with its defaults and with each of its `SETTINGS`."""
    return request.param


# ---- records ----

PER_TOKEN = (Field.PER_TOKEN, Field.COLLISION, Field.KL, Field.REFERENCE_PER_TOKEN)
COLUMNS = ("score_margin", "probability")
SIDES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def _random(size=6, dtype=torch.float64, seed=0) -> PairLogps:
    """A record with everything in it that a loss may declare."""
    random = torch.Generator().manual_seed(seed)

    def draw(count, low, high):
        return (low + (high - low) * torch.rand(count, generator=random, dtype=torch.float64)).to(dtype)

    lengths = [torch.randint(1, 9, (size,), generator=random).to(dtype) for _ in range(2)]
    sides = []
    for length in (*lengths, *lengths):
        count = int(length.sum())
        side = SequenceLogps(length, length, draw(count, -1, 0), draw(count, -3, 0), draw(count, 0, 2))
        sides.append(side._replace(total=side.sums(side.per_token)))
    ranges = {"weight": (0.5, 2), "score_margin": (0.2, 3), "probability": (0.55, 0.95)}
    return PairLogps(*sides, columns={name: draw(size, *ends) for name, ends in ranges.items()})


def _complete(pairs: PairLogps) -> PairLogps:
    """A record of totals with the rest filled in, evenly over tokens."""
    changed: dict[str, Any] = {}
    for name in SIDES:
        if (side := getattr(pairs, name)) is not None:
            tokens = (side.total / side.length).repeat_interleave(side.length.long())
            answer = name.split("_")[1]
            kl = torch.full_like(tokens, KL[answer])
            changed[name] = side._replace(per_token=tokens, collision=tokens + BELOW[answer], kl=kl)
    rows = torch.ones_like(pairs.policy_chosen.total)
    columns = {"score_margin": SCORE_MARGIN * rows, "probability": PROBABILITY * rows}
    return pairs._replace(**changed, columns=columns)


def _with_tokens(pairs: PairLogps, chosen: torch.Tensor, rejected: torch.Tensor) -> PairLogps:
    """The record with other log-probs of the policy's tokens, of which the totals are the sums."""
    changed = {}
    for name, tokens in (("policy_chosen", chosen), ("policy_rejected", rejected)):
        side = getattr(pairs, name)
        changed[name] = side._replace(per_token=tokens, total=side.sums(tokens))
    return pairs._replace(**changed)


def _leaves(pairs: PairLogps) -> tuple[PairLogps, list[torch.Tensor]]:
    """The record as a function of the policy's tokens, which ask for gradients."""
    leaves = [side.per_token.detach().clone().requires_grad_() for side in pairs[:2]]
    return _with_tokens(pairs, *leaves), leaves


def _pick(pairs: PairLogps, order: list[int]) -> PairLogps:
    def side(given: SequenceLogps) -> SequenceLogps:
        def pick(values):
            parts = values.split([int(length) for length in given.length])
            return torch.cat([parts[number] for number in order])

        return SequenceLogps(given.total[order], given.length[order], *(pick(values) for values in given[2:]))

    return pairs._replace(
        **{name: side(getattr(pairs, name)) for name in SIDES},
        columns={name: column[order] for name, column in pairs.columns.items()},
    )


def _without(pairs: PairLogps, name: str) -> PairLogps:
    if name == Field.REFERENCE:
        return pairs._replace(reference_chosen=None, reference_rejected=None)
    if name in (*COLUMNS, "weight"):
        return pairs._replace(columns={one: column for one, column in pairs.columns.items() if one != name})
    model, field = ("reference", "per_token") if name == Field.REFERENCE_PER_TOKEN else ("policy", name)
    sides = [side for side in SIDES if side.startswith(model)]
    return pairs._replace(**{side: getattr(pairs, side)._replace(**{field: None}) for side in sides})


def _remember(loss: PreferenceLoss, pairs: PairLogps, seen: PairLogps | None = None) -> PairLogps:
    """The record with what the loss remembers of two training batches, always the same ones, or of a given one."""
    state = loss.initial_state()
    if state is not None:
        for batch in [_random(5, seed=7), _random(5, seed=8)] if seen is None else [seen]:
            state = loss.next_state(state, loss.sums(batch))
    return pairs._replace(state=state)


def _score(loss: PreferenceLoss, pairs: PairLogps) -> torch.Tensor:
    return loss(_remember(loss, pairs))


# ---- arguments ----


def _takes_beta(kind: type[PreferenceLoss]) -> bool:
    return any(field.name == "beta" and field.init for field in dataclasses.fields(kind))


def _arguments(loss: PreferenceLoss | type[PreferenceLoss]) -> list[str]:
    return [field.name for field in dataclasses.fields(loss) if field.init]


def _changes(loss: PreferenceLoss, name: str) -> list[dict]:
    """Allowed changes of the arguments that give this one another value; none where it does not apply."""
    value = getattr(loss, name)
    match loss, name:
        case FDPOLoss(), "divergence":
            every = [("js", None), ("forward_kl", None), ("alpha", 0.5)]
            return [{"divergence": one, "alpha": alpha} for one, alpha in every if one != value]
        case SimPOLoss(link="hinge"), "label_smoothing":
            return []
        case SimPOLoss(), "link":
            return [{"link": "sigmoid" if value == "hinge" else "hinge", "label_smoothing": 0.0}]
        case TDPOLoss(), "version":
            return [{"version": "tdpo1" if value == "tdpo2" else "tdpo2", "kl_weight": None}]
        case DPOShiftLoss(), "rejected_weight":
            return [{name: 0.5 * value}]
        case HumanlineLoss(), "lower" | "upper":  # narrower; beyond the bounds there may be nothing to hold
            return [{name: 0.3 * value}]
        case LDDPOLoss(loss=inner), "reference" if Field.REFERENCE not in inner.requires:
            return []
        case WPOLoss(), "alignment":
            return [{"alignment": "none" if value == "sampled" else "sampled", "clamp": True}]
        case WPOLoss(alignment="none"), "clamp":
            return []
        case PlackettLuceLoss(), "top":
            return [{name: 3 if value == 1 else 1}]
        case MixtureLoss(), "losses":
            return [{"losses": (HingeLoss(), *value[1:])}]
        case MixtureLoss(), "weights":
            return [{"weights": tuple(1.5 * weight for weight in value or [1] * len(loss.losses))}]
    if value is None:
        return []
    if isinstance(value, PreferenceLoss):
        return [{name: HingeLoss(0.3)}]
    if isinstance(value, bool):
        return [{name: not value}]
    if isinstance(value, str):
        return [{name: choice} for choice in get_args(get_type_hints(type(loss))[name]) if choice != value]
    assert isinstance(value, float), f"tell this test about {type(loss).__name__}.{name}"
    if name in {"momentum", "z_momentum"} and value:
        return [{name: 0.5 * value}]
    return [{name: 0.5 * value}, {name: 1.5 * value}] if value else [{name: 0.1}, {name: 0.3}]


def _two(kind: type[PreferenceLoss]) -> tuple[dict, dict | None]:
    """Two lots of arguments that differ; no second one for a loss without arguments."""
    if _takes_beta(kind):
        return {"beta": 0.3}, {"beta": 0.4}
    return {}, next((change for name in _arguments(kind) for change in _changes(kind(), name)), None)


def _needs_only_the_margin(loss: PreferenceLoss) -> bool:
    """Whether the loss looks at nothing but one margin, be it of log-ratios or log-probs."""
    if isinstance(loss, CPOLoss | SLiCLoss):
        return loss.nll_weight == 0
    if isinstance(loss, LDDPOLoss | WPOLoss | HumanlineLoss):
        return _needs_only_the_margin(loss.loss)
    if isinstance(loss, MixtureLoss):
        return all(map(_needs_only_the_margin, loss.losses))
    own = NCALoss | SPPOLoss | APOZeroLoss | APODownLoss | FDPOLoss | AlphaPOLoss | BCOLoss | ORPOLoss | SFTLoss
    return not isinstance(loss, own | DPOPLoss | CalDPOLoss | ChiPOLoss | SimPERLoss | DPOShiftLoss)


# ---- the laws ----


def test_the_walk_finds_every_exported_loss():
    exported = {getattr(lit_dpo.losses, name) for name in lit_dpo.losses.__all__} - {PreferenceLoss}
    assert set(LOSSES) == exported == AT_ZERO.keys()


def test_losses_are_not_reduced_and_of_the_pairs_dtype(make):
    for dtype in (torch.float32, torch.float64):
        losses = _score(make(), _random(6, dtype))
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
    pairs, leaves = _leaves(_complete(pairs))
    loss = make()
    losses = loss(_remember(loss, pairs, seen=pairs.detach()))
    gradients = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_those_of_the_values(make, monkeypatch):
    pairs = _random(4)
    # WPO's weights and α-DPO's targets are constants to the gradient, so they have to be to the differences too
    for owner, name in ((WPOLoss, "weights"), (AlphaDPOLoss, "target")):
        monkeypatch.setattr(owner, name, functools.partialmethod(_held, getattr(owner, name), pairs))
    leaves = [side.per_token.clone().requires_grad_() for side in pairs[:2]]
    assert torch.autograd.gradcheck(lambda *tokens: _score(make(), _with_tokens(pairs, *tokens)), leaves)


def _held(loss: PreferenceLoss, constant: Any, pairs: PairLogps, given: PairLogps) -> torch.Tensor:
    """A method's value for pairs of its own, with what the loss remembers."""
    return constant(loss, pairs._replace(state=given.state))


def test_losses_follow_the_order_of_pairs(make):
    pairs, order = _random(5), [3, 0, 4, 1, 2]
    torch.testing.assert_close(
        _score(make(), _pick(pairs, order)), _score(make(), pairs)[order], rtol=1e-13, atol=1e-12
    )


def test_a_pairs_loss_does_not_depend_on_its_batch_mates_unless_it_says_so(make):
    pairs, loss = _random(5, seed=1), make()
    alone = torch.cat([_score(loss, _pick(pairs, [number])) for number in range(5)])
    if loss.couples_pairs:
        assert not torch.allclose(_score(loss, pairs), alone)
    else:
        torch.testing.assert_close(_score(loss, pairs), alone, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_value_and_slope_at_margin_0_are_the_closed_form(make, beta):
    loss = make(beta=beta) if _takes_beta(make.func) else make()
    rejected = [-5.0] if Field.REFERENCE in loss.requires else [-3.0]
    pairs, (tokens, _) = _leaves(_complete(tiny.logps([-3.0], rejected, [-3.0], rejected)))
    losses = loss(pairs._replace(state=loss.initial_state()))
    losses.sum().backward()
    value, slope = AT_ZERO[make.func](loss)
    assert losses.item() == pytest.approx(value, rel=1e-12)
    assert tokens.grad.item() == pytest.approx(slope, rel=1e-12)


def test_chosen_and_rejected_pull_with_the_same_force_where_only_the_margin_counts(make):
    pairs, leaves = _leaves(_complete(tiny.logps([-3.5], [-5.0], [-3.0], [-4.0], lengths=([4], [4]))))
    up, down = torch.autograd.grad(_score(make(), pairs).sum(), leaves, materialize_grads=True)
    assert (up.mean().item() == pytest.approx(-down.mean().item(), rel=1e-12)) == _needs_only_the_margin(make())


def test_every_argument_changes_the_value(make):
    loss = make()
    for name in _arguments(loss):
        # what is said of many completions shows where there are many
        pairs = lists.random().pairs() if name in {"top", "of"} else _random()
        for change in _changes(loss, name):
            other = dataclasses.replace(loss, **change)
            if other.per_prompt != loss.per_prompt:
                assert _score(other, pairs).mean() != pytest.approx(_score(loss, pairs).mean().item())
                continue
            assert not torch.allclose(_score(other, pairs), _score(loss, pairs)), f"{change} changes nothing"


def test_every_argument_has_been_changed_by_then(kind):
    settings = [{}, *SETTINGS.get(kind, [])]
    for name in _arguments(kind):
        assert any(_changes(kind(**given), name) for given in settings), f"{kind.__name__}.{name}"


def test_it_is_frozen(kind):
    loss = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 1.0


def test_it_pickles_compares_and_hashes_by_value(kind):
    one, other = _two(kind)
    loss = kind(**one)
    assert pickle.loads(pickle.dumps(loss)) == loss == kind(**one)
    assert hash(loss) == hash(kind(**one))
    assert loss != (HingeLoss(0.3) if other is None else kind(**other))


def test_a_configuration_file_gives_an_equal_loss(make):
    loss = make()
    written = yaml.safe_dump({"loss": to_builtins(loss)})
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=PreferenceLoss)
    assert parser.instantiate_classes(parser.parse_string(written)).loss == loss
    assert yaml.safe_load(written)["loss"]["init_args"].keys() == set(_arguments(loss))


def test_different_losses_with_the_same_arguments_are_different():
    assert len({one(beta=0.3) if _takes_beta(one) else one() for one in LOSSES}) == len(LOSSES)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_bad_beta_is_refused_by_name(kind, beta):
    if _takes_beta(kind):
        with pytest.raises(ValueError, match="`beta`"):
            kind(beta=beta)
    else:
        with pytest.raises(TypeError, match="beta"):
            kind(beta=beta)


# What is no value of an argument of this type: NaN, infinities, and what belongs to another type.
WRONG = {
    int: [math.nan, 1.0, 0, -1, True, "1", torch.tensor(1)],
    float: [math.nan, math.inf, -math.inf, True, "0.1", torch.tensor(0.1)],
    bool: [1, 0.0, "true", None],
    str: ["neither", True, 0, None],
}


def test_every_argument_refuses_what_is_not_its_type_and_names_itself(kind):
    hints = get_type_hints(kind)
    for name in _arguments(kind):
        (of,) = {int, float, bool, str, PreferenceLoss} & {type(one) if isinstance(one, str) else one
                                                      for one in _types(hints[name])}  # fmt: skip
        # an argument that only counts with another one is given with it
        given = next((one for one in SETTINGS.get(kind, []) if name in one), {})
        several = "tuple" in str(hints[name])
        for wrong in WRONG.get(of, []):
            value = (wrong,) * len(kind(**given).inner) if several else wrong
            with pytest.raises(ValueError, match=rf"^Expected `{name}` .*but got {re.escape(repr(wrong))}\.$"):
                kind(**{**given, name: value})


def _types(hint: Any) -> set[Any]:
    """A type, those that it is made of, and the choices of a literal."""
    return {hint}.union(*map(_types, get_args(hint)))


def test_an_argument_that_it_does_not_have_is_a_type_error(kind):
    with pytest.raises(TypeError, match="no_such_argument"):
        kind(no_such_argument=1)


def test_without_a_reference_it_says_so_or_does_without(make):
    pairs, loss = _random()._replace(reference_chosen=None, reference_rejected=None), make()
    if Field.REFERENCE in loss.requires:
        with pytest.raises(ValueError, match="NoReference"):
            _score(loss, pairs)
    else:
        assert torch.equal(_score(loss, pairs), _score(loss, _random()))


def test_what_it_does_not_declare_it_does_not_read(make):
    loss, pairs = make(), _random()
    assert loss.requires <= {*Field}
    assert loss.columns <= {*COLUMNS}
    bare = _without(pairs, "weight")
    for name in {*PER_TOKEN, *COLUMNS} - loss.requires - loss.columns:
        bare = _without(bare, name)
    assert torch.equal(_score(loss, bare), _score(loss, pairs))
    assert loss.parts(_remember(loss, bare)).keys() == set(loss.part_names)


def test_what_it_declares_it_asks_for_by_name(make):
    loss = make()
    for name in (loss.requires - {Field.REFERENCE}) | loss.columns:
        with pytest.raises(ValueError, match=rf"`(\w+\.)?{name.removeprefix('reference_')}`"):
            _score(loss, _without(_random(), name))


def test_what_it_remembers_it_asks_for_by_name(make):
    loss, pairs = make(), _random()
    if loss.initial_state() is None:
        assert torch.equal(loss(pairs), _score(loss, pairs))
    else:
        with pytest.raises(ValueError, match="`state`"):
            loss(pairs)


def test_its_memory_is_a_function_of_what_it_has_seen(make):
    loss = make()
    if (start := loss.initial_state()) is None:
        return
    assert start.dtype == torch.float64
    assert start.ndim == 1
    pairs, _ = _leaves(_random(dtype=torch.float32))
    once, again = (loss.next_state(start, loss.sums(pairs)) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(start, loss.initial_state())
    assert (once.shape, once.dtype, once.requires_grad) == (start.shape, torch.float64, False)
    assert not torch.equal(once, start)


@pytest.mark.parametrize("split", [([0, 1, 2], [3, 4, 5]), ([0, 1, 2, 3, 4], [5]), ([3], [0], [1, 2, 4, 5])], ids=str)
def test_ranks_remember_the_whole_batch_however_it_is_split(make, split):
    """Their sums add up to those of the batch, over two steps; a mean of means would not."""
    loss = make()
    if (alone := loss.initial_state()) is None:
        return
    shared = alone
    for pairs in (_random(6), _random(6, seed=3)):
        alone = loss.next_state(alone, loss.sums(pairs))
        sums = [loss.sums(_pick(pairs, part)) for part in split]
        assert {(one.shape, one.dtype) for one in sums} == {(alone.shape, torch.float64)}
        shared = loss.next_state(shared, torch.stack(sums).sum(0))
        torch.testing.assert_close(shared, alone, rtol=1e-12, atol=0)
        scores = [loss(pairs._replace(state=state)) for state in (shared, alone)]
        torch.testing.assert_close(*scores, rtol=1e-12, atol=0)


def test_a_loss_with_a_memory_says_what_it_sums():
    class Forgetful(DPOLoss):
        def initial_state(self):
            return torch.zeros(1, dtype=torch.float64)

    with pytest.raises(NotImplementedError, match="Expected Forgetful to define `sums`"):
        Forgetful().sums(_random())


def test_rewards_are_beta_times_the_log_ratios_or_log_probs(kind):
    pairs, loss = _random(), kind(**_two(kind)[0])
    chosen, rejected = loss.rewards(pairs)
    if Field.REFERENCE in loss.requires:
        assert torch.equal(chosen, loss.beta * pairs.chosen_logratio)
        assert torch.equal(rejected, loss.beta * pairs.rejected_logratio)
    else:
        assert torch.equal(chosen, loss.beta * pairs.policy_chosen.total)
        assert torch.equal(rejected, loss.beta * pairs.policy_rejected.total)


def test_the_interface_itself_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        PreferenceLoss()


def test_a_loss_without_a_reference_rewards_beta_times_log_probs():
    @dataclasses.dataclass(frozen=True)
    class Plain(PreferenceLoss):
        requires = frozenset()

        def __call__(self, pairs):
            return -pairs.policy_chosen.total

    pairs = _random()._replace(reference_chosen=None, reference_rejected=None)
    chosen, _ = Plain(beta=0.3).rewards(pairs)
    assert torch.equal(chosen, 0.3 * pairs.policy_chosen.total)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (
            {"requires": frozenset({"colision"})},
            r"`requires` of Wrong .* Field.COLLISION.* got frozenset\({'colision'}\)",
        ),
        ({"requires": frozenset({"kl"})}, "`requires` of Wrong"),  # a string that looks like one
        ({"requires": {Field.KL}}, "to be a frozenset"),
        ({"columns": "difficulty"}, "`columns` of Wrong to be a set of the names"),
        ({"columns": frozenset({"kl"})}, "What the models compute belongs to `requires`"),
    ],
)
def test_what_nobody_knows_is_an_error_where_the_class_is_made(declared, words):
    with pytest.raises(TypeError, match=words):
        type("Wrong", (DPOLoss,), declared)
