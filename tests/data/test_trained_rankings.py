"""What is trained on merged prompts, and on rankings, is what is trained on their pairs written out."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch

from lit_dpo.data.formats import Rankings, Triples
from training import adapter, data, module, trainer

WORDS = [" yes", " no, never", " perhaps so", " why"]
SCORES = [2.0, 0.5, 3.0, 1.0]


@pytest.fixture
def written(tmp_path):
    """Rankings, and the same comparisons as pairs."""
    ranked = [{"prompt": f"Is it {n}?", "completions": WORDS[: n + 2], "stars": SCORES[: n + 2]} for n in range(3)]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completions"][better], "rejected": row["completions"][worse]}
        for row in ranked
        for a, b in combinations(range(len(row["stars"])), 2)
        for better, worse in [(a, b) if row["stars"][a] > row["stars"][b] else (b, a)]
    ]
    paths = tmp_path / "ranked.jsonl", tmp_path / "pairs.jsonl"
    for path, rows in zip(paths, (ranked, pairs), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_a_run_on_rankings_or_merged_prompts_is_that_on_their_pairs(tiny_model, written, tmp_path):
    ranked, pairs = written
    runs = [
        data(pairs, batch_size=10, format=Triples()),
        data(pairs, batch_size=3, format=Triples(), group_by_prompt=4),
        data(ranked, batch_size=3, format=Rankings(scores="stars")),
    ]
    trained = []
    for number, one in enumerate(runs):
        dpo = module(tiny_model)
        trainer(tmp_path / str(number), max_epochs=3).fit(dpo, one)
        trained.append(adapter(dpo))
    for other in trained[1:]:
        for name, expected in trained[0].items():
            torch.testing.assert_close(other[name], expected, rtol=0, atol=2e-5)
    assert any(value.abs().max() > 1e-3 for name, value in trained[0].items() if "lora_B" in name)


def test_predictions_of_rankings_are_one_per_comparison(tiny_model, written, tmp_path):
    predicted = trainer(tmp_path).predict(
        module(tiny_model), data(written[0], predict=str(written[0]), format=Rankings(scores="stars"))
    )
    assert [index for batch in predicted for index in batch["index"].tolist()] == [0] + [1] * 3 + [2] * 6
