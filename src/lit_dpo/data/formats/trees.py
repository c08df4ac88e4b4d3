"""Trees of conversations, in which the replies to a message are ranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_dpo.data.formats.base import Message, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.cells import short
from lit_dpo.data.formats.turns import ROLES, answers, text_in
from lit_dpo.errors import DataError


@dataclass(frozen=True)
class Trees(PreferenceFormat):
    """Rows that are OpenAssistant's message trees: a `prompt` with `replies`, which have replies, and ranks from 0.

    Each message of the user's to which two or more ranked answers are given is an example, with all before it as its
    prompt. Answers without a rank are left out.

    Example:
        >>> from lit_dpo.data.formats import Trees
        >>> replies = [{"role": "assistant", "text": "5", "rank": 1}, {"role": "assistant", "text": "4", "rank": 0}]
        >>> tree = {"prompt": {"role": "prompter", "text": "2 + 2?", "replies": replies}}
        >>> [Trees().read(one).ranks for one in Trees().examples(tree)]
        [[1, 0]]
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of this layout."""
        return "message_tree_id", "prompt"

    def examples(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """List the questions of a tree, each with its ranked answers; an empty one if there is none.

        Raises:
            DataError: for what is no tree, or a message without text or with an unknown role.
        """
        tree = row.get("prompt")
        if not isinstance(tree, dict) or not isinstance(tree.get("replies"), list):
            raise DataError(f"Expected a message with `replies` in `prompt` but got {short(tree)}.")
        return list(_questions([], tree)) or [{"prompt": [], "completions": [], "ranks": []}]

    def read(self, row: Mapping[str, Any]) -> Ranking | Skipped:
        """Read one of the examples."""
        if not row["completions"]:
            return Skipped("no two answers are ranked")
        completions = {f"replies[{place}]": one for place, one in enumerate(row["completions"])}
        return Ranking(*answers(row["prompt"], completions), ranks=row["ranks"])


def _questions(before: list[Message], message: Any) -> Iterator[dict[str, Any]]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"Expected a message with a known `role` but got {short(message)}.")
    path = [*before, {"role": ROLES[role], "content": text_in("text", message)}]
    replies = message.get("replies") or []
    if not isinstance(replies, list):
        raise DataError(f"Expected a list of messages in `replies` but got {short(replies)}.")
    ranked = [one for one in replies if isinstance(one, dict) and isinstance(one.get("rank"), int | float)]
    if path[-1]["role"] == "user" and len(ranked) > 1:
        texts, ranks = [text_in("text", one) for one in ranked], [one["rank"] for one in ranked]
        yield {"prompt": path, "completions": texts, "ranks": ranks}
    for one in replies:
        yield from _questions(path, one)
