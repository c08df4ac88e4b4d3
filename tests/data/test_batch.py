from __future__ import annotations

import pytest

from lit_dpo.data.batch import EncodedPair, collate_pairs

PAIRS = [EncodedPair([1, 2, 3], [4, 5], [6]), EncodedPair([7], [8], [9, 10, 11])]


def test_the_row_holds_every_token_once_in_order() -> None:
    batch = collate_pairs(PAIRS, rows=[7, 3])
    flat = batch.input_ids[0].tolist()
    rebuilt = []
    for prompt, chosen, rejected in zip(*(batch[i].tolist() for i in (2, 3, 4)), strict=True):
        parts = [flat[:prompt], flat[prompt : prompt + chosen], flat[prompt + chosen : prompt + chosen + rejected]]
        rebuilt.append(EncodedPair(*parts))
        flat = flat[prompt + chosen + rejected :]
    assert (rebuilt, flat, batch.rows.tolist(), batch.size) == (PAIRS, [], [7, 3], 2)


def test_both_answers_continue_at_the_length_of_the_prompt() -> None:
    batch = collate_pairs(PAIRS)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_an_empty_part_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        collate_pairs([PAIRS[0]._replace(**{part: []})])
