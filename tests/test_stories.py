"""Real tiny language models learn real preferences: stories with dialogue. Needs the shared data."""

from __future__ import annotations

import functools
import json
import os

import pytest
import torch

from lit_dpo import DPOLoss, DPOModule, LoRAPolicy, PreferenceDataModule
from lit_dpo.callbacks.completions import sample_completions
from training import trainer

STORIES = 80


def _dialogue(dpo: DPOModule, prompt: list[int]) -> float:
    stories = sample_completions(
        dpo.model, dpo.policy.load_tokenizer(), [prompt] * STORIES, max_new_tokens=200, batch_size=STORIES
    )
    return sum('"' in story for story in stories) / STORIES


def _continuations(rows: list[dict]) -> list[dict]:
    """For a model that only continues stories: the common beginning is the prompt."""
    found = []
    for row in rows:
        start = os.path.commonprefix([row["chosen"], row["rejected"]])  # noqa: RUF071 - characters, not paths
        start = start[: start.rfind(" ")]
        if len(start) > 10:
            found.append({"prompt": start, **{side: row[side][len(start) :] for side in ("chosen", "rejected")}})
    return found


def _conversations(rows: list[dict]) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": row["request"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in rows
    ]


@pytest.mark.parametrize(
    ("model", "convert", "lr", "steps"),
    [("stories260K", _continuations, 4e-3, 15), ("storybyte-nano-kd", _conversations, 2e-3, 8)],
)
def test_stories_come_to_hold_dialogue(shared, tmp_path, model, convert, lr, steps):
    source = shared / "data" / "finetuning-lab-tinystories" / "preference_pairs.jsonl"
    rows = convert([json.loads(line) for line in source.read_text().splitlines()])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    dpo = DPOModule(
        LoRAPolicy(str(shared / "models" / model)),
        loss=DPOLoss(beta=0.2),
        optimizer=functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
    )
    data = PreferenceDataModule(
        train=str(tmp_path / "pairs.jsonl"), batch_size=8, max_length=256, truncation="truncate_completion"
    )
    dpo.configure_model()
    tokenizer = dpo.policy.load_tokenizer()
    if convert is _conversations:
        messages = [{"role": "user", "content": "Tell me a story about a dog named Max."}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        prompt = tokenizer("Once upon a time, there was a")["input_ids"]
    before = _dialogue(dpo, prompt)
    trainer(tmp_path, max_steps=steps).fit(dpo, data)
    after = _dialogue(dpo, prompt)
    assert before < 0.9
    assert after >= 0.95
