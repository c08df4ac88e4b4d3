from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from lit_dpo.callbacks.export import run_directory, tokenizer_of
from lit_dpo.errors import TrainingError
from lit_dpo.logps.attention import plain_attention


class SampleAnswers(pl.Callback):
    """Answers held-out prompts before and after `fit`, prints a few side by side, and writes all to `answers.jsonl`.

    Args:
        prompts: how many held-out prompts are answered; the first ones of `val`, else of `train`.
        shown: how many of them are printed.
        max_new_tokens: length limit of an answer.
        temperature: of sampling.
        classify: `(prompt, answer) -> label`, given by its import path; the share of each label is then printed too.
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
        self._before: list[str] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See that there are prompts to take."""
        if not hasattr(trainer.datamodule, "prompts"):
            raise TrainingError("SampleAnswers takes its prompts from a PreferenceDataModule; fit with `datamodule=`.")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Answer with the policy as it comes."""
        split = "val" if trainer.datamodule.val_dataloader() else "train"
        self._questions = [
            (_question(pair.prompt), ids) for _, ids, pair in trainer.datamodule.prompts(split, self.prompts)
        ]
        if trainer.is_global_zero:
            self._before = self._answer(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Answer again, and compare."""
        directory = run_directory(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        after = self._answer(trainer, pl_module)
        questions = [question for question, _ in self._questions]
        path = directory / "answers.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            for row in zip(questions, self._before, after, strict=True):
                stream.write(json.dumps(dict(zip(("prompt", "before", "after"), row, strict=True))) + "\n")
        self._print(questions, after)

    def _answer(self, trainer: Any, pl_module: Any) -> list[str]:
        return sample_answers(
            pl_module.model,
            tokenizer_of(trainer),
            [ids for _, ids in self._questions],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )

    def _print(self, questions: list[str], after: list[str]) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("held-out prompt", "before", "after", title="Answers, sampled", show_lines=True)
        for row in list(zip(questions, self._before, after, strict=True))[: self.shown]:
            table.add_row(*(text.replace("[", r"\[") for text in row))
        console = Console()
        console.print(table)
        if self.classify is not None:
            shares = [
                Counter(self.classify(question, answer) for question, answer in zip(questions, answers, strict=True))
                for answers in (self._before, after)
            ]
            for label in sorted(shares[0] | shares[1]):
                before, now = (share[label] / len(questions) for share in shares)
                console.print(f"share of {label} answers: {before:.2f} before, {now:.2f} after")


def _question(prompt: Any) -> str:
    """The text of a prompt, or what the user said last in a conversation."""
    if isinstance(prompt, str):
        return prompt
    said = [message["content"] for message in prompt if message["role"] == "user"]
    return str(said[-1] if said else prompt[-1]["content"])


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """Sample one answer to each prompt.

    Args:
        model: a policy in training or not; left as it was, like the global random state.
        tokenizer: turns the answers into text.
        prompts: token ids.
        max_new_tokens: length limit.
        temperature: of sampling.
        seed: of sampling.
        batch_size: prompts answered at once.
    """
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    training, answers = model.training, []
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
                answers += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    finally:
        model.train(training)
    return [answer.strip() for answer in answers]
