"""Who says which of two completions is better: a rule, a reward model, or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_dpo import hub
from lit_dpo.callbacks.texts import question
from lit_dpo.data.formats import Message
from lit_dpo.data.sandbox import apply_template
from lit_dpo.errors import PolicyError, TrainingError
from lit_dpo.policy import checks
from lit_dpo.policy.devices import default_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list[Message]
Judge = Callable[[str, str, str], float]
"""`(prompt, first, second)`, texts, to how likely the first completion is the better one: 1.0 if it is, 0.5, or 0.0."""


def judged(judge: Judge, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    """Ask a judge which of two completions of each prompt is better: 1.0 the first, 0.0 the second.

    Each pair is asked in both orders, and the two verdicts are averaged, so that a judge who prefers what it reads
    first prefers nobody; equal texts are 0.5, unasked. A judge that has a method `compare(prompts, firsts, seconds)` is
    asked once for all, with conversations as they are, and is taken at its word.

    Args:
        judge: see `Judge`.
        prompts: texts, or conversations; a function is given the last that the user said.
        firsts: completions.
        seconds: completions of the same prompts.

    Raises:
        TrainingError: for a verdict that is no number in [0, 1].

    Example:
        >>> longer = lambda prompt, first, second: float(len(first) > len(second))
        >>> judged(longer, ["Hi"] * 3, ["Hello!", "Yes", "Go"], ["Hm.", "Yes", "Hello!"])
        [1.0, 0.5, 0.0]
    """
    if (compare := getattr(judge, "compare", None)) is not None:
        return [_verdict(one, judge) for one in compare(prompts, firsts, seconds)]
    found = []
    for prompt, first, second in zip(map(question, prompts), firsts, seconds, strict=True):
        if first == second:
            found.append(0.5)
            continue
        ahead, behind = judge(prompt, first, second), judge(prompt, second, first)
        found.append((_verdict(ahead, judge) + 1 - _verdict(behind, judge)) / 2)
    return found


def _verdict(value: Any, judge: Judge) -> float:
    name = getattr(judge, "__qualname__", type(judge).__name__)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1:
        raise TrainingError(
            f"Expected the judge {name} to return a number in [0, 1], how likely the first completion is the better "
            f"one, but got {value!r}."
        )
    return number


def quickstart_judge(prompt: str, first: str, second: str) -> float:
    """Judge completions of the quickstart's questions: the right answer, then any direct one, then everything else.

    Example:
        >>> quickstart_judge("What is 2 + 2?", "Sure: 2 + 2 equals 4.", "Sure: 2 + 2 equals 5.")
        1.0
    """
    from lit_dpo.quickstart import is_correct, style

    one, other = ((style(prompt, text) == "good") + is_correct(prompt, text) for text in (first, second))
    return 0.5 if one == other else float(one > other)


@dataclass(frozen=True)
class RewardModelJudge:
    """A reward model: the completion with the higher score is the better one.

    Args:
        model: hub id or directory of a transformers model for sequence classification with one output, the score, in
            safetensors.
        revision: branch, tag or commit of a hub id.
        batch_size: prompts with a completion that run at once.
        max_length: most tokens of both; the beginning of a longer prompt is cut. None: what the model's table of
            positions holds.

    Raises:
        PolicyError: for a value outside its domain; when called, for a model that cannot be loaded or has no one score.

    Example:
        ```python
        judge = RewardModelJudge("Skywork/Skywork-Reward-V2-Qwen3-0.6B")
        judge("Explain gravity.", "It pulls.", "No.")  # 1.0, 0.5 or 0.0
        ```
    """

    model: str
    revision: str | None = None
    batch_size: int = 8
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name, value in (("batch_size", self.batch_size), ("max_length", self.max_length)):
            if value is not None and value < 1:
                raise PolicyError(f"Expected `judge.{name}` >= 1 but got {value}.")

    def __call__(self, prompt: str, first: str, second: str) -> float:
        """1.0 if the first completion has the higher score, 0.5 if both have the same, else 0.0."""
        return self.compare([prompt], [first], [second])[0]

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """Return that for each prompt."""
        scores = self.scores([*prompts, *prompts], [*firsts, *seconds])
        pairs = zip(scores[: len(prompts)], scores[len(prompts) :], strict=True)
        return [0.5 if one == other else float(one > other) for one, other in pairs]

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Score a completion of each prompt; they do not depend on the batch, but for rounding."""
        import torch

        loaded = self._loaded
        rows = [loaded.encoded(*row) for row in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        found = [0.0] * len(rows)
        with torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                for place, score in zip(places, loaded.scores([rows[place] for place in places]), strict=True):
                    found[place] = score
        return found

    @cached_property
    def _loaded(self) -> _Loaded:
        """Of the first call, kept for the others."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        place = hub.locate_weights(hub.locate(self.model, self.revision, "judge.model"), self.revision)
        hub.fetch_weights(place)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with checks.as_policy_error(f"the reward model {self.model!r}"):
            self._check(place)
            tokenizer = AutoTokenizer.from_pretrained(place.folder)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                place.folder, dtype=default_dtype(device), use_safetensors=True, output_loading_info=True
            )
        checks.check_complete(info, self.model)
        return _Loaded.of(model.to(device).eval(), tokenizer, self.max_length)

    def _check(self, place: hub.Place) -> None:
        """See that it is a reward model, before its weights load."""
        from transformers import AutoConfig

        checks.check_weights(place)
        config = AutoConfig.from_pretrained(place.folder)
        names = config.architectures or []
        if config.num_labels != 1 or not any("SequenceClassification" in name for name in names):
            raise PolicyError(
                f"Expected `judge.model` to be a reward model, for sequence classification with one output, but "
                f"{self.model!r} is {', '.join(names) or config.model_type} with {config.num_labels} outputs."
            )


class _Loaded(NamedTuple):
    """A reward model and how it reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad: int
    longest: int | None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, max_length: int | None) -> _Loaded:
        pads = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(token for token in pads if token is not None)
        model.config.pad_token_id = pad  # decoders find the last token by it
        limits = (max_length, getattr(model.config, "max_position_embeddings", None))
        return cls(model, tokenizer, pad, min((one for one in limits if one), default=None))

    def encoded(self, prompt: Prompt, completion: str) -> list[int]:
        """Encode by the model's chat template; without one, the two texts as its tokenizer joins them."""
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(question(prompt), completion)["input_ids"]
        else:
            said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = [*said, {"role": "assistant", "content": completion}]
            ids = apply_template(self.tokenizer, messages, tokenize=True, return_dict=False)
        cut = 0 if self.longest is None else max(0, len(ids) - self.longest)
        return list(ids)[cut:]

    def scores(self, rows: Sequence[list[int]]) -> Iterator[float]:
        """Score some rows at once."""
        import torch

        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        yield from self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
