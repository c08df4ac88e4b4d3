from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_dpo.errors import LitDPOError
from lit_dpo.tools import trained
from lit_dpo.tools.generate import completing
from lit_dpo.tools.generate.chat import chat
from lit_dpo.tools.generate.completing import Completer
from lit_dpo.tools.generate.prompts import Prompt, as_messages, check_template, encode, read_prompts, set_template
from lit_dpo.tools.generate.terminal import Streamer, heading, say
from lit_dpo.writing import written_whole

log = logging.getLogger(__name__)

_SIDES = ("policy", "reference")
_AT_ONCE = 8


@trained.quiet()
def main(args: Sequence[str]) -> None:
    """Run `lit-dpo generate`.

    Args:
        args: the command line after `generate`.

    Raises:
        LitDPOError: for a model, prompts or options that cannot be used.
    """
    parser = _parser()
    given = parser.parse_args(args)
    _check(given)
    prompts = [*map(Prompt, given.prompt or ()), *(read_prompts(given.file) if given.file else ())]
    found = trained.find(given.model, given, given.dtype)
    if given.compare and not found.has_reference:
        raise LitDPOError(
            f"`--compare` needs an adapter, and {found.name} is a whole model: there is no reference in it."
        )
    tokenizer = trained.tokenizer(found)
    set_template(tokenizer, given.chat_template)
    asked_for = given.messages or (given.messages is None and given.system is not None)
    messages = asked_for or (given.messages is None and bool(found.said.get("conversations")))
    prompts = as_messages(prompts, given.system) if messages else prompts
    if given.chat or any(not isinstance(one.asked, str) for one in prompts):
        check_template(tokenizer)
        if messages and not asked_for:
            log.info("prompts are a user's messages, as in training; `--no-messages` completes them as they are")
    elif given.messages is None and tokenizer.chat_template is not None and prompts:
        log.info("texts are completed as they are; `--messages` gives them to the chat template as a user's message")
    rows = [encode(tokenizer, prompt, given.chat_template_kwargs) for prompt in prompts]
    model = completing.completer(trained.load(found, trained.device_of(given.device)), tokenizer, given)
    for number, row in enumerate(rows):
        model.check(row, f"prompt {number + 1}")
    if given.chat:
        first = [] if given.system is None else [{"role": "system", "content": given.system}]
        chat(model, first, given.chat_template_kwargs, compare=given.compare)
        return
    written = _streamed(model, prompts, rows, given) if given.file is None else _in_batches(model, prompts, rows, given)
    if given.out:
        _write(Path(given.out), prompts, written)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-dpo generate",
        usage="lit-dpo generate MODEL (--prompt TEXT ... | --file FILE | --chat) [--compare] [--option value ...]",
        description="Complete prompts with what was trained, streamed as they come; those of a file in batches.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", help="a run's folder, an adapter's, a .ckpt, a model's folder, or a hub id of an adapter or a model"
    )
    what = parser.add_argument_group("prompts")
    what.add_argument("--prompt", action="append", help="a prompt; several times for several")
    what.add_argument(
        "--file", help="a text file with a prompt a line, or any file or data set that `data.train` reads"
    )
    what.add_argument(
        "--chat", action="store_true", help="a conversation; `/reset` begins anew, `/exit` or Ctrl-D ends it"
    )
    what.add_argument(
        "--messages",
        action=argparse.BooleanOptionalAction,
        help="a text is a user's message, rendered by the chat template; default: if it was trained on conversations",
    )
    what.add_argument("--system", help="a system message before each conversation; with `--messages` or `--chat`")
    what.add_argument("--chat_template", help="a file with another chat template, in Jinja")
    what.add_argument("--chat_template_kwargs", type=_json, default={}, help="more arguments for it, as a JSON object")
    what.add_argument("--compare", action="store_true", help="the reference too: the same base without the adapter")
    what.add_argument("--out", help="a file, .jsonl, of prompts and completions")
    what.add_argument(
        "--batch_size", type=int, default=None, help=f"prompts of a file completed at once; default: {_AT_ONCE}"
    )
    completing.add_arguments(parser)
    trained.add_arguments(parser)
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of computation; default: as trained"
    )
    return parser


def _json(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


def _check(given: argparse.Namespace) -> None:
    """See that what is typed goes together, before anything is read."""
    if given.chat and (given.prompt or given.file):
        raise LitDPOError("Expected `--chat`, or prompts with `--prompt` or `--file`, but got both.")
    if not (given.chat or given.prompt or given.file):
        raise LitDPOError("Expected `--prompt TEXT`, `--file FILE` or `--chat`: what shall be completed?")
    for name in ("out", "messages"):
        if given.chat and getattr(given, name) is not None:
            raise LitDPOError(f"`--{name}` has no effect with `--chat`: leave it out.")
    if given.messages is False and given.system is not None:
        raise LitDPOError("`--system` is a message, and `--no-messages` completes texts as they are: leave one out.")
    if given.batch_size is not None and not given.file:
        raise LitDPOError("`--batch_size` has no effect without `--file`: leave it out.")
    if given.batch_size is not None and given.batch_size < 1:
        raise LitDPOError(f"Expected `--batch_size` >= 1 but got {given.batch_size}.")
    completing.check(given)


def _streamed(
    model: Completer, prompts: list[Prompt], rows: list[list[int]], given: argparse.Namespace
) -> list[dict[str, str]]:
    """Complete one prompt after another, printed as tokens come."""
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        if len(prompts) > 1:
            heading(prompt.shown, strong=True)
        completions: dict[str, str] = {}
        for side in _SIDES[: 1 + given.compare]:
            if given.compare:
                heading(side)
            with model.side(side):
                (completions[side],) = model.complete([row], Streamer(model.tokenizer))
        found.append(completions)
    return found


def _in_batches(
    model: Completer, prompts: list[Prompt], rows: list[list[int]], given: argparse.Namespace
) -> list[dict[str, str]]:
    """Complete some prompts at once, and print them as they are done."""
    found: list[dict[str, str]] = []
    size = given.batch_size or _AT_ONCE
    for start in range(0, len(rows), size):
        together = rows[start : start + size]
        sides: dict[str, list[str]] = {}
        for side in _SIDES[: 1 + given.compare]:
            with model.side(side):
                sides[side] = model.complete(together)
        for number, prompt in enumerate(prompts[start : start + size]):
            found.append({side: completions[number] for side, completions in sides.items()})
            heading(prompt.shown, strong=True)
            for side, completion in found[-1].items():
                if given.compare:
                    heading(side)
                say(completion.strip())
    return found


def _write(path: Path, prompts: list[Prompt], written: list[dict[str, str]]) -> None:
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for prompt, completions in zip(prompts, written, strict=True):
            row: dict[str, Any] = {"prompt": prompt.asked, "completion": completions["policy"]}
            if "reference" in completions:
                row["reference"] = completions["reference"]
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    log.info("%s completions in %s", len(written), path)
