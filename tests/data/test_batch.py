from __future__ import annotations

import pytest

from lit_dpo.data.batch import EncodedPair, collate_pairs

PAIRS = [EncodedPair([1, 2, 3], [4, 5], [6]), EncodedPair([7], [8], [9, 10, 11])]


def test_the_row_holds_every_token_once_in_order() -> None:
    batch = collate_pairs(PAIRS, indices=[7, 3])
    flat = batch.input_ids[0].tolist()
    rebuilt = []
    for prompt, chosen, rejected in zip(*(batch[i].tolist() for i in (2, 3, 4)), strict=True):
        parts = [flat[:prompt], flat[prompt : prompt + chosen], flat[prompt + chosen : prompt + chosen + rejected]]
        rebuilt.append(EncodedPair(*parts))
        flat = flat[prompt + chosen + rejected :]
    assert (rebuilt, flat, batch.indices.tolist(), batch.size) == (PAIRS, [], [7, 3], 2)


def test_both_answers_continue_at_the_length_of_the_prompt() -> None:
    batch = collate_pairs(PAIRS)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_an_empty_part_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        collate_pairs([PAIRS[0]._replace(**{part: []})])


def test_a_selection_is_the_batch_of_those_pairs_alone() -> None:
    whole = collate_pairs([*PAIRS, PAIRS[0]], indices=[7, 3, 5], columns={"weight": [0.5, 1.0, 2.0]})
    some = whole.select([2, 1])
    alone = collate_pairs([PAIRS[0], PAIRS[1]], indices=[5, 3], columns={"weight": [2.0, 1.0]})
    assert some.columns["weight"].equal(alone.columns["weight"])
    for name in {*alone._fields} - {"columns"}:
        assert getattr(some, name).equal(getattr(alone, name)), name


def test_equal_pairs_have_equal_keys_and_other_pairs_others() -> None:
    first, second = collate_pairs(PAIRS, indices=[1, 2]), collate_pairs([PAIRS[1], PAIRS[0]])
    assert first.keys.tolist() == second.keys.flip(0).tolist()
    moved = EncodedPair([1, 2], [3, 4, 5], [6])  # the same tokens, cut elsewhere
    other = EncodedPair([1, 2, 3], [4, 6], [5])
    keys = {tuple(key) for key in collate_pairs([*PAIRS, moved, other]).keys.tolist()}
    assert len(keys) == 4
