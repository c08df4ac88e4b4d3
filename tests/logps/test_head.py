"""Selected log-probs in chunks: dense numbers, without the dense matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from lit_dpo.logps import head as head_module
from lit_dpo.logps.head import collision_logps, selected_logps
from lit_dpo.logps.model_head import _output_type, _replace, backbone, model_head

TOKENS, WIDTH, VOCABULARY = 200, 8, 97


@pytest.fixture(params=[16, 50, 199, 200, 10_000], ids=lambda rows: f"chunks-of-{rows}")
def chunked(request, monkeypatch):
    monkeypatch.setattr(head_module, "chunk_rows", lambda *_: request.param)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "chunk_rows", lambda *_: 16)


def _inputs(dtype=torch.float32, width=WIDTH):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=random).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (TOKENS,), generator=random)


def _dense(head, hidden, targets):
    return head(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, backward included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_equals_dense_in_value_and_gradient(bias):
    hidden, targets = _inputs()
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    found = selected_logps(head, hidden, targets, VOCABULARY)
    dense = _dense(head, hidden, targets)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)
    parameters = [hidden, *head.parameters()]
    mine = torch.autograd.grad(tiny.weighted(found), parameters)
    theirs = torch.autograd.grad(tiny.weighted(dense), parameters)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("chunked")
def test_values_without_gradients_are_the_same():
    hidden, targets = _inputs()
    head = nn.Linear(WIDTH, VOCABULARY)
    with torch.no_grad():
        found = selected_logps(head, hidden, targets, VOCABULARY)
    assert not found.requires_grad
    torch.testing.assert_close(found, selected_logps(head, hidden, targets, VOCABULARY).detach(), rtol=0, atol=0)


@pytest.mark.usefixtures("small_chunks")
def test_a_frozen_head_gets_no_gradient_and_hidden_states_get_the_dense_one():
    hidden, targets = _inputs()
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    tiny.weighted(selected_logps(head, hidden, targets, VOCABULARY)).backward()
    assert head.weight.grad is None
    (dense,) = torch.autograd.grad(tiny.weighted(_dense(head, hidden, targets)), hidden)
    torch.testing.assert_close(hidden.grad, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_the_divergence_of_two_heads_is_the_dense_one_over_the_tokens_that_both_have():
    (hidden, _), (other, _) = _inputs(), _inputs()
    head, wider = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, VOCABULARY + 3)
    found = head_module.reference_kl(head, hidden, wider, other, VOCABULARY)
    theirs = wider(other)[:, :VOCABULARY].log_softmax(-1).detach()
    dense = (theirs.exp() * (theirs - head(hidden).log_softmax(-1))).sum(-1)
    assert found.shape == (TOKENS,)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_has_tokens_times_vocabulary_elements_forward_or_backward(frozen):
    hidden, targets = _inputs()
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(not frozen)
    with _Largest() as seen:
        selected_logps(head, hidden, targets, VOCABULARY).sum().backward()
    assert seen.elements <= max(16 * VOCABULARY, TOKENS * WIDTH)
    with _Largest() as dense:
        _dense(head, hidden, targets).sum().backward()
    assert dense.elements == TOKENS * VOCABULARY  # the measure sees what it looks for


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_tensor_has_tokens_times_vocabulary_elements_in_a_whole_step(name):
    """2 × 8 layers wide states stay below 16 rows × 5,000 tokens of vocabulary; dense would be 180 × 5,000."""
    from lit_dpo.logps.choice import choose_layout
    from lit_dpo.logps.score import completion_logps

    vocabulary = 5000
    model = tiny.model(name, vocab_size=vocabulary, max_position_embeddings=256)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(False)
    choose_layout(model)
    batch = tiny.batch((5, 60, 50), (4, 40, 30), vocabulary=vocabulary)
    with _Largest() as seen:
        tiny.weighted(completion_logps(model, batch).total).backward()
    assert seen.elements <= vocabulary * 32  # 16 rows of logits, or the transposed view of the head


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "trained head"])
def test_no_tensor_has_tokens_times_vocabulary_elements_in_a_whole_step_of_dpo(targets):
    """Policy and reference, losses and gradients; 180 scored tokens in chunks of 16."""
    from lit_dpo import DPOLoss
    from lit_dpo.logps import CompletionLogps
    from lit_dpo.logps.choice import choose_layout
    from lit_dpo.logps.score import completion_logps
    from lit_dpo.references.adapter import BaseReference

    vocabulary = 5000
    model = tiny.lora(tiny.model("llama", vocab_size=vocabulary, max_position_embeddings=256), targets=targets)
    choose_layout(model)
    batch = tiny.batch((5, 60, 50), (4, 40, 30), vocabulary=vocabulary)
    with _Largest() as seen:
        reference = BaseReference().logps(model, batch)
        DPOLoss()(CompletionLogps.of(batch, completion_logps(model, batch), reference).pairs()).mean().backward()
    assert seen.elements <= vocabulary * 32  # the embedding's weights
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_chunks_are_smaller_than_a_batch_of_any_vocabulary_that_matters():
    """fp32 logits of a chunk: 8 MiB on a CPU up to 16k tokens of vocabulary, then 128 rows."""
    rows = [head_module.chunk_rows(vocabulary, torch.device("cpu")) for vocabulary in (8192, 16384, 262144)]
    assert rows == [256, 128, 128]
    on_a_gpu = [head_module.chunk_rows(vocabulary, torch.device("cuda")) for vocabulary in (8192, 16384, 262144)]
    assert on_a_gpu == [4096, 2048, 256]


@pytest.mark.usefixtures("small_chunks")
def test_the_chance_that_two_samples_agree_is_the_dense_one():
    """Also of logits whose squared probabilities no float32 holds: log Σ p², and p² of a sure token is 1."""
    hidden, _ = _inputs()
    head = nn.Linear(WIDTH, VOCABULARY)
    dense = head(hidden.double().float()).double().log_softmax(-1).mul(2).logsumexp(-1)
    found = collision_logps(head, hidden, VOCABULARY)
    torch.testing.assert_close(found.double(), dense.detach(), rtol=0, atol=1e-5)
    assert not found.requires_grad
    assert collision_logps(nn.Identity(), torch.tensor([[300.0, 0.0, -300.0]]), 3).tolist() == [0.0]


def test_what_a_head_reads_of_its_backbone_besides_the_states_is_not_there():
    """Heads hand on caches and router scores; a protocol of Python's is not there either, rather than None."""
    output = _output_type()(last_hidden_state=torch.ones(1))
    assert output.router_logits is None
    assert not hasattr(output, "__array__")
    assert copy.copy(output).last_hidden_state is output.last_hidden_state


