"""Agreement with the peers' own code on fixed inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo.data.batch import EncodedPrompt, collate
from lit_dpo.logps import CompletionLogps, PairLogps, SequenceLogps
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.score import completion_logps
from lit_dpo.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    BCOLoss,
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
    SFTLoss,
    SimPOLoss,
    SPPOLoss,
)


@pytest.fixture(scope="module")
def referee():
    return json.loads((Path(__file__).parent / "referee" / "losses.json").read_text(encoding="utf-8"))


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


BETA_ONLY = {
    "apozero": APOZeroLoss,
    "apo_zero": APOZeroLoss,
    "apodown": APODownLoss,
    "apo_down": APODownLoss,
    "spppohard": SPPOLoss,
    "sppo_hard": SPPOLoss,
    "ncapair": NCALoss,
    "nca_pair": NCALoss,
    "discopop": DiscoPOPLoss,
    "sigmoid_norm": NormalizedDPOLoss,
}
TRL_AND_LIGER = [
    "HingeLoss",
    "RobustDPOLoss",
    "EXOLoss",
    "NCALoss",
    "SPPOLoss",
    "APOZeroLoss",
    "APODownLoss",
    "DiscoPOPLoss",
    "BCOLoss",
]
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


def _ours(case: dict) -> PreferenceLoss:
    """The same loss as a peer's settings."""
    settings, name = case["params"], case["loss"]
    beta, smoothing = settings.get("beta"), settings.get("label_smoothing")
    if name in BETA_ONLY:
        return BETA_ONLY[name](beta)
    if kind := settings.get("f_divergence_type"):
        flipped = settings.get("f_alpha_divergence_coef")  # TRL ≥ 1.0 gives 1 − α
        return FDPOLoss(beta, DIVERGENCES[kind], None if flipped is None else 1 - flipped)
    if settings.get("reference_free"):
        return CPOLoss(beta, nll_weight=0.0)
    match name:
        case "dpo" | "sigmoid":
            return DPOLoss(beta) if smoothing is None else CDPOLoss(beta, smoothing)
        case "ipo":
            return IPOLoss(beta, "mean" if case["peer"].startswith("TRL") else "sum")
        case "hinge":
            return HingeLoss(settings.get("gamma", beta))
        case "robust":
            return RobustDPOLoss(beta, smoothing)
        case "exo_pair" | "exopair":
            return EXOLoss(beta, 1e-3 if smoothing is None else smoothing)
        case "aot":
            return AOTLoss(beta, smoothing)
        case "aot_unpaired":
            return AOTUnpairedLoss(beta, smoothing)
        case "simpo":
            return SimPOLoss(beta, beta * settings["gamma_beta_ratio"], smoothing, settings["loss_type"])
        case "bco_pair" | "bcopair":
            return BCOLoss(beta, "zero")
        case "sft":  # one pair at a time
            return SFTLoss()
    raise AssertionError(f"{name}, {settings} is not ours")


def test_losses_and_rewards_are_the_peers(referee, pairs):
    seen = []
    for case in referee["cases"]:
        loss, label = _ours(case), f"{case['peer']}, {case['params']}"
        expected, found = torch.tensor(case["losses"], dtype=torch.float64), loss(pairs)
        assert found.isfinite().all()
        if len(expected) == 1:  # OpenRLHF's batch mean, and AOT's
            found = found.mean(dim=0, keepdim=True)
        if isinstance(loss, FDPOLoss):  # TRL overflows, and computes the α-divergence in float32 with a cap at e^80
            fits = (expected < 1e30) if loss.divergence == "alpha" else expected.isfinite()
            assert (~fits).sum() == {"js": 0, "forward_kl": 1, "alpha": 2}[loss.divergence]
            expected, found = expected[fits], found[fits]
        relative, absolute = (1e-4, 1e-6) if case["params"].get("f_alpha_divergence_coef") else (1e-12, 1e-9)
        torch.testing.assert_close(
            found, expected, rtol=relative, atol=absolute, msg=lambda text, at=label: f"{at}: {text}"
        )
        for mine, side, length in zip(
            loss.rewards(pairs),
            ("chosen", "rejected"),
            (pairs.policy_chosen.length, pairs.policy_rejected.length),
            strict=True,
        ):
            theirs = case[f"{side}_rewards"]
            if theirs is None or len(theirs) != len(mine):
                continue
            if case["params"].get("reference_free") or isinstance(loss, SFTLoss):
                continue  # Mitchell's and TRL's rewards subtract the reference even where the loss does not
            mine = mine / length if isinstance(loss, SimPOLoss) else mine  # per token there
            theirs = torch.tensor(theirs, dtype=torch.float64)
            torch.testing.assert_close(mine, theirs, rtol=1e-12 if relative < 1e-6 else 1e-5, atol=absolute)
        variant = next(
            (getattr(loss, name) for name in ("average", "average_over", "divergence", "link") if hasattr(loss, name)),
            None,
        )
        seen.append((type(loss).__name__, variant, case["peer"].split()[0]))
    mitchell, liger = "eric-mitchell/direct-preference-optimization", "Liger-Kernel"
    assert {
        ("DPOLoss", None, "TRL"),
        ("DPOLoss", None, "torchtune"),
        ("DPOLoss", None, "OpenRLHF"),
        ("DPOLoss", None, mitchell),
        ("DPOLoss", None, liger),
        ("CDPOLoss", None, mitchell),
        ("CDPOLoss", None, "torchtune"),
        ("CDPOLoss", None, "OpenRLHF"),
        ("IPOLoss", "mean", "TRL"),
        ("IPOLoss", "sum", mitchell),
        ("IPOLoss", "sum", "OpenRLHF"),
        ("HingeLoss", None, "torchtune"),
        *((name, None, peer) for name in TRL_AND_LIGER for peer in ("TRL", liger)),
        ("AOTLoss", None, "TRL"),
        ("AOTUnpairedLoss", None, "TRL"),
        ("NormalizedDPOLoss", None, "TRL"),
        *(("FDPOLoss", divergence, "TRL") for divergence in DIVERGENCES.values()),
        ("SimPOLoss", "sigmoid", "princeton-nlp/SimPO"),
        ("SimPOLoss", "hinge", "princeton-nlp/SimPO"),
        ("SFTLoss", "sequence", "TRL"),
        ("CPOLoss", None, mitchell),
    } == set(seen)
    assert len(seen) == 44


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
        encoded.append(EncodedPrompt(prompt, [chosen, rejected]))
    return collate(encoded)


