"""What `HealthMonitor` knows of a run, and what a rule is that reads it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Finding(NamedTuple):
    """What a rule says.

    Attributes:
        seen: what was seen, with numbers.
        matters: why it matters.
        remedy: what to try.
    """

    seen: str
    matters: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen}: {self.matters}. Try: {self.remedy}{'' if self.remedy.endswith('?') else '.'}"


class FirstPairs(NamedTuple):
    """The first pairs of a run, under the policy as it comes.

    Attributes:
        pairs: how many.
        rejected: in how many the policy finds the rejected completion likelier, per token.
        same: in how many both completions have the same length and log-prob.
    """

    pairs: int = 0
    rejected: int = 0
    same: int = 0


class PairsSeen(NamedTuple):
    """Pairs of the last validation, or of the last epoch.

    Attributes:
        margins: `(N,)` rewards of chosen minus rejected.
        longer: `(N,)` by how many tokens the chosen completion is longer.
    """

    margins: NDArray[np.float64]
    longer: NDArray[np.float64]


@dataclass
class History:
    """What a run has shown so far. Rules read it; what is not there is NaN, which is less and more than nothing.

    Attributes:
        beta: of the loss.
        compared: whether the loss reads a reference: rewards are log-ratios then.
        step: optimizer steps that were made.
        rate: learning rate of the last step.
        effort: steps so far, each as a share of the largest learning rate; a warm-up counts as less.
        start: measures of the first step, before it: `loss`, `reward_margin`, … as in the log, without `train/`.
        recent: of the last steps; a row of the log begins each time anew.
        validations: of each validation, the first one may be before training.
        validated: pairs of a validation.
        pairs: of the last validation, or of the last epoch where there is none.
        first: pairs before anything has moved.
        skipped: steps that were left out since they were not finite.
        dead: adapters that can change nothing.
        lengths: mean length of sampled completions, in characters, by step.
        reference: in words.
    """

    beta: float = math.nan
    compared: bool = True
    reference: str = ""
    step: int = 0
    rate: float = math.nan
    effort: float = 0.0
    start: dict[str, float] = field(default_factory=dict)
    recent: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=5))
    validations: list[dict[str, float]] = field(default_factory=list)
    validated: int = 0
    pairs: PairsSeen | None = None
    first: FirstPairs = field(default_factory=FirstPairs)
    skipped: int = 0
    dead: list[str] = field(default_factory=list)
    lengths: dict[int, float] = field(default_factory=dict)

    def now(self, name: str) -> float:
        """Mean of a measure over the last steps, NaN where it is not measured."""
        values = [row[name] for row in self.recent if name in row]
        return sum(values) / len(values) if values else math.nan

    def moved(self, name: str) -> float:
        """By how much a measure differs from its start."""
        return self.now(name) - self.start.get(name, math.nan)


@dataclass(frozen=True)
class Rule(ABC):
    """A pathology that a run may have. Subclass it anywhere and give it to `HealthMonitor(rules=…)`.

    Example:
        ```python
        @dataclass(frozen=True)
        class SlowStart(Rule):
            steps: int = 200

            def __call__(self, seen):
                if seen.step > self.steps and seen.now("reward_margin") < 0:
                    return Finding("the margin is still negative", "nothing is learnt", "a larger learning rate")
        ```
    """

    when: ClassVar[Literal["step", "once", "pairs"]] = "step"
    """`step`: after each step, and it must hold for `patience` steps on end. `once`: after each step, and it holds as
    soon as it is seen. `pairs`: after each validation and each epoch."""

    @abstractmethod
    def __call__(self, seen: History) -> Finding | None:
        """Look at a run, and say what is wrong with it, or None."""
