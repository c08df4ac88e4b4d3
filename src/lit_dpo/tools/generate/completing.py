"""From token ids to completions: sampled as transformers samples, one at a time and streamed, or in batches."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_dpo.errors import DataError, LitDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEW_TOKENS = 256  # as transformers' pipeline has it
_OF_SAMPLING = ("temperature", "top_p", "top_k")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of sampling, as transformers names them."""
    group = parser.add_argument_group("sampling", "what is not given is as the model's generation_config.json says")
    group.add_argument(
        "--max_new_tokens", type=int, help=f"default: the model's, else {_NEW_TOKENS}; less if its context ends"
    )
    how = group.add_mutually_exclusive_group()
    how.add_argument("--do_sample", action="store_true", default=None, help="sample; so does any of the three below")
    how.add_argument("--greedy", action="store_true", help="the most likely token each time")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top_p", type=float)
    group.add_argument("--top_k", type=int)
    group.add_argument("--repetition_penalty", type=float)
    group.add_argument("--seed", type=int, default=0, help="of sampling, for each batch anew; default: 0")


class Completer(NamedTuple):
    """A model that completes prompts.

    Attributes:
        model: of transformers, or of PEFT; in evaluation mode.
        tokenizer: its own.
        settings: what `generate` is given.
        context: most tokens of a prompt and its completion. None: nothing says.
        seed: of sampling.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    context: int | None
    seed: int

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.settings.get("do_sample", self.model.generation_config.do_sample))

    def check(self, ids: Sequence[int], what: str) -> None:
        """See that a prompt leaves room for a token.

        Raises:
            DataError: if it does not.
        """
        if self.context is not None and len(ids) >= self.context:
            raise DataError(
                f"Expected {what} to have fewer tokens than the model's context, {self.context}, but it has "
                f"{len(ids)}: shorten it."
            )

    def room(self, longest: int) -> int:
        """Count the new tokens that prompts of up to `longest` tokens get."""
        wanted: int = self.settings["max_new_tokens"]
        return wanted if self.context is None else min(wanted, self.context - longest)

    def complete(self, rows: list[list[int]], streamer: Any = None) -> list[str]:
        """Complete prompts, padded on the left; their text is without special tokens.

        Args:
            rows: token ids, each shorter than the context.
            streamer: of transformers; for a single prompt. It gets tokens as they come.
        """
        import torch

        width, device = max(map(len, rows)), self.model.get_input_embeddings().weight.device
        pad = self._pad
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        torch.manual_seed(self.seed)
        more = {} if streamer is None else {"streamer": streamer}
        settings = {**self.settings, "max_new_tokens": self.room(width), "pad_token_id": pad, **more}
        with torch.no_grad():
            out = self.model.generate(input_ids=ids, attention_mask=mask, **settings)
        return [str(text) for text in self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]

    @property
    def _pad(self) -> int:
        # a pad token may be one that the model never had
        count = self.model.get_input_embeddings().weight.shape[0]
        found = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in found if token is not None and token < count)

    def side(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Within it, the `policy` completes, or the `reference`: the base without the adapter."""
        from lit_dpo.policy.adapters import adapters_off

        return adapters_off(self.model) if name == "reference" else contextlib.nullcontext()


def completer(model: Any, tokenizer: PreTrainedTokenizerBase, given: argparse.Namespace) -> Completer:
    """Put a model and the options of sampling together.

    Raises:
        LitDPOError: for an option outside of its domain, or one that has no effect.
    """
    from lit_dpo.policy.limits import limits

    found = limits(model)
    return Completer(
        model, tokenizer, _settings(given, model.generation_config), found.context or found.made_for, given.seed
    )


def check(given: argparse.Namespace) -> None:
    """See that what is typed of sampling has an effect and is in its domain; no weights are needed.

    Raises:
        LitDPOError: naming the option.
    """
    typed = [name for name in _OF_SAMPLING if getattr(given, name) is not None]
    if given.greedy and typed:
        raise LitDPOError(f"`--{typed[0]}` has no effect with `--greedy`: leave one of them out.")
    domains: dict[str, Callable[[float], bool]] = {
        "max_new_tokens": lambda value: value >= 1,
        "temperature": lambda value: value > 0,
        "top_p": lambda value: 0 < value <= 1,
        "top_k": lambda value: value >= 0,
        "repetition_penalty": lambda value: value > 0,
    }
    bounds = {
        "max_new_tokens": ">= 1",
        "temperature": "> 0 (`--greedy` for none)",
        "top_p": "in (0, 1]",
        "top_k": ">= 0",
    }
    for name, holds in domains.items():
        if (value := getattr(given, name)) is not None and not holds(value):
            raise LitDPOError(f"Expected `--{name}` {bounds.get(name, '> 0')} but got {value}.")


def _settings(given: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Return what `generate` is given besides the model's own generation_config."""
    names = ("max_new_tokens", *_OF_SAMPLING, "repetition_penalty")
    found = {name: value for name in names if (value := getattr(given, name)) is not None}
    found.setdefault("max_new_tokens", config.max_new_tokens or _NEW_TOKENS)
    if given.greedy:
        # the model's own settings of sampling would be warned of
        found |= {"do_sample": False, **dict.fromkeys(_OF_SAMPLING)}
    elif given.do_sample or any(name in found for name in _OF_SAMPLING):
        found["do_sample"] = True
    return found
