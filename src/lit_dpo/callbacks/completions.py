from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.export import data_of, run_directory, tokenizer_of
from lit_dpo.data.formats import Message
from lit_dpo.errors import TrainingError
from lit_dpo.logps.attention import plain_attention
from lit_dpo.policy.limits import limits
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from lit_dpo.module import DPOModule


# C0 but for tab and newline, DEL, C1, and marks that turn the direction of text
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class SampleCompletions(pl.Callback):
    """Completes held-out prompts before and after `fit`, prints a few side by side, and writes all to
    `completions.jsonl`.

    Whatever fails here fails alone, in a line: it shows, and costs nothing that was trained.

    Args:
        prompts: how many held-out prompts are completed; the first ones of `val`, else of `train`.
        shown: how many of them are printed.
        max_new_tokens: length limit of a completion.
        temperature: of sampling.
        classify: `(prompt, completion) -> label`, given by its import path; the share of each label is then printed
            too.
        seed: of sampling; training's own random state is left alone.
    """

    def __init__(
        self,
        prompts: int = 64,
        shown: int = 6,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        classify: Callable[[str, str], str] | None = None,
        seed: int = 0,
    ) -> None:
        self.prompts, self.shown, self.seed = prompts, shown, seed
        self.max_new_tokens, self.temperature, self.classify = max_new_tokens, temperature, classify
        self._before: list[str] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """See that there are prompts to take."""
        if not hasattr(data_of(trainer), "prompts"):
            raise TrainingError(
                "SampleCompletions takes its prompts from a PreferenceDataModule; fit with `datamodule=`."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Complete them with the policy as it comes."""
        self._before = None
        if not trainer.is_global_zero:
            return
        with alone("SampleCompletions"):
            split = "val" if data_of(trainer).val_dataloader() else "train"
            self._questions = [
                (_question(pair.prompt), ids) for _, ids, pair in data_of(trainer).prompts(split, self.prompts)
            ]
            self._before = self._complete(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Complete them again, and compare."""
        directory = run_directory(trainer)
        if self._before is None or getattr(trainer, "fast_dev_run", False):
            return
        with alone("SampleCompletions"):
            after = self._complete(trainer, pl_module)
            questions = [question for question, _ in self._questions]
            with written_whole(directory / "completions.jsonl") as path, path.open("w", encoding="utf-8") as stream:
                for row in zip(questions, self._before, after, strict=True):
                    stream.write(json.dumps(dict(zip(("prompt", "before", "after"), row, strict=True))) + "\n")
            self._print(questions, self._before, after)

    def _complete(self, trainer: pl.Trainer, pl_module: DPOModule) -> list[str]:
        return sample_completions(
            pl_module.model,
            tokenizer_of(trainer),
            [ids for _, ids in self._questions],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )

    def _print(self, questions: list[str], before: list[str], after: list[str]) -> None:
        from rich.console import Console
        from rich.table import Column, Table

        console = Console()
        columns = (Column(name, overflow="fold") for name in ("held-out prompt", "before", "after"))
        table = Table(*columns, title="Completions, sampled", show_lines=True)
        for row in list(zip(questions, before, after, strict=True))[: self.shown]:
            table.add_row(*(_shown(text, console.encoding) for text in row))
        console.print(table)
        if self.classify is not None:
            shares = [
                Counter(str(self.classify(*pair)) for pair in zip(questions, completions, strict=True))
                for completions in (before, after)
            ]
            for label in sorted(shares[0] | shares[1]):
                was, now = (share[label] / len(questions) for share in shares)
                console.print(
                    _shown(f"share of {label} completions: {was:.2f} before, {now:.2f} after", console.encoding)
                )


def _shown(text: str, encoding: str) -> Any:
    """Text for a terminal as it is: no markup, nothing that steers the terminal, only what its encoding has."""
    from rich.text import Text

    return Text(_STEERING.sub("", text).encode(encoding, "replace").decode(encoding))


def _question(prompt: str | list[Message]) -> str:
    """Return the text of a prompt, or what the user said last in a conversation."""
    if isinstance(prompt, str):
        return prompt
    said = [message["content"] for message in prompt if message["role"] == "user"]
    return str(said[-1] if said else prompt[-1].get("content") or "")


def _until(ends: set[int], row: list[int]) -> list[int]:
    """Cut a row where it ends, without what was put after it."""
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


@torch.no_grad()
def sample_completions(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """Sample one completion of each prompt.

    Args:
        model: a policy in training or not; left as it was, like the global random state.
        tokenizer: turns the completions into text.
        prompts: token ids; where the model's context is too short their beginning is cut.
        max_new_tokens: length limit.
        temperature: of sampling.
        seed: of sampling.
        batch_size: prompts completed at once.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary, context, _ = limits(model)
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - 1)
        if any(len(row) + max_new_tokens > context for row in prompts):
            rank_zero_info(
                f"completions: prompts keep the last {context - max_new_tokens} tokens; the model has {context}"
            )
        prompts = [row[max(0, len(row) + max_new_tokens - context) :] for row in prompts]
    # a pad token may be one that the model never had
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in pads if token is not None and token < vocabulary)
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    training, completions = model.training, []
    model.eval()
    try:
        with plain_attention(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                rows = prompts[start : start + batch_size]
                width = max(len(row) for row in rows)
                ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                )
                written = [_until(ends, row) for row in out[:, width:].tolist()]
                completions += tokenizer.batch_decode(written, skip_special_tokens=True)
    finally:
        model.train(training)
    return [completion.strip() for completion in completions]
