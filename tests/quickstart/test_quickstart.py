"""The embedded default does what the README says, through the command that the README gives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lit_dpo.cli import main
from lit_dpo.quickstart import is_correct, quickstart_directory, style

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _shares(rows: list[dict], when: str) -> dict[str, float]:
    counted = Counter(style(row["prompt"], row[when]) for row in rows)
    return {label: counted[label] / len(rows) for label in ("good", "evasive", "other")}


def test_model_and_preferences_are_ordinary_files(quickstart):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quickstart / "model")
    model = AutoModelForCausalLM.from_pretrained(quickstart / "model")
    assert len(tokenizer) == model.config.vocab_size
    assert quickstart_directory() == quickstart, "the second call only finds it"
    train, val = (_rows(quickstart / f"{name}.jsonl") for name in ("train", "val"))
    asked = [{row["prompt"][0]["content"] for row in rows} for rows in (train, val)]
    assert not asked[0] & asked[1], "no prompt is on both sides"
    assert {"Explain gravity.", "What is photosynthesis?", "What is 2 + 2?"} <= asked[1]
    for row in [*train, *val]:
        question = row["prompt"][0]["content"]
        assert style(question, row["chosen"][0]["content"]) == "good"
        assert is_correct(question, row["chosen"][0]["content"])
        assert style(question, row["rejected"][0]["content"]) == "evasive"


@pytest.fixture(scope="module")
def runs(quickstart, once):
    """The README's command, and the same with chosen and rejected swapped."""
    return once("quickstart", _trained) / "runs"


def _trained(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        command = ["fit", "--config", str(CONFIG), "--trainer.enable_progress_bar=false"]
        main(command)
        swapped = ["--data.format.chosen=rejected", "--data.format.rejected=chosen"]
        main([*command, *swapped, "--trainer.max_epochs=2", "--trainer.callbacks+=training.Unestimated"])


def test_a_4_bit_policy_learns_to_answer_and_still_speaks(runs):
    """Typically 0.45 before and 0.97 after; the bounds leave room for 64 draws and another machine's rounding."""
    rows = _rows(runs / "version_0" / "completions.jsonl")
    before, after = _shares(rows, "before"), _shares(rows, "after")
    assert before["good"] <= 0.6
    assert after["good"] >= 0.9
    assert after["other"] <= 0.1


def test_with_the_preference_swapped_it_learns_to_evade(runs):
    assert _shares(_rows(runs / "version_1" / "completions.jsonl"), "after")["good"] <= 0.1


@pytest.mark.parametrize("version", ["version_0", "version_1"])
def test_held_out_accuracy_is_high_and_the_policy_stays_near(runs, version):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / version))
    events.Reload()
    assert events.Scalars("val/reward_accuracy")[-1].value >= 0.95
    assert 0 < events.Scalars("val/kl")[-1].value < 3, "rejected completions are pushed far, and count"


def test_the_adapter_answers_through_an_ordinary_pipeline(runs):
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(runs / "version_0" / "adapter"))
    messages = [{"role": "user", "content": "Explain gravity."}]
    answer = generate(messages, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"]
    assert is_correct("Explain gravity.", answer)
