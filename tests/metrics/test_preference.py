"""What is measured does not depend on batches, dtypes or processes."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

import tiny
from lit_dpo import metrics
from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.losses import DPOLoss
from lit_dpo.metrics import KLEstimate, Mean, RewardAccuracy, RewardMargin
from lit_dpo.metrics.collections import of_set, preference_metrics
from lit_dpo.metrics.preference import _double, on_host
from lit_dpo.references import BaseReference

ALL = [getattr(metrics, name) for name in metrics.__all__ if name != "Mean"]
LOSS = DPOLoss(0.1)


def _pairs(size=12, seed=0) -> PairLogps:
    random = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 9, (size,), generator=random) for _ in range(2)]
    sides = []
    for length in (*lengths, *lengths):
        tokens = [-3 * torch.rand(int(n), generator=random) for n in length]
        sides.append(SequenceLogps(torch.stack([part.sum() for part in tokens]), length.float(), torch.cat(tokens)))
    return PairLogps(*sides)


def _part(pairs: PairLogps, start: int, stop: int) -> PairLogps:
    def side(given: SequenceLogps) -> SequenceLogps:
        parts = given.per_token.split([int(length) for length in given.length])
        return SequenceLogps(given.total[start:stop], given.length[start:stop], torch.cat(parts[start:stop]))

    return PairLogps(*(side(given) for given in pairs[:4]))


def _given(pairs: PairLogps) -> dict:
    chosen, rejected = LOSS.rewards(pairs)
    rewards = {"chosen_rewards": chosen, "rejected_rewards": rejected}
    return {"pairs": pairs, "losses": LOSS(pairs), "parts": {"dpo": 2 * LOSS(pairs)}, **rewards}


def _update(metric, pairs: PairLogps):
    wanted = inspect.signature(metric.update).parameters
    metric.update(**{name: value for name, value in _given(pairs).items() if name in wanted})
    return metric


@pytest.fixture(params=ALL, ids=lambda kind: kind.__name__)
def kind(request):
    return functools.partial(request.param, "dpo") if request.param is metrics.LossPart else request.param


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [11, 1]])
def test_any_split_into_batches_gives_the_same_value(kind, sizes):
    pairs, metric, start = _pairs(), kind(), 0
    for size in sizes:
        _update(metric, _part(pairs, start, start + size))
        start += size
    torch.testing.assert_close(metric.compute(), _update(kind(), pairs).compute(), rtol=1e-12, atol=0)


def test_the_sum_over_processes_is_the_value_of_all_pairs(kind):
    """Sums and counts are reduced by adding: two ranks with 9 and 3 pairs."""
    pairs = _pairs()
    first, second = _update(kind(), _part(pairs, 0, 9)), _update(kind(), _part(pairs, 9, 12))
    assert all(
        reduction is torch.sum or reduction.__name__ == "dim_zero_sum" for reduction in first._reductions.values()
    )
    total, count = first.total + second.total, first.count + second.count
    torch.testing.assert_close(total / count, _update(kind(), pairs).compute(), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_it_is_nan_before_the_first_update_and_after_a_reset(kind):
    metric = kind()
    assert metric.compute().isnan()
    metric.reset()  # torchmetrics remembers the computed value
    assert _update(metric, _pairs()).compute().isfinite()
    metric.reset()
    assert metric.compute().isnan()


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_states_stay_float64_and_long_under_a_cast_of_the_module_around_them(kind, cast):
    holder = torch.nn.Module()
    holder.metric = kind()
    assert cast(holder) is holder
    assert holder.metric.to("cpu") is holder.metric
    _update(holder.metric, _pairs())
    assert holder.metric.total.dtype == torch.float64
    assert holder.metric.count.dtype == torch.long
    torch.testing.assert_close(holder.metric.compute(), _update(kind(), _pairs()).compute(), rtol=0, atol=0)


def test_it_keeps_no_graph(kind):
    pairs = _pairs()
    pairs.policy_chosen.total.requires_grad_()
    assert not _update(kind(), pairs).total.requires_grad


def test_it_pickles_and_copies(kind):
    metric = _update(kind(), _pairs())
    for again in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert torch.equal(again.compute(), metric.compute())


def test_adding_many_small_values_does_not_drift():
    """A float32 sum of 0.1 stops being right after some millions; float64 does not."""
    metric = metrics.PreferenceLossMean()
    metric.update(torch.full((100,), 2.0**24))
    for _ in range(100):
        metric.update(torch.full((1,), 0.25))
    assert float(metric.compute()) == (100 * 2**24 + 25) / 200


# ---- each metric's own law ----


def test_a_tie_counts_one_half():
    """won, tied, lost: (1 + ½ + 0) / 3."""
    accuracy = RewardAccuracy()
    accuracy.update(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0]))
    assert accuracy.compute().item() == 0.5


def test_policy_equal_to_reference_has_accuracy_one_half_margin_0_and_kl_0():
    pairs = _pairs()
    pairs = pairs._replace(reference_chosen=pairs.policy_chosen, reference_rejected=pairs.policy_rejected)
    assert _update(RewardAccuracy(), pairs).compute() == 0.5
    assert _update(RewardMargin(), pairs).compute() == 0
    assert _update(KLEstimate(), pairs).compute() == 0


def test_swapping_the_sides_turns_accuracy_and_margin_round():
    pairs = _pairs()
    swapped = PairLogps(*(pairs[number] for number in (1, 0, 3, 2)))
    one, other = (_update(RewardAccuracy(), given).compute() for given in (pairs, swapped))
    assert one + other == 1
    one, other = (_update(RewardMargin(), given).compute() for given in (pairs, swapped))
    torch.testing.assert_close(one, -other)


def test_the_margin_is_the_difference_of_the_two_rewards():
    pairs = _pairs()
    chosen, rejected = (_update(kind(), pairs).compute() for kind in (metrics.ChosenReward, metrics.RejectedReward))
    torch.testing.assert_close(_update(RewardMargin(), pairs).compute(), chosen - rejected)


def test_log_probs_are_per_token_and_not_means_of_means():
    """(−2 − 30) / (1 + 9), not (−2 − 30/9) / 2."""
    pairs = tiny.logps([-2.0, -30.0], [-1.0, -1.0], lengths=([1, 9], [1, 1]))
    assert _update_pairs(metrics.ChosenLogps(), pairs) == pytest.approx(-3.2)
    assert _update_pairs(metrics.RejectedLogps(), pairs) == pytest.approx(-1.0)


def _update_pairs(metric, pairs) -> float:
    metric.update(pairs=pairs)
    return float(metric.compute())


def test_kl_is_half_the_mean_squared_difference_per_token():
    """Differences 1, 0 and 2 in three tokens: ½ · 5/3."""
    policy = SequenceLogps(torch.tensor([-3.0]), torch.tensor([2.0]), torch.tensor([-1.0, -2.0]))
    other = SequenceLogps(torch.tensor([-3.0]), torch.tensor([1.0]), torch.tensor([-3.0]))
    reference = policy._replace(per_token=torch.tensor([-2.0, -2.0]))
    pairs = PairLogps(policy, other, reference, other._replace(per_token=torch.tensor([-5.0])))
    assert _update_pairs(KLEstimate(), pairs) == pytest.approx(5 / 6)


def test_kl_is_zero_only_where_policy_and_reference_agree_on_every_token():
    """Differences that cancel in the sum do not cancel here."""
    policy = SequenceLogps(torch.tensor([-3.0]), torch.tensor([2.0]), torch.tensor([-1.0, -2.0]))
    reference = policy._replace(per_token=torch.tensor([-2.0, -1.0]))
    assert _update_pairs(KLEstimate(), PairLogps(policy, policy, reference, policy)) > 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_kl_without_a_reference_or_without_tokens_is_nan_and_not_0():
    pairs = _pairs()
    alone = PairLogps(pairs.policy_chosen, pairs.policy_rejected)
    sums = PairLogps(*(side._replace(per_token=None) for side in pairs[:4]))
    assert math.isnan(_update_pairs(KLEstimate(), alone))
    assert math.isnan(_update_pairs(KLEstimate(), sums))


# ---- the collection of the module ----


def _collection():
    from lit_dpo.module import DPOModule

    return DPOModule.configure_metrics(SimpleNamespace(loss=LOSS, reference=BaseReference()))


def test_the_modules_collection_gives_each_metric_the_arguments_that_it_names():
    pairs = _pairs()
    collection = _collection()
    collection.update(**_given(pairs))
    found = collection.compute()
    assert {type(metric) for metric in collection.values()} == set(ALL) - {metrics.LossPart}  # DPO has no parts
    for name, metric in collection.items():
        torch.testing.assert_close(found[name], _update(type(metric)(), pairs).compute())


def test_metrics_of_the_collection_do_not_share_states():
    """Compute groups would merge metrics whose first states happen to be equal."""
    pairs = _pairs(1)
    same = pairs._replace(reference_chosen=pairs.policy_chosen, reference_rejected=pairs.policy_rejected)
    collection = _collection()
    collection.update(**_given(same))
    collection.update(**_given(pairs))
    found = collection.compute()
    assert float(found["chosen_reward"]) != float(found["rejected_reward"])


def test_a_set_of_several_is_measured_by_itself_and_what_all_measured_before_is_not_its():
    sets, together = torch.nn.ModuleDict(), preference_metrics(["dpo"]).clone(prefix="val/").eval()
    together.update(**_given(first := _pairs(5)))
    key, mine = of_set(sets, together, "val", "a.b")
    assert (key, next(iter(mine))) == ("val_a_b", "val/a.b/" + sorted(together.keys(keep_base=True))[0])
    assert all(metric.training and metric.update_count == 0 for metric in mine.values())
    mine.update(**_given(second := _pairs(7, seed=1)))
    assert of_set(sets, together, "val", "a.b")[1] is mine
    for name, given in (("val/", first), ("val/a.b/", second)):
        found = (together if name == "val/" else mine).compute()
        torch.testing.assert_close(float(found[f"{name}loss"]), float(LOSS(given).mean()))
    key, numbered = of_set(sets, together, "test", 1)
    assert (key, list(sets)) == ("test_1", ["val_a_b", "test_1"])
    assert all(name.startswith("test/") and name.count("/") == 1 for name in numbered)


def test_a_kl_is_measured_where_it_can_be_alone():
    assert set(preference_metrics(kl=True)) - set(preference_metrics()) == {"kl"}


def test_numbers_of_any_kind_come_to_the_cpu_as_they_are():
    fine = 1 + 2.0**-40
    given = {"b": torch.tensor([fine], dtype=torch.float64, requires_grad=True), "a": 3, "c": torch.tensor(True)}
    found = on_host({**given, "d": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert {name: value.item() for name, value in found.items()} == {"b": fine, "a": 3.0, "c": 1.0, "d": 0.5}
    assert list(found) == ["b", "a", "c", "d"]
    assert all(one.dtype == torch.float64 and one.shape == () and not one.requires_grad for one in found.values())
    assert on_host({}) == {}
    assert [_double(torch.device(kind)) for kind in ("cuda", "mps")] == [torch.float64, torch.float32]  # what they have


def test_a_metric_of_your_own_takes_what_it_names():
    class LongAnswers(Mean):
        def update(self, pairs: PairLogps) -> None:
            self.add(pairs.policy_chosen.length > 4)

    collection = _collection()
    collection.add_metrics({"long": LongAnswers()})
    pairs = _pairs()
    collection.update(**_given(pairs))
    assert float(collection.compute()["long"]) == float((pairs.policy_chosen.length > 4).double().mean())
