"""Prompts: typed, or from a file of any kind that training reads; and as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_dpo.data.formats import Auto, Message, Skipped
from lit_dpo.data.formats.turns import is_turns, messages, read_row, tools_in
from lit_dpo.data.sandbox import apply_template
from lit_dpo.data.sources import load_rows
from lit_dpo.errors import DataError, LitDPOError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST = 100  # rows by which a layout is recognised


class Prompt(NamedTuple):
    """What is to be completed.

    Attributes:
        asked: text, completed as it is; or messages, which the chat template renders.
        template: more arguments of the chat template, such as `tools`.
    """

    asked: str | list[Message]
    template: Mapping[str, Any] = {}

    @property
    def shown(self) -> str:
        """The text, or what was said last."""
        return self.asked if isinstance(self.asked, str) else str(self.asked[-1].get("content") or "")


def read_prompts(file: str) -> list[Prompt]:
    """Read a text file with a prompt a line, or the prompts of whatever `data.train` reads.

    A row's `prompt`, or its `messages`, is the prompt; rows of a known layout of preferences give theirs.

    Raises:
        DataError: for a file that cannot be read, or has no prompts.
    """
    if Path(file).suffix in (".txt", "") and Path(file).is_file():
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Expected a text file in UTF-8 in `--file` but {file}: {first_line(error)}.") from error
        found = [Prompt(line) for line in lines if line.strip()]
    else:
        found = [prompt for source in load_rows(file, None, stage="val") for prompt in _of_rows(source)]
    if not found:
        raise DataError(f"Expected prompts in {file} but it has none.")
    return found


def _of_rows(source: Any) -> list[Prompt]:
    rows, format, found = source.rows.to_list(), None, []
    for number, row in enumerate(rows):
        try:
            given = row.get("prompt", row.get("messages"))
            if isinstance(given, str) and not is_turns(given):
                found.append(Prompt(given))
                continue
            if is_turns(given):
                found.append(Prompt(messages("prompt", given), tools_in("tools", row) if row.get("tools") else {}))
                continue
            format = format or Auto().of(source.name, rows[:_FIRST])
            read = read_row(format, row)
        except DataError as error:
            raise error if format is None else DataError(f"{source.place(number)}: {error}") from error
        if not isinstance(read, Skipped):
            found.append(Prompt(read.prompt, read.template))
    return found


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Mapping[str, Any]) -> list[int]:
    """Return the token ids of a prompt, as `pipeline("text-generation")` has them.

    Args:
        tokenizer: with a chat template, if the prompt is of messages.
        prompt: what to encode.
        template: arguments of the chat template for all prompts.

    Raises:
        DataError: if there is no chat template, or it refuses the messages.
    """
    if isinstance(prompt.asked, str):
        ids: list[int] = tokenizer(prompt.asked)["input_ids"]
        if not ids:
            raise DataError(f"Expected a prompt of at least one token but {prompt.asked!r} has none.")
        return ids
    check_template(tokenizer)
    try:
        text = apply_template(
            tokenizer, prompt.asked, tokenize=False, add_generation_prompt=True, **{**template, **prompt.template}
        )
    except Exception as error:  # templates raise whatever they like
        raise DataError(f"The chat template refuses the conversation: {first_line(error)}") from error
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """See that conversations can be rendered.

    Raises:
        DataError: if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"Expected a tokenizer with a chat template for conversations but that of `{tokenizer.name_or_path}` has "
            "none: give text with `--prompt`, or a template with `--chat_template FILE`."
        )


def set_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Let conversations be rendered by a file's template.

    Raises:
        LitDPOError: if it cannot be read.
    """
    if file is None:
        return
    try:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LitDPOError(f"Expected a file in `--chat_template` but {file}: {first_line(error)}.") from error


def as_messages(prompts: Sequence[Prompt], system: str | None) -> list[Prompt]:
    """Make texts a user's messages, after a system message if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [
        prompt._replace(asked=[*first, *(_user(prompt.asked) if isinstance(prompt.asked, str) else prompt.asked)])
        for prompt in prompts
    ]


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
