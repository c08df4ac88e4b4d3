"""Which completions of a prompt are compared, and what the numbers of a comparison are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

from lit_dpo.data.formats.base import Preference, Ranking
from lit_dpo.data.formats.cells import (
    ANY,
    MEDIA,
    RANGES,
    check_text,
    is_written_conversation,
    says_something,
    short,
)
from lit_dpo.errors import DataError

Choice: TypeAlias = Literal["all", "best_worst", "best_rest", "adjacent"]
Ties: TypeAlias = Literal["drop", "half"]

_NEVER_RENDERED = ("function_call", *MEDIA)
_OTHERS = ("system", "developer", "user", "tool", "function")  # whoever else speaks answers, under any name


class Compared(NamedTuple):
    """The comparisons of a row, `B` of them, and their numbers.

    Attributes:
        comparisons: places among the row's completions, the better one's first.
        columns: by name, `B` numbers each.
    """

    comparisons: Sequence[tuple[int, int]]
    columns: dict[str, list[float]]


class Comparing(NamedTuple):
    """How scores or ranks become comparisons; `comparing(row)` gives those of a row.

    Attributes:
        choice: `all`: each two completions. `best_worst`: the first of the best with the last of the worst.
            `best_rest`: the first of the best with each other one. `adjacent`: each with the next one, best first,
            equal ones in their order.
        ties: `drop`: equal completions are not compared. `half`: they are, the earlier one as the chosen one, with 1/2
            in the column `probability`, which is 1 for all others.

    Example:
        >>> row = Ranking("Hi", [" Hm.", " Hello!", " Go."], scores=[1, 5, 1])
        >>> Comparing().of(row)
        Compared(comparisons=[(1, 0), (1, 2)], columns={'score_margin': [4.0, 4.0]})
        >>> Comparing("adjacent", "half").of(row).columns["probability"]
        [1.0, 0.5]
    """

    choice: Choice = "all"
    ties: Ties = "drop"

    def of(self, row: Preference | Ranking) -> Compared:
        """Say what is compared in a row; nothing if all its completions tie."""
        if isinstance(row, Preference):
            return Compared(((0, 1),), {name: [float(value)] for name, value in row.columns.items()})
        if row.comparisons is not None:
            return Compared(row.comparisons, _each(row, len(row.comparisons)))
        values = row.scores if row.scores is not None else [-rank for rank in row.ranks or ()]
        pairs = self._chosen(sorted(range(len(values)), key=lambda place: -values[place]))
        if self.ties == "drop":
            pairs = [(better, worse) for better, worse in pairs if values[better] > values[worse]]
        columns = _each(row, len(pairs))
        if row.scores is not None:
            columns["score_margin"] = [float(values[better] - values[worse]) for better, worse in pairs]
        if self.ties == "half":
            columns["probability"] = [1.0 if values[better] > values[worse] else 0.5 for better, worse in pairs]
        return Compared(pairs, columns)

    def _chosen(self, order: list[int]) -> list[tuple[int, int]]:
        if self.choice == "best_worst":
            return [(order[0], order[-1])]
        if self.choice == "best_rest":
            return [(order[0], other) for other in order[1:]]
        return list(pairwise(order) if self.choice == "adjacent" else combinations(order, 2))


def check_row(row: object, comparing: Comparing) -> None:
    """See that what a format says of a row holds together, and that its parts and numbers are some that can be used.

    This stands behind every format, a user's own too: a prompt that asks something, completions that say something and
    do not begin with the prompt's messages, text that is no conversation written as a string.

    Raises:
        DataError: if not, naming the field of the `Preference` or `Ranking`.
    """
    if not isinstance(row, Preference | Ranking):
        raise DataError(
            f"Expected the format's `read` to return a `Preference`, a `Ranking` or `Skipped` but got {short(row)}."
        )
    for name, given in (("columns", row.columns), ("template", row.template)):
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise DataError(f"Expected values by name in `{name}` but got {short(given)}.")
    if isinstance(row, Ranking):
        _check_ranking(row, comparing)
        completions: dict[str, Any] = {f"completions[{place}]": one for place, one in enumerate(row.completions)}
    else:
        completions = {"chosen": row.chosen, "rejected": row.rejected}
    kinds = {name: _kind(part) for name, part in (("prompt", row.prompt), *completions.items())}
    if {*kinds.values()} not in ({"text"}, {"messages"}):
        found = ", ".join(f"`{name}` is {kind}" for name, kind in kinds.items())
        raise DataError(
            f"Expected the prompt and its completions all as text, or all as lists of messages, but {found}."
        )
    if isinstance(row.prompt, str):
        _check_text(row.prompt, completions)
    else:
        _check_conversation(row.prompt, completions)
    _check_columns(row.columns)


def _kind(part: object) -> str:
    return "text" if isinstance(part, str) else "messages" if isinstance(part, list) else short(part)


def _check_text(prompt: str, completions: Mapping[str, str]) -> None:
    if not prompt:
        raise DataError("Expected text in `prompt` but it is empty.")
    for name, text in completions.items():
        check_text(name, text)
    _check_written(prompt, completions)


def _check_written(prompt: str, completions: Mapping[str, str]) -> None:
    """See that a text is no conversation written as a string: of completions all are, or they say what they say."""
    written = [name for name, text in completions.items() if is_written_conversation(text)]
    if is_written_conversation(prompt):
        written = ["prompt"]
    elif len(written) < len(completions):
        return
    raise DataError(
        f"Expected text in `{written[0]}` but it is a conversation that is written as a string. Where all parts are, "
        "`--data.format Triples` reads them; a prompt and whole conversations `ImplicitPrompt` does, and "
        "conversations with text as answers `ShareGPT`, with their column as `--data.format.conversations`."
    )


def _check_conversation(prompt: list[Any], completions: Mapping[str, list[Any]]) -> None:
    for name, messages in (("prompt", prompt), *completions.items()):
        if not messages:
            raise DataError(f"Expected at least one message in `{name}` but the list is empty.")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise DataError(f"Expected a `role` in message {number} of `{name}` but got {short(message)}.")
            if unread := [key for key in _NEVER_RENDERED if message.get(key)]:
                raise DataError(
                    f"Expected text and `tool_calls` in message {number} of `{name}` but it holds `{unread[0]}`."
                )
            content = message.get("content")
            if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
                raise DataError(
                    f"Expected text as the `content` of message {number} of `{name}` but got {short(content)}."
                )
    for name, messages in completions.items():
        if messages[: len(prompt)] == prompt:
            raise DataError(
                f"Expected only the completion in `{name}` but it begins with the messages of `prompt`. Leave them out "
                "there, or read whole conversations with `ImplicitPrompt`."
            )
        if not any(says_something(one) for one in messages if one["role"] not in _OTHERS):
            raise DataError(f"Expected an assistant message with text in `{name}` but got {short(messages)}.")
    _check_written(
        prompt[-1].get("content") or "", {name: one[0].get("content") or "" for name, one in completions.items()}
    )


def _check_columns(columns: Mapping[str, Any]) -> None:
    for name, value in columns.items():
        for one in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if not _is_number(one, *RANGES.get(name, ANY)):
                low, high = RANGES.get(name, ANY)
                raise DataError(
                    f"Expected a finite number in [{low:g}, {high:g}] for the column `{name}` but got {one!r}."
                )


def _check_ranking(row: Ranking, comparing: Comparing) -> None:
    if not isinstance(row.completions, list | tuple):
        raise DataError(f"Expected a list of `completions` but got {short(row.completions)}.")
    count = len(row.completions)
    if count < 2:
        raise DataError(f"Expected at least two completions but got {count}.")
    given = {name: getattr(row, name) for name in ("scores", "ranks", "comparisons")}
    given = {name: values for name, values in given.items() if values is not None}
    if len(given) != 1:
        raise DataError(f"Expected one of `scores`, `ranks` and `comparisons` but got {' and '.join(given) or 'none'}.")
    ((name, values),) = given.items()
    if name == "comparisons":
        _check_comparisons(row, values)
        return
    if len(values) != count:
        raise DataError(f"Expected as many {name} as completions but got {len(values)} for {count}.")
    if wrong := [value for value in values if not _is_number(value)]:
        raise DataError(f"Expected finite numbers as {name} but got {wrong[0]!r}.")
    made = {"score_margin": name == "scores", "probability": comparing.ties == "half"}
    for column, value in row.columns.items():
        if made.get(column):
            raise DataError(f"Expected no column `{column}` in a row with `{name}`, from which it is made.")
        if isinstance(value, Sequence):
            raise DataError(f"Expected one number for the row in the column `{column}` but got {value!r}.")


def _check_comparisons(row: Ranking, comparisons: Sequence[tuple[int, int]]) -> None:
    count = len(row.completions)
    if not comparisons:
        raise DataError("Expected at least one comparison but got none.")
    for pair in comparisons:
        if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= place < count for place in pair):
            raise DataError(f"Expected comparisons as two different places among {count} completions but got {pair}.")
    for column, value in row.columns.items():
        if isinstance(value, Sequence) and len(value) != len(comparisons):
            raise DataError(
                f"Expected a number for each of the {len(comparisons)} comparisons in the column `{column}` but got "
                f"{len(value)}."
            )


def _each(row: Ranking, count: int) -> dict[str, list[float]]:
    """Columns with a number for each of `count` comparisons."""
    return {
        name: [float(one) for one in value] if isinstance(value, Sequence) else [float(value)] * count
        for name, value in row.columns.items()
    }


def _is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # an integer of some hundred digits
        return False
