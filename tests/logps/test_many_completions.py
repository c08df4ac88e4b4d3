"""Many completions of one prompt, each computed once: every number is that of the comparisons written out as pairs."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from transformers import AttentionInterface

import tiny
from lit_dpo import (
    AdapterReference,
    CachedReference,
    DPOLoss,
    DPOModule,
    EMAReference,
    IPOLoss,
    LoRAPolicy,
    ModelReference,
)
from lit_dpo.data.batch import EncodedPrompt, collate, places
from lit_dpo.errors import TrainingError
from lit_dpo.logps import attention, choice
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.microbatch import GradientSum, microbatches
from lit_dpo.logps.probe import probe_batch
from lit_dpo.logps.records import CompletionLogps, SequenceLogps
from lit_dpo.logps.score import completion_logps
from lit_dpo.losses import AOTLoss, DiscoPOPLoss, SFTLoss, SimPOLoss
from lit_dpo.metrics import KLEstimate
from losses.test_contract import LOSSES, SETTINGS
from training import trainer

PROMPTS = tiny.pairs((9, 7, 5), (4, 3, 8, 2), (12, 6, 1, 9, 4))
BATCH = collate(PROMPTS)
PAIRWISE = [kind for kind in LOSSES if not kind.per_prompt and kind.__name__ != "LiPOLoss"]


def _module(tmp_path, loss, model, reference=None):
    made = DPOModule(LoRAPolicy("nowhere", quantization="none"), loss=loss, reference=reference)
    made.model = model
    tiny.randomize(made.model)
    made._trainer = trainer(tmp_path)
    return made.train()


def _columns(count):
    """Numbers for each comparison."""
    return {
        "weight": torch.linspace(0.5, 2.0, count).tolist(),
        "score_margin": torch.linspace(0.2, 3.0, count).tolist(),
        "probability": torch.linspace(0.6, 0.95, count).tolist(),
    }


def _step(dpo, batch, parts=None):
    """Losses and gradients of a batch, whole or in parts."""
    if parts is None:
        losses = dpo.losses_of(dpo.passes.remember(dpo.pair_logps(batch)))
        losses.sum().backward()
    else:
        total, losses, _ = dpo.accumulate(parts, batch)
        total.backward()
    return losses.detach(), tiny.gradients(dpo.model)


# ---- the arithmetic ----


@pytest.fixture(scope="module")
def doubles():
    """One for all losses: no step is made. What is computed in float32 is in float64 here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        model = tiny.lora(tiny.model("gpt2"), fan_in_fan_out=True).double()
        choose_layout(model)
    return model