@pytest.fixture(scope="module", params=["flat", "padded"])
def policy(request, shared, trl):
    return _load(shared, trl["policy"], request.param)


@pytest.fixture(scope="module")
def scored(shared, trl, batch, policy) -> PairLogps:
    """With the policy's graph, down to all of its parameters."""
    reference = _load(shared, trl["reference"], "flat")
    with torch.no_grad():
        frozen = completion_logps(reference, batch)
    return CompletionLogps.of(batch, completion_logps(policy, batch), frozen).pairs()


def _load(shared, name, layout):
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / name, dtype=torch.float32)
    assert choose_layout(model, "auto" if layout == "flat" else "sdpa") == layout
    return model.requires_grad_()


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
    torch.testing.assert_close(getattr(scored, side).total.detach(), torch.tensor(trl[name]), rtol=0, atol=1e-3)


SETTINGS = {
    "sigmoid|beta=0.1|label_smoothing=0.0": DPOLoss(0.1),
    "sigmoid|beta=0.3|label_smoothing=0.0": DPOLoss(0.3),
    "ipo|beta=0.1|label_smoothing=0.0": IPOLoss(0.1, "mean"),
    "hinge|beta=0.1|label_smoothing=0.0": HingeLoss(0.1),
    "robust|beta=0.1|label_smoothing=0.2": RobustDPOLoss(0.1, 0.2),
    "exo_pair|beta=0.1|label_smoothing=0.001": EXOLoss(0.1, 1e-3),
    "nca_pair|beta=0.1|label_smoothing=0.0": NCALoss(0.1),
    "bco_pair|beta=0.1|label_smoothing=0.0": BCOLoss(0.1, "zero"),
    "sppo_hard|beta=0.1|label_smoothing=0.0": SPPOLoss(0.1),
    "aot|beta=0.1|label_smoothing=0.0": AOTLoss(0.1),
    "aot_unpaired|beta=0.1|label_smoothing=0.0": AOTUnpairedLoss(0.1),
    "apo_zero|beta=0.1|label_smoothing=0.0": APOZeroLoss(0.1),
    "apo_down|beta=0.1|label_smoothing=0.0": APODownLoss(0.1),
    "discopop|beta=0.1|label_smoothing=0.0": DiscoPOPLoss(0.1),
    "sft|beta=0.1|label_smoothing=0.0": SFTLoss("token"),
    "sigmoid_norm|beta=2.0|label_smoothing=0.0": NormalizedDPOLoss(2.0),
}


def test_every_setting_is_refereed(trl):
    assert trl["results"].keys() == SETTINGS.keys()


@pytest.mark.parametrize(("key", "loss"), SETTINGS.items())
def test_batch_losses_and_rewards_are_trls(key, loss, scored, trl):
    expected = trl["results"][key]
    assert float(loss(scored.detach()).mean()) == pytest.approx(expected["loss"], rel=1e-4)
    # TRL's rewards subtract the reference whatever the loss
    chosen, rejected = (DPOLoss(0.1) if isinstance(loss, SFTLoss) else loss).rewards(scored.detach())
    assert float(chosen.mean()) == pytest.approx(expected["rewards/chosen"], abs=1e-4)
    assert float(rejected.mean()) == pytest.approx(expected["rewards/rejected"], abs=1e-4)
    assert float((chosen > rejected).double().mean()) == expected["rewards/accuracies"]


# A layout's gradients are those of its log-probs: of sums, means, a batch's tokens and a sorted batch, one loss each.
PADDED = [key for key in SETTINGS if key.startswith(("sigmoid|beta=0.1", "ipo|", "sft|", "aot|"))]


@pytest.mark.parametrize(
    ("policy", "key"),
    [("flat", key) for key in SETTINGS] + [("padded", key) for key in PADDED],
    indirect=["policy"],
    scope="module",  # pytest 8.3 takes it for a function's otherwise
)
def test_gradient_norms_are_trls(key, scored, policy, trl):
    """Of the mean loss in all of the policy's parameters: full fine-tuning."""
    loss = SETTINGS[key]
    gradients = torch.autograd.grad(loss(scored).mean(), list(policy.parameters()), retain_graph=True)
    norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
    assert float(norm) == pytest.approx(trl["results"][key]["grad_norm"], rel=1e-3)
