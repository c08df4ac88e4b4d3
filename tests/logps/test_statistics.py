"""What some losses read of the whole distribution, not of the chosen token alone: equal to the dense definition."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import tiny
from lit_dpo.data.batch import collate
from lit_dpo.logps import head as heads
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.head import reference_kl
from lit_dpo.logps.score import completion_logps
from lit_dpo.references import BaseReference

PAIRS = tiny.pairs((7, 5, 9), (3, 1, 4, 6), (1, 12, 2))
BATCH = collate(PAIRS)


@contextmanager
def _another(model):
    """A reference that is a model of its own."""
    other = tiny.model(seed=7)
    choose_layout(other)
    yield other


def _dense(model) -> list[torch.Tensor]:
    """Log-probs over the vocabulary at each scored position, one completion at a time."""
    found = []
    for one in PAIRS:
        for completion in one.completions:
            ids = torch.tensor([[*one.prompt, *completion]])
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
            found.append(logits[len(one.prompt) - 1 : -1].log_softmax(-1))
    return found


@pytest.fixture(params=["auto", "sdpa"])
def model(request):
    found = tiny.model()
    choose_layout(found, request.param)
    return found


@pytest.fixture(params=[1000, 16], ids=["one chunk", "chunks"], autouse=True)
def chunks(request, monkeypatch):
    monkeypatch.setattr(heads, "chunk_rows", lambda *_: request.param)


def test_collision_is_the_log_of_the_sum_of_squared_probabilities(model):
    truth = torch.cat([(2 * rows).logsumexp(-1) for rows in _dense(tiny.model())])
    found = completion_logps(model, BATCH, collision=True).collision
    torch.testing.assert_close(found, truth.float(), rtol=0, atol=1e-5)
    assert not found.requires_grad


def test_kl_is_that_of_the_whole_distributions_and_so_is_its_gradient(model):
    dense = tiny.model()
    policy, reference = _dense(dense), _dense(tiny.model(seed=7))
    truth = torch.cat([(r.exp() * (r - p)).sum(-1) for p, r in zip(policy, reference, strict=True)])
    weights = torch.linspace(0.5, 1.5, len(truth), dtype=torch.float64)
    (truth * weights).sum().backward()
    found = tiny.with_kl(model, BATCH, _another)[0].kl
    torch.testing.assert_close(found, truth.detach().float(), rtol=1e-5, atol=1e-5)
    (found * weights.float()).sum().backward()
    tiny.assert_same_gradients(tiny.gradients(model), tiny.gradients(dense))


def test_with_the_divergence_come_the_same_log_probs(model):
    with _another(model) as other:
        expected = [completion_logps(model, BATCH), completion_logps(other, BATCH)]
    found = tiny.with_kl(model, BATCH, _another)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.total, theirs.total)
        assert torch.equal(mine.per_token, theirs.per_token)
    assert not found[1].total.requires_grad


@pytest.mark.parametrize("layout", ["auto", "sdpa"])
def test_an_adapter_on_the_head_is_off_in_the_reference_s_distribution(layout):
    model = tiny.lora(tiny.model(), seed=3, targets=["q_proj", "lm_head"])
    choose_layout(model, layout)
    policy, reference = _dense(tiny.lora(tiny.model(), seed=3, targets=["q_proj", "lm_head"])), _dense(tiny.model())
    truth = torch.cat([(r.exp() * (r - p)).sum(-1) for p, r in zip(policy, reference, strict=True)]).detach()
    found = tiny.with_kl(model, BATCH, BaseReference().activated)[0].kl
    torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert float(model.base_model.model.lm_head.lora_B["default"].weight.grad.abs().max()) > 0


def test_both_statistics_come_together(model):
    alone = completion_logps(model, BATCH, collision=True)
    both, _ = tiny.with_kl(model, BATCH, _another, collision=True)
    assert torch.equal(both.collision, alone.collision)
    assert both.kl is not None


def test_padding_of_a_wider_vocabulary_is_left_out():
    """The head of the reference has 31 more rows; the divergence is that over the shared ones."""
    states, heads = torch.randn(5, 4), [torch.nn.Linear(4, 97), torch.nn.Linear(4, 128)]
    cut = torch.nn.Linear(4, 97)
    cut.load_state_dict({name: p[:97] for name, p in heads[1].state_dict().items()})
    found = reference_kl(heads[0], states, heads[1], states, 128)
    torch.testing.assert_close(found, reference_kl(heads[0], states, cut, states, 97))


def test_a_model_does_not_diverge_from_itself(model):
    @contextmanager
    def itself(given):
        yield given

    assert tiny.with_kl(model, BATCH, itself)[0].kl.abs().max() < 1e-6
