from __future__ import annotations

import pytest

from lit_dpo.data.batch import EncodedPrompt, collate

PAIRS = [EncodedPrompt([1, 2, 3], [[4, 5], [6]]), EncodedPrompt([7], [[8], [9, 10, 11]])]
MANY = EncodedPrompt([1, 2], [[3], [4, 5], [6, 7, 8]], [(0, 1), (2, 0)])


def test_the_row_holds_every_token_once_in_order() -> None:
    examples = [*PAIRS, MANY]
    batch = collate(examples, indices=[7, 3, 5, 6])
    flat, completions = batch.input_ids[0].tolist(), iter(batch.completion_lengths.tolist())
    rebuilt = []
    for prompt, count in zip(batch.prompt_lengths.tolist(), batch.completions_per_prompt.tolist(), strict=True):
        parts = []
        for length in (prompt, *(next(completions) for _ in range(count))):
            parts.append(flat[:length])
            flat = flat[length:]
        rebuilt.append((parts[0], parts[1:]))
    assert (rebuilt, flat) == ([(one.prompt, one.completions) for one in examples], [])
    assert (batch.indices.tolist(), batch.size) == ([7, 3, 5, 6], 4)
    assert batch.comparisons.tolist() == [[0, 1], [0, 1], [0, 1], [2, 0]]
    assert batch.comparisons_per_prompt.tolist() == [1, 1, 2]
    assert batch.chosen_lengths.tolist() == [2, 1, 1, 3]
    assert batch.rejected_lengths.tolist() == [1, 3, 2, 1]


def test_every_completion_continues_at_the_length_of_the_prompt() -> None:
    batch = collate([*PAIRS, MANY])
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3, 0, 1, 2, 2, 3, 2, 3, 4]


@pytest.mark.parametrize("change", [{"prompt": []}, {"completions": [[], [6]]}, {"completions": [[4, 5], []]}])
def test_an_empty_part_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        collate([PAIRS[0]._replace(**change)])


def test_a_comparison_with_another_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="comparisons of 2 completions"):
        collate([PAIRS[0]._replace(comparisons=[(0, 2)])])


def test_some_completions_are_the_batch_of_those_alone() -> None:
    some = collate([*PAIRS, MANY]).of_completions([1, 4, 6])
    alone = collate([EncodedPrompt([1, 2, 3], [[6]], []), EncodedPrompt([1, 2], [[3], [6, 7, 8]], [])])
    for name in {*alone._fields} - {"columns"}:
        assert getattr(some, name).equal(getattr(alone, name)), name


def test_equal_completions_of_equal_prompts_have_equal_keys_and_others_others() -> None:
    first, second = collate(PAIRS, indices=[1, 2]), collate([PAIRS[1], PAIRS[0]])
    assert first.keys.tolist() == [*second.keys[2:].tolist(), *second.keys[:2].tolist()]
    moved = EncodedPrompt([1, 2], [[3, 4, 5], [3, 6]])  # the same tokens, cut elsewhere
    keys = {tuple(key) for key in collate([*PAIRS, moved, MANY]).keys.tolist()}
    assert len(keys) == 9
    assert first.keys[0].equal(collate([EncodedPrompt([1, 2, 3], [[9], [4, 5]])]).keys[1])
