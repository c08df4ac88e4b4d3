"""The rows of a run's training data, by the comparisons that were made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lit_dpo.data.batch import places
from lit_dpo.data.formats import Message, Preference, Ranking, Rankings, Triples
from lit_dpo.data.mixture import weighted_sources
from lit_dpo.errors import DataError
from lit_dpo.tools.audit.dynamics import Numbers

if TYPE_CHECKING:
    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.data.table import PromptTable

_AT_ONCE = 256


class Said(NamedTuple):
    """What a comparison says.

    Attributes:
        source: file or hub id.
        row: number in there, from 0.
        place: both, in words.
        prompt: text or messages.
        chosen: text or messages; of a row with many completions decoded from what is trained on.
        rejected: likewise.
    """

    source: str
    row: int
    place: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]


class Weighted(NamedTuple):
    """The data with weights.

    Attributes:
        files: rows of each file.
        left_out: rows that no layout with a weight has: whose completions hold turns of the user, for instance.
    """

    files: list[list[dict[str, Any]]]
    left_out: int


class Rows:
    """The training rows of a run.

    Args:
        data: set up for `fit`, as a table.
    """

    def __init__(self, data: PreferenceDataModule) -> None:
        self.table: PromptTable = data.tables["train"]
        self.tokenizer = data.loaded_tokenizer
        self.source = data.sources["train"]
        self._decoded: dict[tuple[int, int, int], tuple[str, str]] = {}

    def knows(self, index: int) -> bool:
        """Whether there is a row of this number."""
        return 0 <= index < sum(len(source.rows) for source in self.table.sources)

    def of_stream(self, index: Numbers, stream: PreferenceDataModule) -> Numbers:
        """Return the numbers that rows of a stream have in the table: a stream counts those of its sources in turn.

        Args:
            index: row numbers of the stream.
            stream: of which they are.

        Raises:
            DataError: where a stream has other sources than a table, or rows that hold several examples.
        """
        sources = self.table.sources
        firsts = [f"{source.name}, row 0 (from 0)" for source in sources]
        second = f"{sources[0].name}, row 1 (from 0)"
        said = [stream.place("train", number) for number in range(len(sources) + 1)]
        if said != [*firsts, second] or any(source.numbers is not None for source in sources):
            raise DataError(
                "Expected rows that a table numbers as the stream did, to know which they are: audit a run without "
                "`streaming`."
            )
        inside, number = np.divmod(index.astype(np.int64), len(sources))
        starts = np.cumsum([0, *(len(source.rows) for source in sources[:-1])])
        return np.asarray(starts[number] + inside)

    def decode(self, wanted: Mapping[tuple[int, int, int], Any]) -> None:
        """Have the texts of some comparisons of rows with many completions, each by index and places."""
        if self.table.holds_pairs or not wanted:
            return
        for first in range(0, self.table.size, _AT_ONCE):
            batch = self.table.batch(range(first, min(first + _AT_ONCE, self.table.size)))
            keys = np.concatenate([batch.indices.numpy()[:, None], batch.comparisons.numpy()], 1).tolist()
            ends = _ends_of_completions(batch)
            for key, both in zip(map(tuple, keys), places(batch).tolist(), strict=True):
                if key in wanted:
                    ids = [batch.input_ids[0, slice(*ends[place])].tolist() for place in both]
                    chosen, rejected = (self.tokenizer.decode(one, skip_special_tokens=True) for one in ids)
                    self._decoded[key] = chosen, rejected

    def said(self, index: int, chosen: int, rejected: int) -> Said:
        """Read a comparison."""
        number, inside = self.table.find(index)
        source = self.table.sources[number]
        found = self.table.preference(index)
        sides = (found.chosen, found.rejected) if isinstance(found, Preference) else ("", "")
        sides = self._decoded.get((index, chosen, rejected), sides)
        return Said(source.name, source.number(inside), source.place(inside), found.prompt, *sides)

    # --- the data with weights -------------------------------------------------------------------------------------

    def why_not_weighted(self) -> str:
        """Why no file with weights can be written of these data; empty if it can."""
        kinds = {type(row) for _, row in self._read()}
        if kinds - {Preference} and (kinds - {Ranking} or self._ranked() is None):
            return "its rows are compared in ways that no one layout has"
        if weighted_sources(self.source) is not None and len(self.table.sources) != len(self._shares()):
            return "the parts of its mixture are of several files each"
        return ""

    def weighted(self, of_rows: Mapping[int, float]) -> Weighted:
        """Make the rows of each file that is to be written: one, or one for each part of a mixture.

        Args:
            of_rows: weights by row number; 1 for all others. They multiply a weight that a row has.
        """
        files: list[list[dict[str, Any]]] = [[] for _ in range(len(self._shares()) or 1)]
        format = Triples() if (ranked := self._ranked()) is None else Rankings(**_values_of(ranked))
        left_out = 0
        for index, row in self._read():
            written = _of_pair(row) if isinstance(row, Preference) else _of_ranking(row)
            written["weight"] = float(written.get("weight", 1.0)) * of_rows.get(index, 1.0)
            try:
                format.read(written)
            except DataError:
                left_out += 1
            else:
                files[self.table.find(index)[0] if len(files) > 1 else 0].append(written)
        return Weighted(files, left_out)

    def options(self, files: list[str]) -> list[str]:
        """Name the options of `lit-dpo fit` that train on them.

        Args:
            files: as they were written.
        """
        train = files[0]
        if shares := self._shares():
            train = "{" + ", ".join(f'"{file}": {share}' for file, share in zip(files, shares, strict=True)) + "}"
        ranked = self._ranked()
        found = ["--data.train", train, "--data.format", "Rankings" if ranked else "Triples"]
        if ranked == "ranks":
            found += ["--data.format.scores", "null", "--data.format.ranks", "ranks"]
        named = [name for name in self.table.columns if name != "weight" and not (ranked and name == "score_margin")]
        for name in [name for name in named if name in ("score_margin", "probability") and not ranked]:
            found += [f"--data.format.{name}", name]
            named.remove(name)
        named = [name for name in named if name != "probability"]  # of ties, which the ranks say
        if named:
            found += ["--data.format.numeric_columns", f"[{', '.join(named)}]"]
        return [*found, "--data.format.weight", "weight"]

    def _shares(self) -> list[float]:
        return [share for _, share in weighted_sources(self.source) or ()]

    def _read(self) -> Iterator[tuple[int, Preference | Ranking]]:
        """Read the rows that are used, in their order, with their numbers."""
        bad = {row for row, _ in self.table.bad}
        for index in range(sum(len(source.rows) for source in self.table.sources)):
            if index not in bad:
                try:
                    yield index, self.table.preference(index)
                except LookupError:  # a row that prefers nothing
                    continue

    def _ranked(self) -> str | None:
        """Name what tells rows of many completions apart: `scores` or `ranks`; None for pairs, or where it differs."""
        found = {_values(row) for _, row in self._read()}
        return found.pop() if len(found) == 1 else None


def row_weights(index: Numbers, weights: Numbers) -> dict[int, float]:
    """Weights by row number: of a row with several comparisons their mean."""
    found, of = np.unique(index, return_inverse=True)
    means = np.bincount(of.ravel(), weights) / np.bincount(of.ravel())
    return dict(zip(found.tolist(), means.tolist(), strict=True))


def _values(row: Preference | Ranking) -> str | None:
    if isinstance(row, Preference) or (row.scores is None and row.ranks is None):
        return None
    return "scores" if row.scores is not None else "ranks"


def _of_pair(row: Preference) -> dict[str, Any]:
    return {
        "prompt": row.prompt,
        "chosen": row.chosen,
        "rejected": row.rejected,
        **row.columns,
        **_template(row),
    }


def _of_ranking(row: Ranking) -> dict[str, Any]:
    values = {"scores": row.scores} if row.scores is not None else {"ranks": row.ranks}
    return {"prompt": row.prompt, "completions": list(row.completions), **values, **row.columns, **_template(row)}


def _values_of(ranked: str) -> dict[str, Any]:
    """Name the columns of `Rankings` that say what is better."""
    return {"scores": None, "ranks": "ranks"} if ranked == "ranks" else {}


def _template(row: Preference | Ranking) -> dict[str, Any]:
    """Columns that give a row its arguments of the chat template again."""
    arguments = dict(row.template)
    tools = {"tools": arguments.pop("tools")} if "tools" in arguments else {}
    return {**tools, **({"chat_template_kwargs": arguments} if arguments else {})}


def _ends_of_completions(batch: Any) -> list[tuple[int, int]]:
    """Where each completion begins and ends in a batch's row."""
    lengths = iter(batch.completion_lengths.tolist())
    found, start = [], 0
    for prompt, count in zip(batch.prompt_lengths.tolist(), batch.completions_per_prompt.tolist(), strict=True):
        start += prompt
        for _ in range(count):
            end = start + next(lengths)
            found.append((start, end))
            start = end
    return found
