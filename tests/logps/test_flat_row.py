"""The flat row is exact: the same log-probs and gradients as one sequence at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import tiny
from lit_dpo.data.batch import EncodedPrompt, collate
from lit_dpo.errors import PolicyError, UnsupportedAttentionError
from lit_dpo.logps.attention import PAIR_ATTENTION, has_pair_attention, plain_attention
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.last_layer import last_layer_on
from lit_dpo.logps.layouts import padded_rows, segments
from lit_dpo.logps.score import completion_logps

PAIRS = tiny.pairs((7, 5, 9), (3, 1, 4, 6), (1, 12, 2))


def _assert_equals_one_at_a_time(model, reference, pairs, tolerance=1e-4):
    """Values per token and gradients of a weighted sum; `reference` is an untouched copy of `model`."""
    found = completion_logps(model, collate(pairs))
    truth = tiny.one_at_a_time(reference, pairs)
    torch.testing.assert_close(found.per_token, torch.cat(truth), rtol=0, atol=tolerance)
    expected = torch.stack([part.sum() for part in truth])
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=tolerance)
    assert found.length.tolist() == [len(part) for part in truth]
    tiny.weighted(found.total).backward()
    tiny.weighted(expected).backward()
    tiny.assert_same_gradients(tiny.gradients(reference), tiny.gradients(model), tolerance)


@pytest.mark.parametrize("name", tiny.FLAT)
def test_flat_row_equals_one_sequence_at_a_time(name):
    model = tiny.model(name)
    reference = copy.deepcopy(model)
    assert choose_layout(model) == "flat"
    _assert_equals_one_at_a_time(model, reference, PAIRS)


@pytest.mark.parametrize("name", tiny.PADDED)
def test_architectures_that_mix_tokens_otherwise_fall_back_to_exact_padded_rows_in_one_log_line(name):
    model = tiny.model(name)
    reference = copy.deepcopy(model)
    with tiny.records("lit_dpo.logps.choice") as lines:
        assert choose_layout(model) == "padded"
    assert len(lines) == 1
    assert type(model).__name__ in lines[0].getMessage()
    assert model.config._attn_implementation == reference.config._attn_implementation
    _assert_equals_one_at_a_time(model, reference, PAIRS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt-projected", "mistral-window"])
def test_flat_row_equals_one_sequence_at_a_time_in_the_gradients_of_lora(name):
    model = tiny.lora(tiny.model(name))
    reference = copy.deepcopy(model)
    assert choose_layout(model) == "flat"
    _assert_equals_one_at_a_time(model, reference, PAIRS)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            "Qwen2MoeConfig",
            {
                "layer_types": ["sliding_attention", "full_attention"],
                "use_sliding_window": True,
                "num_experts": 4,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
            },
        ),
        # without the jitter, which the policy turns off, as its router draws experts at random in training mode
        ("PhimoeConfig", {"num_local_experts": 4, "router_jitter_noise": 0.0}),
    ],
)
def test_a_sliding_window_that_is_only_in_the_mask_is_not_lost(kind, changes):
    """These models tell their mask about the window and the attention function nothing."""
    model = tiny.from_config(getattr(transformers, kind)(**{**tiny.SIZES, "sliding_window": 20, **changes}))
    reference = copy.deepcopy(model)
    choose_layout(model)
    _assert_equals_one_at_a_time(model, reference, tiny.pairs((20, 9, 7), (3, 30, 2)))


def test_a_batch_mate_that_would_change_the_rope_is_refused():
    """LongRoPE picks its factors by the longest row of a batch: exact below the limit, an error above it."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 24,
        "factor": 4.0,
    }
    model = tiny.model("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    reference = copy.deepcopy(model)
    choose_layout(model)
    _assert_equals_one_at_a_time(model, reference, tiny.pairs((3, 5, 7), (10, 14, 8)))
    with pytest.raises(PolicyError, match=r"up to 24 tokens but one has 40[\s\S]*max_length"):
        completion_logps(model, collate(tiny.pairs((3, 5, 7), (10, 30, 8))))


def test_deepseek_with_values_narrower_than_keys_is_exact_in_whichever_layout():
    sizes = {
        **tiny.SIZES,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    model = tiny.from_config(transformers.DeepseekV3Config(**sizes))
    reference = copy.deepcopy(model)
    assert choose_layout(model) == "flat"
    _assert_equals_one_at_a_time(model, reference, PAIRS)


@pytest.mark.parametrize("changes", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_gpt2_with_other_score_scales_is_exact_in_whichever_layout(changes):
    model = tiny.model("gpt2", **changes)
    reference = copy.deepcopy(model)
    choose_layout(model)
    _assert_equals_one_at_a_time(model, reference, PAIRS)


class TwoModels(transformers.LlamaForCausalLM):
    """Names itself as its decoder, and has two parts that could be one."""

    def __init__(self, config):
        super().__init__(config)
        self.other = transformers.LlamaModel(config)

    def get_decoder(self):
        return self


def test_a_model_whose_backbone_cannot_be_taken_apart_is_a_policy_error():
    with pytest.raises(PolicyError, match="TwoModels does not tell its backbone from its head"):
        choose_layout(TwoModels(tiny.config("llama")))


def test_a_model_that_calls_its_backbone_in_another_way_is_a_policy_error():
    """CPM-Ant hands everything on by position, and takes left-padded rows."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64}
    model = tiny.from_config(transformers.CpmAntConfig(**sizes, num_hidden_layers=2, prompt_length=4))
    with pytest.raises(PolicyError, match="CpmAntForCausalLM cannot be scored: its parts are not called"):
        choose_layout(model)


# ---- forcing a layout ----


def test_attention_pairs_is_an_error_where_the_flat_row_is_not_exact():
    model = tiny.model("gpt-oss")
    with pytest.raises(PolicyError, match=r"attention=pairs.*GptOss.*s_aux"):
        choose_layout(model, "pairs")
    assert not has_pair_attention(model)


def test_attention_pairs_gives_the_flat_row_where_it_is_exact():
    model = tiny.model()
    assert choose_layout(model, "pairs") == "flat"
    assert has_pair_attention(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformers_attention_gives_padded_rows_that_are_exact(attention):
    model = tiny.model("mistral-window")
    model.set_attn_implementation(attention)
    reference = copy.deepcopy(model)
    with tiny.records("lit_dpo.logps.choice") as lines:
        assert choose_layout(model, attention) == "padded"
    assert not lines  # it was asked for: nothing to explain
    assert model.config._attn_implementation == attention
    _assert_equals_one_at_a_time(model, reference, PAIRS)


def test_a_model_whose_log_probs_are_nan_is_refused():
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(PolicyError, match="cannot be trusted"):
        choose_layout(model)


@pytest.mark.parametrize("training", [True, False])
def test_choosing_the_layout_leaves_the_mode_as_it_was(training):
    model = tiny.model().train(training)
    choose_layout(model)
    assert model.training is training


# ---- invariances ----


@pytest.fixture(scope="module", params=["flat", "padded"])
def model(request):
    found = tiny.model("gemma2").requires_grad_(False)
    assert choose_layout(found, "auto" if request.param == "flat" else "eager") == request.param
    return found


def _totals(model, prompts):
    return completion_logps(model, collate(prompts)).total


def _by_prompt(model, prompts):
    return _totals(model, prompts).split([len(one.completions) for one in prompts])


def test_log_probs_do_not_depend_on_batch_mates(model):
    alone = torch.cat([_totals(model, [prompt]) for prompt in PAIRS])
    torch.testing.assert_close(_totals(model, PAIRS), alone, rtol=0, atol=1e-4)


def test_log_probs_follow_the_order_of_prompts(model):
    order = [2, 0, 1]
    shuffled = _totals(model, [PAIRS[number] for number in order])
    expected = torch.cat([_by_prompt(model, PAIRS)[number] for number in order])
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-4)


def test_permuting_completions_permutes_their_log_probs(model):
    permuted = _by_prompt(model, [EncodedPrompt(p.prompt, p.completions[::-1]) for p in PAIRS])
    for found, expected in zip(permuted, _by_prompt(model, PAIRS), strict=True):
        torch.testing.assert_close(found, expected.flip(0), rtol=0, atol=1e-4)


def test_a_long_batch_mate_that_adds_padding_changes_nothing(model):
    long = tiny.pairs((9, 20, 25), seed=5)
    together = _totals(model, PAIRS + long)[:-2]
    torch.testing.assert_close(together, _totals(model, PAIRS), rtol=0, atol=1e-4)


def test_equal_completions_have_equal_log_probs(model):
    """A completion does not see those before it, and its positions start where the prompt ends."""
    same = [EncodedPrompt(p.prompt, [p.completions[0]] * 3) for p in PAIRS]
    for one in _by_prompt(model, same):
        torch.testing.assert_close(one, one[:1].expand(3), rtol=0, atol=1e-4)


def test_the_token_ids_of_padding_do_not_matter():
    model = tiny.model("mistral-window").requires_grad_(False)
    choose_layout(model, "sdpa")
    batch = collate(PAIRS)
    rows = padded_rows(batch, segments(batch))
    mask = rows.inputs["attention_mask"].bool()
    assert not mask.all()
    other = {**rows.inputs, "input_ids": rows.inputs["input_ids"].where(mask, torch.tensor(41))}
    first, second = (model.get_decoder()(**inputs).last_hidden_state for inputs in (rows.inputs, other))
    scored = (states.flatten(0, 1)[rows.predictors] for states in (first, second))
    torch.testing.assert_close(*scored, rtol=0, atol=1e-6)


def test_the_tokens_a_layout_scores_are_the_completions_in_order():
    batch = collate(PAIRS)
    expected = [token for prompt in PAIRS for completion in prompt.completions for token in completion]
    assert padded_rows(batch, segments(batch)).targets.tolist() == expected


def test_a_row_much_longer_than_the_window_is_exact():
    model = tiny.model("mistral-window")
    reference = copy.deepcopy(model)
    choose_layout(model)
    _assert_equals_one_at_a_time(model, reference, tiny.pairs((30, 25, 28), (2, 40, 3)))


# ---- gradient checkpointing ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-projected"])
def test_gradient_checkpointing_changes_no_number(name, monkeypatch):
    import torch.utils.checkpoint as checkpointing

    batch, found = collate(PAIRS), []
    for on in (False, True):
        model = tiny.lora(tiny.model(name))
        choose_layout(model)
        model.train()
        calls = []
        if on:
            # transformers stores the function that it wraps: count before it does
            original = checkpointing.checkpoint

            def counted(*args, _original=original, _calls=calls, **kwargs):
                _calls.append(1)
                return _original(*args, **kwargs)

            monkeypatch.setattr(checkpointing, "checkpoint", counted)
            monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted, raising=False)
            from lit_dpo.policy.checks import enable_checkpointing

            enable_checkpointing(model.get_base_model())
        totals = completion_logps(model, batch).total
        tiny.weighted(totals).backward()
        assert bool(calls) is on
        found.append((totals.detach(), tiny.gradients(model)))
    (plain, expected), (checkpointed, gradients) = found
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-5)
    tiny.assert_same_gradients(expected, gradients, 1e-5)


# ---- 16 bits ----


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_rows_agree_within_the_tolerance_of_the_dtype(name):
    exact = tiny.model(name).requires_grad_(False)
    truth = torch.stack([part.sum() for part in tiny.one_at_a_time(exact, PAIRS)])
    found = {}
    for attention in ("auto", "eager"):
        model = tiny.model(name).requires_grad_(False).to(torch.bfloat16)
        layout = choose_layout(model, attention)
        scored = completion_logps(model, collate(PAIRS))
        assert scored.total.dtype == scored.per_token.dtype == torch.float32
        found[layout] = scored.total
    noise = float((found["padded"] - truth).abs().max())
    assert float((found["flat"] - truth).abs().max()) < 3 * noise + 0.05
    torch.testing.assert_close(found["flat"], found["padded"], rtol=0.05, atol=0.5)


def test_a_leak_that_hides_below_the_tolerance_of_bfloat16_is_still_seen():
    """The convolution moves log-probs by less than 0.1 nats here, which 16 bits may lose anyway."""
    model = tiny.model("lfm2-conv").to(torch.bfloat16)
    with tiny.records("lit_dpo.logps.choice") as lines:
        assert choose_layout(model) == "padded"
    assert "moves another's log-probs" in lines[0].getMessage()


# ---- the ordinary attention, lent ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-projected"])
def test_generation_inside_plain_attention_is_that_of_the_unpatched_model(name):
    model = tiny.lora(tiny.model(name))
    ids = torch.tensor([[5, 9, 11, 40, 3]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **options)
    assert choose_layout(model) == "flat"
    with plain_attention(model):
        assert not has_pair_attention(model.get_base_model())
        assert model.generate(input_ids=ids, **options).tolist() == expected.tolist()
    assert has_pair_attention(model.get_base_model())
    assert expected.shape[1] == 17


def test_plain_attention_ends_with_the_pair_attention_even_after_an_error():
    model = tiny.model()
    choose_layout(model)
    with pytest.raises(KeyError), plain_attention(model):
        raise KeyError
    assert model.config._attn_implementation == PAIR_ATTENTION


def test_plain_attention_scores_padded_rows_equal_to_the_flat_row():
    model = tiny.model("gemma2").requires_grad_(False)
    choose_layout(model)
    flat = _totals(model, PAIRS)
    with plain_attention(model):
        torch.testing.assert_close(_totals(model, PAIRS), flat, rtol=0, atol=1e-4)


def test_calling_the_model_plainly_in_the_pair_attention_raises():
    model = tiny.model()
    choose_layout(model)
    with pytest.raises(UnsupportedAttentionError, match="plain_attention"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_two_models_do_not_share_their_attention():
    one, other = tiny.model(), tiny.model()
    choose_layout(one)
    assert not has_pair_attention(other)
    other(input_ids=torch.tensor([[1, 2, 3]]))


class _Rows(torch.nn.Module):
    """A part of a layer that writes down the rows it is given."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, states):
        self.seen.append(states.shape[-2])
        return 2 * states, "scores"


def test_a_part_of_the_last_layer_transforms_the_rows_that_are_read_and_others_run_whole():
    """What is given by keyword, or flattened already, is none of its rows."""
    part, needed = _Rows([]), torch.tensor([1, 4])
    layer = torch.nn.Module()
    layer.mlp = part
    decoder = torch.nn.Module()
    decoder.layers = [layer]
    states = torch.arange(12.0).reshape(1, 6, 2)
    with last_layer_on(decoder, needed):
        cut, scores = part(states)
        assert scores == "scores"
        assert torch.equal(cut[0, needed], 2 * states[0, needed])
        assert int((cut != 0).any(-1).sum()) == 2
        for whole in (part(states=states), part(states[0])):
            assert torch.equal(whole[0].reshape(states.shape), 2 * states)
    assert part.seen == [2, 6, 6]
    decoder.layers = None
    with last_layer_on(decoder, needed):  # nothing of it is known
        assert torch.equal(part(states)[0], 2 * states)
    assert not part._forward_hooks
    assert not part._forward_pre_hooks


def test_the_layout_knows_which_layer_is_the_last():
    model, layouts = tiny.model(num_hidden_layers=3), []
    choose_layout(model)
    told = model.model.register_forward_pre_hook(
        lambda _, __, given: layouts.append(given["pair_layout"]), with_kwargs=True
    )
    with torch.no_grad():
        completion_logps(model, collate(PAIRS))
    told.remove()
    assert [layout.last_layer for layout in layouts] == [2]
    assert [layer.self_attn.layer_idx for layer in model.model.layers][-1] == 2
