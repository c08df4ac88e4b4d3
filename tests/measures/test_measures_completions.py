"""Sampled completions of policy and reference, and who judges them."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from lit_dpo.errors import DataError, PolicyError, TrainingError
from lit_dpo.tools.measures.completions import sampled
from lit_dpo.tools.measures.judges import RewardModelJudge, judged, quickstart_judge
from training import adapter, data, module, trainer

SETTINGS = {"prompts": 5, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out") / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {number // 2}:", "chosen": f" {number}", "rejected": " no" * (number + 1)}
        for number in range(14)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def fitted(tiny_model, files, tmp_path_factory):
    dpo, rows = module(tiny_model), data(files, val=files)
    trainer(tmp_path_factory.mktemp("fitted"), max_steps=3, limit_val_batches=0).fit(dpo, rows)
    return dpo, rows


def test_the_policy_is_next_to_its_reference(fitted, tiny_model, files):
    dpo, rows = fitted
    torch.manual_seed(3)
    before, weights = torch.get_rng_state(), adapter(dpo)
    found = sampled(dpo, rows, **SETTINGS)
    assert [row["prompt"] for row in found] == [f"Say {number}:" for number in range(5)]
    assert [*found[0]] == ["prompt", "reference", "policy", "judged"]
    assert all(row["judged"] is None for row in found)
    assert any(row["policy"] != row["reference"] for row in found)
    assert found == sampled(dpo, rows, **SETTINGS)
    assert found != sampled(dpo, rows, **SETTINGS, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(now, weights[name]) for name, now in adapter(dpo).items())
    fresh = module(tiny_model)
    same = sampled(fresh, data(files, val=files, tokenizer=str(tiny_model)), **SETTINGS)
    assert [row["reference"] for row in same] == [row["reference"] for row in found]
    assert all(row["policy"] == row["reference"] for row in same)


def test_a_judge_sees_both_orders(fitted):
    dpo, rows = fitted
    asked = []

    def first_is_best(prompt, first, second):
        asked.append((prompt, first, second))
        return 1.0

    found = sampled(dpo, rows, **SETTINGS, judge=first_is_best)
    assert all(row["judged"] == 0.5 for row in found)
    row = next(row for row in found if row["policy"] != row["reference"])
    assert (row["prompt"], row["policy"], row["reference"]) in asked
    assert (row["prompt"], row["reference"], row["policy"]) in asked
    verdicts = sampled(dpo, rows, **SETTINGS, judge=lambda prompt, first, second: float(first > second))
    assert [row["judged"] for row in verdicts] == [
        0.5 if row["policy"] == row["reference"] else float(row["policy"] > row["reference"]) for row in verdicts
    ]


@pytest.mark.parametrize("verdict", [1.5, -0.1, float("nan"), "better", None])
def test_a_verdict_is_a_number_from_0_to_1(verdict):
    with pytest.raises(TrainingError, match=r"in \[0, 1\]"):
        judged(lambda *_: verdict, ["Hi"], ["a"], ["b"])


def test_what_cannot_be_sampled_is_refused(fitted, files, tiny_model):
    dpo, rows = fitted
    assert sampled(dpo, rows, prompts=0) == []
    with pytest.raises(TrainingError, match="max_new_tokens"):
        sampled(dpo, rows, max_new_tokens=0)
    with pytest.raises(DataError, match="held-out"):
        sampled(dpo, data(files, tokenizer=str(tiny_model)))


def test_the_quickstart_has_a_judge():
    right, wrong, evasive = "Sure: 2 + 2 equals 4.", "Sure: 2 + 2 equals 5.", "I cannot tell you much about 2 + 2."
    order = [right, wrong, evasive]
    for place, better in enumerate(order):
        for worse in order[place + 1 :]:
            assert judged(quickstart_judge, ["What is 2 + 2?"], [better], [worse]) == [1.0]
            assert judged(quickstart_judge, ["What is 2 + 2?"], [worse], [better]) == [0.0]
    assert quickstart_judge("What is 2 + 2?", evasive, "Hm.") == 0.5


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory):
    """A random one, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


PROMPTS = ["Hi", "How are you?", "x" * 80, "Hi"]
COMPLETIONS = [" Hello!", " Fine, thank you.", " No.", " What?"]


def test_a_reward_model_scores_as_transformers_does(reward_model):
    judge = RewardModelJudge(str(reward_model), batch_size=3)
    found = judge.scores(PROMPTS, COMPLETIONS)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, found, strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"][:, -64:]
        with torch.no_grad():
            assert score == pytest.approx(float(model(ids).logits), abs=1e-5)
    assert RewardModelJudge(str(reward_model), batch_size=1).scores(PROMPTS, COMPLETIONS) == pytest.approx(found)
    # of the same prompt, the first completion against the last
    expected = float(found[0] > found[3])
    assert judge("Hi", COMPLETIONS[0], COMPLETIONS[3]) == expected
    assert judged(judge, ["Hi"], [COMPLETIONS[3]], [COMPLETIONS[0]]) == [1 - expected]
    assert judged(judge, ["Hi"], [" Same."], [" Same."]) == [0.5]
    assert pickle.loads(pickle.dumps(judge)) == judge


def test_a_reward_model_reads_conversations_by_its_template(reward_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ';' }}{% endfor %}"
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path)
    judge = RewardModelJudge(str(tmp_path))
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Go"},
    ]
    whole, plain = "u:Hi;a:Yes;u:Go;a:Ok;", RewardModelJudge(str(reward_model))
    assert judge.scores([said], ["Ok"]) == pytest.approx(plain.scores([whole[:-1]], [";"]))
    assert judge.scores(["Go"], ["Ok"]) == pytest.approx(plain.scores(["u:Go;a:Ok"], [";"]))


def test_what_is_no_reward_model_is_refused(tiny_model, reward_model, tmp_path):
    with pytest.raises(PolicyError, match="LlamaForCausalLM"):
        RewardModelJudge(str(tiny_model))("Hi", "a", "b")
    model = LlamaForSequenceClassification.from_pretrained(reward_model, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="with 3 outputs"):
        RewardModelJudge(str(tmp_path))("Hi", "a", "b")
    with pytest.raises(PolicyError, match=r"judge\.model"):
        RewardModelJudge(str(tmp_path / "none"))("Hi", "a", "b")
    with pytest.raises(PolicyError, match=r"judge\.batch_size"):
        RewardModelJudge("any", batch_size=0)
