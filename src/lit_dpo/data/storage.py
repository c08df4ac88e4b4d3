"""How examples lie in an Arrow table: what its columns are, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_dpo.data.batch import EncodedPrompt
from lit_dpo.data.truncation import Dropped, Fitted
from lit_dpo.seals import is_sealed, seal
from lit_dpo.writing import refusals

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset, Features
    from pyarrow import Table

EXAMPLE = ("prompt_ids", "completion_ids", "comparisons")
ROW_NUMBERS = "row_numbers"
_NOTHING = Fitted(EncodedPrompt([], [], []), [])


def features(columns: Sequence[str], **more: Any) -> Features:
    """Return what a table of examples holds."""
    from datasets import Features, List, Value

    ids, number = List(Value("int32")), Value("int32")
    return Features(
        {
            "prompt_ids": ids,
            "completion_ids": List(ids),
            "comparisons": ids,  # chosen and rejected in turn
            "length": number,
            "prompt_key": Value("int64"),
            "identical": number,
            "lost": number,
            "ranked": number,
            "dropped": Value("string"),
            "bad": number,
            "remarks": List(Value("string")),
            **{stored(name): List(Value("float64")) for name in columns},
            **more,
        }
    )


def mapped(table: Dataset, function: Callable[..., Any], file: Path | None, **options: Any) -> Dataset:
    """Return what a function makes of batches of rows, from a file where it is there as it was written.

    Args:
        table: of the rows.
        function: of a batch.
        file: where the result is, or goes; named by all that it depends on. None: it is made each time.
        options: of `Dataset.map`.

    Raises:
        TrainingError: if the disk refuses.
    """
    if file is None:
        return table.map(function, batched=True, **options)
    there = is_sealed([file], file.stem)
    with refusals(file):  # another process may read the file that is replaced: it keeps the one that it has opened
        found = table.map(function, batched=True, cache_file_name=str(file), load_from_cache_file=there, **options)
    if not there and file.is_file():
        seal([file], file.stem)
    return found


def laid_out(results: Sequence[Fitted | Dropped], identical: Sequence[bool | None]) -> dict[str, list[Any]]:
    """Return the columns of what was encoded; a dropped example has no ids.

    Args:
        results: of encoding.
        identical: whether the two completions of a pair are the same; None where ids tell.
    """
    fitted = [_NOTHING if isinstance(result, Dropped) else result for result in results]
    prompts = [one.prompt for one in fitted]
    return {
        "prompt_ids": [one.prompt for one in prompts],
        "completion_ids": [one.completions for one in prompts],
        "comparisons": [[place for pair in one.comparisons for place in pair] for one in prompts],
        "length": [len(one.prompt) + sum(map(len, one.completions)) for one in prompts],
        "identical": [
            _equals(one) if said is None else int(said) for one, said in zip(prompts, identical, strict=True)
        ],
        "lost": [one.lost for one in fitted],
        "dropped": [result.reason if isinstance(result, Dropped) else "" for result in results],
        "bad": [int(isinstance(result, Dropped) and result.fatal) for result in results],
        "remarks": [list(one.remarks) for one in fitted],
    }


def _equals(one: EncodedPrompt) -> int:
    """Count the comparisons of equal completions."""
    return sum(one.completions[chosen] == one.completions[rejected] for chosen, rejected in one.comparisons)


def stored(name: str) -> str:
    """Say what a column of numbers is called among the encoded facts."""
    return f"column {name}"


def examples_of(cells: Table) -> list[EncodedPrompt]:
    """Return the examples of some rows."""
    parts = (
        lists(cells.column("prompt_ids")),
        lists(cells.column("completion_ids")),
        lists(cells.column("comparisons")),
    )
    return [
        EncodedPrompt(prompt, completions, list(zip(flat[::2], flat[1::2], strict=True)))
        for prompt, completions, flat in zip(*parts, strict=True)
    ]


def lists(column: Any) -> list[list[Any]]:
    """Return the lists in an Arrow column; many times as fast as Arrow's own way, which makes an object per number."""
    return [one for chunk in chunks_of(column) for one in _contents(chunk)]


def ragged(values: NDArray[Any], counts: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[Any]:
    """Pick rows of a table that is stored as one array.

    Args:
        values: of all rows, one after another.
        counts: how many values each row has.
        rows: to pick.

    Example:
        >>> ragged(np.array([1, 2, 3, 4, 5, 6]), np.array([1, 2, 3]), np.array([0, 2]))
        array([1, 4, 5, 6])
    """
    if len(rows) == len(counts):  # ascending, so these are all
        return values
    picked, starts = counts[rows], counts.cumsum() - counts
    places = np.repeat(starts[rows] - (picked.cumsum() - picked), picked) + np.arange(picked.sum())
    found: NDArray[Any] = values[places]
    return found


def values_of(column: Any) -> NDArray[Any]:
    """Return what the lists in an Arrow column hold, one after another."""
    found = [inner_of(chunk).to_numpy() for chunk in chunks_of(column)]
    values: NDArray[Any] = found[0] if len(found) == 1 else np.concatenate(found)
    return values


def inner_of(chunk: Any) -> Any:
    """Return the array of what the lists in an Arrow array hold."""
    first, last = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
    return chunk.values.slice(first, last - first)


def counts_of(column: Any) -> NDArray[np.int64]:
    """Return how many values each list in an Arrow column holds."""
    found = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks_of(column)]
    counts = found[0] if len(found) == 1 else np.concatenate(found)
    return counts.astype(np.int64)


def chunks_of(column: Any) -> list[Any]:
    """Return the arrays of an Arrow column, which may be one itself."""
    found: list[Any] = column.chunks if hasattr(column, "chunks") else [column]
    return found


def _contents(chunk: Any) -> list[Any]:
    if not hasattr(chunk, "offsets"):
        found: list[Any] = chunk.to_numpy().tolist()
        return found
    ends = (chunk.offsets.to_numpy() - chunk.offsets[0].as_py()).tolist()
    inside = _contents(inner_of(chunk))
    return [inside[start:end] for start, end in pairwise(ends)]
