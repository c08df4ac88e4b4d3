from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.export import callbacks_of, data_of, run_directory, tokenizer_of
from lit_dpo.callbacks.texts import log_table, print_shares, print_table, prompts_of_file, question
from lit_dpo.data.sandbox import apply_template
from lit_dpo.errors import TrainingError
from lit_dpo.logps.attention import plain_attention
from lit_dpo.policy.limits import limits
from lit_dpo.policy.sharding import mesh_of
from lit_dpo.references import CachedReference, NoReference
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.data.formats import Message
    from lit_dpo.module import DPOModule


_ENDS = ("prompt", "before", "after")


class SampleCompletions(pl.Callback):
    """Completes prompts before and after `fit`, prints a few side by side, and writes all to `completions.jsonl`.

    With `every_n_steps` or `every_n_epochs` also on the way, next to the reference, whose completions are sampled once:
    then the file has a row for each step and prompt (`step`, `prompt`, `completion`, `reference`), and loggers that
    take text get a table. All are sampled with the same random numbers, so that what differs is the policy.

    A run with it is the same run to the last bit: random states and modes are left as they were. Whatever fails here
    fails alone, in a line: it shows, and costs nothing that was trained.

    Args:
        prompts: how many held-out prompts are completed, the first ones of `val`, else of `train`. Or the prompts
            themselves; or a file of them: JSON Lines with a `prompt` each, or one in each line. Where the data are
            conversations, a prompt of text is what the user says.
        shown: how many of them are printed.
        max_new_tokens: length limit of a completion.
        temperature: of sampling.
        classify: `(prompt, completion) -> label`, given by its import path; the share of each label is then printed
            too.
        seed: of sampling; training's own random state is left alone.
        every_n_steps: optimizer steps from one time to the next. None: before and after only.
        every_n_epochs: epochs from one time to the next. None: before and after only.

    Raises:
        TrainingError: for an interval that is not at least 1, a file without prompts, or no data to take them from.
    """

    def __init__(
        self,
        prompts: int | list[str] | str = 64,
        shown: int = 6,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        classify: Callable[[str, str], str] | None = None,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
    ) -> None:
        for name, every in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if every is not None and every < 1:
                raise TrainingError(f"Expected `{name}` >= 1 but got {every}.")
        given = prompts_of_file(Path(prompts)) if isinstance(prompts, str) else prompts
        if not given:
            raise TrainingError(f"Expected `prompts` to be at least one but got {prompts!r}.")
        self.prompts, self.shown, self.seed = given, shown, seed
        self.max_new_tokens, self.temperature, self.classify = max_new_tokens, temperature, classify
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.lengths: dict[int, float] = {}
        """Mean length of the policy's completions by step, in characters."""
        self._before: list[str] | None = None
        self._reference: list[str] | None = None
        self._taken: dict[int, list[str]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """See that there are prompts to take."""
        if isinstance(self.prompts, int) and not hasattr(data_of(trainer), "prompts"):
            raise TrainingError(
                "SampleCompletions takes its prompts from a PreferenceDataModule; fit with `datamodule=`, or give it "
                "`prompts` of your own."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Complete them with the policy as it comes."""
        self._before, self._reference, self._step = None, None, -1
        self._taken, self.lengths = {}, {}
        # a sharded base is run by all ranks, each of which completes all; the first one shows and writes them
        if trainer.is_global_zero or mesh_of(pl_module.model) is not None:
            with alone("SampleCompletions"):
                self._questions = self._prompts(trainer)
                self._before = self._complete(trainer, pl_module.model)

    def on_train_start(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Let the reference complete them, once; a checkpoint's steps are known by now."""
        if self._before is None:
            return
        self._step = trainer.global_step
        self._take(self._step, self._before)
        if self._on_the_way and not isinstance(pl_module.reference.unwrapped, NoReference):
            with alone("SampleCompletions, of the reference,"):
                self._reference = self._of_reference(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DPOModule, outputs: object, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Complete them if it is time."""
        step, every = trainer.global_step, self.every_n_steps
        if step != self._step and every is not None and step % every == 0:
            self._on_time(trainer, pl_module)
        self._step = step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Complete them if it is time."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._on_time(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Complete them again, and compare."""
        directory = run_directory(trainer)
        if self._before is None or getattr(trainer, "fast_dev_run", False):
            return
        with alone("SampleCompletions"):
            after = self._taken.get(trainer.global_step) if trainer.global_step in list(self._taken)[1:] else None
            if after is None:
                after = self._complete(trainer, pl_module.model)
            if not trainer.is_global_zero:
                return
            questions = [text for text, _ in self._questions]
            if self._on_the_way:
                self._take(trainer.global_step, after)
                self._write(self._file(trainer, directory))
            else:
                _write(self._file(trainer, directory), zip(questions, self._before, after, strict=True), _ENDS)
            columns = {"held-out prompt" if isinstance(self.prompts, int) else "prompt": questions}
            columns |= {"reference": self._reference} if self._reference else {}
            columns |= {"before": self._before, "after": after}
            print_table("Completions, sampled", columns, self.shown)
            if self.classify is not None:
                print_shares(self._shares(questions, self._before), self._shares(questions, after))

    @property
    def _on_the_way(self) -> bool:
        return self.every_n_steps is not None or self.every_n_epochs is not None

    def _on_time(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Complete them in the middle of training: print, log and keep."""
        directory = run_directory(trainer)  # all ranks ask
        step = trainer.global_step
        if self._before is None or step in self._taken or getattr(trainer, "fast_dev_run", False):
            return
        with alone("SampleCompletions"):
            self._take(step, self._complete(trainer, pl_module.model))
            if not trainer.is_global_zero:
                return
            self._write(self._file(trainer, directory))
            questions = [text for text, _ in self._questions]
            columns = {"prompt": questions} | ({"reference": self._reference} if self._reference else {})
            columns |= {f"after {step} steps": self._taken[step]}
            print_table("Completions, sampled", columns, self.shown)
            rows = list(zip(*columns.values(), strict=True))[: self.shown]
            for logger in trainer.loggers:
                log_table(logger, "completions", list(columns), rows, step)

    def _file(self, trainer: pl.Trainer, directory: Path) -> Path:
        """Name the file; a second one of these callbacks has its own."""
        number = [one for one in callbacks_of(trainer) if isinstance(one, SampleCompletions)].index(self)
        return directory / f"completions{f'-{number + 1}' if number else ''}.jsonl"

    def _take(self, step: int, completions: list[str]) -> None:
        self._taken[step] = completions
        self.lengths[step] = sum(map(len, completions)) / len(completions)

    def _write(self, file: Path) -> None:
        questions = [text for text, _ in self._questions]
        reference: Sequence[str | None] = self._reference or [None] * len(questions)
        rows = [
            (step, *row)
            for step, completions in self._taken.items()
            for row in zip(questions, completions, reference, strict=True)
        ]
        _write(file, rows, ("step", "prompt", "completion", "reference"))

    def _prompts(self, trainer: pl.Trainer) -> list[tuple[str, list[int]]]:
        """Text and token ids of each prompt."""
        data, found = data_of(trainer), []
        count = self.prompts if isinstance(self.prompts, int) else 1
        if hasattr(data, "prompts"):
            split = "val" if data.val_dataloader() else "train"
            found = [(pair.prompt, ids) for _, ids, pair in data.prompts(split, count)]
        if isinstance(self.prompts, int):
            return [(question(prompt), ids) for prompt, ids in found]
        in_conversation = bool(found) and not isinstance(found[0][0], str)
        tokenizer, template = tokenizer_of(trainer), getattr(data, "chat_template_kwargs", None) or {}
        return [(question(one), _ids(tokenizer, one, in_conversation, template)) for one in self.prompts]

    def _of_reference(self, trainer: pl.Trainer, pl_module: DPOModule) -> list[str]:
        reference = pl_module.reference
        if isinstance(reference, CachedReference):  # it has numbers; what it remembers the numbers of may be run
            reference = reference.unwrapped
        with reference.activated(pl_module.model) as model:
            return self._complete(trainer, model)

    def _complete(self, trainer: pl.Trainer, model: PeftModel) -> list[str]:
        return sample_completions(
            model,
            tokenizer_of(trainer),
            [ids for _, ids in self._questions],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )

    def _shares(self, questions: list[str], completions: list[str]) -> dict[str, float]:
        """How large a part of the completions each label has."""
        assert self.classify is not None
        counts = Counter(str(self.classify(*pair)) for pair in zip(questions, completions, strict=True))
        return {label: count / len(questions) for label, count in counts.items()}


def _write(file: Path, rows: Any, names: Sequence[str]) -> None:
    with written_whole(file) as path, path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")


def _ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], in_conversation: bool, template: dict[str, Any]
) -> list[int]:
    """Token ids of a prompt of one's own, as the data's prompts have them."""
    if isinstance(prompt, str) and not in_conversation:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    found = apply_template(tokenizer, messages, add_generation_prompt=True, return_dict=False, **template)
    return list(found)


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
    completions: list[str] = []
    # ranks that share a base go on until the last one has ended: numbers that round otherwise end another row first
    together = {"synced_gpus": True} if mesh_of(model) is not None else {}
    with left_as_it_is(model, device), plain_attention(model):
        model.eval()
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
                **together,
            )
            written = [_until(ends, row) for row in out[:, width:].tolist()]
            completions += tokenizer.batch_decode(written, skip_special_tokens=True)
    return [completion.strip() for completion in completions]


@contextmanager
def left_as_it_is(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give back all random states, and each part of the model in the mode that it was in.

    Args:
        model: whatever is done to it in between.
        device: where random numbers are drawn, besides the CPU.
    """
    modes = [(part, part.training) for part in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for part, mode in modes:
            part.training = mode
