"""What is passed between the rooms of an ablation: what is asked, what a run gave, what is made of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Asked(NamedTuple):
    """A run that is wanted."""

    name: str
    """Of its folder: what is varied, and the seed, such as `loss=ipo,beta=0.1,seed=1`."""
    axes: dict[str, str]
    """What is varied, and its value here, both as they are shown; without the seed."""
    seed: int
    arguments: list[str]
    """Of `lit-dpo fit`, without where it writes."""


class Result(NamedTuple):
    """What became of a run; `result.json` in its folder."""

    name: str
    axes: dict[str, str]
    seed: int
    status: Literal["done", "failed"]
    error: str = ""
    """One paragraph; empty where it is done."""
    loss: str = ""
    """Among the names of the losses that everything is measured by: the one that it was trained with."""
    steps: int = 0
    seconds: float = 0.0
    """Of `fit`, without starting the process."""
    tokens: int = 0
    """That were trained on, prompts and completions."""
    peak_memory: int = 0
    """Bytes: of the GPU, or resident."""
    curves: list[dict[str, float]] = []  # noqa: RUF012 - a default of a record, never changed
    """Rows that were logged, each with `step`."""
    completions: list[dict[str, Any]] = []  # noqa: RUF012
    """`prompt`, `reference`, `policy`, and `judged`: 1.0 where the policy's is the better one, 0.5, or 0.0."""


class Estimate(NamedTuple):
    """A number, and its 95 % interval."""

    value: float
    low: float
    high: float


class RunSummary(NamedTuple):
    """A run, with its measures on the held-out pairs; intervals by bootstrap over prompts."""

    result: Result
    measures: dict[str, Estimate]


class ArmSummary(NamedTuple):
    """The runs that differ in their seed alone: means over seeds, with t intervals; of one seed, the run's own."""

    name: str
    """As a run's, without the seed."""
    axes: dict[str, str]
    loss: str
    seeds: list[int]
    measures: dict[str, Estimate]


class Comparison(NamedTuple):
    """Two arms on the same pairs: the paired difference, by bootstrap over prompts."""

    measure: str
    arm: str
    other: str
    difference: Estimate
    p: float
    p_holm: float
    """Corrected for all comparisons of this measure (Holm 1979)."""


class Summary(NamedTuple):
    """All that reports say; made from the table of pairs and the results alone."""

    runs: Sequence[RunSummary]
    failed: Sequence[Result]
    arms: Sequence[ArmSummary]
    comparisons: Sequence[Comparison]
    losses: Sequence[str]
    """Names of the losses that every run was measured by: `loss/NAME` among the measures."""
    margins: Mapping[str, Mapping[str, Any]]
    """Of each arm: `edges` and `counts` of a histogram of its margins, nats."""
    pairs: int
    prompts: int


class Layout(NamedTuple):
    """Where an ablation writes."""

    root: Path

    @property
    def asked(self) -> Path:
        """What was asked, so that the same command goes on, and another is refused."""
        return self.root / "ablation.json"

    @property
    def cache(self) -> Path:
        """The reference's log-probs, for all runs."""
        return self.root / "reference-cache"

    def run(self, name: str) -> Path:
        """Folder of a run: `config.yaml`, checkpoints, `adapter`, `result.json`, `pairs.parquet`."""
        return self.root / "runs" / name
