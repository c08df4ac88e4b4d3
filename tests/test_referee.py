"""Agreement with the peers' own code on fixed inputs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo.data.batch import EncodedPair, collate_pairs
from lit_dpo.logps import PairLogps, SequenceLogps
from lit_dpo.logps.score import choose_layout, pair_logps
from lit_dpo.losses import CDPOLoss, DPOLoss, IPOLoss, PreferenceLoss


@pytest.fixture(scope="module")
def referee(shared):
    return json.loads((shared / "data" / "referee" / "losses.json").read_text())


@pytest.fixture(scope="module")
def pairs(referee) -> PairLogps:
    given = {name: torch.tensor(values, dtype=torch.float64) for name, values in referee["inputs"].items()}
    return PairLogps(
        *(
            SequenceLogps(given[f"{model}_{side}"], given[f"{side}_len"])
            for model in ("policy", "ref")
            for side in ("chosen", "rejected")
        )
    )


def _ours(case: dict) -> PreferenceLoss | None:
    """The same loss as a peer's settings, or None where the package has none."""
    settings, summed = case["params"], not case["peer"].startswith("TRL")
    if settings.get("reference_free") or settings.get("f_divergence_type"):
        return None
    beta, smoothing = settings.get("beta"), settings.get("label_smoothing")
    if case["loss"] == "ipo":
        return IPOLoss(beta, "sum" if summed else "mean")
    if case["loss"] in ("dpo", "sigmoid"):
        return DPOLoss(beta) if smoothing is None else CDPOLoss(beta, smoothing)
    return None


def test_losses_and_rewards_are_the_peers(referee, pairs):
    seen = []
    for case in referee["cases"]:
        if (loss := _ours(case)) is None:
            continue
        label = f"{case['peer']}, {case['params']}"
        expected = torch.tensor(case["losses"], dtype=torch.float64)
        found = loss(pairs)
        if len(expected) == 1:  # OpenRLHF's batch mean
            found = found.mean(dim=0, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9, msg=lambda text, at=label: f"{at}: {text}")
        for mine, theirs in zip(loss.rewards(pairs), ("chosen_rewards", "rejected_rewards"), strict=True):
            if case[theirs] is not None and len(case[theirs]) == len(mine):
                torch.testing.assert_close(mine, torch.tensor(case[theirs], dtype=torch.float64), rtol=1e-12, atol=1e-9)
        seen.append((type(loss).__name__, getattr(loss, "average", None), case["peer"].split()[0]))
    assert {
        ("DPOLoss", None, "TRL"),
        ("DPOLoss", None, "torchtune"),
        ("DPOLoss", None, "OpenRLHF"),
        ("DPOLoss", None, "eric-mitchell/direct-preference-optimization"),
        ("CDPOLoss", None, "eric-mitchell/direct-preference-optimization"),
        ("CDPOLoss", None, "OpenRLHF"),
        ("IPOLoss", "mean", "TRL"),
        ("IPOLoss", "sum", "eric-mitchell/direct-preference-optimization"),
        ("IPOLoss", "sum", "OpenRLHF"),
    } <= set(seen)


# ---- TRL's trainer end to end, from its token ids ----


@pytest.fixture(scope="module")
def trl(shared):
    return json.loads((shared / "data" / "referee" / "trl_stories260K_text.json").read_text())


@pytest.fixture(scope="module")
def batch(trl):
    rows = []
    for ids, mask in zip(trl["input_ids"], trl["completion_mask"], strict=True):
        start = mask.index(1)
        rows.append((ids[:start], [token for token, scored in zip(ids, mask, strict=True) if scored]))
    size = len(rows) // 2
    encoded = []
    for (prompt, chosen), (same, rejected) in zip(rows[:size], rows[size:], strict=True):
        assert prompt == same
        encoded.append(EncodedPair(prompt, chosen, rejected))
    return collate_pairs(encoded)


@pytest.fixture(scope="module", params=["flat", "padded"])
def scored(request, shared, trl, batch) -> PairLogps:
    sides = []
    for name in ("policy", "reference"):
        model = AutoModelForCausalLM.from_pretrained(shared / "models" / trl[name], dtype=torch.float32)
        assert choose_layout(model, "auto" if request.param == "flat" else "sdpa") == request.param
        with torch.no_grad():
            sides += pair_logps(model, batch)
    return PairLogps(*sides)


@pytest.mark.parametrize(
    ("side", "name"),
    [
        ("policy_chosen", "policy_chosen_logps"),
        ("policy_rejected", "policy_rejected_logps"),
        ("reference_chosen", "ref_chosen_logps"),
        ("reference_rejected", "ref_rejected_logps"),
    ],
)
def test_log_probs_of_each_pair_are_trls(side, name, scored, trl):
    torch.testing.assert_close(getattr(scored, side).total, torch.tensor(trl[name]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "loss"),
    [
        ("sigmoid|beta=0.1|label_smoothing=0.0", DPOLoss(0.1)),
        ("sigmoid|beta=0.3|label_smoothing=0.0", DPOLoss(0.3)),
        ("ipo|beta=0.1|label_smoothing=0.0", IPOLoss(0.1, "mean")),
    ],
)
def test_batch_losses_and_rewards_are_trls(key, loss, scored, trl):
    expected = trl["results"][key]
    assert float(loss(scored).mean()) == pytest.approx(expected["loss"], abs=1e-4)
    chosen, rejected = loss.rewards(scored)
    assert float(chosen.mean()) == pytest.approx(expected["rewards/chosen"], abs=1e-4)
    assert float(rejected.mean()) == pytest.approx(expected["rewards/rejected"], abs=1e-4)
    assert float((chosen > rejected).double().mean()) == expected["rewards/accuracies"]
