"""What is said of the data of a run: what was dropped, what teaches nothing, which options change nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.rendering import REPEATS_PROMPT
from lit_dpo.data.table import PromptTable
from lit_dpo.errors import DataError

log = logging.getLogger(__name__)

Ask: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]

_AT_ONCE = 4096


def report(
    split: str,
    table: PromptTable,
    truncation: str,
    comparing: Comparing,
    group_by_prompt: int | None = None,
    deduplicate: bool = False,
    of_templates: Sequence[str] = (),
) -> None:
    """One line for dropped examples, one for what cannot teach anything, one for each option that changes nothing.

    Args:
        split: its name.
        table: what was encoded.
        truncation: as it was encoded.
        comparing: as well.
        group_by_prompt: as well.
        deduplicate: as well.
        of_templates: the options of chat templates that are set.
    """
    _report_dropped(split, table, truncation)
    if table.repeated:
        rank_zero_info(f"{split}: {table.repeated} rows left out: an earlier one says the same (deduplicate)")
    if lost := table.lost:
        line = f"{lost} of {lost + len(table.completion_lengths)} completions dropped with their comparisons: too long"
        rank_zero_info(f"{split}: {line} (truncation={truncation})")
    if table.identical:
        warn(
            f"{split}: {table.identical} of {table.comparisons_count} {_compared(table)} have two equal completions; "
            "kept, but they teach nothing"
        )
    if deduplicate and not table.repeated:
        rank_zero_info(f"{split}: `deduplicate` changes nothing, for no row says what an earlier one says")
    _report_remarks(split, table)
    for line in _without_effect(table, comparing, group_by_prompt):
        rank_zero_info(f"{split}: {line}")
    if of_templates and not table.holds_conversations:
        named = " and ".join(f"`{name}`" for name in of_templates)
        rank_zero_info(f"{split}: {named} changes nothing, for the rows are text, which no chat template renders")
    if not table.holds_pairs:
        share = table.lengths.sum() / _written_out(table)
        rank_zero_info(f"{split}: {table.summary}; {share:.2f} of the tokens of as many pairs")


def _report_dropped(split: str, table: PromptTable, truncation: str) -> None:
    if not table.dropped:
        return
    reasons = "; ".join(
        f"{count} {reason}" if len(table.dropped) > 1 else reason for reason, count in table.dropped.most_common()
    )
    too_long = any("longer than max_" in reason for reason in table.dropped)
    unit = table.unit
    line = f"{table.dropped.total()} of {table.total} {unit} dropped: {reasons}"
    line += f" (truncation={truncation})" if too_long else ""
    if table.size == 0:
        remedy = " Raise `max_length` or set another `truncation`." if too_long else ""
        raise DataError(f"{split}: no {unit} are left, {line}.{remedy}")
    rank_zero_info(f"{split}: {line}")


def _report_remarks(split: str, table: PromptTable) -> None:
    """One line for each remark; where most prompts are in their completions once more, the columns are read wrongly."""
    for remark, count in table.remarks.most_common():
        line = f"{count} of {table.size} {table.unit} {remark}"
        if remark == REPEATS_PROMPT and 2 * count > table.size:
            raise DataError(
                f"{split}: {line}: it would be trained on twice, once as the prompt. Leave it out of the completions, "
                "or read them with a format of your own (docs/extending.md)."
            )
        rank_zero_info(f"{split}: {line}")


def _compared(table: PromptTable) -> str:
    return "pairs" if table.holds_pairs else "comparisons"


def _without_effect(table: PromptTable, comparing: Comparing, group_by_prompt: int | None) -> Iterator[str]:
    """Say which options the data cannot feel."""
    ranked = table.facts("ranked").max(initial=0)
    if comparing.choice != "all" and ranked < 3:
        yield f"`comparisons={comparing.choice}` changes nothing, for no row ranks more than two completions"
    if comparing.ties != "drop" and not ranked:
        yield f"`ties={comparing.ties}` changes nothing, for no row has scores or ranks"
    if group_by_prompt is not None and not table.has_merged:
        yield f"`group_by_prompt={group_by_prompt}` merges nothing, for no two rows with the same prompt fit together"


def _written_out(table: PromptTable) -> int:
    """Tokens of the same comparisons as pairs."""
    counts = table.comparisons_per_prompt
    starts = table.completions_per_prompt.cumsum() - table.completions_per_prompt
    compared = table.completion_lengths[table.comparisons + starts.repeat(counts)[:, None]]
    return int(compared.sum() + (table.prompt_lengths * counts).sum())


def check_budget(split: str, table: PromptTable, max_tokens: int | None) -> None:
    """See that every prompt fits a batch, with its completions.

    Raises:
        DataError: if one does not.
    """
    if max_tokens is None or not (longer := int((table.lengths > max_tokens).sum())):
        return
    holds, remedy = "prompt and both completions", ""
    if not table.holds_pairs:
        holds = "with all completions"
        remedy = " A lower `--data.group_by_prompt` makes smaller ones." if table.is_merged else ""
    raise DataError(
        f"{split}: Expected {table.unit} of up to `max_tokens`={max_tokens} tokens ({holds}) but "
        f"{longer} of {table.size} are longer, the longest {table.lengths.max()}. "
        f"Raise `--data.max_tokens`, or lower `--data.max_length`, and `--data.truncation` drops or cuts them.{remedy}"
    )


def check_tokens(
    split: str, table: PromptTable, vocabulary: int, context: int | None, made_for: int | None, model: str
) -> None:
    """See that a model can read everything; one line for what is longer than what it was made for.

    Raises:
        DataError: for the first comparison that it cannot read.
    """
    if found := table.first_beyond(vocabulary, context):
        reach = "any length" if context is None else f"up to {context} tokens"
        remedy = "" if context is None else f", and `--data.max_length {context}` at most"
        raise DataError(
            f"{found}, but {model} has {vocabulary} token ids and reads {reach}. Use its own tokenizer{remedy}."
        )
    longer = int((table.side_lengths > made_for).sum()) if made_for and context is None else 0
    if longer:
        warn(
            f"{split}: {longer} of {table.size} {table.unit} are longer than the {made_for} tokens that {model} was "
            "made for (`max_position_embeddings`); kept, but it may not read them well"
        )


def check_lists(split: str, table: PromptTable, ask: Ask) -> None:
    """See that a loss over lists can use every prompt; see `PreferenceDataModule.check_lists`.

    Raises:
        DataError: for the first one that it cannot.
    """
    completions, comparisons = table.completions_per_prompt, table.comparisons_per_prompt
    places, ends = table.comparisons, [0, *comparisons.cumsum().tolist()]

    def refusal(first: int, last: int) -> str | None:
        of_prompts, of_comparisons = slice(first, last), slice(ends[first], ends[last])
        given = completions[of_prompts], places[of_comparisons], comparisons[of_prompts]
        try:
            ask(*(torch.from_numpy(one.astype(np.int64)) for one in given))
        except ValueError as error:
            return str(error)
        return None

    for first in range(0, table.size, _AT_ONCE):
        last = min(first + _AT_ONCE, table.size)
        if refusal(first, last) is not None:
            each = ((number, refusal(number, number + 1)) for number in range(first, last))
            number, said = next((number, said) for number, said in each if said is not None)
            raise DataError(f"{split}: {table.place(table.first_row(number))}: {said}")


@rank_zero_only
def warn(message: str) -> None:
    """Say it once, not once per process."""
    log.warning(message)