@pytest.mark.parametrize("kind", PAIRWISE, ids=lambda kind: kind.__name__)
def test_every_loss_is_that_of_the_pairs_to_the_precision_of_float64(kind, doubles, tmp_path, monkeypatch):
    """Also the losses that couple pairs, remember, or read whole distributions: they cannot know."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what is computed in float32 is so in float64
    columns = _columns(BATCH.size)
    batch, pairs = collate(PROMPTS, columns=columns), collate(tiny.written_out(PROMPTS), columns=columns)
    for settings in [{}, *SETTINGS.get(kind, [])]:
        listed, apart = (_step(_module(tmp_path, kind(**settings), doubles), given) for given in (batch, pairs))
        assert listed[0].dtype == torch.float64
        torch.testing.assert_close(listed[0], apart[0], rtol=1e-12, atol=1e-12)
        tiny.assert_same_gradients(apart[1], listed[1], 1e-12)


@pytest.fixture(scope="module", params=["nf4", "none"])
def stories(shared, request):
    """One for all losses."""
    model = LoRAPolicy(str(shared / "models" / "stories260K"), quantization=request.param, r=8).load()
    choose_layout(model)
    return model


@pytest.mark.parametrize(
    ("loss", "tolerance"),
    [(DPOLoss(), 2e-5), (IPOLoss(average="sum"), 5e-5), (SimPOLoss(), 2e-5), (DiscoPOPLoss(), 2e-4), (AOTLoss(), 2e-5)],
    ids=lambda one: type(one).__name__,
)
def test_a_real_model_in_float32_and_in_4_bits(stories, loss, tolerance, tmp_path):
    vocabulary = stories.get_base_model().config.vocab_size
    prompts = tiny.pairs(*[(20 + n, 9, 14 + n, 6, 11) for n in range(3)], vocabulary=vocabulary)
    listed, apart = (
        _step(_module(tmp_path, loss, stories), collate(given)) for given in (prompts, tiny.written_out(prompts))
    )
    torch.testing.assert_close(listed[0], apart[0], rtol=tolerance, atol=tolerance)
    tiny.assert_same_gradients(apart[1], listed[1], tolerance)


@pytest.fixture(params=["auto", "sdpa"], ids=["flat", "padded"])
def model(request):
    found = tiny.lora(tiny.model(), r=4)
    choose_layout(found, request.param)
    return found


def test_any_microbatch_and_parts_of_a_prompt_give_the_gradients_of_the_whole_batch(model, tmp_path):
    """A prompt alone, its completions in parts of two, and a loss of the whole batch on top of that."""
    for loss in (DPOLoss(), AOTLoss(), SFTLoss(average_over="token")):
        dpo = _module(tmp_path, loss, model)
        expected = _step(dpo, BATCH)
        for limit, of_one, count in ((40, 10**9, 2), (1, 10**9, 3), (1, 1, 5), (21, 21, 4)):
            parts = microbatches(BATCH, limit, of_one)
            assert len(parts) == count
            assert sum(len(part.completion_lengths) for part in parts) == 9
            losses, gradients = _step(dpo, BATCH, parts)
            torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-5)
            tiny.assert_same_gradients(expected[1], gradients, 2e-5)


def test_a_prompt_in_parts_has_the_dropout_masks_of_its_first_pass(tmp_path):
    dpo = _module(tmp_path, DPOLoss(), tiny.lora(tiny.model(), r=4, lora_dropout=0.5))
    choose_layout(dpo.model)
    batch = collate([PROMPTS[2]])
    parts = microbatches(batch, 1, 1)
    assert [part.size for part in parts] == [0, 0]
    with pytest.raises(TrainingError, match="Expected the batch of these parts"):
        dpo.accumulate(parts)
    trained = [p for p in dpo.model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    total, _, _ = dpo.passes.in_two_passes(parts, batch, GradientSum(trained))
    total.backward()
    found = tiny.gradients(dpo.model)
    torch.manual_seed(3)  # by hand: both parts with their graphs, under the same masks
    logps = [completion_logps(dpo.model, part) for part in parts]
    joined = SequenceLogps(*(torch.cat([one[field] for one in logps]) for field in range(3)))
    with torch.no_grad():
        reference = dpo.reference.logps(dpo.model, batch)
    dpo.losses_of(CompletionLogps.of(batch, joined, reference).pairs()).sum().backward()
    tiny.assert_same_gradients(tiny.gradients(dpo.model), found, 2e-5)


def test_permuting_completions_changes_nothing(model, tmp_path):
    permuted = []
    for one in PROMPTS:
        order = list(reversed(range(len(one.completions))))
        where = {old: new for new, old in enumerate(order)}
        comparisons = [(where[chosen], where[rejected]) for chosen, rejected in one.comparisons]
        permuted.append(EncodedPrompt(one.prompt, [one.completions[place] for place in order], comparisons))
    dpo = _module(tmp_path, DPOLoss(), model)
    (losses, gradients), (others, theirs) = _step(dpo, BATCH), _step(dpo, collate(permuted))
    torch.testing.assert_close(losses, others, rtol=0, atol=1e-5)
    tiny.assert_same_gradients(gradients, theirs, 1e-5)


# ---- the probe ----


@pytest.mark.parametrize(("source", "target"), [(0, 1), (0, 2), (1, 2)])
def test_a_leak_between_any_two_completions_is_seen_before_training(source, target, monkeypatch):
    """Far below the tolerance of the numbers themselves: so much of one completion's values gets into another."""

    def leaking(module, query, key, value, mask, *, pair_layout, **options):
        out, weights = attention.pair_attention_forward(
            module, query, key, value, mask, pair_layout=pair_layout, **options
        )
        spans = pair_layout.prompts[0].spans
        if len(spans) <= target:
            return out, weights
        (begin, end), (first, last) = spans[source], spans[target]
        leak = torch.zeros_like(out)
        leak[:, first:last] = 1e-2 * value[:, :, begin:end].mean(2).repeat_interleave(out.shape[2] // value.shape[1], 1)
        return out + leak, weights

    model = tiny.model()
    assert choose_layout(model) == "flat"
    AttentionInterface.register(attention.PAIR_ATTENTION, leaking)
    try:
        batch = probe_batch(model)
        assert 1e-4 < choice._leak(model, batch, choice._tokens(model, batch)) < 0.1
    finally:
        AttentionInterface.register(attention.PAIR_ATTENTION, attention.pair_attention_forward)
    assert choice._leak(model, batch, choice._tokens(model, batch)) < 1e-5


# ---- metrics ----


def test_drift_counts_a_completion_once_however_often_it_is_compared(model, tmp_path):
    dpo = _module(tmp_path, DPOLoss(), model)
    with torch.no_grad():
        pairs = dpo.pair_logps(BATCH)
    policy, reference = pairs.completions[:2]
    measured = KLEstimate()
    measured.update(pairs)
    expected = (0.5 * (policy.per_token.double() - reference.per_token.double()) ** 2).mean()
    torch.testing.assert_close(measured.compute(), expected)
    assert measured.count == BATCH.completion_lengths.sum()


# ---- references ----


@pytest.mark.parametrize("kind", ["base", "adapter", "moving", "another model", "stored"])
def test_every_reference_scores_each_completion_once(kind, tmp_path, monkeypatch):
    folder = tiny.directory(tmp_path / "base")
    made = {
        "base": lambda: None,
        "adapter": lambda: AdapterReference(str(_adapter(tmp_path))),
        "moving": EMAReference,
        "another model": lambda: ModelReference(str(tiny.directory(tmp_path / "other", seed=5)), quantization="none"),
        "stored": lambda: CachedReference(directory=str(tmp_path / "cache")),
    }[kind]()
    policy = LoRAPolicy(str(folder), quantization="none", r=2)
    dpo = DPOModule(policy, reference=made)
    dpo.configure_model()
    listed, pairs = (dpo.reference.logps(dpo.model, collate(given)) for given in (PROMPTS, tiny.written_out(PROMPTS)))
    assert listed.total.shape == (9,)
    expected = CompletionLogps.of(BATCH, listed, listed).pairs()
    found = CompletionLogps.of(collate(tiny.written_out(PROMPTS)), pairs, pairs).pairs()
    torch.testing.assert_close(found.margin, expected.margin, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        found.reference_rejected.per_token, expected.reference_rejected.per_token, rtol=0, atol=1e-5
    )


def _adapter(folder):
    tiny.lora(tiny.model(), seed=3).save_pretrained(folder / "adapter")
    return folder / "adapter"


# ---- what counts how much ----


def test_average_over_prompts_is_the_mean_of_their_means(model, tmp_path):
    dpo = _module(tmp_path, DPOLoss(), model)
    each = _step(dpo, BATCH)[0].split([1, 3, 6])
    dpo.average_over = "prompt"
    losses, gradients = _step(dpo, BATCH)
    torch.testing.assert_close(losses, torch.stack([one.mean() for one in each]))
    for limit in (30, 1):
        others, theirs = _step(dpo, BATCH, BATCH.cut(limit))
        torch.testing.assert_close(others, losses, rtol=0, atol=1e-5)
        tiny.assert_same_gradients(gradients, theirs, 2e-5)
    pairs = collate(tiny.pairs((5, 4, 3), (6, 2, 2)))
    one = _step(dpo, pairs)[0]
    dpo.average_over = "comparison"
    assert torch.equal(one, _step(dpo, pairs)[0])


def test_places_are_those_of_the_batch_and_parts_need_no_new_numbers():
    expected = [(a, b) for a, b in itertools.combinations(range(2), 2)]
    expected += [(2 + a, 2 + b) for a, b in itertools.combinations(range(3), 2)]
    expected += [(5 + a, 5 + b) for a, b in itertools.combinations(range(4), 2)]
    assert places(BATCH).tolist() == [list(one) for one in expected]
    assert BATCH.chosen_lengths.tolist() == [BATCH.completion_lengths[a] for a, _ in expected]
    for part, numbers in zip(BATCH.cut(1), ([0], [1], [2]), strict=True):
        alone = collate([PROMPTS[number] for number in numbers], part.indices.tolist())
        torch.testing.assert_close(part._asdict(), alone._asdict(), rtol=0, atol=0)


def test_some_completions_of_a_batch_are_those_of_a_batch_of_them():
    picked = BATCH.of_completions([1, 3, 5, 8])
    kept = [(0, [1]), (1, [1]), (2, [0, 3])]
    alone = collate(
        [EncodedPrompt(PROMPTS[n].prompt, [PROMPTS[n].completions[k] for k in some], ()) for n, some in kept]
    )
    torch.testing.assert_close(picked._asdict(), alone._asdict(), rtol=0, atol=0)


@pytest.mark.parametrize("comparisons", [[(0, 2)], [(-1, 0)]])
def test_a_comparison_of_what_is_not_there_is_refused(comparisons):
    with pytest.raises(ValueError, match="Expected comparisons of 2 completions"):
        collate([EncodedPrompt([1], [[2], [3]], comparisons)])


@pytest.mark.parametrize("given", [{"indices": [4]}, {"columns": {"weight": [1.0, 2.0]}}], ids=str)
def test_numbers_that_are_not_one_for_each_comparison_are_refused(given):
    with pytest.raises(ValueError, match=r"Expected 3 (indices|weight), one for each comparison, but got [12]"):
        collate([PROMPTS[1]], **given)


def test_a_forward_that_gives_something_else_is_refused(model, tmp_path):
    class Sides(DPOModule):
        def forward(self, batch):
            found = super().forward(batch)
            return found, found

    dpo = Sides(LoRAPolicy("nowhere", quantization="none"))
    dpo.model, dpo._trainer = model, trainer(tmp_path)
    with pytest.raises(Exception, match="`SequenceLogps` of the batch's 9 completions, in their order, but Sides gave"):
        dpo.pair_logps(BATCH)


def test_a_step_of_a_long_list_needs_the_memory_of_two_completions(tmp_path):
    from lit_dpo.memory import LiveBytes

    base = tiny.model(max_position_embeddings=512, num_hidden_layers=4)
    dpo = _module(tmp_path, DPOLoss(), tiny.lora(base, r=4))
    choose_layout(dpo.model)
    batch = tiny.batch((40, *[60] * 12))

    def peak(parts):
        with LiveBytes() as memory:
            dpo.accumulate(parts, batch)[0].backward()
        dpo.zero_grad()
        return memory.peak

    whole, pieces = peak([batch]), peak(microbatches(batch, 160, 160))
    assert pieces < 0.35 * whole


def test_gradients_of_a_completion_in_many_comparisons_add_up():
    """Closed form: −β·σ(−βΔ) of each comparison that it wins, and plus that of each that it loses."""
    total = torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(3, dtype=torch.float64)
    batch = collate([EncodedPrompt([1], [[2], [3], [4]], [(0, 1), (0, 2), (1, 2)])])
    ones = torch.ones(3, dtype=torch.float64)
    record = CompletionLogps.of(batch, SequenceLogps(total, ones), SequenceLogps(zeros, ones)).pairs()
    DPOLoss(beta=0.5)(record).sum().backward()
    slope = functools.partial(lambda a, b: 0.5 * torch.sigmoid(-0.5 * (total[a] - total[b])).detach())
    expected = [-slope(0, 1) - slope(0, 2), slope(0, 1) - slope(1, 2), slope(0, 2) + slope(1, 2)]
    torch.testing.assert_close(total.grad, torch.stack(expected))
