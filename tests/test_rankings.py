"""Rankings through the whole command: what is refused before weights load, what is trained, logged and predicted."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from lit_dpo import DPOLoss, DPOModule, PreferenceDataModule
from lit_dpo.data.formats import Rankings
from lit_dpo.errors import DataError
from lit_dpo.losses import LiPOLoss, MixtureLoss, PlackettLuceLoss, SFTLoss
from lit_dpo.memory import Lengths
from training import Trace, adapter, trainer
from training import light as module

SCORES = {" yes": 3.0, " no": 1.0, " maybe so": 2.5, " who knows": 0.0}


@pytest.fixture
def ranked(tmp_path):
    """Nine prompts with two to four completions, all scored differently."""
    rows = []
    for n in range(9):
        count = 2 + n % 3
        rows.append(
            {
                "prompt": f"question {n}",
                "completions": [*SCORES][:count],
                "scores": [score + n for score in [*SCORES.values()][:count]],
            }
        )
    file = tmp_path / "ranked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _data(file, **options):
    return PreferenceDataModule(**{"train": str(file), "format": Rankings(), "batch_size": 3, **options})


@pytest.mark.parametrize(
    "loss",
    [
        PlackettLuceLoss(beta=0.5),
        PlackettLuceLoss(beta=0.5, top=1),
        LiPOLoss(beta=0.5),
        MixtureLoss([DPOLoss(beta=0.5), SFTLoss(of="best")]),
    ],
    ids=str,
)
def test_a_loss_over_lists_learns_a_ranking(loss, ranked, tiny_model, tmp_path):
    """From the reference, where all orders are alike, to the order of the scores; of S-DPO to the first place."""
    dpo = module(tiny_model, loss=loss, lr=1e-1)
    run = trainer(tmp_path, max_epochs=6, check_val_every_n_epoch=6, num_sanity_val_steps=0)
    compared = {"comparisons": "best_rest"} if getattr(loss, "top", None) else {}
    run.fit(dpo, _data(ranked, val=str(ranked), **compared))
    assert float(run.callback_metrics["val/reward_accuracy"]) > 0.85
    assert float(run.callback_metrics["val/loss"]) < 0.9 * float(loss_at_start(loss, ranked, tiny_model, tmp_path))


def loss_at_start(loss, ranked, tiny_model, tmp_path):
    run = trainer(tmp_path)
    run.validate(module(tiny_model, loss=loss), _data(ranked, val=str(ranked)), verbose=False)
    return run.callback_metrics["val/loss"]


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        (PlackettLuceLoss(), {"comparisons": "best_rest"}, "row 1 .*which one is above which"),
        (MixtureLoss([DPOLoss(), PlackettLuceLoss()]), {"comparisons": "best_rest"}, "row 1 .*above which"),
        (LiPOLoss(), {"comparisons": "adjacent"}, "row 1 "),
    ],
    ids=["Plackett–Luce", "within a mixture", "LiPO"],
)
def test_comparisons_that_a_loss_cannot_use_are_refused_before_weights_load(loss, options, said, ranked, tiny_model):
    dpo = module(tiny_model, loss=loss)
    with pytest.raises(DataError, match=said):
        trainer(ranked.parent).fit(dpo, _data(ranked, **options))
    assert dpo.model is None


def test_the_best_one_alone_is_enough_for_the_first_position(ranked, tiny_model, tmp_path):
    dpo = module(tiny_model, loss=PlackettLuceLoss(top=1))
    trainer(tmp_path, max_steps=1).fit(dpo, _data(ranked, comparisons="best_rest"))


def test_ties_are_said_with_their_row(ranked, tiny_model, tmp_path):
    rows = [json.loads(line) for line in ranked.read_text().splitlines()]
    rows[4]["scores"] = [1.0, 2.0, 1.0]
    ranked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"train: .*ranked.jsonl, row 4 \(from 0\): Expected comparisons"):
        trainer(tmp_path).fit(module(tiny_model, loss=PlackettLuceLoss()), _data(ranked))


def test_predictions_say_which_completions_they_compare(ranked, tiny_model, tmp_path):
    run = trainer(tmp_path)
    run.predict(module(tiny_model), _data(ranked, predict=str(ranked)))
    (file,) = tmp_path.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    scores = [json.loads(line)["scores"] for line in ranked.read_text().splitlines()]
    assert len(rows) == sum(len(one) * (len(one) - 1) // 2 for one in scores)
    for row in rows:
        one = scores[row["index"]]
        better, worse = row.get("chosen_completion", 0), row.get("rejected_completion", 1)
        if len(one) > 2:
            assert one[better] - one[worse] == row["score_margin"] > 0


def test_what_counts_the_same_is_a_prompt_or_a_comparison(ranked, tiny_model, tmp_path):
    """Validation losses are means over what counts; micro-batches do not change a step."""
    found = {}
    for average_over in ("comparison", "prompt"):
        for limit in (None, 1):
            dpo = module(tiny_model, average_over=average_over, microbatch_tokens=limit, lr=1e-2)
            trace = Trace()
            trainer(tmp_path, max_epochs=2, callbacks=[trace]).fit(dpo, _data(ranked, batch_size=9))
            found[average_over, limit] = torch.cat([p.flatten() for p in adapter(dpo).values()])
        torch.testing.assert_close(found[average_over, 1], found[average_over, None], rtol=0, atol=2e-5)
    assert not torch.allclose(found["comparison", None], found["prompt", None], atol=1e-4)
    with pytest.raises(Exception, match="`average_over` to be `comparison` or `prompt` but got 'pair'"):
        module(tiny_model, average_over="pair")


def test_the_largest_micro_batch_of_a_long_list_is_a_part_of_it(ranked):
    made = _data(ranked, tokenizer=tiny.tokenizer(), batch_size=9)
    made.setup("fit")
    loader = made.train_dataloader()
    ((whole, _), _), (parts, several) = loader.largest_microbatches(1, 10**9), loader.largest_microbatches(1, 1)
    assert several
    assert Lengths.of(parts[0]).tokens < Lengths.of(whole).tokens
    assert len(parts[0][0][1]) == 2
    table = loader.dataset.table
    shapes = table.part_lengths(range(table.size))
    assert (
        max(prompt + a + b for prompt, lengths in shapes for a, b in [sorted(lengths)[-2:]])
        >= Lengths.of(parts[0]).tokens
    )


def test_a_subclass_that_makes_its_own_pairs_keeps_prompts_whole(ranked, tiny_model, tmp_path):
    seen = []

    class Own(DPOModule):
        couples_pairs = False

        def pair_logps(self, batch):
            seen.append(batch.size)
            return super().pair_logps(batch)

    dpo = module(tiny_model, kind=Own, microbatch_tokens=1)
    trainer(tmp_path, max_steps=1).fit(dpo, _data(ranked, batch_size=9))
    assert sorted(seen)[-3:] == [6, 6, 6]