def test_a_part_is_replaced_wherever_it_is_and_only_there():
    old, new, other = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    whole = nn.Sequential(other, nn.Sequential(nn.Identity(), old))
    changed = _replace(whole, old, new)
    assert changed[0] is other
    assert changed[1][1] is new
    assert whole[1][1] is old
    with pytest.raises(ValueError, match="Sequential does not hold its decoder"):
        _replace(whole, new, old)


@pytest.mark.usefixtures("small_chunks")
def test_the_graph_keeps_no_logits():
    hidden, targets = _inputs()
    head, kept = nn.Linear(WIDTH, VOCABULARY), []

    def remember(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        selected_logps(head, hidden, targets, VOCABULARY)
    assert max(kept, default=0) < 16 * VOCABULARY


def test_bfloat16_weights_give_float32_log_probs():
    """512 random tokens, vocabulary 32k: bfloat16 log-softmax and sum is about 12 nats off, float32 under 0.01."""
    random = torch.Generator().manual_seed(0)
    vocabulary = 32_000
    hidden = torch.randn(512, 16, generator=random).to(torch.bfloat16)
    weight = torch.randn(vocabulary, 16, generator=random).to(torch.bfloat16)
    targets = torch.randint(vocabulary, (512,), generator=random)

    def head(states):
        return states @ weight.T

    with torch.no_grad():
        found = selected_logps(head, hidden, targets, vocabulary)
    logits = head(hidden)
    truth = logits.double().log_softmax(-1).gather(-1, targets[:, None]).sum()
    low = logits.log_softmax(-1).gather(-1, targets[:, None]).sum()
    assert found.dtype == torch.float32
    assert abs(float(found.sum() - truth)) < 0.01
    assert abs(float(low - truth)) > 0.1  # what the law protects from


# ---- the model's own arithmetic after its backbone ----


@pytest.mark.parametrize("name", [*tiny.FLAT, *tiny.PADDED])
def test_the_model_head_is_what_the_model_does_after_its_backbone(name):
    model = tiny.model(name).requires_grad_(False)
    ids = torch.tensor([[5, 9, 11, 40, 3]])
    states = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(model_head(model)(states[0]), expected[0], rtol=1e-5, atol=1e-5)


def test_the_soft_cap_bounds_logits_and_the_logit_scale_scales_them():
    states = 100 * torch.randn(3, 32)
    capped = model_head(tiny.model("gemma2"))(states)
    assert 1.5 < float(capped.abs().max()) <= 2.0
    one, other = (tiny.model("cohere-logit-scale", logit_scale=scale) for scale in (0.3, 0.6))
    torch.testing.assert_close(2 * model_head(one)(states), model_head(other)(states))


def test_making_a_head_leaves_the_model_as_it_was():
    model = tiny.lora(tiny.model(), targets=["q_proj", "lm_head"])
    names = [name for name, _ in model.named_modules()]
    decoder = model.get_base_model().get_decoder()
    model_head(model.get_base_model())(torch.randn(2, 32))
    assert [name for name, _ in model.named_modules()] == names
    assert model.get_base_model().get_decoder() is decoder


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere-logit-scale"])
@pytest.mark.parametrize("active", [True, False], ids=["adapter-on", "adapter-off"])
def test_an_adapter_on_the_head_counts_in_value_and_gradient(name, active):
    model = tiny.lora(tiny.model(name, tie_word_embeddings=False), targets=["q_proj", "lm_head"])
    if not active:
        model.base_model.disable_adapter_layers()
    base = model.get_base_model()
    hidden, targets = _inputs(width=32)
    found = selected_logps(model_head(base), hidden, targets, VOCABULARY)
    whole = copy.deepcopy(base)
    dense = _dense(lambda states: model_head(whole)(states), hidden, targets)
    plain = _dense(lambda states: model_head(base)(states), hidden, targets)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-4)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    tiny.weighted(found).backward()
    tiny.weighted(dense).backward()
    head_gradients = {n: g for n, g in tiny.gradients(base).items() if "lm_head" in n}
    assert bool(head_gradients) is active
    if active:
        tiny.assert_same_gradients(tiny.gradients(whole), head_gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_with_dropout_on_the_head_has_the_gradient_of_the_forward_pass(dropout):
    """The chunk is computed again in the backward pass, and must fall under the same dropout mask."""
    model = tiny.lora(tiny.model(), targets=["lm_head"], lora_dropout=dropout).train()
    base = model.get_base_model()
    hidden, targets = _inputs(width=32)
    found = []
    for score in (lambda head: selected_logps(head, hidden, targets, VOCABULARY), lambda h: _dense(h, hidden, targets)):
        torch.manual_seed(7)
        values = score(model_head(base))
        tiny.weighted(values).backward()
        found.append((values.detach(), tiny.gradients(base)))
    (values, gradients), (dense, expected) = found
    torch.testing.assert_close(values, dense, rtol=0, atol=1e-4)
    tiny.assert_same_gradients(expected, gradients)
