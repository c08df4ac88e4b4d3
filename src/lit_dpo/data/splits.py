"""The splits of a run: a table each, or a stream of the training data, made when they are first needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_dpo.data.encode import PromptEncoder
from lit_dpo.data.mixture import weighted_sources
from lit_dpo.data.preparing import Preparation
from lit_dpo.data.reports import Ask, check_lists, check_tokens, warn
from lit_dpo.data.sources import Source
from lit_dpo.data.stream import PromptStream
from lit_dpo.data.table import PromptTable
from lit_dpo.errors import DataError

_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class Making(NamedTuple):
    """How splits are made.

    Attributes:
        preparation: of any of them.
        encoder: of its prompts and completions.
        val_split: the part of the training prompts that is held out.
        seed: of that part, and of a stream's order.
        shuffle_buffer: of a stream. None: the training data are a table.
    """

    preparation: Preparation
    encoder: PromptEncoder
    val_split: float
    seed: int
    shuffle_buffer: int | None


class Splits:
    """The data of a run, by split.

    Args:
        sources: of `train`, `val`, `test` and `predict`, or of several sets `val/NAME`; None where there is none.

    Attributes:
        tables: that are made; None for a split without data.
        stream: of the training data, in place of a table.
        parts: of each row of the training data the number of its part of a mixture.
    """

    def __init__(self, sources: Mapping[str, Source | None]) -> None:
        self.sources = sources
        self.forget()

    def forget(self) -> None:
        """Make all of them anew, when they are needed again."""
        self.tables: dict[str, PromptTable | None] = {}
        self.stream: PromptStream | None = None
        self.parts: NDArray[np.int64] = np.zeros(0, np.int64)

    def sets(self, split: str) -> list[str]:
        """Name a split's sets: itself, or `val/NAME` for each."""
        return [name for name in self.sources if name.startswith(f"{split}/")] or [split]

    def of_stage(self, stage: str) -> list[str]:
        """Name all sets that a stage needs."""
        return [one for split in _OF_STAGE[stage] for one in self.sets(split)]

    def table(self, split: str) -> PromptTable:
        """Return the table of a split.

        Raises:
            DataError: if it has none.
        """
        table = self.tables.get(split)
        if table is None:
            raise DataError(f"Expected `{split}` data but there are none: set `--data.{split}`.")
        return table

    def rows(self, split: str) -> PromptTable | PromptStream:
        """Return the table of a split, or the stream of the training data."""
        return self.stream if split == "train" and self.stream is not None else self.table(split)

    @property
    def made(self) -> dict[str, PromptTable]:
        """The tables that there are."""
        return {split: table for split, table in self.tables.items() if table is not None}

    @property
    def all(self) -> dict[str, PromptTable | PromptStream]:
        """The tables that there are, and the stream."""
        return {**self.made, **({} if self.stream is None else {"train": self.stream})}

    # --- making ----------------------------------------------------------------------------------------------------

    def make(self, stage: str, making: Making) -> None:
        """Have what a stage needs, and say which prompts validation shares with training.

        Raises:
            DataError: for whatever is wrong with the data.
        """
        missing = [split for split in self.of_stage(stage) if split not in self.tables]
        for split in missing:
            if split not in self.tables:  # making `train` may make `val`
                self._make(split, making)
        if missing and stage == "fit":
            for line in self._leaks():
                warn(line)

    def _make(self, split: str, making: Making) -> None:
        if split == "train" or (split == "val" and self.sources["val"] is None and making.val_split):
            self.tables |= self._of_train(making)
        elif split == "predict":
            self.tables["predict"] = self._of_predict(making)
        else:
            source = self.sources[split]
            self.tables[split] = None if source is None else self._table(split, source, making)

    def _of_train(self, making: Making) -> dict[str, PromptTable | None]:
        source = self.sources["train"]
        if source is None:
            raise DataError("Expected training data but `train` is not set: name a file with `--data.train`.")
        if making.shuffle_buffer is not None:
            self.stream = making.preparation.stream(source, making.encoder, making.shuffle_buffer, making.seed)
            return {"train": None}
        table = self._table("train", source, making)
        if self.sources.get("val") is not None or self.sets("val") != ["val"] or not making.val_split:
            return {"train": table}
        train, val = table.hold_out(making.val_split, making.seed)
        rank_zero_info(f"train: {train.summary}; val: {val.summary} (val_split={making.val_split}, by prompt)")
        return {"train": train, "val": val}

    def _of_predict(self, making: Making) -> PromptTable:
        found = {name: self.sources[name] for name in ("predict", "test", "val") if self.sources.get(name) is not None}
        if not found and making.val_split and self.sources["train"] is not None:
            rank_zero_info("predict: no `predict` data are set, so those of `val_split` are used")
            held_out = self._of_train(making)["val"]
            assert held_out is not None
            return held_out
        split = next(iter(found), None)
        if split is None:
            raise DataError(
                "Expected data to predict but none of `predict`, `test`, `val` is one set: use `--data.predict`."
            )
        if split != "predict":
            rank_zero_info(f"predict: no `predict` data are set, so those of `{split}` are used")
        return self._table(split, found[split], making)

    def _table(self, split: str, source: Any, making: Making) -> PromptTable:
        table, parts = making.preparation.table(split, source, making.encoder)
        if split == "train":
            self.parts = parts
        return table

    def _leaks(self) -> Iterator[str]:
        train = self.tables.get("train")
        if train is None:
            if any(self.tables.get(split) for split in self.sets("val")):
                rank_zero_info("val: whether prompts are in train too is not known, for train is streamed")
            return
        for split in self.sets("val"):
            val = self.tables.get(split)
            leaked = 0 if val is None else int(np.isin(val.prompt_keys, train.prompt_keys).sum())
            if val is not None and leaked:
                said = f"{split}: {leaked} of {val.size} {val.unit} have a prompt that is in train too"
                yield f"{said}; validation looks too good"

    # --- checks by a model -----------------------------------------------------------------------------------------

    def check_tokens(self, vocabulary: int, context: int | None, made_for: int | None, model: str) -> None:
        """See that a model can read all of them; see `PreferenceDataModule.check_tokens`."""
        if self.stream is not None:
            self.stream.check_tokens(vocabulary, context, model)
        for split, table in self.made.items():
            check_tokens(split, table, vocabulary, context, made_for, model)

    def check_lists(self, ask: Ask) -> None:
        """Let a loss over lists see what is compared; see `PreferenceDataModule.check_lists`."""
        if self.stream is not None:
            self.stream.check_lists(ask)
        for split, table in self.made.items():
            if not table.holds_pairs:
                check_lists(split, table, ask)


def by_name(split: str, source: Source | Mapping[str, Source] | None) -> dict[str, Source | None]:
    """Name a split's sources: by its own name, or several by `split/NAME`.

    Raises:
        DataError: for names that cannot be part of a metric's name, or weights.
    """
    if weighted_sources(source) is not None:
        raise DataError(f"Expected sets by name for `{split}` but got weights: a mixture is for `train` alone.")
    if not isinstance(source, Mapping) or hasattr(source, "column_names"):  # a `DatasetDict` has splits, not sets
        return {split: source}
    if not source or not all(isinstance(name, str) and name and "/" not in name for name in source):
        raise DataError(f"Expected names without `/` for the sets of `{split}` but got {list(source)}.")
    return {f"{split}/{name}": one for name, one in source.items()}
